//! One table of packets, through the common crate and through the BPF program in the kernel.

mod test_run;

use std::collections::BTreeSet;

use internet_checksum::Checksum;
use test_run::{Kernel, Outcome, in_user_space};
use vxcsum_common::layout::{DeviceKey, SEEN_SUM, SEEN_ZERO};
use vxcsum_common::{Device, Offload, Policy, Verdict};
use vxcsum_tests::cases::{self, After, Broken, Case, Expected, Known, PORT};
use vxcsum_tests::packets::UDP_CHECK;

/// The UDP checksum that a receiver finds right, over the packet with all sums filled in.
fn right_sum(case: &Case) -> u16 {
    let frame = &case.frame;
    let bytes = &frame.finished;
    let len = usize::from(u16::from_be_bytes([bytes[frame.udp + 4], bytes[frame.udp + 5]]));
    let mut sum = Checksum::new();
    let is_ipv6 = bytes[frame.ip] >> 4 == 6;
    let addresses = if is_ipv6 { 8..40 } else { 12..20 };
    sum.add_bytes(&bytes[frame.ip..][addresses]);
    sum.add_bytes(&[0, 17]);
    sum.add_bytes(&(len as u16).to_be_bytes());
    let datagram = &bytes[frame.udp..frame.udp + len];
    sum.add_bytes(&datagram[..UDP_CHECK]);
    sum.add_bytes(&datagram[UDP_CHECK + 2..]);
    match u16::from_be_bytes(sum.checksum()) {
        0 => 0xffff,
        sum => sum,
    }
}

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
            let right = if broken.is_sum_told { right_sum(case) } else { 0 };
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
                After::Right => right_sum(case),
            };
            after[field..field + 2].copy_from_slice(&value.to_be_bytes());
        }
        (should, is) => compare("report", format!("{is:?}"), format!("{should:?}")),
    }
    let changed = |frame: &[u8]| match frame.len() == case.frame.bytes.len() {
        true => {
            let bytes = frame.iter().zip(&case.frame.bytes).enumerate();
            let changed = bytes.filter(|(_, (is, was))| is != was);
            changed.map(|(at, (is, _))| format!("{at}: {is:02x} ")).collect()
        }
        false => format!("{} bytes", frame.len()),
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
        case.frame.bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>()
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
fn the_bpf_program_says_what_the_table_says() {
    let cases = cases::all().unwrap();
    let mut wrong = Vec::new();
    let mut tried = 0;
    for offload in [Offload::Unknown, Offload::Complete] {
        // Devices are only ever added to a program, so each set of them needs one of its own.
        let mut kernels: Vec<(&[(DeviceKey, Device)], Kernel)> = Vec::new();
        for case in &cases {
            let devices = &case.known.devices[..];
            let place = kernels.iter().position(|(known, _)| *known == devices);
            let place = place.unwrap_or_else(|| {
                kernels.push((devices, Kernel::load(offload, &case.known)));
                kernels.len() - 1
            });
            let kernel = &mut kernels[place].1;
            if !kernel.takes(case) {
                continue;
            }
            kernel.configure(case);
            let differences = differences(case, &kernel.run(case));
            if !differences.is_empty() {
                wrong.push(describe(case, offload, &differences));
            }
            tried += 1;
        }
    }
    assert!(tried > cases.len(), "only {tried} of {} cases, twice", cases.len());
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

    let mut kernel = Kernel::load(Offload::Unknown, &none.known);
    kernel.configure(&none);
    assert_eq!(kernel.run(&mangled).verdict, Some(Verdict::Bad));
    assert_eq!(kernel.learned(PORT), (0, 0), "a broken packet teaches nothing");
    assert_eq!(kernel.run(&none).verdict, Some(Verdict::Zero));
    assert_eq!(kernel.learned(PORT), (SEEN_ZERO, 0));
    let outcome = kernel.run(&mangled);
    assert_eq!(outcome.verdict, Some(Verdict::MangledZero));
    assert_eq!(outcome.report.unwrap().policy, Policy::Zero as u8);
    assert_eq!(kernel.run(&right_ipv6).verdict, Some(Verdict::Valid));
    assert_eq!(kernel.learned(PORT), (SEEN_ZERO, SEEN_SUM), "each family on its own");
    assert_eq!(kernel.run(&right).verdict, Some(Verdict::Valid));
    assert_eq!(kernel.learned(PORT), (SEEN_ZERO | SEEN_SUM, SEEN_SUM));
    let outcome = kernel.run(&mangled);
    assert_eq!(outcome.verdict, Some(Verdict::Bad), "it sends the one and the other");
    assert_eq!(outcome.report.unwrap().policy, Policy::Unknown as u8);

    // What rtnetlink says is not to be learned.
    let mut known = none.clone();
    known.known.ports = vec![cases::port(PORT, Policy::Sum)];
    kernel.configure(&known);
    assert_eq!(kernel.run(&known).verdict, Some(Verdict::Missing));
    assert_eq!(kernel.learned(PORT), (0, 0));
}
