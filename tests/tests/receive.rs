//! The receiver's side: what this node drops for its outer checksum, seen at the drop itself.

use std::fs;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt as _;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use aya::programs::links::LinkError;
use nix::sys::signal::Signal;
use vxcsum_tests::client::Socket;
use vxcsum_tests::conntrack;
use vxcsum_tests::counters;
use vxcsum_tests::daemon::{Daemon, Event, Peer, Receive, binary};
use vxcsum_tests::folder::Folder;
use vxcsum_tests::lab::{Family, Lab, LabConfig, NIC, Nat, OuterSum, VXLAN};
use vxcsum_tests::netns::NetNs;
use vxcsum_tests::packets::{Check, Extension, Frame, Ip, SegmentSum, Transport, Udp, Vxlan};
use vxcsum_tests::storm::{PORT_BEFORE_NAT, Packet, SOURCE_PORTS, Storm};
use vxcsum_tests::traffic::{self, TcpServer, UdpServer, send_frames};
use vxcsum_tests::wait::wait_until;

const PLENTY: Duration = Duration::from_secs(10);
/// A lost SYN is sent again after a second, and after two more.
const STALL: Duration = Duration::from_millis(3500);
const LOST: Duration = Duration::from_millis(50);
const STORM: Duration = Duration::from_secs(2);
const THREADS: usize = 2;
/// Sending nodes that are told apart.
const MAX_PEERS: usize = 1024;

/// A daemon on the receiving node, and what the kernel itself counts there from now on.
struct Receiver<'a> {
    node: &'a NetNs,
    socket: Socket,
    daemon: Daemon,
    before: u64,
}

impl<'a> Receiver<'a> {
    fn start(node: &'a NetNs, args: &[&str]) -> Result<Self> {
        let socket = Socket::new()?;
        let daemon = socket.run(node, [&["--receive", "on"], args].concat())?;
        Ok(Self { node, socket, daemon, before: in_csum_errors(node)? })
    }

    fn kernel(&self) -> Result<u64> {
        Ok(in_csum_errors(self.node)? - self.before)
    }

    fn receive(&self) -> Result<Receive> {
        Ok(self.socket.status()?.receive)
    }

    /// Waits until the kernel has counted so many.
    fn wait_dropped(&self, packets: u64) -> Result<()> {
        wait_until(&format!("{packets} drops"), PLENTY, || Ok(self.kernel()? >= packets))
    }

    /// Ends it, checks all sums, and returns what it reported of dropped packets.
    fn stop(self) -> Result<(Vec<Event>, Receive)> {
        let kernel = self.kernel()?;
        let (mut events, summary) = self.daemon.stop()?;
        let receive = summary.receive;
        check_identities(&receive)?;
        assert_eq!(receive.dropped + receive.not_vxlan, kernel, "{receive:#?}");
        assert_eq!(receive.in_csum_errors, Some(kernel));
        events.retain(|event| event.direction == "receive");
        assert_eq!(events.len() as u64, receive.events.emitted);
        Ok((events, receive))
    }
}

/// Both families together.
fn in_csum_errors(ns: &NetNs) -> Result<u64> {
    let ipv4 = counters::udp(ns, Family::V4)?.in_csum_errors;
    Ok(ipv4 + counters::udp(ns, Family::V6)?.in_csum_errors)
}

fn check_identities(receive: &Receive) -> Result<()> {
    let events = receive.events;
    let of_peers: u64 = receive.peers.iter().map(|peer| peer.packets).sum();
    ensure!(
        receive.dropped == events.emitted + events.suppressed + events.lost
            && receive.dropped == of_peers,
        "{receive:#?}"
    );
    Ok(())
}

/// Of a device that has no other port to send from, so that arithmetic proves enough.
fn lab() -> Result<Lab> {
    LabConfig { srcport: Some(SOURCE_PORTS), ..LabConfig::default() }.start()
}

fn from_a(packets: u64) -> Vec<Peer> {
    vec![Peer { peer: "10.0.0.11".to_owned(), packets }]
}

