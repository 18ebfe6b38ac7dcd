//! How the cost grows with what there is to watch, and with who listens.

use std::net::{IpAddr, Ipv4Addr};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use vxcsum::transport::Transport;
use vxcsum_common::layout::{Config, FixMode, Port, Ports};
use vxcsum_common::{Policy, Verdict};
use vxcsum_tests::lab::{Lab, LabConfig, NIC};
use vxcsum_tests::packets::{
    Check, Ethernet, Extension, Frame, Ip, SERVICE_VLAN, SegmentSum, Transport as Carried, Udp,
    VLAN, Vxlan,
};
use vxcsum_tests::storm::{Packet, SOURCE_PORTS};
use vxcsum_tests::traffic::send_frames;

use crate::clients::Clients;
use crate::effort::{Effort, interleaved};
use crate::report::{Findings, Limit, Panel, Series};
use crate::start::interfaces;
use crate::test_run::Loaded;
use crate::usage;
use crate::vxcsum::Vxcsum;

const PORTS: [u16; 5] = [1, 2, 4, 8, 16];
const INTERFACES: [usize; 4] = [1, 4, 16, 64];
const CLIENTS: [usize; 4] = [1, 10, 100, 1000];

/// How long it is watched at doing nothing.
const IDLE: Duration = Duration::from_secs(2);
const EVENTS_PER_SECOND: u32 = 100;
const EVENTS: u32 = 200;

/// Measures all of it.
pub(crate) fn measure(effort: Effort) -> Result<Findings> {
    let mut findings = Findings::default();
    findings.panel(headers(effort)?);
    findings.panel(ports(effort)?);
    for panel in with_interfaces(effort)? {
        findings.panel(panel);
    }
    for panel in with_clients(effort)? {
        findings.panel(panel);
    }
    findings.note(
        "Time per packet is that of BPF_PROG_TEST_RUN, with the few nanoseconds that its own loop \
         takes: the bench `cost` takes these off. Packets with a right sum have an open inner one, \
         as a node sends them.",
    );
    findings.note(format!(
        "Clients: {EVENTS_PER_SECOND} events/s, {EVENTS} in all; each client wants all of them, and \
         is told of those that it has missed. All clients are read by one thread of the bench, on \
         the same machine."
    ));
    Ok(findings)
}

fn config(count: u16) -> Result<Config> {
    let port = |port| Port {
        port,
        policy_ipv4: Policy::Sum as u8,
        policy_ipv6: Policy::Sum as u8,
        ..Port::default()
    };
    let ports: Vec<_> = (0..count).map(|index| port(8472 + index)).collect();
    Ok(Config {
        ports: Ports::new(&ports).context("too many ports")?,
        fix: FixMode::Off as u8,
        fix_unproven: 0,
        is_raw_ip: 0,
        following: 0,
        max_frame_len: 1514,
        zero: [0; 2],
        event_cost_ns: 1_000_000,
    })
}

/// DNS over UDP with an open sum, as `outer` carries it.
fn vxlan(check: Check) -> Vxlan {
    let ends = [Ipv4Addr::new(172, 29, 0, 0), Ipv4Addr::new(172, 29, 2, 0)].map(IpAddr::from);
    let udp = Udp {
        source_port: 7000,
        destination_port: 53,
        payload: vec![0x5a; 60],
        sum: SegmentSum::Open,
    };
    Vxlan::new(50000, check, Ip::new(ends[0], ends[1], Carried::Udp(udp)).into())
}

fn headers(effort: Effort) -> Result<Panel> {
    let v4 = || Ip::v4(Carried::Vxlan(vxlan(Check::Right)));
    let v6 = || Ip::v6(Carried::Vxlan(vxlan(Check::Right)));
    let extensions = |extensions| Ip { extensions, ..v6() };
    let kinds: [(&str, Ethernet); 7] = [
        ("IPv4", v4().into()),
        ("IPv4, VLAN", Ethernet::from(v4()).tagged(&[VLAN])),
        ("IPv4, QinQ", Ethernet::from(v4()).tagged(&[SERVICE_VLAN, VLAN])),
        ("IPv4, 40 bytes of options", Ip { options: vec![1; 40], ..v4() }.into()),
        ("IPv6", v6().into()),
        ("IPv6, 1 extension header", extensions(vec![Extension::HopByHop(8)]).into()),
        (
            "IPv6, 2 extension headers",
            extensions(vec![Extension::HopByHop(8), Extension::DestinationOptions(24)]).into(),
        ),
    ];
    let config = config(1)?;
    let mut subjects = Vec::new();
    for (name, ethernet) in kinds {
        let frame = Frame::new(&ethernet)?.bytes;
        subjects.extend(Transport::ALL.map(|transport| (name, frame.clone(), transport)));
    }
    let mut ring = Loaded::new(Transport::Ring, &config)?;
    let mut perf = Loaded::new(Transport::Perf, &config)?;
    let samples = interleaved("growth, headers", effort, &subjects, |(_, frame, transport)| {
        let loaded = if *transport == Transport::Ring { &mut ring } else { &mut perf };
        loaded.nanoseconds(frame, Some(Verdict::Valid), effort)
    })?;
    let mut panel = Panel::new("A packet with a right sum, by its outer headers", "ns");
    for ((name, _, transport), samples) in subjects.into_iter().zip(samples) {
        panel.push(Series::new(name, samples).variant(transport.as_str()));
    }
    Ok(panel)
}

