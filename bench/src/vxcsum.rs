//! The daemon that is measured.

use std::io::{BufRead as _, BufReader, copy, sink};
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vxcsum_tests::client::Socket;
use vxcsum_tests::netns::NetNs;
use vxcsum_tests::wait::wait_until;

/// A running `vxcsum run --quiet`, killed on drop.
#[derive(Debug)]
pub(crate) struct Vxcsum {
    child: Child,
    /// Where it answers.
    pub(crate) socket: Socket,
    /// From before its process was started until it said of the last interface that it watches it.
    pub(crate) started_in: Duration,
}

impl Vxcsum {
    /// Starts it inside `ns` and waits until it watches all interfaces.
    pub(crate) fn start(ns: &NetNs, interfaces: &[&str], options: &[&str]) -> Result<Self> {
        let socket = Socket::new()?;
        let interface_options = interfaces.iter().flat_map(|name| ["--interface", name]);
        let mut command = socket.command_in(ns, ["run", "--quiet"])?;
        command.args(interface_options).args(options);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let begin = Instant::now();
        let mut child = command.spawn().context("start vxcsum")?;
        let stderr = child.stderr.take();
        let mut vxcsum = Self { child, socket, started_in: Duration::ZERO };
        let mut messages = BufReader::new(stderr.context("no standard error")?);
        let (mut watched, mut said) = (0, String::new());
        while watched < interfaces.len() {
            let start = said.len();
            if messages.read_line(&mut said)? == 0 {
                bail!("vxcsum ended: {said}");
            }
            watched += usize::from(said[start..].contains("watching "));
        }
        vxcsum.started_in = begin.elapsed();
        // What it says from now on is to find a reader.
        thread::spawn(move || copy(&mut messages, &mut sink()));
        Ok(vxcsum)
    }

    /// Waits until it answers, which is when it is through with its start.
    pub(crate) fn wait_ready(&self) -> Result<()> {
        let answers = || Ok(self.socket.status().is_ok());
        wait_until("vxcsum answers", Duration::from_secs(10), answers)
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends it as a service manager does.
    pub(crate) fn stop(mut self) -> Result<()> {
        kill(Pid::from_raw(self.pid().cast_signed()), Signal::SIGTERM)?;
        let status = self.child.wait()?;
        ensure!(status.success(), "vxcsum ended with {status}");
        Ok(())
    }
}

impl Drop for Vxcsum {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
