//! VXLAN frames, sound and unsound ones, for what judges them.
//!
//! Everything here is written forwards, from fields to bytes, and shares nothing with the parser
//! that it is there to test. Headers that are to come out broken are patched after etherparse has
//! written them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context as _, Result, ensure};
use etherparse::checksum::Sum16BitWords;
use etherparse::{
    ArpHardwareId, ArpOperation, ArpPacket, EtherType, Ethernet2Header, IpAuthHeader, IpFragOffset,
    IpNumber, Ipv4Header, Ipv4Options, Ipv6FragmentHeader, Ipv6Header, Ipv6RawExtHeader, TcpHeader,
    UdpHeader,
};

/// `EtherType` of an 802.1Q tag.
pub const VLAN: u16 = 0x8100;
/// `EtherType` of an 802.1ad service tag.
pub const SERVICE_VLAN: u16 = 0x88a8;
/// Offset of the checksum in a UDP header.
pub const UDP_CHECK: usize = 6;
/// Offset of the checksum in a TCP header.
pub const TCP_CHECK: usize = 16;
/// Lengths of the two headers.
const UDP_AND_VXLAN: usize = 16;
const UDP_LEN: usize = 8;
const ETHERNET_LEN: usize = 14;

/// A frame, and where things are in it.
#[derive(Debug, Clone)]
pub struct Frame {
    /// As the sender hands it to the NIC.
    pub bytes: Vec<u8>,
    /// As it is once every sum that is left open has been filled in.
    pub finished: Vec<u8>,
    /// Where each header begins, and where the last one ends.
    pub boundaries: Vec<usize>,
    /// Where the outer IP header begins.
    pub ip: usize,
    /// Where the outer UDP header begins, if it is a VXLAN frame.
    pub udp: usize,
    /// What `CHECKSUM_PARTIAL` would say: where the sum begins that is still to be made, and where
    /// it goes. The innermost, if there are several.
    pub open: Option<(usize, usize)>,
    /// It begins with its IP header.
    pub is_raw_ip: bool,
}

impl Frame {
    /// Lays out a frame.
    pub fn new(outer: &Ethernet) -> Result<Self> {
        let ip = outer.header_len();
        let mut place = Place::default();
        outer.locate(0, &mut place)?;
        Ok(Self {
            bytes: outer.to_bytes(Sums::AsTheyAre)?,
            finished: outer.to_bytes(Sums::Finished)?,
            boundaries: place.boundaries,
            ip,
            udp: place.udp.unwrap_or(ip),
            open: place.open,
            is_raw_ip: false,
        })
    }

    /// Lays out a packet of a device that has no link header.
    pub fn raw_ip(outer: &Ip) -> Result<Self> {
        let mut place = Place::default();
        outer.locate(0, &mut place)?;
        Ok(Self {
            bytes: outer.to_bytes(Sums::AsTheyAre)?,
            finished: outer.to_bytes(Sums::Finished)?,
            boundaries: place.boundaries,
            ip: 0,
            udp: place.udp.unwrap_or(0),
            open: place.open,
            is_raw_ip: true,
        })
    }

    /// The checksum field of the outer UDP header.
    pub fn check(&self) -> Result<u16> {
        let at = self.udp + UDP_CHECK;
        let field = self.bytes.get(at..at + 2).context("the frame ends before the checksum")?;
        Ok(u16::from_be_bytes([field[0], field[1]]))
    }

    /// The same frame with another value in that field.
    pub fn with_check(mut self, check: u16) -> Result<Self> {
        let at = self.udp + UDP_CHECK;
        for bytes in [&mut self.bytes, &mut self.finished] {
            bytes
                .get_mut(at..at + 2)
                .context("the frame ends before the checksum")?
                .copy_from_slice(&check.to_be_bytes());
        }
        Ok(self)
    }

    /// Its first `len` bytes.
    #[must_use]
    pub fn cut(mut self, len: usize) -> Self {
        self.bytes.truncate(len);
        self.finished.truncate(len);
        self
    }
}

/// A packet in a message.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().concat()
}

/// What is being laid out: everything as it is, or with all open sums filled in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sums {
    AsTheyAre,
    Finished,
}

/// Offsets that are collected on the way in.
#[derive(Debug, Default)]
struct Place {
    boundaries: Vec<usize>,
    udp: Option<usize>,
    open: Option<(usize, usize)>,
}

