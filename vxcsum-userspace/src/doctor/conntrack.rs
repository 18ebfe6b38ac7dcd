//! Tunnel packets that connection tracking knows as rewritten.
//!
//! Looking must not change anything: asking for a netlink subsystem loads its module, so that is
//! done only where it is there already.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_netfilter::conntrack::{
    ConntrackAttribute, ConntrackMessage, IPTuple, ProtoTuple, Protocol, Status, Tuple,
};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr as NetlinkAddress};

use crate::modules;

/// How many entries are kept as evidence; all are counted.
const MAX_EXAMPLES: usize = 3;

const NO_NETLINK: &str = "this kernel has no /proc/net/nf_conntrack, and its module \
                          nf_conntrack_netlink is not loaded: `modprobe nf_conntrack_netlink` and \
                          try again";

/// What could be seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tracking {
    /// This kernel has no NAT now, or tracks no connections for it.
    Unused,
    /// What entries say.
    Seen(Entries),
    /// Nothing, for this reason.
    Unseen(String),
}

/// Entries of UDP datagrams to tunnel ports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entries {
    /// All of them.
    pub total: usize,
    /// Those that NAT rewrites.
    pub rewritten: Vec<Rewritten>,
}

/// Entries to one port that are rewritten.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rewritten {
    /// UDP port of the tunnel.
    pub port: u16,
    /// How many.
    pub count: usize,
    /// How many of them no answer ever came to. A VXLAN answers to its own port, so that is usual.
    pub unreplied: usize,
    /// A few, for people.
    pub examples: Vec<Entry>,
}

/// A tracked flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Source before NAT.
    pub source: SocketAddr,
    /// Destination before NAT.
    pub destination: SocketAddr,
    /// Source after NAT.
    pub new_source: SocketAddr,
    /// Destination after NAT.
    pub new_destination: SocketAddr,
    /// No answer ever came.
    pub is_unreplied: bool,
}

impl Entry {
    /// Whether NAT changes anything.
    pub fn is_rewritten(&self) -> bool {
        (self.source, self.destination) != (self.new_source, self.new_destination)
    }
}

impl Entries {
    /// Counts those that this node sends to one of these ports.
    fn add(&mut self, entry: Entry, ports: &[u16], own: &[IpAddr]) {
        let port = entry.destination.port();
        if !ports.contains(&port) || !own.contains(&entry.source.ip()) {
            return;
        }
        self.total += 1;
        if !entry.is_rewritten() {
            return;
        }
        let index = self.rewritten.iter().position(|it| it.port == port).unwrap_or_else(|| {
            self.rewritten.push(Rewritten { port, count: 0, unreplied: 0, examples: Vec::new() });
            self.rewritten.len() - 1
        });
        let rewritten = &mut self.rewritten[index];
        rewritten.count += 1;
        rewritten.unreplied += usize::from(entry.is_unreplied);
        if rewritten.examples.len() < MAX_EXAMPLES {
            rewritten.examples.push(entry);
        }
    }
}

impl Tracking {
    /// Looks at the entries of what the addresses `own` send to `ports`.
    pub fn read(ports: &[u16], own: &[IpAddr]) -> Self {
        if !modules::may_be_there("nf_nat") {
            return Self::Unused;
        }
        let mut entries = Entries::default();
        let file = File::open("/proc/self/net/nf_conntrack").and_then(|file| {
            for line in BufReader::new(file).lines() {
                if let Some(entry) = of_line(&line?) {
                    entries.add(entry, ports, own);
                }
            }
            Ok(())
        });
        let unseen = match file {
            Ok(()) => return Self::Seen(entries),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if !Path::new("/proc/sys/net/netfilter/nf_conntrack_count").exists() {
                    return Self::Unused;
                }
                if !modules::may_be_there("nf_conntrack_netlink") {
                    return Self::Unseen(NO_NETLINK.to_owned());
                }
                match Entries::by_netlink(ports, own) {
                    Ok(entries) => return Self::Seen(entries),
                    Err(error) => error,
                }
            }
            Err(error) => error,
        };
        Self::Unseen(match unseen.kind() {
            io::ErrorKind::PermissionDenied => {
                "not permitted: run as root, or grant CAP_NET_ADMIN".to_owned()
            }
            _ => format!("{unseen}"),
        })
    }
}

/// `ipv4 2 udp 17 29 src=… dst=… sport=… dport=… [UNREPLIED] src=… dst=… sport=… dport=… zone=1 …`
fn of_line(line: &str) -> Option<Entry> {
    let mut words = line.split_whitespace();
    if words.nth(2)? != "udp" {
        return None;
    }
    let (mut ips, mut ports) = (Vec::new(), Vec::new());
    let mut is_unreplied = false;
    for word in words {
        match word.split_once('=') {
            Some(("src" | "dst", ip)) => ips.push(ip.parse().ok()?),
            Some(("sport" | "dport", port)) => ports.push(port.parse().ok()?),
            _ => is_unreplied |= word == "[UNREPLIED]",
        }
    }
    let ends = |n: usize| Some(SocketAddr::new(*ips.get(n)?, *ports.get(n)?));
    Some(Entry {
        source: ends(0)?,
        destination: ends(1)?,
        // The second half is an answer as it is expected.
        new_destination: ends(2)?,
        new_source: ends(3)?,
        is_unreplied,
    })
}

