//! The outer headers, sound and unsound.

use std::net::{Ipv4Addr, Ipv6Addr};

use anyhow::Result;
use vxcsum_common::layout::{Action, FixMode};
use vxcsum_common::{Policy, Proof, Verdict};

use super::{
    After, BAD, Case, Family, MANGLED, NO_NEXT_HEADER, OLD_PORT, ONE_PORT, PORT, SOURCE_PORT,
    complete_tcp, inner_ip, open_tcp, other, stale, udp, vxlan,
};
use crate::packets::{
    Check, Ethernet, Extension, Frame, Ip, Network, SERVICE_VLAN, SegmentSum, Transport, VLAN,
    Vxlan,
};

/// The outer link, UDP and VXLAN headers.
pub(super) fn outer_headers(family: Family) -> Result<Vec<Case>> {
    use Verdict::{Unverified, Valid};
    let inner = open_tcp();
    let tagged = |tags: &[u16]| -> Result<Frame> {
        Frame::new(&Ethernet::from(family.ip(vxlan(Check::Right, &inner))).tagged(tags))
    };
    let udp_len = |len: u16, check| -> Result<Frame> {
        let vxlan = Vxlan {
            udp_len: Some(len),
            ..Vxlan::new(SOURCE_PORT, check, inner_ip(udp(SegmentSum::Complete, 40)).into())
        };
        Frame::new(&family.ip(Transport::Vxlan(vxlan)).into())
    };
    let with = |change: &dyn Fn(&mut Vxlan)| -> Result<Frame> {
        let mut vxlan = Vxlan::new(SOURCE_PORT, Check::Right, inner.clone());
        change(&mut vxlan);
        Frame::new(&family.ip(Transport::Vxlan(vxlan)).into())
    };
    // UDP and VXLAN header, inner Ethernet, IPv4 and UDP header, 40 bytes.
    let whole = 16 + 14 + 20 + 8 + 40;
    let mut cases = vec![
        Case::quiet("802.1Q", tagged(&[VLAN])?, Valid),
        Case::quiet("802.1ad", tagged(&[SERVICE_VLAN])?, Valid),
        Case::quiet("802.1ad and 802.1Q", tagged(&[SERVICE_VLAN, VLAN])?, Valid),
        Case::quiet("802.1Q twice", tagged(&[VLAN, VLAN])?, Valid),
        Case::quiet("a tag from before 802.1ad", tagged(&[0x9100, VLAN])?, Valid),
        Case::not_vxlan("three VLAN tags", tagged(&[SERVICE_VLAN, VLAN, VLAN])?),
        Case::broken(
            "802.1ad and 802.1Q, stale, restored",
            Frame::new(
                &Ethernet::from(
                    family
                        .ip(vxlan(Check::Stale { old_port: OLD_PORT, old_address: None }, &inner)),
                )
                .tagged(&[SERVICE_VLAN, VLAN]),
            )?,
            stale(Proof::FlowHash).then(Action::Restored, After::Right),
        )
        .device(ONE_PORT)
        .fix(FixMode::Restore),
        Case::quiet(
            "bytes after the datagram",
            Frame::new(&Ethernet {
                padding: 7,
                ..family.ip(vxlan(Check::Right, &complete_tcp())).into()
            })?,
            Valid,
        ),
        Case::quiet("UDP length", udp_len(whole, Check::Right)?, Valid),
        Case::quiet("UDP length one short of the data", udp_len(whole - 1, Check::Right)?, Valid),
        Case::broken(
            "UDP length one short of the data, wrong",
            udp_len(whole - 1, Check::Value(0x7777))?,
            BAD,
        )
        .offload_known(),
        Case::quiet("UDP length of headers only", udp_len(16, Check::Right)?, Valid),
        Case::quiet("UDP length one too long", udp_len(whole + 1, Check::Right)?, Unverified),
        Case::quiet("UDP length 65535", udp_len(0xffff, Check::Zero)?, Unverified),
        Case::quiet("all flags", with(&|vxlan| vxlan.flags = 0xff)?, Valid),
        Case::not_vxlan("no flags", with(&|vxlan| vxlan.flags = 0)?),
        Case::not_vxlan("all flags but I", with(&|vxlan| vxlan.flags = 0xf7)?),
        Case::not_vxlan("another port", with(&|vxlan| vxlan.destination_port = 4789)?),
        Case::not_vxlan("port 0", with(&|vxlan| vxlan.destination_port = 0)?),
        Case::not_vxlan(
            "from the port, not to it",
            with(&|vxlan| {
                vxlan.source_port = PORT;
                vxlan.destination_port = SOURCE_PORT;
            })?,
        ),
        Case::quiet("from the port and to it", with(&|vxlan| vxlan.source_port = PORT)?, Valid),
        Case::quiet("highest VNI", with(&|vxlan| vxlan.vni = 0xff_ffff)?, Valid),
    ];
    for len in [0, 1, 7, 8, 15] {
        // Without regard to what is in the field: the length makes no sense.
        for check in [Check::Zero, Check::Value(0x4321)] {
            let name = format!("UDP length {len}, {check:?}");
            cases.push(Case::quiet(name, udp_len(len, check)?, Unverified));
        }
    }
    for inner_len in [0, 1, 13] {
        let frame = with(&|vxlan| vxlan.inner_len = Some(inner_len))?;
        let name = format!("inner frame of {inner_len} bytes");
        cases.push(Case::quiet(name, frame, Unverified).offload_unknown());
    }
    Ok(cases)
}

