//! What nft, iptables-save and the kernel say of rules, and the way of packets through them.

use std::net::IpAddr;

use vxcsum::netfilter::fuzzing::{from_nft, from_save, legacy_to_save, tables};
use vxcsum::netfilter::walk::{Met, Packet, Rewritten, walk};
use vxcsum::netfilter::{Hook, Rule, Ruleset, Step, Verdict};

/// `struct ipt_getinfo`
const INFO_LEN: usize = 84;

/// Checks rules, after a byte that says who speaks of them.
pub fn check(data: &[u8]) {
    let Some((&who, rest)) = data.split_first() else { return };
    let is_ipv6 = who & 4 != 0;
    let rules = match who % 4 {
        0 => from_nft(rest),
        1 => std::str::from_utf8(rest).ok().map(|text| from_save(text, is_ipv6)),
        2 => rest.split_at_checked(INFO_LEN).and_then(|(info, entries)| {
            let text = legacy_to_save(info, entries, is_ipv6)?;
            assert!(text.lines().all(is_save_line), "{text}");
            Some(from_save(&text, is_ipv6))
        }),
        _ => {
            tables(rest);
            None
        }
    };
    let Some(rules) = rules else { return };
    rules.looks_at_source_ports();
    for is_ipv6 in [false, true] {
        let listed = rules.source_nat_rules(is_ipv6);
        for (packet, rewritten) in packets(is_ipv6) {
            for believe_counters in [false, true] {
                let walked = walk(&rules, &packet, rewritten, believe_counters);
                let all = [&walked.nat, &walked.unmarked, &walked.unmarked_too_late];
                let all = all.into_iter().chain([&walked.spared, &walked.set_checksum]);
                all.flatten().for_each(|met| met_holds(&rules, met));
                assert!(walked.nat.is_sorted_by_key(|met| met.order));
                for met in &walked.nat {
                    let steps = &rules.rule(met.place()).1.steps;
                    assert!(steps.iter().any(|step| matches!(step, Step::Nat(_))));
                    let base = rules.chains[met.path[0].chain].base.expect("a way in");
                    assert!(base.hook != Hook::Postrouting || listed.contains(&met.place()));
                }
                if let Some(likely) = walked.likely_nat() {
                    assert!(walked.nat.contains(likely));
                }
            }
        }
    }
}

fn is_save_line(line: &str) -> bool {
    line == "COMMIT"
        || line.starts_with(['*', ':'])
        || line.starts_with('[') && line.contains("] -A ")
}

/// Every rule of the path leads to the chain of the next one.
fn met_holds(rules: &Ruleset, met: &Met) {
    assert!(met.is_match || !met.is_certain);
    assert!(rules.chains[met.path[0].chain].base.is_some());
    for step in met.path.windows(2) {
        let next = &rules.chains[step[1].chain];
        let (_, rule) = rules.rule(step[0]);
        assert!(targets(rule).any(|name| *name == *next.name), "{met:?}");
    }
    assert!(!rules.rule(met.place()).1.text.contains('\n') || met.path.is_empty());
}

fn targets(rule: &Rule) -> impl Iterator<Item = &str> {
    let verdicts = rule.steps.iter().flat_map(|step| match step {
        Step::Go(verdict) => vec![verdict],
        Step::Map(map) => map.iter().map(|(_, verdict)| verdict).collect(),
        _ => Vec::new(),
    });
    verdicts.filter_map(|verdict| match verdict {
        Verdict::Jump(to) | Verdict::Goto(to) => Some(&**to),
        _ => None,
    })
}

/// A tunnel packet of this node that NAT is known to have rewritten, and one of which next to nothing
/// is known.
fn packets(is_ipv6: bool) -> [(Packet, Rewritten); 2] {
    let address = |ipv4: &str, ipv6: &str| -> Option<IpAddr> {
        if is_ipv6 { ipv6.parse().ok() } else { ipv4.parse().ok() }
    };
    let tunnel = Packet {
        is_ipv6,
        is_local: true,
        src: address("10.0.0.11", "fd00:10::11"),
        dst: address("10.0.0.13", "fd00:10::13"),
        protocol: Some(17),
        sport: Some(42276),
        dport: Some(8472),
        out_interface: Some("eth0".to_owned()),
        mark: 0x4000,
        masquerade_bit: 0x4000,
    };
    let unknown = Packet {
        is_local: false,
        src: None,
        dst: None,
        protocol: None,
        sport: None,
        dport: None,
        out_interface: None,
        ..tunnel.clone()
    };
    let rewritten = Rewritten { src: tunnel.src, sport: Some(1024) };
    [(tunnel, rewritten), (unknown, Rewritten::default())]
}