fn ports(effort: Effort) -> Result<Panel> {
    let other = Udp {
        source_port: 7000,
        destination_port: 53,
        payload: vec![0x5a; 60],
        sum: SegmentSum::Complete,
    };
    let other = Frame::new(&Ip::v4(Carried::Udp(other)).into())?.bytes;
    let right = Frame::new(&Ip::v4(Carried::Vxlan(vxlan(Check::Right))).into())?.bytes;
    let kinds =
        [("UDP to another port", other, None), ("a right sum", right, Some(Verdict::Valid))];
    let mut subjects = Vec::new();
    for (name, frame, verdict) in kinds {
        subjects.extend(PORTS.map(|count| (name, frame.clone(), verdict, count)));
    }
    let samples = interleaved("growth, ports", effort, &subjects, |(_, frame, verdict, count)| {
        let mut loaded = Loaded::new(Transport::Ring, &config(*count)?)?;
        loaded.nanoseconds(frame, *verdict, effort)
    })?;
    let mut panel = Panel::over("watched ports", "A packet, by the number of watched ports", "ns");
    for ((name, .., count), samples) in subjects.into_iter().zip(samples) {
        panel.push(Series::new(name, samples).variant(name).at(count.into()));
    }
    Ok(panel)
}

fn with_interfaces(effort: Effort) -> Result<[Panel; 3]> {
    let subjects = &INTERFACES[..effort.count(INTERFACES.len(), 2)];
    let samples = interleaved("growth, interfaces", effort, subjects, |&count| {
        let (ns, names) = interfaces(count)?;
        let names: Vec<_> = names.iter().map(String::as_str).collect();
        let vxcsum = Vxcsum::start(&ns, &names, &[])?;
        vxcsum.wait_ready()?;
        let (start, busy) = (Instant::now(), usage::process_busy(vxcsum.pid())?);
        thread::sleep(effort.duration(IDLE));
        let used = usage::process_busy(vxcsum.pid())?.saturating_sub(busy).as_secs_f64();
        let idle = 1000.0 * used / start.elapsed().as_secs_f64();
        let resident = usage::resident_kib(vxcsum.pid())?.now;
        let took = vxcsum.started_in.as_secs_f64() * 1000.0;
        vxcsum.stop()?;
        Ok([took, resident, idle])
    })?;
    let over = |title, unit| Panel::over("interfaces", title, unit);
    let panels = [
        over("Start to attached, by interfaces", "ms"),
        over("Memory of the daemon, by interfaces", "KiB"),
        over("The idle daemon, by interfaces", "ms of a processor per s"),
    ];
    Ok(filled(panels, "ring", subjects, &samples))
}

fn with_clients(effort: Effort) -> Result<[Panel; 4]> {
    let lab = LabConfig { srcport: Some(SOURCE_PORTS), ..LabConfig::default() }.start()?;
    let subjects = &CLIENTS[..effort.count(CLIENTS.len(), 2)];
    let samples = interleaved("growth, clients", effort, subjects, |&count| {
        clients(&lab, count, effort.count(EVENTS as usize, 20))
    })?;
    let over = |title, unit| Panel::over("clients", title, unit);
    let panels = [
        over("The daemon, by clients that want all of 100 events/s", "% of a core"),
        over("Memory of the daemon, by clients", "KiB"),
        over("Events that a client got", "events"),
        over("Events that no client got nor was told to have missed", "events"),
    ];
    let mut panels = filled(panels, "tail", subjects, &samples);
    for series in &mut panels[3].series {
        *series = series.clone().reach(Limit::AtMost, 0.0);
    }
    Ok(panels)
}

/// Daemon's processor time in percent, its memory in KiB, events that a client got on average, and
/// events of all clients that are not accounted for.
fn clients(lab: &Lab, count: usize, events: usize) -> Result<[f64; 4]> {
    let vxcsum = Vxcsum::start(&lab.a, &[NIC], &[])?;
    vxcsum.wait_ready()?;
    usage::forget_peak(vxcsum.pid())?;
    let clients = Clients::connect(&vxcsum.socket, count)?;
    let stale = Packet::stale().frame()?;
    let (start, busy) = (Instant::now(), usage::process_busy(vxcsum.pid())?);
    for index in 1..=events {
        send_frames(&lab.a, NIC, &[&stale])?;
        let next = start + Duration::from_secs(1) / EVENTS_PER_SECOND * index as u32;
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    let took = start.elapsed().as_secs_f64();
    let used = usage::process_busy(vxcsum.pid())?.saturating_sub(busy).as_secs_f64();
    let clients = clients.stop()?;
    let emitted = vxcsum.socket.status()?.events.emitted;
    let resident = usage::resident_kib(vxcsum.pid())?.peak;
    vxcsum.stop()?;
    let unaccounted = clients.iter().map(|client| emitted.abs_diff(client.events + client.missed));
    let got = clients.iter().map(|client| client.events).sum::<u64>();
    Ok([100.0 * used / took, resident, got as f64 / count as f64, unaccounted.sum::<u64>() as f64])
}

/// Puts one number of each sample into each panel.
fn filled<const N: usize>(
    mut panels: [Panel; N],
    name: &str,
    subjects: &[usize],
    samples: &[Vec<[f64; N]>],
) -> [Panel; N] {
    for (&count, samples) in subjects.iter().zip(samples) {
        for (index, panel) in panels.iter_mut().enumerate() {
            let values = samples.iter().map(|sample| sample[index]).collect();
            panel.push(Series::new(name, values).at(count as f64));
        }
    }
    panels
}
