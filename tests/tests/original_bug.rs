//! The bug that the first reports are about, made by the kernel itself: NAT of a tunnel packet
//! without a checksum, whose inner checksum is still open, leaves 0xffff in the outer field.
//!
//! Kernels have been cured of it long ago (ea64d8d6c675). `cargo xtask vm original-bug` boots one
//! that was given it back, and runs these tests there.

use std::io::Write as _;
use std::net::TcpStream;
use std::time::Duration;

use anyhow::Result;
use vxcsum_tests::capture::{Capture, Direction};
use vxcsum_tests::counters;
use vxcsum_tests::daemon::{Daemon, Event, counts_segments};
use vxcsum_tests::evidence::{frames_of, sent_by_a};
use vxcsum_tests::lab::{Family, Lab, LabConfig, MASQUERADE_MARK, NIC, Nat, OuterSum, VXLAN};
use vxcsum_tests::oracle::Transport;
use vxcsum_tests::traffic::{self, TcpServer, UdpServer};
use vxcsum_tests::wait::wait_until;

/// A lost SYN is sent again after a second, and is lost as well.
const STALL: Duration = Duration::from_millis(1500);
const PLENTY: Duration = Duration::from_secs(30);
const LOST: Duration = Duration::from_millis(200);
/// Six SYNs are sent within 31 seconds, and all are lost. The kernel forgets the tunnel's NAT 30
/// seconds after the last; the seventh SYN follows 63 seconds after the first, and passes.
const SIX_SYNS: Duration = Duration::from_mins(1);
const SEVEN_SYNS: Duration = Duration::from_secs(100);

fn lab(nat: Nat, nic_offload: bool) -> Result<Lab> {
    let outer_sum = OuterSum::Zero;
    LabConfig { outer_sum, nat, nic_offload, ..LabConfig::default() }.start()
}

/// Rewrites every packet, not only the first of a connection.
const EVERY_PACKET: Nat = Nat::Masquerade { random_fully: true };

fn is_the_bug(event: &Event) {
    assert_eq!((event.verdict.as_str(), event.check), ("mangled_zero", 0xffff), "{event:#?}");
    assert_eq!(event.device.as_deref(), Some(VXLAN), "{event:#?}");
    let cause = event.cause.as_ref();
    assert!(cause.is_some_and(|cause| cause.text.contains("ea64d8d6c675")), "{event:#?}");
}

/// Not of every event: reading rules takes long here, and an event does not wait for it.
fn names_the_rule(event: &Event) -> bool {
    let rule = event.cause.as_ref().and_then(|cause| cause.rule.as_ref());
    rule.is_some_and(|rule| {
        rule.chain == "POSTROUTING" && rule.text.contains("MASQUERADE --random-fully")
    })
}

#[test]
#[ignore = "needs a kernel with the bug: cargo xtask vm original-bug"]
fn the_kernel_itself_makes_ffff_and_it_is_told() -> Result<()> {
    for nic_offload in [false, true] {
        let lab = lab(Nat::KubeProxy, nic_offload)?;
        let tcp = TcpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
        let udp = UdpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
        let capture = Capture::start(&lab.b, NIC, Direction::In)?;
        let vxcsum = Daemon::start(&lab.a, NIC, [""; 0])?;
        assert_eq!(traffic::try_connect(&lab.a, tcp.address(), LOST)?, None);
        let ask = || traffic::udp_request(&lab.a, udp.address(), &traffic::dns_query(), LOST);
        assert!(ask().is_err());
        vxcsum.wait_events(2, PLENTY)?;
        wait_until("the rule is named", PLENTY, || {
            Ok(vxcsum.events()?.iter().any(names_the_rule) || ask().is_ok())
        })?;
        let (events, summary) = vxcsum.stop()?;
        let received = sent_by_a(&lab, &capture.stop()?)?;
        let mangled: Vec<_> = received.iter().filter(|frame| frame.outer.check != 0).collect();
        assert!(mangled.iter().all(|frame| frame.outer.check == 0xffff));
        assert_eq!(events.len(), mangled.len());
        events.iter().for_each(is_the_bug);
        assert!(events.iter().any(names_the_rule), "{events:#?}");
        // Sent again after a second, a SYN has no mark any more, and the same fate.
        assert!(events.iter().any(|event| event.mark & MASQUERADE_MARK != 0), "{events:#?}");
        let lost = events.len() as u64;
        assert_eq!(counters::udp(&lab.b, Family::V4)?.in_csum_errors, lost);
        assert_eq!(summary.interface()?.packets("mangled_zero"), lost);
        assert_eq!(summary.interface()?.broken(), lost);
    }
    Ok(())
}

