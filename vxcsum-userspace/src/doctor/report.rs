//! What the doctor says, for people and as JSON. Names are stable once released.

use std::fmt::{self, Display, Formatter};
use std::io::{self, Write as _};

use serde::Serialize;

use crate::stdio::write_json;

/// All of it.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// In one word.
    pub verdict: Verdict,
    /// In one sentence.
    pub summary: String,
    /// What was found, the worst first.
    pub findings: Vec<Finding>,
    /// What ends it, the best first.
    pub remedies: Vec<Remedy>,
    /// What could not be seen, and why.
    pub unseen: Vec<Unseen>,
    /// The kernel.
    pub kernel: Kernel,
    /// Every VXLAN device.
    pub devices: Vec<Device>,
    /// NAT rules that tunnel packets can meet, in their order.
    pub rules: Vec<Rule>,
    /// kube-proxy's mark; null without kube-proxy.
    pub kube_proxy: Option<KubeProxy>,
    /// The receiver's side.
    pub receive: Receive,
}

/// The state of this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Broken packets are sent or received now, by the evidence.
    Broken,
    /// They can be.
    AtRisk,
    /// Nothing is wrong.
    Fine,
    /// Too little could be seen.
    CannotTell,
}

impl Verdict {
    /// Exit code of the command.
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Fine => 0,
            Self::Broken | Self::AtRisk => 1,
            Self::CannotTell => 2,
        }
    }

    const fn word(self) -> &'static str {
        match self {
            Self::Broken => "BROKEN",
            Self::AtRisk => "AT RISK",
            Self::Fine => "FINE",
            Self::CannotTell => "CANNOT TELL",
        }
    }
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// It breaks packets now.
    Problem,
    /// It can break packets.
    Risk,
    /// Worth knowing.
    Note,
}

impl Severity {
    const fn word(self) -> &'static str {
        match self {
            Self::Problem => "problem",
            Self::Risk => "risk",
            Self::Note => "note",
        }
    }
}

/// One thing found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What kind of finding.
    pub id: &'static str,
    /// How bad.
    pub severity: Severity,
    /// What it is about: a device, or `kernel`, `rules`, `receive`.
    pub subject: String,
    /// One sentence.
    pub text: String,
    /// What shows it, a line each.
    pub evidence: Vec<String>,
}

/// One way out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Remedy {
    /// What kind of remedy.
    pub id: &'static str,
    /// What it does.
    pub text: String,
    /// For a shell, as root; null where no command does it.
    pub command: Option<String>,
    /// What it costs.
    pub cost: &'static str,
    /// Whether it is still in place after a reboot.
    pub survives_reboot: bool,
}

/// Something that could not be seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Unseen {
    /// What.
    pub what: String,
    /// Why, and how to see it.
    pub why: String,
}

/// The kernel.
#[derive(Clone, Debug, Serialize)]
pub struct Kernel {
    /// `uname -r`.
    pub release: String,
    /// `carried`, `lacking` or `unknown`: whether it has ea64d8d6c675, which ends class 1.
    pub class1_fix: &'static str,
    /// Why that is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub class1_unknown: Option<&'static str>,
    /// Whether class 2 was measured in kernels as new as this one.
    pub class2_measured: bool,
}

/// A VXLAN device.
#[derive(Clone, Debug, Serialize)]
pub struct Device {
    /// Name.
    pub name: String,
    /// VXLAN network identifier.
    pub vni: u32,
    /// UDP destination port.
    pub port: u16,
    /// Source ports, lowest and upper bound.
    pub source_ports: Option<(u16, u16)>,
    /// Everything is decided per packet.
    pub external: bool,
    /// `zero`, `sum` or `unknown`.
    pub policy: &'static str,
    /// Whether `tx-checksum-ip-generic` is on.
    pub tx_checksum_ip_generic: Option<bool>,
    /// What its packets leave by.
    pub underlays: Vec<Underlay>,
}

/// An interface that tunnel packets leave through.
#[derive(Clone, Debug, Serialize)]
pub struct Underlay {
    /// Name.
    pub name: String,
    /// Driver.
    pub driver: Option<String>,
    /// Whether `tx-checksum-ip-generic` is on.
    pub tx_checksum_ip_generic: Option<bool>,
    /// What it does to the insides of tunnels, as `ethtool -k` calls it.
    pub tunnel_offloads: Vec<&'static str>,
}

/// A NAT rule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Rule {
    /// Where it stands.
    pub place: String,
    /// As its own tool prints it.
    pub text: String,
    /// How many packets it has matched, where that is counted. A rule of NAT meets only the first
    /// packet of a connection.
    pub packets: Option<u64>,
}

/// What becomes of the mark that kube-proxy asks for masquerading with.
#[derive(Clone, Debug, Serialize)]
pub struct KubeProxy {
    /// The mark, hexadecimal.
    pub mark: String,
    /// The rule that clears it.
    pub unmark: Option<String>,
    /// The rule that takes packets before that one, or may do so.
    pub taken_by: Option<String>,
    /// Both in a sentence.
    pub text: String,
}

/// The receiver's side.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Receive {
    /// How long counters were watched.
    pub seconds: f64,
    /// Datagrams dropped for their checksum, over IPv4.
    pub udp_in_csum_errors: Option<Count>,
    /// Datagrams dropped for their checksum, over IPv6.
    pub udp6_in_csum_errors: Option<Count>,
    /// Datagrams dropped at the sockets of tunnel ports.
    pub ports: Vec<Port>,
}

