//! Bad luck: what breaks around the daemon. It goes on or says why it cannot, its counters stay
//! consistent, and it leaves nothing behind.

use std::fs;
use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, anyhow, ensure};
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::sys::signal::Signal;
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr};
use vxcsum_tests::client::Socket;
use vxcsum_tests::daemon::{Daemon, Ended, Summary, binary, run_to_end};
use vxcsum_tests::foreign::{Says, add_filter, filters};
use vxcsum_tests::held::{Held, attached, cpu_ticks, wait_as_before};
use vxcsum_tests::lab::{Lab, LabConfig, NIC, OuterSum, VXLAN};
use vxcsum_tests::storm::{Packet, SOURCE_PORTS, Storm};
use vxcsum_tests::traffic::send_frames;
use vxcsum_tests::wait::{wait_for, wait_until};

const PLENTY: Duration = Duration::from_secs(10);
const NO_ARGS: [&str; 0] = [];

fn lab() -> Result<Lab> {
    LabConfig { srcport: Some(SOURCE_PORTS), ..LabConfig::default() }.start()
}

fn send_stale(lab: &Lab, count: usize) -> Result<()> {
    send_frames(&lab.a, NIC, &vec![Packet::stale().frame()?; count])
}

/// No packet here is more than one on the wire, so packets are skbs.
fn check_counters(status: &Summary) -> Result<()> {
    let mut broken = 0;
    for interface in &status.interfaces {
        broken += interface.broken();
        let counted = interface.vxlan().packets + interface.not_vxlan;
        ensure!(interface.skbs == counted, "{} skbs, {counted} counted", interface.skbs);
    }
    let events = status.events;
    let told = events.emitted + events.suppressed + events.lost;
    ensure!(broken == told, "{broken} broken: {events:?}");
    Ok(())
}

/// Numbers as if by chance, the same each time (xorshift64, Marsaglia 2003).
struct Chance(u64);

impl Chance {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

/// Broken packets in small bursts, until the work is done.
fn under_traffic<T>(lab: &Lab, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let traffic = scope.spawn(|| -> Result<()> {
            while !done.load(Ordering::Relaxed) {
                send_stale(lab, 20)?;
                thread::sleep(Duration::from_millis(2));
            }
            Ok(())
        });
        let outcome = work();
        done.store(true, Ordering::Relaxed);
        traffic.join().map_err(|_| anyhow!("the traffic panicked"))??;
        outcome
    })
}

#[test]
fn killed_at_any_moment_by_tcx() -> Result<()> {
    killed_at_any_moment("tcx")
}

#[test]
fn killed_at_any_moment_by_clsact() -> Result<()> {
    killed_at_any_moment("clsact")
}

/// Twice a round: while it starts, and while it works.
fn killed_at_any_moment(attach: &str) -> Result<()> {
    // By both methods together, it is killed 200 times.
    const ROUNDS: u64 = 50;
    let lab = lab()?;
    lab.a.run(&format!("tc qdisc add dev {NIC} clsact"))?;
    add_filter(&lab.a, NIC, 7, Says::Next)?;
    let foreign = filters(&lab.a, NIC)?;
    let socket = Socket::new()?;
    let args = ["--attach", attach, "--quiet"];
    let mut chance = Chance(0x76_78_63_73_75_6d);
    under_traffic(&lab, || {
        for round in 0..ROUNDS {
            let mut left = Vec::new();
            let starting = socket.launch(&lab.a, args)?;
            thread::sleep(Duration::from_micros(chance.below(150_000)));
            left.push(kill(&lab, attach, starting)?);

            let daemon = socket.run(&lab.a, args).with_context(|| format!("round {round}"))?;
            ensure!(attached(&lab.a, NIC)? == 1, "{} programs", attached(&lab.a, NIC)?);
            wait_until("it counts", PLENTY, || {
                let status = socket.status()?;
                check_counters(&status)?;
                Ok(status.interface()?.broken() > 0)
            })?;
            thread::sleep(Duration::from_micros(chance.below(20_000)));
            left.push(kill(&lab, attach, daemon)?);
            if attach == "clsact" {
                // The next one removes what has stayed.
                socket.run(&lab.a, args)?.stop()?;
            }
            ensure!(filters(&lab.a, NIC)? == foreign, "{}", filters(&lab.a, NIC)?);
            left.iter().try_for_each(Held::wait_gone)?;
        }
        Ok(())
    })?;
    let daemon = socket.run(&lab.a, args)?;
    check_counters(&daemon.stop()?.1)?;
    assert_eq!(attached(&lab.a, NIC)?, 0);
    assert!(!socket.path().exists());
    Ok(())
}

