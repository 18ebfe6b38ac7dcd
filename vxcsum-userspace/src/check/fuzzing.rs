//! For fuzz targets: a capture in memory, read and judged as a file is.

use std::io::{self, Cursor, Read};

use vxcsum_common::{Device, Policy, Verdict};

use super::input::decompressed;
use super::judge::{Judge, Judged};
use super::reader::Reader;
use super::report::{FileSummary, Found, Summary, Totals};

/// Decompressed bytes that are looked at: little input can stand for very much.
const MAX_LEN: u64 = 4 << 20;

/// What was read of a capture.
#[derive(Debug, PartialEq, Eq)]
pub struct Capture {
    /// Its packets.
    pub packets: Vec<Packet>,
    /// Why it was not read to its end.
    pub error: Option<String>,
    /// The summary for people, and as JSON.
    pub summary: [String; 2],
}

/// A packet of a capture.
#[derive(Debug, PartialEq, Eq)]
pub struct Packet {
    /// As Wireshark counts.
    pub number: u64,
    /// What was captured of it.
    pub bytes: Vec<u8>,
    /// Its whole length in bytes.
    pub len: usize,
    /// The verdict, where it is VXLAN, and what is printed of it: the line for people, and the JSON.
    pub found: Option<(Verdict, [String; 2])>,
}

/// Reads and judges a capture that comes in pieces of no more than `piece_len` bytes.
pub fn read(capture: &[u8], piece_len: usize) -> io::Result<Capture> {
    let pieces = Pieces { bytes: Cursor::new(capture.to_vec()), piece_len };
    let mut reader = Reader::new(decompressed(Box::new(pieces))?.take(MAX_LEN));
    let ports = vec![8472, 4789];
    let mut judge =
        Judge::new(&ports, Policy::Unknown, Device::UNKNOWN).map_err(io::Error::other)?;
    let (mut packets, mut totals) = (Vec::new(), Totals::default());
    let error = loop {
        let frame = match reader.next(|| Ok(())) {
            Ok(Some(frame)) => frame,
            Ok(None) => break None,
            Err(error) => break Some(error.to_string()),
        };
        let captured = frame.link.packet(frame.bytes, frame.len);
        let judged = captured.map(|packet| (packet, judge.judge(&packet)));
        let found = match judged {
            Some((packet, Judged::Vxlan(verdict, details))) => {
                totals.count(verdict, frame.len, details.as_ref());
                let found = Found::new("-", &frame, &packet, verdict, details.as_ref());
                Some((verdict, [found.to_string(), serde_json::to_string(&found)?]))
            }
            _ => None,
        };
        let (number, bytes, len) = (frame.number, frame.bytes.to_vec(), frame.len);
        packets.push(Packet { number, bytes, len, found });
    };
    totals.frames = reader.frames;
    totals.premature = judge.premature();
    let file = FileSummary {
        file: "-".to_owned(),
        totals: totals.clone(),
        learned: judge.lessons(),
        error: error.clone(),
    };
    let summary = Summary { totals, files: vec![file], ports };
    let summary = [summary.to_string(), serde_json::to_string(&summary)?];
    Ok(Capture { packets, error, summary })
}

struct Pieces {
    bytes: Cursor<Vec<u8>>,
    piece_len: usize,
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = buffer.len().min(self.piece_len);
        self.bytes.read(&mut buffer[..len])
    }
}
