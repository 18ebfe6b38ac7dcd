//! A `vxcsum tail --json` whose lines are timed.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, anyhow};
use vxcsum_tests::client::Socket;
use vxcsum_tests::daemon;

/// A running one, killed on drop.
#[derive(Debug)]
pub(crate) struct Tail {
    child: Child,
    reader: Option<JoinHandle<Vec<Line>>>,
}

/// When an event came, and the start of its line.
#[derive(Debug)]
struct Line {
    came: SystemTime,
    start: String,
}

/// What an event begins with: the time at which the packet left.
const TIME: &str = r#"{"time":""#;
const TIME_LEN: usize = 30;

impl Tail {
    /// Starts it, and waits until the daemon has taken it.
    pub(crate) fn start(socket: &Socket) -> Result<Self> {
        let mut command = Command::new(daemon::binary()?);
        command.args(["tail", "--json"]).arg("--socket").arg(socket.path());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        socket.with_one_more_client(|| {
            let mut child = command.spawn().context("start vxcsum tail")?;
            let stdout = child.stdout.take();
            let mut tail = Self { child, reader: None };
            let stdout = BufReader::new(stdout.context("no standard output")?);
            tail.reader = Some(thread::spawn(move || {
                let lines = stdout.lines().map_while(Result::ok);
                let timed = lines.filter(|line| !line.contains(r#","stall":{"#)).map(|mut line| {
                    let came = SystemTime::now();
                    line.truncate(TIME.len() + TIME_LEN);
                    line.shrink_to_fit();
                    Line { came, start: line }
                });
                timed.collect()
            }));
            Ok(tail)
        })
    }

    /// Ends it; returns how long each event took from the packet to the line, in microseconds.
    pub(crate) fn stop(mut self) -> Result<Vec<f64>> {
        self.child.kill()?;
        self.child.wait()?;
        let reader = self.reader.take().context("no reader")?;
        let lines = reader.join().map_err(|_| anyhow!("the reader of vxcsum tail panicked"))?;
        // What is no event has no time: how many it has missed, and half a line at the end.
        let took = |line: Line| {
            let left = humantime::parse_rfc3339(line.start.strip_prefix(TIME)?).ok()?;
            // Its clock is that of boot time, the difference read now and then.
            let took = line.came.duration_since(left).unwrap_or(Duration::ZERO);
            Some(took.as_secs_f64() * 1e6)
        };
        Ok(lines.into_iter().filter_map(took).collect())
    }
}

impl Drop for Tail {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
