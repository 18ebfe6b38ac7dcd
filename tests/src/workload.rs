//! Traffic of all kinds through a lab: what a healthy node sends, and must not be accused of.

use std::time::Duration;

use anyhow::Result;

use crate::lab::Lab;
use crate::traffic::{TcpServer, UdpServer, dns_query, ping, send_bulk, send_small, udp_request};

const TIMEOUT: Duration = Duration::from_secs(5);
const BULK_BYTES: usize = 300_000;

/// TCP in bulk and in small pieces, UDP, inner fragments, echo requests, over inner IPv4 and IPv6,
/// from the sending node and from its pod if it has one. Every one of them has to arrive.
pub fn everything(lab: &Lab) -> Result<()> {
    for to in [lab.inner_b(), lab.inner_b_v6()] {
        let tcp = TcpServer::start(&lab.b, (to, 0).into())?;
        let udp = UdpServer::start(&lab.b, (to, 0).into())?;
        let mut senders = vec![&lab.a];
        if to.is_ipv4() {
            senders.extend(lab.pod());
        }
        for from in senders {
            send_bulk(from, tcp.address(), BULK_BYTES, TIMEOUT)?;
            send_small(from, tcp.address(), 10, 100, TIMEOUT)?;
            for payload in [dns_query(), vec![7; 1], vec![7; 1200], vec![7; 4000]] {
                udp_request(from, udp.address(), &payload, TIMEOUT)?;
            }
            for len_bytes in [0, 1, 56, 1400, 3000] {
                ping(from, to, len_bytes, TIMEOUT)?;
            }
        }
    }
    Ok(())
}