/// Ends it without a chance to clear up. Returns what it held in that moment.
fn kill(lab: &Lab, attach: &str, daemon: Daemon) -> Result<Held> {
    daemon.signal(Signal::SIGSTOP)?;
    let held = Held::by(daemon.pid())?;
    daemon.kill()?;
    // A filter outlives it, one alone.
    let most = usize::from(attach == "clsact");
    if attach == "tcx" {
        held.wait_gone()?;
    }
    let left = attached(&lab.a, NIC)?;
    ensure!(left <= most, "{left} programs are left by {held:?}");
    Ok(held)
}

/// In the midst of a storm, with all that is upon it.
#[test]
fn nic_deleted_in_a_storm() -> Result<()> {
    deleted_in_a_storm(Lab::remove_nics, Lab::add_nics)
}

/// The storm goes on, on a NIC that is no longer of interest.
#[test]
fn vxlan_device_deleted_in_a_storm() -> Result<()> {
    deleted_in_a_storm(Lab::remove_vxlan, |lab| lab.add_vxlan(OuterSum::Sum))
}

fn deleted_in_a_storm(
    delete: impl Fn(&Lab) -> Result<()>,
    make: impl Fn(&Lab) -> Result<()>,
) -> Result<()> {
    for attach in ["tcx", "clsact"] {
        let lab = lab()?;
        let socket = Socket::new()?;
        let daemon = socket.run(&lab.a, ["--attach", attach, "--quiet"])?;
        let before = Held::at_rest(daemon.pid())?;
        let mut broken = 0;
        for _ in 0..2 {
            let storm = Storm::start(&lab.a, NIC, &[Packet::stale().frame()?], 1)?;
            wait_until("it counts", PLENTY, || {
                Ok(socket.status()?.interface()?.broken() > broken + 1000)
            })?;
            let said = daemon.said();
            delete(&lab)?;
            let said = daemon.wait_says(said, "no longer watching", PLENTY)?;
            let status = socket.status()?;
            check_counters(&status)?;
            assert_eq!(status.interface()?.attach, None);
            broken = status.interface()?.broken();
            let sent = storm.stop()?;
            ensure!(broken > 1000, "{broken} broken of {sent}");
            make(&lab)?;
            daemon.wait_says(said, &format!("({VXLAN})"), PLENTY)?;
            wait_as_before(daemon.pid(), &before)?;
        }
        send_stale(&lab, 10)?;
        let status = socket.status()?;
        assert_eq!(status.interface()?.broken(), broken + 10);
        let held = Held::by(daemon.pid())?;
        let complaints: Vec<_> = daemon.stderr();
        let (_, summary) = daemon.stop()?;
        check_counters(&summary)?;
        assert_eq!(summary.interface()?.broken(), broken + 10);
        held.wait_gone()?;
        assert_eq!(attached(&lab.a, NIC)?, 0);
        // It is told as it is, and not as if something had failed.
        let is_expected = |line: &String| !line.starts_with("vxcsum:") || line.contains("waiting");
        assert!(complaints.iter().all(is_expected), "{complaints:#?}");
    }
    Ok(())
}

/// Somebody deletes the qdisc, and with it everybody's filters.
#[test]
fn program_that_is_taken_off() -> Result<()> {
    let (lab, socket) = (lab()?, Socket::new()?);
    let daemon = socket.run(&lab.a, ["--attach", "clsact", "--quiet"])?;
    displaced(&lab, &socket, &daemon, || {
        lab.a.run(&format!("tc qdisc del dev {NIC} clsact")).map(drop)
    })
}

/// The NIC is another one under the old index, as if nothing had been.
#[test]
fn nic_made_anew_under_its_index() -> Result<()> {
    for attach in ["tcx", "clsact"] {
        let (lab, socket) = (lab()?, Socket::new()?);
        let make = "link add eth1 index 77 type veth peer name peer1\n\
                    link set eth1 up\nlink set peer1 up";
        lab.a.ip(make)?;
        let daemon = socket.run(&lab.a, ["--attach", attach, "--interface", "eth1", "--quiet"])?;
        displaced(&lab, &socket, &daemon, || {
            // It sees nothing of that but the end.
            daemon.signal(Signal::SIGSTOP)?;
            lab.a.ip(&format!("link del eth1\n{make}"))?;
            daemon.signal(Signal::SIGCONT)
        })?;
    }
    Ok(())
}

