//! `vxcsum tail`, `status` and `fix`, and the socket that they talk through.

use std::fs;
use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;
use vxcsum_tests::client::Socket;
use vxcsum_tests::daemon::{Daemon, Ended, binary, run_to_end};
use vxcsum_tests::lab::{Lab, LabConfig, NIC, Nat, VXLAN};
use vxcsum_tests::packets::Check;
use vxcsum_tests::storm::{PORT_BEFORE_NAT, Packet, SOURCE_PORTS};
use vxcsum_tests::traffic::{self, TcpServer, send_frames};
use vxcsum_tests::wait::{wait_for, wait_until};

const PLENTY: Duration = Duration::from_secs(5);
const SECOND: Duration = Duration::from_secs(1);
/// A healthy connect takes a few milliseconds; a lost SYN is sent again after a second.
const STALL: Duration = Duration::from_millis(700);

const NO_ARGS: [&str; 0] = [];
const NOBODY: u32 = 65534;
const NOBODY_GROUP: &str = "nogroup";

fn lab() -> Result<Lab> {
    LabConfig { srcport: Some(SOURCE_PORTS), ..LabConfig::default() }.start()
}

fn send(lab: &Lab, packets: &[Packet]) -> Result<()> {
    let frames = packets.iter().map(|packet| packet.frame()).collect::<Result<Vec<_>>>()?;
    send_frames(&lab.a, NIC, &frames)
}

fn assert_quiet_success(ended: &Ended) {
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""), "{ended:?}");
}

/// Exit code 2, nothing on standard output, and one line that names all of `names`.
fn assert_refused(ended: &Ended, names: &[&str]) {
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""), "{ended:?}");
    assert_eq!(ended.stderr.lines().count(), 1, "{ended:?}");
    for name in names {
        assert!(ended.stderr.contains(name), "{name:?} is not in {:?}", ended.stderr);
    }
}

#[test]
fn tail_prints_events_as_json() -> Result<()> {
    let lab = lab()?;
    let socket = Socket::new()?;
    let daemon = socket.run(&lab.a, NO_ARGS)?;
    let tails = [socket.tail(["--json"])?, socket.tail(["--json"])?];
    send(&lab, &[Packet::stale()])?;
    for tail in &tails {
        tail.wait_events(1, PLENTY)?;
        assert_eq!(tail.events()?, daemon.wait_events(1, PLENTY)?);
    }
    // All of product.md §4 but what only TCP has.
    let event: Value = serde_json::from_str(&tails[0].lines()[0])?;
    for (pointer, value) in [
        ("/interface", Value::from(NIC)),
        ("/device", VXLAN.into()),
        ("/vni", 1.into()),
        ("/verdict", "stale_nat".into()),
        ("/action", "none".into()),
        ("/outer/src", "10.0.0.11".into()),
        ("/outer/dst", "10.0.0.13".into()),
        ("/outer/sport", 50000.into()),
        ("/outer/dport", 8472.into()),
        ("/outer/sport_before_nat", PORT_BEFORE_NAT.into()),
        ("/inner/src", "172.29.0.0".into()),
        ("/inner/dst", "172.29.2.0".into()),
        ("/inner/proto", "udp".into()),
        ("/inner/sport", 7000.into()),
        ("/inner/dport", 53.into()),
        ("/mark", "0x0".into()),
        ("/segments", 1.into()),
    ] {
        assert_eq!(event.pointer(pointer), Some(&value), "{pointer} of {event:#}");
    }
    let text = |key: &str| event.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    for key in ["check", "expected"] {
        assert!(text(key).starts_with("0x") && text(key).len() == 6, "{key} of {event:#}");
    }
    let time = text("time");
    assert!(time.len() == 30 && time.ends_with('Z') && time.contains('T'), "{time}");
    assert_eq!(event["len"], Packet::stale().frame()?.len());
    Ok(())
}

