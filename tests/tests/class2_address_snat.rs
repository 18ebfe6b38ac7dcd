//! Class 2 where NAT rewrites the outer source address: the kernel folds the new address into the
//! stale sum with the wrong sign.

use std::time::Duration;

use anyhow::Result;
use vxcsum_tests::capture::{Capture, Direction};
use vxcsum_tests::counters;
use vxcsum_tests::daemon::Daemon;
use vxcsum_tests::evidence::{check_ports_before_nat, frames_of, sent_by_a};
use vxcsum_tests::lab::{Family, LabConfig, NIC, Nat};
use vxcsum_tests::traffic::{self, TcpServer, UdpServer};

const STALL: Duration = Duration::from_millis(700);
const PLENTY: Duration = Duration::from_secs(5);
const LOST: Duration = Duration::from_millis(50);

#[test]
fn is_explained_and_restored_over_ipv4() -> Result<()> {
    is_explained_and_restored(Family::V4)
}

#[test]
fn is_explained_and_restored_over_ipv6() -> Result<()> {
    is_explained_and_restored(Family::V6)
}

fn is_explained_and_restored(outer: Family) -> Result<()> {
    let lab = LabConfig { outer, nat: Nat::Snat, ..LabConfig::default() }.start()?;
    let tcp = TcpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
    let udp = UdpServer::start(&lab.b, (lab.inner_b(), 0).into())?;

    let capture = Capture::start(&lab.b, NIC, Direction::In)?;
    let vxcsum = Daemon::start(&lab.a, NIC, [""; 0])?;
    assert_eq!(traffic::try_connect(&lab.a, tcp.address(), STALL)?, None);
    for _ in 0..3 {
        assert!(traffic::udp_request(&lab.a, udp.address(), b"question", LOST).is_err());
    }
    // Echo requests come with their own sum complete: the outer one is still open, and survives.
    traffic::ping(&lab.a, lab.inner_b(), 56, PLENTY)?;
    vxcsum.wait_events(4, PLENTY)?;
    let (events, summary) = vxcsum.stop()?;
    let received = sent_by_a(&lab, &capture.stop()?)?;
    for (event, frame) in events.iter().zip(frames_of(&lab, &events, &received)?) {
        assert_eq!(event.verdict, "stale_nat", "{event:#?}");
        assert_eq!(event.outer.src, lab.snat_address());
        assert_eq!(event.check, frame.outer.check, "{event:#?}");
        assert_eq!(event.expected, Some(frame.outer.expected), "{event:#?}");
    }
    check_ports_before_nat(&lab, &events)?;
    let lost = events.len() as u64;
    assert_eq!(received.iter().filter(|frame| !frame.outer.is_right()).count() as u64, lost);
    assert_eq!(counters::udp(&lab.b, outer)?.in_csum_errors, lost);
    assert_eq!(summary.interface()?.broken(), lost);
    assert_eq!(summary.interface()?.packets("offload_pending"), 1);

    let capture = Capture::start(&lab.b, NIC, Direction::In)?;
    let vxcsum = Daemon::start(&lab.a, NIC, ["--fix", "restore"])?;
    let took = traffic::connect(&lab.a, tcp.address(), PLENTY)?;
    assert!(took < STALL, "{took:?}");
    traffic::send_bulk(&lab.a, tcp.address(), 300_000, PLENTY)?;
    traffic::udp_request(&lab.a, udp.address(), b"question", PLENTY)?;
    counters::wait_quiet(&lab.a, NIC)?;
    let (events, summary) = vxcsum.stop()?;
    let received = sent_by_a(&lab, &capture.stop()?)?;
    assert!(received.iter().all(|frame| frame.outer.is_right() && frame.outer.check != 0));
    frames_of(&lab, &events, &received)?;
    assert!(events.iter().all(|event| event.action == "restored"), "{events:#?}");
    assert_eq!(summary.interface()?.fixed, events.len() as u64);
    assert_eq!(counters::udp(&lab.b, outer)?.in_csum_errors, lost);
    Ok(())
}
