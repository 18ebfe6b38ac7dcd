//! The lab shows what it is there to show, without vxcsum: the real bug on this very kernel.

use std::process::{self, Command};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use vxcsum_tests::capture::{Capture, Direction};
use vxcsum_tests::lab::{Family, LabConfig, NIC, Nat, OuterSum, PodSums, Underlay};
use vxcsum_tests::netns::{self, NetNs};
use vxcsum_tests::traffic::{self, TcpServer};
use vxcsum_tests::workload::everything;
use vxcsum_tests::{conntrack, counters, oracle};

/// A healthy connect takes a few milliseconds; a lost SYN is sent again after a second.
const STALL: Duration = Duration::from_millis(700);
const PLENTY: Duration = Duration::from_secs(5);
const MASQUERADE: Nat = Nat::Masquerade { random_fully: true };

#[test]
fn masquerade_stalls_the_connect_over_ipv4() -> Result<()> {
    masquerade_stalls_the_connect(Family::V4)
}

#[test]
fn masquerade_stalls_the_connect_over_ipv6() -> Result<()> {
    masquerade_stalls_the_connect(Family::V6)
}

fn masquerade_stalls_the_connect(outer: Family) -> Result<()> {
    let srcport = Some((40000, 40001));
    let lab = LabConfig { outer, srcport, ..LabConfig::default() }.start()?;
    let server = TcpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
    let before = counters::udp(&lab.b, outer)?;

    let healthy = traffic::connect(&lab.a, server.address(), PLENTY)?;
    assert!(healthy < STALL, "{healthy:?} without NAT");
    assert_eq!(counters::udp(&lab.b, outer)?.in_csum_errors, before.in_csum_errors);

    lab.enable_nat(MASQUERADE)?;
    let capture = Capture::start(&lab.b, NIC, Direction::In)?;
    assert_eq!(traffic::try_connect(&lab.a, server.address(), STALL)?, None);
    let frames = capture.stop()?.frames;
    let syns = oracle::vxlan_frames(&frames, lab.config.dstport)?;
    assert!(!syns.is_empty());
    let flows = conntrack::udp_flows(&lab.a, lab.config.dstport)?;
    for syn in &syns {
        assert!(!syn.outer.is_right(), "{syn:?}");
        assert!(syn.inner.as_ref().is_some_and(oracle::Transport::is_right), "{syn:?}");
        // The end of the range is used by newer kernels only (Linux 7.2).
        let from_device = 40000..=40001;
        assert!(!from_device.contains(&syn.outer.sport), "{syn:?}");
        let before = conntrack::before_nat(&flows, syn.outer.sport).context("not tracked")?;
        assert!(from_device.contains(&before.sport), "{before:?}");
    }
    let after = counters::udp(&lab.b, outer)?;
    assert_eq!(after.in_csum_errors - before.in_csum_errors, syns.len() as u64);
    assert_eq!(after.in_errors - before.in_errors, syns.len() as u64);
    let drops = counters::port_drops(&lab.b, outer, lab.config.dstport)?;
    assert_eq!(drops, syns.len() as u64);

    lab.disable_nat()?;
    let healed = traffic::connect(&lab.a, server.address(), PLENTY)?;
    assert!(healed < STALL, "{healed:?} after NAT was switched off");
    Ok(())
}

#[test]
fn nothing_stalls_where_the_port_stays_or_the_device_sends_zero() -> Result<()> {
    for (outer_sum, nat) in
        [(OuterSum::Sum, Nat::Masquerade { random_fully: false }), (OuterSum::Zero, MASQUERADE)]
    {
        let lab = LabConfig { outer_sum, nat, ..LabConfig::default() }.start()?;
        let server = TcpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
        let took = traffic::connect(&lab.a, server.address(), PLENTY)?;
        assert!(took < STALL, "{outer_sum:?} {nat:?}: {took:?}");
        assert_eq!(counters::udp(&lab.b, Family::V4)?.in_csum_errors, 0);
    }
    Ok(())
}

#[test]
fn snat_to_another_address_stalls_the_connect() -> Result<()> {
    let lab = LabConfig { nat: Nat::Snat, ..LabConfig::default() }.start()?;
    let server = TcpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
    let capture = Capture::start(&lab.b, NIC, Direction::In)?;
    assert_eq!(traffic::try_connect(&lab.a, server.address(), STALL)?, None);
    let frames = capture.stop()?.frames;
    let syns = oracle::vxlan_frames(&frames, lab.config.dstport)?;
    assert!(!syns.is_empty());
    let flows = conntrack::udp_flows(&lab.a, lab.config.dstport)?;
    for syn in &syns {
        assert!(!syn.outer.is_right(), "{syn:?}");
        assert_eq!(syn.outer.src, lab.snat_address());
        let original = conntrack::before_nat(&flows, syn.outer.sport).context("not tracked")?;
        assert_eq!(original.src, lab.outer_a());
    }
    Ok(())
}