/// An Ethernet frame.
#[derive(Debug, Clone)]
pub struct Ethernet {
    /// Destination address.
    pub destination: [u8; 6],
    /// Source address.
    pub source: [u8; 6],
    /// VLAN tags from the outside in: their `EtherType` and what they hold.
    pub tags: Vec<[u16; 2]>,
    /// What it carries.
    pub payload: Network,
    /// Bytes after that.
    pub padding: usize,
}

/// What an Ethernet frame carries.
#[derive(Debug, Clone)]
pub enum Network {
    /// IPv4 or IPv6.
    Ip(Box<Ip>),
    /// "Who has 172.30.44.4?"
    Arp,
    /// Something else.
    Other {
        /// Its `EtherType`.
        ethertype: u16,
        /// All of it.
        bytes: Vec<u8>,
    },
}

impl From<Ip> for Ethernet {
    fn from(ip: Ip) -> Self {
        Self::of(Network::Ip(Box::new(ip)))
    }
}

impl Ethernet {
    /// A frame between the two that all frames here are between.
    pub const fn of(payload: Network) -> Self {
        Self {
            destination: [0x02, 0, 0, 0, 0, 0x0d],
            source: [0x02, 0, 0, 0, 0, 0x0b],
            tags: Vec::new(),
            payload,
            padding: 0,
        }
    }

    /// The same frame with VLAN tags.
    #[must_use]
    pub fn tagged(self, ethertypes: &[u16]) -> Self {
        let numbered = ethertypes.iter().zip(100..);
        Self { tags: numbered.map(|(&ethertype, tci)| [ethertype, tci]).collect(), ..self }
    }

    fn header_len(&self) -> usize {
        ETHERNET_LEN + 4 * self.tags.len()
    }

    fn to_bytes(&self, sums: Sums) -> Result<Vec<u8>> {
        let (ethertype, payload) = match &self.payload {
            Network::Ip(ip) => (ip.ethertype(), ip.to_bytes(sums)?),
            Network::Arp => (EtherType::ARP.0, arp_request()?),
            Network::Other { ethertype, bytes } => (*ethertype, bytes.clone()),
        };
        let mut ethertypes = self.tags.iter().map(|tag| tag[0]).chain([ethertype]);
        let first = ethertypes.next().unwrap_or(ethertype);
        let header = Ethernet2Header {
            source: self.source,
            destination: self.destination,
            ether_type: EtherType(first),
        };
        let mut bytes = header.to_bytes().to_vec();
        for (tag, next) in self.tags.iter().zip(ethertypes) {
            bytes.extend([tag[1], next].map(u16::to_be_bytes).concat());
        }
        bytes.extend(payload);
        bytes.resize(bytes.len() + self.padding, 0);
        Ok(bytes)
    }

    fn locate(&self, at: usize, place: &mut Place) -> Result<()> {
        place.boundaries.push(at);
        let end = at + self.header_len();
        place.boundaries.extend((at + ETHERNET_LEN..end).step_by(4));
        match &self.payload {
            Network::Ip(ip) => ip.locate(end, place),
            Network::Arp | Network::Other { .. } => {
                place.boundaries.push(end);
                Ok(())
            }
        }
    }
}

fn arp_request() -> Result<Vec<u8>> {
    let arp = ArpPacket::new(
        ArpHardwareId::ETHERNET,
        EtherType::IPV4,
        ArpOperation::REQUEST,
        &[0x02, 0, 0, 0, 0, 0x0b],
        &[172, 30, 17, 0],
        &[0; 6],
        &[172, 30, 44, 4],
    )?;
    Ok(arp.to_bytes().to_vec())
}

/// An IPv4 or IPv6 packet.
#[derive(Debug, Clone)]
pub struct Ip {
    /// Source address.
    pub source: IpAddr,
    /// Destination address, of the same family.
    pub destination: IpAddr,
    /// Identification; IPv4 only.
    pub identification: u16,
    /// Time to live, or hop limit.
    pub ttl: u8,
    /// The DF flag; IPv4 only.
    pub dont_fragment: bool,
    /// Options, a multiple of four bytes; IPv4 only.
    pub options: Vec<u8>,
    /// Where its payload stands in the datagram, in units of eight bytes, and whether more follows;
    /// IPv4 only.
    pub fragment: (u16, bool),
    /// Extension headers; IPv6 only.
    pub extensions: Vec<Extension>,
    /// The header's length field instead of the right one: total length, or payload length.
    pub len: Option<u16>,
    /// Its first byte instead of the right one: version, and with IPv4 header length in words.
    pub first_byte: Option<u8>,
    /// What it carries.
    pub transport: Transport,
}

