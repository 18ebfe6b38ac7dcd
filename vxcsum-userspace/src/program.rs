//! The BPF program of one interface: loading, its maps, and what it has counted.

use std::collections::HashSet;
use std::error;
use std::io;
use std::num::NonZero;
use std::os::fd::AsFd as _;
use std::panic::resume_unwind;
use std::sync::{Arc, Mutex};
use std::thread;

use aya::maps::{
    Array, HashMap, Map, MapData, MapError, MapType, PerCpuArray, PerfEventArray, RingBuf,
};
use aya::programs::{ProgramError, ProgramType, SchedClassifier};
use aya::sys::{is_map_supported, is_program_supported};
use aya::{Ebpf, EbpfError, EbpfLoader};
use thiserror::Error;
use vxcsum_common::Device;
use vxcsum_common::layout::{Config, Counters, DeviceKey, SYN_TOLD, SkbLayout};

use crate::transport::{Buffer, OpenError, Transport};

/// The object that the build script compiled.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/vxcsum-ebpf"));
/// The same without anything that Linux 4.19 does not know.
pub static LEGACY_OBJECT: &[u8] =
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/vxcsum-ebpf-legacy"));

/// Name of the program, also of its TC filter.
pub const PROGRAM_NAME: &str = "vxcsum_egress";

