//! `vxcsum tail`, `status` and `fix`: what talks to the daemon.

use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Deserialize;
use serde::de::IgnoredAny;
use vxcsum_common::layout::FixMode;

use crate::cause::Narrator;
use crate::event::Event;
use crate::protocol::{Command, Filter, Notice};
use crate::stalls;
use crate::stdio::{self, write_json};
use crate::summary::Summary;

/// Between the two looks that a rate is made of.
const RATE_INTERVAL: Duration = Duration::from_secs(1);

/// A connection to the daemon.
struct Daemon {
    stream: BufReader<UnixStream>,
}

/// A line of the daemon.
#[derive(Deserialize)]
#[serde(untagged)]
enum Said {
    Notice(Notice),
    Stall(Box<stalls::Line>),
    Event(Box<Event>),
    Summary(Box<Summary>),
    /// An event or a stall that goes on as it is.
    #[serde(skip)]
    Passed {
        is_stall: bool,
    },
}

/// What only events and stalls have.
#[derive(Deserialize)]
struct Timed {
    #[serde(rename = "time")]
    _time: IgnoredAny,
    stall: Option<IgnoredAny>,
}

impl Daemon {
    fn ask(socket: &Path, command: &Command) -> Result<Self> {
        let stream = UnixStream::connect(socket).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => anyhow::anyhow!(
                "no vxcsum is running at {}: start one with `vxcsum run`, or name its socket with \
                 --socket",
                socket.display()
            ),
            io::ErrorKind::PermissionDenied => anyhow::anyhow!(
                "not permitted to use {}: run as root, or as a member of the daemon's \
                 --socket-group",
                socket.display()
            ),
            _ => anyhow::anyhow!("cannot connect to {}: {error}", socket.display()),
        })?;
        let mut line = serde_json::to_vec(command)?;
        line.push(b'\n');
        match (&stream).write_all(&line) {
            // It has turned us away already, and what it has said about that is there to be read.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            other => other.context("cannot ask the daemon")?,
        }
        Ok(Self { stream: BufReader::new(stream) })
    }

    /// The next line; none when the daemon has ended. With `pass`, events and stalls are not
    /// read.
    fn next(&mut self, pass: bool) -> Result<Option<(String, Said)>> {
        let mut line = String::new();
        if self.stream.read_line(&mut line).context("cannot read from the daemon")? == 0 {
            return Ok(None);
        }
        line.truncate(line.trim_end().len());
        if pass && let Ok(timed) = serde_json::from_str::<Timed>(&line) {
            return Ok(Some((line, Said::Passed { is_stall: timed.stall.is_some() })));
        }
        let said = serde_json::from_str(&line)
            .with_context(|| format!("the daemon speaks another version's language: {line}"))?;
        match said {
            Said::Notice(Notice::Error(error)) => bail!("{error}"),
            said => Ok(Some((line, said))),
        }
    }
}

impl Daemon {
    /// Waits until the daemon says something; false where nobody reads standard output any more,
    /// which would not show before the next event.
    fn wait(&self) -> Result<bool> {
        if !self.stream.buffer().is_empty() {
            return Ok(true);
        }
        let stdout = io::stdout();
        // Errors are told without being asked for.
        let mut ends = [
            PollFd::new(self.stream.get_ref().as_fd(), PollFlags::POLLIN),
            PollFd::new(stdout.as_fd(), PollFlags::empty()),
        ];
        poll(&mut ends, PollTimeout::NONE).context("cannot wait for the daemon")?;
        Ok(!ends[1].any().unwrap_or_default() || ends[0].any().unwrap_or_default())
    }
}

/// Prints live events and stalls, at most `limit` events; or only stalls, at most `limit` of them.
pub fn tail(socket: &Path, filter: Filter, limit: Option<u64>, json: bool) -> Result<()> {
    let only_stalls = filter.stalls;
    let mut daemon = Daemon::ask(socket, &Command::Tail(filter))?;
    let mut out = io::stdout().lock();
    let mut left = limit.unwrap_or(u64::MAX);
    let mut narrator = Narrator::default();
    while left > 0 && daemon.wait()? {
        let Some((line, said)) = daemon.next(json)? else { break };
        let is_stall = matches!(said, Said::Stall(_) | Said::Passed { is_stall: true });
        let written = match said {
            Said::Passed { .. } => writeln!(out, "{line}"),
            Said::Event(event) => narrator.write(&mut out, &event),
            Said::Stall(line) => writeln!(out, "{line}"),
            Said::Notice(Notice::Missed(count)) => {
                stdio::say(format_args!("too slow, {count} events were missed"));
                continue;
            }
            Said::Notice(Notice::MissedStalls(count)) => {
                stdio::say(format_args!("too slow, {count} lines about stalls were missed"));
                continue;
            }
            _ => continue,
        };
        match written.and_then(|()| out.flush()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => break,
            other => other.context("cannot write to standard output")?,
        }
        left -= u64::from(only_stalls || !is_stall);
    }
    Ok(())
}

/// Prints counters and attachment.
pub fn status(socket: &Path, json: bool) -> Result<()> {
    let first = summary(socket)?;
    let mut out = io::stdout().lock();
    let outcome = if json {
        write_json(&mut out, &first)
    } else {
        let start = Instant::now();
        sleep(RATE_INTERVAL);
        let second = summary(socket)?;
        writeln!(out, "{}", second.table(&first, start.elapsed()))
    };
    stdio::written(outcome)
}

fn summary(socket: &Path) -> Result<Summary> {
    match Daemon::ask(socket, &Command::Status {})?.next(false)? {
        Some((_, Said::Summary(summary))) => Ok(*summary),
        _ => bail!("the daemon did not answer"),
    }
}

/// Switches the fix mode.
pub fn fix(socket: &Path, mode: FixMode) -> Result<()> {
    match Daemon::ask(socket, &Command::Fix { mode })?.next(false)? {
        Some((_, Said::Notice(Notice::Fix(mode)))) => {
            stdio::print(format_args!("fix {}", mode.as_str()))
        }
        _ => bail!("the daemon did not answer"),
    }
}
