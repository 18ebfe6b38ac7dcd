//! Frames that are broken, or not, and a storm of them.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use nix::errno::Errno;

use crate::netns::NetNs;
use crate::packet::PacketSocket;
use crate::packets::{Check, Ethernet, Frame, Ip, Network, SegmentSum, Transport, Udp, Vxlan};

/// It ends then even if nobody stops it.
const LONGEST: Duration = Duration::from_secs(10);

/// The source port before NAT of [`Packet::stale`].
pub const PORT_BEFORE_NAT: u16 = 40000;
/// For the lab: a device that has no other port to send from is proof enough of where a packet came
/// from that no VXLAN device has sent, and that has no flow hash.
pub const SOURCE_PORTS: (u16, u16) = (PORT_BEFORE_NAT, PORT_BEFORE_NAT + 1);

/// A VXLAN packet from the lab's sending node, with UDP inside.
#[derive(Debug, Clone, Copy)]
pub struct Packet {
    /// Outer checksum.
    pub check: Check,
    /// Outer destination address.
    pub peer: IpAddr,
    /// VXLAN network identifier.
    pub vni: u32,
    /// Inner source port; packets that differ in it are different flows.
    pub inner_sport: u16,
}

impl Packet {
    /// With this checksum, to the lab's receiving node.
    pub fn new(check: Check) -> Self {
        Self { check, peer: Ipv4Addr::new(10, 0, 0, 13).into(), vni: 1, inner_sport: 7000 }
    }

    /// With the checksum of before NAT.
    pub fn stale() -> Self {
        Self::new(Check::Stale { old_port: PORT_BEFORE_NAT, old_address: None })
    }

    /// Its bytes.
    pub fn frame(self) -> Result<Vec<u8>> {
        Ok(self.laid_out()?.bytes)
    }

    /// All of it.
    pub fn laid_out(self) -> Result<Frame> {
        let ends = [Ipv4Addr::new(172, 29, 0, 0), Ipv4Addr::new(172, 29, 2, 0)].map(IpAddr::from);
        let inner = Ip::new(
            ends[0],
            ends[1],
            Transport::Udp(Udp {
                source_port: self.inner_sport,
                destination_port: 53,
                payload: vec![0x5a; 32],
                sum: SegmentSum::Open,
            }),
        );
        let mut vxlan = Vxlan::new(50000, self.check, inner.into());
        vxlan.vni = self.vni;
        let source = Ipv4Addr::new(10, 0, 0, 11).into();
        let outer = Ip::new(source, self.peer, Transport::Vxlan(vxlan));
        Frame::new(&outer.into())
    }
}

/// A frame that is no VXLAN.
pub fn other_frame() -> Result<Vec<u8>> {
    Ok(Frame::new(&Ethernet::of(Network::Arp))?.bytes)
}

/// Frames that leave through a device as fast as they can.
#[derive(Debug)]
pub struct Storm {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<u64>>>,
}

impl Storm {
    /// Starts it: each of `threads` sends all `frames` over and over.
    pub fn start(ns: &NetNs, device: &str, frames: &[Vec<u8>], threads: usize) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let end = Instant::now() + LONGEST;
        let mut storm = Self { stop, threads: Vec::new() };
        for _ in 0..threads {
            let socket = ns.enter(|| PacketSocket::sender(device))?;
            let (stop, frames) = (Arc::clone(&storm.stop), frames.to_vec());
            storm.threads.push(thread::spawn(move || {
                let mut sent = 0;
                while !stop.load(Ordering::Relaxed) && Instant::now() < end {
                    for frame in &frames {
                        match socket.try_send(frame) {
                            // It has been through TC egress, too.
                            Ok(()) | Err(Errno::ENOBUFS) => sent += 1,
                            // The device is gone, and with it the storm.
                            Err(Errno::ENXIO | Errno::ENETDOWN | Errno::ENODEV) => return Ok(sent),
                            Err(error) => return Err(error).context("send a frame"),
                        }
                    }
                }
                Ok(sent)
            }));
        }
        Ok(storm)
    }

    /// Ends it and returns how many frames went through TC egress.
    pub fn stop(mut self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        let mut sent = 0;
        for thread in self.threads.drain(..) {
            sent += thread.join().map_err(|_| anyhow!("a thread of the storm panicked"))??;
        }
        Ok(sent)
    }
}

impl Drop for Storm {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
