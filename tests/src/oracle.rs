//! What a frame's checksums ought to be, from all of its bytes, by etherparse.
//!
//! Shares nothing with vxcsum. Right for frames whose sums are finished, as the receiver sees
//! them; at the sender the inner sum may still be open, which is the trap vxcsum is there to avoid.

use std::net::IpAddr;

use anyhow::{Context as _, Result};
use etherparse::{IpNumber, NetSlice, SlicedPacket, TcpSlice, TransportSlice, UdpSlice};
use internet_checksum::Checksum;

use crate::packets::{Frame, UDP_CHECK};

const VXLAN_HEADER_LEN: usize = 8;

/// The checksum field of a TCP or UDP header and what should be in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transport {
    /// IP protocol number: 6 or 17.
    pub protocol: u8,
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// Source port.
    pub sport: u16,
    /// Destination port.
    pub dport: u16,
    /// What the field holds.
    pub check: u16,
    /// The sum over pseudo-header, header and data; never zero for UDP.
    pub expected: u16,
    /// The sum over the pseudo-header alone, not inverted: what the field holds while the rest is
    /// left to the NIC.
    pub pseudo: u16,
    /// Where the field is in the frame.
    pub check_at: usize,
    /// SYN flag; false for UDP.
    pub syn: bool,
}

impl Transport {
    /// Whether a receiver takes the field for right.
    ///
    /// Zero stands for "no checksum" in UDP. In TCP it is a sum like any other, and the same number
    /// as 0xffff in ones' complement, which Linux writes instead (`skb_checksum_help`).
    pub fn is_right(&self) -> bool {
        let is_zero = |sum: u16| sum == 0 || sum == 0xffff;
        self.check == self.expected
            || (self.protocol == IpNumber::UDP.0 && self.check == 0)
            || (self.protocol == IpNumber::TCP.0 && is_zero(self.check) && is_zero(self.expected))
    }
}

/// A VXLAN frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vxlan {
    /// The datagram that carries it.
    pub outer: Transport,
    /// VXLAN network identifier.
    pub vni: u32,
    /// TCP or UDP inside, if that is what it is and it is not a fragment.
    pub inner: Option<Transport>,
}

/// The datagram in a frame; none if it is not a UDP datagram to `port`.
pub fn outer(frame: &[u8], port: u16) -> Result<Option<Transport>> {
    let packet = SlicedPacket::from_ethernet(frame).context("outer headers")?;
    let outer = transport(frame, &packet)?;
    Ok(outer.filter(|outer| outer.protocol == IpNumber::UDP.0 && outer.dport == port))
}

/// Takes a frame apart; none if it holds no VXLAN datagram to `port`.
pub fn vxlan(frame: &[u8], port: u16) -> Result<Option<Vxlan>> {
    let Some(outer) = outer(frame, port)? else { return Ok(None) };
    let payload = &frame[outer.check_at + 2..];
    let header = payload.get(..VXLAN_HEADER_LEN).context("VXLAN header is cut short")?;
    let vni = u32::from_be_bytes([0, header[4], header[5], header[6]]);
    let inner = &payload[VXLAN_HEADER_LEN..];
    let inner = SlicedPacket::from_ethernet(inner).context("inner headers")?;
    Ok(Some(Vxlan { vni, inner: transport(frame, &inner)?, outer }))
}

/// The same for many frames; those that are no VXLAN are left out.
pub fn vxlan_frames(frames: &[Vec<u8>], port: u16) -> Result<Vec<Vxlan>> {
    frames.iter().filter_map(|frame| vxlan(frame, port).transpose()).collect()
}

/// `frame` is the whole frame, which `packet` is, or a part of.
fn transport(frame: &[u8], packet: &SlicedPacket<'_>) -> Result<Option<Transport>> {
    if packet.is_ip_payload_fragmented() {
        return Ok(None);
    }
    let Some(net) = &packet.net else { return Ok(None) };
    match &packet.transport {
        Some(TransportSlice::Udp(udp)) => of_udp(frame, net, udp).map(Some),
        Some(TransportSlice::Tcp(tcp)) => of_tcp(frame, net, tcp).map(Some),
        _ => Ok(None),
    }
}

