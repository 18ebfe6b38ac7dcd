//! The rate limit of events: [`pay`], with what is paid for and reported in maps.

use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, LruHashMap};
use vxcsum_common::layout::{BURST_NS, Config, MAX_FLOWS};
use vxcsum_common::limit::pay;

/// When the events sent so far are paid for, in nanoseconds of `CLOCK_MONOTONIC`.
#[map]
static PAID_UNTIL: Array<u64> = Array::with_max_entries(1, 0);

/// Inner flows that were reported.
#[map]
static FLOWS: LruHashMap<u64, u8> = LruHashMap::with_max_entries(MAX_FLOWS, 0);

/// Whether an event may be sent, of the inner flow of this number. The first one of an inner flow may
/// still be when repeats may not.
///
/// CPUs race for the map value. Two that read the same one pay once for two events, so the limit is
/// exceeded by as many as there are CPUs at the most, and only at the same instant.
#[inline(always)]
pub(crate) fn allows(config: &Config, flow: impl FnOnce() -> u64) -> bool {
    let cost = u64::from(config.event_cost_ns);
    if cost == 0 {
        return true;
    }
    let Some(paid_until) = PAID_UNTIL.get_ptr_mut(0) else { return true };
    // SAFETY: the helper only reads a clock.
    let now = unsafe { bpf_ktime_get_ns() };
    // SAFETY: a map value lives as long as the program.
    let pay = |is_repeat| pay(unsafe { *paid_until }, now, cost, BURST_NS, is_repeat);
    // In a storm, not even something new may be sent, and nobody needs to know what it is.
    let Some(paid) = pay(false) else { return false };
    let flow = flow();
    let is_repeat = FLOWS.get_ptr(flow).is_some();
    if is_repeat && pay(true).is_none() {
        return false;
    }
    // SAFETY: as above.
    unsafe { *paid_until = paid };
    if !is_repeat {
        // Fails only without memory; the flow then stays new.
        let _ = FLOWS.insert(flow, 1, 0);
    }
    true
}
