//! Connections that wait for broken packets, from the first SYN to the end.

use std::collections::BTreeSet;
use std::io;
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use vxcsum_tests::client::Socket;
use vxcsum_tests::counters;
use vxcsum_tests::daemon::{Daemon, Stall};
use vxcsum_tests::lab::{Family, Lab, LabConfig, NIC, Nat, VXLAN};
use vxcsum_tests::netns::NetNs;
use vxcsum_tests::segment::{SERVICE, Segment};
use vxcsum_tests::storm::{Packet, SOURCE_PORTS, Storm};
use vxcsum_tests::traffic::{self, TcpServer, send_frames};
use vxcsum_tests::wait::{wait_for, wait_until};

const PLENTY: Duration = Duration::from_secs(20);
const TWO_MINUTES: Duration = Duration::from_mins(2);
/// Flows that are followed at a time.
const BOUND: u16 = 4096;

/// A node whose tunnel packets are masqueraded, from other ports each time unless `srcport` pins
/// them.
fn lab(srcport: Option<(u16, u16)>) -> Result<Lab> {
    let nat = Nat::Masquerade { random_fully: true };
    let lab = LabConfig { srcport, nat, ..LabConfig::default() }.start()?;
    // The way it was before Linux 6.5, and is for many pods: 1, 3, 7, 15, 31, 63 s.
    let is_there = lab.a.enter(|| {
        Ok(std::path::Path::new("/proc/sys/net/ipv4/tcp_syn_linear_timeouts").exists())
    })?;
    if is_there {
        lab.a.sysctl("net.ipv4.tcp_syn_linear_timeouts", "0")?;
    }
    Ok(lab)
}

/// For packets that the tests make themselves, which all come from one port before NAT.
fn lab_of_made_packets() -> Result<Lab> {
    LabConfig { srcport: Some(SOURCE_PORTS), ..LabConfig::default() }.start()
}

fn send(lab: &Lab, segments: &[Segment]) -> Result<()> {
    let frames = segments.iter().map(|it| it.frame()).collect::<Result<Vec<_>>>()?;
    send_frames(&lab.a, NIC, &frames)
}

/// The one that has come to an end, whatever its port.
fn wait_end(daemon: &Daemon, timeout: Duration) -> Result<Stall> {
    wait_for("the end of a wait", timeout, || {
        Ok(daemon.stalls()?.into_iter().find(|it| it.state != "waiting"))
    })
}

/// Seconds, with room for a busy machine above: TCP's timers are late there, never early.
fn assert_waited(stall: &Stall, from: f64, to: f64) {
    assert!((from..to).contains(&stall.waited_seconds), "{stall:#?}");
}

fn assert_about(stall: &Stall, lab: &Lab, server: SocketAddr) {
    assert_eq!((stall.proto.as_str(), stall.vni), ("tcp", 1), "{stall:#?}");
    assert_eq!((stall.src, stall.dst, stall.dport), (lab.inner_a(), server.ip(), server.port()));
    assert_eq!((stall.peer, stall.interface.as_str()), (lab.outer_b(), NIC));
    assert_eq!((stall.device.as_deref(), stall.verdict.as_str()), (Some(VXLAN), "stale_nat"));
}

/// The retransmitted SYN has another hash, so another outer source port, and meets no NAT entry.
#[test]
fn a_second_is_one_line() -> Result<()> {
    let lab = lab(None)?;
    mark_once(&lab)?;
    let server = TcpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
    let socket = Socket::new()?;
    let daemon = socket.run(&lab.a, [""; 0])?;
    let tail = socket.tail(["--json", "--stalls"])?;
    let people = socket.tail(["--stalls", "--limit", "1"])?;
    let address = server.address();
    let took = traffic::connect(&lab.a, address, PLENTY)?;
    let end = wait_end(&daemon, PLENTY)?;
    assert_about(&end, &lab, address);
    assert_eq!((end.state.as_str(), end.tries, end.fixed), ("connected", 1, false));
    assert_waited(&end, 0.9, took.as_secs_f64() + 0.1);
    wait_until("tail has it", PLENTY, || Ok(tail.stalls()?.contains(&end)))?;
    let text = people.wait_end(PLENTY)?.stdout;
    assert!(text.contains(&format!("> {address} (tcp, vni 1) ")), "{text}");
    assert!(text.contains("dropped by 10.0.0.13"), "{text}");
    let (_, summary) = daemon.stop()?;
    assert_eq!((summary.stalls.connected, summary.stalls.waiting.len()), (1, 0));
    Ok(())
}

