//! What the daemon may do: no more than it needs.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use vxcsum_tests::client::Socket;
use vxcsum_tests::daemon::{Daemon, binary};
use vxcsum_tests::kernel;
use vxcsum_tests::lab::{Lab, LabConfig, NIC};
use vxcsum_tests::netns::NetNs;
use vxcsum_tests::storm::{Packet, SOURCE_PORTS};
use vxcsum_tests::traffic::send_frames;
use vxcsum_tests::wait::wait_until;

const PLENTY: Duration = Duration::from_secs(5);
/// `CAP_NET_ADMIN` (12), `CAP_PERFMON` (38) and `CAP_BPF` (39).
const KEPT: u64 = 1 << 12 | 1 << 38 | 1 << 39;
/// The same as setpriv names them.
const THREE: &str = "+bpf,+perfmon,+net_admin";
const NOBODY: u32 = 65534;

fn lab() -> Result<Lab> {
    LabConfig { srcport: Some(SOURCE_PORTS), ..LabConfig::default() }.start()
}

/// /proc/PID/task/TID/status of every thread.
fn threads(daemon: &Daemon) -> Result<Vec<BTreeMap<String, String>>> {
    let folder = format!("/proc/{}/task", daemon.pid());
    let mut threads = Vec::new();
    for entry in fs::read_dir(&folder).context(folder)? {
        let text = fs::read_to_string(entry?.path().join("status"))?;
        let fields = text.lines().filter_map(|line| line.split_once(':'));
        threads.push(fields.map(|(name, it)| (name.to_owned(), it.trim().to_owned())).collect());
    }
    // A test that looks at one thread only would prove little.
    ensure!(threads.len() > 1, "{} threads", threads.len());
    Ok(threads)
}

fn assert_capabilities(daemon: &Daemon, expected: &[(&str, u64)]) -> Result<()> {
    for thread in threads(daemon)? {
        let field = |name: &str| thread.get(name).cloned().with_context(|| name.to_owned());
        let name = field("Name")?;
        for (set, expected) in expected {
            let found = u64::from_str_radix(&field(set)?, 16)?;
            assert_eq!(found, *expected, "{set} of {name}: {found:#x}");
        }
        assert_eq!(field("NoNewPrivs")?, "1", "{name}");
    }
    Ok(())
}

fn sees_a_broken_packet(lab: &Lab, socket: &Socket, daemon: &Daemon) -> Result<()> {
    let before = daemon.events()?.len();
    send_frames(&lab.a, NIC, &[Packet::stale().frame()?])?;
    let events = daemon.wait_events(before + 1, PLENTY)?;
    assert_eq!(events[before].verdict, "stale_nat");
    let status = socket.status()?;
    assert_eq!(status.interface()?.name, NIC);
    assert!(status.receive.attached, "{:?}", status.receive);
    Ok(())
}

#[test]
fn root_keeps_three_capabilities() -> Result<()> {
    let lab = lab()?;
    let metrics = ["--metrics", "127.0.0.1:9472"];
    for args in [&["--attach", "tcx"] as &[&str], &["--attach", "clsact"], &metrics] {
        let socket = Socket::new()?;
        let daemon = socket.run(&lab.a, args)?;
        sees_a_broken_packet(&lab, &socket, &daemon)?;
        let sets =
            [("CapEff", KEPT), ("CapPrm", KEPT), ("CapBnd", KEPT), ("CapInh", 0), ("CapAmb", 0)];
        assert_capabilities(&daemon, &sets)?;
        daemon.stop()?;
        assert!(!socket.path().exists(), "the socket's file stays");
    }
    Ok(())
}

/// They are enough for all that comes later: other interfaces, other devices, another mode.
#[test]
fn three_capabilities_are_enough_to_go_on() -> Result<()> {
    for attach in ["tcx", "clsact"] {
        let lab = lab()?;
        let socket = Socket::new()?;
        let daemon = socket.run(&lab.a, ["--attach", attach])?;
        sees_a_broken_packet(&lab, &socket, &daemon)?;
        lab.remove_nics()?;
        daemon.wait_says(0, "no longer watching", PLENTY)?;
        let said = daemon.said();
        lab.add_nics()?;
        daemon.wait_says(said, "watching", PLENTY)?;
        sees_a_broken_packet(&lab, &socket, &daemon)?;
        let ended = socket.vxcsum(["fix", "restore"])?;
        assert_eq!(ended.code, Some(0), "{ended:?}");
        sees_a_broken_packet(&lab, &socket, &daemon)?;
        assert_capabilities(&daemon, &[("CapEff", KEPT)])?;
    }
    Ok(())
}

