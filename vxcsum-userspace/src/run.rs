//! `vxcsum run`: the daemon, in the foreground as service managers want it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};

use crate::annotate::annotate;
use crate::changes;
use crate::cli::{LogFormat, UsageError};
use crate::clock;
use crate::kernel::{self, Kernel};
use crate::links::sent_packets;
use crate::memory;
use crate::metrics;
use crate::news::{Channels, distribute, lock, observe};
use crate::printer::{Line, print};
use crate::privileges::{check_privileges, drop_privileges};
use crate::program::check_bpf;
use crate::server::{self, Metered, Request, Server};
use crate::stalls::Stalls;
use crate::summary::Summary;
use crate::supervisor::{self, Supervisor};
use crate::transport::Transport;

/// What to run.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// What to watch.
    pub watch: supervisor::Options,
    /// How events come; the best that the kernel has where that is left open.
    pub transport: Option<Transport>,
    /// Another description of the kernel's types than its own.
    pub btf: Option<PathBuf>,
    /// Where clients connect.
    pub socket: server::Options,
    /// Where to serve metrics, if anywhere.
    pub metrics: Option<SocketAddr>,
    /// JSON instead of lines for people.
    pub json: bool,
    /// Print no events.
    pub quiet: bool,
    /// How to log.
    pub log_format: LogFormat,
}

/// Events that wait for a slow reader before the ring buffers fill up.
const QUEUE_LEN: usize = 1024;
/// Events that a client may fall behind before it misses some.
const CLIENT_QUEUE_LEN: usize = 4096;
/// How often to look at the devices anew although the kernel has told of no change.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);

