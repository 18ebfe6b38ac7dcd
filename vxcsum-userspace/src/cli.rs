//! The command line.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::Deserialize;
use thiserror::Error;
use vxcsum_common::layout::{FixMode, MAX_PORTS};
use vxcsum_common::{Policy, Verdict};

use crate::attach::Method;
use crate::check;
use crate::config::{Config, ConfigError};
use crate::event::Direction;
use crate::plan::{UnusablePorts, Wish};
use crate::protocol::Filter;
use crate::receive;
use crate::run::Options;
use crate::server::{self, DEFAULT_SOCKET};
use crate::supervisor;
use crate::transport::Transport;

/// Finds the VXLAN packets that this node sends with a broken outer UDP checksum, says why each is
/// broken, and can put it right in place.
#[derive(Debug, Parser)]
#[command(name = "vxcsum", version, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Watch interfaces in the foreground and print an event for every broken packet
    #[command(after_help = RUN_HELP)]
    Run(RunArgs),
    /// Print live events of the running daemon
    Tail(TailArgs),
    /// Show counters and attachment of the running daemon
    Status(StatusArgs),
    /// Switch the fix mode of the running daemon (root only)
    Fix(FixArgs),
    /// Diagnose this node once: what breaks packets, what shows it, and the command that ends it
    #[command(after_help = DOCTOR_HELP)]
    Doctor(DoctorArgs),
    /// Judge the packets of capture files, or of a capture on standard input
    #[command(after_help = check::args::HELP)]
    Check(check::args::CheckArgs),
}

/// Where the daemon is.
#[derive(Args, Debug)]
pub struct SocketArg {
    /// Socket of the daemon
    #[arg(long, value_name = "PATH", default_value = DEFAULT_SOCKET)]
    pub socket: PathBuf,
}

/// Options of `vxcsum tail`.
#[derive(Args, Debug)]
pub struct TailArgs {
    /// Where the daemon is.
    #[command(flatten)]
    pub socket: SocketArg,

    /// Print JSON, one object a line
    #[arg(long)]
    pub json: bool,

    /// Only events with this verdict: `mangled_zero`, `stale_nat` or `bad`; of dropped packets also
    /// `offload_pending`, `missing`, `zero` or `unverified`
    #[arg(long, value_name = "VERDICT", num_args = 1.., value_parser = reported_verdict)]
    verdict: Vec<String>,

    /// Only events of this VXLAN network identifier
    #[arg(long, value_name = "VNI", num_args = 1..)]
    vni: Vec<u32>,

    /// Only events of packets to or from this other node, by its outer address
    #[arg(long, value_name = "ADDRESS", num_args = 1..)]
    peer: Vec<IpAddr>,

    /// Only events of packets that this node sends, or of those that it drops
    #[arg(long, value_enum)]
    direction: Option<Direction>,

    /// Only connections that wait for a broken packet or have waited, and queries that were lost
    /// again; no events
    #[arg(long)]
    stalls: bool,

    /// End after this many events; with --stalls, after this many lines
    #[arg(long, value_name = "N")]
    pub limit: Option<u64>,
}

impl TailArgs {
    /// Which events to print.
    pub fn filter(&self) -> Filter {
        Filter {
            verdict: self.verdict.clone(),
            vni: self.vni.clone(),
            peer: self.peer.clone(),
            direction: self.direction.into_iter().collect(),
            stalls: self.stalls,
        }
    }
}

/// All but one have events: nothing is to be said of a right sum.
fn reported_verdict(text: &str) -> Result<String, String> {
    let reported = Verdict::ALL.into_iter().filter(|&verdict| verdict != Verdict::Valid);
    let names: Vec<_> = reported.map(Verdict::as_str).collect();
    if names.contains(&text) {
        return Ok(text.to_owned());
    }
    Err(format!("events are of {}", names.join(", ")))
}

/// Options of `vxcsum status`.
#[derive(Args, Debug)]
pub struct StatusArgs {
    /// Where the daemon is.
    #[command(flatten)]
    pub socket: SocketArg,

    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Options of `vxcsum fix`.
#[derive(Args, Debug)]
pub struct FixArgs {
    /// Where the daemon is.
    #[command(flatten)]
    pub socket: SocketArg,

    /// What to write into broken packets from now on
    #[arg(value_enum)]
    mode: FixArg,
}

impl FixArgs {
    /// The mode to switch to.
    pub const fn mode(&self) -> FixMode {
        self.mode.mode()
    }
}

const DOCTOR_HELP: &str = "\
Looks at the kernel, VXLAN devices and their NICs, NAT rules, connection tracking, and the
counters of this node as a receiver, in the network namespace that it runs in. Needs no BPF and
no daemon, and changes nothing. Without root it sees less, and says what it could not see.

Examples:
  vxcsum doctor                                  look for three seconds
  vxcsum doctor --seconds 60                     wait for a slow stall
  vxcsum doctor --seconds 0 --json | jq .        for scripts
  nsenter -t PID -n vxcsum doctor                in the network namespace of a process

Exit codes: 0 fine, 1 broken or at risk, 2 wrong usage, or too little could be seen to tell.";

/// Options of `vxcsum doctor`.
#[derive(Args, Debug)]
pub struct DoctorArgs {
    /// Print one JSON object
    #[arg(long)]
    pub json: bool,

