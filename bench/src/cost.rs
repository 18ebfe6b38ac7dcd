//! What a packet costs, above a program that does nothing: by `BPF_PROG_TEST_RUN`, beside the same job
//! written by hand in C.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use aya::Ebpf;
use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};
use vxcsum::program::{LoadOptions, Program};
use vxcsum::skb_layout::{self, VMLINUX_BTF};
use vxcsum::transport::{Buffer, Taken, Transport};
use vxcsum_common::layout::{Config, Counters, DeviceKey, FixMode, Port, Ports, Report};
use vxcsum_common::{Device, Policy, Verdict};
use vxcsum_tests::cases;
use vxcsum_tests::packets::{Check, Frame, Ip, SegmentSum, Transport as Carried, Udp, Vxlan};
use vxcsum_tests::storm::{PORT_BEFORE_NAT, SOURCE_PORTS};

use crate::effort::{Effort, interleaved};
use crate::reference::{self, Objects, Reference};
use crate::report::{Findings, Limit, Panel, Series};

const PORT: u16 = 8472;
const VNI: u32 = 1;

/// The most that a packet may cost (product.md §6), in nanoseconds.
const NOT_VXLAN: f64 = 2.0;
const ZERO: f64 = 4.0;
const RIGHT: f64 = 12.0;

/// Measures all of it.
pub(crate) fn measure(effort: Effort) -> Result<Findings> {
    let objects = Objects::compile()?;
    let kinds = kinds()?;
    let samples = interleaved("cost", effort, &WHICH, |&which| {
        // Loaded anew each time: where the JIT compiler puts a program makes a difference of 2 ns.
        let mut program = Loaded::load(which, &objects)?;
        kinds.iter().map(|kind| program.nanoseconds(kind, effort)).collect::<Result<Vec<_>>>()
    })?;
    let mut findings = Findings::default();
    for panel in panels(&kinds, &samples)? {
        findings.panel(panel);
    }
    findings.note(format!(
        "Time of the kernel's own loop, less that of the same loop around a program that does \
         nothing. The fastest of some batches of one packet, over and over; of packets that are \
         restored, and broken no more then, one at a time. C: bench/reference/egress.bpf.c with \
         libbpf's headers, by {}.",
        objects.compiler
    ));
    findings.note(
        "Broken packets are rare, and cost more in vxcsum than in C: each step of their way is a \
         function that the verifier walks on its own, which keeps what it has to walk small on old \
         kernels.",
    );
    Ok(findings)
}

fn panels(kinds: &[Kind], samples: &[Vec<Vec<f64>>]) -> Result<[Panel; 3]> {
    let mut healthy = Panel::new("A packet that is not broken, above an empty program", "ns");
    let mut broken = Panel::new("A broken packet, above an empty program", "ns");
    let mut ratios = Panel::new("vxcsum, as a multiple of C", "×");
    let empty = samples.first().context("nothing was measured")?;
    for (index, kind) in kinds.iter().enumerate() {
        let above = |samples: &[Vec<f64>]| -> Vec<f64> {
            samples.iter().zip(empty).map(|(all, empty)| all[index] - empty[index]).collect()
        };
        for (which, samples) in WHICH.iter().zip(samples).skip(1) {
            let mut series = Series::new(kind.name, above(samples)).variant(which.name());
            if let (Which::Vxcsum(Transport::Ring), Some(limit)) = (which, kind.reach) {
                series = series.reach(Limit::AtMost, limit);
                series = series.quote(&format!("A packet, {}", kind.name));
            }
            if kind.is_broken() { broken.push(series) } else { healthy.push(series) }
        }
        for transport in Transport::ALL {
            let of = |wanted| WHICH.iter().position(|&which| which == wanted);
            let (Some(own), Some(other)) = (of(Which::Vxcsum(transport)), of(Which::C(transport)))
            else {
                continue;
            };
            let pairs = above(&samples[own]).into_iter().zip(above(&samples[other]));
            let series = Series::new(kind.name, pairs.map(|(own, other)| own / other).collect());
            let series = series.variant(transport.as_str());
            let is_limited = kind.reach.is_some() && transport == Transport::Ring;
            ratios.push(if is_limited { series.reach(Limit::AtMost, 1.0) } else { series });
        }
    }
    Ok([healthy, broken, ratios])
}

/// A packet, and how it is measured.
struct Kind {
    name: &'static str,
    frame: Vec<u8>,
    policy: Policy,
    /// What it is; not VXLAN where there is none.
    verdict: Option<Verdict>,
    run: Run,
    reach: Option<f64>,
}

/// How often a packet is taken at a time, and what is to be done with a broken one.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Run {
    /// Over and over; there is no event of it.
    Repeated,
    /// As often as the event buffer has room, which is emptied then.
    WithEvent,
    /// Singly, because it is restored.
    Restored,
}