/// With one source port, all SYNs meet the same NAT entry. Each of them keeps it alive, until the
/// pause between two is longer than the 30 s that it lives.
#[test]
fn sixty_three_seconds_are_one_line() -> Result<()> {
    let lab = lab(Some((40000, 40001)))?;
    mark_once(&lab)?;
    let server = TcpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
    let socket = Socket::new()?;
    let daemon = socket.run(&lab.a, [""; 0])?;
    let people = socket.tail(["--stalls"])?;
    let before = counters::udp(&lab.b, Family::V4)?;
    let address = server.address();
    let took = thread::scope(|scope| {
        let connecting = scope.spawn(|| traffic::connect(&lab.a, address, TWO_MINUTES));
        let waiting = wait_for("it waits", PLENTY, || {
            Ok(socket.status()?.stalls.waiting.into_iter().next())
        })?;
        assert_about(&waiting, &lab, address);
        assert_eq!((waiting.state.as_str(), waiting.whole_tries), ("waiting", 0), "{waiting:#?}");
        // The sixth is 16 s away then.
        wait_until("the fifth try", TWO_MINUTES, || {
            Ok(socket.status()?.stalls.waiting.first().is_some_and(|it| it.tries == 5))
        })?;
        let text = socket.vxcsum(["status"])?.stdout;
        for part in [
            "stalls: 1 waiting, 0 connected, 0 gave up",
            &format!("> {address} (tcp, vni 1) has been waiting for "),
            "its first 5 SYNs left with a broken checksum and were dropped by 10.0.0.13",
            "next try within ",
        ] {
            ensure!(text.contains(part), "{part:?} is not in {text}");
        }
        connecting.join().map_err(|_| anyhow!("panicked"))?
    })?;
    let end = wait_end(&daemon, PLENTY)?;
    assert_about(&end, &lab, address);
    assert_eq!((end.state.as_str(), end.tries), ("connected", 6), "{took:?}");
    let line = wait_for("a line for people", PLENTY, || Ok(people.lines().into_iter().nth(5)))?;
    let sentence = format!(
        " connected after {:.1} s: its first 6 SYNs left with a broken checksum and were dropped by \
         10.0.0.13",
        end.waited_seconds
    );
    ensure!(line.ends_with(&format!("> {address} (tcp, vni 1){sentence}")), "{line}");
    assert_waited(&end, 62.0, took.as_secs_f64() + 1.0);
    ensure!(took.as_secs_f64() - end.waited_seconds < 2.0, "{took:?}: {end:#?}");
    // Every try but the first was told while it waited.
    let tries: Vec<_> = daemon.stalls()?.iter().map(|it| (it.state.clone(), it.tries)).collect();
    for wanted in 2..=6 {
        ensure!(tries.contains(&("waiting".to_owned(), wanted)), "{tries:?}");
    }
    let after = counters::udp(&lab.b, Family::V4)?;
    assert_eq!(after.in_csum_errors - before.in_csum_errors, 6);
    Ok(())
}

/// Has packets marked in nat OUTPUT, as kube-proxy marks them: only the first packet of an inner
/// connection gets there. What comes after is not marked, and starts no NAT entry of its own.
fn mark_once(lab: &Lab) -> Result<()> {
    lab.a.run("iptables -t mangle -F")?;
    let mark = "-d 172.29.2.0/24 -j MARK --or-mark 0x4000";
    lab.a.run(&format!("iptables -t nat -A OUTPUT {mark}")).map(drop)
}

#[test]
fn one_that_gives_up_is_told() -> Result<()> {
    let lab = lab(None)?;
    let socket = Socket::new()?;
    let daemon = socket.run(&lab.a, [""; 0])?;
    let server = (lab.inner_b(), SERVICE).into();
    connect_with_few_syns(&lab.a, server, 2)?;
    let end = wait_end(&daemon, Duration::from_secs(40))?;
    assert_about(&end, &lab, server);
    assert_eq!((end.state.as_str(), end.tries, end.reset), ("gave_up", 3, false));
    // From the first SYN to the last.
    assert_waited(&end, 2.8, 10.0);
    let status = socket.status()?;
    assert_eq!((status.stalls.gave_up, status.stalls.waiting.len()), (1, 0));
    Ok(())
}

/// Connects in vain, with `retries` SYNs after the first.
fn connect_with_few_syns(ns: &NetNs, to: SocketAddr, retries: libc::c_int) -> Result<()> {
    ns.enter(|| {
        use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, connect, socket};
        let fd = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        // SAFETY: the pointer is to a live integer of the size passed with it.
        let done = unsafe {
            libc::setsockopt(
                fd.as_raw_fd(),
                libc::IPPROTO_TCP,
                libc::TCP_SYNCNT,
                (&raw const retries).cast(),
                size_of_val(&retries) as u32,
            )
        };
        ensure!(done == 0, "TCP_SYNCNT: {}", io::Error::last_os_error());
        let SocketAddr::V4(to) = to else { anyhow::bail!("IPv4 only") };
        ensure!(connect(fd.as_raw_fd(), &SockaddrIn::from(to)).is_err(), "connected to {to}");
        Ok(())
    })
}

