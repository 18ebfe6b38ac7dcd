//! What the sender did to a packet that was dropped here.

use std::sync::OnceLock;
use std::time::Duration;

use vxcsum_common::layout::Action;
use vxcsum_common::outer::{self, Beyond, Outer, UDP_LEN};
use vxcsum_common::receive::Dropped;
use vxcsum_common::verdict::{self, AnswerKind, Finding};
use vxcsum_common::{Captured, Cut, Offload, Packet as _, Policy, Proof, Sum, Verdict, Watch as _};

use crate::clock;
use crate::event::{AnyPort, Direction, Event, Hex, InnerView, OuterView, addresses};
use crate::plan::Plan;
use crate::stalls::Trace;

/// Decodes a record of the ring buffer; `None` for what no program of this version sends.
pub(super) fn decode(plan: &Plan, record: &[u8]) -> Option<Event> {
    let (head, bytes) = record.split_at_checked(size_of::<Dropped>())?;
    let dropped: Dropped = bytemuck::try_pod_read_unaligned(head).ok()?;
    let packet = Captured {
        len: dropped.len as usize,
        is_raw_ip: true,
        // Whatever the sender's NIC was to fill in is filled in by now.
        offload: Offload::Complete,
        ..Captured::new(bytes.get(..dropped.snapshot_len as usize)?)
    };
    let outer = match outer::locate(&packet, &AnyPort) {
        Ok(Some((at, ()))) => Some(Outer::read(&packet, at).ok()?),
        // Its VXLAN header is out of reach.
        Err(Beyond::Vxlan) => None,
        Ok(None) | Err(Beyond::Outer) => return None,
    };
    let is_ipv6 = packet.header::<1>(0).ok()?.u8::<0>() >> 4 == 6;
    let ip = outer::ip(&packet, if is_ipv6 { 0x86dd } else { 0x0800 }, 0).ok()??;
    let (src, dst) = addresses(&packet, 0, is_ipv6).ok()?;
    let udp = packet.header::<UDP_LEN>(ip.payload).ok()?;
    let judged = match &outer {
        Some(outer) => judge(&packet, plan, outer).unwrap_or_else(|Cut| Judged::default()),
        None => Judged::default(),
    };
    let device = |outer: &Outer| plan.device_name(outer.destination_port, outer.vni);
    let interface = dropped.interface.split(|&byte| byte == 0).next().unwrap_or_default();
    Some(Event {
        time: clock::time_of_day(Duration::from_nanos(dropped.boot_ns)),
        direction: Direction::Receive,
        interface: String::from_utf8_lossy(interface).into_owned(),
        device: outer.as_ref().and_then(device).map(str::to_owned),
        vni: outer.as_ref().map(|outer| outer.vni),
        verdict: judged.verdict.unwrap_or(Verdict::Unverified),
        action: Action::None,
        check: Hex::U16(udp.be16::<6>()),
        expected: judged.expected.map(Hex::U16),
        expected_from: judged.is_by_headers.then(|| "headers".to_owned()),
        outer: OuterView {
            src,
            dst,
            sport: udp.be16::<0>(),
            dport: udp.be16::<2>(),
            src_before_nat: None,
            sport_before_nat: judged.source_port_before_nat,
        },
        inner: match &outer {
            Some(outer) => InnerView::of(&packet, outer),
            None => InnerView::cut(),
        },
        mark: Hex::U32(dropped.mark),
        segments: Some(1),
        len: dropped.len.saturating_add(dropped.link_len),
        ip_summed: None,
        proof: judged.proof.and_then(Proof::as_str).map(str::to_owned),
        cause: None,
        trace: Trace::default(),
        out_interface: None,
        json: OnceLock::new(),
    })
}

/// What is left unsaid cannot be told.
#[derive(Default)]
struct Judged {
    verdict: Option<Verdict>,
    proof: Option<Proof>,
    expected: Option<u16>,
    is_by_headers: bool,
    source_port_before_nat: Option<u16>,
}

/// The verdict of the common crate, and what it means of a packet that has arrived: nothing is going
/// to finish it any more.
fn judge(packet: &Captured<'_>, plan: &Plan, outer: &Outer) -> Result<Judged, Cut> {
    let policy = plan
        .port(outer.destination_port)
        .map_or(Policy::Unknown, |port| plan.policy(port, outer.vni, outer.at.is_ipv6));
    let mut is_by_headers = false;
    let answer = match verdict::by_outer(packet, outer) {
        Some(answer) => answer,
        None => match verdict::by_inner(packet, outer, policy)? {
            unknown if unknown.kind == AnswerKind::Unknown => {
                is_by_headers = true;
                verdict::by_headers(packet, outer)?
            }
            answer => answer,
        },
    };
    let Finding { verdict, proof, expected, source_port_before_nat, .. } =
        verdict::explain(packet, plan, outer, policy, answer);
    let right_sum = packet
        .sum(outer.at.udp, outer.udp_len)
        .map(|sum| (outer.pseudo_header + sum).minus(Sum::of_u16(outer.check)).checksum());
    let (verdict, expected) = match (verdict, right_sum) {
        // The sender's NIC has left the outer sum unfinished, or the inner one that the outer sum
        // counts on.
        (Verdict::OffloadPending | Verdict::Valid, Some(right)) if right != outer.check => {
            (Verdict::OffloadPending, Some(right))
        }
        (Verdict::Valid, _) => (Verdict::Unverified, None),
        (verdict, _) => (verdict, (expected != 0).then_some(expected)),
    };
    Ok(Judged {
        verdict: Some(verdict),
        proof: Some(proof),
        expected,
        is_by_headers: is_by_headers && expected.is_some(),
        source_port_before_nat: (source_port_before_nat != 0).then_some(source_port_before_nat),
    })
}

#[cfg(test)]
mod tests {
    use vxcsum_common::Policy;
    use vxcsum_common::layout::FixMode;

    use super::*;
    use crate::links::Links;
    use crate::plan::Wish;

    #[test]
    fn lengths_that_no_packet_has_do_not_overflow() {
        let wish = Wish {
            ports: vec![8472],
            policy: Some(Policy::Sum),
            fix: FixMode::Off,
            fix_unproven: false,
            events_per_second: 0,
        };
        let plan = Plan::of_node(&wish, &Links::default(), (32768, 60999)).unwrap();
        // IPv4 and UDP to port 8472; the VXLAN header is out of reach.
        let mut packet = [0; 28];
        packet[0] = 0x45;
        packet[9] = 17;
        packet[22..24].copy_from_slice(&8472_u16.to_be_bytes());
        let dropped = Dropped {
            boot_ns: 0,
            len: u32::MAX,
            snapshot_len: packet.len() as u32,
            mark: 0,
            link_len: u32::MAX,
            interface: [0; 16],
        };
        let record = [bytemuck::bytes_of(&dropped), &packet].concat();
        assert_eq!(decode(&plan, &record).unwrap().len, u32::MAX);
    }
}