pub(super) fn ipv4_headers() -> Result<Vec<Case>> {
    use Verdict::{Unverified, Valid, Zero};
    let inner = open_tcp();
    let with = |check, change: &dyn Fn(&mut Ip)| -> Result<Frame> {
        let mut ip = Ip::v4(vxlan(check, &inner));
        change(&mut ip);
        Frame::new(&ip.into())
    };
    // IPv4, UDP and VXLAN header, inner Ethernet, IPv4 and TCP header.
    let whole: u16 = 20 + 16 + 14 + 20 + 20;
    let mut cases = vec![
        Case::quiet("IPv4 options", with(Check::Right, &|ip| ip.options = vec![1; 4])?, Valid),
        Case::quiet(
            "most IPv4 options",
            with(Check::Right, &|ip| ip.options = vec![1; 40])?,
            Valid,
        ),
        Case::broken(
            "IPv4 options, stale, zeroed",
            with(Check::Stale { old_port: OLD_PORT, old_address: None }, &|ip| {
                ip.options = vec![1; 24];
            })?,
            stale(Proof::FlowHash).then(Action::Zeroed, After::Zero),
        )
        .device(ONE_PORT)
        .fix(FixMode::Zero),
        Case::quiet("DF", with(Check::Right, &|ip| ip.dont_fragment = true)?, Valid),
        Case::quiet(
            "first fragment",
            with(Check::Right, &|ip| ip.fragment = (0, true))?,
            Unverified,
        ),
        Case::quiet(
            "first fragment without a sum",
            with(Check::Zero, &|ip| ip.fragment = (0, true))?,
            Unverified,
        )
        .policy(Policy::Zero),
        Case::not_vxlan(
            "middle fragment that looks like VXLAN",
            with(Check::Value(0x1234), &|ip| ip.fragment = (185, true))?,
        ),
        Case::not_vxlan(
            "last fragment that looks like VXLAN",
            with(Check::Value(0x1234), &|ip| ip.fragment = (0x1fff, false))?,
        ),
        Case::quiet("total length", with(Check::Right, &|ip| ip.len = Some(whole))?, Valid),
        Case::quiet(
            "total length one too short",
            with(Check::Right, &|ip| ip.len = Some(whole - 1))?,
            Unverified,
        ),
        // The datagram is there as a whole. What the receiver makes of the IP header is its own
        // business.
        Case::quiet(
            "total length one too long",
            with(Check::Right, &|ip| ip.len = Some(whole + 1))?,
            Valid,
        ),
        Case::quiet("total length 65535", with(Check::Right, &|ip| ip.len = Some(0xffff))?, Valid),
        Case::quiet(
            "total length of the header only",
            with(Check::Value(0x1234), &|ip| ip.len = Some(20))?,
            Unverified,
        ),
        Case::quiet("total length 0", with(Check::Zero, &|ip| ip.len = Some(0))?, Unverified),
        Case::quiet(
            "total length 0, on a zero device",
            with(Check::Value(0xffff), &|ip| ip.len = Some(0))?,
            Unverified,
        )
        .policy(Policy::Zero),
        Case::not_vxlan("version 6 in IPv4", with(Check::Right, &|ip| ip.first_byte = Some(0x65))?),
        Case::not_vxlan("version 0", with(Check::Right, &|ip| ip.first_byte = Some(0x05))?),
        Case::not_vxlan("TTL and all, but protocol TCP", {
            let mut frame = with(Check::Right, &|_| ())?;
            frame.bytes[frame.ip + 9] = 6;
            frame
        }),
        Case::quiet(
            "IPv4 padded to the least frame",
            Frame::new(&Ethernet {
                padding: 46,
                ..Ip::v4(vxlan(Check::Zero, &Ethernet::of(Network::Arp))).into()
            })?,
            Zero,
        )
        .policy(Policy::Zero),
    ];
    for words in 0..5 {
        let frame = with(Check::Right, &|ip| ip.first_byte = Some(0x40 | words))?;
        cases.push(Case::not_vxlan(format!("IPv4 header length of {words} words"), frame));
    }
    // Taken at its word, one of four words would end at something that sends to the watched port
    // and has the I flag: the end of the address, and the length of the real UDP header.
    cases.push(Case::not_vxlan("IPv4 header length of 4 words, and VXLAN behind that", {
        let inner = inner_ip(udp(SegmentSum::Complete, 0x0800)).into();
        let destination = Ipv4Addr::from_bits(0x0a00_0000 | u32::from(PORT));
        let ip = Ip::v4(vxlan(Check::Right, &inner));
        Frame::new(&Ip { destination: destination.into(), first_byte: Some(0x44), ..ip }.into())?
    }));
    // A longer header than there is moves everything; what comes to lie where the UDP header is
    // looked for sends to another port.
    for words in 6..16 {
        let frame = with(Check::Right, &|ip| ip.first_byte = Some(0x40 | words))?;
        cases.push(Case::not_vxlan(format!("IPv4 header length of {words} words"), frame));
    }
    Ok(cases)
}

