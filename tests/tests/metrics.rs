//! `--metrics`: what Prometheus reads.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use vxcsum_tests::client::Socket;
use vxcsum_tests::daemon::Interface;
use vxcsum_tests::lab::{Lab, LabConfig, NIC};
use vxcsum_tests::packets::Check;
use vxcsum_tests::storm::{Packet, SOURCE_PORTS, Storm};
use vxcsum_tests::traffic::send_frames;

const PLENTY: Duration = Duration::from_secs(5);
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0";

/// product.md §4, and the labels there.
const COUNTERS: [(&str, &[&str]); 13] = [
    ("vxcsum_skbs", &["interface"]),
    ("vxcsum_packets", &["interface", "verdict"]),
    ("vxcsum_bytes", &["interface", "verdict"]),
    ("vxcsum_fixed_packets", &["interface", "action"]),
    ("vxcsum_events_emitted", &[]),
    ("vxcsum_events_suppressed", &[]),
    ("vxcsum_events_lost", &[]),
    ("vxcsum_stalls", &["outcome"]),
    ("vxcsum_receive_dropped_packets", &["peer"]),
    ("vxcsum_receive_not_vxlan_packets", &[]),
    ("vxcsum_receive_events_emitted", &[]),
    ("vxcsum_receive_events_suppressed", &[]),
    ("vxcsum_receive_events_lost", &[]),
];
const GAUGES: [(&str, &[&str]); 4] = [
    ("vxcsum_attached", &["interface", "method"]),
    ("vxcsum_receive_attached", &[]),
    ("vxcsum_build_info", &["version"]),
    ("vxcsum_stalls_waiting", &[]),
];

fn lab() -> Result<Lab> {
    LabConfig { srcport: Some(SOURCE_PORTS), ..LabConfig::default() }.start()
}

/// Each lab has a network namespace of its own, so any port is free.
fn address() -> SocketAddr {
    ([127, 0, 0, 1], 9472).into()
}

/// An answer of the server.
#[derive(Debug)]
struct Answer {
    status: u16,
    content_type: String,
    body: String,
}

fn http(lab: &Lab, method: &str, path: &str, accept: &str) -> Result<Answer> {
    let mut stream = lab.a.enter(|| Ok(TcpStream::connect(address())?))?;
    stream.set_read_timeout(Some(PLENTY))?;
    let accept = if accept.is_empty() { String::new() } else { format!("Accept: {accept}\r\n") };
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\n{accept}Content-Length: 0\r\n\
         Connection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").with_context(|| answer.clone())?;
    let status = head.split(' ').nth(1).with_context(|| answer.clone())?.parse()?;
    let content_type = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-type").then(|| value.trim().to_owned())
    });
    let content_type = content_type.unwrap_or_default();
    Ok(Answer { status, content_type, body: body.to_owned() })
}

/// Which grammar to hold a text against.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    /// <https://prometheus.io/docs/instrumenting/exposition_formats/>, version 0.0.4.
    Text,
    /// `OpenMetrics` 1.0.
    OpenMetrics,
}

type Labels = BTreeMap<String, String>;

/// A metric family with its samples.
#[derive(Debug, Default)]
struct Family {
    kind: String,
    help: String,
    samples: BTreeMap<Labels, u64>,
}

/// All families by name, a counter's without its suffix. Strict: whatever promtool would object to
/// is an error.
fn parse(text: &str, format: Format) -> Result<BTreeMap<String, Family>> {
    ensure!(text.ends_with('\n'), "the last line has no end");
    let mut families = BTreeMap::<String, Family>::new();
    let mut current = String::new();
    let mut lines = text.lines().collect::<Vec<_>>();
    if format == Format::OpenMetrics {
        ensure!(lines.pop() == Some("# EOF"), "no mark of the end");
    }
    for line in lines {
        let context = || format!("{line:?}");
        ensure!(!line.is_empty() && line.trim() == line, "{line:?}");
        if let Some(comment) = line.strip_prefix("# ") {
            let (word, rest) = comment.split_once(' ').with_context(context)?;
            let (name, value) = rest.split_once(' ').with_context(context)?;
            let family = match format {
                Format::Text => name.strip_suffix("_total").unwrap_or(name),
                Format::OpenMetrics => name,
            };
            if current != family {
                // The lines of a family stand together.
                ensure!(!families.contains_key(family), "{family} comes twice");
                family.clone_into(&mut current);
            }
            let entry = families.entry(family.to_owned()).or_default();
            ensure!(entry.samples.is_empty(), "{line:?} after the samples");
            let field = match word {
                "HELP" => &mut entry.help,
                "TYPE" => &mut entry.kind,
                _ => bail!("{line:?}"),
            };
            ensure!(field.is_empty() && !value.is_empty(), "{line:?}");
            value.clone_into(field);
            let is_total = name.ends_with("_total");
            let should_be = format == Format::Text && entry.kind == "counter";
            ensure!(word != "TYPE" || is_total == should_be, "{line:?}");
            continue;
        }
        let (name, labels, value) = sample(line).with_context(context)?;
        let family = families.get_mut(&current).with_context(context)?;
        let suffix = if family.kind == "counter" { "_total" } else { "" };
        ensure!(name == format!("{current}{suffix}"), "{line:?} under {current}");
        ensure!(!family.help.is_empty() && !family.kind.is_empty(), "{line:?}");
        ensure!(family.samples.insert(labels, value).is_none(), "{line:?} comes twice");
    }
    Ok(families)
}

