//! The verdict on an outer UDP checksum.

use crate::inner::Transport;
use crate::outer::{Beyond, Outer};
use crate::packet::Header;
use crate::{Cut, Device, Offload, Packet, Policy, Sum, inner, outer};

/// What can be said of a packet's outer UDP checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Verdict {
    /// No checksum, and the device sends none.
    Zero = 0,
    /// No checksum although the device sends them.
    Missing = 1,
    /// The pseudo-header sum, which NIC or GSO will finish.
    OffloadPending = 2,
    /// The right sum.
    Valid = 3,
    /// Not zero although the device sends zero.
    MangledZero = 4,
    /// Wrong, and right again once source port or address from before NAT are put back.
    StaleNat = 5,
    /// Wrong, with no proof of NAT.
    Bad = 6,
    /// Cannot be told here.
    Unverified = 7,
}

impl Verdict {
    /// Every verdict, in the order of its code.
    pub const ALL: [Self; 8] = [
        Self::Zero,
        Self::Missing,
        Self::OffloadPending,
        Self::Valid,
        Self::MangledZero,
        Self::StaleNat,
        Self::Bad,
        Self::Unverified,
    ];

    /// From the byte that crosses the boundary.
    pub fn from_u8(code: u8) -> Option<Self> {
        Self::ALL.get(usize::from(code)).copied()
    }

    /// Whether a receiver that checks must drop the packet (RFC 7348 §5).
    #[inline(always)]
    pub const fn is_broken(self) -> bool {
        matches!(self, Self::MangledZero | Self::StaleNat | Self::Bad)
    }

    /// The name in JSON, metrics and messages.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Zero => "zero",
            Self::Missing => "missing",
            Self::OffloadPending => "offload_pending",
            Self::Valid => "valid",
            Self::MangledZero => "mangled_zero",
            Self::StaleNat => "stale_nat",
            Self::Bad => "bad",
            Self::Unverified => "unverified",
        }
    }
}

/// What proves that NAT left a stale sum behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Proof {
    /// Nothing does.
    None = 0,
    /// The field is what the driver's own source port, known from the flow hash, predicts.
    FlowHash = 1,
    /// The field is what the driver's own source port and the device's address predict: NAT
    /// rewrote the address.
    FlowHashAndAddress = 2,
    /// The error leads to a port that the device may send from. Weaker: many errors do.
    PortRange = 3,
}

impl Proof {
    /// From the byte that crosses the boundary.
    pub const fn from_u8(code: u8) -> Self {
        match code {
            1 => Self::FlowHash,
            2 => Self::FlowHashAndAddress,
            3 => Self::PortRange,
            _ => Self::None,
        }
    }

    /// The name in JSON, where there is a proof.
    pub const fn as_str(self) -> Option<&'static str> {
        match self {
            Self::None => None,
            Self::FlowHash => Some("flow_hash"),
            Self::FlowHashAndAddress => Some("flow_hash_and_address"),
            Self::PortRange => Some("port_range"),
        }
    }
}

/// The verdict on one packet and what led to it.
#[derive(Clone, Copy, Debug)]
pub struct Finding {
    /// The verdict.
    pub verdict: Verdict,
    /// What proves [`Verdict::StaleNat`].
    pub proof: Proof,
    /// The policy that was assumed.
    pub policy: Policy,
    /// IPv6 outer header, else IPv4.
    pub is_ipv6: bool,
    /// Offset of the outer UDP header in bytes.
    pub udp: usize,
    /// The checksum field, host byte order.
    pub check: u16,
    /// The right sum, host byte order. 0 where it is not known, which is never a right sum: a GSO
    /// packet has none before it is cut.
    pub expected: u16,
    /// Source port from before NAT, host byte order; 0 where it is not known.
    pub source_port_before_nat: u16,
}

/// The outcome for one packet.
#[derive(Clone, Copy, Debug)]
pub enum Examined<Port> {
    /// Not VXLAN to a watched port.
    NotVxlan,
    /// A header was out of reach.
    Cut(Beyond),
    /// VXLAN to a watched port, with what [`Watch::port`] gave.
    Vxlan(Finding, Port),
}

/// What is watched, and what is known of the devices that send there.
pub trait Watch {
    /// What is held per port.
    type Port: Copy;

    /// Whether VXLAN is expected on a UDP destination port (host byte order).
    fn port(&self, port: u16) -> Option<Self::Port>;

