//! The network interfaces of this network namespace, by rtnetlink.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::pin::pin;

use futures_util::TryStreamExt as _;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::AddressAttribute;
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkInfo, LinkLayerType, LinkMessage,
};
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute};
use netlink_packet_route::route::{RouteAttribute, RouteMessage};
use rtnetlink::{Handle, RouteMessageBuilder};
use thiserror::Error;
use vxcsum_common::Policy;

/// rtnetlink did not answer.
#[derive(Debug, Error)]
#[error("cannot ask the kernel for {what} (rtnetlink): {source}")]
pub struct LinksError {
    what: &'static str,
    source: Box<dyn std::error::Error + Send + Sync>,
}

/// Every interface, by index.
#[derive(Clone, Debug, Default)]
pub struct Links(BTreeMap<u32, Link>);

/// One interface.
#[derive(Clone, Debug, Default)]
pub struct Link {
    /// Interface index.
    pub index: u32,
    /// Name.
    pub name: String,
    /// Frames carry no link header.
    pub is_raw_ip: bool,
    /// Longest packet that it takes, in bytes without link header; 0 where that is not known.
    pub mtu: u32,
    /// The interface below: of a VLAN its parent, of a VXLAN device the underlay if one is set.
    pub below: Option<u32>,
    /// The bond or bridge that it is a port of.
    pub controller: Option<u32>,
    /// What happens to packets behind it.
    pub kind: Kind,
    /// What is set on a VXLAN device.
    pub vxlan: Option<Vxlan>,
    /// Addresses.
    pub addresses: Vec<IpAddr>,
}

/// Whether packets leave the node through an interface, or go on through another one as they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// They leave, or are changed so that they are no tunnel packets any more.
    #[default]
    Final,
    /// They go on through the interface below (VLAN, macvlan, ipvlan).
    Stacked,
    /// They go on through one of its ports (bond, team).
    Aggregate,
}

/// The attributes of a VXLAN device that decide about its outer header.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Vxlan {
    /// VXLAN network identifier.
    pub vni: u32,
    /// UDP destination port.
    pub port: u16,
    /// The address it sends from.
    pub local: Option<IpAddr>,
    /// Source ports, lowest and upper bound; 0-0 stands for `ip_local_port_range`.
    pub source_ports: (u16, u16),
    /// Over IPv4.
    pub policy_ipv4: Policy,
    /// Over IPv6.
    pub policy_ipv6: Policy,
    /// VNI and addresses are decided per packet.
    pub is_external: bool,
    /// Where it sends what has no entry of its own, if that is one node.
    pub remote: Option<IpAddr>,
    /// The interfaces that routes to its remotes lead to, where it is not set to one.
    pub routed_by: BTreeSet<u32>,
}

/// What the VXLAN driver takes its source ports from by default, where it can be read
/// (`udp_flow_src_port` in include/net/udp.h).
pub fn local_port_range() -> Option<(u16, u16)> {
    let text = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").ok()?;
    let mut numbers = text.split_whitespace().map_while(|number| number.parse().ok());
    Some((numbers.next()?, numbers.next()?))
}

/// How many packets each interface has sent, by index.
pub async fn sent_packets() -> Result<BTreeMap<u32, u64>, LinksError> {
    let failed = |source| LinksError { what: "its interfaces", source };
    let (connection, handle, _) =
        rtnetlink::new_connection().map_err(|error| failed(error.into()))?;
    let connection = tokio::spawn(connection);
    let mut sent = BTreeMap::new();
    let mut answers = pin!(handle.link().get().execute());
    while let Some(link) = answers.try_next().await.map_err(|error| failed(error.into()))? {
        let packets = link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::Stats64(stats) => Some(stats.tx_packets),
            _ => None,
        });
        sent.extend(packets.map(|packets| (link.header.index, packets)));
    }
    connection.abort();
    Ok(sent)
}

/// The nodes that VXLAN devices know by their forwarding entries, by index of the device.
pub async fn remotes() -> Result<BTreeMap<u32, BTreeSet<IpAddr>>, LinksError> {
    let (connection, handle, _) = rtnetlink::new_connection()
        .map_err(|error| LinksError { what: "its forwarding entries", source: error.into() })?;
    let connection = tokio::spawn(connection);
    let remotes = forwarding_entries(&handle).await;
    connection.abort();
    remotes
}

impl Links {
    /// Asks the kernel.
    pub async fn read() -> Result<Self, LinksError> {
        let (connection, handle, _) = rtnetlink::new_connection()
            .map_err(|error| LinksError { what: "its interfaces", source: error.into() })?;
        let connection = tokio::spawn(connection);
        let links = Self::read_by(&handle).await;
        connection.abort();
        links
    }

