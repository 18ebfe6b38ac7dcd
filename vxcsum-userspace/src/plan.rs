//! What the program of an interface is to watch: ports, policies, devices.

use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::net::IpAddr;

use thiserror::Error;
use vxcsum_common::layout::{ANY_VNI, Config, DeviceKey, FixMode, MAX_PORTS, Port, Ports};
use vxcsum_common::{Device, Policy, Watch};

use crate::links::{Link, Links, Vxlan};

/// What the user asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct Wish {
    /// UDP destination ports, at most [`MAX_PORTS`] different ones.
    pub ports: Vec<u16>,
    /// The policy of every device, instead of what rtnetlink says.
    pub policy: Option<Policy>,
    /// What may be written.
    pub fix: FixMode,
    /// Also into packets whose error nothing explains.
    pub fix_unproven: bool,
    /// The most events a second and interface; 0 for no limit.
    pub events_per_second: u32,
}

impl Wish {
    const fn event_cost_ns(&self) -> u32 {
        match self.events_per_second {
            0 => 0,
            // Never 0, which would be no limit at all.
            limit => 1_000_000_000_u32.div_ceil(limit),
        }
    }
}

/// What follows for one interface.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    ports: BTreeMap<u16, PortPlan>,
    devices: BTreeMap<(u16, u32), Device>,
    config: Config,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct PortPlan {
    senders: Vec<Sender>,
}

#[derive(Clone, Debug, PartialEq)]
struct Sender {
    name: String,
    /// Where routes lead its packets, before the interfaces below that one.
    out_interface: Option<String>,
    vni: u32,
    policy_ipv4: Policy,
    policy_ipv6: Policy,
    is_ipv6: bool,
}

impl Plan {
    /// Makes the plan for `link`. `default_ports` is what 0-0 stands for (`ip_local_port_range`).
    pub fn new(
        wish: &Wish,
        link: &Link,
        links: &Links,
        default_ports: (u16, u16),
    ) -> Result<Self, UnusablePorts> {
        let senders: Vec<_> = links.vxlan_over(link.index).collect();
        Self::of_senders(wish, &senders, link, links, default_ports)
    }

    /// Makes the plan for what the node receives: over whatever interface, from senders that are
    /// taken to be like the node's own device of the same port and VNI.
    pub fn of_node(
        wish: &Wish,
        links: &Links,
        default_ports: (u16, u16),
    ) -> Result<Self, UnusablePorts> {
        let senders: Vec<_> =
            links.vxlan().filter_map(|link| Some((link, link.vxlan.as_ref()?))).collect();
        Self::of_senders(wish, &senders, &Link::default(), links, default_ports)
    }

    fn of_senders(
        wish: &Wish,
        senders: &[(&Link, &Vxlan)],
        link: &Link,
        links: &Links,
        default_ports: (u16, u16),
    ) -> Result<Self, UnusablePorts> {
        let mut ports = BTreeMap::new();
        let mut devices = BTreeMap::new();
        for &port in &wish.ports {
            let mut port_plan = PortPlan::default();
            // Whatever sends there without being known to rtnetlink, from another namespace say.
            let anybody = Device {
                source_port_min: default_ports.0,
                source_port_max: default_ports.1,
                policy_ipv4: wish.policy.unwrap_or_default() as u8,
                policy_ipv6: wish.policy.unwrap_or_default() as u8,
                ..Device::UNKNOWN
            };
            devices.insert((port, ANY_VNI), anybody);
            for &(vxlan_link, vxlan) in senders {
                if vxlan.port != port {
                    continue;
                }
                let mut outs = vxlan_link.below.iter().chain(&vxlan.routed_by);
                let out = outs.next().filter(|_| outs.next().is_none());
                let out = out.and_then(|out| links.by_index(*out));
                let sender = Sender {
                    name: vxlan_link.name.clone(),
                    out_interface: out.map(|out| out.name.clone()),
                    vni: if vxlan.is_external { ANY_VNI } else { vxlan.vni },
                    policy_ipv4: wish.policy.unwrap_or(vxlan.policy_ipv4),
                    policy_ipv6: wish.policy.unwrap_or(vxlan.policy_ipv6),
                    is_ipv6: vxlan.local.is_some_and(|local| local.is_ipv6()),
                };
                let underlay = vxlan_link.below.and_then(|below| links.by_index(below));
                let device = Device {
                    local_ipv4: local(vxlan.local, underlay.unwrap_or(link)),
                    local_ipv6: local(vxlan.local, underlay.unwrap_or(link)),
                    policy_ipv4: sender.policy_ipv4 as u8,
                    policy_ipv6: sender.policy_ipv6 as u8,
                    ..anybody
                };
                let device = match vxlan.source_ports {
                    // The driver takes the default wherever this is no range (udp_flow_src_port).
                    (min, max) if min >= max => device,
                    (min, max) => Device { source_port_min: min, source_port_max: max, ..device },
                };
                devices.insert((port, sender.vni), device);
                port_plan.senders.push(sender);
            }
            ports.insert(port, port_plan);
        }
        let entries: Vec<_> =
            ports.iter().map(|(&port, plan)| plan.port(port, wish.policy)).collect();
        let config = Config {
            ports: Ports::new(&entries).ok_or(UnusablePorts)?,
            fix: wish.fix as u8,
            fix_unproven: wish.fix_unproven.into(),
            is_raw_ip: link.is_raw_ip.into(),
            following: 0,
            max_frame_len: max_frame_len(link),
            zero: [0; 2],
            event_cost_ns: wish.event_cost_ns(),
        };
        Ok(Self { ports, devices, config })
    }

