//! The command line.

use clap::{Args, Parser, Subcommand, ValueEnum};
use vxcsum_common::Policy;
use vxcsum_common::layout::{FixMode, MAX_PORTS};

use crate::attach::Method;
use crate::plan::{UnusablePorts, Wish};
use crate::run::Options;

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
}

const RUN_HELP: &str = "\
Examples:
  vxcsum run --interface eth0                    watch only: nothing is ever written
  vxcsum run --interface eth0 --json | jq .      one JSON object a line, the summary last
  vxcsum run --interface eth0 --fix restore      put broken checksums right in place

The interface is the underlay NIC, the one that tunnel packets leave through (eth0, bond0), not
the VXLAN device. Needs root, or CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON.

Exit codes: 0 ended by a signal or a closed pipe, 2 wrong usage or cannot run.";

/// Options of `vxcsum run`.
#[derive(Args, Debug)]
pub struct RunArgs {
    /// Underlay interface to watch; may be given several times
    #[arg(long, value_name = "IF", required = true, num_args = 1..)]
    interface: Vec<String>,

    /// UDP destination port of VXLAN, at most 16 of them
    #[arg(
        long,
        value_name = "N",
        num_args = 1..,
        default_values_t = [8472, 4789],
        value_parser = clap::value_parser!(u16).range(1..)
    )]
    port: Vec<u16>,

    /// What the VXLAN devices put into the outer checksum; auto asks the kernel (rtnetlink), and
    /// learns from traffic where that does not tell
    #[arg(long, value_enum, default_value_t = PolicyArg::Auto)]
    policy: PolicyArg,

    /// What to write into broken packets: nothing, zero (IPv4 only), or what the device should have
    /// sent
    #[arg(long, value_enum, value_name = "MODE", default_value_t = FixArg::Off)]
    fix: FixArg,

    /// With --fix, also rewrite packets whose error nothing explains (verdict bad)
    #[arg(long)]
    fix_unproven: bool,

    /// Print events and summary as JSON, one object a line
    #[arg(long)]
    json: bool,

    /// The most events a second from each interface, 0 for no limit; counters stay exact, and a
    /// connection that is new is preferred over repeats
    #[arg(long, value_name = "N", default_value_t = 1000)]
    events_per_second: u32,

    /// How to attach: tcx (Linux 6.6), clsact, or the first of them that works
    #[arg(long, value_enum, default_value_t = AttachArg::Auto)]
    attach: AttachArg,

    /// Size of the event buffer of each interface in KiB, a power of two
    #[arg(long, value_name = "KIB", default_value_t = 1024, value_parser = ring_kib)]
    ring_kib: u32,

    /// Print the debug log of the BPF program to standard error
    #[arg(long)]
    bpf_log: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum PolicyArg {
    Auto,
    Zero,
    Sum,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum FixArg {
    Off,
    Zero,
    Restore,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum AttachArg {
    Auto,
    Tcx,
    Clsact,
}

/// A ring buffer is a power of two and whole pages; 64 KiB are whole pages everywhere.
fn ring_kib(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(kib @ 64..=1_048_576) if u32::is_power_of_two(kib) => Ok(kib),
        _ => Err("must be a power of two from 64 to 1048576".to_owned()),
    }
}

impl RunArgs {
    /// What to run.
    pub fn options(self) -> Result<Options, UnusablePorts> {
        let ports = unique(self.port);
        if ports.len() > MAX_PORTS {
            return Err(UnusablePorts);
        }
        Ok(Options {
            interfaces: unique(self.interface),
            wish: Wish {
                ports,
                policy: match self.policy {
                    PolicyArg::Auto => None,
                    PolicyArg::Zero => Some(Policy::Zero),
                    PolicyArg::Sum => Some(Policy::Sum),
                },
                fix: match self.fix {
                    FixArg::Off => FixMode::Off,
                    FixArg::Zero => FixMode::Zero,
                    FixArg::Restore => FixMode::Restore,
                },
                fix_unproven: self.fix_unproven,
                events_per_second: self.events_per_second,
            },
            method: match self.attach {
                AttachArg::Auto => None,
                AttachArg::Tcx => Some(Method::Tcx),
                AttachArg::Clsact => Some(Method::Clsact),
            },
            ring_len: self.ring_kib * 1024,
            json: self.json,
            bpf_log: self.bpf_log,
        })
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