#[test]
fn one_that_is_cured_while_it_waits_gets_through() -> Result<()> {
    let lab = lab(Some((40000, 40001)))?;
    let server = TcpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
    let socket = Socket::new()?;
    let daemon = socket.run(&lab.a, [""; 0])?;
    let address = server.address();
    thread::scope(|scope| {
        let connecting = scope.spawn(|| traffic::connect(&lab.a, address, PLENTY));
        daemon.wait_events(2, PLENTY)?;
        assert_eq!(socket.vxcsum(["fix", "restore"])?.code, Some(0));
        connecting.join().map_err(|_| anyhow!("panicked"))?
    })?;
    let end = wait_end(&daemon, PLENTY)?;
    assert_about(&end, &lab, address);
    assert_eq!((end.state.as_str(), end.fixed), ("connected", true));
    assert!(end.tries >= 2 && end.whole_tries >= 1, "{end:#?}");
    // Nobody waits from then on.
    let count = daemon.stalls()?.len();
    traffic::send_small(&lab.a, address, 10, 100, PLENTY)?;
    assert_eq!((daemon.stalls()?.len(), socket.status()?.stalls.connected), (count, 1));
    Ok(())
}

/// A resolver takes another port for each try.
#[test]
fn a_query_that_is_lost_again_is_known_by_its_question() -> Result<()> {
    let lab = lab(None)?;
    let socket = Socket::new()?;
    let daemon = socket.run(&lab.a, [""; 0])?;
    let to: SocketAddr = (lab.inner_b(), 53).into();
    let ports = lab.a.enter(|| {
        let mut ports = BTreeSet::new();
        for id in 1..=3 {
            let resolver = UdpSocket::bind("0.0.0.0:0")?;
            ports.insert(resolver.local_addr()?.port());
            let mut query = traffic::dns_query();
            query[0] = id;
            resolver.send_to(&query, to)?;
            thread::sleep(Duration::from_millis(700));
        }
        Ok(ports)
    })?;
    assert_eq!(ports.len(), 3);
    let lost = wait_for("lost three times", PLENTY, || {
        Ok(daemon.stalls()?.into_iter().find(|stall| stall.tries == 3))
    })?;
    assert_eq!((lost.state.as_str(), lost.proto.as_str(), lost.dport), ("lost_again", "udp", 53));
    let question = lost.question.context("no question")?;
    assert_eq!(question.name, "kubernetes.default.svc.cluster.local");
    assert_eq!(question.kind, "A");
    let status = socket.vxcsum(["status"])?.stdout;
    assert!(status.contains("2 datagrams lost again"), "{status}");
    Ok(())
}

/// Ports are used again, by a connection with a sequence number of its own.
#[test]
fn another_connection_of_the_same_ports_is_another_wait() -> Result<()> {
    let lab = lab_of_made_packets()?;
    let socket = Socket::new()?;
    let daemon = socket.run(&lab.a, [""; 0])?;
    let first = Segment::broken_syn(7000);
    let second = Segment { sequence: 0xbeef_0000, ..first };
    send(&lab, &[first, first])?;
    daemon.wait_events(2, PLENTY)?;
    send(&lab, &[second])?;
    let end = daemon.wait_stall("gave_up", 7000, PLENTY)?;
    assert_eq!(end.tries, 2);
    send(&lab, &[Segment { sequence: second.sequence + 1, ..Segment::ack(7000) }])?;
    assert_eq!(daemon.wait_stall("connected", 7000, PLENTY)?.tries, 1);
    Ok(())
}

#[test]
fn a_reset_ends_a_wait() -> Result<()> {
    let lab = lab_of_made_packets()?;
    let socket = Socket::new()?;
    let daemon = socket.run(&lab.a, [""; 0])?;
    send(&lab, &[Segment::broken_syn(7000)])?;
    wait_until("it waits", PLENTY, || Ok(socket.status()?.stalls.waiting.len() == 1))?;
    send(&lab, &[Segment { flags: "R", ..Segment::ack(7000) }])?;
    assert!(daemon.wait_stall("gave_up", 7000, PLENTY)?.reset);
    Ok(())
}

