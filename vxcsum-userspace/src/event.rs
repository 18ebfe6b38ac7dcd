//! A broken packet as people and programs read it.

use std::fmt::{self, Display};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

use clap::ValueEnum;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use vxcsum_common::layout::{self, Action};
use vxcsum_common::outer::{self, Outer, TCP, UDP};
use vxcsum_common::verdict::Watch;
use vxcsum_common::{Captured, Cut, Device, Packet as _, Policy, Proof, Verdict, inner};

use crate::cause::Cause;
use crate::clock;
use crate::names;
use crate::plan::Plan;
use crate::stalls::Trace;

/// An event, in the order of its JSON.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Event {
    /// When the packet left, or was dropped.
    #[serde(with = "rfc3339")]
    pub time: SystemTime,
    /// Who saw it.
    pub direction: Direction,
    /// The interface it left or arrived through.
    pub interface: String,
    /// The VXLAN device that sent it, or that would have received it, where that is known.
    pub device: Option<String>,
    /// VXLAN network identifier, where it is known: it always is at the sender.
    pub vni: Option<u32>,
    /// The verdict.
    #[serde(with = "names::verdict")]
    pub verdict: Verdict,
    /// What was done.
    #[serde(with = "names::action")]
    pub action: Action,
    /// The checksum field as it was.
    pub check: Hex,
    /// The right sum, where it is known.
    pub expected: Option<Hex>,
    /// `headers` where the payload was out of reach and the inner checksum is taken to be right.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected_from: Option<String>,
    /// The outer headers.
    pub outer: OuterView,
    /// The inner headers.
    pub inner: InnerView,
    /// `skb->mark`.
    pub mark: Hex,
    /// Packets on the wire; null where that is not known of a packet that is still to be cut.
    pub segments: Option<u32>,
    /// Length in bytes, link header included.
    pub len: u32,
    /// `skb->ip_summed` by its kernel name, where it can be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ip_summed: Option<String>,
    /// What proves NAT.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub proof: Option<String>,
    /// What led to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cause: Option<Cause>,
    /// What is not for readers.
    #[serde(skip)]
    pub trace: Trace,
    /// The interface that the packet left by as rules see it, where that is known.
    #[serde(skip)]
    pub out_interface: Option<String>,
    /// Its JSON, once somebody has asked for it.
    #[serde(skip)]
    pub json: OnceLock<Box<str>>,
}

/// Who saw the packet: the node that sent it, on its way out, or the node that dropped it for its
/// outer checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "the words of the option")]
pub enum Direction {
    Egress,
    Receive,
}

/// Outer addresses and ports.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub struct OuterView {
    /// Source address.
    pub src: IpAddr,
    /// The node that it goes to.
    pub dst: IpAddr,
    /// Source port.
    pub sport: u16,
    /// Destination port.
    pub dport: u16,
    /// Source address before NAT, where that rewrote it and it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub src_before_nat: Option<IpAddr>,
    /// Source port before NAT, where that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sport_before_nat: Option<u16>,
}

/// Inner addresses and ports, as far as the inner packet has them.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct InnerView {
    /// Source address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub src: Option<IpAddr>,
    /// Destination address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dst: Option<IpAddr>,
    /// `tcp`, `udp`, `icmp`, `arp`, …
    pub proto: String,
    /// Source port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sport: Option<u16>,
    /// Destination port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dport: Option<u16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tcp_flags: Option<String>,
}

/// A number written as `0x` and its digits; 16-bit ones with all four.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hex {
    /// A checksum.
    U16(u16),
    /// A mark.
    U32(u32),
}

impl Hex {
    /// The number.
    pub const fn value(self) -> u32 {
        match self {
            Self::U16(value) => value as u32,
            Self::U32(value) => value,
        }
    }
}

impl Display for Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::U16(value) => write!(f, "{value:#06x}"),
            Self::U32(value) => write!(f, "{value:#x}"),
        }
    }
}

impl Serialize for Hex {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Hex {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let digits = text.strip_prefix("0x").ok_or_else(|| D::Error::custom("no 0x"))?;
        let value = u32::from_str_radix(digits, 16).map_err(D::Error::custom)?;
        // Only a checksum has leading zeros, or four digits by chance, which prints the same.
        match u16::try_from(value) {
            Ok(value) if digits.len() == 4 => Ok(Self::U16(value)),
            _ => Ok(Self::U32(value)),
        }
    }
}

/// An instant as RFC 3339 has it, in UTC, with nanoseconds.
pub(crate) mod rfc3339 {
    use serde::{Deserialize as _, Deserializer, Serializer};

    use super::SystemTime;

    pub(crate) fn serialize<Out: Serializer>(
        time: &SystemTime,
        out: Out,
    ) -> Result<Out::Ok, Out::Error> {
        out.collect_str(&humantime::format_rfc3339_nanos(*time))
    }

    pub(crate) fn deserialize<'de, In: Deserializer<'de>>(
        input: In,
    ) -> Result<SystemTime, In::Error> {
        let text = String::deserialize(input)?;
        humantime::parse_rfc3339(&text).map_err(serde::de::Error::custom)
    }
}

