//! Judging nodes that no lab has: old kernels, other NICs, rules that are only half understood.

use std::collections::BTreeMap;
use std::path::PathBuf;

use vxcsum_common::Policy;

use super::conntrack::{Entries, Entry as Flow, Rewritten, Tracking};
use super::devices::{Device, Underlay};
use super::facts::{Entry, Facts, Fate, Hit, Mark, Rules};
use super::judge::judge;
use super::kernel::Kernel;
use super::offloads::Offloads;
use super::receive::Counters;
use super::report::{Report, Rule, Severity, Unseen, Verdict};
use crate::netfilter::Backend;

const RHEL7: &str = "3.10.0-1160.el7.x86_64";
const NEW: &str = "6.18.44";

fn offloads(driver: &str, features: &[(&str, bool)]) -> Offloads {
    let features = features.iter().map(|&(name, is_on)| (name.to_owned(), is_on)).collect();
    Offloads { driver: Some(driver.to_owned()), features }
}

fn underlay(driver: &str) -> Underlay {
    let offloads = Ok(offloads(driver, &[("tx-udp_tnl-csum-segmentation", true)]));
    Underlay { name: "ens192".to_owned(), offloads }
}

fn device(policy: Policy) -> Device {
    Device {
        name: "flannel.1".to_owned(),
        vni: 1,
        port: 8472,
        source_ports: None,
        is_external: policy == Policy::Unknown,
        local: None,
        remotes: Vec::new(),
        is_ipv6: false,
        policy,
        offloads: Ok(offloads("vxlan", &[("tx-checksum-ip-generic", true)])),
        leaves_by: Some("ens192".to_owned()),
        underlays: vec![Underlay {
            name: "ens192".to_owned(),
            offloads: Ok(offloads("e1000", &[])),
        }],
    }
}

fn facts(release: &str, device: Device) -> Facts {
    Facts {
        kernel: Kernel { release: release.to_owned(), ..Kernel::default() },
        devices: Ok(vec![device]),
        rules: Rules::default(),
        tracking: Tracking::Seen(Entries::default()),
        received: [Counters::default(), Counters { udp: Some(0), ..Counters::default() }],
        seconds: 0.0,
        is_privileged: true,
        tools: BTreeMap::from([("iptables", PathBuf::from("/sbin/iptables"))]),
    }
}

fn seen(is_rewritten: bool) -> Tracking {
    let (source, destination) =
        ("10.0.0.11:42276".parse().unwrap(), "10.0.0.13:8472".parse().unwrap());
    let new_source = "10.0.0.11:54947".parse().unwrap();
    let flow =
        Flow { source, destination, new_source, new_destination: destination, is_unreplied: true };
    let rewritten = Rewritten { port: 8472, count: 1, unreplied: 1, examples: vec![flow] };
    let rewritten = if is_rewritten { vec![rewritten] } else { Vec::new() };
    Tracking::Seen(Entries { total: 1, rewritten })
}

fn hit(is_certain: bool) -> Hit {
    Hit {
        device: "flannel.1".to_owned(),
        rule: Rule {
            place: "POSTROUTING rule 1".to_owned(),
            text: "-j MASQUERADE".to_owned(),
            packets: Some(7),
        },
        entry: Entry {
            backend: Backend::IptablesLegacy,
            family: "ip",
            table: "nat".to_owned(),
            chain: "POSTROUTING".to_owned(),
        },
        is_specific: false,
        mark: None,
        is_certain,
        keeps_source: false,
    }
}

fn unread() -> Vec<Unseen> {
    vec![Unseen { what: "rules".to_owned(), why: "nft is not installed".to_owned() }]
}

/// Its severity, where it is found.
fn severity(report: &Report, id: &str) -> Option<Severity> {
    report.findings.iter().find(|finding| finding.id == id).map(|finding| finding.severity)
}

fn remedies(report: &Report) -> Vec<&str> {
    report.remedies.iter().map(|remedy| remedy.id).collect()
}

