//! The program of the receiver's side: sees each packet that this node drops for its UDP checksum,
//! counts VXLAN packets among them by their sender, and hands them to user space.
//!
//! It hangs on a tracepoint that every freed packet passes, so the drop reason comes first: all
//! others cost one comparison. The kernel does not run it while it runs already on the same CPU
//! (`__bpf_trace_run` in `kernel/trace/bpf_trace.c`, 6.2): drops of a softirq that interrupts that
//! comparison are not seen.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]
#![allow(
    clippy::inline_always,
    reason = "what is not inlined is walked by the verifier once for every caller"
)]

mod limit;
mod object;
#[expect(dead_code, reason = "the other program needs all of it")]
mod opaque;

use core::arch::asm;
use core::ptr::{addr_of, addr_of_mut, read_volatile};

use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::helpers::{
    bpf_get_current_task, bpf_ktime_get_boot_ns, bpf_probe_read_kernel, generated,
};
use aya_ebpf::macros::{map, raw_tracepoint};
use aya_ebpf::maps::{Array, HashMap, PerCpuArray, RingBuf};
use aya_ebpf::programs::RawTracePointContext;
use vxcsum_common::layout::{Config, Report};
use vxcsum_common::outer::{self, Beyond, Extensions, Location, Outer};
use vxcsum_common::packet::Header;
use vxcsum_common::receive::{Counters, Dropped, Drops, Kernel, MAX_DROPPED_LEN, MAX_PEERS, Peer};
use vxcsum_common::{Cut, Device, Offload, Packet, Policy, Sum, Watch, inner};

use crate::opaque::opaque;

/// Filled in by the loader.
#[unsafe(no_mangle)]
static KERNEL: Kernel = Kernel {
    reason: 0,
    netns: 0,
    skb_len: 0,
    skb_data_len: 0,
    skb_head: 0,
    skb_data: 0,
    skb_mac_header: 0,
    skb_network_header: 0,
    skb_mark: 0,
    skb_dev: 0,
    dev_name: 0,
    dev_net: 0,
    net_inum: 0,
    task_nsproxy: 0,
    nsproxy_net: 0,
    reserved: 0,
};

/// A constant that only the loader knows.
macro_rules! kernel {
    ($field:ident) => {
        // SAFETY: the address of a live, aligned static. Volatile, because its value in the object
        // is not the one that it is loaded with.
        unsafe { read_volatile(addr_of!(KERNEL.$field)) }
    };
}

/// Ports and rate limit; one value. The same layout as on egress, of which the rest is not used.
#[map]
static CONFIG: Array<Config> = Array::with_max_entries(1, 0);

/// What is counted of all peers together; one value a CPU.
#[map]
static COUNTERS: PerCpuArray<Counters> = PerCpuArray::with_max_entries(1, 0);

/// Drops by outer source address. No entry is ever removed, so no count is lost.
#[map]
static PEERS: HashMap<Peer, Drops> = HashMap::with_max_entries(MAX_PEERS, 0);

/// Dropped packets, for user space; the loader sets its size.
#[map]
static EVENTS: RingBuf = RingBuf::with_byte_size(256 * 1024, 0);

/// Where a record is put together.
#[map]
static RECORD: PerCpuArray<Record> = PerCpuArray::with_max_entries(1, 0);

/// As it goes through the ring buffer, less the bytes that are not used.
#[repr(C)]
struct Record {
    dropped: Dropped,
    bytes: [u8; MAX_DROPPED_LEN],
}

/// Bytes in which all headers are looked for.
const HEADERS_LEN: u64 = 512;
/// Reach of an offset in [`Record::bytes`]: tells the verifier that it cannot run away.
const OFFSET_MASK: usize = 0x1fff;

/// Runs for every packet that is freed other than by being consumed (`kfree_skb` in
/// include/trace/events/skb.h).
#[raw_tracepoint]
#[expect(clippy::needless_pass_by_value, reason = "the signature is aya's")]
fn vxcsum_receive(ctx: RawTracePointContext) -> i32 {
    if ctx.arg::<u32>(2) == kernel!(reason) {
        examine(Skb(ctx.arg(0)));
    }
    0
}