#[test]
fn tail_prints_events_for_people() -> Result<()> {
    let lab = lab()?;
    let socket = Socket::new()?;
    let daemon = socket.run(&lab.a, ["--quiet"])?;
    let tail = socket.tail(NO_ARGS)?;
    send(&lab, &[Packet::stale()])?;
    let lines = wait_for("a line", PLENTY, || Ok(Some(tail.lines()).filter(|it| !it.is_empty())))?;
    for word in [NIC, VXLAN, "stale_nat", "10.0.0.11:50000", "10.0.0.13:8472", "before NAT"] {
        assert!(lines[0].contains(word), "{word} is not in {lines:?}");
    }
    // Its end is that of the daemon, which has printed nothing but its summary.
    let (events, _) = daemon.stop()?;
    assert!(events.is_empty(), "{events:#?}");
    // A line for the event, and one for its cause.
    let ended = tail.wait_end(PLENTY)?;
    assert_eq!((ended.code, ended.stdout.lines().count()), (Some(0), 2), "{ended:?}");
    Ok(())
}

#[test]
fn tail_filters() -> Result<()> {
    let lab = lab()?;
    let socket = Socket::new()?;
    let daemon = socket.run(&lab.a, NO_ARGS)?;
    let numbered = |inner_sport, packet: Packet| Packet { inner_sport, ..packet };
    let bad = Packet::new(Check::Value(0xffff));
    let peer = "10.0.0.99".parse()?;
    let packets = [
        numbered(1, Packet::stale()),
        numbered(2, bad),
        numbered(3, Packet { vni: 7, ..bad }),
        numbered(4, Packet { peer, ..bad }),
        numbered(5, Packet { vni: 7, peer, ..bad }),
    ];
    let cases: [(&[&str], &[u16]); 11] = [
        (&[], &[1, 2, 3, 4, 5]),
        (&["--verdict", "stale_nat"], &[1]),
        (&["--verdict", "stale_nat", "bad"], &[1, 2, 3, 4, 5]),
        (&["--verdict", "mangled_zero"], &[]),
        (&["--vni", "7"], &[3, 5]),
        (&["--vni", "7", "--vni", "1"], &[1, 2, 3, 4, 5]),
        (&["--peer", "10.0.0.99"], &[4, 5]),
        (&["--peer", "10.0.0.99", "--vni", "1"], &[4]),
        (&["--peer", "fd00::1"], &[]),
        (&["--limit", "2"], &[1, 2]),
        (&["--vni", "7", "--limit", "1"], &[3]),
    ];
    let mut tails = Vec::new();
    for (args, numbers) in cases {
        let tail = socket.tail(args.iter().chain(&["--json"]))?;
        tails.push((args, numbers, tail));
    }
    send(&lab, &packets)?;
    daemon.wait_events(packets.len(), PLENTY)?;
    // Those without a limit end with the daemon.
    daemon.stop()?;
    for (args, numbers, tail) in tails {
        let ended = tail.wait_end(PLENTY)?;
        assert_quiet_success(&ended);
        let sport = |line: &str| -> Result<Value> {
            Ok(serde_json::from_str::<Value>(line)?["inner"]["sport"].clone())
        };
        let seen = ended.stdout.lines().map(sport).collect::<Result<Vec<_>>>()?;
        let numbers: Vec<_> = numbers.iter().copied().map(Value::from).collect();
        assert_eq!(seen, numbers, "{args:?}");
    }
    Ok(())
}

#[test]
fn tail_ends_quietly_when_nobody_reads_on() -> Result<()> {
    let lab = lab()?;
    let socket = Socket::new()?;
    let _daemon = socket.run(&lab.a, NO_ARGS)?;
    let mut command = Command::new(binary()?);
    command.arg("tail").arg("--socket").arg(socket.path());
    let mut tail = socket.with_one_more_client(|| {
        Ok(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?)
    })?;
    send(&lab, &[Packet::stale()])?;
    let mut line = String::new();
    BufReader::new(tail.stdout.take().context("no pipe")?).read_line(&mut line)?;
    assert!(line.contains("stale_nat"), "{line}");
    // The pipe is closed now.
    let status = wait_for("tail ends", PLENTY, || {
        send(&lab, &[Packet::stale()])?;
        Ok(tail.try_wait()?)
    })?;
    let mut stderr = String::new();
    tail.stderr.take().context("no pipe")?.read_to_string(&mut stderr)?;
    assert_eq!((status.code(), stderr.as_str()), (Some(0), ""));
    Ok(())
}

