//! Packets out of pcap and pcapng, as a stream: nothing is held but the packet at hand.
//!
//! `pcap-parser` knows the formats. The buffer is ours, because a reader has to know the length of a
//! block before it waits for the rest: a length that makes no sense is then told with its place in
//! the file, and not taken for a reason to read on.

use std::io::{self, Read};
use std::time::{Duration, SystemTime};

use pcap_parser::nom::{self, Needed};
use pcap_parser::pcapng::{
    EnhancedPacketBlock, InterfaceDescriptionBlock, OptionCode, SimplePacketBlock,
    parse_enhancedpacketblock_be, parse_enhancedpacketblock_le, parse_interfacedescriptionblock_be,
    parse_interfacedescriptionblock_le, parse_sectionheaderblock, parse_simplepacketblock_be,
    parse_simplepacketblock_le,
};
use pcap_parser::{
    EPB_MAGIC, IDB_MAGIC, LegacyPcapBlock, PcapError, PcapHeader, SHB_MAGIC, SPB_MAGIC,
    parse_pcap_frame, parse_pcap_frame_be, parse_pcap_frame_modified, parse_pcap_header,
};
use thiserror::Error;

use super::link::Link;

/// Read at a time: stays in the processor's cache until it is judged.
const BUFFER_LEN: usize = 256 * 1024;
/// What libpcap takes for the longest packet of all (`MAXIMUM_SNAPLEN`), unless the file says more.
const MAX_SNAPLEN: usize = 262_144;
/// What libpcap takes for the longest block (`INITIAL_MAX_BLOCKSIZE`).
const MAX_BLOCK_LEN: usize = 16 * 1024 * 1024;

/// Length of the header of a pcap file.
const PCAP_HEADER_LEN: usize = 24;
/// Length of the header of a packet in it.
const RECORD_HEADER_LEN: usize = 16;
/// Type, length, and the byte-order magic of a section header.
const BLOCK_START_LEN: usize = 12;
/// Where the data of a packet begins in its block.
const ENHANCED_DATA: usize = 28;
const SIMPLE_DATA: usize = 12;
/// The predecessor of the enhanced packet block, not written since 2009.
const OBSOLETE_PACKET: u32 = 2;
/// Wireshark numbers these among the packets.
const JOURNAL_ENTRY: u32 = 9;

/// Why reading ends before the end. Offsets are in bytes from the start of the capture, decompressed.
#[derive(Debug, Error)]
pub(super) enum ReadError {
    /// The file has no bytes.
    #[error("it is empty")]
    Empty,
    /// Neither format.
    #[error(
        "it is not a capture (starts with {0}): pcap and pcapng are read, plain or compressed with \
         gzip or zstd"
    )]
    NotACapture(String),
    /// Not a version that is known.
    #[error("pcapng version {0} is not known, only 1")]
    Version(u16),
    /// The rest is missing.
    #[error(
        "it ends within packet {frame} (byte {offset}): cut short, or still being written; {} \
         before it", read(*.frame)
    )]
    Cut { frame: u64, offset: u64 },
    /// The compressed stream ends early.
    #[error(
        "its compressed data end within packet {frame} (byte {offset} of the capture): cut short, or \
         still being written; {} before it", read(*.frame)
    )]
    CutCompressed { frame: u64, offset: u64 },
    /// A length that cannot be.
    #[error(
        "packet {frame} (byte {offset}) claims {len} bytes: the file is damaged from there on; {} \
         before it", read(*.frame)
    )]
    Length { frame: u64, offset: u64, len: u64 },
    /// A block of pcapng that contradicts itself.
    #[error(
        "the block at byte {offset}, before packet {frame} is over, {what}: the file is damaged from \
         there on; {} before it", read(*.frame)
    )]
    Block { frame: u64, offset: u64, what: &'static str },
    /// The operating system, or a decompressor.
    #[error("cannot read on at packet {frame} (byte {offset}): {error}")]
    Io { frame: u64, offset: u64, error: io::Error },
}