/// Another user with only these capabilities, as a service manager would grant them.
fn as_nobody_with(ns: &NetNs, socket: &Socket, capabilities: &str) -> Result<Daemon> {
    launch_as_nobody(ns.command("setpriv"), socket, capabilities)
}

fn launch_as_nobody(setpriv: Command, socket: &Socket, capabilities: &str) -> Result<Daemon> {
    let mut command = setpriv;
    command.args([&format!("--reuid={NOBODY}"), &format!("--regid={NOBODY}"), "--clear-groups"]);
    command
        .args([&format!("--inh-caps={capabilities}"), &format!("--ambient-caps={capabilities}")]);
    command.arg(binary()?).args(["run", "--json", "--socket"]).arg(socket.path());
    Daemon::launch(command)
}

fn give_folder_to_nobody(socket: &Socket) -> Result<()> {
    std::os::unix::fs::chown(socket.folder(), Some(NOBODY), Some(NOBODY))?;
    Ok(())
}

#[test]
fn another_user_with_three_capabilities() -> Result<()> {
    let lab = lab()?;
    let socket = Socket::new()?;
    give_folder_to_nobody(&socket)?;
    let daemon = as_nobody_with(&lab.a, &socket, THREE)?;
    daemon.wait_watching()?;
    wait_until("the daemon answers", PLENTY, || Ok(socket.status().is_ok()))?;
    sees_a_broken_packet(&lab, &socket, &daemon)?;
    assert_capabilities(
        &daemon,
        &[("CapEff", KEPT), ("CapPrm", KEPT), ("CapInh", 0), ("CapAmb", 0)],
    )?;
    for thread in threads(&daemon)? {
        assert!(thread["Uid"].split_whitespace().all(|uid| uid == NOBODY.to_string()));
    }
    // The user itself may look, but only root may change anything.
    let mut command = Command::new("setpriv");
    command.args([&format!("--reuid={NOBODY}"), &format!("--regid={NOBODY}"), "--clear-groups"]);
    command.arg(binary()?).args(["fix", "zero", "--socket"]).arg(socket.path());
    let ended = vxcsum_tests::daemon::run_to_end(&mut command, PLENTY)?;
    assert_eq!(ended.code, Some(2), "{ended:?}");
    let ended = socket.vxcsum(["fix", "zero"])?;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    daemon.stop()?;
    assert!(!socket.path().exists(), "the socket's file stays");
    Ok(())
}

/// Linux before 5.11 counts BPF maps as locked memory, and these capabilities do not raise its limit.
#[test]
fn little_locked_memory() -> Result<()> {
    let lab = lab()?;
    let socket = Socket::new()?;
    give_folder_to_nobody(&socket)?;
    let mut setpriv = lab.a.command("prlimit");
    setpriv.args(["--memlock=65536", "setpriv"]);
    let daemon = launch_as_nobody(setpriv, &socket, THREE)?;
    if kernel::version()? >= (5, 11) {
        daemon.wait_watching()?;
        daemon.stop()?;
        return Ok(());
    }
    let ended = daemon.wait_end(PLENTY)?;
    assert_eq!(ended.code, Some(2), "{ended:?}");
    let last = ended.stderr.lines().last().unwrap_or_default();
    for part in ["locked memory", "64 KiB", "LimitMEMLOCK=infinity"] {
        assert!(last.contains(part), "{part:?} is not in {last:?}");
    }
    Ok(())
}

#[test]
fn without_cap_bpf() -> Result<()> {
    is_told_what_is_missing("+perfmon,+net_admin", "CAP_BPF")
}

#[test]
fn without_cap_perfmon() -> Result<()> {
    is_told_what_is_missing("+bpf,+net_admin", "CAP_PERFMON")
}

#[test]
fn without_cap_net_admin() -> Result<()> {
    is_told_what_is_missing("+bpf,+perfmon", "CAP_NET_ADMIN")
}

fn is_told_what_is_missing(capabilities: &str, missing: &str) -> Result<()> {
    let lab = lab()?;
    let socket = Socket::new()?;
    give_folder_to_nobody(&socket)?;
    let ended = as_nobody_with(&lab.a, &socket, capabilities)?.wait_end(PLENTY)?;
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""), "{ended:?}");
    let last = ended.stderr.lines().last().unwrap_or_default();
    for part in ["not permitted", "root", missing] {
        assert!(last.contains(part), "{part:?} is not in {last:?}");
    }
    assert!(!socket.path().exists(), "it leaves its socket");
    Ok(())
}