    /// What the sender of a VNI on a port puts into the checksum field.
    fn policy(&self, port: Self::Port, vni: u32, is_ipv6: bool) -> Policy;

    /// The sender of a VNI on a port.
    fn device(&self, port: u16, vni: u32) -> Device;
}

/// Examines the outer UDP checksum of one packet.
///
/// The BPF program takes the same steps, but takes them in functions that the verifier walks one by
/// one: from [`outer::locate`] to [`by_outer`], [`by_inner`] and [`explain`].
pub fn examine<P: Packet, W: Watch>(packet: &P, watch: &W) -> Examined<W::Port> {
    let (at, port) = match outer::locate(packet, watch) {
        Ok(Some(vxlan)) => vxlan,
        Ok(None) => return Examined::NotVxlan,
        Err(beyond) => return Examined::Cut(beyond),
    };
    let finding = || {
        let outer = Outer::read(packet, at)?;
        let policy = watch.policy(port, outer.vni, at.is_ipv6);
        judge(packet, watch, &outer, policy)
    };
    match finding() {
        Ok(finding) => Examined::Vxlan(finding, port),
        Err(Cut) => Examined::Cut(Beyond::Vxlan),
    }
}

/// The same for a packet whose outer headers are known, and with them what its sender sends.
pub fn judge<P: Packet, W: Watch>(
    packet: &P,
    watch: &W,
    outer: &Outer,
    policy: Policy,
) -> Result<Finding, Cut> {
    let answer = match by_outer(packet, outer) {
        Some(answer) => answer,
        None => by_inner(packet, outer, policy)?,
    };
    Ok(explain(packet, watch, outer, policy, answer))
}

/// What a checksum field was found to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The answer itself.
    pub kind: AnswerKind,
    /// The right sum, host byte order, where it is known and the field is wrong; else 0.
    pub expected: u16,
}

/// See [`Answer`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum AnswerKind {
    /// Cannot be told.
    Unknown = 0,
    /// No checksum.
    Zero = 1,
    /// The pseudo-header sum.
    Pending = 2,
    /// The right sum.
    Right = 3,
    /// Wrong.
    Wrong = 4,
    /// Wrong unless the inner checksum, which is complete then, looks like an open one by chance.
    LikelyWrong = 5,
}

impl Answer {
    /// An answer to which no sum belongs.
    #[inline(always)]
    pub const fn of(kind: AnswerKind) -> Self {
        Self { kind, expected: 0 }
    }

    /// The verdict, unless the field is wrong: then [`explain`] says which.
    #[inline(always)]
    pub const fn verdict(self, policy: Policy) -> Option<Verdict> {
        match (self.kind, policy) {
            (AnswerKind::Unknown, _) => Some(Verdict::Unverified),
            (AnswerKind::Zero, Policy::Sum) => Some(Verdict::Missing),
            (AnswerKind::Zero, _) => Some(Verdict::Zero),
            (AnswerKind::Pending, _) => Some(Verdict::OffloadPending),
            (AnswerKind::Right, _) => Some(Verdict::Valid),
            (AnswerKind::Wrong | AnswerKind::LikelyWrong, _) => None,
        }
    }

    /// In one register.
    #[inline(always)]
    pub const fn to_bits(self) -> u64 {
        self.kind as u64 | (self.expected as u64) << 16
    }

    /// From one register.
    #[inline(always)]
    pub const fn from_bits(bits: u64) -> Self {
        let kind = match bits & 0xff {
            1 => AnswerKind::Zero,
            2 => AnswerKind::Pending,
            3 => AnswerKind::Right,
            4 => AnswerKind::Wrong,
            5 => AnswerKind::LikelyWrong,
            _ => AnswerKind::Unknown,
        };
        Self { kind, expected: (bits >> 16 & 0xffff) as u16 }
    }
}

/// What the outer headers alone tell, which is enough for most packets.
#[inline(always)]
pub fn by_outer<P: Packet>(packet: &P, outer: &Outer) -> Option<Answer> {
    Some(Answer::of(if !outer.at.is_whole {
        AnswerKind::Unknown
    } else if outer.check == 0 {
        AnswerKind::Zero
    } else if outer.pseudo_header.folds_to(outer.check) {
        AnswerKind::Pending
    } else if packet.is_gso() {
        // Segments either inherit the field as it is, or are finished from a pseudo-header sum
        // (__skb_udp_tunnel_segment in net/ipv4/udp_offload.c), which this is not.
        AnswerKind::Wrong
    } else {
        return None;
    }))
}

