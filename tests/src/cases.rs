//! Packets and what is to be said of each: one table for every place that has the verdict compiled
//! in. What is expected is written by hand, from the rules, never computed by what is tested.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Result, ensure};
use etherparse::TcpHeader;
use etherparse::checksum::Sum16BitWords;
use vxcsum_common::layout::{
    ANY_VNI, Action, Config, DeviceKey, FixMode, MASQUERADE_MARK, Port, Ports, SEEN_SUM, SEEN_ZERO,
};
use vxcsum_common::{Device, Offload, Policy, Proof, Verdict, Watch};

use crate::packets::{
    Check, Ethernet, Extension, Frame, Ip, Network, SERVICE_VLAN, SegmentSum, Tcp, Transport,
    UDP_CHECK, Udp, VLAN, Vxlan,
};

/// The watched port.
pub const PORT: u16 = 8472;
/// The source port of all outer headers: after NAT, where there is any.
pub const SOURCE_PORT: u16 = 54947;
/// The source port before NAT.
pub const OLD_PORT: u16 = 42276;
/// `IPPROTO_ICMP` and others that have no header of their own here.
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
const SCTP: u8 = 132;
const NO_NEXT_HEADER: u8 = 59;
/// `EtherType` of MPLS, for something that is not looked into.
const MPLS: u16 = 0x8847;

/// One packet and its surroundings, and what is to come out.
#[derive(Debug, Clone)]
pub struct Case {
    /// What is special about it.
    pub name: String,
    /// The packet.
    pub frame: Frame,
    /// What is known of its sender.
    pub known: Known,
    /// The fix mode.
    pub fix: FixMode,
    /// See [`Config::fix_unproven`].
    pub fix_unproven: bool,
    /// `skb->mark`.
    pub mark: u32,
    /// `gso_segs`.
    pub segments: u32,
    /// `skb->hash`.
    pub hash: u32,
    /// The states of `ip_summed` in which it is tried. What comes out is the same in all of them.
    pub offloads: Vec<Offload>,
    /// What comes out.
    pub expected: Expected,
}

/// What user space has made known.
#[derive(Debug, Clone)]
pub struct Known {
    /// The watched ports.
    pub ports: Vec<Port>,
    /// The devices.
    pub devices: Vec<(DeviceKey, Device)>,
}

impl Watch for Known {
    type Port = Port;

    fn port(&self, port: u16) -> Option<Port> {
        self.ports.iter().find(|watched| watched.port == port).copied()
    }

    fn policy(&self, port: Port, vni: u32, is_ipv6: bool) -> Policy {
        if port.by_vni == 0 {
            port.policy(is_ipv6)
        } else {
            self.device(port.port, vni).policy(is_ipv6)
        }
    }

    fn device(&self, port: u16, vni: u32) -> Device {
        let of = |vni| {
            let key = DeviceKey { vni, port: port.into() };
            self.devices.iter().find(|(known, _)| *known == key).map(|(_, device)| *device)
        };
        of(vni).or_else(|| of(ANY_VNI)).unwrap_or(Device::UNKNOWN)
    }
}

/// What is to come out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// Not VXLAN to a watched port.
    NotVxlan,
    /// A verdict that says of nothing that it is broken.
    Quiet(Verdict),
    /// Broken.
    Broken(Broken),
}

/// What is to come out for a broken packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Broken {
    /// The verdict.
    pub verdict: Verdict,
    /// Whether the right sum is to be told.
    pub is_sum_told: bool,
    /// The proof of NAT.
    pub proof: Proof,
    /// The port before NAT, or 0.
    pub source_port_before_nat: u16,
    /// What is done.
    pub action: Action,
    /// What is in the field then.
    pub after: After,
}

/// What is in the checksum field in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum After {
    /// What was.
    Unchanged,
    /// Zero.
    Zero,
    /// The sum that a receiver finds right.
    Right,
}

const MANGLED: Broken = Broken {
    verdict: Verdict::MangledZero,
    is_sum_told: true,
    proof: Proof::None,
    source_port_before_nat: 0,
    action: Action::None,
    after: After::Unchanged,
};

const BAD: Broken = Broken { verdict: Verdict::Bad, ..MANGLED };

const fn stale(proof: Proof) -> Broken {
    Broken { verdict: Verdict::StaleNat, proof, source_port_before_nat: OLD_PORT, ..MANGLED }
}

impl Broken {
    const fn then(self, action: Action, after: After) -> Self {
        Self { action, after, ..self }
    }
}

