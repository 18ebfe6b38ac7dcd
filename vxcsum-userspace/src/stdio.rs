//! Standard output and standard error, each of which may be closed, or full.

use std::fmt::Display;
use std::io::{self, Write as _};

use anyhow::{Context as _, Result};
use serde::Serialize;

/// Says something to people on standard error. Where that cannot be written there is nobody to tell,
/// which is no reason to fail.
pub fn say(message: impl Display) {
    let _ = writeln!(io::stderr(), "vxcsum: {message}");
}

/// Prints a line on standard output.
pub fn print(line: impl Display) -> Result<()> {
    written(writeln!(io::stdout(), "{line}"))
}

/// What writing to standard output has come to: that nobody reads any more is no error.
pub fn written(outcome: io::Result<()>) -> Result<()> {
    match outcome {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("cannot write to standard output"),
    }
}

/// One JSON object on a line of its own.
pub(crate) fn write_json(out: &mut impl io::Write, value: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer(&mut *out, value)?;
    out.write_all(b"\n")
}