/// Counts and reports a packet that is dropped for its UDP checksum, in the namespace that is
/// watched. Without its maps, which always exist, it does nothing.
#[inline(always)]
fn examine(skb: Skb) -> Option<()> {
    let device = skb.device();
    if netns(device)? != kernel!(netns) {
        return None;
    }
    let record = RECORD.get_ptr_mut(0)?;
    let config = CONFIG.get_ptr(0)?;
    // SAFETY: a map value lives as long as the program; user space replaces it as a whole.
    let config = unsafe { &*config };
    let counters = COUNTERS.get_ptr_mut(0)?;
    // SAFETY: as above.
    let bytes = unsafe { addr_of_mut!((*record).bytes) };

    let place = skb.place().unwrap_or_default();
    let linear_len = copy(bytes, place, HEADERS_LEN);
    let packet = Captured { bytes, linear_len, len: place.len };
    let (flow, peer) = match outer::locate(&packet, &Watched(config)) {
        Ok(Some((at, ()))) => (flow(at.to_bits(), linear_len), packet.peer()),
        // To a watched port, but its VXLAN header is out of reach.
        Err(Beyond::Vxlan) => (0, packet.peer()),
        Ok(None) | Err(Beyond::Outer) => {
            // SAFETY: nothing else counts on this CPU meanwhile: the kernel does not nest a program
            // of this kind (6.2), and drops before that come from softirqs, which do not nest.
            unsafe { (*counters).not_vxlan += 1 };
            return None;
        }
    };
    let report = if limit::allows(config, || flow) {
        emit(skb, device, place, record)
    } else {
        Report::Suppressed
    };
    count(peer, report, counters);
    Some(())
}

// What follows are global functions: the verifier walks each once, for any arguments, instead of
// once more for every state in which another part of the program calls it.

/// Result of [`extension_headers`]: a header is out of reach.
const CUT: u64 = u64::MAX;

/// [`inner::flow`] of the packet in the record, 0 where it is out of reach.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn flow(at: u64, linear_len: u64) -> u64 {
    let Some(packet) = Captured::get(linear_len) else { return 0 };
    let flow = Outer::read(&packet, Location::from_bits(at))
        .and_then(|outer| inner::flow(&packet, &outer));
    flow.unwrap_or_default()
}

/// [`Extensions::read`] of the packet in the record.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn extension_headers(protocol: u32, offset: u64, linear_len: u64) -> u64 {
    let Some(packet) = Captured::get(linear_len) else { return CUT };
    Extensions::read(&packet, protocol as u8, offset as usize).map_or(CUT, Extensions::to_bits)
}

/// Sends a packet to user space.
#[inline(always)]
fn emit(skb: Skb, device: Option<u64>, place: Place, record: *mut Record) -> Report {
    // SAFETY: a map value lives as long as the program, and is this CPU's own.
    let (out, bytes) = unsafe { (&mut (*record).dropped, addr_of_mut!((*record).bytes)) };
    let len = copy(bytes, place, MAX_DROPPED_LEN as u64);
    // SAFETY: the helper only reads a clock.
    out.boot_ns = unsafe { bpf_ktime_get_boot_ns() };
    out.len = place.len as u32;
    out.snapshot_len = len as u32;
    out.mark = skb.read(kernel!(skb_mark)).unwrap_or_default();
    out.link_len = place.link_len;
    out.interface = device.and_then(|device| read(device, kernel!(dev_name))).unwrap_or_default();
    let record_len = size_of::<Dropped>() as u64 + len;
    // SAFETY: `copy` has filled at most the whole of the record, and the map is a ring buffer.
    let outcome = unsafe {
        generated::bpf_ringbuf_output(
            addr_of!(EVENTS).cast_mut().cast(),
            record.cast(),
            record_len,
            0,
        )
    };
    if outcome == 0 { Report::Emitted } else { Report::Lost }
}

