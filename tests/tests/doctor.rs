//! `vxcsum doctor`: each finding where it belongs and not where it does not, remedies that cure, and
//! a node that is left as it was.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde::Deserialize;
use vxcsum::doctor::conntrack::{Entries, Tracking};
use vxcsum_tests::conntrack;
use vxcsum_tests::counters;
use vxcsum_tests::daemon::{Daemon, Ended, binary, run_to_end};
use vxcsum_tests::lab::{Family, Lab, LabConfig, MASQUERADE_MARK, NIC, Nat, OuterSum, VXLAN};
use vxcsum_tests::netns::NetNs;
use vxcsum_tests::traffic::{self, TcpServer};

/// The doctor runs other programs, on a machine that may be busy.
const TIMEOUT: Duration = Duration::from_mins(1);
/// A healthy connect takes a few milliseconds; a lost SYN is sent again after a second.
const STALL: Duration = Duration::from_millis(700);
const MASQUERADE: Nat = Nat::Masquerade { random_fully: true };
const AT_ONCE: [&str; 3] = ["doctor", "--seconds=0", "--json"];

/// What `--json` promises.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Report {
    verdict: String,
    summary: String,
    findings: Vec<Finding>,
    remedies: Vec<Remedy>,
    unseen: Vec<Unseen>,
    kernel: Kernel,
    devices: Vec<Device>,
    rules: Vec<Rule>,
    kube_proxy: Option<KubeProxy>,
    receive: Receive,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Finding {
    id: String,
    severity: String,
    subject: String,
    text: String,
    evidence: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Remedy {
    id: String,
    text: String,
    command: Option<String>,
    cost: String,
    survives_reboot: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Unseen {
    what: String,
    why: String,
}

#[derive(Debug, Deserialize)]
struct Kernel {
    release: String,
    class1_fix: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Device {
    name: String,
    vni: u32,
    port: u16,
    source_ports: Option<(u16, u16)>,
    external: bool,
    policy: String,
    tx_checksum_ip_generic: Option<bool>,
    underlays: Vec<Underlay>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Underlay {
    name: String,
    driver: Option<String>,
    tx_checksum_ip_generic: Option<bool>,
    tunnel_offloads: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Rule {
    place: String,
    text: String,
    packets: Option<u64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct KubeProxy {
    mark: String,
    unmark: Option<String>,
    taken_by: Option<String>,
    text: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Receive {
    seconds: f64,
    udp_in_csum_errors: Option<Count>,
    udp6_in_csum_errors: Option<Count>,
    ports: Vec<Port>,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
struct Count {
    total: u64,
    risen: u64,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Port {
    #[serde(rename = "port")]
    number: u16,
    total: u64,
    risen: u64,
}

impl Report {
    fn finding(&self, id: &str) -> Option<&Finding> {
        self.findings.iter().find(|finding| finding.id == id)
    }

    /// The severity of a finding; none where it is not there.
    fn severity(&self, id: &str) -> Option<&str> {
        self.finding(id).map(|finding| finding.severity.as_str())
    }

    fn command(&self, id: &str) -> Result<&str> {
        let remedy = self.remedies.iter().find(|remedy| remedy.id == id);
        remedy.and_then(|it| it.command.as_deref()).with_context(|| format!("no {id}: {self:#?}"))
    }
}

fn run(ns: &NetNs, args: &[&str]) -> Result<Ended> {
    run_to_end(ns.command(binary()?).args(args), TIMEOUT)
}

fn report_of(ended: &Ended) -> Result<Report> {
    ensure!(ended.stderr.is_empty(), "{ended:?}");
    let report: Report =
        serde_json::from_str(&ended.stdout).with_context(|| format!("{ended:?}"))?;
    let code = match report.verdict.as_str() {
        "fine" => 0,
        "broken" | "at_risk" => 1,
        _ => 2,
    };
    ensure!(ended.code == Some(code), "exit code {:?}: {report:#?}", ended.code);
    Ok(report)
}

fn doctor(ns: &NetNs) -> Result<Report> {
    report_of(&run(ns, &AT_ONCE)?)
}

fn lab(outer: Family, nat: Nat) -> Result<Lab> {
    LabConfig { outer, nat, ..LabConfig::default() }.start()
}

/// Whether a connection through the tunnel stalls.
fn stalls(lab: &Lab) -> Result<bool> {
    let server = TcpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
    Ok(traffic::try_connect(&lab.a, server.address(), STALL)?.is_none())
}

#[test]
fn healthy_node_is_fine() -> Result<()> {
    for outer in [Family::V4, Family::V6] {
        let lab = lab(outer, Nat::None)?;
        assert!(!stalls(&lab)?);
        let report = doctor(&lab.a)?;
        assert_eq!(report.verdict, "fine", "{report:#?}");
        assert!(report.findings.is_empty() && report.remedies.is_empty(), "{report:#?}");
        assert!(report.unseen.is_empty(), "{report:#?}");
        assert!(report.rules.is_empty() && report.kube_proxy.is_none(), "{report:#?}");

        let [device] = &report.devices[..] else { panic!("{report:#?}") };
        assert_eq!((device.name.as_str(), device.vni, device.port), (VXLAN, 1, 8472));
        assert_eq!((device.policy.as_str(), device.external), ("sum", false));
        assert_eq!(device.tx_checksum_ip_generic, Some(true));
        assert!(device.source_ports.is_some_and(|(low, high)| low < high), "{device:?}");
        let [underlay] = &device.underlays[..] else { panic!("{device:#?}") };
        assert_eq!((underlay.name.as_str(), underlay.driver.as_deref()), (NIC, Some("veth")));
        assert_eq!(underlay.tx_checksum_ip_generic, Some(false));
        assert!(underlay.tunnel_offloads.iter().all(|it| it.starts_with("tx-udp_tnl-")));
    }
    Ok(())
}

#[test]
fn kernel_is_the_running_one() -> Result<()> {
    let ns = NetNs::new("doctor")?;
    let kernel = doctor(&ns)?.kernel;
    assert_eq!(kernel.release, ns.run("uname -r")?.trim());
    assert_eq!(kernel.class1_fix, "carried");
    Ok(())
}

/// At risk by its rules alone, broken once traffic shows it.
#[test]
fn masquerade_by_mark_is_a_risk_and_then_broken() -> Result<()> {
    for outer in [Family::V4, Family::V6] {
        let lab = lab(outer, MASQUERADE)?;
        let report = doctor(&lab.a)?;
        assert_eq!(report.verdict, "at_risk", "{report:#?}");
        let finding = report.finding("nat_stale_sum").context("no finding")?;
        assert_eq!((finding.severity.as_str(), finding.subject.as_str()), ("risk", VXLAN));
        assert!(finding.evidence.iter().any(|line| line.contains("MASQUERADE")), "{finding:#?}");
        assert!(finding.evidence.iter().any(|line| line.contains("0x4000")), "{finding:#?}");

        assert!(stalls(&lab)?);
        let report = doctor(&lab.a)?;
        assert_eq!(report.verdict, "broken", "{report:#?}");
        assert!(report.summary.contains("class 2") && report.summary.contains(VXLAN), "{report:?}");
        let finding = report.finding("nat_stale_sum").context("no finding")?;
        assert_eq!(finding.severity, "problem");
        // The very flows that connection tracking knows.
        let flows = conntrack::udp_flows(&lab.a, lab.config.dstport)?;
        let shown =
            |port: u16| finding.evidence.iter().any(|line| line.contains(&port.to_string()));
        assert!(flows.iter().any(|flow| shown(flow.original.sport) && shown(flow.sport_after())));
        assert!(finding.evidence[0].contains("[UNREPLIED]"), "{finding:#?}");
        assert!(finding.text.contains("class 2"), "{finding:#?}");
    }
    Ok(())
}

/// Runs the command of a remedy as a shell would, and sees the stall cured and the finding gone.
fn cures(lab: &Lab, remedy: &str) -> Result<()> {
    assert!(stalls(lab)?, "{remedy}");
    let report = doctor(&lab.a)?;
    assert_eq!(report.verdict, "broken", "{report:#?}");
    let command = report.command(remedy)?.to_owned();
    run_to_end(lab.a.command("sh").args(["-c", &command]), TIMEOUT)
        .and_then(|ended| {
            // What there is to forget may have been forgotten.
            ensure!(ended.code == Some(0) || command.contains("conntrack"), "{ended:?}");
            Ok(())
        })
        .context(command.clone())?;
    assert!(!stalls(lab)?, "{command}");
    let report = doctor(&lab.a)?;
    assert_eq!(report.verdict, "fine", "after {command}: {report:#?}");
    let left = report.findings.iter().filter(|finding| finding.severity != "note").count();
    assert_eq!(left, 0, "after {command}: {report:#?}");
    assert!(report.remedies.is_empty(), "after {command}: {report:#?}");
    Ok(())
}

#[test]
fn unmark_rule_cures() -> Result<()> {
    cures(&lab(Family::V4, MASQUERADE)?, "unmark_rule")?;
    cures(&lab(Family::V6, MASQUERADE)?, "unmark_rule")
}

#[test]
fn return_rule_cures() -> Result<()> {
    cures(&lab_of_node_snat(Family::V4)?, "return_rule")?;
    cures(&lab_of_node_snat(Family::V6)?, "return_rule")
}

/// The CNI masquerades what leaves the node, whatever it is.
fn lab_of_node_snat(outer: Family) -> Result<Lab> {
    let lab = lab(outer, Nat::None)?;
    let program = if outer == Family::V4 { "iptables" } else { "ip6tables" };
    lab.a.run(&format!("{program} -t nat -A POSTROUTING -o {NIC} -j MASQUERADE --random-fully"))?;
    Ok(lab)
}

#[test]
fn offload_off_cures() -> Result<()> {
    let lab = lab(Family::V4, MASQUERADE)?;
    cures(&lab, "offload_off")?;
    // NAT goes on, and does no harm any more.
    let report = doctor(&lab.a)?;
    assert_eq!(report.severity("nat_harmless"), Some("note"), "{report:#?}");
    assert_eq!(report.devices[0].tx_checksum_ip_generic, Some(false));
    Ok(())
}

#[test]
fn rules_of_nft_are_cured_in_nft() -> Result<()> {
    let nat = "table ip cni { chain post { type nat hook postrouting priority 100; \
               meta mark & 0x4000 == 0x4000 masquerade fully-random; }; }";
    let mark = "table ip marks { chain out { type route hook output priority -150; \
                ip daddr 172.29.2.0/24 meta mark set meta mark | 0x4000; }; }";
    let lab = nft_lab(&format!("{mark}\n{nat}"))?;
    cures(&lab, "unmark_rule")?;

    let all = "table ip cni { chain post { type nat hook postrouting priority 100; \
               oifname \"eth0\" masquerade fully-random; }; }";
    cures(&nft_lab(all)?, "return_rule")
}

fn nft_lab(rules: &str) -> Result<Lab> {
    let lab = lab(Family::V4, Nat::None)?;
    let ended = run_to_end(lab.a.command("nft").arg(rules), TIMEOUT)?;
    ensure!(ended.code == Some(0), "{ended:?}");
    Ok(lab)
}

#[test]
fn legacy_rules_are_cured_by_legacy_commands() -> Result<()> {
    let lab = lab(Family::V4, Nat::None)?;
    lab.a.run(&format!(
        "iptables-legacy -t nat -A POSTROUTING -o {NIC} -j MASQUERADE --random-fully"
    ))?;
    cures(&lab, "return_rule")?;
    let rules = lab.a.run("iptables-legacy -t nat -S POSTROUTING")?;
    assert!(rules.contains("RETURN"), "{rules}");
    Ok(())
}

/// The command in full, in a lab with nothing else to find it by.
#[test]
fn vxcsum_itself_cures() -> Result<()> {
    let lab = lab(Family::V4, MASQUERADE)?;
    assert!(stalls(&lab)?);
    let report = doctor(&lab.a)?;
    let command = report.command("run_fix_restore")?;
    let args: Vec<&str> = command.split(' ').collect();
    assert_eq!(args[..4], ["vxcsum", "run", "--fix", "restore"], "{command}");
    let expected = ["--interface", NIC, "--port", "8472"];
    assert_eq!(args[4..], expected, "{command}");
    let vxcsum = Daemon::start(&lab.a, NIC, [&args[2..4], &args[6..]].concat())?;
    assert!(!stalls(&lab)?);
    vxcsum.stop()?;
    Ok(())
}

/// What udev runs for the rule, on a device that is made anew.
#[test]
fn udev_rule_says_what_to_run() -> Result<()> {
    let lab = lab(Family::V4, MASQUERADE)?;
    let report = doctor(&lab.a)?;
    let command = report.command("offload_off_udev")?;
    let (echo, path) = command.split_once(" > ").context("no redirection")?;
    assert_eq!(path, "/etc/udev/rules.d/90-vxcsum-flannel.1.rules");
    let rule = run_to_end(Command::new("sh").args(["-c", echo]), TIMEOUT)?.stdout;
    let mut keys = BTreeMap::new();
    for key in rule.trim().split(", ") {
        let (name, value) = key.split_once('=').context("no key")?;
        let value = value.trim_start_matches('=').trim_matches('"');
        keys.insert(name.trim_end_matches(['=', '+']), value);
    }
    assert_eq!((keys["ACTION"], keys["SUBSYSTEM"], keys["KERNEL"]), ("add", "net", VXLAN));
    lab.remove_vxlan()?;
    lab.add_vxlan(OuterSum::Sum)?;
    assert!(stalls(&lab)?);
    lab.a.run(&keys["RUN"].replace("$name", VXLAN))?;
    assert!(!stalls(&lab)?);
    let remedy = report.remedies.iter().find(|it| it.id == "offload_off_udev");
    assert!(remedy.is_some_and(|it| it.survives_reboot));
    Ok(())
}

#[test]
fn snat_of_the_port_counts_as_evidence() -> Result<()> {
    let lab = lab(Family::V4, Nat::Snat)?;
    assert_eq!(doctor(&lab.a)?.verdict, "at_risk");
    assert!(stalls(&lab)?);
    let report = doctor(&lab.a)?;
    assert_eq!(report.severity("nat_stale_sum"), Some("problem"), "{report:#?}");
    let [rule] = &report.rules[..] else { panic!("{report:#?}") };
    assert!(rule.text.contains("SNAT") && rule.place.contains("POSTROUTING rule 1"), "{rule:?}");
    assert!(rule.packets.is_some_and(|packets| packets > 0), "{rule:?}");
    let finding = report.finding("nat_stale_sum").context("no finding")?;
    let new = lab.snat_address().to_string();
    assert!(finding.evidence.iter().any(|line| line.contains(&new)), "{finding:#?}");
    cures(&lab, "return_rule")
}

/// Retransmissions that stay on one entry of connection tracking: it has to be forgotten as well.
#[test]
fn known_connections_are_cured_as_well() -> Result<()> {
    let srcport = Some((40000, 40001));
    let lab = LabConfig { srcport, nat: MASQUERADE, ..LabConfig::default() }.start()?;
    cures(&lab, "unmark_rule")
}

/// Without `--random-fully`, the source port stays.
#[test]
fn masquerade_that_keeps_the_port_is_a_note() -> Result<()> {
    let lab = lab(Family::V4, Nat::Masquerade { random_fully: false })?;
    assert!(!stalls(&lab)?);
    let report = doctor(&lab.a)?;
    assert_eq!(report.verdict, "fine", "{report:#?}");
    assert_eq!(report.severity("nat_stale_sum"), Some("note"), "{report:#?}");
    assert!(report.summary.ends_with("nothing rewrites them"), "{report:#?}");
    assert!(report.remedies.is_empty(), "{report:#?}");
    Ok(())
}

/// A device that sends zeroes, on a kernel that leaves them alone.
#[test]
fn nat_does_no_harm_to_zeroes() -> Result<()> {
    let nat = MASQUERADE;
    let lab = LabConfig { outer_sum: OuterSum::Zero, nat, ..LabConfig::default() }.start()?;
    assert!(!stalls(&lab)?);
    let report = doctor(&lab.a)?;
    assert_eq!(report.verdict, "fine", "{report:#?}");
    assert_eq!(report.severity("nat_harmless"), Some("note"), "{report:#?}");
    assert_eq!(report.devices[0].policy, "zero");
    assert!(report.remedies.is_empty(), "{report:#?}");
    Ok(())
}

#[test]
fn rule_that_writes_the_checksum_is_found() -> Result<()> {
    let nat = Nat::ZeroMangle;
    let lab = LabConfig { outer_sum: OuterSum::Zero, nat, ..LabConfig::default() }.start()?;
    let report = doctor(&lab.a)?;
    assert_eq!(report.severity("checksum_written"), Some("risk"), "{report:#?}");
    lab.disable_nat()?;
    let report = doctor(&lab.a)?;
    assert_eq!(report.severity("checksum_written"), None, "{report:#?}");
    Ok(())
}

/// kube-proxy's own rules since 1.18.6.
const KUBE_PROXY: &str = "\
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
";

fn kube_proxy_lab(postrouting: &str, chain: &str) -> Result<Lab> {
    let lab = lab(Family::V4, Nat::None)?;
    let mark = format!("-d 172.29.2.0/24 -j MARK --or-mark {MASQUERADE_MARK:#x}");
    let tables = format!(
        "*mangle\n-A OUTPUT {mark}\nCOMMIT\n\
         *nat\n:KUBE-POSTROUTING - [0:0]\n:cali-POSTROUTING - [0:0]\n{postrouting}\
         -A cali-POSTROUTING -o {VXLAN} -j MASQUERADE --random-fully\n{chain}COMMIT\n"
    );
    let script = format!("iptables-restore <<'END'\n{tables}END");
    let ended = run_to_end(lab.a.command("sh").args(["-c", &script]), TIMEOUT)?;
    ensure!(ended.code == Some(0), "{ended:?}");
    Ok(lab)
}

#[test]
fn kube_proxy_that_clears_its_mark_is_fine() -> Result<()> {
    let first = "-A POSTROUTING -j KUBE-POSTROUTING\n-A POSTROUTING -j cali-POSTROUTING\n";
    let lab = kube_proxy_lab(first, KUBE_PROXY)?;
    let report = doctor(&lab.a)?;
    assert_eq!(report.verdict, "fine", "{report:#?}");
    assert!(report.findings.is_empty(), "{report:#?}");
    assert!(!stalls(&lab)?);
    let report = doctor(&lab.a)?;
    assert_eq!(report.verdict, "fine", "{report:#?}");
    let kube_proxy = report.kube_proxy.context("kube-proxy")?;
    assert_eq!((kube_proxy.mark.as_str(), &kube_proxy.taken_by), ("0x4000", &None));
    let unmark = kube_proxy.unmark.context("unmark")?;
    assert!(unmark.contains("POSTROUTING rule 1 > KUBE-POSTROUTING rule 2"), "{unmark}");
    assert!(kube_proxy.text.contains(&unmark));
    Ok(())
}

/// calico#8860: the CNI's rule comes first.
#[test]
fn kube_proxy_whose_unmark_is_not_reached_is_broken() -> Result<()> {
    let last = "-A POSTROUTING -j cali-POSTROUTING\n-A POSTROUTING -j KUBE-POSTROUTING\n";
    let lab = kube_proxy_lab(last, KUBE_PROXY)?;
    let report = doctor(&lab.a)?;
    assert_eq!(report.verdict, "at_risk", "{report:#?}");
    let kube_proxy = report.kube_proxy.as_ref().context("kube-proxy")?;
    let taken_by = kube_proxy.taken_by.as_deref().context("taken by")?;
    assert!(taken_by.contains("POSTROUTING rule 1 > cali-POSTROUTING rule 1"), "{taken_by}");
    assert!(report.command("kube_proxy_upgrade").is_err());
    cures(&lab, "unmark_rule")
}

/// Before 1.18.6: no rule clears the mark.
#[test]
fn old_kube_proxy_is_to_be_upgraded() -> Result<()> {
    let old = "-A KUBE-POSTROUTING -m mark --mark 0x4000/0x4000 -j MASQUERADE --random-fully\n";
    let lab = kube_proxy_lab("-A POSTROUTING -j KUBE-POSTROUTING\n", old)?;
    let report = doctor(&lab.a)?;
    let remedy = report.remedies.iter().find(|it| it.id == "kube_proxy_upgrade");
    let remedy = remedy.with_context(|| format!("{report:#?}"))?;
    assert!(remedy.text.contains("1.18.6") && remedy.command.is_none(), "{remedy:?}");
    assert!(!remedy.cost.is_empty());
    cures(&lab, "unmark_rule")
}

#[test]
fn receiver_sees_what_it_drops() -> Result<()> {
    for outer in [Family::V4, Family::V6] {
        let lab = lab(outer, MASQUERADE)?;
        let report = doctor(&lab.b)?;
        assert_eq!(report.severity("received_bad_sums"), None, "{report:#?}");
        assert_eq!(report.verdict, "fine", "{report:#?}");

        // A SYN that is sent again and again while the doctor looks.
        let server = TcpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
        let long = Duration::from_secs(8);
        let report = std::thread::scope(|scope| {
            let syns = scope.spawn(|| traffic::try_connect(&lab.a, server.address(), long));
            let ended = run(&lab.b, &["doctor", "--seconds=5", "--json"]);
            ensure!(syns.join().is_ok_and(|tried| matches!(tried, Ok(None))), "no stall");
            report_of(&ended?)
        })?;
        assert_eq!(report.verdict, "broken", "{report:#?}");
        assert_eq!(report.severity("received_bad_sums"), Some("problem"), "{report:#?}");
        assert!(report.receive.seconds >= 5.0);
        let [port] = &report.receive.ports[..] else { panic!("{report:#?}") };
        assert!(port.number == 8472 && port.risen > 0 && port.total >= port.risen, "{port:?}");
        // Long ago is worth a note.
        let report = doctor(&lab.b)?;
        assert_eq!(report.severity("received_bad_sums"), Some("note"), "{report:#?}");
        assert_eq!(report.verdict, "fine", "{report:#?}");
        let total = counters::port_drops(&lab.b, outer, 8472)?;
        let errors = match outer {
            Family::V4 => report.receive.udp_in_csum_errors,
            Family::V6 => report.receive.udp6_in_csum_errors,
        };
        assert_eq!(errors, Some(Count { total, risen: 0 }));
    }
    Ok(())
}

/// Both ways to connection tracking say the same.
#[test]
fn conntrack_by_netlink_agrees() -> Result<()> {
    for outer in [Family::V4, Family::V6] {
        let lab = lab(outer, MASQUERADE)?;
        assert!(stalls(&lab)?);
        let (ports, own) = ([lab.config.dstport], [lab.outer_a()]);
        let entries = lab.a.enter(|| Ok(Entries::by_netlink(&ports, &own)?))?;
        let flows = conntrack::udp_flows(&lab.a, lab.config.dstport)?;
        assert_eq!(entries.total, flows.len());
        let [rewritten] = &entries.rewritten[..] else { panic!("{entries:?}") };
        assert_eq!(
            rewritten.count,
            flows.iter().filter(|it| it.original.sport != it.sport_after()).count()
        );
        for entry in &rewritten.examples {
            let is_it = |flow: &&conntrack::Flow| flow.original.sport == entry.source.port();
            let flow = flows.iter().find(is_it).context("no such flow")?;
            assert_eq!(flow.sport_after(), entry.new_source.port());
            assert_eq!(flow.src_after(), entry.new_source.ip());
            assert!(entry.is_unreplied);
        }
        assert!(matches!(Tracking::read(&ports, &own), Tracking::Seen(_) | Tracking::Unused));
    }
    Ok(())
}

#[test]
fn node_without_vxlan() -> Result<()> {
    let ns = NetNs::new("doctor")?;
    let report = doctor(&ns)?;
    assert_eq!(report.verdict, "fine", "{report:#?}");
    assert!(report.summary.contains("no VXLAN device here"), "{report:#?}");
    assert_eq!(report.severity("no_vxlan"), Some("note"));
    let elsewhere = report.unseen.iter().find(|it| it.what.contains("namespaces"));
    assert!(elsewhere.is_some_and(|it| it.why.contains("nsenter -t PID -n vxcsum doctor")));
    assert!(report.devices.is_empty() && report.remedies.is_empty(), "{report:#?}");

    // A device that sends from here, and was moved away.
    let lab = lab(Family::V4, Nat::None)?;
    lab.a.ip(&format!("link set {VXLAN} netns {}", ns.name()))?;
    ns.ip(&format!("link set {VXLAN} up"))?;
    let report = doctor(&lab.a)?;
    let finding = report.finding("no_vxlan").context("no finding")?;
    assert!(finding.evidence.iter().any(|line| line.contains("8472")), "{finding:?}");
    assert_eq!(report.severity("nat_elsewhere"), None, "{report:#?}");

    // Its packets pass by here, and NAT rewrites them.
    lab.a.run(&format!("iptables -t nat -A POSTROUTING -o {NIC} -j MASQUERADE --random-fully"))?;
    ns.ip(&format!(
        "addr add {}/32 dev {VXLAN}\nroute add default dev {VXLAN}\n\
         neigh add {} lladdr 02:00:00:00:02:0b dev {VXLAN} nud permanent",
        lab.inner_a(),
        lab.inner_b()
    ))?;
    let server = TcpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
    assert_eq!(traffic::try_connect(&ns, server.address(), STALL)?, None);
    let report = doctor(&lab.a)?;
    assert_eq!(report.severity("nat_elsewhere"), Some("risk"), "{report:#?}");
    assert_eq!(report.verdict, "at_risk", "{report:#?}");
    Ok(())
}

/// Without the programs that show rules, what is not seen is said.
#[test]
fn without_tools() -> Result<()> {
    let lab = lab(Family::V4, MASQUERADE)?;
    let mut command = lab.a.command("env");
    command.arg("PATH=/nowhere").arg(binary()?).args(AT_ONCE);
    let report = report_of(&run_to_end(&mut command, TIMEOUT)?)?;
    assert_eq!(report.verdict, "cannot_tell", "{report:#?}");
    assert!(report.unseen.iter().any(|it| it.why.contains("not installed")), "{report:#?}");

    // Connection tracking shows it all the same.
    assert!(stalls(&lab)?);
    let mut command = lab.a.command("env");
    command.arg("PATH=/nowhere").arg(binary()?).args(AT_ONCE);
    let report = report_of(&run_to_end(&mut command, TIMEOUT)?)?;
    assert_eq!(report.verdict, "broken", "{report:#?}");
    assert_eq!(report.devices.len(), 1);
    cures(&lab, "unmark_rule")
}

/// In a container: no capabilities, and /proc read-only.
#[test]
fn without_privileges() -> Result<()> {
    let lab = lab(Family::V4, MASQUERADE)?;
    assert!(stalls(&lab)?);
    for drop in [
        ["--reuid=65534", "--regid=65534", "--clear-groups"],
        ["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"],
    ] {
        let mut command = lab.a.command("setpriv");
        command.args(drop).arg(binary()?).args(AT_ONCE);
        let report = report_of(&run_to_end(&mut command, TIMEOUT)?)?;
        assert!(!report.unseen.is_empty(), "{report:#?}");
        assert!(report.unseen.iter().all(|it| !it.what.is_empty() && !it.why.is_empty()));
        assert_ne!(report.verdict, "fine", "{report:#?}");
        // What needs no privilege is there.
        assert_eq!(report.devices[0].tx_checksum_ip_generic, Some(true), "{report:#?}");
        assert!(report.receive.udp_in_csum_errors.is_some(), "{report:#?}");
    }
    Ok(())
}

/// What people see first is the verdict, and every remedy has its cost.
#[test]
fn text_for_people() -> Result<()> {
    let lab = lab(Family::V4, MASQUERADE)?;
    assert!(stalls(&lab)?);
    let ended = run(&lab.a, &["doctor", "--seconds=1"])?;
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(1), ""), "{ended:?}");
    let first = ended.stdout.lines().next().unwrap_or_default();
    assert!(
        first.starts_with("BROKEN: class 2: NAT rewrites tunnel packets of flannel.1"),
        "{first}"
    );
    for part in ["conntrack:", "ethtool -K flannel.1 tx-checksum-ip-generic off", "costs", "reboot"]
    {
        assert!(ended.stdout.contains(part), "{part:?} is not in {}", ended.stdout);
    }
    Ok(())
}

#[test]
fn wrong_usage() -> Result<()> {
    let ns = NetNs::new("doctor")?;
    for args in
        [&["doctor", "--seconds", "-1"][..], &["doctor", "--seconds", "soon"], &["doctor", "x"]]
    {
        let ended = run(&ns, args)?;
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""), "{ended:?}");
        assert!(!ended.stderr.is_empty());
    }
    Ok(())
}

/// Everything that could be changed, before and after; in a namespace with rules and in a fresh
/// one, where asking is enough to create tables.
#[test]
fn changes_nothing() -> Result<()> {
    let lab = lab(Family::V4, MASQUERADE)?;
    assert!(stalls(&lab)?);
    let fresh = NetNs::new("doctor")?;
    for ns in [&lab.a, &fresh] {
        let before = state(ns)?;
        run(ns, &["doctor", "--seconds=1"])?;
        assert_eq!(before, state(ns)?);
    }
    Ok(())
}

fn state(ns: &NetNs) -> Result<Vec<String>> {
    let mut state = Vec::new();
    for command in ["nft list ruleset", "ip -d link", "ip address", "ip rule", "tc qdisc"] {
        state.push(ns.run(command)?);
    }
    for file in [
        "/proc/net/ip_tables_names",
        "/proc/net/ip6_tables_names",
        "/proc/sys/net/netfilter/nf_conntrack_acct",
    ] {
        let ended = run_to_end(ns.command("cat").arg(file), TIMEOUT)?;
        state.push(ended.stdout);
    }
    for device in ["lo", NIC, VXLAN] {
        let ended = run_to_end(ns.command("ethtool").args(["-k", device]), TIMEOUT)?;
        state.push(ended.stdout);
    }
    Ok(state)
}
