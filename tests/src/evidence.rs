//! Whether what vxcsum says agrees with what others saw: the oracle in the frames that the
//! receiver got, and connection tracking.

use anyhow::{Context as _, Result, ensure};

use crate::capture::Recording;
use crate::conntrack;
use crate::daemon::Event;
use crate::lab::{Lab, OuterSum};
use crate::oracle::{self, Vxlan};

/// The VXLAN frames in a recording that the sending node sent.
pub fn sent_by_a(lab: &Lab, recording: &Recording) -> Result<Vec<Vxlan>> {
    let mut frames = oracle::vxlan_frames(&recording.frames, lab.config.dstport)?;
    let ours = [lab.outer_a(), lab.snat_address()];
    frames.retain(|frame| ours.contains(&frame.outer.src));
    Ok(frames)
}

/// Finds the frame of each event among those that the receiver got, every one once.
///
/// Addresses, ports and VNI have to agree, the right sum with the oracle's, and the field on the
/// wire with what vxcsum says it has done.
pub fn frames_of<'a>(lab: &Lab, events: &[Event], received: &'a [Vxlan]) -> Result<Vec<&'a Vxlan>> {
    let mut left: Vec<&Vxlan> = received.iter().collect();
    let mut found = Vec::new();
    for event in events {
        let at = left.iter().position(|frame| {
            describes(event, frame) && frame.outer.check == field_on_wire(lab, event, frame)
        });
        let at = at.with_context(|| format!("no frame at the receiver fits {event:#?}"))?;
        found.push(left.remove(at));
    }
    Ok(found)
}

fn describes(event: &Event, frame: &Vxlan) -> bool {
    let outer = &frame.outer;
    let inner = frame.inner.as_ref();
    (event.outer.src, event.outer.sport) == (outer.src, outer.sport)
        && (event.outer.dst, event.outer.dport) == (outer.dst, outer.dport)
        && event.vni == frame.vni
        && event.expected.is_none_or(|expected| expected == outer.expected)
        && event.inner.src == inner.map(|inner| inner.src)
        && event.inner.dst == inner.map(|inner| inner.dst)
        && event.inner.sport == inner.map(|inner| inner.sport)
        && event.inner.dport == inner.map(|inner| inner.dport)
}

fn field_on_wire(lab: &Lab, event: &Event, frame: &Vxlan) -> u16 {
    match (event.action.as_str(), lab.config.outer_sum) {
        ("zeroed", _) | ("restored", OuterSum::Zero) => 0,
        ("restored", OuterSum::Sum) => frame.outer.expected,
        _ => event.check,
    }
}

/// Checks the source port before NAT of each event, and that its sum is stale by just that.
pub fn check_ports_before_nat(lab: &Lab, events: &[Event]) -> Result<()> {
    let flows = conntrack::udp_flows(&lab.a, lab.config.dstport)?;
    for event in events {
        let sport = event.outer.sport;
        let original = conntrack::before_nat(&flows, sport)
            .with_context(|| format!("connection tracking knows nothing of port {sport}"))?;
        ensure!(
            event.outer.sport_before_nat == Some(original.sport),
            "connection tracking says {} before NAT: {event:#?}",
            original.sport
        );
        ensure!(original.src == lab.outer_a(), "{original:?}");
    }
    Ok(())
}
