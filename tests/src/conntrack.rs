//! What connection tracking remembers of VXLAN datagrams: addresses and ports before NAT.

use std::fs;
use std::net::IpAddr;

use anyhow::{Context as _, Result, anyhow};

use crate::netns::NetNs;

/// One direction of a tracked flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuple {
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// Source port.
    pub sport: u16,
    /// Destination port.
    pub dport: u16,
}

/// A tracked flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flow {
    /// As the first packet was before NAT.
    pub original: Tuple,
    /// As an answer is expected: the source and destination after NAT, swapped.
    pub reply: Tuple,
}

impl Flow {
    /// Source address after NAT.
    pub fn src_after(&self) -> IpAddr {
        self.reply.dst
    }

    /// Source port after NAT.
    pub fn sport_after(&self) -> u16 {
        self.reply.dport
    }
}

/// The UDP flows to port `dport` that the namespace tracks.
pub fn udp_flows(ns: &NetNs, dport: u16) -> Result<Vec<Flow>> {
    let mut flows = Vec::new();
    for line in table(ns)?.lines().filter(|line| line.split_whitespace().nth(2) == Some("udp")) {
        let flow = parse(line).with_context(|| format!("conntrack line {line:?}"))?;
        if flow.original.dport == dport {
            flows.push(flow);
        }
    }
    Ok(flows)
}

/// The source before NAT of what leaves with source port `sport_after`.
pub fn before_nat(flows: &[Flow], sport_after: u16) -> Option<Tuple> {
    flows.iter().find(|flow| flow.sport_after() == sport_after).map(|flow| flow.original)
}

/// Both print the same lines; the file is there only where `CONFIG_NF_CONNTRACK_PROCFS` is.
fn table(ns: &NetNs) -> Result<String> {
    ns.enter(|| Ok(fs::read_to_string("/proc/thread-self/net/nf_conntrack")?))
        .or_else(|_| ns.run("conntrack -L -o extended"))
}

fn parse(line: &str) -> Result<Flow> {
    let values = |key: &str| -> Result<[&str; 2]> {
        let words = line.split_whitespace();
        let found: Vec<_> =
            words.filter_map(|word| word.strip_prefix(key)?.strip_prefix('=')).collect();
        found.try_into().map_err(|_| anyhow!("{key} is not there twice"))
    };
    let (src, dst) = (values("src")?, values("dst")?);
    let (sport, dport) = (values("sport")?, values("dport")?);
    let tuple = |n: usize| -> Result<Tuple> {
        Ok(Tuple {
            src: src[n].parse()?,
            dst: dst[n].parse()?,
            sport: sport[n].parse()?,
            dport: dport[n].parse()?,
        })
    };
    Ok(Flow { original: tuple(0)?, reply: tuple(1)? })
}
