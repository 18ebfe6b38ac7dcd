//! Packets by the million: VXLAN packets of every structure there is, and what becomes of them when
//! something on the way lies, cuts or rewrites. The same for the same seed and number, always.

use std::net::{Ipv4Addr, Ipv6Addr};

use anyhow::Result;
use etherparse::TcpHeader;
use fastrand::Rng;
use vxcsum_common::layout::{
    ANY_VNI, DeviceKey, FixMode, MASQUERADE_MARK, Port, SEEN_SUM, SEEN_ZERO,
};
use vxcsum_common::{Device, Offload, Policy};

use crate::cases::{Case, Expected, Known, PORT, port};
use crate::packets::{
    Check, Ethernet, Extension, Frame, Ip, Network, SERVICE_VLAN, SegmentSum, Tcp, Transport,
    UDP_CHECK, Udp, VLAN, Vxlan,
};

/// Mutants of one stem: packets that differ in little but what was done to them.
pub const MUTANTS_PER_STEM: u64 = 32;

/// A packet of which everything is right but, perhaps, its checksum, in each of the states that this
/// may be in; and its surroundings.
#[derive(Debug, Clone)]
pub struct Stem {
    seed: u64,
    number: u64,
    /// With the right sum, pending, stale by port, and stale by port and address.
    frames: [Frame; 4],
    case: Case,
}

/// What was done to a stem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mutation {
    /// Which of its frames.
    pub frame: usize,
    /// What is in the checksum field, if something else.
    pub check: Option<u16>,
    /// What was done to the bytes, one after the other.
    pub edits: Vec<Edit>,
    /// `skb->mark`.
    pub mark: u32,
}

/// A change of a few bytes. What lies outside of the packet is left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Edit {
    /// One bit.
    Flip {
        /// The byte.
        at: usize,
        /// The bit in it.
        bit: u8,
    },
    /// One byte.
    Set {
        /// Which.
        at: usize,
        /// To that.
        to: u8,
    },
    /// A word, such as a length, a port or a checksum.
    SetWord {
        /// Its first byte.
        at: usize,
        /// To that, big-endian.
        to: u16,
    },
    /// A word that is to be more, or less.
    AddWord {
        /// Its first byte.
        at: usize,
        /// By so much.
        by: i16,
    },
    /// Two words change places, which no sum notices.
    SwapWords(usize, usize),
    /// Two neighbouring bytes change places.
    SwapBytes(usize),
    /// A VLAN tag.
    Insert {
        /// Before that byte.
        at: usize,
        /// All of it.
        bytes: [u8; 4],
    },
    /// Four bytes go.
    Remove(usize),
    /// Nothing is left from there on.
    Truncate(usize),
    /// So many bytes more, all of that value.
    Append {
        /// How many.
        count: usize,
        /// What.
        byte: u8,
    },
}

impl Stem {
    /// Grows a stem.
    pub fn grow(seed: u64, number: u64) -> Result<Self> {
        let mut rng = rng(seed, number, 0);
        let old_port = rng.u16(1..);
        let hash = if rng.u8(..16) == 0 { rng.u32(1..) } else { 0 };
        let is_ipv6 = rng.bool();
        let device = device(&mut rng, old_port, hash);
        // As the driver takes it (udp_flow_src_port in include/net/udp.h).
        let old_port = match device.source_ports(hash) {
            Some(ports) => ports[rng.usize(..2)],
            None => old_port,
        };
        let (vni, destination) = (rng.u32(..1 << 24), destination_port(&mut rng));
        let old_address = if is_ipv6 {
            Ipv6Addr::from(device.local_ipv6).into()
        } else {
            Ipv4Addr::from(device.local_ipv4).into()
        };
        let inner = inner(&mut rng, 2)?;
        let vxlan = Vxlan {
            destination_port: destination,
            vni,
            ..Vxlan::new(rng.u16(..), Check::Right, inner)
        };
        let shape = ip(&mut rng, is_ipv6, Transport::Vxlan(vxlan.clone()));
        let (tags, padding) = (tags(&mut rng), rng.usize(..8) * usize::from(rng.bool()));
        let is_raw_ip = tags.is_empty() && rng.u8(..12) == 0;
        let frame = |check| {
            let transport = Transport::Vxlan(Vxlan { check, ..vxlan.clone() });
            let ip = Ip { transport, ..shape.clone() };
            if is_raw_ip {
                return Frame::raw_ip(&ip);
            }
            Frame::new(&Ethernet { padding, ..ip.into() }.tagged(&tags))
        };
        let frames = [
            frame(Check::Right)?,
            frame(Check::Pending)?,
            frame(Check::Stale { old_port, old_address: None })?,
            frame(Check::Stale { old_port, old_address: Some(old_address) })?,
        ];
        let mut case = Case::new(String::new(), frames[0].clone(), Expected::NotVxlan);
        case.known = known(&mut rng, device, destination, vni);
        case.hash = hash;
        case.segments = if rng.u8(..6) == 0 { rng.u32(2..46) } else { 1 };
        case.fix = FixMode::ALL[rng.usize(..3)];
        case.fix_unproven = rng.bool();
        // What is open in truth is not known of a mutant.
        case.offloads = vec![Offload::Unknown, Offload::Complete];
        Ok(Self { seed, number, frames, case })
    }

