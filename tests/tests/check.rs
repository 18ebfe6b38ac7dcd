//! `vxcsum check`: captures of the labs, and of what tcpdump writes there, judged as the kernel's
//! side judges packets. Wireshark is the oracle wherever every sum is filled in.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use serde_json::Value;
use vxcsum_tests::capture::{Capture, Direction, Recording};
use vxcsum_tests::check::{
    Checked, Status, Tcpdump, check, check_json, check_json_piped, compress, editcap, tshark,
};
use vxcsum_tests::conntrack;
use vxcsum_tests::counters;
use vxcsum_tests::daemon::binary;
use vxcsum_tests::folder::Folder;
use vxcsum_tests::lab::{
    Family, InnerNeighbours, Lab, LabConfig, NIC, Nat, OuterSum, PodSums, Underlay,
};
use vxcsum_tests::packets::{Check, Ethernet, Frame, Ip, SegmentSum, Transport, Udp, VLAN, Vxlan};
use vxcsum_tests::traffic::{self, TcpServer, UdpServer};
use vxcsum_tests::wait::wait_until;
use vxcsum_tests::workload::everything;

const STALL: Duration = Duration::from_millis(300);
const LOST: Duration = Duration::from_millis(50);
const PLENTY: Duration = Duration::from_secs(30);
const MASQUERADE: Nat = Nat::Masquerade { random_fully: true };

/// Healthy traffic first, and then packets that get lost.
fn all_traffic(lab: &Lab, nat: Nat) -> Result<()> {
    everything(lab)?;
    lab.enable_nat(nat)?;
    lost_traffic(lab)
}

fn lost_traffic(lab: &Lab) -> Result<()> {
    let tcp = TcpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
    let udp = UdpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
    assert_eq!(traffic::try_connect(&lab.a, tcp.address(), STALL)?, None);
    for len_bytes in [1, 2, 33, 1200] {
        assert!(traffic::udp_request(&lab.a, udp.address(), &vec![1; len_bytes], LOST).is_err());
    }
    counters::wait_quiet(&lab.a, NIC)
}

/// What has come and gone at the receiver's NIC: every sum of `a`'s packets is filled in.
fn at_receiver(config: LabConfig, nat: Nat) -> Result<(Lab, Recording)> {
    let lab = LabConfig { pod: Some(PodSums::Open), ..config }.start()?;
    let capture = Capture::start(&lab.b, NIC, Direction::In)?;
    all_traffic(&lab, nat)?;
    Ok((lab, capture.stop()?))
}

/// Every packet has the verdict that follows from what Wireshark says of it. Returns how many are
/// bad.
fn assert_agrees(file: &Path) -> Result<(Checked, usize)> {
    let checked = check_json(["--all".as_ref(), file.as_os_str()])?;
    assert_eq!(checked.ended.stderr, "");
    let statuses: BTreeMap<_, _> = tshark(file)?.into_iter().collect();
    assert_eq!(checked.packets.len(), statuses.len(), "not all UDP packets are VXLAN");
    for (number, verdict) in checked.verdicts() {
        let fitting: &[&str] = match statuses[&number] {
            Status::Good => &["valid"],
            Status::Bad => &["stale_nat", "mangled_zero", "bad"],
            Status::Unknown => &["zero"],
        };
        assert!(fitting.contains(&verdict.as_str()), "frame {number}: {verdict}");
    }
    assert_eq!(checked.looks_bad(), 0);
    let bad = statuses.values().filter(|status| **status == Status::Bad).count();
    assert_eq!(checked.ended.code, Some(i32::from(bad > 0)));
    Ok((checked, bad))
}

#[test]
fn agrees_with_tshark_on_stale_packets_over_ipv4() -> Result<()> {
    agrees_with_tshark_on_stale_packets(LabConfig::default())
}

#[test]
fn agrees_with_tshark_on_stale_packets_over_ipv6() -> Result<()> {
    agrees_with_tshark_on_stale_packets(LabConfig { outer: Family::V6, ..LabConfig::default() })
}

#[test]
fn agrees_with_tshark_on_stale_packets_in_a_vlan() -> Result<()> {
    let underlay = Underlay::Vlan(vec![200, 100]);
    agrees_with_tshark_on_stale_packets(LabConfig { underlay, ..LabConfig::default() })
}

fn agrees_with_tshark_on_stale_packets(config: LabConfig) -> Result<()> {
    let (lab, received) = at_receiver(config, MASQUERADE)?;
    let (checked, bad) = assert_agrees(received.file()?.path())?;
    assert!(bad >= 5, "{bad} bad packets");
    assert_eq!(checked.count("stale_nat"), bad as u64, "{:#}", checked.summary);
    let flows = conntrack::udp_flows(&lab.a, lab.config.dstport)?;
    let stale = |packet: &&Value| packet["verdict"] == "stale_nat";
    for packet in checked.packets.iter().filter(stale) {
        let sport = packet["outer"]["sport"].as_u64().context("a port")?;
        let original = conntrack::before_nat(&flows, u16::try_from(sport)?);
        let original = original.with_context(|| format!("connection tracking: {packet:#}"))?;
        assert_eq!(packet["outer"]["sport_before_nat"], original.sport, "{packet:#}");
        assert_eq!(packet["proof"], "port_range");
        assert_eq!(packet["vni"], 1);
    }
    Ok(())
}