impl ReadError {
    /// Whether it is only that the end is missing.
    pub(super) const fn is_cut(&self) -> bool {
        matches!(self, Self::Cut { .. } | Self::CutCompressed { .. })
    }
}

/// What was read before a frame.
fn read(frame: u64) -> String {
    match frame - 1 {
        0 => "nothing was read".to_owned(),
        1 => "1 packet was read".to_owned(),
        count => format!("{count} packets were read"),
    }
}

/// A packet of a capture.
#[derive(Clone, Copy, Debug)]
pub(super) struct Frame<'a> {
    /// As Wireshark counts, from 1.
    pub(super) number: u64,
    pub(super) time: Time,
    pub(super) link: Link,
    /// Name of the interface, where the file has it.
    pub(super) interface: Option<&'a str>,
    /// What was captured of it.
    pub(super) bytes: &'a [u8],
    /// Its whole length in bytes.
    pub(super) len: usize,
}

/// When a packet was captured, as the file has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Time {
    /// Since 1970, in units of a second's `resolution`-th part; `None` where there is none.
    units: Option<u64>,
    /// Units in a second.
    resolution: u64,
    /// Seconds to add.
    offset: i64,
}

impl Time {
    /// As the system has it; `None` also for what no calendar of four-digit years has.
    pub(super) fn system_time(self) -> Option<SystemTime> {
        /// The end of the year 9999.
        const END: i64 = 253_402_300_800;
        let units = self.units?;
        let seconds = i64::try_from(units / self.resolution).ok()?.checked_add(self.offset)?;
        let rest = u128::from(units % self.resolution) * 1_000_000_000;
        let nanoseconds = (rest / u128::from(self.resolution)) as u32;
        if !(0..END).contains(&seconds) {
            return None;
        }
        let since = Duration::new(seconds.cast_unsigned(), nanoseconds);
        SystemTime::UNIX_EPOCH.checked_add(since)
    }
}

/// Reads one capture.
pub(super) struct Reader<R> {
    input: R,
    buffer: Vec<u8>,
    /// What of the buffer is still to be read.
    start: usize,
    end: usize,
    /// Place of `start` in the capture, in bytes.
    offset: u64,
    is_at_end: bool,
    format: Format,
    /// Packets so far, as Wireshark counts.
    pub(super) frames: u64,
    /// Of these: in a format that nobody writes any more, not read.
    pub(super) obsolete: u64,
    /// Of these: other than packets of a network.
    pub(super) others: u64,
}

#[derive(Debug)]
enum Format {
    /// Not known before the first bytes are there.
    Unknown,
    Pcap {
        header: PcapHeader,
        parse: RecordParser,
        link: Link,
        max_len: usize,
    },
    PcapNg {
        is_big_endian: bool,
        interfaces: Vec<Interface>,
    },
}

type RecordParser = fn(&[u8]) -> nom::IResult<&[u8], LegacyPcapBlock<'_>, PcapError<&[u8]>>;

#[derive(Debug)]
struct Interface {
    link: Link,
    name: Option<String>,
    snaplen: usize,
    resolution: u64,
    offset: i64,
}

/// Where a packet is.
struct Place {
    /// In the buffer.
    data: usize,
    captured: usize,
    len: usize,
    /// All of its record.
    record_len: usize,
    time: Time,
    /// Index among the interfaces of pcapng.
    interface: usize,
}

impl<R: Read> Reader<R> {
    pub(super) fn new(input: R) -> Self {
        Self {
            input,
            buffer: vec![0; BUFFER_LEN],
            start: 0,
            end: 0,
            offset: 0,
            is_at_end: false,
            format: Format::Unknown,
            frames: 0,
            obsolete: 0,
            others: 0,
        }
    }

