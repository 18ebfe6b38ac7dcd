//! Keeps the right interfaces watched, as devices come, change and go.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, bail};
use aya_log::EbpfLogger;
use futures_util::future::select_all;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};
use vxcsum_common::Device;
use vxcsum_common::layout::{Counters, FixMode, Report};

use crate::attach::{Attachment, Claim, Method, chain};
use crate::event::{Event, Source};
use crate::kernel::Kernel;
use crate::links::{Link, Links, local_port_range};
use crate::memory;
use crate::plan::{Plan, Wish};
use crate::program::{LoadOptions, Loaded, Program};
use crate::receive::{self, Receive};
use crate::stalls::Follower;
use crate::transport::{Buffer, Taken, Transport};

/// What to watch, and how.
#[derive(Clone, Debug, PartialEq)]
pub struct Options {
    /// The interfaces to watch; where there are none, the underlays of all VXLAN devices.
    pub interfaces: Vec<String>,
    /// What to watch them for.
    pub wish: Wish,
    /// How to attach; the best that the kernel has where that is left open.
    pub method: Option<Method>,
    /// Size of the event buffers of each interface in bytes.
    pub ring_len: u32,
    /// Show the debug log of the BPF program.
    pub bpf_log: bool,
    /// Whether to watch the receiver's side as well.
    pub receive: receive::Mode,
}

/// What comes out of an event buffer.
#[derive(Clone)]
pub enum Record {
    /// A broken packet, or one of a flow that is followed, and who follows flows where it left.
    Event(Arc<Event>, Follower),
    /// A packet that was dropped here.
    Dropped(Arc<Event>),
    /// Not an event of this version, from this interface.
    Undecodable(String),
}

impl Record {
    fn time(&self) -> Option<SystemTime> {
        match self {
            Self::Event(event, _) | Self::Dropped(event) => Some(event.time),
            Self::Undecodable(_) => None,
        }
    }
}

/// What was counted on all interfaces, and on the receiver's side.
#[derive(Clone, Debug, Default)]
pub struct Counts {
    /// Packets on their way out.
    pub interfaces: Vec<Counted>,
    /// Packets dropped on their way in.
    pub receive: receive::Counted,
}

/// What was counted on one interface.
#[derive(Clone, Debug)]
pub struct Counted {
    /// The interface.
    pub name: String,
    /// How it is watched; none while it is gone.
    pub method: Option<Method>,
    /// On all CPUs, from the start of the daemon.
    pub counters: Counters,
    /// Packets that the interface itself says it has sent, where it was asked.
    pub sent_packets: Option<u64>,
}

/// All watched interfaces.
pub struct Supervisor {
    options: Options,
    kernel: Kernel,
    records: mpsc::Sender<Record>,
    watched: BTreeMap<u32, Watched>,
    receive: Receive,
    /// What programs had counted that are gone, by interface.
    past: BTreeMap<String, Counters>,
    /// What was said last, so as not to say it again each time.
    complaints: BTreeSet<String>,
}

/// A watched interface.
struct Watched {
    name: String,
    program: Program,
    attachment: Attachment,
    claim: Claim,
    source: watch::Sender<Arc<Source>>,
    stop: watch::Sender<bool>,
    arrived: Arc<Arrived>,
    reader: JoinHandle<()>,
}

/// What has become of the events that a program has sent.
#[derive(Debug, Default)]
pub(crate) struct Arrived {
    /// Taken out of the buffers, those only that the program has counted as events.
    taken: AtomicU64,
    /// Had found no room, as far as perf buffers have told.
    lost: AtomicU64,
}

impl Supervisor {
    /// Watches nothing yet. Events go to `records`, whose reader they wait for.
    pub fn new(options: Options, kernel: Kernel, records: mpsc::Sender<Record>) -> Self {
        Self {
            options,
            kernel,
            records,
            watched: BTreeMap::new(),
            receive: Receive::Not("not started yet".to_owned()),
            past: BTreeMap::new(),
            complaints: BTreeSet::new(),
        }
    }

    /// Starts to watch. What cannot be done is an error; later it is said and tried again.
    pub async fn start(&mut self) -> Result<()> {
        let links = Links::read().await?;
        for name in &self.options.interfaces {
            if links.by_name(name).is_none() {
                let names = links.names().collect::<Vec<_>>().join(", ");
                bail!("there is no interface {name:?} in this network namespace; it has {names}");
            }
        }
        let wanted = self.wanted(&links);
        let to_watch: Vec<_> = wanted.iter().filter_map(|&it| links.by_index(it)).collect();
        let claims = to_watch.iter().map(|link| Claim::new(&link.name, link.index));
        let claims = claims.collect::<Result<Vec<_>, _>>()?;
        let loaded = Program::load_all(&self.load_options(), to_watch.len())?;
        for ((link, claim), loaded) in to_watch.into_iter().zip(claims).zip(loaded) {
            self.watch_with(loaded, claim, link, &links)?;
        }
        if wanted.is_empty() {
            self.complain(&nothing_to_watch(&links));
        }
        self.receive = Receive::start(
            self.options.receive,
            &self.kernel.btf,
            self.receive_plan(&links)?,
            self.options.ring_len,
            self.records.clone(),
        )?;
        memory::give_back();
        Ok(())
    }

