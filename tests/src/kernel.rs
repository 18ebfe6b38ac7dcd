//! The kernel that the tests run on.

use std::fs;

use anyhow::{Context as _, Result, bail};

/// Major and minor version: for what is known of a version, not to find out what it can do.
pub fn version() -> Result<(u32, u32)> {
    let path = "/proc/sys/kernel/osrelease";
    let release = fs::read_to_string(path).context(path)?;
    let mut numbers = release.split('.').map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => Ok((major, minor)),
        _ => bail!("cannot read the version in {release:?}"),
    }
}