#[test]
fn wrong_filters_are_named() -> Result<()> {
    let socket = Socket::new()?;
    for (args, names) in [
        (["--verdict", "valid"], ["valid", "stale_nat"]),
        (["--vni", "x"], ["--vni", "x"]),
        (["--peer", "10.0.0"], ["--peer", "10.0.0"]),
        (["--json", "--limit=-1"], ["-1", "--limit"]),
    ] {
        let ended = socket.vxcsum(["tail"].iter().chain(&args))?;
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""), "{ended:?}");
        for name in names {
            assert!(ended.stderr.contains(name), "{name:?} is not in {ended:?}");
        }
    }
    Ok(())
}

#[test]
fn status_is_as_documented() -> Result<()> {
    let lab = lab()?;
    let socket = Socket::new()?;
    let daemon = socket.run(&lab.a, NO_ARGS)?;
    let bad = Packet::new(Check::Value(0xffff));
    send(&lab, &[Packet::stale(), bad, bad, Packet::new(Check::Right)])?;
    daemon.wait_events(3, PLENTY)?;
    let len = Packet::stale().frame()?.len() as u64;
    let status = socket.status_json()?;
    for (pointer, value) in [
        ("/fix", Value::from("off")),
        ("/events/emitted", 3.into()),
        ("/events/suppressed", 0.into()),
        ("/events/lost", 0.into()),
        ("/interfaces/0/name", NIC.into()),
        ("/interfaces/0/attach", "tcx".into()),
        ("/interfaces/0/verdicts/stale_nat/packets", 1.into()),
        ("/interfaces/0/verdicts/stale_nat/bytes", len.into()),
        ("/interfaces/0/verdicts/bad/packets", 2.into()),
        ("/interfaces/0/verdicts/bad/bytes", (2 * len).into()),
        ("/interfaces/0/verdicts/valid/packets", 1.into()),
        ("/interfaces/0/fixed", 0.into()),
    ] {
        assert_eq!(status.pointer(pointer), Some(&value), "{pointer} of {status:#}");
    }
    let verdicts = status["interfaces"][0]["verdicts"].as_object().context("no verdicts")?;
    let names: Vec<_> = verdicts.keys().map(String::as_str).collect();
    let all = [
        "bad",
        "mangled_zero",
        "missing",
        "offload_pending",
        "stale_nat",
        "unverified",
        "valid",
        "zero",
    ];
    assert_eq!(names, all);
    let skbs = status["interfaces"][0]["skbs"].as_u64().context("no skbs")?;
    assert!(skbs >= 4, "{status:#}");
    assert_eq!(status["interfaces"].as_array().map(Vec::len), Some(1));
    Ok(())
}

#[test]
fn status_is_a_table_with_rates() -> Result<()> {
    let lab = lab()?;
    let socket = Socket::new()?;
    let daemon = socket.run(&lab.a, NO_ARGS)?;
    send(&lab, &vec![Packet::stale(); 30])?;
    daemon.wait_events(30, PLENTY)?;
    let ended = thread::scope(|scope| {
        let status = scope.spawn(|| socket.vxcsum(["status"]));
        // In the second between its two looks.
        thread::sleep(Duration::from_millis(500));
        send(&lab, &vec![Packet::stale(); 20])?;
        status.join().map_err(|_| anyhow::anyhow!("status panicked"))?
    })?;
    assert_quiet_success(&ended);
    let row = ended.stdout.lines().find(|line| line.contains("stale_nat"));
    let words: Vec<_> = row.with_context(|| ended.stdout.clone())?.split_whitespace().collect();
    assert_eq!(words[..3], ["stale_nat", "50", "packets"], "{}", ended.stdout);
    let rate = words.iter().find_map(|word| word.strip_suffix("/s")).context("no rate")?;
    let rate: f64 = rate.parse()?;
    assert!((15.0..=20.0).contains(&rate), "{}", ended.stdout);
    assert!(ended.stdout.contains(&format!("{NIC} (tcx)")), "{}", ended.stdout);
    assert!(ended.stdout.contains("fix off") && ended.stdout.contains("50 emitted"));
    Ok(())
}

