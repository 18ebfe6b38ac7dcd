use std::net::IpAddr;

use super::walk::{Met, Packet, Rewritten, Walked, walk};
use super::*;

/// What kube-proxy writes since 1.16.13, and before it what Calico does for VXLAN.
const CALICO_FIRST: &str = r#"
*mangle
:OUTPUT ACCEPT [10:1000]
:POSTROUTING ACCEPT [10:1000]
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:INPUT ACCEPT [0:0]
:OUTPUT ACCEPT [5:300]
:POSTROUTING ACCEPT [5:300]
:KUBE-MARK-MASQ - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-SERVICES - [0:0]
:cali-POSTROUTING - [0:0]
:cali-fip-snat - [0:0]
:cali-nat-outgoing - [0:0]
[5:300] -A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
[9:540] -A POSTROUTING -m comment --comment "cali:O3lYWMrLQYEMJtB5" -j cali-POSTROUTING
[9:540] -A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
[2:120] -A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
[4:240] -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
[3:180] -A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
[3:180] -A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully
[2:120] -A KUBE-SERVICES ! -s 172.29.0.0/16 -d 10.96.0.10/32 -p udp -m comment --comment "kube-system/kube-dns:dns cluster IP" -m udp --dport 53 -j KUBE-MARK-MASQ
[9:540] -A cali-POSTROUTING -m comment --comment "cali:Z-c7XtVd2Bq7s_hA" -j cali-fip-snat
[9:540] -A cali-POSTROUTING -m comment --comment "cali:nYKhEzDlr11Jccal" -j cali-nat-outgoing
[2:120] -A cali-POSTROUTING -o vxlan.calico -m comment --comment "cali:JHlpT-eSqR1TvyYm" -m addrtype ! --src-type LOCAL --limit-iface-out -m addrtype --src-type LOCAL -j MASQUERADE --random-fully
[0:0] -A cali-nat-outgoing -m comment --comment "cali:flqWnvo8yq4ULQLa" -m set --match-set cali40masq-ipam-pools src -m set ! --match-set cali40all-ipam-pools dst -j MASQUERADE --random-fully
COMMIT
"#;

/// As deep as the kernel lets iptables-legacy nest its chains.
#[test]
fn chains_in_chains_in_chains_do_not_overflow_the_stack() {
    use std::fmt::Write as _;

    const DEPTH: usize = 20_000;
    let mut text = "*nat\n:POSTROUTING ACCEPT [0:0]\n".to_owned();
    for chain in 0..DEPTH {
        writeln!(text, ":c{chain} - [0:0]").unwrap();
    }
    text += "-A POSTROUTING -j c0\n";
    for chain in 1..DEPTH {
        writeln!(text, "-A c{} -j c{chain}", chain - 1).unwrap();
    }
    writeln!(text, "-A c{} -j MASQUERADE\nCOMMIT", DEPTH - 1).unwrap();
    let rules = from_save(&text);
    assert_eq!(rules.chains.len(), DEPTH + 1);
    assert_eq!(rules.source_nat_rules(false), []);
    assert_eq!(walk(&rules, &tunnel_packet(0), Rewritten::default(), false).nat, []);
}

fn from_save(text: &str) -> Ruleset {
    let chains = save::parse(text, Backend::IptablesNft, Family::Ipv4);
    let local = |name: &str, address: &str| (name.to_owned(), address.parse().unwrap());
    let addresses = vec![local("eth0", "10.0.0.11"), local("vxlan.calico", "172.29.0.0")];
    Ruleset::new(chains, addresses, Vec::new())
}

fn from_nft(json: &str) -> Ruleset {
    Ruleset::new(nft::parse(json.as_bytes()).unwrap(), Vec::new(), Vec::new())
}

fn address(text: &str) -> Option<IpAddr> {
    text.parse().ok()
}

fn tunnel_packet(mark: u32) -> Packet {
    Packet {
        is_ipv6: false,
        is_local: true,
        src: address("10.0.0.11"),
        dst: address("10.0.0.13"),
        protocol: Some(17),
        sport: Some(42276),
        dport: Some(4789),
        out_interface: Some("eth0".to_owned()),
        mark,
        masquerade_bit: 0x4000,
    }
}

/// From a process of the node to a service, which is in a pod elsewhere.
fn inner_packet() -> Packet {
    Packet {
        src: address("10.0.0.11"),
        dst: address("172.29.2.3"),
        protocol: Some(6),
        sport: None,
        dport: Some(9153),
        out_interface: Some("vxlan.calico".to_owned()),
        ..tunnel_packet(0x4000)
    }
}

