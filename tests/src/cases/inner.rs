//! What is inside of the outer packet.

use std::net::Ipv6Addr;

use anyhow::Result;
use etherparse::checksum::Sum16BitWords;
use vxcsum_common::layout::{Action, FixMode};
use vxcsum_common::{Proof, Verdict};

use super::{
    After, BAD, Case, Family, ICMP, ICMPV6, NO_NEXT_HEADER, ONE_PORT, SCTP, complete_tcp, inner_ip,
    inner_ip6, open_tcp, other, stale, tcp, udp,
};
use crate::packets::{
    Check, Ethernet, Extension, Frame, Ip, Network, SERVICE_VLAN, SegmentSum, Transport, UDP_CHECK,
    VLAN, Vxlan,
};

/// What may be inside: the outer sum is right over it, and known to be wrong where it is.
pub(super) fn inner_packets(family: Family) -> Result<Vec<Case>> {
    let mut cases = well_formed(family)?;
    // Where the inner header contradicts itself, or the segment is not whole, nobody leaves a sum
    // to the NIC: one that looks open is not, and all bytes decide.
    let segment = |sum| Ip { len: None, ..inner_ip(tcp(sum)) };
    for (name, len, ip) in [
        ("a first fragment", 20, Ip { fragment: (0, true), ..segment(SegmentSum::Open) }),
        ("a later fragment", 20, Ip { fragment: (7, false), ..segment(SegmentSum::Open) }),
        ("less than a TCP header", 10, Ip { len: Some(30), ..segment(SegmentSum::Open) }),
        ("more than there is", 21, Ip { len: Some(41), ..segment(SegmentSum::Open) }),
    ] {
        let frame = looks_open(family, &ip, len)?;
        cases.push(Case::broken(format!("{name}, looks open"), frame, BAD));
    }
    Ok(cases)
}

/// A frame that is right if the sum of the inner TCP segment is open and the segment is so long.
fn looks_open(family: Family, inner: &Ip, len: u16) -> Result<Frame> {
    let open = family.frame(Check::Right, &inner.clone().into())?;
    let Some((start, field)) = open.open else { anyhow::bail!("no open sum") };
    let real_len = u16::try_from(open.bytes.len() - start)?;
    // The length is in the pseudo-header, and so in both sums.
    let moved = |at: usize| {
        let sum = Sum16BitWords::new()
            .add_slice(&open.bytes[at..at + 2])
            .add_2bytes(len.to_be_bytes())
            .add_2bytes((!real_len).to_be_bytes());
        !u16::from_be(sum.ones_complement())
    };
    let transport = tcp(SegmentSum::Value(moved(field)));
    let check = Check::Value(moved(open.udp + UDP_CHECK));
    family.frame(check, &Ip { transport, ..inner.clone() }.into())
}

fn well_formed(family: Family) -> Result<Vec<Case>> {
    let mut cases = Vec::new();
    for (name, complete, open) in [plain(), fragments_and_extensions()].concat() {
        for (how, inner) in [("complete", Some(complete)), ("open", open)] {
            let Some(inner) = inner else { continue };
            let right = family.frame(Check::Right, &inner)?;
            let wrong = right.clone().with_check(right.check()? ^ 0x0101)?;
            cases.extend([
                Case::quiet(format!("{name} ({how}), right"), right, Verdict::Valid),
                // Of opaque contents, only ip_summed tells that nothing is open.
                Case::broken(format!("{name} ({how}), wrong"), wrong, BAD).offload_known(),
                Case::broken(
                    format!("{name} ({how}), stale"),
                    family.stale(&inner)?,
                    stale(Proof::FlowHash),
                )
                .device(ONE_PORT)
                .offload_known(),
            ]);
        }
    }
    // A right sum is right over a wrong one. Somebody else has corrupted the inner packet.
    let corrupt: Ethernet = inner_ip(tcp(SegmentSum::Value(0x1234))).into();
    cases.push(Case::quiet(
        "a wrong inner sum in a right outer one",
        family.frame(Check::Right, &corrupt)?,
        Verdict::Valid,
    ));
    Ok(cases)
}

