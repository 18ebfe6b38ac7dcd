//! A verdict that shares nothing with vxcsum: headers are taken apart by etherparse, and every right
//! sum is an addition of all bytes, after open inner sums have been filled in. No short cut of the
//! real verdict is taken, so where both speak they must agree.

use etherparse::checksum::Sum16BitWords;
use etherparse::{
    IpNumber, Ipv6ExtensionSlice, LinkExtSlice, NetSlice, SlicedPacket, TransportSlice,
};
use vxcsum_common::layout::MASQUERADE_MARK;
use vxcsum_common::{Device, Offload, Policy, Proof, Verdict, Watch as _};

use crate::cases::Case;
use crate::packets::{TCP_CHECK, UDP_CHECK};

const UDP_AND_VXLAN: usize = 16;
/// What vxcsum looks through at the most.
const MAX_VLAN_TAGS: usize = 2;
const MAX_EXTENSION_HEADERS: usize = 6;
const MAX_EXTENSIONS_LEN: usize = 1024;

/// What is to be said of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Opinion {
    /// The verdict.
    pub verdict: Verdict,
    /// The right sum of a broken packet; 0 where it has none.
    pub expected: u16,
    /// What proves NAT.
    pub proof: Proof,
    /// The source port before NAT; 0 where it is not known.
    pub source_port_before_nat: u16,
}

/// Judges a packet with its sums in that state; none where etherparse finds fault with it, or reads
/// it in another way.
pub fn opinion(case: &Case, offload: Offload) -> Option<Opinion> {
    let bytes = &case.frame.bytes[..];
    let packet = if case.frame.is_raw_ip {
        SlicedPacket::from_ip(bytes)
    } else {
        SlicedPacket::from_ethernet(bytes)
    };
    let packet = packet.ok()?;
    let outer = Segment::of(bytes, &packet)?;
    let known = &case.known;
    let destination_port = be16(bytes, outer.start + 2);
    let port = known.port(destination_port)?;
    if outer.protocol != IpNumber::UDP.0
        || outer.len < UDP_AND_VXLAN
        || bytes[outer.start + 8] & 0x08 == 0
    {
        return None;
    }
    let vni = be16(bytes, outer.start + 12);
    let vni = u32::from(vni) << 8 | u32::from(bytes[outer.start + 14]);
    let policy = known.policy(port, vni, outer.is_ipv6);
    let check = be16(bytes, outer.field());
    let quiet = |verdict| Some(Opinion::quiet(verdict));
    if check == 0 {
        return quiet(if policy == Policy::Sum { Verdict::Missing } else { Verdict::Zero });
    }
    if check == outer.pseudo_header_sum() {
        return quiet(Verdict::OffloadPending);
    }
    if case.segments > 1 {
        let verdict = if policy == Policy::Zero { Verdict::MangledZero } else { Verdict::Bad };
        return quiet(verdict);
    }
    let finished = match judge(bytes, &outer, offload)? {
        Answer::Right => return quiet(Verdict::Valid),
        Answer::Unknown => return quiet(Verdict::Unverified),
        Answer::Wrong(finished) => finished,
    };
    let broken = Opinion { expected: outer.right(&finished), ..Opinion::quiet(Verdict::Bad) };
    if policy == Policy::Zero {
        return Some(Opinion { verdict: Verdict::MangledZero, ..broken });
    }
    let device = known.device(destination_port, vni);
    let proved = Proofs { finished: &finished, outer: &outer, check, device }.find(case)?;
    Some(match proved {
        None => broken,
        Some((proof, source_port_before_nat)) => {
            Opinion { verdict: Verdict::StaleNat, proof, source_port_before_nat, ..broken }
        }
    })
}

impl Opinion {
    const fn quiet(verdict: Verdict) -> Self {
        Self { verdict, expected: 0, proof: Proof::None, source_port_before_nat: 0 }
    }
}

enum Answer {
    Right,
    Unknown,
    /// The packet with every inner sum filled in.
    Wrong(Vec<u8>),
}

