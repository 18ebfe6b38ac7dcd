//! The demonstration: the real bug of this machine's kernel, seen, proved and cured.

use anyhow::{Result, bail};

/// Shows the bug and the cure in a lab of two network namespaces.
pub(crate) fn run() -> Result<()> {
    bail!("the demo is not written yet")
}