/// Its program is back soon, once, and nothing is lost of what it has counted.
fn displaced(
    lab: &Lab,
    socket: &Socket,
    daemon: &Daemon,
    displace: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let before = Held::at_rest(daemon.pid())?;
    let name = socket.status()?.interface()?.name.clone();
    let stale = Packet::stale().frame()?;
    send_frames(&lab.a, &name, &[&stale; 5])?;
    assert_eq!(socket.status()?.interface()?.broken(), 5);
    let said = daemon.said();
    displace()?;
    // It looks around by itself every five seconds, and with every change.
    lab.a.ip("link add x type bridge\nlink del x")?;
    let said = daemon.wait_says(said, &format!("{name} has lost the program"), PLENTY)?;
    daemon.wait_says(said, &format!("watching {name} ("), PLENTY)?;
    assert_eq!(attached(&lab.a, &name)?, 1);
    send_frames(&lab.a, &name, &[&stale; 5])?;
    let status = socket.status()?;
    check_counters(&status)?;
    assert_eq!(status.interface()?.broken(), 10);
    for _ in 0..3 {
        lab.a.ip("link add x type bridge\nlink del x")?;
        thread::sleep(Duration::from_millis(400));
    }
    let lost = daemon.stderr().iter().filter(|line| line.contains("has lost")).count();
    assert_eq!(lost, 1, "{:#?}", daemon.stderr());
    wait_as_before(daemon.pid(), &before)
}

/// A command line of the shell with vxcsum's own arguments behind it, in a network namespace.
fn by_shell(lab: &Lab, socket: &Socket, line: &str, args: &[&str]) -> Result<Command> {
    let mut command = lab.a.command("sh");
    command.args(["-c", line, "sh"]).arg(binary()?).args(["run", "--json", "--socket"]);
    command.arg(socket.path()).args(args).stdin(Stdio::null());
    Ok(command)
}

/// The same command to its end by SIGINT, once it has counted some broken packets and shown that it
/// serves clients.
fn works_although(lab: &Lab, socket: &Socket, command: Command) -> Result<Ended> {
    const BROKEN: usize = 30;
    let daemon = Daemon::launch(command)?;
    wait_until("the daemon answers", PLENTY, || Ok(socket.status().is_ok()))?;
    let tail = socket.tail(["--json"])?;
    let before = Held::at_rest(daemon.pid())?;
    for _ in 0..BROKEN {
        send_stale(lab, 1)?;
    }
    tail.wait_events(BROKEN, PLENTY)?;
    let status = socket.status()?;
    check_counters(&status)?;
    assert_eq!(status.interface()?.broken(), BROKEN as u64);
    wait_as_before(daemon.pid(), &before)?;
    daemon.signal(Signal::SIGINT)?;
    let ended = daemon.wait_end(PLENTY)?;
    before.wait_gone()?;
    assert_eq!(attached(&lab.a, NIC)?, 0);
    assert!(!socket.path().exists(), "it leaves its socket");
    Ok(ended)
}

#[test]
fn standard_error_on_a_full_disk() -> Result<()> {
    let (lab, socket) = (lab()?, Socket::new()?);
    for redirected in ["exec \"$@\" 2>/dev/full", "exec \"$@\" 2>&-"] {
        for format in ["text", "json"] {
            let command = by_shell(&lab, &socket, redirected, &["--log-format", format])?;
            let ended = works_although(&lab, &socket, command)?;
            assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""), "{ended:?}");
            // All events and the summary.
            assert_eq!(ended.stdout.lines().count(), 31, "{ended:?}");
        }
        // What cannot run cannot say why, but it ends as always.
        let mut command = by_shell(&lab, &socket, redirected, &["--interface", "eth7"])?;
        assert_eq!(run_to_end(&mut command, PLENTY)?.code, Some(2));
        let mut command = Command::new("sh");
        command.args(["-c", redirected, "sh"]).arg(binary()?).args(["status", "--socket"]);
        assert_eq!(run_to_end(command.arg(socket.path()), PLENTY)?.code, Some(2));
    }
    Ok(())
}

#[test]
fn standard_output_on_a_full_disk() -> Result<()> {
    let (lab, socket) = (lab()?, Socket::new()?);
    let command = by_shell(&lab, &socket, "exec \"$@\" >/dev/full", &[])?;
    let ended = works_although(&lab, &socket, command)?;
    // Said when it begins, and at the end, when there is no later any more.
    assert_eq!(ended.code, Some(2), "{ended:?}");
    let said: Vec<_> = ended.stderr.lines().filter(|it| it.contains("No space left")).collect();
    assert_eq!(said.len(), 2, "{ended:?}");
    assert!(said.iter().all(|line| line.starts_with("vxcsum: cannot write to standard output")));

    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$@\" >/dev/full", "sh"]).arg(binary()?);
    let ended = run_to_end(command.args(["run", "--check-config"]), PLENTY)?;
    assert_eq!((ended.code, ended.stderr.lines().count()), (Some(2), 1), "{ended:?}");
    Ok(())
}