/// Judges a field that is neither zero nor pending, of a packet that is not still to be cut.
fn judge(bytes: &[u8], outer: &Segment, offload: Offload) -> Option<Answer> {
    let as_it_is = || Some(Answer::Wrong(bytes.to_vec()));
    let check = be16(bytes, outer.field());
    if matches!(offload, Offload::Partial { .. }) {
        let Inside::Open(segment, finished) = inside(bytes, outer)? else { return None };
        let (start, field) = (segment.start, segment.field());
        if offload != (Offload::Partial { start, field }) {
            return None;
        }
        let is_right = outer.right(&finished) == check;
        return Some(if is_right { Answer::Right } else { Answer::Wrong(finished) });
    }
    // Of an inner frame that is none, vxcsum says nothing, whatever the sum.
    match (inside(bytes, outer)?, offload) {
        _ if outer.right(bytes) == check => Some(Answer::Right),
        (Inside::Open(_, finished), _) if outer.right(&finished) == check => Some(Answer::Right),
        (Inside::Open(_, finished), _) => Some(Answer::Wrong(finished)),
        (Inside::Complete, _) | (Inside::Opaque, Offload::Complete) => as_it_is(),
        (Inside::Opaque, _) => Some(Answer::Unknown),
    }
}

/// What is in the tunnel, as far as sums go.
enum Inside {
    /// A segment whose sum is to be filled in, and the whole packet once it is.
    Open(Segment, Vec<u8>),
    /// Nothing is left open.
    Complete,
    /// Something may be.
    Opaque,
}

fn inside(bytes: &[u8], outer: &Segment) -> Option<Inside> {
    let frame = &bytes[outer.start + UDP_AND_VXLAN..outer.start + outer.len];
    let packet = SlicedPacket::from_ethernet(frame).ok()?;
    has_known_tags(&packet).then_some(())?;
    match &packet.net {
        Some(NetSlice::Arp(_)) => return Some(Inside::Complete),
        None => return Some(Inside::Opaque),
        Some(_) => {}
    }
    if packet.is_ip_payload_fragmented() || !is_looked_through(packet.net.as_ref()?) {
        return None;
    }
    let protocol = packet.net.as_ref()?.ip_payload_ref()?.ip_number;
    if matches!(protocol, IpNumber::ICMP | IpNumber::IPV6_ICMP) {
        return Some(Inside::Complete);
    }
    if !matches!(protocol, IpNumber::TCP | IpNumber::UDP) {
        return Some(Inside::Opaque);
    }
    let segment = Segment::of(bytes, &packet)?;
    // Bytes behind the segment are added up by NICs and by the outer sum, but not by the inner one.
    let end = outer.start + outer.len;
    let is_padded_with_zeros = bytes[segment.start + segment.len..end].iter().all(|&it| it == 0);
    if !segment.fills_payload || !is_padded_with_zeros {
        return None;
    }
    let check = be16(bytes, segment.field());
    if segment.protocol == IpNumber::UDP.0 && check == 0 {
        return Some(Inside::Opaque);
    }
    if check == segment.pseudo_header_sum() {
        let mut finished = bytes.to_vec();
        write16(&mut finished, segment.field(), segment.right(bytes));
        return Some(Inside::Open(segment, finished));
    }
    let is_right = same(check, segment.right(bytes));
    Some(if is_right { Inside::Complete } else { Inside::Opaque })
}

/// A TCP segment or UDP datagram that is whole; offsets are those in the packet.
struct Segment {
    is_ipv6: bool,
    /// Of both addresses.
    addresses: [u8; 32],
    source: usize,
    protocol: u8,
    start: usize,
    len: usize,
    /// There is nothing behind it that the IP header takes for its payload.
    fills_payload: bool,
}

