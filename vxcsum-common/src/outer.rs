//! The outer headers: link, VLAN, IPv4 or IPv6, UDP, VXLAN.

use crate::{Cut, Packet, Sum, Watch};

/// `IPPROTO_UDP`.
pub const UDP: u8 = 17;
/// `IPPROTO_TCP`.
pub const TCP: u8 = 6;
/// Length of a UDP header in bytes (RFC 768).
pub const UDP_LEN: usize = 8;
/// Length of a VXLAN header in bytes (RFC 7348 §5).
pub const VXLAN_LEN: usize = 8;

/// `ETH_P_IP`.
pub const ETHERTYPE_IPV4: u16 = 0x0800;
/// `ETH_P_IPV6`.
pub const ETHERTYPE_IPV6: u16 = 0x86dd;
const ETHERNET_LEN: usize = 14;
const VLAN_LEN: usize = 4;
/// Tags that are looked through, in the frame; one more may be held beside it by the skb.
const MAX_VLAN_TAGS: usize = 2;
/// IPv6 extension headers that are looked through (RFC 8200 §4.1 lists six, each once).
const MAX_EXTENSION_HEADERS: usize = 6;
/// A chain of extension headers this long is not followed further, so that no offset grows beyond
/// what the BPF program can reach. One header has 2048 bytes at the most.
const MAX_EXTENSIONS_LEN: usize = 1024;
const IPV4_LEN: usize = 20;
const IPV6_LEN: usize = 40;
/// First byte of an IPv4 header without options.
const PLAIN_IPV4: u8 = 0x45;

/// An IP header and where it leads.
#[derive(Clone, Copy, Debug)]
pub struct Ip {
    /// Offset of the IP header in bytes.
    pub offset: usize,
    /// IPv6, else IPv4.
    pub is_ipv6: bool,
    /// Protocol of the payload (IANA protocol number).
    pub protocol: u8,
    /// Offset of the payload in bytes, past options and extension headers.
    pub payload: usize,
    /// Offset in bytes of what follows the payload, by the header's length field; less than that of
    /// the payload where the header contradicts itself.
    pub end: usize,
    /// Where the payload stands in its datagram, in units of 8 bytes.
    pub fragment_offset: u16,
    /// Not zero where more of the datagram follows.
    pub more_fragments: u16,
    /// Not zero where an IPv6 routing header is not used up: the last address of the path is the
    /// one in the pseudo-header (RFC 8200 §8.1), not the one in the IP header.
    pub segments_left: u8,
}

impl Ip {
    /// Whether the payload is a datagram of its own, and its pseudo-header can be told.
    #[inline(always)]
    pub const fn is_whole(&self) -> bool {
        self.fragment_offset == 0 && self.more_fragments == 0 && self.segments_left == 0
    }

    /// The sum of the pseudo-header for `len` bytes of `protocol` (RFC 768, RFC 8200 §8.1).
    #[inline(always)]
    pub fn pseudo_header<P: Packet>(&self, packet: &P, len: usize) -> Result<Sum, Cut> {
        let addresses = addresses(packet, self.offset, self.is_ipv6)?;
        Ok(addresses + Sum::of_u16(u16::from(self.protocol)) + Sum::of_u16(len as u16))
    }

    /// The sum of the header, with options and extension headers.
    #[inline(always)]
    pub fn header<P: Packet>(&self, packet: &P) -> Result<Sum, Cut> {
        // In parts that both have, and one that only IPv6 has: LLVM would join the sums of two
        // headers at an offset from either, which verifiers before 5.3 do not follow.
        let mut fixed = packet.header::<IPV4_LEN>(self.offset)?.sum::<0, IPV4_LEN>();
        let mut end = self.offset + IPV4_LEN;
        if self.is_ipv6 {
            const REST: usize = IPV6_LEN - IPV4_LEN;
            fixed = fixed + packet.header::<REST>(end)?.sum::<0, REST>();
            end += REST;
        }
        match self.payload - end {
            0 => Ok(fixed),
            len => Ok(fixed + packet.sum(end, len).ok_or(Cut)?),
        }
    }
}

/// The sum of source and destination address of the IP header at `offset`.
#[inline(always)]
fn addresses<P: Packet>(packet: &P, offset: usize, is_ipv6: bool) -> Result<Sum, Cut> {
    // As in `Ip::header`: what both have lies in the middle of the addresses of IPv6.
    let common = packet.header::<8>(offset + 12)?.sum::<0, 8>();
    if !is_ipv6 {
        return Ok(common);
    }
    let all = packet.header::<32>(offset + 8)?;
    Ok(common + all.sum::<0, 4>() + all.sum::<12, 20>())
}

