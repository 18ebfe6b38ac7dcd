//! Running other programs.

use std::io::Write as _;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

/// Runs a command to its end and returns its standard output; an error carries what it said.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    output_with_input(command, "")
}

/// The same, with `input` on standard input.
pub(crate) fn output_with_input(command: &mut Command, input: &str) -> Result<String> {
    let line = display(command);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start `{line}`: is the program installed?"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that ends before it has read everything says why by its exit code.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().with_context(|| format!("`{line}`"))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("`{line}` failed ({}): {}", output.status, stderr.trim());
    }
    String::from_utf8(output.stdout).with_context(|| format!("`{line}` printed other than UTF-8"))
}

fn display(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// More time where everything takes longer: in an emulated machine (`cargo xtask vm`).
pub(crate) fn patience(timeout: Duration) -> Duration {
    if std::env::var_os("VXCSUM_INSIDE_VM").is_some() { timeout * 10 } else { timeout }
}

/// Looks every few milliseconds until `ready` gives something or the time is over.
pub(crate) fn poll<T>(
    timeout: Duration,
    mut ready: impl FnMut() -> Result<Option<T>>,
) -> Result<Option<T>> {
    let deadline = Instant::now() + patience(timeout);
    loop {
        if let Some(value) = ready()? {
            return Ok(Some(value));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        thread::sleep(Duration::from_millis(5));
    }
}
