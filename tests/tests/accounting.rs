//! Every packet is counted once, every broken one is accounted for, at any instant and whatever the
//! load.

use std::collections::BTreeMap;
use std::slice;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use vxcsum_tests::client::Socket;
use vxcsum_tests::counters;
use vxcsum_tests::daemon::Summary;
use vxcsum_tests::held::cpu_ticks;
use vxcsum_tests::lab::{Lab, LabConfig, NIC};
use vxcsum_tests::packets::Check;
use vxcsum_tests::storm::{Packet, SOURCE_PORTS, Storm, other_frame};
use vxcsum_tests::traffic::send_frames;
use vxcsum_tests::wait::wait_until;

const STORM: Duration = Duration::from_secs(2);
/// A storm goes on until it has been looked at so often: under emulation a look takes long.
const LOOKS: usize = 10;
const PATIENCE: Duration = Duration::from_mins(2);
const PLENTY: Duration = Duration::from_secs(5);
const THREADS: usize = 2;

fn lab() -> Result<Lab> {
    LabConfig { srcport: Some(SOURCE_PORTS), ..LabConfig::default() }.start()
}

/// Broken in both ways that a summing device has, right, without a sum, and not VXLAN.
fn all_kinds() -> Result<Vec<Vec<u8>>> {
    let mut frames = vec![other_frame()?];
    for check in [Check::Right, Check::Value(0xffff), Check::Zero] {
        frames.push(Packet::new(check).frame()?);
    }
    frames.push(Packet::stale().frame()?);
    frames.push(Packet { inner_sport: 7001, ..Packet::stale() }.frame()?);
    Ok(frames)
}

/// No packet here is more than one on the wire, so packets are skbs.
fn check_identities(status: &Summary) -> Result<()> {
    let interface = status.interface()?;
    let events = status.events;
    ensure!(
        interface.broken() == events.emitted + events.suppressed + events.lost,
        "{} broken: {status:#?}",
        interface.broken()
    );
    ensure!(
        interface.skbs == interface.vxlan().packets + interface.not_vxlan,
        "{} skbs: {status:#?}",
        interface.skbs
    );
    Ok(())
}

#[test]
fn exact_in_a_storm_by_tcx() -> Result<()> {
    exact_in_a_storm("tcx", 1000)
}

#[test]
fn exact_in_a_storm_by_clsact() -> Result<()> {
    exact_in_a_storm("clsact", 200)
}

fn exact_in_a_storm(attach: &str, events_per_second: u64) -> Result<()> {
    let lab = lab()?;
    let socket = Socket::new()?;
    counters::wait_quiet(&lab.a, NIC)?;
    let before = counters::device(&lab.a, NIC)?;
    let rate = events_per_second.to_string();
    let daemon = socket.run(&lab.a, ["--attach", attach, "--events-per-second", &rate])?;
    let tail = socket.tail(["--json"])?;

    let start = Instant::now();
    let storm = Storm::start(&lab.a, NIC, &all_kinds()?, THREADS)?;
    let mut looks = 0;
    let mut skbs = 0;
    while start.elapsed() < STORM || looks <= LOOKS {
        ensure!(start.elapsed() < PATIENCE, "only {looks} looks");
        let status = socket.status()?;
        check_identities(&status)?;
        // It is the storm that is looked at, not the calm before.
        looks += usize::from(status.interface()?.skbs > skbs);
        skbs = status.interface()?.skbs;
    }
    let json = socket.status_json()?;
    check_identities(&serde_json::from_value(json)?)?;
    let sent = storm.stop()?;
    let took = start.elapsed();

    let status = socket.status()?;
    check_identities(&status)?;
    let interface = status.interface()?;
    assert_eq!(interface.skbs, counters::device(&lab.a, NIC)?.left_since(&before));
    assert_eq!(interface.skbs, sent, "nothing else was to be sent");
    // A sixth of what all threads have sent in whole rounds.
    let sixth = sent / 6;
    assert_eq!((sent % 6, interface.not_vxlan), (0, sixth));
    for (verdict, packets) in
        [("valid", sixth), ("bad", sixth), ("missing", sixth), ("stale_nat", 2 * sixth)]
    {
        assert_eq!(interface.packets(verdict), packets, "{verdict} of {sent}: {interface:#?}");
    }
    ensure!(sent > 20_000, "{sent} packets are no storm");
    ensure!(status.events.suppressed > status.events.emitted, "{:?}", status.events);

    // All that was emitted reaches readers; and it is no more than the limit allows.
    let emitted = status.events.emitted;
    tail.wait_events(emitted as usize, PLENTY)?;
    let (events, summary) = daemon.stop()?;
    assert_eq!((events.len() as u64, summary.events), (emitted, status.events));
    assert_eq!(tail.events()?, events);
    let allowed = events_per_second * (took.as_millis() as u64 + 1000) / 1000 + THREADS as u64;
    ensure!(emitted <= allowed, "{emitted} events in {took:?}");
    // Half of a burst is for repeats, and so is everything after.
    ensure!(emitted >= events_per_second * 3 / 2, "{emitted} events in {took:?}");
    Ok(())
}

