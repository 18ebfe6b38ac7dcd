//! `vxcsum check` beside the tools that people have used so far, over the same capture.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use vxcsum_tests::capture::Recording;
use vxcsum_tests::check::{Status, tshark};
use vxcsum_tests::daemon;
use vxcsum_tests::packets::{Check, Frame, Ip, SegmentSum, Transport, Udp, Vxlan};
use vxcsum_tests::segment::Segment;
use vxcsum_tests::storm::{PORT_BEFORE_NAT, Packet, other_frame};

use crate::effort::{Effort, interleaved};
use crate::report::{Findings, Limit, Panel, Series};

/// How many times as fast as tshark (product.md §6).
const REACH: f64 = 50.0;
/// Bytes of the capture.
const LARGE: usize = 200 << 20;
const SMALL: usize = 4 << 20;

/// Measures the tools, and compares what they say.
pub(crate) fn measure(effort: Effort) -> Result<Findings> {
    let len = effort.count(LARGE, SMALL);
    let recording = recording(len)?;
    let packets = recording.frames.len();
    let file = recording.file()?;
    drop(recording);

    let tools = [tshark_command(file.path()), tcpdump(file.path()), vxcsum(file.path())?];
    let megabytes = fs::metadata(file.path())?.len() as f64 / 1e6;
    let samples = interleaved("check", effort, &[0, 1, 2], |&tool| {
        let (program, arguments) = &tools[tool];
        let start = Instant::now();
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let status = command.status().with_context(|| format!("cannot start {program}"))?;
        // 1: vxcsum has found what it was to find.
        ensure!(matches!(status.code(), Some(0 | 1)), "{program}: {status}");
        Ok(megabytes / start.elapsed().as_secs_f64())
    })?;
    let mut speed = Panel::new("Speed", "MB/s");
    let mut names = ["tshark", "tcpdump -vv", "vxcsum check"].into_iter().zip(samples);
    let peer = names.next().map(|(name, samples)| Series::new(name, samples));
    let peer = peer.context("no tshark")?;
    speed.push(peer.clone());
    for (name, samples) in names {
        let mut series = Series::new(name, samples).against(&peer);
        if name.starts_with("vxcsum") {
            series = series.reach_ratio(Limit::AtLeast, REACH).quote("`vxcsum check`, a capture");
        }
        speed.push(series);
    }

    let mut findings = Findings::default();
    findings.panel(speed);
    findings.panel(differences(file.path())?);
    findings.note(format!(
        "One capture of {packets} packets, {megabytes:.0} MB, read from memory: TCP data and \
         acknowledgements, UDP, over IPv4 and IPv6, all of it in VXLAN but for one in forty; all \
         inner sums are filled in; one outer sum in twenty is zero, and one in twenty is wrong. \
         Output goes to /dev/null."
    ));
    findings.note(
        "A field with the sum of the pseudo-header alone is open to vxcsum, and wrong to the others. \
         One wrong sum in 65,535 is that by chance.",
    );
    findings.note(
        "tshark is told to add up UDP checksums and to print number and status of each packet, and \
         spared the analysis of TCP; tcpdump adds them up at -vv; vxcsum prints broken packets and \
         a summary.",
    );
    Ok(findings)
}

/// Packets of about `len` bytes, every one different from those before.
fn recording(len: usize) -> Result<Recording> {
    let mut frames = Vec::new();
    let mut bytes = 0;
    let mut index = 0;
    while bytes < len {
        let frame = frame(index)?;
        bytes += frame.len();
        frames.push(frame);
        index += 1;
    }
    Ok(Recording { frames })
}

fn frame(index: u32) -> Result<Vec<u8>> {
    let check = match index % 40 {
        7 | 23 => Check::Zero,
        11 => Check::Stale { old_port: PORT_BEFORE_NAT, old_address: None },
        // Right by chance once in 65,535 packets, which is then for all tools.
        31 => Check::Value(index as u16 | 1),
        _ => Check::Right,
    };
    let sport = 1024 + (index % 40_000) as u16;
    let segment = |flags, len| {
        let sequence = index.wrapping_mul(1360);
        let segment = Segment { is_stale: false, sport, sequence, flags, len };
        Ok(segment.laid_out(check)?.finished)
    };
    match index % 10 {
        0..=3 => segment(".", 1360),
        4..=6 => segment(".", 0),
        7 if index % 4 == 1 => segment("S", 0),
        8 if index % 4 == 2 => Ok(outer_ipv6(sport, check)?.finished),
        9 if index % 4 == 3 => other_frame(),
        _ => Ok(Packet { inner_sport: sport, ..Packet::new(check) }.laid_out()?.finished),
    }
}