    /// Brings what is watched in line with the devices that there are now.
    pub async fn follow(&mut self) {
        let links = match Links::read().await {
            Ok(links) => links,
            Err(error) => return self.complain(&chain(&error)),
        };
        let wanted = self.wanted(&links);
        let gone: Vec<u32> =
            self.watched.keys().copied().filter(|index| !wanted.contains(index)).collect();
        for index in gone {
            self.unwatch(index, links.by_index(index).is_none()).await;
        }
        for index in self.displaced(&wanted).await {
            self.unwatch(index, true).await;
        }
        let mut complaints = BTreeSet::new();
        for &index in &wanted {
            let Some(link) = links.by_index(index) else { continue };
            let outcome = if self.watched.contains_key(&index) {
                self.update(link, &links)
            } else {
                self.watch(link, &links)
            };
            if let Err(error) = outcome {
                complaints.insert(chain(error.as_ref()));
            }
        }
        let outcome = self.receive_plan(&links).and_then(|plan| self.receive.update(plan));
        if let Err(error) = outcome {
            complaints.insert(chain(error.as_ref()));
        }
        if wanted.is_empty() && self.options.interfaces.is_empty() {
            complaints.insert(nothing_to_watch(&links));
        }
        for complaint in &complaints {
            self.complain(complaint);
        }
        // What does not hold any more may be said again.
        self.complaints = complaints;
    }

    /// The watched interfaces that our program does not hang on any more.
    async fn displaced(&self, wanted: &BTreeSet<u32>) -> Vec<u32> {
        let mut displaced = Vec::new();
        for (&index, watched) in &self.watched {
            if wanted.contains(&index) && !watched.attachment.is_in_place(index).await {
                tracing::warn!("{} has lost the program: attaching it anew", watched.name);
                displaced.push(index);
            }
        }
        displaced
    }

    /// Says something once.
    fn complain(&mut self, complaint: &str) {
        if self.complaints.insert(complaint.to_owned()) {
            tracing::warn!("{complaint}");
        }
    }

    fn wanted(&self, links: &Links) -> BTreeSet<u32> {
        if self.options.interfaces.is_empty() {
            return links.underlays();
        }
        let named = self.options.interfaces.iter().filter_map(|name| links.by_name(name));
        named.map(|link| link.index).collect()
    }

    fn plan(&self, link: &Link, links: &Links) -> Result<Plan> {
        Ok(Plan::new(&self.options.wish, link, links, default_ports())?)
    }

    fn receive_plan(&self, links: &Links) -> Result<Plan> {
        let mut plan = Plan::of_node(&self.options.wish, links, default_ports())?;
        for watched in self.watched.values() {
            plan.learn(&watched.program.config()?.ports);
        }
        Ok(plan)
    }

    fn load_options(&self) -> LoadOptions {
        LoadOptions {
            transport: self.kernel.transport,
            skb_layout: self.kernel.skb_layout,
            ring_len: self.options.ring_len,
            debug_log: self.options.bpf_log && self.kernel.transport == Transport::Ring,
        }
    }

    /// Starts to watch one interface.
    fn watch(&mut self, link: &Link, links: &Links) -> Result<()> {
        let claim = Claim::new(&link.name, link.index)?;
        let loaded = Program::load(&self.load_options())?;
        self.watch_with(loaded, claim, link, links)
    }

    /// Configures and attaches the program of one interface.
    fn watch_with(
        &mut self,
        (mut program, events): Loaded,
        claim: Claim,
        link: &Link,
        links: &Links,
    ) -> Result<()> {
        let plan = self.plan(link, links)?;
        for (key, device) in plan.devices() {
            program.set_device(key, device)?;
        }
        program.configure(plan.config())?;
        // SAFETY: a buffer owns its file descriptor and keeps it open and the same as long as it
        // lives, which is longer than the registration.
        let register = |buffer| unsafe { AsyncFd::register(buffer) }.map_err(io::Error::from);
        let events: io::Result<Vec<_>> = events.into_iter().map(register).collect();
        let events = events.context("cannot wait for events")?;
        if self.load_options().debug_log {
            let log = EbpfLogger::init_with_logger(program.ebpf(), StderrLog)
                .context("cannot read the debug log of the BPF program")?;
            // SAFETY: as above.
            let log = unsafe { AsyncFd::register(log) }.context("cannot wait for the debug log")?;
            tokio::spawn(forward_log(log));
        }
        let attachment = Attachment::new(program.classifier()?, &link.name, self.options.method)?;
        tracing::info!("watching {} ({}): {plan}", link.name, attachment.method.as_str());
        let source = Arc::new(Source { interface: link.name.clone(), plan });
        let (source, sources) = watch::channel(source);
        let (stop, stopped) = watch::channel(false);
        let follower = program.followed();
        let decode = move |record: &[u8]| {
            let source = sources.borrow();
            match source.decode(record) {
                Some(event) => Record::Event(Arc::new(event), follower.clone()),
                None => Record::Undecodable(source.interface.clone()),
            }
        };
        let arrived = Arc::<Arrived>::default();
        let records = self.records.clone();
        let reader = tokio::spawn(forward(events, decode, records, arrived.clone(), stopped));
        let name = link.name.clone();
        let watched = Watched { name, program, attachment, claim, source, stop, arrived, reader };
        self.watched.insert(link.index, watched);
        memory::give_back();
        Ok(())
    }

