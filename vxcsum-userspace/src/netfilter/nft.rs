//! Rules as `nft -j list` shows them (libnftables-json(5)).
//!
//! What a rule says is taken apart by hand: a schema that has to know every statement would refuse a
//! whole ruleset for one rule that is newer than itself.

use std::collections::HashMap;
use std::fmt::{self, Write as _};
use std::net::IpAddr;
use std::sync::Arc;

use serde::de::{DeserializeSeed, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::save::protocol;
use super::{
    Addresses, Backend, Base, Chain, Family, Hook, Nat, Property, Rule, Step, Test, Verdict,
};

/// Larger sets are not looked into.
const MAX_SET_LEN: usize = 1 << 16;

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum Object {
    Table(RawTable),
    Chain(RawChain),
    Rule(RawRule),
    Set(RawSet),
    Map(RawSet),
    #[serde(untagged)]
    Other(IgnoredAny),
}

/// A table by name.
#[derive(Debug, Deserialize, PartialEq, Eq)]
pub(super) struct RawTable {
    /// `ip`, `ip6`, `inet` or one that sees no tunnel packets.
    pub(super) family: String,
    /// Its name.
    pub(super) name: String,
}

#[derive(Deserialize)]
struct RawChain {
    family: String,
    table: String,
    name: String,
    #[serde(rename = "type")]
    kind: Option<String>,
    hook: Option<String>,
    prio: Option<i32>,
}

#[derive(Deserialize)]
struct RawRule {
    family: String,
    table: String,
    chain: String,
    #[serde(default)]
    expr: Vec<Value>,
}

#[derive(Deserialize)]
struct RawSet {
    family: String,
    table: String,
    name: String,
    #[serde(default)]
    elem: Vec<Value>,
}

/// Reads what `nft -j list tables` has written, without tables of families that see no tunnel
/// packets (bridge, arp, netdev).
pub(super) fn parse_tables(json: &[u8]) -> Result<Vec<RawTable>, serde_json::Error> {
    let mut tables = Vec::new();
    each_object(json, |object| {
        if let Object::Table(table) = object {
            tables.push(table);
        }
    })?;
    tables.retain(|table| family(&table.family).is_some());
    Ok(tables)
}

/// Reads what `nft -j list ruleset` or `nft -j list table` has written.
pub(super) fn parse(json: &[u8]) -> Result<Vec<Chain>, serde_json::Error> {
    let mut chains: Vec<Chain> = Vec::new();
    let mut index: HashMap<(Family, String, String), usize> = HashMap::new();
    let mut sets = Sets::default();
    // Rules come after what they name.
    each_object(json, |object| match object {
        Object::Chain(chain) => {
            if let Some(chain) = chain.read() {
                let key = (chain.family, chain.table.to_string(), chain.name.to_string());
                index.insert(key, chains.len());
                chains.push(chain);
            }
        }
        Object::Rule(rule) => {
            let Some(family) = family(&rule.family) else { return };
            let read = rule.read(&sets);
            if let Some(&at) = index.get(&(family, rule.table, rule.chain)) {
                chains[at].rules.push(read);
            }
        }
        Object::Set(set) | Object::Map(set) => {
            // Without elements it would match nothing, which is more than we know.
            if set.elem.len() <= MAX_SET_LEN {
                sets.0.insert((set.family, set.table, set.name), set.elem);
            }
        }
        Object::Table(_) | Object::Other(_) => {}
    })?;
    for chain in &mut chains {
        chain.backend = backend(chain);
    }
    Ok(chains)
}

/// Takes one object after another. All of them at once would take a hundred times the memory of
/// the rules.
fn each_object(json: &[u8], take: impl FnMut(Object)) -> Result<(), serde_json::Error> {
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    Listing(take).deserialize(&mut deserializer)?;
    deserializer.end()
}

/// `{"nftables": [object, …]}`
struct Listing<Take>(Take);

impl<'de, Take: FnMut(Object)> DeserializeSeed<'de> for Listing<Take> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de, Take: FnMut(Object)> Visitor<'de> for Listing<Take> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("what nft -j lists")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        let mut is_found = false;
        while let Some(key) = map.next_key::<String>()? {
            if key == "nftables" {
                is_found = true;
                map.next_value_seed(Objects(&mut self.0))?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        if is_found { Ok(()) } else { Err(A::Error::missing_field("nftables")) }
    }
}

struct Objects<'a, Take>(&'a mut Take);