impl Kind {
    fn is_broken(&self) -> bool {
        self.verdict.is_some_and(Verdict::is_broken)
    }
}

fn kinds() -> Result<Vec<Kind>> {
    let stale = Check::Stale { old_port: PORT_BEFORE_NAT, old_address: None };
    let other = Udp {
        source_port: 7000,
        destination_port: 53,
        payload: vec![0x5a; 60],
        sum: SegmentSum::Complete,
    };
    let tcp = cases::tcp(SegmentSum::Complete);
    let kind = |name, frame: Frame, verdict, run, reach| Kind {
        name,
        frame: frame.bytes,
        policy: if verdict == Some(Verdict::Zero) { Policy::Zero } else { Policy::Sum },
        verdict,
        run,
        reach,
    };
    let repeated = |name, frame, verdict, reach| kind(name, frame, verdict, Run::Repeated, reach);
    let not_vxlan = |ip: Ip| Frame::new(&ip.into());
    let broken = vxlan(false, stale)?;
    let broken = |name, run| kind(name, broken.clone(), Some(Verdict::StaleNat), run, None);
    Ok(vec![
        repeated("TCP, not VXLAN", not_vxlan(Ip::v4(tcp))?, None, Some(NOT_VXLAN)),
        repeated("UDP, not VXLAN", not_vxlan(Ip::v4(Carried::Udp(other)))?, None, Some(NOT_VXLAN)),
        repeated("zero", vxlan(false, Check::Zero)?, Some(Verdict::Zero), Some(ZERO)),
        repeated("pending", vxlan(false, Check::Pending)?, Some(Verdict::OffloadPending), None),
        repeated("right, IPv4", vxlan(false, Check::Right)?, Some(Verdict::Valid), Some(RIGHT)),
        repeated("right, IPv6", vxlan(true, Check::Right)?, Some(Verdict::Valid), Some(RIGHT)),
        broken("event limited away", Run::Repeated),
        broken("with an event", Run::WithEvent),
        broken("restored", Run::Restored),
    ])
}

/// A SYN in a VXLAN packet, its own sum still open.
fn vxlan(is_ipv6: bool, check: Check) -> Result<Frame> {
    let inner = Ip::v4(cases::tcp(SegmentSum::Open));
    let carried = Carried::Vxlan(Vxlan::new(50000, check, inner.into()));
    let outer = if is_ipv6 { Ip::v6(carried) } else { Ip::v4(carried) };
    Frame::new(&outer.into())
}

/// A program.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Which {
    Empty,
    Vxcsum(Transport),
    C(Transport),
}

/// The empty one first.
const WHICH: [Which; 5] = [
    Which::Empty,
    Which::Vxcsum(Transport::Ring),
    Which::C(Transport::Ring),
    Which::Vxcsum(Transport::Perf),
    Which::C(Transport::Perf),
];

impl Which {
    const fn name(self) -> &'static str {
        match self {
            Self::Empty => "empty",
            Self::Vxcsum(Transport::Ring) => "vxcsum",
            Self::Vxcsum(Transport::Perf) => "vxcsum, old kernels",
            Self::C(Transport::Ring) => "C",
            Self::C(Transport::Perf) => "C, old kernels",
        }
    }
}

/// A program in the kernel.
enum Loaded {
    Empty(Ebpf),
    Vxcsum(Box<Program>, Vec<Buffer>),
    C(Box<Reference>),
}

impl Loaded {
    fn load(which: Which, objects: &Objects) -> Result<Self> {
        Ok(match which {
            Which::Empty => Self::Empty(objects.load_empty()?),
            Which::Vxcsum(transport) => {
                let layout = || skb_layout::read(Path::new(VMLINUX_BTF));
                let has_layout = transport == Transport::Ring;
                let skb_layout = has_layout.then(layout).transpose()?;
                let options = LoadOptions { transport, skb_layout, ..LoadOptions::default() };
                let (program, events) = Program::load(&options)?;
                Self::Vxcsum(Box::new(program), events)
            }
            Which::C(transport) => Self::C(Box::new(objects.load(transport)?)),
        })
    }

    fn classifier(&mut self) -> Result<&mut SchedClassifier> {
        match self {
            Self::Empty(ebpf) => reference::classifier(ebpf, "empty"),
            Self::Vxcsum(program, _) => Ok(program.classifier()?),
            Self::C(reference) => reference.classifier(),
        }
    }

