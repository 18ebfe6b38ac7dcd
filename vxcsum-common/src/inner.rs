//! The inner headers, as far as the outer checksum depends on them.

use crate::outer::{self, Ip, Outer, TCP, UDP};
use crate::{Cut, Packet, Sum};

/// Inner headers up to the transport header, and what they sum up to.
#[derive(Clone, Copy, Debug)]
pub struct Inner {
    /// The inner IP header, where there is one.
    pub ip: Option<Ip>,
    /// The inner TCP or UDP header, where this packet has one.
    pub transport: Option<Transport>,
    /// A sum still to be filled in by the NIC may hide where it is not looked for: a tunnel in the
    /// tunnel, a protocol that is not known.
    pub is_opaque: bool,
}

/// An inner TCP or UDP header.
#[derive(Clone, Copy, Debug)]
pub struct Transport {
    /// Its checksum field, host byte order.
    pub check: u16,
    /// The sum of the inner pseudo-header.
    pub pseudo_header: Sum,
    /// The IP header before it.
    pub ip: Ip,
}

impl Transport {
    /// Whether the field holds the pseudo-header sum only: the NIC is to finish it
    /// (`CHECKSUM_PARTIAL`). One complete sum in 65 536 looks the same.
    #[inline(always)]
    pub const fn is_open(&self) -> bool {
        self.pseudo_header.folds_to(self.check)
    }

    /// The sum of everything from the start of the inner frame up to the transport header.
    #[inline(always)]
    pub fn before<P: Packet>(&self, packet: &P, outer: &Outer) -> Result<Sum, Cut> {
        let ethernet = outer::ethernet(packet, outer.inner(), self.ip.offset)?;
        Ok(ethernet + self.ip.header(packet)?)
    }
}

/// Parses the inner frame of `outer`.
#[inline(always)]
pub fn parse<P: Packet>(packet: &P, outer: &Outer) -> Result<Inner, Cut> {
    let (ethertype, offset) = outer::ethertype(packet, outer.inner())?;
    parse_in(packet, outer, ethertype, offset)
}

/// The same for an inner frame of this `EtherType`, whose network header is at `offset`.
#[inline(always)]
pub fn parse_in<P: Packet>(
    packet: &P,
    outer: &Outer,
    ethertype: u16,
    offset: usize,
) -> Result<Inner, Cut> {
    const ARP: u16 = 0x0806;
    const ICMP: u8 = 1;
    const ICMPV6: u8 = 58;

    let without = |ip, is_opaque| Inner { ip, transport: None, is_opaque };
    let Some(ip) = outer::ip(packet, ethertype, offset)? else {
        return Ok(without(None, ethertype != ARP));
    };
    let check_offset = match ip.protocol {
        TCP => 16,
        UDP => 6,
        protocol => return Ok(without(Some(ip), !matches!(protocol, ICMP | ICMPV6))),
    };
    if ip.fragment_offset != 0 || ip.more_fragments != 0 {
        // A stack sums a datagram up before it cuts it.
        return Ok(without(Some(ip), false));
    }
    let end = outer.at.udp + outer.udp_len;
    let is_within = ip.payload + check_offset + 2 <= ip.end && ip.end <= end;
    if !ip.is_whole() || !is_within {
        // The pseudo-header of a source route is not the one that the sum was opened with; lengths
        // that contradict each other are nothing that a stack sends.
        return Ok(without(Some(ip), is_within));
    }
    let check = packet.header::<2>(ip.payload + check_offset)?.be16::<0>();
    if ip.protocol == UDP && check == 0 {
        // No checksum, which is what tunnels like.
        return Ok(without(Some(ip), true));
    }
    let transport =
        Transport { check, pseudo_header: ip.pseudo_header(packet, ip.end - ip.payload)?, ip };
    Ok(Inner { ip: Some(ip), transport: Some(transport), is_opaque: false })
}

/// A number that tells inner flows apart: VNI, addresses, protocol and ports; without an inner IP
/// header, the MAC addresses.
#[inline(always)]
pub fn flow<P: Packet>(packet: &P, outer: &Outer) -> Result<u64, Cut> {
    let (ethertype, offset) = outer::ethertype(packet, outer.inner())?;
    let Some(ip) = outer::ip(packet, ethertype, offset)? else {
        let flow = Flow::new(outer.vni);
        let macs = packet.header::<12>(outer.inner())?;
        return Ok(flow.with(macs.be32::<0>()).with(macs.be32::<4>()).with(macs.be32::<8>()).0);
    };
    flow_of(packet, outer, &ip)
}

/// A packet of an inner TCP connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TcpSegment {
    /// The number of its [`flow`].
    pub flow: u64,
    /// Sequence number.
    pub sequence: u32,
    /// Flags as in the header (RFC 9293 §3.1).
    pub flags: u8,
}

impl TcpSegment {
    /// Asks for, or grants, a connection.
    pub const SYN: u8 = 0x02;
    /// Resets it.
    pub const RST: u8 = 0x04;
    /// Acknowledges: from a client, that its SYN was answered.
    pub const ACK: u8 = 0x10;
}

/// What [`flow`] and TCP header say of an inner TCP packet; `None` for any other.
#[inline(always)]
pub fn tcp_segment<P: Packet>(packet: &P, outer: &Outer) -> Result<Option<TcpSegment>, Cut> {
    let (ethertype, offset) = outer::ethertype(packet, outer.inner())?;
    let Some(ip) = outer::ip(packet, ethertype, offset)? else { return Ok(None) };
    if ip.protocol != TCP || ip.fragment_offset != 0 {
        return Ok(None);
    }
    let header = packet.header::<14>(ip.payload)?;
    Ok(Some(TcpSegment {
        flow: flow_of(packet, outer, &ip)?,
        sequence: header.be32::<4>(),
        flags: header.u8::<13>(),
    }))
}

#[inline(always)]
fn flow_of<P: Packet>(packet: &P, outer: &Outer, ip: &Ip) -> Result<u64, Cut> {
    let flow = Flow::new(outer.vni).with(u32::from(ip.protocol));
    let flow = if ip.is_ipv6 {
        let ends = packet.header::<32>(ip.offset + 8)?;
        let source = flow.with(ends.be32::<0>()).with(ends.be32::<4>());
        let source = source.with(ends.be32::<8>()).with(ends.be32::<12>());
        let both = source.with(ends.be32::<16>()).with(ends.be32::<20>());
        both.with(ends.be32::<24>()).with(ends.be32::<28>())
    } else {
        let ends = packet.header::<8>(ip.offset + 12)?;
        flow.with(ends.be32::<0>()).with(ends.be32::<4>())
    };
    if matches!(ip.protocol, TCP | UDP) && ip.fragment_offset == 0 {
        return Ok(flow.with(packet.header::<4>(ip.payload)?.be32::<0>()).0);
    }
    Ok(flow.0)
}

/// FNV-1a over 32-bit words. Flows that collide share the place of one, which costs a repeat its
/// preference and nothing else.
struct Flow(u64);

impl Flow {
    #[inline(always)]
    const fn new(vni: u32) -> Self {
        Self(0xcbf2_9ce4_8422_2325).with(vni)
    }

    #[inline(always)]
    const fn with(self, word: u32) -> Self {
        Self((self.0 ^ word as u64).wrapping_mul(0x0000_0100_0000_01b3))
    }
}