impl<'de, Take: FnMut(Object)> DeserializeSeed<'de> for Objects<'_, Take> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de, Take: FnMut(Object)> Visitor<'de> for Objects<'_, Take> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of tables, chains and rules")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while let Some(object) = list.next_element()? {
            (self.0)(object);
        }
        Ok(())
    }
}

/// Whether a table is one of those that iptables makes, by its name.
pub(super) fn may_be_of_iptables(table: &RawTable) -> bool {
    matches!(table.family.as_str(), "ip" | "ip6") && TABLES.contains(&table.name.as_str())
}

const TABLES: [&str; 5] = ["raw", "mangle", "nat", "filter", "security"];

/// Tables that iptables made look like its own: family, names, and chains in capitals.
fn backend(chain: &Chain) -> Backend {
    let is_own = chain.family != Family::Inet
        && TABLES.contains(&&*chain.table)
        && (chain.base.is_none() || chain.name.bytes().all(|byte| byte.is_ascii_uppercase()));
    if is_own { Backend::IptablesNft } else { Backend::Nft }
}

pub(super) fn family(name: &str) -> Option<Family> {
    Some(match name {
        "ip" => Family::Ipv4,
        "ip6" => Family::Ipv6,
        "inet" => Family::Inet,
        _ => return None,
    })
}

impl RawChain {
    fn read(self) -> Option<Chain> {
        let hook = self.hook.as_deref().and_then(Hook::from_name);
        Some(Chain {
            backend: Backend::Nft,
            family: family(&self.family)?,
            table: self.table.into(),
            name: self.name.into(),
            base: hook.map(|hook| Base {
                hook,
                priority: self.prio.unwrap_or(0),
                is_nat: self.kind.as_deref() == Some("nat"),
            }),
            rules: Vec::new(),
        })
    }
}

/// Elements of named sets and maps.
#[derive(Default)]
struct Sets(HashMap<(String, String, String), Vec<Value>>);

impl RawRule {
    fn read(&self, sets: &Sets) -> Rule {
        let mut reader =
            Reader { rule: self, sets, steps: Vec::new(), packets: None, texts: Vec::new() };
        for statement in &self.expr {
            reader.statement(statement);
        }
        let Reader { steps, packets, texts, .. } = reader;
        let action = texts.last().map(String::as_str).unwrap_or_default().into();
        Rule { steps, packets, text: texts.join(" ").into(), action }
    }
}

struct Reader<'a> {
    rule: &'a RawRule,
    sets: &'a Sets,
    steps: Vec<Step>,
    packets: Option<u64>,
    texts: Vec<String>,
}

