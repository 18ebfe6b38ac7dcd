//! What led to broken packets: the rule, in all that rules can be made with.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use vxcsum::netfilter::{self, Backend, Family as Packets, Property, Step, Test};
use vxcsum_tests::client::Socket;
use vxcsum_tests::conntrack;
use vxcsum_tests::daemon::{Cause, Daemon, Event, binary, run_to_end};
use vxcsum_tests::lab::{Cluster, Cni, Family, Lab, LabConfig, NIC, Nat, OuterSum, PodSums, Tool};
use vxcsum_tests::netns::NetNs;
use vxcsum_tests::packets::Check;
use vxcsum_tests::storm::{Packet, SOURCE_PORTS};
use vxcsum_tests::traffic::{self, UdpServer, send_frames};
use vxcsum_tests::wait::{wait_for, wait_until};

const PLENTY: Duration = Duration::from_secs(30);
/// Long enough for an answer, if there were one.
const LOST: Duration = Duration::from_millis(50);

fn lab(nat: Nat) -> Result<Lab> {
    LabConfig { nat, pod: Some(PodSums::Open), ..LabConfig::default() }.start()
}

fn cluster(tool: Tool, cni: Cni) -> Nat {
    Nat::Cluster(Cluster { tool, cni })
}

/// The event of a lost packet. The first one may have to go on without rules, where reading them
/// takes long: then of another one.
fn lose_one(lab: &Lab, from: &NetNs, vxcsum: &Daemon) -> Result<(Event, Cause)> {
    wait_for("rules", PLENTY, || {
        let (event, cause) = lose_one_now(lab, from, vxcsum)?;
        let is_late = cause.rules_unread.as_ref().is_some_and(|why| why.contains("takes long"));
        Ok((!is_late).then_some((event, cause)))
    })
}

/// The same, whatever is known of rules.
fn lose_one_now(lab: &Lab, from: &NetNs, vxcsum: &Daemon) -> Result<(Event, Cause)> {
    let before = vxcsum.events()?.len();
    let server = UdpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
    let answer = traffic::udp_request(from, server.address(), &traffic::dns_query(), LOST);
    ensure!(answer.is_err(), "nothing was lost");
    let events = vxcsum.wait_events(before + 1, PLENTY)?;
    let event = events[before].clone();
    let cause = event.cause.clone().with_context(|| format!("no cause: {event:#?}"))?;
    Ok((event, cause))
}

#[track_caller]
fn assert_has(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
}

#[test]
fn one_rule_of_the_cni_takes_both_packets() -> Result<()> {
    for tool in Tool::ALL {
        let lab = lab(cluster(tool, Cni::MarkedFirst))?;
        let vxcsum = Daemon::start(&lab.a, NIC, [""; 0])?;
        for from in [Some(&lab.a), lab.pod()].into_iter().flatten() {
            let (event, cause) = lose_one(&lab, from, &vxcsum)?;
            let rule = cause.rule.as_ref().with_context(|| format!("{cause:#?}"))?;
            assert_eq!((rule.backend.as_str(), rule.family.as_str()), (tool.backend(), "ip"));
            let (path, unmark): (&[_], _) = match tool {
                Tool::Nft => (&["post 1"], "masquerading"),
                _ => (&["POSTROUTING 1", "cali-POSTROUTING 1"], "KUBE-POSTROUTING"),
            };
            assert_eq!(rule.path, path, "{rule:#?}");
            assert_eq!(rule.position, 1);
            assert!(rule.packets.is_some_and(|packets| packets > 0), "{rule:#?}");
            assert!(cause.rule_certain && !cause.mark_assumed && cause.masquerade_mark);
            let unmark_rule = cause.unmark_rule.as_ref().context("no rule clears the mark")?;
            assert_eq!((unmark_rule.chain.as_str(), unmark_rule.position), (unmark, 2));
            assert_eq!(cause.rules_unread, None);
            let port = event.outer.sport_before_nat.context("no port before NAT")?;
            let says = match tool {
                Tool::Nft => "rule 1 of post (masquerade fully-random)",
                _ => "rule 1 of POSTROUTING (cali-POSTROUTING -> MASQUERADE --random-fully)",
            };
            assert_eq!(
                cause.text,
                format!(
                    "source port {port} -> {} by NAT; mark 0x4000 left on the tunnel packet; \
                     {says} runs before {unmark} clears the mark",
                    event.outer.sport
                )
            );
        }
    }
    Ok(())
}