/// An IPv6 extension header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Extension {
    /// Hop-by-hop options, this long in bytes: a multiple of eight.
    HopByHop(usize),
    /// Destination options, likewise.
    DestinationOptions(usize),
    /// A routing header (type 2) with the address that is left.
    Routing {
        /// 1 before that address is reached, else 0.
        segments_left: u8,
        /// The address.
        home: Ipv6Addr,
    },
    /// A fragment header.
    Fragment {
        /// In units of eight bytes.
        offset: u16,
        /// Whether more follows.
        more: bool,
    },
    /// An authentication header with so many bytes of proof: a multiple of four.
    Authentication(usize),
}

impl Extension {
    const fn number(&self) -> IpNumber {
        match self {
            Self::HopByHop(_) => IpNumber::IPV6_HEADER_HOP_BY_HOP,
            Self::DestinationOptions(_) => IpNumber::IPV6_DESTINATION_OPTIONS,
            Self::Routing { .. } => IpNumber::IPV6_ROUTE_HEADER,
            Self::Fragment { .. } => IpNumber::IPV6_FRAGMENTATION_HEADER,
            Self::Authentication(_) => IpNumber::AUTHENTICATION_HEADER,
        }
    }

    fn to_bytes(&self, next: IpNumber) -> Result<Vec<u8>> {
        match self {
            // PadN fills all of it but the two bytes before.
            Self::HopByHop(len) | Self::DestinationOptions(len) => {
                ensure!(*len >= 8, "options take at least 8 bytes, not {len}");
                let mut options = vec![0; len - 2];
                options[0] = 1;
                options[1] = u8::try_from((len - 4).min(255))?;
                Ok(Ipv6RawExtHeader::new_raw(next, &options)?.to_bytes().to_vec())
            }
            Self::Routing { segments_left, home } => {
                let routing = [&[2, *segments_left, 0, 0, 0, 0], &home.octets()[..]].concat();
                Ok(Ipv6RawExtHeader::new_raw(next, &routing)?.to_bytes().to_vec())
            }
            Self::Fragment { offset, more } => {
                let offset = IpFragOffset::try_new(*offset)?;
                Ok(Ipv6FragmentHeader::new(next, offset, *more, 0x1234_5678).to_bytes().to_vec())
            }
            Self::Authentication(len) => {
                Ok(IpAuthHeader::new(next, 7, 1, &vec![0xa5; *len])?.to_bytes().to_vec())
            }
        }
    }
}

impl Ip {
    /// A packet from one address to another.
    pub fn new(source: IpAddr, destination: IpAddr, transport: Transport) -> Self {
        Self {
            source,
            destination,
            identification: 0x5555,
            ttl: 64,
            dont_fragment: false,
            options: Vec::new(),
            fragment: (0, false),
            extensions: Vec::new(),
            len: None,
            first_byte: None,
            transport,
        }
    }

    /// A packet from 10.0.0.11 to 10.0.0.13.
    pub fn v4(transport: Transport) -> Self {
        let [source, destination] = [11, 13].map(|host| Ipv4Addr::new(10, 0, 0, host).into());
        Self::new(source, destination, transport)
    }

    /// A packet from `fd00:10::11` to `fd00:10::13`.
    pub fn v6(transport: Transport) -> Self {
        let [source, destination] =
            [0x11, 0x13].map(|host| Ipv6Addr::new(0xfd00, 0x10, 0, 0, 0, 0, 0, host).into());
        Self::new(source, destination, transport)
    }

    const fn ethertype(&self) -> u16 {
        if self.source.is_ipv4() { EtherType::IPV4.0 } else { EtherType::IPV6.0 }
    }

    fn extensions(&self) -> Result<Vec<u8>> {
        let next = self.extensions.iter().skip(1).map(Extension::number);
        let next = next.chain([self.transport.number()]);
        let headers = self.extensions.iter().zip(next).map(|(header, next)| header.to_bytes(next));
        Ok(headers.collect::<Result<Vec<_>>>()?.concat())
    }

    fn header_len(&self) -> Result<usize> {
        Ok(match self.source {
            IpAddr::V4(_) => Ipv4Header::MIN_LEN + self.options.len(),
            IpAddr::V6(_) => Ipv6Header::LEN + self.extensions()?.len(),
        })
    }