/// Sends frames as they are on the wire, from the sending node.
fn send(lab: &Lab, packets: impl IntoIterator<Item = Vec<u8>>) -> Result<u64> {
    let packets: Vec<_> = packets.into_iter().map(to_b).collect();
    send_frames(&lab.a, NIC, &packets)?;
    Ok(packets.len() as u64)
}

/// To the NIC of the lab's receiving node.
fn to_b(mut frame: Vec<u8>) -> Vec<u8> {
    frame[..6].copy_from_slice(&[0x02, 0, 0, 0, 0, 0x0b]);
    frame
}

/// A VXLAN packet with UDP inside, all its inner sums filled in.
fn vxlan(source: IpAddr, destination: IpAddr, check: Check, payload: usize) -> Ip {
    let [inner_source, inner_destination] =
        [Ipv4Addr::new(172, 29, 0, 0), Ipv4Addr::new(172, 29, 2, 0)].map(IpAddr::from);
    let udp = Udp {
        source_port: 7000,
        destination_port: 53,
        payload: vec![0x5a; payload],
        sum: SegmentSum::Complete,
    };
    let inner = Ip::new(inner_source, inner_destination, Transport::Udp(udp));
    Ip::new(source, destination, Transport::Vxlan(Vxlan::new(50000, check, inner.into())))
}

/// The one from node to node.
fn finished(lab: &Lab, check: Check, payload: usize) -> Result<Vec<u8>> {
    let ip = vxlan(lab.outer_a(), lab.outer_b(), check, payload);
    Ok(Frame::new(&ip.into())?.finished)
}

const STALE: Check = Check::Stale { old_port: PORT_BEFORE_NAT, old_address: None };

#[test]
fn stalled_connection_is_explained_over_ipv4() -> Result<()> {
    stalled_connection_is_explained(Family::V4)
}

#[test]
fn stalled_connection_is_explained_over_ipv6() -> Result<()> {
    stalled_connection_is_explained(Family::V6)
}

/// Both nodes watched: what one says it sends broken is what the other says it drops.
fn stalled_connection_is_explained(outer: Family) -> Result<()> {
    let nat = Nat::Masquerade { random_fully: true };
    let lab = LabConfig { outer, nat, ..LabConfig::default() }.start()?;
    let tcp = TcpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
    let udp = UdpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
    let sender = Daemon::start(&lab.a, NIC, [""; 0])?;
    let receiver = Receiver::start(&lab.b, &[])?;

    assert_eq!(traffic::try_connect(&lab.a, tcp.address(), STALL)?, None);
    assert!(traffic::udp_request(&lab.a, udp.address(), &traffic::dns_query(), LOST).is_err());
    let sent = sender.wait_events(3, PLENTY)?.len();
    receiver.wait_dropped(sent as u64)?;
    let (sent, _) = sender.stop()?;
    let (dropped, receive) = receiver.stop()?;

    assert_eq!(receive.dropped, sent.len() as u64);
    assert_eq!(receive.not_vxlan, 0);
    let peer = lab.outer_a().to_string();
    assert_eq!(receive.peers, [Peer { peer, packets: receive.dropped }]);
    assert_eq!((receive.events.suppressed, receive.events.lost), (0, 0));
    let flows = conntrack::udp_flows(&lab.a, lab.config.dstport)?;
    for (sent, dropped) in sent.iter().zip(&dropped) {
        assert_eq!((sent.direction.as_str(), dropped.direction.as_str()), ("egress", "receive"));
        assert_eq!(dropped.verdict, "stale_nat", "{dropped:#?}");
        assert_eq!(dropped.proof.as_deref(), Some("port_range"));
        assert_eq!(dropped.outer, sent.outer, "addresses, ports and the port before NAT");
        let original = conntrack::before_nat(&flows, dropped.outer.sport).context("no flow")?;
        assert_eq!(dropped.outer.sport_before_nat, Some(original.sport));
        assert_eq!((dropped.check, dropped.expected), (sent.check, sent.expected));
        assert_eq!(dropped.expected_from, None);
        assert_eq!(dropped.inner, sent.inner);
        assert_eq!((dropped.vni, dropped.len, dropped.segments), (sent.vni, sent.len, Some(1)));
        assert_eq!((dropped.interface.as_str(), dropped.device.as_deref()), (NIC, Some(VXLAN)));
        assert_eq!((dropped.action.as_str(), dropped.mark), ("none", 0));
    }
    Ok(())
}

