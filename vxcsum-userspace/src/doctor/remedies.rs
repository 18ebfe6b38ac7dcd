//! What ends it: the exact command for this host, what it costs, and whether it outlives a reboot.

use std::collections::BTreeSet;

use vxcsum_common::Policy;

use crate::doctor::devices::{Device, TUNNEL_OFFLOADS, Underlay};
use crate::doctor::facts::{Entry, Facts, KubeProxy};
use crate::doctor::judge::{Exposure, exposure};
use crate::doctor::kernel::ZeroSumFix;
use crate::doctor::report::{Finding, Remedy, Severity};
use crate::netfilter::Backend;

/// Every program that a remedy may call.
pub const TOOLS: [&str; 9] = [
    "conntrack",
    "ethtool",
    "ip6tables",
    "ip6tables-legacy",
    "ip6tables-nft",
    "iptables",
    "iptables-legacy",
    "iptables-nft",
    "nft",
];

/// For everything that is more than a note, the best first.
pub fn of(facts: &Facts, fix: ZeroSumFix, findings: &[Finding]) -> Vec<Remedy> {
    let mut remedies = Vec::new();
    let devices = facts.devices.as_deref().unwrap_or_default();
    let is_found = |subject: &str, starts: &str| {
        let of_it = |it: &&Finding| it.subject == subject && it.id.starts_with(starts);
        findings.iter().filter(of_it).any(|it| it.severity != Severity::Note)
    };
    let hit: Vec<&Device> = devices.iter().filter(|it| is_found(&it.name, "nat_")).collect();
    for device in &hit {
        remedies.extend(keep_nat_off(facts, device));
    }
    for device in &hit {
        offload_off(facts, device, &mut remedies);
    }
    if hit.iter().any(|device| exposure(device, fix) == Exposure::MangledZero) {
        remedies.push(kernel_upgrade(facts));
    }
    let lacks_unmark = |it: &KubeProxy| it.fate.unmark.is_none();
    if !hit.is_empty() && facts.rules.kube_proxy.as_ref().is_some_and(lacks_unmark) {
        remedies.push(kube_proxy_upgrade());
    }
    if !hit.is_empty() {
        remedies.push(run_fix(&hit));
    }
    for underlay in devices.iter().flat_map(|device| &device.underlays) {
        if is_found(&underlay.name, "nic_") {
            nic_offload_off(facts, underlay, &mut remedies);
        }
    }
    remedies
}

fn push(remedies: &mut Vec<Remedy>, remedy: Remedy) {
    if !remedies.contains(&remedy) {
        remedies.push(remedy);
    }
}

/// Rules before those that rewrite: they clear the mark where all of those ask for one, else they
/// return.
fn keep_nat_off(facts: &Facts, device: &Device) -> Option<Remedy> {
    let hits = facts.rules.hits.iter().filter(|hit| hit.device == device.name);
    let entries: Vec<&Entry> = hits.clone().map(|hit| &hit.entry).collect();
    let marks: Option<Vec<(Backend, u32)>> = hits
        .map(|hit| Some((hit.entry.backend, hit.mark.as_ref()?.bits)))
        .collect::<Option<_>>()
        .filter(|marks: &Vec<_>| !marks.is_empty());
    let (id, text, commands) = match marks {
        Some(marks) => (
            "unmark_rule",
            format!(
                "Clear the mark from the tunnel packets of {}, before NAT looks at it",
                device.name
            ),
            marks.iter().map(|&(backend, bits)| unmark(facts, device, backend, bits)).collect(),
        ),
        None => (
            "return_rule",
            format!(
                "Let the tunnel packets of {} pass by NAT (until something puts its own rule \
                 first again)",
                device.name
            ),
            if entries.is_empty() {
                vec![pass_by_unseen(facts, device)?]
            } else {
                entries.into_iter().map(|entry| pass_by(facts, device, entry)).collect::<Vec<_>>()
            },
        ),
    };
    let mut commands: Vec<String> = commands;
    let mut seen = BTreeSet::new();
    commands.retain(|command| seen.insert(command.clone()));
    let forget = forget(facts, device);
    let text = match &forget {
        Some(_) => text,
        None => {
            text + "; flows that are known go on as they are until they pause for half a minute"
        }
    };
    commands.extend(forget);
    Some(Remedy {
        id,
        text,
        command: Some(commands.join("; ")),
        cost: "next to nothing",
        survives_reboot: false,
    })
}

