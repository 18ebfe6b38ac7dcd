//! The rules that can rewrite a tunnel packet, of all that the kernel has side by side: iptables in
//! its old form (legacy), iptables on top of `nf_tables`, and nftables. They are only read, and read
//! as far as it takes to say which rule rewrites the source of a packet that leaves ([`walk`]).

use std::collections::{HashMap, HashSet};
use std::fmt::{self, Display};
use std::net::IpAddr;
use std::sync::Arc;

#[cfg(fuzzing)]
pub mod fuzzing;
mod legacy;
mod nft;
mod process;
mod read;
mod save;
#[cfg(test)]
mod tests;
pub mod walk;

pub use read::read;

/// What a set of rules was made with, and has to be changed with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Backend {
    /// `iptables-legacy`: tables of `x_tables`.
    IptablesLegacy,
    /// `iptables-nft`: tables of `nf_tables` under the names of iptables.
    IptablesNft,
    /// `nft`.
    Nft,
}

impl Backend {
    /// The name in JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::IptablesLegacy => "iptables-legacy",
            Self::IptablesNft => "iptables-nft",
            Self::Nft => "nft",
        }
    }
}

/// The packets that a table sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// IPv4 only.
    Ipv4,
    /// IPv6 only.
    Ipv6,
    /// Both.
    Inet,
}

impl Family {
    /// The name in JSON, which is nft's.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ipv4 => "ip",
            Self::Ipv6 => "ip6",
            Self::Inet => "inet",
        }
    }

    /// Whether packets of this kind come by.
    pub const fn sees(self, is_ipv6: bool) -> bool {
        match self {
            Self::Ipv4 => !is_ipv6,
            Self::Ipv6 => is_ipv6,
            Self::Inet => true,
        }
    }
}

/// Where on its way a packet meets a base chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Hook {
    /// It came from elsewhere, and is not routed yet.
    Prerouting,
    /// It is for this node.
    Input,
    /// It goes through this node.
    Forward,
    /// It was made on this node.
    Output,
    /// It leaves.
    Postrouting,
}

impl Hook {
    fn from_name(name: &str) -> Option<Self> {
        Some(match name.to_ascii_lowercase().as_str() {
            "prerouting" => Self::Prerouting,
            "input" => Self::Input,
            "forward" => Self::Forward,
            "output" => Self::Output,
            "postrouting" => Self::Postrouting,
            _ => return None,
        })
    }
}

/// What makes a chain a base chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Base {
    /// Where packets enter it.
    pub hook: Hook,
    /// Its place among the others there: lower comes first.
    pub priority: i32,
    /// It decides about NAT, and sees the first packet of a connection only.
    pub is_nat: bool,
}

/// All rules that could be read.
#[derive(Clone, Debug, Default)]
pub struct Ruleset {
    /// Every chain, tables of one backend together and in the order of their making.
    pub chains: Vec<Chain>,
    /// The addresses of this node, by interface.
    pub local_addresses: Vec<(String, IpAddr)>,
    /// What could not be read, and why.
    pub unread: Vec<String>,
    index: Index,
}

/// A chain.
#[derive(Clone, Debug, PartialEq)]
pub struct Chain {
    /// What it is changed with.
    pub backend: Backend,
    /// The packets that it sees.
    pub family: Family,
    /// The table that it is in.
    pub table: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
    /// Where packets enter it; none where only other chains lead there.
    pub base: Option<Base>,
    /// The rules, in order.
    pub rules: Vec<Rule>,
}

/// A rule.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rule {
    /// What it does, from left to right; a test that fails ends it.
    pub steps: Vec<Step>,
    /// Packets that it has matched, where it counts them.
    pub packets: Option<u64>,
    /// The rule as its tool shows it, without the chain. Rules of nftables are shown as far as they
    /// are understood.
    pub text: Box<str>,
    /// The last part of it: what it does with a packet that matches.
    pub action: Box<str>,
}