#[test]
fn mangled_zero_over_ipv4() -> Result<()> {
    mangled_zero(Family::V4)
}

#[test]
fn mangled_zero_over_ipv6() -> Result<()> {
    mangled_zero(Family::V6)
}

fn mangled_zero(outer: Family) -> Result<()> {
    let lab = LabConfig {
        outer,
        outer_sum: OuterSum::Zero,
        accept_zero_v6: true,
        nat: Nat::ZeroMangle,
        ..LabConfig::default()
    };
    let lab = lab.start()?;
    let udp = UdpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
    let receiver = Receiver::start(&lab.b, &[])?;
    assert!(traffic::udp_request(&lab.a, udp.address(), &traffic::dns_query(), LOST).is_err());
    receiver.wait_dropped(1)?;
    let (events, receive) = receiver.stop()?;
    assert_eq!((receive.dropped, events.len()), (1, 1));
    assert_eq!((events[0].verdict.as_str(), events[0].check), ("mangled_zero", 0xffff));
    assert_eq!(events[0].proof, None);
    Ok(())
}

/// IPv6 without a checksum, which this receiver does not take; a sum that the sender's NIC was to
/// finish; an inner one that it was to finish; damage.
#[test]
fn other_things_that_senders_do() -> Result<()> {
    let lab = lab()?;
    let receiver = Receiver::start(&lab.b, &[])?;
    let ip = |check| vxlan(lab.outer_a(), lab.outer_b(), check, 32);
    let pending = Frame::new(&ip(Check::Pending).into())?;
    let right = Frame::new(&ip(Check::Right).into())?;
    let open = Packet::new(Check::Right).frame()?;
    let mut damaged = right.finished.clone();
    let last = damaged.len() - 1;
    damaged[last] ^= 0xff;
    send(&lab, [pending.bytes, open, damaged])?;
    receiver.wait_dropped(3)?;
    let (events, receive) = receiver.stop()?;
    assert_eq!(receive.peers, from_a(3));
    let verdicts: Vec<_> = events.iter().map(|event| event.verdict.as_str()).collect();
    assert_eq!(verdicts, ["offload_pending", "offload_pending", "bad"]);
    assert_eq!(events[0].expected, Some(right.check()?));
    assert!(events[1].expected.is_some_and(|sum| sum != events[1].check), "{:#?}", events[1]);
    assert!(events.iter().all(|event| event.outer.sport_before_nat.is_none()));

    let lab = LabConfig { outer: Family::V6, outer_sum: OuterSum::Zero, ..LabConfig::default() };
    let lab = lab.start()?;
    let udp = UdpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
    let receiver = Receiver::start(&lab.b, &[])?;
    assert!(traffic::udp_request(&lab.a, udp.address(), &traffic::dns_query(), LOST).is_err());
    receiver.wait_dropped(1)?;
    // Behind an extension header, and on a device that sends none.
    let mut ip = vxlan(lab.outer_a(), lab.outer_b(), Check::Value(0x1234), 32);
    ip.extensions = vec![Extension::DestinationOptions(8)];
    send(&lab, [Frame::new(&ip.into())?.finished])?;
    receiver.wait_dropped(2)?;
    let (events, _) = receiver.stop()?;
    assert_eq!((events[0].verdict.as_str(), events[0].check), ("zero", 0));
    assert_eq!((events[1].verdict.as_str(), events[1].check), ("mangled_zero", 0x1234));
    assert_eq!(events[1].inner.dport, Some(53));
    Ok(())
}

