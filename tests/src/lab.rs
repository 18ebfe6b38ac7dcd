//! Two nodes with a VXLAN between them, as a CNI sets it up, and the NAT rules that break it.
//!
//! ```text
//!  pod (optional)        a: sending node                              b: receiving node
//!  172.29.0.2 ── pod0 ── flannel.1 172.29.0.0                         flannel.1 172.29.2.0
//!                        underlay  10.0.0.11 ── eth0 ═══ eth0 ── 10.0.0.13
//! ```
//!
//! Over a veth with transmit offload on, a packet arrives with its sum still open and is never
//! verified: bad sums, no drop. So offload is off, unless [`LabConfig::nic_offload`] asks for it;
//! then a switch is put between, whose ports close the sums as the hardware of a NIC would.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Result, bail};

use crate::counters;
use crate::netns::NetNs;
use crate::vlan_tag::{Tag, Tagger};

/// The NIC of either node, where vxcsum belongs.
pub const NIC: &str = "eth0";
/// The VXLAN device of either node.
pub const VXLAN: &str = "flannel.1";
/// What kube-proxy marks packets with that are to be masqueraded.
pub const MASQUERADE_MARK: u32 = 0x4000;

const POD_LINK: &str = "pod0";
const MACVLAN: &str = "macvlan0";
const NFT_TABLE: &str = "vxcsum_lab";

/// Family of the outer header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// VXLAN over IPv4.
    V4,
    /// VXLAN over IPv6.
    V6,
}

/// What the VXLAN device puts into the outer checksum field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OuterSum {
    /// A sum: `udpcsum`, and the default over IPv6.
    Sum,
    /// Zero: `noudpcsum`, or `udp6zerocsumtx` over IPv6.
    Zero,
}

/// What the VXLAN device sits on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Underlay {
    /// The NIC.
    Nic,
    /// A macvlan device on the NIC: what is captured on it shows each packet after NAT, but before
    /// TC egress of the NIC.
    Macvlan,
    /// VLAN devices on the NIC, the ids outermost first; two are stacked (802.1ad outside). On a
    /// kernel without VLAN devices, a macvlan device whose packets a TC program tags.
    Vlan(Vec<u16>),
}

/// How packets come from a pod behind the sending node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PodSums {
    /// With their own checksum still open, as over a plain veth.
    Open,
    /// With a finished checksum, as from a NIC.
    Complete,
}

/// How the nodes find each other's inner MAC address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InnerNeighbours {
    /// Entries that never change, as flannel and Calico set them.
    Static,
    /// ARP through the VXLAN.
    Arp,
}

/// What rewrites packets in the sending node's postrouting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nat {
    /// Nothing.
    None,
    /// kube-proxy's masquerade of what it marked; the mark outlives the encapsulation and the rule
    /// matches the outer packet as well. Only for packets to the other node's inner network.
    Masquerade {
        /// Without it, NAT leaves the source port alone wherever it is free.
        random_fully: bool,
    },
    /// The same as in a cluster: kube-proxy marks connections, not packets, and takes the mark off
    /// where it masquerades; a CNI masquerades as well.
    Cluster(Cluster),
    /// The same with the mark from the nat table, which the first packet of a connection passes and
    /// no other, as kube-proxy does it. Packets that are sent again are rewritten only as long as the
    /// kernel remembers having done so to the tunnel's ports. Leaves the source port to chance.
    KubeProxy,
    /// SNAT of every VXLAN packet to [`Lab::snat_address`].
    Snat,
    /// Not NAT: writes 0xffff into the checksum field, the bytes that kernels without ea64d8d6c675
    /// make of a zero when they rewrite the header.
    ZeroMangle,
}

/// The rules of a cluster as kube-proxy has them, and beside them those of a CNI.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cluster {
    /// What they are made with.
    pub tool: Tool,
    /// Which packets the CNI masquerades, and whether it comes before kube-proxy.
    pub cni: Cni,
}

/// What rules are made with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tool {
    /// `iptables-legacy`
    IptablesLegacy,
    /// `iptables-nft`
    IptablesNft,
    /// `nft`, as kube-proxy uses it in nftables mode.
    Nft,
}

impl Tool {
    /// Every one.
    pub const ALL: [Self; 3] = [Self::IptablesLegacy, Self::IptablesNft, Self::Nft];

