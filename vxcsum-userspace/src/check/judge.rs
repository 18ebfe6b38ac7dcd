//! The verdict on each packet of a capture, and what its senders are found to send.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};

use serde::Serialize;
use vxcsum_common::layout::{Port, Ports, SEEN_SUM, SEEN_ZERO};
use vxcsum_common::outer::{self, Beyond, Outer};
use vxcsum_common::packet::Header;
use vxcsum_common::{
    Captured, Cut, Device, Finding, Offload, Packet, Policy, Sum, Verdict, Watch, verdict,
};

use crate::plan::UnusablePorts;

/// Senders that are told apart; further ones to the same port count as one.
const MAX_SENDERS: usize = 65_536;

/// What a packet was found to be.
#[derive(Clone, Copy, Debug)]
pub(super) enum Judged {
    /// Not VXLAN to a watched port.
    NotVxlan,
    /// Cut short before that could be told.
    CutShort,
    /// VXLAN to a watched port.
    Vxlan(Verdict, Option<Details>),
}

/// What there is to say of a VXLAN packet whose headers were captured.
#[derive(Clone, Copy, Debug)]
pub(super) struct Details {
    pub(super) outer: Outer,
    pub(super) finding: Finding,
    pub(super) appearance: Appearance,
}

/// How a packet that is not broken looks to tools that add up the bytes of the capture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Appearance {
    /// Right, or nothing that they could add up.
    Fine,
    /// Wrong: a sum was still open.
    OpenSum,
    /// Wrong: there is none, which they do not forgive over IPv6.
    NoSumOverIpv6,
}

/// Judges the packets of one capture.
///
/// What a sender puts into the field is learned from its own packets: a capture shows packets of
/// both directions, and there the nodes may differ. Of a sender whose packets do not tell, what all
/// senders to the port agree on is assumed.
pub(super) struct Judge {
    watched: Watched,
    /// Index into `senders`.
    known: HashMap<SenderKey, usize>,
    senders: Vec<Sender>,
    /// Index of the one whose packet was the last.
    latest: usize,
    /// What all senders have taught, by port.
    everybody: Vec<Port>,
    /// Nothing is learned any more.
    is_final: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct SenderKey {
    /// IPv4 addresses in the low bits.
    address: u128,
    port: u16,
    is_ipv6: bool,
}

struct Sender {
    key: SenderKey,
    learned: Port,
    /// Packets whose verdict depends on the policy: what was assumed of it.
    assumed: Assumed,
}

/// Packets by what was assumed when they were judged.
#[derive(Clone, Copy, Debug, Default)]
struct Assumed {
    /// Without a checksum: that the device sends sums, or not.
    sum: u64,
    not_sum: u64,
    /// With one that is wrong or cannot be told: that the device sends zero, or not.
    zero: u64,
    not_zero: u64,
}

/// Ports and the device that is assumed behind each.
struct Watched {
    ports: Ports,
    device: Device,
}

impl Watch for Watched {
    type Port = Port;

    fn port(&self, port: u16) -> Option<Port> {
        self.ports.get(port).copied()
    }

    fn policy(&self, port: Port, _vni: u32, is_ipv6: bool) -> Policy {
        port.policy(is_ipv6)
    }

    fn device(&self, _port: u16, _vni: u32) -> Device {
        self.device
    }
}

/// What the senders to one port were found to send.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Learned {
    /// Senders of zero.
    pub(super) zero: u64,
    /// Senders of sums.
    pub(super) sum: u64,
    /// Senders of both.
    pub(super) both: u64,
}

impl Judge {
    /// `policy` is what every device sends, [`Policy::Unknown`] to learn it. `device` has the range
    /// of source ports.
    pub(super) fn new(
        ports: &[u16],
        policy: Policy,
        device: Device,
    ) -> Result<Self, UnusablePorts> {
        let port = |&port: &u16| Port {
            port,
            policy_ipv4: policy as u8,
            policy_ipv6: policy as u8,
            ..Port::default()
        };
        let everybody: Vec<_> = ports.iter().map(port).collect();
        let ports = Ports::new(&everybody).ok_or(UnusablePorts)?;
        Ok(Self {
            watched: Watched { ports, device },
            known: HashMap::new(),
            senders: Vec::new(),
            latest: 0,
            everybody,
            is_final: false,
        })
    }

