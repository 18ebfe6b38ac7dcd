//! The long way, for any packet: optional headers, headers outside of the linear part, sums over a
//! payload, broken packets.
//!
//! Its steps are global functions, by the BTF of the object: the verifier walks each once, for any
//! arguments, instead of once more for every state in which another part of the program calls it.
//! Arguments and results are scalars for that reason. They do not call each other, because their stacks
//! add up, and they are few, because a call costs more than many steps where the processor needs a
//! defence against speculation. The object for old kernels has no BTF, and those know nothing of the
//! kind: there each call is walked in its place.

use aya_ebpf::bindings::__sk_buff;
use vxcsum_common::layout::{Action, Report};
use vxcsum_common::outer::{self, Beyond, Location, Outer};
use vxcsum_common::verdict::{self, Answer, AnswerKind, Watch as _};
use vxcsum_common::{Cut, Policy, Verdict, inner};

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

/// Examines and counts a packet.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn examine(ctx: *mut __sk_buff) -> u64 {
    let (Some(known), Some(counters)) = (Known::get(), counters()) else { return 0 };
    let at = known.forget(reaching(ctx, || locate(ctx)));
    let told = match at {
        CUT | NOT_VXLAN => {
            counters.not_vxlan += 1;
            return 0;
        }
        CUT_VXLAN => Told::of(Verdict::Unverified),
        at => judge(ctx, known, at),
    };
    let told = Told::from_bits(known.forget(told.to_bits()));
    // An event tells enough.
    if known.config().following != 0 && at != CUT_VXLAN && told.report != Report::Emitted as u64 {
        reaching(ctx, || followed(ctx, at, told.verdict as u32, told.action as u32));
    }
    count(&Skb::new(ctx, known), told.verdict, told.report, counters);
    0
}

/// What was found of a packet, and what was done with it, by their codes.
struct Told {
    verdict: u64,
    report: u64,
    action: u64,
}

impl Told {
    /// Nothing was done.
    #[inline(always)]
    const fn of(verdict: Verdict) -> Self {
        Self { verdict: verdict as u64, report: Report::None as u64, action: Action::None as u64 }
    }

    /// In one register.
    #[inline(always)]
    const fn to_bits(&self) -> u64 {
        self.verdict | self.report << 8 | self.action << 16
    }

    /// From one register.
    #[inline(always)]
    const fn from_bits(bits: u64) -> Self {
        Self { verdict: bits & 0xff, report: bits >> 8 & 0xff, action: bits >> 16 & 0xff }
    }
}

/// Gives a VXLAN packet its verdict.
#[inline(always)]
fn judge(ctx: *mut __sk_buff, known: Known, at: u64) -> Told {
    let location = Location::from_bits(at);
    let skb = Skb::new(ctx, known);
    // Neither can fail: these headers were just seen, and the port with them.
    let Ok(outer) = Outer::read(&skb, location) else { return Told::of(Verdict::Unverified) };
    let Some(port) = known.port(outer.destination_port) else {
        return Told::of(Verdict::Unverified);
    };
    let policy = known.policy(port, outer.vni, location.is_ipv6);
    // As a number: of a `Policy`, the verifier would go on with each there is.
    let policy = known.forget(policy as u64) as u32;
    let answer = match verdict::by_outer(&skb, &outer) {
        Some(answer) => answer.to_bits(),
        None => match reaching(ctx, || by_inner(ctx, at, policy)) {
            CUT => Answer::of(AnswerKind::Unknown).to_bits(),
            answer => answer,
        },
    };
    let answer = known.forget(answer);
    match Answer::from_bits(answer).verdict(Policy::from_u8(policy as u8)) {
        Some(verdict) => {
            port.learn(verdict, location.is_ipv6);
            Told::of(verdict)
        }
        None => Told::from_bits(broken(ctx, at, answer, policy)),
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

/// Explains, reports and fixes a broken packet. Returns [`Told`] in a register.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn broken(ctx: *mut __sk_buff, at: u64, answer: u64, policy: u32) -> u64 {
    let (Some(known), Some(counters)) = (Known::get(), counters()) else { return 0 };
    let skb = Skb::new(ctx, known);
    let Ok(outer) = Outer::read(&skb, Location::from_bits(at)) else { return 0 };
    let policy = Policy::from_u8(policy as u8);
    let finding = verdict::explain(&skb, &known, &outer, policy, Answer::from_bits(answer));
    let (report, action) = if finding.verdict.is_broken() {
        broken::handle(&skb, &outer, &finding, known, counters)
    } else {
        (Report::None, Action::None as u8)
    };
    let verdict = finding.verdict as u64;
    known.forget(Told { verdict, report: report as u64, action: action.into() }.to_bits())
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
