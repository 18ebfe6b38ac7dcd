//! Counters and attachment of all interfaces, as `status` shows them.

use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vxcsum_common::Verdict;
use vxcsum_common::layout::{FixMode, Report};

use crate::attach::Method;
use crate::kernel::{Kernel, Missing};
use crate::names;
use crate::receive;
use crate::stalls::Overview;
use crate::supervisor::{Counted, Counts};
use crate::transport::Transport;

/// All interfaces.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Summary {
    /// What is written into broken packets.
    #[serde(with = "names::fix_mode")]
    pub fix: FixMode,
    #[serde(with = "names::transport")]
    transport: Transport,
    /// What the kernel lacks.
    missing: Vec<Missing>,
    events: Events,
    interfaces: Vec<Interface>,
    receive: ReceiveSide,
    stalls: Overview,
}

/// Events of all interfaces, one for each broken skb.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
struct Events {
    emitted: u64,
    suppressed: u64,
    lost: u64,
}

/// One interface.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Interface {
    name: String,
    /// Null while the interface is gone.
    #[serde(with = "names::optional_method")]
    attach: Option<Method>,
    skbs: u64,
    not_vxlan: u64,
    /// By the name of the verdict.
    verdicts: BTreeMap<String, OnWire>,
    fixed: u64,
    /// What the interface itself says that it has sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    nic_packets: Option<u64>,
}

/// Packets that this node drops for their UDP checksum.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
struct ReceiveSide {
    attached: bool,
    /// Why it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<String>,
    /// VXLAN to a watched port; the sum over all events, and over all peers.
    dropped: u64,
    /// The others.
    not_vxlan: u64,
    events: Events,
    peers: Vec<PeerDrops>,
    /// What the kernel itself has counted meanwhile.
    #[serde(skip_serializing_if = "Option::is_none")]
    in_csum_errors: Option<u64>,
}

/// Packets that one peer sent.
#[derive(Clone, Debug, Deserialize, Serialize)]
struct PeerDrops {
    /// As by [`receive::peer_name`].
    peer: String,
    packets: u64,
}

impl ReceiveSide {
    fn new(counted: receive::Counted) -> Self {
        let drops = counted.drops();
        let peers = counted.peers.iter().map(|&(peer, drops)| PeerDrops {
            peer: receive::peer_name(peer),
            packets: drops.packets(),
        });
        Self {
            attached: counted.why_not.is_none(),
            why: counted.why_not,
            dropped: drops.packets(),
            not_vxlan: counted.not_vxlan,
            events: Events {
                emitted: drops.reported(Report::Emitted),
                suppressed: drops.reported(Report::Suppressed),
                lost: drops.reported(Report::Lost),
            },
            peers: peers.collect(),
            in_csum_errors: counted.in_csum_errors,
        }
    }
}

impl Display for ReceiveSide {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        /// More only hide what is above.
        const SHOWN_PEERS: usize = 10;
        if let Some(why) = &self.why {
            return writeln!(f, "receive side: off, {why}");
        }
        write!(f, "receive side: {} VXLAN packets dropped for their UDP checksum", self.dropped)?;
        if self.not_vxlan != 0 {
            write!(f, ", and {} others", self.not_vxlan)?;
        }
        let Events { emitted, suppressed, lost } = self.events;
        writeln!(f, "; events: {emitted} emitted, {suppressed} suppressed, {lost} lost")?;
        let seen = self.dropped + self.not_vxlan;
        if let Some(counted) = self.in_csum_errors.filter(|&counted| counted > seen) {
            writeln!(
                f,
                "  the kernel has counted {counted} (InCsumErrors): it does not tell of all why it \
                 drops them"
            )?;
        }
        for PeerDrops { peer, packets } in self.peers.iter().take(SHOWN_PEERS) {
            writeln!(f, "  from {peer:<28} {packets:>12} packets")?;
        }
        match self.peers.len().saturating_sub(SHOWN_PEERS) {
            0 => Ok(()),
            more => writeln!(f, "  and from {more} more (see --json)"),
        }
    }
}

/// Packets and bytes on the wire.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
struct OnWire {
    packets: u64,
    bytes: u64,
}