    /// Forgets what was assumed of the packets so far, which are judged anew, but not what they taught.
    pub(super) fn start_over(&mut self) {
        for sender in &mut self.senders {
            sender.assumed = Assumed::default();
        }
    }

    /// From here on everything is judged by what was learned up to now.
    pub(super) const fn finish_learning(&mut self) {
        self.is_final = true;
    }

    /// Judges one packet, and learns from it.
    pub(super) fn judge(&mut self, packet: &Captured<'_>) -> Judged {
        let packet = &OfCapture::new(packet);
        let (at, port) = match outer::locate(packet, &self.watched) {
            Ok(Some(found)) => found,
            Ok(None) => return Judged::NotVxlan,
            Err(Beyond::Vxlan) => return Judged::Vxlan(Verdict::Unverified, None),
            // A frame that is short by itself is no more than it is.
            Err(Beyond::Outer) if packet.is_whole() => return Judged::NotVxlan,
            Err(Beyond::Outer) => return Judged::CutShort,
        };
        let mut judged = || {
            let outer = Outer::read(packet, at)?;
            let finding = match self.watched.policy(port, outer.vni, at.is_ipv6) {
                Policy::Unknown => {
                    let sender = self.sender(packet, &outer)?;
                    let policy = self.learned(sender);
                    let finding = verdict::judge(packet, &self.watched, &outer, policy)?;
                    self.learn(sender, &outer, &finding);
                    finding
                }
                given => verdict::judge(packet, &self.watched, &outer, given)?,
            };
            Ok((outer, finding))
        };
        let judged: Result<_, Cut> = judged();
        let Ok((outer, finding)) = judged else {
            return Judged::Vxlan(Verdict::Unverified, None);
        };
        let appearance = appearance(packet, &outer, finding.verdict);
        Judged::Vxlan(finding.verdict, Some(Details { outer, finding, appearance }))
    }

    /// Packets that would have got another verdict, had it been known from the start what is known
    /// now.
    pub(super) fn premature(&self) -> u64 {
        let premature = |(index, sender): (usize, &Sender)| {
            let Assumed { sum, not_sum, zero, not_zero } = sender.assumed;
            match self.learned(index) {
                Policy::Sum => not_sum + zero,
                Policy::Zero => sum + not_zero,
                Policy::Unknown => sum + zero,
            }
        };
        self.senders.iter().enumerate().map(premature).sum()
    }

    /// What was learned of the senders, by port.
    pub(super) fn lessons(&self) -> BTreeMap<u16, Learned> {
        let mut lessons = BTreeMap::<_, Learned>::new();
        for sender in self.senders.iter().filter(|sender| sender.seen() != 0) {
            let learned = lessons.entry(sender.key.port).or_default();
            match sender.seen() {
                SEEN_ZERO => learned.zero += 1,
                SEEN_SUM => learned.sum += 1,
                _ => learned.both += 1,
            }
        }
        lessons
    }

    /// Finds the sender of a packet, or gets to know it.
    fn sender(&mut self, packet: &impl Packet, outer: &Outer) -> Result<usize, Cut> {
        let address = if outer.at.is_ipv6 {
            let words = packet.header::<16>(outer.at.ip + 8)?;
            let words =
                [words.be32::<0>(), words.be32::<4>(), words.be32::<8>(), words.be32::<12>()];
            words.into_iter().fold(0, |address, word| address << 32 | u128::from(word))
        } else {
            packet.header::<4>(outer.at.ip + 12)?.be32::<0>().into()
        };
        let key = SenderKey { address, port: outer.destination_port, is_ipv6: outer.at.is_ipv6 };
        // Packets come in bursts.
        if let Some(latest) = self.senders.get(self.latest)
            && latest.key == key
        {
            return Ok(self.latest);
        }
        let is_full = self.senders.len() >= MAX_SENDERS;
        let key = match self.known.get(&key) {
            // Nobody sends from this address: it stands for all that do not fit.
            None if is_full => SenderKey { address: u128::MAX, ..key },
            _ => key,
        };
        let senders = &mut self.senders;
        self.latest = *self.known.entry(key).or_insert_with(|| {
            let learned = Port { port: key.port, ..Port::default() };
            senders.push(Sender { key, learned, assumed: Assumed::default() });
            senders.len() - 1
        });
        Ok(self.latest)
    }

