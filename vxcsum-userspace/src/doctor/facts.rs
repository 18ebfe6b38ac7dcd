//! All that was seen of a node, before it is judged.

use std::collections::BTreeMap;
use std::path::PathBuf;

use crate::doctor::conntrack::Tracking;
use crate::doctor::devices::Device;
use crate::doctor::kernel::Kernel;
use crate::doctor::receive::Counters;
use crate::doctor::report::{Rule, Unseen};
use crate::netfilter::Backend;

/// All that was seen.
#[derive(Clone, Debug)]
pub struct Facts {
    /// The kernel.
    pub kernel: Kernel,
    /// The VXLAN devices of this network namespace, or why they could not be read.
    pub devices: Result<Vec<Device>, String>,
    /// NAT rules.
    pub rules: Rules,
    /// Connection tracking.
    pub tracking: Tracking,
    /// The receiver's counters at first, and later.
    pub received: [Counters; 2],
    /// How much later, in seconds.
    pub seconds: f64,
    /// `CAP_NET_ADMIN` is there, without which rules and connections are not shown.
    pub is_privileged: bool,
    /// Where the programs are that remedies call, those that are installed.
    pub tools: BTreeMap<&'static str, PathBuf>,
}

/// Rules, as far as tunnel packets can meet them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// Rules that can rewrite tunnel packets, in order.
    pub hits: Vec<Hit>,
    /// Rules that write the UDP checksum of tunnel packets.
    pub checksum_writers: Vec<ChecksumWriter>,
    /// What becomes of kube-proxy's mark, where kube-proxy is.
    pub kube_proxy: Option<KubeProxy>,
    /// What could not be read, and why.
    pub unread: Vec<Unseen>,
}

/// A rule that can rewrite the tunnel packets of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hit {
    /// Name of the device.
    pub device: String,
    /// The rule.
    pub rule: Rule,
    /// What it was made with, and where a rule has to stand to come before it.
    pub entry: Entry,
    /// Whether nothing but tunnel packets can match it, so that its counter is evidence.
    pub is_specific: bool,
    /// It matches only what carries this mark.
    pub mark: Option<Mark>,
    /// All that leads to it was understood, and matches.
    pub is_certain: bool,
    /// It masquerades to the address that the packet has, and changes the port only where another
    /// flow has the same (no `--random-fully`).
    pub keeps_source: bool,
}

/// A base chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What it was made with.
    pub backend: Backend,
    /// Family of its table, as nft calls it.
    pub family: &'static str,
    /// Its table.
    pub table: String,
    /// Its name.
    pub chain: String,
}

/// The mark that a rule asks for, and why a tunnel packet can have it: it gets the mark of the
/// packet inside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Its bits.
    pub bits: u32,
    /// What becomes of it on the packet inside.
    pub fate: Fate,
}

/// What becomes of a mark on its way out through a VXLAN device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Fate {
    /// The rule that clears it.
    pub unmark: Option<String>,
    /// The rule that takes packets before that one, or may do so.
    pub taken_by: Option<String>,
}

/// kube-proxy's rules are there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KubeProxy {
    /// The mark of packets that it is to masquerade.
    pub bits: u32,
    /// What becomes of that.
    pub fate: Fate,
}

/// A rule that writes the UDP checksum of a device's packets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChecksumWriter {
    /// Name of the device.
    pub device: String,
    /// The rule.
    pub rule: Rule,
}
