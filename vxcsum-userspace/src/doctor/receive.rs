//! What this node drops as a receiver: UDP datagrams whose checksum is wrong.
//!
//! `udp_queue_rcv_one_skb` (net/ipv4/udp.c) counts each in `InCsumErrors` and in the drops of the
//! socket. A VXLAN socket has no queue that could overflow, so its drops are wrong checksums.

use std::collections::BTreeMap;
use std::fs;

use crate::in_csum_errors::InCsumErrors;

/// Counters at one moment. Each is none where it could not be read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// [`InCsumErrors::udp`].
    pub udp: Option<u64>,
    /// [`InCsumErrors::udp6`].
    pub udp6: Option<u64>,
    /// Drops of the sockets of each UDP port that was asked for, and has one.
    pub ports: BTreeMap<u16, u64>,
    /// Neither /proc/net/udp nor /proc/net/udp6 could be read.
    pub no_sockets: bool,
}

impl Counters {
    /// Reads them, with the drops of these ports.
    pub fn read(ports: &[u16]) -> Self {
        let read = |name: &str| fs::read_to_string(format!("/proc/self/net/{name}"));
        let sockets: Vec<_> = ["udp", "udp6"].into_iter().filter_map(|it| read(it).ok()).collect();
        let mut drops = BTreeMap::new();
        for text in &sockets {
            add_drops(text, ports, &mut drops);
        }
        let InCsumErrors { udp, udp6 } = InCsumErrors::read();
        Self { udp, udp6, ports: drops, no_sockets: sockets.is_empty() }
    }
}

/// Adds the last column of the lines whose local port, hexadecimal, is one of these.
fn add_drops(text: &str, ports: &[u16], drops: &mut BTreeMap<u16, u64>) {
    for line in text.lines().skip(1) {
        let mut columns = line.split_whitespace();
        let local = columns.nth(1).and_then(|local| local.rsplit(':').next());
        let port = local.and_then(|port| u16::from_str_radix(port, 16).ok());
        if let Some(port) = port.filter(|port| ports.contains(port))
            && let Some(count) = columns.next_back().and_then(|count| count.parse::<u64>().ok())
        {
            *drops.entry(port).or_default() += count;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drops_are_those_of_the_port() {
        let udp = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   \
                   uid  timeout inode ref pointer drops\n\
                   1: 00000000:2118 00000000:0000 07 00000000:00000000 00:00000000 00000000     \
                   0        0 0 2 0000000000000000 4\n\
                   2: 0100007F:12B5 00000000:0000 07 00000000:00000000 00:00000000 00000000     \
                   0        0 0 2 0000000000000000 9\n";
        let mut drops = BTreeMap::new();
        add_drops(udp, &[8472], &mut drops);
        add_drops(udp, &[8472], &mut drops);
        assert_eq!(drops, BTreeMap::from([(8472, 8)]));
    }
}