#[test]
fn rhel_7_mangles_zeroes() {
    let node = Facts { tracking: seen(true), ..facts(RHEL7, device(Policy::Zero)) };
    let report = judge(&node);
    assert_eq!(report.verdict, Verdict::Broken);
    assert_eq!(severity(&report, "nat_mangled_zero"), Some(Severity::Problem));
    assert!(report.summary.starts_with("class 1"), "{}", report.summary);
    assert_eq!(report.kernel.class1_fix, "lacking");
    let expected =
        ["return_rule", "offload_off", "offload_off_udev", "kernel_upgrade", "run_fix_restore"];
    assert_eq!(remedies(&report), expected);
    assert!(report.remedies[3].text.contains("RHEL 7"), "{:?}", report.remedies[3]);

    // Nothing rewrites: fine, on this kernel as well.
    let report = judge(&Facts { tracking: seen(false), ..node });
    assert_eq!((report.verdict, report.remedies.len()), (Verdict::Fine, 0), "{report:#?}");
}

#[test]
fn sums_are_class_2_on_every_kernel() {
    for release in [RHEL7, "5.4.38", NEW] {
        let node = Facts { tracking: seen(true), ..facts(release, device(Policy::Sum)) };
        let report = judge(&node);
        assert_eq!(severity(&report, "nat_stale_sum"), Some(Severity::Problem), "{release}");
        assert!(!remedies(&report).contains(&"kernel_upgrade"), "{release}");
        assert!(report.kernel.class2_measured);
    }
    assert!(!judge(&facts("6.19.0", device(Policy::Sum))).kernel.class2_measured);
}

#[test]
fn where_it_cannot_be_told_what_nat_does() {
    for (release, policy) in [("4.18.0-193.el8.x86_64", Policy::Zero), (NEW, Policy::Unknown)] {
        let node = Facts { tracking: seen(true), ..facts(release, device(policy)) };
        let report = judge(&node);
        assert_eq!(report.verdict, Verdict::AtRisk, "{report:#?}");
        assert_eq!(severity(&report, "nat_unknown"), Some(Severity::Risk));
    }
    let report = judge(&facts("4.18.0-193.el8.x86_64", device(Policy::Zero)));
    assert_eq!(report.kernel.class1_fix, "unknown");
    assert!(report.kernel.to_string().contains("RHEL 8"), "{}", report.kernel);
}

#[test]
fn offload_off_makes_nat_harmless() {
    let device = Device {
        offloads: Ok(offloads("vxlan", &[("tx-checksum-ip-generic", false)])),
        ..device(Policy::Sum)
    };
    let report = judge(&Facts { tracking: seen(true), ..facts(NEW, device) });
    assert_eq!((report.verdict, report.remedies.len()), (Verdict::Fine, 0), "{report:#?}");
    assert_eq!(severity(&report, "nat_harmless"), Some(Severity::Note));
}

#[test]
fn vmxnet3_is_a_risk_and_other_nics_a_note() {
    let node =
        |driver| facts(NEW, Device { underlays: vec![underlay(driver)], ..device(Policy::Sum) });
    let report = judge(&node("vmxnet3"));
    assert_eq!(report.verdict, Verdict::AtRisk);
    assert_eq!(severity(&report, "nic_tunnel_offload"), Some(Severity::Risk));
    assert!(report.summary.contains("class 3"), "{}", report.summary);
    assert_eq!(remedies(&report), ["nic_offload_off", "nic_offload_off_udev"]);
    let command = report.remedies[0].command.as_deref();
    assert_eq!(
        command,
        Some("ethtool -K ens192 tx-udp_tnl-segmentation off tx-udp_tnl-csum-segmentation off")
    );
    assert!(report.remedies[1].survives_reboot && !report.remedies[0].survives_reboot);

    let report = judge(&node("i40e"));
    assert_eq!(severity(&report, "nic_tunnel_offload"), Some(Severity::Note));
    assert_eq!((report.verdict, report.remedies.len()), (Verdict::Fine, 0));
    assert_eq!(severity(&judge(&node("veth")), "nic_tunnel_offload"), None);
}

#[test]
fn traffic_refutes_rules_that_are_not_understood() {
    let rules = |is_certain| Rules { hits: vec![hit(is_certain)], ..Rules::default() };
    let node = |is_certain, tracking| {
        judge(&Facts { rules: rules(is_certain), tracking, ..facts(NEW, device(Policy::Sum)) })
    };
    // Nothing has passed so far.
    let idle = || Tracking::Seen(Entries::default());
    assert_eq!(severity(&node(false, idle()), "nat_stale_sum"), Some(Severity::Risk));
    assert_eq!(severity(&node(false, seen(false)), "nat_stale_sum"), Some(Severity::Note));
    assert_eq!(severity(&node(true, seen(false)), "nat_stale_sum"), Some(Severity::Risk));
    // Its counter counts other packets, too, and proves nothing.
    assert_eq!(node(true, seen(false)).verdict, Verdict::AtRisk);
    assert_eq!(severity(&node(true, Tracking::Unused), "nat_stale_sum"), None);
    assert_eq!(severity(&node(false, seen(true)), "nat_stale_sum"), Some(Severity::Problem));
}