#[test]
fn agrees_with_tshark_on_mangled_packets() -> Result<()> {
    let zero = LabConfig { outer_sum: OuterSum::Zero, ..LabConfig::default() };
    let (_lab, received) = at_receiver(zero, Nat::ZeroMangle)?;
    let (checked, bad) = assert_agrees(received.file()?.path())?;
    assert!(bad >= 5, "{bad} bad packets");
    assert_eq!(checked.count("mangled_zero"), bad as u64, "{:#}", checked.summary);
    assert!(checked.count("zero") > 20, "{:#}", checked.summary);
    Ok(())
}

/// The sums of both nodes are open where this is captured, GSO packets among them.
#[test]
fn right_where_tcpdump_and_tshark_are_wrong() -> Result<()> {
    for outer in [Family::V4, Family::V6] {
        let config = LabConfig {
            outer,
            nic_offload: true,
            pod: Some(PodSums::Open),
            inner_neighbours: InnerNeighbours::Arp,
            ..LabConfig::default()
        };
        let lab = config.start()?;
        let capture = Capture::start(&lab.a, NIC, Direction::Out)?;
        everything(&lab)?;
        counters::wait_quiet(&lab.a, NIC)?;
        let sent = capture.stop()?;
        assert!(sent.frames.iter().any(|frame| frame.len() > 10_000), "no GSO packet");
        let file = sent.file()?;
        let checked = check_json([file.path()])?;
        assert_eq!((checked.ended.code, checked.packets.len()), (Some(0), 0));
        assert_eq!(checked.count("unverified"), 0, "{:#}", checked.summary);
        let bad_to_tcpdump = sent.tcpdump_verdicts(lab.config.dstport)?.bad;
        let statuses = tshark(file.path())?;
        let bad = statuses.iter().filter(|(_, status)| *status == Status::Bad).count();
        assert!(bad > 20, "tshark calls {bad} bad");
        assert_eq!(checked.looks_bad(), bad as u64);
        assert_eq!(checked.looks_bad(), bad_to_tcpdump as u64);
        let text = check([file.path()])?.stdout;
        assert!(text.contains(&format!("but not broken: {bad} packets, captured on")), "{text}");
        assert!(text.ends_with("no broken packet\n"), "{text}");
    }
    Ok(())
}

#[test]
fn zero_over_ipv6_looks_bad_and_is_not() -> Result<()> {
    let config = LabConfig {
        outer: Family::V6,
        outer_sum: OuterSum::Zero,
        accept_zero_v6: true,
        ..LabConfig::default()
    };
    let lab = config.start()?;
    let capture = Capture::start(&lab.a, NIC, Direction::Out)?;
    everything(&lab)?;
    let sent = capture.stop()?;
    let checked = check_json([sent.file()?.path()])?;
    let bad = sent.tcpdump_verdicts(lab.config.dstport)?.bad as u64;
    assert!(bad > 20 && checked.looks_bad() == bad, "{bad} {:#}", checked.summary);
    assert_eq!(checked.summary["looks_bad"]["no_sum_over_ipv6"], bad);
    assert_eq!((checked.ended.code, checked.count("zero")), (Some(0), bad));
    Ok(())
}

/// The first broken packet comes before the first that tells what the sender sends.
#[test]
fn what_comes_late_counts_from_the_start() -> Result<()> {
    let config =
        LabConfig { outer_sum: OuterSum::Zero, nat: Nat::ZeroMangle, ..LabConfig::default() };
    let lab = config.start()?;
    let capture = Capture::start(&lab.b, NIC, Direction::In)?;
    lost_traffic(&lab)?;
    lab.disable_nat()?;
    everything(&lab)?;
    let file = capture.stop()?.file()?;
    let checked = check_json([file.path()])?;
    let broken = checked.packets.len() as u64;
    assert!(broken >= 5, "{:#}", checked.summary);
    assert_eq!(checked.count("mangled_zero"), broken, "{:#}", checked.summary);
    assert_eq!(checked.summary["premature"], 0);

    // A stream cannot be read again: it says so.
    let streamed = check_json_piped(file.path(), "")?;
    assert_eq!(streamed.packets.len() as u64, broken);
    assert_eq!(streamed.summary["premature"], broken, "{:#}", streamed.summary);
    assert_eq!(streamed.count("mangled_zero"), 0, "{:#}", streamed.summary);
    let told = check_json_piped(file.path(), "--policy zero")?;
    assert_eq!(told.summary["premature"], 0);
    assert_eq!(told.count("mangled_zero"), broken, "{:#}", told.summary);
    assert_eq!(told.verdicts(), checked.verdicts());
    Ok(())
}

