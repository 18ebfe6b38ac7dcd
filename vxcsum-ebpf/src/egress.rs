//! The TC egress program: finds VXLAN packets with a broken outer UDP checksum, counts, reports
//! and may fix them.
//!
//! It never decides about a packet's way: every path returns `TC_ACT_UNSPEC`, so that the programs
//! after it run.
use aya_ebpf::bindings::{__sk_buff, TC_ACT_UNSPEC};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use vxcsum_common::layout::{Action, Counters, Port, Report};
use vxcsum_common::outer::{self, Beyond, Location, Outer};
use vxcsum_common::verdict::{self, Answer, AnswerKind, Watch as _};
use vxcsum_common::{Cut, Packet as _, Policy, Proof, Verdict, inner};

use crate::broken;
use crate::follow;
use crate::maps::{COUNTERS, Known};
use crate::opaque::opaque;
use crate::skb::Skb;

/// Runs for every packet that leaves through the interface.
#[classifier]
#[expect(clippy::needless_pass_by_value, reason = "the signature is aya's")]
fn vxcsum_egress(ctx: TcContext) -> i32 {
    examine(ctx.skb.skb);
    TC_ACT_UNSPEC
}

/// Examines and counts a packet. Without its maps, which always exist, it does nothing.
#[inline(always)]
fn examine(ctx: *mut __sk_buff) -> Option<()> {
    let known = Known::get()?;
    let counters = counters()?;
    let mut skb = Skb::new(ctx, known);
    let mut found = outer::locate(&skb, &known);
    if found.is_err() && skb.is_partly_linear() {
        skb = skb.with_linear_headers(known);
        found = located(locate(ctx), &skb, known);
    }
    match found {
        Ok(None) | Err(Beyond::Outer) => counters.not_vxlan += 1,
        Ok(Some((at, port))) => judge(skb, known, at, port, counters),
        Err(Beyond::Vxlan) => {
            count(&skb, Verdict::Unverified as u64, Report::None as u64, counters);
        }
    }
    Some(())
}

/// Gives a VXLAN packet its verdict.
#[inline(always)]
fn judge(skb: Skb, known: Known, at: Location, port: *mut Port, counters: &mut Counters) {
    let at = known.oblivion.pass(at, Location::to_bits, Location::from_bits);
    // Cannot fail: `locate` has just seen these headers.
    let Ok(outer) = Outer::read(&skb, at) else {
        return count(&skb, Verdict::Unverified as u64, Report::None as u64, counters);
    };
    let policy = known.policy(port, outer.vni, at.is_ipv6);
    let policy = known.oblivion.pass(policy, |it| it as u64, |bits| Policy::from_u8(bits as u8));
    let answer = match verdict::by_outer(&skb, &outer) {
        Some(answer) => answer,
        None => answer_by_inner(skb, known, at, policy),
    };
    let answer = known.oblivion.pass(answer, Answer::to_bits, Answer::from_bits);
    match answer.verdict(policy) {
        Some(verdict) => {
            if known.config().following != 0 {
                follow(skb, known, at, verdict);
            }
            count(&skb, verdict as u64, Report::None as u64, counters);
            learn(verdict, at.is_ipv6, port);
        }
        None => _ = broken(skb.ctx, at.to_bits(), answer.to_bits(), policy as u32),
    }
}

/// Tells of a packet that is not broken, where its inner flow is followed.
#[inline(always)]
fn follow(skb: Skb, known: Known, at: Location, verdict: Verdict) {
    let told = followed(skb.ctx, at.to_bits(), verdict as u32, Action::None as u32);
    // Looked at anew, so that what the verifier knows of it so far does not matter meanwhile.
    let skb = Skb::new(skb.ctx, known);
    if told == CUT && skb.is_partly_linear() {
        skb.with_linear_headers(known);
        followed(skb.ctx, at.to_bits(), verdict as u32, Action::None as u32);
    }
}

#[inline(always)]
fn answer_by_inner(skb: Skb, known: Known, at: Location, policy: Policy) -> Answer {
    let mut answer = inner(skb.ctx, at.to_bits(), policy as u32);
    // Anew, as in `follow`.
    let skb = Skb::new(skb.ctx, known);
    if answer == CUT && skb.is_partly_linear() {
        skb.with_linear_headers(known);
        answer = inner(skb.ctx, at.to_bits(), policy as u32);
    }
    if answer == CUT { Answer::of(AnswerKind::Unknown) } else { Answer::from_bits(answer) }
}

// What follows are global functions, by the BTF of the object: the verifier walks each once, for any
// arguments, instead of once more for every state in which another part of the program calls it.
// Arguments and results are scalars for that reason. The object for old kernels has no BTF, and
// those know nothing of the kind: there each call is walked in its place.

/// Result of [`locate`] and [`inner`]: a header is out of reach.
const CUT: u64 = u64::MAX;
/// Result of [`locate`]: a header is out of reach in a packet to a watched port.
const CUT_VXLAN: u64 = CUT - 1;
/// Result of [`locate`].
const NOT_VXLAN: u64 = CUT - 2;

/// [`outer::locate`] in a register.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn locate(ctx: *mut __sk_buff) -> u64 {
    let Some(known) = Known::get() else { return NOT_VXLAN };
    match outer::locate(&Skb::new(ctx, known), &known) {
        Ok(None) => NOT_VXLAN,
        Ok(Some((at, _))) => at.to_bits(),
        Err(Beyond::Outer) => CUT,
        Err(Beyond::Vxlan) => CUT_VXLAN,
    }
}

