//! What the program of an interface is to watch: ports, policies, devices.

use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::net::IpAddr;

use vxcsum_common::layout::{ANY_VNI, Config, DeviceKey, FixMode, MAX_PORTS, Port};
use vxcsum_common::{Device, Policy};

use crate::links::{Link, Links};

/// What the user asked for.
#[derive(Clone, Debug)]
pub struct Wish {
    /// UDP destination ports, at most [`MAX_PORTS`].
    pub ports: Vec<u16>,
    /// The policy of every device, instead of what rtnetlink says.
    pub policy: Option<Policy>,
    /// What may be written.
    pub fix: FixMode,
    /// Also into packets whose error nothing explains.
    pub fix_unproven: bool,
}

/// What follows for one interface.
#[derive(Clone, Debug)]
pub struct Plan {
    ports: BTreeMap<u16, PortPlan>,
    devices: BTreeMap<(u16, u32), Device>,
    config: Config,
}

#[derive(Clone, Debug, Default)]
struct PortPlan {
    senders: Vec<Sender>,
}

#[derive(Clone, Debug)]
struct Sender {
    name: String,
    vni: u32,
    policy_ipv4: Policy,
    policy_ipv6: Policy,
    is_ipv6: bool,
}

impl Plan {
    /// Makes the plan for `link`. `default_ports` is what 0-0 stands for (`ip_local_port_range`).
    pub fn new(wish: &Wish, link: &Link, links: &Links, default_ports: (u16, u16)) -> Self {
        let mut plan = Self {
            ports: wish.ports.iter().map(|&port| (port, PortPlan::default())).collect(),
            devices: BTreeMap::new(),
            config: bytemuck::Zeroable::zeroed(),
        };
        for (&port, port_plan) in &mut plan.ports {
            // Whatever sends there without being known to rtnetlink, from another namespace say.
            let anybody = Device {
                source_port_min: default_ports.0,
                source_port_max: default_ports.1,
                policy_ipv4: wish.policy.unwrap_or_default() as u8,
                policy_ipv6: wish.policy.unwrap_or_default() as u8,
                ..Device::UNKNOWN
            };
            plan.devices.insert((port, ANY_VNI), anybody);
            for (vxlan_link, vxlan) in links.vxlan_over(link.index) {
                if vxlan.port != port {
                    continue;
                }
                let sender = Sender {
                    name: vxlan_link.name.clone(),
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
                plan.devices.insert((port, sender.vni), device);
                port_plan.senders.push(sender);
            }
        }
        for (slot, (&port, port_plan)) in plan.config.ports.iter_mut().zip(&plan.ports) {
            *slot = port_plan.port(port, wish.policy);
        }
        plan.config.fix = wish.fix as u8;
        plan.config.fix_unproven = wish.fix_unproven.into();
        plan.config.is_raw_ip = link.is_raw_ip.into();
        plan
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
        let senders = &self.ports.get(&port)?.senders;
        let own = senders.iter().find(|sender| sender.vni == vni);
        let external = || senders.iter().find(|sender| sender.vni == ANY_VNI);
        own.or_else(external).map(|sender| sender.name.as_str())
    }
}

/// `port 8472 sum (flannel.1), port 4789 unknown, learned from traffic; fix off`
impl Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, slot) in self.config.ports.iter().take(self.ports.len()).enumerate() {
            let separator = if index == 0 { "" } else { ", " };
            write!(f, "{separator}port {} ", slot.port)?;
            let senders = &self.ports[&slot.port].senders;
            if senders.is_empty() {
                match Policy::from_u8(slot.policy_ipv4) {
                    Policy::Unknown => write!(f, "policy unknown (no VXLAN device), learned from traffic")?,
                    policy => write!(f, "policy {} (as told)", policy.as_str())?,
                }
            }
            for (index, sender) in senders.iter().enumerate() {
                let separator = if index == 0 { "" } else { ", " };
                let policy = if sender.is_ipv6 { sender.policy_ipv6 } else { sender.policy_ipv4 };
                write!(f, "{separator}policy {} ({}", policy.as_str(), sender.name)?;
                match policy {
                    Policy::Unknown => write!(f, ", external), learned from traffic")?,
                    _ => write!(f, ")")?,
                }
            }
        }
        write!(f, "; fix {}", FixMode::from_u8(self.config.fix).as_str())
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

/// The address that a device sends from: its own, or else the first of its underlay, which is what
/// the kernel takes when routes do not say otherwise. All zero where there is none.
fn local<const LEN: usize>(own: Option<IpAddr>, underlay: &Link) -> [u8; LEN] {
    let bytes = |address: IpAddr| match address {
        IpAddr::V4(address) => address.octets().as_slice().try_into().ok(),
        IpAddr::V6(address) => address.octets().as_slice().try_into().ok(),
    };
    own.into_iter().chain(underlay.addresses.iter().copied()).find_map(bytes).unwrap_or([0; LEN])
}

/// Checks a list of ports. Returns it sorted, each port once.
pub fn unique_ports(ports: &[u16]) -> Result<Vec<u16>, String> {
    let mut ports = ports.to_vec();
    ports.sort_unstable();
    ports.dedup();
    if ports.len() > MAX_PORTS {
        return Err(format!("{} ports given, at most {MAX_PORTS} can be watched", ports.len()));
    }
    Ok(ports)
}
