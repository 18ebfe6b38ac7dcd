//! What a kernel without the ring buffer offers: 4.19 and all later ones.

use core::ptr;

use aya_ebpf::bindings::{__sk_buff, BPF_F_CURRENT_CPU};
use aya_ebpf::helpers::{bpf_ktime_get_ns, bpf_perf_event_output};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, PerCpuArray, PerfEventArray};
use vxcsum_common::layout::{Config, Event};
use vxcsum_common::{Finding, Offload};

/// Broken packets, for user space; one buffer a CPU.
#[map]
static EVENTS: PerfEventArray<Event> = PerfEventArray::new(0);

/// Where an event is put together, because it is too long for the stack.
#[map]
static DRAFT: PerCpuArray<Event> = PerCpuArray::with_max_entries(1, 0);

/// What the program works by; one value.
#[map]
static CONFIG: Array<Config> = Array::with_max_entries(1, 0);

/// Never `None`, because the map always exists.
#[inline(always)]
pub(crate) fn config() -> Option<*mut Config> {
    CONFIG.get_ptr_mut(0)
}

/// Verifiers before 5.3 know nothing of a number that comes back from the stack.
pub(crate) const KNOWS_SPILLED_NUMBERS: bool = false;

/// Kernels before 5.2 take no more than 4096 instructions: inner IPv6 goes the long way.
pub(crate) const HAS_ROOM: bool = false;

/// An event on its way to user space.
pub(crate) struct Draft(*mut Event);

impl Draft {
    /// Never `None`, because the map always exists.
    #[inline(always)]
    pub(crate) fn new() -> Option<Self> {
        DRAFT.get_ptr_mut(0).map(Self)
    }

    /// To be filled in as a whole.
    #[inline(always)]
    pub(crate) fn as_mut_ptr(&mut self) -> *mut Event {
        self.0
    }

    /// Whether there was room. Kernels before 5.1 say so even where there was none: user space
    /// learns of it from the buffer.
    #[inline(always)]
    pub(crate) fn send(self, skb: *mut __sk_buff) -> bool {
        // Not by aya's `output`, which does not tell how it went.
        // SAFETY: the map is live, and so is the event, a map value of this CPU.
        let outcome = unsafe {
            bpf_perf_event_output(
                skb.cast(),
                ptr::from_ref(&EVENTS).cast_mut().cast(),
                BPF_F_CURRENT_CPU,
                self.0.cast(),
                size_of::<Event>() as u64,
            )
        };
        outcome == 0
    }
}

/// `CLOCK_MONOTONIC`; user space makes `CLOCK_BOOTTIME` of it.
#[inline(always)]
pub(crate) fn now_ns() -> u64 {
    // SAFETY: the helper only reads a clock.
    unsafe { bpf_ktime_get_ns() }
}

/// How many packets the skb is on the wire; 0 where that is not known: what is longer than the
/// interface takes is still to be cut, and `gso_segs` cannot be read.
#[inline(always)]
pub(crate) fn segments(skb: &__sk_buff, config: &Config) -> u32 {
    u32::from(skb.len <= config.max_frame_len)
}

/// Bytes as the stack hands them down.
#[inline(always)]
pub(crate) fn wire_len(skb: &__sk_buff) -> u32 {
    skb.len
}

/// Cannot be read.
#[inline(always)]
pub(crate) fn ip_summed(_: *mut __sk_buff) -> u8 {
    Event::IP_SUMMED_UNKNOWN
}

/// Cannot be read.
#[inline(always)]
pub(crate) fn offload(_: *mut __sk_buff) -> Offload {
    Offload::Unknown
}

/// The debug log (aya-log) needs the ring buffer.
#[inline(always)]
pub(crate) fn log(_: *mut __sk_buff, _: &Finding) {}