/// Unpacks what [`locate`] returned.
#[inline(always)]
fn located(bits: u64, skb: &Skb, known: Known) -> Result<Option<(Location, *mut Port)>, Beyond> {
    match bits {
        CUT => Err(Beyond::Outer),
        CUT_VXLAN => Err(Beyond::Vxlan),
        NOT_VXLAN => Ok(None),
        bits => {
            let at = Location::from_bits(bits);
            let udp = skb.header::<4>(at.udp).map_err(Beyond::vxlan)?;
            Ok(known.port(udp.be16::<2>()).map(|port| (at, port)))
        }
    }
}

/// [`verdict::by_inner`] in a register.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn inner(ctx: *mut __sk_buff, at: u64, policy: u32) -> u64 {
    let Some(known) = Known::get() else { return CUT };
    let skb = Skb::new(ctx, known);
    let answer = Outer::read(&skb, Location::from_bits(at))
        .and_then(|outer| verdict::by_inner(&skb, &outer, Policy::from_u8(policy as u8)));
    answer.map_or(CUT, Answer::to_bits)
}

/// Explains, counts, reports and fixes a broken packet.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn broken(ctx: *mut __sk_buff, at: u64, answer: u64, policy: u32) -> u64 {
    let (Some(known), Some(counters)) = (Known::get(), counters()) else { return 0 };
    let skb = Skb::new(ctx, known);
    let Ok(outer) = Outer::read(&skb, Location::from_bits(at)) else { return 0 };
    let policy = Policy::from_u8(policy as u8);
    let mut finding = verdict::explain(&skb, &known, &outer, policy, Answer::from_bits(answer));
    let oblivion = known.oblivion;
    finding.verdict = oblivion.pass(finding.verdict, |it| it as u64, verdict_of);
    finding.proof = oblivion.pass(finding.proof, |it| it as u64, |it| Proof::from_u8(it as u8));
    finding.source_port_before_nat =
        oblivion.pass(finding.source_port_before_nat, u64::from, |port| port as u16);
    let (report, action) = if finding.verdict.is_broken() {
        broken::handle(&skb, &outer, &finding, known.config(), counters)
    } else {
        (Report::None, Action::None)
    };
    let (report, action) = (oblivion.take(report as u64), oblivion.take(action as u64));
    // An event tells enough.
    if known.config().following != 0 && report != Report::Emitted as u64 {
        followed(ctx, at, finding.verdict as u32, action as u32);
    }
    count(&skb, finding.verdict as u64, report, counters);
    0
}

/// [`follow::tell`] of a packet without an event.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn followed(ctx: *mut __sk_buff, at: u64, verdict: u32, action: u32) -> u64 {
    let Some(known) = Known::get() else { return CUT };
    let skb = Skb::new(ctx, known);
    let segment = Outer::read(&skb, Location::from_bits(at))
        .and_then(|outer| inner::tcp_segment(&skb, &outer).map(|segment| (outer, segment)));
    match segment {
        Ok((outer, Some(segment))) => {
            follow::tell(&skb, &outer, segment, verdict as u8, action as u8);
            0
        }
        Ok((_, None)) => 0,
        Err(Cut) => CUT,
    }
}

#[inline(always)]
fn counters() -> Option<&'static mut Counters> {
    // SAFETY: nothing else on this CPU runs this program meanwhile, and user space only reads.
    // The references that are made of it are used one after the other.
    COUNTERS.get_ptr_mut(0).map(|counters| unsafe { &mut *counters })
}

/// The verdict of a code that was one.
#[inline(always)]
const fn verdict_of(code: u64) -> Verdict {
    // Not by a look into a table, which would be global data.
    match code {
        0 => Verdict::Zero,
        1 => Verdict::Missing,
        2 => Verdict::OffloadPending,
        3 => Verdict::Valid,
        4 => Verdict::MangledZero,
        5 => Verdict::StaleNat,
        6 => Verdict::Bad,
        _ => Verdict::Unverified,
    }
}

#[inline(always)]
fn count(skb: &Skb, verdict: u64, report: u64, counters: &mut Counters) {
    // There are eight verdicts and four reports, powers of two: the masks are for the verifier only.
    let by_report = &mut counters.tallies[opaque(verdict as usize) & (Verdict::ALL.len() - 1)];
    let tally = &mut by_report[opaque(report as usize) & (Report::ALL.len() - 1)];
    tally.skbs += 1;
    tally.further_segments += u64::from(skb.segments() - 1);
    tally.bytes += u64::from(skb.wire_len());
}

/// Remembers what a sender of unknown policy sends.
#[inline(always)]
fn learn(verdict: Verdict, is_ipv6: bool, port: *mut Port) {
    // SAFETY: it points into the map value of `CONFIG`, which lives as long as the program. CPUs
    // race for it: each sets bits that are never taken back, so the next packet mends what is lost.
    let port = unsafe { &mut *port };
    let (policy, seen) = if is_ipv6 {
        (port.policy_ipv6, &mut port.seen_ipv6)
    } else {
        (port.policy_ipv4, &mut port.seen_ipv4)
    };
    let lesson = Port::lesson(verdict);
    if policy == Policy::Unknown as u8 && *seen & lesson != lesson {
        *seen |= lesson;
    }
}
