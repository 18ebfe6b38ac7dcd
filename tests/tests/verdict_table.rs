//! One table of packets, through the common crate and through the BPF program in the kernel.
#![allow(
    clippy::panic,
    clippy::unwrap_used,
    reason = "what these tests are made of fails as they do, by a panic"
)]

mod test_run;
mod wire;

use std::collections::BTreeSet;

use test_run::{Kernel, Outcome, TestRun, Way, in_user_space};
use vxcsum::program::Program;
use vxcsum::transport::Transport;
use vxcsum_common::layout::{SEEN_SUM, SEEN_ZERO};
use vxcsum_common::{Offload, Policy, Verdict};
use vxcsum_tests::cases::{self, After, Broken, Case, Expected, Known, PORT};
use vxcsum_tests::oracle::right_sum;
use vxcsum_tests::packets::{UDP_CHECK, hex};
use wire::Wire;

/// Compares, and returns what is wrong.
fn differences(case: &Case, outcome: &Outcome) -> Vec<String> {
    let mut differences = Vec::new();
    let mut compare = |what: &str, is: String, should: String| {
        if is != should {
            differences.push(format!("{what} is {is}, should be {should}"));
        }
    };
    let (verdict, broken) = match case.expected {
        Expected::NotVxlan => (None, None),
        Expected::Quiet(verdict) => (Some(verdict), None),
        Expected::Broken(broken) => (Some(broken.verdict), Some(broken)),
    };
    compare("verdict", format!("{:?}", outcome.verdict), format!("{verdict:?}"));
    let mut after = case.frame.bytes.clone();
    match (broken, outcome.report) {
        (None, None) => {}
        (Some(broken), Some(told)) => {
            let right = if broken.is_sum_told { right_sum(&case.frame) } else { 0 };
            compare("expected", format!("{:#06x}", told.expected), format!("{right:#06x}"));
            let check = case.frame.check().unwrap();
            compare("check", format!("{:#06x}", told.check), format!("{check:#06x}"));
            let Broken { proof, source_port_before_nat, action, .. } = broken;
            compare("proof", told.proof.to_string(), (proof as u8).to_string());
            let port = told.source_port_before_nat;
            compare("port before NAT", port.to_string(), source_port_before_nat.to_string());
            compare("action", told.action.to_string(), (action as u8).to_string());
            let field = case.frame.udp + UDP_CHECK;
            let value = match broken.after {
                After::Unchanged => check,
                After::Zero => 0,
                After::Right => right_sum(&case.frame),
            };
            after[field..field + 2].copy_from_slice(&value.to_be_bytes());
        }
        (should, is) => compare("report", format!("{is:?}"), format!("{should:?}")),
    }
    let changed = |frame: &[u8]| {
        let bytes = frame.iter().zip(&case.frame.bytes).enumerate();
        let changed = bytes.filter(|(_, (is, was))| is != was);
        let changed: Vec<_> = changed.map(|(at, (is, _))| format!("{at}: {is:02x}")).collect();
        format!("{} of {} bytes", changed.join(", "), frame.len())
    };
    compare("change", changed(&outcome.after), changed(&after));
    differences
}

/// Fails with all that is wrong, not with the first of it.
fn assert_none(wrong: &[String], of: usize) {
    assert!(wrong.is_empty(), "{} of {of} are wrong:\n{}", wrong.len(), wrong.join("\n"));
}

fn describe(case: &Case, offload: Offload, differences: &[String]) -> String {
    format!(
        "{} ({offload:?}): {}\n    frame {}",
        case.name,
        differences.join(", "),
        hex(&case.frame.bytes)
    )
}

#[test]
fn the_common_crate_says_what_the_table_says() {
    let cases = cases::all().unwrap();
    let mut wrong = Vec::new();
    let mut tried = 0;
    for case in &cases {
        for &offload in &case.offloads {
            let differences = differences(case, &in_user_space(case, offload));
            if !differences.is_empty() {
                wrong.push(describe(case, offload, &differences));
            }
            tried += 1;
        }
    }
    assert_none(&wrong, tried);
}

#[test]
fn a_test_run_says_what_the_table_says() {
    for transport in Transport::ALL {
        let tried = compare(&cases::all().unwrap(), (transport, false), TestRun::open);
        // The others are for what a test run's packet cannot be.
        assert!(tried > 600, "only {tried}");
    }
}

#[test]
fn a_test_run_says_what_the_table_says_of_a_known_offload_state() {
    let tried = compare(&cases::all().unwrap(), (Transport::Ring, true), TestRun::open);
    assert!(tried > 400, "only {tried}");
}

#[test]
fn packets_on_their_way_get_what_the_table_says() {
    for transport in Transport::ALL {
        let tried = compare(&cases::all().unwrap(), (transport, false), Wire::open);
        assert!(tried > 600, "only {tried}");
    }
}

/// Here sums are really open.
#[test]
fn packets_on_their_way_get_what_the_table_says_of_a_known_offload_state() {
    let tried = compare(&cases::all().unwrap(), (Transport::Ring, true), Wire::open);
    assert!(tried > 600, "only {tried}");
}

#[test]
fn what_is_too_long_to_be_summed_is_judged_by_its_headers_or_not_at_all() {
    let cases = cases::beyond_full_sums().unwrap();
    for kernel in Kernel::<Wire>::ALL {
        assert!(compare(&cases, kernel, Wire::open) > 0);
    }
}

