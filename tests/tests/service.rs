//! What a service manager and an operator need: configuration, reload, readiness, logs.

use std::fs;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vxcsum_tests::client::Socket;
use vxcsum_tests::daemon::{Daemon, Ended, binary, run_to_end};
use vxcsum_tests::folder::Folder;
use vxcsum_tests::lab::{Lab, LabConfig, NIC, Nat};
use vxcsum_tests::traffic::{TcpServer, try_connect};

const TIMEOUT: Duration = Duration::from_secs(5);

fn check(config: &str, arguments: &[&str]) -> Result<Ended> {
    let folder = Folder::new()?;
    let path = folder.path().join("vxcsum.toml");
    fs::write(&path, config)?;
    let mut command = Command::new(binary()?);
    command.args(["run", "--check-config", "--config"]).arg(&path).args(arguments);
    run_to_end(&mut command, TIMEOUT)
}

#[track_caller]
fn refused(config: &str, line: usize, said: &str) -> Result<()> {
    let ended = check(config, &[])?;
    ensure!(ended.code == Some(2), "{ended:?}");
    ensure!(ended.stderr.lines().count() == 1, "{ended:?}");
    ensure!(ended.stderr.contains(&format!("vxcsum.toml, line {line}: ")), "{ended:?}");
    ensure!(ended.stderr.contains(said), "{ended:?}");
    Ok(())
}

#[test]
fn a_configuration_is_checked_without_running() -> Result<()> {
    let ended =
        check("interface = [\"eth0\"]\nfix = \"restore\"\nmetrics = \"[::1]:9108\"\n", &[])?;
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
    assert!(ended.stdout.contains("vxcsum.toml: all well"), "{ended:?}");
    Ok(())
}

#[test]
fn errors_of_the_configuration_name_line_and_way_out() -> Result<()> {
    refused("intreface = [\"eth0\"]", 1, "did you mean \"interface\"?")?;
    refused("\n\nfix = \"perhaps\"", 3, "restore")?;
    refused("port = [8472]\nport = [4789]", 2, "duplicate")?;
    refused("port = [70000]", 1, "70000")?;
    refused("interface = eth0", 1, "")
}

#[test]
fn impossible_values_are_refused_as_those_of_options_are() -> Result<()> {
    for (config, said) in [
        ("port = [0]", "UDP ports from 1 to 65535"),
        ("port = []", "UDP ports from 1 to 65535"),
        ("ring-kib = 100", "power of two"),
    ] {
        let ended = check(config, &[])?;
        assert_eq!(ended.code, Some(2), "{ended:?}");
        assert!(ended.stderr.contains(said), "{ended:?}");
    }
    Ok(())
}

#[test]
fn a_missing_configuration_is_named() -> Result<()> {
    let mut command = Command::new(binary()?);
    command.args(["run", "--config", "/nonexistent/vxcsum.toml"]);
    let ended = run_to_end(&mut command, TIMEOUT)?;
    assert_eq!(ended.code, Some(2));
    assert!(ended.stderr.contains("cannot read /nonexistent/vxcsum.toml"), "{ended:?}");
    Ok(())
}

/// A daemon that is configured by a file, in a lab whose connections stall.
struct Configured {
    daemon: Daemon,
    socket: Socket,
    file: Folder,
    lab: Lab,
}

impl Configured {
    fn start(config: &str, arguments: &[&str]) -> Result<Self> {
        let nat = Nat::Masquerade { random_fully: true };
        let lab = LabConfig { nat, ..LabConfig::default() }.start()?;
        let (file, socket) = (Folder::new()?, Socket::new()?);
        write_config(&file, config)?;
        let path = file.path().join("vxcsum.toml");
        let path = path.to_str().context("a path that is no text")?;
        let mut command = socket.command_in(&lab.a, ["run", "--json", "--config", path])?;
        command.args(arguments);
        let daemon = Daemon::launch(command)?;
        daemon.wait_watching()?;
        Ok(Self { daemon, socket, file, lab })
    }

    fn reload(&self, config: &str) -> Result<()> {
        write_config(&self.file, config)?;
        kill(Pid::from_raw(self.daemon.pid().try_into()?), Signal::SIGHUP)?;
        Ok(())
    }

    fn connects(&self) -> Result<bool> {
        let server = TcpServer::start(&self.lab.b, (self.lab.inner_b(), 0).into())?;
        let patience = Duration::from_millis(700);
        Ok(try_connect(&self.lab.a, server.address(), patience)?.is_some())
    }
}

fn write_config(folder: &Folder, config: &str) -> Result<()> {
    Ok(fs::write(folder.path().join("vxcsum.toml"), config)?)
}

