//! What led to a broken packet: what NAT has changed, and the rule that did it.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use vxcsum_common::Verdict;

use crate::event::Event;
use crate::netfilter::Ruleset;
use crate::netfilter::walk::{Met, Packet, Rewritten, Walked, walk};

/// kube-proxy's mark on packets that are to be masqueraded, unless it is told another one
/// (`--iptables-masquerade-bit`, 14 by default).
pub const MASQUERADE_MARK: u32 = 0x4000;

/// What led to a broken packet, in the order of its JSON.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Cause {
    /// All of it in one sentence: what was changed, and after the first semicolon why.
    pub text: String,
    /// Source address before NAT, where that rewrote it and it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub src_before_nat: Option<IpAddr>,
    /// Source port before NAT, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sport_before_nat: Option<u16>,
    /// kube-proxy's masquerade mark is on the tunnel packet.
    pub masquerade_mark: bool,
    /// The rule that rewrote the tunnel packet, where one can be named.
    pub rule: Option<Arc<RuleView>>,
    /// It is this rule; else it is likely.
    pub rule_certain: bool,
    /// No rule rewrites a packet with this mark. The rule is the one that does it with kube-proxy's
    /// mark, which the first packet of the connection may have had.
    #[serde(default, skip_serializing_if = "is_false")]
    pub mark_assumed: bool,
    /// The rule that rewrites the packet inside, and so keeps it from the rule that takes the mark
    /// off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inner_rule: Option<Arc<RuleView>>,
    /// The rule that is there to take the mark off, where one is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unmark_rule: Option<Arc<RuleView>>,
    /// What could not be read of the rules, and why.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rules_unread: Option<Arc<str>>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature is serde's")]
const fn is_false(it: &bool) -> bool {
    !*it
}

/// A rule of netfilter, and where it stands.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct RuleView {
    /// `iptables-legacy`, `iptables-nft` or `nft`.
    pub backend: String,
    /// `ip`, `ip6` or `inet`.
    pub family: String,
    /// Its table.
    pub table: String,
    /// Its chain.
    pub chain: String,
    /// Its number in the chain, from 1.
    pub position: usize,
    /// The rules that lead there from the base chain and the rule itself, each as chain and number.
    pub path: Vec<String>,
    /// The rule.
    pub text: String,
    /// What it does with packets that match.
    pub action: String,
    /// Packets that it had matched when it was read, where it counts them.
    pub packets: Option<u64>,
}

impl RuleView {
    fn new(rules: &Ruleset, met: &Met) -> Self {
        let (chain, rule) = rules.rule(met.place());
        let step = |place| {
            let (chain, _) = rules.rule(place);
            format!("{} {}", chain.name, place.rule + 1)
        };
        Self {
            backend: chain.backend.as_str().to_owned(),
            family: chain.family.as_str().to_owned(),
            table: chain.table.to_string(),
            chain: chain.name.to_string(),
            position: met.place().rule + 1,
            path: met.path.iter().copied().map(step).collect(),
            text: rule.text.to_string(),
            action: rule.action.to_string(),
            packets: rule.packets,
        }
    }

    /// `rule 3 of POSTROUTING (cali-POSTROUTING -> MASQUERADE --random-fully)`
    fn describe(&self) -> String {
        let split = |step: &str| step.rsplit_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned()));
        let mut steps = self.path.iter().filter_map(|step| split(step));
        let Some((base, number)) = steps.next() else { return self.text.clone() };
        let mut way: Vec<String> = steps.map(|(chain, _)| chain).collect();
        way.push(self.action.clone());
        format!("rule {number} of {base} ({})", way.join(" -> "))
    }
}

/// What the rules tell of a packet; the same for all packets of its kind.
#[derive(Clone, Debug, Default)]
struct Reasons {
    rule: Option<Arc<RuleView>>,
    rule_certain: bool,
    mark_assumed: bool,
    inner_rule: Option<Arc<RuleView>>,
    unmark_rule: Option<Arc<RuleView>>,
    unmark_missed: Missed,
    /// The rule is none of NAT: it writes the UDP checksum.
    writes_checksum: bool,
}

/// Why the mark is still there although a rule takes it off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Missed {
    /// There is no such rule, or it does not matter.
    #[default]
    Nothing,
    /// The inner packet is rewritten before it gets there.
    TooLate,
    /// The inner packet gets there, if it is the first of its connection.
    LaterPacket,
    /// The inner packet does not get there, or it cannot be told.
    NotReached,
}