/// Where the outer headers of a VXLAN packet are.
///
/// It fits a register: the BPF program hands it to functions that the verifier walks on their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Location {
    /// Offset of the outer IP header in bytes.
    pub ip: usize,
    /// Offset of the outer UDP header in bytes.
    pub udp: usize,
    /// IPv6, else IPv4.
    pub is_ipv6: bool,
    /// The UDP datagram lies in this packet as a whole, and its lengths agree.
    pub is_whole: bool,
}

impl Location {
    /// In one register.
    #[inline(always)]
    pub const fn to_bits(self) -> u64 {
        (self.ip as u64 & 0xffff)
            | (self.udp as u64 & 0xffff) << 16
            | (self.is_ipv6 as u64) << 32
            | (self.is_whole as u64) << 33
    }

    /// From one register.
    #[inline(always)]
    pub const fn from_bits(bits: u64) -> Self {
        Self {
            ip: (bits & 0xffff) as usize,
            udp: (bits >> 16 & 0xffff) as usize,
            is_ipv6: bits >> 32 & 1 != 0,
            is_whole: bits >> 33 & 1 != 0,
        }
    }
}

/// The outer headers of a VXLAN packet.
#[derive(Clone, Copy, Debug)]
pub struct Outer {
    /// Where they are.
    pub at: Location,
    /// UDP length in bytes, header included.
    pub udp_len: usize,
    /// UDP source port, host byte order.
    pub source_port: u16,
    /// UDP destination port, host byte order.
    pub destination_port: u16,
    /// UDP checksum field, host byte order.
    pub check: u16,
    /// VXLAN network identifier.
    pub vni: u32,
    /// The sum of the pseudo-header.
    pub pseudo_header: Sum,
    /// The sum of UDP header, without its checksum field, and VXLAN header.
    pub headers: Sum,
}

impl Outer {
    /// Reads the headers that were found at `at`.
    #[inline(always)]
    pub fn read<P: Packet>(packet: &P, at: Location) -> Result<Self, Cut> {
        let addresses = addresses(packet, at.ip, at.is_ipv6)?;
        let headers = packet.header::<{ UDP_LEN + VXLAN_LEN }>(at.udp)?;
        let udp_len = udp_len(packet, at.udp, headers.be16::<4>());
        Ok(Self {
            at,
            udp_len,
            source_port: headers.be16::<0>(),
            destination_port: headers.be16::<2>(),
            check: headers.be16::<6>(),
            vni: headers.be32::<12>() >> 8,
            pseudo_header: addresses + Sum::of_u16(u16::from(UDP)) + sum_of_len(udp_len),
            headers: headers.sum::<0, 6>() + headers.sum::<8, VXLAN_LEN>(),
        })
    }

    /// Offset of the inner frame in bytes.
    #[inline(always)]
    pub const fn inner(&self) -> usize {
        self.at.udp + UDP_LEN + VXLAN_LEN
    }
}

/// The length of the UDP datagram at `offset`, by its length field. One that is too long for the
/// field has zero there, or, on kernels that do not take care, the low half of its length.
#[inline(always)]
fn udp_len<P: Packet>(packet: &P, offset: usize, field: u16) -> usize {
    if packet.may_lack_length() {
        let all = packet.len().saturating_sub(offset);
        if all > usize::from(u16::MAX) && (field == 0 || field == all as u16) {
            return all;
        }
    }
    usize::from(field)
}

/// A length in a pseudo-header: 32 bits (RFC 8200 §8.1), the upper of which are zero unless the
/// packet is too long for its length field.
#[inline(always)]
fn sum_of_len(len: usize) -> Sum {
    Sum::of_u16(len as u16) + Sum::of_u16((len >> 16) as u16)
}

/// The `EtherType` of the Ethernet frame at `offset`, and the offset of what it announces: VLAN tags
/// are looked through.
#[inline(always)]
pub fn ethertype<P: Packet>(packet: &P, offset: usize) -> Result<(u16, usize), Cut> {
    let ethernet = packet.header::<ETHERNET_LEN>(offset)?;
    let mut next = offset + ETHERNET_LEN;
    // Most are this one, for which a comparison as it lies in memory is enough.
    if ethernet.is_be16::<12>(ETHERTYPE_IPV4) {
        return Ok((ETHERTYPE_IPV4, next));
    }
    let mut ethertype = ethernet.be16::<12>();
    for _ in 0..MAX_VLAN_TAGS {
        // 802.1Q, 802.1ad, and the EtherType that some switches used for the outer tag before it.
        if !matches!(ethertype, 0x8100 | 0x88a8 | 0x9100) {
            break;
        }
        if P::IS_PLAIN {
            return Err(Cut);
        }
        ethertype = packet.header::<VLAN_LEN>(next)?.be16::<2>();
        next = packet.forget(next + VLAN_LEN);
    }
    Ok((ethertype, next))
}

