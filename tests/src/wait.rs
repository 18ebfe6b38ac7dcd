//! Waiting for something, but not for ever.

use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::sh;

/// Looks every few milliseconds until `ready` gives something; it is an error, which names `what`,
/// if it does not in time.
pub fn wait_for<T>(
    what: &str,
    timeout: Duration,
    ready: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    sh::poll(timeout, ready)?.with_context(|| format!("not within {timeout:?}: {what}"))
}

/// The same for a condition.
pub fn wait_until(
    what: &str,
    timeout: Duration,
    mut holds: impl FnMut() -> Result<bool>,
) -> Result<()> {
    wait_for(what, timeout, || Ok(holds()?.then_some(())))
}