/// Lines that found no room are left out as a whole and counted; the rest is there.
#[test]
fn disk_that_is_full_for_a_while() -> Result<()> {
    const EVENTS: usize = 400;
    let (lab, socket) = (lab()?, Socket::new()?);
    let folder = socket.folder().join("logs");
    fs::create_dir(&folder)?;
    // In a mount namespace of its own, which goes with it.
    let line = format!(
        "mount -t tmpfs -o size=32k tmpfs {0} && exec \"$@\" >{0}/out 2>{0}/err",
        folder.display()
    );
    let mut command = lab.a.command("unshare");
    let run = by_shell(&lab, &socket, &line, &["--events-per-second", "0"])?;
    // Without `ip netns exec` in front, which `command` has already.
    command.arg("-m").args(run.get_args().skip(3));
    let daemon = Daemon::launch(command)?;
    wait_until("the daemon answers", PLENTY, || Ok(socket.status().is_ok()))?;
    let logs = format!("/proc/{}/root{}", daemon.pid(), folder.display());
    let out = format!("{logs}/out");
    let lines = |text: &str| text.lines().filter(|line| line.contains("\"verdict\"")).count();

    let tail = socket.tail(["--json"])?;
    // Each of them another datagram, so that nothing is said to be lost again.
    let frame = |inner_sport| Packet { inner_sport, ..Packet::stale() }.frame();
    let frames = (1..=EVENTS as u16).map(frame).collect::<Result<Vec<_>>>()?;
    send_frames(&lab.a, NIC, &frames)?;
    tail.wait_events(EVENTS, PLENTY)?;
    check_counters(&socket.status()?)?;
    let full = fs::read_to_string(&out)?;
    ensure!(lines(&full) < 60, "{} lines find room in 32 KiB", lines(&full));

    // There is room again: what was kept for that comes first.
    Command::new("nsenter")
        .args(["-t", &daemon.pid().to_string(), "-m", "mount", "-o", "remount,size=8m"])
        .arg(&folder)
        .status()?;
    send_stale(&lab, 1)?;
    let said = wait_for("the rest", PLENTY, || {
        let said = fs::read_to_string(format!("{logs}/err"))?;
        Ok(said.lines().find(|line| line.contains("is written again")).map(str::to_owned))
    })?;
    let left_out: usize =
        said.split_whitespace().find_map(|word| word.parse().ok()).context(said.clone())?;
    assert!(left_out > 0, "{said}");
    let text = fs::read_to_string(&out)?;
    assert!(text.starts_with(&full), "what was written is there");
    for line in text.lines() {
        serde_json::from_str::<serde_json::Value>(line).with_context(|| line.to_owned())?;
    }
    assert_eq!(lines(&text) + left_out, EVENTS + 1);
    daemon.signal(Signal::SIGINT)?;
    assert_eq!(daemon.wait_end(PLENTY)?.code, Some(0));
    Ok(())
}

/// As many more files may be opened. The limit is one on the numbers of file descriptors, of which
/// some may be free below the highest.
fn allow_files(daemon: &Daemon, more: u64) -> Result<()> {
    Held::at_rest(daemon.pid())?;
    let mut taken = Vec::new();
    for entry in fs::read_dir(format!("/proc/{}/fd", daemon.pid()))? {
        taken.push(entry?.file_name().to_string_lossy().parse::<u64>()?);
    }
    let free = (0..).filter(|number| !taken.contains(number));
    limit_files(daemon, free.take(more as usize).last().context("none")? + 1)
}

fn limit_files(daemon: &Daemon, limit: u64) -> Result<()> {
    let mut command = Command::new("prlimit");
    command.args(["--pid", &daemon.pid().to_string(), &format!("--nofile={limit}:")]);
    ensure!(command.status()?.success(), "prlimit");
    Ok(())
}

/// Those that are served are served on, the others wait without costing anything, and all is well when
/// there are file descriptors again.
#[test]
fn more_clients_than_files() -> Result<()> {
    const MORE: u64 = 20;
    let (lab, socket) = (lab()?, Socket::new()?);
    let daemon = socket.run(&lab.a, NO_ARGS)?;
    let before = Held::at_rest(daemon.pid())?;
    allow_files(&daemon, MORE)?;
    let tail = socket.tail(["--json"])?;
    let clients = (0..2 * MORE).map(|_| socket.connect()).collect::<Result<Vec<_>>>()?;
    daemon.wait_says(0, "cannot accept a client", PLENTY)?;
    let ticks = cpu_ticks(daemon.pid())?;
    send_stale(&lab, 10)?;
    tail.wait_events(10, PLENTY)?;
    thread::sleep(Duration::from_millis(1500));
    let ticks = cpu_ticks(daemon.pid())? - ticks;
    assert!(ticks < 15, "{ticks} hundredths of a second");
    let is_about = |line: &&String| line.contains("Too many open files");
    assert_eq!(daemon.stderr().iter().filter(is_about).count(), 1, "{:#?}", daemon.stderr());

    drop(clients);
    check_counters(&socket.status()?)?;
    drop(tail);
    wait_as_before(daemon.pid(), &before)?;
    check_counters(&daemon.stop()?.1)?;
    before.wait_gone()
}