    fn to_bytes(&self, sums: Sums) -> Result<Vec<u8>> {
        let payload = self.transport.to_bytes(self, sums)?;
        let mut bytes = match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                self.ipv4_header(source, destination, payload.len())?
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                self.ipv6_header(source, destination, payload.len())?
            }
            _ => anyhow::bail!("{} and {} do not go together", self.source, self.destination),
        };
        bytes[0] = self.first_byte.unwrap_or(bytes[0]);
        bytes.extend(payload);
        Ok(bytes)
    }

    fn ipv4_header(&self, source: Ipv4Addr, destination: Ipv4Addr, len: usize) -> Result<Vec<u8>> {
        ensure!(self.extensions.is_empty(), "IPv4 has no extension headers");
        let total_len = Ipv4Header::MIN_LEN + self.options.len() + len;
        let mut header = Ipv4Header {
            total_len: self.len.map_or_else(|| u16::try_from(total_len), Ok)?,
            identification: self.identification,
            dont_fragment: self.dont_fragment,
            more_fragments: self.fragment.1,
            fragment_offset: IpFragOffset::try_new(self.fragment.0)?,
            time_to_live: self.ttl,
            protocol: self.transport.number(),
            source: source.octets(),
            destination: destination.octets(),
            options: Ipv4Options::try_from(&self.options[..])?,
            ..Ipv4Header::default()
        };
        header.header_checksum = header.calc_header_checksum();
        Ok(header.to_bytes().to_vec())
    }

    fn ipv6_header(&self, source: Ipv6Addr, destination: Ipv6Addr, len: usize) -> Result<Vec<u8>> {
        let extensions = self.extensions()?;
        let payload_len = extensions.len() + len;
        let transport = self.transport.number();
        let header = Ipv6Header {
            payload_length: self.len.map_or_else(|| u16::try_from(payload_len), Ok)?,
            next_header: self.extensions.first().map_or(transport, Extension::number),
            hop_limit: self.ttl,
            source: source.octets(),
            destination: destination.octets(),
            ..Ipv6Header::default()
        };
        Ok([&header.to_bytes()[..], &extensions].concat())
    }

    fn locate(&self, at: usize, place: &mut Place) -> Result<()> {
        place.boundaries.push(at);
        let fixed = if self.source.is_ipv4() { Ipv4Header::MIN_LEN } else { Ipv6Header::LEN };
        let end = at + self.header_len()?;
        if at + fixed < end {
            place.boundaries.push(at + fixed);
        }
        self.transport.locate(end, place)
    }

    /// The sum of the pseudo-header for `len` bytes. The address at the end of a routing header is
    /// where the packet is really going (RFC 8200 §8.1).
    fn pseudo_header(&self, len: usize) -> Result<Sum16BitWords> {
        let left = self.extensions.iter().find_map(|extension| match extension {
            Extension::Routing { segments_left: 1.., home } => Some(IpAddr::from(*home)),
            _ => None,
        });
        let destination = left.unwrap_or(self.destination);
        Ok(Sum16BitWords::new()
            .add_slice(&octets(self.source))
            .add_slice(&octets(destination))
            .add_2bytes(u16::from(self.transport.number().0).to_be_bytes())
            .add_2bytes(u16::try_from(len)?.to_be_bytes()))
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// What an IP packet carries.
#[derive(Debug, Clone)]
pub enum Transport {
    /// A TCP segment.
    Tcp(Tcp),
    /// A UDP datagram.
    Udp(Udp),
    /// A UDP datagram with an Ethernet frame in it.
    Vxlan(Vxlan),
    /// Another IP packet: IPIP, SIT.
    Ip(Box<Ip>),
    /// GRE without options, with another IP packet in it.
    Gre(Box<Ip>),
    /// Something else.
    Other {
        /// Its IP protocol number.
        protocol: u8,
        /// All of it.
        bytes: Vec<u8>,
    },
}

/// What is in a TCP or UDP checksum field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SegmentSum {
    /// The right sum.
    Complete,
    /// The sum of the pseudo-header alone, as `CHECKSUM_PARTIAL` leaves it for the NIC.
    Open,
    /// This.
    Value(u16),
}

/// A TCP segment.
#[derive(Debug, Clone)]
pub struct Tcp {
    /// Ports, flags, window, options and so on; the checksum is not looked at.
    pub header: TcpHeader,
    /// Its data.
    pub payload: Vec<u8>,
    /// Its checksum.
    pub sum: SegmentSum,
}

/// A UDP datagram.
#[derive(Debug, Clone)]
pub struct Udp {
    /// Source port.
    pub source_port: u16,
    /// Destination port.
    pub destination_port: u16,
    /// Its data.
    pub payload: Vec<u8>,
    /// Its checksum.
    pub sum: SegmentSum,
}

