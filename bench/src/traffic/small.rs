//! Small packets, as many as one processor can send.

use std::io::IoSlice;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrIn, sendmmsg};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;
use vxcsum_tests::lab::{NIC, VXLAN};
use vxcsum_tests::netns::NetNs;

use super::subject::{Busy, PORT, Sample};
use super::{SENDER_CPU, SETTLE};

/// Data of a packet, in bytes: some 160 on the wire.
pub(super) const LEN: usize = 64;
/// An address in the overlay.
const PEER: Ipv4Addr = Ipv4Addr::new(172, 29, 2, 0);

/// A node with a VXLAN device whose NIC takes everything, and throws it away as sent.
pub(super) struct Small {
    pub(super) node: NetNs,
}

impl Small {
    /// Sets it up.
    pub(super) fn new() -> Result<Self> {
        let node = NetNs::new("sender")?;
        // A packet that is dropped anywhere on this machine is looked at by the receiver's side of
        // vxcsum, which would not be so on a real wire. These two count it as sent: the second throws
        // away what was not redirected to it.
        let add = |kind| node.ip(&format!("link add {NIC} type {kind}"));
        add("dummy").or_else(|_| add("ifb")).context("a NIC that takes everything")?;
        node.ip(&format!(
            "addr add 10.0.0.11/24 dev {NIC}\n\
             link set {NIC} up\n\
             neigh replace 10.0.0.13 lladdr 02:00:00:00:00:0b dev {NIC} nud permanent\n\
             link add {VXLAN} type vxlan id 1 local 10.0.0.11 remote 10.0.0.13 dev {NIC} \
             dstport {PORT} udpcsum\n\
             addr add 172.29.0.0/32 dev {VXLAN}\n\
             link set {VXLAN} up\n\
             route add {PEER}/32 dev {VXLAN}\n\
             neigh replace {PEER} lladdr 02:00:00:00:02:0b dev {VXLAN} nud permanent"
        ))?;
        node.run(&format!("tc qdisc replace dev {NIC} root noqueue"))?;
        Ok(Self { node })
    }

    /// Datagrams from one processor as fast as it can; packets a second of that processor's time, which
    /// is that of the clock unless others want the processor, too.
    pub(super) fn send(&self, duration: Duration, pid: Option<u32>) -> Result<Sample> {
        let to = SocketAddr::from((PEER, 9));
        self.node.enter(|| {
            let mut cpu = CpuSet::new();
            cpu.set(SENDER_CPU)?;
            sched_setaffinity(Pid::from_raw(0), &cpu).context("stay on one processor")?;
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.connect(to)?;
            send_for(&socket, SETTLE)?;
            let busy = Busy::start(pid)?;
            let cpu_time =
                || anyhow::Ok(Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?));
            let before = cpu_time()?;
            let sent = send_for(&socket, duration)?;
            busy.stop(sent as f64 / cpu_time()?.saturating_sub(before).as_secs_f64())
        })
    }
}

/// How many could be sent.
fn send_for(socket: &UdpSocket, duration: Duration) -> Result<usize> {
    const BATCH: usize = 64;
    let data = [0x5a; LEN];
    let slices = [[IoSlice::new(&data)]; BATCH];
    let nowhere_else: [Option<SockaddrIn>; BATCH] = [None; BATCH];
    let mut headers = MultiHeaders::preallocate(BATCH, None);
    let (end, mut sent) = (Instant::now() + duration, 0);
    while Instant::now() < end {
        let flags = MsgFlags::empty();
        let fd = socket.as_raw_fd();
        match sendmmsg(fd, &mut headers, &slices, nowhere_else, [], flags) {
            Ok(results) => sent += results.count(),
            Err(Errno::ENOBUFS) => {}
            Err(error) => return Err(error).context("send datagrams"),
        }
    }
    Ok(sent)
}