#[inline(always)]
fn count(peer: Peer, report: Report, counters: *mut Counters) {
    let of_peer = || {
        if let Some(drops) = PEERS.get_ptr_mut(peer) {
            return Some(drops);
        }
        // Another CPU may have been quicker, which is as good; or there is no room.
        let _ = PEERS.insert(peer, Drops::default(), u64::from(BPF_NOEXIST));
        PEERS.get_ptr_mut(peer)
    };
    // SAFETY: a map value lives as long as the program, and `report` is within the array.
    unsafe {
        match of_peer() {
            // Of all CPUs.
            Some(drops) => {
                // `core` has no atomics for a machine that cannot compare and swap on all kernels.
                let drops = addr_of_mut!((*drops).0).cast::<u64>().add(report as usize);
                asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) drops, in(reg) 1_u64);
            }
            None => *addr_of_mut!((*counters).others.0).cast::<u64>().add(report as usize) += 1,
        }
    }
}

/// The ports of the configuration.
struct Watched<'a>(&'a Config);

impl Watch for Watched<'_> {
    type Port = ();

    #[inline(always)]
    fn port(&self, port: u16) -> Option<()> {
        self.0.ports.get(port).map(|_| ())
    }

    /// The verdict is user space's.
    #[inline(always)]
    fn policy(&self, (): (), _vni: u32, _is_ipv6: bool) -> Policy {
        Policy::Unknown
    }

    #[inline(always)]
    fn device(&self, _port: u16, _vni: u32) -> Device {
        Device::UNKNOWN
    }
}

/// `struct sk_buff *`
#[derive(Clone, Copy)]
struct Skb(u64);

/// Where the linear part of a packet lies, from its outer IP header on.
#[derive(Clone, Copy, Default)]
struct Place {
    start: u64,
    linear_len: u64,
    /// With what is not linear.
    len: u64,
    link_len: u32,
}

impl Skb {
    #[inline(always)]
    fn read<T>(self, offset: u16) -> Option<T> {
        read(self.0, offset)
    }

    /// The device that it was received on. While a packet waits for a program to read it from its
    /// socket, something else is in the place of the pointer (`udp_set_dev_scratch` in
    /// net/ipv4/udp.c).
    #[inline(always)]
    fn device(self) -> Option<u64> {
        let device: u64 = self.read(kernel!(skb_dev))?;
        // Kernel addresses have the highest bit set, and what else is there has not: its highest
        // byte says whether the checksum need not be verified.
        (device >> 63 != 0).then_some(device)
    }

    #[inline(always)]
    fn place(self) -> Option<Place> {
        /// Longer than any link header.
        const MAX_LINK_LEN: u16 = 64;
        let head: u64 = self.read(kernel!(skb_head))?;
        let data: u64 = self.read(kernel!(skb_data))?;
        let len: u32 = self.read(kernel!(skb_len))?;
        let data_len: u32 = self.read(kernel!(skb_data_len))?;
        let network: u16 = self.read(kernel!(skb_network_header))?;
        let mac: u16 = self.read(kernel!(skb_mac_header))?;
        let start = head + u64::from(network);
        // `skb->data` has come to the UDP header or beyond by now, and `len` counts from there.
        let end = data + u64::from(len.wrapping_sub(data_len));
        let linear_len = end.checked_sub(start)?;
        let link_len = network.wrapping_sub(mac);
        Some(Place {
            start,
            linear_len,
            len: linear_len + u64::from(data_len),
            link_len: if link_len > MAX_LINK_LEN { 0 } else { u32::from(link_len) },
        })
    }
}

/// The network namespace of a device, or else that of the program that reads from its socket.
#[inline(always)]
fn netns(device: Option<u64>) -> Option<u32> {
    let net: u64 = if let Some(device) = device {
        read(device, kernel!(dev_net))?
    } else {
        // SAFETY: the helper only says who runs.
        let task = unsafe { bpf_get_current_task() };
        let nsproxy: u64 = read(task, kernel!(task_nsproxy))?;
        read(nsproxy, kernel!(nsproxy_net))?
    };
    read(net, kernel!(net_inum))
}