fn follow(rules: &Ruleset, packet: &Packet) -> Walked {
    walk(rules, packet, Rewritten::default(), true)
}

/// `CHAIN:number` from the base chain to the rule.
fn path(rules: &Ruleset, met: &Met) -> Vec<String> {
    let show = |place: &Place| format!("{}:{}", rules.chains[place.chain].name, place.rule + 1);
    met.path.iter().map(show).collect()
}

#[test]
fn the_marked_tunnel_packet_is_masqueraded_by_kube_proxy() {
    let rules = from_save(CALICO_FIRST);
    let walked = follow(&rules, &tunnel_packet(0x4000));
    let nat = walked.likely_nat().unwrap();
    assert_eq!(path(&rules, nat), ["POSTROUTING:2", "KUBE-POSTROUTING:3"]);
    assert!(nat.is_certain, "the rule with sets has never matched");
    assert_eq!(&*rules.rule(nat.place()).1.action, "MASQUERADE --random-fully");
    assert_eq!(walked.nat.len(), 1);

    let in_doubt = walk(&rules, &tunnel_packet(0x4000), Rewritten::default(), false);
    assert_eq!(in_doubt.nat.len(), 2, "sets are not looked into");
    let nat = in_doubt.likely_nat().unwrap();
    assert_eq!(path(&rules, nat), ["POSTROUTING:2", "KUBE-POSTROUTING:3"]);
    assert!(!nat.is_certain && nat.is_match);
}

#[test]
fn an_unmarked_tunnel_packet_is_left_alone() {
    let rules = from_save(CALICO_FIRST);
    assert_eq!(follow(&rules, &tunnel_packet(0)).nat, []);
}

#[test]
fn the_inner_packet_misses_the_unmark() {
    let rules = from_save(CALICO_FIRST);
    let walked = follow(&rules, &inner_packet());
    let nat = walked.likely_nat().unwrap();
    assert_eq!(path(&rules, nat), ["POSTROUTING:1", "cali-POSTROUTING:3"]);
    assert!(nat.is_certain);
    assert_eq!(walked.unmarked, []);
    let missed = &walked.unmarked_too_late[0];
    assert_eq!(path(&rules, missed), ["POSTROUTING:2", "KUBE-POSTROUTING:2"]);
}

#[test]
fn kube_proxy_first_unmarks_the_inner_packet() {
    let text = CALICO_FIRST.replace("[9:540] -A POSTROUTING -m comment --comment \"cali:O3lYWMrLQYEMJtB5\" -j cali-POSTROUTING\n", "");
    let rules = from_save(&text.replace(
        "[2:120] -A KUBE-MARK-MASQ",
        "[9:540] -A POSTROUTING -j cali-POSTROUTING\n[2:120] -A KUBE-MARK-MASQ",
    ));
    let walked = follow(&rules, &inner_packet());
    let nat = walked.likely_nat().unwrap();
    assert_eq!(path(&rules, nat), ["POSTROUTING:1", "KUBE-POSTROUTING:3"]);
    assert!(walked.unmarked[0].is_certain);
}

#[test]
fn a_pod_is_not_local() {
    let rules = from_save(CALICO_FIRST);
    let pod = Packet { src: address("172.29.0.2"), is_local: false, ..inner_packet() };
    let walked = follow(&rules, &pod);
    assert_eq!(path(&rules, walked.likely_nat().unwrap()), ["POSTROUTING:2", "KUBE-POSTROUTING:3"]);
    let unknown = Packet { src: None, ..inner_packet() };
    let walked = follow(&rules, &unknown);
    assert_eq!(walked.nat.len(), 2);
    assert!(walked.nat.iter().all(|met| !met.is_certain));
}

