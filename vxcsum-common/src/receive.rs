//! The receiver's side: what crosses the boundary between the BPF program that watches drops and
//! user space, byte for byte. See [`crate::layout`] for the rules.

use bytemuck::{Pod, Zeroable};

use crate::layout::Report;

/// Outer source addresses that drops are counted by; further ones are counted together.
pub const MAX_PEERS: u32 = 1024;

/// Bytes of a dropped packet that are handed up at the most: a jumbo frame of 9000 bytes.
pub const MAX_DROPPED_LEN: usize = 9216;

/// What is known of the running kernel before the program is loaded; offsets in bytes, from BTF.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Kernel {
    /// `SKB_DROP_REASON_UDP_CSUM`: its number differs from version to version.
    pub reason: u32,
    /// The network namespace to count in, by its inode number (`/proc/self/ns/net`).
    pub netns: u32,
    /// `sk_buff.len`, four bytes.
    pub skb_len: u16,
    /// `sk_buff.data_len`, four bytes.
    pub skb_data_len: u16,
    /// `sk_buff.head`, a pointer.
    pub skb_head: u16,
    /// `sk_buff.data`, a pointer.
    pub skb_data: u16,
    /// `sk_buff.mac_header`, two bytes.
    pub skb_mac_header: u16,
    /// `sk_buff.network_header`, two bytes.
    pub skb_network_header: u16,
    /// `sk_buff.mark`, four bytes.
    pub skb_mark: u16,
    /// `sk_buff.dev`, a pointer.
    pub skb_dev: u16,
    /// `net_device.name`, sixteen bytes.
    pub dev_name: u16,
    /// `net_device.nd_net`, a pointer.
    pub dev_net: u16,
    /// `net.ns.inum`, four bytes.
    pub net_inum: u16,
    /// `task_struct.nsproxy`, a pointer.
    pub task_nsproxy: u16,
    /// `nsproxy.net_ns`, a pointer.
    pub nsproxy_net: u16,
    /// Zero.
    pub reserved: u16,
}

/// An outer source address as on the wire, IPv4 mapped into IPv6 (RFC 4291 §2.5.5.2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C, align(4))]
pub struct Peer(pub [u8; 16]);

/// VXLAN packets of one peer that were dropped, by the code of the report. There is no other total:
/// so drops and reports agree at any instant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Drops(pub [u64; Report::ALL.len()]);

impl Drops {
    /// All of them.
    pub fn packets(&self) -> u64 {
        self.0.iter().sum()
    }

    /// Those with one report.
    pub const fn reported(&self, report: Report) -> u64 {
        self.0[report as usize]
    }

    /// Both together.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        let mut sum = *self;
        for (drops, other) in sum.0.iter_mut().zip(other.0) {
            *drops += other;
        }
        sum
    }
}

/// What is counted without regard to the peer, on one CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Counters {
    /// Packets that are not VXLAN to a watched port.
    pub not_vxlan: u64,
    /// VXLAN packets of peers beyond [`MAX_PEERS`].
    pub others: Drops,
}

impl Counters {
    /// Both together.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        Self {
            not_vxlan: self.not_vxlan + other.not_vxlan,
            others: self.others.plus(&other.others),
        }
    }
}

/// A dropped VXLAN packet; its bytes follow, from the outer IP header on.
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
#[repr(C)]
pub struct Dropped {
    /// `CLOCK_BOOTTIME` in nanoseconds.
    pub boot_ns: u64,
    /// Length of the packet in bytes, from the outer IP header on.
    pub len: u32,
    /// Bytes of it that follow.
    pub snapshot_len: u32,
    /// `skb->mark`.
    pub mark: u32,
    /// Length of the link header in bytes.
    pub link_len: u32,
    /// Name of the interface, ended by a zero.
    pub interface: [u8; 16],
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_have_all_reports() {
        let drops = Drops([0, 1, 20, 300]);
        assert_eq!(drops.plus(&drops).packets(), 642);
        assert_eq!(drops.reported(Report::Suppressed), 20);
    }
}
