//! What the kernel itself counted inside a namespace.

use std::fs;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::kernel;
use crate::lab::Family;
use crate::netns::NetNs;

/// UDP counters of one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Udp {
    /// Datagrams dropped because their checksum was wrong.
    pub in_csum_errors: u64,
    /// Datagrams that could not be delivered, the ones above among them.
    pub in_errors: u64,
    /// Datagrams delivered.
    pub in_datagrams: u64,
}

/// Counters of a network device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Device {
    /// Packets sent; a GSO packet counts once here.
    pub tx_packets: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Packets that passed TC egress and found no room behind it: veth takes no more than its peer's
    /// backlog.
    pub tx_dropped: u64,
    /// Packets received.
    pub rx_packets: u64,
    /// Bytes received.
    pub rx_bytes: u64,
}

impl Device {
    /// Packets that have gone through TC egress since `before`.
    pub const fn left_since(&self, before: &Self) -> u64 {
        self.tx_packets + self.tx_dropped - before.tx_packets - before.tx_dropped
    }
}

/// The UDP counters of a namespace, or those of UDP over IPv6.
pub fn udp(ns: &NetNs, family: Family) -> Result<Udp> {
    match family {
        Family::V4 => {
            let text = read(ns, "snmp")?;
            let mut lines = text.lines().filter_map(|line| line.strip_prefix("Udp: "));
            let names = lines.next().context("no UDP counters")?.split_whitespace();
            let values = lines.next().context("no UDP counters")?.split_whitespace();
            let pairs: Vec<_> = names.zip(values).collect();
            from_pairs(&pairs, "")
        }
        Family::V6 => {
            let text = read(ns, "snmp6")?;
            let pairs: Vec<_> =
                text.lines().filter_map(|line| line.split_once(char::is_whitespace)).collect();
            from_pairs(&pairs, "Udp6")
        }
    }
}

fn from_pairs(pairs: &[(&str, &str)], prefix: &str) -> Result<Udp> {
    let value = |name: &str| -> Result<u64> {
        let full = format!("{prefix}{name}");
        let (_, value) = pairs.iter().find(|(name, _)| *name == full).context(full)?;
        Ok(value.trim().parse()?)
    };
    Ok(Udp {
        in_csum_errors: value("InCsumErrors")?,
        in_errors: value("InErrors")?,
        in_datagrams: value("InDatagrams")?,
    })
}

/// Datagrams dropped at the UDP sockets bound to `port`.
pub fn port_drops(ns: &NetNs, family: Family, port: u16) -> Result<u64> {
    let text = match family {
        Family::V4 => read(ns, "udp")?,
        Family::V6 => read(ns, "udp6")?,
    };
    let local_port = format!(":{port:04X}");
    let mut drops = 0;
    for line in text.lines().skip(1) {
        let columns: Vec<_> = line.split_whitespace().collect();
        if columns.get(1).is_some_and(|local| local.ends_with(&local_port)) {
            drops += columns.last().context("an empty line")?.parse::<u64>()?;
        }
    }
    Ok(drops)
}

/// The counters of a network device.
pub fn device(ns: &NetNs, name: &str) -> Result<Device> {
    let text = read(ns, "dev")?;
    let line = text
        .lines()
        .find_map(|line| line.trim_start().strip_prefix(name)?.strip_prefix(':'))
        .with_context(|| format!("no device {name} in {}", ns.name()))?;
    let values: Vec<u64> =
        line.split_whitespace().map(|value| Ok(value.parse()?)).collect::<Result<_>>()?;
    let value = |column: usize| values.get(column).copied().context("a column is missing");
    Ok(Device {
        rx_bytes: value(0)?,
        rx_packets: value(1)?,
        tx_bytes: value(8)?,
        tx_packets: value(9)?,
        tx_dropped: value(11)?,
    })
}

/// Waits until a device has sent nothing for a while: what TCP says at the end of a connection
/// (delayed acknowledgements) comes after the program is done.
pub fn wait_quiet(ns: &NetNs, name: &str) -> Result<()> {
    wait_same(Duration::from_millis(250), || Ok(device(ns, name)?.tx_packets))
}

/// Waits until a device has neither sent nor received anything for a moment: what the kernel has to
/// say to a new device and its neighbour (multicast reports) comes by itself, within milliseconds.
pub(crate) fn wait_settled(ns: &NetNs, name: &str) -> Result<()> {
    wait_same(Duration::from_millis(100), || {
        let now = device(ns, name)?;
        Ok((now.tx_packets, now.rx_packets))
    })
}

fn wait_same<T: PartialEq>(quiet: Duration, look: impl Fn() -> Result<T>) -> Result<()> {
    let mut last = look()?;
    loop {
        thread::sleep(quiet);
        let now = look()?;
        if now == last {
            return Ok(());
        }
        last = now;
    }
}

/// Whether this kernel counts the inner headers of each segment into the length of a packet that is
/// still to be cut (`qdisc_pkt_len_init` in net/core/dev.c). Wrong in 6.12, right in 6.18.
pub fn counts_inner_headers() -> Result<bool> {
    Ok(kernel::version()? >= (6, 18))
}

fn read(ns: &NetNs, file: &str) -> Result<String> {
    let path = format!("/proc/thread-self/net/{file}");
    ns.enter(|| fs::read_to_string(&path).with_context(|| path.clone()))
}