/// An Ethernet frame in a UDP datagram.
#[derive(Debug, Clone)]
pub struct Vxlan {
    /// UDP source port.
    pub source_port: u16,
    /// UDP destination port.
    pub destination_port: u16,
    /// The UDP length field instead of the right one.
    pub udp_len: Option<u16>,
    /// The UDP checksum.
    pub check: Check,
    /// The VXLAN flags.
    pub flags: u8,
    /// The VXLAN network identifier.
    pub vni: u32,
    /// The inner frame.
    pub inner: Box<Ethernet>,
    /// How much there is of it, if not all.
    pub inner_len: Option<usize>,
}

/// What is in the UDP checksum field of a VXLAN packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Check {
    /// None.
    Zero,
    /// The sum of the pseudo-header, for NIC or GSO to finish.
    Pending,
    /// What the receiver will find right once every inner sum is filled in.
    Right,
    /// What a right sum becomes when NAT rewrites the header around an open inner sum.
    Stale {
        /// The source port before.
        old_port: u16,
        /// The source address before, if that is rewritten as well.
        old_address: Option<IpAddr>,
    },
    /// This.
    Value(u16),
}

impl Vxlan {
    /// An inner frame to port 8472, as VNI 1.
    pub fn new(source_port: u16, check: Check, inner: Ethernet) -> Self {
        Self {
            source_port,
            destination_port: 8472,
            udp_len: None,
            check,
            flags: 0x08,
            vni: 1,
            inner: Box::new(inner),
            inner_len: None,
        }
    }

    fn to_bytes(&self, ip: &Ip, sums: Sums) -> Result<Vec<u8>> {
        let check = match (self.check, sums) {
            (Check::Value(check), _) => check,
            (Check::Zero, _) => 0,
            (Check::Pending, Sums::AsTheyAre) => self.pending(ip)?,
            (Check::Pending | Check::Right, _) => self.right(ip)?,
            (Check::Stale { old_port, old_address }, _) => self.stale(ip, old_port, old_address)?,
        };
        self.with_check(check, sums)
    }

    fn with_check(&self, check: u16, sums: Sums) -> Result<Vec<u8>> {
        let mut inner = self.inner.to_bytes(sums)?;
        inner.truncate(self.inner_len.unwrap_or(inner.len()));
        let header = UdpHeader {
            source_port: self.source_port,
            destination_port: self.destination_port,
            length: self.length(inner.len())?,
            checksum: check,
        };
        let [vni @ .., _] = (self.vni << 8).to_be_bytes();
        let vxlan = [&[self.flags, 0, 0, 0][..], &vni, &[0]].concat();
        Ok([&header.to_bytes()[..], &vxlan, &inner].concat())
    }

    fn length(&self, inner: usize) -> Result<u16> {
        Ok(self.udp_len.map_or_else(|| u16::try_from(UDP_AND_VXLAN + inner), Ok)?)
    }

    fn pending(&self, ip: &Ip) -> Result<u16> {
        let bytes = self.with_check(0, Sums::AsTheyAre)?;
        let length = self.length(bytes.len() - UDP_AND_VXLAN)?;
        Ok(folded(&ip.pseudo_header(length.into())?))
    }

    fn right(&self, ip: &Ip) -> Result<u16> {
        let mut bytes = self.with_check(0, Sums::Finished)?;
        let length = usize::from(self.length(bytes.len() - UDP_AND_VXLAN)?);
        bytes.truncate(length);
        Ok(checksum(&ip.pseudo_header(length)?.add_slice(&bytes)))
    }

    /// `udp_manip_pkt` with `ip_summed == CHECKSUM_PARTIAL`, step by step.
    fn stale(&self, ip: &Ip, old_port: u16, old_address: Option<IpAddr>) -> Result<u16> {
        let old = Self { source_port: old_port, ..self.clone() };
        let old_ip = Ip { source: old_address.unwrap_or(ip.source), ..ip.clone() };
        let check = old.right(&old_ip)?;
        // nf_csum_update: inet_proto_csum_replace4 and 16 take the field for a pseudo-header sum
        // and add the complement of the old address and the new address, without inverting.
        let complement: Vec<_> = octets(old_ip.source).iter().map(|byte| !byte).collect();
        let sum = Sum16BitWords::new()
            .add_2bytes(check.to_be_bytes())
            .add_slice(&complement)
            .add_slice(&octets(ip.source));
        // inet_proto_csum_replace2 with `pseudohdr` false: nothing for CHECKSUM_PARTIAL, so the
        // port is not in it. In the end zero becomes CSUM_MANGLED_0.
        Ok(match folded(&sum) {
            0 => 0xffff,
            check => check,
        })
    }
}