#[test]
fn what_was_not_seen_is_no_proof() {
    let node = |tracking, unread| {
        let rules = Rules { unread, ..Rules::default() };
        judge(&Facts { rules, tracking, ..facts(NEW, device(Policy::Sum)) })
    };
    let unseen = || Tracking::Unseen("not permitted".to_owned());
    assert_eq!(node(seen(false), Vec::new()).verdict, Verdict::Fine);
    assert_eq!(node(seen(false), unread()).verdict, Verdict::CannotTell);
    assert_eq!(node(unseen(), unread()).verdict, Verdict::CannotTell);
    assert_eq!(node(unseen(), Vec::new()).verdict, Verdict::Fine);
    // No connection tracking, no NAT.
    assert_eq!(node(Tracking::Unused, unread()).verdict, Verdict::Fine);
    let report = node(unseen(), unread());
    assert_eq!(report.verdict.exit_code(), 2);
    assert_eq!(report.unseen.len(), 2, "{:?}", report.unseen);

    let blind =
        Facts { devices: Err("no rtnetlink".to_owned()), ..facts(NEW, device(Policy::Sum)) };
    assert_eq!(judge(&blind).verdict, Verdict::CannotTell);
}

#[test]
fn unprivileged_is_told_to_become_root() {
    let facts = Facts {
        is_privileged: false,
        tracking: Tracking::Unseen("not permitted".to_owned()),
        rules: Rules { unread: unread(), ..Rules::default() },
        ..facts(NEW, device(Policy::Sum))
    };
    assert!(judge(&facts).summary.ends_with("run it as root"));
}

#[test]
fn one_command_for_all_rules_of_a_device() {
    let marked = |bits, backend| {
        let mark = Some(Mark { bits, fate: Fate::default() });
        let entry = Entry { backend, ..hit(true).entry };
        Hit { entry, mark, ..hit(true) }
    };
    let command = |hits| {
        let rules = Rules { hits, ..Rules::default() };
        let report = judge(&Facts { rules, ..facts(NEW, device(Policy::Sum)) });
        let first = report.remedies.into_iter().next().unwrap();
        (first.id, first.command.unwrap())
    };
    assert_eq!(
        command(vec![marked(0x4000, Backend::IptablesLegacy), marked(0x4000, Backend::IptablesLegacy)]),
        (
            "unmark_rule",
            "iptables -t mangle -I POSTROUTING 1 -o ens192 -p udp --dport 8472 -j MARK --set-xmark \
             0x0/0x4000"
                .to_owned()
        )
    );
    // A rule that asks for no mark is not kept off by clearing one.
    let (id, both) = command(vec![marked(0x4000, Backend::Nft), hit(true)]);
    assert_eq!(id, "return_rule");
    assert_eq!(
        both,
        "nft 'insert rule ip nat POSTROUTING oifname \"ens192\" udp dport 8472 return'; iptables -t \
         nat -I POSTROUTING 1 -o ens192 -p udp --dport 8472 -j RETURN"
    );
}

/// Names of interfaces may hold nearly anything.
#[test]
fn odd_names_are_quoted() {
    let device = Device { name: "vx'; reboot".to_owned(), ..device(Policy::Sum) };
    let rules =
        Rules { hits: vec![Hit { device: device.name.clone(), ..hit(true) }], ..Rules::default() };
    let report = judge(&Facts { rules, ..facts(NEW, device) });
    let command = |id: &str| {
        let remedy = report.remedies.iter().find(|remedy| remedy.id == id).unwrap();
        remedy.command.clone().unwrap()
    };
    assert_eq!(command("offload_off"), r"ethtool -K 'vx'\''; reboot' tx-checksum-ip-generic off");
    assert!(command("offload_off_udev").contains(r#"KERNEL=="vx'\''; reboot""#));
}