impl Reader<'_> {
    fn say(&mut self, text: impl Into<String>) {
        self.texts.push(text.into());
    }

    fn do_it(&mut self, step: Step, text: impl Into<String>) {
        self.steps.push(step);
        self.say(text);
    }

    fn statement(&mut self, statement: &Value) {
        let Some((kind, value)) = only_entry(statement) else {
            return self.do_it(Step::Unknown("?".into()), "?");
        };
        if let Some(verdict) = verdict(kind, value) {
            let text = match &verdict {
                Verdict::Jump(to) | Verdict::Goto(to) => format!("{kind} {to}"),
                _ => kind.to_owned(),
            };
            return self.do_it(Step::Go(verdict), text);
        }
        match kind {
            "match" => self.matching(value),
            "counter" => self.packets = value["packets"].as_u64(),
            "mangle" => self.mangle(value),
            "masquerade" | "snat" => {
                let nat = nat(value);
                let text = nat_text(kind, value);
                self.do_it(Step::Nat(nat), text);
            }
            "notrack" => self.do_it(Step::NoTrack, kind),
            "vmap" => self.vmap(value),
            "xt" => self.xt(value),
            // Holds back what comes too fast: who passes is not known.
            "limit" | "quota" | "ct count" => {
                self.test(false, Property::Unknown(kind.into()), kind.to_owned());
            }
            other => self.do_it(Step::Unknown(other.into()), other),
        }
    }

    fn test(&mut self, is_negated: bool, of: Property, text: String) {
        self.steps.push(Step::Test(Test { is_negated, of }));
        self.say(text);
    }

    fn matching(&mut self, value: &Value) {
        let (left, right) = (&value["left"], &value["right"]);
        let operator = value["op"].as_str().unwrap_or("==");
        let of = match operator {
            "==" | "!=" | "in" => self.property(left, right),
            _ => unknown(left),
        };
        let sign =
            if matches!(operator, "==" | "in") { String::new() } else { format!("{operator} ") };
        let text = format!("{} {sign}{}", show(left), show(right));
        self.test(operator == "!=", of, text);
    }

    /// What is looked at, and for what.
    fn property(&self, left: &Value, right: &Value) -> Property {
        let property = match only_entry(left) {
            Some(("meta", meta)) => match meta["key"].as_str() {
                Some("mark") => number(right).map(|value| Property::Mark { mask: u32::MAX, value }),
                Some("l4proto") => self.list(right, protocol_number).map(Property::Protocol),
                Some("oifname" | "oif") => self.list(right, interface).map(Property::OutInterface),
                Some("nfproto") => right.as_str().map(|name| Property::IsIpv6(name == "ipv6")),
                _ => None,
            },
            Some(("&", operands)) if is_mark(&operands[0]) => number(&operands[1])
                .zip(number(right))
                .map(|(mask, value)| Property::Mark { mask, value }),
            Some(("payload", payload)) => {
                match (payload["protocol"].as_str(), payload["field"].as_str()) {
                    (Some("ip" | "ip6"), Some("saddr")) => {
                        self.list(right, addresses).map(Property::Source)
                    }
                    (Some("ip" | "ip6"), Some("daddr")) => {
                        self.list(right, addresses).map(Property::Destination)
                    }
                    (Some("ip"), Some("protocol")) | (Some("ip6"), Some("nexthdr")) => {
                        self.list(right, protocol_number).map(Property::Protocol)
                    }
                    (Some("udp" | "tcp" | "th"), Some("sport")) => {
                        self.list(right, port).map(Property::SourcePort)
                    }
                    (Some("udp" | "tcp" | "th"), Some("dport")) => {
                        self.list(right, port).map(Property::DestinationPort)
                    }
                    _ => None,
                }
            }
            Some(("ct", ct)) if ct["key"] == "state" => self
                .list(right, |state| state.as_str().map(str::to_owned))
                .map(|states| Property::NewConnection(states.iter().any(|state| state == "new"))),
            Some(("fib", fib)) if fib["result"] == "type" && right == "local" => {
                local(&fib["flags"])
            }
            _ => None,
        };
        property.unwrap_or_else(|| unknown(left))
    }

    /// Protocols are implied by the headers that are looked into.
    fn implied_protocol(payload: &Value) -> Option<Test> {
        let of = match payload["payload"]["protocol"].as_str()? {
            "udp" => Property::Protocol(vec![17]),
            "tcp" => Property::Protocol(vec![6]),
            "ip" => Property::IsIpv6(false),
            "ip6" => Property::IsIpv6(true),
            _ => return None,
        };
        Some(Test { is_negated: false, of })
    }

    /// One value or a set of them, if each is understood.
    fn list<T>(&self, value: &Value, read: impl Fn(&Value) -> Option<T>) -> Option<Vec<T>> {
        self.elements(value).iter().map(|element| read(plain(element))).collect()
    }

    fn elements<'a>(&'a self, value: &'a Value) -> &'a [Value] {
        if let Some(elements) = value["set"].as_array() {
            return elements;
        }
        let named = value.as_str().and_then(|name| name.strip_prefix('@'));
        let named = named.and_then(|name| {
            let key = (self.rule.family.clone(), self.rule.table.clone(), name.to_owned());
            self.sets.0.get(&key)
        });
        named.map_or(std::slice::from_ref(value), Vec::as_slice)
    }

    fn mangle(&mut self, value: &Value) {
        let (key, new) = (&value["key"], &value["value"]);
        let step = if is_mark(key) {
            set_mark(new)
        } else if key["payload"]["protocol"] == "udp" && key["payload"]["field"] == "checksum" {
            if let Some(test) = Self::implied_protocol(key) {
                self.steps.push(Step::Test(test));
            }
            Step::SetUdpChecksum
        } else {
            Step::Unknown(show(key).into())
        };
        self.do_it(step, format!("{} set {}", show(key), show(new)));
    }

    fn vmap(&mut self, value: &Value) {
        let (key, data) = (&value["key"], &value["data"]);
        let keys = match key["concat"].as_array() {
            Some(keys) => keys.as_slice(),
            None => std::slice::from_ref(key),
        };
        let branch = |element: &Value| {
            let (from, to) = (plain(&element[0]), &element[1]);
            let (kind, value) = only_entry(to)?;
            let verdict = verdict(kind, value)?;
            let values = match from["concat"].as_array() {
                Some(values) => values.as_slice(),
                None => std::slice::from_ref(from),
            };
            let tests = keys.iter().zip(values).filter(|(_, value)| *value != "*");
            let tests =
                tests.map(|(key, value)| Test { is_negated: false, of: self.property(key, value) });
            Some((tests.collect(), verdict))
        };
        let branches: Option<Vec<_>> = self.elements(data).iter().map(branch).collect();
        let step = branches.map_or_else(|| Step::Unknown("vmap".into()), Step::Map);
        self.do_it(step, format!("{} vmap {}", show(key), show(data)));
    }

    /// An extension of iptables, of which nft shows no more than the name; where `iptables-nft-save`
    /// can be asked, this is not used.
    fn xt(&mut self, value: &Value) {
        let name = value["name"].as_str().unwrap_or("?").to_owned();
        let is_target = value["type"] == "target";
        match (is_target, name.as_str()) {
            (true, "MASQUERADE" | "SNAT" | "NETMAP") => {
                self.do_it(Step::Nat(Nat::default()), format!("-j {name}"));
            }
            (true, "MARK" | "CONNMARK") => self.do_it(Step::UnknownMark, format!("-j {name}")),
            (true, "NOTRACK") => self.do_it(Step::NoTrack, format!("-j {name}")),
            (true, _) => self.do_it(Step::Unknown(name.as_str().into()), format!("-j {name}")),
            (false, "comment") => {}
            (false, _) => {
                let text = format!("-m {name}");
                self.test(false, Property::Unknown(text.as_str().into()), text);
            }
        }
    }
}