/// A counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Count {
    /// Since boot, or since the socket was opened.
    pub total: u64,
    /// While watched.
    pub risen: u64,
}

/// A tunnel port.
#[derive(Clone, Debug, Serialize)]
pub struct Port {
    /// UDP port.
    pub port: u16,
    /// Datagrams dropped.
    #[serde(flatten)]
    pub drops: Count,
}

impl Report {
    /// Writes it to standard output. A reader that has seen enough is no error.
    pub fn print(&self, json: bool) -> io::Result<()> {
        let mut out = io::stdout().lock();
        let written = if json { write_json(&mut out, self) } else { write!(out, "{self}") };
        match written.and_then(|()| out.flush()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            other => other,
        }
    }
}

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {}", self.verdict.word(), self.summary)?;
        if !self.findings.is_empty() {
            writeln!(f, "\nFound")?;
        }
        for finding in &self.findings {
            let Finding { severity, subject, text, .. } = finding;
            writeln!(f, "  {}: {subject}: {text}", severity.word())?;
            for line in &finding.evidence {
                writeln!(f, "    - {line}")?;
            }
        }
        writeln!(f, "\nThis node")?;
        writeln!(f, "  {}", self.kernel)?;
        for device in &self.devices {
            writeln!(f, "  {device}")?;
        }
        for rule in &self.rules {
            let packets = rule.packets.map(|packets| format!(" [{packets} packets]"));
            writeln!(f, "  rule {}: {}{}", rule.place, rule.text, packets.unwrap_or_default())?;
        }
        if let Some(kube_proxy) = &self.kube_proxy {
            writeln!(f, "  kube-proxy: {}", kube_proxy.text)?;
        }
        writeln!(f, "  {}", self.receive)?;
        if !self.remedies.is_empty() {
            writeln!(f, "\nWhat ends it (as root; one of these for each device)")?;
        }
        for remedy in &self.remedies {
            writeln!(f, "  * {}", remedy.text)?;
            if let Some(command) = &remedy.command {
                writeln!(f, "      {command}")?;
            }
            let survives = if remedy.survives_reboot { "survives" } else { "does not survive" };
            writeln!(f, "    costs {}; {survives} a reboot", remedy.cost)?;
        }
        if !self.unseen.is_empty() {
            writeln!(f, "\nNot seen")?;
        }
        for Unseen { what, why } in &self.unseen {
            writeln!(f, "  {what}: {why}")?;
        }
        Ok(())
    }
}

impl Display for Kernel {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "kernel {}: class 1 ", self.release)?;
        match (self.class1_fix, self.class1_unknown) {
            ("carried", _) => write!(f, "fixed (carries ea64d8d6c675)")?,
            ("lacking", _) => write!(f, "not fixed (lacks ea64d8d6c675)")?,
            (_, why) => {
                write!(f, "cannot be told from the version: {}", why.unwrap_or_default())?;
            }
        }
        if self.class2_measured {
            write!(f, "; class 2 not fixed (no kernel up to 7.2 is)")
        } else {
            write!(f, "; class 2: not measured in kernels this new, no fix is known")
        }
    }
}

impl Display for Device {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "{}: VXLAN vni {} port {}", self.name, self.vni, self.port)?;
        if let Some((low, high)) = self.source_ports {
            write!(f, ", source ports {low}-{high}")?;
        }
        let policy = match (self.external, self.policy) {
            (true, _) => "external: checksum decided per packet",
            (_, "zero") => "sends no checksum",
            (_, "sum") => "sends a checksum",
            _ => "checksum policy not known",
        };
        write!(f, ", {policy}, tx-checksum-ip-generic {}", on_off(self.tx_checksum_ip_generic))?;
        for underlay in &self.underlays {
            write!(f, "; leaves by {}", underlay.name)?;
            let driver = underlay.driver.as_deref().unwrap_or("not known");
            let state = on_off(underlay.tx_checksum_ip_generic);
            write!(f, " (driver {driver}, tx-checksum-ip-generic {state}")?;
            for feature in &underlay.tunnel_offloads {
                write!(f, ", {feature} on")?;
            }
            f.write_str(")")?;
        }
        Ok(())
    }
}

const fn on_off(state: Option<bool>) -> &'static str {
    match state {
        Some(true) => "on",
        Some(false) => "off",
        None => "not known",
    }
}

impl Display for Receive {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str("received: ")?;
        let mut counts = Vec::new();
        let named = [("Udp", self.udp_in_csum_errors), ("Udp6", self.udp6_in_csum_errors)];
        for (name, count) in named {
            counts.extend(count.map(|count| (format!("{name} InCsumErrors"), count)));
        }
        counts.extend(
            self.ports.iter().map(|port| (format!("drops at port {}", port.port), port.drops)),
        );
        if counts.is_empty() {
            return f.write_str("counters not seen");
        }
        for (index, (name, count)) in counts.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(f, "{comma}{name} {}", count.total)?;
            if self.seconds > 0.0 {
                #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
                let rate = count.risen as f64 / self.seconds;
                write!(f, " ({rate:.1}/s)")?;
            }
        }
        Ok(())
    }
}