/// They are told so, and there is enough left for an interface that comes.
#[test]
fn clients_leave_files_to_interfaces() -> Result<()> {
    let (lab, socket) = (lab()?, Socket::new()?);
    let mut command = lab.a.command("prlimit");
    command.arg("--nofile=300:300").arg(binary()?).args(["run", "--json", "--socket"]);
    let daemon = Daemon::launch({
        command.arg(socket.path());
        command
    })?;
    wait_until("the daemon answers", PLENTY, || Ok(socket.status().is_ok()))?;
    let before = Held::at_rest(daemon.pid())?;
    // Half of the files.
    let clients = (0..150).map(|_| socket.connect()).collect::<Result<Vec<_>>>()?;
    wait_until("they are served", PLENTY, || Ok(socket.clients()? == clients.len()))?;
    let told = socket.vxcsum(["status", "--json"])?;
    assert_eq!(told.code, Some(2), "{told:?}");
    assert!(told.stderr.contains("there are 150 clients already"), "{told:?}");
    lab.remove_nics()?;
    daemon.wait_says(0, "no longer watching", PLENTY)?;
    let said = daemon.said();
    lab.add_nics()?;
    daemon.wait_says(said, "watching", PLENTY)?;
    drop(clients);
    wait_as_before(daemon.pid(), &before)?;
    daemon.stop()?;
    before.wait_gone()
}

/// An interface comes while no file can be opened: that is said, once, and it is watched when one can.
#[test]
fn interface_without_a_file_for_it() -> Result<()> {
    let (lab, socket) = (lab()?, Socket::new()?);
    let daemon = socket.run(&lab.a, NO_ARGS)?;
    let before = Held::at_rest(daemon.pid())?;
    lab.remove_nics()?;
    let mut said = daemon.wait_says(0, "no longer watching", PLENTY)?;
    // Enough to ask for links, not to watch one.
    allow_files(&daemon, 4)?;
    lab.add_nics()?;
    said = daemon.wait_says(said, "Too many open files", PLENTY)?;
    assert_eq!(attached(&lab.a, NIC)?, 0);
    limit_files(&daemon, 1024)?;
    daemon.wait_says(said, "watching", PLENTY)?;
    send_stale(&lab, 1)?;
    daemon.wait_events(1, PLENTY)?;
    wait_as_before(daemon.pid(), &before)?;
    let complaints = daemon.stderr();
    let complaints: Vec<_> = complaints.iter().filter(|line| line.contains("Too many")).collect();
    assert_eq!(complaints.len(), 1, "{complaints:#?}");
    daemon.stop()?;
    before.wait_gone()
}

/// It is told in the end what it has missed, however long it was stopped.
#[test]
fn client_that_is_stopped_for_long() -> Result<()> {
    const EVENTS: usize = 6000;
    // Others are given up after ten seconds.
    const LONG: Duration = Duration::from_secs(11);
    let (lab, socket) = (lab()?, Socket::new()?);
    let daemon = socket.run(&lab.a, ["--quiet", "--events-per-second", "0"])?;
    let before = Held::at_rest(daemon.pid())?;
    let tail = socket.tail(["--json"])?;
    // It has said by then what it wants.
    send_stale(&lab, 1)?;
    tail.wait_events(1, PLENTY)?;
    tail.signal(Signal::SIGSTOP)?;
    for _ in 0..EVENTS / 500 {
        send_stale(&lab, 500)?;
        thread::sleep(Duration::from_millis(50));
    }
    let emitted = socket.status()?.events.emitted as usize;
    thread::sleep(LONG);
    tail.signal(Signal::SIGCONT)?;
    let missed = || -> usize {
        let said = tail.stderr();
        let words = said.iter().flat_map(|line| line.split(' '));
        words.filter_map(|word| word.parse::<usize>().ok()).sum()
    };
    wait_until("it has made up for it", PLENTY, || Ok(tail.lines().len() + missed() == emitted))
        .with_context(|| format!("{} of {emitted}: {:?}", tail.lines().len(), tail.stderr()))?;
    assert!(missed() > 0);
    drop(tail);
    wait_as_before(daemon.pid(), &before)
}

