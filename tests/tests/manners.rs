//! Beside others on the same interface, and again and again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use aya::programs::{SchedClassifier, TcAttachType};
use nix::sys::signal::Signal;
use vxcsum_tests::client::Socket;
use vxcsum_tests::counters;
use vxcsum_tests::foreign::{ForeignProgram, Place, Says, add_filter, filters};
use vxcsum_tests::lab::{Lab, LabConfig, NIC};
use vxcsum_tests::netns::NetNs;
use vxcsum_tests::storm::{Packet, SOURCE_PORTS};
use vxcsum_tests::traffic::{TcpServer, ping, send_bulk, send_frames};
use vxcsum_tests::wait::wait_until;

const PLENTY: Duration = Duration::from_secs(5);
/// Long enough for an answer, if there were one.
const LOST: Duration = Duration::from_millis(50);
/// The names of our program and of our filter.
const OURS: &str = "vxcsum_egress";

fn lab() -> Result<Lab> {
    LabConfig { srcport: Some(SOURCE_PORTS), ..LabConfig::default() }.start()
}

/// Names of the TCX programs on the egress of the NIC, in the order in which they run.
fn programs(ns: &NetNs) -> Result<Vec<String>> {
    let name = |info: &aya::programs::ProgramInfo| {
        info.name_as_str().filter(|name| !name.is_empty()).unwrap_or("foreign").to_owned()
    };
    ns.enter(|| {
        let (_, programs) = SchedClassifier::query_tcx(NIC, TcAttachType::Egress)?;
        Ok(programs.iter().map(name).collect())
    })
}

fn is_reachable(lab: &Lab) -> bool {
    ping(&lab.a, lab.inner_b(), 56, LOST).is_ok()
}

/// Sends a broken packet that somebody behind ours will drop, which the sender is told.
fn send_to_be_dropped(lab: &Lab) -> Result<()> {
    let sent = send_frames(&lab.a, NIC, &[Packet::stale().frame()?]);
    ensure!(sent.is_err(), "nobody has dropped it");
    Ok(())
}

/// How many filters of ours there are.
fn our_filters(lab: &Lab) -> Result<usize> {
    Ok(filters(&lab.a, NIC)?.lines().filter(|line| line.contains(OURS)).count())
}

fn skbs(socket: &Socket) -> Result<u64> {
    Ok(socket.status()?.interface()?.skbs)
}

/// Ours is the first, whoever came first; those behind run, as one shows that drops everything; and
/// they are there still when ours has gone.
#[test]
fn beside_a_foreign_tcx_program() -> Result<()> {
    for came_first in [true, false] {
        let lab = lab()?;
        let attach = || ForeignProgram::attach(&lab.a, NIC, Says::Drop, Place::Last);
        let socket = Socket::new()?;
        let early = came_first.then(attach).transpose()?;
        let daemon = socket.run(&lab.a, ["--attach", "tcx"])?;
        let late = (!came_first).then(attach).transpose()?;
        assert_eq!(programs(&lab.a)?, [OURS, "foreign"]);

        let before = counters::device(&lab.a, NIC)?;
        let seen = skbs(&socket)?;
        send_to_be_dropped(&lab)?;
        daemon.wait_events(1, PLENTY)?;
        assert!(!is_reachable(&lab));
        assert_eq!(counters::device(&lab.a, NIC)?.tx_packets, before.tx_packets);
        assert!(skbs(&socket)? >= seen + 2);
        daemon.stop()?;
        assert_eq!(programs(&lab.a)?, ["foreign"]);
        assert!(!is_reachable(&lab));
        drop((early, late));
        assert!(is_reachable(&lab));
    }
    Ok(())
}