    /// Follows a change of the devices over a watched interface, or of its name.
    fn update(&mut self, link: &Link, links: &Links) -> Result<()> {
        let plan = self.plan(link, links)?;
        let Some(watched) = self.watched.get_mut(&link.index) else { return Ok(()) };
        watched.claim.answer();
        watched.name.clone_from(&link.name);
        let before = watched.source.borrow().clone();
        if before.plan == plan && before.interface == link.name {
            return Ok(());
        }
        watched.apply(plan)
    }

    /// Stops watching an interface that is gone, or is there still but not an underlay any more.
    async fn unwatch(&mut self, index: u32, is_gone: bool) {
        if let Some(watched) = self.watched.remove(&index) {
            let name = watched.name.clone();
            tracing::info!("no longer watching {name}");
            match watched.end(is_gone).await {
                Ok((_, counters)) => {
                    let past = self.past.entry(name).or_default();
                    *past = past.plus(&counters);
                }
                Err(error) => self.complain(&format!("{name}: {}", chain(error.as_ref()))),
            }
        }
    }

    /// Watches by other options from now on. Those that programs are loaded and attached with are
    /// kept: they take a restart.
    pub async fn reconfigure(&mut self, options: Options) {
        self.options.interfaces = options.interfaces;
        self.options.wish = options.wish;
        self.follow().await;
    }

    /// Switches the fix mode of all interfaces, from the next packet on.
    pub fn set_fix(&mut self, fix: FixMode) -> Result<()> {
        self.options.wish.fix = fix;
        for watched in self.watched.values_mut() {
            let plan = watched.source.borrow().plan.with_fix(fix);
            watched.apply(plan)?;
        }
        Ok(())
    }

    /// The fix mode.
    pub const fn fix(&self) -> FixMode {
        self.options.wish.fix
    }

    /// What the kernel offers.
    pub const fn kernel(&self) -> &Kernel {
        &self.kernel
    }

    /// What has been counted so far, beside what the interfaces say that they have sent.
    pub fn counted(&self, sent_packets: &BTreeMap<u32, u64>) -> Result<Counts> {
        let mut counted = Vec::new();
        for (index, Watched { name, program, attachment, arrived, .. }) in &self.watched {
            // In this order: kernels that tell the program of a loss have it counted before the
            // buffer tells of it.
            let lost = arrived.lost.load(Ordering::Relaxed);
            let mut counters = program.counters()?;
            counters.lose(lost.saturating_sub(counters.reported(Report::Lost).skbs));
            counted.push(Counted {
                name: name.clone(),
                method: Some(attachment.method),
                counters,
                sent_packets: sent_packets.get(index).copied(),
            });
        }
        Ok(Counts { interfaces: self.with_past(counted), receive: self.receive.counted()? })
    }

    /// Detaches from all interfaces. First the programs end, then what they have left in the
    /// buffers is read, then the counters: so every event that is counted has been forwarded.
    pub async fn stop(mut self) -> Result<Counts> {
        let mut counted = Vec::new();
        while let Some((_, watched)) = self.watched.pop_first() {
            let name = watched.name.clone();
            let (method, counters) = watched.end(false).await?;
            counted.push(Counted { name, method: Some(method), counters, sent_packets: None });
        }
        let interfaces = self.with_past(counted);
        Ok(Counts { interfaces, receive: self.receive.stop().await? })
    }

    fn with_past(&self, mut counted: Vec<Counted>) -> Vec<Counted> {
        for (name, past) in &self.past {
            if let Some(now) = counted.iter_mut().find(|other| other.name == *name) {
                now.counters = now.counters.plus(past);
            } else {
                let (name, counters) = (name.clone(), *past);
                counted.push(Counted { name, method: None, counters, sent_packets: None });
            }
        }
        counted
    }
}