#[test]
fn fix_is_switched_live() -> Result<()> {
    let nat = Nat::Masquerade { random_fully: true };
    let lab = LabConfig { nat, srcport: Some(SOURCE_PORTS), ..LabConfig::default() }.start()?;
    let server = TcpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
    let connect = |timeout| traffic::try_connect(&lab.a, server.address(), timeout);
    let socket = Socket::new()?;
    let daemon = socket.run(&lab.a, NO_ARGS)?;
    assert_eq!(connect(STALL)?, None);
    assert!(!daemon.wait_events(1, PLENTY)?.is_empty());

    // A connection that has been waiting gets through with its next attempt.
    let took = thread::scope(|scope| {
        let waiting = scope.spawn(|| connect(PLENTY));
        thread::sleep(Duration::from_millis(300));
        let ended = socket.vxcsum(["fix", "restore"])?;
        assert_quiet_success(&ended);
        assert_eq!(ended.stdout, "fix restore\n");
        waiting.join().map_err(|_| anyhow::anyhow!("the connection panicked"))?
    })?;
    let took = took.context("the connection did not get through")?;
    assert!(took > Duration::from_millis(900), "{took:?}: it has not been stalled at all");
    assert!(connect(STALL)?.is_some());
    assert_eq!(socket.status()?.fix, "restore");
    assert!(socket.status()?.interface()?.fixed > 0);

    assert_quiet_success(&socket.vxcsum(["fix", "off"])?);
    assert_eq!(socket.status()?.fix, "off");
    assert_eq!(connect(STALL)?, None);
    assert_quiet_success(&socket.vxcsum(["fix", "zero"])?);
    assert!(connect(STALL)?.is_some());
    let ended = socket.vxcsum(["fix", "maybe"])?;
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""), "{ended:?}");
    assert_eq!(socket.status()?.fix, "zero");
    Ok(())
}

/// A mode that was switched to is that of interfaces, too, that come later.
#[test]
fn fix_outlives_the_nic() -> Result<()> {
    let lab = lab()?;
    let socket = Socket::new()?;
    let daemon = socket.run(&lab.a, NO_ARGS)?;
    assert_quiet_success(&socket.vxcsum(["fix", "restore"])?);
    lab.remove_nics()?;
    daemon.wait_says(0, "no longer watching", PLENTY)?;
    let said = daemon.said();
    lab.add_nics()?;
    daemon.wait_says(said, "fix restore", PLENTY)?;
    send(&lab, &[Packet::stale()])?;
    assert_eq!(daemon.wait_events(1, PLENTY)?[0].action, "restored");
    Ok(())
}

/// Runs a client as another user and group.
fn vxcsum_as(socket: &Socket, id: u32, args: &[&str]) -> Result<Ended> {
    let mut command = Command::new("setpriv");
    command.args([&format!("--reuid={id}"), &format!("--regid={id}"), "--clear-groups"]);
    command.arg(binary()?).args(args).arg("--socket").arg(socket.path());
    run_to_end(&mut command, PLENTY)
}

#[test]
fn only_root_unless_there_is_a_group() -> Result<()> {
    let lab = lab()?;
    let socket = Socket::new()?;
    let daemon = socket.run(&lab.a, NO_ARGS)?;
    assert_eq!(fs::metadata(socket.path())?.permissions().mode() & 0o777, 0o600);
    for args in [&["status", "--json"] as &[&str], &["tail"], &["fix", "off"]] {
        let ended = vxcsum_as(&socket, NOBODY, args)?;
        assert_refused(&ended, &["not permitted", "root", "--socket-group"]);
    }
    daemon.stop()?;
    Ok(())
}

#[test]
fn group_reads_along_and_changes_nothing() -> Result<()> {
    let lab = lab()?;
    let socket = Socket::new()?;
    let daemon = socket.run(&lab.a, ["--socket-group", NOBODY_GROUP])?;
    let metadata = fs::metadata(socket.path())?;
    assert_eq!((metadata.mode() & 0o777, metadata.uid(), metadata.gid()), (0o660, 0, NOBODY));
    let ended = vxcsum_as(&socket, NOBODY, &["status", "--json"])?;
    assert_quiet_success(&ended);
    assert_eq!(serde_json::from_str::<Value>(&ended.stdout)?["fix"], "off");
    assert_refused(&vxcsum_as(&socket, NOBODY, &["fix", "restore"])?, &["only root"]);
    assert_eq!(socket.status()?.fix, "off");
    let others = NOBODY - 1;
    assert_refused(&vxcsum_as(&socket, others, &["status"])?, &["not permitted"]);
    // Root is in no group, and need not be.
    assert_quiet_success(&socket.vxcsum(["fix", "restore"])?);
    daemon.stop()?;
    Ok(())
}