/// A new configuration replaces the old one as a whole.
#[test]
fn switching_the_mode_forgets_nobody() -> Result<()> {
    let lab = lab_of_made_packets()?;
    let socket = Socket::new()?;
    let daemon = socket.run(&lab.a, [""; 0])?;
    send(&lab, &[Segment::broken_syn(7000)])?;
    wait_until("it waits", PLENTY, || Ok(socket.status()?.stalls.waiting.len() == 1))?;
    for mode in ["restore", "off"] {
        assert_eq!(socket.vxcsum(["fix", mode])?.code, Some(0));
    }
    send(&lab, &[Segment::ack(7000)])?;
    assert_eq!(daemon.wait_stall("connected", 7000, PLENTY)?.tries, 1);
    Ok(())
}

/// The oldest make room, and those that are left still come to their end.
#[test]
fn more_connections_than_can_be_followed() -> Result<()> {
    const MORE: u16 = 50;
    let lab = lab_of_made_packets()?;
    let socket = Socket::new()?;
    let daemon = socket.run(&lab.a, ["--events-per-second", "0", "--ring-kib", "4096"])?;
    let ports: Vec<_> = (10_000..10_000 + BOUND + MORE).collect();
    let syns: Vec<_> = ports.iter().map(|&port| Segment::broken_syn(port)).collect();
    send(&lab, &syns)?;
    daemon.wait_events(syns.len(), PLENTY)?;
    let stalls = wait_for("all are taken", PLENTY, || {
        let stalls = socket.status()?.stalls;
        Ok((stalls.evicted == u64::from(MORE)).then_some(stalls))
    })?;
    assert_eq!(stalls.waiting.len(), usize::from(BOUND));
    assert_eq!((stalls.waiting[0].sport, stalls.connected), (10_000 + MORE, 0));
    let last = *ports.last().context("no ports")?;
    send(&lab, &[Segment::ack(10_000), Segment::ack(10_000 + MORE), Segment::ack(last)])?;
    daemon.wait_stall("connected", 10_000 + MORE, PLENTY)?;
    daemon.wait_stall("connected", last, PLENTY)?;
    assert!(daemon.stalls()?.iter().all(|stall| stall.sport != 10_000), "it was evicted");
    assert!(!daemon.stderr().iter().any(|line| line.contains("followed")), "{:?}", daemon.stderr());
    Ok(())
}

/// Retries whose events a storm holds back are counted all the same, and counters stay exact.
#[test]
fn tries_are_exact_in_a_storm() -> Result<()> {
    const TRIES: u32 = 30;
    let lab = lab_of_made_packets()?;
    let socket = Socket::new()?;
    counters::wait_quiet(&lab.a, NIC)?;
    let daemon = socket.run(&lab.a, ["--events-per-second", "50"])?;
    let storm = Storm::start(&lab.a, NIC, &[Packet::stale().frame()?], 2)?;
    wait_until("events are held back", PLENTY, || Ok(socket.status()?.events.suppressed > 1000))?;
    let syn = Segment::broken_syn(7000);
    send(&lab, &[syn])?;
    wait_until("it waits", PLENTY, || Ok(socket.status()?.stalls.waiting.len() == 1))?;
    send(&lab, &vec![syn; TRIES as usize - 1])?;
    // Clean ones of others are looked at meanwhile.
    let others: Vec<_> = (0..500).map(|sport| Segment::ack(8000 + sport)).collect();
    send(&lab, &others)?;
    send(&lab, &[Segment::ack(7000), Segment::ack(7000)])?;
    let end = daemon.wait_stall("connected", 7000, PLENTY)?;
    assert_eq!((end.tries, end.whole_tries), (TRIES, 0));
    let sent = storm.stop()?;
    let status = socket.status()?;
    let (interface, events) = (status.interface()?, status.events);
    assert_eq!(interface.broken(), events.emitted + events.suppressed + events.lost);
    assert_eq!(interface.broken(), sent + u64::from(TRIES));
    assert_eq!(interface.packets("valid"), 502);
    daemon.wait_events(events.emitted as usize, PLENTY)?;
    let (printed, _) = daemon.stop()?;
    assert_eq!(printed.len() as u64, events.emitted, "what is told of a wait is no event");
    Ok(())
}

/// A connection that is not broken has nothing to do with it.
#[test]
fn healthy_connections_leave_no_line() -> Result<()> {
    let lab = LabConfig::default().start()?;
    let server = TcpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
    let socket = Socket::new()?;
    let daemon = socket.run(&lab.a, [""; 0])?;
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(1) {
        lab.a.enter(|| Ok(TcpStream::connect(server.address()).map(drop)?))?;
    }
    let status = socket.vxcsum(["status"])?.stdout;
    assert!(!status.contains("stalls"), "{status}");
    assert_eq!((daemon.stalls()?.len(), daemon.events()?.len()), (0, 0));
    Ok(())
}