/// A part of a rule.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Goes on only with packets of this kind.
    Test(Test),
    /// New mark = (mark & !clear) ^ xor.
    SetMark {
        /// Bits that are cleared first.
        clear: u32,
        /// Bits that are turned over then.
        xor: u32,
    },
    /// The new mark is not known.
    UnknownMark,
    /// Rewrites the source.
    Nat(Nat),
    /// Takes the packet out of connection tracking, and with that out of NAT.
    NoTrack,
    /// Writes the UDP checksum.
    SetUdpChecksum,
    /// Where packets go from here.
    Go(Verdict),
    /// Where packets go by a map: the first that applies.
    Map(Vec<(Vec<Test>, Verdict)>),
    /// Something that is not understood and may do anything short of NAT.
    Unknown(Box<str>),
}

/// Where a packet goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// To another chain of the table, and back.
    Jump(Arc<str>),
    /// To another chain of the table.
    Goto(Arc<str>),
    /// Back, or to the chain's policy.
    Return,
    /// On to the next base chain.
    Accept,
    /// Nowhere.
    Drop,
}

/// Rewriting of the source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Nat {
    /// To one of these, the end included; to the address of the interface where none are given.
    pub addresses: Option<(IpAddr, IpAddr)>,
    /// To one of these ports, the end included.
    pub ports: Option<(u16, u16)>,
}

/// A kind of packets.
#[derive(Clone, Debug, PartialEq)]
pub struct Test {
    /// All others instead.
    pub is_negated: bool,
    /// What is looked at.
    pub of: Property,
}

/// What a rule looks at.
#[derive(Clone, Debug, PartialEq)]
pub enum Property {
    /// IPv6, else IPv4.
    IsIpv6(bool),
    /// Source address.
    Source(Vec<Addresses>),
    /// Destination address.
    Destination(Vec<Addresses>),
    /// Protocol number.
    Protocol(Vec<u8>),
    /// Ports of the source, both ends included.
    SourcePort(Vec<(u16, u16)>),
    /// Ports of the destination, both ends included.
    DestinationPort(Vec<(u16, u16)>),
    /// Either.
    AnyPort(Vec<(u16, u16)>),
    /// Interfaces that packets leave by; a name that ends in `*` stands for all that begin so.
    OutInterface(Vec<Box<str>>),
    /// The mark, as far as the mask goes.
    Mark {
        /// The bits that matter.
        mask: u32,
        /// What they are.
        value: u32,
    },
    /// The connection is new, and is among those looked for.
    NewConnection(bool),
    /// The source is an address of this node; of the interface it leaves by, if so wanted.
    SourceIsLocal {
        /// Only the addresses of that interface.
        on_out_interface: bool,
    },
    /// The destination is an address of this node; of the interface it leaves by, if so wanted.
    DestinationIsLocal {
        /// Only the addresses of that interface.
        on_out_interface: bool,
    },
    /// Something that is not understood.
    Unknown(Box<str>),
}

/// A range of addresses, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    first: IpAddr,
    last: IpAddr,
}

impl Addresses {
    /// From one to another, both included.
    pub const fn range(first: IpAddr, last: IpAddr) -> Self {
        Self { first, last }
    }

    /// Those that agree in `prefix_len` bits.
    pub fn prefix(address: IpAddr, prefix_len: u32) -> Option<Self> {
        let (first, last) = match address {
            IpAddr::V4(address) => {
                let host = u32::MAX.checked_shr(prefix_len).unwrap_or(0);
                let bits = address.to_bits();
                (prefix_len <= 32).then(|| {
                    (IpAddr::from((bits & !host).to_be_bytes()), (bits | host).to_be_bytes().into())
                })?
            }
            IpAddr::V6(address) => {
                let host = u128::MAX.checked_shr(prefix_len).unwrap_or(0);
                let bits = address.to_bits();
                (prefix_len <= 128).then(|| {
                    (IpAddr::from((bits & !host).to_be_bytes()), (bits | host).to_be_bytes().into())
                })?
            }
        };
        Some(Self { first, last })
    }

