//! The receiver's side: packets that this node drops for their outer UDP checksum.

mod decode;
#[cfg(fuzzing)]
pub mod fuzzing;
mod kernel;

use std::net::{IpAddr, Ipv6Addr};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use aya::maps::{Array, HashMap, MapData, PerCpuArray, RingBuf};
use aya::programs::{ProgramError, RawTracePoint};
use aya::{Ebpf, EbpfLoader};
use clap::ValueEnum;
use serde::Deserialize;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use vxcsum_common::layout::{Config, Report};
use vxcsum_common::receive::{Counters, Drops, Kernel, Peer};

use crate::attach::chain;
use crate::in_csum_errors::InCsumErrors;
use crate::plan::Plan;
use crate::program::{LoadError, Wire, take_map};
use crate::supervisor::{Record, forward};
use crate::transport::Buffer;

/// The object that the build script compiled.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/vxcsum-receive"));

const PROGRAM_NAME: &str = "vxcsum_receive";
const TRACEPOINT: &str = "kfree_skb";

/// Whether to watch: yes, or it is an error; no; where the kernel can.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
#[expect(missing_docs, reason = "the words of the option")]
pub enum Mode {
    On,
    Off,
    #[default]
    Auto,
}

/// The name of all peers beyond those that are told apart.
const OTHER_PEERS: &str = "other";

/// A peer of [`Counted`] in JSON, metrics and messages.
pub fn peer_name(peer: Option<IpAddr>) -> String {
    peer.map_or_else(|| OTHER_PEERS.to_owned(), |address| address.to_string())
}

/// What was counted from the start of the daemon.
#[derive(Clone, Debug, Default)]
pub struct Counted {
    /// Why nothing is watched, where that is so.
    pub why_not: Option<String>,
    /// Dropped packets that are not VXLAN to a watched port.
    pub not_vxlan: u64,
    /// Dropped VXLAN packets by their outer source address, most first; without an address, those
    /// of all further peers.
    pub peers: Vec<(Option<IpAddr>, Drops)>,
    /// Packets that the kernel itself has counted meanwhile (`InCsumErrors`), where they can be read.
    pub in_csum_errors: Option<u64>,
}

impl Counted {
    /// Dropped VXLAN packets of all peers.
    pub fn drops(&self) -> Drops {
        self.peers.iter().fold(Drops::default(), |sum, (_, drops)| sum.plus(drops))
    }

    /// Dropped VXLAN packets with one report.
    pub fn reported(&self, report: Report) -> u64 {
        self.drops().reported(report)
    }
}

/// The receiver's side of this node, watched or not.
pub enum Receive {
    /// It is.
    Watched(Box<Watched>),
    /// It is not, and why.
    Not(String),
}

impl Receive {
    /// Starts to watch as `mode` says, on a kernel whose types `btf` describes. Drops are judged by
    /// `plan`; events go to `records`.
    pub fn start(
        mode: Mode,
        btf: &Path,
        plan: Plan,
        ring_len: u32,
        records: mpsc::Sender<Record>,
    ) -> Result<Self> {
        if mode == Mode::Off {
            return Ok(Self::Not("turned off".to_owned()));
        }
        match Watched::start(btf, plan, ring_len, records) {
            Ok(watched) => {
                tracing::info!("receive side: on, reports packets dropped for their UDP checksum");
                Ok(Self::Watched(Box::new(watched)))
            }
            Err(why) if mode == Mode::On => bail!("cannot watch the receive side: {why}"),
            Err(why) => {
                tracing::warn!("receive side: off, {why}");
                Ok(Self::Not(why))
            }
        }
    }

    /// Goes by another plan from the next packet on.
    pub fn update(&mut self, plan: Plan) -> Result<()> {
        match self {
            Self::Watched(watched) => watched.update(plan),
            Self::Not(_) => Ok(()),
        }
    }

    /// What was counted so far.
    pub fn counted(&self) -> Result<Counted> {
        match self {
            Self::Watched(watched) => watched.maps.counted(watched.before),
            Self::Not(why) => Ok(Counted { why_not: Some(why.clone()), ..Counted::default() }),
        }
    }

    /// Takes the program off, and returns once all its events are forwarded.
    pub async fn stop(self) -> Result<Counted> {
        match self {
            Self::Watched(watched) => watched.stop().await,
            Self::Not(why) => Ok(Counted { why_not: Some(why), ..Counted::default() }),
        }
    }
}

/// The loaded and attached program.
pub struct Watched {
    /// With the link; dropping it detaches.
    ebpf: Ebpf,
    maps: Maps,
    /// [`InCsumErrors::total`] at the start.
    before: Option<u64>,
    plan: watch::Sender<Arc<Plan>>,
    stop: watch::Sender<bool>,
    reader: JoinHandle<()>,
}

struct Maps {
    config: Array<MapData, Wire<Config>>,
    counters: PerCpuArray<MapData, Wire<Counters>>,
    peers: HashMap<MapData, Wire<Peer>, Wire<Drops>>,
}

