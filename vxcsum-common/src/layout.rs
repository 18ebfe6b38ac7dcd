//! What crosses the boundary between the BPF program and user space, byte for byte.
//!
//! Integers are in host byte order. Codes are plain bytes and decoded on arrival: a Rust enum or
//! `Option` would be undefined behaviour for a value that the other side does not know.

use bytemuck::{Pod, Zeroable};

use crate::Policy;
use crate::verdict::Verdict;

/// How many UDP ports one interface can be watched for.
pub const MAX_PORTS: usize = 16;

/// The [`DeviceKey::vni`] of a port's sender whatever the VNI; real ones have 24 bits.
pub const ANY_VNI: u32 = u32::MAX;

/// The bit of `skb->mark` by which kube-proxy asks for masquerading, left on the tunnel packet.
pub const MASQUERADE_MARK: u32 = 0x4000;

/// Bytes of a packet that an [`Event`] carries: all headers of any packet that is not made to be
/// extreme.
pub const SNAPSHOT_LEN: usize = 256;

/// What the program of one interface works by. User space may replace it at any time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Config {
    /// The watched ports.
    pub ports: Ports,
    /// A [`FixMode`].
    pub fix: u8,
    /// Also rewrite what is [`Verdict::Bad`].
    pub fix_unproven: u8,
    /// The interface has no link header.
    pub is_raw_ip: u8,
    /// Not zero while user space follows inner flows of the interface; it sets it.
    pub following: u8,
    /// Longest frame that the interface takes, in bytes, with its link header: a longer one is still
    /// to be cut. Read where `gso_segs` cannot be.
    pub max_frame_len: u32,
    /// Zero, which the verifier does not know.
    pub zero: [u32; 2],
    /// Time that an event costs, in nanoseconds: a second by the rate limit; 0 without a limit.
    pub event_cost_ns: u32,
}

/// How far events may run ahead of the rate limit, in nanoseconds: a burst of one second's worth.
/// Repeats of an inner flow that was reported before may use half of it.
pub const BURST_NS: u64 = 1_000_000_000;

/// Inner flows that are remembered per interface.
pub const MAX_FLOWS: u32 = 8192;

impl Config {
    /// Takes over what `before` holds of the running program: what it has learned about the same
    /// ports, and whether flows are followed.
    pub fn carry(&mut self, before: &Self) {
        self.ports.carry_lessons(&before.ports);
        self.following = before.following;
    }
}

/// Inner TCP flows that user space may follow at a time on one interface.
pub const MAX_FOLLOWED: u32 = 4096;

/// In the value of a followed flow: a SYN that left whole has been told. The bits below count
/// broken SYNs whose event was suppressed or lost.
pub const SYN_TOLD: u32 = 1 << 31;

/// The watched ports, each in the slot that its number hashes to, so that the program finds any of
/// them with one look, and so does the verifier, which would walk a search from every place on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Ports {
    /// Multiplier under which the ports have slots of their own.
    seed: u32,
    /// Zero.
    reserved: u32,
    /// The ports, in a table four times as large as they can be many.
    slots: [Port; SLOTS],
}

/// Slots of [`Ports`].
const SLOTS: usize = 1 << SLOT_BITS;
const SLOT_BITS: u32 = 6;

impl Ports {
    /// Places the ports. `None` where one is 0 or given twice, or where they are more than
    /// [`MAX_PORTS`].
    pub fn new(ports: &[Port]) -> Option<Self> {
        let is_unusable = |(index, port): (usize, &Port)| {
            port.port == 0 || ports[..index].iter().any(|other| other.port == port.port)
        };
        if ports.len() > MAX_PORTS || ports.iter().enumerate().any(is_unusable) {
            return None;
        }
        // One multiplier in seven parts 16 ports; Knuth's (TAOCP 6.4) is tried first.
        (0..u32::MAX).find_map(|attempt| {
            let mut table = Self {
                seed: 0x9e37_79b1_u32.wrapping_mul(2 * attempt + 1),
                reserved: 0,
                slots: [Port::default(); SLOTS],
            };
            for port in ports {
                let slot = &mut table.slots[table.slot(port.port)];
                if slot.port != 0 {
                    return None;
                }
                *slot = *port;
            }
            table.hide_port_0();
            Some(table)
        })
    }

    /// Puts into the slot of port 0, where it is empty, a port that is never looked for there: so one
    /// comparison tells whether a port is watched.
    fn hide_port_0(&mut self) {
        let elsewhere = (1..=u16::MAX).find(|&port| self.slot(port) != self.slot(0));
        let slot = &mut self.slots[self.slot(0)];
        if let (0, Some(port)) = (slot.port, elsewhere) {
            slot.port = port;
        }
    }

