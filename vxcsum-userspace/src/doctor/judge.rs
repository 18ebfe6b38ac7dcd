//! From what was seen to what it means.

use vxcsum_common::Policy;

use crate::doctor::conntrack::{Entry, Rewritten, Tracking};
use crate::doctor::devices::{Device, TX_CHECKSUM, Underlay};
use crate::doctor::facts::{ChecksumWriter, Facts, Fate, Hit, Rules};
use crate::doctor::kernel::{CLASS2_MEASURED, ZeroSumFix};
use crate::doctor::receive::Counters;
use crate::doctor::remedies;
use crate::doctor::report::{
    self, Count, Finding, Port, Receive, Report, Rule, Severity, Unseen, Verdict,
};

/// Ports of VXLAN: that of Linux and flannel, and the assigned one.
pub const USUAL_PORTS: [u16; 2] = [8472, 4789];

/// What NAT does to the checksum of a device's packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exposure {
    /// Class 1: a zero becomes something else.
    MangledZero,
    /// Class 2: a sum stays as it was.
    StaleSum,
    /// One of the two, or nothing: it is not known.
    Unknown(&'static str),
    /// Nothing.
    None(&'static str),
}

/// What NAT does to the checksum of this device's packets.
pub fn exposure(device: &Device, fix: ZeroSumFix) -> Exposure {
    if !device.leaves_inner_sums_open() {
        return Exposure::None(
            "its tx-checksum-ip-generic is off, so inner checksums are complete before NAT",
        );
    }
    match (device.policy, fix) {
        (Policy::Sum, _) => Exposure::StaleSum,
        (Policy::Zero, ZeroSumFix::Lacking) => Exposure::MangledZero,
        (Policy::Zero, ZeroSumFix::Carried) => {
            Exposure::None("it sends no checksum, and this kernel leaves a zero alone")
        }
        (Policy::Zero, ZeroSumFix::Unknown(_)) => {
            Exposure::Unknown("it cannot be told whether this kernel leaves a zero alone")
        }
        (Policy::Unknown, _) => Exposure::Unknown("its checksum is decided per packet"),
    }
}

/// Judges a node.
pub fn judge(facts: &Facts) -> Report {
    let fix = facts.kernel.zero_sum_fix();
    let mut findings = Vec::new();
    let mut unseen = unseen(facts);
    let devices = facts.devices.as_deref().unwrap_or_default();
    for device in devices {
        findings.extend(judge_nat(facts, device, fix));
        findings.extend(judge_writers(facts, device));
        for underlay in &device.underlays {
            let class3 = judge_underlay(underlay);
            findings.extend(class3.filter(|finding| !findings.contains(finding)));
        }
    }
    if facts.devices.as_ref().is_ok_and(Vec::is_empty) {
        findings.push(no_vxlan(facts));
        findings.extend(judge_elsewhere(&facts.tracking));
        unseen.push(Unseen {
            what: "other network namespaces".to_owned(),
            why: "only this one was looked into; in the one of a process: `nsenter -t PID -n \
                  vxcsum doctor`, in a named one: `ip netns exec NAME vxcsum doctor`, in one of \
                  Docker: `nsenter --net=/run/docker/netns/ID vxcsum doctor`"
                .to_owned(),
        });
    }
    let receive = receive(facts);
    findings.extend(judge_receive(&receive));
    findings.sort_by_key(|finding| finding.severity);

    let (verdict, summary) = verdict(facts, fix, &findings);
    let remedies = remedies::of(facts, fix, &findings);
    let (class1_fix, class1_unknown) = match fix {
        ZeroSumFix::Carried => ("carried", None),
        ZeroSumFix::Lacking => ("lacking", None),
        ZeroSumFix::Unknown(why) => ("unknown", Some(why)),
    };
    Report {
        verdict,
        summary,
        findings,
        remedies,
        unseen,
        kernel: report::Kernel {
            release: facts.kernel.release.clone(),
            class1_fix,
            class1_unknown,
            class2_measured: facts.kernel.series().is_some_and(|it| it <= CLASS2_MEASURED),
        },
        devices: devices.iter().map(describe).collect(),
        rules: rules(&facts.rules),
        kube_proxy: facts.rules.kube_proxy.as_ref().map(|it| report::KubeProxy {
            mark: format!("{:#x}", it.bits),
            unmark: it.fate.unmark.clone(),
            taken_by: it.fate.taken_by.clone(),
            text: describe_fate(it.bits, &it.fate),
        }),
        receive,
    }
}

/// A rule that several devices meet is shown once.
fn rules(facts: &Rules) -> Vec<Rule> {
    let mut rules: Vec<Rule> = Vec::new();
    let writers = facts.checksum_writers.iter().map(|it| &it.rule);
    for rule in facts.hits.iter().map(|hit| &hit.rule).chain(writers) {
        if !rules.contains(rule) {
            rules.push(rule.clone());
        }
    }
    rules
}

fn finding(
    id: &'static str,
    severity: Severity,
    subject: &str,
    text: String,
    evidence: Vec<String>,
) -> Finding {
    Finding { id, severity, subject: subject.to_owned(), text, evidence }
}

/// Class 1 and class 2, for one device.
fn judge_nat(facts: &Facts, device: &Device, fix: ZeroSumFix) -> Option<Finding> {
    let name = device.name.as_str();
    let rewritten = rewritten(&facts.tracking, device);
    let hits: Vec<&Hit> = facts.rules.hits.iter().filter(|hit| hit.device == name).collect();
    if rewritten.is_none() && (hits.is_empty() || facts.tracking == Tracking::Unused) {
        return None;
    }
    let mut evidence: Vec<String> = rewritten.into_iter().flat_map(conntrack_evidence).collect();
    evidence.extend(hits.iter().flat_map(|hit| rule_evidence(hit)));

    let counted = |hit: &&Hit| hit.is_specific && hit.rule.packets.unwrap_or(0) > 0;
    let is_now = rewritten.is_some() || hits.iter().any(counted);
    // A rule that is not understood in full, and packets that went by it untouched.
    let is_refuted = !hits.iter().any(|hit| hit.is_certain)
        && matches!(&facts.tracking, Tracking::Seen(entries) if entries.total > 0);
    let keeps_source = hits.iter().all(|hit| hit.keeps_source);
    let (severity, does) = if is_now {
        (Severity::Problem, "NAT rewrites its tunnel packets")
    } else if keeps_source {
        (
            Severity::Note,
            "a NAT rule can match its tunnel packets, but changes them only where two flows have \
             the same source port",
        )
    } else {
        let severity = if is_refuted { Severity::Note } else { Severity::Risk };
        (severity, "a NAT rule can match its tunnel packets; none is seen to be rewritten now")
    };
    let (id, severity, text) = match exposure(device, fix) {
        Exposure::StaleSum => (
            "nat_stale_sum",
            severity,
            format!(
                "class 2: {does}, and this kernel leaves the checksum of those stale whose inner \
                 checksum is still open: every SYN, ACK and DNS query"
            ),
        ),
        Exposure::MangledZero => (
            "nat_mangled_zero",
            severity,
            format!(
                "class 1: {does}, and this kernel (without ea64d8d6c675) writes a wrong checksum \
                 where the device sends none"
            ),
        ),
        Exposure::Unknown(why) => (
            "nat_unknown",
            severity.max(Severity::Risk),
            format!("{does}; whether that breaks them: {why}"),
        ),
        Exposure::None(why) => ("nat_harmless", Severity::Note, format!("{does}, but {why}")),
    };
    Some(finding(id, severity, name, text, evidence))
}

/// What connection tracking says of a device.
fn rewritten<'a>(tracking: &'a Tracking, device: &Device) -> Option<&'a Rewritten> {
    let Tracking::Seen(entries) = tracking else { return None };
    entries.rewritten.iter().find(|it| it.port == device.port)
}