/// Whoever reaches the port of the metrics takes no more than some of them.
#[test]
fn scrapers_that_say_nothing() -> Result<()> {
    const SCRAPERS: usize = 120;
    const SERVED: usize = 64;
    let (lab, socket) = (lab()?, Socket::new()?);
    let daemon = socket.run(&lab.a, ["--metrics", "127.0.0.1:9473"])?;
    let before = Held::at_rest(daemon.pid())?;
    let connect = || Ok(std::net::TcpStream::connect("127.0.0.1:9473")?);
    let scrapers = lab.a.enter(|| (0..SCRAPERS).map(|_| connect()).collect::<Result<Vec<_>>>())?;
    wait_until("they are served", PLENTY, || {
        Ok(Held::by(daemon.pid())?.open_files() == before.open_files() + SERVED)
    })?;
    drop(scrapers);
    let mut scraper = lab.a.enter(connect)?;
    scraper.write_all(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")?;
    scraper.set_read_timeout(Some(PLENTY))?;
    let mut answer = String::new();
    std::io::Read::read_to_string(&mut scraper, &mut answer)?;
    assert!(answer.contains("vxcsum_skbs_total"), "{answer}");
    wait_as_before(daemon.pid(), &before)
}

/// In a time namespace the clocks of processes are not those of BPF programs.
#[test]
fn time_namespace() -> Result<()> {
    for args in [
        ["--boottime", "86400", "--monotonic", "3600"],
        ["--boottime", "-60", "--monotonic", "-30"],
    ] {
        for transport in ["ring", "perf"] {
            let (lab, socket) = (lab()?, Socket::new()?);
            let mut command = lab.a.command("unshare");
            command.arg("-T").args(args).arg(binary()?).args(["run", "--json", "--socket"]);
            command.arg(socket.path()).args(["--transport", transport]);
            let daemon = Daemon::launch(command)?;
            wait_until("the daemon answers", PLENTY, || Ok(socket.status().is_ok()))?;
            let offsets = fs::read_to_string(format!("/proc/{}/timens_offsets", daemon.pid()))?;
            assert!(offsets.contains(args[1]), "it is in no time namespace: {offsets}");
            let before = SystemTime::now();
            send_stale(&lab, 1)?;
            let event = daemon.wait_events(1, PLENTY)?.remove(0);
            let time = humantime::parse_rfc3339(&event.time)?;
            // Clocks are compared one after the other.
            let slack = Duration::from_millis(5);
            assert!(before < time + slack && time < SystemTime::now() + slack, "{event:?}");
        }
    }
    Ok(())
}

/// No memory may be locked, and there are no privileges to change that.
fn without_locked_memory(lab: &Lab, socket: &Socket, args: &[&str]) -> Result<Command> {
    let mut command = lab.a.command("setpriv");
    command.args(["--bounding-set", "-sys_resource,-ipc_lock", "prlimit", "--memlock=0:0"]);
    command.arg(binary()?).args(["run", "--json", "--socket"]).arg(socket.path()).args(args);
    Ok(command)
}

/// The kernel takes BPF for locked memory before 5.11, and perf buffers up to now.
#[test]
fn no_memory_may_be_locked() -> Result<()> {
    let (lab, socket) = (lab()?, Socket::new()?);
    let small: &[&str] = &["--transport", "ring"];
    let large: &[&str] = &["--transport", "perf", "--ring-kib", "8192"];
    let words = ["perf buffer", "locked", "ulimit -l", "--ring-kib"];
    let command = without_locked_memory(&lab, &socket, small)?;
    assert_eq!(works_although(&lab, &socket, command)?.code, Some(0));
    let ended = run_to_end(&mut without_locked_memory(&lab, &socket, large)?, PLENTY)?;
    assert_refused(&lab, &socket, &ended, &words)?;

    // With CAP_SYS_RESOURCE, which root has not everywhere, it raises the limit by itself.
    let mut command = by_shell(&lab, &socket, "exec prlimit --memlock=0:0 \"$@\"", large)?;
    if rlimit::Resource::MEMLOCK.set(rlimit::INFINITY, rlimit::INFINITY).is_ok() {
        assert_eq!(works_although(&lab, &socket, command)?.code, Some(0));
        Ok(())
    } else {
        assert_refused(&lab, &socket, &run_to_end(&mut command, PLENTY)?, &words)
    }
}

/// Exit code 2, nothing on standard output, a last line that names all of `words`, and nothing left.
#[track_caller]
fn assert_refused(lab: &Lab, socket: &Socket, ended: &Ended, words: &[&str]) -> Result<()> {
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""), "{ended:?}");
    let line = ended.stderr.lines().last().unwrap_or_default();
    assert!(line.starts_with("vxcsum: "), "{ended:?}");
    for word in words {
        assert!(line.contains(word), "{word:?} is not in {ended:?}");
    }
    let is_socket = |it: fs::Metadata| it.file_type().is_socket();
    assert!(!fs::metadata(socket.path()).is_ok_and(is_socket), "it leaves its socket");
    assert_eq!(attached(&lab.a, NIC)?, 0);
    Ok(())
}

