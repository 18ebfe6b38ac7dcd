//! What a kernel with the ring buffer offers.

use core::mem::MaybeUninit;
use core::ptr::{self, addr_of};

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::{bpf_ktime_get_boot_ns, bpf_probe_read_kernel};
use aya_ebpf::macros::map;
use aya_ebpf::maps::RingBuf;
use aya_ebpf::maps::ring_buf::RingBufEntry;
use aya_ebpf::programs::TcContext;
use aya_log_ebpf::debug;
use vxcsum_common::layout::{Config, Event, SkbLayout};
use vxcsum_common::{Finding, Offload};

use crate::skb::OFFSET_MASK;

/// Broken packets, for user space; the loader sets its size.
#[map]
static EVENTS: RingBuf = RingBuf::with_byte_size(256 * 1024, 0);

/// Where the running kernel keeps the offload state. The loader fills it in before the program is
/// loaded; while it is not known, the verifier finds the reads unreachable and leaves them out, so
/// that a kernel that does not allow them (lockdown) loads the rest.
#[unsafe(no_mangle)]
static SKB_LAYOUT: SkbLayout = SkbLayout {
    ip_summed: 0,
    ip_summed_shift: 0,
    csum_start: 0,
    csum_offset: 0,
    head: 0,
    data: 0,
    is_known: 0,
};

/// What the program works by: global data, which is there without being looked up.
#[unsafe(no_mangle)]
#[unsafe(link_section = ".data.config")]
static mut CONFIG: MaybeUninit<Config> = MaybeUninit::zeroed();

/// Never `None`.
#[inline(always)]
#[expect(clippy::unnecessary_wraps, reason = "as on old kernels")]
pub(crate) const fn config() -> Option<*mut Config> {
    Some((&raw mut CONFIG).cast())
}

/// A constant that only the loader knows.
macro_rules! skb_layout {
    ($field:ident) => {
        // SAFETY: the address of a live, aligned static. Volatile, because its value in the object
        // is not the one that it is loaded with.
        usize::from(unsafe { ptr::read_volatile(addr_of!(SKB_LAYOUT.$field)) })
    };
}

/// The verifier knows of a number that comes back from the stack what it knew before.
pub(crate) const KNOWS_SPILLED_NUMBERS: bool = true;

/// There is room for a short way over inner IPv6.
pub(crate) const HAS_ROOM: bool = true;

/// An event on its way to user space: room in the ring buffer, which must be sent.
pub(crate) struct Draft(RingBufEntry<Event>);

impl Draft {
    /// `None` where there is no room.
    #[inline(always)]
    pub(crate) fn new() -> Option<Self> {
        EVENTS.reserve(0).map(Self)
    }

    /// To be filled in as a whole.
    #[inline(always)]
    pub(crate) fn as_mut_ptr(&mut self) -> *mut Event {
        self.0.as_mut_ptr()
    }

    /// Whether there was room.
    #[inline(always)]
    pub(crate) fn send(self, _: *mut __sk_buff) -> bool {
        self.0.submit(0);
        true
    }
}

/// `CLOCK_BOOTTIME`.
#[inline(always)]
pub(crate) fn now_ns() -> u64 {
    // SAFETY: the helper only reads a clock.
    unsafe { bpf_ktime_get_boot_ns() }
}

/// How many packets the skb is on the wire; 0 where that is not known.
#[inline(always)]
pub(crate) fn segments(skb: &__sk_buff, _: &Config) -> u32 {
    skb.gso_segs.max(1)
}

/// Bytes on the wire, with the headers of every segment (`qdisc_pkt_len_init` in net/core/dev.c).
#[inline(always)]
pub(crate) fn wire_len(skb: &__sk_buff) -> u32 {
    skb.wire_len
}

/// `skb->ip_summed`.
#[inline(always)]
pub(crate) fn ip_summed(skb: *mut __sk_buff) -> u8 {
    if skb_layout!(is_known) == 0 {
        return Event::IP_SUMMED_UNKNOWN;
    }
    read_ip_summed(skb).unwrap_or(Event::IP_SUMMED_UNKNOWN)
}

/// What is left for the NIC to sum.
#[inline(always)]
pub(crate) fn offload(skb: *mut __sk_buff) -> Offload {
    /// `CHECKSUM_PARTIAL` (include/linux/skbuff.h).
    const PARTIAL: u8 = 3;
    match ip_summed(skb) {
        Event::IP_SUMMED_UNKNOWN => Offload::Unknown,
        PARTIAL => match open_sum(skb) {
            NO_SUM => Offload::Unknown,
            place => Offload::Partial {
                start: (place >> 16) as usize & OFFSET_MASK,
                field: place as usize & OFFSET_MASK,
            },
        },
        _ => Offload::Complete,
    }
}

/// Writes to the debug log (aya-log).
#[inline(always)]
pub(crate) fn log(skb: *mut __sk_buff, finding: &Finding) {
    debug!(
        TcContext::new(skb),
        "verdict {} check {:x} expected {:x}",
        finding.verdict as u8,
        finding.check,
        finding.expected
    );
}

/// Reads a field of `struct sk_buff`; the context pointer of a TC program is its address.
#[inline(always)]
fn read_field<T>(skb: *const __sk_buff, offset: usize) -> Option<T> {
    // SAFETY: the helper reads any address without faulting; `T` is an integer.
    unsafe { bpf_probe_read_kernel(skb.cast::<u8>().wrapping_add(offset).cast::<T>()) }.ok()
}

#[inline(always)]
fn read_ip_summed(skb: *const __sk_buff) -> Option<u8> {
    let byte = read_field::<u8>(skb, skb_layout!(ip_summed))?;
    Some((byte >> (skb_layout!(ip_summed_shift) & 7)) & 3)
}

/// Result of [`open_sum`]: it cannot be read.
const NO_SUM: u64 = u64::MAX;

/// Where the sum starts that the NIC is to make (upper 16 bits), and where it goes (lower 16
/// bits): offsets from the start of the packet.
///
/// A global function, see [`crate::thorough`]: the verifier walks it even where nothing calls it.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn open_sum(skb: *mut __sk_buff) -> u64 {
    if skb_layout!(is_known) == 0 {
        return NO_SUM;
    }
    let place = || {
        let head = read_field::<u64>(skb, skb_layout!(head))?;
        let data = read_field::<u64>(skb, skb_layout!(data))?;
        // Counted from `head`, which lies before the packet (skb_checksum_start_offset).
        let csum_start = u64::from(read_field::<u16>(skb, skb_layout!(csum_start))?);
        let csum_offset = u64::from(read_field::<u16>(skb, skb_layout!(csum_offset))?);
        let start = csum_start.wrapping_sub(data.wrapping_sub(head)) & 0xffff;
        Some(start << 16 | ((start + csum_offset) & 0xffff))
    };
    place().unwrap_or(NO_SUM)
}