    /// The next packet. `before_read` is called before waiting for more input.
    pub(super) fn next(
        &mut self,
        mut before_read: impl FnMut() -> io::Result<()>,
    ) -> Result<Option<Frame<'_>>, ReadError> {
        if matches!(self.format, Format::Unknown) {
            self.read_format(&mut before_read)?;
        }
        let place = match self.format {
            Format::Pcap { .. } => self.next_record(&mut before_read)?,
            _ => self.next_packet_block(&mut before_read)?,
        };
        let Some(place) = place else { return Ok(None) };
        self.frames += 1;
        let data = self.start + place.data;
        self.advance(place.record_len);
        let (link, interface) = match &self.format {
            Format::Pcap { link, .. } => (*link, None),
            Format::PcapNg { interfaces, .. } => {
                let interface = &interfaces[place.interface];
                (interface.link, interface.name.as_deref())
            }
            Format::Unknown => return Ok(None),
        };
        Ok(Some(Frame {
            number: self.frames,
            time: place.time,
            link,
            interface,
            bytes: &self.buffer[data..data + place.captured],
            len: place.len.max(place.captured),
        }))
    }

    /// What was read and not yet taken.
    fn rest(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    fn advance(&mut self, len: usize) {
        self.start += len;
        self.offset += len as u64;
    }

    /// Reads until there are `len` bytes; false where the capture ends before.
    fn fill(
        &mut self,
        len: usize,
        before_read: &mut impl FnMut() -> io::Result<()>,
    ) -> Result<bool, ReadError> {
        if self.end - self.start >= len {
            return Ok(true);
        }
        if self.buffer.len() - self.start < len {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
            self.buffer.resize(len.max(BUFFER_LEN), 0);
        }
        while self.end - self.start < len && !self.is_at_end {
            let read = before_read().and_then(|()| self.input.read(&mut self.buffer[self.end..]));
            match read {
                Ok(0) => self.is_at_end = true,
                Ok(len) => self.end += len,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.io_error(error)),
            }
        }
        Ok(self.end - self.start >= len)
    }

    fn io_error(&self, error: io::Error) -> ReadError {
        let (frame, offset) = (self.frames + 1, self.offset);
        if error.kind() == io::ErrorKind::UnexpectedEof {
            ReadError::CutCompressed { frame, offset }
        } else {
            ReadError::Io { frame, offset, error }
        }
    }

    fn cut(&self) -> ReadError {
        ReadError::Cut { frame: self.frames + 1, offset: self.offset }
    }

    fn damaged(&self, what: &'static str) -> ReadError {
        ReadError::Block { frame: self.frames + 1, offset: self.offset, what }
    }

    fn read_format(
        &mut self,
        before_read: &mut impl FnMut() -> io::Result<()>,
    ) -> Result<(), ReadError> {
        let is_whole = self.fill(PCAP_HEADER_LEN, before_read)?;
        let start = self.rest();
        if start.is_empty() {
            return Err(ReadError::Empty);
        }
        if start.starts_with(&SHB_MAGIC.to_le_bytes()) {
            self.format = Format::PcapNg { is_big_endian: false, interfaces: Vec::new() };
            return Ok(());
        }
        let header = match parse_pcap_header(start) {
            Ok((_, header)) if is_whole => header,
            Err(nom::Err::Incomplete(_)) if start.len() >= 4 => return Err(self.cut()),
            _ => {
                let bytes: Vec<_> =
                    start.iter().take(8).map(|byte| format!("{byte:02x}")).collect();
                return Err(ReadError::NotACapture(bytes.join(" ")));
            }
        };
        self.format = Format::Pcap {
            parse: if header.is_modified_format() {
                parse_pcap_frame_modified
            } else if header.is_bigendian() {
                parse_pcap_frame_be
            } else {
                parse_pcap_frame
            },
            // The upper bits tell of a frame check sequence, which changes nothing here.
            link: Link::new(header.network.0 & 0xffff),
            max_len: (header.snaplen as usize).clamp(MAX_SNAPLEN, MAX_BLOCK_LEN),
            header,
        };
        self.advance(PCAP_HEADER_LEN);
        Ok(())
    }

    fn next_record(
        &mut self,
        before_read: &mut impl FnMut() -> io::Result<()>,
    ) -> Result<Option<Place>, ReadError> {
        loop {
            let Format::Pcap { header, parse, max_len, .. } = &self.format else { return Ok(None) };
            let rest = self.rest();
            let missing = match parse(rest) {
                Ok((after, record)) => {
                    let captured = record.data.len();
                    let resolution =
                        if header.is_nanosecond_precision() { 1_000_000_000 } else { 1_000_000 };
                    let time = u64::from(record.ts_sec) * resolution + u64::from(record.ts_usec);
                    let record_len = rest.len() - after.len();
                    return Ok(Some(Place {
                        data: record_len - captured,
                        captured,
                        len: record.origlen as usize,
                        record_len,
                        time: Time { units: Some(time), resolution, offset: 0 },
                        interface: 0,
                    }));
                }
                Err(nom::Err::Incomplete(Needed::Size(missing))) => missing.get(),
                Err(_) => return Err(self.damaged("is none")),
            };
            let len = rest.len() + missing;
            if len > max_len + RECORD_HEADER_LEN {
                let (frame, offset) = (self.frames + 1, self.offset);
                let len = (len - RECORD_HEADER_LEN) as u64;
                return Err(ReadError::Length { frame, offset, len });
            }
            if !self.fill(len, before_read)? {
                return if self.rest().is_empty() { Ok(None) } else { Err(self.cut()) };
            }
        }
    }

    /// Looks through other blocks for the next packet.
    fn next_packet_block(
        &mut self,
        before_read: &mut impl FnMut() -> io::Result<()>,
    ) -> Result<Option<Place>, ReadError> {
        loop {
            if !self.fill(BLOCK_START_LEN, before_read)? {
                return if self.rest().is_empty() { Ok(None) } else { Err(self.cut()) };
            }
            let (kind, len) = self.block_start()?;
            if !self.fill(len, before_read)? {
                return Err(self.cut());
            }
            match kind {
                SHB_MAGIC => self.start_section(len)?,
                IDB_MAGIC => self.add_interface(len)?,
                EPB_MAGIC => return self.enhanced_packet(len).map(Some),
                SPB_MAGIC => return self.simple_packet(len).map(Some),
                OBSOLETE_PACKET => {
                    self.frames += 1;
                    self.obsolete += 1;
                }
                JOURNAL_ENTRY => {
                    self.frames += 1;
                    self.others += 1;
                }
                _ => {}
            }
            self.advance(len);
        }
    }

    /// Type and length of the block at hand.
    fn block_start(&mut self) -> Result<(u32, usize), ReadError> {
        let rest = self.rest();
        let word = |at: usize| [rest[at], rest[at + 1], rest[at + 2], rest[at + 3]];
        // The same in both byte orders.
        let is_section = u32::from_le_bytes(word(0)) == SHB_MAGIC;
        let is_big_endian = match &self.format {
            _ if is_section => match word(8) {
                [0x1a, 0x2b, 0x3c, 0x4d] => true,
                [0x4d, 0x3c, 0x2b, 0x1a] => false,
                _ => return Err(self.damaged("has no byte order")),
            },
            Format::PcapNg { is_big_endian, .. } => *is_big_endian,
            _ => false,
        };
        let read = if is_big_endian { u32::from_be_bytes } else { u32::from_le_bytes };
        let (kind, len) = (read(word(0)), read(word(4)) as usize);
        if len > MAX_BLOCK_LEN {
            let (frame, offset) = (self.frames + 1, self.offset);
            return Err(ReadError::Length { frame, offset, len: len as u64 });
        }
        if len < BLOCK_START_LEN || !len.is_multiple_of(4) {
            return Err(self.damaged("has a length that no block has"));
        }
        if is_section {
            self.format = Format::PcapNg { is_big_endian, interfaces: Vec::new() };
        }
        Ok((kind, len))
    }

    /// The block at hand, all of which is there, by the parser for its byte order.
    fn parsed<'a, T>(
        &'a self,
        len: usize,
        little: BlockParser<'a, T>,
        big: BlockParser<'a, T>,
    ) -> Result<T, ReadError> {
        let parse = if self.is_big_endian() { big } else { little };
        // Also what the parser takes for incomplete is damaged: nothing is missing.
        let (_, block) = parse(&self.rest()[..len])
            .map_err(|_: nom::Err<_>| self.damaged("contradicts itself"))?;
        Ok(block)
    }

    const fn is_big_endian(&self) -> bool {
        matches!(self.format, Format::PcapNg { is_big_endian: true, .. })
    }

    fn start_section(&self, len: usize) -> Result<(), ReadError> {
        let header = self.parsed(len, parse_sectionheaderblock, parse_sectionheaderblock)?;
        match header.major_version {
            1 => Ok(()),
            version => Err(ReadError::Version(version)),
        }
    }

    fn add_interface(&mut self, len: usize) -> Result<(), ReadError> {
        let block: InterfaceDescriptionBlock<'_> = self.parsed(
            len,
            parse_interfacedescriptionblock_le,
            parse_interfacedescriptionblock_be,
        )?;
        let offset = block.options.iter().find(|option| option.code == OptionCode::IfTsoffset);
        let offset = offset.and_then(|option| option.value().first_chunk().copied());
        let read = if self.is_big_endian() { i64::from_be_bytes } else { i64::from_le_bytes };
        let interface = Interface {
            link: Link::new(block.linktype.0),
            // It will be printed, and whoever wrote the file may have put anything there.
            name: block
                .if_name()
                .and_then(Result::ok)
                .map(|name| name.replace(char::is_control, "\u{fffd}")),
            snaplen: match block.snaplen {
                0 => usize::MAX,
                snaplen => snaplen as usize,
            },
            resolution: resolution(block.if_tsresol)
                .ok_or_else(|| self.damaged("has a time resolution that no clock has"))?,
            offset: offset.map_or(0, read),
        };
        if let Format::PcapNg { interfaces, .. } = &mut self.format {
            interfaces.push(interface);
        }
        Ok(())
    }

    fn interface(&self, index: usize) -> Result<&Interface, ReadError> {
        let interface = match &self.format {
            Format::PcapNg { interfaces, .. } => interfaces.get(index),
            _ => None,
        };
        interface.ok_or_else(|| self.damaged("is of an interface that was not described"))
    }

    fn enhanced_packet(&self, len: usize) -> Result<Place, ReadError> {
        let block: EnhancedPacketBlock<'_> =
            self.parsed(len, parse_enhancedpacketblock_le, parse_enhancedpacketblock_be)?;
        let index = block.if_id as usize;
        let interface = self.interface(index)?;
        let units = u64::from(block.ts_high) << 32 | u64::from(block.ts_low);
        Ok(Place {
            data: ENHANCED_DATA,
            captured: block.data.len().min(block.caplen as usize),
            len: block.origlen as usize,
            record_len: len,
            time: Time {
                units: Some(units),
                resolution: interface.resolution,
                offset: interface.offset,
            },
            interface: index,
        })
    }

    fn simple_packet(&self, len: usize) -> Result<Place, ReadError> {
        let block: SimplePacketBlock<'_> =
            self.parsed(len, parse_simplepacketblock_le, parse_simplepacketblock_be)?;
        let interface = self.interface(0)?;
        Ok(Place {
            data: SIMPLE_DATA,
            captured: block.data.len().min(block.origlen as usize).min(interface.snaplen),
            len: block.origlen as usize,
            record_len: len,
            time: Time { units: None, resolution: 1, offset: 0 },
            interface: 0,
        })
    }
}

