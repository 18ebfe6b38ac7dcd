//! Packets that are too short, too long, or something else altogether.

use anyhow::Result;
use vxcsum_common::layout::{Action, FixMode};
use vxcsum_common::{Offload, Policy, Proof, Verdict};

use super::{
    After, BAD, Broken, Case, Expected, Family, ICMP, MANGLED, OLD_PORT, ONE_PORT, PORT,
    SOURCE_PORT, inner_ip, inner_ip6, open_tcp, other, stale, tcp, udp, vxlan,
};
use crate::packets::{
    Check, Ethernet, Extension, Frame, Ip, Network, SERVICE_VLAN, SegmentSum, Transport, Udp, VLAN,
};

/// Every length of a few frames, from nothing to all.
pub(super) fn cut_short() -> Result<Vec<Case>> {
    let stale_check = Check::Stale { old_port: OLD_PORT, old_address: None };
    let frames = [
        ("IPv4", Frame::new(&Ip::v4(vxlan(stale_check, &open_tcp())).into())?),
        (
            "all there is",
            Frame::new(
                &Ethernet::from(Ip {
                    extensions: vec![Extension::HopByHop(8), Extension::DestinationOptions(16)],
                    ..Ip::v6(vxlan(
                        stale_check,
                        &Ethernet::from(Ip {
                            extensions: vec![Extension::DestinationOptions(8)],
                            ..inner_ip6(udp(SegmentSum::Open, 9))
                        })
                        .tagged(&[VLAN]),
                    ))
                })
                .tagged(&[SERVICE_VLAN, VLAN]),
            )?,
        ),
    ];
    let mut cases = Vec::new();
    for (name, frame) in frames {
        for len in 0..=frame.bytes.len() {
            let expected = if len == frame.bytes.len() {
                Expected::Broken(stale(Proof::FlowHash))
            } else if len < frame.udp + 8 {
                // It is not even known where it goes.
                Expected::NotVxlan
            } else {
                Expected::Quiet(Verdict::Unverified)
            };
            let boundary = if frame.boundaries.contains(&len) { ", between headers" } else { "" };
            let name = format!("{name}, cut to {len} bytes{boundary}");
            // One that NAT has broken, and that no fix mode may touch as long as something is
            // missing.
            let mut case = Case::new(name, frame.clone().cut(len), expected).device(ONE_PORT);
            // Nothing that could be said of an open sum changes anything.
            case.offloads.push(Offload::Complete);
            let whole = len == frame.bytes.len();
            cases.push(if whole { case } else { case.fix(FixMode::Restore).unproven() });
        }
    }
    Ok(cases)
}

pub(super) fn not_vxlan() -> Result<Vec<Case>> {
    let raw = |ethertype, len| {
        Frame::new(&Ethernet::of(Network::Other { ethertype, bytes: vec![0x45; len] }))
    };
    Ok(vec![
        Case::not_vxlan("ARP", Frame::new(&Ethernet::of(Network::Arp))?),
        Case::not_vxlan("LLDP", raw(0x88cc, 100)?),
        Case::not_vxlan("802.3 with a length", raw(60, 60)?),
        Case::not_vxlan("an IPv4 EtherType and nothing behind it", raw(0x0800, 0)?),
        Case::not_vxlan("an IPv6 EtherType and nothing behind it", raw(0x86dd, 0)?),
        Case::not_vxlan("a VLAN EtherType and nothing behind it", raw(VLAN, 0)?),
        Case::not_vxlan("TCP", Frame::new(&Ip::v4(tcp(SegmentSum::Open)).into())?),
        Case::not_vxlan("TCP over IPv6", Frame::new(&Ip::v6(tcp(SegmentSum::Open)).into())?),
        Case::not_vxlan("DNS", Frame::new(&Ip::v4(udp(SegmentSum::Complete, 40)).into())?),
        Case::not_vxlan("ICMP", Frame::new(&Ip::v4(other(ICMP, 64)).into())?),
        Case::not_vxlan("no port is watched", {
            Frame::new(&Ip::v4(vxlan(Check::Value(0x1234), &open_tcp())).into())?
        })
        .ports(vec![]),
        Case::not_vxlan("UDP to a watched port, too short for VXLAN's flags", {
            Frame::new(
                &Ip::v4(Transport::Udp(Udp {
                    source_port: SOURCE_PORT,
                    destination_port: PORT,
                    payload: vec![0; 8],
                    sum: SegmentSum::Complete,
                }))
                .into(),
            )?
        }),
    ])
}

/// Jumbo frames.
pub(super) fn long() -> Result<Vec<Case>> {
    let complete: Ethernet = inner_ip(udp(SegmentSum::Complete, 8900)).into();
    let frame = |check, inner| Family::V4.frame(check, inner);
    Ok(vec![
        Case::quiet("9,000 bytes, right", frame(Check::Right, &complete)?, Verdict::Valid),
        Case::broken("9,000 bytes, wrong", frame(Check::Value(0x1234), &complete)?, BAD),
    ])
}

/// Packets that are longer than the BPF program may sum, 9,000 bytes and a bit; for it alone.
pub fn beyond_full_sums() -> Result<Vec<Case>> {
    let mut cases = Vec::new();
    for family in [Family::V4, Family::V6] {
        let complete: Ethernet = inner_ip(udp(SegmentSum::Complete, 20_000)).into();
        let open: Ethernet = inner_ip(udp(SegmentSum::Open, 20_000)).into();
        let frame = |check, inner| family.frame(check, inner);
        let wrong = Check::Value(0x1234);
        let name = |what: &str| format!("{}, 20,000 bytes: {what}", family.name());
        let unverified = |what, frame| Case::quiet(name(what), frame, Verdict::Unverified);
        cases.extend([
            unverified("complete, right", frame(Check::Right, &complete)?),
            unverified("complete, wrong", frame(wrong, &complete)?),
            unverified("complete, stale", family.stale(&complete)?).device(ONE_PORT),
            Case::broken(
                name("complete, on a zero device"),
                frame(Check::Value(0xffff), &complete)?,
                Broken { is_sum_told: false, ..MANGLED },
            )
            .policy(Policy::Zero),
            Case::quiet(name("no sum"), frame(Check::Zero, &complete)?, Verdict::Missing),
            Case::quiet(
                name("pending"),
                frame(Check::Pending, &complete)?,
                Verdict::OffloadPending,
            ),
            Case::quiet(name("open, right"), frame(Check::Right, &open)?, Verdict::Valid),
            Case::broken(
                name("open, stale"),
                family.stale(&open)?,
                stale(Proof::FlowHash).then(Action::Restored, After::Right),
            )
            .device(ONE_PORT)
            .fix(FixMode::Restore),
            // One complete sum in 65,536 looks open.
            unverified("open, wrong, offload state unknown", frame(wrong, &open)?)
                .offload_unknown(),
            Case::broken(name("open, wrong"), frame(wrong, &open)?, BAD).offload_known(),
        ]);
    }
    Ok(cases)
}