/// The usual way (kubernetes#122835): the CNI takes the packet inside, so that kube-proxy takes the
/// tunnel packet, and with it the mark that would tell.
#[test]
fn the_cni_takes_the_packet_inside_and_kube_proxy_the_tunnel_packet() -> Result<()> {
    for tool in Tool::ALL {
        let lab = lab(cluster(tool, Cni::TunnelledFirst))?;
        let vxcsum = Daemon::start(&lab.a, NIC, [""; 0])?;
        for from in [Some(&lab.a), lab.pod()].into_iter().flatten() {
            let (event, cause) = lose_one(&lab, from, &vxcsum)?;
            assert_eq!(event.mark, 0);
            let (rule, inner, unmark) = (cause.rule, cause.inner_rule, cause.unmark_rule);
            let paths = [rule, inner, unmark].map(|rule| rule.map(|rule| rule.path.join(", ")));
            let expected = match tool {
                Tool::Nft => [
                    "nat-postrouting 1, masquerading 3",
                    "post 1",
                    "nat-postrouting 1, masquerading 2",
                ],
                _ => [
                    "POSTROUTING 2, KUBE-POSTROUTING 3",
                    "POSTROUTING 1, cali-POSTROUTING 1",
                    "POSTROUTING 2, KUBE-POSTROUTING 2",
                ],
            };
            assert_eq!(paths.map(Option::unwrap_or_default), expected);
            assert!(cause.mark_assumed && !cause.rule_certain && !cause.masquerade_mark);
            assert_has(&cause.text, &["probably on the first", "takes the packet inside before"]);
        }
    }
    Ok(())
}

#[test]
fn kube_proxy_before_the_cni_breaks_nothing() -> Result<()> {
    for tool in Tool::ALL {
        let lab = lab(cluster(tool, Cni::TunnelledLast))?;
        let vxcsum = Daemon::start(&lab.a, NIC, [""; 0])?;
        let server = UdpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
        for from in [Some(&lab.a), lab.pod()].into_iter().flatten() {
            traffic::udp_request(from, server.address(), &traffic::dns_query(), PLENTY)?;
        }
        let (events, _) = vxcsum.stop()?;
        assert_eq!(events, []);
    }
    Ok(())
}

#[test]
fn rules_that_come_later_are_read_later() -> Result<()> {
    let lab = lab(cluster(Tool::IptablesNft, Cni::MarkedFirst))?;
    let vxcsum = Daemon::start(&lab.a, NIC, [""; 0])?;
    let (_, cause) = lose_one(&lab, &lab.a, &vxcsum)?;
    assert_eq!(cause.rule.map(|rule| rule.backend).as_deref(), Some("iptables-nft"));
    lab.enable_nat(cluster(Tool::IptablesLegacy, Cni::MarkedFirst))?;
    wait_until("the new rules are named", PLENTY, || {
        let (_, cause) = lose_one(&lab, &lab.a, &vxcsum)?;
        Ok(cause.rule.is_some_and(|rule| rule.backend == "iptables-legacy"))
    })
}

#[test]
fn without_an_unmark_it_says_so() -> Result<()> {
    let lab = lab(Nat::Masquerade { random_fully: true })?;
    let vxcsum = Daemon::start(&lab.a, NIC, [""; 0])?;
    let (_, cause) = lose_one(&lab, &lab.a, &vxcsum)?;
    assert!(cause.rule_certain, "{cause:#?}");
    let says =
        ["rule 1 of POSTROUTING (MASQUERADE --random-fully) rewrote it", "no rule clears the mark"];
    assert_has(&cause.text, &says);
    Ok(())
}

#[test]
fn address_nat_over_ipv4() -> Result<()> {
    address_nat(Family::V4)
}

#[test]
fn address_nat_over_ipv6() -> Result<()> {
    address_nat(Family::V6)
}

