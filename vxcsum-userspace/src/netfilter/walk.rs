//! The way of a packet out of the node, through all rules that it meets.

use std::cell::Cell;
use std::cmp::Ordering;
use std::net::IpAddr;

use super::{Hook, Nat, Place, Property, Rule, Ruleset, Step, Test, Verdict};

/// What is known of a packet. What is not known is `None`, and a rule that asks for it may match.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Packet {
    /// IPv6, else IPv4.
    pub is_ipv6: bool,
    /// Made on this node: it passes the output hook as well. A forwarded one does not.
    pub is_local: bool,
    /// Source address, before NAT.
    pub src: Option<IpAddr>,
    /// Destination address, after NAT.
    pub dst: Option<IpAddr>,
    /// Protocol number.
    pub protocol: Option<u8>,
    /// Source port, before NAT.
    pub sport: Option<u16>,
    /// Destination port, after NAT.
    pub dport: Option<u16>,
    /// The interface that it leaves by.
    pub out_interface: Option<String>,
    /// The mark that it sets out with.
    pub mark: u32,
    /// The bit that says that it wants to be masqueraded.
    pub masquerade_bit: u32,
}

/// What NAT has made of a packet, where it is known: rules that could not have done that did not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Rewritten {
    /// Source address, after NAT.
    pub src: Option<IpAddr>,
    /// Source port, after NAT.
    pub sport: Option<u16>,
}

/// A rule that the packet meets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Met {
    /// From the base chain to the rule itself: the rules that lead there, and it.
    pub path: Vec<Place>,
    /// It matches, and so do the rules that lead there; else it may.
    pub is_match: bool,
    /// It matches, and nothing before it may have ended the way of the packet.
    pub is_certain: bool,
    /// Its number among all rules that the packet meets: lower comes first.
    pub order: u32,
}

impl Met {
    /// The rule itself.
    pub fn place(&self) -> Place {
        // A path has the rule itself at least.
        self.path.last().copied().unwrap_or(Place { chain: 0, rule: 0 })
    }
}

/// What becomes of a packet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Walked {
    /// The rules that may rewrite its source, in order. The first that is certain is the last.
    pub nat: Vec<Met>,
    /// The rules that take the masquerade bit from it, in order, before one that is certain to
    /// rewrite it.
    pub unmarked: Vec<Met>,
    /// The same after that: they would have, if the packet had come so far.
    pub unmarked_too_late: Vec<Met>,
    /// The rules about its destination port that keep it from NAT: it returns or is accepted there,
    /// or leaves connection tracking.
    pub spared: Vec<Met>,
    /// The rules that write the UDP checksum.
    pub set_checksum: Vec<Met>,
    /// It was followed no further: too many rules.
    pub is_cut: bool,
}

impl Walked {
    /// The rule that rewrites the packet, as far as can be told: rather one that matches than one
    /// that may.
    pub fn likely_nat(&self) -> Option<&Met> {
        let is_certain = self.nat.iter().find(|met| met.is_certain);
        is_certain.or_else(|| self.nat.iter().find(|met| met.is_match)).or(self.nat.first())
    }
}

/// Follows the first packet of a new connection through output and postrouting. With `believe_counters`,
/// rules that have matched no packet so far are taken for what they are: not the ones that did it.
pub fn walk(
    rules: &Ruleset,
    packet: &Packet,
    rewritten: Rewritten,
    believe_counters: bool,
) -> Walked {
    let mut walk = Walk::new(rules, packet, rewritten, believe_counters);
    let hooks: &[Hook] =
        if packet.is_local { &[Hook::Output, Hook::Postrouting] } else { &[Hook::Postrouting] };
    for &hook in hooks {
        for chain in rules.base_chains(hook, packet.is_ipv6) {
            walk.base_chain(chain);
        }
    }
    let mut walked = walk.walked;
    for met in walked.nat.iter_mut().filter(|met| met.is_certain) {
        // Which of two chains comes first that have the same priority is not certain.
        let of = |place: &Place| rules.chains[place.chain].base;
        let base = met.path.first().and_then(of);
        let rivals =
            rules.base_chains(Hook::Postrouting, packet.is_ipv6).into_iter().filter(|chain| {
                rules.chains[*chain].base == base
                    && met.path.iter().all(|place| place.chain != *chain)
            });
        for rival in rivals {
            let mut walk = Walk::new(rules, packet, rewritten, believe_counters);
            walk.base_chain(rival);
            met.is_certain &= walk.walked.nat.is_empty();
        }
    }
    walked
}

