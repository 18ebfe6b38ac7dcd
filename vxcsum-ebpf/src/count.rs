//! Counting: each packet once, in one tally.

use vxcsum_common::Verdict;
use vxcsum_common::layout::{Counters, Report, Tally};

use crate::maps::COUNTERS;
use crate::opaque::opaque;
use crate::skb::Skb;

/// The counters of this CPU. Never `None`, because the map always exists.
#[inline(always)]
pub(crate) fn counters() -> Option<&'static mut Counters> {
    // SAFETY: nothing else on this CPU runs this program meanwhile, and user space only reads.
    // The references that are made of it are used one after the other.
    COUNTERS.get_ptr_mut(0).map(|counters| unsafe { &mut *counters })
}

/// Counts a packet by the codes of its verdict and report.
#[inline(always)]
pub(crate) fn count(skb: &Skb, verdict: u64, report: u64, counters: &mut Counters) {
    // There are eight verdicts and four reports, powers of two: the masks are for the verifier only.
    let by_report = &mut counters.tallies[opaque(verdict as usize) & (Verdict::ALL.len() - 1)];
    add(skb, &mut by_report[opaque(report as usize) & (Report::ALL.len() - 1)]);
}

/// Counts a packet in a tally.
#[inline(always)]
pub(crate) fn add(skb: &Skb, tally: &mut Tally) {
    tally.skbs += 1;
    let segments = skb.segments();
    if segments > 1 {
        tally.further_segments += u64::from(segments - 1);
    }
    tally.bytes += u64::from(skb.wire_len());
}