/// Rules, and what they have told of packets so far.
#[derive(Debug)]
pub struct Explainer {
    rules: Ruleset,
    /// From when on their counters are, by the clock of events, which nobody can set.
    read: Duration,
    looks_at_source_ports: bool,
    unread: Option<Arc<str>>,
    known: HashMap<(Packet, Packet, Rewritten, Verdict), Reasons>,
}

impl Explainer {
    /// By these rules, which were read from that time on, by the clock of events.
    pub fn new(rules: Ruleset, read: Duration) -> Self {
        Self {
            looks_at_source_ports: rules.looks_at_source_ports(),
            unread: (!rules.unread.is_empty()).then(|| rules.unread.join("; ").into()),
            rules,
            read,
            known: HashMap::new(),
        }
    }

    /// The cause of an event.
    pub fn explain(&mut self, event: &Event) -> Cause {
        /// Kinds of packets to remember.
        const MAX_KNOWN: usize = 4096;
        let (mut outer, mut rewritten) = tunnel_packet(event);
        if !self.looks_at_source_ports {
            outer.sport = None;
            rewritten.sport = None;
        }
        let inner = inner_packet(event, &self.rules);
        // A counter that was still zero before the packet came proves nothing.
        let believe_counters = event.trace.boot() <= self.read;
        let key = (outer, inner, rewritten, event.verdict);
        let reasons = if let Some(reasons) = self.known.get(&key) {
            reasons.clone()
        } else {
            let (outer, inner, rewritten, verdict) = &key;
            let reasons =
                reasons(&self.rules, outer, inner, *rewritten, *verdict, believe_counters);
            if self.known.len() >= MAX_KNOWN {
                self.known.clear();
            }
            self.known.insert(key, reasons.clone());
            reasons
        };
        assemble(event, reasons, self.unread.clone())
    }
}

/// The cause of an event as far as it can be told without rules.
pub fn without_rules(event: &Event, why: &str) -> Cause {
    assemble(event, Reasons::default(), Some(why.into()))
}

fn tunnel_packet(event: &Event) -> (Packet, Rewritten) {
    let outer = &event.outer;
    let is_proven = outer.sport_before_nat.is_some();
    // Where the port alone was rewritten, the address is the old one.
    let src = match (outer.src_before_nat, is_proven) {
        (Some(src), _) => Some(src),
        (None, true) => Some(outer.src),
        (None, false) => None,
    };
    let packet = Packet {
        is_ipv6: outer.dst.is_ipv6(),
        is_local: true,
        src,
        dst: Some(outer.dst),
        protocol: Some(17),
        sport: outer.sport_before_nat,
        dport: Some(outer.dport),
        out_interface: event.out_interface.clone(),
        mark: event.mark.value(),
        masquerade_bit: MASQUERADE_MARK,
    };
    (packet, Rewritten { src: Some(outer.src), sport: Some(outer.sport) })
}

/// The packet inside, as it came to postrouting with the mark on it.
fn inner_packet(event: &Event, rules: &Ruleset) -> Packet {
    let inner = &event.inner;
    // What comes from an address of this node may have come from another one before NAT.
    let is_own = |src: &IpAddr| rules.local_addresses.iter().any(|(_, own)| own == src);
    let protocol = match inner.proto.as_str() {
        "tcp" => Some(6),
        "udp" => Some(17),
        "icmp" => Some(1),
        "icmpv6" => Some(58),
        other => other.parse().ok(),
    };
    Packet {
        is_ipv6: inner.dst.is_some_and(|dst| dst.is_ipv6()),
        is_local: false,
        src: inner.src.filter(|src| !is_own(src)),
        dst: inner.dst,
        protocol,
        sport: None,
        dport: inner.dport,
        out_interface: event.device.clone(),
        mark: event.mark.value() | MASQUERADE_MARK,
        masquerade_bit: MASQUERADE_MARK,
    }
}