fn address_nat(outer: Family) -> Result<()> {
    let lab = LabConfig { outer, nat: Nat::Snat, ..LabConfig::default() }.start()?;
    let vxcsum = Daemon::start(&lab.a, NIC, [""; 0])?;
    let (event, cause) = lose_one(&lab, &lab.a, &vxcsum)?;
    let flows = conntrack::udp_flows(&lab.a, lab.config.dstport)?;
    let original = conntrack::before_nat(&flows, event.outer.sport).context("no such flow")?;
    assert_eq!(event.outer.src_before_nat, Some(original.src));
    assert_eq!(cause.src_before_nat, Some(original.src));
    assert_eq!(cause.sport_before_nat, Some(original.sport));
    let rule = cause.rule.with_context(|| cause.text.clone())?;
    let to = format!("SNAT --to-source {}", lab.snat_address());
    assert_has(&rule.text, &[&to]);
    assert!(cause.rule_certain && !cause.masquerade_mark);
    let change = format!("address {} -> {}", lab.outer_a(), lab.snat_address());
    assert_has(&cause.text, &[&change, &format!("rule 1 of POSTROUTING ({to}) rewrote it")]);
    Ok(())
}

#[test]
fn a_rule_that_writes_the_checksum_is_named() -> Result<()> {
    let nat = Nat::ZeroMangle;
    let lab = LabConfig { outer_sum: OuterSum::Zero, nat, ..LabConfig::default() }.start()?;
    let vxcsum = Daemon::start(&lab.a, NIC, [""; 0])?;
    let (event, cause) = lose_one(&lab, &lab.a, &vxcsum)?;
    assert_eq!(event.verdict, "mangled_zero");
    assert!(cause.rule_certain, "{cause:#?}");
    assert_has(&cause.text, &["0xffff", "rule 1 of post", "writes the UDP checksum"]);
    Ok(())
}

#[test]
fn where_nothing_proves_nat_no_rule_is_named() -> Result<()> {
    let nat = cluster(Tool::IptablesNft, Cni::MarkedFirst);
    let lab = LabConfig { srcport: Some(SOURCE_PORTS), nat, ..LabConfig::default() }.start()?;
    let vxcsum = Daemon::start(&lab.a, NIC, [""; 0])?;
    send_frames(&lab.a, NIC, &[Packet::new(Check::Value(0xffff)).frame()?])?;
    let events = vxcsum.wait_events(1, PLENTY)?;
    assert_eq!(events[0].verdict, "bad");
    let cause = events[0].cause.clone().context("no cause")?;
    assert_eq!((cause.rule, cause.rule_certain), (None, false));
    assert_has(&cause.text, &["nothing proves NAT; ", "may have changed the packet"]);
    Ok(())
}

/// A daemon that finds no tools.
fn without_tools(lab: &Lab, socket: &Socket) -> Result<Daemon> {
    let mut command = lab.a.command("env");
    command.arg("PATH=/nonexistent").arg(binary()?).args(["run", "--json", "--interface", NIC]);
    command.arg("--socket").arg(socket.path());
    let vxcsum = Daemon::launch(command)?;
    vxcsum.wait_watching()?;
    Ok(vxcsum)
}

#[test]
fn rules_that_cannot_be_read() -> Result<()> {
    let lab = lab(cluster(Tool::IptablesNft, Cni::MarkedFirst))?;
    let socket = Socket::new()?;
    let vxcsum = without_tools(&lab, &socket)?;
    let (event, cause) = lose_one(&lab, &lab.a, &vxcsum)?;
    assert_eq!(event.verdict, "stale_nat");
    assert_eq!(cause.rule, None);
    assert!(!cause.rule_certain && cause.masquerade_mark);
    assert_eq!(cause.sport_before_nat, event.outer.sport_before_nat);
    let unread = cause.rules_unread.context("it does not say that it cannot read rules")?;
    assert_has(&unread, &["nft is not installed", "iptables-nft-save is not installed"]);
    assert_has(&cause.text, &["by NAT", "mark 0x4000 left", &unread]);

    // The kernel itself is asked for these.
    lab.enable_nat(cluster(Tool::IptablesLegacy, Cni::MarkedFirst))?;
    wait_until("legacy rules are named", PLENTY, || {
        let (_, cause) = lose_one(&lab, &lab.a, &vxcsum)?;
        Ok(cause.rule.is_some_and(|rule| rule.backend == "iptables-legacy"))
    })
}