#[test]
fn group_that_does_not_exist() -> Result<()> {
    let lab = lab()?;
    let socket = Socket::new()?;
    let daemon = socket.launch(&lab.a, ["--socket-group", "no-such-group"])?;
    assert_refused(&daemon.wait_end(PLENTY)?, &["no-such-group", "group"]);
    assert!(!socket.path().exists());
    Ok(())
}

#[test]
fn no_daemon() -> Result<()> {
    let socket = Socket::new()?;
    let path = socket.path().display().to_string();
    for args in [&["tail"] as &[&str], &["status"], &["status", "--json"], &["fix", "off"]] {
        assert_refused(&socket.vxcsum(args)?, &[&path, "vxcsum run", "no vxcsum is running"]);
    }
    // Nor one that was killed.
    let lab = lab()?;
    socket.run(&lab.a, NO_ARGS)?.kill()?;
    assert!(socket.path().exists());
    assert_refused(&socket.vxcsum(["status"])?, &[&path, "vxcsum run", "no vxcsum is running"]);
    Ok(())
}

#[test]
fn socket_of_a_killed_daemon_is_replaced() -> Result<()> {
    let lab = lab()?;
    let socket = Socket::new()?;
    socket.run(&lab.a, NO_ARGS)?.kill()?;
    let daemon = socket.run(&lab.a, NO_ARGS)?;
    assert_eq!(socket.status()?.interface()?.name, NIC);
    daemon.stop()?;
    assert!(!socket.path().exists(), "the file stays");
    Ok(())
}

#[test]
fn socket_of_a_living_daemon_is_not() -> Result<()> {
    let lab = lab()?;
    let socket = Socket::new()?;
    let daemon = socket.run(&lab.a, NO_ARGS)?;
    let path = socket.path().display().to_string();
    let ended = socket.launch(&lab.b, NO_ARGS)?.wait_end(PLENTY)?;
    assert_refused(&ended, &[&path, "another", "--socket"]);
    assert_eq!(socket.status()?.interface()?.name, NIC);
    daemon.stop()?;
    Ok(())
}

#[test]
fn file_in_the_place_of_the_socket() -> Result<()> {
    let lab = lab()?;
    let socket = Socket::new()?;
    fs::write(socket.path(), "somebody's notes")?;
    let path = socket.path().display().to_string();
    let ended = socket.launch(&lab.a, NO_ARGS)?.wait_end(PLENTY)?;
    assert_refused(&ended, &[&path, "no socket"]);
    assert_eq!(fs::read(socket.path())?, b"somebody's notes");
    // A client has no daemon to talk to.
    assert_eq!(socket.vxcsum(["status"])?.code, Some(2));

    // A folder, and a link to a file that is not its own.
    fs::remove_file(socket.path())?;
    fs::create_dir(socket.path())?;
    assert_refused(&socket.launch(&lab.a, NO_ARGS)?.wait_end(PLENTY)?, &[&path]);
    assert!(fs::metadata(socket.path())?.is_dir());
    fs::remove_dir(socket.path())?;
    let notes = socket.folder().join("notes");
    fs::write(&notes, "somebody's notes")?;
    std::os::unix::fs::symlink(&notes, socket.path())?;
    assert_refused(&socket.launch(&lab.a, NO_ARGS)?.wait_end(PLENTY)?, &[&path]);
    assert_eq!(fs::read(&notes)?, b"somebody's notes");
    Ok(())
}

