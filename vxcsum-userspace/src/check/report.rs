//! What is said of packets and of whole captures.

use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::time::SystemTime;

use serde::{Serialize, Serializer};
use vxcsum_common::{Captured, Finding, Policy, Verdict};

use super::judge::{Appearance, Details, Learned};
use super::reader::Frame;
use crate::event::{Hex, InnerView, OuterView};
use crate::names;

/// A VXLAN packet, in the order of its JSON: an event ([`crate::event::Event`]) without what a
/// capture does not know, and with its place in the file.
#[derive(Debug, Serialize)]
pub(super) struct Found<'a> {
    /// Null where the file has none.
    #[serde(serialize_with = "rfc3339")]
    time: Option<SystemTime>,
    file: &'a str,
    /// As Wireshark counts, from 1.
    frame: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    interface: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    vni: Option<u32>,
    #[serde(with = "names::verdict")]
    verdict: Verdict,
    #[serde(skip_serializing_if = "Option::is_none")]
    check: Option<Hex>,
    expected: Option<Hex>,
    #[serde(skip_serializing_if = "Option::is_none")]
    outer: Option<OuterView>,
    #[serde(skip_serializing_if = "Option::is_none")]
    inner: Option<InnerView>,
    /// Length in bytes, link header included.
    len: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    proof: Option<&'static str>,
    /// Not broken, but tcpdump calls it bad.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    looks_bad: bool,
}

impl<'a> Found<'a> {
    pub(super) fn new(
        file: &'a str,
        frame: &Frame<'a>,
        packet: &Captured<'_>,
        verdict: Verdict,
        details: Option<&Details>,
    ) -> Self {
        let found = Self {
            time: frame.time.system_time(),
            file,
            frame: frame.number,
            interface: frame.interface,
            vni: None,
            verdict,
            check: None,
            expected: None,
            outer: None,
            inner: None,
            len: frame.len,
            proof: None,
            looks_bad: false,
        };
        let Some(Details { outer, finding, appearance }) = details else { return found };
        let Finding { check, expected, proof, source_port_before_nat, .. } = *finding;
        Self {
            vni: Some(outer.vni),
            check: Some(Hex::U16(check)),
            expected: (expected != 0).then_some(Hex::U16(expected)),
            outer: OuterView::read(packet, outer, source_port_before_nat).ok(),
            inner: Some(InnerView::of(packet, outer)),
            proof: proof.as_str(),
            looks_bad: *appearance != Appearance::Fine,
            ..found
        }
    }
}

/// `frame 7  2026-11-21T10:31:02.832436Z stale_nat vni 1  10.0.0.11:54947 > …`, for people.
impl Display for Found<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "frame {}", self.frame)?;
        if let Some(time) = self.time {
            write!(f, "  {}", humantime::format_rfc3339_micros(time))?;
        }
        if let Some(interface) = self.interface {
            write!(f, " {interface}")?;
        }
        write!(f, " {}", self.verdict.as_str())?;
        if let Some(vni) = self.vni {
            write!(f, " vni {vni}")?;
        }
        match &self.outer {
            Some(outer) => write!(f, "  {outer}")?,
            None => write!(f, "  cut short before its VXLAN header")?,
        }
        if let Some(check) = self.check {
            write!(f, "  check {check}")?;
        }
        match (self.verdict, self.expected) {
            (Verdict::MangledZero, _) => write!(f, ", the device sends none")?,
            (_, Some(expected)) => write!(f, ", expected {expected}")?,
            (_, None) => {}
        }
        if let Some(inner) = &self.inner {
            write!(f, "  inner {inner}")?;
        }
        if self.looks_bad { write!(f, "  (looks bad to tcpdump)") } else { Ok(()) }
    }
}

#[expect(clippy::ref_option, reason = "the signature is serde's")]
fn rfc3339<S: Serializer>(time: &Option<SystemTime>, serializer: S) -> Result<S::Ok, S::Error> {
    match time {
        Some(time) => serializer.collect_str(&humantime::format_rfc3339_nanos(*time)),
        None => serializer.serialize_none(),
    }
}

/// The packets of a capture, or of several.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Totals {
    /// All of them.
    pub(super) frames: u64,
    /// Those that are not VXLAN to a watched port.
    pub(super) not_vxlan: u64,
    /// Cut short before that could be told.
    pub(super) cut_short: u64,
    /// Of a link type that is not known here, or of an old format.
    pub(super) unreadable: u64,
    /// By the name of the verdict; every one of them.
    #[serde(serialize_with = "by_name")]
    verdicts: [Tally; Verdict::ALL.len()],
    looks_bad: LooksBad,
    /// Judged before their sender's policy was known, and otherwise by now.
    pub(super) premature: u64,
    /// Wrong fields of 0xffff from senders of unknown policy.
    #[serde(skip)]
    all_ones: u64,
}

/// Packets that are not broken, but look so to tcpdump and Wireshark.
#[derive(Clone, Copy, Debug, Default, Serialize)]
struct LooksBad {
    packets: u64,
    /// Of these: a sum was not filled in yet.
    open_sum: u64,
    /// Of these: over IPv6 and without a checksum.
    no_sum_over_ipv6: u64,
}

#[derive(Clone, Copy, Debug, Default, Serialize)]
struct Tally {
    packets: u64,
    bytes: u64,
}

fn by_name<S: Serializer>(
    tallies: &[Tally; Verdict::ALL.len()],
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_map(Verdict::ALL.iter().map(|verdict| verdict.as_str()).zip(tallies))
}