impl Watched {
    /// Works by another plan from the next packet on.
    fn apply(&mut self, plan: Plan) -> Result<()> {
        let before = self.source.borrow().clone();
        let devices: BTreeMap<_, _> = plan.devices().map(|(key, it)| (sortable(key), it)).collect();
        for (key, device) in plan.devices() {
            self.program.set_device(key, device)?;
        }
        for (key, _) in before.plan.devices() {
            if !devices.contains_key(&sortable(key)) {
                self.program.remove_device(key)?;
            }
        }
        let mut config = *plan.config();
        config.carry(&self.program.config()?);
        self.program.configure(&config)?;
        tracing::info!("watching {} ({}): {plan}", self.name, self.attachment.method.as_str());
        self.source.send_replace(Arc::new(Source { interface: self.name.clone(), plan }));
        Ok(())
    }

    /// Takes the program off, unless the interface `is_gone` and the program with it. Returns what it
    /// has counted, once all its events are forwarded.
    async fn end(self, is_gone: bool) -> Result<(Method, Counters)> {
        let Self { name, mut program, attachment, claim, source: _source, stop, arrived, reader } =
            self;
        let method = attachment.method;
        let detached = attachment.detach(program.classifier()?);
        if let Err(error) = detached
            && !is_gone
        {
            tracing::warn!("cannot detach from {name}: {}", chain(&error));
        }
        stop.send_replace(true);
        reader.await.with_context(|| format!("cannot read the events of {name}"))?;
        let mut counters = program.counters()?;
        // None where the kernel tells the program of each event that found no room.
        let sent = counters.reported(Report::Emitted).skbs;
        counters.lose(sent.saturating_sub(arrived.taken.load(Ordering::Relaxed)));
        drop(claim);
        Ok((method, counters))
    }
}

fn nothing_to_watch(links: &Links) -> String {
    let devices = links.vxlan().map(|link| link.name.as_str()).collect::<Vec<_>>().join(", ");
    if devices.is_empty() {
        "there is no VXLAN device: waiting for one".to_owned()
    } else {
        format!("no route tells yet which interface {devices} leaves by: waiting for one")
    }
}

const fn sortable(key: vxcsum_common::layout::DeviceKey) -> (u32, u32) {
    (key.port, key.vni)
}

/// Takes records from the buffers of a program, until told to stop and all are empty. Of those that
/// come in a row, the first is taken at once and the rest in batches.
pub(crate) async fn forward(
    mut buffers: Vec<AsyncFd<Buffer>>,
    decode: impl Fn(&[u8]) -> Record,
    records: mpsc::Sender<Record>,
    arrived: Arc<Arrived>,
    mut stop: watch::Receiver<bool>,
) {
    /// Between two looks: to be woken costs more than to handle an event, here and for the sender of
    /// the packet, whose processor does it.
    const PAUSE: Duration = Duration::from_millis(5);
    loop {
        // Nobody is there any more to say so where the sender has gone.
        let stopping = *stop.borrow_and_update() || stop.has_changed().is_err();
        let next_look = Instant::now() + PAUSE;
        loop {
            let mut taken = Taken::default();
            for buffer in &mut buffers {
                buffer.get_mut().take(&mut taken);
            }
            arrived.lost.fetch_add(taken.lost, Ordering::Relaxed);
            if taken.records.is_empty() {
                break;
            }
            arrived.taken.fetch_add(taken.events(), Ordering::Relaxed);
            let mut decoded: Vec<_> = taken.records.iter().map(|record| decode(record)).collect();
            // Those of one CPU are in order already.
            if buffers.len() > 1 {
                decoded.sort_by_key(Record::time);
            }
            for record in decoded {
                if records.send(record).await.is_err() {
                    return;
                }
            }
        }
        if stopping {
            return;
        }
        tokio::select! {
            readable = any_readable(&mut buffers) => if readable.is_err() {
                return;
            },
            _ = stop.changed() => continue,
        }
        tokio::select! {
            () = sleep_until(next_look) => {}
            _ = stop.changed() => {}
        }
    }
}

/// Waits until one of the buffers has something.
async fn any_readable(buffers: &mut [AsyncFd<Buffer>]) -> io::Result<()> {
    let each = buffers.iter_mut().map(|buffer| Box::pin(buffer.readable_mut()));
    let (ready, ..) = select_all(each).await;
    ready?.clear_ready();
    Ok(())
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

/// Hands the BPF program's debug log to standard error.
struct StderrLog;

impl log::Log for StderrLog {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        tracing::debug!("bpf: {}", record.args());
    }

    fn flush(&self) {}
}

/// What 0-0 stands for as a range of source ports.
fn default_ports() -> (u16, u16) {
    let unknown = (Device::UNKNOWN.source_port_min, Device::UNKNOWN.source_port_max);
    local_port_range().unwrap_or(unknown)
}