/// The sum itself, in host byte order.
fn folded(sum: &Sum16BitWords) -> u16 {
    !u16::from_be(sum.ones_complement())
}

/// The complement of the sum, as it goes into a UDP checksum field, in host byte order.
fn checksum(sum: &Sum16BitWords) -> u16 {
    u16::from_be(sum.to_ones_complement_with_no_zero())
}

/// Fills in the checksum of a TCP or UDP segment in which it is zero yet.
fn sum_segment(bytes: &mut [u8], field: usize, sum: SegmentSum, ip: &Ip, sums: Sums) -> Result<()> {
    let pseudo_header = ip.pseudo_header(bytes.len())?;
    let value = match (sum, sums) {
        (SegmentSum::Value(value), _) => value,
        (SegmentSum::Open, Sums::AsTheyAre) => folded(&pseudo_header),
        (SegmentSum::Open | SegmentSum::Complete, _) => {
            let sum = pseudo_header.add_slice(bytes);
            if field == UDP_CHECK { checksum(&sum) } else { !folded(&sum) }
        }
    };
    bytes[field..field + 2].copy_from_slice(&value.to_be_bytes());
    Ok(())
}

impl Transport {
    fn number(&self) -> IpNumber {
        match self {
            Self::Tcp(_) => IpNumber::TCP,
            Self::Udp(_) | Self::Vxlan(_) => IpNumber::UDP,
            Self::Ip(ip) if ip.source.is_ipv4() => IpNumber::IPV4,
            Self::Ip(_) => IpNumber::IPV6,
            Self::Gre(_) => IpNumber::GRE,
            Self::Other { protocol, .. } => IpNumber(*protocol),
        }
    }

    fn to_bytes(&self, ip: &Ip, sums: Sums) -> Result<Vec<u8>> {
        match self {
            Self::Tcp(tcp) => {
                let header = TcpHeader { checksum: 0, ..tcp.header.clone() };
                let mut bytes = [&header.to_bytes()[..], &tcp.payload].concat();
                sum_segment(&mut bytes, TCP_CHECK, tcp.sum, ip, sums)?;
                Ok(bytes)
            }
            Self::Udp(udp) => {
                let header = UdpHeader {
                    source_port: udp.source_port,
                    destination_port: udp.destination_port,
                    length: u16::try_from(UDP_LEN + udp.payload.len())?,
                    checksum: 0,
                };
                let mut bytes = [&header.to_bytes()[..], &udp.payload].concat();
                sum_segment(&mut bytes, UDP_CHECK, udp.sum, ip, sums)?;
                Ok(bytes)
            }
            Self::Vxlan(vxlan) => vxlan.to_bytes(ip, sums),
            Self::Ip(inner) => inner.to_bytes(sums),
            Self::Gre(inner) => {
                let header = [[0, 0], inner.ethertype().to_be_bytes()].concat();
                Ok([header, inner.to_bytes(sums)?].concat())
            }
            Self::Other { bytes, .. } => Ok(bytes.clone()),
        }
    }

    fn locate(&self, at: usize, place: &mut Place) -> Result<()> {
        place.boundaries.push(at);
        match self {
            Self::Tcp(tcp) => {
                place.boundaries.push(at + tcp.header.header_len());
                if tcp.sum == SegmentSum::Open {
                    place.open = Some((at, at + TCP_CHECK));
                }
            }
            Self::Udp(udp) => {
                place.boundaries.push(at + UDP_LEN);
                if udp.sum == SegmentSum::Open {
                    place.open = Some((at, at + UDP_CHECK));
                }
            }
            Self::Vxlan(vxlan) => {
                place.boundaries.push(at + UDP_LEN);
                // Of a tunnel in the tunnel, the outer one is the one that is looked at.
                place.udp = place.udp.or(Some(at));
                if vxlan.check == Check::Pending {
                    place.open = Some((at, at + UDP_CHECK));
                }
                vxlan.inner.locate(at + UDP_AND_VXLAN, place)?;
            }
            Self::Ip(ip) => {
                // The boundary is that of the inner packet.
                place.boundaries.pop();
                ip.locate(at, place)?;
            }
            Self::Gre(ip) => ip.locate(at + 4, place)?,
            Self::Other { .. } => {}
        }
        Ok(())
    }
}