fn reasons(
    rules: &Ruleset,
    outer: &Packet,
    inner: &Packet,
    rewritten: Rewritten,
    verdict: Verdict,
    believe_counters: bool,
) -> Reasons {
    let view = |met: &Met| Arc::new(RuleView::new(rules, met));
    let walked = walk(rules, outer, rewritten, believe_counters);
    let mut reasons = Reasons::default();
    if let Some(met) = walked.set_checksum.first() {
        reasons.writes_checksum = true;
        reasons.rule = Some(view(met));
        reasons.rule_certain = met.is_certain;
        return reasons;
    }
    // Whatever matches it, nothing says that it has left its mark on the packet.
    if verdict == Verdict::Bad {
        return reasons;
    }
    let mut nat = walked.likely_nat().cloned();
    let is_match = nat.as_ref().is_some_and(|met| met.is_match);
    if !is_match && outer.mark & MASQUERADE_MARK == 0 {
        // NAT sees the first packet of a connection only, and the rule that takes the mark off may
        // have done so on the tunnel packet itself.
        let marked = Packet { mark: outer.mark | MASQUERADE_MARK, ..outer.clone() };
        let walked = walk(rules, &marked, rewritten, believe_counters);
        if let Some(met) = walked.likely_nat().filter(|met| met.is_match) {
            nat = Some(Met { is_certain: false, ..met.clone() });
            reasons.mark_assumed = true;
        }
    }
    reasons.rule_certain = nat.as_ref().is_some_and(|met| met.is_certain);
    reasons.rule = nat.as_ref().map(view);
    let is_marked = reasons.mark_assumed || outer.mark & MASQUERADE_MARK != 0;
    if is_marked && inner.dst.is_some() {
        find_unmark(
            rules,
            &walk(rules, inner, Rewritten::default(), believe_counters),
            &mut reasons,
        );
    }
    reasons
}

/// Why the mark is still on the packet, which is to be explained: it is there.
fn find_unmark(rules: &Ruleset, walked: &Walked, reasons: &mut Reasons) {
    let view = |met: &Met| Arc::new(RuleView::new(rules, met));
    let unmark = walked.unmarked.first();
    // What rewrites the inner packet before it gets to the rule that takes the mark off.
    let before = |met: &&Met| unmark.is_none_or(|unmark| met.order < unmark.order);
    let nat = walked.nat.iter().filter(before);
    let nat = nat.clone().find(|met| met.is_match).or_else(|| nat.clone().next());
    let late = walked.unmarked_too_late.first();
    (reasons.unmark_rule, reasons.unmark_missed) = match (nat, unmark.or(late)) {
        (Some(nat), Some(unmark)) => {
            reasons.inner_rule = Some(view(nat));
            (Some(view(unmark)), Missed::TooLate)
        }
        (None, Some(unmark)) if unmark.is_match => (Some(view(unmark)), Missed::LaterPacket),
        (None, Some(unmark)) => (Some(view(unmark)), Missed::NotReached),
        (_, None) => (None, Missed::Nothing),
    };
}

fn assemble(event: &Event, reasons: Reasons, unread: Option<Arc<str>>) -> Cause {
    let masquerade_mark = event.mark.value() & MASQUERADE_MARK != 0;
    let mut parts = vec![what_changed(event)];
    parts.extend(why_marked(event, &reasons));
    parts.extend(which_rule(event, &reasons, unread.is_some()));
    parts.extend(unread.as_ref().map(|why| format!("rules not read: {why}")));
    Cause {
        text: parts.join("; "),
        src_before_nat: event.outer.src_before_nat,
        sport_before_nat: event.outer.sport_before_nat,
        masquerade_mark,
        rule_certain: reasons.rule_certain,
        rule: reasons.rule,
        mark_assumed: reasons.mark_assumed,
        inner_rule: reasons.inner_rule,
        unmark_rule: reasons.unmark_rule,
        rules_unread: unread,
    }
}

/// The first part of the sentence: the only one in which numbers of this packet stand.
fn what_changed(event: &Event) -> String {
    let outer = &event.outer;
    match event.verdict {
        Verdict::MangledZero => format!("checksum {} although the device sends none", event.check),
        Verdict::StaleNat => {
            let mut changes = Vec::new();
            if let Some(src) = outer.src_before_nat {
                changes.push(format!("address {src} -> {}", outer.src));
            }
            if let Some(port) = outer.sport_before_nat.filter(|port| *port != outer.sport) {
                changes.push(format!("port {port} -> {}", outer.sport));
            }
            format!("source {} by NAT", changes.join(" and "))
        }
        _ => "nothing proves NAT".to_owned(),
    }
}

