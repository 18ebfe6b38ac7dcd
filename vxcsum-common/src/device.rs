//! What is known of the VXLAN device that sends a packet.

use bytemuck::{Pod, Zeroable};

/// What a device puts into the outer UDP checksum of the packets it sends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Policy {
    /// Not known: the device decides per packet (`external`), or is not ours.
    #[default]
    Unknown = 0,
    /// Zero, no checksum (`noudpcsum`; IPv6: `udp6zerocsumtx`).
    Zero = 1,
    /// A checksum (`udpcsum`, the kernel's default since 4.6; IPv6: `noudp6zerocsumtx`).
    Sum = 2,
}

impl Policy {
    /// From the byte that crosses the boundary; what is not known there is [`Policy::Unknown`].
    #[inline(always)]
    pub const fn from_u8(code: u8) -> Self {
        match code {
            1 => Self::Zero,
            2 => Self::Sum,
            _ => Self::Unknown,
        }
    }

    /// The word that the command line and messages use.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Zero => "zero",
            Self::Sum => "sum",
        }
    }
}

/// A VXLAN device as far as its outer header is concerned; crosses the boundary as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C, align(4))]
pub struct Device {
    /// The IPv4 address it sends from (`local`), as on the wire; zero where it has none.
    pub local_ipv4: [u8; 4],
    /// The IPv6 address it sends from (`local`), as on the wire; zero where it has none.
    pub local_ipv6: [u8; 16],
    /// Lowest source port that it uses, host byte order.
    pub source_port_min: u16,
    /// Upper bound of its source ports, which only newer kernels use, host byte order.
    pub source_port_max: u16,
    /// A [`Policy`] for IPv4.
    pub policy_ipv4: u8,
    /// A [`Policy`] for IPv6.
    pub policy_ipv6: u8,
    /// Zero.
    pub reserved: [u8; 2],
}

impl Device {
    /// A device of which nothing is known but the kernel's default for `ip_local_port_range`.
    pub const UNKNOWN: Self = Self {
        local_ipv4: [0; 4],
        local_ipv6: [0; 16],
        source_port_min: 32768,
        source_port_max: 60999,
        policy_ipv4: Policy::Unknown as u8,
        policy_ipv6: Policy::Unknown as u8,
        reserved: [0; 2],
    };

    /// The policy for the family of the outer header.
    #[inline(always)]
    pub const fn policy(&self, is_ipv6: bool) -> Policy {
        Policy::from_u8(if is_ipv6 { self.policy_ipv6 } else { self.policy_ipv4 })
    }

    /// The source ports one of which the driver picked for a flow, host byte order
    /// (`udp_flow_src_port` in include/net/udp.h): the first where the upper bound of the range is
    /// not used, as up to Linux 6.18 at least, the second where it is, as in 7.2. `None` where they
    /// cannot be known.
    #[inline(always)]
    pub const fn source_ports(&self, flow_hash: u32) -> Option<[u16; 2]> {
        let min = self.source_port_min;
        let width = self.source_port_max.saturating_sub(min);
        if flow_hash == 0 {
            return if width > 1 { None } else { Some([min, min + width]) };
        }
        let hash = (flow_hash ^ (flow_hash << 16)) as u64;
        let exclusive = ((hash * width as u64) >> 32) as u16;
        let inclusive = ((hash * (width as u64 + 1)) >> 32) as u16;
        Some([min.wrapping_add(exclusive), min.wrapping_add(inclusive)])
    }

    /// Whether the driver could have picked this source port (host byte order).
    #[inline(always)]
    pub const fn may_send_from(&self, source_port: u16) -> bool {
        source_port >= self.source_port_min
            && (source_port <= self.source_port_max || source_port == self.source_port_min)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_of_one_needs_no_hash() {
        let device = Device { source_port_min: 40000, source_port_max: 40001, ..Device::UNKNOWN };
        assert_eq!(device.source_ports(0), Some([40000, 40001]));
        assert_eq!(device.source_ports(0x0001_0001), Some([40000, 40000]));
        assert_eq!(device.source_ports(0xdead_0000), Some([40000, 40001]));
        assert!(device.may_send_from(40000) && device.may_send_from(40001));
        assert!(!device.may_send_from(39999) && !device.may_send_from(40002));
    }

    #[test]
    fn a_hash_spreads_over_the_range() {
        let device = Device::UNKNOWN;
        assert_eq!(device.source_ports(0), None);
        assert_eq!(device.source_ports(1), Some([32768, 32768]));
        assert_eq!(device.source_ports(0xffff_0000), Some([60998, 60999]));
    }
}