/// A VXLAN packet over IPv6 with something changed.
fn ipv6_with(check: Check, change: impl FnOnce(&mut Ip)) -> Result<Frame> {
    let mut ip = Ip::v6(vxlan(check, &open_tcp()));
    change(&mut ip);
    Frame::new(&ip.into())
}

fn ipv6_after(check: Check, extensions: &[Extension]) -> Result<Frame> {
    ipv6_with(check, |ip| ip.extensions = extensions.to_vec())
}

pub(super) fn ipv6_headers() -> Result<Vec<Case>> {
    use Verdict::{Unverified, Valid};
    // UDP and VXLAN header, inner Ethernet, IPv4 and TCP header.
    let whole: u16 = 16 + 14 + 20 + 20;
    Ok(vec![
        Case::quiet("payload length", ipv6_with(Check::Right, |ip| ip.len = Some(whole))?, Valid),
        Case::quiet(
            "payload length one too short",
            ipv6_with(Check::Right, |ip| ip.len = Some(whole - 1))?,
            Unverified,
        ),
        Case::quiet(
            "payload length one too long",
            ipv6_with(Check::Right, |ip| ip.len = Some(whole + 1))?,
            Valid,
        ),
        Case::quiet(
            "payload length 0",
            ipv6_with(Check::Right, |ip| ip.len = Some(0))?,
            Unverified,
        ),
        Case::quiet(
            "payload length that leaves nothing behind the options",
            ipv6_with(Check::Right, |ip| {
                ip.extensions = vec![Extension::HopByHop(16)];
                ip.len = Some(8);
            })?,
            Unverified,
        ),
        Case::not_vxlan(
            "version 4 in IPv6",
            ipv6_with(Check::Right, |ip| ip.first_byte = Some(0x45))?,
        ),
        Case::not_vxlan("IPv6 without next header", {
            Frame::new(&Ip::v6(other(NO_NEXT_HEADER, 30)).into())?
        }),
        Case::not_vxlan("extension header beyond the end", {
            let mut frame = ipv6_after(Check::Right, &[Extension::HopByHop(8)])?;
            // It claims 2,048 bytes.
            frame.bytes[frame.ip + 41] = 0xff;
            frame
        }),
    ])
}