/// Its folder is made where there is none.
#[test]
fn folder_of_the_socket() -> Result<()> {
    let lab = lab()?;
    let socket = Socket::new()?;
    let path = socket.folder().join("vxcsum").join("a.sock");
    let mut command = lab.a.command(binary()?);
    command.args(["run", "--json", "--socket"]).arg(&path);
    let daemon = Daemon::launch(command)?;
    daemon.wait_watching()?;
    assert!(fs::metadata(&path)?.file_type().is_socket());
    daemon.stop()?;
    Ok(())
}

#[test]
fn what_is_no_command_is_answered() -> Result<()> {
    let lab = lab()?;
    let socket = Socket::new()?;
    let daemon = socket.run(&lab.a, NO_ARGS)?;
    for line in [
        "",
        "garbage",
        "{}",
        "[1,2",
        "\u{7}\0\u{1b}[2J",
        r#"{"command":"reboot"}"#,
        r#"{"command":"fix"}"#,
        r#"{"command":"fix","mode":"maybe"}"#,
        r#"{"command":"tail","vni":["x"]}"#,
        r#"{"command":"tail","unknown":1}"#,
        r#"{"command":"status","unknown":1}"#,
        r#"{"command":"status"} trailing"#,
    ] {
        let answer = socket.ask(line).with_context(|| format!("{line:?}"))?;
        let answer: Value =
            serde_json::from_str(&answer).with_context(|| format!("{line:?}: {answer:?}"))?;
        let error = answer["error"].as_str().unwrap_or_default();
        assert!(!error.is_empty(), "{line:?}: {answer}");
    }
    // No UTF-8, and a line that is too long.
    for bytes in [b"\xff\xfe\xfd\n".to_vec(), vec![b'x'; 200_000]] {
        let mut stream = socket.connect()?;
        // It may close before it has read everything.
        let _ = stream.write_all(&bytes);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
    }
    assert_eq!(socket.status()?.fix, "off");
    daemon.stop()?;
    Ok(())
}

/// Calls `act` while somebody else asks for the status all the time: which must be given within a
/// second, by a daemon that does not grow.
fn while_it_answers<T: Send>(
    socket: &Socket,
    daemon: &Daemon,
    act: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    let calm = daemon.resident_kib()?;
    let mut answers = 0;
    let value = thread::scope(|scope| {
        let acting = scope.spawn(act);
        while !acting.is_finished() {
            let start = Instant::now();
            socket.status()?;
            let took = start.elapsed();
            ensure!(took < SECOND, "an answer took {took:?}");
            let resident = daemon.resident_kib()?;
            ensure!(resident < 40 * 1024, "{resident} KiB, {calm} KiB before");
            answers += 1;
            thread::sleep(Duration::from_millis(5));
        }
        acting.join().map_err(|_| anyhow::anyhow!("a client panicked"))?
    })?;
    ensure!(answers > 0, "it was never asked");
    Ok(value)
}

#[test]
fn endless_line() -> Result<()> {
    const LEN: usize = 100 << 20;
    let lab = lab()?;
    let socket = Socket::new()?;
    let daemon = socket.run(&lab.a, NO_ARGS)?;
    while_it_answers(&socket, &daemon, || {
        for start in ["", r#"{"command":"status","x":""#] {
            let mut stream = socket.connect()?;
            stream.write_all(start.as_bytes())?;
            let chunk = vec![b'x'; 1 << 20];
            let mut written = 0;
            while written < LEN {
                match stream.write(&chunk) {
                    Ok(len) => written += len,
                    Err(error) => {
                        let closed = [ErrorKind::BrokenPipe, ErrorKind::ConnectionReset];
                        ensure!(closed.contains(&error.kind()), "{error}");
                        break;
                    }
                }
            }
            ensure!(written < LEN, "it took all of an endless line");
        }
        Ok(())
    })?;
    daemon.stop()?;
    Ok(())
}