impl Watched {
    /// An error says in one line what the kernel lacks.
    fn start(
        btf: &Path,
        plan: Plan,
        ring_len: u32,
        records: mpsc::Sender<Record>,
    ) -> Result<Self, String> {
        let kernel = kernel::read(btf)?;
        let (mut ebpf, mut maps, events) = load(&kernel, ring_len).map_err(|it| one_line(&it))?;
        maps.configure(&plan).map_err(|error| one_line(&error))?;
        // SAFETY: the ring buffer owns its file descriptor and keeps it open and the same as long
        // as it lives, which is longer than the registration.
        let events = unsafe { AsyncFd::register(Buffer::Ring(events)) }
            .map_err(|error| format!("cannot wait for events: {error}"))?;
        let program = program(&mut ebpf).map_err(|error| one_line(&error))?;
        program.load().map_err(|error| refused(&error))?;
        program.attach(TRACEPOINT).map_err(|error| {
            let error = chain(&error);
            format!("cannot attach to the tracepoint {TRACEPOINT} with its drop reason: {error}")
        })?;
        let before = InCsumErrors::read().total();
        let (plan, plans) = watch::channel(Arc::new(plan));
        let decode = move |record: &[u8]| match decode::decode(&plans.borrow(), record) {
            Some(event) => Record::Dropped(Arc::new(event)),
            None => Record::Undecodable("the receive side".to_owned()),
        };
        let (stop, stopped) = watch::channel(false);
        let reader = tokio::spawn(forward(vec![events], decode, records, Arc::default(), stopped));
        Ok(Self { ebpf, maps, before, plan, stop, reader })
    }

    fn update(&mut self, plan: Plan) -> Result<()> {
        if **self.plan.borrow() == plan {
            return Ok(());
        }
        self.maps.configure(&plan)?;
        self.plan.send_replace(Arc::new(plan));
        Ok(())
    }

    async fn stop(self) -> Result<Counted> {
        let Self { ebpf, maps, before, plan: _plan, stop, reader } = self;
        drop(ebpf);
        stop.send_replace(true);
        reader.await.context("cannot read the events of the receive side")?;
        maps.counted(before)
    }
}

impl Maps {
    fn configure(&mut self, plan: &Plan) -> Result<(), LoadError> {
        self.config
            .set(0, Wire(*plan.config()), 0)
            .map_err(|source| LoadError::Map { name: "CONFIG", source })
    }

    fn counted(&self, before: Option<u64>) -> Result<Counted> {
        // First, so that what is dropped meanwhile does not look as if it had been missed.
        let now = InCsumErrors::read().total();
        let in_csum_errors = now.zip(before).map(|(now, before)| now.saturating_sub(before));
        let per_cpu = self.counters.get(&0, 0).context("cannot read the BPF map COUNTERS")?;
        let counters = per_cpu.iter().fold(Counters::default(), |sum, Wire(cpu)| sum.plus(cpu));
        let mut peers = Vec::new();
        for entry in &self.peers {
            let (Wire(Peer(address)), Wire(drops)) =
                entry.context("cannot read the BPF map PEERS")?;
            // An entry is there before its first packet is counted.
            if drops.packets() != 0 {
                peers.push((Some(Ipv6Addr::from(address).to_canonical()), drops));
            }
        }
        peers.sort_by_key(|(address, drops)| (std::cmp::Reverse(drops.packets()), *address));
        if counters.others.packets() != 0 {
            peers.push((None, counters.others));
        }
        Ok(Counted { why_not: None, not_vxlan: counters.not_vxlan, peers, in_csum_errors })
    }
}

fn load(kernel: &Kernel, ring_len: u32) -> Result<(Ebpf, Maps, RingBuf<MapData>), LoadError> {
    let mut ebpf = EbpfLoader::new()
        .override_global("KERNEL", bytemuck::bytes_of(kernel), true)
        .map_max_entries("EVENTS", ring_len)
        .load(OBJECT)
        .map_err(LoadError::of_object)?;
    let maps = Maps {
        config: take_map(&mut ebpf, "CONFIG", Array::try_from)?,
        counters: take_map(&mut ebpf, "COUNTERS", PerCpuArray::try_from)?,
        peers: take_map(&mut ebpf, "PEERS", HashMap::try_from)?,
    };
    let events = take_map(&mut ebpf, "EVENTS", RingBuf::try_from)?;
    Ok((ebpf, maps, events))
}

fn program(ebpf: &mut Ebpf) -> Result<&mut RawTracePoint, LoadError> {
    ebpf.program_mut(PROGRAM_NAME)
        .and_then(|program| program.try_into().ok())
        .ok_or(LoadError::Missing("program vxcsum_receive"))
}

/// Why the kernel does not take the program, with the last line of the verifier's log that says
/// something.
fn refused(error: &ProgramError) -> String {
    let ProgramError::LoadError { io_error, verifier_log } = error else {
        return chain(error);
    };
    let log = verifier_log.to_string();
    let said = log.lines().rfind(|line| !line.is_empty() && !line.starts_with("processed "));
    let said = said.map(|line| format!(" ({line})")).unwrap_or_default();
    // Without bpf_probe_read_kernel, which is not there while the kernel is locked down, the log ends
    // with its name.
    format!("the kernel refuses the program: {io_error}{said}")
}

fn one_line(error: &LoadError) -> String {
    chain(error).replace('\n', "; ")
}
