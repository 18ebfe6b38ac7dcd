//! What is done to traffic, and what that takes.

use std::fs;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use aya::programs::links::LinkOrder;
use aya::programs::tc::{TcAttachOptions, TcAttachType};
use vxcsum_tests::folder::Folder;
use vxcsum_tests::lab::{NIC, VXLAN};
use vxcsum_tests::netns::NetNs;
use vxcsum_tests::wait::wait_until;

use crate::reference::{self, Objects};
use crate::usage;
use crate::vxcsum::Vxcsum;

/// Of VXLAN, in the labs.
pub(super) const PORT: u16 = 8472;

const WITHOUT: &str = "without";

/// What is done to the traffic.
#[derive(Debug, Clone, Copy)]
pub(super) enum Subject {
    Without,
    /// A program that does nothing, which shows what the hook itself takes.
    Empty,
    Vxcsum(&'static str, &'static [&'static str]),
    Cure,
    Nft,
    Tcpdump,
}

pub(super) const SUBJECTS: [Subject; 8] = [
    Subject::Without,
    Subject::Empty,
    Subject::Vxcsum("vxcsum, tcx", &["--attach", "tcx"]),
    Subject::Vxcsum("vxcsum, clsact", &["--attach", "clsact"]),
    Subject::Vxcsum("vxcsum --fix restore", &["--fix", "restore"]),
    Subject::Cure,
    Subject::Nft,
    Subject::Tcpdump,
];

impl Subject {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Without => WITHOUT,
            Self::Empty => "an empty program, tcx",
            Self::Vxcsum(name, _) => name,
            Self::Cure => "ethtool -K, checksum offload off",
            Self::Nft => "nft, udp checksum set 0",
            Self::Tcpdump => "tcpdump -s 128 -w FILE",
        }
    }

    /// How the README names it.
    pub(super) fn quoted(self) -> Option<&'static str> {
        match self {
            Self::Vxcsum(_, ["--attach", "tcx"]) => Some("watched by vxcsum"),
            Self::Cure => Some("with checksum offload off (`ethtool -K`) instead"),
            Self::Tcpdump => Some("with tcpdump writing headers instead"),
            _ => None,
        }
    }

    /// Whether connections that are there already go on as before.
    pub(super) const fn needs_new_connection(self) -> bool {
        matches!(self, Self::Cure)
    }

    pub(super) const fn is_vxcsum(self) -> bool {
        matches!(self, Self::Vxcsum(..))
    }

    /// Does to the node what it is about, measures, and undoes it. `measure` gets the process that
    /// watches, if any.
    pub(super) fn measured(
        self,
        node: &NetNs,
        measure: impl FnOnce(Option<u32>) -> Result<Sample>,
    ) -> Result<Sample> {
        match self {
            Self::Without => measure(None),
            Self::Empty => {
                let mut ebpf = Objects::compile()?.load_empty()?;
                let empty = reference::classifier(&mut ebpf, "empty")?;
                node.enter(|| {
                    let order = TcAttachOptions::TcxOrder(LinkOrder::first());
                    Ok(empty.attach_with_options(NIC, TcAttachType::Egress, order)?)
                })?;
                measure(None)
            }
            Self::Vxcsum(_, options) => {
                let vxcsum = Vxcsum::start(node, &[NIC], options)?;
                vxcsum.wait_ready()?;
                let sample = measure(Some(vxcsum.pid()))?;
                vxcsum.stop()?;
                // It leaves the qdisc that it has made, and the next one is to find none.
                if options.contains(&"clsact") {
                    node.run(&format!("tc qdisc del dev {NIC} clsact"))?;
                }
                Ok(sample)
            }
            Self::Cure => {
                let turn =
                    |how| node.run(&format!("ethtool -K {VXLAN} tx-checksum-ip-generic {how}"));
                turn("off")?;
                let sample = measure(None);
                turn("on")?;
                sample
            }
            Self::Nft => {
                for command in [
                    "add table ip vxcsum_bench".to_owned(),
                    "add chain ip vxcsum_bench post { type filter hook postrouting priority 300; }"
                        .to_owned(),
                    format!("add rule ip vxcsum_bench post udp dport {PORT} udp checksum set 0"),
                ] {
                    node.run(&format!("nft {command}"))?;
                }
                let sample = measure(None);
                node.run("nft delete table ip vxcsum_bench")?;
                sample
            }
            Self::Tcpdump => {
                let folder = Folder::new()?;
                let tcpdump = Tcpdump::start(node, &folder)?;
                measure(Some(tcpdump.0.id()))
            }
        }
    }
}

/// One measurement.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sample {
    /// Of what is measured, a second.
    pub(super) rate: f64,
    /// Of all cores, in cores.
    pub(super) machine: f64,
    /// Of what watches, in percent of one core.
    pub(super) watcher: f64,
}

/// A running tcpdump as people run it, killed on drop.
struct Tcpdump(Child);

impl Tcpdump {
    fn start(ns: &NetNs, folder: &Folder) -> Result<Self> {
        let log = folder.path().join("log");
        let mut command = ns.command("tcpdump");
        command.args(["-Z", "root", "-n", "-i", NIC, "-s", "128", "-w"]);
        command.arg(folder.path().join("capture.pcap"));
        command.stdin(Stdio::null()).stderr(fs::File::create(&log)?);
        let tcpdump = Self(command.spawn().context("start tcpdump")?);
        wait_until("tcpdump listens", Duration::from_secs(5), || {
            Ok(fs::read_to_string(&log)?.contains("listening on"))
        })?;
        Ok(tcpdump)
    }
}

impl Drop for Tcpdump {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Processor time between two instants.
pub(super) struct Busy {
    start: Instant,
    machine: Duration,
    watcher: Duration,
    pid: Option<u32>,
}

impl Busy {
    /// From now on, with the process that watches, if any.
    pub(super) fn start(pid: Option<u32>) -> Result<Self> {
        let watcher = pid.map(usage::process_busy).transpose()?.unwrap_or_default();
        Ok(Self { start: Instant::now(), machine: usage::machine_busy()?, watcher, pid })
    }

    /// With this rate.
    pub(super) fn stop(self, rate: f64) -> Result<Sample> {
        let took = self.start.elapsed().as_secs_f64();
        let watcher = self.pid.map(usage::process_busy).transpose()?.unwrap_or_default();
        let share = |after: Duration, before| after.saturating_sub(before).as_secs_f64() / took;
        Ok(Sample {
            rate,
            machine: share(usage::machine_busy()?, self.machine),
            watcher: 100.0 * share(watcher, self.watcher),
        })
    }
}