#[test]
fn many_rules_hold_nothing_up() -> Result<()> {
    const SERVICES: usize = 10_000;
    let lab = lab(cluster(Tool::IptablesNft, Cni::MarkedFirst))?;
    let mut rules = "*nat\n".to_owned();
    for number in 0..SERVICES {
        let (high, low) = (number / 250, number % 250);
        let _ = write!(
            rules,
            ":KUBE-SVC-{number} -\n\
             -A KUBE-SERVICES -d 10.96.{high}.{low}/32 -p tcp -m comment --comment \"ns/{number} \
             cluster IP\" -m tcp --dport 80 -j KUBE-SVC-{number}\n\
             -A KUBE-SVC-{number} ! -s 172.29.0.0/16 -j KUBE-MARK-MASQ\n"
        );
    }
    rules.push_str("COMMIT\n");
    let file = Socket::new()?.folder().with_extension("rules");
    std::fs::write(&file, &rules)?;
    let restored = lab.a.run(&format!("iptables-nft-restore --noflush {}", file.display()));
    std::fs::remove_file(&file)?;
    restored?;

    let socket = Socket::new()?;
    let vxcsum = socket.run(&lab.a, ["--interface", NIC])?;
    wait_until("the rule is named", 2 * PLENTY, || {
        let (_, cause) = lose_one_now(&lab, &lab.a, &vxcsum)?;
        // It answers, whatever it reads.
        socket.status()?;
        let Some(rule) = cause.rule else {
            assert_has(&cause.rules_unread.unwrap_or_default(), &["takes long"]);
            return Ok(false);
        };
        assert_eq!(rule.path, ["POSTROUTING 1", "cali-POSTROUTING 1"]);
        assert!(cause.rule_certain);
        Ok(true)
    })?;
    let (events, summary) = vxcsum.stop()?;
    assert_eq!(summary.interface()?.broken(), events.len() as u64);
    Ok(())
}

#[test]
fn people_read_a_cause_once() -> Result<()> {
    let lab = lab(cluster(Tool::IptablesNft, Cni::MarkedFirst))?;
    let socket = Socket::new()?;
    let vxcsum = socket.run(&lab.a, ["--interface", NIC])?;
    lose_one(&lab, &lab.a, &vxcsum)?;
    let mut command = socket.command_in(&lab.b, ["tail", "--limit", "3"])?;
    let tail = std::thread::spawn(move || run_to_end(&mut command, PLENTY));
    wait_until("three events are told", PLENTY, || {
        lose_one(&lab, &lab.a, &vxcsum)?;
        Ok(tail.is_finished())
    })?;
    let ended = tail.join().map_err(|_| anyhow::anyhow!("tail panicked"))??;
    let lines: Vec<_> = ended.stdout.lines().collect();
    assert_eq!(lines.len(), 4, "{lines:#?}");
    assert!(lines[1].starts_with("    cause: source port "), "{lines:#?}");
    assert_has(lines[1], &["rule 1 of POSTROUTING (cali-POSTROUTING -> MASQUERADE"]);
    assert!(lines[2..].iter().all(|line| line.contains("stale_nat")), "{lines:#?}");
    Ok(())
}

/// Rules of every kind that is understood, and of one that is not.
const RULES: &str = r#"*mangle
-A OUTPUT -p udp -m udp --dport 8472 -j MARK --set-xmark 0x0/0x4000
-A OUTPUT -p udp -m udp --sport 1000:2000 ! --dport 53 -j MARK --set-xmark 0x4000/0x0
-A POSTROUTING -j CONNMARK --restore-mark
COMMIT
*nat
:EMPTY -
:KUBE-POSTROUTING -
:ONE -
-A POSTROUTING -m comment --comment "with \"quotes\" and -j DROP" -j ONE
-A POSTROUTING -m comment --comment nothing
-A POSTROUTING -g KUBE-POSTROUTING
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
-A KUBE-POSTROUTING -p tcp -j MASQUERADE --to-ports 1024-2048 --random
-A ONE -o eth0 -j EMPTY
-A ONE ! -o veth+ -p tcp -m tcp --dport 80 -j ACCEPT
-A ONE -p tcp -m tcp --tcp-flags SYN,ACK SYN -j ACCEPT
-A ONE -p udp -m multiport --dports 53,1000:2000,8472 -j RETURN
-A ONE -p udp -m multiport ! --sports 53 -j RETURN
-A ONE -m conntrack --ctstate NEW,RELATED -j ACCEPT
-A ONE -m addrtype ! --src-type LOCAL --limit-iface-out -m addrtype --src-type LOCAL -j MASQUERADE
-A ONE -m statistic --mode random --probability 0.5 -j ACCEPT
-A ONE -j RETURN
COMMIT
"#;