fn conntrack_evidence(rewritten: &Rewritten) -> Vec<String> {
    let Rewritten { port, count, unreplied, examples } = rewritten;
    let mut lines = vec![format!(
        "conntrack: {count} {} to UDP port {port} rewritten, {unreplied} of them [UNREPLIED]",
        if *count == 1 { "flow" } else { "flows" }
    )];
    lines.extend(examples.iter().map(|entry| {
        let Entry { source, destination, new_source, new_destination, .. } = entry;
        if new_destination == destination {
            format!("conntrack: {source} > {destination} leaves from {new_source}")
        } else {
            format!("conntrack: {source} > {destination} is {new_source} > {new_destination} then")
        }
    }));
    lines
}

fn rule_evidence(hit: &Hit) -> Vec<String> {
    let Rule { place, text, packets, .. } = &hit.rule;
    let packets = packets.map(|packets| format!(", {packets} packets")).unwrap_or_default();
    let may = if hit.is_certain { "matches" } else { "may match" };
    let mut lines = vec![format!("rule: {place}: {text} ({may}{packets})")];
    if let Some(mark) = &hit.mark {
        lines.push(format!("mark: {}", describe_fate(mark.bits, &mark.fate)));
    }
    lines
}

/// What becomes of the mark of a packet that is about to go into the tunnel.
fn describe_fate(bits: u32, Fate { unmark, taken_by }: &Fate) -> String {
    match (unmark, taken_by) {
        (None, _) => format!(
            "the tunnel packet gets mark {bits:#x} of the packet inside, for no rule clears it"
        ),
        (Some(unmark), Some(taken_by)) => format!(
            "{unmark} clears mark {bits:#x} of the packet inside, but {taken_by} can come before: \
             then the tunnel packet gets it"
        ),
        (Some(unmark), None) => {
            format!("{unmark} clears mark {bits:#x} before a packet goes into the tunnel")
        }
    }
}