/// Most rules that a packet is followed through: maps and doubts may lead to the same chain often.
const MAX_RULES: u32 = 400_000;
/// Most places that are remembered, 16 bytes each: every rule that is met has the way there with it.
const MAX_PLACES: usize = 1 << 18;
/// Deepest nesting of chains; nftables allows 16 (`NFT_JUMP_STACK_SIZE`).
pub(super) const MAX_DEPTH: usize = 64;

/// Whether something is so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Truth {
    No,
    Maybe,
    Yes,
}

impl Truth {
    const fn from_bool(it: bool) -> Self {
        if it { Self::Yes } else { Self::No }
    }

    fn known(it: Option<bool>) -> Self {
        it.map_or(Self::Maybe, Self::from_bool)
    }

    const fn not(self) -> Self {
        match self {
            Self::No => Self::Yes,
            Self::Maybe => Self::Maybe,
            Self::Yes => Self::No,
        }
    }
}

/// A mark of which some bits are not known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Mark {
    bits: u32,
    unknown: u32,
}

impl Mark {
    /// Whether (mark & mask) == value.
    const fn equals(self, mask: u32, value: u32) -> Truth {
        if (self.bits ^ value) & mask & !self.unknown != 0 || value & !mask != 0 {
            Truth::No
        } else if mask & self.unknown != 0 {
            Truth::Maybe
        } else {
            Truth::Yes
        }
    }

    const fn set(self, clear: u32, xor: u32) -> Self {
        Self { bits: (self.bits & !clear) ^ xor, unknown: self.unknown & !clear }
    }

    /// It may be this or the other.
    const fn or(self, other: Self) -> Self {
        Self { unknown: self.unknown | other.unknown | (self.bits ^ other.bits), ..self }
    }
}

struct Walk<'a> {
    rules: &'a Ruleset,
    packet: &'a Packet,
    rewritten: Rewritten,
    believe_counters: bool,
    mark: Mark,
    path: Vec<Place>,
    /// How many rules on the path may match only.
    maybes: u32,
    is_tracked: Truth,
    /// NAT is decided once for a connection. What follows is looked at only for what the packet
    /// has missed.
    is_rewritten: Truth,
    budget: u32,
    /// In all of `walked`.
    places: Cell<usize>,
    walked: Walked,
}

/// How a chain was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Left {
    /// To go on where it was called.
    Back {
        /// It may as well have ended for good.
        is_certain: bool,
    },
    /// To the next base chain.
    Ended,
}

impl<'a> Walk<'a> {
    fn new(
        rules: &'a Ruleset,
        packet: &'a Packet,
        rewritten: Rewritten,
        believe_counters: bool,
    ) -> Self {
        Self {
            rules,
            packet,
            rewritten,
            believe_counters,
            mark: Mark { bits: packet.mark, unknown: 0 },
            path: Vec::new(),
            maybes: 0,
            is_tracked: Truth::Yes,
            is_rewritten: Truth::No,
            budget: MAX_RULES,
            places: Cell::new(0),
            walked: Walked::default(),
        }
    }

    fn base_chain(&mut self, chain: usize) {
        let is_nat = self.rules.chains[chain].base.is_some_and(|base| base.is_nat);
        // NAT looks at nothing that is not tracked.
        if is_nat && self.is_tracked == Truth::No {
            return;
        }
        self.chain(chain, is_nat && self.is_tracked != Truth::Yes);
    }

    /// `in_doubt`: the packet may not come here.
    fn chain(&mut self, chain: usize, mut in_doubt: bool) -> Left {
        if self.path.len() >= MAX_DEPTH {
            self.walked.is_cut = true;
            return Left::Back { is_certain: false };
        }
        // Then it is not certain either that it goes on after this chain.
        let mut may_have_ended = false;
        let rules = self.rules;
        for (number, rule) in rules.chains[chain].rules.iter().enumerate() {
            let is_full = self.places.get() >= MAX_PLACES;
            let Some(budget) = self.budget.checked_sub(1).filter(|_| !is_full) else {
                self.walked.is_cut = true;
                return Left::Back { is_certain: false };
            };
            self.budget = budget;
            self.path.push(Place { chain, rule: number });
            let outcome = self.rule(chain, rule, in_doubt);
            self.path.pop();
            match outcome {
                Outcome::Next => {}
                Outcome::Return(Truth::Yes) => break,
                Outcome::End(Truth::Yes) if !in_doubt => return Left::Ended,
                Outcome::End(Truth::Yes) => return Left::Back { is_certain: false },
                Outcome::Return(_) => in_doubt = true,
                Outcome::End(_) => {
                    in_doubt = true;
                    may_have_ended = true;
                }
            }
        }
        Left::Back { is_certain: !may_have_ended }
    }