/// The limit is a limit on every second, not only on all of them together.
#[test]
fn no_second_has_more_events_than_a_burst_allows() -> Result<()> {
    const PER_SECOND: usize = 100;
    let lab = lab()?;
    let socket = Socket::new()?;
    let daemon = socket.run(&lab.a, ["--events-per-second", "100"])?;
    let storm = Storm::start(&lab.a, NIC, &[Packet::stale().frame()?], 1)?;
    thread::sleep(Duration::from_millis(3200));
    storm.stop()?;
    let (events, _) = daemon.stop()?;
    let mut by_second = BTreeMap::<&str, usize>::new();
    for event in &events {
        let (second, _) = event.time.split_once('.').context("no fraction of a second")?;
        *by_second.entry(second).or_default() += 1;
    }
    let most = by_second.values().max().copied().unwrap_or_default();
    assert!(most <= 2 * PER_SECOND, "{by_second:?}");
    // A whole second after the first one is at the limit.
    assert!(by_second.values().any(|&count| count.abs_diff(PER_SECOND) <= 5), "{by_second:?}");
    Ok(())
}

#[test]
fn new_flow_is_reported_in_the_midst_of_repeats() -> Result<()> {
    let lab = lab()?;
    let socket = Socket::new()?;
    let daemon = socket.run(&lab.a, ["--events-per-second", "50"])?;
    let storm = Storm::start(&lab.a, NIC, &[Packet::stale().frame()?], THREADS)?;
    // Repeats have used up all that is theirs.
    wait_until("events are held back", PLENTY, || Ok(socket.status()?.events.suppressed > 1000))?;
    for inner_sport in 8001..8011 {
        thread::sleep(Duration::from_millis(50));
        let newcomer = Packet { inner_sport, ..Packet::stale() };
        send_frames(&lab.a, NIC, &[newcomer.frame()?])?;
        wait_until(&format!("an event of {inner_sport}"), PLENTY, || {
            Ok(daemon.events()?.iter().any(|event| event.inner.sport == Some(inner_sport)))
        })?;
    }
    storm.stop()?;
    check_identities(&socket.status()?)
}

/// Without a limit, and with a reader that does not read: what finds no room is counted as lost.
#[test]
fn events_that_find_no_room() -> Result<()> {
    let lab = lab()?;
    let socket = Socket::new()?;
    counters::wait_quiet(&lab.a, NIC)?;
    let before = counters::device(&lab.a, NIC)?;
    let daemon = socket.run(&lab.a, ["--events-per-second", "0", "--ring-kib", "64"])?;
    daemon.signal(Signal::SIGSTOP)?;
    let stale = Packet::stale().frame()?;
    send_frames(&lab.a, NIC, &vec![&stale; 2000])?;
    daemon.signal(Signal::SIGCONT)?;
    let status = socket.status()?;
    check_identities(&status)?;
    let events = status.events;
    assert_eq!((events.emitted + events.lost, events.suppressed), (2000, 0));
    // 64 KiB hold some 190 of them.
    assert!((100..1000).contains(&events.emitted), "{events:?}");
    daemon.wait_events(events.emitted as usize, PLENTY)?;

    // There is room again, also beside a storm.
    let storm = Storm::start(&lab.a, NIC, &[stale], THREADS)?;
    let start = Instant::now();
    while start.elapsed() < STORM / 2 {
        check_identities(&socket.status()?)?;
    }
    storm.stop()?;
    let after = counters::device(&lab.a, NIC)?;
    let (events, summary) = daemon.stop()?;
    check_identities(&summary)?;
    assert!(summary.events.emitted > status.events.emitted, "{:?}", summary.events);
    assert_eq!(events.len() as u64, summary.events.emitted);
    assert_eq!(summary.interface()?.skbs, after.left_since(&before));
    Ok(())
}

/// A storm is no reason to grow, nor to take a core: what product.md promises with the default options,
/// whoever reads along.
#[test]
fn storm_costs_the_daemon_little() -> Result<()> {
    let lab = lab()?;
    let stale = Packet::stale().frame()?;
    for is_read in [false, true] {
        let socket = Socket::new()?;
        let daemon = socket.run(&lab.a, if is_read { [""; 0].as_slice() } else { &["--quiet"] })?;
        let _tail = is_read.then(|| socket.tail(["--json"])).transpose()?;
        // The burst first.
        let storm = Storm::start(&lab.a, NIC, slice::from_ref(&stale), THREADS)?;
        thread::sleep(Duration::from_secs(1));
        let (start, before) = (Instant::now(), cpu_ticks(daemon.pid())?);
        thread::sleep(STORM);
        let (took, ticks) = (start.elapsed(), cpu_ticks(daemon.pid())? - before);
        storm.stop()?;
        let resident = daemon.resident_kib()?;
        assert!(resident < 20 * 1024, "{resident} KiB");
        // Hundredths of a second; where others take the caches away, it takes more of them.
        let percent = u128::from(ticks) * 1000 / took.as_millis();
        println!("read along: {is_read}; {percent} % of a core, {resident} KiB");
        assert!(percent <= 10, "{percent} % of a core");
    }
    Ok(())
}