impl Summary {
    /// Of all interfaces, by what their programs have counted.
    pub fn new(fix: FixMode, kernel: &Kernel, counts: Counts) -> Self {
        let mut summary = Self {
            fix,
            transport: kernel.transport,
            missing: kernel.missing.clone(),
            events: Events::default(),
            interfaces: Vec::new(),
            receive: ReceiveSide::new(counts.receive),
            stalls: Overview::default(),
        };
        for Counted { name, method: attach, counters, sent_packets } in counts.interfaces {
            summary.events.emitted += counters.reported(Report::Emitted).skbs;
            summary.events.suppressed += counters.reported(Report::Suppressed).skbs;
            summary.events.lost += counters.reported(Report::Lost).skbs;
            let verdicts = Verdict::ALL.into_iter().map(|verdict| {
                let tally = counters.of(verdict);
                let on_wire = OnWire { packets: tally.packets(), bytes: tally.bytes };
                (verdict.as_str().to_owned(), on_wire)
            });
            summary.interfaces.push(Interface {
                name,
                attach,
                skbs: counters.skbs(),
                not_vxlan: counters.not_vxlan,
                verdicts: verdicts.collect(),
                fixed: counters.zeroed + counters.restored,
                nic_packets: sent_packets,
            });
        }
        summary
    }

    /// The same with those that wait.
    #[must_use]
    pub fn with_stalls(self, stalls: Overview) -> Self {
        Self { stalls, ..self }
    }

    /// A table with rates, from two summaries that lie `apart`.
    pub fn table<'a>(&'a self, earlier: &'a Self, apart: Duration) -> impl Display + 'a {
        Table { summary: self, earlier: Some((earlier, apart)) }
    }
}

/// A table for people.
impl Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Table { summary: self, earlier: None }.fmt(f)
    }
}

struct Table<'a> {
    summary: &'a Summary,
    earlier: Option<(&'a Summary, Duration)>,
}

impl Table<'_> {
    fn earlier(&self, interface: &Interface) -> Option<&Interface> {
        let (earlier, _) = self.earlier?;
        earlier.interfaces.iter().find(|other| other.name == interface.name)
    }

    /// Packets that the NIC has sent since the earlier summary, none of which came by.
    fn starved(&self, interface: &Interface) -> Option<u64> {
        /// Counters are not read at the same instant.
        const CHANCE: u64 = 3;
        let earlier = self.earlier(interface)?;
        let sent = interface.nic_packets?.saturating_sub(earlier.nic_packets?);
        let is_attached = interface.attach.is_some() && earlier.attach.is_some();
        (is_attached && interface.skbs == earlier.skbs && sent > CHANCE).then_some(sent)
    }

    /// Packets a second, where there is an earlier summary.
    fn rate(&self, interface: &Interface, verdict: &str) -> Option<f64> {
        let (_, apart) = self.earlier?;
        let before = self
            .earlier(interface)
            .and_then(|other| other.verdicts.get(verdict))
            .map_or(0, |on_wire| on_wire.packets);
        let now = interface.verdicts.get(verdict).map_or(0, |on_wire| on_wire.packets);
        #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
        let packets = now.saturating_sub(before) as f64;
        Some(packets / apart.as_secs_f64())
    }
}

