//! Packets of inner TCP connections, one by one.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::Result;
use etherparse::TcpHeader;

use crate::packets::{Check, Frame, Ip, SegmentSum, Tcp, Transport, Vxlan};
use crate::storm::PORT_BEFORE_NAT;

/// The inner destination port.
pub const SERVICE: u16 = 9153;

/// A VXLAN packet from the lab's sending node, with TCP inside, from a device that sends from
/// [`PORT_BEFORE_NAT`] only.
#[derive(Debug, Clone, Copy)]
pub struct Segment {
    /// The outer checksum is from before NAT, else right.
    pub is_stale: bool,
    /// Inner source port.
    pub sport: u16,
    /// Sequence number.
    pub sequence: u32,
    /// Flags in tcpdump's letters, of `S`, `R`, `F` and `.`
    pub flags: &'static str,
    /// Bytes of data.
    pub len: usize,
}

impl Segment {
    /// A SYN that has lost its way.
    pub fn broken_syn(sport: u16) -> Self {
        Self { is_stale: true, sport, sequence: 0x1000, flags: "S", len: 0 }
    }

    /// A SYN that is right.
    pub fn clean_syn(sport: u16) -> Self {
        Self { is_stale: false, ..Self::broken_syn(sport) }
    }

    /// What a client says next.
    pub fn ack(sport: u16) -> Self {
        Self { sequence: 0x1001, flags: ".", ..Self::clean_syn(sport) }
    }

    /// Its bytes.
    pub fn frame(self) -> Result<Vec<u8>> {
        let check = if self.is_stale {
            Check::Stale { old_port: PORT_BEFORE_NAT, old_address: None }
        } else {
            Check::Right
        };
        self.frame_with(check)
    }

    /// Its bytes, with this outer checksum.
    pub fn frame_with(self, check: Check) -> Result<Vec<u8>> {
        Ok(self.laid_out(check)?.bytes)
    }

    /// All of it, with this outer checksum.
    pub fn laid_out(self, check: Check) -> Result<Frame> {
        let ends = [Ipv4Addr::new(172, 29, 0, 0), Ipv4Addr::new(172, 29, 2, 0)].map(IpAddr::from);
        let mut header = TcpHeader::new(self.sport, SERVICE, self.sequence, 43690);
        header.syn = self.flags.contains('S');
        header.rst = self.flags.contains('R');
        header.fin = self.flags.contains('F');
        header.ack = self.flags.contains('.');
        let payload = vec![0x5a; self.len];
        let tcp = Transport::Tcp(Tcp { header, payload, sum: SegmentSum::Open });
        let vxlan = Vxlan::new(50000, check, Ip::new(ends[0], ends[1], tcp).into());
        let nodes = [Ipv4Addr::new(10, 0, 0, 11), Ipv4Addr::new(10, 0, 0, 13)].map(IpAddr::from);
        let outer = Ip::new(nodes[0], nodes[1], Transport::Vxlan(vxlan));
        Frame::new(&outer.into())
    }
}
