//! Rules as `iptables-save -c` writes them.

use std::net::IpAddr;
use std::str::Chars;
use std::sync::Arc;

use super::{
    Addresses, Backend, Base, Chain, Family, Hook, Nat, Property, Rule, Step, Test, Verdict,
};

/// Reads what `iptables-save -c` or `ip6tables-save -c` has written. Lines that are none of its kind
/// are passed over.
pub(super) fn parse(text: &str, backend: Backend, family: Family) -> Vec<Chain> {
    let mut chains: Vec<Chain> = Vec::new();
    let mut table: Arc<str> = Arc::from("");
    // Chains of the present table.
    let mut first = 0;
    let mut last_used = 0;
    for line in text.lines() {
        let line = line.trim();
        if let Some(name) = line.strip_prefix('*') {
            table = Arc::from(name);
            first = chains.len();
        } else if let Some(declared) = line.strip_prefix(':') {
            let name = declared.split_whitespace().next().unwrap_or_default();
            let base = base(&table, name);
            let (table, name) = (table.clone(), Arc::from(name));
            chains.push(Chain { backend, family, table, name, base, rules: Vec::new() });
        } else if let Some((packets, name, rest)) = rule_line(line) {
            // Rules of a chain follow one another.
            if chains.get(last_used).is_none_or(|chain| last_used < first || *chain.name != *name) {
                let at = chains[first..].iter().position(|chain| *chain.name == *name);
                let Some(at) = at else { continue };
                last_used = first + at;
            }
            chains[last_used].rules.push(parse_rule(rest, packets));
        }
    }
    chains
}

/// Where the kernel calls a built-in chain (enum `nf_ip_hook_priorities`).
fn base(table: &str, chain: &str) -> Option<Base> {
    if chain.bytes().any(|byte| byte.is_ascii_lowercase()) {
        return None;
    }
    let hook = Hook::from_name(chain)?;
    let priority = match (table, hook) {
        ("raw", _) => -300,
        ("mangle", _) => -150,
        ("nat", Hook::Prerouting | Hook::Output) => -100,
        ("nat", _) => 100,
        ("filter", _) => 0,
        ("security", _) => 50,
        _ => return None,
    };
    Some(Base { hook, priority, is_nat: table == "nat" })
}

/// `[12:3456] -A CHAIN …`
fn rule_line(line: &str) -> Option<(Option<u64>, &str, &str)> {
    let (packets, line) = match line.strip_prefix('[').and_then(|rest| rest.split_once("] ")) {
        Some((counters, rest)) => (counters.split_once(':')?.0.parse().ok(), rest),
        None => (None, line),
    };
    let rest = line.strip_prefix("-A ")?;
    let (name, rest) = rest.split_once(' ').unwrap_or((rest, ""));
    Some((packets, name, rest))
}

fn parse_rule(text: &str, packets: Option<u64>) -> Rule {
    let words = words(text);
    let mut parser = Parser { words: &words, at: 0, steps: Vec::new() };
    parser.tests();
    let rest = words.get(parser.at..).unwrap_or_default();
    let action = rest.get(1..).unwrap_or_default().join(" ");
    parser.action();
    parser.steps.shrink_to_fit();
    Rule { steps: parser.steps, packets, text: text.into(), action: action.into() }
}

/// Splits at spaces outside of quotes, as `xtables_save_string` of iptables sets them.
fn words(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut rest = text.chars();
    loop {
        rest = rest.as_str().trim_start().chars();
        if rest.as_str().is_empty() {
            return words;
        }
        words.push(word(&mut rest));
    }
}

fn word(rest: &mut Chars<'_>) -> String {
    let mut word = String::new();
    let mut is_quoted = false;
    while let Some(char) = rest.next() {
        match char {
            '"' => is_quoted = !is_quoted,
            '\\' if is_quoted => word.extend(rest.next()),
            ' ' if !is_quoted => break,
            char => word.push(char),
        }
    }
    word
}

struct Parser<'a> {
    words: &'a [String],
    at: usize,
    steps: Vec<Step>,
}