    /// The mutation of a mutant's number, from 0 to [`MUTANTS_PER_STEM`].
    pub fn mutation(&self, mutant: u64) -> Mutation {
        let mut rng = rng(self.seed, self.number, mutant + 1);
        let right = self.frames[0].check().unwrap_or_default();
        let frame = rng.usize(..4);
        let check = match rng.u8(..24) {
            0..4 => Some(0),
            4 => Some(0xffff),
            5 => Some(right.swap_bytes()),
            6 => Some(right.wrapping_add(1)),
            7 => Some(!right),
            8 | 9 => Some(rng.u16(..)),
            _ => None,
        };
        let edits = match rng.u8(..8) {
            0..3 => 0,
            3..6 => 1,
            6 => 2,
            _ => rng.usize(3..6),
        };
        let edits = (0..edits).map(|_| edit(&mut rng, &self.frames[frame])).collect();
        let mark = if rng.u8(..3) == 0 { MASQUERADE_MARK | rng.u32(..4) } else { rng.u32(..4) };
        Mutation { frame, check, edits, mark }
    }

    /// The mutant.
    pub fn mutant(&self, mutation: &Mutation) -> Case {
        let mut frame = self.frames[mutation.frame].clone();
        if let Some(check) = mutation.check {
            let at = frame.udp + UDP_CHECK;
            set_word(&mut frame.bytes, at, check);
        }
        for edit in &mutation.edits {
            edit.apply(&mut frame.bytes);
        }
        Case { frame, mark: mutation.mark, ..self.case.clone() }
    }
}

impl Edit {
    fn apply(self, bytes: &mut Vec<u8>) {
        match self {
            Self::Flip { at, bit } => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1 << (bit % 8);
                }
            }
            Self::Set { at, to } => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = to;
                }
            }
            Self::SetWord { at, to } => set_word(bytes, at, to),
            Self::AddWord { at, by } => {
                if let Some(word) = word(bytes, at) {
                    set_word(bytes, at, word.wrapping_add_signed(by));
                }
            }
            Self::SwapWords(one, other) => {
                if let (Some(a), Some(b)) = (word(bytes, one), word(bytes, other)) {
                    set_word(bytes, one, b);
                    set_word(bytes, other, a);
                }
            }
            Self::SwapBytes(at) => {
                if at + 1 < bytes.len() {
                    bytes.swap(at, at + 1);
                }
            }
            Self::Insert { at, bytes: tag } => {
                if at <= bytes.len() {
                    bytes.splice(at..at, tag);
                }
            }
            Self::Remove(at) => {
                if at + 4 <= bytes.len() {
                    bytes.drain(at..at + 4);
                }
            }
            Self::Truncate(len) => bytes.truncate(len),
            Self::Append { count, byte } => bytes.resize(bytes.len() + count, byte),
        }
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|word| u16::from_be_bytes(*word))
}

fn set_word(bytes: &mut [u8], at: usize, to: u16) {
    if let Some(word) = bytes.get_mut(at..at + 2) {
        word.copy_from_slice(&to.to_be_bytes());
    }
}

