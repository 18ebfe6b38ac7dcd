//! Giving up what is not needed.

use anyhow::{Context as _, Result};
use caps::{CapSet, Capability, CapsHashSet};

/// What the daemon goes on with: loading and attaching programs to interfaces that come, and reading
/// the offload state.
const KEPT: [Capability; 3] =
    [Capability::CAP_BPF, Capability::CAP_PERFMON, Capability::CAP_NET_ADMIN];

/// Keeps those of [`KEPT`] that the process has, and nothing else, for good. For the calling thread
/// and those that it starts later: call it before there are others.
pub fn drop_privileges() -> Result<()> {
    nix::sys::prctl::set_no_new_privs().context("cannot forbid new privileges")?;
    let permitted = caps::read(None, CapSet::Permitted).context("cannot read capabilities")?;
    let kept: CapsHashSet = KEPT.into_iter().filter(|cap| permitted.contains(cap)).collect();
    // Dropping from the bounding set takes CAP_SETPCAP, which only root starts with.
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP).unwrap_or(false) {
        for cap in caps::all().difference(&kept) {
            // Fails for capabilities that this kernel does not know.
            let _ = caps::drop(None, CapSet::Bounding, *cap);
        }
    }
    caps::clear(None, CapSet::Ambient).context("cannot clear ambient capabilities")?;
    caps::clear(None, CapSet::Inheritable).context("cannot clear inheritable capabilities")?;
    caps::set(None, CapSet::Effective, &kept).context("cannot drop capabilities")?;
    caps::set(None, CapSet::Permitted, &kept).context("cannot drop capabilities")?;
    Ok(())
}
