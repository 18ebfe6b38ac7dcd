//! TCP in bulk, by iperf3.

use std::process::{Child, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use vxcsum_tests::daemon::run_to_end;
use vxcsum_tests::lab::{Lab, LabConfig, NIC};
use vxcsum_tests::wait::{wait_for, wait_until};

use super::subject::{Busy, Sample};
use super::{SENDER_CPU, SETTLE};

/// A lab whose NICs leave all sums and all cutting to hardware that is not there, and a server in it.
pub(super) struct Bulk {
    // The server goes first.
    _server: Server,
    pub(super) lab: Lab,
}

impl Bulk {
    /// Sets it up.
    pub(super) fn new() -> Result<Self> {
        let lab = LabConfig::default().start()?;
        for ns in [&lab.a, &lab.b] {
            ns.run(&format!("ethtool -K {NIC} tx on tso on gso on"))?;
        }
        Ok(Self { _server: Server::start(&lab)?, lab })
    }

    /// One connection; Gbit/s from when it is at speed.
    pub(super) fn send(&self, pid: Option<u32>) -> Result<Sample> {
        let (from, to) = (SENDER_CPU, (SENDER_CPU + 1) % thread::available_parallelism()?.get());
        let mut command = self.lab.a.command("iperf3");
        command.args(["-c", &self.lab.inner_b().to_string(), "-p", IPERF_PORT, "-J", "-i", "0.1"]);
        command.args(["-A", &format!("{from},{to}"), "-t", SECONDS]);
        // The server may not be through with the connection before.
        let (busy, answer) = wait_for("iperf3 has time", Duration::from_secs(5), || {
            let busy = Busy::start(pid)?;
            let ended = run_to_end(&mut command, Duration::from_secs(10)).context("iperf3")?;
            let answer: Value = serde_json::from_str(&ended.stdout).context("iperf3's answer")?;
            let is_busy = answer["error"].as_str().is_some_and(|error| error.contains("busy"));
            ensure!(ended.code == Some(0) || is_busy, "iperf3: {}", answer["error"]);
            Ok((!is_busy).then_some((busy, answer)))
        })?;
        let seconds = |interval: &Value, name: &str| interval[name].as_f64().unwrap_or_default();
        let intervals = answer["intervals"].as_array().context("iperf3 tells of no interval")?;
        let (mut bytes, mut took) = (0.0, 0.0);
        for interval in intervals.iter().map(|interval| &interval["sum"]) {
            if seconds(interval, "start") >= SETTLE.as_secs_f64() - 0.01 {
                bytes += seconds(interval, "bytes");
                took += seconds(interval, "seconds");
            }
        }
        ensure!(took > 0.0, "iperf3 tells of no interval after the first {SETTLE:?}");
        busy.stop(8.0 * bytes / took / 1e9)
    }
}

const IPERF_PORT: &str = "5201";
/// How long a connection sends: iperf3 takes whole seconds only.
const SECONDS: &str = "1";

/// A running `iperf3 -s`, killed on drop.
struct Server(Child);

impl Server {
    fn start(lab: &Lab) -> Result<Self> {
        let mut command = lab.b.command("iperf3");
        command.args(["-s", "-p", IPERF_PORT]).stdin(Stdio::null()).stdout(Stdio::null());
        let server = Self(command.spawn().context("start iperf3")?);
        wait_until("iperf3 listens", Duration::from_secs(5), || {
            Ok(lab.b.run("ss -Hltn")?.contains(&format!(":{IPERF_PORT}")))
        })?;
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.0.id().cast_signed()), Signal::SIGTERM);
        let _ = self.0.wait();
    }
}
