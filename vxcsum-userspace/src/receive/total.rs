//! What the kernel itself has counted, which tells whether it names the reason of every drop.

use std::fs;

/// `InCsumErrors` of UDP over IPv4 and IPv6 in the network namespace of this process, since it was
/// made. Without IPv6 there is no counter for it.
pub(super) fn in_csum_errors() -> Option<u64> {
    let ipv4 = of_ipv4(&fs::read_to_string("/proc/self/net/snmp").ok()?)?;
    let ipv6 = fs::read_to_string("/proc/self/net/snmp6").ok().and_then(|text| of_ipv6(&text));
    Some(ipv4 + ipv6.unwrap_or_default())
}

/// A line of names, a line of values.
fn of_ipv4(text: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Udp: "));
    let at = lines.next()?.split_whitespace().position(|name| name == "InCsumErrors")?;
    lines.next()?.split_whitespace().nth(at)?.parse().ok()
}

/// A name and its value a line.
fn of_ipv6(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("Udp6InCsumErrors"))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_right_counters() {
        let text = "Ip: Forwarding InCsumErrors\nIp: 1 7\n\
                    Udp: InDatagrams NoPorts InCsumErrors IgnoredMulti\nUdp: 1 2 3 4\n\
                    UdpLite: InDatagrams InCsumErrors\nUdpLite: 5 6\n";
        assert_eq!(of_ipv4(text), Some(3));
        let text = "Ip6InReceives 1\nUdp6InErrors \t2\nUdp6InCsumErrors     \t9\n";
        assert_eq!(of_ipv6(text), Some(9));
        assert!(in_csum_errors().is_some());
    }
}
