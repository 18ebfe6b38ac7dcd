//! Nothing but broken packets, as fast as they can be sent.

use std::slice;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use vxcsum_tests::counters;
use vxcsum_tests::lab::{Lab, LabConfig, NIC};
use vxcsum_tests::storm::{Packet, SOURCE_PORTS, Storm};
use vxcsum_tests::traffic::send_frames;

use crate::effort::{Effort, interleaved};
use crate::report::{Findings, Limit, Panel, Series, percentile};
use crate::tail::Tail;
use crate::usage;
use crate::vxcsum::Vxcsum;

/// What the daemon may use (product.md §6).
const REACH_CPU_PERCENT: f64 = 5.0;
const REACH_KIB: f64 = 20.0 * 1024.0;

/// The burst that the limit allows at first, and what it takes to write it.
const BURST: Duration = Duration::from_secs(1);
const STORM: Duration = Duration::from_secs(2);
/// Events a second when there is no storm.
const MODEST: u32 = 100;

/// How the daemon is run, and whether somebody listens.
struct Subject {
    name: &'static str,
    options: &'static [&'static str],
    has_tail: bool,
    has_limit: bool,
    is_storm: bool,
}

const SUBJECTS: [Subject; 4] = [
    Subject {
        name: "default limit, nobody listens",
        options: &[],
        has_tail: false,
        has_limit: true,
        is_storm: true,
    },
    Subject {
        name: "default limit, one tail",
        options: &[],
        has_tail: true,
        has_limit: true,
        is_storm: true,
    },
    Subject {
        name: "no limit, one tail",
        options: &["--events-per-second", "0"],
        has_tail: true,
        has_limit: false,
        is_storm: true,
    },
    Subject {
        name: "no storm, 100 events/s, one tail",
        options: &[],
        has_tail: true,
        has_limit: true,
        is_storm: false,
    },
];

/// What came out of one of them.
struct Sample {
    packets_per_second: f64,
    /// Between what the daemon and what the NIC has counted, and what is not accounted for.
    off_by: f64,
    emitted: f64,
    suppressed: f64,
    lost: f64,
    cpu_percent: f64,
    /// Before anything happens, all that the start took included.
    start_kib: f64,
    /// From then on.
    peak_kib: f64,
    /// From the packet to the line, in microseconds.
    latency: Vec<f64>,
}

/// Measures all of it.
pub(crate) fn measure(effort: Effort) -> Result<Findings> {
    let lab = LabConfig { srcport: Some(SOURCE_PORTS), ..LabConfig::default() }.start()?;
    let samples = interleaved("storm", effort, &SUBJECTS, |subject| one(&lab, subject, effort))?;

    let all: Vec<_> = SUBJECTS.iter().zip(&samples).collect();
    let storms: Vec<_> = all.iter().copied().filter(|(subject, _)| subject.is_storm).collect();
    let panel = |title, unit, of: &[(&Subject, &Vec<Sample>)], value: fn(&Sample) -> f64| {
        let mut panel = Panel::new(title, unit);
        for (subject, samples) in of {
            panel.push(Series::new(subject.name, samples.iter().map(value).collect()));
        }
        panel
    };
    let reach = |mut panel: Panel, limit, without_limit_too, quote: Option<&str>| {
        let subjects = all.iter().map(|(subject, _)| *subject);
        for (series, subject) in panel.series.iter_mut().zip(subjects) {
            if subject.has_limit || without_limit_too {
                *series = series.clone().reach(Limit::AtMost, limit);
            }
            if let Some(name) = quote.filter(|_| subject.is_storm && subject.has_limit) {
                let listens = if subject.has_tail { "with a `tail`" } else { "nobody listens" };
                *series = series.clone().quote(&format!("{name}, {listens}"));
            }
        }
        panel
    };

    let mut findings = Findings::default();
    let title = "Packets that counters of vxcsum and of the NIC differ by, or that are not in the \
                 accounts of events";
    findings.panel(reach(panel(title, "packets", &all, |it| it.off_by), 0.0, true, None));
    let cpu = panel("The daemon", "% of a core", &all, |it| it.cpu_percent);
    let name = "The daemon in a storm of broken packets";
    findings.panel(reach(cpu, REACH_CPU_PERCENT, false, Some(name)));
    let memory = panel("The daemon's memory, at its peak", "KiB", &all, |it| it.peak_kib);
    let mut memory = reach(memory, REACH_KIB, false, Some("Its memory"));
    let at_start = samples.iter().flatten().map(|sample| sample.start_kib);
    memory.push(Series::new("peak of the start before that", at_start.collect()));
    findings.panel(memory);
    findings.panel(panel("Storm", "packets/s", &storms, |it| it.packets_per_second));
    findings.panel(fates(&storms));
    findings.panel(latencies(&all));
    findings.note(format!(
        "Each broken in the same way (`stale_nat`), sent by {} thread(s) through packet sockets; \
         one processor is left for the rest where there is more than one. Processor time is taken \
         for {STORM:?} after the burst of the first second; counts are of the whole run. While it \
         starts, the daemon holds the kernel's types (BTF) for a moment, as that peak shows.",
        threads()?
    ));
    findings.note(
        "Packet to line: from the time that the BPF program gives a packet to when its line has \
         come out of `vxcsum tail --json`. Without a limit, events wait in the queues of the \
         daemon; what finds no room in them is lost in the ring buffer, and counted.",
    );
    Ok(findings)
}

