//! The programs that are written in C: compiled when they are needed, loaded by aya as vxcsum's own.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use aya::maps::{Array, HashMap, MapData, PerCpuArray, PerfEventArray, RingBuf};
use aya::programs::SchedClassifier;
use aya::{Ebpf, EbpfLoader};
use vxcsum::program::PROGRAM_NAME;
use vxcsum::transport::{Buffer, Transport};
use vxcsum_common::Device;
use vxcsum_common::layout::{Config, Counters, DeviceKey};
use vxcsum_tests::folder::Folder;

/// Compilers, the first that is there: that with the LLVM of the Rust compiler is the fairest.
const COMPILERS: [&str; 2] = ["clang-22", "clang"];
const FLAGS: [&str; 8] = ["-O2", "-g", "-Wall", "-Wextra", "-Werror", "-target", "bpf", "-mcpu=v2"];
/// Size of the event buffer in bytes, as vxcsum has it by default.
const BUFFER_LEN: u32 = 1 << 20;

/// Compiled programs.
pub(crate) struct Objects {
    folder: Folder,
    /// What compiled them.
    pub(crate) compiler: String,
}

impl Objects {
    /// Compiles them.
    pub(crate) fn compile() -> Result<Self> {
        let is_there = |name: &&str| Command::new(name).arg("--version").output().is_ok();
        let compiler = COMPILERS.into_iter().find(is_there).context("there is no clang")?;
        let folder = Folder::new()?;
        for (source, object, defines) in [
            ("empty", "empty", None),
            ("egress", "ring", None),
            ("egress", "perf", Some("-DLEGACY")),
        ] {
            let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("reference").join(source);
            let object = folder.path().join(object).with_extension("o");
            let mut command = Command::new(compiler);
            command.args(FLAGS).args(defines).arg(multiarch_headers()).arg("-c");
            command.arg(source.with_extension("bpf.c")).arg("-o").arg(&object);
            let status = command.status().with_context(|| format!("cannot start {compiler}"))?;
            ensure!(status.success(), "{compiler}: {status} for {}", source.display());
        }
        let version = Command::new(compiler).arg("--version").output()?.stdout;
        let version = String::from_utf8_lossy(&version);
        let compiler = version.lines().next().unwrap_or(compiler).trim().to_owned();
        Ok(Self { folder, compiler })
    }

    /// Loads the program that does nothing.
    pub(crate) fn load_empty(&self) -> Result<Ebpf> {
        let mut ebpf = EbpfLoader::new().load_file(self.folder.path().join("empty.o"))?;
        classifier(&mut ebpf, "empty")?.load()?;
        Ok(ebpf)
    }

    /// Loads the one that does vxcsum's job.
    pub(crate) fn load(&self, transport: Transport) -> Result<Reference> {
        let object = self.folder.path().join(transport.as_str()).with_extension("o");
        let mut ebpf = EbpfLoader::new().load_file(object)?;
        let config = match transport {
            Transport::Ring => ".data.config",
            Transport::Perf => "CONFIG",
        };
        let mut take = |name: &str| ebpf.take_map(name).with_context(|| format!("no map {name}"));
        let events = take("EVENTS")?;
        let reference = Reference {
            config: Array::try_from(take(config)?)?,
            counters: PerCpuArray::try_from(take("COUNTERS")?)?,
            devices: HashMap::try_from(take("DEVICES")?)?,
            events: match transport {
                Transport::Ring => vec![Buffer::Ring(RingBuf::try_from(events)?)],
                Transport::Perf => Buffer::open_all(PerfEventArray::try_from(events)?, BUFFER_LEN)?,
            },
            ebpf,
        };
        reference.load()
    }
}

/// Where Debian has the headers that differ between machines; elsewhere they are with the others.
fn multiarch_headers() -> String {
    format!("-I/usr/include/{}-linux-gnu", std::env::consts::ARCH)
}

/// A program of an object.
pub(crate) fn classifier<'a>(ebpf: &'a mut Ebpf, name: &str) -> Result<&'a mut SchedClassifier> {
    let program = ebpf.program_mut(name).with_context(|| format!("no program {name}"))?;
    Ok(program.try_into()?)
}

/// vxcsum's job, done in C.
pub(crate) struct Reference {
    ebpf: Ebpf,
    config: Array<MapData, [u8; size_of::<Config>()]>,
    counters: PerCpuArray<MapData, [u8; size_of::<Counters>()]>,
    devices: HashMap<MapData, [u8; size_of::<DeviceKey>()], [u8; size_of::<Device>()]>,
    /// Where its events arrive.
    pub(crate) events: Vec<Buffer>,
}

impl Reference {
    fn load(mut self) -> Result<Self> {
        self.classifier()?.load()?;
        Ok(self)
    }

    /// The program itself.
    pub(crate) fn classifier(&mut self) -> Result<&mut SchedClassifier> {
        classifier(&mut self.ebpf, PROGRAM_NAME)
    }

    /// Makes it work by `config`.
    pub(crate) fn configure(&mut self, config: &Config) -> Result<()> {
        Ok(self.config.set(0, bytes(config)?, 0)?)
    }

    /// Makes a VXLAN device known.
    pub(crate) fn set_device(&mut self, key: DeviceKey, device: Device) -> Result<()> {
        Ok(self.devices.insert(bytes(&key)?, bytes(&device)?, 0)?)
    }

    /// What it has counted.
    pub(crate) fn counters(&self) -> Result<Counters> {
        let per_cpu = self.counters.get(&0, 0)?;
        let read = |cpu: &[u8; _]| bytemuck::pod_read_unaligned::<Counters>(cpu);
        Ok(per_cpu.iter().fold(Counters::default(), |sum, cpu| sum.plus(&read(cpu))))
    }
}

fn bytes<T: bytemuck::NoUninit, const N: usize>(value: &T) -> Result<[u8; N]> {
    Ok(bytemuck::bytes_of(value).try_into()?)
}
