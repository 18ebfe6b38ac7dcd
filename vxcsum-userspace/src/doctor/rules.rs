//! Which rules tunnel packets can meet, and what becomes of marks on their way into a tunnel.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::doctor::devices::Device;
use crate::doctor::facts::{ChecksumWriter, Entry, Fate, Hit, KubeProxy, Mark, Rules};
use crate::doctor::report::{self, Unseen};
use crate::netfilter::walk::{Met, Packet, Rewritten, Walked, walk};
use crate::netfilter::{Nat, Property, Ruleset, Step, Test};

/// The mark of kube-proxy, unless `--iptables-masquerade-bit` says otherwise.
const MASQUERADE_MARK: u32 = 0x4000;
/// Most other marks that are followed.
const MAX_MARKS: usize = 8;
/// Nodes are many, and rules that tell one from another are few.
const MAX_REMOTES: usize = 4;
const UDP: u8 = 17;
const TOO_MANY: &str = "there are too many to follow a packet through all of them";

/// Follows the packets of every device through these rules.
pub fn of_ruleset(ruleset: &Ruleset, devices: &[Device]) -> Rules {
    let unread = |why: &String| Unseen { what: "rules".to_owned(), why: why.clone() };
    let mut rules =
        Rules { unread: ruleset.unread.iter().map(unread).collect(), ..Rules::default() };
    for device in devices {
        add_device(ruleset, device, &mut rules);
    }
    rules
}

fn add_device(ruleset: &Ruleset, device: &Device, rules: &mut Rules) {
    let marks: Vec<(u32, Fate)> = marks(ruleset, device.is_ipv6)
        .into_iter()
        .map(|bits| (bits, fate(ruleset, device, bits)))
        .collect();
    let kube_proxy = marks.iter().find(|(bits, _)| *bits == MASQUERADE_MARK);
    if let Some((bits, fate)) = kube_proxy.filter(|_| has_kube_proxy(ruleset)) {
        rules.kube_proxy = Some(KubeProxy { bits: *bits, fate: fate.clone() });
    }
    let mut found: Vec<(Met, Option<Mark>)> = Vec::new();
    let remotes = device.remotes.iter().copied().map(Some).take(MAX_REMOTES);
    let remotes: Vec<Option<IpAddr>> = remotes.collect();
    for &to in if remotes.is_empty() { &[None][..] } else { &remotes } {
        let plain = outer(ruleset, device, to, 0);
        let is_told = rules.unread.iter().any(|unread| unread.why == TOO_MANY);
        if plain.is_cut && !is_told {
            let why = TOO_MANY.to_owned();
            rules.unread.push(Unseen { what: "rules".to_owned(), why });
        }
        for met in &plain.set_checksum {
            let rule = shown(ruleset, met);
            let writer = ChecksumWriter { device: device.name.clone(), rule };
            if !rules.checksum_writers.contains(&writer) {
                rules.checksum_writers.push(writer);
            }
        }
        plain.nat.into_iter().for_each(|met| add(&mut found, met, None));
        for (bits, fate) in &marks {
            // Cleared for certain, the mark never gets into the tunnel.
            if fate.unmark.is_some() && fate.taken_by.is_none() {
                continue;
            }
            for met in outer(ruleset, device, to, *bits).nat {
                add(&mut found, met, Some(Mark { bits: *bits, fate: fate.clone() }));
            }
        }
    }
    rules.hits.extend(found.into_iter().map(|(met, mark)| hit(ruleset, device, &met, mark)));
}

/// Each rule once, and by the surest way to it.
fn add(found: &mut Vec<(Met, Option<Mark>)>, met: Met, mark: Option<Mark>) {
    match found.iter_mut().find(|(known, _)| known.place() == met.place()) {
        None => found.push((met, mark)),
        Some(known) if met.is_certain && !known.0.is_certain => *known = (met, mark),
        Some(_) => {}
    }
}

fn hit(ruleset: &Ruleset, device: &Device, met: &Met, mark: Option<Mark>) -> Hit {
    let chain = &ruleset.chains[met.path.first().map_or(0, |place| place.chain)];
    let is_of_port = |step: &Step| {
        matches!(step, Step::Test(Test { is_negated: false, of: Property::DestinationPort(among) })
            if among[..] == [(device.port, device.port)])
    };
    let is_specific =
        met.path.iter().any(|&place| ruleset.rule(place).1.steps.iter().any(is_of_port));
    // Whether a packet inside comes to have the mark is another question.
    let is_certain = met.is_certain && mark.as_ref().is_none_or(|it| it.fate.unmark.is_none());
    Hit {
        device: device.name.clone(),
        rule: shown(ruleset, met),
        entry: Entry {
            backend: chain.backend,
            family: chain.family.as_str(),
            table: chain.table.to_string(),
            chain: chain.name.to_string(),
        },
        is_specific,
        mark,
        is_certain,
        keeps_source: keeps_source(ruleset, device, met),
    }
}