/// A connection that is there when the rules come sends its window in GSO packets.
#[test]
#[ignore = "needs a kernel with the bug: cargo xtask vm original-bug"]
fn gso_packets_are_mangled_and_told_as_well() -> Result<()> {
    for nic_offload in [false, true] {
        let lab = lab(Nat::None, nic_offload)?;
        let tcp = TcpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
        let mut stream = lab.a.enter(|| Ok(TcpStream::connect(tcp.address())?))?;
        lab.enable_nat(EVERY_PACKET)?;
        let capture = Capture::start(&lab.b, NIC, Direction::In)?;
        let vxcsum = Daemon::start(&lab.a, NIC, [""; 0])?;
        // No more than the socket takes while nothing is confirmed.
        stream.write_all(&vec![0x5a; 30_000])?;
        vxcsum.wait_events(1, PLENTY)?;
        let (events, summary) = vxcsum.stop()?;
        lab.disable_nat()?;
        let received = sent_by_a(&lab, &capture.stop()?)?;
        events.iter().for_each(is_the_bug);
        assert!(events.iter().any(Event::is_gso), "{events:#?}");
        let segments: u64 = events.iter().map(|event| u64::from(event.segments.unwrap_or(1))).sum();
        assert_eq!(summary.interface()?.packets("mangled_zero"), segments);
        frames_of(&lab, &events, &received)?;
    }
    Ok(())
}

#[test]
#[ignore = "needs a kernel with the bug: cargo xtask vm original-bug"]
fn fix_zero_cures() -> Result<()> {
    is_cured("zero", "zeroed")
}

/// What the device should have sent is zero.
#[test]
#[ignore = "needs a kernel with the bug: cargo xtask vm original-bug"]
fn fix_restore_cures() -> Result<()> {
    is_cured("restore", "restored")
}

fn is_cured(fix: &str, action: &str) -> Result<()> {
    for nic_offload in [false, true] {
        let lab = lab(EVERY_PACKET, nic_offload)?;
        let tcp = TcpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
        assert_eq!(traffic::try_connect(&lab.a, tcp.address(), STALL)?, None, "no bug to cure");
        let capture = Capture::start(&lab.b, NIC, Direction::In)?;
        let vxcsum = Daemon::start(&lab.a, NIC, ["--fix", fix])?;
        let before = counters::udp(&lab.b, Family::V4)?.in_csum_errors;
        traffic::connect(&lab.a, tcp.address(), PLENTY)?;
        traffic::send_bulk(&lab.a, tcp.address(), 300_000, PLENTY)?;
        counters::wait_quiet(&lab.a, NIC)?;
        let (events, summary) = vxcsum.stop()?;
        assert_eq!(counters::udp(&lab.b, Family::V4)?.in_csum_errors, before);
        let received = sent_by_a(&lab, &capture.stop()?)?;
        assert!(received.iter().all(|frame| frame.outer.check == 0));
        assert!(received.iter().flat_map(|frame| &frame.inner).all(Transport::is_right));
        events.iter().for_each(is_the_bug);
        assert!(events.iter().all(|event| event.action == action), "{events:#?}");
        assert!(events.iter().any(Event::is_gso), "{events:#?}");
        let interface = summary.interface()?;
        let least = if counts_segments() { 100 } else { 5 };
        assert!(interface.fixed > least, "{interface:?}");
        assert_eq!(interface.packets("mangled_zero"), interface.fixed);
    }
    Ok(())
}

/// The whole story of the first reports: with the tunnel's port pinned, the retransmissions share
/// the fate of the first SYN for a minute.
#[test]
#[ignore = "needs a kernel with the bug: cargo xtask vm original-bug"]
fn a_connection_takes_a_minute_and_with_a_fix_no_time() -> Result<()> {
    let config = LabConfig {
        outer_sum: OuterSum::Zero,
        nat: Nat::KubeProxy,
        srcport: Some((40000, 40001)),
        ..LabConfig::default()
    };
    let lab = config.clone().start()?;
    let tcp = TcpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
    let took = traffic::connect(&lab.a, tcp.address(), SEVEN_SYNS)?;
    assert!(took > SIX_SYNS, "{took:?}");
    assert_eq!(counters::udp(&lab.b, Family::V4)?.in_csum_errors, 6);
    drop((tcp, lab));

    for fix in ["zero", "restore"] {
        let lab = config.clone().start()?;
        let tcp = TcpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
        let vxcsum = Daemon::start(&lab.a, NIC, ["--fix", fix])?;
        let took = traffic::connect(&lab.a, tcp.address(), PLENTY)?;
        // The first SYN has passed, or it would have been more than a second.
        assert!(took < Duration::from_secs(1), "{took:?} with {fix}");
        assert_eq!(counters::udp(&lab.b, Family::V4)?.in_csum_errors, 0);
        let (events, _) = vxcsum.stop()?;
        events.iter().for_each(is_the_bug);
        assert!(!events.is_empty());
    }
    Ok(())
}
