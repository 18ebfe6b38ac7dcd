//! Options of `vxcsum check`.

use std::path::PathBuf;

use clap::Args;
use vxcsum_common::layout::MAX_PORTS;
use vxcsum_common::{Device, Policy};

use crate::cli::PolicyArg;
use crate::plan::UnusablePorts;

/// Shown below the options.
pub(crate) const HELP: &str = "\
Examples:
  vxcsum check capture.pcap                      broken packets, and a summary
  vxcsum check --all --json capture.pcapng.zst   every VXLAN packet, one JSON object a line
  tcpdump -i eth0 -U -w - udp | vxcsum check -   live; Ctrl-C ends tcpdump, and the summary follows

Reads pcap and pcapng (Ethernet, Linux cooked, raw IP), plain or compressed with gzip or zstd. A
checksum over a packet that was cut short (tcpdump -s) can be told only where the headers tell it;
otherwise the packet counts as unverified.

Exit codes: 0 no packet is broken, 1 one is, 2 wrong usage, or a file that cannot be read.";

/// Options of `vxcsum check`.
#[derive(Args, Debug)]
pub struct CheckArgs {
    /// Captures; - is standard input
    #[arg(value_name = "FILE", required = true)]
    pub(super) files: Vec<PathBuf>,

    /// Print every VXLAN packet, not only broken ones
    #[arg(long)]
    pub(super) all: bool,

    /// Print packets and summary as JSON, one object a line
    #[arg(long)]
    pub(super) json: bool,

    /// What the VXLAN devices put into the outer checksum; auto learns it from the packets of each
    /// sender
    #[arg(long, value_enum, default_value = "auto")]
    policy: PolicyArg,

    /// UDP destination ports of VXLAN, at most 16, with commas between
    #[arg(
        long,
        value_name = "N",
        value_delimiter = ',',
        default_values_t = [8472, 4789],
        value_parser = clap::value_parser!(u16).range(1..)
    )]
    port: Vec<u16>,

    /// Source ports that VXLAN devices send from: `ip_local_port_range` of the sending node, or
    /// srcport of its device. NAT is only blamed where the port from before is one of them
    #[arg(long, value_name = "MIN-MAX", default_value = "32768-60999", value_parser = port_range)]
    port_range: (u16, u16),
}

impl CheckArgs {
    /// The ports, each once.
    pub(super) fn ports(&self) -> Result<Vec<u16>, UnusablePorts> {
        let mut ports = Vec::new();
        for &port in &self.port {
            if !ports.contains(&port) {
                ports.push(port);
            }
        }
        if ports.len() > MAX_PORTS { Err(UnusablePorts) } else { Ok(ports) }
    }

    /// What every device sends; [`Policy::Unknown`] to learn it.
    pub(super) const fn policy(&self) -> Policy {
        match self.policy {
            PolicyArg::Auto => Policy::Unknown,
            PolicyArg::Zero => Policy::Zero,
            PolicyArg::Sum => Policy::Sum,
        }
    }

    /// The device that is assumed behind each port.
    pub(super) const fn device(&self) -> Device {
        let (source_port_min, source_port_max) = self.port_range;
        Device { source_port_min, source_port_max, ..Device::UNKNOWN }
    }
}

fn port_range(text: &str) -> Result<(u16, u16), String> {
    let ends =
        text.split_once('-').and_then(|(min, max)| Some((min.parse().ok()?, max.parse().ok()?)));
    match ends {
        Some((min, max)) if 0 < min && min < max => Ok((min, max)),
        _ => Err("must be two ports with a dash between, the lower first: 32768-60999".to_owned()),
    }
}