/// What can go wrong between the object and a program in the kernel.
#[derive(Debug, Error)]
pub enum LoadError {
    /// Without the privilege.
    #[error(
        "not permitted to load BPF: run as root or grant CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON"
    )]
    NotPermitted,
    /// With the privilege; what else may be in the way.
    #[error(
        "not permitted to load BPF although all capabilities are there: a seccomp filter, a security \
         module or a user namespace forbids it{0}"
    )]
    Forbidden(String),
    /// Without the system call.
    #[error(
        "this kernel has no BPF (the bpf system call is not there): vxcsum needs Linux 4.19 or \
         newer built with CONFIG_BPF_SYSCALL"
    )]
    NoBpf,
    /// With the smallest that there are.
    #[error("the kernel takes no BPF {0}: {1}")]
    Refused(&'static str, #[source] Box<dyn error::Error + Send + Sync>),
    /// The object or a map of it was refused.
    #[error("cannot load the BPF object: {0}")]
    Object(#[source] EbpfError),
    /// The perf buffers could not be opened.
    #[error(transparent)]
    Perf(#[from] OpenError),
    /// The program was refused.
    #[error("the kernel refused the BPF program {PROGRAM_NAME}: {0}")]
    Program(String),
    /// The object does not hold what this binary was built with.
    #[error("the BPF object has no {0}: the binary was not built as a whole, build it anew")]
    Missing(&'static str),
    /// A map could not be used.
    #[error("cannot use the BPF map {name}: {source}")]
    Map {
        /// The map.
        name: &'static str,
        /// Why not.
        source: MapError,
    },
}

/// Refuses to go on where the kernel takes neither maps nor programs. What is tried later would fail
/// as well, and be taken for a feature that is missing.
pub fn check_bpf() -> Result<(), LoadError> {
    is_map_supported(MapType::Array).map_err(|error| LoadError::refused("maps", error))?;
    is_program_supported(ProgramType::SchedClassifier)
        .map_err(|error| LoadError::refused("programs", error))?;
    Ok(())
}

/// How to load.
#[derive(Clone, Copy, Debug)]
pub struct LoadOptions {
    /// How events come, which decides about the object.
    pub transport: Transport,
    /// Where the kernel keeps the offload state, if that is known; for [`Transport::Ring`] only.
    pub skb_layout: Option<SkbLayout>,
    /// Size of the ring buffer in bytes: a power of two and a multiple of the page size. That of all
    /// perf buffers together.
    pub ring_len: u32,
    /// Whether the program writes a debug log (aya-log); over [`Transport::Ring`] only.
    pub debug_log: bool,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self { transport: Transport::Ring, skb_layout: None, ring_len: 1 << 20, debug_log: false }
    }
}

/// A layout of the common crate as aya wants it.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub(crate) struct Wire<T>(pub(crate) T);

// SAFETY: `Wire` is transparent, and bytemuck's `Pod` asks for no less than aya's: any bytes are a
// value, there is no padding and no pointer.
unsafe impl<T: bytemuck::Pod> aya::Pod for Wire<T> {}

/// Says which inner flows of one interface are followed; a [`Program`] has as many as are asked for.
pub struct Followed {
    flows: HashMap<MapData, u64, u32>,
    /// What was put in and not taken out here; the program takes out as well.
    open: HashSet<u64>,
    config: Array<MapData, Wire<Config>>,
}

impl Followed {
    /// Has the first packet told that leaves whole, of the inner TCP flow of this number
    /// ([`vxcsum_common::inner::flow`]). One that is followed already starts anew.
    pub fn insert(&mut self, flow: u64) -> Result<(), LoadError> {
        self.flows.insert(flow, 0, 0).map_err(Self::error)?;
        self.open.insert(flow);
        self.set_following(true)
    }

    /// How many broken SYNs of a flow have had no event since it is followed; none once it is not.
    pub fn held_back(&self, flow: u64) -> Option<u32> {
        self.flows.get(&flow, 0).ok().map(|told| told & !SYN_TOLD)
    }

    /// Ends that, whether or not the packet has come. With the last one, the program stops looking.
    pub fn remove(&mut self, flow: u64) -> Result<(), LoadError> {
        if self.open.remove(&flow) && self.open.is_empty() {
            self.set_following(false)?;
        }
        match self.flows.remove(&flow) {
            Err(MapError::SyscallError(error))
                if error.io_error.kind() == io::ErrorKind::NotFound =>
            {
                Ok(())
            }
            other => other.map_err(Self::error),
        }
    }

    fn set_following(&mut self, following: bool) -> Result<(), LoadError> {
        let error = |source| LoadError::Map { name: "CONFIG", source };
        let Wire(mut config) = self.config.get(&0, 0).map_err(error)?;
        if config.following != u8::from(following) {
            config.following = following.into();
            self.config.set(0, Wire(config), 0).map_err(error)?;
        }
        Ok(())
    }

    const fn error(source: MapError) -> LoadError {
        LoadError::Map { name: "FOLLOWED", source }
    }
}

/// A loaded program with maps of its own.
pub struct Program {
    ebpf: Ebpf,
    config: Array<MapData, Wire<Config>>,
    counters: PerCpuArray<MapData, Wire<Counters>>,
    devices: HashMap<MapData, Wire<DeviceKey>, Wire<Device>>,
    followed: Arc<Mutex<Followed>>,
}

/// A program in the kernel, and the buffers of its events.
pub type Loaded = (Program, Vec<Buffer>);

impl Program {
    /// Loads the program into the kernel. Returns it with the buffers of its events.
    pub fn load(options: &LoadOptions) -> Result<Loaded, LoadError> {
        let mut loaded = Self::load_all(options, 1)?;
        loaded.pop().ok_or(LoadError::Missing("program vxcsum_egress"))
    }

    /// Loads so many of the same, each with maps of its own.
    ///
    /// Nearly all the time is spent in two places, and only there: aya reads the types of the whole
    /// kernel, which is done once for all; and the kernel verifies each program, as many at a time as
    /// there are processors.
    pub fn load_all(options: &LoadOptions, count: usize) -> Result<Vec<Loaded>, LoadError> {
        let layout = options.skb_layout.unwrap_or_default();
        let log_level = if options.debug_log { aya_log::Level::Debug as u8 } else { 0 };
        let mut loader = EbpfLoader::new();
        let object = match options.transport {
            Transport::Ring => {
                loader
                    .override_global("SKB_LAYOUT", bytemuck::bytes_of(&layout), true)
                    .override_global(aya_log::LEVEL, &log_level, true)
                    .map_max_entries("EVENTS", options.ring_len);
                OBJECT
            }
            Transport::Perf => LEGACY_OBJECT,
        };
        let mut open = || {
            let ebpf = loader.load(object).map_err(LoadError::of_object)?;
            Self::open(ebpf, options)
        };
        let mut programs = (0..count).map(|_| open()).collect::<Result<Vec<_>, _>>()?;
        // Before the verifier takes its share of memory.
        drop(loader);
        verify(&mut programs)?;
        Ok(programs)
    }

    /// Takes the maps out of an object. The program is not in the kernel yet.
    fn open(mut ebpf: Ebpf, options: &LoadOptions) -> Result<Loaded, LoadError> {
        // Global data, which kernels with the other object do not have.
        let config_name = match options.transport {
            Transport::Ring => ".data.config",
            Transport::Perf => "CONFIG",
        };
        let followed = Followed {
            flows: take_map(&mut ebpf, "FOLLOWED", HashMap::try_from)?,
            open: HashSet::new(),
            config: Array::try_from(second_handle(&ebpf, config_name)?)
                .map_err(|source| LoadError::Map { name: "CONFIG", source })?,
        };
        let config = take_map(&mut ebpf, config_name, Array::try_from)?;
        let counters = take_map(&mut ebpf, "COUNTERS", PerCpuArray::try_from)?;
        let devices = take_map(&mut ebpf, "DEVICES", HashMap::try_from)?;
        let events = match options.transport {
            Transport::Ring => {
                vec![Buffer::Ring(take_map(&mut ebpf, "EVENTS", RingBuf::try_from)?)]
            }
            Transport::Perf => {
                let array = take_map(&mut ebpf, "EVENTS", PerfEventArray::try_from)?;
                Buffer::open_all(array, options.ring_len)?
            }
        };
        let followed = Arc::new(Mutex::new(followed));
        Ok((Self { ebpf, config, counters, devices, followed }, events))
    }

    /// The TC program itself.
    pub fn classifier(&mut self) -> Result<&mut SchedClassifier, LoadError> {
        self.ebpf
            .program_mut(PROGRAM_NAME)
            .and_then(|program| program.try_into().ok())
            .ok_or(LoadError::Missing("program vxcsum_egress"))
    }

    /// The inner flows that are followed, for whoever says which these are.
    pub fn followed(&self) -> Arc<Mutex<Followed>> {
        self.followed.clone()
    }

    /// The whole object, for the debug log.
    pub fn ebpf(&mut self) -> &mut Ebpf {
        &mut self.ebpf
    }

    /// Makes the program work by `config` from the next packet on.
    pub fn configure(&mut self, config: &Config) -> Result<(), LoadError> {
        self.config
            .set(0, Wire(*config), 0)
            .map_err(|source| LoadError::Map { name: "CONFIG", source })
    }

    /// Makes a VXLAN device known.
    pub fn set_device(&mut self, key: DeviceKey, device: Device) -> Result<(), LoadError> {
        self.devices
            .insert(Wire(key), Wire(device), 0)
            .map_err(|source| LoadError::Map { name: "DEVICES", source })
    }

    /// Forgets a VXLAN device that is gone.
    pub fn remove_device(&mut self, key: DeviceKey) -> Result<(), LoadError> {
        self.devices.remove(&Wire(key)).map_err(|source| LoadError::Map { name: "DEVICES", source })
    }

    /// What it works by now, with what it has learned.
    pub fn config(&self) -> Result<Config, LoadError> {
        match self.config.get(&0, 0) {
            Ok(Wire(config)) => Ok(config),
            Err(source) => Err(LoadError::Map { name: "CONFIG", source }),
        }
    }

    /// What it has counted on all CPUs.
    pub fn counters(&self) -> Result<Counters, LoadError> {
        let per_cpu = self
            .counters
            .get(&0, 0)
            .map_err(|source| LoadError::Map { name: "COUNTERS", source })?;
        Ok(per_cpu.iter().fold(Counters::default(), |sum, Wire(cpu)| sum.plus(cpu)))
    }
}

/// Has the kernel take the programs, several at a time.
fn verify(loaded: &mut [Loaded]) -> Result<(), LoadError> {
    let load = |(program, _): &mut Loaded| {
        program.classifier()?.load().map_err(|error| LoadError::of_program(&error))
    };
    let processors = thread::available_parallelism().map_or(1, NonZero::get);
    let share = loaded.len().div_ceil(processors).max(1);
    thread::scope(|scope| {
        let shares = loaded.chunks_mut(share);
        let threads: Vec<_> =
            shares.map(|share| scope.spawn(move || share.iter_mut().try_for_each(load))).collect();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().unwrap_or_else(|panic| resume_unwind(panic)))
    })
}

pub(crate) fn take_map<T>(
    ebpf: &mut Ebpf,
    name: &'static str,
    convert: impl FnOnce(Map) -> Result<T, MapError>,
) -> Result<T, LoadError> {
    let map = ebpf.take_map(name).ok_or(LoadError::Missing(name))?;
    convert(map).map_err(|source| LoadError::Map { name, source })
}

/// Another handle of an array, which can be taken besides.
fn second_handle(ebpf: &Ebpf, name: &'static str) -> Result<Map, LoadError> {
    let error = |source| LoadError::Map { name, source };
    let Some(Map::Array(map)) = ebpf.map(name) else { return Err(LoadError::Missing(name)) };
    let fd =
        map.fd().as_fd().try_clone_to_owned().map_err(|error_of_io| error(error_of_io.into()))?;
    MapData::from_fd(fd).map(Map::Array).map_err(error)
}

impl LoadError {
    fn refused(what: &'static str, error: impl error::Error + Send + Sync + 'static) -> Self {
        Self::by_cause(&error).unwrap_or_else(|| Self::Refused(what, error.into()))
    }

    pub(crate) fn of_object(error: EbpfError) -> Self {
        Self::by_cause(&error).unwrap_or(Self::Object(error))
    }

    pub(crate) fn of_program(error: &ProgramError) -> Self {
        /// Of a log of thousands, those that say what is wrong.
        const LAST_LINES: usize = 6;
        if let Some(known) = Self::by_cause(error) {
            return known;
        }
        let ProgramError::LoadError { io_error, verifier_log } = error else {
            return Self::Program(error.to_string());
        };
        let log = verifier_log.to_string();
        let lines: Vec<_> = log.lines().collect();
        let last = lines[lines.len().saturating_sub(LAST_LINES)..].join("\n");
        Self::Program(format!("{io_error}; the verifier's last words:\n{last}"))
    }

    /// That privileges are missing shows before anything is loaded.
    fn forbidden() -> Self {
        let limit = rlimit::Resource::MEMLOCK.get_soft().ok();
        let limit = limit.filter(|&limit| limit < rlimit::INFINITY).map(|limit| {
            format!(
                ", or the kernel is older than 5.11 and the {} KiB of locked memory that are allowed \
                 are too few (`ulimit -l unlimited`, LimitMEMLOCK=infinity)",
                limit / 1024
            )
        });
        Self::Forbidden(limit.unwrap_or_default())
    }

    /// Names the causes that have nothing to do with the object.
    fn by_cause(error: &(dyn error::Error + 'static)) -> Option<Self> {
        let mut cause = Some(error);
        while let Some(error) = cause {
            match error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
                Some(libc::EPERM) => return Some(Self::forbidden()),
                Some(libc::ENOSYS) => return Some(Self::NoBpf),
                _ => cause = error.source(),
            }
        }
        None
    }
}