    fn configure(&mut self, config: &Config) -> Result<()> {
        let key = DeviceKey { vni: VNI, port: PORT.into() };
        // A device that has no other port to send from needs no flow hash as proof of NAT.
        let (source_port_min, source_port_max) = SOURCE_PORTS;
        let device = Device { source_port_min, source_port_max, ..Device::UNKNOWN };
        match self {
            Self::Empty(_) => {}
            Self::Vxcsum(program, _) => {
                program.configure(config)?;
                program.set_device(key, device)?;
            }
            Self::C(reference) => {
                reference.configure(config)?;
                reference.set_device(key, device)?;
            }
        }
        Ok(())
    }

    fn counters(&self) -> Result<Option<Counters>> {
        Ok(match self {
            Self::Empty(_) => None,
            Self::Vxcsum(program, _) => Some(program.counters()?),
            Self::C(reference) => Some(reference.counters()?),
        })
    }

    /// Makes room for events.
    fn drain(&mut self) {
        let events = match self {
            Self::Empty(_) => return,
            Self::Vxcsum(_, events) => events,
            Self::C(reference) => &mut reference.events,
        };
        for buffer in events {
            let mut taken = Taken::default();
            let mut before = None;
            while before.replace(taken.records.len()) != Some(taken.records.len()) {
                buffer.take(&mut taken);
            }
        }
    }

    /// What a packet takes, in nanoseconds, with the loop in the kernel. It is an error if it is
    /// counted as anything but what it is.
    fn nanoseconds(&mut self, kind: &Kind, effort: Effort) -> Result<f64> {
        self.configure(&kind.config()?)?;
        let before = self.counters()?;
        let (batches, repeat) = match kind.run {
            Run::Repeated => (12, 100_000),
            // Half of what the buffer has room for.
            Run::WithEvent => (100, 1000),
            Run::Restored => (12, 2000),
        };
        let (batches, repeat) = (effort.count(batches, 2), effort.count(repeat, 200));
        let mut fastest = f64::INFINITY;
        for _ in 0..batches {
            self.drain();
            let classifier = self.classifier()?;
            let batch = match kind.run {
                Run::Repeated | Run::WithEvent => over_and_over(classifier, &kind.frame, repeat)?,
                Run::Restored => one_at_a_time(classifier, &kind.frame, repeat)?,
            };
            fastest = fastest.min(batch);
        }
        if let (Some(before), Some(after)) = (before, self.counters()?) {
            let packets = (batches * repeat) as u64;
            ensure!(kind.counted(&before, &after) == packets, "{}: counted otherwise", kind.name);
        }
        Ok(fastest)
    }
}

impl Kind {
    fn config(&self) -> Result<Config> {
        let policy = self.policy as u8;
        let port = Port { port: PORT, policy_ipv4: policy, policy_ipv6: policy, ..Port::default() };
        let is_restored = self.run == Run::Restored;
        Ok(Config {
            ports: Ports::new(&[port]).context("a port that cannot be watched")?,
            fix: if is_restored { FixMode::Restore } else { FixMode::Off } as u8,
            fix_unproven: 0,
            is_raw_ip: 0,
            following: 0,
            max_frame_len: 1514,
            // One event in four seconds, or as many as there are.
            zero: [0; 2],
            event_cost_ns: if self.run == Run::WithEvent { 0 } else { u32::MAX },
        })
    }

    /// How many packets were counted as what this is, with the report and the action that belong to
    /// it.
    fn counted(&self, before: &Counters, after: &Counters) -> u64 {
        let Some(verdict) = self.verdict else { return after.not_vxlan - before.not_vxlan };
        let skbs = after.of(verdict).skbs - before.of(verdict).skbs;
        let emitted = |counters: &Counters| counters.reported(Report::Emitted).skbs;
        match self.run {
            Run::Repeated => skbs,
            Run::WithEvent => skbs.min(emitted(after) - emitted(before)),
            Run::Restored => skbs.min(after.restored - before.restored),
        }
    }
}

/// By the clock around the system call: what the kernel returns is whole nanoseconds.
fn over_and_over(classifier: &mut SchedClassifier, frame: &[u8], repeat: usize) -> Result<f64> {
    let options = TestRunOptions {
        data_in: Some(frame),
        repeat: u32::try_from(repeat)?,
        ..TestRunOptions::default()
    };
    let start = Instant::now();
    classifier.test_run(options).context("test run")?;
    Ok(start.elapsed().as_nanos() as f64 / repeat as f64)
}

/// By the clock of the kernel, which leaves the system call out.
fn one_at_a_time(classifier: &mut SchedClassifier, frame: &[u8], count: usize) -> Result<f64> {
    let mut sum = 0.0;
    for _ in 0..count {
        let options = TestRunOptions { data_in: Some(frame), ..TestRunOptions::default() };
        sum += classifier.test_run(options).context("test run")?.duration.as_nanos() as f64;
    }
    Ok(sum / count as f64)
}