impl Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Summary { fix, transport, missing, events, interfaces, receive, stalls } = self.summary;
        if interfaces.is_empty() {
            writeln!(f, "no interface is watched")?;
        }
        for interface in interfaces {
            writeln!(
                f,
                "{} ({}): {} skbs, {} of them not VXLAN",
                interface.name,
                interface.attach.map_or("gone", Method::as_str),
                interface.skbs,
                interface.not_vxlan
            )?;
            if let Some(sent) = self.starved(interface) {
                writeln!(
                    f,
                    "  STARVED: the NIC has sent {sent} packets meanwhile, none came by vxcsum: a \
                     program before it ends the chain (see `bpftool net`, `tc filter show dev {} \
                     egress`)",
                    interface.name
                )?;
            }
            // In the order of the codes, not of the names.
            for verdict in Verdict::ALL {
                let name = verdict.as_str();
                let on_wire = interface.verdicts.get(name).copied().unwrap_or_default();
                if on_wire.packets == 0 {
                    continue;
                }
                write!(
                    f,
                    "  {name:<16} {:>12} packets {:>16} bytes",
                    on_wire.packets, on_wire.bytes
                )?;
                if let Some(rate) = self.rate(interface, name) {
                    write!(f, " {rate:>12.1}/s")?;
                }
                writeln!(f, "{}", if verdict.is_broken() { "  broken" } else { "" })?;
            }
            if interface.fixed != 0 {
                writeln!(f, "  {:<16} {:>12} packets", "fixed", interface.fixed)?;
            }
        }
        stalls.fmt(f)?;
        receive.fmt(f)?;
        for missing in missing {
            writeln!(f, "{missing}")?;
        }
        let Events { emitted, suppressed, lost } = events;
        write!(
            f,
            "fix {}; events ({}): {emitted} emitted, {suppressed} suppressed, {lost} lost",
            fix.as_str(),
            transport.as_str()
        )
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use vxcsum_common::layout::Counters;
    use vxcsum_common::receive::Drops;

    use super::*;

    fn kernel() -> Kernel {
        let [feature, reason, cost] = ["tcx", "unknown", "clsact"].map(str::to_owned);
        let missing = vec![Missing { feature, reason, cost }];
        Kernel { transport: Transport::Perf, skb_layout: None, btf: PathBuf::new(), missing }
    }

    fn counted(packets: u64) -> Counts {
        let mut counters = Counters { not_vxlan: 2, zeroed: 1, ..Counters::default() };
        let tally = &mut counters.tallies[Verdict::StaleNat as usize][Report::Emitted as usize];
        (tally.skbs, tally.bytes) = (packets, packets * 100);
        let eth0 = Counted {
            name: "eth0".to_owned(),
            method: Some(Method::Tcx),
            counters,
            sent_packets: None,
        };
        let peer = |address, drops| (address, Drops(drops));
        let receive = receive::Counted {
            why_not: None,
            not_vxlan: 4,
            peers: vec![peer(Some([10, 0, 0, 11].into()), [0, 3, 2, 0]), peer(None, [0, 0, 0, 1])],
            in_csum_errors: Some(10),
        };
        Counts { interfaces: vec![eth0], receive }
    }

    #[test]
    fn json_is_as_documented() {
        let summary = Summary::new(FixMode::Zero, &kernel(), counted(3));
        let json = serde_json::to_value(&summary).unwrap();
        assert_eq!(json["fix"], "zero");
        assert_eq!(
            (&json["transport"], &json["missing"][0]["feature"]),
            (&"perf".into(), &"tcx".into())
        );
        assert_eq!(json["events"]["emitted"], 3);
        let interface = &json["interfaces"][0];
        assert_eq!(interface["name"], "eth0");
        assert_eq!(interface["attach"], "tcx");
        assert_eq!((&interface["skbs"], &interface["not_vxlan"]), (&5.into(), &2.into()));
        assert_eq!(interface["verdicts"]["stale_nat"]["bytes"], 300);
        assert_eq!(interface["verdicts"].as_object().unwrap().len(), Verdict::ALL.len());
        assert_eq!(interface["fixed"], 1);
        assert_eq!(
            json["receive"],
            serde_json::json!({
                "attached": true, "dropped": 6, "not_vxlan": 4,
                "events": {"emitted": 3, "suppressed": 2, "lost": 1},
                "peers": [{"peer": "10.0.0.11", "packets": 5}, {"peer": "other", "packets": 1}],
                "in_csum_errors": 10,
            })
        );
        let back: Summary = serde_json::from_value(json.clone()).unwrap();
        assert_eq!(serde_json::to_value(&back).unwrap(), json);
    }

    #[test]
    fn the_table_shows_rates_and_what_is_broken() {
        let earlier = Summary::new(FixMode::Off, &kernel(), counted(3));
        let now = Summary::new(FixMode::Off, &kernel(), counted(5));
        let table = now.table(&earlier, Duration::from_secs(2)).to_string();
        let row = table.lines().find(|line| line.contains("stale_nat")).unwrap();
        assert!(row.contains("1.0/s") && row.ends_with("broken"), "{table}");
        assert!(!table.contains("STARVED"), "{table}");
        assert!(
            table.ends_with("fix off; events (perf): 5 emitted, 0 suppressed, 0 lost"),
            "{table}"
        );
        assert!(table.contains("\nno tcx (unknown): clsact\n"), "{table}");
    }

    #[test]
    fn the_receive_side_says_who_or_why_not() {
        let mut counts = counted(0);
        let table = Summary::new(FixMode::Off, &kernel(), counts.clone()).to_string();
        assert!(table.contains("receive side: 6 VXLAN packets dropped"), "{table}");
        assert!(table.contains("from 10.0.0.11 ") && !table.contains("InCsum"), "{table}");
        counts.receive.in_csum_errors = Some(11);
        let table = Summary::new(FixMode::Off, &kernel(), counts.clone()).to_string();
        assert!(table.contains("the kernel has counted 11 "), "{table}");
        counts.receive.why_not = Some("no BTF".to_owned());
        let table = Summary::new(FixMode::Off, &kernel(), counts).to_string();
        assert!(table.contains("receive side: off, no BTF\n"), "{table}");
    }

    #[test]
    fn an_interface_that_sends_past_vxcsum_is_pointed_out() {
        let at = |sent| {
            let mut counted = counted(3);
            counted.interfaces[0].sent_packets = Some(sent);
            Summary::new(FixMode::Off, &kernel(), counted)
        };
        let table = |sent| at(sent).table(&at(100), Duration::from_secs(1)).to_string();
        assert!(table(200).contains("STARVED: the NIC has sent 100 packets"), "{}", table(200));
        assert!(!table(100).contains("STARVED"), "{}", table(100));
    }
}
