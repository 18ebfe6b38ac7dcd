//! `vxcsum check`, and the tools that it is compared with.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::daemon::{Ended, binary, run_to_end};
use crate::netns::NetNs;
use crate::sh;
use crate::wait::wait_until;

/// For a run of anything here; all of it takes a fraction of that.
const TIMEOUT: Duration = Duration::from_mins(1);

/// What `vxcsum check --json` found.
#[derive(Debug, Clone)]
pub struct Checked {
    /// How it ended.
    pub ended: Ended,
    /// The packets, in order.
    pub packets: Vec<Value>,
    /// The summary, without what is around it; null where there is none.
    pub summary: Value,
}

impl Checked {
    /// Packets with a verdict, by the summary.
    pub fn count(&self, verdict: &str) -> u64 {
        self.summary["verdicts"][verdict]["packets"].as_u64().unwrap_or_default()
    }

    /// Packets that look bad and are not, by the summary.
    pub fn looks_bad(&self) -> u64 {
        self.summary["looks_bad"]["packets"].as_u64().unwrap_or_default()
    }

    /// Every packet is counted once.
    fn ensure_complete(&self) -> Result<()> {
        let number = |value: &Value| value.as_u64().unwrap_or_default();
        let verdicts = self.summary["verdicts"].as_object().into_iter().flatten();
        let vxlan: u64 = verdicts.map(|(_, tally)| number(&tally["packets"])).sum();
        let others = ["not_vxlan", "cut_short", "unreadable"];
        let others: u64 = others.iter().map(|name| number(&self.summary[name])).sum();
        ensure!(number(&self.summary["frames"]) == vxlan + others, "{:#}", self.summary);
        Ok(())
    }

    /// Frame numbers and verdicts of the packets.
    pub fn verdicts(&self) -> Vec<(u64, String)> {
        let verdict = |packet: &Value| {
            let name = packet["verdict"].as_str().unwrap_or_default();
            (packet["frame"].as_u64().unwrap_or_default(), name.to_owned())
        };
        self.packets.iter().map(verdict).collect()
    }
}

/// Runs `vxcsum check` with these arguments.
pub fn check<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Result<Ended> {
    run_to_end(Command::new(binary()?).arg("check").args(args), TIMEOUT)
}

/// The same with `--json`, taken apart.
pub fn check_json<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Result<Checked> {
    taken_apart(run_to_end(Command::new(binary()?).args(["check", "--json"]).args(args), TIMEOUT)?)
}

/// The same with a file on standard input, through a pipe.
pub fn check_json_piped(file: &Path, args: &str) -> Result<Checked> {
    let binary = binary()?;
    let line = format!("cat '{}' | '{}' check --json {args} -", file.display(), binary.display());
    taken_apart(run_to_end(Command::new("sh").args(["-c", &line]), TIMEOUT)?)
}

fn taken_apart(ended: Ended) -> Result<Checked> {
    let lines = ended.stdout.lines();
    let mut packets =
        lines.map(serde_json::from_str).collect::<serde_json::Result<Vec<Value>>>()?;
    let summary = match packets.pop() {
        Some(mut last) if last.get("summary").is_some() => last["summary"].take(),
        last => {
            packets.extend(last);
            Value::Null
        }
    };
    let checked = Checked { ended, packets, summary };
    checked.ensure_complete()?;
    Ok(checked)
}

/// What Wireshark says of the outer UDP checksum of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// It adds up.
    Good,
    /// It does not.
    Bad,
    /// There is none, or not all of the packet.
    Unknown,
}

/// Frame number and status of each UDP packet, by tshark.
pub fn tshark(file: &Path) -> Result<Vec<(u64, Status)>> {
    let mut command = Command::new("tshark");
    command.args(["-n", "-o", "udp.check_checksum:TRUE", "-Y", "udp", "-T", "fields"]);
    command.args(["-E", "occurrence=f", "-e", "frame.number", "-e", "udp.checksum.status"]);
    let text = sh::output(command.arg("-r").arg(file))?;
    let line = |line: &str| -> Result<_> {
        let (number, status) = line.split_once('\t').context("two fields")?;
        // `proto_checksum_status` in epan/proto.h.
        let status = match status {
            "0" => Status::Bad,
            "1" => Status::Good,
            _ => Status::Unknown,
        };
        Ok((number.parse()?, status))
    };
    text.lines().map(line).collect()
}

/// Converts a capture with editcap, of Wireshark.
pub fn editcap(options: &[&str], from: &Path, to: &Path) -> Result<()> {
    sh::output(Command::new("editcap").args(options).args([from, to])).map(drop)
}

/// Compresses a file with a tool that writes to standard output.
pub fn compress(tool: &str, options: &[&str], from: &Path, to: &Path) -> Result<()> {
    let output = Command::new(tool).args(options).arg("-c").arg(from).output();
    let output = output.with_context(|| format!("cannot start {tool}: is it installed?"))?;
    ensure!(output.status.success(), "{tool}: {}", String::from_utf8_lossy(&output.stderr));
    fs::write(to, output.stdout).with_context(|| to.display().to_string())
}

/// A running tcpdump.
#[derive(Debug)]
pub struct Tcpdump {
    child: Child,
}

impl Tcpdump {
    /// Writes what passes `device` in `ns` to `file`. From here on nothing is missed.
    pub fn start(ns: &NetNs, device: &str, options: &[&str], file: &Path) -> Result<Self> {
        let log = file.with_extension("log");
        let mut command = ns.command("tcpdump");
        command.args(["-Z", "root", "-n", "-U", "-i", device]);
        // In immediate mode each packet takes a slot of this length, whatever its own: with the
        // default length, the buffer has room for a few hundred.
        command.args(["--immediate-mode", "-s", "4096", "-B", "65536"]);
        command.args(options).arg("-w").arg(file).stderr(fs::File::create(&log)?);
        let tcpdump = Self { child: command.stdin(Stdio::null()).spawn().context("tcpdump")? };
        wait_until("tcpdump listens", TIMEOUT, || {
            Ok(fs::read_to_string(&log)?.contains("listening on"))
        })?;
        Ok(tcpdump)
    }

    /// Ends it; the file is complete then.
    pub fn stop(mut self) -> Result<()> {
        kill(Pid::from_raw(i32::try_from(self.child.id())?), Signal::SIGINT)?;
        let status = self.child.wait()?;
        ensure!(status.success(), "tcpdump: {status}");
        Ok(())
    }
}

impl Drop for Tcpdump {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