/// A stream of its own for every mutant, so that each can be made without those before it.
fn rng(seed: u64, stem: u64, mutant: u64) -> Rng {
    // Each number is drawn from a generator of its own, so that no two triples share a stream.
    let draw = |from: u64, number: u64| Rng::with_seed(Rng::with_seed(from).u64(..) ^ number);
    Rng::with_seed(draw(draw(seed, stem).u64(..), mutant).u64(..))
}

fn pick<T: Copy>(rng: &mut Rng, among: &[T]) -> T {
    among[rng.usize(..among.len())]
}

fn bytes(rng: &mut Rng, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    rng.fill(&mut bytes);
    bytes
}

fn data(rng: &mut Rng) -> Vec<u8> {
    let len = match rng.u8(..16) {
        0 => rng.usize(1300..1460),
        1..4 => 0,
        _ => rng.usize(..100),
    };
    bytes(rng, len)
}

fn destination_port(rng: &mut Rng) -> u16 {
    if rng.u8(..8) == 0 { pick(rng, &[4789, 1, 65535, 8473]) } else { PORT }
}

fn device(rng: &mut Rng, old_port: u16, hash: u32) -> Device {
    let mut device = Device::UNKNOWN;
    if rng.bool() {
        rng.fill(&mut device.local_ipv4);
        rng.fill(&mut device.local_ipv6);
    }
    // Without a hash, only a range of one says which port it was.
    let (min, max) = match (hash, rng.u8(..4)) {
        (0, 0 | 1) => (old_port, old_port.saturating_add(rng.u16(..2))),
        (_, 2) => (rng.u16(..), rng.u16(..)),
        _ => return device,
    };
    Device { source_port_min: min, source_port_max: max, ..device }
}

fn known(rng: &mut Rng, device: Device, watched: u16, vni: u32) -> Known {
    let policy =
        |rng: &mut Rng| pick(rng, &[Policy::Sum, Policy::Sum, Policy::Zero, Policy::Unknown]);
    let own = if rng.u8(..16) == 0 { PORT } else { watched };
    let mut ports = vec![Port {
        policy_ipv6: policy(rng) as u8,
        seen_ipv4: pick(rng, &[0, 0, SEEN_ZERO, SEEN_SUM, SEEN_ZERO | SEEN_SUM]),
        seen_ipv6: pick(rng, &[0, 0, SEEN_ZERO, SEEN_SUM]),
        by_vni: u8::from(rng.u8(..4) == 0),
        ..port(own, policy(rng))
    }];
    for number in [4789, 53, 40000, 65535].into_iter().filter(|&number| number != own) {
        if rng.u8(..4) == 0 {
            ports.push(port(number, policy(rng)));
        }
    }
    let device =
        Device { policy_ipv4: policy(rng) as u8, policy_ipv6: policy(rng) as u8, ..device };
    let key = |vni| DeviceKey { vni, port: watched.into() };
    let devices = match rng.u8(..4) {
        0 => vec![(key(ANY_VNI), Device::UNKNOWN), (key(vni), device)],
        1 => Vec::new(),
        _ => vec![(key(ANY_VNI), device)],
    };
    Known { ports, devices }
}

fn tags(rng: &mut Rng) -> Vec<u16> {
    let count = rng.usize(..8).saturating_sub(5);
    (0..count).map(|_| pick(rng, &[VLAN, SERVICE_VLAN, 0x9100])).collect()
}

/// An IP packet between random ends.
fn ip(rng: &mut Rng, is_ipv6: bool, transport: Transport) -> Ip {
    let ip = if is_ipv6 {
        let [source, destination] = [rng.u128(..), rng.u128(..)].map(Ipv6Addr::from_bits);
        Ip::new(source.into(), destination.into(), transport)
    } else {
        let [source, destination] = [rng.u32(..), rng.u32(..)].map(Ipv4Addr::from_bits);
        Ip::new(source.into(), destination.into(), transport)
    };
    let ip = Ip { identification: rng.u16(..), ttl: rng.u8(..), ..ip };
    let is_plain = rng.u8(..4) != 0;
    let fragment = match rng.u8(..16) {
        0 => (pick(rng, &[0, 1, 185, 0x1fff]), true),
        1 => (rng.u16(..0x2000), false),
        _ => (0, false),
    };
    match is_ipv6 {
        _ if is_plain => ip,
        true => Ip { extensions: extensions(rng, fragment), ..ip },
        false => {
            let options = vec![1; 4 * rng.usize(..=10)];
            Ip { dont_fragment: rng.bool(), options, fragment, ..ip }
        }
    }
}

