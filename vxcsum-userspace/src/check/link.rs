//! From the link type of a capture to the IP header.

use vxcsum_common::Captured;

/// How the bytes of a packet begin (<https://www.tcpdump.org/linktypes.html>).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Link {
    Ethernet,
    /// No link header.
    RawIp,
    /// `tcpdump -i any`, once.
    Cooked,
    /// `tcpdump -i any`, today.
    Cooked2,
    /// Nothing that is known here.
    Other(i32),
}

/// Both headers are made of big-endian fields.
const COOKED_LEN: usize = 16;
const COOKED2_LEN: usize = 20;

impl Link {
    /// By its number in the file.
    pub(super) const fn new(number: i32) -> Self {
        match number {
            1 => Self::Ethernet,
            // LINKTYPE_RAW; DLT_RAW as some systems number it; LINKTYPE_IPV4 and LINKTYPE_IPV6.
            101 | 12 | 14 | 228 | 229 => Self::RawIp,
            113 => Self::Cooked,
            276 => Self::Cooked2,
            other => Self::Other(other),
        }
    }

    /// The packet, `len` bytes long, of which `bytes` were captured; `None` where it is neither
    /// Ethernet nor IP.
    pub(super) fn packet(self, bytes: &[u8], len: usize) -> Option<Captured<'_>> {
        let (start, is_raw_ip) = match self {
            Self::Ethernet => (0, false),
            Self::RawIp => (0, true),
            Self::Cooked => (ip_behind(bytes, 14, COOKED_LEN)?, true),
            Self::Cooked2 => (ip_behind(bytes, 0, COOKED2_LEN)?, true),
            Self::Other(_) => return None,
        };
        let bytes = bytes.get(start..)?;
        Some(Captured { len: len.saturating_sub(start), is_raw_ip, ..Captured::new(bytes) })
    }
}

/// Where the IP header is behind a cooked header, whose protocol is at `protocol`. VLAN tags stand
/// between the two.
fn ip_behind(bytes: &[u8], protocol: usize, mut offset: usize) -> Option<usize> {
    /// As many as the common crate looks through.
    const MAX_VLAN_TAGS: usize = 2;

    let be16 = |at: usize| Some(u16::from_be_bytes(*bytes.get(at..)?.first_chunk()?));
    let mut ethertype = be16(protocol)?;
    for _ in 0..MAX_VLAN_TAGS {
        if matches!(ethertype, 0x8100 | 0x88a8 | 0x9100) {
            ethertype = be16(offset + 2)?;
            offset += 4;
        }
    }
    matches!(ethertype, 0x0800 | 0x86dd).then_some(offset)
}