/// A rule that writes checksums need not be NAT.
fn judge_writers(facts: &Facts, device: &Device) -> Option<Finding> {
    let of_it = |writer: &&ChecksumWriter| writer.device == device.name;
    let writers: Vec<&ChecksumWriter> = facts.rules.checksum_writers.iter().filter(of_it).collect();
    let is_counted = writers.iter().any(|writer| writer.rule.packets.unwrap_or(0) > 0);
    let severity = if is_counted { Severity::Problem } else { Severity::Risk };
    let line = |writer: &&ChecksumWriter| {
        let Rule { place, text, packets, .. } = &writer.rule;
        let packets = packets.map(|packets| format!(" ({packets} packets)")).unwrap_or_default();
        format!("rule: {place}: {text}{packets}")
    };
    let text = "a rule writes the UDP checksum of its tunnel packets: remove it".to_owned();
    let evidence: Vec<String> = writers.iter().map(line).collect();
    (!writers.is_empty())
        .then(|| finding("checksum_written", severity, &device.name, text, evidence))
}

/// Class 3: what a NIC may do after everything that can be seen here.
fn judge_underlay(underlay: &Underlay) -> Option<Finding> {
    /// Not NICs, so that nothing happens to a packet in them.
    const SOFTWARE: &[&str] = &["veth", "bridge", "tun", "dummy", "macvlan", "bonding", "team"];

    let offloads = underlay.tunnel_offloads();
    let driver = underlay.driver()?;
    if offloads.is_empty() || SOFTWARE.contains(&driver) {
        return None;
    }
    let evidence = offloads.iter().map(|it| format!("ethtool -k {}: {it}: on", underlay.name));
    let (severity, text) = match driver {
        "vmxnet3" => (
            Severity::Risk,
            "class 3: vmxnet3 finishes the checksums inside of tunnels, and on some ESXi releases \
             and tunnel ports it breaks them. At egress the packets are still right, so nothing \
             here shows it: turn the offload off and see whether it helps"
                .to_owned(),
        ),
        driver => (
            Severity::Note,
            format!(
                "class 3: {driver} finishes the checksums inside of tunnels. Should it break them, \
                 nothing here would show it; where all else is fine, try without the offload"
            ),
        ),
    };
    Some(finding("nic_tunnel_offload", severity, &underlay.name, text, evidence.collect()))
}

/// A socket on a VXLAN port tells of a device that sends from here and is elsewhere.
fn no_vxlan(facts: &Facts) -> Finding {
    let [_, now] = &facts.received;
    let ports: Vec<String> =
        now.ports.keys().map(|port| format!("UDP port {port} is open")).collect();
    let text = if ports.is_empty() {
        "no VXLAN device here".to_owned()
    } else {
        "no VXLAN device here, but a socket on a port of VXLAN: its device may be in another \
         network namespace (Docker swarm), and NAT of this one can rewrite its packets"
            .to_owned()
    };
    finding("no_vxlan", Severity::Note, "devices", text, ports)
}

/// Tunnel packets that come through here from another network namespace.
fn judge_elsewhere(tracking: &Tracking) -> Option<Finding> {
    let Tracking::Seen(entries) = tracking else { return None };
    let evidence: Vec<String> = entries.rewritten.iter().flat_map(conntrack_evidence).collect();
    let text =
        "NAT rewrites packets to a port of VXLAN; whether that breaks them depends on their \
                VXLAN device, which is not in this network namespace"
            .to_owned();
    (!evidence.is_empty())
        .then(|| finding("nat_elsewhere", Severity::Risk, "devices", text, evidence))
}

