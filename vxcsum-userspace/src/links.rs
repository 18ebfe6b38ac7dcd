//! The network interfaces of this network namespace, by rtnetlink.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use futures_util::TryStreamExt as _;
use netlink_packet_route::address::AddressAttribute;
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkInfo, LinkLayerType, LinkMessage,
};
use rtnetlink::Handle;
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
    /// The interface below: of a VLAN its parent, of a VXLAN device the underlay if one is set.
    pub below: Option<u32>,
    /// The bond or bridge that it is a port of.
    pub controller: Option<u32>,
    /// What is set on a VXLAN device.
    pub vxlan: Option<Vxlan>,
    /// Addresses.
    pub addresses: Vec<IpAddr>,
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
        Ok(Self(links))
    }

    /// The interface of that name.
    pub fn by_name(&self, name: &str) -> Option<&Link> {
        self.0.values().find(|link| link.name == name)
    }

    /// The interface of that index.
    pub fn by_index(&self, index: u32) -> Option<&Link> {
        self.0.get(&index)
    }

    /// Every name, for messages.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.values().map(|link| link.name.as_str())
    }

    /// The VXLAN devices whose packets leave through the interface `index`: those set to it, or to
    /// a VLAN, bond or bridge above it, and those without an underlay of their own, which routes
    /// may lead there.
    pub fn vxlan_over(&self, index: u32) -> impl Iterator<Item = (&Link, &Vxlan)> {
        let above = self.above(index);
        self.0.values().filter_map(move |link| {
            let vxlan = link.vxlan.as_ref()?;
            let is_over = link.below.is_none_or(|below| above.contains(&below));
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
                // Their IFLA_LINK is a peer, not an interface below.
                LinkInfo::Kind(InfoKind::Veth) => self.below = None,
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
                link(4, None, None),
                link(5, Some(4), None),
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