    /// As `10.0.0.0/8`, `10.0.0.0/255.0.0.0` or `10.0.0.1`.
    fn parse(text: &str) -> Option<Self> {
        let (address, mask) =
            text.split_once('/').map_or((text, None), |(it, mask)| (it, Some(mask)));
        let address: IpAddr = address.parse().ok()?;
        let Some(mask) = mask else { return Some(Self::range(address, address)) };
        match mask.parse::<u32>() {
            Ok(prefix_len) => Self::prefix(address, prefix_len),
            Err(_) => match mask.parse().ok()? {
                IpAddr::V4(mask) => contiguous(mask.to_bits().into(), 32),
                IpAddr::V6(mask) => contiguous(mask.to_bits(), 128),
            }
            .and_then(|prefix_len| Self::prefix(address, prefix_len)),
        }
    }

    /// Whether an address is among them.
    pub fn contains(&self, address: IpAddr) -> bool {
        // Derived order puts all of IPv4 before all of IPv6.
        self.first.is_ipv4() == address.is_ipv4() && self.first <= address && address <= self.last
    }
}

/// The length of a mask of `width` bits, if all of its ones come first.
fn contiguous(mask: u128, width: u32) -> Option<u32> {
    let ones = mask.count_ones();
    (ones + mask.trailing_zeros().min(width) == width).then_some(ones)
}

/// Where a rule stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    /// Index of the chain in [`Ruleset::chains`].
    pub chain: usize,
    /// Index of the rule in it.
    pub rule: usize,
}

impl Ruleset {
    /// The base chains that a packet meets at a hook, in order. Of those with the same priority the
    /// kernel takes the younger one first (`nf_hook_entries_grow` in `net/netfilter/core.c`; measured);
    /// how old they are does not show, but the order in which they are read is a hint.
    pub fn base_chains(&self, hook: Hook, is_ipv6: bool) -> Vec<usize> {
        let mut found: Vec<(i32, bool, i32, usize)> = self
            .chains
            .iter()
            .enumerate()
            .filter(|(_, chain)| chain.family.sees(is_ipv6))
            .filter_map(|(index, chain)| {
                let base = chain.base.filter(|base| base.hook == hook)?;
                // All of NAT runs as one, at the core's own place (`nf_nat_register_fn`,
                // net/netfilter/nf_nat_core.c), and by priority there.
                let place = if base.is_nat { nat_priority(hook) } else { base.priority };
                Some((place, base.is_nat, base.priority, index))
            })
            .collect();
        // The younger one of equals first, as far as that is known.
        found.sort_by_key(|&(place, is_nat, own, index)| (place, is_nat, own, usize::MAX - index));
        found.into_iter().map(|(.., index)| index).collect()
    }

    /// Whether any rule asks for the port that a packet comes from, or rewrites it within a range.
    pub fn looks_at_source_ports(&self) -> bool {
        self.chains.iter().flat_map(|chain| &chain.rules).flat_map(|rule| &rule.steps).any(|step| {
            let is_about_port =
                |test: &Test| matches!(test.of, Property::SourcePort(_) | Property::AnyPort(_));
            match step {
                Step::Test(test) => is_about_port(test),
                Step::Map(map) => map.iter().flat_map(|(tests, _)| tests).any(is_about_port),
                Step::Nat(nat) => nat.ports.is_some(),
                _ => false,
            }
        })
    }

    /// The rule at a place.
    pub fn rule(&self, place: Place) -> (&Chain, &Rule) {
        let chain = &self.chains[place.chain];
        (chain, &chain.rules[place.rule])
    }