/// `name{label="value",…} number`: all numbers here are whole ones.
fn sample(line: &str) -> Option<(&str, Labels, u64)> {
    let (left, value) = line.rsplit_once(' ')?;
    let mut labels = Labels::new();
    let name = match left.split_once('{') {
        None => left,
        Some((name, rest)) => {
            for pair in rest.strip_suffix('}')?.split(',') {
                let (label, value) = pair.split_once('=')?;
                let value = value.strip_prefix('"')?.strip_suffix('"')?;
                if !is_name(label) || value.contains(['"', '\\']) {
                    return None;
                }
                labels.insert(label.to_owned(), value.to_owned());
            }
            name
        }
    };
    is_name(name).then_some((name, labels, value.parse().ok()?))
}

fn is_name(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_lowercase())
        && text.chars().all(|letter| matches!(letter, 'a'..='z' | '0'..='9' | '_'))
}

fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|&(label, value)| (label.to_owned(), value.to_owned())).collect()
}

#[test]
fn names_and_numbers_are_as_documented() -> Result<()> {
    let lab = lab()?;
    let socket = Socket::new()?;
    let metrics = address().to_string();
    let daemon = socket.run(&lab.a, ["--metrics", &metrics, "--fix", "restore"])?;
    let bad = Packet::new(Check::Value(0xffff));
    let packets = [Packet::stale(), Packet::stale(), bad, Packet::new(Check::Right)];
    let frames = packets.iter().map(|packet| packet.frame()).collect::<Result<Vec<_>>>()?;
    send_frames(&lab.a, NIC, &frames)?;
    daemon.wait_events(3, PLENTY)?;

    for (accept, format, content_type) in [
        ("", Format::Text, "text/plain; version=0.0.4"),
        ("text/plain", Format::Text, "text/plain; version=0.0.4"),
        (OPEN_METRICS, Format::OpenMetrics, OPEN_METRICS),
    ] {
        let answer = http(&lab, "GET", "/metrics", accept)?;
        assert_eq!(answer.status, 200, "{answer:?}");
        assert!(answer.content_type.starts_with(content_type), "{answer:?}");
        let families = parse(&answer.body, format).with_context(|| answer.body.clone())?;
        assert_eq!(families.len(), COUNTERS.len() + GAUGES.len(), "{:?}", families.keys());
        let kinds = [(&COUNTERS[..], "counter"), (&GAUGES, "gauge")];
        for ((name, names_of_labels), kind) in
            kinds.into_iter().flat_map(|(all, kind)| all.iter().map(move |it| (*it, kind)))
        {
            let family = families.get(name).with_context(|| name.to_owned())?;
            assert_eq!(family.kind, kind, "{name}");
            // Without a drop there is no peer; tests/receive.rs has some.
            let has_samples = name != "vxcsum_receive_dropped_packets";
            assert_eq!(!family.samples.is_empty(), has_samples, "{name}");
            let wanted: BTreeSet<_> = names_of_labels.iter().copied().collect();
            for labels in family.samples.keys() {
                let names: BTreeSet<_> = labels.keys().map(String::as_str).collect();
                assert_eq!(names, wanted, "{name}");
            }
        }

        let value = |name: &str, pairs: &[(&str, &str)]| -> Result<u64> {
            let family = families.get(name).with_context(|| name.to_owned())?;
            family.samples.get(&labels(pairs)).copied().with_context(|| format!("{name} {pairs:?}"))
        };
        let status = socket.status()?;
        let interface = status.interface()?;
        assert_eq!(value("vxcsum_skbs", &[("interface", NIC)])?, interface.skbs);
        for (verdict, count) in &interface.verdicts {
            let pairs = [("interface", NIC), ("verdict", verdict)];
            assert_eq!(value("vxcsum_packets", &pairs)?, count.packets, "{verdict}");
            assert_eq!(value("vxcsum_bytes", &pairs)?, count.bytes, "{verdict}");
        }
        let fixed =
            |action| value("vxcsum_fixed_packets", &[("interface", NIC), ("action", action)]);
        assert_eq!((fixed("restored")?, fixed("zeroed")?), (2, 0));
        assert_eq!(interface.fixed, 2);
        assert_eq!(value("vxcsum_events_emitted", &[])?, 3);
        assert_eq!(value("vxcsum_events_suppressed", &[])?, 0);
        assert_eq!(value("vxcsum_events_lost", &[])?, 0);
        assert_eq!(value("vxcsum_attached", &[("interface", NIC), ("method", "tcx")])?, 1);
        let version = env!("CARGO_PKG_VERSION");
        assert_eq!(value("vxcsum_build_info", &[("version", version)])?, 1);
    }
    Ok(())
}

