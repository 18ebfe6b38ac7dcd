//! `vxcsum doctor`: what is wrong with this node, without attaching anything and without changing
//! anything.
//!
//! Facts are gathered first ([`facts`]), judged then ([`judge`], [`remedies`]) and shown at last
//! ([`report`]).

use std::collections::BTreeMap;
use std::env;
use std::path::{Path, PathBuf};
use std::time::Duration;

use caps::{CapSet, Capability};
use nix::unistd::{AccessFlags, access};
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep_until};

use crate::links::{Links, remotes};
use crate::netfilter;

pub mod conntrack;
pub mod devices;
pub mod facts;
pub mod judge;
pub mod kernel;
pub mod offloads;
pub mod receive;
pub mod remedies;
pub mod report;
pub mod rules;
#[cfg(test)]
mod tests;

use conntrack::Tracking;
use facts::{Facts, Rules};
use receive::Counters;
use report::{Report, Unseen};

/// Looks at this node for about as long as `watch`, and judges it.
pub async fn diagnose(watch: Duration) -> Report {
    judge::judge(&gather(watch).await)
}

async fn gather(watch: Duration) -> Facts {
    let links = Links::read().await;
    // Without them, rules about destinations may match.
    let remotes = remotes().await.unwrap_or_default();
    let devices = links.as_ref().map(|links| devices::of_links(links, &remotes));
    let devices = devices.map_err(ToString::to_string);
    let known = devices.as_deref().unwrap_or_default();
    let own = links.as_ref().map(devices::addresses).unwrap_or_default();
    let mut ports: Vec<u16> = known.iter().map(|device| device.port).collect();
    if ports.is_empty() {
        ports.extend(judge::USUAL_PORTS);
    }

    let start = Instant::now();
    let before = Counters::read(&ports);
    // Reading rules waits for other programs.
    let ruleset = spawn_blocking(netfilter::read).await;
    sleep_until(start + watch).await;
    let seconds = start.elapsed().as_secs_f64();
    let received = [before, Counters::read(&ports)];
    // Last, so that it shows what traffic did meanwhile.
    let tracking = Tracking::read(&ports, &own);

    let rules = match &ruleset {
        Ok(ruleset) => rules::of_ruleset(ruleset, known),
        Err(error) => {
            let unread = Unseen { what: "rules".to_owned(), why: error.to_string() };
            Rules { unread: vec![unread], ..Rules::default() }
        }
    };
    Facts {
        kernel: kernel::Kernel::read(),
        rules,
        devices,
        tracking,
        received,
        seconds: if watch.is_zero() { 0.0 } else { seconds },
        is_privileged: caps::has_cap(None, CapSet::Effective, Capability::CAP_NET_ADMIN)
            .unwrap_or_default(),
        tools: tools(),
    }
}

/// Where programs are: in `PATH`, and where administrators have them.
fn tools() -> BTreeMap<&'static str, PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let folders: Vec<PathBuf> = env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .filter(|folder| folder.is_absolute())
        .collect();
    let find = |tool: &'static str| {
        let mut found = folders.iter().map(|folder| folder.join(tool));
        found.find(|path| is_program(path)).map(|path| (tool, path))
    };
    remedies::TOOLS.into_iter().filter_map(find).collect()
}

fn is_program(path: &Path) -> bool {
    path.is_file() && access(path, AccessFlags::X_OK).is_ok()
}
