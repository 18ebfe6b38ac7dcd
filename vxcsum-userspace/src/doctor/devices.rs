//! VXLAN devices and what they leave by, with their offloads.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use vxcsum_common::Policy;

use crate::doctor::offloads::Offloads;
use crate::links::{Link, Links, Vxlan, local_port_range};

/// Completes the sums of packets that leave a device; on where the device leaves that to others.
pub const TX_CHECKSUM: &str = "tx-checksum-ip-generic";
/// What a NIC does to the insides of tunnels, as far as checksums go.
pub const TUNNEL_OFFLOADS: [&str; 2] = ["tx-udp_tnl-segmentation", "tx-udp_tnl-csum-segmentation"];

/// A VXLAN device.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    pub is_external: bool,
    /// The address that it sends from.
    pub local: Option<IpAddr>,
    /// The nodes that it sends to, as far as known.
    pub remotes: Vec<IpAddr>,
    /// Tunnels over IPv6.
    pub is_ipv6: bool,
    /// What it puts into the outer checksum.
    pub policy: Policy,
    /// Its offloads, or why they could not be read.
    pub offloads: Result<Offloads, String>,
    /// The interface that routing sends its packets through, if it is one: what rules call their
    /// output interface.
    pub leaves_by: Option<String>,
    /// The last interfaces that its packets pass.
    pub underlays: Vec<Underlay>,
}

/// An interface that tunnel packets leave through.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Underlay {
    /// Name.
    pub name: String,
    /// Its offloads, or why they could not be read.
    pub offloads: Result<Offloads, String>,
}

impl Device {
    /// Whether it hands on inner packets with their checksum still open, by its features. Where
    /// they are not known, it does: that is how VXLAN devices are made.
    pub fn leaves_inner_sums_open(&self) -> bool {
        self.offloads.as_ref().ok().and_then(|it| it.is_on(TX_CHECKSUM)).unwrap_or(true)
    }
}

impl Underlay {
    /// Name of the driver, as far as known.
    pub fn driver(&self) -> Option<&str> {
        self.offloads.as_ref().ok()?.driver.as_deref()
    }

    /// Which of [`TUNNEL_OFFLOADS`] are on.
    pub fn tunnel_offloads(&self) -> Vec<&'static str> {
        let Ok(offloads) = &self.offloads else { return Vec::new() };
        TUNNEL_OFFLOADS.into_iter().filter(|it| offloads.is_on(it) == Some(true)).collect()
    }
}

/// Every VXLAN device, with the nodes that it knows by its index.
pub fn of_links(links: &Links, remotes: &BTreeMap<u32, BTreeSet<IpAddr>>) -> Vec<Device> {
    let device = |link: &Link| {
        let vxlan = link.vxlan.as_ref()?;
        let known = remotes.get(&link.index).into_iter().flatten().copied();
        Some(Device { remotes: known.chain(vxlan.remote).collect(), ..device(links, link, vxlan) })
    };
    links.vxlan().filter_map(device).collect()
}

/// Every address of this network namespace.
pub fn addresses(links: &Links) -> Vec<IpAddr> {
    links
        .names()
        .filter_map(|name| links.by_name(name))
        .flat_map(|link| link.addresses.iter().copied())
        .collect()
}

fn device(links: &Links, link: &Link, vxlan: &Vxlan) -> Device {
    let name = |index| links.by_index(index).map(|link| link.name.clone());
    let is_over = |index: &u32| links.vxlan_over(*index).any(|(it, _)| it.index == link.index);
    let underlays = links.underlays().into_iter().filter(is_over).filter_map(name);
    let routed: BTreeSet<u32> = match link.below {
        Some(below) => BTreeSet::from([below]),
        None => vxlan.routed_by.clone(),
    };
    let is_ipv6 = vxlan.local.or(vxlan.remote).is_some_and(|ip| ip.is_ipv6());
    Device {
        name: link.name.clone(),
        vni: vxlan.vni,
        port: vxlan.port,
        source_ports: match vxlan.source_ports {
            (0, 0) => local_port_range(),
            range => Some(range),
        },
        is_external: vxlan.is_external,
        local: vxlan.local,
        remotes: Vec::new(),
        is_ipv6,
        policy: if is_ipv6 { vxlan.policy_ipv6 } else { vxlan.policy_ipv4 },
        offloads: offloads(&link.name),
        leaves_by: match Vec::from_iter(routed)[..] {
            [index] => name(index),
            _ => None,
        },
        underlays: underlays.map(|name| Underlay { offloads: offloads(&name), name }).collect(),
    }
}

fn offloads(device: &str) -> Result<Offloads, String> {
    Offloads::read(device).map_err(|errno| errno.desc().to_owned())
}
