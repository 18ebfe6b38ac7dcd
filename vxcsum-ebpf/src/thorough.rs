//! The long way, for any packet: optional headers, headers outside of the linear part, sums over a
//! payload, broken packets.
//!
//! Its steps are global functions, by the BTF of the object: the verifier walks each once, for any
//! arguments, instead of once more for every state in which another part of the program calls it.
//! Arguments and results are scalars for that reason. They are called one after the other rather than
//! by each other, because their stacks add up. The object for old kernels has no BTF, and those know
//! nothing of the kind: there each call is walked in its place.

use aya_ebpf::bindings::__sk_buff;
use vxcsum_common::layout::{Action, Report};
use vxcsum_common::outer::{self, Beyond, Location, Outer};
use vxcsum_common::verdict::{self, Answer, AnswerKind, Watch as _};
use vxcsum_common::{Cut, Policy, Proof, Verdict, inner};

use crate::count::{count, counters};
use crate::maps::Known;
use crate::skb::Skb;
use crate::{broken, follow};

/// Instead of a result: a header is out of reach.
const CUT: u64 = u64::MAX;
/// The same, in a packet to a watched port.
const CUT_VXLAN: u64 = CUT - 1;
/// Result of [`locate`].
const NOT_VXLAN: u64 = CUT - 2;
/// Result of [`by_outer`]: [`by_inner`] is to be asked.
const OPEN: u64 = 1 << 63;
/// Where [`by_outer`] has the policy in its result, above an [`Answer`].
const POLICY_SHIFT: u32 = 32;

/// Examines and counts a packet.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn examine(ctx: *mut __sk_buff) -> u64 {
    let Some(known) = Known::get() else { return 0 };
    let take = |number| known.oblivion.take(number);
    match take(reaching(ctx, || locate(ctx))) {
        CUT | NOT_VXLAN => not_vxlan(),
        CUT_VXLAN => unverified(ctx),
        at => judge(ctx, at),
    }
}

/// Gives a VXLAN packet, found at this [`Location`], its verdict, and counts it.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn judge(ctx: *mut __sk_buff, at: u64) -> u64 {
    let Some(known) = Known::get() else { return 0 };
    let by_outer = known.oblivion.take(by_outer(ctx, at));
    let policy = (by_outer >> POLICY_SHIFT) as u8;
    let mut answer = by_outer;
    if answer & OPEN != 0 {
        answer = reaching(ctx, || by_inner(ctx, at, policy.into()));
        if answer == CUT {
            answer = Answer::of(AnswerKind::Unknown).to_bits();
        }
    }
    match Answer::from_bits(answer).verdict(Policy::from_u8(policy)) {
        Some(verdict) => settled(ctx, at, verdict as u32),
        None => broken(ctx, at, answer, policy.into()),
    }
}

/// Looks again with all headers in reach where one was not.
#[inline(always)]
fn reaching(ctx: *mut __sk_buff, look: impl Fn() -> u64) -> u64 {
    let found = look();
    if found >= CUT_VXLAN && Skb::make_linear(ctx) { look() } else { found }
}

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

/// [`verdict::by_outer`] in a register, with the policy of the sender.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn by_outer(ctx: *mut __sk_buff, at: u64) -> u64 {
    let Some(known) = Known::get() else { return 0 };
    let skb = Skb::new(ctx, known);
    // Cannot fail: `locate` has just seen these headers.
    let Ok(outer) = Outer::read(&skb, Location::from_bits(at)) else { return 0 };
    let policy = known
        .port(outer.destination_port)
        .map_or(Policy::Unknown, |port| known.policy(port, outer.vni, outer.at.is_ipv6));
    let answer = verdict::by_outer(&skb, &outer).map_or(OPEN, Answer::to_bits);
    answer | (policy as u64) << POLICY_SHIFT
}

/// [`verdict::by_inner`] in a register.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn by_inner(ctx: *mut __sk_buff, at: u64, policy: u32) -> u64 {
    let Some(known) = Known::get() else { return CUT };
    let skb = Skb::new(ctx, known);
    let answer = Outer::read(&skb, Location::from_bits(at))
        .and_then(|outer| verdict::by_inner(&skb, &outer, Policy::from_u8(policy as u8)));
    answer.map_or(CUT, Answer::to_bits)
}

#[inline(always)]
fn not_vxlan() -> u64 {
    if let Some(counters) = counters() {
        counters.not_vxlan += 1;
    }
    0
}

#[inline(always)]
fn unverified(ctx: *mut __sk_buff) -> u64 {
    if let (Some(known), Some(counters)) = (Known::get(), counters()) {
        let (verdict, report) = (Verdict::Unverified, Report::None);
        count(&Skb::new(ctx, known), verdict as u64, report as u64, counters);
    }
    0
}

/// Counts and learns from a packet that is not broken, and tells of it where its inner flow is
/// followed.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn settled(ctx: *mut __sk_buff, at: u64, verdict: u32) -> u64 {
    let (Some(known), Some(counters)) = (Known::get(), counters()) else { return 0 };
    if known.config().following != 0 {
        reaching(ctx, || followed(ctx, at, verdict, Action::None as u32));
    }
    let skb = Skb::new(ctx, known);
    count(&skb, verdict.into(), Report::None as u64, counters);
    let at = Location::from_bits(at);
    if let Ok(outer) = Outer::read(&skb, at)
        && let Some(port) = known.port(outer.destination_port)
    {
        port.learn(verdict_of(verdict.into()), at.is_ipv6);
    }
    0
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
