//! `vxcsum run`: watches interfaces until it is told to stop.

use std::io::{self, Write as _};
use std::path::Path;
use std::thread;

use anyhow::{Context as _, Result, bail};
use aya::maps::{MapData, RingBuf};
use aya_log::EbpfLogger;
use serde::Serialize;
use tokio::io::unix::AsyncFd;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use vxcsum_common::layout::SkbLayout;

use crate::attach::{Attachment, Claim, Method};
use crate::event::{Event, Source};
use crate::links::Links;
use crate::plan::{Plan, Wish};
use crate::program::{LoadOptions, Program};
use crate::skb_layout::{self, VMLINUX_BTF};
use crate::summary::Summary;

/// What to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// The interfaces to watch.
    pub interfaces: Vec<String>,
    /// What to watch them for.
    pub wish: Wish,
    /// How to attach; the best that the kernel has where that is left open.
    pub method: Option<Method>,
    /// Size of each ring buffer in bytes.
    pub ring_len: u32,
    /// JSON instead of lines for people.
    pub json: bool,
    /// Show the debug log of the BPF program.
    pub bpf_log: bool,
}

/// Events that wait for a slow reader before the ring buffers fill up.
const PRINT_QUEUE_LEN: usize = 1024;

/// A watched interface.
struct Watched {
    name: String,
    program: Program,
    attachment: Attachment,
    _claim: Claim,
}

/// Runs until SIGINT or SIGTERM, or until nobody reads what it prints.
pub async fn run(options: Options) -> Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    raise_memlock_limit();
    let skb_layout = read_skb_layout();

    let (to_printer, printer_queue) = mpsc::channel(PRINT_QUEUE_LEN);
    let json = options.json;
    let printer = thread::spawn(move || print(printer_queue, json));

    let (stop, stopped) = watch::channel(false);
    let mut readers = JoinSet::new();
    let mut watched = Vec::new();
    let links = Links::read().await?;
    let default_ports = read_local_port_range();
    for name in &options.interfaces {
        let (interface, events, plan) = attach(&options, skb_layout, &links, default_ports, name)?;
        eprintln!("watching {name} ({}): {plan}", interface.attachment.method.as_str());
        let source = Source { interface: name.clone(), plan };
        // SAFETY: the ring buffer owns its file descriptor and keeps it open and the same as long
        // as it lives, which is longer than the registration.
        let events = unsafe { AsyncFd::register(events) }.context("cannot wait for events")?;
        readers.spawn(forward(events, source, to_printer.clone(), stopped.clone()));
        watched.push(interface);
    }
    drop(stopped);
    if options.bpf_log {
        for interface in &mut watched {
            let log = EbpfLogger::init_with_logger(interface.program.ebpf(), StderrLog)
                .context("cannot read the debug log of the BPF program")?;
            // SAFETY: as above.
            let log = unsafe { AsyncFd::register(log) }.context("cannot wait for the debug log")?;
            tokio::spawn(forward_log(log));
        }
    }

    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
        () = to_printer.closed() => {}
    }

    // First the programs, then what they have left in the ring buffers, then the counters: so that
    // every event that is counted is printed.
    let mut detached = Vec::new();
    for Watched { name, mut program, attachment, _claim: claim } in watched {
        let method = attachment.method;
        if let Err(error) = attachment.detach(program.classifier()?) {
            eprintln!("vxcsum: cannot detach from {name}: {error}");
        }
        detached.push((name, program, method, claim));
    }
    stop.send_replace(true);
    while readers.join_next().await.is_some() {}
    let mut counted = Vec::new();
    for (name, program, method, _) in &detached {
        counted.push((name.as_str(), *method, program.counters()?));
    }
    let summary = Summary::new(options.wish.fix, counted);
    // Fails when nobody reads any more, which ends quietly.
    let _ = to_printer.send(Line::Summary(Box::new(summary))).await;
    drop(to_printer);
    match printer.join() {
        Ok(outcome) => outcome.context("cannot write to standard output"),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// Loads, configures and attaches the program of one interface.
fn attach(
    options: &Options,
    skb_layout: Option<SkbLayout>,
    links: &Links,
    default_ports: (u16, u16),
    name: &str,
) -> Result<(Watched, RingBuf<MapData>, Plan)> {
    let Some(link) = links.by_name(name) else {
        let names = links.names().collect::<Vec<_>>().join(", ");
        bail!("there is no interface {name:?} in this network namespace; it has {names}");
    };
    let claim = Claim::new(name, link.index)?;
    let (mut program, events) = Program::load(&LoadOptions {
        skb_layout,
        ring_len: options.ring_len,
        debug_log: options.bpf_log,
    })?;
    let plan = Plan::new(&options.wish, link, links, default_ports)?;
    for (key, device) in plan.devices() {
        program.set_device(key, device)?;
    }
    program.configure(plan.config())?;
    let attachment = Attachment::new(program.classifier()?, name, options.method)?;
    let interface = Watched { name: name.to_owned(), program, attachment, _claim: claim };
    Ok((interface, events, plan))
}

/// Takes events from a ring buffer to the printer, until told to stop and the ring is empty.
async fn forward(
    mut events: AsyncFd<RingBuf<MapData>>,
    source: Source,
    to_printer: mpsc::Sender<Line>,
    mut stop: watch::Receiver<bool>,
) {
    loop {
        let stopping = *stop.borrow_and_update();
        while let Some(record) = events.get_mut().next().map(|record| record.to_vec()) {
            let line = match source.decode(&record) {
                Some(event) => Line::Event(Box::new(event)),
                None => Line::Undecodable(source.interface.clone()),
            };
            if to_printer.send(line).await.is_err() {
                return;
            }
        }
        if stopping {
            return;
        }
        tokio::select! {
            ready = events.readable_mut() => match ready {
                Ok(mut ready) => ready.clear_ready(),
                Err(_) => return,
            },
            _ = stop.changed() => {}
        }
    }
}

async fn forward_log(mut log: AsyncFd<EbpfLogger<StderrLog>>) {
    loop {
        match log.readable_mut().await {
            Ok(mut ready) => {
                ready.get_inner_mut().flush();
                ready.clear_ready();
            }
            Err(_) => return,
        }
    }
}

/// What goes to standard output.
enum Line {
    Event(Box<Event>),
    Undecodable(String),
    Summary(Box<Summary>),
}

/// Writes what comes, and flushes whenever nothing more is waiting. In a thread of its own: a
/// reader that stops reading must not keep signals from being handled.
fn print(mut queue: mpsc::Receiver<Line>, json: bool) -> io::Result<()> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    while let Some(line) = queue.blocking_recv() {
        let mut written = write_line(&mut out, line, json);
        if queue.is_empty() {
            written = written.and_then(|()| out.flush());
        }
        match written {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            other => other?,
        }
    }
    Ok(())
}