    async fn read_by(handle: &Handle) -> Result<Self, LinksError> {
        let mut links = BTreeMap::new();
        let mut answers = handle.link().get().execute();
        while let Some(message) = answers
            .try_next()
            .await
            .map_err(|error| LinksError { what: "its interfaces", source: error.into() })?
        {
            let link = Link::of_message(&message);
            links.insert(link.index, link);
        }
        let mut answers = handle.address().get().execute();
        while let Some(message) = answers
            .try_next()
            .await
            .map_err(|error| LinksError { what: "its addresses", source: error.into() })?
        {
            let Some(link) = links.get_mut(&message.header.index) else { continue };
            // IFA_LOCAL is the address itself; IFA_ADDRESS is the peer's on point-to-point links.
            let local = message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Local(address) => Some(*address),
                _ => None,
            });
            let address = message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Address(address) => Some(*address),
                _ => None,
            });
            link.addresses.extend(local.or(address));
        }
        let mut links = Self(links);
        links.follow_routes(handle).await?;
        Ok(links)
    }

    /// Finds the underlay of those VXLAN devices that are not set to one: where the routes to their
    /// remotes lead, or without any remote the default routes.
    async fn follow_routes(&mut self, handle: &Handle) -> Result<(), LinksError> {
        /// Nodes of a cluster are many, underlays are few.
        const MAX_LOOKUPS: usize = 64;

        let unset = |link: &Link| link.vxlan.is_some() && link.below.is_none();
        if !self.0.values().any(unset) {
            return Ok(());
        }
        let forwarding = forwarding_entries(handle).await?;
        let defaults = default_route_interfaces(handle).await?;
        for link in self.0.values_mut().filter(|link| unset(link)) {
            let Some(vxlan) = &mut link.vxlan else { continue };
            let entries = forwarding.get(&link.index).into_iter().flatten().copied();
            let remotes: BTreeSet<IpAddr> = entries.chain(vxlan.remote).collect();
            for remote in remotes.into_iter().take(MAX_LOOKUPS) {
                vxlan.routed_by.extend(route_interface(handle, remote).await);
            }
            if vxlan.routed_by.is_empty() {
                vxlan.routed_by.clone_from(&defaults);
            }
        }
        Ok(())
    }

    /// The interfaces where packets of VXLAN devices can be watched: each is the last that they
    /// pass on this node, so each packet passes one of them, once.
    pub fn underlays(&self) -> BTreeSet<u32> {
        let mut found = BTreeSet::new();
        for link in self.0.values() {
            let Some(vxlan) = &link.vxlan else { continue };
            for &index in link.below.iter().chain(&vxlan.routed_by) {
                self.add_last(index, &mut found, 0);
            }
        }
        found
    }

    /// Adds the last interfaces that packets pass which leave by `index`.
    fn add_last(&self, index: u32, found: &mut BTreeSet<u32>, depth: usize) {
        /// The kernel stacks no deeper (`MAX_NEST_DEV` in include/linux/netdevice.h).
        const MAX_DEPTH: usize = 8;
        let Some(link) = self.0.get(&index) else { return };
        let ports = self.0.values().filter(|port| port.controller == Some(index));
        match (link.kind, link.below) {
            _ if depth == MAX_DEPTH => {}
            (Kind::Stacked, Some(below)) => self.add_last(below, found, depth + 1),
            (Kind::Aggregate, _) => {
                ports.for_each(|port| self.add_last(port.index, found, depth + 1));
            }
            _ => _ = found.insert(index),
        }
    }

    /// The interface of that name.
    pub fn by_name(&self, name: &str) -> Option<&Link> {
        self.0.values().find(|link| link.name == name)
    }

    /// The interface of that index.
    pub fn by_index(&self, index: u32) -> Option<&Link> {
        self.0.get(&index)
    }

    /// Every VXLAN device.
    pub fn vxlan(&self) -> impl Iterator<Item = &Link> {
        self.0.values().filter(|link| link.vxlan.is_some())
    }

    /// Every name, for messages.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.values().map(|link| link.name.as_str())
    }

    /// The VXLAN devices whose packets leave through the interface `index`: those set to it, or to
    /// a VLAN, bond or bridge above it, and those without an underlay of their own, where routes may
    /// lead there.
    pub fn vxlan_over(&self, index: u32) -> impl Iterator<Item = (&Link, &Vxlan)> {
        let above = self.above(index);
        self.0.values().filter_map(move |link| {
            let vxlan = link.vxlan.as_ref()?;
            let is_over = match link.below {
                Some(below) => above.contains(&below),
                None => vxlan.routed_by.is_empty() || !vxlan.routed_by.is_disjoint(&above),
            };
            is_over.then_some((link, vxlan))
        })
    }

    /// The interface `index` and those stacked upon it.
    fn above(&self, index: u32) -> BTreeSet<u32> {
        let mut above = BTreeSet::from([index]);
        loop {
            let known = above.len();
            for link in self.0.values() {
                if link.below.is_some_and(|below| above.contains(&below)) && link.vxlan.is_none() {
                    above.insert(link.index);
                }
                if let Some(controller) = link.controller
                    && above.contains(&link.index)
                {
                    above.insert(controller);
                }
            }
            if above.len() == known {
                return above;
            }
        }
    }
}