fn only_entry(value: &Value) -> Option<(&str, &Value)> {
    let (key, value) = value.as_object()?.iter().next()?;
    Some((key, value))
}

/// Without the timeout, counter or comment that an element may carry.
fn plain(element: &Value) -> &Value {
    match element["elem"].get("val") {
        Some(value) => value,
        None => element,
    }
}

fn verdict(kind: &str, value: &Value) -> Option<Verdict> {
    let target = || value["target"].as_str().map(Arc::from);
    Some(match kind {
        "accept" => Verdict::Accept,
        "drop" | "reject" => Verdict::Drop,
        "return" => Verdict::Return,
        "jump" => Verdict::Jump(target()?),
        "goto" => Verdict::Goto(target()?),
        _ => return None,
    })
}

fn unknown(left: &Value) -> Property {
    Property::Unknown(show(left).into())
}

fn is_mark(value: &Value) -> bool {
    value["meta"]["key"] == "mark"
}

fn number(value: &Value) -> Option<u32> {
    match value {
        Value::Number(number) => number.as_u64()?.try_into().ok(),
        Value::String(text) => match text.strip_prefix("0x") {
            Some(digits) => u32::from_str_radix(digits, 16).ok(),
            None => text.parse().ok(),
        },
        _ => None,
    }
}

fn protocol_number(value: &Value) -> Option<u8> {
    match value {
        Value::String(name) => protocol(name),
        other => number(other)?.try_into().ok(),
    }
}

fn interface(value: &Value) -> Option<Box<str>> {
    Some(value.as_str()?.into())
}

fn addresses(value: &Value) -> Option<Addresses> {
    if let Some(text) = value.as_str() {
        return Addresses::parse(text);
    }
    let address = |value: &Value| value.as_str()?.parse::<IpAddr>().ok();
    match only_entry(value)? {
        ("prefix", prefix) => Addresses::prefix(address(&prefix["addr"])?, number(&prefix["len"])?),
        ("range", range) => Some(Addresses::range(address(&range[0])?, address(&range[1])?)),
        _ => None,
    }
}