    /// Takes over what `before` has learned about the same ports.
    pub fn carry_lessons(&mut self, before: &Self) {
        for slot in &mut self.slots {
            if let Some(known) = before.get(slot.port) {
                (slot.seen_ipv4, slot.seen_ipv6) = (known.seen_ipv4, known.seen_ipv6);
            }
        }
    }

    /// Adds what `other` has learned about the same ports.
    pub fn learn(&mut self, other: &Self) {
        for slot in &mut self.slots {
            if let Some(known) = other.get(slot.port) {
                slot.seen_ipv4 |= known.seen_ipv4;
                slot.seen_ipv6 |= known.seen_ipv6;
            }
        }
    }

    /// The slot of a port number.
    #[inline(always)]
    pub const fn slot(&self, port: u16) -> usize {
        // Not the uppermost bits: where they are is in reach of an immediate mask.
        ((port as u32).wrapping_mul(self.seed) >> 16) as usize & (SLOTS - 1)
    }

    /// The only place where a port can be.
    #[inline(always)]
    pub const fn slot_of(&self, port: u16) -> &Port {
        &self.slots[self.slot(port)]
    }

    /// What is held of a port, if it is watched.
    pub const fn get(&self, port: u16) -> Option<&Port> {
        let slot = self.slot_of(port);
        if slot.port == port { Some(slot) } else { None }
    }
}

/// A watched port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Port {
    /// UDP destination port; one of another slot, or 0, in a slot without a port.
    pub port: u16,
    /// A [`Policy`] for IPv4, where it is the same for all VNIs of the port.
    pub policy_ipv4: u8,
    /// A [`Policy`] for IPv6, likewise.
    pub policy_ipv6: u8,
    /// The devices of the port differ: the policy is that of the VNI's [`crate::Device`].
    pub by_vni: u8,
    /// What [`Policy::Unknown`] has been seen to send over IPv4: [`SEEN_ZERO`], [`SEEN_SUM`].
    /// Written by the program.
    pub seen_ipv4: u8,
    /// The same over IPv6.
    pub seen_ipv6: u8,
    /// Zero.
    pub reserved: u8,
}

/// A packet without a checksum was seen.
pub const SEEN_ZERO: u8 = 1;
/// A packet with a right or pending checksum was seen.
pub const SEEN_SUM: u8 = 2;

impl Port {
    /// The policy for the family of the outer header, learned from traffic where it is not known
    /// and all traffic agreed.
    #[inline(always)]
    pub const fn policy(&self, is_ipv6: bool) -> Policy {
        let (known, seen) = if is_ipv6 {
            (self.policy_ipv6, self.seen_ipv6)
        } else {
            (self.policy_ipv4, self.seen_ipv4)
        };
        match (Policy::from_u8(known), seen) {
            (Policy::Unknown, SEEN_ZERO) => Policy::Zero,
            (Policy::Unknown, SEEN_SUM) => Policy::Sum,
            (known, _) => known,
        }
    }

    /// What a verdict teaches of a sender whose policy is not known.
    #[inline(always)]
    pub const fn lesson(verdict: Verdict) -> u8 {
        match verdict {
            Verdict::Zero | Verdict::Missing => SEEN_ZERO,
            Verdict::OffloadPending | Verdict::Valid => SEEN_SUM,
            _ => 0,
        }
    }
}

/// Whose [`crate::Device`] it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct DeviceKey {
    /// VXLAN network identifier, or [`ANY_VNI`].
    pub vni: u32,
    /// UDP destination port.
    pub port: u32,
}

/// Where `struct sk_buff` of the running kernel holds its offload state, in bytes from its start;
/// from BTF, because it moves from version to version.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct SkbLayout {
    /// The byte with the `ip_summed` bit field.
    pub ip_summed: u16,
    /// Lowest bit of `ip_summed` in that byte.
    pub ip_summed_shift: u16,
    /// `csum_start`, two bytes.
    pub csum_start: u16,
    /// `csum_offset`, two bytes.
    pub csum_offset: u16,
    /// `head`, a pointer.
    pub head: u16,
    /// `data`, a pointer.
    pub data: u16,
    /// Whether the rest is filled in.
    pub is_known: u16,
}

/// What may be written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(u8)]
pub enum FixMode {
    /// Nothing.
    #[default]
    Off = 0,
    /// Zero, on IPv4.
    Zero = 1,
    /// What the device should have sent.
    Restore = 2,
}

impl FixMode {
    /// Every mode, in the order of its code.
    pub const ALL: [Self; 3] = [Self::Off, Self::Zero, Self::Restore];

    /// From the byte that crosses the boundary.
    #[inline(always)]
    pub const fn from_u8(code: u8) -> Self {
        match code {
            1 => Self::Zero,
            2 => Self::Restore,
            _ => Self::Off,
        }
    }

    /// The word that the command line and JSON use.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Zero => "zero",
            Self::Restore => "restore",
        }
    }
}