/// What tcpdump writes of all interfaces has the same packets as the NIC has.
#[test]
fn cooked_captures_of_any_interface() -> Result<()> {
    for (outer, link) in [(Family::V4, "LINUX_SLL"), (Family::V6, "LINUX_SLL2")] {
        let folder = Folder::new()?;
        let lab = LabConfig { outer, ..LabConfig::default() }.start()?;
        let cooked = folder.path().join("any.pcap");
        let filter = ["-y", link, "udp", "port", "8472"];
        let tcpdump = Tcpdump::start(&lab.b, "any", &filter, &cooked)?;
        let capture = Capture::start(&lab.b, NIC, Direction::Both)?;
        all_traffic(&lab, MASQUERADE)?;
        let plain = check_json([capture.stop()?.file()?.path()])?;
        // tcpdump may be behind, and leaves what it has not read yet. It was there first, so a
        // multicast report may be more.
        let enough = |checked: &Checked, verdict| checked.count(verdict) >= plain.count(verdict);
        wait_until("tcpdump has written as many packets", PLENTY, || {
            let checked = check_json([&cooked])?;
            Ok(enough(&checked, "stale_nat") && enough(&checked, "valid"))
        })?;
        tcpdump.stop()?;
        let (_, bad) = assert_agrees(&cooked)?;
        assert!(bad >= 5, "{bad} bad packets over {link}");
    }
    Ok(())
}

/// One capture to convert: of a summing node, with stale packets in it.
fn stale_capture(folder: &Folder) -> Result<PathBuf> {
    let (_lab, received) = at_receiver(LabConfig::default(), MASQUERADE)?;
    let path = folder.path().join("capture.pcap");
    editcap(&["-F", "pcap"], received.file()?.path(), &path)?;
    assert!(fs::read(&path)?.starts_with(&[0xd4, 0xc3, 0xb2, 0xa1]), "not little-endian");
    Ok(path)
}

/// Packets without what depends on the file: name, interface and precision of the time.
fn without_file(checked: &Checked) -> Vec<Value> {
    let mut packets = checked.packets.clone();
    for packet in packets.iter_mut().filter_map(Value::as_object_mut) {
        packet.remove("file");
        packet.remove("interface");
    }
    packets
}

#[test]
fn every_format_says_the_same() -> Result<()> {
    let folder = Folder::new()?;
    let plain = stale_capture(&folder)?;
    let expected = check_json(["--all".as_ref(), plain.as_os_str()])?;
    assert!(expected.count("stale_nat") >= 5, "{:#}", expected.summary);
    let path = |name: &str| folder.path().join(name);

    let files = ["nsec.pcap", "c.pcapng", "big.pcap", "big.pcapng", "c.gz", "c.zst", "frames.zst"];
    let files = files.map(path);
    editcap(&["-F", "nsecpcap"], &plain, &files[0])?;
    editcap(&["-F", "pcapng"], &plain, &files[1])?;
    fs::write(&files[2], big_endian_pcap(&fs::read(&plain)?)?)?;
    fs::write(&files[3], big_endian_pcapng(&fs::read(&files[1])?)?)?;
    compress("gzip", &[], &plain, &files[4])?;
    compress("zstd", &["-3"], &files[1], &files[5])?;
    // Two frames, with one between that is to be skipped (RFC 8878 §3.1.2).
    let bytes = fs::read(&plain)?;
    let (one, two) = bytes.split_at(bytes.len() / 3);
    let mut frames = Vec::new();
    for part in [one, two] {
        let (from, to) = (path("part"), path("part.zst"));
        fs::write(&from, part)?;
        compress("zstd", &[], &from, &to)?;
        frames.extend(fs::read(to)?);
        frames.extend([0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3]);
    }
    fs::write(&files[6], frames)?;

    for file in &files {
        let checked = check_json(["--all".as_ref(), file.as_os_str()])?;
        let name = file.display();
        assert_eq!(checked.ended.stderr, "", "{name}");
        assert_eq!(without_file(&checked), without_file(&expected), "{name}");
        assert_eq!(checked.summary["verdicts"], expected.summary["verdicts"], "{name}");
        assert_eq!(checked.ended.code, Some(1), "{name}");
        let piped = check_json_piped(file, "--all --policy sum")?;
        assert_eq!(without_file(&piped), without_file(&expected), "{name}");
    }
    // All of them at once: lines carry the name, and the totals add up.
    let all = check_json(&files)?;
    let sum = files.len() as u64 * expected.count("stale_nat");
    assert_eq!((all.count("stale_nat"), all.packets.len() as u64), (sum, sum));
    assert_eq!(all.summary["files"].as_array().map(Vec::len), Some(files.len()));
    let text = check(&files)?.stdout;
    assert!(text.starts_with(&format!("{}: frame ", files[0].display())), "{text}");
    Ok(())
}