    fn rule(&mut self, chain: usize, rule: &Rule, in_doubt: bool) -> Outcome {
        let mut matches = Truth::Yes;
        // A rule about the tunnel's port is there for the tunnel.
        let mut is_for_port = false;
        for step in &rule.steps {
            let met = |walk: &Self| {
                let is_match = matches == Truth::Yes && walk.maybes == 0;
                walk.places.set(walk.places.get() + walk.path.len());
                Met {
                    path: walk.path.clone(),
                    is_match,
                    is_certain: is_match && !in_doubt,
                    order: MAX_RULES - walk.budget,
                }
            };
            match step {
                Step::Test(test) => {
                    matches = matches.min(self.test(test));
                    if matches == Truth::No {
                        return Outcome::Next;
                    }
                    let is_port = matches!(test.of, Property::DestinationPort(_));
                    is_for_port |= is_port && !test.is_negated;
                }
                Step::SetMark { clear, xor } => {
                    let met = met(self);
                    self.set_mark((*clear, *xor), met, is_for_port);
                }
                Step::UnknownMark => self.mark.unknown = u32::MAX,
                Step::SetUdpChecksum => self.walked.set_checksum.push(met(self)),
                Step::NoTrack => {
                    let met = met(self);
                    self.is_tracked = if met.is_certain { Truth::No } else { Truth::Maybe };
                    self.walked.spared.push(met);
                }
                Step::Nat(nat) => {
                    let is_unused = self.believe_counters && rule.packets == Some(0);
                    if !is_unused && self.can_be(nat) {
                        let met = met(self);
                        self.nat(met);
                    }
                    return Outcome::Next;
                }
                Step::Go(verdict) => {
                    if is_for_port && matches!(verdict, Verdict::Return | Verdict::Accept) {
                        self.walked.spared.push(met(self));
                    }
                    return self.go(chain, verdict, matches, in_doubt);
                }
                Step::Map(branches) => {
                    for (tests, verdict) in branches {
                        let fits = tests.iter().map(|test| self.test(test)).min();
                        let fits = fits.unwrap_or(Truth::Yes).min(matches);
                        let outcome = match fits {
                            Truth::No => continue,
                            _ => self.go(chain, verdict, fits, in_doubt),
                        };
                        if fits == Truth::Yes || outcome != Outcome::Next {
                            return outcome;
                        }
                    }
                }
                Step::Unknown(_) => {}
            }
        }
        Outcome::Next
    }

    fn set_mark(&mut self, (clear, xor): (u32, u32), mut met: Met, is_for_port: bool) {
        let bit = self.packet.masquerade_bit;
        let takes_bit = bit != 0 && (bit & !clear) ^ (xor & bit) == 0;
        let takes_bit = takes_bit && self.mark.equals(bit, bit) != Truth::No;
        if self.is_rewritten == Truth::Yes {
            if takes_bit {
                self.walked.unmarked_too_late.push(met);
            }
            return;
        }
        met.is_certain &= self.is_rewritten == Truth::No;
        let next = self.mark.set(clear, xor);
        self.mark = if met.is_certain { next } else { self.mark.or(next) };
        if takes_bit {
            if is_for_port {
                self.walked.spared.push(met.clone());
            }
            self.walked.unmarked.push(met);
        }
    }

    fn nat(&mut self, mut met: Met) {
        if self.is_rewritten == Truth::Yes {
            return;
        }
        met.is_certain &= self.is_rewritten == Truth::No;
        self.is_rewritten = if met.is_certain { Truth::Yes } else { Truth::Maybe };
        self.walked.nat.push(met);
    }

