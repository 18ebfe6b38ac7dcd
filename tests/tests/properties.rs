//! What must hold for every packet, tried on random ones, against checksums that are computed by
//! other people's code.
#![allow(
    clippy::panic,
    clippy::unwrap_used,
    reason = "what these tests are made of fails as they do, by a panic"
)]

use std::fmt::{self, Debug, Formatter};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use internet_checksum::Checksum;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::TestRunner;
use vxcsum_common::fix::remedy;
use vxcsum_common::layout::{Action, FixMode};
use vxcsum_common::{
    Captured, Device, Examined, Finding, Offload, Policy, Proof, Sum, Verdict, examine,
};
use vxcsum_tests::cases::{self, Known, PORT, counted_verdict as verdict};
use vxcsum_tests::mutants::Stem;
use vxcsum_tests::oracle::right_sum;
use vxcsum_tests::packets::{
    Check, Ethernet, Extension, Frame, Ip, Network, SERVICE_VLAN, SegmentSum, Tcp, Transport,
    UDP_CHECK, Udp, VLAN, Vxlan, hex,
};

/// Everything about a packet but its outer checksum.
#[derive(Clone)]
struct Packet {
    outer: Ip,
    tags: Vec<u16>,
    padding: usize,
}

/// As what it is on the wire: the structure behind it fills pages.
impl Debug for Packet {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let frame = self.frame(Check::Zero);
        write!(f, "{}, open: {:?}, padding: {}", hex(&frame.bytes), frame.open, self.padding)
    }
}

impl Packet {
    fn vxlan(&self) -> &Vxlan {
        let Transport::Vxlan(vxlan) = &self.outer.transport else {
            panic!("{:?} is no VXLAN", self.outer.transport);
        };
        vxlan
    }

    fn frame(&self, check: Check) -> Frame {
        let vxlan = Vxlan { check, ..self.vxlan().clone() };
        let outer = Ip { transport: Transport::Vxlan(vxlan), ..self.outer.clone() };
        let ethernet = Ethernet { padding: self.padding, ..outer.into() };
        Frame::new(&ethernet.tagged(&self.tags)).unwrap()
    }

    fn is_ipv6(&self) -> bool {
        self.outer.source.is_ipv6()
    }

    /// What the receiver finds right.
    fn right(&self) -> u16 {
        right_sum(&self.frame(Check::Zero))
    }

    /// What means that NIC or GSO will finish it.
    fn pending(&self) -> u16 {
        self.frame(Check::Pending).check().unwrap()
    }
}

/// What is known of the sender.
#[derive(Clone, Copy)]
struct About {
    device: Device,
    policy: Policy,
    hash: u32,
    arithmetic_proves_nat: bool,
    offload: Option<Offload>,
}

/// A summing device of which nothing else is known.
const NOTHING: About = About {
    device: Device::UNKNOWN,
    policy: Policy::Sum,
    hash: 0,
    arithmetic_proves_nat: false,
    offload: None,
};

/// What is found; the offload state, unless another is given, is the true one.
fn found(frame: &Frame, about: About) -> Finding {
    let truth = match frame.open {
        Some((start, field)) => Offload::Partial { start, field },
        None => Offload::Complete,
    };
    let packet = Captured {
        offload: about.offload.unwrap_or(truth),
        flow_hash: about.hash,
        arithmetic_proves_nat: about.arithmetic_proves_nat,
        ..Captured::new(&frame.bytes)
    };
    match examine(&packet, &known(about.device, about.policy)) {
        Examined::Vxlan(finding, _) => finding,
        other => panic!("{other:?}"),
    }
}

fn known(device: Device, policy: Policy) -> Known {
    let any_vni = vxcsum_common::layout::ANY_VNI;
    let key = vxcsum_common::layout::DeviceKey { vni: any_vni, port: PORT.into() };
    Known { ports: vec![cases::port(PORT, policy)], devices: vec![(key, device)] }
}

/// A device that sends from one port only.
fn sends_from(port: u16) -> Device {
    Device { source_port_min: port, source_port_max: port.saturating_add(1), ..Device::UNKNOWN }
}

fn mac() -> impl Strategy<Value = [u8; 6]> {
    any::<[u8; 6]>()
}