#[test]
fn the_stand_in_puts_ffff_on_the_wire_singly_and_in_bulk() -> Result<()> {
    let lab = LabConfig { outer_sum: OuterSum::Zero, ..LabConfig::default() }.start()?;
    let server = TcpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
    let capture = Capture::start(&lab.b, NIC, Direction::In)?;
    traffic::send_bulk(&lab.a, server.address(), 200_000, PLENTY)?;
    lab.enable_nat(Nat::ZeroMangle)?;
    assert_eq!(traffic::try_connect(&lab.a, server.address(), STALL)?, None);
    let recording = capture.stop()?;
    let sent = oracle::vxlan_frames(&recording.frames, lab.config.dstport)?;
    let from_a: Vec<_> = sent.iter().filter(|frame| frame.outer.src == lab.outer_a()).collect();
    let mangled = from_a.iter().filter(|frame| frame.outer.check == 0xffff).count();
    let zero = from_a.iter().filter(|frame| frame.outer.check == 0).count();
    assert!(zero > 100, "{zero} of {}", from_a.len());
    assert!(mangled >= 1, "{mangled} of {}", from_a.len());
    assert_eq!(mangled + zero, from_a.len());
    let said = recording.tcpdump_verdicts(lab.config.dstport)?;
    assert_eq!((said.none, said.bad), (zero, mangled));
    assert_eq!(counters::port_drops(&lab.b, Family::V4, lab.config.dstport)?, mangled as u64);
    Ok(())
}

/// All kinds of traffic arrive whole over every kind of underlay; with NIC offload on, the
/// receiver still gets finished sums and can tell wrong ones.
#[test]
fn all_traffic_arrives_over_every_underlay() -> Result<()> {
    for underlay in [
        Underlay::Nic,
        Underlay::Macvlan,
        Underlay::Vlan(vec![100]),
        Underlay::Vlan(vec![200, 100]),
    ] {
        let pod = Some(PodSums::Open);
        let config = LabConfig {
            underlay: underlay.clone(),
            nic_offload: true,
            pod,
            ..LabConfig::default()
        };
        let lab = config.start()?;
        let capture = Capture::start(&lab.b, NIC, Direction::In)?;
        everything(&lab)?;
        let recording = capture.stop()?;
        let vxlan = oracle::vxlan_frames(&recording.frames, lab.config.dstport)?;
        assert!(vxlan.len() > 100, "{underlay:?}: {} frames", vxlan.len());
        for frame in &vxlan {
            assert!(frame.outer.is_right() && frame.outer.check != 0, "{underlay:?}: {frame:?}");
            assert!(frame.inner.as_ref().is_none_or(oracle::Transport::is_right), "{frame:?}");
        }
        let tags = |frame: &[u8]| match (&frame[12..14], &frame[16..18]) {
            ([0x88, 0xa8], [0x81, 0x00]) => 2,
            ([0x81, 0x00], _) => 1,
            _ => 0,
        };
        let expected = if let Underlay::Vlan(ids) = &underlay { ids.len() } else { 0 };
        for frame in &recording.frames {
            assert_eq!(tags(frame), expected, "{underlay:?}: {frame:02x?}");
        }
        assert_eq!(counters::udp(&lab.b, Family::V4)?.in_csum_errors, 0);
    }
    Ok(())
}

#[test]
fn with_offload_the_receiver_still_drops_wrong_sums() -> Result<()> {
    let lab = LabConfig { nic_offload: true, nat: MASQUERADE, ..LabConfig::default() };
    let lab = lab.start()?;
    let server = TcpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
    assert_eq!(traffic::try_connect(&lab.a, server.address(), STALL)?, None);
    assert!(counters::udp(&lab.b, Family::V4)?.in_csum_errors > 0);
    Ok(())
}

#[test]
fn device_counters_move() -> Result<()> {
    let lab = LabConfig::default().start()?;
    let before = counters::device(&lab.a, NIC)?;
    traffic::ping(&lab.a, lab.inner_b(), 56, PLENTY)?;
    let after = counters::device(&lab.a, NIC)?;
    assert_eq!(after.tx_packets - before.tx_packets, 1);
    assert_eq!(after.tx_bytes - before.tx_bytes, 14 + 20 + 8 + 8 + 14 + 20 + 8 + 56);
    assert_eq!(after.rx_packets - before.rx_packets, 1);
    Ok(())
}

#[test]
fn namespaces_are_gone_afterwards_even_after_a_panic() {
    let names = Mutex::new(Vec::new());
    let panicked = thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let lab = LabConfig::default().start().unwrap();
            names.lock().unwrap().extend([lab.a.name().to_owned(), lab.b.name().to_owned()]);
            panic!("as a failed assertion would");
        });
        thread.join().is_err()
    });
    assert!(panicked);
    let names = names.into_inner().unwrap();
    assert_eq!(names.len(), 2);
    let there = netns::of_process(process::id());
    for name in names {
        assert!(!there.contains(&name), "{name} is still there");
    }
}

#[test]
fn remains_of_a_dead_process_are_removed_with_what_runs_there() -> Result<()> {
    // Making the first namespace of this process clears up, which would be too early below.
    drop(NetNs::new("first")?);
    // Process ids stay below 2^22.
    let name = "vxc4194305-0-a";
    ip(&["netns", "add", name])?;
    let mut left = Command::new("ip").args(["netns", "exec", name, "sleep", "60"]).spawn()?;
    let started = Instant::now();
    while !ip(&["netns", "pids", name])?.contains(&left.id().to_string()) {
        assert!(started.elapsed() < PLENTY);
        thread::sleep(Duration::from_millis(5));
    }
    netns::remove_stale();
    assert!(!ip(&["netns", "list"])?.contains(name));
    assert!(!left.wait()?.success());
    Ok(())
}

fn ip(args: &[&str]) -> Result<String> {
    let output = Command::new("ip").args(args).output()?;
    assert!(output.status.success(), "ip {args:?}: {output:?}");
    Ok(String::from_utf8(output.stdout)?)
}