/// What was done to a broken packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Action {
    /// The fix mode is off.
    None = 0,
    /// The field was set to zero.
    Zeroed = 1,
    /// The field was set to the right sum.
    Restored = 2,
    /// Nothing proves what broke it: rewriting it might launder a packet corrupted elsewhere.
    RefusedUnproven = 3,
    /// IPv6 receivers drop a zero checksum by default (RFC 6935).
    RefusedIpv6 = 4,
    /// The right sum is not known: the packet is still to be cut into segments.
    RefusedUnknownSum = 5,
    /// The kernel did not let the field be written.
    RefusedWriteFailed = 6,
}

impl Action {
    /// Every action, in the order of its code.
    pub const ALL: [Self; 7] = [
        Self::None,
        Self::Zeroed,
        Self::Restored,
        Self::RefusedUnproven,
        Self::RefusedIpv6,
        Self::RefusedUnknownSum,
        Self::RefusedWriteFailed,
    ];

    /// Whether the action of this code writes the checksum field.
    #[inline(always)]
    pub const fn writes(code: u8) -> bool {
        code == Self::Zeroed as u8 || code == Self::Restored as u8
    }

    /// From the byte that crosses the boundary.
    pub fn from_u8(code: u8) -> Option<Self> {
        Self::ALL.get(usize::from(code)).copied()
    }

    /// The word in JSON and messages.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Zeroed => "zeroed",
            Self::Restored => "restored",
            Self::RefusedUnproven => "refused:unproven",
            Self::RefusedIpv6 => "refused:ipv6",
            Self::RefusedUnknownSum => "refused:unknown_sum",
            Self::RefusedWriteFailed => "refused:write_failed",
        }
    }
}

/// Packets that got one verdict.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Tally {
    /// Packets as the stack hands them down, GSO packets not yet cut.
    pub skbs: u64,
    /// Packets on the wire beyond the first of each skb. Not all of them: two counters of the same
    /// packets would differ while one of them is counted.
    pub further_segments: u64,
    /// Bytes on the wire, link headers included.
    pub bytes: u64,
}

/// What became of the report on a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Report {
    /// The packet is not broken, so there is none.
    None = 0,
    /// An event was sent.
    Emitted = 1,
    /// The rate limit held the event back.
    Suppressed = 2,
    /// The event found no room.
    Lost = 3,
}

impl Report {
    /// Every report, in the order of its code.
    pub const ALL: [Self; 4] = [Self::None, Self::Emitted, Self::Suppressed, Self::Lost];
}

/// The counters of one interface on one CPU.
///
/// Each packet is counted once, in one tally, and every total is a sum over tallies: so totals agree
/// with each other at any instant, however counting and reading meet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Counters {
    /// Skbs that are not VXLAN to a watched port.
    pub not_vxlan: u64,
    /// By the code of the verdict, and of the report.
    pub tallies: [[Tally; Report::ALL.len()]; Verdict::ALL.len()],
    /// Packets on the wire whose checksum was set to zero.
    pub zeroed: u64,
    /// Packets on the wire whose checksum was set to the right sum.
    pub restored: u64,
}

/// A broken packet, or a packet of a followed flow.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct Event {
    /// `CLOCK_BOOTTIME` in nanoseconds.
    pub boot_ns: u64,
    /// Length of the skb in bytes, link header included.
    pub len: u32,
    /// Packets on the wire (`gso_segs`); 0 where that is not known.
    pub segments: u32,
    /// `skb->mark`.
    pub mark: u32,
    /// [`crate::Finding::check`].
    pub check: u16,
    /// [`crate::Finding::expected`].
    pub expected: u16,
    /// [`crate::Finding::source_port_before_nat`].
    pub source_port_before_nat: u16,
    /// Bytes of `snapshot` that hold the packet.
    pub snapshot_len: u16,
    /// A [`Verdict`].
    pub verdict: u8,
    /// An [`Action`].
    pub action: u8,
    /// A [`crate::Proof`].
    pub proof: u8,
    /// The [`Policy`] that was assumed.
    pub policy: u8,
    /// `skb->ip_summed`, or [`Event::IP_SUMMED_UNKNOWN`].
    pub ip_summed: u8,
    /// Not zero: told because its inner flow is followed. No event then, and not counted as one.
    pub is_followed: u8,
    /// Zero.
    pub reserved: [u8; 2],
    /// Of a packet that ends the following of its flow: broken SYNs before it whose event was
    /// suppressed or lost.
    pub held_back: u32,
    /// The start of the packet, from before it was fixed.
    pub snapshot: [u8; SNAPSHOT_LEN],
}

impl Event {
    /// [`Event::ip_summed`] where it cannot be read.
    pub const IP_SUMMED_UNKNOWN: u8 = u8::MAX;
}