impl Totals {
    /// Counts a VXLAN packet.
    pub(super) fn count(&mut self, verdict: Verdict, len: usize, details: Option<&Details>) {
        let tally = &mut self.verdicts[verdict as usize];
        tally.packets += 1;
        tally.bytes += len as u64;
        let Some(Details { finding, appearance, .. }) = details else { return };
        match appearance {
            Appearance::Fine => {}
            Appearance::OpenSum => self.looks_bad.open_sum += 1,
            Appearance::NoSumOverIpv6 => self.looks_bad.no_sum_over_ipv6 += 1,
        }
        self.looks_bad.packets = self.looks_bad.open_sum + self.looks_bad.no_sum_over_ipv6;
        if verdict.is_broken() && finding.policy == Policy::Unknown && finding.check == 0xffff {
            self.all_ones += 1;
        }
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.frames += other.frames;
        self.not_vxlan += other.not_vxlan;
        self.cut_short += other.cut_short;
        self.unreadable += other.unreadable;
        for (tally, other) in self.verdicts.iter_mut().zip(other.verdicts) {
            tally.packets += other.packets;
            tally.bytes += other.bytes;
        }
        self.looks_bad.packets += other.looks_bad.packets;
        self.looks_bad.open_sum += other.looks_bad.open_sum;
        self.looks_bad.no_sum_over_ipv6 += other.looks_bad.no_sum_over_ipv6;
        self.premature += other.premature;
        self.all_ones += other.all_ones;
    }

    fn vxlan(&self) -> u64 {
        self.verdicts.iter().map(|tally| tally.packets).sum()
    }

    pub(super) fn broken(&self) -> u64 {
        let broken = Verdict::ALL.into_iter().filter(|verdict| verdict.is_broken());
        broken.map(|verdict| self.verdicts[verdict as usize].packets).sum()
    }
}

/// All captures.
#[derive(Debug, Serialize)]
pub(super) struct Summary {
    #[serde(flatten)]
    pub(super) totals: Totals,
    pub(super) files: Vec<FileSummary>,
    #[serde(skip)]
    pub(super) ports: Vec<u16>,
}

/// One capture.
#[derive(Debug, Serialize)]
pub(super) struct FileSummary {
    pub(super) file: String,
    #[serde(flatten)]
    pub(super) totals: Totals,
    /// What was learned of the senders, by port.
    pub(super) learned: BTreeMap<u16, Learned>,
    /// Why it could not be read to its end, or at all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) error: Option<String>,
}

/// A table for people.
impl Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { totals, files, ports } = self;
        let ports: Vec<_> = ports.iter().map(u16::to_string).collect();
        write!(f, "{}", packets(totals.frames))?;
        if files.len() > 1 {
            write!(f, " in {} files", files.len())?;
        }
        let port = if ports.len() == 1 { "port" } else { "ports" };
        writeln!(f, ", {} of them VXLAN (UDP {port} {})", totals.vxlan(), ports.join(", "))?;
        for verdict in Verdict::ALL {
            let Tally { packets, bytes } = totals.verdicts[verdict as usize];
            if packets > 0 {
                let broken = if verdict.is_broken() { "  broken" } else { "" };
                let name = verdict.as_str();
                writeln!(f, "  {name:<16} {packets:>12} packets {bytes:>16} bytes{broken}")?;
            }
        }
        for (packets, what) in [
            (totals.cut_short, "cut too short to tell whether they are VXLAN"),
            (totals.unreadable, "of a link type or format that vxcsum does not read"),
        ] {
            if packets > 0 {
                writeln!(f, "  {:<16} {packets:>12} packets {what}", "not looked at")?;
            }
        }
        if let [file] = &files[..] {
            for (port, learned) in &file.learned {
                writeln!(f, "senders to port {port}, as learned from traffic: {learned}")?;
            }
        }
        self.advice(f)
    }
}

impl Display for Learned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kinds = [(self.sum, "sums"), (self.zero, "zero"), (self.both, "both")];
        let kinds = kinds.into_iter().filter(|(senders, _)| *senders > 0);
        let kinds: Vec<_> = kinds.map(|(senders, what)| format!("{senders} of {what}")).collect();
        f.write_str(&kinds.join(", "))
    }
}

fn packets(count: u64) -> String {
    match count {
        1 => "1 packet".to_owned(),
        count => format!("{count} packets"),
    }
}

impl Summary {
    fn advice(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let totals = &self.totals;
        for (count, what) in [
            (
                totals.looks_bad.open_sum,
                "bad to tcpdump and Wireshark, but not broken: {}, captured on the sender before \
                 the inner checksum was filled in",
            ),
            (
                totals.looks_bad.no_sum_over_ipv6,
                "bad to tcpdump and Wireshark, but not broken: {} without a checksum over IPv6, \
                 which receivers take if their device has udp6zerocsumrx",
            ),
            (
                totals.premature,
                "judged too early: {}, before the traffic had told what the sender puts into the \
                 field; give --policy, or check a file instead of a stream",
            ),
            (
                totals.all_ones,
                "not sure why: {} with 0xffff, from senders that nothing is known of; if their \
                 devices have noudpcsum, give --policy zero",
            ),
        ] {
            if count > 0 {
                writeln!(f, "{}", what.replacen("{}", &packets(count), 1))?;
            }
        }
        match totals.broken() {
            0 if totals.vxlan() == 0 => {
                write!(f, "nothing to judge; if VXLAN uses other ports, name them by --port")
            }
            0 => write!(f, "no broken packet"),
            broken => write!(f, "broken: {}", packets(broken)),
        }
    }
}
