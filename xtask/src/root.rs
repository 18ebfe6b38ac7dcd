//! What only root may do, for people who are not.

use std::{ffi::OsString, process::Command};

use anyhow::{Result, bail};
use nix::unistd::Uid;

use crate::process;

/// The words that put in front of a command line make it run as root: none if we are root.
///
/// Only what needs root goes through sudo, never a whole task: cargo run by root would leave files
/// in the user's target and cargo folders that the user cannot replace.
pub(crate) fn prefix(what: &str) -> Result<Vec<OsString>> {
    if Uid::effective().is_root() {
        return Ok(Vec::new());
    }
    let Some(sudo) = process::find("sudo") else {
        bail!("{what} needs root, and there is no sudo here: run this as root");
    };
    Ok(vec![sudo.into(), "--".into()])
}

/// A command that runs as root with these variables set, which sudo alone would not pass on.
pub(crate) fn command(what: &str, variables: &[(&str, &str)], program: &str) -> Result<Command> {
    let mut words = prefix(what)?.into_iter();
    let mut command = match words.next() {
        Some(sudo) => {
            let mut command = process::command(&sudo.to_string_lossy());
            command.args(words).arg("env");
            command
        }
        None => process::command("env"),
    };
    command.args(variables.iter().map(|(name, value)| format!("{name}={value}"))).arg(program);
    Ok(command)
}
