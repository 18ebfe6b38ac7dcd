//! Class 2: NAT rewrites the outer source port, but not the outer sum. The real bug of this kernel.

use std::time::Duration;

use anyhow::Result;
use vxcsum_tests::capture::{Capture, Direction};
use vxcsum_tests::counters;
use vxcsum_tests::daemon::{Daemon, counts_segments};
use vxcsum_tests::evidence::{check_ports_before_nat, frames_of, sent_by_a};
use vxcsum_tests::lab::{Family, Lab, LabConfig, MASQUERADE_MARK, NIC, Nat, PodSums, VXLAN};
use vxcsum_tests::traffic::{self, TcpServer, UdpServer};

/// A healthy connect takes a few milliseconds; a lost SYN is sent again after a second.
const STALL: Duration = Duration::from_millis(700);
const PLENTY: Duration = Duration::from_secs(5);
/// Long enough for an answer, if there were one.
const LOST: Duration = Duration::from_millis(50);

fn lab(outer: Family) -> Result<Lab> {
    let nat = Nat::Masquerade { random_fully: true };
    LabConfig { outer, nat, pod: Some(PodSums::Open), ..LabConfig::default() }.start()
}

#[test]
fn each_lost_packet_is_explained_over_ipv4() -> Result<()> {
    each_lost_packet_is_explained(Family::V4)
}

#[test]
fn each_lost_packet_is_explained_over_ipv6() -> Result<()> {
    each_lost_packet_is_explained(Family::V6)
}

fn each_lost_packet_is_explained(outer: Family) -> Result<()> {
    let lab = lab(outer)?;
    let tcp = TcpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
    let udp = UdpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
    let before = counters::udp(&lab.b, outer)?;
    let capture = Capture::start(&lab.b, NIC, Direction::In)?;
    let vxcsum = Daemon::start(&lab.a, NIC, [""; 0])?;

    assert_eq!(traffic::try_connect(&lab.a, tcp.address(), STALL)?, None);
    for from in [Some(&lab.a), Some(&lab.a), lab.pod()].into_iter().flatten() {
        assert!(traffic::udp_request(from, udp.address(), &traffic::dns_query(), LOST).is_err());
    }

    vxcsum.wait_events(4, PLENTY)?;
    let (events, summary) = vxcsum.stop()?;
    let received = sent_by_a(&lab, &capture.stop()?)?;
    let frames = frames_of(&lab, &events, &received)?;
    for (event, frame) in events.iter().zip(&frames) {
        assert_eq!(event.verdict, "stale_nat", "{event:#?}");
        assert_eq!(event.action, "none");
        assert_eq!(event.check, frame.outer.check, "{event:#?}");
        assert_eq!(event.expected, Some(frame.outer.expected), "{event:#?}");
        assert_eq!((event.interface.as_str(), event.device.as_deref()), (NIC, Some(VXLAN)));
        assert_eq!(event.mark, MASQUERADE_MARK);
        assert_eq!(event.segments, Some(1));
    }
    check_ports_before_nat(&lab, &events)?;
    let syn = events.iter().find(|event| event.inner.proto == "tcp");
    assert_eq!(syn.and_then(|event| event.inner.tcp_flags.as_deref()), Some("S"));

    let lost = events.len() as u64;
    assert_eq!(received.iter().filter(|frame| !frame.outer.is_right()).count() as u64, lost);
    let after = counters::udp(&lab.b, outer)?;
    assert_eq!(after.in_csum_errors - before.in_csum_errors, lost);
    assert_eq!(after.in_errors - before.in_errors, lost);
    assert_eq!(counters::port_drops(&lab.b, outer, lab.config.dstport)?, lost);
    let interface = summary.interface()?;
    assert_eq!((interface.packets("stale_nat"), interface.broken()), (lost, lost));
    assert_eq!((summary.fix.as_str(), interface.fixed), ("off", 0));
    assert_eq!(summary.events.emitted, lost);
    assert_eq!((summary.events.suppressed, summary.events.lost), (0, 0));
    Ok(())
}

#[test]
fn fix_zero_cures_over_ipv4() -> Result<()> {
    is_cured(Family::V4, "zero", "zeroed")
}

#[test]
fn fix_restore_cures_over_ipv4() -> Result<()> {
    is_cured(Family::V4, "restore", "restored")
}

#[test]
fn fix_restore_cures_over_ipv6() -> Result<()> {
    is_cured(Family::V6, "restore", "restored")
}

fn is_cured(outer: Family, fix: &str, action: &str) -> Result<()> {
    let lab = lab(outer)?;
    let tcp = TcpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
    let udp = UdpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
    let before = counters::udp(&lab.b, outer)?;
    let capture = Capture::start(&lab.b, NIC, Direction::In)?;
    let vxcsum = Daemon::start(&lab.a, NIC, ["--fix", fix])?;

    for from in [Some(&lab.a), lab.pod()].into_iter().flatten() {
        let took = traffic::connect(from, tcp.address(), PLENTY)?;
        assert!(took < STALL, "{took:?}");
        traffic::send_bulk(from, tcp.address(), 300_000, PLENTY)?;
        traffic::send_small(from, tcp.address(), 10, 100, PLENTY)?;
        traffic::udp_request(from, udp.address(), &traffic::dns_query(), PLENTY)?;
    }
    counters::wait_quiet(&lab.a, NIC)?;

    let (events, summary) = vxcsum.stop()?;
    assert_eq!(counters::udp(&lab.b, outer)?.in_csum_errors, before.in_csum_errors);
    let received = sent_by_a(&lab, &capture.stop()?)?;
    assert!(received.iter().all(|frame| frame.outer.is_right()));
    frames_of(&lab, &events, &received)?;
    check_ports_before_nat(&lab, &events)?;
    assert!(events.iter().all(|event| event.action == action), "{events:#?}");
    assert!(events.len() >= 20, "{} events", events.len());
    let interface = summary.interface()?;
    assert_eq!(interface.fixed, events.len() as u64);
    assert_eq!(interface.packets("stale_nat"), interface.fixed);
    assert_eq!(interface.broken(), interface.fixed);
    // The bulk went in GSO packets, which NAT leaves right and nothing may touch.
    let least = if counts_segments() { 100 } else { 10 };
    assert!(interface.packets("offload_pending") > least, "{interface:?}");
    Ok(())
}

#[test]
fn fix_zero_is_refused_over_ipv6_and_writes_nothing() -> Result<()> {
    let lab = lab(Family::V6)?;
    let tcp = TcpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
    let capture = Capture::start(&lab.b, NIC, Direction::In)?;
    let vxcsum = Daemon::start(&lab.a, NIC, ["--fix", "zero"])?;
    assert_eq!(traffic::try_connect(&lab.a, tcp.address(), STALL)?, None);
    let (events, summary) = vxcsum.stop()?;
    let received = sent_by_a(&lab, &capture.stop()?)?;
    let frames = frames_of(&lab, &events, &received)?;
    assert!(!events.is_empty());
    for (event, frame) in events.iter().zip(&frames) {
        assert!(event.action.starts_with("refused:"), "{event:#?}");
        assert_eq!(event.check, frame.outer.check, "{event:#?}");
    }
    assert_eq!(summary.interface()?.fixed, 0);
    Ok(())
}
