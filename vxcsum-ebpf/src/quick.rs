//! The short way, for most packets: no optional header, and a checksum field that is none, pending, or
//! right by the headers alone. It is the same parser and the same verdict as in [`crate::thorough`],
//! compiled once more, where the compiler knows the place of every header.
//!
//! All of it is inlined into the program: a call costs more than many of its steps. The counters are
//! looked up last, so that nothing has to be kept over that.

use vxcsum_common::layout::Report;
use vxcsum_common::outer::{self, Location, Outer};
use vxcsum_common::verdict::{self, Answer, AnswerKind};
use vxcsum_common::{Cut, Policy, Verdict};

use crate::count::{add, counters};
use crate::kernel;
use crate::maps::{Known, Watched};
use crate::skb::{Plain, Skb};

/// The least that a VXLAN packet has of outer headers, in bytes: Ethernet, IPv4, UDP, VXLAN.
const OUTER_LEN: usize = 14 + 20 + 8 + 8;
/// With what has an inner checksum: Ethernet, IPv4, and TCP up to its checksum; or UDP with some data.
const INNER_LEN: usize = OUTER_LEN + 14 + 20 + 18;

/// Counts a packet. [`Cut`] where it takes more to know what as.
#[inline(always)]
pub(crate) fn examine(skb: Skb, known: Known) -> Result<(), Cut> {
    if known.config().is_raw_ip != 0 {
        return Err(Cut);
    }
    let packet = Plain::<OUTER_LEN>::of(skb)?;
    // One after the other, so that each is compiled for its own places.
    match outer::ethertype(&packet, 0)? {
        (outer::ETHERTYPE_IPV4, at) => ip(packet, known, outer::ETHERTYPE_IPV4, at),
        (outer::ETHERTYPE_IPV6, at) => ip(packet, known, outer::ETHERTYPE_IPV6, at),
        _ => not_vxlan(),
    }
}

#[inline(always)]
fn ip(packet: Plain<OUTER_LEN>, known: Known, ethertype: u16, at: usize) -> Result<(), Cut> {
    match outer::locate_in(&packet, &known, ethertype, at) {
        Ok(None) => not_vxlan(),
        // All of the location is constant then.
        Ok(Some((at, port))) if at.is_whole => {
            let at = Location { is_whole: true, ..at };
            vxlan(packet, known, at, port)
        }
        Ok(Some(_)) | Err(_) => Err(Cut),
    }
}

#[inline(always)]
fn vxlan(packet: Plain<OUTER_LEN>, known: Known, at: Location, port: Watched) -> Result<(), Cut> {
    if known.config().following != 0 {
        return Err(Cut);
    }
    let outer = Outer::read(&packet, at)?;
    let count = |verdict: Option<Verdict>| {
        // What is new of the sender is learned on the long way.
        let verdict = verdict.filter(|&it| port.has_learned(it, at.is_ipv6)).ok_or(Cut)?;
        if let Some(counters) = counters() {
            add(&packet.skb, &mut counters.tallies[verdict as usize][Report::None as usize]);
        }
        Ok(())
    };
    match verdict::by_outer(&packet, &outer) {
        Some(zero) if zero.kind as u8 == AnswerKind::Zero as u8 => match port.port.by_vni {
            0 => count(zero.verdict(port.port.policy(at.is_ipv6))),
            // Takes a look into a map, which is not for here.
            _ => Err(Cut),
        },
        // The policy makes no difference.
        Some(other) => count(other.verdict(Policy::Unknown)),
        None if is_right(packet, &outer)? => {
            count(Answer::of(AnswerKind::Right).verdict(Policy::Unknown))
        }
        None => Err(Cut),
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
fn not_vxlan() -> Result<(), Cut> {
    if let Some(counters) = counters() {
        counters.not_vxlan += 1;
    }
    Ok(())
}