impl Parser<'_> {
    fn peek(&self) -> Option<&str> {
        self.words.get(self.at).map(String::as_str)
    }

    fn next(&mut self) -> Option<&str> {
        let word = self.words.get(self.at)?;
        self.at += 1;
        Some(word)
    }

    fn test(&mut self, is_negated: bool, of: Property) {
        self.steps.push(Step::Test(Test { is_negated, of }));
    }

    /// Everything up to `-j` or `-g`.
    fn tests(&mut self) {
        let mut module = String::new();
        let mut is_negated = false;
        while let Some(word) = self.peek() {
            if matches!(word, "-j" | "-g") {
                return;
            }
            let word = word.to_owned();
            self.at += 1;
            match word.as_str() {
                "!" => {
                    is_negated = true;
                    continue;
                }
                "-m" => {
                    module = self.next().unwrap_or_default().to_owned();
                    self.module_without_options(&module);
                }
                "-f" => self.test(is_negated, unknown("a later fragment")),
                option => self.option(&module, option, is_negated),
            }
            is_negated = false;
        }
    }

    /// What is not understood as a whole may match.
    fn module_without_options(&mut self, module: &str) {
        if !is_understood(module) {
            self.test(false, unknown(&format!("-m {module}")));
            self.skip_values();
        }
    }

    /// Goes on to the next option.
    fn skip_values(&mut self) {
        while self.peek().is_some_and(|word| !word.starts_with('-') && word != "!") {
            self.at += 1;
        }
    }

    fn option(&mut self, module: &str, option: &str, is_negated: bool) {
        let property = match (module, option) {
            // All of it is one thing that is not understood, and said to be.
            (module, _) if !module.is_empty() && !is_understood(module) => {
                self.skip_values();
                return;
            }
            ("comment", "--comment") => {
                self.at += 1;
                return;
            }
            (_, "-s") => self.value(addresses).map(Property::Source),
            (_, "-d") => self.value(addresses).map(Property::Destination),
            (_, "-o") => self.value(|name| Some(Property::OutInterface(vec![interface(name)]))),
            (_, "-p") => self.value(protocol).map(|number| Property::Protocol(vec![number])),
            ("mark", "--mark") => self.value(mark),
            ("tcp" | "udp", "--sport") | ("multiport", "--sports") => {
                self.value(ports).map(Property::SourcePort)
            }
            ("tcp" | "udp", "--dport") | ("multiport", "--dports") => {
                self.value(ports).map(Property::DestinationPort)
            }
            ("multiport", "--ports") => self.value(ports).map(Property::AnyPort),
            ("conntrack", "--ctstate") | ("state", "--state") => self.value(|states| {
                let is_listed = |state| states.split(',').any(|listed| listed == state);
                // These two are of connections that NAT has changed already.
                let is_plain = !is_listed("SNAT") && !is_listed("DNAT");
                is_plain.then(|| Property::NewConnection(is_listed("NEW")))
            }),
            ("addrtype", "--src-type" | "--dst-type") => {
                return self.address_type(option, is_negated);
            }
            // Belongs to the type before it, where it is looked for.
            ("addrtype", "--limit-iface-out") => return,
            _ => None,
        };
        if let Some(property) = property {
            self.test(is_negated, property);
            return;
        }
        let by = if module.is_empty() { String::new() } else { format!("-m {module} ") };
        self.test(false, unknown(&format!("{by}{option}")));
        self.skip_values();
    }

    /// The value of an option, unless it is not understood: then it is left in place.
    fn value<T>(&mut self, read: impl FnOnce(&str) -> Option<T>) -> Option<T> {
        let value = read(self.peek()?)?;
        self.at += 1;
        Some(value)
    }

    fn address_type(&mut self, option: &str, is_negated: bool) {
        let types = self.next().unwrap_or_default().to_owned();
        // The limit is one of the whole match, which may hold two types.
        let rest = &self.words[self.at..];
        let own = rest.iter().position(|word| matches!(word.as_str(), "-m" | "-j" | "-g"));
        let own = &rest[..own.unwrap_or(rest.len())];
        let on_out_interface = own.iter().any(|word| word == "--limit-iface-out");
        let property = match (types.as_str(), option) {
            ("LOCAL", "--src-type") => Property::SourceIsLocal { on_out_interface },
            ("LOCAL", _) => Property::DestinationIsLocal { on_out_interface },
            _ => unknown(&format!("-m addrtype {option} {types}")),
        };
        self.test(is_negated, property);
    }

    /// `-j TARGET …` or `-g CHAIN`
    fn action(&mut self) {
        let Some(kind) = self.next().map(str::to_owned) else { return };
        let Some(target) = self.next().map(str::to_owned) else { return };
        let options = self.words.get(self.at..).unwrap_or_default();
        let option = |name: &str| {
            let at = options.iter().position(|word| word == name)?;
            Some(options.get(at + 1).map_or("", String::as_str))
        };
        let step = match (kind.as_str(), target.as_str()) {
            ("-g", chain) => Step::Go(Verdict::Goto(chain.into())),
            (_, "ACCEPT") => Step::Go(Verdict::Accept),
            (_, "RETURN") => Step::Go(Verdict::Return),
            (_, "DROP" | "REJECT") => Step::Go(Verdict::Drop),
            (_, "MARK") => set_mark(option),
            (_, "CONNMARK") if option("--restore-mark").is_none() => return,
            (_, "CONNMARK") => Step::UnknownMark,
            (_, "MASQUERADE" | "SNAT" | "NETMAP") => Step::Nat(nat(option)),
            (_, "NOTRACK") => Step::NoTrack,
            (_, "CT") if option("--notrack").is_some() => Step::NoTrack,
            // They look, count, or change what is of no interest here; packets go on.
            (
                _,
                "LOG" | "NFLOG" | "ULOG" | "TRACE" | "AUDIT" | "CT" | "TCPMSS" | "TCPOPTSTRIP"
                | "CHECKSUM" | "CLASSIFY" | "SET" | "DSCP" | "TOS" | "TTL" | "HL" | "ECN" | "TEE"
                | "RATEEST" | "IDLETIMER" | "LED" | "SECMARK" | "CONNSECMARK" | "DNAT" | "REDIRECT"
                | "QUEUE" | "NFQUEUE" | "HMARK" | "TPROXY" | "SYNPROXY",
            ) => Step::Unknown(target.into()),
            (_, chain) => Step::Go(Verdict::Jump(chain.into())),
        };
        self.steps.push(step);
    }
}