impl Segment {
    /// `packet` is part of `bytes`. None also for what vxcsum may read in another way.
    fn of(bytes: &[u8], packet: &SlicedPacket<'_>) -> Option<Self> {
        if packet.is_ip_payload_fragmented() || !has_known_tags(packet) {
            return None;
        }
        let net = packet.net.as_ref()?;
        if !is_looked_through(net) {
            return None;
        }
        let mut addresses = [0; 32];
        let (is_ipv6, header) = match net {
            NetSlice::Ipv4(ip) => {
                addresses[..8].copy_from_slice(&ip.header().slice()[12..20]);
                (false, ip.header().slice())
            }
            NetSlice::Ipv6(ip) => {
                let mut headers = ip.extensions().clone().into_iter();
                let is_routed = headers.any(|it| matches!(it, Ipv6ExtensionSlice::Routing(_)));
                if is_routed || ip.header().payload_length() == 0 {
                    return None;
                }
                addresses.copy_from_slice(&ip.header().slice()[8..40]);
                (true, ip.header().slice())
            }
            NetSlice::Arp(_) => return None,
        };
        let payload = net.ip_payload_ref()?.payload;
        let (protocol, slice) = match packet.transport.as_ref()? {
            TransportSlice::Udp(udp) => {
                // etherparse takes 0 for "all there is".
                (usize::from(udp.length()) == udp.slice().len()).then_some(())?;
                (IpNumber::UDP.0, udp.slice())
            }
            TransportSlice::Tcp(tcp) => (IpNumber::TCP.0, tcp.slice()),
            _ => return None,
        };
        Some(Self {
            is_ipv6,
            addresses,
            source: offset(bytes, header) + if is_ipv6 { 8 } else { 12 },
            protocol,
            start: offset(bytes, slice),
            len: slice.len(),
            fills_payload: slice.len() == payload.len(),
        })
    }

    const fn field(&self) -> usize {
        self.start + if self.protocol == IpNumber::TCP.0 { TCP_CHECK } else { UDP_CHECK }
    }

    fn source<'a>(&self, bytes: &'a [u8]) -> &'a [u8] {
        &bytes[self.source..self.source + if self.is_ipv6 { 16 } else { 4 }]
    }

    fn pseudo_header(&self, addresses: &[u8]) -> Sum16BitWords {
        let len = self.len as u16;
        Sum16BitWords::new()
            .add_slice(addresses)
            .add_2bytes([0, self.protocol])
            .add_2bytes(len.to_be_bytes())
    }

    /// What the field holds while all but that is left to the NIC.
    fn pseudo_header_sum(&self) -> u16 {
        !u16::from_be(self.pseudo_header(&self.addresses).ones_complement())
    }

    /// What a receiver finds right.
    fn right(&self, bytes: &[u8]) -> u16 {
        self.right_from(bytes, &self.addresses)
    }

    /// The same with other addresses.
    fn right_from(&self, bytes: &[u8], addresses: &[u8]) -> u16 {
        let field = self.field();
        let sum = self
            .pseudo_header(addresses)
            .add_slice(&bytes[self.start..field])
            .add_slice(&bytes[field + 2..self.start + self.len]);
        u16::from_be(sum.to_ones_complement_with_no_zero())
    }
}

/// What NAT would have left behind.
struct Proofs<'a> {
    finished: &'a [u8],
    outer: &'a Segment,
    check: u16,
    device: Device,
}