#[test]
fn rules_for_the_tunnel_keep_it_from_nat() {
    for (table, rule, is_spared) in [
        ("*nat", "-A POSTROUTING -p udp -m udp --dport 4789 -j RETURN", true),
        ("*nat", "-A POSTROUTING -p udp -m multiport --dports 4000:4788,8472,4789 -j ACCEPT", true),
        ("*mangle", "-A OUTPUT -p udp -m udp --dport 4789 -j MARK --set-xmark 0x0/0x4000", true),
        ("*mangle", "-A OUTPUT -p udp -m udp --dport 4789 -j MARK --and-mark 0xffffbfff", true),
        (
            "*raw\n:OUTPUT ACCEPT [0:0]",
            "-A OUTPUT -p udp -m udp --dport 4789 -j CT --notrack",
            true,
        ),
        ("*nat", "-A POSTROUTING -p udp -m udp --dport 8472 -j RETURN", false),
        ("*nat", "-A POSTROUTING -p tcp -m tcp --dport 4789 -j RETURN", false),
        ("*nat", "-A POSTROUTING ! -o eth0 -p udp -m udp --dport 4789 -j RETURN", false),
        ("*nat", "-A POSTROUTING -o eth+ -p udp -m udp --dport 4789 -j RETURN", true),
    ] {
        // In front of all other rules of its table.
        let text = if table.starts_with("*raw") {
            format!("{table}\n{rule}\nCOMMIT\n{CALICO_FIRST}")
        } else {
            let declared = CALICO_FIRST.find(table).unwrap();
            let at =
                CALICO_FIRST[declared..].find("\n[").or(CALICO_FIRST[declared..].find("\nCOMMIT"));
            let commit = CALICO_FIRST[declared..].find("\nCOMMIT").unwrap();
            let at = declared + at.unwrap().min(commit);
            format!("{}\n{rule}{}", &CALICO_FIRST[..at], &CALICO_FIRST[at..])
        };
        let rules = from_save(&text);
        let walked = follow(&rules, &tunnel_packet(0x4000));
        assert_eq!(walked.nat.is_empty(), is_spared, "{rule}: {walked:?}");
        assert_eq!(walked.spared.iter().any(|met| met.is_certain), is_spared, "{rule}: {walked:?}");
    }
}

#[test]
fn flannel_masquerades_by_address() {
    let rules = from_save(
        "*nat\n:POSTROUTING ACCEPT [0:0]\n:FLANNEL-POSTRTG - [0:0]\n\
         [1:1] -A POSTROUTING -m comment --comment \"flanneld masq\" -j FLANNEL-POSTRTG\n\
         [1:1] -A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment \"flanneld masq\" -j RETURN\n\
         [1:1] -A FLANNEL-POSTRTG -s 172.29.0.0/24 -d 172.29.0.0/16 -m comment --comment \"flanneld masq\" -j RETURN\n\
         [1:1] -A FLANNEL-POSTRTG -s 172.29.0.0/16 ! -d 224.0.0.0/4 -m comment --comment \"flanneld masq\" -j MASQUERADE --random-fully\n\
         [1:1] -A FLANNEL-POSTRTG ! -s 172.29.0.0/16 -d 172.29.0.0/16 -m comment --comment \"flanneld masq\" -j MASQUERADE --random-fully\nCOMMIT\n",
    );
    let unmarked = Packet { mark: 0, ..inner_packet() };
    let walked = follow(&rules, &unmarked);
    assert_eq!(path(&rules, walked.likely_nat().unwrap()), ["POSTROUTING:1", "FLANNEL-POSTRTG:4"]);
    assert_eq!(follow(&rules, &inner_packet()).nat, []);
    assert_eq!(follow(&rules, &tunnel_packet(0)).nat, []);
}

#[test]
fn what_nat_did_tells_rules_apart() {
    let rules = from_save(
        "*nat\n:POSTROUTING ACCEPT [0:0]\n\
         [1:1] -A POSTROUTING -p udp -j SNAT --to-source 10.0.0.20-10.0.0.29\n\
         [1:1] -A POSTROUTING -p udp -j MASQUERADE --to-ports 1024-2048\n\
         [1:1] -A POSTROUTING -p udp -j SNAT --to-source 10.0.0.12:2000-3000 --random\nCOMMIT\n",
    );
    let find = |src: &str, sport| {
        let rewritten = Rewritten { src: address(src), sport: Some(sport) };
        let walked = walk(&rules, &tunnel_packet(0), rewritten, true);
        walked.likely_nat().map(|met| met.place().rule + 1)
    };
    assert_eq!(find("10.0.0.21", 50000), Some(1));
    assert_eq!(find("10.0.0.11", 1500), Some(2));
    assert_eq!(find("10.0.0.12", 2500), Some(3));
    assert_eq!(find("10.0.0.12", 50000), None);
}