/// A thousand clients, with the limit on open files that a service starts with.
#[test]
fn thousand_clients() -> Result<()> {
    const CLIENTS: usize = 1000;
    rlimit::increase_nofile_limit(4096)?;
    let lab = lab()?;
    let socket = Socket::new()?;
    let mut command = lab.a.command("prlimit");
    command.args(["--nofile=1024:"]).arg(binary()?).args(["run", "--json", "--socket"]);
    command.arg(socket.path());
    let daemon = Daemon::launch(command)?;
    daemon.wait_watching()?;
    wait_until("the daemon answers", PLENTY, || Ok(socket.status().is_ok()))?;
    let clients = while_it_answers(&socket, &daemon, || {
        let mut clients = Vec::new();
        for number in 0..CLIENTS {
            let mut stream = socket.connect().with_context(|| format!("client {number}"))?;
            match number % 4 {
                // Half a line.
                0 => stream.write_all(br#"{"command":"#)?,
                // Nothing at all.
                1 => {}
                // Events, and never reads them.
                2 => stream.write_all(b"{\"command\":\"tail\"}\n")?,
                // The end of what it says, but not of listening.
                _ => {
                    stream.write_all(b"{\"command\":\"tail\"}\n")?;
                    stream.shutdown(std::net::Shutdown::Write)?;
                }
            }
            clients.push(stream);
        }
        send(&lab, &vec![Packet::stale(); 100])?;
        // Those that have shut down have ended; the others are there.
        wait_until("clients", PLENTY, || Ok(socket.clients()? >= CLIENTS * 3 / 4))?;
        Ok(clients)
    })?;
    assert_eq!(socket.status()?.interface()?.broken(), 100);
    daemon.wait_events(100, PLENTY)?;
    // All are gone at once, and soon forgotten.
    while_it_answers(&socket, &daemon, || {
        drop(clients);
        wait_until("their sockets are closed", PLENTY, || Ok(socket.clients()? < 5))
    })?;
    daemon.stop()?;
    Ok(())
}

/// Reads a tail by hand: events, and how many were missed.
fn read_tail(stream: &UnixStream, until: u64) -> Result<(u64, u64)> {
    let (mut events, mut missed) = (0, 0);
    for line in BufReader::new(stream).lines() {
        let line: Value = serde_json::from_str(&line?)?;
        match line.get("missed") {
            Some(count) => missed += count.as_u64().context("not a number")?,
            None => events += 1,
        }
        if events + missed >= until {
            break;
        }
    }
    Ok((events, missed))
}

#[test]
fn slow_client_is_told_what_it_missed() -> Result<()> {
    const ROUNDS: u64 = 30;
    const EACH: u64 = 300;
    let lab = lab()?;
    let socket = Socket::new()?;
    let daemon = socket.run(&lab.a, ["--quiet", "--events-per-second", "0"])?;
    let fast = socket.tail(["--json"])?;
    // One is a program that is stopped, the other one does not read.
    let stopped = socket.tail(["--json"])?;
    let stale = Packet::stale().frame()?;
    send_frames(&lab.a, NIC, &[&stale])?;
    // It has said by then what it wants.
    stopped.wait_events(1, PLENTY)?;
    stopped.signal(Signal::SIGSTOP)?;
    let deaf = socket.with_one_more_client(|| {
        let mut stream = socket.connect()?;
        stream.write_all(b"{\"command\":\"tail\"}\n")?;
        Ok(stream)
    })?;

    let all = while_it_answers(&socket, &daemon, || {
        for round in 1..=ROUNDS {
            send_frames(&lab.a, NIC, &vec![&stale; EACH as usize])?;
            // Others get theirs all the while.
            fast.wait_events((1 + round * EACH) as usize, PLENTY)?;
        }
        Ok(1 + ROUNDS * EACH)
    })?;
    let status = socket.status()?;
    assert_eq!((status.interface()?.broken(), status.events.emitted), (all, all));
    assert!(fast.stderr().is_empty(), "{:?}", fast.stderr());

    // It came after the first one.
    let (events, missed) = read_tail(&deaf, all - 1)?;
    assert!(missed > 0 && events > 0, "{events} events, {missed} missed");
    assert_eq!(events + missed, all - 1);

    stopped.signal(Signal::SIGCONT)?;
    send_frames(&lab.a, NIC, &[&stale])?;
    let told = || {
        let words = stopped.stderr().join(" ");
        words.split(' ').filter_map(|word| word.parse::<usize>().ok()).sum::<usize>()
    };
    wait_until("it has made up for it", PLENTY, || {
        Ok(stopped.lines().len() + told() == all as usize + 1)
    })?;
    assert!(told() > 0);
    daemon.stop()?;
    Ok(())
}