impl Proofs<'_> {
    /// The proof and the old port; `Some(None)` where nothing proves NAT. `None` where it is not
    /// clear: 0 and 65535 are the same port in this arithmetic.
    #[expect(clippy::option_option, reason = "no opinion, and the opinion that there is no proof")]
    fn find(&self, case: &Case) -> Option<Option<(Proof, u16)>> {
        let Device { source_port_min: min, source_port_max: max, .. } = self.device;
        let width = max.saturating_sub(min);
        let ports = match (case.hash, width) {
            (0, 0 | 1) => [min, min + width],
            (0, _) if case.mark & MASQUERADE_MARK == 0 => return Some(None),
            (0, _) => {
                // The field is off by the change of the port.
                let error = i32::from(self.check) - i32::from(self.outer.right(self.finished));
                let new = i32::from(be16(self.finished, self.outer.start));
                let old = (new - error).rem_euclid(0xffff) as u16;
                if old == 0 {
                    return None;
                }
                assert_eq!(self.left_by_port(old), self.check, "the arithmetic of this oracle");
                let is_in_range = (min..=max).contains(&old);
                return Some(is_in_range.then_some((Proof::PortRange, old)));
            }
            // udp_flow_src_port in include/net/udp.h, in both of its forms.
            (hash, _) => {
                let hash = u64::from(hash ^ hash.wrapping_shl(16));
                let pick = |width: u64| min.wrapping_add(((hash * width) >> 32) as u16);
                [pick(width.into()), pick(u64::from(width) + 1)]
            }
        };
        let find = |proof, left: &dyn Fn(u16) -> u16| {
            ports.iter().find(|&&old| left(old) == self.check).map(|&old| (proof, old))
        };
        let by_port = find(Proof::FlowHash, &|old| self.left_by_port(old));
        let by_address = || {
            let Device { local_ipv4, local_ipv6, .. } = &self.device;
            let local = if self.outer.is_ipv6 { &local_ipv6[..] } else { local_ipv4 };
            let is_known = local.iter().any(|&byte| byte != 0);
            let by_both = &|old| self.left_by_address(old, local);
            is_known.then(|| find(Proof::FlowHashAndAddress, by_both)).flatten()
        };
        Some(by_port.or_else(by_address))
    }

    /// The right sum of the packet as it was with that source port.
    fn left_by_port(&self, old: u16) -> u16 {
        self.outer.right(&self.with_source_port(old))
    }

    /// The same, from that address, into which `udp_manip_pkt` has folded the change of the address
    /// as if it were a pseudo-header sum.
    fn left_by_address(&self, old_port: u16, old: &[u8]) -> u16 {
        let bytes = self.with_source_port(old_port);
        let new = self.outer.source(&bytes);
        let mut addresses = self.outer.addresses;
        addresses[..old.len()].copy_from_slice(old);
        let right = self.outer.right_from(&bytes, &addresses);
        let old: Vec<u8> = old.iter().map(|byte| !byte).collect();
        let sum =
            Sum16BitWords::new().add_2bytes(right.to_be_bytes()).add_slice(&old).add_slice(new);
        match !u16::from_be(sum.ones_complement()) {
            0 => 0xffff,
            left => left,
        }
    }

    fn with_source_port(&self, old: u16) -> Vec<u8> {
        let mut bytes = self.finished.to_vec();
        write16(&mut bytes, self.outer.start, old);
        bytes
    }
}

/// Whether vxcsum looks through all of its extension headers. Of IPv4 it knows none.
fn is_looked_through(net: &NetSlice<'_>) -> bool {
    match net {
        NetSlice::Ipv4(ip) => ip.extensions().auth.is_none(),
        NetSlice::Ipv6(ip) => {
            let extensions = ip.extensions();
            extensions.slice().len() <= MAX_EXTENSIONS_LEN
                && extensions.clone().into_iter().count() <= MAX_EXTENSION_HEADERS
        }
        NetSlice::Arp(_) => true,
    }
}

/// Tags that vxcsum knows, and no more of them than it looks through.
fn has_known_tags(packet: &SlicedPacket<'_>) -> bool {
    let tags = &packet.link_exts;
    tags.len() <= MAX_VLAN_TAGS && tags.iter().all(|tag| matches!(tag, LinkExtSlice::Vlan(_)))
}

/// Two numbers that are one in ones' complement.
const fn same(one: u16, other: u16) -> bool {
    one % 0xffff == other % 0xffff
}

fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn write16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

/// Where `part`, a slice of `bytes`, begins in it.
fn offset(bytes: &[u8], part: &[u8]) -> usize {
    part.as_ptr().addr() - bytes.as_ptr().addr()
}