fn extensions(rng: &mut Rng, (offset, more): (u16, bool)) -> Vec<Extension> {
    let count = match rng.u8(..8) {
        0 => rng.usize(5..9),
        _ => rng.usize(1..4),
    };
    let mut extensions: Vec<_> = (0..count).map(|_| extension(rng, offset, more)).collect();
    if rng.u8(..4) == 0 {
        extensions.insert(0, Extension::HopByHop(8 * rng.usize(1..5)));
    }
    extensions
}

fn extension(rng: &mut Rng, offset: u16, more: bool) -> Extension {
    match rng.u8(..8) {
        0 => Extension::HopByHop(8 * rng.usize(1..5)),
        1 | 2 => Extension::Routing {
            segments_left: u8::from(rng.u8(..4) == 0),
            home: Ipv6Addr::from_bits(rng.u128(..)),
        },
        3 => Extension::Fragment { offset, more },
        4 => Extension::Authentication(8 * rng.usize(..4) + 4),
        5 => Extension::DestinationOptions(8 * rng.usize(1..100)),
        _ => Extension::DestinationOptions(8 * rng.usize(1..5)),
    }
}

/// An inner frame with at most so many tunnels in it.
fn inner(rng: &mut Rng, tunnels: u8) -> Result<Ethernet> {
    let network = match rng.u8(..16) {
        0 => Network::Arp,
        1 => Network::Other {
            ethertype: pick(rng, &[0x88cc, 0x8847, 0x8864, 0x894f, 0x88b5, 0x0800, 0x86dd]),
            bytes: data(rng),
        },
        _ => {
            let transport = transport(rng, tunnels)?;
            let is_ipv6 = rng.bool();
            Network::Ip(Box::new(ip(rng, is_ipv6, transport)))
        }
    };
    let frame = Ethernet {
        destination: rng.u64(..).to_be_bytes()[..6].try_into()?,
        source: rng.u64(..).to_be_bytes()[..6].try_into()?,
        padding: if rng.u8(..8) == 0 { rng.usize(..8) } else { 0 },
        ..Ethernet::of(network)
    };
    Ok(frame.tagged(&tags(rng)))
}

fn transport(rng: &mut Rng, tunnels: u8) -> Result<Transport> {
    let sum = match rng.u8(..8) {
        0 => SegmentSum::Value(pick(rng, &[0, 0xffff, 0x1234])),
        1..4 => SegmentSum::Complete,
        _ => SegmentSum::Open,
    };
    Ok(match rng.u8(..16) {
        0..7 => {
            let mut header = TcpHeader::new(rng.u16(..), rng.u16(..), rng.u32(..), rng.u16(..));
            header.set_options_raw(&vec![1; 4 * rng.usize(..=10)])?;
            header.syn = rng.bool();
            header.ack = rng.bool();
            Transport::Tcp(Tcp { header, payload: data(rng), sum })
        }
        7..12 => Transport::Udp(Udp {
            source_port: rng.u16(..),
            destination_port: pick(rng, &[53, PORT, 4789, 443]),
            payload: data(rng),
            sum,
        }),
        12 => Transport::Other {
            protocol: pick(rng, &[1, 58, 2, 6, 17, 50, 89, 132, 136, 253]),
            bytes: data(rng),
        },
        tunnel if tunnels > 0 => {
            let is_ipv6 = rng.bool();
            let inside = transport(rng, tunnels - 1)?;
            let ip = Box::new(ip(rng, is_ipv6, inside));
            match tunnel {
                13 => Transport::Ip(ip),
                14 => Transport::Gre(ip),
                _ => {
                    let check = pick(rng, &[Check::Right, Check::Zero, Check::Pending]);
                    let inner = inner(rng, tunnels - 1)?;
                    Transport::Vxlan(Vxlan::new(rng.u16(..), check, inner))
                }
            }
        }
        _ => Transport::Other { protocol: 59, bytes: Vec::new() },
    })
}