    /// As vxcsum names it.
    pub const fn backend(self) -> &'static str {
        match self {
            Self::IptablesLegacy => "iptables-legacy",
            Self::IptablesNft => "iptables-nft",
            Self::Nft => "nft",
        }
    }
}

/// The masquerading of a CNI.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cni {
    /// Before kube-proxy, everything with its mark: takes the tunnel packet as well.
    MarkedFirst,
    /// Before kube-proxy, everything into the tunnel.
    TunnelledFirst,
    /// The same after kube-proxy, where it does no harm.
    TunnelledLast,
}

/// How to set up a [`Lab`].
#[derive(Debug, Clone)]
pub struct LabConfig {
    /// Family of the outer header.
    pub outer: Family,
    /// What the VXLAN device puts into the outer checksum field.
    pub outer_sum: OuterSum,
    /// Whether the receiver takes zero sums over IPv6 (`udp6zerocsumrx`, off by default in Linux).
    pub accept_zero_v6: bool,
    /// VXLAN network identifier.
    pub vni: u32,
    /// Outer destination port.
    pub dstport: u16,
    /// Range of outer source ports, the end not included (in Linux 7.2 it is); otherwise `ip_local_port_range`. A range
    /// of one port keeps retransmissions on it and with that on the same NAT entry: the stall then
    /// lasts a minute instead of a second.
    pub srcport: Option<(u16, u16)>,
    /// What the VXLAN device sits on.
    pub underlay: Underlay,
    /// Transmit offload of the NICs, sums and segmentation.
    pub nic_offload: bool,
    /// MTU of the underlay.
    pub mtu: u32,
    /// A third namespace, routed through the sending node.
    pub pod: Option<PodSums>,
    /// How the nodes find each other's inner MAC address.
    pub inner_neighbours: InnerNeighbours,
    /// What rewrites packets from the start.
    pub nat: Nat,
}

impl Default for LabConfig {
    fn default() -> Self {
        Self {
            outer: Family::V4,
            outer_sum: OuterSum::Sum,
            accept_zero_v6: false,
            vni: 1,
            dstport: 8472,
            srcport: None,
            underlay: Underlay::Nic,
            nic_offload: false,
            mtu: 1500,
            pod: None,
            inner_neighbours: InnerNeighbours::Static,
            nat: Nat::None,
        }
    }
}

impl LabConfig {
    /// Builds the lab. What was made before a failure is removed again.
    pub fn start(self) -> Result<Lab> {
        Lab::start(self)
    }
}

/// A running lab, removed on drop.
#[derive(Debug)]
pub struct Lab {
    // In reverse order of making, which is the order of dropping.
    _taggers: Vec<Tagger>,
    pod: Option<NetNs>,
    _switch: Option<NetNs>,
    /// The receiving node.
    pub b: NetNs,
    /// The sending node.
    pub a: NetNs,
    /// What it was made from.
    pub config: LabConfig,
    underlay_device: String,
}

/// One end of the tunnel, with the addresses of both.
struct Node<'a> {
    ns: &'a NetNs,
    own: Ends,
    peer: Ends,
}

#[derive(Clone, Copy)]
struct Ends {
    outer: IpAddr,
    /// Last byte of the MAC addresses.
    id: u8,
    inner: Ipv4Addr,
    inner_net: &'static str,
    inner_v6: Ipv6Addr,
    inner_v6_net: &'static str,
}

impl Ends {
    fn a(family: Family) -> Self {
        Self {
            outer: match family {
                Family::V4 => Ipv4Addr::new(10, 0, 0, 11).into(),
                Family::V6 => Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0x11).into(),
            },
            id: 0x0a,
            inner: Ipv4Addr::new(172, 29, 0, 0),
            inner_net: "172.29.0.0/24",
            inner_v6: Ipv6Addr::new(0xfd29, 0, 0, 0, 0, 0, 0, 1),
            inner_v6_net: "fd29::/64",
        }
    }

    fn b(family: Family) -> Self {
        Self {
            outer: match family {
                Family::V4 => Ipv4Addr::new(10, 0, 0, 13).into(),
                Family::V6 => Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0x13).into(),
            },
            id: 0x0b,
            inner: Ipv4Addr::new(172, 29, 2, 0),
            inner_net: "172.29.2.0/24",
            inner_v6: Ipv6Addr::new(0xfd29, 0, 0, 2, 0, 0, 0, 1),
            inner_v6_net: "fd29:0:0:2::/64",
        }
    }

    fn nic_mac(&self) -> String {
        format!("02:00:00:00:00:{:02x}", self.id)
    }

    fn upper_mac(&self) -> String {
        format!("02:00:00:00:01:{:02x}", self.id)
    }

    fn vxlan_mac(&self) -> String {
        format!("02:00:00:00:02:{:02x}", self.id)
    }
}