    /// What is known so far of what a sender sends.
    fn learned(&self, sender: usize) -> Policy {
        let sender = &self.senders[sender];
        let SenderKey { port, is_ipv6, .. } = sender.key;
        if sender.seen() != 0 {
            return sender.learned.policy(is_ipv6);
        }
        let everybody = self.everybody.iter().find(|other| other.port == port);
        everybody.map_or(Policy::Unknown, |everybody| everybody.policy(is_ipv6))
    }

    fn learn(&mut self, sender: usize, outer: &Outer, finding: &Finding) {
        let sender = &mut self.senders[sender];
        let (assumed, policy) = (&mut sender.assumed, finding.policy);
        match finding.verdict {
            Verdict::OffloadPending | Verdict::Valid => {}
            Verdict::Zero | Verdict::Missing => match policy {
                Policy::Sum => assumed.sum += 1,
                Policy::Zero | Policy::Unknown => assumed.not_sum += 1,
            },
            // Whatever its device sends, it cannot be told.
            Verdict::Unverified if !outer.at.is_whole => {}
            Verdict::Unverified | Verdict::MangledZero | Verdict::StaleNat | Verdict::Bad => {
                match policy {
                    Policy::Zero => assumed.zero += 1,
                    Policy::Sum | Policy::Unknown => assumed.not_zero += 1,
                }
            }
        }
        let lesson = Port::lesson(finding.verdict);
        if self.is_final || lesson == 0 {
            return;
        }
        let SenderKey { port, is_ipv6, .. } = sender.key;
        let everybody = self.everybody.iter_mut().find(|other| other.port == port);
        for learner in [Some(&mut sender.learned), everybody].into_iter().flatten() {
            *(if is_ipv6 { &mut learner.seen_ipv6 } else { &mut learner.seen_ipv4 }) |= lesson;
        }
    }
}

impl Sender {
    const fn seen(&self) -> u8 {
        self.learned.seen_ipv4 | self.learned.seen_ipv6
    }
}

/// A packet of a capture, which may have been taken before the NIC cut it. It remembers the longest
/// sum: to add up the payload is what takes the time, and both the verdict and the comparison with
/// other tools ask for it.
struct OfCapture<'a> {
    packet: &'a Captured<'a>,
    /// Offset, length, and the sum of these bytes.
    longest: Cell<(usize, usize, Option<Sum>)>,
}

impl<'a> OfCapture<'a> {
    const fn new(packet: &'a Captured<'a>) -> Self {
        Self { packet, longest: Cell::new((0, 0, Some(Sum::ZERO))) }
    }

    /// Whether all of it was captured.
    const fn is_whole(&self) -> bool {
        self.packet.bytes.len() >= self.packet.len
    }
}

impl Packet for OfCapture<'_> {
    fn len(&self) -> usize {
        self.packet.len()
    }

    fn header<const N: usize>(&self, offset: usize) -> Result<Header<'_, N>, Cut> {
        self.packet.header(offset)
    }

    fn sum(&self, offset: usize, len: usize) -> Option<Sum> {
        let (known_offset, known_len, known) = self.longest.get();
        if (offset, len) == (known_offset, known_len) {
            return known;
        }
        let sum = self.packet.sum(offset, len);
        if len > known_len {
            self.longest.set((offset, len, sum));
        }
        sum
    }

    fn is_raw_ip(&self) -> bool {
        self.packet.is_raw_ip()
    }

    fn may_lack_length(&self) -> bool {
        true
    }

    fn is_gso(&self) -> bool {
        self.packet.is_gso()
    }

    fn offload(&self) -> Offload {
        self.packet.offload()
    }

    fn flow_hash(&self) -> u32 {
        self.packet.flow_hash()
    }

    fn arithmetic_proves_nat(&self) -> bool {
        self.packet.arithmetic_proves_nat()
    }
}

/// How a packet looks to tcpdump and Wireshark, which add up what was captured of it.
fn appearance(packet: &impl Packet, outer: &Outer, verdict: Verdict) -> Appearance {
    if verdict.is_broken() || verdict == Verdict::Unverified {
        return Appearance::Fine;
    }
    match (packet.sum(outer.at.udp, outer.udp_len), outer.check) {
        // Cut short: they do not try.
        (None, _) => Appearance::Fine,
        (_, 0) if outer.at.is_ipv6 => Appearance::NoSumOverIpv6,
        (_, 0) => Appearance::Fine,
        (Some(sum), _) if (outer.pseudo_header + sum).is_zero() => Appearance::Fine,
        _ => Appearance::OpenSum,
    }
}
