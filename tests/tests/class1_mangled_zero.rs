//! Class 1: a device that sends no checksums, and something that turns the zero into 0xffff.
//! Kernels of today do not do that any more; the rule in the lab writes the same bytes.

use std::io::Write as _;
use std::net::TcpStream;
use std::time::Duration;

use anyhow::Result;
use vxcsum_tests::capture::{Capture, Direction};
use vxcsum_tests::counters;
use vxcsum_tests::daemon::{Daemon, Event, counts_segments};
use vxcsum_tests::evidence::{frames_of, sent_by_a};
use vxcsum_tests::lab::{Family, Lab, LabConfig, NIC, Nat, OuterSum};
use vxcsum_tests::oracle::Transport;
use vxcsum_tests::traffic::{self, TcpServer, UdpServer};

const STALL: Duration = Duration::from_millis(700);
const PLENTY: Duration = Duration::from_secs(5);
const LOST: Duration = Duration::from_millis(50);

fn lab(outer: Family) -> Result<Lab> {
    let outer_sum = OuterSum::Zero;
    LabConfig { outer, outer_sum, accept_zero_v6: true, ..LabConfig::default() }.start()
}

#[test]
fn single_packets_are_seen_over_ipv4() -> Result<()> {
    single_packets_are_seen(Family::V4)
}

#[test]
fn single_packets_are_seen_over_ipv6() -> Result<()> {
    single_packets_are_seen(Family::V6)
}

fn single_packets_are_seen(outer: Family) -> Result<()> {
    let lab = lab(outer)?;
    lab.enable_nat(Nat::ZeroMangle)?;
    let tcp = TcpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
    let udp = UdpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
    let capture = Capture::start(&lab.b, NIC, Direction::In)?;
    let vxcsum = Daemon::start(&lab.a, NIC, [""; 0])?;
    assert_eq!(traffic::try_connect(&lab.a, tcp.address(), STALL)?, None);
    assert!(traffic::udp_request(&lab.a, udp.address(), b"question", LOST).is_err());
    assert!(traffic::ping(&lab.a, lab.inner_b(), 56, LOST).is_err());
    vxcsum.wait_events(3, PLENTY)?;
    let (events, summary) = vxcsum.stop()?;
    let received = sent_by_a(&lab, &capture.stop()?)?;
    assert_eq!(events.len(), received.len());
    for event in &events {
        assert_eq!((event.verdict.as_str(), event.check), ("mangled_zero", 0xffff), "{event:#?}");
        assert_eq!(event.action, "none");
    }
    assert!(received.iter().all(|frame| frame.outer.check == 0xffff));
    let lost = events.len() as u64;
    assert_eq!(counters::udp(&lab.b, outer)?.in_csum_errors, lost);
    assert_eq!(summary.interface()?.packets("mangled_zero"), lost);
    assert_eq!(summary.interface()?.broken(), lost);
    Ok(())
}

/// A connection that is there when the trouble begins sends its window in GSO packets.
#[test]
fn gso_packets_are_counted_by_segment() -> Result<()> {
    let lab = lab(Family::V4)?;
    let tcp = TcpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
    let mut stream = lab.a.enter(|| Ok(TcpStream::connect(tcp.address())?))?;
    lab.enable_nat(Nat::ZeroMangle)?;
    let capture = Capture::start(&lab.b, NIC, Direction::In)?;
    let vxcsum = Daemon::start(&lab.a, NIC, [""; 0])?;
    // No more than the socket takes while nothing is confirmed.
    stream.write_all(&vec![0x5a; 30_000])?;
    vxcsum.wait_events(1, PLENTY)?;
    // A tail loss probe may follow: everything is compared after all of it has stopped.
    let (events, summary) = vxcsum.stop()?;
    lab.disable_nat()?;
    let received = sent_by_a(&lab, &capture.stop()?)?;
    let segments: u64 = events.iter().map(|event| u64::from(event.segments.unwrap_or(1))).sum();
    assert!(events.iter().any(Event::is_gso), "{events:#?}");
    assert!(events.iter().all(|event| event.verdict == "mangled_zero"), "{events:#?}");
    assert_eq!(summary.interface()?.packets("mangled_zero"), segments);
    assert!(received.len() as u64 >= segments, "{} frames, {segments} segments", received.len());
    frames_of(&lab, &events, &received)?;
    Ok(())
}

#[test]
fn fix_zero_cures_over_ipv4() -> Result<()> {
    is_cured(Family::V4, "zero", "zeroed")
}

/// What the device should have sent is zero.
#[test]
fn fix_restore_cures_over_ipv4() -> Result<()> {
    is_cured(Family::V4, "restore", "restored")
}

/// A device that sends zero over IPv6 has a receiver that takes it.
#[test]
fn fix_restore_cures_over_ipv6() -> Result<()> {
    is_cured(Family::V6, "restore", "restored")
}

fn is_cured(outer: Family, fix: &str, action: &str) -> Result<()> {
    let lab = lab(outer)?;
    lab.enable_nat(Nat::ZeroMangle)?;
    let tcp = TcpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
    let capture = Capture::start(&lab.b, NIC, Direction::In)?;
    let vxcsum = Daemon::start(&lab.a, NIC, ["--fix", fix])?;
    let took = traffic::connect(&lab.a, tcp.address(), PLENTY)?;
    // A lost SYN would be sent again after a second.
    assert!(took < Duration::from_secs(1), "{took:?}");
    traffic::send_bulk(&lab.a, tcp.address(), 300_000, PLENTY)?;
    traffic::ping(&lab.a, lab.inner_b(), 3000, PLENTY)?;
    counters::wait_quiet(&lab.a, NIC)?;
    let (events, summary) = vxcsum.stop()?;
    let received = sent_by_a(&lab, &capture.stop()?)?;
    assert!(received.len() > 200, "{} frames", received.len());
    assert!(received.iter().all(|frame| frame.outer.check == 0));
    assert!(received.iter().flat_map(|frame| &frame.inner).all(Transport::is_right));
    assert_eq!(counters::udp(&lab.b, outer)?.in_csum_errors, 0);
    assert!(events.iter().all(|event| event.action == action), "{events:#?}");
    assert!(events.iter().any(Event::is_gso), "{events:#?}");
    let interface = summary.interface()?;
    let sent = if counts_segments() { received.len() } else { events.len() };
    assert_eq!(interface.fixed, sent as u64);
    assert_eq!(interface.packets("mangled_zero"), sent as u64);
    Ok(())
}

#[test]
fn fix_zero_is_refused_over_ipv6() -> Result<()> {
    let lab = lab(Family::V6)?;
    lab.enable_nat(Nat::ZeroMangle)?;
    let capture = Capture::start(&lab.b, NIC, Direction::In)?;
    let vxcsum = Daemon::start(&lab.a, NIC, ["--fix", "zero"])?;
    assert!(traffic::ping(&lab.a, lab.inner_b(), 56, LOST).is_err());
    let (events, summary) = vxcsum.stop()?;
    let received = sent_by_a(&lab, &capture.stop()?)?;
    assert_eq!(events.len(), 1);
    assert!(events[0].action.starts_with("refused:"), "{events:#?}");
    assert!(received.iter().all(|frame| frame.outer.check == 0xffff));
    assert_eq!(summary.interface()?.fixed, 0);
    Ok(())
}