fn write_line(out: &mut impl io::Write, line: Line, json: bool) -> io::Result<()> {
    match line {
        Line::Event(event) if json => write_json(out, &event),
        Line::Event(event) => writeln!(out, "{event}"),
        Line::Undecodable(interface) => {
            eprintln!("vxcsum: an event of {interface} cannot be decoded");
            Ok(())
        }
        Line::Summary(summary) if json => write_json(out, &SummaryLine { summary }),
        Line::Summary(summary) => writeln!(out, "{summary}"),
    }
}

#[derive(Serialize)]
struct SummaryLine {
    summary: Box<Summary>,
}

fn write_json(out: &mut impl io::Write, value: &impl Serialize) -> io::Result<()> {
    serde_json::to_writer(&mut *out, value)?;
    out.write_all(b"\n")
}

/// Hands the BPF program's debug log to standard error.
struct StderrLog;

impl log::Log for StderrLog {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        eprintln!("bpf: {}", record.args());
    }

    fn flush(&self) {}
}

/// Kernels before 5.11 charge maps against a limit that is 64 KiB by default. Where it may not be
/// raised, loading says what is missing.
fn raise_memlock_limit() {
    let _ = rlimit::Resource::MEMLOCK.set(rlimit::INFINITY, rlimit::INFINITY);
}

/// Without it the offload state is missing from events, and nested tunnels are `unverified`.
fn read_skb_layout() -> Option<SkbLayout> {
    match skb_layout::read(Path::new(VMLINUX_BTF)) {
        Ok(layout) => Some(layout),
        Err(error) => {
            eprintln!("vxcsum: {error}; events go without ip_summed");
            None
        }
    }
}

/// What the VXLAN driver takes its source ports from by default.
fn read_local_port_range() -> (u16, u16) {
    const KERNEL_DEFAULT: (u16, u16) = (32768, 60999);
    let parse = |text: &str| {
        let (min, max) = text.trim().split_once(char::is_whitespace)?;
        Some((min.parse().ok()?, max.trim().parse().ok()?))
    };
    std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")
        .ok()
        .and_then(|text| parse(&text))
        .unwrap_or(KERNEL_DEFAULT)
}