fn tags() -> impl Strategy<Value = Vec<u16>> {
    vec(select(vec![VLAN, SERVICE_VLAN]), 0..=2)
}

fn extensions() -> BoxedStrategy<Vec<Extension>> {
    let extension = prop_oneof![
        (1_usize..5).prop_map(|units| Extension::HopByHop(8 * units)),
        (1_usize..5).prop_map(|units| Extension::DestinationOptions(8 * units)),
        any::<u128>().prop_map(|home| Extension::Routing {
            segments_left: 0,
            home: Ipv6Addr::from_bits(home),
        }),
        Just(Extension::Fragment { offset: 0, more: false }),
        // Of 12 + len bytes, a multiple of eight.
        (0_usize..4).prop_map(|units| Extension::Authentication(8 * units + 4)),
    ];
    prop_oneof![3 => Just(Vec::new()), 1 => vec(extension, 1..=4)].boxed()
}

fn addresses() -> BoxedStrategy<(IpAddr, IpAddr)> {
    prop_oneof![
        any::<[u32; 2]>().prop_map(|pair| pair.map(|bits| Ipv4Addr::from_bits(bits).into())),
        any::<[u128; 2]>().prop_map(|pair| pair.map(|bits| Ipv6Addr::from_bits(bits).into())),
    ]
    .prop_map(|[source, destination]| (source, destination))
    .boxed()
}

/// An IP packet; whatever `transport` makes is in it.
fn ip(transport: BoxedStrategy<Transport>) -> BoxedStrategy<Ip> {
    let header = (addresses(), any::<u16>(), any::<u8>(), any::<bool>());
    let ip = (header, 0_usize..=10, extensions(), transport).prop_map(
        |(((source, destination), identification, ttl, df), words, extensions, transport)| {
            let ip = Ip { identification, ttl, ..Ip::new(source, destination, transport) };
            if source.is_ipv4() {
                // Most packets have no options.
                let options = vec![1; 4 * words.saturating_sub(6)];
                Ip { dont_fragment: df, options, ..ip }
            } else {
                Ip { extensions, ..ip }
            }
        },
    );
    ip.boxed()
}

fn data() -> BoxedStrategy<Vec<u8>> {
    prop_oneof![9 => vec(any::<u8>(), 0..120), 1 => vec(any::<u8>(), 1300..1500)].boxed()
}

fn segment_sum() -> impl Strategy<Value = SegmentSum> {
    select(vec![SegmentSum::Open, SegmentSum::Complete])
}

fn tcp_or_udp() -> BoxedStrategy<Transport> {
    let ports = (any::<u16>(), any::<u16>());
    let tcp = (ports, any::<(u32, u16)>(), vec(Just(1), 0..=10), data(), segment_sum());
    let tcp = tcp.prop_map(|((from, to), (sequence, window), words, payload, sum)| {
        let mut header = etherparse::TcpHeader::new(from, to, sequence, window);
        header.set_options_raw(&words.repeat(4)).unwrap();
        Transport::Tcp(Tcp { header, payload, sum })
    });
    let udp = (ports, data(), segment_sum()).prop_map(|((from, to), payload, sum)| {
        Transport::Udp(Udp { source_port: from, destination_port: to, payload, sum })
    });
    prop_oneof![tcp, udp].boxed()
}

fn ethernet(payload: BoxedStrategy<Network>) -> BoxedStrategy<Ethernet> {
    let ethernet =
        (mac(), mac(), tags(), payload).prop_map(|(destination, source, tags, payload)| {
            Ethernet { destination, source, ..Ethernet::of(payload) }.tagged(&tags)
        });
    ethernet.boxed()
}

fn network(transport: BoxedStrategy<Transport>) -> BoxedStrategy<Network> {
    ip(transport).prop_map(|ip| Network::Ip(Box::new(ip))).boxed()
}

/// An inner frame, of which everything is known that is to be known.
fn transparent() -> BoxedStrategy<Ethernet> {
    let icmp = data().prop_map(|bytes| Transport::Other { protocol: 1, bytes }).boxed();
    prop_oneof![
        8 => ethernet(network(tcp_or_udp())),
        1 => ethernet(network(icmp)),
        1 => ethernet(Just(Network::Arp).boxed()),
    ]
    .boxed()
}