/// Reads a field of a struct of the kernel.
#[inline(always)]
fn read<T>(address: u64, offset: u16) -> Option<T> {
    let address = address.wrapping_add(u64::from(offset));
    // SAFETY: the helper reads any address without faulting; `T` is an integer or bytes.
    unsafe { bpf_probe_read_kernel(address as *const T) }.ok()
}

/// Copies the linear part of a packet, `max` bytes of it at the most. Returns how many.
#[inline(always)]
fn copy(bytes: *mut [u8; MAX_DROPPED_LEN], place: Place, max: u64) -> u64 {
    let len = place.linear_len.min(max);
    // SAFETY: there is room for `max` bytes, and the helper reads any address without faulting.
    let outcome = unsafe {
        generated::bpf_probe_read_kernel(bytes.cast(), len as u32, place.start as *const _)
    };
    if outcome == 0 { len } else { 0 }
}

/// A packet in the record, from its outer IP header on.
#[derive(Clone, Copy)]
struct Captured {
    bytes: *const [u8; MAX_DROPPED_LEN],
    linear_len: u64,
    len: u64,
}

impl Captured {
    /// The packet in the record, of which only headers are asked for.
    #[inline(always)]
    fn get(linear_len: u64) -> Option<Self> {
        let record = RECORD.get_ptr(0)?;
        // SAFETY: a map value lives as long as the program.
        let bytes = unsafe { addr_of!((*record).bytes) };
        Some(Self { bytes, linear_len, len: linear_len })
    }

    /// The outer source address of a packet that has an IP header.
    #[inline(always)]
    fn peer(&self) -> Peer {
        const IPV4_MAPPED: [u8; 16] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0];
        // SAFETY: within the record, whose bytes are initialized, as any map value's.
        let bytes = unsafe { &*self.bytes };
        let mut peer = IPV4_MAPPED;
        if bytes[0] >> 4 == 6 {
            peer.copy_from_slice(&bytes[8..24]);
        } else {
            peer[12..].copy_from_slice(&bytes[12..16]);
        }
        Peer(peer)
    }
}

impl Packet for Captured {
    #[inline(always)]
    fn len(&self) -> usize {
        self.len as usize
    }

    #[inline(always)]
    fn header<const N: usize>(&self, offset: usize) -> Result<Header<'_, N>, Cut> {
        const { assert!(OFFSET_MASK + N <= MAX_DROPPED_LEN) }
        let offset = offset & OFFSET_MASK;
        if (offset + N) as u64 > self.linear_len {
            return Err(Cut);
        }
        // SAFETY: within the record, whose bytes are initialized, as any map value's.
        Ok(Header::new(unsafe { &*self.bytes.cast::<u8>().add(offset).cast::<[u8; N]>() }))
    }

    #[inline(always)]
    fn forget(&self, offset: usize) -> usize {
        opaque(offset) & OFFSET_MASK
    }

    #[inline(always)]
    fn extension_headers(&self, protocol: u8, offset: usize) -> Result<Extensions, Cut> {
        match extension_headers(u32::from(protocol), offset as u64, self.linear_len) {
            CUT => Err(Cut),
            bits => Ok(Extensions::from_bits(bits)),
        }
    }

    /// Nothing is summed here.
    #[inline(always)]
    fn sum(&self, _offset: usize, _len: usize) -> Option<Sum> {
        None
    }

    #[inline(always)]
    fn is_raw_ip(&self) -> bool {
        true
    }

    #[inline(always)]
    fn is_gso(&self) -> bool {
        false
    }

    #[inline(always)]
    fn offload(&self) -> Offload {
        Offload::Unknown
    }

    #[inline(always)]
    fn flow_hash(&self) -> u32 {
        0
    }

    #[inline(always)]
    fn arithmetic_proves_nat(&self) -> bool {
        false
    }
}