fn outer_ipv6(inner_sport: u16, check: Check) -> Result<Frame> {
    let inner = Ip::v4(Transport::Udp(Udp {
        source_port: inner_sport,
        destination_port: 53,
        payload: vec![0x5a; 300],
        sum: SegmentSum::Open,
    }));
    // NAT to another port; the address stays.
    let outer = Ip::v6(Transport::Vxlan(Vxlan::new(50000, check, inner.into())));
    debug_assert!(matches!(outer.source, IpAddr::V6(_)));
    Frame::new(&outer.into())
}

fn tshark_command(file: &Path) -> (String, Vec<String>) {
    let arguments = [
        "-n",
        "-o",
        "udp.check_checksum:TRUE",
        "-o",
        "tcp.analyze_sequence_numbers:FALSE",
        "-Y",
        "udp",
        "-T",
        "fields",
        "-E",
        "occurrence=f",
        "-e",
        "frame.number",
        "-e",
        "udp.checksum.status",
        "-r",
    ];
    with_file("tshark", &arguments, file)
}

fn tcpdump(file: &Path) -> (String, Vec<String>) {
    // As root, or Debian's would read the file as another user.
    with_file("tcpdump", &["-Z", "root", "-n", "-vv", "-r"], file)
}

fn vxcsum(file: &Path) -> Result<(String, Vec<String>)> {
    Ok(with_file(&daemon::binary()?.to_string_lossy(), &["check"], file))
}

fn with_file(program: &str, arguments: &[&str], file: &Path) -> (String, Vec<String>) {
    let mut arguments: Vec<_> = arguments.iter().map(|&it| it.to_owned()).collect();
    arguments.push(file.to_string_lossy().into_owned());
    (program.to_owned(), arguments)
}

/// What vxcsum says otherwise than tshark of each packet, and tcpdump of all.
fn differences(file: &Path) -> Result<Panel> {
    let own = verdicts(file)?;
    let theirs: BTreeMap<_, _> = tshark(file)?.into_iter().collect();
    let differs = |(frame, own): (&u64, &Own)| theirs.get(frame) != Some(&own.status);
    let is_open = |own: &Own| own.is_open;
    let packets = own.iter().filter(|&(frame, it)| !it.is_open && differs((frame, it))).count();
    // What tshark takes for UDP and vxcsum not.
    let missed = theirs.keys().filter(|frame| !own.contains_key(frame)).count();
    let open = own.values().filter(|own| is_open(own)).count();
    let own_bad = own.values().filter(|own| own.status == Status::Bad || is_open(own)).count();
    let tcpdump_bad = tcpdump_bad(file)?;

    let mut panel = Panel::new("Packets judged differently by vxcsum", "packets");
    let compared = format!("than by tshark, of {}", own.len() - open);
    let series = Series::new(compared, vec![(packets + missed) as f64]);
    panel.push(series.reach(Limit::AtMost, 0.0));
    let compared = format!("than by tcpdump, of {own_bad} bad or open ones");
    let series = Series::new(compared, vec![own_bad.abs_diff(tcpdump_bad) as f64]);
    panel.push(series.reach(Limit::AtMost, 0.0));
    panel.push(Series::new("left out: the sum is open by vxcsum", vec![open as f64]));
    Ok(panel)
}

/// What vxcsum says of a packet.
struct Own {
    /// In tshark's words.
    status: Status,
    /// The field is a pseudo-header sum, which is for the NIC to finish, or a wrong sum that is the
    /// same by chance, once in 65,535: the two cannot be told apart.
    is_open: bool,
}

fn verdicts(file: &Path) -> Result<BTreeMap<u64, Own>> {
    let mut command = Command::new(daemon::binary()?);
    let output = command.args(["check", "--all", "--json"]).arg(file).output()?;
    let text = String::from_utf8(output.stdout)?;
    let mut verdicts = BTreeMap::new();
    for line in text.lines() {
        let packet: Value = serde_json::from_str(line)?;
        let Some(frame) = packet["frame"].as_u64() else { continue };
        let verdict = packet["verdict"].as_str();
        let is_open = verdict == Some("offload_pending");
        let status = match verdict {
            Some("valid") => Status::Good,
            Some("stale_nat" | "bad" | "mangled_zero") => Status::Bad,
            _ => Status::Unknown,
        };
        verdicts.insert(frame, Own { status, is_open });
    }
    ensure!(!verdicts.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(verdicts)
}

fn tcpdump_bad(file: &Path) -> Result<usize> {
    let (program, arguments) = tcpdump(file);
    let output = Command::new(program).args(arguments).output().context("cannot start tcpdump")?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().filter(|line| line.contains(".8472: [bad udp cksum")).count())
}