#[test]
fn only_that_page_and_only_to_read() -> Result<()> {
    let lab = lab()?;
    let socket = Socket::new()?;
    let _daemon = socket.run(&lab.a, ["--metrics", &address().to_string()])?;
    for (method, path, status) in [
        ("GET", "/metrics", 200),
        ("POST", "/metrics", 405),
        ("DELETE", "/metrics", 405),
        ("GET", "/", 404),
        ("GET", "/metrics/x", 404),
        ("POST", "/", 404),
    ] {
        let answer = http(&lab, method, path, "")?;
        assert_eq!(answer.status, status, "{method} {path}: {answer:?}");
    }
    // What is no HTTP is no harm.
    let mut stream = lab.a.enter(|| Ok(TcpStream::connect(address())?))?;
    stream.write_all(b"\0\xff garbage\r\n\r\n")?;
    assert_eq!(http(&lab, "GET", "/metrics", "")?.status, 200);
    Ok(())
}

#[test]
fn nothing_listens_unless_asked() -> Result<()> {
    let lab = lab()?;
    let socket = Socket::new()?;
    let _daemon = socket.run(&lab.a, [""; 0])?;
    let listening = lab.a.enter(|| Ok(std::fs::read_to_string("/proc/thread-self/net/tcp")?))?;
    assert_eq!(listening.lines().count(), 1, "{listening}");
    Ok(())
}

#[test]
fn address_in_use() -> Result<()> {
    let lab = lab()?;
    let _other = lab.a.enter(|| Ok(TcpListener::bind(address())?))?;
    let socket = Socket::new()?;
    let metrics = address().to_string();
    let ended = socket.launch(&lab.a, ["--metrics", &metrics])?.wait_end(PLENTY)?;
    assert_eq!(ended.code, Some(2), "{ended:?}");
    let last = ended.stderr.lines().last().unwrap_or_default();
    assert!(last.contains(&metrics) && last.contains("in use"), "{ended:?}");
    assert!(!socket.path().exists(), "it leaves its socket");
    for wrong in ["9472", "localhost", "127.0.0.1:99999"] {
        let ended = socket.launch(&lab.a, ["--metrics", wrong])?.wait_end(PLENTY)?;
        assert_eq!(ended.code, Some(2), "{ended:?}");
        assert!(ended.stderr.contains(wrong) && ended.stderr.contains("--metrics"), "{ended:?}");
    }
    Ok(())
}

/// What is scraped in a storm is of one instant, and counting goes on. Scrapers that say nothing
/// are in nobody's way.
#[test]
fn scraped_in_a_storm() -> Result<()> {
    let lab = lab()?;
    let socket = Socket::new()?;
    let _daemon = socket.run(&lab.a, ["--quiet", "--metrics", &address().to_string()])?;
    let silent = lab.a.enter(|| {
        (0..50).map(|_| Ok(TcpStream::connect(address())?)).collect::<Result<Vec<_>>>()
    })?;
    let before = socket.status()?.interface()?.skbs;
    let storm = Storm::start(&lab.a, NIC, &[Packet::stale().frame()?], 2)?;
    let start = Instant::now();
    let mut scrapes = 0;
    while start.elapsed() < Duration::from_secs(2) {
        let asked = Instant::now();
        let families = parse(&http(&lab, "GET", "/metrics", "")?.body, Format::Text)?;
        assert!(asked.elapsed() < Duration::from_secs(1), "{:?}", asked.elapsed());
        let sum = |name: &str| -> u64 {
            families.get(name).map_or(0, |family| family.samples.values().sum())
        };
        let broken = families["vxcsum_packets"].samples.iter().filter(|(labels, _)| {
            ["mangled_zero", "stale_nat", "bad"].contains(&labels["verdict"].as_str())
        });
        let broken: u64 = broken.map(|(_, value)| value).sum();
        let events = ["emitted", "suppressed", "lost"];
        let events: u64 = events.iter().map(|it| sum(&format!("vxcsum_events_{it}"))).sum();
        assert_eq!(broken, events);
        scrapes += 1;
        thread::sleep(Duration::from_millis(2));
    }
    let sent = storm.stop()?;
    assert!(scrapes > 20, "{scrapes} scrapes");
    let status = socket.status()?;
    let interface: &Interface = status.interface()?;
    assert_eq!(interface.broken(), sent);
    assert!(interface.skbs - before >= sent);
    drop(silent);
    Ok(())
}
