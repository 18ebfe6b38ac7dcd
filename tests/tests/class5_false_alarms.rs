//! Class 5: healthy packets that look broken to tcpdump on the sender. vxcsum accuses none of them,
//! leaves none untold, and counts every one.

use anyhow::{Context as _, Result};
use vxcsum_tests::capture::{Capture, Direction};
use vxcsum_tests::counters;
use vxcsum_tests::daemon::{Daemon, counts_segments};
use vxcsum_tests::evidence::sent_by_a;
use vxcsum_tests::lab::{
    Family, InnerNeighbours, LabConfig, NIC, Nat, OuterSum, PodSums, Underlay,
};
use vxcsum_tests::oracle::Transport;
use vxcsum_tests::workload::everything;

/// The sums are open where vxcsum runs, inner neighbours ask by ARP, and a pod takes part.
fn config() -> LabConfig {
    LabConfig {
        nic_offload: true,
        inner_neighbours: InnerNeighbours::Arp,
        pod: Some(PodSums::Open),
        ..LabConfig::default()
    }
}

fn zero() -> LabConfig {
    LabConfig { outer_sum: OuterSum::Zero, accept_zero_v6: true, ..config() }
}

fn nobody_is_accused(config: LabConfig) -> Result<()> {
    let lab = config.start()?;
    // Where ARP goes by broadcast, so do multicast reports, and the first of them find nobody there.
    let before = counters::udp(&lab.b, lab.config.outer)?;
    let at_sender = Capture::start(&lab.a, NIC, Direction::Out)?;
    let at_receiver = Capture::start(&lab.b, NIC, Direction::In)?;
    let vxcsum = Daemon::start(&lab.a, NIC, [""; 0])?;
    everything(&lab)?;
    counters::wait_quiet(&lab.a, NIC)?;
    let (events, summary) = vxcsum.stop()?;
    let (sent, received) = (at_sender.stop()?, at_receiver.stop()?);
    assert_eq!(events, []);
    let interface = summary.interface()?;
    assert_eq!(interface.broken(), 0, "{interface:?}");
    assert_eq!(interface.packets("unverified"), 0, "{interface:?}");
    assert_eq!(interface.packets("missing"), 0, "{interface:?}");

    let on_wire = sent_by_a(&lab, &received)?;
    assert!(on_wire.iter().all(|frame| frame.outer.is_right()));
    assert!(on_wire.iter().flat_map(|frame| &frame.inner).all(Transport::is_right));
    let after = counters::udp(&lab.b, lab.config.outer)?;
    assert_eq!(after.in_csum_errors, before.in_csum_errors);
    let verdicts = match lab.config.outer_sum {
        OuterSum::Zero => interface.packets("zero"),
        OuterSum::Sum => interface.packets("valid") + interface.packets("offload_pending"),
    };
    assert_eq!(received.frames.len(), on_wire.len());
    if counts_segments() {
        assert_eq!(verdicts, on_wire.len() as u64, "{interface:?}");
        let bytes: usize = received.frames.iter().map(Vec::len).sum();
        let uncounted = (bytes as u64).checked_sub(interface.vxlan().bytes);
        let uncounted = uncounted.with_context(|| format!("{interface:?}"))?;
        // A tag that the NIC is to add is not yet a part of the packet.
        let is_tagged = matches!(lab.config.underlay, Underlay::Vlan(_));
        let tags = if is_tagged { 4 * received.frames.len() as u64 } else { 0 };
        if counters::counts_inner_headers()? {
            assert!([0, tags].contains(&uncounted), "{uncounted}: {interface:?}");
        }
    } else {
        assert_eq!(verdicts, interface.skbs - interface.not_vxlan, "{interface:?}");
    }
    if lab.config.nic_offload {
        assert_eq!(interface.skbs, sent.frames.len() as u64);
    }

    // Without offload the sums are finished before anybody can capture them. Zero is fine with
    // tcpdump over IPv4 only.
    let looks_bad = match (lab.config.outer, lab.config.outer_sum) {
        (_, OuterSum::Sum) => lab.config.nic_offload,
        (family, OuterSum::Zero) => family == Family::V6,
    };
    let tcpdump = sent.tcpdump_verdicts(lab.config.dstport)?;
    assert_eq!(tcpdump.bad > 20, looks_bad, "tcpdump on the sender: {tcpdump:?}");
    assert_eq!(tcpdump.bad == 0, !looks_bad, "tcpdump on the sender: {tcpdump:?}");
    Ok(())
}

#[test]
fn summing_device_over_ipv4() -> Result<()> {
    nobody_is_accused(config())
}

#[test]
fn summing_device_over_ipv6() -> Result<()> {
    nobody_is_accused(LabConfig { outer: Family::V6, ..config() })
}

#[test]
fn zero_device_over_ipv4() -> Result<()> {
    nobody_is_accused(zero())
}

#[test]
fn zero_device_over_ipv6() -> Result<()> {
    nobody_is_accused(LabConfig { outer: Family::V6, ..zero() })
}

#[test]
fn nic_without_offload() -> Result<()> {
    nobody_is_accused(LabConfig { nic_offload: false, ..config() })
}

#[test]
fn forwarded_packets_that_come_complete() -> Result<()> {
    nobody_is_accused(LabConfig { pod: Some(PodSums::Complete), ..config() })
}

#[test]
fn nat_that_leaves_the_port_alone() -> Result<()> {
    nobody_is_accused(LabConfig { nat: Nat::Masquerade { random_fully: false }, ..config() })
}

#[test]
fn calico_port_and_vni() -> Result<()> {
    nobody_is_accused(LabConfig { dstport: 4789, vni: 4096, ..config() })
}

#[test]
fn vlan_on_the_underlay() -> Result<()> {
    nobody_is_accused(LabConfig { underlay: Underlay::Vlan(vec![100]), ..config() })
}

#[test]
fn vlan_on_the_underlay_of_a_zero_device_over_ipv6() -> Result<()> {
    let underlay = Underlay::Vlan(vec![100]);
    nobody_is_accused(LabConfig { underlay, outer: Family::V6, ..zero() })
}

#[test]
fn two_vlans_on_the_underlay() -> Result<()> {
    nobody_is_accused(LabConfig { underlay: Underlay::Vlan(vec![200, 100]), ..config() })
}

#[test]
fn macvlan_on_the_underlay() -> Result<()> {
    nobody_is_accused(LabConfig { underlay: Underlay::Macvlan, ..config() })
}