/// As `nft -j list ruleset` shows kube-proxy's nftables mode and rules of an administrator.
const NFT: &str = r#"{"nftables": [
{"metainfo": {"version": "1.0.6", "release_name": "Lester Gooch #5", "json_schema_version": 1}},
{"table": {"family": "ip", "name": "kube-proxy", "handle": 1}},
{"chain": {"family": "ip", "table": "kube-proxy", "name": "nat-postrouting", "handle": 1, "type": "nat", "hook": "postrouting", "prio": 100, "policy": "accept"}},
{"chain": {"family": "ip", "table": "kube-proxy", "name": "nat-output", "handle": 2, "type": "nat", "hook": "output", "prio": -100, "policy": "accept"}},
{"chain": {"family": "ip", "table": "kube-proxy", "name": "masquerading", "handle": 3}},
{"chain": {"family": "ip", "table": "kube-proxy", "name": "mark-for-masquerade", "handle": 4}},
{"map": {"family": "ip", "name": "service-ips", "table": "kube-proxy", "type": ["ipv4_addr", "inet_proto", "inet_service"], "handle": 6, "map": "verdict", "elem": [[{"concat": ["10.96.0.10", "udp", 53]}, {"goto": {"target": "mark-for-masquerade"}}]]}},
{"set": {"family": "ip", "name": "nodes", "table": "kube-proxy", "type": "ipv4_addr", "handle": 7, "flags": ["interval"], "elem": [{"prefix": {"addr": "10.1.0.0", "len": 16}}, {"range": ["10.0.0.20", "10.0.0.29"]}]}},
{"rule": {"family": "ip", "table": "kube-proxy", "chain": "nat-postrouting", "handle": 9, "expr": [{"jump": {"target": "masquerading"}}]}},
{"rule": {"family": "ip", "table": "kube-proxy", "chain": "nat-output", "handle": 10, "expr": [{"vmap": {"key": {"concat": [{"payload": {"protocol": "ip", "field": "daddr"}}, {"meta": {"key": "l4proto"}}, {"payload": {"protocol": "th", "field": "dport"}}]}, "data": "@service-ips"}}]}},
{"rule": {"family": "ip", "table": "kube-proxy", "chain": "masquerading", "handle": 11, "expr": [{"match": {"op": "==", "left": {"&": [{"meta": {"key": "mark"}}, 16384]}, "right": 0}}, {"return": null}]}},
{"rule": {"family": "ip", "table": "kube-proxy", "chain": "masquerading", "handle": 12, "expr": [{"mangle": {"key": {"meta": {"key": "mark"}}, "value": {"^": [{"meta": {"key": "mark"}}, 16384]}}}]}},
{"rule": {"family": "ip", "table": "kube-proxy", "chain": "masquerading", "handle": 13, "expr": [{"masquerade": {"flags": "fully-random"}}]}},
{"rule": {"family": "ip", "table": "kube-proxy", "chain": "mark-for-masquerade", "handle": 14, "expr": [{"mangle": {"key": {"meta": {"key": "mark"}}, "value": {"|": [{"meta": {"key": "mark"}}, 16384]}}}]}},
{"table": {"family": "inet", "name": "site", "handle": 2}},
{"chain": {"family": "inet", "table": "site", "name": "post", "handle": 1, "type": "nat", "hook": "postrouting", "prio": 90, "policy": "accept"}},
{"rule": {"family": "inet", "table": "site", "chain": "post", "handle": 2, "expr": [{"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "daddr"}}, "right": "@nodes"}}, {"match": {"op": "==", "left": {"payload": {"protocol": "udp", "field": "dport"}}, "right": {"set": [8472, {"range": [4000, 5000]}]}}}, {"counter": {"packets": 7, "bytes": 700}}, {"snat": {"family": "ip", "addr": "10.0.0.12", "flags": ["random", "persistent"]}}]}},
{"rule": {"family": "inet", "table": "site", "chain": "post", "handle": 3, "expr": [{"something new": {"a": 1}}, {"match": {"op": "==", "left": {"meta": {"key": "oifname"}}, "right": {"set": ["ppp*", "eth1"]}}}, {"masquerade": null}]}}
]}"#;

#[test]
fn kube_proxy_in_nftables_mode() {
    let rules = from_nft(NFT);
    let walked = follow(&rules, &tunnel_packet(0x4000));
    let nat = walked.likely_nat().unwrap();
    assert_eq!(path(&rules, nat), ["nat-postrouting:1", "masquerading:3"]);
    assert_eq!(rules.rule(nat.place()).0.backend, Backend::Nft);
    assert_eq!(&*rules.rule(nat.place()).1.text, "masquerade fully-random");
    // Sets of another table are not looked into; this one might match.
    assert!(nat.is_match && !nat.is_certain, "{walked:?}");
    assert!(walked.unmarked[0].is_match);
    let dns = Packet { dst: address("10.96.0.10"), dport: Some(53), ..tunnel_packet(0) };
    let marked = follow(&rules, &dns);
    assert_eq!(marked.likely_nat().unwrap().place(), nat.place(), "marked in output, by a map");
}

#[test]
fn nftables_sets_and_priorities() {
    let rules = from_nft(
        &NFT.replace(
            "\"table\": \"kube-proxy\", \"type\": \"ipv4_addr\"",
            "\"table\": \"site\", \"type\": \"ipv4_addr\"",
        )
        .replace(
            "\"family\": \"ip\", \"name\": \"nodes\"",
            "\"family\": \"inet\", \"name\": \"nodes\"",
        ),
    );
    let to = |dst| Packet { dst: address(dst), ..tunnel_packet(0x4000) };
    let first = |dst| {
        let walked = follow(&rules, &to(dst));
        let nat = walked.likely_nat().unwrap();
        assert!(nat.is_certain, "{walked:?}");
        rules.rule(nat.place())
    };
    let (chain, rule) = first("10.1.2.3");
    assert_eq!((&*chain.name, rule.packets), ("post", Some(7)));
    assert_eq!(
        &*rule.text,
        "ip daddr @nodes udp dport { 8472, 4000-5000 } snat to 10.0.0.12 random,persistent"
    );
    assert_eq!(&*first("10.0.0.25").0.name, "post");
    assert_eq!(&*first("10.0.0.13").0.name, "masquerading");
}

#[test]
fn what_nft_cannot_name_stays_unknown() {
    let xt = r#"{"nftables": [{"chain": {"family": "ip", "table": "nat", "name": "POSTROUTING", "handle": 1, "type": "nat", "hook": "postrouting", "prio": 100, "policy": "accept"}},
      {"rule": {"family": "ip", "table": "nat", "chain": "POSTROUTING", "handle": 2, "expr": [{"xt": {"type": "match", "name": "comment"}}, {"xt": {"type": "match", "name": "multiport"}}, {"counter": {"packets": 1, "bytes": 0}}, {"xt": {"type": "target", "name": "MASQUERADE"}}]}},
      {"rule": {"family": "ip", "table": "nat", "chain": "POSTROUTING", "handle": 3, "expr": [{"xt": null}, {"counter": {"packets": 1, "bytes": 0}}]}}]}"#;
    let rules = from_nft(xt);
    let walked = follow(&rules, &tunnel_packet(0));
    assert_eq!(rules.chains[0].backend, Backend::IptablesNft);
    assert!(!walked.likely_nat().unwrap().is_match, "{walked:?}");
}