impl Tally {
    /// Packets on the wire.
    pub const fn packets(&self) -> u64 {
        self.skbs + self.further_segments
    }

    /// Both together.
    #[must_use]
    pub const fn plus(&self, other: &Self) -> Self {
        Self {
            skbs: self.skbs + other.skbs,
            further_segments: self.further_segments + other.further_segments,
            bytes: self.bytes + other.bytes,
        }
    }
}

impl Counters {
    /// Counts `skbs` events as lost that the program took for sent: kernels before 5.1 do not tell it
    /// of a perf buffer that is full.
    pub fn lose(&mut self, mut skbs: u64) {
        for by_report in &mut self.tallies {
            let moved = by_report[Report::Emitted as usize].skbs.min(skbs);
            by_report[Report::Emitted as usize].skbs -= moved;
            by_report[Report::Lost as usize].skbs += moved;
            skbs -= moved;
        }
    }

    /// Both together.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        let mut sum = *self;
        sum.not_vxlan += other.not_vxlan;
        sum.zeroed += other.zeroed;
        sum.restored += other.restored;
        let tallies = sum.tallies.as_flattened_mut().iter_mut();
        for (tally, other) in tallies.zip(other.tallies.as_flattened()) {
            *tally = tally.plus(other);
        }
        sum
    }

    /// All packets with one verdict.
    pub fn of(&self, verdict: Verdict) -> Tally {
        total(&self.tallies[verdict as usize])
    }

    /// All packets with one report; an event is one skb.
    pub fn reported(&self, report: Report) -> Tally {
        total(self.tallies.iter().map(|by_report| &by_report[report as usize]))
    }

    /// All packets that are VXLAN to a watched port.
    pub fn vxlan(&self) -> Tally {
        total(self.tallies.as_flattened())
    }

    /// Every skb seen.
    pub fn skbs(&self) -> u64 {
        self.not_vxlan + self.vxlan().skbs
    }
}

fn total<'a>(tallies: impl IntoIterator<Item = &'a Tally>) -> Tally {
    tallies.into_iter().fold(Tally::default(), |sum, tally| sum.plus(tally))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port(port: u16) -> Port {
        Port { port, ..Port::default() }
    }

    #[test]
    fn every_port_is_found_and_no_other() {
        let many =
            [1, 2, 3, 53, 80, 443, 4789, 4790, 6081, 8472, 8473, 32768, 40000, 65533, 65534, 65535];
        for count in 0..=MAX_PORTS {
            let ports = Ports::new(&many.map(port)[..count]).unwrap();
            for number in 0..=u16::MAX {
                let found = ports.get(number).map(|found| found.port);
                assert_eq!(found, many[..count].contains(&number).then_some(number));
            }
        }
    }

    #[test]
    fn lessons_stay_with_their_port() {
        let mut before = Ports::new(&[port(8472), port(4789)]).unwrap();
        let slot = before.slot(8472);
        before.slots[slot].seen_ipv4 = SEEN_ZERO;
        let mut after = Ports::new(&[port(8472), port(1)]).unwrap();
        after.carry_lessons(&before);
        assert_eq!(after.get(8472).unwrap().policy(false), Policy::Zero);
        assert_eq!(after.get(1).unwrap().policy(false), Policy::Unknown);
        before.slots[slot].seen_ipv4 = SEEN_SUM;
        after.learn(&before);
        assert_eq!(after.get(8472).unwrap().seen_ipv4, SEEN_ZERO | SEEN_SUM);
    }

    #[test]
    fn what_is_lost_later_stays_broken() {
        let mut counters = Counters::default();
        for (verdict, skbs) in [(Verdict::MangledZero, 3), (Verdict::Bad, 5)] {
            counters.tallies[verdict as usize][Report::Emitted as usize].skbs = skbs;
        }
        counters.lose(4);
        assert_eq!(counters.reported(Report::Emitted).skbs, 4);
        assert_eq!(counters.reported(Report::Lost).skbs, 4);
        assert_eq!(counters.of(Verdict::MangledZero).skbs, 3);
        assert_eq!(counters.of(Verdict::Bad).skbs, 5);
    }

    #[test]
    fn only_what_is_given_is_watched() {
        let given = [8472, 4789, 1, 65535].map(port);
        for count in 0..=given.len() {
            let given = &given[..count];
            let ports = Ports::new(given).unwrap();
            for port in 0..=u16::MAX {
                let is_given = given.iter().any(|given| given.port == port);
                assert_eq!(ports.get(port).is_some(), is_given, "{port} of the first {count}");
            }
        }
    }

    #[test]
    fn unusable_lists_are_refused() {
        assert!(Ports::new(&[port(0)]).is_none());
        assert!(Ports::new(&[port(8472), port(8472)]).is_none());
        assert!(Ports::new(&[port(1); MAX_PORTS + 1]).is_none());
    }
}