    /// The same with another fix mode.
    #[must_use]
    pub fn with_fix(&self, fix: FixMode) -> Self {
        let mut plan = self.clone();
        plan.config.fix = fix as u8;
        plan
    }

    /// Adds what a program has learned of senders whose policy is not known.
    pub fn learn(&mut self, ports: &Ports) {
        self.config.ports.learn(ports);
    }

    /// For the program.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// For the program.
    pub fn devices(&self) -> impl Iterator<Item = (DeviceKey, Device)> {
        self.devices
            .iter()
            .map(|(&(port, vni), device)| (DeviceKey { vni, port: port.into() }, *device))
    }

    /// Name of the device that sends a VNI to a port.
    pub fn device_name(&self, port: u16, vni: u32) -> Option<&str> {
        self.sender(port, vni).map(|sender| sender.name.as_str())
    }

    /// The interface that packets of that device leave by, as rules see it: of a stack the highest.
    pub fn out_interface(&self, port: u16, vni: u32) -> Option<&str> {
        self.sender(port, vni)?.out_interface.as_deref()
    }

    /// The address that the device sends from, as the verdict assumes it.
    pub fn local_address(&self, port: u16, vni: u32, is_ipv6: bool) -> Option<IpAddr> {
        let device = self.devices.get(&(port, vni)).or(self.devices.get(&(port, ANY_VNI)))?;
        let local =
            if is_ipv6 { IpAddr::from(device.local_ipv6) } else { IpAddr::from(device.local_ipv4) };
        (!local.is_unspecified()).then_some(local)
    }

    fn sender(&self, port: u16, vni: u32) -> Option<&Sender> {
        let senders = &self.ports.get(&port)?.senders;
        let own = senders.iter().find(|sender| sender.vni == vni);
        own.or_else(|| senders.iter().find(|sender| sender.vni == ANY_VNI))
    }
}

/// What the program would find out by its maps, except what it learns from traffic.
impl Watch for Plan {
    type Port = Port;

    fn port(&self, port: u16) -> Option<Port> {
        self.config.ports.get(port).copied()
    }

    fn policy(&self, port: Port, vni: u32, is_ipv6: bool) -> Policy {
        if port.by_vni == 0 {
            port.policy(is_ipv6)
        } else {
            self.device(port.port, vni).policy(is_ipv6)
        }
    }

    fn device(&self, port: u16, vni: u32) -> Device {
        let own = self.devices.get(&(port, vni));
        own.or_else(|| self.devices.get(&(port, ANY_VNI))).copied().unwrap_or(Device::UNKNOWN)
    }
}

/// `port 4789 policy unknown (no VXLAN device), learned from traffic, port 8472 policy sum
/// (flannel.1); fix off`
impl Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (number, plan)) in self.ports.iter().enumerate() {
            let separator = if index == 0 { "" } else { ", " };
            write!(f, "{separator}port {number} ")?;
            let Some(sender) = plan.senders.first() else {
                let port = self.config.ports.get(*number);
                match port.map_or(Policy::Unknown, |port| port.policy(false)) {
                    Policy::Unknown => {
                        write!(f, "policy unknown (no VXLAN device), learned from traffic")?;
                    }
                    policy => write!(f, "policy {} (as told)", policy.as_str())?,
                }
                continue;
            };
            sender.fmt(f)?;
            for sender in &plan.senders[1..] {
                write!(f, ", {sender}")?;
            }
        }
        write!(f, "; fix {}", FixMode::from_u8(self.config.fix).as_str())
    }
}

/// `policy sum (flannel.1)`
impl Display for Sender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let policy = if self.is_ipv6 { self.policy_ipv6 } else { self.policy_ipv4 };
        write!(f, "policy {} ({}", policy.as_str(), self.name)?;
        match policy {
            Policy::Unknown => write!(f, ", external), learned from traffic"),
            Policy::Zero | Policy::Sum => write!(f, ")"),
        }
    }
}

impl PortPlan {
    /// Where all senders agree, the program need not look a device up for every packet.
    fn port(&self, port: u16, wish: Option<Policy>) -> Port {
        let mut policies = self.senders.iter().map(|it| (it.policy_ipv4, it.policy_ipv6));
        let (policy_ipv4, policy_ipv6) =
            policies.next().unwrap_or((wish.unwrap_or_default(), wish.unwrap_or_default()));
        Port {
            port,
            policy_ipv4: policy_ipv4 as u8,
            policy_ipv6: policy_ipv6 as u8,
            by_vni: policies.any(|other| other != (policy_ipv4, policy_ipv6)).into(),
            ..Port::default()
        }
    }
}

/// With a link header and two VLAN tags, which the MTU does not count.
const fn max_frame_len(link: &Link) -> u32 {
    const LINK_HEADER_LEN: u32 = 14 + 2 * 4;
    match link.mtu {
        0 => u32::MAX,
        mtu if link.is_raw_ip => mtu,
        mtu => mtu.saturating_add(LINK_HEADER_LEN),
    }
}

/// The address that a device sends from: its own, or else the first of its underlay, which is what
/// the kernel takes when routes do not say otherwise. All zero where there is none.
fn local<const LEN: usize>(own: Option<IpAddr>, underlay: &Link) -> [u8; LEN] {
    let bytes = |address: IpAddr| match address {
        IpAddr::V4(address) => address.octets().as_slice().try_into().ok(),
        IpAddr::V6(address) => address.octets().as_slice().try_into().ok(),
    };
    own.into_iter().chain(underlay.addresses.iter().copied()).find_map(bytes).unwrap_or([0; LEN])
}

/// The list of ports cannot be watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("at most {MAX_PORTS} different UDP ports from 1 to 65535 can be watched")]
pub struct UnusablePorts;