/// They count, but as what they are: without a socket, for a program that reads them, and to a
/// watched port without being VXLAN.
#[test]
fn what_is_not_vxlan_is_counted_apart() -> Result<()> {
    let lab = lab()?;
    let receiver = Receiver::start(&lab.b, &[])?;
    let frame = |destination_port| -> Result<Vec<u8>> {
        let udp = Udp {
            source_port: 1234,
            destination_port,
            // Shorter ones are summed up before a socket is looked for.
            payload: vec![7; 201],
            sum: SegmentSum::Value(0x1234),
        };
        Ok(Frame::new(&Ip::v4(Transport::Udp(udp)).into())?.finished)
    };
    send(&lab, [frame(9)?, frame(8472)?, frame(9)?])?;
    receiver.wait_dropped(3)?;
    wait_until("they are counted", PLENTY, || Ok(receiver.receive()?.not_vxlan == 3))?;
    lab.b.enter(|| {
        let server = UdpSocket::bind("10.0.0.13:7777")?;
        server.set_read_timeout(Some(Duration::from_millis(500)))?;
        send(&lab, [frame(7777)?])?;
        ensure!(server.recv(&mut [0; 64]).is_err(), "a damaged datagram is delivered");
        Ok(())
    })?;
    receiver.wait_dropped(4)?;
    let (events, receive) = receiver.stop()?;
    assert_eq!((receive.dropped, receive.not_vxlan, events.len()), (0, 4, 0));
    assert_eq!(receive.peers, []);
    Ok(())
}

/// A kernel is one, its counters are not.
#[test]
fn each_namespace_counts_its_own() -> Result<()> {
    let (near, far) = (lab()?, lab()?);
    let nearby = Receiver::start(&near.b, &[])?;
    let faraway = Receiver::start(&far.b, &[])?;
    let sender = Receiver::start(&near.a, &[])?;
    for _ in 0..3 {
        send(&near, [finished(&near, STALE, 32)?])?;
    }
    send(&far, [finished(&far, STALE, 32)?])?;
    nearby.wait_dropped(3)?;
    faraway.wait_dropped(1)?;
    assert_eq!(nearby.stop()?.1.dropped, 3);
    assert_eq!(faraway.stop()?.1.dropped, 1);
    assert_eq!(sender.stop()?.1.dropped, 0);
    Ok(())
}

/// On the way into a pod there is no VXLAN device, and none is needed.
#[test]
fn node_without_a_vxlan_device() -> Result<()> {
    let lab = lab()?;
    lab.b.ip(&format!("link del {VXLAN}"))?;
    let socket = Socket::new()?;
    let daemon = socket.launch(&lab.b, ["--receive"])?;
    wait_until("it answers", PLENTY, || Ok(socket.status().is_ok()))?;
    send(&lab, [finished(&lab, Check::Value(0xffff), 32)?])?;
    let events = daemon.wait_events(1, PLENTY)?;
    assert_eq!((events[0].direction.as_str(), events[0].device.as_deref()), ("receive", None));
    assert_eq!(daemon.stop()?.1.receive.dropped, 1);
    Ok(())
}

/// Fragments are put together before the checksum is looked at, but stay in pieces.
#[test]
fn payload_out_of_reach() -> Result<()> {
    let lab = lab()?;
    let receiver = Receiver::start(&lab.b, &[])?;
    let whole = finished(&lab, STALE, 1200)?;
    for (first, id) in [(96, 1), (8, 2)] {
        send(&lab, fragments(&whole, first, id))?;
    }
    receiver.wait_dropped(2)?;
    wait_until("both are reported", PLENTY, || Ok(receiver.receive()?.events.emitted == 2))?;
    let lines = receiver.daemon.lines();
    wait_until("both are printed", PLENTY, || Ok(receiver.daemon.lines().len() == 2))
        .with_context(|| lines.join("\n"))?;
    let lines = receiver.daemon.lines();
    let events: Vec<serde_json::Value> =
        lines.iter().map(|line| Ok(serde_json::from_str(line)?)).collect::<Result<_>>()?;
    // All headers: the sum follows from them.
    assert_eq!(events[0]["verdict"], "stale_nat", "{}", lines[0]);
    assert_eq!(events[0]["expected_from"], "headers");
    assert_eq!(events[0]["outer"]["sport_before_nat"], PORT_BEFORE_NAT);
    let right = Frame::new(&vxlan(lab.outer_a(), lab.outer_b(), Check::Right, 1200).into())?;
    assert_eq!(events[0]["expected"], format!("{:#06x}", right.check()?));
    assert_eq!(events[0]["len"], whole.len());
    // Not even the VXLAN header.
    assert_eq!(events[1]["verdict"], "unverified", "{}", lines[1]);
    assert_eq!(events[1]["outer"]["src"], "10.0.0.11");
    assert!(events[1]["vni"].is_null() && events[1]["expected"].is_null(), "{}", lines[1]);
    let receive = receiver.receive()?;
    check_identities(&receive)?;
    assert_eq!((receive.dropped, receiver.kernel()?), (2, 2));
    Ok(())
}