fn receive(facts: &Facts) -> Receive {
    let [before, after] = &facts.received;
    let count = |of: fn(&Counters) -> Option<u64>| {
        let (before, total) = (of(before)?, of(after)?);
        Some(Count { total, risen: total.saturating_sub(before) })
    };
    let ports = after.ports.iter().map(|(&port, &total)| {
        let before = before.ports.get(&port).copied().unwrap_or(0);
        Port { port, drops: Count { total, risen: total.saturating_sub(before) } }
    });
    Receive {
        seconds: facts.seconds,
        udp_in_csum_errors: count(|counters| counters.udp),
        udp6_in_csum_errors: count(|counters| counters.udp6),
        ports: ports.collect(),
    }
}

fn judge_receive(receive: &Receive) -> Option<Finding> {
    let mut evidence: Vec<String> = Vec::new();
    let (mut dropped, mut risen, mut errors) = (0, 0, 0);
    for Port { port, drops } in &receive.ports {
        dropped += drops.total;
        risen += drops.risen;
        if drops.total > 0 {
            evidence.push(format!(
                "/proc/net/udp: drops at port {port}: {}, {} of them in {:.1} s",
                drops.total, drops.risen, receive.seconds
            ));
        }
    }
    for (name, count) in
        [("Udp", receive.udp_in_csum_errors), ("Udp6", receive.udp6_in_csum_errors)]
    {
        let Some(count) = count.filter(|count| count.total > 0) else { continue };
        errors += count.total;
        evidence.push(format!(
            "{name} InCsumErrors: {}, {} of them in {:.1} s",
            count.total, count.risen, receive.seconds
        ));
    }
    // Both rise one for one; drops alone may be the work of a filter on some other socket.
    if dropped == 0 || errors == 0 {
        return None;
    }
    let (severity, text) = if risen > 0 {
        (
            Severity::Problem,
            "other nodes send tunnel packets with a wrong checksum, and this one drops them: run \
             `vxcsum doctor` on those that send"
                .to_owned(),
        )
    } else {
        (
            Severity::Note,
            "tunnel packets with a wrong checksum have been dropped, none of them just now: watch \
             for longer with --seconds, and run `vxcsum doctor` on the nodes that send"
                .to_owned(),
        )
    };
    Some(finding("received_bad_sums", severity, "receive", text, evidence))
}

fn unseen(facts: &Facts) -> Vec<Unseen> {
    let mut unseen = Vec::new();
    let mut add = |what: String, why: &str| unseen.push(Unseen { what, why: why.to_owned() });
    match &facts.devices {
        Err(why) => add("VXLAN devices".to_owned(), why),
        Ok(devices) => {
            for device in devices {
                let of = |name: &str| format!("offloads of {name}");
                if let Err(why) = &device.offloads {
                    add(of(&device.name), why);
                }
                for underlay in &device.underlays {
                    if let Err(why) = &underlay.offloads {
                        add(of(&underlay.name), why);
                    }
                }
                if device.underlays.is_empty() {
                    add(
                        format!("underlay of {}", device.name),
                        "no route leads out of this network namespace",
                    );
                }
            }
        }
    }
    if let Tracking::Unseen(why) = &facts.tracking {
        add("connection tracking".to_owned(), why);
    }
    let [_, now] = &facts.received;
    if now.udp.is_none() {
        add("UDP checksum errors".to_owned(), "no InCsumErrors in /proc/net/snmp");
    }
    if now.no_sockets {
        add("drops of tunnel ports".to_owned(), "/proc/net/udp cannot be read");
    }
    unseen.extend(facts.rules.unread.iter().cloned());
    unseen
}

