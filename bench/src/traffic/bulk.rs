//! TCP in bulk, by iperf3.

use std::cell::RefCell;
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vxcsum_tests::counters;
use vxcsum_tests::lab::{Lab, LabConfig, NIC, VXLAN};
use vxcsum_tests::wait::{wait_for, wait_until};

use super::subject::{Busy, Sample, Subject};
use super::{SENDER_CPU, SETTLE};

/// How long the bytes of a connection are counted, how many times in a row. The fastest counts: whatever
/// interrupts it makes it slower, and nothing makes it faster.
const SLICE: Duration = Duration::from_millis(200);
const SLICES: usize = 4;

/// A lab whose NICs leave all sums and all cutting to hardware that is not there, and a server in it.
pub(super) struct Bulk {
    // The client goes first, the server then.
    connection: RefCell<Option<Iperf>>,
    _server: Iperf,
    pub(super) lab: Lab,
}

impl Bulk {
    /// Sets it up.
    pub(super) fn new() -> Result<Self> {
        let lab = LabConfig::default().start()?;
        for ns in [&lab.a, &lab.b] {
            ns.run(&format!("ethtool -K {NIC} tx on tso on gso on"))?;
        }
        Ok(Self { connection: RefCell::default(), _server: Iperf::server(&lab)?, lab })
    }

    /// Gbit/s of a connection at speed. It is the same for as many subjects as can be, because
    /// each finds another speed for itself.
    pub(super) fn send(&self, subject: Subject, pid: Option<u32>) -> Result<Sample> {
        let mut connection = self.connection.borrow_mut();
        if subject.needs_new_connection() {
            connection.take();
        }
        if !connection.as_mut().is_some_and(Iperf::is_running) {
            *connection = Some(self.connect()?);
            thread::sleep(SETTLE);
        }
        thread::sleep(SETTLE);
        let busy = Busy::start(pid)?;
        let mut fastest = 0.0_f64;
        let mut before = self.received_at()?;
        for _ in 0..SLICES {
            thread::sleep(SLICE);
            let after = self.received_at()?;
            let took = (after.0 - before.0).as_secs_f64();
            fastest = fastest.max((after.1 - before.1) as f64 / took);
            before = after;
        }
        if subject.needs_new_connection() {
            connection.take();
        }
        busy.stop(8.0 * fastest / 1e9)
    }

    /// Starts a client; returns once data have come.
    fn connect(&self) -> Result<Iperf> {
        let before = self.received()?;
        // The server may not be through with the connection before, and sends the client away.
        let mut client = Iperf::client(&self.lab)?;
        wait_for("iperf3 sends", Duration::from_secs(5), || {
            if !client.is_running() {
                client = Iperf::client(&self.lab)?;
            }
            Ok((self.received()? > before + (1 << 20)).then_some(()))
        })?;
        Ok(client)
    }

    /// Bytes that have come through the tunnel.
    fn received(&self) -> Result<u64> {
        Ok(counters::device(&self.lab.b, VXLAN)?.rx_bytes)
    }

    /// The same, and when: in the middle of the look.
    fn received_at(&self) -> Result<(Instant, u64)> {
        let start = Instant::now();
        let bytes = self.received()?;
        Ok((start + start.elapsed() / 2, bytes))
    }
}

const IPERF_PORT: &str = "5201";
/// The longest that a connection sends, in seconds; another one follows then.
const SECONDS: &str = "60";
/// A running `iperf3`, ended on drop.
struct Iperf(Child);

impl Iperf {
    fn server(lab: &Lab) -> Result<Self> {
        let mut command = lab.b.command("iperf3");
        command.args(["-s", "-p", IPERF_PORT]).stdin(Stdio::null()).stdout(Stdio::null());
        let server = Self(command.spawn().context("start iperf3")?);
        wait_until("iperf3 listens", Duration::from_secs(5), || {
            Ok(lab.b.run("ss -Hltn")?.contains(&format!(":{IPERF_PORT}")))
        })?;
        Ok(server)
    }

    /// One connection, sender and receiver on a processor each.
    fn client(lab: &Lab) -> Result<Self> {
        let (from, to) = (SENDER_CPU, (SENDER_CPU + 1) % thread::available_parallelism()?.get());
        let mut command = lab.a.command("iperf3");
        command.args(["-c", &lab.inner_b().to_string(), "-p", IPERF_PORT]);
        command.args(["-A", &format!("{from},{to}"), "-t", SECONDS]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Ok(Self(command.spawn().context("start iperf3")?))
    }

    fn is_running(&mut self) -> bool {
        matches!(self.0.try_wait(), Ok(None))
    }
}

impl Drop for Iperf {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.0.id().cast_signed()), Signal::SIGTERM);
        let _ = self.0.wait();
    }
}