type BlockParser<'a, T> = fn(&'a [u8]) -> nom::IResult<&'a [u8], T, PcapError<&'a [u8]>>;

/// Units in a second by the `if_tsresol` option (pcapng draft §4.2): a negative power of 10, or of 2
/// where the highest bit is set.
const fn resolution(if_tsresol: u8) -> Option<u64> {
    let exponent = (if_tsresol & 0x7f) as u32;
    if if_tsresol & 0x80 == 0 { 10_u64.checked_pow(exponent) } else { 1_u64.checked_shl(exponent) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nanoseconds(units: u64, resolution: u64, offset: i64) -> Option<u128> {
        let time = Time { units: Some(units), resolution, offset }.system_time()?;
        Some(time.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos())
    }

    #[test]
    fn times_of_any_resolution() {
        for (if_tsresol, units, expected) in [
            (6, 1_500_000, Some(1_500_000_000)),
            (9, 1_500_000_001, Some(1_500_000_001)),
            (0, 3, Some(3_000_000_000)),
            (19, 15_000_000_000_000_000_000, Some(1_500_000_000)),
            (0x8a, 1536, Some(1_500_000_000)),
            (0xbf, 3 << 62, Some(1_500_000_000)),
            (0, u64::MAX, None),
        ] {
            let resolution = resolution(if_tsresol).unwrap();
            assert_eq!(nanoseconds(units, resolution, 0), expected, "{if_tsresol:#x}");
        }
        assert_eq!(resolution(20), None);
        assert_eq!(resolution(0xc0), None);
        assert_eq!(nanoseconds(7, 1, -5), Some(2_000_000_000));
        assert_eq!(nanoseconds(7, 1, -8), None);
        assert_eq!(nanoseconds(7, 1, i64::MAX), None);
        // humantime prints four digits of the year, and no more.
        assert!(nanoseconds(253_402_300_799, 1, 0).is_some());
        assert_eq!(nanoseconds(253_402_300_800, 1, 0), None);
    }

    /// A block of pcapng, big-endian where asked for.
    fn block(is_big_endian: bool, kind: u32, words: &[u32], data: &[u8]) -> Vec<u8> {
        let len = 12 + 4 * words.len() + data.len();
        let all = [kind, u32::try_from(len).unwrap()].into_iter().chain(words.iter().copied());
        let bytes = |word: u32| if is_big_endian { word.to_be_bytes() } else { word.to_le_bytes() };
        let mut block: Vec<u8> = all.flat_map(bytes).collect();
        block.extend(data);
        block.extend(bytes(len as u32));
        block
    }

    type Seen = (u64, Option<SystemTime>, Link, Option<String>, Vec<u8>, usize);

    fn read_all(capture: &[u8]) -> Vec<Seen> {
        let mut reader = Reader::new(capture);
        let mut seen = Vec::new();
        while let Some(frame) = reader.next(|| Ok(())).unwrap() {
            let Frame { number, time, link, interface, bytes, len } = frame;
            let interface = interface.map(str::to_owned);
            seen.push((number, time.system_time(), link, interface, bytes.to_vec(), len));
        }
        seen
    }

    #[test]
    fn sections_and_interfaces_differ() {
        let mut capture = Vec::new();
        for is_big_endian in [false, true] {
            let block = |kind, words: &[u32], data: &[u8]| block(is_big_endian, kind, words, data);
            let half = |high: u16, low: u16| {
                let (high, low) = (u32::from(high), u32::from(low));
                if is_big_endian { high << 16 | low } else { low << 16 | high }
            };
            capture.extend(block(SHB_MAGIC, &[0x1a2b_3c4d, half(1, 0), u32::MAX, u32::MAX], &[]));
            // Raw IP, cut to 5 bytes; Ethernet, called eth0, in milliseconds, an hour ahead.
            capture.extend(block(IDB_MAGIC, &[half(101, 0), 5], &[]));
            let hour: [u32; 2] = if is_big_endian { [0, 3600] } else { [3600, 0] };
            let ethernet = [&[half(1, 0), 0, half(2, 4)][..], &[u32::from_ne_bytes(*b"eth0")]];
            let mut words = ethernet.concat();
            if is_big_endian != cfg!(target_endian = "big") {
                words[3] = words[3].swap_bytes();
            }
            words.extend([half(9, 1)]);
            words.push(if is_big_endian { 3 << 24 } else { 3 });
            words.extend([half(14, 8), hour[0], hour[1], 0]);
            capture.extend(block(IDB_MAGIC, &words, &[]));
            // Of a kind that nobody knows.
            capture.extend(block(0x0bad_cafe, &[1, 2, 3], &[]));
            capture.extend(block(SPB_MAGIC, &[9], &[1, 2, 3, 4, 5, 0, 0, 0]));
            capture.extend(block(OBSOLETE_PACKET, &[0; 5], &[]));
            capture.extend(block(JOURNAL_ENTRY, &[0; 2], &[]));
            capture.extend(block(EPB_MAGIC, &[1, 0, 1500, 3, 60], &[7, 8, 9, 0]));
        }
        let time = SystemTime::UNIX_EPOCH + Duration::from_millis(3_601_500);
        let simple = |number| (number, None, Link::RawIp, None, vec![1, 2, 3, 4, 5], 9);
        let enhanced = |number| {
            let name = Some("eth0".to_owned());
            (number, Some(time), Link::Ethernet, name, vec![7, 8, 9], 60)
        };
        assert_eq!(read_all(&capture), [simple(1), enhanced(4), simple(5), enhanced(8)]);
    }

    #[test]
    fn nothing_in_a_name_of_an_interface_reaches_a_terminal_as_it_is() {
        let mut capture = block(false, SHB_MAGIC, &[0x1a2b_3c4d, 1, u32::MAX, u32::MAX], &[]);
        let name = [&[2, 0, 10, 0][..], b"e\x1b[2J\xc2\x9b\\d\n", &[0; 2], &[0; 4]].concat();
        capture.extend(block(false, IDB_MAGIC, &[1, 0], &name));
        capture.extend(block(false, EPB_MAGIC, &[0, 0, 0, 0, 0], &[]));
        let (_, _, _, interface, ..) = read_all(&capture).remove(0);
        assert_eq!(interface.unwrap(), "e\u{fffd}[2J\u{fffd}\\d\u{fffd}");
    }

    #[test]
    fn packets_longer_than_the_buffer_and_across_its_end() {
        let mut capture = Vec::new();
        capture
            .extend([0xa1b2_3c4d, 0x0004_0002, 0, 0, 4_000_000, 1].map(u32::to_le_bytes).concat());
        let lens = [BUFFER_LEN - 100, 200, 3 * BUFFER_LEN, 0, 1];
        for (byte, len) in (1..).zip(lens) {
            let len = u32::try_from(len).unwrap();
            capture.extend([1, 5, len, len + 4].map(u32::to_le_bytes).concat());
            capture.resize(capture.len() + len as usize, byte);
        }
        let seen = read_all(&capture);
        assert_eq!(seen.len(), lens.len());
        for ((byte, len), (_, time, _, _, bytes, whole)) in (1..).zip(lens).zip(seen) {
            assert!(bytes.iter().all(|&other| other == byte));
            assert_eq!((bytes.len(), whole), (len, len + 4));
            let time = time.unwrap().duration_since(SystemTime::UNIX_EPOCH).unwrap();
            assert_eq!(time.as_nanos(), 1_000_000_005);
        }
    }
}