impl Entries {
    /// Asks connection tracking itself (ctnetlink); needs `CAP_NET_ADMIN`. Loads its module.
    pub fn by_netlink(ports: &[u16], own: &[IpAddr]) -> io::Result<Self> {
        /// The kernel fills no more than this at a time (`NLMSG_GOODSIZE` and 32 KiB).
        const LEN: usize = 64 * 1024;

        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.connect(&NetlinkAddress::new(0, 0))?;
        let header = NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, 0);
        let request = NetfilterMessage::new(header, ConntrackMessage::Get(Vec::new()));
        let mut request = NetlinkMessage::from(request);
        request.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        socket.send(&bytes, 0)?;

        let mut entries = Self::default();
        let mut answer = vec![0; LEN];
        loop {
            let len = socket.recv(&mut &mut answer[..], 0)?;
            let mut rest = &answer[..len];
            while !rest.is_empty() {
                let message = NetlinkMessage::<NetfilterMessage>::deserialize(rest)
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
                match message.payload {
                    NetlinkPayload::Done(_) => return Ok(entries),
                    NetlinkPayload::Error(error) if error.code.is_some() => {
                        return Err(error.to_io());
                    }
                    NetlinkPayload::InnerMessage(NetfilterMessage {
                        inner: NetfilterMessageInner::Conntrack(ConntrackMessage::New(attributes)),
                        ..
                    }) => {
                        if let Some(entry) = of_attributes(&attributes) {
                            entries.add(entry, ports, own);
                        }
                    }
                    _ => {}
                }
                // Messages begin at multiples of four; the last one need not end at one.
                let step = (message.header.length as usize).next_multiple_of(4);
                rest = rest.get(step..).unwrap_or_default();
            }
        }
    }
}

/// None of anything but UDP.
fn of_attributes(attributes: &[ConntrackAttribute]) -> Option<Entry> {
    let (mut original, mut reply, mut status) = (None, None, Status::empty());
    for attribute in attributes {
        match attribute {
            ConntrackAttribute::CtaTupleOrig(tuple) => original = udp_ends(tuple),
            ConntrackAttribute::CtaTupleReply(tuple) => reply = udp_ends(tuple),
            ConntrackAttribute::CtaStatus(bits) => status = *bits,
            _ => {}
        }
    }
    let ((source, destination), (new_destination, new_source)) = (original?, reply?);
    let is_unreplied = !status.contains(Status::SeenReply);
    Some(Entry { source, destination, new_source, new_destination, is_unreplied })
}

/// Source and destination.
fn udp_ends(tuple: &[Tuple]) -> Option<(SocketAddr, SocketAddr)> {
    let (mut source, mut destination) = (None, None);
    let (mut sport, mut dport, mut is_udp) = (None, None, false);
    for part in tuple {
        match part {
            Tuple::Ip(addresses) => {
                for address in addresses {
                    match address {
                        IPTuple::SourceAddress(ip) => source = Some(*ip),
                        IPTuple::DestinationAddress(ip) => destination = Some(*ip),
                        _ => {}
                    }
                }
            }
            Tuple::Proto(parts) => {
                for part in parts {
                    match part {
                        ProtoTuple::Protocol(protocol) => is_udp = *protocol == Protocol::Udp,
                        ProtoTuple::SourcePort(port) => sport = Some(*port),
                        ProtoTuple::DestinationPort(port) => dport = Some(*port),
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    is_udp.then_some((SocketAddr::new(source?, sport?), SocketAddr::new(destination?, dport?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const REWRITTEN: &str = "ipv4     2 udp      17 29 src=10.0.0.11 dst=10.0.0.13 sport=42276 \
                             dport=8472 [UNREPLIED] src=10.0.0.13 dst=10.0.0.11 sport=8472 \
                             dport=54947 mark=0 zone=1 use=2";
    const PLAIN: &str = "ipv6     10 udp      17 110 src=fd00::11 dst=fd00::13 sport=42276 \
                         dport=8472 packets=3 bytes=300 src=fd00::13 dst=fd00::11 sport=8472 \
                         dport=42276 packets=1 bytes=100 [ASSURED] mark=0 use=1";

    #[test]
    fn a_rewritten_port_shows() {
        let entry = of_line(REWRITTEN).unwrap();
        assert!(entry.is_rewritten() && entry.is_unreplied, "{entry:?}");
        assert_eq!((entry.source.port(), entry.new_source.port()), (42276, 54947));
        let entry = of_line(PLAIN).unwrap();
        assert!(!entry.is_rewritten() && !entry.is_unreplied, "{entry:?}");
        assert_eq!(of_line("ipv4 2 tcp 6 29 ESTABLISHED src=10.0.0.11 dst=10.0.0.13"), None);
    }

    #[test]
    fn only_what_this_node_sends_to_the_ports_counts() {
        let (rewritten, plain) = (of_line(REWRITTEN).unwrap(), of_line(PLAIN).unwrap());
        let own = [rewritten.source.ip(), plain.source.ip()];
        let mut entries = Entries::default();
        for _ in 0..5 {
            entries.add(rewritten, &[8472], &own);
        }
        entries.add(plain, &[8472], &own);
        entries.add(rewritten, &[4789], &own);
        entries.add(rewritten, &[8472], &own[1..]);
        assert_eq!(entries.total, 6);
        let [seen] = &entries.rewritten[..] else { panic!("{entries:?}") };
        assert_eq!((seen.port, seen.count, seen.unreplied), (8472, 5, 5));
        assert_eq!(seen.examples, [rewritten; MAX_EXAMPLES]);
    }
}
