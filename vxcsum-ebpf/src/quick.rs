//! The short way, for most packets: no optional header, and a checksum field that is none, pending, or
//! right by the headers alone. It is the same parser and the same verdict as in [`crate::thorough`],
//! compiled once more, where the compiler knows the place of every header.
//!
//! All of it is inlined into the program: a call costs more than many of its steps.

use vxcsum_common::layout::{Counters, Report};
use vxcsum_common::outer::{self, Location, Outer};
use vxcsum_common::verdict::{self, AnswerKind};
use vxcsum_common::{Cut, Policy, Verdict};

use crate::count::add;
use crate::kernel;
use crate::maps::{Known, Watched};
use crate::skb::{Plain, Skb};

/// The least that a VXLAN packet has of outer headers, in bytes: Ethernet, IPv4, UDP, VXLAN.
const OUTER_LEN: usize = 14 + 20 + 8 + 8;
/// The least that one has with an inner checksum: with Ethernet, IPv4 and UDP inside.
const INNER_LEN: usize = OUTER_LEN + 14 + 20 + 8;

/// It takes more to know what to count a packet as.
pub(crate) enum Stuck {
    /// Not even whether it is VXLAN is known.
    Anywhere,
    /// It is VXLAN.
    At(Location),
}

impl From<Cut> for Stuck {
    #[inline(always)]
    fn from(_: Cut) -> Self {
        Self::Anywhere
    }
}

/// Counts a packet.
#[inline(always)]
pub(crate) fn examine(skb: Skb, known: Known, counters: &mut Counters) -> Result<(), Stuck> {
    if known.config().is_raw_ip != 0 {
        return Err(Stuck::Anywhere);
    }
    let packet = Plain::<OUTER_LEN>::of(skb)?;
    // One after the other, so that each is compiled for its own places.
    match outer::ethertype(&packet, 0)? {
        (outer::ETHERTYPE_IPV4, at) => ip(packet, known, outer::ETHERTYPE_IPV4, at, counters),
        (outer::ETHERTYPE_IPV6, _) if !kernel::HAS_ROOM => Err(Stuck::Anywhere),
        (outer::ETHERTYPE_IPV6, at) => ip(packet, known, outer::ETHERTYPE_IPV6, at, counters),
        _ => not_vxlan(counters),
    }
}

#[inline(always)]
fn ip(
    packet: Plain<OUTER_LEN>,
    known: Known,
    ethertype: u16,
    at: usize,
    counters: &mut Counters,
) -> Result<(), Stuck> {
    match outer::locate_in(&packet, &known, ethertype, at) {
        Ok(None) => not_vxlan(counters),
        Ok(Some((at, port))) => {
            vxlan(packet, known, at, port, counters).map_err(|Cut| Stuck::At(at))
        }
        Err(_) => Err(Stuck::Anywhere),
    }
}

#[inline(always)]
fn vxlan(
    packet: Plain<OUTER_LEN>,
    known: Known,
    at: Location,
    port: Watched,
    counters: &mut Counters,
) -> Result<(), Cut> {
    if known.config().following != 0 {
        return Err(Cut);
    }
    let outer = Outer::read(&packet, at)?;
    let kind = match verdict::by_outer(&packet, &outer) {
        Some(answer) => answer.kind,
        None if is_right(packet, &outer)? => AnswerKind::Right,
        None => return Err(Cut),
    };
    let mut count = |verdict| {
        port.learn(verdict, at.is_ipv6);
        add(&packet.skb, &mut counters.tallies[verdict as usize][Report::None as usize]);
        Ok(())
    };
    match kind {
        // Ports of several devices take a look into a map, which is not for here.
        AnswerKind::Zero if port.port.by_vni != 0 => Err(Cut),
        AnswerKind::Zero => match port.port.policy(at.is_ipv6) {
            Policy::Sum => count(Verdict::Missing),
            Policy::Zero | Policy::Unknown => count(Verdict::Zero),
        },
        AnswerKind::Pending => count(Verdict::OffloadPending),
        AnswerKind::Right => count(Verdict::Valid),
        AnswerKind::Unknown | AnswerKind::Wrong | AnswerKind::LikelyWrong => Err(Cut),
    }
}

#[inline(always)]
fn is_right(packet: Plain<OUTER_LEN>, outer: &Outer) -> Result<bool, Cut> {
    let packet = Plain::<INNER_LEN>::of(packet.skb)?;
    match outer::ethertype(&packet, outer.inner())? {
        (outer::ETHERTYPE_IPV4, at) => {
            verdict::is_right_by_lco(&packet, outer, outer::ETHERTYPE_IPV4, at)
        }
        (outer::ETHERTYPE_IPV6, at) if kernel::HAS_ROOM => {
            verdict::is_right_by_lco(&packet, outer, outer::ETHERTYPE_IPV6, at)
        }
        _ => Ok(false),
    }
}

#[inline(always)]
#[expect(clippy::unnecessary_wraps, reason = "what the functions above return")]
fn not_vxlan(counters: &mut Counters) -> Result<(), Stuck> {
    counters.not_vxlan += 1;
    Ok(())
}