    /// Every rule that rewrites the source of packets that leave, in the order in which they are
    /// met: for those who look for rules rather than for what happens to a packet.
    pub fn source_nat_rules(&self, is_ipv6: bool) -> Vec<Place> {
        let mut found = Vec::new();
        let mut seen = HashSet::new();
        for chain in self.base_chains(Hook::Postrouting, is_ipv6) {
            self.collect_nat(chain, 0, &mut seen, &mut found);
        }
        found
    }

    fn collect_nat(
        &self,
        chain: usize,
        depth: usize,
        seen: &mut HashSet<usize>,
        found: &mut Vec<Place>,
    ) {
        // iptables-legacy sets no limit, but this stack has one.
        if depth >= walk::MAX_DEPTH || !seen.insert(chain) {
            return;
        }
        for (number, rule) in self.chains[chain].rules.iter().enumerate() {
            if rule.steps.iter().any(|step| matches!(step, Step::Nat(_))) {
                found.push(Place { chain, rule: number });
            }
            for to in rule.steps.iter().flat_map(Step::targets) {
                if let Some(to) = self.index.find(&self.chains[chain], to) {
                    self.collect_nat(to, depth + 1, seen, found);
                }
            }
        }
    }

    /// Rules, of which only those are kept that a packet that leaves can meet: the others may be
    /// most of them.
    fn new(
        chains: Vec<Chain>,
        local_addresses: Vec<(String, IpAddr)>,
        unread: Vec<String>,
    ) -> Self {
        let mut rules = Self { index: Index::new(&chains), chains, local_addresses, unread };
        rules.keep_reachable();
        rules.index = Index::new(&rules.chains);
        rules
    }

    fn keep_reachable(&mut self) {
        let mut is_kept = vec![false; self.chains.len()];
        let is_entry = |chain: &Chain| {
            chain.base.is_some_and(|base| matches!(base.hook, Hook::Output | Hook::Postrouting))
        };
        let mut open: Vec<usize> =
            (0..self.chains.len()).filter(|&at| is_entry(&self.chains[at])).collect();
        while let Some(at) = open.pop() {
            if std::mem::replace(&mut is_kept[at], true) {
                continue;
            }
            let chain = &self.chains[at];
            let targets = chain.rules.iter().flat_map(|rule| &rule.steps).flat_map(Step::targets);
            open.extend(targets.filter_map(|to| self.index.find(chain, to)));
        }
        let mut is_kept = is_kept.into_iter();
        self.chains.retain(|_| is_kept.next().unwrap_or(true));
    }
}

/// The priority at which the core of NAT runs (`nf_nat_ipv4_ops` in `nf_nat_proto.c`).
const fn nat_priority(hook: Hook) -> i32 {
    match hook {
        Hook::Prerouting | Hook::Output => -100,
        Hook::Input | Hook::Forward | Hook::Postrouting => 100,
    }
}

impl Step {
    /// The chains that it leads to.
    fn targets(&self) -> impl Iterator<Item = &Arc<str>> {
        let (one, many) = match self {
            Self::Go(verdict) => (Some(verdict), [].as_slice()),
            Self::Map(map) => (None, map.as_slice()),
            _ => (None, [].as_slice()),
        };
        one.into_iter().chain(many.iter().map(|(_, verdict)| verdict)).filter_map(|verdict| {
            match verdict {
                Verdict::Jump(to) | Verdict::Goto(to) => Some(to),
                _ => None,
            }
        })
    }
}

/// Chains by name.
#[derive(Clone, Debug, Default)]
struct Index(HashMap<(Backend, Family, Arc<str>, Arc<str>), usize>);

impl Index {
    fn new(chains: &[Chain]) -> Self {
        let key =
            |chain: &Chain| (chain.backend, chain.family, chain.table.clone(), chain.name.clone());
        Self(chains.iter().enumerate().map(|(at, chain)| (key(chain), at)).collect())
    }

    /// The chain of that name in the table of another.
    fn find(&self, from: &Chain, name: &Arc<str>) -> Option<usize> {
        self.0.get(&(from.backend, from.family, from.table.clone(), name.clone())).copied()
    }
}

impl Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