/// A program before ours that lets packets out starves it: it counts nothing while the NIC does.
#[test]
fn starved_by_a_foreign_tcx_program() -> Result<()> {
    let lab = lab()?;
    let socket = Socket::new()?;
    let daemon = socket.run(&lab.a, ["--attach", "tcx"])?;
    assert!(is_reachable(&lab));
    let foreign = ForeignProgram::attach(&lab.a, NIC, Says::Pass, Place::First)?;
    assert_eq!(programs(&lab.a)?, ["foreign", OURS]);
    let (seen, before) = (skbs(&socket)?, counters::device(&lab.a, NIC)?.tx_packets);
    assert!(is_reachable(&lab));
    let status = socket.status()?;
    assert_eq!(
        (status.interface()?.skbs, status.interface()?.attach.as_deref()),
        (seen, Some("tcx"))
    );
    assert!(counters::device(&lab.a, NIC)?.tx_packets > before);
    // One that has no opinion starves nobody.
    drop(foreign);
    let _foreign = ForeignProgram::attach(&lab.a, NIC, Says::Next, Place::First)?;
    assert!(is_reachable(&lab));
    assert!(skbs(&socket)? > seen);
    daemon.stop()?;
    Ok(())
}

/// Of another priority and of ours, from before and from after; by either method of our own.
#[test]
fn beside_foreign_clsact_filters() -> Result<()> {
    for method in ["tcx", "clsact"] {
        let lab = lab()?;
        lab.a.run(&format!("tc qdisc add dev {NIC} clsact"))?;
        add_filter(&lab.a, NIC, 7, Says::Next)?;
        add_filter(&lab.a, NIC, 1, Says::Next)?;
        let foreign = filters(&lab.a, NIC)?;
        let socket = Socket::new()?;
        let daemon = socket.run(&lab.a, ["--attach", method])?;
        assert_eq!(our_filters(&lab)?, usize::from(method == "clsact"));
        send_frames(&lab.a, NIC, &[Packet::stale().frame()?])?;
        daemon.wait_events(1, PLENTY)?;
        assert!(is_reachable(&lab), "{}", filters(&lab.a, NIC)?);

        // The ones behind ours do run.
        add_filter(&lab.a, NIC, 9, Says::Drop)?;
        let before = counters::device(&lab.a, NIC)?.tx_packets;
        send_to_be_dropped(&lab)?;
        daemon.wait_events(2, PLENTY)?;
        assert_eq!(counters::device(&lab.a, NIC)?.tx_packets, before);
        lab.a.run(&format!("tc filter del dev {NIC} egress prio 9"))?;
        daemon.stop()?;
        assert_eq!(filters(&lab.a, NIC)?, foreign);
        assert!(lab.a.run(&format!("tc qdisc show dev {NIC}"))?.contains("clsact"));
    }
    Ok(())
}

/// The next start removes what a kill has left, however it attaches itself, and nothing else.
#[test]
fn stale_clsact_filter() -> Result<()> {
    for (qdisc_is_ours, next) in
        [(true, "tcx"), (true, "clsact"), (false, "auto"), (false, "clsact")]
    {
        let lab = lab()?;
        if !qdisc_is_ours {
            lab.a.run(&format!("tc qdisc add dev {NIC} clsact"))?;
            add_filter(&lab.a, NIC, 1, Says::Next)?;
            add_filter(&lab.a, NIC, 2, Says::Next)?;
        }
        let foreign = filters(&lab.a, NIC)?;
        let socket = Socket::new()?;
        socket.run(&lab.a, ["--attach", "clsact"])?.kill()?;
        assert_eq!(our_filters(&lab)?, 1);
        let daemon = socket.run(&lab.a, ["--attach", next])?;
        let expected = usize::from(next == "clsact");
        assert_eq!(our_filters(&lab)?, expected);
        // It is counted once.
        send_frames(&lab.a, NIC, &[Packet::stale().frame()?])?;
        daemon.wait_events(1, PLENTY)?;
        assert_eq!(socket.status()?.interface()?.broken(), 1);
        daemon.stop()?;
        assert_eq!(filters(&lab.a, NIC)?, foreign);
        assert!(lab.a.run(&format!("tc qdisc show dev {NIC}"))?.contains("clsact"));
    }
    Ok(())
}