/// Cuts an Ethernet frame with IPv4 in two, the first with so many bytes behind the IP header.
fn fragments(frame: &[u8], first: usize, id: u16) -> [Vec<u8>; 2] {
    const HEADERS: usize = 34;
    let (headers, payload) = frame.split_at(HEADERS);
    let fragment = |payload: &[u8], offset_and_flags: u16| {
        let mut bytes = [headers, payload].concat();
        let len = (bytes.len() - 14) as u16;
        bytes[16..18].copy_from_slice(&len.to_be_bytes());
        bytes[18..20].copy_from_slice(&id.to_be_bytes());
        bytes[20..22].copy_from_slice(&offset_and_flags.to_be_bytes());
        bytes[24..26].fill(0);
        let sum = bytes[14..34]
            .chunks(2)
            .fold(0_u32, |sum, word| sum + u32::from(u16::from_be_bytes([word[0], word[1]])));
        let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
        bytes[24..26].copy_from_slice(&sum.to_be_bytes());
        bytes
    };
    [fragment(&payload[..first], 0x2000), fragment(&payload[first..], (first / 8) as u16)]
}

#[test]
fn jumbo_frame_is_summed_as_a_whole() -> Result<()> {
    const PAYLOAD: usize = 8800;
    let nat = Nat::Masquerade { random_fully: true };
    let lab = LabConfig { mtu: 9000, nat, ..LabConfig::default() }.start()?;
    let udp = UdpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
    let receiver = Receiver::start(&lab.b, &[])?;
    assert!(traffic::udp_request(&lab.a, udp.address(), &[7; PAYLOAD], LOST).is_err());
    receiver.wait_dropped(1)?;
    let (events, _) = receiver.stop()?;
    assert_eq!(events[0].verdict, "stale_nat", "{:#?}", events[0]);
    assert_eq!(events[0].expected_from, None);
    // Ethernet, IPv4 and UDP twice, and VXLAN.
    assert_eq!(events[0].len as usize, PAYLOAD + 2 * 42 + 8);
    Ok(())
}

#[test]
fn exact_in_a_storm() -> Result<()> {
    const PER_SECOND: u64 = 200;
    let lab = lab()?;
    let receiver = Receiver::start(&lab.b, &["--events-per-second", "200", "--quiet"])?;
    let frames = [
        finished(&lab, STALE, 32)?,
        finished(&lab, Check::Right, 32)?,
        finished(&lab, Check::Value(0xffff), 32)?,
    ];
    let start = Instant::now();
    let storm = Storm::start(&lab.a, NIC, &frames.map(to_b), THREADS)?;
    let (mut looks, mut last) = (0, 0);
    while start.elapsed() < STORM {
        let receive = receiver.receive()?;
        check_identities(&receive)?;
        looks += usize::from(receive.dropped > last);
        last = receive.dropped;
    }
    storm.stop()?;
    let took = start.elapsed();
    ensure!(looks > 20, "only {looks} looks");
    // What is queued is dropped within the next moments.
    let mut kernel = 0;
    wait_until("the storm is over", PLENTY, || {
        thread::sleep(Duration::from_millis(50));
        let before = std::mem::replace(&mut kernel, receiver.kernel()?);
        Ok(kernel == before)
    })?;
    let receive = receiver.receive()?;
    check_identities(&receive)?;
    assert_eq!((receive.dropped, receive.not_vxlan), (kernel, 0));
    assert_eq!(receive.peers, from_a(kernel));
    ensure!(kernel > 5000, "{kernel} drops are no storm");
    let allowed = PER_SECOND * (took.as_millis() as u64 + 1000) / 1000 + THREADS as u64;
    let emitted = receive.events.emitted;
    ensure!(emitted <= allowed && emitted >= PER_SECOND, "{emitted} events in {took:?}");
    Ok(())
}