/// Where connection tracking shows it, and the rule was not seen.
fn pass_by_unseen(facts: &Facts, device: &Device) -> Option<String> {
    let programs = ["iptables", "iptables-nft", "iptables-legacy"];
    let is_there = programs.iter().any(|it| facts.tools.contains_key(it));
    let (table, chain) = ("nat".to_owned(), "POSTROUTING".to_owned());
    let backend = Backend::IptablesNft;
    let entry = Entry { backend, family: family(device), table, chain };
    is_there.then(|| pass_by(facts, device, &entry))
}

/// A rule that returns, first in the chain that leads to NAT.
fn pass_by(facts: &Facts, device: &Device, entry: &Entry) -> String {
    let Entry { backend, family, table, chain } = entry;
    let port = device.port;
    match backend {
        Backend::Nft => {
            let out = nft_interface(device);
            format!("nft 'insert rule {family} {table} {chain} {out}udp dport {port} return'")
        }
        _ => format!(
            "{} -t {table} -I {chain} 1{} -p udp --dport {port} -j RETURN",
            iptables(facts, *backend, device),
            out_interface(device)
        ),
    }
}

/// A rule in a table that is met before NAT, whatever the order of rules in there.
fn unmark(facts: &Facts, device: &Device, backend: Backend, bits: u32) -> String {
    let port = device.port;
    match backend {
        Backend::Nft => {
            let (out, kept) = (nft_interface(device), !bits);
            format!(
                "nft 'add table inet vxcsum; add chain inet vxcsum unmark {{ type filter hook \
                 postrouting priority -150; }}; add rule inet vxcsum unmark {out}udp dport {port} \
                 meta mark set meta mark & {kept:#x}'"
            )
        }
        backend => format!(
            "{} -t mangle -I POSTROUTING 1{} -p udp --dport {port} -j MARK --set-xmark \
             0x0/{bits:#x}",
            iptables(facts, backend, device),
            out_interface(device)
        ),
    }
}

/// Connections that are known already are rewritten on and on, without a look at the rules.
fn forget(facts: &Facts, device: &Device) -> Option<String> {
    let family = if device.is_ipv6 { "ipv6" } else { "ipv4" };
    let is_there = facts.tools.contains_key("conntrack");
    is_there.then(|| format!("conntrack -D -f {family} -p udp --dport {}", device.port))
}

const fn family(device: &Device) -> &'static str {
    if device.is_ipv6 { "ip6" } else { "ip" }
}

/// The program by its full name where that is installed: `iptables` alone may stand for the other.
fn iptables(facts: &Facts, backend: Backend, device: &Device) -> &'static str {
    let (plain, full) = match (backend, device.is_ipv6) {
        (Backend::IptablesLegacy, false) => ("iptables", "iptables-legacy"),
        (Backend::IptablesLegacy, true) => ("ip6tables", "ip6tables-legacy"),
        (_, false) => ("iptables", "iptables-nft"),
        (_, true) => ("ip6tables", "ip6tables-nft"),
    };
    if facts.tools.contains_key(full) { full } else { plain }
}

fn out_interface(device: &Device) -> String {
    device.leaves_by.as_deref().map(|name| format!(" -o {}", shell(name))).unwrap_or_default()
}

fn nft_interface(device: &Device) -> String {
    // nft has no way to write a quote inside of quotes.
    let name = device.leaves_by.as_deref().filter(|name| !name.contains('"'));
    // Inside of single quotes for a shell.
    let quoted = name.map(|name| format!("oifname \"{}\" ", name.replace('\'', r"'\''")));
    quoted.unwrap_or_default()
}

fn offload_off(facts: &Facts, device: &Device, remedies: &mut Vec<Remedy>) {
    let name = shell(&device.name);
    let cost = "throughput: the CPU adds up inner checksums, and TCP segmentation offload of the \
                tunnel goes with it";
    remedies.push(Remedy {
        id: "offload_off",
        text: format!(
            "Complete inner checksums in {}, before NAT{}",
            device.name,
            needs_ethtool(facts)
        ),
        command: Some(format!("ethtool -K {name} tx-checksum-ip-generic off")),
        cost,
        survives_reboot: false,
    });
    remedies.push(Remedy {
        id: "offload_off_udev",
        text: format!("The same whenever {} is made, for example by the CNI", device.name),
        command: Some(udev_rule(facts, &device.name, "tx-checksum-ip-generic off")),
        cost,
        survives_reboot: true,
    });
}

fn needs_ethtool(facts: &Facts) -> &'static str {
    let is_there = facts.tools.contains_key("ethtool");
    if is_there { "" } else { " (needs ethtool, which is not installed)" }
}