/// An inner frame with something in it that is not looked into.
fn opaque() -> BoxedStrategy<Ethernet> {
    let tunnel = ip(tcp_or_udp()).prop_flat_map(|ip| {
        prop_oneof![Just(Transport::Ip(Box::new(ip.clone()))), Just(Transport::Gre(Box::new(ip))),]
    });
    let vxlan = (any::<u16>(), transparent()).prop_flat_map(|(port, inner)| {
        prop_oneof![
            Just(Transport::Vxlan(Vxlan::new(port, Check::Right, inner.clone()))),
            Just(Transport::Vxlan(Vxlan::new(port, Check::Zero, inner))),
        ]
    });
    // IGMP, ESP, OSPF, SCTP, UDP-Lite, one that nobody has; LLDP, MPLS, PPPoE, NSH, one of nobody's.
    // None of those that are looked into: there random data would be a packet that ends too soon.
    let protocols = select(vec![2, 50, 89, 132, 136, 253]);
    let ethertypes = select(vec![0x88cc, 0x8847, 0x8864, 0x894f, 0x88b5]);
    let other =
        (protocols, data()).prop_map(|(protocol, bytes)| Transport::Other { protocol, bytes });
    let unknown =
        (ethertypes, data()).prop_map(|(ethertype, bytes)| Network::Other { ethertype, bytes });
    prop_oneof![
        ethernet(network(tunnel.boxed())),
        ethernet(network(vxlan.boxed())),
        ethernet(network(other.boxed())),
        ethernet(unknown.boxed()),
    ]
    .boxed()
}

fn packet(inner: BoxedStrategy<Ethernet>) -> BoxedStrategy<Packet> {
    let vxlan = (any::<u16>(), 0_u32..1 << 24, inner).prop_map(|(port, vni, inner)| {
        Transport::Vxlan(Vxlan { vni, ..Vxlan::new(port, Check::Zero, inner) })
    });
    (ip(vxlan.boxed()), tags(), 0_usize..8)
        .prop_map(|(outer, tags, padding)| Packet { outer, tags, padding })
        // Nobody can tell a right sum that equals the pseudo-header sum from a pending one.
        .prop_filter("a right sum that looks pending", |packet| packet.right() != packet.pending())
        .boxed()
}

