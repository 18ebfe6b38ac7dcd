//! Captures, as tcpdump would make them, and what tcpdump says of them.
//!
//! The frames come from a packet socket of our own, as tcpdump's do: it has taken part from the
//! moment it is there, and it can be emptied, so that nothing is missed at either end.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{self, Command};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use pcap_file::pcap::{PcapHeader, PcapPacket, PcapWriter};

use crate::netns::NetNs;
use crate::packet::PacketSocket;
use crate::sh;

/// GSO packets are 64 KiB and a header.
const MAX_FRAME_BYTES: u32 = 1 << 18;

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Which way packets pass the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Received.
    In,
    /// Sent: as they are after TC egress, sums that the NIC is to finish still open.
    Out,
    /// Both.
    Both,
}

/// A capture that is running.
#[derive(Debug)]
pub struct Capture {
    socket: PacketSocket,
    direction: Direction,
}

impl Capture {
    /// From here on nothing that passes `device` in `ns` is missed.
    pub fn start(ns: &NetNs, device: &str, direction: Direction) -> Result<Self> {
        Ok(Self { socket: ns.enter(|| PacketSocket::tap(device))?, direction })
    }

    /// Ends the capture. A frame that was lost is an error.
    pub fn stop(mut self) -> Result<Recording> {
        let mut frames = Vec::new();
        while let Some((frame, sent)) = self.socket.receive()? {
            match (self.direction, sent) {
                (Direction::In, true) | (Direction::Out, false) => {}
                _ => frames.push(frame),
            }
        }
        let lost = self.socket.lost()?;
        ensure!(lost == 0, "{lost} frames did not fit into the capture's buffer");
        Ok(Recording { frames })
    }
}

/// Captured frames, in order, from the Ethernet header on, a VLAN tag where it belongs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recording {
    /// The frames.
    pub frames: Vec<Vec<u8>>,
}

/// What tcpdump says of the outer checksums in a capture file.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TcpdumpVerdicts {
    /// `bad udp cksum`
    pub bad: usize,
    /// `udp sum ok`
    pub ok: usize,
    /// `no cksum`
    pub none: usize,
}

impl Recording {
    /// Writes a capture file, which is there as long as the value.
    pub fn file(&self) -> Result<CaptureFile> {
        let file = CaptureFile::new();
        let open = File::create(file.path()).with_context(|| file.path.display().to_string())?;
        let header = PcapHeader { snaplen: MAX_FRAME_BYTES, ..PcapHeader::default() };
        let mut writer = PcapWriter::with_header(open, header).context("write a capture")?;
        for (number, frame) in self.frames.iter().enumerate() {
            // When exactly is nobody's concern, only the order.
            let time = Duration::from_millis(number as u64);
            let packet = PcapPacket::new(time, frame.len() as u32, frame);
            writer.write_packet(&packet).context("write a capture")?;
        }
        Ok(file)
    }

    /// Everything tcpdump has to say about the capture.
    pub fn tcpdump_text(&self) -> Result<String> {
        let file = self.file()?;
        let mut command = Command::new("tcpdump");
        // As root: Debian's tcpdump would read the file as another user.
        sh::output(command.args(["-Z", "root", "-t", "-n", "-vv", "-r"]).arg(file.path()))
    }

    /// What tcpdump says of the outer checksum of datagrams to `port`.
    pub fn tcpdump_verdicts(&self, port: u16) -> Result<TcpdumpVerdicts> {
        let mut verdicts = TcpdumpVerdicts::default();
        let outer = format!(".{port}: [");
        for line in self.tcpdump_text()?.lines() {
            let Some((_, said)) = line.split_once(&outer) else { continue };
            if said.starts_with("bad udp cksum") {
                verdicts.bad += 1;
            } else if said.starts_with("udp sum ok") {
                verdicts.ok += 1;
            } else if said.starts_with("no cksum") {
                verdicts.none += 1;
            }
        }
        Ok(verdicts)
    }
}

/// A capture file, removed on drop.
#[derive(Debug)]
pub struct CaptureFile {
    path: PathBuf,
}

impl CaptureFile {
    fn new() -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("vxcsum-tests-{}-{number}.pcap", process::id());
        Self { path: std::env::temp_dir().join(name) }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for CaptureFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}