/// The sum of an Ethernet header at `offset`, with its VLAN tags, up to `end`.
#[inline(always)]
pub fn ethernet<P: Packet>(packet: &P, offset: usize, end: usize) -> Result<Sum, Cut> {
    let sum = packet.header::<ETHERNET_LEN>(offset)?.sum::<0, ETHERNET_LEN>();
    match end - offset - ETHERNET_LEN {
        0 => Ok(sum),
        tags_len => Ok(sum + packet.sum(offset + ETHERNET_LEN, tags_len).ok_or(Cut)?),
    }
}

/// Parses the IP header at `offset`. `None` where there is none, or one that no stack accepts.
#[inline(always)]
pub fn ip<P: Packet>(packet: &P, ethertype: u16, offset: usize) -> Result<Option<Ip>, Cut> {
    match ethertype {
        ETHERTYPE_IPV4 => ipv4(packet, offset),
        ETHERTYPE_IPV6 => ipv6(packet, offset),
        _ => Ok(None),
    }
}

#[inline(always)]
fn ipv4<P: Packet>(packet: &P, offset: usize) -> Result<Option<Ip>, Cut> {
    let header = packet.header::<IPV4_LEN>(offset)?;
    let version_and_len = match header.u8::<0>() {
        PLAIN_IPV4 => PLAIN_IPV4,
        _ if P::IS_PLAIN => return Err(Cut),
        other => other,
    };
    let header_len = usize::from(version_and_len & 0x0f) * 4;
    if version_and_len >> 4 != 4 || header_len < IPV4_LEN {
        return Ok(None);
    }
    Ok(Some(Ip {
        offset,
        is_ipv6: false,
        protocol: header.u8::<9>(),
        payload: offset + header_len,
        end: match header.be16::<2>() {
            0 if packet.may_lack_length() => packet.len(),
            total_len => offset + usize::from(total_len),
        },
        fragment_offset: header.be16_bits::<6>(0x1fff),
        more_fragments: header.be16_bits::<6>(0x2000),
        segments_left: 0,
    }))
}

#[inline(always)]
fn ipv6<P: Packet>(packet: &P, offset: usize) -> Result<Option<Ip>, Cut> {
    let header = packet.header::<IPV6_LEN>(offset)?;
    if header.u8::<0>() >> 4 != 6 {
        return Ok(None);
    }
    let extensions = match header.u8::<6>() {
        protocol @ (TCP | UDP) => Extensions::none(protocol),
        _ if P::IS_PLAIN => return Err(Cut),
        protocol => packet.extension_headers(protocol, offset + IPV6_LEN)?,
    };
    Ok(Some(Ip {
        offset,
        is_ipv6: true,
        protocol: extensions.protocol,
        payload: offset + IPV6_LEN + extensions.len,
        end: match header.be16::<4>() {
            0 if packet.may_lack_length() => packet.len(),
            len => offset + IPV6_LEN + usize::from(len),
        },
        fragment_offset: extensions.fragment_offset,
        more_fragments: extensions.more_fragments,
        segments_left: extensions.segments_left,
    }))
}

/// A chain of IPv6 extension headers (RFC 8200 §4). It fits a register, as [`Location`] does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extensions {
    /// What follows the chain.
    pub protocol: u8,
    /// Its length in bytes.
    pub len: usize,
    /// As in [`Ip::fragment_offset`].
    pub fragment_offset: u16,
    /// As in [`Ip::more_fragments`].
    pub more_fragments: u16,
    /// As in [`Ip::segments_left`].
    pub segments_left: u8,
}

impl Extensions {
    /// No extension header.
    #[inline(always)]
    pub const fn none(protocol: u8) -> Self {
        Self { protocol, len: 0, fragment_offset: 0, more_fragments: 0, segments_left: 0 }
    }

    /// Looks through the extension headers from `protocol` at `offset` on.
    #[inline(always)]
    pub fn read<P: Packet>(packet: &P, protocol: u8, offset: usize) -> Result<Self, Cut> {
        let mut extensions = Self::none(protocol);
        for _ in 0..MAX_EXTENSION_HEADERS {
            if extensions.fragment_offset != 0
                || extensions.len > MAX_EXTENSIONS_LEN
                || !extensions.next(packet, offset)?
            {
                break;
            }
            extensions.len = packet.forget(extensions.len);
        }
        Ok(extensions)
    }

