//! How many UDP datagrams the kernel has dropped for their checksum (`InCsumErrors`), in the network
//! namespace of this process since it was made.

use std::fs;

/// Each is none where it could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InCsumErrors {
    /// `Udp: InCsumErrors` of /proc/net/snmp (Linux 3.10).
    pub udp: Option<u64>,
    /// `Udp6InCsumErrors` of /proc/net/snmp6, which is not there without IPv6.
    pub udp6: Option<u64>,
}

impl InCsumErrors {
    /// Reads them.
    pub fn read() -> Self {
        let read = |name: &str| fs::read_to_string(format!("/proc/self/net/{name}")).ok();
        Self {
            udp: read("snmp").and_then(|text| in_snmp(&text)),
            udp6: read("snmp6").and_then(|text| in_snmp6(&text)),
        }
    }

    /// Of both; none where that over IPv4 is not known, which every kernel has.
    pub fn total(self) -> Option<u64> {
        Some(self.udp? + self.udp6.unwrap_or_default())
    }
}

/// A line of names and a line of values, both after `Udp:`.
fn in_snmp(text: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Udp:"));
    let (names, values) = (lines.next()?.split_whitespace(), lines.next()?.split_whitespace());
    let (_, value) = names.zip(values).find(|(name, _)| *name == "InCsumErrors")?;
    value.parse().ok()
}

/// A name and a value on each line.
fn in_snmp6(text: &str) -> Option<u64> {
    let mut lines = text.lines().map(str::split_whitespace);
    let mut line = lines.find(|line| line.clone().next() == Some("Udp6InCsumErrors"))?;
    line.nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_found_by_name() {
        let snmp = "Ip: Forwarding InCsumErrors\nIp: 1 7\n\
                    Udp: InDatagrams NoPorts InErrors OutDatagrams InCsumErrors IgnoredMulti\n\
                    Udp: 13 2 5 14 4 0\nUdpLite: InDatagrams InCsumErrors\nUdpLite: 5 6\n";
        assert_eq!(in_snmp(snmp), Some(4));
        assert_eq!(in_snmp("Udp: InDatagrams\nUdp: 13\n"), None);
        let snmp6 =
            "Ip6InReceives 1\nUdp6InErrors       \t7\nUdp6InCsumErrors                \t6\n";
        assert_eq!(in_snmp6(snmp6), Some(6));
        assert!(InCsumErrors::read().total().is_some());
    }

    #[test]
    fn without_ipv6_it_is_what_there_is() {
        assert_eq!(InCsumErrors { udp: Some(3), udp6: None }.total(), Some(3));
        assert_eq!(InCsumErrors { udp: None, udp6: Some(3) }.total(), None);
    }
}