fn swap<const N: usize>(bytes: &mut [u8], at: usize) -> Result<()> {
    let field = bytes.get_mut(at..at + N).context("the file ends within a header")?;
    field.reverse();
    Ok(())
}

fn le32(bytes: &[u8], at: usize) -> Result<usize> {
    let field = bytes.get(at..).and_then(<[u8]>::first_chunk).context("four bytes")?;
    Ok(u32::from_le_bytes(*field) as usize)
}

/// The same capture as a big-endian machine writes it.
fn big_endian_pcap(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut swapped = bytes.to_vec();
    for at in [0, 8, 12, 16, 20] {
        swap::<4>(&mut swapped, at)?;
    }
    swap::<2>(&mut swapped, 4)?;
    swap::<2>(&mut swapped, 6)?;
    let mut at = 24;
    while at < bytes.len() {
        for field in 0..4 {
            swap::<4>(&mut swapped, at + 4 * field)?;
        }
        at += 16 + le32(bytes, at + 8)?;
    }
    Ok(swapped)
}

/// The same for the blocks that editcap writes.
fn big_endian_pcapng(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut swapped = bytes.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let (kind, len) = (le32(bytes, at)?, le32(bytes, at + 4)?);
        let options = match kind {
            0x0a0d_0d0a => {
                swap::<4>(&mut swapped, at + 8)?;
                swap::<2>(&mut swapped, at + 12)?;
                swap::<2>(&mut swapped, at + 14)?;
                swap::<8>(&mut swapped, at + 16)?;
                24
            }
            1 => {
                swap::<2>(&mut swapped, at + 8)?;
                swap::<4>(&mut swapped, at + 12)?;
                16
            }
            6 => {
                for field in 2..7 {
                    swap::<4>(&mut swapped, at + 4 * field)?;
                }
                28 + le32(bytes, at + 20)?.next_multiple_of(4)
            }
            _ => anyhow::bail!("block type {kind}"),
        };
        let mut option = at + options;
        while option < at + len - 4 {
            let option_len =
                usize::from(u16::from_le_bytes([bytes[option + 2], bytes[option + 3]]));
            swap::<2>(&mut swapped, option)?;
            swap::<2>(&mut swapped, option + 2)?;
            option += 4 + option_len.next_multiple_of(4);
        }
        for field in [at, at + 4, at + len - 4] {
            swap::<4>(&mut swapped, field)?;
        }
        at += len;
    }
    Ok(swapped)
}

/// Nothing is guessed of what was not captured: only headers that settle it do.
#[test]
fn packets_cut_short_stay_honest() -> Result<()> {
    let folder = Folder::new()?;
    let plain = stale_capture(&folder)?;
    let whole: BTreeMap<_, _> =
        check_json(["--all".as_ref(), plain.as_os_str()])?.verdicts().into_iter().collect();
    for snaplen in [30, 45, 60, 90, 110, 130, 300] {
        let cut = folder.path().join("cut.pcap");
        editcap(&["-s", &snaplen.to_string()], &plain, &cut)?;
        let checked = check_json(["--all".as_ref(), cut.as_os_str()])?;
        assert_eq!(checked.ended.stderr, "");
        let mut told = 0;
        for (number, verdict) in checked.verdicts() {
            if verdict != "unverified" {
                assert_eq!(verdict, whole[&number], "frame {number} cut to {snaplen}");
                told += 1;
            }
        }
        let summary = &checked.summary;
        assert_eq!(summary["frames"], whole.len(), "{summary:#}");
        if snaplen < 42 {
            assert_eq!(summary["cut_short"], whole.len(), "{summary:#}");
        }
        // Everything is filled in here: only whole packets can be told, the shortest of 93 bytes.
        assert_eq!(told > 0, snaplen > 90, "{told} told at {snaplen}");
    }
    Ok(())
}

/// Open sums are told by headers alone.
#[test]
fn headers_settle_open_sums_of_packets_cut_short() -> Result<()> {
    let folder = Folder::new()?;
    let config = LabConfig { nic_offload: true, ..LabConfig::default() };
    let lab = config.start()?;
    let capture = Capture::start(&lab.a, NIC, Direction::Out)?;
    all_traffic(&lab, MASQUERADE)?;
    let file = capture.stop()?.file()?;
    let whole = check_json([file.path()])?;
    let cut = folder.path().join("cut.pcap");
    editcap(&["-s", "128"], file.path(), &cut)?;
    let checked = check_json([&cut])?;
    assert!(checked.count("stale_nat") >= 5, "{:#}", checked.summary);
    assert_eq!(checked.count("stale_nat"), whole.count("stale_nat"));
    assert_eq!(checked.verdicts(), whole.verdicts());
    // tcpdump does not add up what it has not got.
    assert!(checked.looks_bad() < whole.looks_bad());
    Ok(())
}

fn question(check: Check, sum: SegmentSum) -> Ip {
    let udp = Udp { source_port: 42230, destination_port: 53, payload: vec![7; 40], sum };
    let [from, to] = [[172, 30, 17, 0], [172, 30, 44, 4]].map(std::net::Ipv4Addr::from);
    let inner = Ip::new(from.into(), to.into(), Transport::Udp(udp));
    Ip::v4(Transport::Vxlan(Vxlan::new(54947, check, inner.into())))
}

