//! Packets and what is to be said of each: one table for every place that has the verdict compiled
//! in. What is expected is written by hand, from the rules, never computed by what is tested.

mod extent;
mod inner;
mod outer;
mod senders;
mod verdicts;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Result;
use etherparse::TcpHeader;
use vxcsum_common::layout::{
    ANY_VNI, Action, Config, DeviceKey, FixMode, MASQUERADE_MARK, Port, Ports,
};
use vxcsum_common::outer::Beyond;
use vxcsum_common::{Device, Examined, Offload, Policy, Proof, Verdict, Watch};

use crate::packets::{Check, Ethernet, Frame, Ip, SegmentSum, Tcp, Transport, Udp, Vxlan};

pub use extent::beyond_full_sums;

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
            following: 0,
            // For the program that must tell by the length what is still to be cut.
            max_frame_len: if self.segments > 1 {
                self.frame.bytes.len() as u32 - 1
            } else {
                u32::MAX
            },
            // So little that no event is held back, but that each is asked for.
            zero: [0; 2],
            event_cost_ns: 1,
        })
    }
}

/// The verdict that the BPF program counts; none for what is not VXLAN to a watched port.
pub fn counted_verdict<Port>(examined: &Examined<Port>) -> Option<Verdict> {
    match examined {
        Examined::NotVxlan | Examined::Cut(Beyond::Outer) => None,
        Examined::Cut(Beyond::Vxlan) => Some(Verdict::Unverified),
        Examined::Vxlan(finding, _) => Some(finding.verdict),
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

    /// The same device with the old address for its own.
    fn local(self, device: Device) -> Device {
        match self.old_address() {
            IpAddr::V4(address) => Device { local_ipv4: address.octets(), ..device },
            IpAddr::V6(address) => Device { local_ipv6: address.octets(), ..device },
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
pub fn tcp(sum: SegmentSum) -> Transport {
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
        for topic in [
            verdicts::healthy,
            verdicts::mangled,
            verdicts::stale_by_port,
            verdicts::stale_by_address,
            verdicts::bad,
            verdicts::fixes,
            verdicts::coincidences,
            inner::inner_packets,
            inner::tunnels,
            outer::outer_headers,
        ] {
            let named = topic(family)?
                .into_iter()
                .map(|case| Case { name: format!("{}: {}", family.name(), case.name), ..case });
            cases.extend(named);
        }
    }
    for topic in [
        outer::ipv4_headers,
        outer::ipv6_headers,
        outer::ipv6_extension_headers,
        outer::raw_ip,
        extent::cut_short,
        extent::not_vxlan,
        extent::long,
        senders::senders,
    ] {
        cases.extend(topic()?);
    }
    Ok(cases)
}