impl Lab {
    fn start(config: LabConfig) -> Result<Self> {
        let a = quiet_namespace("a")?;
        let b = quiet_namespace("b")?;
        let switch = connect_nics(&config, &a, &b)?;

        let (ends_a, ends_b) = (Ends::a(config.outer), Ends::b(config.outer));
        let node_a = Node { ns: &a, own: ends_a, peer: ends_b };
        let node_b = Node { ns: &b, own: ends_b, peer: ends_a };
        let (mut taggers, mut underlay_device) = (Vec::new(), String::new());
        for node in [&node_a, &node_b] {
            let (device, tagger) = node.add_underlay_device(&config)?;
            taggers.extend(tagger);
            node.add_underlay_addresses(&device, &config)?;
            underlay_device = device;
        }
        for node in [&node_a, &node_b] {
            node.add_vxlan(&underlay_device, &config)?;
        }
        let pod = config.pod.map(|sums| connect_pod(&a, sums)).transpose()?;

        let lab = Self { _taggers: taggers, pod, _switch: switch, b, a, config, underlay_device };
        lab.add_nat(lab.config.nat)?;
        counters::wait_settled(&lab.a, NIC)?;
        Ok(lab)
    }

    /// The device that the VXLAN device sits on: the NIC or one above it.
    pub fn underlay_device(&self) -> &str {
        &self.underlay_device
    }

    /// The namespace of the pod, if there is one.
    pub fn pod(&self) -> Option<&NetNs> {
        self.pod.as_ref()
    }

    /// The sending node's underlay address.
    pub fn outer_a(&self) -> IpAddr {
        Ends::a(self.config.outer).outer
    }

    /// The receiving node's underlay address.
    pub fn outer_b(&self) -> IpAddr {
        Ends::b(self.config.outer).outer
    }