#[test]
fn events_that_find_no_room() -> Result<()> {
    let lab = lab()?;
    let receiver = Receiver::start(&lab.b, &["--events-per-second", "0", "--ring-kib", "64"])?;
    receiver.daemon.signal(Signal::SIGSTOP)?;
    let stale = finished(&lab, STALE, 32)?;
    send(&lab, vec![stale.clone(); 1000])?;
    receiver.wait_dropped(1000)?;
    receiver.daemon.signal(Signal::SIGCONT)?;
    let receive = receiver.receive()?;
    check_identities(&receive)?;
    assert_eq!((receive.dropped, receive.events.suppressed), (1000, 0));
    // 64 KiB hold some 350 of them.
    assert!((100..900).contains(&receive.events.emitted), "{receive:#?}");
    send(&lab, [stale])?;
    receiver.wait_dropped(1001)?;
    let (_, after) = receiver.stop()?;
    assert_eq!(after.events.emitted, receive.events.emitted + 1);
    Ok(())
}

#[test]
fn more_peers_than_are_told_apart() -> Result<()> {
    const MORE: usize = 76;
    let lab = lab()?;
    let receiver = Receiver::start(&lab.b, &["--metrics", "127.0.0.1:9472"])?;
    let source = |number: usize| IpAddr::from(Ipv4Addr::from_bits(0x0a01_0000 + number as u32));
    let frames: Vec<_> = (1..=MAX_PEERS + MORE)
        .map(|number| {
            let ip = vxlan(source(number), lab.outer_b(), STALE, 32);
            Ok(Frame::new(&ip.into())?.finished)
        })
        .collect::<Result<_>>()?;
    // No more at a time than the backlog of the receiver takes.
    for (round, frames) in [&frames, &frames].into_iter().flat_map(|it| it.chunks(500)).enumerate()
    {
        send(&lab, frames.to_vec())?;
        wait_until(&format!("round {round}"), PLENTY, || {
            Ok(receiver.kernel()? == receiver.receive()?.dropped)
        })?;
    }
    receiver.wait_dropped(2 * frames.len() as u64)?;
    let receive = receiver.receive()?;
    check_identities(&receive)?;
    assert_eq!(receive.peers.len(), MAX_PEERS + 1);
    let (other, named) = receive.peers.split_last().context("no peers")?;
    assert_eq!(*other, Peer { peer: "other".to_owned(), packets: 2 * MORE as u64 });
    assert!(named.iter().all(|peer| peer.packets == 2), "{named:?}");
    let text = metrics_of(&lab.b)?;
    let samples: Vec<_> = text
        .lines()
        .filter(|line| line.starts_with("vxcsum_receive_dropped_packets_total{"))
        .collect();
    assert_eq!(samples.len(), MAX_PEERS + 1);
    for line in [
        &format!(r#"vxcsum_receive_dropped_packets_total{{peer="other"}} {}"#, 2 * MORE),
        r#"vxcsum_receive_dropped_packets_total{peer="10.1.0.1"} 2"#,
        &format!("vxcsum_receive_events_emitted_total {}", receive.events.emitted),
        "vxcsum_receive_not_vxlan_packets_total 0",
        "vxcsum_receive_attached 1",
    ] {
        assert!(text.lines().any(|it| it == line), "{line} is not in\n{text}");
    }
    let table = receiver.socket.vxcsum(["status"])?.stdout;
    assert!(table.contains("receive side: 2200 VXLAN packets dropped"), "{table}");
    assert!(table.contains("and from 1015 more"), "{table}");
    receiver.stop().map(drop)
}

fn metrics_of(node: &NetNs) -> Result<String> {
    let mut stream = node.enter(|| Ok(TcpStream::connect("127.0.0.1:9472")?))?;
    stream.set_read_timeout(Some(PLENTY))?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (_, body) = answer.split_once("\r\n\r\n").context("no body")?;
    Ok(body.to_owned())
}

#[test]
fn tail_tells_the_directions_apart() -> Result<()> {
    let lab = lab()?;
    let receiver = Receiver::start(&lab.b, &[])?;
    let socket = &receiver.socket;
    let all = socket.tail(["--json"])?;
    let dropped = socket.tail(["--json", "--direction", "receive"])?;
    let sent = socket.tail(["--json", "--direction", "egress"])?;
    let from_a = socket.tail(["--json", "--peer", "10.0.0.11"])?;
    let people = socket.tail(["--direction", "receive"])?;
    send(&lab, [finished(&lab, STALE, 32)?])?;
    all.wait_events(1, PLENTY)?;
    // From here, to somebody else.
    let other = Packet { peer: Ipv4Addr::new(10, 0, 0, 14).into(), ..Packet::stale() };
    send_frames(&lab.b, NIC, &[other.frame()?])?;
    let all = all.wait_events(2, PLENTY)?;
    let directions: Vec<_> = all.iter().map(|event| event.direction.as_str()).collect();
    assert_eq!(directions, ["receive", "egress"]);
    assert_eq!(dropped.wait_events(1, PLENTY)?, all[..1]);
    assert_eq!(sent.wait_events(1, PLENTY)?, all[1..]);
    assert_eq!(from_a.wait_events(1, PLENTY)?, all[..1]);
    wait_until("a line", PLENTY, || Ok(!people.lines().is_empty()))?;
    let line = people.lines().join("\n");
    for part in [" eth0 receive dropped stale_nat from 10.0.0.11 flannel.1 vni 1  ", "40000 before"]
    {
        assert!(line.contains(part), "{part:?} is not in {line:?}");
    }
    Ok(())
}

#[test]
fn turned_off() -> Result<()> {
    let lab = lab()?;
    let folder = Folder::new()?;
    let config = folder.path().join("vxcsum.toml");
    fs::write(&config, "receive = \"off\"\n")?;
    let config = config.to_str().context("no UTF-8")?;
    for args in [["--receive", "off"], ["--config", config]] {
        let socket = Socket::new()?;
        let daemon = socket.run(&lab.b, args)?;
        let before = in_csum_errors(&lab.b)?;
        send(&lab, [finished(&lab, STALE, 32)?])?;
        wait_until("the drop", PLENTY, || Ok(in_csum_errors(&lab.b)? > before))?;
        let receive = socket.status()?.receive;
        assert_eq!((receive.attached, receive.dropped), (false, 0));
        assert!(receive.why.is_some_and(|why| why.contains("turned off")));
        let said = daemon.stderr().join("\n");
        assert!(!said.contains("receive side"), "{said}");
        assert_eq!(daemon.stop()?.0, []);
    }
    Ok(())
}

/// A kernel whose types do not name the drop reason, as before 5.17, and one without types.
#[test]
fn kernels_that_cannot() -> Result<()> {
    let lab = lab()?;
    let folder = Folder::new()?;
    let types = folder.path().join("btf");
    let mut bytes = fs::read("/sys/kernel/btf/vmlinux")?;
    let name = b"SKB_DROP_REASON_UDP_CSUM\0";
    let at = bytes.windows(name.len()).position(|it| it == name).context("no such reason")?;
    bytes[at] = b'X';
    fs::write(&types, &bytes)?;
    fs::set_permissions(&types, fs::Permissions::from_mode(0o444))?;
    for (types, why) in [(types.to_str().context("no UTF-8")?, "5.17"), ("/dev/null", "types")] {
        // `ip netns exec` gives it mounts of its own.
        let launch = |receive: &str, socket: &Socket| -> Result<Daemon> {
            let mut command = lab.b.command("sh");
            let script = "mount --bind \"$1\" /sys/kernel/btf/vmlinux && shift && exec \"$@\"";
            command.args(["-c", script, "sh", types]).arg(binary()?);
            command.args(["run", "--json", "--receive", receive, "--socket"]).arg(socket.path());
            Daemon::launch(command)
        };
        let socket = Socket::new()?;
        let ended = launch("on", &socket)?.wait_end(PLENTY)?;
        assert_eq!(ended.code, Some(2), "{ended:?}");
        let last = ended.stderr.lines().last().unwrap_or_default();
        assert!(last.contains("receive side") && last.contains(why), "{last:?}");

        let daemon = launch("auto", &socket)?;
        daemon.wait_watching()?;
        daemon.wait_says(0, "receive side: off, ", PLENTY)?;
        wait_until("it answers", PLENTY, || Ok(socket.status().is_ok()))?;
        send_frames(&lab.b, NIC, &[Packet::stale().frame()?])?;
        daemon.wait_events(1, PLENTY)?;
        let receive = socket.status()?.receive;
        assert!(!receive.attached && receive.why.is_some_and(|it| it.contains(why)));
        let said = daemon.stderr();
        let said: Vec<_> = said.iter().filter(|line| line.contains("receive side")).collect();
        assert_eq!(said.len(), 1, "{said:?}");
        let table = socket.vxcsum(["status"])?.stdout;
        assert!(table.contains("receive side: off, "), "{table}");
        daemon.stop()?;
    }
    Ok(())
}

/// What the kernel calls the attachment goes with the process, however that ends.
#[test]
fn kill_leaves_nothing() -> Result<()> {
    let lab = lab()?;
    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        let receiver = Receiver::start(&lab.b, &[])?;
        let link = raw_tracepoint_link(receiver.daemon.pid())?.context("no link")?;
        assert!(link_exists(link)?);
        receiver.daemon.signal(signal)?;
        receiver.daemon.wait_end(PLENTY)?;
        wait_until("the link is gone", PLENTY, || Ok(!link_exists(link)?))?;
    }
    Ok(())
}