#[test]
fn nonsense_is_survived() {
    for text in [
        "",
        "*",
        ":",
        "[",
        "[:] -A",
        "*nat\n[1:1] -A X -j",
        "*nat\n:A -\n-A A -m",
        "*nat\n:POSTROUTING ACCEPT [0:0]\n-A POSTROUTING ! -j \"",
        "*nat\n:POSTROUTING A\n-A POSTROUTING -s x -d 1.2.3.4/99 -p nope -m mark --mark 0xzz -m multiport --dports 1:2:3 -j MARK --set-xmark",
    ] {
        let rules = from_save(text);
        let _ = follow(&rules, &tunnel_packet(0));
    }
    for json in ["", "{}", "[]", "{\"nftables\": 1}"] {
        assert!(nft::parse(json.as_bytes()).is_err(), "{json}");
    }
    for expr in [
        "null",
        "1",
        "[]",
        "{}",
        "{\"match\": null}",
        "{\"vmap\": {\"key\": 1, \"data\": {\"set\": [1, [], [1]]}}}",
        "{\"mangle\": 7}",
        "{\"jump\": {}}",
        "{\"xt\": null}",
        "{\"snat\": {\"addr\": [], \"port\": {}}}",
    ] {
        let json = format!(
            "{{\"nftables\": [{{\"chain\": {{\"family\": \"ip\", \"table\": \"t\", \"name\": \"c\", \"type\": \"nat\", \"hook\": \"postrouting\", \"prio\": 1}}}}, {{\"rule\": {{\"family\": \"ip\", \"table\": \"t\", \"chain\": \"c\", \"expr\": [{expr}]}}}}]}}"
        );
        let _ = follow(&from_nft(&json), &tunnel_packet(0));
    }
}