/// Name, the inner frame with its sum complete and, where there is a sum to be left to the NIC, with
/// its sum open.
type Inner = (&'static str, Ethernet, Option<Ethernet>);

fn plain() -> Vec<Inner> {
    use SegmentSum::{Complete, Open};
    vec![
        ("TCP", complete_tcp(), Some(open_tcp())),
        ("UDP", inner_ip(udp(Complete, 75)).into(), Some(inner_ip(udp(Open, 75)).into())),
        (
            "UDP without data",
            inner_ip(udp(Complete, 0)).into(),
            Some(inner_ip(udp(Open, 0)).into()),
        ),
        (
            "UDP of even length",
            inner_ip(udp(Complete, 512)).into(),
            Some(inner_ip(udp(Open, 512)).into()),
        ),
        (
            "UDP of 1,401 bytes",
            inner_ip(udp(Complete, 1401)).into(),
            Some(inner_ip(udp(Open, 1401)).into()),
        ),
        ("TCP over IPv6", inner_ip6(tcp(Complete)).into(), Some(inner_ip6(tcp(Open)).into())),
        (
            "UDP over IPv6",
            inner_ip6(udp(Complete, 33)).into(),
            Some(inner_ip6(udp(Open, 33)).into()),
        ),
        ("ICMP", inner_ip(other(ICMP, 64)).into(), None),
        ("ICMP of odd length", inner_ip(other(ICMP, 65)).into(), None),
        ("ICMPv6", inner_ip6(other(ICMPV6, 64)).into(), None),
        ("ARP", Ethernet::of(Network::Arp), None),
        ("ARP, padded", Ethernet { padding: 18, ..Ethernet::of(Network::Arp) }, None),
        (
            "TCP, padded",
            Ethernet { padding: 6, ..complete_tcp() },
            Some(Ethernet { padding: 6, ..open_tcp() }),
        ),
        ("802.1Q and TCP", complete_tcp().tagged(&[VLAN]), Some(open_tcp().tagged(&[VLAN]))),
        (
            "802.1ad, 802.1Q and TCP",
            complete_tcp().tagged(&[SERVICE_VLAN, VLAN]),
            Some(open_tcp().tagged(&[SERVICE_VLAN, VLAN])),
        ),
        ("no IP", Ethernet::of(Network::Other { ethertype: 0x88cc, bytes: vec![7; 50] }), None),
        ("no payload", Ethernet::of(Network::Other { ethertype: 0x88cc, bytes: vec![] }), None),
        ("IPv6 without next header", inner_ip6(other(NO_NEXT_HEADER, 0)).into(), None),
    ]
}

fn fragments_and_extensions() -> Vec<Inner> {
    use SegmentSum::{Complete, Open};
    let fragment = |fragment, transport| Ip { fragment, ..inner_ip(transport) };
    let extended = |extensions: &[Extension], transport| Ip {
        extensions: extensions.to_vec(),
        ..inner_ip6(transport)
    };
    let home = Ipv6Addr::new(0xfd00, 9, 0, 0, 0, 0, 0, 9);
    let arrived = Extension::Routing { segments_left: 0, home };
    let under_way = Extension::Routing { segments_left: 1, home };
    let options = Extension::DestinationOptions(16);
    let with_options = |transport| Ip { options: vec![1; 8], ..inner_ip(transport) };
    vec![
        (
            "IPv4 options and TCP",
            with_options(tcp(Complete)).into(),
            Some(with_options(tcp(Open)).into()),
        ),
        (
            "IPv6 extension headers and UDP",
            extended(&[options.clone(), arrived], udp(Complete, 20)).into(),
            Some(extended(&[options], udp(Open, 20)).into()),
        ),
        ("a first fragment", fragment((0, true), udp(Complete, 800)).into(), None),
        ("a later fragment", fragment((100, false), other(17, 800)).into(), None),
        (
            "a first IPv6 fragment",
            extended(&[Extension::Fragment { offset: 0, more: true }], udp(Complete, 80)).into(),
            None,
        ),
        (
            "an atomic IPv6 fragment",
            extended(&[Extension::Fragment { offset: 0, more: false }], udp(Complete, 80)).into(),
            Some(extended(&[Extension::Fragment { offset: 0, more: false }], udp(Open, 80)).into()),
        ),
        (
            "an IPv6 routing header that is not used up",
            extended(&[under_way], tcp(Complete)).into(),
            None,
        ),
    ]
}

/// Tunnels in the tunnel: a sum may be open where nobody looks.
pub(super) fn tunnels(family: Family) -> Result<Vec<Case>> {
    use Verdict::{Unverified, Valid};
    let nested = |check, inner: &Ethernet| -> Ethernet {
        let vxlan = Vxlan { vni: 77, ..Vxlan::new(33333, check, inner.clone()) };
        inner_ip(Transport::Vxlan(vxlan)).into()
    };
    let ipip = |sum| -> Ethernet { inner_ip(Transport::Ip(Box::new(inner_ip(tcp(sum))))).into() };
    let gre = |sum| -> Ethernet { inner_ip(Transport::Gre(Box::new(inner_ip6(tcp(sum))))).into() };
    let sctp: Ethernet = inner_ip(other(SCTP, 100)).into();
    let mut cases = Vec::new();
    // Nothing is open: the sum of all bytes tells, if it is known that nothing is open.
    for (name, inner) in [
        ("VXLAN", nested(Check::Right, &complete_tcp())),
        ("VXLAN without a sum", nested(Check::Zero, &complete_tcp())),
        ("IPIP", ipip(SegmentSum::Complete)),
        ("GRE", gre(SegmentSum::Complete)),
        ("SCTP", sctp.clone()),
    ] {
        let right = family.frame(Check::Right, &inner)?;
        let wrong = right.clone().with_check(right.check()? ^ 0x0040)?;
        cases.extend([
            Case::quiet(format!("{name} inside, right"), right, Valid),
            Case::broken(format!("{name} inside, wrong"), wrong, BAD).offload_known(),
        ]);
    }
    for (name, inner) in [("IPIP", ipip(SegmentSum::Complete)), ("SCTP", sctp)] {
        let right = family.frame(Check::Right, &inner)?;
        let wrong = right.clone().with_check(right.check()? ^ 0x0040)?;
        let name = format!("{name} inside, wrong, offload state unknown");
        cases.push(Case::quiet(name, wrong, Unverified).offload_unknown());
    }
    // The innermost sum is open: the bytes do not sum up, and that is as it should be.
    for (name, inner) in [
        ("VXLAN", nested(Check::Right, &open_tcp())),
        ("VXLAN without a sum", nested(Check::Zero, &open_tcp())),
        ("IPIP", ipip(SegmentSum::Open)),
        ("GRE", gre(SegmentSum::Open)),
    ] {
        let frame = |check| family.frame(check, &inner);
        cases.extend([
            Case::quiet(format!("{name} inside, open, right"), frame(Check::Right)?, Valid)
                .offload_known(),
            Case::quiet(
                format!("{name} inside, open, right, offload state unknown"),
                frame(Check::Right)?,
                Unverified,
            )
            .offload_unknown(),
            Case::broken(
                format!("{name} inside, open, stale"),
                family.stale(&inner)?,
                stale(Proof::FlowHash).then(Action::Restored, After::Right),
            )
            .device(ONE_PORT)
            .fix(FixMode::Restore)
            .offload_known(),
            Case::quiet(
                format!("{name} inside, open, stale, offload state unknown"),
                family.stale(&inner)?,
                Unverified,
            )
            .device(ONE_PORT)
            .fix(FixMode::Restore)
            .unproven()
            .offload_unknown(),
        ]);
    }
    // The inner tunnel's own sum is pending, as that of an inner UDP packet is.
    let pending = nested(Check::Pending, &complete_tcp());
    cases.extend([
        Case::quiet("VXLAN inside, pending, right", family.frame(Check::Right, &pending)?, Valid),
        Case::broken(
            "VXLAN inside, pending, stale",
            family.stale(&pending)?,
            stale(Proof::FlowHash),
        )
        .device(ONE_PORT),
    ]);
    cases.extend(opaque_ethertypes(family)?);
    Ok(cases)
}

/// Open sums behind headers that are not looked through.
fn opaque_ethertypes(family: Family) -> Result<Vec<Case>> {
    /// For something that is not looked into.
    const MPLS: u16 = 0x8847;

    use Verdict::{Unverified, Valid};
    let three_tags = open_tcp().tagged(&[SERVICE_VLAN, VLAN, VLAN]);
    let under_way =
        Extension::Routing { segments_left: 1, home: Ipv6Addr::new(0xfd00, 9, 0, 0, 0, 0, 0, 9) };
    let routed: Ethernet =
        Ip { extensions: vec![under_way], ..inner_ip6(tcp(SegmentSum::Open)) }.into();
    let mut cases = Vec::new();
    for (name, inner) in [("three inner VLAN tags", three_tags), ("inner routing header", routed)] {
        let right = family.frame(Check::Right, &inner)?;
        cases.extend([
            Case::quiet(format!("{name}, open, right"), right.clone(), Valid).offload_known(),
            Case::quiet(format!("{name}, open, right, offload state unknown"), right, Unverified)
                .offload_unknown(),
            Case::broken(
                format!("{name}, open, stale"),
                family.stale(&inner)?,
                stale(Proof::FlowHash),
            )
            .device(ONE_PORT)
            .offload_known(),
        ]);
    }
    let mpls = Ethernet::of(Network::Other { ethertype: MPLS, bytes: vec![0x11; 60] });
    cases.push(Case::quiet("MPLS inside, right", family.frame(Check::Right, &mpls)?, Valid));
    Ok(cases)
}
