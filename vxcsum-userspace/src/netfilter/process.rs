//! Asking another program, within bounds.

use std::io;
use std::os::fd::AsFd as _;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Instant;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Most that is taken from a program, in bytes: 20,000 rules make some 10 MiB.
const MAX_LEN: usize = 64 << 20;

/// Runs a program to its end, which has to come before `deadline`, and returns what it has printed,
/// or why there is nothing.
pub(super) fn output(program: &str, args: &[&str], deadline: Instant) -> Result<Vec<u8>, String> {
    let mut command = Command::new(program);
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // Nothing of the environment changes what it says, but where programs are.
    command.env_clear().envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
    let mut child = command.spawn().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => format!("{program} is not installed"),
        _ => format!("cannot run {program}: {error}"),
    })?;
    let outcome = collect(&mut child, deadline);
    if outcome.is_err() {
        // Fails where it has ended by itself.
        let _ = child.kill();
    }
    let status = child.wait().map_err(|error| format!("{program}: {error}"))?;
    let (stdout, stderr) = outcome.map_err(|error| format!("{program}: {error}"))?;
    if status.success() { Ok(stdout) } else { Err(complaint(program, status, &stderr)) }
}

fn complaint(program: &str, status: ExitStatus, stderr: &[u8]) -> String {
    let stderr = String::from_utf8_lossy(stderr);
    let first = stderr.lines().find(|line| !line.trim().is_empty());
    match first {
        Some(line) => format!("{program}: {}", line.trim()),
        None => format!("{program} ended with {status}"),
    }
}

fn collect(child: &mut Child, deadline: Instant) -> io::Result<(Vec<u8>, Vec<u8>)> {
    let (mut stdout, mut stderr) = (child.stdout.take(), child.stderr.take());
    let (mut printed, mut complained) = (Vec::new(), Vec::new());
    let mut buffer = vec![0; 64 << 10];
    while stdout.is_some() || stderr.is_some() {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::Error::other("it takes too long"));
        }
        // Either may be over before the other.
        let mut ends = Vec::with_capacity(2);
        ends.extend(stdout.as_ref().map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLIN)));
        ends.extend(stderr.as_ref().map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLIN)));
        poll(&mut ends, PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX))?;
        let mut ready = ends.iter().map(|end| end.any().unwrap_or_default()).collect::<Vec<_>>();
        ready.reverse();
        drop(ends);
        if stdout.is_some() && ready.pop() == Some(true) {
            read_some(&mut stdout, &mut buffer, &mut printed)?;
        }
        if stderr.is_some() && ready.pop() == Some(true) {
            read_some(&mut stderr, &mut buffer, &mut complained)?;
        }
        if printed.len() + complained.len() > MAX_LEN {
            return Err(io::Error::other(format!("it says more than {} MiB", MAX_LEN >> 20)));
        }
    }
    Ok((printed, complained))
}

/// Takes the pipe away at its end.
fn read_some(
    pipe: &mut Option<impl io::Read>,
    buffer: &mut [u8],
    into: &mut Vec<u8>,
) -> io::Result<()> {
    let len = match pipe.as_mut().map(|pipe| pipe.read(buffer)) {
        Some(Err(error)) if error.kind() == io::ErrorKind::Interrupted => return Ok(()),
        Some(read) => read?,
        None => 0,
    };
    if len == 0 {
        *pipe = None;
    }
    into.extend_from_slice(&buffer[..len]);
    Ok(())
}