    /// The sending node's other underlay address, the one that [`Nat::Snat`] rewrites to.
    pub fn snat_address(&self) -> IpAddr {
        match self.config.outer {
            Family::V4 => Ipv4Addr::new(10, 0, 0, 12).into(),
            Family::V6 => Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0x12).into(),
        }
    }

    /// The sending node's address in the overlay.
    pub fn inner_a(&self) -> IpAddr {
        Ends::a(self.config.outer).inner.into()
    }

    /// The receiving node's address in the overlay.
    pub fn inner_b(&self) -> IpAddr {
        Ends::b(self.config.outer).inner.into()
    }

    /// The receiving node's IPv6 address in the overlay.
    pub fn inner_b_v6(&self) -> IpAddr {
        Ends::b(self.config.outer).inner_v6.into()
    }

    /// Removes the VXLAN device of the sending node.
    pub fn remove_vxlan(&self) -> Result<()> {
        self.a.ip(&format!("link del {VXLAN}"))
    }

    /// Makes it again, with this policy.
    pub fn add_vxlan(&self, outer_sum: OuterSum) -> Result<()> {
        let config = LabConfig { outer_sum, ..self.config.clone() };
        let [node_a, _] = self.nodes();
        node_a.add_vxlan(&self.underlay_device, &config)
    }

    /// Removes the NICs, and with them everything upon them.
    pub fn remove_nics(&self) -> Result<()> {
        self.a.ip(&format!("link del {NIC}"))
    }

    /// Makes them again, and everything upon them. For a lab with nothing between.
    pub fn add_nics(&self) -> Result<()> {
        connect_nics(&self.config, &self.a, &self.b)?;
        for node in self.nodes() {
            node.add_underlay_addresses(NIC, &self.config)?;
            node.add_vxlan(NIC, &self.config)?;
        }
        Ok(())
    }

    fn nodes(&self) -> [Node<'_>; 2] {
        let [ends_a, ends_b] = [Ends::a(self.config.outer), Ends::b(self.config.outer)];
        [
            Node { ns: &self.a, own: ends_a, peer: ends_b },
            Node { ns: &self.b, own: ends_b, peer: ends_a },
        ]
    }

    /// Puts rewriting rules into the sending node, in place of those it has.
    pub fn enable_nat(&self, nat: Nat) -> Result<()> {
        self.disable_nat()?;
        self.add_nat(nat)
    }

    fn add_nat(&self, nat: Nat) -> Result<()> {
        match nat {
            Nat::None => Ok(()),
            Nat::Masquerade { random_fully } => self.masquerade("mangle", random_fully),
            Nat::KubeProxy => self.masquerade("nat", true),
            Nat::Cluster(Cluster { tool: Tool::Nft, cni }) => self.cluster_by_nft(cni),
            Nat::Cluster(cluster) => self.cluster_by_iptables(cluster),
            Nat::Snat => self.snat(),
            Nat::ZeroMangle => self.mangle_zero(),
        }
    }

    /// Removes all rewriting rules from the sending node, and its memory of earlier rewriting.
    pub fn disable_nat(&self) -> Result<()> {
        for restore in ["iptables-restore", "ip6tables-restore"] {
            self.restore_tables(restore, "*mangle\nCOMMIT\n*nat\nCOMMIT\n")?;
        }
        let names = self.a.run("cat /proc/net/ip_tables_names /proc/net/ip6_tables_names");
        // Without such tables, their tool would make them.
        if names.is_ok_and(|names| !names.is_empty()) {
            for restore in ["iptables-legacy-restore", "ip6tables-legacy-restore"] {
                self.restore_tables(restore, "*nat\nCOMMIT\n")?;
            }
        }
        let mut clear = String::new();
        let lab = format!("inet {NFT_TABLE}");
        for table in [&lab, "ip kube-proxy", "ip cni", "ip6 kube-proxy", "ip6 cni"] {
            let _ = write!(clear, "table {table}\ndelete table {table}\n");
        }
        self.nft(&clear)?;
        self.a.run("conntrack -F").map(drop)
    }

    /// Marks in the table `mark_in`, masquerades what is marked.
    fn masquerade(&self, mark_in: &str, random_fully: bool) -> Result<()> {
        let option = if random_fully { " --random-fully" } else { "" };
        let ends = Ends::b(self.config.outer);
        for (restore, net) in
            [("iptables-restore", ends.inner_net), ("ip6tables-restore", ends.inner_v6_net)]
        {
            let mark = format!("-d {net} -j MARK --or-mark {MASQUERADE_MARK:#x}");
            let mark = format!("-A PREROUTING {mark}\n-A OUTPUT {mark}\n");
            // A table that is named twice would lose what was said first.
            let before = match mark_in {
                "nat" => format!("*nat\n{mark}"),
                table => format!("*{table}\n{mark}COMMIT\n*nat\n"),
            };
            let marked = format!("-m mark --mark {MASQUERADE_MARK:#x}/{MASQUERADE_MARK:#x}");
            let tables = format!("{before}-A POSTROUTING {marked} -j MASQUERADE{option}\nCOMMIT\n");
            self.restore_tables(restore, &tables)?;
        }
        Ok(())
    }

    fn cluster_by_iptables(&self, Cluster { tool, cni }: Cluster) -> Result<()> {
        let kind = if tool == Tool::IptablesLegacy { "legacy" } else { "nft" };
        let ends = Ends::b(self.config.outer);
        for (tables, net) in [("iptables", ends.inner_net), ("ip6tables", ends.inner_v6_net)] {
            let marked = "-m mark --mark 0x4000/0x4000";
            let from_cni = match cni {
                Cni::MarkedFirst => marked.to_owned(),
                Cni::TunnelledFirst | Cni::TunnelledLast => format!("-o {VXLAN}"),
            };
            let jumps = [
                "-A POSTROUTING -m comment --comment \"cali:O3lYWMrLQYEMJtB5\" -j cali-POSTROUTING\n",
                "-A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" \
                 -j KUBE-POSTROUTING\n",
            ];
            let [first, second] = match cni {
                Cni::TunnelledLast => [jumps[1], jumps[0]],
                _ => jumps,
            };
            let rules = format!(
                "*nat\n:KUBE-SERVICES -\n:KUBE-MARK-MASQ -\n:KUBE-POSTROUTING -\n\
                 :cali-POSTROUTING -\n\
                 -A PREROUTING -j KUBE-SERVICES\n-A OUTPUT -j KUBE-SERVICES\n\
                 -A KUBE-SERVICES -d {net} -j KUBE-MARK-MASQ\n\
                 -A KUBE-MARK-MASQ -j MARK --or-mark 0x4000\n{first}{second}\
                 -A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN\n\
                 -A KUBE-POSTROUTING -j MARK --xor-mark 0x4000\n\
                 -A KUBE-POSTROUTING -m comment --comment \"kubernetes service traffic requiring \
                 SNAT\" -j MASQUERADE --random-fully\n\
                 -A cali-POSTROUTING {from_cni} -m comment --comment \"cali:JHlpT-eSqR1TvyYm\" \
                 -j MASQUERADE --random-fully\nCOMMIT\n"
            );
            self.restore_tables(&format!("{tables}-{kind}-restore"), &rules)?;
        }
        Ok(())
    }

    fn cluster_by_nft(&self, cni: Cni) -> Result<()> {
        let ends = Ends::b(self.config.outer);
        for (family, net) in [("ip", ends.inner_net), ("ip6", ends.inner_v6_net)] {
            let (from_cni, priority) = match cni {
                Cni::MarkedFirst => ("meta mark & 0x4000 == 0x4000".to_owned(), "srcnat - 1"),
                Cni::TunnelledFirst => (format!("oifname \"{VXLAN}\""), "srcnat - 1"),
                Cni::TunnelledLast => (format!("oifname \"{VXLAN}\""), "srcnat + 1"),
            };
            self.nft(&format!(
                "table {family} kube-proxy {{
                     chain mark-for-masquerade {{ mark set mark or 0x4000; }}
                     chain services {{ {family} daddr {net} jump mark-for-masquerade; }}
                     chain nat-prerouting {{
                         type nat hook prerouting priority dstnat; jump services;
                     }}
                     chain nat-output {{ type nat hook output priority -100; jump services; }}
                     chain masquerading {{
                         mark and 0x4000 == 0 return
                         mark set mark xor 0x4000
                         masquerade fully-random
                     }}
                     chain nat-postrouting {{
                         type nat hook postrouting priority srcnat; jump masquerading;
                     }}
                 }}
                 table {family} cni {{
                     chain post {{
                         type nat hook postrouting priority {priority};
                         {from_cni} counter masquerade fully-random
                     }}
                 }}\n"
            ))?;
        }
        Ok(())
    }

    fn snat(&self) -> Result<()> {
        let (address, device) = (self.snat_address(), &self.underlay_device);
        let (restore, add) = match address {
            IpAddr::V4(_) => {
                ("iptables-restore", format!("addr replace {address}/24 dev {device}"))
            }
            // Deprecated, or the kernel might pick it as a source where nothing asks for it.
            IpAddr::V6(_) => (
                "ip6tables-restore",
                format!("addr replace {address}/64 dev {device} nodad preferred_lft 0"),
            ),
        };
        self.a.ip(&add)?;
        let port = self.config.dstport;
        let rule = format!("-A POSTROUTING -p udp --dport {port} -j SNAT --to-source {address}");
        self.restore_tables(restore, &format!("*nat\n{rule}\nCOMMIT\n"))
    }

    fn mangle_zero(&self) -> Result<()> {
        let port = self.config.dstport;
        self.nft(&format!(
            "table inet {NFT_TABLE} {{ chain post {{ type filter hook postrouting priority 300; \
             udp dport {port} udp checksum set 0xffff; }}; }}\n"
        ))
    }

    fn restore_tables(&self, restore: &str, tables: &str) -> Result<()> {
        self.a.run_with_input(restore, tables).map(drop)
    }

    fn nft(&self, commands: &str) -> Result<()> {
        self.a.run_with_input("nft -f -", commands).map(drop)
    }
}