/// Whether the field is right by the headers alone, because the inner checksum is open: the answer
/// for most packets of a summing device, where the inner frame is of this `EtherType` and its network
/// header is at `offset`.
#[inline(always)]
pub fn is_right_by_lco<P: Packet>(
    packet: &P,
    outer: &Outer,
    ethertype: u16,
    offset: usize,
) -> Result<bool, Cut> {
    let inner = inner::parse_in(packet, outer, ethertype, offset)?;
    let Some(transport) = inner.transport.filter(Transport::is_open) else { return Ok(false) };
    // What is open sums up to the complement of what its field holds.
    let open = Sum::of_u16(!transport.check);
    let check = Sum::of_u16(outer.check);
    let before = outer.pseudo_header + outer.headers + transport.before(packet, outer)?;
    Ok((before + open + check).is_zero())
}

/// What the inner headers tell, and what the offload state or all bytes do where they do not.
#[inline(always)]
pub fn by_inner<P: Packet>(packet: &P, outer: &Outer, policy: Policy) -> Result<Answer, Cut> {
    let inner = inner::parse(packet, outer)?;
    let lco = match &inner.transport {
        Some(transport) => lco(packet, outer, transport)?,
        None => 0,
    };
    let is_open = inner.transport.is_some_and(|transport| transport.is_open());
    if is_open && lco == outer.check {
        return Ok(Answer::of(AnswerKind::Right));
    }
    if let Offload::Partial { start, field } = packet.offload() {
        return Ok(by_open_sum(packet, outer, start, field));
    }
    let Some(sum) = packet.sum(outer.at.udp, outer.udp_len) else {
        return Ok(match (is_open, policy) {
            (true, _) => Answer { kind: AnswerKind::LikelyWrong, expected: lco },
            (false, Policy::Zero) => Answer::of(AnswerKind::Wrong),
            (false, _) => Answer::of(AnswerKind::Unknown),
        });
    };
    let sum = outer.pseudo_header + sum;
    if sum.is_zero() {
        return Ok(Answer::of(AnswerKind::Right));
    }
    if is_open {
        return Ok(Answer { kind: AnswerKind::Wrong, expected: lco });
    }
    let expected = sum.minus(Sum::of_u16(outer.check)).checksum();
    // Where the inner sum does not hold, another one may be open deeper inside (a tunnel in the
    // tunnel), and what is right depends on it.
    let may_be_open = inner.is_opaque || (inner.transport.is_some() && lco != expected);
    if may_be_open && packet.offload() == Offload::Unknown {
        return Ok(Answer::of(AnswerKind::Unknown));
    }
    Ok(Answer { kind: AnswerKind::Wrong, expected })
}

/// What the headers of a received packet tell whose payload is out of reach: the inner checksum is
/// filled in by now, and taken to be right.
pub fn by_headers<P: Packet>(packet: &P, outer: &Outer) -> Result<Answer, Cut> {
    let Some(transport) = inner::parse(packet, outer)?.transport else {
        return Ok(Answer::of(AnswerKind::Unknown));
    };
    let expected = lco(packet, outer, &transport)?;
    Ok(if expected == outer.check {
        Answer::of(AnswerKind::Right)
    } else {
        Answer { kind: AnswerKind::LikelyWrong, expected }
    })
}

/// The NIC is to sum from `start` on: local checksum offload at any depth
/// (Documentation/networking/checksum-offloads.rst, `lco_csum` in include/linux/skbuff.h).
#[inline(always)]
fn by_open_sum<P: Packet>(packet: &P, outer: &Outer, start: usize, field: usize) -> Answer {
    if start <= outer.at.udp {
        // It starts from this very field, which is not the pseudo-header sum.
        return Answer::of(AnswerKind::Wrong);
    }
    let before = packet.sum(outer.at.udp, start - outer.at.udp);
    let (Some(before), Ok(open)) = (before, packet.header::<2>(field)) else {
        return Answer::of(AnswerKind::Unknown);
    };
    let expected = (outer.pseudo_header + before)
        .minus(Sum::of_u16(outer.check))
        .minus(Sum::of_u16(open.be16::<0>()))
        .checksum();
    if expected == outer.check {
        Answer::of(AnswerKind::Right)
    } else {
        Answer { kind: AnswerKind::Wrong, expected }
    }
}

