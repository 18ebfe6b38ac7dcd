//! What happens to a broken packet: fixed where that is asked for, and reported.

use aya_ebpf::helpers::{bpf_skb_load_bytes, bpf_skb_store_bytes};
use vxcsum_common::fix::remedy;
use vxcsum_common::layout::{Action, Counters, Event, FixMode, Report, SNAPSHOT_LEN};
use vxcsum_common::outer::Outer;
use vxcsum_common::verdict::Finding;
use vxcsum_common::{Packet as _, inner};

use crate::kernel::{self, Draft};
use crate::limit;
use crate::maps::Known;
use crate::opaque::between_1_and;
use crate::skb::Skb;

/// Offset of the checksum field in a UDP header, in bytes (RFC 768).
const CHECK_OFFSET: usize = 6;

/// Reports a broken packet as it was, then fixes it. Returns what came of it, the code of an
/// [`Action`] with it.
#[inline(always)]
pub(crate) fn handle(
    skb: &Skb,
    outer: &Outer,
    finding: &Finding,
    known: Known,
    counters: &mut Counters,
) -> (Report, u8) {
    kernel::log(skb.ctx, finding);
    let config = known.config();
    let remedy = remedy(FixMode::from_u8(config.fix), config.fix_unproven != 0, finding);
    // As a number: of an `Action`, the verifier would go on with each there is.
    let remedy = Fix { action: known.forget(remedy.action as u64) as u8, check: remedy.check };
    if !limit::allows(config, || inner::flow(skb, outer).unwrap_or_default()) {
        return (Report::Suppressed, apply(skb, finding, remedy, counters));
    }
    let Some(mut draft) = Draft::new() else {
        return (Report::Lost, apply(skb, finding, remedy, counters));
    };
    let out = draft.as_mut_ptr();
    // SAFETY: `out` is valid for a whole `Event`.
    unsafe { write(out, skb, finding) };
    let action = apply(skb, finding, remedy, counters);
    // SAFETY: as above.
    unsafe {
        (*out).is_followed = 0;
        (*out).held_back = 0;
        (*out).action = action;
    }
    (if draft.send(skb.ctx) { Report::Emitted } else { Report::Lost }, action)
}

/// Writes what an event tells of a packet: every field but `action`, `is_followed` and `held_back`.
///
/// # Safety
///
/// `out` is valid for a whole `Event`.
#[inline(always)]
pub(crate) unsafe fn write(out: *mut Event, skb: &Skb, finding: &Finding) {
    // SAFETY: promised by the caller.
    unsafe {
        (*out).boot_ns = kernel::now_ns();
        (*out).len = skb.len() as u32;
        (*out).segments = skb.known_segments();
        (*out).mark = skb.mark();
        (*out).check = finding.check;
        (*out).expected = finding.expected;
        (*out).source_port_before_nat = finding.source_port_before_nat;
        (*out).snapshot_len = snapshot(skb, &raw mut (*out).snapshot);
        (*out).verdict = finding.verdict as u8;
        (*out).proof = finding.proof as u8;
        (*out).policy = finding.policy as u8;
        (*out).ip_summed = skb.ip_summed();
        (*out).reserved = [0; 2];
    }
}

/// Copies the start of the packet. Returns how many bytes.
#[inline(always)]
fn snapshot(skb: &Skb, out: *mut [u8; SNAPSHOT_LEN]) -> u16 {
    // A packet that was found broken is longer than its headers.
    let len = between_1_and::<SNAPSHOT_LEN>(skb.len().min(SNAPSHOT_LEN));
    // SAFETY: `out` has room for SNAPSHOT_LEN bytes, and `len` is at most that.
    match unsafe { bpf_skb_load_bytes(skb.ctx.cast(), 0, out.cast(), len as u32) } {
        0 => len as u16,
        _ => 0,
    }
}

/// A [`vxcsum_common::fix::Remedy`] with the code of its action.
#[derive(Clone, Copy)]
struct Fix {
    action: u8,
    check: u16,
}

/// Writes what the remedy says: two bytes and no others. Returns the code of what came of it.
#[inline(always)]
fn apply(skb: &Skb, finding: &Finding, remedy: Fix, counters: &mut Counters) -> u8 {
    if !Action::writes(remedy.action) {
        return remedy.action;
    }
    let check = remedy.check.to_be_bytes();
    // No flags: `skb->csum` belongs to received packets.
    // SAFETY: reads two bytes of a live local.
    let outcome = unsafe {
        bpf_skb_store_bytes(
            skb.ctx.cast(),
            (finding.udp + CHECK_OFFSET) as u32,
            check.as_ptr().cast(),
            2,
            0,
        )
    };
    if outcome != 0 {
        return Action::RefusedWriteFailed as u8;
    }
    let packets = u64::from(skb.segments());
    // Not one of the two by an offset that is chosen before: verifiers before 5.3 do not follow it
    // over the stack.
    let zeroed = if remedy.action == Action::Zeroed as u8 { packets } else { 0 };
    counters.zeroed += zeroed;
    counters.restored += packets - zeroed;
    remedy.action
}