/// A namespace that sends nothing by itself: no duplicate address detection, no router
/// solicitation, and multicast reports (which go through the VXLAN, too) within milliseconds.
fn quiet_namespace(label: &str) -> Result<NetNs> {
    let ns = NetNs::new(label)?;
    ns.sysctl("net.ipv6.conf.default.addr_gen_mode", "1")?;
    ns.sysctl("net.ipv6.conf.default.accept_dad", "0")?;
    ns.sysctl("net.ipv6.conf.default.mldv2_unsolicited_report_interval", "1")?;
    ns.sysctl("net.ipv4.conf.all.rp_filter", "0")?;
    ns.sysctl("net.ipv4.conf.default.rp_filter", "0")?;
    Ok(ns)
}

/// Joins the two nodes, directly or by a switch; returns the switch.
fn connect_nics(config: &LabConfig, a: &NetNs, b: &NetNs) -> Result<Option<NetNs>> {
    let mtu = config.mtu + 4 * config.underlay.vlans().len() as u32;
    let nic = |ends: Ends| format!("{NIC} address {} mtu {mtu} type veth", ends.nic_mac());
    let (nic_a, nic_b) = (nic(Ends::a(config.outer)), nic(Ends::b(config.outer)));
    let switch = if config.nic_offload {
        let switch = quiet_namespace("switch")?;
        switch.ip(&format!("link add br0 mtu {mtu} type bridge mcast_snooping 0"))?;
        for (node, nic, port) in [(a, nic_a, "port-a"), (b, nic_b, "port-b")] {
            let netns = switch.name();
            node.ip(&format!("link add {nic} peer name {port} mtu {mtu} netns {netns}"))?;
            turn_offload_off(&switch, port)?;
            switch.ip(&format!("link set {port} master br0 up"))?;
        }
        switch.ip("link set br0 up")?;
        Some(switch)
    } else {
        let peer = nic_b.trim_end_matches(" type veth");
        a.ip(&format!("link add {nic_a} peer name {peer} netns {}", b.name()))?;
        turn_offload_off(a, NIC)?;
        turn_offload_off(b, NIC)?;
        None
    };
    a.ip(&format!("link set {NIC} up"))?;
    b.ip(&format!("link set {NIC} up"))?;
    Ok(switch)
}

