//! `vxcsum check`: captures in any format, compressed or not, damaged or not.

use pcap_file::pcap::PcapReader;
use serde_json::Value;
use vxcsum::check::fuzzing::{Capture, Packet, read};

use crate::assert_one_line;

/// Checks a capture, after a byte that says in what pieces it comes.
pub fn check(data: &[u8]) {
    let Some((&piece, capture)) = data.split_first() else { return };
    let whole = read(capture, usize::MAX).expect("memory can be read");
    let pieces = read(capture, 1 + usize::from(piece)).expect("memory can be read");
    if is_compressed(capture) {
        // How much a decompressor gives before it finds fault depends on how it is fed.
        let common = whole.packets.len().min(pieces.packets.len());
        assert_eq!(whole.packets[..common], pieces.packets[..common]);
        assert_eq!(whole.error.is_some(), pieces.error.is_some());
    } else {
        assert_eq!(whole, pieces);
        agrees_with_pcap_file(capture, &whole);
    }
    let mut last = 0;
    for packet in &whole.packets {
        packet_holds(packet);
        assert!(packet.number > last);
        last = packet.number;
    }
    if let Some(error) = &whole.error {
        assert_one_line(error);
    }
    let [text, json] = &whole.summary;
    text.lines().for_each(assert_one_line);
    let json: Value = serde_json::from_str(json).expect("JSON");
    assert!(json["frames"].as_u64() >= Some(last));
}

fn is_compressed(capture: &[u8]) -> bool {
    capture.starts_with(&[0x1f, 0x8b]) || capture.starts_with(&[0x28, 0xb5, 0x2f, 0xfd])
}

fn packet_holds(packet: &Packet) {
    assert!(packet.bytes.len() <= packet.len);
    let Some((verdict, [line, json])) = &packet.found else { return };
    assert_one_line(line);
    let json: Value = serde_json::from_str(json).expect("JSON");
    assert_eq!(json["verdict"], verdict.as_str());
    assert_eq!(json["frame"], packet.number);
    assert_eq!(json["len"], packet.len);
    if verdict.is_broken() {
        assert_ne!(json["check"], json["expected"]);
    }
}

/// What another reader makes of a pcap file, as far as it comes.
fn agrees_with_pcap_file(capture: &[u8], read: &Capture) {
    let Ok(mut other) = PcapReader::new(capture) else { return };
    for packet in &read.packets {
        let Some(Ok(other)) = other.next_packet() else { return };
        assert_eq!(*other.data, packet.bytes);
        assert_eq!(packet.len, (other.orig_len as usize).max(packet.bytes.len()));
    }
    if read.error.is_none() {
        assert!(other.next_packet().is_none_or(|packet| packet.is_err()), "a packet is missing");
    }
}