/// A udev rule in a file of its own, which udev notices by itself. It acts when the device is made.
fn udev_rule(facts: &Facts, device: &str, features: &str) -> String {
    let ethtool = facts.tools.get("ethtool").and_then(|path| path.to_str());
    let ethtool = ethtool.unwrap_or("/usr/sbin/ethtool");
    // What means something in a pattern, or ends it; a question mark stands for it.
    let name = device.replace(['"', '\\', '*', '[', ']', '|', '$', '%'], "?");
    let rule = format!(
        "ACTION==\"add\", SUBSYSTEM==\"net\", KERNEL==\"{name}\", \
         RUN+=\"{ethtool} -K $name {features}\""
    );
    let path = format!("/etc/udev/rules.d/90-vxcsum-{device}.rules");
    format!("echo {} > {}", quoted(&rule), shell(&path))
}

fn kernel_upgrade(facts: &Facts) -> Remedy {
    let text = if facts.kernel.release.contains(".el7") {
        "Upgrade to a kernel with ea64d8d6c675: no kernel of RHEL 7 has it, RHEL 9 does. The \
         device is then best left at sending no checksum (noudpcsum): one that sends sums runs \
         into class 2"
    } else {
        "Upgrade to a kernel with ea64d8d6c675: 5.7, 5.6.13, 5.4.41, 4.19.123, 4.14.181 or newer \
         of these. The device is then best left at sending no checksum (noudpcsum): one that sends \
         sums runs into class 2"
    };
    Remedy {
        id: "kernel_upgrade",
        text: text.to_owned(),
        command: None,
        cost: "a reboot",
        survives_reboot: true,
    }
}

fn kube_proxy_upgrade() -> Remedy {
    Remedy {
        id: "kube_proxy_upgrade",
        text: "Upgrade kube-proxy to 1.16.13, 1.17.9, 1.18.6 or newer: it clears its mark before \
               it masquerades (helps only where no rule of the CNI takes packets before)"
            .to_owned(),
        command: None,
        cost: "a restart of kube-proxy",
        survives_reboot: true,
    }
}

fn run_fix(devices: &[&Device]) -> Remedy {
    let interfaces = devices.iter().flat_map(|device| &device.underlays);
    let names: BTreeSet<&str> = interfaces.map(|underlay| underlay.name.as_str()).collect();
    let ports: BTreeSet<u16> = devices.iter().map(|device| device.port).collect();
    let names = names.into_iter().map(|name| format!(" --interface {}", shell(name)));
    let ports = ports.into_iter().map(|port| format!(" --port {port}"));
    let options: String = names.chain(ports).collect();
    let command = format!("vxcsum run --fix restore{options}");
    // Where the kernel does not tell, the policy is learned from traffic.
    let learns = devices.iter().any(|device| device.policy == Policy::Unknown);
    let text = "Put broken checksums right as they leave, while vxcsum runs (as a service, with \
                fix = \"restore\" in /etc/vxcsum/vxcsum.toml, it outlives a reboot)";
    Remedy {
        id: "run_fix_restore",
        text: if learns {
            format!("{text}; what the device sends is learned first")
        } else {
            text.to_owned()
        },
        command: Some(command),
        cost: "some nanoseconds for each packet that leaves",
        survives_reboot: false,
    }
}

fn nic_offload_off(facts: &Facts, underlay: &Underlay, remedies: &mut Vec<Remedy>) {
    let features: Vec<String> =
        TUNNEL_OFFLOADS.iter().map(|feature| format!("{feature} off")).collect();
    let features = features.join(" ");
    let cost = "throughput: the CPU cuts and adds up what the NIC did";
    push(
        remedies,
        Remedy {
            id: "nic_offload_off",
            text: format!(
                "Keep {} from touching the insides of tunnels, and see whether it helps",
                underlay.name
            ),
            command: Some(format!("ethtool -K {} {features}", shell(&underlay.name))),
            cost,
            survives_reboot: false,
        },
    );
    push(
        remedies,
        Remedy {
            id: "nic_offload_off_udev",
            text: format!("The same whenever {} appears", underlay.name),
            command: Some(udev_rule(facts, &underlay.name, &features)),
            cost,
            survives_reboot: true,
        },
    );
}

/// A word for a shell. Names of interfaces may hold anything but spaces and slashes.
fn shell(word: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.:/@".contains(c);
    if word.chars().all(is_plain) { word.to_owned() } else { quoted(word) }
}

fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}