fn of_udp(frame: &[u8], net: &NetSlice<'_>, udp: &UdpSlice<'_>) -> Result<Transport> {
    let header = udp.to_header();
    let expected = match addresses(net)? {
        Addresses::V4(src, dst) => header.calc_checksum_ipv4_raw(src, dst, udp.payload())?,
        Addresses::V6(src, dst) => header.calc_checksum_ipv6_raw(src, dst, udp.payload())?,
    };
    Ok(Transport {
        sport: header.source_port,
        dport: header.destination_port,
        check: header.checksum,
        expected,
        check_at: offset(frame, udp.slice()) + 6,
        ..unfilled(net, IpNumber::UDP, udp.slice().len())?
    })
}

fn of_tcp(frame: &[u8], net: &NetSlice<'_>, tcp: &TcpSlice<'_>) -> Result<Transport> {
    let expected = match addresses(net)? {
        Addresses::V4(src, dst) => tcp.calc_checksum_ipv4(src, dst)?,
        Addresses::V6(src, dst) => tcp.calc_checksum_ipv6(src, dst)?,
    };
    Ok(Transport {
        sport: tcp.source_port(),
        dport: tcp.destination_port(),
        check: tcp.checksum(),
        expected,
        check_at: offset(frame, tcp.slice()) + 16,
        syn: tcp.syn(),
        ..unfilled(net, IpNumber::TCP, tcp.slice().len())?
    })
}

/// What does not depend on the transport header.
fn unfilled(net: &NetSlice<'_>, protocol: IpNumber, len: usize) -> Result<Transport> {
    let addresses = addresses(net)?;
    let (src, dst) = addresses.ip();
    let sum = match addresses {
        Addresses::V4(src, dst) => [src, dst].concat(),
        Addresses::V6(src, dst) => [src, dst].concat(),
    };
    let words = sum.chunks_exact(2).map(|word| u64::from(u16::from_be_bytes([word[0], word[1]])));
    let mut pseudo = words.sum::<u64>() + u64::from(protocol.0) + len as u64;
    while pseudo > 0xffff {
        pseudo = (pseudo & 0xffff) + (pseudo >> 16);
    }
    Ok(Transport {
        protocol: protocol.0,
        src,
        dst,
        sport: 0,
        dport: 0,
        check: 0,
        expected: 0,
        pseudo: pseudo as u16,
        check_at: 0,
        syn: false,
    })
}

/// The UDP checksum that a receiver finds right, over the packet with all sums filled in.
pub fn right_sum(frame: &Frame) -> u16 {
    let bytes = &frame.finished;
    let len = usize::from(u16::from_be_bytes([bytes[frame.udp + 4], bytes[frame.udp + 5]]));
    let is_ipv6 = bytes[frame.ip] >> 4 == 6;
    let addresses = if is_ipv6 { 8..40 } else { 12..20 };
    let mut sum = Checksum::new();
    sum.add_bytes(&bytes[frame.ip..][addresses]);
    sum.add_bytes(&[0, 17]);
    sum.add_bytes(&(len as u16).to_be_bytes());
    let datagram = &bytes[frame.udp..frame.udp + len];
    sum.add_bytes(&datagram[..UDP_CHECK]);
    sum.add_bytes(&datagram[UDP_CHECK + 2..]);
    match u16::from_be_bytes(sum.checksum()) {
        0 => 0xffff,
        sum => sum,
    }
}

enum Addresses {
    V4([u8; 4], [u8; 4]),
    V6([u8; 16], [u8; 16]),
}

impl Addresses {
    fn ip(&self) -> (IpAddr, IpAddr) {
        match *self {
            Self::V4(src, dst) => (src.into(), dst.into()),
            Self::V6(src, dst) => (src.into(), dst.into()),
        }
    }
}

fn addresses(net: &NetSlice<'_>) -> Result<Addresses> {
    match net {
        NetSlice::Ipv4(ip) => Ok(Addresses::V4(ip.header().source(), ip.header().destination())),
        NetSlice::Ipv6(ip) => Ok(Addresses::V6(ip.header().source(), ip.header().destination())),
        NetSlice::Arp(_) => anyhow::bail!("ARP has no transport header"),
    }
}

/// Where `part`, a slice of `frame`, begins in it.
fn offset(frame: &[u8], part: &[u8]) -> usize {
    part.as_ptr().addr() - frame.as_ptr().addr()
}