    /// Looks through one extension header, if there is one.
    #[inline(always)]
    fn next<P: Packet>(&mut self, packet: &P, offset: usize) -> Result<bool, Cut> {
        const HOP_BY_HOP: u8 = 0;
        const ROUTING: u8 = 43;
        const FRAGMENT: u8 = 44;
        const AUTHENTICATION: u8 = 51;
        const DESTINATION_OPTIONS: u8 = 60;

        if !matches!(
            self.protocol,
            HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION_OPTIONS
        ) {
            return Ok(false);
        }
        let header = packet.header::<8>(offset + self.len)?;
        let units = usize::from(header.u8::<1>());
        self.len += match self.protocol {
            FRAGMENT => {
                // One that says neither "offset" nor "more" is a whole datagram (RFC 6946).
                self.fragment_offset = header.be16::<2>() >> 3;
                self.more_fragments = header.be16::<2>() & 1;
                8
            }
            // RFC 4302 §2.2 counts in 4-byte units, less 2.
            AUTHENTICATION => (units + 2) * 4,
            ROUTING => {
                self.segments_left |= header.u8::<3>();
                (units + 1) * 8
            }
            _ => (units + 1) * 8,
        };
        self.protocol = header.u8::<0>();
        Ok(true)
    }

    /// In one register.
    #[inline(always)]
    pub const fn to_bits(self) -> u64 {
        self.protocol as u64
            | (self.segments_left as u64) << 8
            | (self.len as u64 & 0xffff) << 16
            | (self.fragment_offset as u64) << 32
            | (self.more_fragments as u64) << 48
    }

    /// From one register.
    #[inline(always)]
    pub const fn from_bits(bits: u64) -> Self {
        Self {
            protocol: bits as u8,
            segments_left: (bits >> 8) as u8,
            len: (bits >> 16) as u16 as usize,
            fragment_offset: (bits >> 32) as u16,
            more_fragments: (bits >> 48 & 1) as u16,
        }
    }
}

/// Finds the outer headers of a VXLAN packet to a port that `watch` knows; hands through what it
/// has of the port.
///
/// `None` for a packet that is not VXLAN, a later fragment included: it has no UDP header.
#[inline(always)]
pub fn locate<P: Packet, W: Watch>(
    packet: &P,
    watch: &W,
) -> Result<Option<(Location, W::Port)>, Beyond> {
    let (ethertype, offset) = if packet.is_raw_ip() {
        let version = packet.header::<IPV4_LEN>(0).map_err(Beyond::outer)?.u8::<0>() >> 4;
        (if version == 6 { ETHERTYPE_IPV6 } else { ETHERTYPE_IPV4 }, 0)
    } else {
        let (ethertype, next) = ethertype(packet, 0).map_err(Beyond::outer)?;
        (ethertype, next)
    };
    locate_in(packet, watch, ethertype, offset)
}

/// The same for a packet of this `EtherType`, whose network header is at `offset`.
#[inline(always)]
pub fn locate_in<P: Packet, W: Watch>(
    packet: &P,
    watch: &W,
    ethertype: u16,
    offset: usize,
) -> Result<Option<(Location, W::Port)>, Beyond> {
    let Some(ip) = ip(packet, ethertype, offset).map_err(Beyond::outer)? else {
        return Ok(None);
    };
    if ip.protocol != UDP || ip.fragment_offset != 0 {
        return Ok(None);
    }
    let udp = packet.header::<UDP_LEN>(ip.payload).map_err(Beyond::outer)?;
    let Some(port) = watch.port(udp.be16::<2>()) else {
        return Ok(None);
    };
    let vxlan = packet.header::<VXLAN_LEN>(ip.payload + UDP_LEN).map_err(Beyond::vxlan)?;
    // The I flag must be set (RFC 7348 §5): without it, something else uses the port.
    if vxlan.u8::<0>() & 0x08 == 0 {
        return Ok(None);
    }
    let udp_len = udp_len(packet, ip.payload, udp.be16::<4>());
    let is_whole = ip.is_whole()
        && udp_len >= UDP_LEN + VXLAN_LEN
        && ip.payload + udp_len <= ip.end
        && ip.payload + udp_len <= packet.len();
    let at = Location { ip: ip.offset, udp: ip.payload, is_ipv6: ip.is_ipv6, is_whole };
    Ok(Some((at, port)))
}

/// How far parsing came before a header was out of reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beyond {
    /// Before it was known whether this is VXLAN.
    Outer,
    /// In a packet to a watched port.
    Vxlan,
}

impl Beyond {
    #[inline(always)]
    const fn outer(_: Cut) -> Self {
        Self::Outer
    }

    /// For what follows the outer UDP header.
    #[inline(always)]
    pub const fn vxlan(_: Cut) -> Self {
        Self::Vxlan
    }
}