fn threads() -> Result<usize> {
    Ok(thread::available_parallelism()?.get().saturating_sub(1).max(1))
}

fn one(lab: &Lab, subject: &Subject, effort: Effort) -> Result<Sample> {
    counters::wait_quiet(&lab.a, NIC)?;
    let before = counters::device(&lab.a, NIC)?;
    let vxcsum = Vxcsum::start(&lab.a, &[NIC], subject.options)?;
    vxcsum.wait_ready()?;
    let start_kib = usage::resident_kib(vxcsum.pid())?.peak;
    usage::forget_peak(vxcsum.pid())?;
    let tail = subject.has_tail.then(|| Tail::start(&vxcsum.socket)).transpose()?;

    let stale = Packet::stale().frame()?;
    let storm = subject
        .is_storm
        .then(|| Storm::start(&lab.a, NIC, slice::from_ref(&stale), threads()?))
        .transpose()?;
    let storm_start = Instant::now();
    let pass = |duration| -> Result<()> {
        let end = Instant::now() + effort.duration(duration);
        while Instant::now() < end {
            if !subject.is_storm {
                send_frames(&lab.a, NIC, &[&stale])?;
            }
            thread::sleep(Duration::from_secs(1) / MODEST);
        }
        Ok(())
    };
    pass(BURST)?;
    let (start, busy) = (Instant::now(), usage::process_busy(vxcsum.pid())?);
    pass(STORM)?;
    let used = (usage::process_busy(vxcsum.pid())?.saturating_sub(busy)).as_secs_f64();
    let cpu_percent = 100.0 * used / start.elapsed().as_secs_f64();
    let sent = storm.map(Storm::stop).transpose()?.unwrap_or_default();
    let packets_per_second = sent as f64 / storm_start.elapsed().as_secs_f64();

    let status = vxcsum.socket.status()?;
    let (interface, events) = (status.interface()?, status.events);
    let left = counters::device(&lab.a, NIC)?.left_since(&before);
    let accounted = events.emitted + events.suppressed + events.lost;
    let off_by = interface.skbs.abs_diff(left)
        + interface.broken().abs_diff(accounted)
        + interface.packets("stale_nat").abs_diff(left);
    let peak_kib = usage::resident_kib(vxcsum.pid())?.peak;
    let latency = tail.map(Tail::stop).transpose()?.unwrap_or_default();
    vxcsum.stop()?;
    Ok(Sample {
        packets_per_second,
        off_by: off_by as f64,
        emitted: events.emitted as f64,
        suppressed: events.suppressed as f64,
        lost: events.lost as f64,
        cpu_percent,
        start_kib,
        peak_kib,
        latency,
    })
}

fn fates(storms: &[(&Subject, &Vec<Sample>)]) -> Panel {
    let mut panel = Panel::new("What became of the events", "events");
    for (subject, samples) in storms {
        let mut push = |fate, value: fn(&Sample) -> f64| {
            let series = Series::new(subject.name, samples.iter().map(value).collect());
            panel.push(series.variant(fate));
        };
        push("emitted", |sample| sample.emitted);
        push("suppressed", |sample| sample.suppressed);
        push("lost", |sample| sample.lost);
    }
    panel
}

fn latencies(all: &[(&Subject, &Vec<Sample>)]) -> Panel {
    let mut panel = Panel::new("From packet to line", "µs");
    for (subject, samples) in all.iter().filter(|(subject, _)| subject.has_tail) {
        for percent in [50, 99] {
            let samples = samples.iter().map(|sample| percentile(&sample.latency, percent));
            let series = Series::new(subject.name, samples.collect());
            panel.push(series.variant(format!("p{percent}")));
        }
    }
    panel
}