fn why_marked(event: &Event, reasons: &Reasons) -> Option<String> {
    let mark = format!("mark {MASQUERADE_MARK:#x}");
    match event.verdict {
        Verdict::Bad => None,
        _ if event.mark.value() & MASQUERADE_MARK != 0 => {
            Some(format!("{mark} left on the tunnel packet"))
        }
        _ if reasons.mark_assumed => Some(format!(
            "no {mark} on this packet, but probably on the first one of its connection"
        )),
        _ => None,
    }
}

fn which_rule(event: &Event, reasons: &Reasons, is_unread: bool) -> Option<String> {
    const KERNEL: &str = "a kernel without ea64d8d6c675 writes that where NAT rewrites the packet";
    const OTHERS: &str = "a BPF program, a driver or faulty memory may have changed the packet after \
                          its sum was made, or whoever sent it made a wrong one";
    let probably = if reasons.rule_certain { "" } else { "probably " };
    let rule = reasons.rule.as_ref().map(|rule| format!("{probably}{}", rule.describe()));
    match (event.verdict, rule) {
        (_, Some(rule)) if reasons.writes_checksum => {
            Some(format!("{rule} writes the UDP checksum"))
        }
        (Verdict::Bad, _) => Some(OTHERS.to_owned()),
        (Verdict::MangledZero, None) => Some(KERNEL.to_owned()),
        (_, None) if is_unread => None,
        (_, None) => Some("no rule of this node would do that now".to_owned()),
        (Verdict::MangledZero, Some(rule)) => {
            Some(format!("{KERNEL}; {}", which_rewrote(event, reasons, &rule)))
        }
        (_, Some(rule)) => Some(which_rewrote(event, reasons, &rule)),
    }
}

/// The rule that rewrote the tunnel packet, and what it has to do with the one that takes the mark
/// off.
fn which_rewrote(event: &Event, reasons: &Reasons, rule: &str) -> String {
    let Some(unmark) = &reasons.unmark_rule else {
        let is_marked = event.mark.value() & MASQUERADE_MARK != 0;
        let nobody = if is_marked { "; no rule clears the mark" } else { "" };
        return format!("{rule} rewrote it{nobody}");
    };
    let unmark = &unmark.chain;
    match (&reasons.inner_rule, reasons.unmark_missed) {
        // One rule takes both, first the inner packet.
        (Some(inner), _) if reasons.rule.as_ref().is_some_and(|it| it.path == inner.path) => {
            format!("{rule} runs before {unmark} clears the mark")
        }
        (Some(inner), _) => format!(
            "{} takes the packet inside before {unmark} clears the mark; {rule} rewrote the tunnel \
             packet",
            inner.describe()
        ),
        (None, Missed::LaterPacket) => format!(
            "{rule} rewrote it; {unmark} clears the mark, but only on the first packet of a \
             connection inside"
        ),
        (None, _) => {
            format!(
                "{rule} rewrote it; the packet inside may not get to {unmark}, which clears the mark"
            )
        }
    }
}

/// Says of causes what has not been said before: each once, and again after a while.
#[derive(Debug, Default)]
pub struct Narrator {
    /// The oldest first.
    said: VecDeque<(SystemTime, String)>,
}

impl Narrator {
    /// Writes an event for people, and its cause on a line below where it is news.
    pub fn write(&mut self, out: &mut impl io::Write, event: &Event) -> io::Result<()> {
        writeln!(out, "{event}")?;
        match &event.cause {
            Some(cause) if self.is_news(event.time, &cause.text) => {
                writeln!(out, "    cause: {}", cause.text)
            }
            _ => Ok(()),
        }
    }

    fn is_news(&mut self, now: SystemTime, text: &str) -> bool {
        const AGAIN: Duration = Duration::from_mins(1);
        const MAX_SAID: usize = 64;
        // Its first part is about this packet only, which the line of the event shows.
        let why = text.split_once("; ").map_or(text, |(_, why)| why);
        let is_over = |time: &SystemTime| now.duration_since(*time).is_ok_and(|age| age > AGAIN);
        while self.said.front().is_some_and(|(time, _)| is_over(time)) || self.said.len() > MAX_SAID
        {
            self.said.pop_front();
        }
        if self.said.iter().any(|(_, said)| said == why) {
            return false;
        }
        self.said.push_back((now, why.to_owned()));
        true
    }
}