    /// How long to watch counters, in seconds; 0 for no waiting, and no rates
    #[arg(
        long,
        value_name = "N",
        default_value_t = 3,
        value_parser = clap::value_parser!(u32).range(..=86_400)
    )]
    pub seconds: u32,
}

const RUN_HELP: &str = "\
Examples:
  vxcsum run                                     watch the underlays of all VXLAN devices
  vxcsum run --interface eth0                    watch this one only
  vxcsum run --interface eth0 --json | jq .      one JSON object a line, the summary last
  vxcsum run --interface eth0 --fix restore      put broken checksums right in place
  vxcsum run --receive                           insist on seeing what this node drops

Nothing is ever written unless --fix asks for it. An interface is the underlay NIC, the one that tunnel packets leave through (eth0, bond0), not
the VXLAN device. Needs root, or CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON.

Exit codes: 0 ended by a signal or a closed pipe, 2 wrong usage or cannot run.";

/// Options of `vxcsum run`.
#[derive(Args, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a switch of its own")]
pub struct RunArgs {
    /// Underlay interfaces to watch, instead of those that the VXLAN devices leave by
    #[arg(long, value_name = "IF", num_args = 1..)]
    interface: Vec<String>,

    /// UDP destination ports of VXLAN, at most 16 [default: 8472 4789]
    #[arg(
        long,
        value_name = "N",
        num_args = 1..,
        value_parser = clap::value_parser!(u16).range(1..)
    )]
    port: Vec<u16>,

    /// What the VXLAN devices put into the outer checksum; auto asks the kernel (rtnetlink), and
    /// learns from traffic where that does not tell [default: auto]
    #[arg(long, value_enum)]
    policy: Option<PolicyArg>,

    /// What to write into broken packets: nothing, zero (IPv4 only), or what the device should have
    /// sent [default: off]
    #[arg(long, value_enum, value_name = "MODE")]
    fix: Option<FixArg>,

    /// With --fix, also rewrite packets whose error nothing explains (verdict bad)
    #[arg(long)]
    fix_unproven: bool,

    /// Print events and summary as JSON, one object a line
    #[arg(long)]
    json: bool,

    /// The most events a second from each interface and of dropped packets, 0 for no limit; counters stay exact, and a
    /// connection that is new is preferred over repeats [default: 1000]
    #[arg(long, value_name = "N")]
    events_per_second: Option<u32>,

    /// How to attach: tcx (Linux 6.6), clsact, or the first of them that works [default: auto]
    #[arg(long, value_enum)]
    attach: Option<AttachArg>,

    /// Also report packets that this node drops for their outer UDP checksum, and who sent them; auto
    /// where the kernel can [default: auto]
    #[arg(long, value_enum, value_name = "MODE", num_args = 0..=1, default_missing_value = "on")]
    receive: Option<receive::Mode>,

    /// How events come from the kernel: ring (a ring buffer, Linux 5.8), perf (a perf buffer for
    /// each CPU, older ones), or the first of them that works [default: auto]
    #[arg(long, value_enum)]
    transport: Option<TransportArg>,

    /// BTF of the running kernel, where it brings none itself at /sys/kernel/btf/vmlinux
    #[arg(long, value_name = "PATH")]
    btf: Option<PathBuf>,

    /// Size of each event buffer in KiB, a power of two [default: 1024]
    #[arg(long, value_name = "KIB", value_parser = ring_kib)]
    ring_kib: Option<u32>,

    /// Where tail, status and fix connect [default: /run/vxcsum/vxcsum.sock]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,

    /// Group that may use tail and status
    #[arg(long, value_name = "GROUP")]
    socket_group: Option<String>,

    /// Serve metrics for Prometheus over HTTP, at /metrics of this address
    #[arg(long, value_name = "ADDRESS")]
    metrics: Option<SocketAddr>,

    /// Print no events, for a service; clients get them all the same
    #[arg(long)]
    quiet: bool,

    /// Print the debug log of the BPF program to standard error
    #[arg(long)]
    bpf_log: bool,

    /// How to log to standard error: text for people and the journal, json for machines
    /// [default: text]
    #[arg(long, value_enum)]
    log_format: Option<LogFormat>,

    /// Configuration file, in which every option above may stand; options win [default:
    /// /etc/vxcsum/vxcsum.toml, where it exists]. SIGHUP reads it again
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Only check the configuration, options included
    #[arg(long)]
    pub check_config: bool,
}