/// Where the records of one program come from.
#[derive(Clone, Debug)]
pub struct Source {
    /// The interface.
    pub interface: String,
    /// What its program works by.
    pub plan: Plan,
}

impl Source {
    /// Decodes a record; `None` for what no program of this version sends.
    pub fn decode(&self, record: &[u8]) -> Option<Event> {
        let raw: layout::Event = bytemuck::try_pod_read_unaligned(record).ok()?;
        let bytes = raw.snapshot.get(..usize::from(raw.snapshot_len))?;
        let packet = Captured {
            len: raw.len as usize,
            is_raw_ip: self.plan.config().is_raw_ip != 0,
            ..Captured::new(bytes)
        };
        let (at, ()) = outer::locate(&packet, &AnyPort).ok()??;
        let outer = Outer::read(&packet, at).ok()?;
        let inner = InnerView::of(&packet, &outer);
        let ends = inner.src.zip(inner.dst).map(|(src, dst)| [src, dst]);
        let trace = Trace::read(&raw, &packet, &outer, ends);
        let (port, vni) = (outer.destination_port, outer.vni);
        let proof = Proof::from_u8(raw.proof);
        let src_before_nat = match proof {
            Proof::FlowHashAndAddress => self.plan.local_address(port, vni, at.is_ipv6),
            _ => None,
        };
        Some(Event {
            time: clock::time_of_day(Duration::from_nanos(raw.boot_ns)),
            direction: Direction::Egress,
            interface: self.interface.clone(),
            device: self.plan.device_name(port, vni).map(str::to_owned),
            vni: Some(vni),
            verdict: Verdict::from_u8(raw.verdict)?,
            action: Action::from_u8(raw.action)?,
            check: Hex::U16(raw.check),
            expected: (raw.expected != 0).then_some(Hex::U16(raw.expected)),
            expected_from: None,
            outer: OuterView {
                src_before_nat,
                ..OuterView::read(&packet, &outer, raw.source_port_before_nat).ok()?
            },
            inner,
            mark: Hex::U32(raw.mark),
            segments: (raw.segments != 0).then_some(raw.segments),
            len: raw.len,
            ip_summed: match raw.ip_summed {
                0 => Some("none".to_owned()),
                1 => Some("unnecessary".to_owned()),
                2 => Some("complete".to_owned()),
                3 => Some("partial".to_owned()),
                _ => None,
            },
            proof: proof.as_str().map(str::to_owned),
            cause: None,
            trace,
            out_interface: self.plan.out_interface(port, vni).map(str::to_owned),
            json: OnceLock::new(),
        })
    }
}

/// Finds the headers of a packet that the program has already found to be VXLAN.
pub(crate) struct AnyPort;

impl Watch for AnyPort {
    type Port = ();

    fn port(&self, _port: u16) -> Option<()> {
        Some(())
    }

    fn policy(&self, (): (), _vni: u32, _is_ipv6: bool) -> Policy {
        Policy::Unknown
    }

    fn device(&self, _port: u16, _vni: u32) -> Device {
        Device::UNKNOWN
    }
}

impl Event {
    /// Its JSON, which is written once for all who want it: ask when it does not change any more.
    pub fn json(&self) -> &str {
        // Has no maps with keys other than strings, and none of its own code fails.
        self.json.get_or_init(|| serde_json::to_string(self).unwrap_or_default().into())
    }

    /// The other node.
    pub const fn peer(&self) -> IpAddr {
        match self.direction {
            Direction::Egress => self.outer.dst,
            Direction::Receive => self.outer.src,
        }
    }
}

impl OuterView {
    /// Of a packet with these outer headers. The port from before NAT is 0 where it is not known.
    pub(crate) fn read(
        packet: &Captured<'_>,
        outer: &Outer,
        source_port_before_nat: u16,
    ) -> Result<Self, Cut> {
        let (src, dst) = addresses(packet, outer.at.ip, outer.at.is_ipv6)?;
        Ok(Self {
            src,
            dst,
            sport: outer.source_port,
            dport: outer.destination_port,
            src_before_nat: None,
            sport_before_nat: (source_port_before_nat != 0).then_some(source_port_before_nat),
        })
    }
}

impl InnerView {
    /// Of a packet with these outer headers, as far as it can be read.
    pub(crate) fn of(packet: &Captured<'_>, outer: &Outer) -> Self {
        Self::read(packet, outer).unwrap_or_else(|Cut| Self::cut())
    }

    fn read(packet: &Captured<'_>, outer: &Outer) -> Result<Self, Cut> {
        let Some(ip) = inner::parse(packet, outer)?.ip else {
            let (ethertype, _) = outer::ethertype(packet, outer.inner())?;
            let proto = match ethertype {
                0x0806 => "arp".to_owned(),
                ethertype => format!("{ethertype:#06x}"),
            };
            return Ok(Self { proto, ..Self::default() });
        };
        let (src, dst) = addresses(packet, ip.offset, ip.is_ipv6)?;
        let mut view = Self {
            src: Some(src),
            dst: Some(dst),
            proto: match ip.protocol {
                TCP => "tcp".to_owned(),
                UDP => "udp".to_owned(),
                1 => "icmp".to_owned(),
                58 => "icmpv6".to_owned(),
                protocol => protocol.to_string(),
            },
            ..Self::default()
        };
        if matches!(ip.protocol, TCP | UDP) && ip.fragment_offset == 0 {
            let ports = packet.header::<4>(ip.payload)?;
            view.sport = Some(ports.be16::<0>());
            view.dport = Some(ports.be16::<2>());
            if ip.protocol == TCP {
                view.tcp_flags = Some(tcp_flags(packet.header::<1>(ip.payload + 13)?.u8::<0>()));
            }
        }
        Ok(view)
    }