impl Link {
    fn of_message(message: &LinkMessage) -> Self {
        let mut link = Self {
            index: message.header.index,
            is_raw_ip: matches!(
                message.header.link_layer_type,
                LinkLayerType::None
                    | LinkLayerType::Rawip
                    | LinkLayerType::Ppp
                    | LinkLayerType::Tunnel
                    | LinkLayerType::Tunnel6
                    | LinkLayerType::Sit
                    | LinkLayerType::Ipgre
            ),
            ..Self::default()
        };
        let mut is_elsewhere = false;
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
                LinkAttribute::Link(below) if *below != 0 => link.below = Some(*below),
                LinkAttribute::Controller(controller) => link.controller = Some(*controller),
                // The link below is in another namespace, where its index means another one.
                LinkAttribute::LinkNetNsId(_) => is_elsewhere = true,
                LinkAttribute::LinkInfo(infos) => link.read_info(infos),
                _ => {}
            }
        }
        if is_elsewhere {
            link.below = None;
        }
        link
    }

    fn read_info(&mut self, infos: &[LinkInfo]) {
        for info in infos {
            match info {
                LinkInfo::Data(InfoData::Vxlan(attributes)) => {
                    let (vxlan, below) = Vxlan::of_attributes(attributes);
                    self.vxlan = Some(vxlan);
                    self.below = below;
                }
                // Its IFLA_LINK is a peer, not an interface below.
                LinkInfo::Kind(InfoKind::Veth) => self.below = None,
                LinkInfo::Kind(
                    InfoKind::Vlan | InfoKind::MacVlan | InfoKind::MacVtap | InfoKind::IpVlan,
                ) => self.kind = Kind::Stacked,
                LinkInfo::Kind(InfoKind::Bond | InfoKind::Team) => self.kind = Kind::Aggregate,
                _ => {}
            }
        }
    }
}

impl Vxlan {
    /// Also returns the underlay, if one is set.
    fn of_attributes(attributes: &[InfoVxlan]) -> (Self, Option<u32>) {
        let mut vxlan = Self::default();
        let mut below = None;
        for attribute in attributes {
            match attribute {
                InfoVxlan::Id(vni) => vxlan.vni = *vni,
                InfoVxlan::Port(port) => vxlan.port = *port,
                InfoVxlan::Link(index) if *index != 0 => below = Some(*index),
                InfoVxlan::Local(local) if !local.is_unspecified() => {
                    vxlan.local = Some((*local).into());
                }
                InfoVxlan::Local6(local) if !local.is_unspecified() => {
                    vxlan.local = Some((*local).into());
                }
                InfoVxlan::Group(group) if !group.is_multicast() && !group.is_unspecified() => {
                    vxlan.remote = Some((*group).into());
                }
                InfoVxlan::Group6(group) if !group.is_multicast() && !group.is_unspecified() => {
                    vxlan.remote = Some((*group).into());
                }
                InfoVxlan::PortRange(range) => vxlan.source_ports = *range,
                InfoVxlan::UDPCsum(sums) => vxlan.policy_ipv4 = policy(*sums),
                InfoVxlan::UDPZeroCsumTX(zero) => vxlan.policy_ipv6 = policy(!*zero),
                InfoVxlan::CollectMetadata(is_external) | InfoVxlan::Vnifilter(is_external) => {
                    vxlan.is_external |= *is_external;
                }
                _ => {}
            }
        }
        if vxlan.is_external {
            // Then the attributes say nothing: whoever fills in the metadata decides per packet.
            (vxlan.policy_ipv4, vxlan.policy_ipv6) = (Policy::Unknown, Policy::Unknown);
        }
        (vxlan, below)
    }
}