/// Runs until SIGINT or SIGTERM, or until nobody reads what it prints. On SIGHUP, `reread` tells what
/// to run from then on.
pub async fn run(options: Options, reread: impl Fn() -> Result<Options, UsageError>) -> Result<()> {
    memory::keep_little();
    let current = options.clone();
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    raise_memlock_limit();

    check_privileges()?;
    check_bpf()?;
    // What needs more privileges than it goes on with comes first, and threads come later: they
    // inherit what is left.
    let server = Server::bind(&options.socket)?;
    let kernel = probe(&options)?;
    drop_privileges()?;

    let (records, recorded) = mpsc::channel(QUEUE_LEN);
    let (to_printer, printer_queue) = mpsc::channel(QUEUE_LEN);
    let to_clients = Channels::new(CLIENT_QUEUE_LEN);
    let json = options.json;
    let printer = thread::spawn(move || print(printer_queue, json));
    let printing = (!options.quiet).then(|| to_printer.clone());
    let stalls = Arc::new(Mutex::new(Stalls::default()));
    let (to_annotator, observed) = mpsc::channel(QUEUE_LEN);
    let (to_distributor, annotated) = mpsc::channel(QUEUE_LEN);
    let (is_printing, clients) = (printing.is_some(), to_clients.clone());
    let is_wanted = move || is_printing || clients.events.receiver_count() > 0;
    let telling = [
        tokio::spawn(observe(recorded, to_annotator, stalls.clone())),
        tokio::spawn(annotate(observed, to_distributor, is_wanted)),
        tokio::spawn(distribute(annotated, printing, to_clients.clone())),
    ];

    // Subscribed before the first look, so that nothing falls between.
    let mut changes = changes::subscribe().context("cannot follow network devices")?;
    let mut supervisor = Supervisor::new(options.watch, kernel, records);
    supervisor.start().await?;
    let (requests, mut requested) = mpsc::channel(server::MAX_CLIENTS);
    if let Some(address) = options.metrics {
        metrics::serve(address, requests.clone()).await?;
    }
    let serving = server.map(|server| tokio::spawn(server.serve(requests.clone(), to_clients)));
    // Without a service manager that listens, this does nothing.
    let _ = sd_notify::notify(&[NotifyState::Ready]);

    let mut look = interval(LOOK_INTERVAL);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut alive = interval(watchdog_interval());
    alive.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = interrupt.recv() => break,
            _ = terminate.recv() => break,
            _ = hangup.recv() => match reread() {
                Ok(options) => {
                    warn_of_restart(&current, &options);
                    supervisor.reconfigure(options.watch).await;
                }
                Err(error) => tracing::warn!("the configuration stays as it was: {error}"),
            },
            () = to_printer.closed() => break,
            Some(()) = changes.recv() => supervisor.follow().await,
            _ = look.tick() => supervisor.follow().await,
            _ = alive.tick() => {
                let _ = sd_notify::notify(&[NotifyState::Watchdog]);
            }
            Some(request) = requested.recv() => answer(request, &mut supervisor, &stalls).await,
        }
    }

    let _ = sd_notify::notify(&[NotifyState::Stopping]);
    if let Some(serving) = serving {
        // Takes the socket's file away.
        serving.abort();
    }
    let (fix, kernel) = (supervisor.fix(), supervisor.kernel().clone());
    let counted = supervisor.stop().await?;
    // The supervisor is gone, and with it the last sender of records.
    for task in telling {
        task.await.context("cannot hand on events")?;
    }
    let stalls = lock(&stalls).overview(clock::boot());
    let summary = Summary::new(fix, &kernel, counted).with_stalls(stalls);
    // Fails when nobody reads any more, which ends quietly.
    let _ = to_printer.send(Line::Summary(Box::new(summary))).await;
    drop(to_printer);
    match printer.join() {
        Ok(outcome) => outcome.context("cannot write to standard output"),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// Says which changes a running daemon cannot follow.
fn warn_of_restart(current: &Options, new: &Options) {
    let kept = Options {
        watch: supervisor::Options {
            interfaces: new.watch.interfaces.clone(),
            wish: new.watch.wish.clone(),
            ..current.watch.clone()
        },
        ..current.clone()
    };
    if kept != *new {
        tracing::warn!(
            "attach, receive, transport, btf, ring-kib, socket, socket-group, metrics, json, quiet \
             and log-format change with the next start only"
        );
    }
}

/// How often to tell the service manager that all is well: twice as often as it wants to hear it.
fn watchdog_interval() -> Duration {
    const NOBODY_LISTENS: Duration = Duration::from_hours(1);
    sd_notify::watchdog_enabled().map_or(NOBODY_LISTENS, |interval| interval / 2)
}

async fn answer(request: Request, supervisor: &mut Supervisor, stalls: &Mutex<Stalls>) {
    // An answer that nobody waits for any more is dropped.
    match request {
        Request::Status(reply) => {
            // Only tells whether the program is starved: counters are there without it.
            let sent = sent_packets().await.unwrap_or_default();
            let summary = supervisor.counted(&sent).map(|it| {
                let stalls = lock(stalls).overview(clock::boot());
                Summary::new(supervisor.fix(), supervisor.kernel(), it).with_stalls(stalls)
            });
            let _ = reply.send(summary);
        }
        Request::Count(reply) => {
            let counts = supervisor.counted(&BTreeMap::new()).map(|counts| {
                let stalls = lock(stalls);
                Metered { counts, waiting: stalls.waiting(), stalls: stalls.totals() }
            });
            let _ = reply.send(counts);
        }
        Request::Fix(mode, reply) => _ = reply.send(supervisor.set_fix(mode)),
    }
}

/// Kernels before 5.11 charge maps against a limit that is 64 KiB by default. Where it may not be
/// raised, loading says what is missing.
fn raise_memlock_limit() {
    let _ = rlimit::Resource::MEMLOCK.set(rlimit::INFINITY, rlimit::INFINITY);
}

/// Finds out what the kernel offers, and says what it does not.
fn probe(options: &Options) -> Result<Kernel> {
    let Options { transport, btf, watch, .. } = options;
    let wish = kernel::Wish { transport: *transport, btf: btf.as_deref(), method: watch.method };
    let kernel = Kernel::probe(&wish)?;
    for missing in &kernel.missing {
        tracing::warn!("{missing}");
    }
    if watch.bpf_log && kernel.transport == Transport::Perf {
        tracing::warn!("no debug log of the BPF program: it needs the ring buffer");
    }
    Ok(kernel)
}