/// Every rule but its counters, as text.
fn rules_of(ns: &NetNs, backend: Backend, packets: Packets) -> Result<Vec<String>> {
    let rules = ns.enter(|| Ok(netfilter::read()))?;
    ensure!(rules.unread.is_empty(), "{:?}", rules.unread);
    let mut found = Vec::new();
    for chain in &rules.chains {
        if (chain.backend, chain.family) != (backend, packets) {
            continue;
        }
        for rule in &chain.rules {
            let show = |step: &Step| match step {
                Step::Test(Test { of: Property::Unknown(_), .. }) => "unknown".to_owned(),
                step => format!("{step:?}"),
            };
            // In which order a rule looks at things is up to the tool.
            let steps: BTreeSet<_> = rule.steps.iter().map(show).collect();
            let base = chain.base;
            found.push(format!(
                "{} {} {base:?} {steps:#?} {}",
                chain.table, chain.name, rule.action
            ));
        }
    }
    // Tables come in any order.
    found.sort_by_key(|rule| rule.split(' ').take(2).collect::<Vec<_>>().join(" "));
    Ok(found)
}

/// What the kernel itself says of legacy tables is what the tools say of the same rules.
#[test]
fn legacy_tables_are_read_like_the_others() -> Result<()> {
    for (tables, packets, rules) in [
        (
            "iptables",
            Packets::Ipv4,
            "-A ONE -s 10.0.0.0/8 ! -d 10.1.2.3/32 -j SNAT --to-source 10.0.0.1-10.0.0.9:1-99\n",
        ),
        (
            "ip6tables",
            Packets::Ipv6,
            "-A ONE -s fd00::/9 ! -d fd00::1/128 -p udp -j SNAT --to-source [fd00::1]:1-99\n",
        ),
    ] {
        let more = if packets == Packets::Ipv4 {
            rules.replace(" -j SNAT", " -p udp -j SNAT")
        } else {
            rules.to_owned()
        };
        let text = RULES.replacen("-A ONE -o", &format!("{more}-A ONE -o"), 1);
        let text = text.replace(" -j MASQUERADE\n", " -j MASQUERADE --random\n");
        let mut found = Vec::new();
        for (kind, backend) in [("legacy", Backend::IptablesLegacy), ("nft", Backend::IptablesNft)]
        {
            let ns = NetNs::new(kind)?;
            let folder = Socket::new()?;
            let file = folder.folder().join("rules");
            std::fs::write(&file, &text)?;
            ns.run(&format!("{tables}-{kind}-restore {}", file.display()))?;
            found.push(rules_of(&ns, backend, packets)?);
        }
        assert!(found[0].len() >= 20, "{found:#?}");
        for (legacy, nft) in found[0].iter().zip(&found[1]) {
            assert_eq!(legacy, nft);
        }
        assert_eq!(found[0].len(), found[1].len());
    }
    Ok(())
}

#[test]
fn reading_makes_nothing() -> Result<()> {
    let ns = NetNs::new("empty")?;
    for _ in 0..2 {
        let rules = ns.enter(|| Ok(netfilter::read()))?;
        assert_eq!(rules.chains, []);
        assert_eq!(rules.unread, [""; 0]);
    }
    assert_eq!(ns.run("cat /proc/net/ip_tables_names")?, "");
    assert_eq!(ns.run("cat /proc/net/ip6_tables_names")?, "");
    assert_eq!(ns.run("nft list ruleset")?, "");
    // Nor does asking iptables where there is no nft.
    ns.run("iptables-nft-save -c")?;
    ns.run("ip6tables-nft-save -c")?;
    assert_eq!(ns.run("nft list ruleset")?, "");
    Ok(())
}
