//! The inner headers, as far as the outer checksum depends on them.

use crate::outer::{self, Ip, Outer, TCP, UDP};
use crate::{Cut, Packet, Sum};

/// Inner headers up to the transport header, and what they sum up to.
#[derive(Clone, Copy, Debug)]
pub struct Inner {
    /// The inner IP header, where there is one.
    pub ip: Option<Ip>,
    /// The inner TCP or UDP header, where this packet has one.
    pub transport: Option<Transport>,
    /// A sum still to be filled in by the NIC may hide behind a protocol that is not looked into
    /// (a tunnel in the tunnel).
    pub is_opaque: bool,
}

/// An inner TCP or UDP header.
#[derive(Clone, Copy, Debug)]
pub struct Transport {
    /// Its checksum field, host byte order.
    pub check: u16,
    /// The sum of the inner pseudo-header.
    pub pseudo_header: Sum,
    /// The sum of everything from the start of the inner frame up to the transport header.
    pub before: Sum,
}

impl Transport {
    /// Whether the field holds the pseudo-header sum only: the NIC is to finish it
    /// (`CHECKSUM_PARTIAL`). One complete sum in 65 536 looks the same.
    #[inline(always)]
    pub fn is_open(&self) -> bool {
        self.check == self.pseudo_header.folded()
    }
}

/// Parses the inner frame of `outer`.
#[inline(always)]
pub fn parse<P: Packet>(packet: &P, outer: &Outer) -> Result<Inner, Cut> {
    const ICMP: u8 = 1;
    const ICMPV6: u8 = 58;

    let nothing = Inner { ip: None, transport: None, is_opaque: false };
    let frame = outer.inner();
    let (ethertype, offset) = outer::ethertype(packet, frame)?;
    let Some(ip) = outer::ip(packet, ethertype, offset)? else {
        return Ok(nothing);
    };
    let check_offset = match ip.protocol {
        TCP => 16,
        UDP => 6,
        protocol => {
            let is_opaque = !matches!(protocol, ICMP | ICMPV6);
            return Ok(Inner { ip: Some(ip), is_opaque, ..nothing });
        }
    };
    let end = outer.at.udp + outer.udp_len;
    let is_within = check_offset + 2 <= ip.payload_len && ip.payload + ip.payload_len <= end;
    if !ip.is_whole() || !is_within {
        return Ok(Inner { ip: Some(ip), ..nothing });
    }
    let transport = Transport {
        check: packet.header::<2>(ip.payload + check_offset)?.be16::<0>(),
        pseudo_header: ip.pseudo_header(packet, ip.payload_len)?,
        before: outer::ethernet(packet, frame, offset)? + ip.header(packet)?,
    };
    Ok(Inner { ip: Some(ip), transport: Some(transport), is_opaque: false })
}