fn config() -> ProptestConfig {
    // There is no file to keep failures in: the table is the place for what was found once.
    ProptestConfig { failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn a_right_sum_is_valid(packet in packet(transparent())) {
        let frame = packet.frame(Check::Right);
        prop_assert_eq!(frame.check().unwrap(), packet.right(), "the builder against the oracle");
        for policy in [Policy::Unknown, Policy::Zero, Policy::Sum] {
            for offload in [None, Some(Offload::Unknown)] {
                let finding = found(&frame, About { policy, offload, ..NOTHING });
                prop_assert_eq!(finding.verdict, Verdict::Valid);
                prop_assert_eq!(finding.expected, 0);
            }
        }
    }

    #[test]
    fn a_right_sum_over_anything_is_never_broken(packet in packet(opaque())) {
        let frame = packet.frame(Check::Right);
        prop_assert_eq!(found(&frame, NOTHING).verdict, Verdict::Valid);
        let guess = found(&frame, About { offload: Some(Offload::Unknown), ..NOTHING }).verdict;
        prop_assert!(matches!(guess, Verdict::Valid | Verdict::Unverified), "{guess:?}");
    }

    #[test]
    fn a_pseudo_header_sum_is_pending(packet in packet(transparent()), policy in policies()) {
        let finding = found(&packet.frame(Check::Pending), About { policy, ..NOTHING });
        prop_assert_eq!(finding.verdict, Verdict::OffloadPending);
        prop_assert_eq!(finding.is_ipv6, packet.is_ipv6());
    }

    #[test]
    fn no_sum_is_zero_or_missing(packet in packet(opaque()), policy in policies()) {
        let finding = found(&packet.frame(Check::Zero), About { policy, ..NOTHING });
        let expected = if policy == Policy::Sum { Verdict::Missing } else { Verdict::Zero };
        prop_assert_eq!(finding.verdict, expected);
    }

    #[test]
    fn a_stale_sum_tells_the_port(
        packet in packet(transparent()),
        old_port in any::<u16>(),
        by_hash in any::<bool>(),
    ) {
        let frame = packet.frame(Check::Stale { old_port, old_address: None });
        let field = frame.check().unwrap();
        prop_assume!(field != packet.right() && field != packet.pending());
        let about = if by_hash {
            About { device: sends_from(old_port), ..NOTHING }
        } else {
            let device = Device { source_port_min: 1, source_port_max: 65535, ..Device::UNKNOWN };
            About { device, arithmetic_proves_nat: true, ..NOTHING }
        };
        // 0 and 65535 are the same number in this arithmetic, and 65535 is out of the range.
        prop_assume!(by_hash || (1..65535).contains(&old_port));
        prop_assume!(!by_hash || old_port < 65535);
        let finding = found(&frame, about);
        prop_assert_eq!(finding.verdict, Verdict::StaleNat);
        prop_assert_eq!(finding.proof, if by_hash { Proof::FlowHash } else { Proof::PortRange });
        prop_assert_eq!(finding.source_port_before_nat, old_port);
        prop_assert_eq!(finding.check, field);
        prop_assert_eq!(finding.expected, packet.right());
        prop_assert_eq!(finding.udp, frame.udp);
    }

    #[test]
    fn a_stale_sum_tells_the_port_of_the_hash(
        packet in packet(transparent()),
        hash in 1..=u32::MAX,
        range in any::<(u16, u16)>(),
    ) {
        let (min, max) = (range.0.min(range.1), range.0.max(range.1));
        // udp_flow_src_port in include/net/udp.h.
        let spread = u64::from(hash ^ hash.wrapping_shl(16)) * u64::from(max - min);
        let old_port = min + (spread >> 32) as u16;
        let frame = packet.frame(Check::Stale { old_port, old_address: None });
        let field = frame.check().unwrap();
        prop_assume!(field != packet.right() && field != packet.pending());
        let device = Device { source_port_min: min, source_port_max: max, ..Device::UNKNOWN };
        let finding = found(&frame, About { device, hash, ..NOTHING });
        prop_assert_eq!(finding.verdict, Verdict::StaleNat);
        prop_assert_eq!(finding.proof, Proof::FlowHash);
        prop_assert_eq!(finding.source_port_before_nat, old_port);
        prop_assert_eq!(finding.expected, packet.right());
    }

    #[test]
    fn a_rewritten_address_is_proved(
        packet in packet(transparent()),
        old_port in 0..u16::MAX,
        octets in any::<[u8; 16]>(),
    ) {
        let [a, b, c, d, ..] = octets;
        let mut device = Device { local_ipv6: octets, ..sends_from(old_port) };
        device.local_ipv4 = [a, b, c, d];
        let old_address: IpAddr =
            if packet.is_ipv6() { octets.into() } else { [a, b, c, d].into() };
        prop_assume!(!old_address.is_unspecified());
        let frame = packet.frame(Check::Stale { old_port, old_address: Some(old_address) });
        let field = frame.check().unwrap();
        prop_assume!(field != packet.right() && field != packet.pending());
        let finding = found(&frame, About { device, ..NOTHING });
        prop_assert_eq!(finding.verdict, Verdict::StaleNat);
        // An address that adds up to the same leaves no trace.
        prop_assert!(matches!(finding.proof, Proof::FlowHash | Proof::FlowHashAndAddress));
        prop_assert_eq!(finding.source_port_before_nat, old_port);
        prop_assert_eq!(finding.expected, packet.right());
    }

    #[test]
    fn any_other_value_is_bad(packet in packet(transparent()), value in 1..=u16::MAX) {
        prop_assume!(value != packet.right() && value != packet.pending());
        let frame = packet.frame(Check::Value(value));
        for policy in [Policy::Unknown, Policy::Sum] {
            let finding = found(&frame, About { policy, ..NOTHING });
            prop_assert_eq!(finding.verdict, Verdict::Bad);
            prop_assert_eq!(finding.expected, packet.right());
            prop_assert_eq!(finding.source_port_before_nat, 0);
        }
        let finding = found(&frame, About { policy: Policy::Zero, ..NOTHING });
        prop_assert_eq!(finding.verdict, Verdict::MangledZero);
        prop_assert_eq!(finding.expected, packet.right());
    }

    #[test]
    fn without_the_offload_state_nothing_wrong_is_told(
        packet in packet(prop_oneof![transparent(), opaque()].boxed()),
        value in 1..=u16::MAX,
    ) {
        prop_assume!(value != packet.right() && value != packet.pending());
        let frame = packet.frame(Check::Value(value));
        // What is right if nothing is open is not wrong without knowing that something is.
        let as_it_is = Frame { finished: frame.bytes.clone(), ..frame.clone() };
        prop_assume!(value != right_sum(&as_it_is));
        let finding = found(&frame, About { offload: Some(Offload::Unknown), ..NOTHING });
        if finding.verdict.is_broken() {
            prop_assert_eq!(finding.expected, packet.right());
        } else {
            prop_assert_eq!(finding.verdict, Verdict::Unverified);
        }
    }

    #[test]
    fn what_restore_writes_is_right(packet in packet(transparent()), value in 1..=u16::MAX) {
        let frame = packet.frame(Check::Value(value));
        let finding = found(&frame, NOTHING);
        prop_assume!(finding.verdict.is_broken());
        let remedy = remedy(FixMode::Restore, true, &finding);
        prop_assert_eq!(remedy.action, Action::Restored);
        prop_assert_eq!(remedy.check, packet.right());
        let mended = frame.with_check(remedy.check).unwrap();
        prop_assert!(sums_up(&mended));
        prop_assert_eq!(found(&mended, NOTHING).verdict, Verdict::Valid);
    }

    #[test]
    fn a_frame_that_is_cut_short_is_never_judged(
        packet in packet(prop_oneof![transparent(), opaque()].boxed()),
        value in any::<u16>(),
        len in any::<prop::sample::Index>(),
    ) {
        let frame = packet.frame(Check::Value(value));
        // What comes after the datagram is not missed.
        let end = frame.bytes.len() - packet.padding;
        let len = len.index(end);
        let captured = Captured::new(&frame.bytes[..len]);
        let told = verdict(&examine(&captured, &known(Device::UNKNOWN, Policy::Sum)));
        let expected = (len >= frame.udp + 8).then_some(Verdict::Unverified);
        prop_assert_eq!(told, expected);
    }

    #[test]
    fn a_capture_that_is_cut_short_says_what_the_whole_one_says_or_nothing(
        packet in packet(transparent()),
        check in prop_oneof![
            Just(Check::Right),
            Just(Check::Zero),
            Just(Check::Pending),
            any::<u16>().prop_map(|old_port| Check::Stale { old_port, old_address: None }),
            any::<u16>().prop_map(Check::Value),
        ],
        len in any::<prop::sample::Index>(),
    ) {
        let frame = packet.frame(check);
        let whole = Captured::new(&frame.bytes);
        let cut = Captured { bytes: &frame.bytes[..len.index(frame.bytes.len())], ..whole };
        let known = known(Device::UNKNOWN, Policy::Sum);
        let (whole, cut) = (examine(&whole, &known), examine(&cut, &known));
        match (verdict(&whole), verdict(&cut)) {
            (_, None | Some(Verdict::Unverified)) => {}
            (whole, cut) => prop_assert_eq!(whole, cut),
        }
    }

    #[test]
    fn nothing_makes_it_panic(
        bytes in vec(any::<u8>(), 0..400),
        len in 0_usize..70_000,
        is_raw_ip in any::<bool>(),
        is_gso in any::<bool>(),
        offload in offloads(),
        flow_hash in any::<u32>(),
        range in any::<(u16, u16)>(),
    ) {
        let device =
            Device { source_port_min: range.0, source_port_max: range.1, ..Device::UNKNOWN };
        let packet = Captured {
            bytes: &bytes, len, is_raw_ip, is_gso, offload, flow_hash, arithmetic_proves_nat: true,
        };
        let _ = examine(&packet, &known(device, Policy::Unknown));
    }

    #[test]
    fn nothing_that_resembles_vxlan_makes_it_panic(
        (seed, number) in any::<(u64, u64)>(),
        len in 0_usize..70_000,
        offload in offloads(),
        flow_hash in any::<u32>(),
    ) {
        let stem = Stem::grow(seed, 0).unwrap();
        let case = stem.mutant(&stem.mutation(number));
        let packet = Captured {
            len,
            is_raw_ip: case.frame.is_raw_ip,
            offload,
            flow_hash,
            ..Captured::new(&case.frame.bytes)
        };
        let _ = examine(&packet, &case.known);
    }

    #[test]
    fn sums_are_those_of_the_other_crate(
        head in vec(any::<u8>(), 0..40).prop_map(|bytes| bytes.repeat(2)),
        tail in vec(any::<u8>(), 0..200),
    ) {
        let sum = Sum::of_bytes(&head) + Sum::of_bytes(&tail);
        let other = internet_checksum::checksum(&[&head[..], &tail].concat());
        prop_assert_eq!(!sum.folded(), u16::from_be_bytes(other));
        let expected = match u16::from_be_bytes(other) {
            0 => 0xffff,
            checksum => checksum,
        };
        prop_assert_eq!(sum.checksum(), expected);
        prop_assert_eq!(sum.is_zero(), [[0; 2], [0xff; 2]].contains(&other));
    }

    #[test]
    fn taking_away_is_updating(
        bytes in vec(any::<u8>(), 2..100).prop_map(|bytes| bytes.repeat(2)),
        at in any::<prop::sample::Index>(),
        word in any::<u16>(),
    ) {
        let at = at.index(bytes.len() / 2) * 2;
        let old = u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        let sum = Sum::of_bytes(&bytes).minus(Sum::of_u16(old)) + Sum::of_u16(word);
        let other = internet_checksum::checksum(&bytes);
        let other = internet_checksum::update(other, &old.to_be_bytes(), &word.to_be_bytes());
        // The two zeros of this arithmetic are one number.
        let is = u32::from(!sum.folded()) % 0xffff;
        prop_assert_eq!(is, u32::from(u16::from_be_bytes(other)) % 0xffff);
    }

    #[test]
    fn the_ports_of_a_hash_are_within_the_range(hash in any::<u32>(), range in any::<(u16, u16)>()) {
        let device =
            Device { source_port_min: range.0, source_port_max: range.1, ..Device::UNKNOWN };
        for port in device.source_ports(hash).into_iter().flatten() {
            prop_assert!(device.may_send_from(port) || range.0 > range.1, "{port}");
        }
    }
}

fn policies() -> impl Strategy<Value = Policy> {
    select(vec![Policy::Unknown, Policy::Zero, Policy::Sum])
}

fn offloads() -> impl Strategy<Value = Offload> {
    prop_oneof![
        Just(Offload::Unknown),
        Just(Offload::Complete),
        (0_usize..70_000, 0_usize..70_000)
            .prop_map(|(start, field)| Offload::Partial { start, field }),
    ]
}

/// Whether the receiver will find the outer sum right.
fn sums_up(frame: &Frame) -> bool {
    let datagram = &frame.finished[frame.udp..];
    let len = usize::from(u16::from_be_bytes([datagram[4], datagram[5]]));
    let mut sum = Checksum::new();
    let is_ipv6 = frame.finished[frame.ip] >> 4 == 6;
    sum.add_bytes(&frame.finished[frame.ip..][if is_ipv6 { 8..40 } else { 12..20 }]);
    sum.add_bytes(&[0, 17]);
    sum.add_bytes(&datagram[4..6]);
    sum.add_bytes(&datagram[..len]);
    sum.checksum() == [0; 2]
}

/// Writing changes two bytes and no other.
#[test]
fn the_checksum_is_where_it_is_looked_for() {
    let mut runner = TestRunner::deterministic();
    let strategy = packet(transparent());
    for _ in 0..100 {
        let packet = strategy.new_tree(&mut runner).unwrap().current();
        let [zero, one] = [0, 1].map(|value| packet.frame(Check::Value(value)).bytes);
        let different = (0..zero.len()).filter(|&at| zero[at] != one[at]).collect::<Vec<_>>();
        assert_eq!(different, [packet.frame(Check::Zero).udp + UDP_CHECK + 1]);
    }
}