/// The remotes that forwarding entries (`bridge fdb`) name, by interface.
async fn forwarding_entries(
    handle: &Handle,
) -> Result<BTreeMap<u32, BTreeSet<IpAddr>>, LinksError> {
    let mut entries = BTreeMap::<u32, BTreeSet<IpAddr>>::new();
    let request = handle.neighbours().get().set_address_family(AddressFamily::Bridge);
    let mut answers = pin!(request.execute());
    while let Some(message) = answers
        .try_next()
        .await
        .map_err(|error| LinksError { what: "its forwarding entries", source: error.into() })?
    {
        let remote = message.attributes.iter().find_map(|attribute| match attribute {
            NeighbourAttribute::Destination(destination) => ip_address(destination),
            _ => None,
        });
        let remote = remote.filter(|ip| !ip.is_unspecified() && !ip.is_multicast());
        entries.entry(message.header.ifindex).or_default().extend(remote);
    }
    Ok(entries)
}

/// The family of a forwarding entry is not that of its address.
fn ip_address(address: &NeighbourAddress) -> Option<IpAddr> {
    match address {
        NeighbourAddress::Inet(address) => Some((*address).into()),
        NeighbourAddress::Inet6(address) => Some((*address).into()),
        NeighbourAddress::Other(bytes) => match bytes.len() {
            4 => <[u8; 4]>::try_from(bytes.as_slice()).ok().map(IpAddr::from),
            16 => <[u8; 16]>::try_from(bytes.as_slice()).ok().map(IpAddr::from),
            _ => None,
        },
        _ => None,
    }
}

/// The interfaces of all default routes.
async fn default_route_interfaces(handle: &Handle) -> Result<BTreeSet<u32>, LinksError> {
    let mut interfaces = BTreeSet::new();
    for request in [
        handle.route().get(RouteMessageBuilder::<Ipv4Addr>::new().build()),
        handle.route().get(RouteMessageBuilder::<Ipv6Addr>::new().build()),
    ] {
        let mut answers = pin!(request.execute());
        while let Some(route) = answers
            .try_next()
            .await
            .map_err(|error| LinksError { what: "its routes", source: error.into() })?
        {
            if route.header.destination_prefix_length == 0 {
                interfaces.extend(output_interface(&route));
            }
        }
    }
    Ok(interfaces)
}

/// The interface that packets to `remote` leave by; none where it cannot be reached.
async fn route_interface(handle: &Handle, remote: IpAddr) -> Option<u32> {
    let request = match remote {
        IpAddr::V4(remote) => {
            RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(remote, 32).build()
        }
        IpAddr::V6(remote) => {
            RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(remote, 128).build()
        }
    };
    let answer = pin!(handle.route().get(request).execute()).try_next().await;
    output_interface(&answer.ok()??)
}

fn output_interface(route: &RouteMessage) -> Option<u32> {
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    })
}

const fn policy(sums: bool) -> Policy {
    if sums { Policy::Sum } else { Policy::Zero }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, below: Option<u32>, controller: Option<u32>) -> Link {
        Link { index, name: format!("if{index}"), below, controller, ..Link::default() }
    }

    fn vxlan(index: u32, below: Option<u32>) -> Link {
        Link { vxlan: Some(Vxlan::default()), ..link(index, below, None) }
    }

    #[test]
    fn devices_are_found_through_vlans_and_bonds() {
        // 2 and 3 are ports of bond 4, 5 is a VLAN on it, 6 leaves by the VLAN; 7 leaves by 8.
        let links = Links(
            [
                link(2, None, Some(4)),
                link(3, None, Some(4)),
                Link { kind: Kind::Aggregate, ..link(4, None, None) },
                Link { kind: Kind::Stacked, ..link(5, Some(4), None) },
                vxlan(6, Some(5)),
                vxlan(7, Some(8)),
                link(8, None, None),
                vxlan(9, None),
            ]
            .into_iter()
            .map(|link| (link.index, link))
            .collect(),
        );
        let over = |index| links.vxlan_over(index).map(|(link, _)| link.index).collect::<Vec<_>>();
        assert_eq!(over(2), [6, 9]);
        assert_eq!(over(5), [6, 9]);
        assert_eq!(over(8), [7, 9]);
        // Watched where packets are final, and once: at the ports of the bond under the VLAN.
        assert_eq!(links.underlays().into_iter().collect::<Vec<_>>(), [2, 3, 8]);
    }

    #[test]
    fn an_external_device_has_no_policy() {
        let (vxlan, below) = Vxlan::of_attributes(&[
            InfoVxlan::UDPCsum(true),
            InfoVxlan::CollectMetadata(true),
            InfoVxlan::Link(3),
        ]);
        assert_eq!((vxlan.policy_ipv4, below), (Policy::Unknown, Some(3)));
    }
}