fn port(value: &Value) -> Option<(u16, u16)> {
    let one = |value: &Value| u16::try_from(number(value)?).ok();
    match value.get("range") {
        Some(range) => Some((one(&range[0])?, one(&range[1])?)),
        None => one(value).map(|port| (port, port)),
    }
}

/// `fib daddr type local`
fn local(flags: &Value) -> Option<Property> {
    let flags = match flags {
        Value::Array(flags) => flags.iter().filter_map(Value::as_str).collect(),
        Value::String(flag) => vec![flag.as_str()],
        _ => return None,
    };
    let on_out_interface = flags.contains(&"oif");
    if flags.contains(&"saddr") {
        Some(Property::SourceIsLocal { on_out_interface })
    } else if flags.contains(&"daddr") {
        Some(Property::DestinationIsLocal { on_out_interface })
    } else {
        None
    }
}

fn set_mark(new: &Value) -> Step {
    let read = || {
        if let Some(value) = number(new) {
            return Some((u32::MAX, value));
        }
        let (operator, operands) = only_entry(new)?;
        if !is_mark(&operands[0]) {
            return None;
        }
        let bits = number(&operands[1])?;
        match operator {
            "^" => Some((0, bits)),
            "|" => Some((bits, bits)),
            "&" => Some((!bits, 0)),
            _ => None,
        }
    };
    read().map_or(Step::UnknownMark, |(clear, xor)| Step::SetMark { clear, xor })
}

fn nat(value: &Value) -> Nat {
    let address = &value["addr"];
    let addresses = addresses(address).map(|it| (it.first, it.last));
    Nat { addresses, ports: port(&value["port"]) }
}

fn nat_text(kind: &str, value: &Value) -> String {
    let mut text = kind.to_owned();
    if !value["addr"].is_null() || !value["port"].is_null() {
        text += " to ";
        text += &show(&value["addr"]);
        if !value["port"].is_null() {
            let _ = write!(text, ":{}", show(&value["port"]));
        }
    }
    let flags = match &value["flags"] {
        Value::Array(flags) => flags.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(","),
        Value::String(flag) => flag.clone(),
        _ => return text,
    };
    text + " " + &flags
}

/// An expression as nft writes it, as far as that is short.
fn show(value: &Value) -> String {
    const MAX_SHOWN: usize = 4;
    match value {
        Value::Null => return String::new(),
        Value::String(text) => return text.clone(),
        // Marks are the numbers that are larger than ports.
        Value::Number(number) => {
            return match number.as_u64() {
                Some(number) if number >= 0x1_0000 => format!("{number:#x}"),
                _ => number.to_string(),
            };
        }
        _ => {}
    }
    let Some((kind, of)) = only_entry(value) else { return "…".to_owned() };
    let part = |key: &str| of[key].as_str().unwrap_or("?").to_owned();
    match kind {
        "meta" => format!("meta {}", part("key")),
        "ct" => format!("ct {}", part("key")),
        "payload" => format!("{} {}", part("protocol"), part("field")),
        "prefix" => format!("{}/{}", part("addr"), of["len"]),
        "range" => format!("{}-{}", show(&of[0]), show(&of[1])),
        "&" | "|" | "^" => format!("{} {kind} {}", show(&of[0]), hex(&of[1])),
        "set" => {
            let elements = of.as_array().map(Vec::as_slice).unwrap_or_default();
            let shown: Vec<_> = elements.iter().take(MAX_SHOWN).map(show).collect();
            let more = if elements.len() > MAX_SHOWN { ", …" } else { "" };
            format!("{{ {}{more} }}", shown.join(", "))
        }
        "concat" => {
            let parts = of.as_array().map(Vec::as_slice).unwrap_or_default();
            parts.iter().map(show).collect::<Vec<_>>().join(" . ")
        }
        "fib" => format!("fib {}", part("result")),
        other => other.to_owned(),
    }
}

fn hex(value: &Value) -> String {
    number(value).map_or_else(|| show(value), |number| format!("{number:#x}"))
}