    fn go(&mut self, chain: usize, verdict: &Verdict, matches: Truth, in_doubt: bool) -> Outcome {
        match verdict {
            // A packet that has left was not dropped.
            Verdict::Drop => Outcome::Next,
            Verdict::Return => Outcome::Return(matches),
            Verdict::Accept => Outcome::End(matches),
            Verdict::Jump(to) | Verdict::Goto(to) => {
                let Some(to) = self.rules.index.find(&self.rules.chains[chain], to) else {
                    return Outcome::Next;
                };
                let is_maybe = matches != Truth::Yes;
                self.maybes += u32::from(is_maybe);
                let left = self.chain(to, in_doubt || is_maybe);
                self.maybes -= u32::from(is_maybe);
                match (left, verdict) {
                    (Left::Ended, _) => Outcome::End(matches),
                    (Left::Back { is_certain: false }, _) => Outcome::End(Truth::Maybe),
                    (Left::Back { .. }, Verdict::Goto(_)) => Outcome::Return(matches),
                    (Left::Back { .. }, _) => Outcome::Next,
                }
            }
        }
    }

    /// Whether a rule can have made of the packet what became of it.
    fn can_be(&self, nat: &Nat) -> bool {
        let within = |range: &Option<(u16, u16)>, port: u16| {
            range.is_none_or(|(first, last)| first <= port && port <= last)
        };
        let address = match (self.rewritten.src, nat.addresses) {
            (Some(src), Some((first, last))) => {
                src.cmp(&first) != Ordering::Less && src.cmp(&last) != Ordering::Greater
            }
            _ => true,
        };
        address && self.rewritten.sport.is_none_or(|port| within(&nat.ports, port))
    }

    fn test(&self, test: &Test) -> Truth {
        let packet = self.packet;
        let truth = match &test.of {
            Property::IsIpv6(is_ipv6) => Truth::from_bool(*is_ipv6 == packet.is_ipv6),
            Property::Source(among) => {
                Truth::known(packet.src.map(|src| among.iter().any(|it| it.contains(src))))
            }
            Property::Destination(among) => {
                Truth::known(packet.dst.map(|dst| among.iter().any(|it| it.contains(dst))))
            }
            Property::Protocol(among) => {
                Truth::known(packet.protocol.map(|protocol| among.contains(&protocol)))
            }
            Property::SourcePort(among) => is_among(packet.sport, among),
            Property::DestinationPort(among) => is_among(packet.dport, among),
            Property::AnyPort(among) => {
                is_among(packet.sport, among).max(is_among(packet.dport, among))
            }
            Property::OutInterface(names) => Truth::known(
                packet.out_interface.as_ref().map(|own| names.iter().any(|it| is_named(own, it))),
            ),
            Property::Mark { mask, value } => self.mark.equals(*mask, *value),
            Property::NewConnection(is_new) => Truth::from_bool(*is_new),
            Property::SourceIsLocal { on_out_interface } => {
                self.is_local(packet.src, *on_out_interface)
            }
            Property::DestinationIsLocal { on_out_interface } => {
                self.is_local(packet.dst, *on_out_interface)
            }
            Property::Unknown(_) => Truth::Maybe,
        };
        if test.is_negated { truth.not() } else { truth }
    }

    fn is_local(&self, address: Option<IpAddr>, on_out_interface: bool) -> Truth {
        let Some(address) = address else { return Truth::Maybe };
        if address.is_loopback() && !on_out_interface {
            return Truth::Yes;
        }
        let mut holders = self
            .rules
            .local_addresses
            .iter()
            .filter(|(_, own)| *own == address)
            .map(|(name, _)| name);
        if !on_out_interface {
            return Truth::from_bool(holders.next().is_some());
        }
        Truth::known(self.packet.out_interface.as_ref().map(|own| holders.any(|name| name == own)))
    }
}

/// What becomes of the packet after a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// On to the next rule.
    Next,
    /// Out of the chain.
    Return(Truth),
    /// Out of the base chain.
    End(Truth),
}

fn is_among(port: Option<u16>, among: &[(u16, u16)]) -> Truth {
    Truth::known(port.map(|port| among.iter().any(|&(first, last)| first <= port && port <= last)))
}

fn is_named(own: &str, wanted: &str) -> bool {
    match wanted.strip_suffix('*') {
        Some(start) => own.starts_with(start),
        None => own == wanted,
    }
}