/// Takes the cases through the program in the kernel; returns how many can come that way.
fn compare<W: Way>(cases: &[Case], which: (Transport, bool), way: fn(&mut Program) -> W) -> usize {
    let mut kernel = Kernel::load(which, way);
    let mut wrong = Vec::new();
    let mut tried = 0;
    for case in cases {
        for offload in kernel.states(case) {
            kernel.configure(case);
            let differences = differences(case, &kernel.run(case, offload));
            if !differences.is_empty() {
                wrong.push(describe(case, offload, &differences));
            }
            tried += 1;
        }
    }
    assert_none(&wrong, tried);
    tried
}

/// A packet longer than a page that is sent in one piece has only its link header in the linear
/// part. The common crate knows of no such thing.
#[test]
fn headers_outside_of_the_linear_part_are_found() {
    /// What may be moved into the linear part: more than the headers of any sane packet.
    const REACH: usize = 256;

    let mut kernels = Kernel::<Wire>::ALL.map(|which| Kernel::load(which, Wire::open));
    let mut wrong = Vec::new();
    let mut tried = 0;
    for mut case in cases::all().unwrap() {
        if case.frame.boundaries.last().is_some_and(|&end| end > REACH) {
            continue;
        }
        let len = case.frame.bytes.len().max(6000);
        case.frame.bytes.resize(len, 0);
        for kernel in &mut kernels {
            for offload in kernel.states(&case) {
                kernel.configure(&case);
                let (is, should) = (kernel.run(&case, offload), in_user_space(&case, offload));
                if is != should {
                    let (is, should) = ((is.verdict, is.report), (should.verdict, should.report));
                    let told = format!("{is:?} instead of {should:?}");
                    case.frame.bytes.truncate(300);
                    wrong.push(describe(&case, offload, &[told]));
                }
                tried += 1;
            }
        }
    }
    assert!(tried > 1800, "only {tried}");
    assert_none(&wrong, tried);
}

#[test]
fn the_table_has_every_verdict_over_both_families() {
    let cases = cases::all().unwrap();
    for family in ["IPv4", "IPv6"] {
        let verdicts: BTreeSet<_> = cases
            .iter()
            .filter(|case| case.name.starts_with(family))
            .filter_map(|case| match case.expected {
                Expected::NotVxlan => None,
                Expected::Quiet(verdict) => Some(verdict as u8),
                Expected::Broken(broken) => Some(broken.verdict as u8),
            })
            .collect();
        assert_eq!(verdicts.len(), Verdict::ALL.len(), "{family}");
    }
    let names: BTreeSet<_> = cases.iter().map(|case| &case.name).collect();
    assert_eq!(names.len(), cases.len(), "names are not unique");
}

/// What has been seen over IPv4 and over IPv6.
fn learned(kernel: &Kernel<TestRun>) -> (u8, u8) {
    let config = kernel.config();
    let port = config.ports.get(PORT).unwrap();
    (port.seen_ipv4, port.seen_ipv6)
}

#[test]
fn a_sender_is_learned_from_what_it_sends() {
    let cases = cases::all().unwrap();
    let case = |name: &str| {
        let mut case = cases.iter().find(|case| case.name == name).unwrap().clone();
        let ports = vec![cases::port(PORT, Policy::Unknown)];
        case.known = Known { ports, devices: Vec::new() };
        case
    };
    let none = case("IPv4: no sum, as meant");
    let right = case("IPv4: right, inner sum open");
    let right_ipv6 = case("IPv6: right, inner sum open");
    let mangled = case("IPv4: 0xffff on a zero device");

    for transport in Transport::ALL {
        let kernel = Kernel::load((transport, false), TestRun::open);
        is_learned(kernel, &none, &right, &right_ipv6, &mangled);
    }
}

fn is_learned(
    mut kernel: Kernel<TestRun>,
    none: &Case,
    right: &Case,
    right_ipv6: &Case,
    mangled: &Case,
) {
    let judged = |kernel: &mut Kernel<_>, case: &Case| kernel.run(case, Offload::Unknown);
    kernel.configure(none);
    assert_eq!(judged(&mut kernel, mangled).verdict, Some(Verdict::Bad));
    assert_eq!(learned(&kernel), (0, 0), "a broken packet teaches nothing");
    assert_eq!(judged(&mut kernel, none).verdict, Some(Verdict::Zero));
    assert_eq!(learned(&kernel), (SEEN_ZERO, 0));
    let outcome = judged(&mut kernel, mangled);
    assert_eq!(outcome.verdict, Some(Verdict::MangledZero));
    assert_eq!(outcome.report.unwrap().policy, Policy::Zero as u8);
    assert_eq!(judged(&mut kernel, right_ipv6).verdict, Some(Verdict::Valid));
    assert_eq!(learned(&kernel), (SEEN_ZERO, SEEN_SUM), "each family on its own");
    assert_eq!(judged(&mut kernel, right).verdict, Some(Verdict::Valid));
    assert_eq!(learned(&kernel), (SEEN_ZERO | SEEN_SUM, SEEN_SUM));
    let outcome = judged(&mut kernel, mangled);
    assert_eq!(outcome.verdict, Some(Verdict::Bad), "it sends the one and the other");
    assert_eq!(outcome.report.unwrap().policy, Policy::Unknown as u8);

    // What rtnetlink says is not to be learned.
    let mut known = none.clone();
    known.known.ports = vec![cases::port(PORT, Policy::Sum)];
    kernel.configure(&known);
    assert_eq!(judged(&mut kernel, &known).verdict, Some(Verdict::Missing));
    assert_eq!(learned(&kernel), (0, 0));
}