/// A device that sends from [`OLD_PORT`] only, so that no flow hash is needed to know it.
const ONE_PORT: Device = Device {
    source_port_min: OLD_PORT,
    source_port_max: OLD_PORT + 1,
    policy_ipv4: Policy::Sum as u8,
    policy_ipv6: Policy::Sum as u8,
    ..Device::UNKNOWN
};

impl Case {
    /// A packet of a device that sends sums and of which nothing else is known.
    pub fn new(name: impl Into<String>, frame: Frame, expected: Expected) -> Self {
        // Whatever has an open sum has it because the NIC is to fill it in.
        let truth = match frame.open {
            Some((start, field)) => Offload::Partial { start, field },
            None => Offload::Complete,
        };
        Self {
            name: name.into(),
            frame,
            known: Known { ports: vec![port(PORT, Policy::Sum)], devices: Vec::new() },
            fix: FixMode::Off,
            fix_unproven: false,
            mark: 0,
            segments: 1,
            hash: 0,
            offloads: vec![Offload::Unknown, truth],
            expected,
        }
    }

    fn quiet(name: impl Into<String>, frame: Frame, verdict: Verdict) -> Self {
        Self::new(name, frame, Expected::Quiet(verdict))
    }

    fn broken(name: impl Into<String>, frame: Frame, broken: Broken) -> Self {
        Self::new(name, frame, Expected::Broken(broken))
    }

    fn not_vxlan(name: impl Into<String>, frame: Frame) -> Self {
        Self::new(name, frame, Expected::NotVxlan)
    }

    fn policy(self, policy: Policy) -> Self {
        self.ports(vec![port(PORT, policy)])
    }

    fn ports(mut self, ports: Vec<Port>) -> Self {
        self.known.ports = ports;
        self
    }

    fn device(self, device: Device) -> Self {
        self.device_of(1, device)
    }

    fn device_of(mut self, vni: u32, device: Device) -> Self {
        self.known.devices.push((DeviceKey { vni, port: PORT.into() }, device));
        self
    }

    fn hash(self, hash: u32) -> Self {
        Self { hash, ..self }
    }

    fn marked(self) -> Self {
        Self { mark: MASQUERADE_MARK | 1, ..self }
    }

    fn segments(self, segments: u32) -> Self {
        Self { segments, ..self }
    }

    fn fix(self, fix: FixMode) -> Self {
        Self { fix, ..self }
    }

    fn unproven(self) -> Self {
        Self { fix_unproven: true, ..self }
    }

    /// Tried only with `ip_summed` at hand, as it truly is.
    fn offload_known(mut self) -> Self {
        self.offloads.retain(|&offload| offload != Offload::Unknown);
        self
    }

    /// Tried only without `ip_summed`.
    fn offload_unknown(self) -> Self {
        Self { offloads: vec![Offload::Unknown], ..self }
    }

    /// What the BPF program is configured with.
    pub fn config(&self) -> Result<Config> {
        let Some(ports) = Ports::new(&self.known.ports) else {
            anyhow::bail!("{}: unusable ports", self.name);
        };
        Ok(Config {
            ports,
            fix: self.fix as u8,
            fix_unproven: self.fix_unproven.into(),
            is_raw_ip: self.frame.is_raw_ip.into(),
            reserved: 0,
            // So little that no event is held back, but that each is asked for.
            event_cost_ns: 1,
        })
    }
}

/// A watched port.
pub fn port(port: u16, policy: Policy) -> Port {
    Port { port, policy_ipv4: policy as u8, policy_ipv6: policy as u8, ..Port::default() }
}

/// The family of an outer header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    const fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }

    /// A packet of this family, between the usual two.
    pub fn ip(self, transport: Transport) -> Ip {
        match self {
            Self::V4 => Ip::v4(transport),
            Self::V6 => Ip::v6(transport),
        }
    }

    fn old_address(self) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::new(192, 168, 7, 201).into(),
            Self::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0x0102, 3, 4, 5, 6).into(),
        }
    }

    fn frame(self, check: Check, inner: &Ethernet) -> Result<Frame> {
        Frame::new(&self.ip(vxlan(check, inner)).into())
    }

    fn stale(self, inner: &Ethernet) -> Result<Frame> {
        self.frame(Check::Stale { old_port: OLD_PORT, old_address: None }, inner)
    }
}

fn vxlan(check: Check, inner: &Ethernet) -> Transport {
    Transport::Vxlan(Vxlan::new(SOURCE_PORT, check, inner.clone()))
}

fn inner_ip(transport: Transport) -> Ip {
    let [source, destination] =
        [[0, 0], [2, 3]].map(|[net, host]| Ipv4Addr::new(172, 29, net, host));
    Ip { ttl: 63, ..Ip::new(source.into(), destination.into(), transport) }
}