/// Has every bpf(2) of this command fail from now on.
fn forbid_bpf(command: &mut Command, subcommand: u32, error: i32) {
    // Offsets in `struct seccomp_data`: the number of the system call, and the low half of its first
    // argument, on little-endian machines.
    const NUMBER: u32 = 0;
    const FIRST_ARGUMENT: u32 = 16;
    let refuse = libc::SECCOMP_RET_ERRNO | error.cast_unsigned();
    let load = |offset| (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset);
    let unless_equal = |value, skip| (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, skip, value);
    let answer = |value| (libc::BPF_RET | libc::BPF_K, 0, 0, value);
    let filter = [
        load(NUMBER),
        unless_equal(libc::SYS_bpf as u32, 3),
        load(FIRST_ARGUMENT),
        unless_equal(subcommand, 1),
        answer(refuse),
        answer(libc::SECCOMP_RET_ALLOW),
    ]
    .map(|(code, jt, jf, k)| libc::sock_filter { code: code as u16, jt, jf, k });
    let install = move || {
        let mut filter = filter;
        let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
        // SAFETY: the program is live and as long as it says. The kernel only reads it.
        let done = unsafe {
            libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program)
        };
        if done == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    };
    // SAFETY: the closure makes a system call and nothing else, which is allowed between fork and exec.
    unsafe { command.pre_exec(install) };
}

#[test]
fn kernel_refuses_maps_and_programs() -> Result<()> {
    const MAP_CREATE: u32 = 0;
    const PROG_LOAD: u32 = 5;
    const LINK_CREATE: u32 = 28;
    let (lab, socket) = (lab()?, Socket::new()?);
    for (subcommand, error, words) in [
        (MAP_CREATE, libc::EPERM, ["not permitted to load BPF", "seccomp"]),
        (MAP_CREATE, libc::ENOMEM, ["takes no BPF maps", "Cannot allocate memory"]),
        (MAP_CREATE, libc::ENOSYS, ["no BPF", "CONFIG_BPF_SYSCALL"]),
        (PROG_LOAD, libc::EPERM, ["not permitted to load BPF", "seccomp"]),
        (PROG_LOAD, libc::ENOMEM, ["takes no BPF programs", "Cannot allocate memory"]),
        (LINK_CREATE, libc::ENOMEM, ["cannot attach to eth0", "Cannot allocate memory"]),
    ] {
        let mut command = socket.command_in(&lab.a, ["run", "--json"])?;
        forbid_bpf(&mut command, subcommand, error);
        let ended = run_to_end(&mut command, PLENTY)?;
        assert_refused(&lab, &socket, &ended, &words).with_context(|| format!("{words:?}"))?;
    }
    Ok(())
}

#[test]
fn socket_that_cannot_be_made() -> Result<()> {
    let (lab, socket) = (lab()?, Socket::new()?);
    // In a mount namespace of its own, which goes with it.
    let folder = socket.folder().display();
    let read_only = format!("mount --bind {folder} {folder} && mount -o remount,bind,ro {folder}");
    let by = |line: &str, path: &str| -> Result<Ended> {
        let mut command = lab.a.command("unshare");
        command.args(["-m", "sh", "-c", &format!("{line} && exec \"$@\""), "sh"]);
        command.arg(binary()?).args(["run", "--json"]);
        if !path.is_empty() {
            command.args(["--socket", path]);
        }
        run_to_end(&mut command, PLENTY)
    };
    let path = socket.path().display().to_string();
    let ended = by(&read_only, &path)?;
    assert_refused(&lab, &socket, &ended, &["cannot listen on", &path, "Read-only file system"])?;
    // One of a killed daemon, which cannot be removed there.
    socket.run(&lab.a, NO_ARGS)?.kill()?;
    let ended = by(&read_only, &path)?;
    fs::remove_file(socket.path())?;
    assert_refused(&lab, &socket, &ended, &["cannot listen on", &path, "Read-only file system"])?;

    let long = format!("{folder}/{}", "x".repeat(110));
    let ended = by("true", &long)?;
    assert_refused(&lab, &socket, &ended, &["cannot listen on", &long, "at most 107 bytes"])?;
    let nowhere = format!("{folder}/file/vxcsum.sock");
    fs::write(socket.folder().join("file"), "")?;
    let ended = by("true", &nowhere)?;
    assert_refused(&lab, &socket, &ended, &["cannot listen on", &nowhere, "cannot make the folder"])
}

/// Where nobody has asked for a socket, it goes without.
#[test]
fn usual_socket_that_cannot_be_made() -> Result<()> {
    let lab = lab()?;
    let mut command = lab.a.command("unshare");
    command.args(["-m", "sh", "-c", "mount -t tmpfs -o ro tmpfs /run && exec \"$@\"", "sh"]);
    command.arg(binary()?).args(["run", "--json"]);
    let daemon = Daemon::launch(command)?;
    daemon.wait_watching()?;
    let said = daemon.stderr().join("\n");
    for words in ["/run/vxcsum/vxcsum.sock", "Read-only", "going on without tail, status and fix"] {
        assert!(said.contains(words), "{words} is not in {said}");
    }
    send_stale(&lab, 1)?;
    daemon.wait_events(1, PLENTY)?;
    check_counters(&daemon.stop()?.1)
}