/// How to log.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people, and for the journal.
    Text,
    /// One object a line.
    Json,
}

#[derive(Clone, Copy, Debug, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "the words of the option")]
pub enum PolicyArg {
    Auto,
    Zero,
    Sum,
}

#[derive(Clone, Copy, Debug, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "the words of the option")]
pub enum FixArg {
    Off,
    Zero,
    Restore,
}

impl FixArg {
    const fn mode(self) -> FixMode {
        match self {
            Self::Off => FixMode::Off,
            Self::Zero => FixMode::Zero,
            Self::Restore => FixMode::Restore,
        }
    }
}

#[derive(Clone, Copy, Debug, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "the words of the option")]
pub enum AttachArg {
    Auto,
    Tcx,
    Clsact,
}

#[derive(Clone, Copy, Debug, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "the words of the option")]
pub enum TransportArg {
    Auto,
    Ring,
    Perf,
}

/// A ring buffer is a power of two and whole pages; 64 KiB are whole pages everywhere.
fn ring_kib(text: &str) -> Result<u32, String> {
    text.parse().ok().filter(|&kib| is_ring_kib(kib)).ok_or_else(|| RING_KIB.to_owned())
}

const RING_KIB: &str = "must be a power of two from 64 to 1048576";

fn is_ring_kib(kib: u32) -> bool {
    kib.is_power_of_two() && (64..=1_048_576).contains(&kib)
}

/// Options and file together ask for something impossible.
#[derive(Debug, Error)]
pub enum UsageError {
    /// The file.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Ports.
    #[error(transparent)]
    Ports(#[from] UnusablePorts),
    /// Of the file; clap has checked the option.
    #[error("ring-kib {0} {RING_KIB}")]
    Ring(u32),
}

impl RunArgs {
    /// What to run: options first, then the file, then defaults. Reads the file anew. Also returns
    /// which file it was.
    pub fn options(&self) -> Result<(Options, Option<PathBuf>), UsageError> {
        let (file, path) = Config::read(self.config.as_deref())?;
        let given = |values: &[u16]| (!values.is_empty()).then(|| values.to_vec());
        let ports = given(&self.port).or(file.port).unwrap_or_else(|| vec![8472, 4789]);
        let ports = unique(ports);
        if ports.len() > MAX_PORTS || ports.contains(&0) || ports.is_empty() {
            return Err(UnusablePorts.into());
        }
        let interfaces = if self.interface.is_empty() {
            file.interface.unwrap_or_default()
        } else {
            self.interface.clone()
        };
        let ring_kib = self.ring_kib.or(file.ring_kib).unwrap_or(1024);
        if !is_ring_kib(ring_kib) {
            return Err(UsageError::Ring(ring_kib));
        }
        let fix_unproven = self.fix_unproven || file.fix_unproven.unwrap_or_default();
        let events_per_second = self.events_per_second.or(file.events_per_second);
        let watch = supervisor::Options {
            interfaces: unique(interfaces),
            wish: Wish {
                ports,
                policy: match self.policy.or(file.policy) {
                    None | Some(PolicyArg::Auto) => None,
                    Some(PolicyArg::Zero) => Some(Policy::Zero),
                    Some(PolicyArg::Sum) => Some(Policy::Sum),
                },
                fix: self.fix.or(file.fix).map_or(FixMode::Off, FixArg::mode),
                fix_unproven,
                events_per_second: events_per_second.unwrap_or(1000),
            },
            method: match self.attach.or(file.attach) {
                None | Some(AttachArg::Auto) => None,
                Some(AttachArg::Tcx) => Some(Method::Tcx),
                Some(AttachArg::Clsact) => Some(Method::Clsact),
            },
            ring_len: ring_kib * 1024,
            bpf_log: self.bpf_log,
            receive: self.receive.or(file.receive).unwrap_or_default(),
        };
        let options = Options {
            watch,
            transport: match self.transport.or(file.transport) {
                None | Some(TransportArg::Auto) => None,
                Some(TransportArg::Ring) => Some(Transport::Ring),
                Some(TransportArg::Perf) => Some(Transport::Perf),
            },
            btf: self.btf.clone().or(file.btf),
            socket: server::Options {
                path: self.socket.clone().or(file.socket),
                group: self.socket_group.clone().or(file.socket_group),
            },
            metrics: self.metrics.or(file.metrics),
            json: self.json || file.json.unwrap_or_default(),
            quiet: self.quiet || file.quiet.unwrap_or_default(),
            log_format: self.log_format.or(file.log_format).unwrap_or(LogFormat::Text),
        };
        Ok((options, path))
    }
}

/// Each value once, in the order given.
fn unique<T: PartialEq>(values: Vec<T>) -> Vec<T> {
    let mut unique = Vec::new();
    for value in values {
        if !unique.contains(&value) {
            unique.push(value);
        }
    }
    unique
}