    pub(crate) fn cut() -> Self {
        Self { proto: "unknown".to_owned(), ..Self::default() }
    }
}

/// The flags of a TCP header (RFC 9293 §3.1) in tcpdump's letters.
fn tcp_flags(flags: u8) -> String {
    const LETTERS: [(u8, char); 8] = [
        (0x01, 'F'),
        (0x02, 'S'),
        (0x04, 'R'),
        (0x08, 'P'),
        (0x20, 'U'),
        (0x40, 'E'),
        (0x80, 'W'),
        (0x10, '.'),
    ];
    LETTERS.iter().filter(|(bit, _)| flags & bit != 0).map(|&(_, letter)| letter).collect()
}

/// Source and destination address of the IP header at `ip`.
pub(crate) fn addresses(
    packet: &Captured<'_>,
    ip: usize,
    is_ipv6: bool,
) -> Result<(IpAddr, IpAddr), Cut> {
    if is_ipv6 {
        let ipv6 = |offset| {
            let words = packet.header::<16>(offset)?;
            let [high, low] =
                [(words.be32::<0>(), words.be32::<4>()), (words.be32::<8>(), words.be32::<12>())]
                    .map(|(high, low)| u128::from(high) << 32 | u128::from(low));
            Ok(Ipv6Addr::from_bits(high << 64 | low).into())
        };
        Ok((ipv6(ip + 8)?, ipv6(ip + 24)?))
    } else {
        let ipv4 = |offset| Ok(Ipv4Addr::from_bits(packet.header::<4>(offset)?.be32::<0>()).into());
        Ok((ipv4(ip + 12)?, ipv4(ip + 16)?))
    }
}

/// `10:31:02.832436Z`, for people.
pub(crate) fn time_of_day(time: SystemTime) -> String {
    let text = humantime::format_rfc3339_micros(time).to_string();
    text.split_once('T').map_or_else(|| text.clone(), |(_, time)| time.to_owned())
}

/// `10:31:02.832436 eth0 stale_nat 10.0.0.11:54947 > 10.0.0.13:8472 …`, for people.
impl Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = time_of_day(self.time);
        let device = self.device.as_deref().unwrap_or("(unknown device)");
        write!(f, "{time} {} ", self.interface)?;
        match self.direction {
            Direction::Egress => write!(f, "{}", self.verdict.as_str())?,
            Direction::Receive => {
                write!(f, "receive dropped {} from {}", self.verdict.as_str(), self.outer.src)?;
            }
        }
        match self.vni {
            Some(vni) => write!(f, " {device} vni {vni}  ")?,
            None => write!(f, " {device} vni unknown  ")?,
        }
        write!(f, "{}  check {}", self.outer, self.check)?;
        match (self.verdict, self.expected) {
            (Verdict::MangledZero, _) => write!(f, ", the device sends none")?,
            (_, Some(expected)) => write!(f, ", expected {expected}")?,
            (_, None) => {}
        }
        if let Some(from) = &self.expected_from {
            write!(f, " (from {from})")?;
        }
        write!(f, "  inner {}", self.inner)?;
        if self.mark != Hex::U32(0) {
            write!(f, "  mark {}", self.mark)?;
        }
        match self.segments {
            Some(1) => {}
            Some(segments) => write!(f, "  segments {segments}")?,
            None => write!(f, "  segments unknown")?,
        }
        match self.action {
            Action::None => Ok(()),
            action => write!(f, "  {}", action.as_str()),
        }
    }
}

impl Display for OuterView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} > {}", endpoint(self.src, self.sport), endpoint(self.dst, self.dport))?;
        match (self.src_before_nat, self.sport_before_nat) {
            (Some(src), Some(port)) => write!(f, " ({} before NAT)", endpoint(src, port)),
            (None, Some(port)) => write!(f, " (port {port} before NAT)"),
            (_, None) => Ok(()),
        }
    }
}

impl Display for InnerView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.proto)?;
        if let (Some(src), Some(dst)) = (self.src, self.dst) {
            match (self.sport, self.dport) {
                (Some(sport), Some(dport)) => {
                    write!(f, " {} > {}", endpoint(src, sport), endpoint(dst, dport))?;
                }
                _ => write!(f, " {src} > {dst}")?,
            }
        }
        match &self.tcp_flags {
            Some(flags) => write!(f, " [{flags}]"),
            None => Ok(()),
        }
    }
}

fn endpoint(address: IpAddr, port: u16) -> String {
    std::net::SocketAddr::new(address, port).to_string()
}