fn verdict(facts: &Facts, fix: ZeroSumFix, findings: &[Finding]) -> (Verdict, String) {
    let worst = findings.first().filter(|finding| finding.severity != Severity::Note);
    if let Some(worst) = worst {
        let verdict = match worst.severity {
            Severity::Problem => Verdict::Broken,
            _ => Verdict::AtRisk,
        };
        let is_alike = |it: &&Finding| (it.id, it.severity) == (worst.id, worst.severity);
        let subjects: Vec<&str> =
            findings.iter().filter(is_alike).map(|it| it.subject.as_str()).collect();
        return (verdict, sentence(worst.id, verdict, &subjects.join(", ")));
    }
    let devices = match &facts.devices {
        Err(why) => return (Verdict::CannotTell, format!("VXLAN devices were not seen: {why}")),
        Ok(devices) => devices,
    };
    if devices.is_empty() {
        return (
            Verdict::Fine,
            "no VXLAN device here; other network namespaces are not looked into".to_owned(),
        );
    }
    let names = |devices: &[&Device]| {
        devices.iter().map(|device| device.name.as_str()).collect::<Vec<_>>().join(", ")
    };
    let is_exposed = |device: &&Device| !matches!(exposure(device, fix), Exposure::None(_));
    let exposed: Vec<&Device> = devices.iter().filter(is_exposed).collect();
    if exposed.is_empty() {
        let all: Vec<&Device> = devices.iter().collect();
        return (Verdict::Fine, format!("NAT cannot break the packets of {}", names(&all)));
    }
    let names = names(&exposed);
    let way_out = if facts.is_privileged { "see below" } else { "run it as root" };
    match (&facts.tracking, facts.rules.unread.is_empty()) {
        (Tracking::Unused, _) => {
            (Verdict::Fine, format!("no NAT here, so nothing rewrites the packets of {names}"))
        }
        (_, true) if findings.iter().any(|finding| finding.id.starts_with("nat_")) => (
            Verdict::Fine,
            format!("NAT rules may match the packets of {names}, but nothing rewrites them"),
        ),
        (_, true) => (Verdict::Fine, format!("no NAT rule matches the packets of {names}")),
        (Tracking::Seen(_), false) => (
            Verdict::CannotTell,
            format!(
                "nothing is seen to rewrite the packets of {names} now, but not all rules that \
                 could were seen: {way_out}"
            ),
        ),
        (Tracking::Unseen(_), false) => (
            Verdict::CannotTell,
            format!("neither rules nor connections were seen that could touch {names}: {way_out}"),
        ),
    }
}

fn sentence(id: &str, verdict: Verdict, subjects: &str) -> String {
    let is_now = verdict == Verdict::Broken;
    match id {
        "nat_stale_sum" if is_now => format!(
            "class 2: NAT rewrites tunnel packets of {subjects} on this node, and this kernel \
             leaves their checksum stale"
        ),
        "nat_stale_sum" => format!(
            "class 2: a NAT rule of this node can match tunnel packets of {subjects}, whose \
             checksum this kernel would leave stale"
        ),
        "nat_mangled_zero" if is_now => format!(
            "class 1: NAT rewrites tunnel packets of {subjects} on this node, and this kernel \
             writes a wrong checksum where there is none"
        ),
        "nat_mangled_zero" => format!(
            "class 1: a NAT rule of this node can match tunnel packets of {subjects}, into which \
             this kernel would write a wrong checksum"
        ),
        "nat_unknown" => format!(
            "NAT can rewrite tunnel packets of {subjects}, and it cannot be told whether that \
             breaks them"
        ),
        "nic_tunnel_offload" => format!(
            "class 3: the driver of {subjects} is known to break the insides of tunnels, which \
             cannot be seen from here"
        ),
        "nat_elsewhere" => "NAT rewrites packets to a port of VXLAN, whose device is in another \
                            network namespace"
            .to_owned(),
        "checksum_written" => {
            format!("a rule of this node writes the checksum of tunnel packets of {subjects}")
        }
        _ => "this node drops tunnel packets of others, whose checksum is wrong".to_owned(),
    }
}

fn describe(device: &Device) -> report::Device {
    let checksum = |offloads: &Result<crate::doctor::offloads::Offloads, String>| {
        offloads.as_ref().ok().and_then(|it| it.is_on(TX_CHECKSUM))
    };
    let underlays = device.underlays.iter().map(|underlay| report::Underlay {
        name: underlay.name.clone(),
        driver: underlay.driver().map(str::to_owned),
        tx_checksum_ip_generic: checksum(&underlay.offloads),
        tunnel_offloads: underlay.tunnel_offloads(),
    });
    report::Device {
        name: device.name.clone(),
        vni: device.vni,
        port: device.port,
        source_ports: device.source_ports,
        external: device.is_external,
        policy: device.policy.as_str(),
        tx_checksum_ip_generic: checksum(&device.offloads),
        underlays: underlays.collect(),
    }
}