/// Masquerading takes the first address of the interface (`inet_select_addr`, net/ipv4/devinet.c).
fn keeps_source(ruleset: &Ruleset, device: &Device, met: &Met) -> bool {
    let (_, rule) = ruleset.rule(met.place());
    let is_plain = |step: &Step| matches!(step, Step::Nat(nat) if *nat == Nat::default());
    let mut own = ruleset.local_addresses.iter().filter(|(name, address)| {
        Some(name) == device.leaves_by.as_ref() && address.is_ipv6() == device.is_ipv6
    });
    let is_first = own.next().is_some_and(|(_, address)| Some(*address) == device.local);
    // Every way to ask for another port has the word in it: --random, fully-random.
    is_first && !rule.text.contains("random") && rule.steps.iter().any(is_plain)
}

/// A tunnel packet as this device makes it.
fn outer(ruleset: &Ruleset, device: &Device, to: Option<IpAddr>, mark: u32) -> Walked {
    let packet = Packet {
        is_ipv6: device.is_ipv6,
        is_local: true,
        src: device.local,
        dst: to,
        protocol: Some(UDP),
        sport: None,
        dport: Some(device.port),
        out_interface: device.leaves_by.clone(),
        mark,
        masquerade_bit: mark,
    };
    walk(ruleset, &packet, Rewritten::default(), false)
}

/// What becomes of a mark on a packet that is about to go into the tunnel, of this node or a pod.
fn fate(ruleset: &Ruleset, device: &Device, mark: u32) -> Fate {
    // The family inside need not be the one outside; it is one in which the mark is put on packets.
    let sets = |is_ipv6: &bool| {
        let mut chains = ruleset.chains.iter().filter(|chain| chain.family.sees(*is_ipv6));
        let is_it = |step: &Step| matches!(step, Step::SetMark { clear, xor } if clear & xor & mark == mark);
        chains.any(|chain| chain.rules.iter().flat_map(|rule| &rule.steps).any(is_it))
    };
    let mut families: Vec<bool> = [false, true].into_iter().filter(sets).collect();
    if families.is_empty() {
        families.push(device.is_ipv6);
    }
    let mut fate = Fate::default();
    for (is_ipv6, is_local) in families.iter().flat_map(|&it| [(it, true), (it, false)]) {
        let packet = Packet {
            is_ipv6,
            is_local,
            src: None,
            dst: None,
            protocol: None,
            sport: None,
            dport: None,
            out_interface: Some(device.name.clone()),
            mark,
            masquerade_bit: mark,
        };
        let walked = walk(ruleset, &packet, Rewritten::default(), false);
        let place = |met: &Met| place(ruleset, met);
        if let Some(clears) = walked.unmarked.iter().find(|met| met.is_certain) {
            fate.unmark.get_or_insert_with(|| place(clears));
        } else if let Some(late) = walked.unmarked.iter().chain(&walked.unmarked_too_late).next() {
            fate.unmark.get_or_insert_with(|| place(late));
            let taken_by = walked.nat.first().map(place);
            let taken_by = taken_by.unwrap_or_else(|| "a rule not understood in full".to_owned());
            fate.taken_by.get_or_insert(taken_by);
        }
    }
    fate
}

/// The marks that rules of NAT look for.
fn marks(ruleset: &Ruleset, is_ipv6: bool) -> BTreeSet<u32> {
    let nat = ruleset
        .chains
        .iter()
        .filter(|chain| chain.family.sees(is_ipv6) && &*chain.table != "filter");
    let tests = nat.flat_map(|chain| &chain.rules).flat_map(|rule| &rule.steps);
    let marks = tests.filter_map(|step| match step {
        Step::Test(Test { of: Property::Mark { mask, value }, .. }) => Some(mask & value),
        _ => None,
    });
    let marks = marks.filter(|bits| !matches!(*bits, 0 | MASQUERADE_MARK)).take(MAX_MARKS);
    marks.chain([MASQUERADE_MARK]).collect()
}

fn has_kube_proxy(ruleset: &Ruleset) -> bool {
    let is_its = |name: &str, table: &str| name == "KUBE-POSTROUTING" || table == "kube-proxy";
    ruleset.chains.iter().any(|chain| is_its(&chain.name, &chain.table))
}

fn shown(ruleset: &Ruleset, met: &Met) -> report::Rule {
    let (_, rule) = ruleset.rule(met.place());
    report::Rule { place: place(ruleset, met), text: rule.text.to_string(), packets: rule.packets }
}

/// `iptables-nft nat: POSTROUTING rule 1 > KUBE-POSTROUTING rule 3`
fn place(ruleset: &Ruleset, met: &Met) -> String {
    let (chain, _) = ruleset.rule(met.place());
    let steps = met.path.iter().map(|place| {
        let (chain, _) = ruleset.rule(*place);
        format!("{} rule {}", chain.name, place.rule + 1)
    });
    let steps = steps.collect::<Vec<_>>().join(" > ");
    format!("{} {}: {steps}", chain.backend, chain.table)
}
