//! Traffic of every kind the tests need, bounded in amount and time.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::socket::{self, AddressFamily, SockFlag, SockProtocol, SockType, shutdown, socket};

use crate::netns::NetNs;
use crate::packet::PacketSocket;

/// How long a server waits for a client that has gone silent.
const IDLE: Duration = Duration::from_secs(5);

/// Counts what each connection brings, and tells the client how much it was.
#[derive(Debug)]
pub struct TcpServer {
    address: SocketAddr,
    listener: TcpListener,
    thread: Option<JoinHandle<()>>,
}

impl TcpServer {
    /// Listens inside `ns`; port 0 takes any.
    pub fn start(ns: &NetNs, address: SocketAddr) -> Result<Self> {
        let listener = ns
            .enter(|| TcpListener::bind(address).with_context(|| format!("listen on {address}")))?;
        let accepting = listener.try_clone()?;
        let thread = thread::spawn(move || {
            while let Ok((stream, _)) = accepting.accept() {
                // A client that broke off is the client's failure to report.
                thread::spawn(move || count_bytes(stream));
            }
        });
        Ok(Self { address: listener.local_addr()?, listener, thread: Some(thread) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for TcpServer {
    fn drop(&mut self) {
        // On Linux this ends an accept() that waits.
        let _ = shutdown(self.listener.as_raw_fd(), socket::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn count_bytes(mut stream: TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(IDLE))?;
    let count = io::copy(&mut stream, &mut io::sink())?;
    if count > 0 {
        stream.write_all(&count.to_be_bytes())?;
    }
    Ok(())
}

/// Connects from inside `ns` and returns how long that took.
pub fn connect(ns: &NetNs, to: SocketAddr, timeout: Duration) -> Result<Duration> {
    try_connect(ns, to, timeout)?.with_context(|| format!("no connection to {to} in {timeout:?}"))
}

/// The same; none if nothing answered in time. Any other failure is an error.
pub fn try_connect(ns: &NetNs, to: SocketAddr, timeout: Duration) -> Result<Option<Duration>> {
    ns.enter(|| {
        let start = Instant::now();
        match TcpStream::connect_timeout(&to, timeout) {
            Ok(_) => Ok(Some(start.elapsed())),
            Err(error) if error.kind() == io::ErrorKind::TimedOut => Ok(None),
            Err(error) => Err(error).with_context(|| format!("connect to {to}")),
        }
    })
}

/// Sends `len_bytes` to a [`TcpServer`] and waits until it has confirmed them all.
pub fn send_bulk(
    ns: &NetNs,
    to: SocketAddr,
    len_bytes: usize,
    timeout: Duration,
) -> Result<Duration> {
    send_tcp(ns, to, len_bytes, 64 * 1024, timeout)
}

/// Sends `count` writes of `len_bytes` each, every one in a packet of its own.
pub fn send_small(
    ns: &NetNs,
    to: SocketAddr,
    count: usize,
    len_bytes: usize,
    timeout: Duration,
) -> Result<Duration> {
    send_tcp(ns, to, count * len_bytes, len_bytes, timeout)
}

fn send_tcp(
    ns: &NetNs,
    to: SocketAddr,
    total: usize,
    chunk: usize,
    timeout: Duration,
) -> Result<Duration> {
    ns.enter(|| {
        let start = Instant::now();
        let mut stream =
            TcpStream::connect_timeout(&to, timeout).with_context(|| format!("connect to {to}"))?;
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(timeout))?;
        stream.set_read_timeout(Some(timeout))?;
        let data = vec![0x5a; chunk];
        let mut left = total;
        while left > 0 {
            let now = left.min(chunk);
            stream.write_all(&data[..now]).with_context(|| format!("send to {to}"))?;
            left -= now;
        }
        stream.shutdown(Shutdown::Write)?;
        let mut confirmed = [0; 8];
        stream.read_exact(&mut confirmed).with_context(|| format!("confirmation from {to}"))?;
        let confirmed = u64::from_be_bytes(confirmed);
        ensure!(confirmed == total as u64, "{confirmed} of {total} bytes arrived at {to}");
        Ok(start.elapsed())
    })
}

/// Sends every datagram back.
#[derive(Debug)]
pub struct UdpServer {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl UdpServer {
    /// Listens inside `ns`; port 0 takes any.
    pub fn start(ns: &NetNs, address: SocketAddr) -> Result<Self> {
        let socket =
            ns.enter(|| UdpSocket::bind(address).with_context(|| format!("listen on {address}")))?;
        socket.set_read_timeout(Some(Duration::from_millis(20)))?;
        let address = socket.local_addr()?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut data = vec![0; 65536];
            while !stopped.load(Ordering::Relaxed) {
                if let Ok((len, from)) = socket.recv_from(&mut data) {
                    let _ = socket.send_to(&data[..len], from);
                }
            }
        });
        Ok(Self { address, stop, thread: Some(thread) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for UdpServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Sends a datagram and waits for it to come back from a [`UdpServer`].
pub fn udp_request(
    ns: &NetNs,
    to: SocketAddr,
    payload: &[u8],
    timeout: Duration,
) -> Result<Duration> {
    ns.enter(|| {
        let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect(to)?;
        socket.set_read_timeout(Some(timeout))?;
        let start = Instant::now();
        socket.send(payload)?;
        let mut answer = vec![0; 65536];
        let len = socket.recv(&mut answer).with_context(|| format!("UDP answer from {to}"))?;
        ensure!(answer[..len] == *payload, "the UDP answer from {to} differs");
        Ok(start.elapsed())
    })
}

/// What a resolver in a cluster asks first: an A record of `kubernetes.default.svc.cluster.local`.
pub fn dns_query() -> Vec<u8> {
    let mut query = vec![0x1d, 0x2b, 0x01, 0x00, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in ["kubernetes", "default", "svc", "cluster", "local"] {
        query.push(label.len() as u8);
        query.extend(label.as_bytes());
    }
    query.extend([0, 0, 1, 0, 1]);
    query
}

/// Sends an ICMP echo request with `len_bytes` of data and waits for the answer.
pub fn ping(ns: &NetNs, to: IpAddr, len_bytes: usize, timeout: Duration) -> Result<Duration> {
    const ECHO_REQUEST: (u8, u8) = (8, 128);
    const ECHO_REPLY: (u8, u8) = (0, 129);
    let id = (process::id() as u16).to_be_bytes();
    ns.enter(|| {
        let (socket, request, reply) = match to {
            IpAddr::V4(_) => {
                (raw(AddressFamily::Inet, SockProtocol::Icmp)?, ECHO_REQUEST.0, ECHO_REPLY.0)
            }
            IpAddr::V6(_) => {
                (raw(AddressFamily::Inet6, SockProtocol::IcmpV6)?, ECHO_REQUEST.1, ECHO_REPLY.1)
            }
        };
        socket.set_read_timeout(Some(timeout))?;
        let mut message = vec![request, 0, 0, 0, id[0], id[1], 0, 1];
        message.extend((0..len_bytes).map(|n| n as u8));
        // Over IPv6 the kernel fills the checksum in.
        if to.is_ipv4() {
            let sum = etherparse::checksum::u64_16bit_word::ones_complement(
                etherparse::checksum::u64_16bit_word::add_slice(0, &message),
            );
            message[2..4].copy_from_slice(&sum.to_ne_bytes());
        }
        let start = Instant::now();
        socket.send_to(&message, (to, 0))?;
        let mut answer = vec![0; 65536];
        loop {
            let len = socket.recv(&mut answer).with_context(|| format!("echo reply from {to}"))?;
            // A raw IPv4 socket delivers the IP header as well.
            let skip = if to.is_ipv4() { usize::from(answer[0] & 0x0f) * 4 } else { 0 };
            let answer = answer.get(skip..len).unwrap_or_default();
            if answer.first() == Some(&reply) && answer.get(4..) == message.get(4..) {
                return Ok(start.elapsed());
            }
            ensure!(start.elapsed() < timeout, "no echo reply from {to}");
        }
    })
}

/// The standard library's methods for datagrams serve raw sockets as well.
fn raw(family: AddressFamily, protocol: SockProtocol) -> Result<UdpSocket> {
    let fd = socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
    Ok(UdpSocket::from(fd))
}

/// Sends Ethernet frames through a device as they are; they pass TC egress like any other.
pub fn send_frames(ns: &NetNs, device: &str, frames: &[impl AsRef<[u8]> + Sync]) -> Result<()> {
    ns.enter(|| {
        let socket = PacketSocket::sender(device)?;
        frames.iter().try_for_each(|frame| socket.send(frame.as_ref()))
    })
}