/// Its id, from the file descriptors of a process (`bpf_link_show_fdinfo` in kernel/bpf/syscall.c).
fn raw_tracepoint_link(pid: u32) -> Result<Option<u32>> {
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        let info = fs::read_to_string(entry?.path()).unwrap_or_default();
        if info.contains("kfree_skb")
            && let Some(id) = info.lines().find_map(|line| line.strip_prefix("link_id:"))
        {
            return Ok(Some(id.trim().parse()?));
        }
    }
    Ok(None)
}

fn link_exists(id: u32) -> Result<bool> {
    for link in aya::programs::loaded_links() {
        match link {
            Ok(link) if link.id() == id => return Ok(true),
            // One that another test is about to make or to end.
            Err(LinkError::SyscallError(error))
                if matches!(error.io_error.kind(), ErrorKind::WouldBlock | ErrorKind::NotFound) => {
            }
            other => _ = other?,
        }
    }
    Ok(false)
}

#[test]
fn other_ports_and_policies_are_followed() -> Result<()> {
    let lab = lab()?;
    let folder = Folder::new()?;
    let config = folder.path().join("vxcsum.toml");
    fs::write(&config, "policy = \"zero\"\n")?;
    let path = config.to_str().context("no UTF-8")?;
    let receiver = Receiver::start(&lab.b, &["--config", path])?;
    let to_port = |destination_port| -> Result<Vec<u8>> {
        let mut ip = vxlan(lab.outer_a(), lab.outer_b(), STALE, 32);
        if let Transport::Vxlan(vxlan) = &mut ip.transport {
            vxlan.destination_port = destination_port;
        }
        Ok(Frame::new(&ip.into())?.finished)
    };
    send(&lab, [to_port(8472)?, to_port(5555)?])?;
    receiver.wait_dropped(2)?;
    let events = receiver.daemon.wait_events(1, PLENTY)?;
    assert_eq!(events[0].verdict, "mangled_zero");
    fs::write(&config, "port = [5555]\n")?;
    let said = receiver.daemon.said();
    receiver.daemon.signal(Signal::SIGHUP)?;
    receiver.daemon.wait_says(said, "port 5555", PLENTY)?;
    // The receiver's side follows within the same look.
    wait_until("the other port is watched", PLENTY, || {
        send(&lab, [to_port(8472)?, to_port(5555)?])?;
        Ok(receiver.receive()?.dropped > 2)
    })?;
    let events = receiver.daemon.wait_events(2, PLENTY)?;
    assert_eq!((events[1].outer.dport, events[1].verdict.as_str()), (5555, "stale_nat"));
    Ok(())
}