#[test]
fn options_win_over_the_file() -> Result<()> {
    let config = format!("interface = [\"{NIC}\"]\nport = [8472]\nfix = \"restore\"\n");
    let configured = Configured::start(&config, &[])?;
    assert!(configured.connects()?, "the file's fix mode");
    drop(configured);
    let configured = Configured::start(&config, &["--fix", "off"])?;
    assert!(!configured.connects()?, "the option's fix mode");
    let said = configured.daemon.stderr().join("\n");
    assert!(said.contains("port 8472") && !said.contains("4789"), "{said}");
    Ok(())
}

#[test]
fn a_reload_changes_the_mode_and_loses_no_count() -> Result<()> {
    let configured = Configured::start("fix = \"off\"", &[])?;
    assert!(!configured.connects()?);
    let before = configured.socket.status()?.interface()?.broken();
    assert!(before > 0);
    let from = configured.daemon.said();
    configured.reload("fix = \"restore\"")?;
    configured.daemon.wait_says(from, "fix restore", TIMEOUT)?;
    assert!(configured.connects()?, "after the reload");
    let after = configured.socket.status()?.interface()?.broken();
    assert!(after > before, "{before} {after}");

    // What cannot be understood changes nothing.
    let from = configured.daemon.said();
    configured.reload("fix = \"of\"")?;
    configured.daemon.wait_says(from, "line 1", TIMEOUT)?;
    assert!(configured.connects()?, "after a reload that failed");

    let from = configured.daemon.said();
    configured.reload("fix = \"restore\"\nring-kib = 64")?;
    configured.daemon.wait_says(from, "with the next start only", TIMEOUT)?;
    let events = configured.socket.status()?.events;
    let (printed, summary) = configured.daemon.stop()?;
    assert!(summary.events.emitted >= events.emitted);
    assert_eq!(printed.len() as u64, summary.events.emitted);
    Ok(())
}

#[test]
fn the_service_manager_hears_of_readiness_life_and_end() -> Result<()> {
    let lab = LabConfig::default().start()?;
    let (folder, socket) = (Folder::new()?, Socket::new()?);
    let path = folder.path().join("notify");
    let manager = UnixDatagram::bind(&path)?;
    manager.set_read_timeout(Some(TIMEOUT))?;
    let mut command = socket.command_in(&lab.a, ["run", "--json", "--interface", NIC])?;
    command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "400000");
    let daemon = Daemon::launch(command)?;
    daemon.wait_watching()?;
    let hear = || -> Result<String> {
        let mut message = [0; 256];
        let len = manager.recv(&mut message).context("the daemon says nothing")?;
        Ok(String::from_utf8_lossy(&message[..len]).trim().to_owned())
    };
    // The first sign of life may come with the readiness.
    let mut heard = Vec::new();
    while heard.len() < 5 {
        heard.push(hear()?);
    }
    assert!(heard.contains(&"READY=1".to_owned()), "{heard:?}");
    assert!(heard.iter().filter(|it| *it == "WATCHDOG=1").count() >= 3, "{heard:?}");
    daemon.stop()?;
    let mut last = hear()?;
    while last == "WATCHDOG=1" {
        last = hear()?;
    }
    assert_eq!(last, "STOPPING=1");
    Ok(())
}

#[test]
fn logs_are_json_for_those_who_ask() -> Result<()> {
    let lab = LabConfig::default().start()?;
    let socket = Socket::new()?;
    let mut command = socket.command_in(&lab.a, ["run", "--json", "--interface", NIC])?;
    command.args(["--log-format", "json"]);
    let daemon = Daemon::launch(command)?;
    daemon.wait_watching()?;
    let said = daemon.stderr();
    let line: serde_json::Value = serde_json::from_str(&said[0])?;
    assert_eq!(line["level"], "INFO");
    assert!(line["message"].as_str().is_some_and(|it| it.starts_with("watching ")), "{line}");
    Ok(())
}

#[test]
fn the_journal_gets_priorities() -> Result<()> {
    let lab = LabConfig::default().start()?;
    let socket = Socket::new()?;
    let mut command = socket.command_in(&lab.a, ["run", "--json", "--interface", NIC])?;
    command.env("JOURNAL_STREAM", "1:1");
    let daemon = Daemon::launch(command)?;
    daemon.wait_watching()?;
    assert!(daemon.stderr()[0].starts_with("<6>watching "), "{:?}", daemon.stderr());
    Ok(())
}

#[test]
fn the_service_unit_starts_what_there_is() -> Result<()> {
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/vxcsum.service");
    let unit = fs::read_to_string(unit)?;
    let start = unit.lines().find_map(|line| line.strip_prefix("ExecStart=/usr/bin/vxcsum "));
    let arguments = start.context("no ExecStart")?.split(' ');
    let mut command = Command::new(binary()?);
    let ended = run_to_end(command.args(arguments).arg("--check-config"), TIMEOUT)?;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    Ok(())
}