/// One thing that may befall a frame.
fn edit(rng: &mut Rng, frame: &Frame) -> Edit {
    let len = frame.bytes.len();
    // Headers more often than data.
    let anywhere = |rng: &mut Rng| {
        if rng.u8(..4) == 0 { rng.usize(..len.max(1)) } else { rng.usize(..len.clamp(1, 160)) }
    };
    let header = |rng: &mut Rng| pick(rng, &frame.boundaries);
    match rng.u8(..32) {
        0..4 => Edit::Flip { at: anywhere(rng), bit: rng.u8(..8) },
        4..6 => Edit::Set { at: anywhere(rng), to: rng.u8(..) },
        6..8 => Edit::Set { at: anywhere(rng), to: rng.u8(..8) },
        8 => Edit::SetWord { at: anywhere(rng), to: rng.u16(..) },
        // Lengths stand at 2 and 4 of IP headers, at 4 of UDP headers.
        9..12 => Edit::AddWord {
            at: header(rng) + pick(rng, &[2, 4]),
            by: pick(rng, &[-16, -8, -4, -1, 1, 2, 4, 8, 100]),
        },
        12 => Edit::SetWord {
            at: header(rng) + pick(rng, &[2, 4]),
            to: pick(rng, &[0, 7, 8, 15, 16, 0x8000, 0xffff]),
        },
        // Of the outer UDP header: ports, length, checksum, VXLAN flags.
        13..15 => Edit::SetWord { at: frame.udp, to: rng.u16(..) },
        15 => Edit::SetWord { at: frame.udp + 2, to: destination_port(rng) },
        16 => Edit::AddWord { at: frame.udp + 4, by: pick(rng, &[-8, -1, 1, 8]) },
        17 => Edit::Flip { at: frame.udp + 8, bit: rng.u8(..8) },
        // Of the outer IP header: the first byte, fragment, protocol or next header.
        18 => Edit::Set { at: frame.ip, to: pick(rng, &[0x45, 0x46, 0x4f, 0x40, 0x60, 0x55]) },
        19 => Edit::SetWord { at: frame.ip + 6, to: pick(rng, &[0x2000, 0x4000, 1, 0x8000]) },
        20 => Edit::Set {
            at: header(rng) + pick(rng, &[0, 6, 9]),
            to: pick(rng, &[0, 1, 4, 6, 17, 41, 43, 44, 47, 50, 51, 58, 59, 60, 132]),
        },
        // The type of the outer frame, or of a tag.
        21 => Edit::SetWord {
            at: 12 + 4 * rng.usize(..3),
            to: pick(rng, &[0x0800, 0x86dd, 0x8100, 0x88a8, 0x9100, 0x0806, 46]),
        },
        22 => Edit::SetWord {
            at: frame.open.map_or(frame.udp + UDP_CHECK, |(_, field)| field),
            to: pick(rng, &[0, 0xffff, 0x5555]),
        },
        23 | 24 => Edit::SwapWords(2 * rng.usize(..=len / 2), 2 * rng.usize(..=len / 2)),
        25 => Edit::SwapBytes(anywhere(rng)),
        26 => {
            let [high, low] = pick(rng, &[VLAN, SERVICE_VLAN, 0x9100]).to_be_bytes();
            let at = pick(rng, &[12, frame.udp + 28]);
            Edit::Insert { at, bytes: [high, low, 0, rng.u8(..)] }
        }
        27 => Edit::Remove(if rng.bool() { 12 } else { header(rng) }),
        28 => Edit::Truncate(anywhere(rng)),
        29 => Edit::Truncate(header(rng) + rng.usize(..20)),
        30 => Edit::Append { count: rng.usize(..40), byte: 0 },
        _ => Edit::Append { count: rng.usize(..40), byte: rng.u8(..) },
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn seeds_and_numbers_have_packets_of_their_own() {
        let numbers = (0..4).flat_map(|seed| (0..50).map(move |number| (seed, number)));
        let stems: HashSet<_> =
            numbers.map(|(seed, number)| rng(seed, number, 0).u128(..)).collect();
        assert_eq!(stems.len(), 200);
        let mutants: HashSet<_> = (0..200).map(|mutant| rng(1, 1, mutant).u128(..)).collect();
        assert_eq!(mutants.len(), 200);
    }

    #[test]
    fn the_same_number_is_the_same_packet() {
        let mutant = || {
            let stem = Stem::grow(7, 11).unwrap();
            stem.mutant(&stem.mutation(13)).frame.bytes
        };
        assert_eq!(mutant(), mutant());
    }
}