/// Modules whose options are read one by one.
fn is_understood(module: &str) -> bool {
    matches!(
        module,
        "comment" | "mark" | "tcp" | "udp" | "multiport" | "conntrack" | "state" | "addrtype"
    )
}

fn unknown(text: &str) -> Property {
    Property::Unknown(text.into())
}

fn addresses(text: &str) -> Option<Vec<Addresses>> {
    text.split(',').map(Addresses::parse).collect()
}

/// Ends in `+` for all that begin so.
fn interface(name: &str) -> Box<str> {
    match name.strip_suffix('+') {
        Some(start) => format!("{start}*").into(),
        None => name.into(),
    }
}

pub(super) fn protocol(name: &str) -> Option<u8> {
    Some(match name {
        "icmp" => 1,
        "tcp" => 6,
        "udp" => 17,
        "ipv6-icmp" | "icmpv6" => 58,
        "sctp" => 132,
        number => number.parse().ok()?,
    })
}

/// `0x4000/0x4000` or `0x4000`
fn mark(text: &str) -> Option<Property> {
    let (value, mask) = value_and_mask(text)?;
    Some(Property::Mark { mask, value })
}

fn value_and_mask(text: &str) -> Option<(u32, u32)> {
    match text.split_once('/') {
        Some((value, mask)) => Some((number(value)?, number(mask)?)),
        None => Some((number(text)?, u32::MAX)),
    }
}

fn number(text: &str) -> Option<u32> {
    match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

/// `8472`, `1:1024`, `53,1000:2000`
fn ports(text: &str) -> Option<Vec<(u16, u16)>> {
    let range = |text: &str| match text.split_once(':') {
        Some((first, last)) => Some((
            if first.is_empty() { 0 } else { first.parse().ok()? },
            if last.is_empty() { u16::MAX } else { last.parse().ok()? },
        )),
        None => text.parse().ok().map(|port| (port, port)),
    };
    text.split(',').map(range).collect()
}

/// Every form that iptables writes or takes (`mark_tg_help` in `libxt_MARK.c`).
fn set_mark<'a>(option: impl Fn(&str) -> Option<&'a str>) -> Step {
    let read = || {
        if let Some(text) = option("--set-xmark") {
            let (xor, clear) = value_and_mask(text)?;
            return Some((clear, xor));
        }
        if let Some(text) = option("--set-mark") {
            let (value, mask) = value_and_mask(text)?;
            return Some((value | mask, value));
        }
        if let Some(text) = option("--xor-mark") {
            return Some((0, number(text)?));
        }
        if let Some(text) = option("--or-mark") {
            let bits = number(text)?;
            return Some((bits, bits));
        }
        Some((!number(option("--and-mark")?)?, 0))
    };
    read().map_or(Step::UnknownMark, |(clear, xor)| Step::SetMark { clear, xor })
}

/// `--to-source 10.0.0.1-10.0.0.9:1024-2048`, `--to-source [fd00::1]:1024`, `--to-ports 1-2`.
fn nat<'a>(option: impl Fn(&str) -> Option<&'a str>) -> Nat {
    if let Some(text) = option("--to-ports") {
        return Nat { addresses: None, ports: port_range(text) };
    }
    if let Some(text) = option("--to") {
        // NETMAP: one address for one.
        let range = Addresses::parse(text);
        return Nat { addresses: range.map(|it| (it.first, it.last)), ports: None };
    }
    let Some(text) = option("--to-source") else { return Nat::default() };
    let (addresses, ports) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((addresses, rest)) => (addresses, rest.strip_prefix(':')),
        // An IPv6 address without a port has no brackets.
        None if text.matches(':').count() > 1 => (text, None),
        None => text.split_once(':').map_or((text, None), |(it, ports)| (it, Some(ports))),
    };
    let (first, last) = addresses.split_once('-').unwrap_or((addresses, addresses));
    let address = |text: &str| text.trim_matches(['[', ']']).parse::<IpAddr>().ok();
    Nat { addresses: address(first).zip(address(last)), ports: ports.and_then(port_range) }
}

fn port_range(text: &str) -> Option<(u16, u16)> {
    // What follows a slash is the base of `--to-source` with an offset.
    let text = text.split('/').next()?;
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    Some((first.parse().ok()?, last.parse().ok()?))
}