fn inner_ip6(transport: Transport) -> Ip {
    let [source, destination] = [1, 2].map(|net| Ipv6Addr::new(0xfd00, net, 0, 0, 0, 0, 0, 5));
    Ip { ttl: 63, ..Ip::new(source.into(), destination.into(), transport) }
}

/// A SYN.
fn tcp(sum: SegmentSum) -> Transport {
    let mut header = TcpHeader::new(40233, 9153, 1_769_165_320, 43690);
    header.syn = true;
    Transport::Tcp(Tcp { header, payload: Vec::new(), sum })
}

/// A question to a name server, of so many bytes.
fn udp(sum: SegmentSum, len: usize) -> Transport {
    let payload = (0..len).map(|at| (at * 7 + 3) as u8).collect();
    Transport::Udp(Udp { source_port: 42230, destination_port: 53, payload, sum })
}

fn other(protocol: u8, len: usize) -> Transport {
    Transport::Other { protocol, bytes: (0..len).map(|at| (at * 11 + 5) as u8).collect() }
}

fn open_tcp() -> Ethernet {
    inner_ip(tcp(SegmentSum::Open)).into()
}

fn complete_tcp() -> Ethernet {
    inner_ip(tcp(SegmentSum::Complete)).into()
}

/// The whole table.
pub fn all() -> Result<Vec<Case>> {
    let mut cases = Vec::new();
    for family in [Family::V4, Family::V6] {
        for topic in [healthy, inner_packets, broken, fixes, coincidences, tunnels, outer_headers] {
            let named = topic(family)?
                .into_iter()
                .map(|case| Case { name: format!("{}: {}", family.name(), case.name), ..case });
            cases.extend(named);
        }
    }
    for topic in [ipv4_headers, ipv6_headers, cut_short, not_vxlan, raw_ip, senders, long] {
        cases.extend(topic()?);
    }
    Ok(cases)
}

fn healthy(family: Family) -> Result<Vec<Case>> {
    use Verdict::{Missing, OffloadPending, Valid, Zero};
    let (open, complete) = (open_tcp(), complete_tcp());
    let frame = |check, inner| family.frame(check, inner);
    Ok(vec![
        Case::quiet("no sum, as meant", frame(Check::Zero, &complete)?, Zero).policy(Policy::Zero),
        Case::quiet("no sum, inner sum open", frame(Check::Zero, &open)?, Zero)
            .policy(Policy::Zero),
        Case::quiet("no sum of an unknown sender", frame(Check::Zero, &open)?, Zero)
            .policy(Policy::Unknown),
        Case::quiet("no sum, GSO", frame(Check::Zero, &open)?, Zero)
            .policy(Policy::Zero)
            .segments(40),
        Case::quiet("no sum of a summing device", frame(Check::Zero, &open)?, Missing),
        Case::quiet("no sum of a summing device, GSO", frame(Check::Zero, &open)?, Missing)
            .segments(2),
        Case::quiet("sum pending", frame(Check::Pending, &complete)?, OffloadPending),
        Case::quiet("sum pending, GSO", frame(Check::Pending, &open)?, OffloadPending).segments(3),
        Case::quiet(
            "sum pending, GSO, marked for NAT",
            frame(Check::Pending, &open)?,
            OffloadPending,
        )
        .device(ONE_PORT)
        .marked()
        .segments(3),
        Case::quiet("sum pending on a zero device", frame(Check::Pending, &open)?, OffloadPending)
            .policy(Policy::Zero),
        Case::quiet("right, inner sum open", frame(Check::Right, &open)?, Valid),
        Case::quiet("right, inner sum complete", frame(Check::Right, &complete)?, Valid),
        Case::quiet("right on a zero device, inner sum open", frame(Check::Right, &open)?, Valid)
            .policy(Policy::Zero),
        Case::quiet("right on a zero device", frame(Check::Right, &complete)?, Valid)
            .policy(Policy::Zero),
        Case::quiet("right, of an unknown sender", frame(Check::Right, &open)?, Valid)
            .policy(Policy::Unknown),
        Case::quiet("right, marked, port from before NAT", frame(Check::Right, &open)?, Valid)
            .device(ONE_PORT)
            .marked(),
        Case::quiet(
            "fix modes leave a pending sum alone",
            frame(Check::Pending, &open)?,
            OffloadPending,
        )
        .fix(FixMode::Restore)
        .unproven()
        .segments(3),
        Case::quiet("fix modes leave a right sum alone", frame(Check::Right, &open)?, Valid)
            .fix(FixMode::Zero)
            .unproven(),
        Case::quiet("fix modes leave a missing sum alone", frame(Check::Zero, &open)?, Missing)
            .fix(FixMode::Restore)
            .unproven(),
    ])
}