pub(super) fn ipv6_extension_headers() -> Result<Vec<Case>> {
    use Extension::{Authentication, DestinationOptions, Fragment, HopByHop, Routing};
    use Verdict::{Unverified, Valid};
    let after = ipv6_after;
    let home = Ipv6Addr::new(0xfd00, 9, 0, 0, 0, 0, 0, 9);
    let arrived = Routing { segments_left: 0, home };
    let under_way = Routing { segments_left: 1, home };
    let atomic = Fragment { offset: 0, more: false };
    let six = [
        HopByHop(8),
        DestinationOptions(8),
        arrived.clone(),
        atomic.clone(),
        Authentication(12),
        DestinationOptions(24),
    ];
    let seven = [&six[..], &[DestinationOptions(8)]].concat();
    let stale_check = Check::Stale { old_port: OLD_PORT, old_address: None };
    Ok(vec![
        Case::quiet("hop-by-hop options", after(Check::Right, &[HopByHop(8)])?, Valid),
        Case::quiet("long hop-by-hop options", after(Check::Right, &[HopByHop(264)])?, Valid),
        Case::quiet("destination options", after(Check::Right, &[DestinationOptions(16)])?, Valid),
        Case::quiet("routing header, used up", after(Check::Right, &[arrived])?, Valid),
        Case::quiet(
            "routing header, not used up",
            after(Check::Right, std::slice::from_ref(&under_way))?,
            Unverified,
        ),
        Case::quiet(
            "routing header, not used up, without a sum",
            after(Check::Zero, &[under_way])?,
            Unverified,
        ),
        Case::quiet("authentication header", after(Check::Right, &[Authentication(12)])?, Valid),
        Case::quiet(
            "long authentication header",
            after(Check::Right, &[Authentication(64)])?,
            Valid,
        ),
        Case::quiet("atomic fragment", after(Check::Right, &[atomic])?, Valid),
        Case::quiet(
            "first IPv6 fragment",
            after(Check::Right, &[Fragment { offset: 0, more: true }])?,
            Unverified,
        ),
        Case::not_vxlan(
            "middle IPv6 fragment that looks like VXLAN",
            after(Check::Value(0x1234), &[Fragment { offset: 150, more: true }])?,
        ),
        Case::not_vxlan(
            "last IPv6 fragment that looks like VXLAN",
            after(Check::Value(0x1234), &[Fragment { offset: 0x1fff, more: false }])?,
        ),
        Case::not_vxlan(
            "later IPv6 fragment behind hop-by-hop options",
            after(Check::Value(0x1234), &[HopByHop(8), Fragment { offset: 1, more: false }])?,
        ),
        Case::quiet("six extension headers", after(Check::Right, &six)?, Valid),
        Case::broken(
            "six extension headers, stale, restored",
            after(stale_check, &six)?,
            stale(Proof::FlowHash).then(Action::Restored, After::Right),
        )
        .device(ONE_PORT)
        .fix(FixMode::Restore),
        Case::not_vxlan("seven extension headers", after(Check::Right, &seven)?),
    ])
}

pub(super) fn raw_ip() -> Result<Vec<Case>> {
    let stale_check = Check::Stale { old_port: OLD_PORT, old_address: None };
    let inner = open_tcp();
    let restored = stale(Proof::FlowHash).then(Action::Restored, After::Right);
    let mut cases = Vec::new();
    for family in [Family::V4, Family::V6] {
        let raw = |check| Frame::raw_ip(&family.ip(vxlan(check, &inner)));
        let name = |what: &str| format!("raw {}, {what}", family.name());
        cases.extend([
            Case::quiet(name("right"), raw(Check::Right)?, Verdict::Valid),
            Case::quiet(name("no sum"), raw(Check::Zero)?, Verdict::Missing),
            Case::quiet(name("pending"), raw(Check::Pending)?, Verdict::OffloadPending).segments(2),
            Case::broken(name("stale, restored"), raw(stale_check)?, restored)
                .device(ONE_PORT)
                .fix(FixMode::Restore),
            Case::broken(name("0xffff on a zero device"), raw(Check::Value(0xffff))?, MANGLED)
                .policy(Policy::Zero),
            Case::not_vxlan(name("on an interface with link headers"), {
                Frame { is_raw_ip: false, ..raw(Check::Right)? }
            }),
            Case::not_vxlan(name("with a link header on an interface without"), {
                Frame { is_raw_ip: true, ..family.frame(Check::Right, &inner)? }
            }),
            Case::not_vxlan(name("of a protocol version that there is none of"), {
                let mut ip = family.ip(vxlan(Check::Right, &inner));
                ip.first_byte = Some(0x75);
                Frame::raw_ip(&ip)?
            }),
        ]);
    }
    Ok(cases)
}