/// The outer sum as local checksum offload has it: over all headers before the inner transport
/// header, plus the complement of the inner pseudo-header sum, which is what the transport segment
/// will sum up to once its own checksum is right.
#[inline(always)]
fn lco<P: Packet>(packet: &P, outer: &Outer, transport: &Transport) -> Result<u16, Cut> {
    let before = outer.pseudo_header + outer.headers + transport.before(packet, outer)?;
    Ok(before.minus(transport.pseudo_header).checksum())
}

/// The verdict that follows from an answer, and for a wrong field its cause.
#[inline(always)]
pub fn explain<P: Packet, W: Watch>(
    packet: &P,
    watch: &W,
    outer: &Outer,
    policy: Policy,
    answer: Answer,
) -> Finding {
    let (proof, source_port_before_nat) = if answer.expected == 0 || policy == Policy::Zero {
        (Proof::None, 0)
    } else {
        Question { packet, watch, outer }.prove_nat(answer.expected)
    };
    let verdict = match (answer.verdict(policy), policy, proof) {
        (Some(verdict), ..) => verdict,
        (None, Policy::Zero, _) => Verdict::MangledZero,
        (None, _, Proof::None) if answer.kind as u8 == AnswerKind::LikelyWrong as u8 => {
            Verdict::Unverified
        }
        (None, _, Proof::None) => Verdict::Bad,
        (None, ..) => Verdict::StaleNat,
    };
    Finding {
        verdict,
        proof,
        policy,
        is_ipv6: outer.at.is_ipv6,
        udp: outer.at.udp,
        check: outer.check,
        expected: answer.expected,
        source_port_before_nat,
    }
}

/// A VXLAN packet with a wrong sum.
struct Question<'a, P, W> {
    packet: &'a P,
    watch: &'a W,
    outer: &'a Outer,
}

impl<P: Packet, W: Watch> Question<'_, P, W> {
    /// Whether NAT explains the field.
    ///
    /// `udp_manip_pkt` (`net/netfilter/nf_nat_proto.c`) takes the complete sum in the field for a
    /// pseudo-header sum, because `ip_summed` says so of the inner packet. A new port is then not
    /// folded in at all, and a new address with the wrong sign: the field is off by the change of
    /// the port and by twice the change of the address.
    #[inline(always)]
    fn prove_nat(&self, expected: u16) -> (Proof, u16) {
        let outer = self.outer;
        let device = self.watch.device(outer.destination_port, outer.vni);
        let new_port = Sum::of_u16(outer.source_port);
        let error = Sum::of_u16(outer.check).minus(Sum::of_u16(expected));
        let Some(old_ports) = device.source_ports(self.packet.flow_hash()) else {
            let old_port = new_port.minus(error).folded();
            return if self.packet.arithmetic_proves_nat() && device.may_send_from(old_port) {
                (Proof::PortRange, old_port)
            } else {
                (Proof::None, 0)
            };
        };
        let unexplained = |old_port| error.minus(new_port.minus(Sum::of_u16(old_port)));
        for old_port in old_ports {
            if unexplained(old_port).is_zero() {
                return (Proof::FlowHash, old_port);
            }
        }
        if let Some(address_change) = self.address_change(&device) {
            for old_port in old_ports {
                if unexplained(old_port).minus(address_change + address_change).is_zero() {
                    return (Proof::FlowHashAndAddress, old_port);
                }
            }
        }
        (Proof::None, 0)
    }

    /// The source address less the one that the device sends from; `None` where that is not known.
    #[inline(always)]
    fn address_change(&self, device: &Device) -> Option<Sum> {
        let at = self.outer.at;
        let (new, old) = if at.is_ipv6 {
            let new = self.packet.header::<16>(at.ip + 8).ok()?.sum::<0, 16>();
            (new, Header::new(&device.local_ipv6).sum::<0, 16>())
        } else {
            let new = self.packet.header::<4>(at.ip + 12).ok()?.sum::<0, 4>();
            (new, Header::new(&device.local_ipv4).sum::<0, 4>())
        };
        (old != Sum::ZERO).then(|| new.minus(old))
    }
}