/// What may be inside: the outer sum is right over it, and known to be wrong where it is.
fn inner_packets(family: Family) -> Result<Vec<Case>> {
    let mut cases = well_formed_inner_packets(family)?;
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

fn well_formed_inner_packets(family: Family) -> Result<Vec<Case>> {
    use SegmentSum::{Complete, Open, Value};
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
    let wrong = Value(0x1234);
    // Each is a name, the inner frame with its sum complete and, where there is one to be left to
    // the NIC, with its sum open.
    let inner: Vec<(&str, Ethernet, Option<Ethernet>)> = vec![
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
        ("no IP", Ethernet::of(Network::Other { ethertype: 0x88cc, bytes: vec![7; 50] }), None),
        ("no payload", Ethernet::of(Network::Other { ethertype: 0x88cc, bytes: vec![] }), None),
        ("IPv6 without next header", inner_ip6(other(NO_NEXT_HEADER, 0)).into(), None),
    ];
    let mut cases = Vec::new();
    for (name, complete, open) in &inner {
        for (how, inner) in [("complete", Some(complete)), ("open", open.as_ref())] {
            let Some(inner) = inner else { continue };
            let right = family.frame(Check::Right, inner)?;
            let wrong = right.clone().with_check(right.check()? ^ 0x0101)?;
            cases.extend([
                Case::quiet(format!("{name} ({how}), right"), right, Verdict::Valid),
                // Of opaque contents, only ip_summed tells that nothing is open.
                Case::broken(format!("{name} ({how}), wrong"), wrong, BAD).offload_known(),
                Case::broken(
                    format!("{name} ({how}), stale"),
                    family.stale(inner)?,
                    stale(Proof::FlowHash),
                )
                .device(ONE_PORT)
                .offload_known(),
            ]);
        }
    }
    // A right sum is right over a wrong one. Somebody else has corrupted the inner packet.
    let corrupt: Ethernet = inner_ip(tcp(wrong)).into();
    cases.push(Case::quiet(
        "a wrong inner sum in a right outer one",
        family.frame(Check::Right, &corrupt)?,
        Verdict::Valid,
    ));
    Ok(cases)
}

fn broken(family: Family) -> Result<Vec<Case>> {
    let (open, complete) = (open_tcp(), complete_tcp());
    let is_v4 = family == Family::V4;
    let local = |device: Device| match family.old_address() {
        IpAddr::V4(address) => Device { local_ipv4: address.octets(), ..device },
        IpAddr::V6(address) => Device { local_ipv6: address.octets(), ..device },
    };
    let both = Check::Stale { old_port: OLD_PORT, old_address: Some(family.old_address()) };
    let address_only =
        Check::Stale { old_port: SOURCE_PORT, old_address: Some(family.old_address()) };
    let value = |value| family.frame(Check::Value(value), &open);
    let same_port = Device {
        source_port_min: SOURCE_PORT,
        source_port_max: SOURCE_PORT + 1,
        ..local(Device::UNKNOWN)
    };
    // 0xc0de0000 as a hash: port = 32768 + (0xc0de0000 * 28231 >> 32).
    let hash = 0xc0de_0000;
    let port_of_hash = 32768 + 21268;
    let by_hash = Check::Stale { old_port: port_of_hash, old_address: None };
    let mut cases = vec![
        Case::broken("0xffff on a zero device", value(0xffff)?, MANGLED).policy(Policy::Zero),
        Case::broken(
            "0xffff on a zero device, GSO, inner frame of 5 bytes",
            {
                let cut = Vxlan {
                    inner_len: Some(5),
                    ..Vxlan::new(SOURCE_PORT, Check::Value(0xffff), open_tcp())
                };
                Frame::new(&family.ip(Transport::Vxlan(cut)).into())?
            },
            Broken { is_sum_told: false, ..MANGLED },
        )
        .policy(Policy::Zero)
        .segments(2),
        Case::broken("any value on a zero device", value(0x1357)?, MANGLED).policy(Policy::Zero),
        Case::broken(
            "0xffff on a zero device, inner sum complete",
            family.frame(Check::Value(0xffff), &complete)?,
            MANGLED,
        )
        .policy(Policy::Zero),
        Case::broken(
            "0xffff on a zero device, GSO",
            value(0xffff)?,
            Broken { is_sum_told: false, ..MANGLED },
        )
        .policy(Policy::Zero)
        .segments(17),
        // The zero was changed like a pseudo-header sum; that NAT did it, is not asked.
        Case::broken("0xffff on a zero device, marked", value(0xffff)?, MANGLED)
            .policy(Policy::Zero)
            .device(ONE_PORT)
            .marked(),
        Case::broken("stale, one port", family.stale(&open)?, stale(Proof::FlowHash))
            .device(ONE_PORT),
        Case::broken(
            "stale, one port, of an unknown sender",
            family.stale(&open)?,
            stale(Proof::FlowHash),
        )
        .policy(Policy::Unknown)
        .device(ONE_PORT),
        Case::broken(
            "stale, hash",
            family.frame(by_hash, &open)?,
            Broken { source_port_before_nat: port_of_hash, ..stale(Proof::FlowHash) },
        )
        .hash(hash),
        Case::broken("stale, but not by the hash's port", family.stale(&open)?, BAD).hash(hash),
        // The hash is the better witness: the range proves nothing where it disagrees.
        Case::broken("stale, marked, but not by the hash's port", family.stale(&open)?, BAD)
            .hash(hash)
            .marked(),
        Case::broken("stale, marked", family.stale(&open)?, stale(Proof::PortRange)).marked(),
        Case::broken("stale, without a mark or a hash", family.stale(&open)?, BAD),
        Case::broken("stale, marked, port out of range", family.stale(&open)?, BAD)
            .device(Device { source_port_min: 50000, source_port_max: 60000, ..ONE_PORT })
            .marked(),
        Case::broken("stale, at the upper end of the range", family.stale(&open)?, BAD)
            .device(Device { source_port_min: 40000, source_port_max: OLD_PORT, ..ONE_PORT })
            .marked(),
        Case::broken(
            "stale, at the lower end of the range",
            family.stale(&open)?,
            stale(Proof::PortRange),
        )
        .device(Device { source_port_min: OLD_PORT, source_port_max: 60000, ..ONE_PORT })
        .marked(),
        Case::broken(
            "address and port rewritten",
            family.frame(both, &open)?,
            stale(Proof::FlowHashAndAddress),
        )
        .device(local(ONE_PORT)),
        Case::broken(
            "address rewritten",
            family.frame(address_only, &open)?,
            Broken { source_port_before_nat: SOURCE_PORT, ..stale(Proof::FlowHashAndAddress) },
        )
        .device(same_port),
        Case::broken("address rewritten, the old one not known", family.frame(both, &open)?, BAD)
            .device(ONE_PORT),
        Case::broken("address rewritten, another one known", family.frame(both, &open)?, BAD)
            .device(Device { local_ipv4: [10, 9, 9, 9], local_ipv6: [0xfe; 16], ..ONE_PORT }),
        Case::broken(
            "one off",
            {
                let right = family.frame(Check::Right, &open)?;
                let check = right.check()?;
                right.with_check(check ^ 1)?
            },
            BAD,
        )
        .device(local(ONE_PORT)),
        Case::broken("0xffff on a summing device", value(0xffff)?, BAD),
        Case::broken("a wrong sum of an unknown sender", value(0x1357)?, BAD)
            .policy(Policy::Unknown),
        // Neither pending nor zero: GSO makes no right sum of it, and there is none yet.
        Case::broken(
            "GSO, neither pending nor zero",
            value(0x1357)?,
            Broken { is_sum_told: false, ..BAD },
        )
        .device(ONE_PORT)
        .marked()
        .segments(2),
        Case::broken(
            "GSO, what would be right if it were none",
            { family.frame(Check::Right, &open)? },
            Broken { is_sum_told: false, ..BAD },
        )
        .segments(2),
    ];
    // The NIC is to sum from the outer UDP header on, into a field that does not hold what it
    // starts from. What it will make of that is wrong, and there is no right sum before.
    for before in [0, 8] {
        let frame = family.frame(Check::Value(0x1357), &complete)?;
        let start = frame.udp - before;
        let name = format!("open from {before} bytes before the outer UDP header, not pending");
        let mut case = Case::broken(name, frame, Broken { is_sum_told: false, ..BAD });
        case.offloads = vec![Offload::Partial { start, field: case.frame.udp + UDP_CHECK }];
        cases.push(case);
    }
    if is_v4 {
        // The pseudo-header of the other family has another sum.
        cases.push(
            Case::broken(
                "pending, but for another address",
                {
                    let pending = family.frame(Check::Pending, &complete)?;
                    let check = pending.check()?;
                    pending.with_check(check.wrapping_add(1))?
                },
                BAD,
            )
            .offload_unknown(),
        );
    }
    Ok(cases)
}

fn fixes(family: Family) -> Result<Vec<Case>> {
    use Action::{None, RefusedIpv6, RefusedUnknownSum, RefusedUnproven, Restored, Zeroed};
    use FixMode::{Off, Restore, Zero};
    let open = open_tcp();
    let is_v6 = family == Family::V6;
    let zeroed = if is_v6 { (RefusedIpv6, After::Unchanged) } else { (Zeroed, After::Zero) };
    let unknown_sum = (RefusedUnknownSum, After::Unchanged);
    let unproven = (RefusedUnproven, After::Unchanged);
    let unproven_sum = if is_v6 { (RefusedIpv6, After::Unchanged) } else { unknown_sum };
    let mangled = family.frame(Check::Value(0xffff), &open)?;
    let stale_frame = family.stale(&open)?;
    let both = Check::Stale { old_port: OLD_PORT, old_address: Some(family.old_address()) };
    let bad = family.frame(Check::Value(0x2468), &open)?;
    let mut cases = Vec::new();
    for (mode, mangled_then, stale_then, bad_then, gso_then) in [
        (
            Off,
            (None, After::Unchanged),
            (None, After::Unchanged),
            (None, After::Unchanged),
            (None, After::Unchanged),
        ),
        (Zero, zeroed, zeroed, zeroed, unproven_sum),
        (
            Restore,
            (Restored, After::Zero),
            (Restored, After::Right),
            (Restored, After::Right),
            unknown_sum,
        ),
    ] {
        let name = |what: &str| format!("{what}, fix mode {}", mode.as_str());
        let unproven = if mode == Off { (None, After::Unchanged) } else { unproven };
        let gso = Broken { is_sum_told: false, ..BAD };
        let then = |broken: Broken, (action, after)| broken.then(action, after);
        cases.extend([
            Case::broken(name("mangled"), mangled.clone(), then(MANGLED, mangled_then))
                .policy(Policy::Zero)
                .fix(mode),
            Case::broken(
                name("mangled, GSO"),
                mangled.clone(),
                then(Broken { is_sum_told: false, ..MANGLED }, mangled_then),
            )
            .policy(Policy::Zero)
            .segments(9)
            .fix(mode),
            Case::broken(
                name("stale by port"),
                stale_frame.clone(),
                then(stale(Proof::FlowHash), stale_then),
            )
            .device(ONE_PORT)
            .fix(mode),
            Case::broken(
                name("stale by mark"),
                stale_frame.clone(),
                then(stale(Proof::PortRange), stale_then),
            )
            .marked()
            .fix(mode),
            Case::broken(
                name("stale by address"),
                family.frame(both, &open)?,
                then(stale(Proof::FlowHashAndAddress), stale_then),
            )
            .device(match family.old_address() {
                IpAddr::V4(address) => Device { local_ipv4: address.octets(), ..ONE_PORT },
                IpAddr::V6(address) => Device { local_ipv6: address.octets(), ..ONE_PORT },
            })
            .fix(mode),
            Case::broken(name("bad"), bad.clone(), then(BAD, unproven)).fix(mode),
            Case::broken(name("bad, unproven too"), bad.clone(), then(BAD, bad_then))
                .fix(mode)
                .unproven(),
            Case::broken(name("bad, GSO"), bad.clone(), then(gso, unproven)).segments(4).fix(mode),
            Case::broken(name("bad, GSO, unproven too"), bad.clone(), then(gso, gso_then))
                .segments(4)
                .fix(mode)
                .unproven(),
        ]);
    }
    Ok(cases)
}

/// Values that are equal by chance.
fn coincidences(family: Family) -> Result<Vec<Case>> {
    let coincident = equal_to_its_pseudo_header()?;
    let right = family.frame(Check::Right, &coincident)?;
    let wrong = right.clone().with_check(right.check()? ^ 0x8000)?;
    let tuned = |check, target| tuned_frame(family, check, target);
    Ok(vec![
        Case::quiet("a complete inner sum that looks open, right", right, Verdict::Valid),
        Case::broken("a complete inner sum that looks open, wrong", wrong, BAD),
        Case::broken(
            "a complete inner sum that looks open, stale",
            family.stale(&coincident)?,
            stale(Proof::FlowHash),
        )
        .device(ONE_PORT),
        Case::quiet(
            "a sum that is zero is sent as 0xffff",
            tuned(Check::Right, 0xffff)?,
            Verdict::Valid,
        ),
        Case::broken("0xffff would be right", tuned(Check::Value(0x1111), 0xffff)?, BAD),
        Case::broken(
            "0xffff would be right, restored",
            tuned(Check::Value(0x1111), 0xffff)?,
            BAD.then(Action::Restored, After::Right),
        )
        .fix(FixMode::Restore)
        .unproven(),
        // Nobody can tell the two apart, and pending is left alone.
        Case::quiet(
            "a right sum that equals the pseudo-header sum",
            tuned(Check::Right, pending(family)?)?,
            Verdict::OffloadPending,
        ),
        Case::quiet(
            "a right sum of 0xffff on a zero device",
            tuned(Check::Right, 0xffff)?,
            Verdict::Valid,
        )
        .policy(Policy::Zero),
    ])
}

/// An inner UDP packet whose complete sum is that of its pseudo-header.
fn equal_to_its_pseudo_header() -> Result<Ethernet> {
    let inner = |sum, last: u16| {
        let payload = [&[7; 40][..], &last.to_be_bytes()].concat();
        Ethernet::from(inner_ip(Transport::Udp(Udp {
            source_port: 1000,
            destination_port: 2000,
            payload,
            sum,
        })))
    };
    let open = Frame::new(&inner(SegmentSum::Open, 0))?;
    let Some((start, field)) = open.open else { anyhow::bail!("no open sum") };
    // The pseudo-header's sum is in the field, and once more in the pseudo-header. What is missing
    // to all ones goes into the last word.
    let sum = Sum16BitWords::new()
        .add_slice(&open.bytes[start..])
        .add_slice(&open.bytes[field..field + 2]);
    let last = u16::from_be(sum.ones_complement());
    let complete = inner(SegmentSum::Complete, last);
    let frame = Frame::new(&complete)?;
    ensure!(frame.bytes[field..field + 2] == open.bytes[field..field + 2], "no coincidence");
    Ok(complete)
}

/// The pseudo-header sum of what [`tuned_frame`] makes.
fn pending(family: Family) -> Result<u16> {
    tuned_frame(family, Check::Pending, 1)?.check()
}

/// A frame whose right sum is `right`.
fn tuned_frame(family: Family, check: Check, right: u16) -> Result<Frame> {
    let frame = |check, word: u16| {
        let bytes = [&word.to_be_bytes()[..], &[0x5a; 44]].concat();
        // In ARP no sum is ever open.
        family.frame(check, &Ethernet::of(Network::Other { ethertype: 0x0806, bytes }))
    };
    // Adding a word to the data takes it away from the sum, which is the complement.
    let untuned = frame(Check::Right, 0)?.check()?;
    let sum =
        Sum16BitWords::new().add_2bytes(untuned.to_be_bytes()).add_2bytes((!right).to_be_bytes());
    let word = !u16::from_be(sum.ones_complement());
    ensure!(frame(Check::Right, word)?.check()? == right, "no frame with the sum {right:#06x}");
    frame(check, word)
}

/// Tunnels in the tunnel: a sum may be open where nobody looks.
fn tunnels(family: Family) -> Result<Vec<Case>> {
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

/// The outer link, UDP and VXLAN headers.
fn outer_headers(family: Family) -> Result<Vec<Case>> {
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

fn ipv4_headers() -> Result<Vec<Case>> {
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

fn ipv6_headers() -> Result<Vec<Case>> {
    use Extension::{Authentication, DestinationOptions, Fragment, HopByHop, Routing};
    use Verdict::{Unverified, Valid};
    let inner = open_tcp();
    let with = |check, change: &dyn Fn(&mut Ip)| -> Result<Frame> {
        let mut ip = Ip::v6(vxlan(check, &inner));
        change(&mut ip);
        Frame::new(&ip.into())
    };
    let after =
        |check, extensions: &[Extension]| with(check, &|ip| ip.extensions = extensions.to_vec());
    let home = Ipv6Addr::new(0xfd00, 9, 0, 0, 0, 0, 0, 9);
    let arrived = Routing { segments_left: 0, home };
    let under_way = Routing { segments_left: 1, home };
    let atomic = Fragment { offset: 0, more: false };
    // UDP and VXLAN header, inner Ethernet, IPv4 and TCP header.
    let whole: u16 = 16 + 14 + 20 + 20;
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
    let cases = vec![
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
        Case::quiet("payload length", with(Check::Right, &|ip| ip.len = Some(whole))?, Valid),
        Case::quiet(
            "payload length one too short",
            with(Check::Right, &|ip| ip.len = Some(whole - 1))?,
            Unverified,
        ),
        Case::quiet(
            "payload length one too long",
            with(Check::Right, &|ip| ip.len = Some(whole + 1))?,
            Valid,
        ),
        Case::quiet("payload length 0", with(Check::Right, &|ip| ip.len = Some(0))?, Unverified),
        Case::quiet(
            "payload length that leaves nothing behind the options",
            with(Check::Right, &|ip| {
                ip.extensions = vec![HopByHop(16)];
                ip.len = Some(8);
            })?,
            Unverified,
        ),
        Case::not_vxlan("version 4 in IPv6", with(Check::Right, &|ip| ip.first_byte = Some(0x45))?),
        Case::not_vxlan("IPv6 without next header", {
            Frame::new(&Ip::v6(other(NO_NEXT_HEADER, 30)).into())?
        }),
        Case::not_vxlan("extension header beyond the end", {
            let mut frame = after(Check::Right, &[HopByHop(8)])?;
            // It claims 2,048 bytes.
            frame.bytes[frame.ip + 41] = 0xff;
            frame
        }),
    ];
    Ok(cases)
}

/// Every length of a few frames, from nothing to all.
fn cut_short() -> Result<Vec<Case>> {
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

fn not_vxlan() -> Result<Vec<Case>> {
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

fn raw_ip() -> Result<Vec<Case>> {
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

/// Who sends, by port and VNI, and what is known or learned of it.
fn senders() -> Result<Vec<Case>> {
    use Verdict::{Missing, Zero};
    let frame = |vni, port, check| {
        let vxlan =
            Vxlan { vni, destination_port: port, ..Vxlan::new(SOURCE_PORT, check, open_tcp()) };
        Frame::new(&Ip::v4(Transport::Vxlan(vxlan)).into())
    };
    let mangled = |vni| frame(vni, PORT, Check::Value(0xffff));
    let none = |vni| frame(vni, PORT, Check::Zero);
    let learned =
        |seen| vec![Port { seen_ipv4: seen, seen_ipv6: 3 - seen, ..port(PORT, Policy::Unknown) }];
    let by_vni = || vec![Port { by_vni: 1, ..port(PORT, Policy::Sum) }];
    let zero_device = Device { policy_ipv4: Policy::Zero as u8, ..ONE_PORT };
    let many: Vec<_> = (0..15).map(|at| port(20000 + 1111 * at, Policy::Zero)).collect();
    let many = [many, vec![port(PORT, Policy::Sum)]].concat();
    Ok(vec![
        Case::broken("learned to send none", mangled(1)?, MANGLED).ports(learned(SEEN_ZERO)),
        Case::quiet("learned to send none, none", none(1)?, Zero).ports(learned(SEEN_ZERO)),
        Case::broken("learned to send sums", mangled(1)?, BAD).ports(learned(SEEN_SUM)),
        Case::quiet("learned to send sums, none", none(1)?, Missing).ports(learned(SEEN_SUM)),
        Case::broken("learned to send both", mangled(1)?, BAD)
            .ports(vec![Port { seen_ipv4: 3, ..port(PORT, Policy::Unknown) }]),
        Case::quiet("learned to send both, none", none(1)?, Zero)
            .ports(vec![Port { seen_ipv4: 3, ..port(PORT, Policy::Unknown) }]),
        Case::broken("what is known is not learned", mangled(1)?, BAD)
            .ports(vec![Port { seen_ipv4: SEEN_ZERO, ..port(PORT, Policy::Sum) }]),
        Case::broken("the VNI's device sends none", mangled(5)?, MANGLED)
            .ports(by_vni())
            .device_of(5, zero_device)
            .device_of(6, ONE_PORT),
        Case::broken("the VNI's device sends sums", mangled(6)?, BAD)
            .ports(by_vni())
            .device_of(5, zero_device)
            .device_of(6, ONE_PORT),
        Case::broken("any other VNI's device sends none", mangled(7)?, MANGLED)
            .ports(by_vni())
            .device_of(ANY_VNI, zero_device)
            .device_of(6, ONE_PORT),
        Case::quiet("a VNI without a device", none(7)?, Zero)
            .ports(by_vni())
            .device_of(6, ONE_PORT),
        Case::broken(
            "the device of any VNI proves the port",
            frame(9, PORT, Check::Stale { old_port: OLD_PORT, old_address: None })?,
            stale(Proof::FlowHash),
        )
        .device_of(ANY_VNI, ONE_PORT),
        Case::quiet("the last of 16 ports", none(1)?, Missing).ports(many.clone()),
        Case::quiet("the first of 16 ports", frame(1, 20000, Check::Zero)?, Zero)
            .ports(many.clone()),
        Case::not_vxlan("none of 16 ports", frame(1, 20001, Check::Zero)?).ports(many),
        Case::quiet("port 65535", frame(1, 65535, Check::Zero)?, Missing)
            .ports(vec![port(65535, Policy::Sum)]),
    ])
}

/// Jumbo frames.
fn long() -> Result<Vec<Case>> {
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