/// More has changed than the kernel keeps notices of: what there is in the end is watched.
#[test]
fn notices_are_lost() -> Result<()> {
    // A second is promised; this machine may have other things to do.
    const SOON: Duration = Duration::from_secs(4);
    const LINKS: usize = 200;
    let (lab, socket) = (lab()?, Socket::new()?);
    let daemon = socket.run(&lab.a, ["--quiet"])?;
    let before = Held::at_rest(daemon.pid())?;
    let lost = lost_notices(&lab, &daemon)?;
    daemon.signal(Signal::SIGSTOP)?;
    lab.remove_nics()?;
    let link = |number| {
        format!("link add d{number} type veth peer name p{number}\nlink set d{number} up\n")
    };
    lab.a.ip(&(0..LINKS).map(link).collect::<String>())?;
    lab.add_nics()?;
    lab.a.ip("link add vx7 type vxlan id 7 dev d7 dstport 8472 noudpcsum\nlink set vx7 up")?;
    ensure!(lost_notices(&lab, &daemon)? > lost, "no notice was lost");
    let said = daemon.said();
    daemon.signal(Signal::SIGCONT)?;
    daemon.wait_says(said, "watching d7 ", SOON)?;
    daemon.wait_says(said, &format!("watching {NIC} "), SOON)?;
    assert_eq!((attached(&lab.a, NIC)?, attached(&lab.a, "d7")?), (1, 1));
    send_stale(&lab, 5)?;
    let status = socket.status()?;
    check_counters(&status)?;
    let nic = status.interfaces.iter().find(|it| it.name == NIC).context("no NIC")?;
    assert_eq!(nic.broken(), 5);

    // It is told of what comes later.
    let said = daemon.said();
    lab.a.ip("link del d7")?;
    daemon.wait_says(said, "no longer watching d7", SOON)?;
    wait_as_before(daemon.pid(), &before)
}

/// How many notices of rtnetlink have found no room in the receive buffers of the daemon (the ninth
/// column of /proc/net/netlink).
fn lost_notices(lab: &Lab, daemon: &Daemon) -> Result<u64> {
    let text = lab.a.enter(|| Ok(fs::read_to_string("/proc/thread-self/net/netlink")?))?;
    let inodes = daemon_sockets(daemon)?;
    let mut lost = 0;
    for line in text.lines().skip(1) {
        let columns: Vec<_> = line.split_whitespace().collect();
        let column = |number: usize| columns.get(number).copied().context("a column is missing");
        if inodes.iter().any(|inode| Ok(inode.as_str()) == column(9).map_err(drop)) {
            lost += column(8)?.parse::<u64>()?;
        }
    }
    Ok(lost)
}

fn daemon_sockets(daemon: &Daemon) -> Result<Vec<String>> {
    let mut inodes = Vec::new();
    for entry in fs::read_dir(format!("/proc/{}/fd", daemon.pid()))? {
        let Ok(file) = fs::read_link(entry?.path()) else { continue };
        let name = file.to_string_lossy();
        let inode = name.strip_prefix("socket:[").and_then(|rest| rest.strip_suffix(']'));
        inodes.extend(inode.map(str::to_owned));
    }
    Ok(inodes)
}

/// Those who ask who claims an interface, again and again, keep nobody from being told.
#[test]
fn claim_that_is_asked_for_often() -> Result<()> {
    let (lab, socket) = (lab()?, Socket::new()?);
    let daemon = socket.run(&lab.a, ["--interface", NIC])?;
    let before = Held::at_rest(daemon.pid())?;
    lab.a.enter(|| {
        const MOST: usize = 100_000;
        let room = (0..MOST).map_while(|_| match ask_for_claim() {
            Ok(true) => Some(Ok(())),
            Ok(false) => None,
            Err(error) => Some(Err(error)),
        });
        let room = room.collect::<Result<Vec<_>>>()?.len();
        ensure!((1..MOST).contains(&room), "there is room for {room}");
        Ok(())
    })?;
    // Any change has it look around, and there.
    lab.a.ip("link add x type bridge\nlink del x")?;
    wait_until("there is room again", PLENTY, || lab.a.enter(ask_for_claim))?;
    let other = Socket::new()?;
    let ended = other.launch(&lab.a, NO_ARGS)?.wait_end(PLENTY)?;
    assert_eq!(ended.code, Some(2), "{ended:?}");
    assert!(ended.stderr.contains(&format!("process {}", daemon.pid())), "{ended:?}");
    wait_as_before(daemon.pid(), &before)
}

/// Connects as a second vxcsum would, from within the namespace; false where there is no room.
fn ask_for_claim() -> Result<bool> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let asking = socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    let name = format!("vxcsum/egress/{}", if_nametoindex(NIC)?);
    match socket::connect(asking.as_raw_fd(), &UnixAddr::new_abstract(name.as_bytes())?) {
        Err(Errno::EAGAIN) => Ok(false),
        other => Ok(other.map(|()| true)?),
    }
}