#[test]
fn second_instance_is_refused_and_told_of_the_first() -> Result<()> {
    let lab = lab()?;
    let (first, second) = (Socket::new()?, Socket::new()?);
    for attach in ["tcx", "clsact"] {
        let daemon = first.run(&lab.a, ["--attach", attach])?;
        let pid = format!("process {}", daemon.pid());
        let before = (programs(&lab.a)?, filters(&lab.a, NIC)?);
        for args in [&[] as &[&str], &["--interface", NIC], &["--attach", "clsact"]] {
            let ended = second.launch(&lab.a, args)?.wait_end(PLENTY)?;
            assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""), "{ended:?}");
            assert_eq!(ended.stderr.lines().count(), 1, "{ended:?}");
            for part in [NIC, &pid, "already"] {
                assert!(ended.stderr.contains(part), "{part:?} is not in {ended:?}");
            }
            assert!(!second.path().exists(), "it leaves its socket");
        }
        assert_eq!((programs(&lab.a)?, filters(&lab.a, NIC)?), before);
        daemon.stop()?;
    }
    Ok(())
}

#[test]
fn restarts_under_traffic_by_tcx() -> Result<()> {
    restarts_under_traffic("tcx")
}

#[test]
fn restarts_under_traffic_by_clsact() -> Result<()> {
    restarts_under_traffic("clsact")
}

fn restarts_under_traffic(attach: &str) -> Result<()> {
    // By both methods together, 200.
    const RESTARTS: usize = 100;
    let lab = lab()?;
    lab.a.run(&format!("tc qdisc add dev {NIC} clsact"))?;
    add_filter(&lab.a, NIC, 7, Says::Next)?;
    let foreign = filters(&lab.a, NIC)?;
    let server = TcpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
    let socket = Socket::new()?;
    let done = AtomicBool::new(false);
    let mut gaps = thread::scope(|scope| -> Result<Vec<Duration>> {
        let traffic = scope.spawn(|| -> Result<usize> {
            let mut rounds = 0;
            while !done.load(Ordering::Relaxed) {
                send_bulk(&lab.a, server.address(), 100_000, PLENTY)?;
                rounds += 1;
            }
            Ok(rounds)
        });
        let restarting = restart(&lab, &socket, attach, RESTARTS);
        done.store(true, Ordering::Relaxed);
        let rounds = traffic.join().map_err(|_| anyhow!("the traffic panicked"))??;
        ensure!(rounds > RESTARTS, "only {rounds} connections");
        restarting
    })?;
    assert_eq!(programs(&lab.a)?, [""; 0]);
    assert_eq!(filters(&lab.a, NIC)?, foreign);
    assert_eq!(counters::udp(&lab.b, lab.config.outer)?.in_csum_errors, 0);
    assert!(!socket.path().exists());
    gaps.sort();
    println!("not watched for {gaps:?}");
    // Of a debug build on two cores that have traffic to carry; 200 ms are promised.
    assert!(gaps[RESTARTS / 2] < Duration::from_millis(400), "{gaps:?}");
    assert!(gaps[RESTARTS - 1] < Duration::from_secs(2), "{gaps:?}");
    Ok(())
}

/// Starts and ends it over and over. Returns how long the NIC was not watched each time.
fn restart(lab: &Lab, socket: &Socket, attach: &str, times: usize) -> Result<Vec<Duration>> {
    let mut gaps = Vec::new();
    let mut daemon = socket.run(&lab.a, ["--attach", attach, "--quiet"])?;
    for number in 0..times {
        wait_until("it counts", PLENTY, || Ok(skbs(socket)? > 0))?;
        let signal = if number % 2 == 0 { Signal::SIGTERM } else { Signal::SIGKILL };
        daemon.signal(signal)?;
        let start = Instant::now();
        let ended = daemon.wait_end(PLENTY)?;
        let code = (signal == Signal::SIGTERM).then_some(0);
        ensure!(ended.code == code, "by {signal}: {ended:?}");
        daemon = socket.launch(&lab.a, ["--attach", attach, "--quiet"])?;
        daemon.wait_watching()?;
        gaps.push(start.elapsed());
        wait_until("it answers", PLENTY, || Ok(socket.status().is_ok()))?;
    }
    daemon.stop()?;
    Ok(gaps)
}
