//! What may grow: memory, file descriptors and BPF objects of a daemon that has much to do for long.

use std::env;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use vxcsum_tests::client::Socket;
use vxcsum_tests::daemon::{Daemon, binary};
use vxcsum_tests::held::{Held, attached, wait_as_before};
use vxcsum_tests::lab::{Cluster, Cni, Lab, LabConfig, NIC, Nat, OuterSum, Tool, VXLAN};
use vxcsum_tests::segment::Segment;
use vxcsum_tests::storm::{Packet, SOURCE_PORTS};
use vxcsum_tests::traffic::send_frames;
use vxcsum_tests::wait::wait_until;

const PLENTY: Duration = Duration::from_secs(10);

fn lab(nat: Nat) -> Result<Lab> {
    LabConfig { srcport: Some(SOURCE_PORTS), nat, ..LabConfig::default() }.start()
}

/// Broken packets of many flows, more of each kind than the daemon remembers at a time: connections
/// that wait, datagrams that are lost again, and those of many devices to many nodes.
fn many_flows() -> Result<Vec<Vec<u8>>> {
    const OF_EACH_KIND: u16 = 5000;
    let mut frames = Vec::new();
    for number in 0..OF_EACH_KIND {
        let inner_sport = 1024 + number;
        frames.push(Segment::broken_syn(inner_sport).frame()?);
        frames.push(Packet { inner_sport, ..Packet::stale() }.frame()?);
        let [high, low] = number.to_be_bytes();
        let (peer, vni) = ([10, 1, high, low].into(), number.into());
        frames.push(Packet { inner_sport, peer, vni, ..Packet::stale() }.frame()?);
    }
    Ok(frames)
}

/// As many events as an hour emits at the default rate limit are 3,600,000. This is the tenth part of
/// it, unless `VXCSUM_SOAK_EVENTS` says how many. All that is remembered is filled up and overflows,
/// rules are read again and again, and of those who read along one has stopped.
#[test]
fn memory_in_a_long_storm() -> Result<()> {
    const EVENTS: u64 = 360_000;
    let events = match env::var("VXCSUM_SOAK_EVENTS") {
        Ok(number) => number.parse().context("VXCSUM_SOAK_EVENTS")?,
        Err(_) => EVENTS,
    };
    let lab = lab(Nat::Cluster(Cluster { tool: Tool::IptablesNft, cni: Cni::MarkedFirst }))?;
    let socket = Socket::new()?;
    let run = socket.command_in(&lab.a, ["run", "--json", "--events-per-second", "0"])?;
    let daemon = silent(&run)?;
    wait_until("the daemon answers", PLENTY, || Ok(socket.status().is_ok()))?;
    let tail = |args: &[&str]| -> Result<Daemon> {
        let mut tail = Command::new(binary()?);
        tail.arg("tail").args(args).arg("--socket").arg(socket.path());
        socket.with_one_more_client(|| silent(&tail))
    };
    let tails = [tail(&["--json"])?, tail(&[])?, tail(&["--json", "--stalls"])?, tail(&[])?];
    tails[3].signal(Signal::SIGSTOP)?;
    let before = Held::at_rest(daemon.pid())?;

    let frames = many_flows()?;
    let mut resident = Vec::new();
    loop {
        for burst in frames.chunks(1000) {
            send_frames(&lab.a, NIC, burst)?;
            // A thousand are read in less, but not together with everything else on two CPUs.
            thread::sleep(Duration::from_millis(10));
        }
        let status = socket.status()?;
        let [emitted, lost] = [status.events.emitted, status.events.lost];
        ensure!(lost < emitted, "most find no room: {:?}", status.events);
        resident.push((emitted, daemon.resident_kib()?));
        if emitted >= events {
            ensure!(status.stalls.evicted > 0 && status.stalls.lost_again > 0);
            break;
        }
    }
    println!("events and KiB: {resident:?}");
    let quarter = |number: u64| {
        let part = events * number / 4..events * (number + 1) / 4;
        let mut part: Vec<_> =
            resident.iter().filter(|(emitted, _)| part.contains(emitted)).map(|it| it.1).collect();
        part.sort_unstable();
        part.get(part.len() / 2).copied().context("no look in a quarter")
    };
    // Everything is full after the first one. What the allocator makes of ever other sizes goes on for
    // longer: half a byte for each event was seen to settle within an hour's worth.
    let quarters = [quarter(1)?, quarter(2)?, quarter(3)?];
    let growth_kib = quarters[2].saturating_sub(quarters[0]);
    let most_kib = 1024 + events / 1024;
    assert!(growth_kib < most_kib, "{growth_kib} KiB more: {quarters:?}, {resident:?}");
    // Queues that are full of events among them, and all that a client has missed that does not read.
    assert!(quarters[2] < 40 * 1024, "{quarters:?}");
    drop(tails);
    wait_until("its clients are gone", PLENTY, || {
        Ok(Held::by(daemon.pid())?.open_files() + 4 == before.open_files())
    })
}