fn turn_offload_off(ns: &NetNs, device: &str) -> Result<()> {
    ns.run(&format!("ethtool -K {device} tx off")).map(drop)
}

/// A third namespace behind the sending node, as a CNI connects a pod.
fn connect_pod(a: &NetNs, sums: PodSums) -> Result<NetNs> {
    let pod = quiet_namespace("pod")?;
    pod.ip(&format!("link add {NIC} type veth peer name {POD_LINK} netns {}", a.name()))?;
    if sums == PodSums::Complete {
        turn_offload_off(&pod, NIC)?;
    }
    a.sysctl("net.ipv4.ip_forward", "1")?;
    a.ip(&format!("addr add 172.29.0.1/24 dev {POD_LINK}\nlink set {POD_LINK} up"))?;
    pod.ip(&format!(
        "addr add 172.29.0.2/24 dev {NIC}\nlink set {NIC} up\nroute add default via 172.29.0.1"
    ))?;
    Ok(pod)
}

impl Underlay {
    fn vlans(&self) -> &[u16] {
        match self {
            Self::Nic | Self::Macvlan => &[],
            Self::Vlan(ids) => ids,
        }
    }
}

impl Node<'_> {
    /// Makes the device that the VXLAN device will sit on and returns its name.
    fn add_underlay_device(&self, config: &LabConfig) -> Result<(String, Option<Tagger>)> {
        let (mut device, mut tagger) = (NIC.to_owned(), None);
        match &config.underlay {
            Underlay::Nic => return Ok((device, None)),
            Underlay::Macvlan => device = self.add_macvlan()?,
            Underlay::Vlan(ids) => {
                let tags = tags(ids)?;
                for (ethertype, id) in &tags {
                    let upper = format!("{device}.{id}");
                    let protocol = if *ethertype == ETHERTYPE_QINQ { "802.1ad" } else { "802.1Q" };
                    let kind = format!("vlan protocol {protocol} id {id}");
                    match self.ns.ip(&format!("link add link {device} name {upper} type {kind}")) {
                        Ok(()) => {}
                        Err(error) if format!("{error:#}").contains("Unknown device type") => {
                            device = self.add_macvlan()?;
                            tagger = Some(Tagger::start(self.ns, &device, NIC, &tags)?);
                            break;
                        }
                        Err(error) => return Err(error),
                    }
                    self.ns.ip(&format!("link set {upper} up"))?;
                    device = upper;
                }
            }
        }
        self.ns.ip(&format!(
            "link set {device} address {} mtu {}\nlink set {device} up",
            self.own.upper_mac(),
            config.mtu
        ))?;
        Ok((device, tagger))
    }

    fn add_macvlan(&self) -> Result<String> {
        self.ns.ip(&format!("link add link {NIC} name {MACVLAN} type macvlan mode bridge"))?;
        Ok(MACVLAN.to_owned())
    }

    fn add_underlay_addresses(&self, device: &str, config: &LabConfig) -> Result<()> {
        let (own, peer) = (self.own.outer, self.peer.outer);
        let length = match config.outer {
            Family::V4 => "24",
            Family::V6 => "64 nodad",
        };
        let peer_mac = if device == NIC { self.peer.nic_mac() } else { self.peer.upper_mac() };
        self.ns.ip(&format!(
            "addr add {own}/{length} dev {device}\n\
             neigh add {peer} lladdr {peer_mac} dev {device} nud permanent"
        ))
    }

    fn add_vxlan(&self, device: &str, config: &LabConfig) -> Result<()> {
        let Ends { outer, inner, inner_v6, .. } = self.own;
        let sums = match (config.outer, config.outer_sum) {
            (Family::V4, OuterSum::Sum) => "udpcsum",
            (Family::V4, OuterSum::Zero) => "noudpcsum",
            (Family::V6, OuterSum::Sum) => "noudp6zerocsumtx",
            (Family::V6, OuterSum::Zero) => "udp6zerocsumtx",
        };
        let accept = match (config.outer, config.accept_zero_v6) {
            (Family::V6, true) => "udp6zerocsumrx",
            _ => "",
        };
        let srcport =
            config.srcport.map(|(low, high)| format!("srcport {low} {high}")).unwrap_or_default();
        self.ns.ip(&format!(
            "link add {VXLAN} address {} type vxlan id {} local {outer} dev {device} dstport {} \
             nolearning {srcport} {sums} {accept}\n\
             addr add {inner}/32 dev {VXLAN}\n\
             addr add {inner_v6}/128 dev {VXLAN} nodad\n\
             link set {VXLAN} up",
            self.own.vxlan_mac(),
            config.vni,
            config.dstport,
        ))?;
        self.add_overlay_peer(config)
    }

    fn add_overlay_peer(&self, config: &LabConfig) -> Result<()> {
        let Ends { outer, inner, inner_net, inner_v6, inner_v6_net, .. } = self.peer;
        self.ns.ip(&format!(
            "route add {inner_net} via {inner} dev {VXLAN} onlink\n\
             route add {inner_v6_net} dev {VXLAN}"
        ))?;
        let mac = self.peer.vxlan_mac();
        let forward =
            |mac: &str| self.ns.run(&format!("bridge fdb append {mac} dev {VXLAN} dst {outer}"));
        forward(&mac)?;
        match config.inner_neighbours {
            InnerNeighbours::Static => self.ns.ip(&format!(
                "neigh add {inner} lladdr {mac} dev {VXLAN} nud permanent\n\
                 neigh add {inner_v6} lladdr {mac} dev {VXLAN} nud permanent"
            )),
            // All zeroes stands for broadcasts and everything that is not known.
            InnerNeighbours::Arp => forward("00:00:00:00:00:00").map(drop),
        }
    }
}

const ETHERTYPE_VLAN: u16 = 0x8100;
const ETHERTYPE_QINQ: u16 = 0x88a8;

fn tags(ids: &[u16]) -> Result<Vec<Tag>> {
    match *ids {
        [id] => Ok(vec![(ETHERTYPE_VLAN, id)]),
        [outer, inner] => Ok(vec![(ETHERTYPE_QINQ, outer), (ETHERTYPE_VLAN, inner)]),
        _ => bail!("one VLAN id or two, not {}", ids.len()),
    }
}