#[test]
fn chains_that_call_each_other_end() {
    let rules = from_save(
        "*nat\n:POSTROUTING ACCEPT [0:0]\n:A - [0:0]\n:B - [0:0]\n-A POSTROUTING -j A\n-A A -m x -j B\n\
         -A A -m x -j B\n-A B -m x -j A\n-A B -m x -j A\nCOMMIT\n",
    );
    assert!(follow(&rules, &tunnel_packet(0)).is_cut);
}

/// Found by fuzzing: each way to a rule was remembered, hundreds of megabytes of them.
#[test]
fn not_every_way_through_a_maze_is_remembered() {
    let rules = from_save(
        "*nat\n:POSTROUTING ACCEPT [0:0]\n:A - [0:0]\n-A POSTROUTING -j A\n-A A -m x -j A\n\
         -A A -m x -j MASQUERADE\n-A A -m x -j A\nCOMMIT\n",
    );
    let walked = follow(&rules, &tunnel_packet(0));
    let places: usize = walked.nat.iter().map(|met| met.path.len()).sum();
    assert!(walked.is_cut && (1 << 17..1 << 19).contains(&places), "{places} places");
}

#[test]
fn options_of_iptables() {
    let rules = from_save(
        "*nat\n:POSTROUTING ACCEPT [0:0]\n\
         -A POSTROUTING -m comment --comment \"a \\\"b\\\" -j DROP\" -m conntrack --ctstate ESTABLISHED -j SNAT --to-source 1.1.1.1\n\
         -A POSTROUTING -m conntrack --ctstate RELATED,NEW -m mark ! --mark 0x1 -j SNAT --to-source 1.1.1.1\n\
         -A POSTROUTING -p udp -m udp --sport 42276 --dport :4788 -j SNAT --to-source 1.1.1.1\n\
         -A POSTROUTING -m addrtype --dst-type LOCAL -j SNAT --to-source 1.1.1.1\n\
         -A POSTROUTING -d 10.0.0.0/255.255.255.0 -g X\n:X - [0:0]\n-A X -j SNAT --to-source 1.1.1.1\nCOMMIT\n",
    );
    let find = |packet: &Packet| {
        let walked = follow(&rules, packet);
        walked.likely_nat().map(|met| (path(&rules, met), met.is_certain))
    };
    let at = |path: &[&str]| Some((path.iter().map(|it| (*it).to_owned()).collect(), true));
    assert_eq!(find(&tunnel_packet(0)), at(&["POSTROUTING:2"]));
    assert_eq!(find(&tunnel_packet(1)), at(&["POSTROUTING:5", "X:1"]));
    let low = Packet { dport: Some(4788), ..tunnel_packet(1) };
    assert_eq!(find(&low), at(&["POSTROUTING:3"]));
    let own = Packet { dst: address("10.0.0.11"), ..tunnel_packet(1) };
    assert_eq!(find(&own), at(&["POSTROUTING:4"]));
}

#[test]
fn prefixes() {
    let contains =
        |range: &str, it: &str| Addresses::parse(range).unwrap().contains(it.parse().unwrap());
    assert!(contains("10.0.0.0/8", "10.255.255.255") && !contains("10.0.0.0/8", "11.0.0.0"));
    assert!(contains("0.0.0.0/0", "1.2.3.4") && !contains("0.0.0.0/0", "::1"));
    assert!(contains("fd00::/8", "fdff::1") && !contains("fd00::/8", "fe00::"));
    assert!(contains("10.0.0.1/32", "10.0.0.1") && contains("10.0.0.0/255.0.0.0", "10.9.9.9"));
    for wrong in ["", "10.0.0.0/33", "::/129", "10.0.0.0/0.255.0.0", "x/8"] {
        assert_eq!(Addresses::parse(wrong), None, "{wrong}");
    }
}

#[test]
fn of_two_chains_with_one_priority_either_may_be_first() {
    let nft = NFT.replace("\"prio\": 90", "\"prio\": 100").replace(
        "{\"match\": {\"op\": \"==\", \"left\": {\"payload\": {\"protocol\": \"ip\", \"field\": \"daddr\"}}, \"right\": \"@nodes\"}}, ",
        "",
    );
    let rules = from_nft(&nft);
    let marked = follow(&rules, &tunnel_packet(0x4000));
    assert!(!marked.likely_nat().unwrap().is_certain, "{marked:?}");
    // Only one of them would rewrite these.
    assert!(follow(&rules, &tunnel_packet(0)).likely_nat().unwrap().is_certain);
    let elsewhere = Packet { dport: Some(53), ..tunnel_packet(0x4000) };
    assert!(follow(&rules, &elsewhere).likely_nat().unwrap().is_certain);
}