const STALE: Check = Check::Stale { old_port: 42276, old_address: None };

/// A pcap file of one link type.
fn pcap(link: u32, snaplen: u32, packets: &[impl AsRef<[u8]>]) -> Vec<u8> {
    let mut file = Vec::new();
    file.extend(0xa1b2_c3d4_u32.to_le_bytes());
    file.extend([2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    file.extend(snaplen.to_le_bytes());
    file.extend(link.to_le_bytes());
    for packet in packets {
        let len = packet.as_ref().len() as u32;
        file.extend([1_782_000_000, 832_436, len, len].map(u32::to_le_bytes).concat());
        file.extend(packet.as_ref());
    }
    file
}

fn write(folder: &Folder, name: &str, bytes: &[u8]) -> Result<PathBuf> {
    let path = folder.path().join(name);
    fs::write(&path, bytes)?;
    Ok(path)
}

#[test]
fn packets_without_link_header() -> Result<()> {
    let folder = Folder::new()?;
    let packet = Frame::raw_ip(&question(STALE, SegmentSum::Complete))?.bytes;
    for link in [101, 228] {
        let file = write(&folder, "raw.pcap", &pcap(link, 262_144, &[&packet]))?;
        let checked = check_json([&file])?;
        assert_eq!(checked.verdicts(), [(1, "stale_nat".to_owned())], "{:?}", checked.ended);
        assert_eq!(checked.packets[0]["outer"]["sport_before_nat"], 42276);
    }
    Ok(())
}

/// In a cooked capture, VLAN tags follow the cooked header.
#[test]
fn tags_behind_a_cooked_header() -> Result<()> {
    let folder = Folder::new()?;
    let ip = Frame::raw_ip(&question(STALE, SegmentSum::Complete))?.bytes;
    let tagged = [&[0_u8, 100, 0x08, 0x00][..], &ip].concat();
    let vlan = VLAN.to_be_bytes();
    let cooked = [&[0_u8, 4, 0, 1, 0, 6, 2, 0, 0, 0, 0, 1, 0, 0][..], &vlan, &tagged].concat();
    let cooked2 =
        [&vlan[..], &[0, 0, 0, 0, 0, 2, 0, 1, 4, 6, 2, 0, 0, 0, 0, 1, 0, 0], &tagged].concat();
    for (link, packet) in [(113, cooked), (276, cooked2)] {
        let file = write(&folder, "cooked.pcap", &pcap(link, 262_144, &[packet]))?;
        assert_eq!(check_json([&file])?.count("stale_nat"), 1, "link type {link}");
    }
    Ok(())
}

/// Longer than the length fields can say, as BIG TCP has it on the sender: the sum is pending.
#[test]
fn packets_too_long_for_their_length_fields() -> Result<()> {
    let folder = Folder::new()?;
    for (is_ipv6, low_half) in [(false, false), (false, true), (true, false), (true, true)] {
        let ip = question(Check::Pending, SegmentSum::Open);
        let ip = match ip.transport {
            transport if is_ipv6 => Ip::v6(transport),
            transport => Ip::v4(transport),
        };
        let frame = Frame::new(&ip.into())?;
        let (mut bytes, udp) = (frame.bytes, frame.udp);
        let old_len = bytes.len() - udp;
        bytes.resize(udp + 100_000, 9);
        let ip_len = if is_ipv6 { frame.ip + 4 } else { frame.ip + 2 };
        bytes[ip_len..ip_len + 2].fill(0);
        let udp_len = if low_half { 100_000_u32 as u16 } else { 0 };
        bytes[udp + 4..udp + 6].copy_from_slice(&udp_len.to_be_bytes());
        // The pseudo-header has all 32 bits of the length (`csum_tcpudp_magic`).
        let mut sum = u32::from(u16::from_be_bytes([bytes[udp + 6], bytes[udp + 7]]));
        sum += 100_000 / 0x1_0000 + 100_000 % 0x1_0000 + 0xffff - old_len as u32;
        sum = sum % 0x1_0000 + sum / 0x1_0000;
        sum = sum % 0x1_0000 + sum / 0x1_0000;
        bytes[udp + 6..udp + 8].copy_from_slice(&(sum as u16).to_be_bytes());
        let file = write(&folder, "big.pcap", &pcap(1, 262_144, &[&bytes]))?;
        let checked = check_json(["--all".as_ref(), file.as_os_str()])?;
        assert_eq!(checked.verdicts(), [(1, "offload_pending".to_owned())], "{is_ipv6} {low_half}");
        bytes[udp + 6] ^= 1;
        let file = write(&folder, "big.pcap", &pcap(1, 262_144, &[&bytes]))?;
        let checked = check_json(["--all".as_ref(), file.as_os_str()])?;
        assert_eq!(checked.count("offload_pending"), 0, "{is_ipv6} {low_half}");
    }
    Ok(())
}

/// Two nodes that differ, as a capture on the way between them shows both.
#[test]
fn senders_are_told_apart() -> Result<()> {
    let folder = Folder::new()?;
    let packet = |host: u8, check| -> Result<_> {
        let ip = question(check, SegmentSum::Complete);
        let source = std::net::Ipv4Addr::new(10, 0, 0, host).into();
        Ok(Frame::new(&Ip { source, ..ip }.into())?.bytes)
    };
    // The stale sums are made for another source address here, or the node would not matter.
    let packets =
        [packet(1, STALE)?, packet(2, STALE)?, packet(1, Check::Zero)?, packet(2, Check::Right)?];
    let file = write(&folder, "both.pcap", &pcap(1, 262_144, &packets))?;
    let checked = check_json(["--all".as_ref(), file.as_os_str()])?;
    let verdicts: Vec<_> = checked.verdicts().into_iter().map(|(_, verdict)| verdict).collect();
    assert_eq!(verdicts, ["mangled_zero", "stale_nat", "zero", "valid"], "{:#}", checked.summary);
    let learned = &checked.summary["files"][0]["learned"]["8472"];
    assert_eq!((&learned["zero"], &learned["sum"]), (&1.into(), &1.into()), "{learned}");
    Ok(())
}

/// The packets that tell come within the first look, right at its end, after it, or one after the other;
/// a verdict must not depend on that.
#[test]
fn when_a_sender_is_told_does_not_matter() -> Result<()> {
    /// Packets of the first look.
    const LOOK: usize = 10_000;
    let folder = Folder::new()?;
    let packet = |host: u8, check| -> Result<_> {
        let ip = question(check, SegmentSum::Complete);
        let source = std::net::Ipv4Addr::new(10, 0, 0, host).into();
        Ok(Frame::new(&Ip { source, ..ip }.into())?.bytes)
    };
    let mangled = [packet(1, Check::Value(0xffff))?, packet(2, Check::Value(0xffff))?];
    let none = [packet(1, Check::Zero)?, packet(2, Check::Zero)?];
    let filler = packet(3, Check::Right)?;
    for [first, second] in [
        [10, 20],
        [LOOK - 1, LOOK],
        [LOOK, LOOK + 1],
        [LOOK + 1, LOOK + 2],
        [10, LOOK + 10],
        [LOOK + 10, LOOK + 20],
    ] {
        let mut packets = vec![&filler; LOOK + 30];
        (packets[0], packets[1]) = (&mangled[0], &mangled[1]);
        (packets[first], packets[second]) = (&none[0], &none[1]);
        let file = write(&folder, "late.pcap", &pcap(1, 262_144, &packets))?;
        let checked = check_json([&file])?;
        let of = |frame| (frame, "mangled_zero".to_owned());
        assert_eq!(checked.verdicts(), [of(1), of(2)], "{first} {second}: {:#}", checked.summary);
        assert_eq!(checked.count("valid"), LOOK as u64 + 26, "{first} {second}");
        assert_eq!(checked.summary["premature"], 0, "{first} {second}");
        assert_eq!(checked.count("zero"), 2, "{first} {second}");
    }
    Ok(())
}

#[test]
fn ports_and_their_range() -> Result<()> {
    let folder = Folder::new()?;
    let mut frame = Frame::new(&question(STALE, SegmentSum::Complete).into())?.bytes;
    let file = write(&folder, "c.pcap", &pcap(1, 262_144, &[&frame]))?;
    let run = |args: &[&str]| check_json(args.iter().map(Path::new).chain([file.as_path()]));
    assert_eq!(run(&["--port", "4789,4790"])?.summary["not_vxlan"], 1);
    assert_eq!(run(&["--port", "8472"])?.count("stale_nat"), 1);
    assert_eq!(run(&["--port-range", "42277-50000"])?.count("bad"), 1);
    assert_eq!(run(&["--port-range", "42276-42277"])?.count("stale_nat"), 1);
    for wrong in ["1", "2-1", "0-5", "1-65536", "a-b"] {
        let refused = run(&["--port-range", wrong])?.ended;
        assert_eq!(refused.code, Some(2));
        assert!(refused.stderr.contains("--port-range"), "{refused:?}");
    }
    // Without the flag that says that there is a VNI, it is something else.
    frame[14 + 20 + 8] = 0;
    let file = write(&folder, "c.pcap", &pcap(1, 262_144, &[&frame]))?;
    let checked = check_json([&file])?;
    assert_eq!((&checked.summary["not_vxlan"], checked.ended.code), (&1.into(), Some(0)));
    Ok(())
}

#[test]
fn fragments_are_counted_and_not_guessed() -> Result<()> {
    let folder = Folder::new()?;
    let fragment = |fragment| -> Result<_> {
        let ip = Ip { fragment, ..question(STALE, SegmentSum::Complete) };
        Ok(Frame::new(&ip.into())?.bytes)
    };
    let packets = [fragment((0, true))?, fragment((8, false))?];
    let file = write(&folder, "c.pcap", &pcap(1, 262_144, &packets))?;
    let checked = check_json([&file])?;
    assert_eq!((checked.count("unverified"), checked.ended.code), (1, Some(0)));
    assert_eq!((&checked.summary["not_vxlan"], checked.looks_bad()), (&1.into(), 0));
    Ok(())
}

#[test]
fn what_is_no_capture_is_refused_by_name() -> Result<()> {
    let folder = Folder::new()?;
    let healthy = Frame::new(&question(Check::Right, SegmentSum::Complete).into())?.bytes;
    let stale = Frame::new(&question(STALE, SegmentSum::Complete).into())?.bytes;
    let good = pcap(1, 262_144, &[&stale, &healthy]);
    let mut absurd = pcap(1, 262_144, &[&stale, &healthy]);
    let second = 24 + 16 + stale.len();
    absurd[second + 8..second + 12].fill(0xff);
    let mut bad_gzip = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3];
    bad_gzip.extend([0xff; 30]);
    let text = b"10.0.0.11.54947 > 10.0.0.13.8472: [bad udp cksum 0x694b -> 0x37cc!]".to_vec();
    let wifi = pcap(127, 262_144, &[&healthy]);
    let mut pcapng = vec![0x0a, 0x0d, 0x0d, 0x0a, 28, 0, 0, 0, 0x4d, 0x3c, 0x2b, 0x1a, 1, 0, 0, 0];
    pcapng.extend([0xff; 8]);
    pcapng.extend([28, 0, 0, 0]);
    let no_interface = [&pcapng[..], &[6, 0, 0, 0, 32, 0, 0, 0], &[0; 20], &[32, 0, 0, 0]].concat();
    let endless = [&pcapng[..], &[6, 0, 0, 0, 0xfc, 0xff, 0xff, 0x7f]].concat();
    let endless = [endless, vec![0; 64]].concat();
    for (name, bytes, says) in [
        ("empty", Vec::new(), "empty"),
        ("text", text, "not a capture"),
        ("short", vec![1, 2], "not a capture"),
        ("absurd.pcap", absurd, "packet 2 (byte 172) claims 4294967295 bytes"),
        ("bad.gz", bad_gzip, "cannot read"),
        ("wifi.pcap", wifi, "link type 127"),
        ("if.pcapng", no_interface, "interface that was not described"),
        ("endless.pcapng", endless, "packet 1 (byte 28) claims"),
    ] {
        let path = write(&folder, name, &bytes)?;
        let ended = check([&path])?;
        assert_eq!(ended.code, Some(2), "{name}: {ended:?}");
        let line = ended.stderr.trim_end();
        assert_eq!(line.lines().count(), 1, "{name}: {ended:?}");
        assert!(line.contains(name) && line.contains(says), "{name}: {ended:?}");
    }
    for path in ["/does/not/exist.pcap", "/tmp"] {
        let ended = check([path])?;
        assert!(ended.code == Some(2) && ended.stderr.contains(path), "{ended:?}");
    }
    // What was read before is told all the same, and other files are.
    let absurd = folder.path().join("absurd.pcap");
    let good = write(&folder, "good.pcap", &good)?;
    let checked = check_json([&absurd, &good])?;
    assert_eq!((checked.ended.code, checked.count("stale_nat")), (Some(2), 2));
    assert_eq!(checked.count("valid"), 1, "{:#}", checked.summary);
    assert!(checked.summary["files"][0]["error"].is_string(), "{:#}", checked.summary);
    Ok(())
}

/// As left by a full disk, or read while tcpdump still writes.
#[test]
fn a_missing_end_is_a_warning() -> Result<()> {
    let folder = Folder::new()?;
    let healthy = Frame::new(&question(Check::Right, SegmentSum::Complete).into())?.bytes;
    let packets = vec![healthy; 3000];
    let whole = pcap(1, 262_144, &packets);
    let name = write(&folder, "whole.pcap", &whole)?;
    let (gzip, zstd) = (folder.path().join("c.gz"), folder.path().join("c.zst"));
    compress("gzip", &[], &name, &gzip)?;
    compress("zstd", &[], &name, &zstd)?;
    for (bytes, least) in [
        (whole[..whole.len() - 5].to_vec(), 2999),
        (whole[..whole.len() - 135].to_vec(), 2999),
        (cut_by_a_few(&gzip)?, 0),
        (cut_by_a_few(&zstd)?, 0),
    ] {
        let path = write(&folder, "cut", &bytes)?;
        let checked = check_json([&path])?;
        assert_eq!(checked.ended.code, Some(0), "{:?}", checked.ended);
        assert!(checked.ended.stderr.contains("still being written"), "{:?}", checked.ended);
        assert!(checked.count("valid") >= least, "{:#}", checked.summary);
    }
    Ok(())
}

fn cut_by_a_few(path: &Path) -> Result<Vec<u8>> {
    let bytes = fs::read(path)?;
    Ok(bytes[..bytes.len() - 20].to_vec())
}

#[test]
fn a_closed_pipe_ends_it_quietly() -> Result<()> {
    let folder = Folder::new()?;
    let stale = Frame::new(&question(STALE, SegmentSum::Complete).into())?.bytes;
    let file = write(&folder, "c.pcap", &pcap(1, 262_144, &vec![stale; 50_000]))?;
    // More than is held back while it may change: all of it is there, once.
    let all: Vec<_> = (1..=50_000).map(|number| (number, "stale_nat".to_owned())).collect();
    assert!(check_json([&file])?.verdicts() == all);
    for args in ["", "--json"] {
        let mut command = Command::new(binary()?);
        command.arg("check").args(args.split_whitespace()).arg(&file);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let mut lines = BufReader::new(child.stdout.take().context("stdout")?).lines();
        assert!(lines.next().context("a line")??.contains("stale_nat"));
        drop(lines);
        let output = child.wait_with_output()?;
        assert_eq!(String::from_utf8_lossy(&output.stderr), "");
        assert!(output.status.code().is_some_and(|code| code < 2), "{}", output.status);
    }
    Ok(())
}

/// tcpdump's packets are judged while it runs.
#[test]
fn a_live_capture_is_judged_as_it_comes() -> Result<()> {
    let stale = Frame::new(&question(STALE, SegmentSum::Complete).into())?.bytes;
    let bytes = pcap(1, 262_144, &[&stale]);
    let mut command = Command::new(binary()?);
    let mut child =
        command.args(["check", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut stdin = child.stdin.take().context("stdin")?;
    let mut lines = BufReader::new(child.stdout.take().context("stdout")?).lines();
    std::io::Write::write_all(&mut stdin, &bytes)?;
    // The pipe stays open: without the line, this waits for ever.
    let line = lines.next().context("a line")??;
    assert!(line.starts_with("frame 1  2026-06-21T00:00:00.832436Z stale_nat vni 1  "), "{line}");
    assert!(line.contains("10.0.0.11:54947 > 10.0.0.13:8472 (port 42276 before NAT)"), "{line}");
    drop(stdin);
    let rest = lines.collect::<std::io::Result<Vec<_>>>()?;
    assert_eq!(rest.last().map(String::as_str), Some("broken: 1 packet"));
    ensure!(child.wait()?.code() == Some(1));
    Ok(())
}

/// Whatever is in a file, it is told apart or refused: no panic, no hanging.
#[test]
fn any_bytes_are_judged_or_refused() -> Result<()> {
    let folder = Folder::new()?;
    let stale = Frame::new(&question(STALE, SegmentSum::Complete).into())?.bytes;
    let good = pcap(1, 262_144, &[&stale, &stale]);
    let plain = write(&folder, "good.pcap", &good)?;
    let others = ["c.pcapng", "c.gz", "c.zst"].map(|name| folder.path().join(name));
    editcap(&["-F", "pcapng"], &plain, &others[0])?;
    compress("gzip", &[], &plain, &others[1])?;
    compress("zstd", &[], &plain, &others[2])?;
    let mut seeds = vec![good];
    for other in &others {
        seeds.push(fs::read(other)?);
    }
    let seed = any::<prop::sample::Index>();
    let changes = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..12);
    let tail = prop::collection::vec(any::<u8>(), 0..64);
    let input = (seed, changes, any::<prop::sample::Index>(), tail);
    let config = ProptestConfig { cases: 150, failure_persistence: None, ..Default::default() };
    TestRunner::new(config).run(&input, |(seed, changes, keep, tail)| {
        let mut bytes = seed.get(&seeds).clone();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        bytes.truncate(keep.index(bytes.len() * 2));
        bytes.extend(tail);
        let fail = |error: anyhow::Error| TestCaseError::fail(format!("{error:#}"));
        let path = write(&folder, "any", &bytes).map_err(fail)?;
        let ended = check(["--all".as_ref(), path.as_os_str()]).map_err(fail)?;
        prop_assert!(matches!(ended.code, Some(0..=2)), "{ended:?}");
        prop_assert!(!ended.stderr.contains("panicked"), "{ended:?}");
        Ok(())
    })?;
    Ok(())
}

/// What is an Ethernet frame, and what a frame of another kind.
#[test]
fn other_packets_are_counted() -> Result<()> {
    let folder = Folder::new()?;
    let other = Ethernet::of(vxcsum_tests::packets::Network::Arp);
    let packets = [Frame::new(&other)?.bytes, vec![0; 10], Vec::new()];
    let file = write(&folder, "c.pcap", &pcap(1, 262_144, &packets))?;
    let ended = check([&file])?;
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
    assert!(ended.stdout.starts_with("3 packets, 0 of them VXLAN (UDP ports 8472, 4789)\n"));
    assert!(ended.stdout.contains("name them by --port"), "{ended:?}");
    Ok(())
}
