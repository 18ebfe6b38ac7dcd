//! Giving up what is not needed.

use anyhow::{Context as _, Result};
use caps::{CapSet, Capability, CapsHashSet};

use crate::program::LoadError;

/// What the daemon goes on with: loading and attaching programs to interfaces that come, and reading
/// the offload state.
const KEPT: [Capability; 3] =
    [Capability::CAP_BPF, Capability::CAP_PERFMON, Capability::CAP_NET_ADMIN];

/// Before kernels had the finer ones (5.8), and in containers that do not know them, this one stands
/// for `CAP_BPF` and `CAP_PERFMON`.
const COARSE: Capability = Capability::CAP_SYS_ADMIN;

/// Refuses to go on without what loading and attaching take.
pub fn check_privileges() -> Result<(), LoadError> {
    let has = |cap| caps::has_cap(None, CapSet::Effective, cap).unwrap_or(false);
    let is_enough = has(Capability::CAP_NET_ADMIN)
        && (has(COARSE) || has(Capability::CAP_BPF) && has(Capability::CAP_PERFMON));
    if is_enough { Ok(()) } else { Err(LoadError::NotPermitted) }
}

/// Keeps those of [`KEPT`] that the process has, or what stands for them, and nothing else, for good. For the calling thread
/// and those that it starts later: call it before there are others.
pub fn drop_privileges() -> Result<()> {
    nix::sys::prctl::set_no_new_privs().context("cannot forbid new privileges")?;
    let permitted = caps::read(None, CapSet::Permitted).context("cannot read capabilities")?;
    let mut kept: CapsHashSet = KEPT.into_iter().filter(|cap| permitted.contains(cap)).collect();
    if kept.len() < KEPT.len() && permitted.contains(&COARSE) {
        kept.insert(COARSE);
    }
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