/// The same command, but nobody keeps what it prints.
fn silent(command: &Command) -> Result<Daemon> {
    let mut silent = Command::new("sh");
    silent.args(["-c", "exec \"$@\" >/dev/null 2>&1", "sh"]);
    silent.arg(command.get_program()).args(command.get_args());
    Daemon::launch(silent)
}

/// As it is after `act` has been done for some time, so it stays.
fn stays_as_it_is(
    daemon: &Daemon,
    times: usize,
    mut act: impl FnMut(usize) -> Result<()>,
) -> Result<()> {
    /// What an allocator does not get back from a heap that has become a patchwork.
    const SOME_KIB: u64 = 512;
    let warm_up = times / 4;
    (0..warm_up).try_for_each(&mut act)?;
    let (before, resident) = (Held::at_rest(daemon.pid())?, daemon.resident_kib()?);
    (warm_up..times).try_for_each(act)?;
    wait_as_before(daemon.pid(), &before)?;
    let growth = daemon.resident_kib()?.saturating_sub(resident);
    ensure!(growth < SOME_KIB, "{growth} KiB more than {resident}");
    Ok(())
}

#[test]
fn devices_come_and_go() -> Result<()> {
    for attach in ["tcx", "clsact"] {
        let (lab, socket) = (lab(Nat::None)?, Socket::new()?);
        let daemon = socket.run(&lab.a, ["--attach", attach, "--quiet"])?;
        let mut said = daemon.said();
        stays_as_it_is(&daemon, 24, |_| {
            lab.remove_vxlan()?;
            said = daemon.wait_says(said, "no longer watching", PLENTY)?;
            lab.add_vxlan(OuterSum::Sum)?;
            said = daemon.wait_says(said, &format!("({VXLAN})"), PLENTY)?;
            Ok(())
        })?;
        assert_eq!(attached(&lab.a, NIC)?, 1);
        let held = Held::at_rest(daemon.pid())?;
        daemon.stop()?;
        held.wait_gone()?;
    }
    Ok(())
}

#[test]
fn clients_come_and_go() -> Result<()> {
    let (lab, socket) = (lab(Nat::None)?, Socket::new()?);
    let daemon = socket.run(&lab.a, ["--quiet", "--metrics", "127.0.0.1:9474"])?;
    let stale = Packet::stale().frame()?;
    stays_as_it_is(&daemon, 400, |number| {
        socket.status()?;
        // Those that end without a word, in the midst of it, and while they are told something.
        drop(socket.connect()?);
        socket.connect()?.write_all(b"{\"command\":")?;
        socket.connect()?.write_all(b"{\"command\":\"tail\"}\n")?;
        send_frames(&lab.a, NIC, &[&stale])?;
        let mode = if number % 2 == 0 { "zero" } else { "off" };
        socket.ask(&format!("{{\"command\":\"fix\",\"mode\":\"{mode}\"}}"))?;
        lab.a.enter(|| {
            let mut scraper = TcpStream::connect("127.0.0.1:9474")?;
            scraper.write_all(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")?;
            Ok(scraper.read_to_string(&mut String::new()).map(drop)?)
        })
    })
}

/// Connections are followed, get through or give up, and the program is told each time.
#[test]
fn connections_wait_and_get_through() -> Result<()> {
    let (lab, socket) = (lab(Nat::None)?, Socket::new()?);
    let daemon = socket.run(&lab.a, ["--events-per-second", "0"])?;
    let mut connected = 0;
    stays_as_it_is(&daemon, 40, |_| {
        let ports = 2000..2100;
        let mut frames = Vec::new();
        for sport in ports.clone() {
            frames.push(Segment::broken_syn(sport).frame()?);
        }
        send_frames(&lab.a, NIC, &frames)?;
        wait_until("all wait", PLENTY, || Ok(socket.status()?.stalls.waiting.len() == 100))?;
        let acks = ports.map(|sport| Segment::ack(sport).frame()).collect::<Result<Vec<_>>>()?;
        send_frames(&lab.a, NIC, &acks)?;
        connected += 100;
        wait_until("all got through", PLENTY, || Ok(socket.status()?.stalls.connected == connected))
    })
}
