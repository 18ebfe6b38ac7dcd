//! What goes into a virtual machine, and its way through one.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context, Result, ensure};
use vxcsum_vm_init::{Job, MODULES, PLAN, Plan};

use super::{
    initramfs::Initramfs,
    kernels::{self, Kernel, Wanted},
    machine::{Boot, Machine},
    suite::{LIMIT, Program},
};
use crate::{build, packages, process, setup::Goal, test};

/// The variable that tells the tests where the program under test is.
const BINARY_VARIABLE: &str = "VXCSUM_BIN";
/// Set for what runs inside of a virtual machine and needs to know.
pub(super) const INSIDE_VARIABLE: &str = "VXCSUM_INSIDE_VM";
/// The variable that tells the tests how events are to come from the kernel.
const TRANSPORT_VARIABLE: &str = "VXCSUM_TRANSPORT";
/// Where the program under test is inside.
const BINARY: &str = "/usr/bin/vxcsum";

/// Where a command line is inside that is to be run there.
pub(super) const SCRIPT: &str = "/script";
/// What the tests call beside the tools that set-up knows by name: other names of theirs, and what
/// no system is without.
const MORE_TOOLS: &[&str] = &[
    "bridge",
    "iptables-restore",
    "ip6tables",
    "ip6tables-restore",
    "iptables-nft-save",
    "ip6tables-nft-save",
    "setpriv",
    "prlimit",
    "mount",
    "sh",
    "sleep",
    "cat",
    "grep",
    "ls",
    "dmesg",
    "uname",
];
/// What only tests of captures call, on whatever kernel: three quarters of what would else be unpacked
/// inside.
const ONLY_FOR_CAPTURES: &[&str] = &["tshark", "editcap", "gzip", "zstd"];
/// Modules that the labs need, and with them what these need.
const NEEDED: &[&str] = &[
    "veth",
    "vxlan",
    "macvlan",
    "8021q",
    "bridge",
    "dummy",
    "bonding",
    "sch_ingress",
    "cls_bpf",
    "nf_nat",
    "nf_conntrack_netlink",
    "nf_tables",
    "nft_chain_nat",
    "nft_compat",
    "nft_ct",
    "nft_masq",
    "nft_nat",
    "xt_MASQUERADE",
    "xt_mark",
    "xt_nat",
    "xt_comment",
    "xt_tcpudp",
];
/// Those that some kernels have built into another.
const IF_THERE: &[&str] = &["nft_counter", "team", "team_mode_activebackup"];

/// What a machine is given beside what all are given.
#[derive(Default)]
pub(super) struct Load<'a> {
    /// What to run.
    pub(super) jobs: Vec<Job>,
    /// Programs: where they go, and where they are.
    pub(super) programs: Vec<(PathBuf, PathBuf)>,
    /// A command line, for [`SCRIPT`].
    pub(super) script: Option<&'a str>,
}

/// What is the same on every kernel.
pub(super) struct Kit {
    /// A folder for what is made on the way.
    folder: PathBuf,
    /// The first process.
    init: PathBuf,
    /// The program under test.
    binary: PathBuf,
    /// Test programs by name.
    tests: BTreeMap<String, PathBuf>,
}

impl Kit {
    pub(super) fn gather(programs: &[&Program]) -> Result<Self> {
        let binary = match env::var_os(BINARY_VARIABLE) {
            Some(binary) => PathBuf::from(binary),
            None => build::release()?,
        };
        // Nothing to compile for a command line or the demo.
        let tests = if programs.is_empty() { BTreeMap::new() } else { test_programs()? };
        for program in programs {
            ensure!(tests.contains_key(program.name), "there is no test program {}", program.name);
        }
        let folder = build::target_folder()?.join("vm");
        fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        Ok(Self { init: build_init()?, folder, binary, tests })
    }

    /// The test programs as a load, with a job for each of these command lines.
    pub(super) fn tests(&self, jobs: Vec<Job>) -> Load<'_> {
        let programs = jobs.iter().filter_map(|job| {
            let path = self.tests.get(&job.name)?;
            Some((PathBuf::from(job.command.first()?), path.clone()))
        });
        Load { programs: programs.collect(), script: None, jobs }
    }

    /// Boots the kernel with all of that in it, and runs the jobs.
    pub(super) fn boot(
        &self,
        wanted: Wanted,
        kernel: &Kernel,
        load: Load<'_>,
        see: &dyn Fn(&str),
    ) -> Result<Boot> {
        let archive = self.folder.join(format!("{}.cpio", wanted.name));
        let mut initramfs = Initramfs::new(&self.init, &archive.with_extension("stripped"))?;
        let tools =
            packages::tools_for(Goal::Test).filter(|tool| !ONLY_FOR_CAPTURES.contains(tool));
        for tool in tools.chain(MORE_TOOLS.iter().copied()) {
            initramfs.tool(tool)?;
        }
        initramfs.xtables_plugins()?;
        initramfs.program(Path::new(BINARY), &self.binary)?;
        for (at, path) in &load.programs {
            initramfs.program(at, path)?;
        }
        if let Some(script) = load.script {
            initramfs.text(SCRIPT, script);
        }
        let mut plan = Plan { nonce: nonce()?, jobs: load.jobs, ..Plan::default() };
        for file in modules(kernel)? {
            let name = file_name(&file)?;
            let file = match &kernel.replaced {
                Some(replaced) if replaced.ends_with(&name) => replaced,
                _ => &file,
            };
            initramfs.bytes(&Path::new(MODULES).join(&name), &kernels::uncompressed(file)?);
            plan.modules.push(name);
        }
        initramfs.text(PLAN, &plan.text()?);
        initramfs.write(&archive)?;
        let machine = Machine {
            image: &kernel.image,
            initramfs: &archive,
            nonce: &plan.nonce,
            limit: plan.jobs.iter().map(|job| job.limit).sum(),
            console: self.folder.join(format!("{}.console", wanted.name)),
        };
        eprintln!("vm: booting {}", kernel.release);
        let boot = machine.run(see);
        let _ = fs::remove_file(&archive);
        boot
    }
}

/// The files of all modules, each once, in the order in which to load them.
fn modules(kernel: &Kernel) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for name in NEEDED {
        files.extend(kernel.module(name)?);
    }
    for name in IF_THERE {
        files.extend(kernel.module(name).unwrap_or_default());
    }
    let mut seen = BTreeSet::new();
    files.retain(|file| seen.insert(file.clone()));
    Ok(files)
}

/// The name of a module's file without what says how it is compressed.
fn file_name(file: &Path) -> Result<String> {
    let name =
        file.file_name().and_then(|name| name.to_str()).context("a module without a name")?;
    let plain = name.strip_suffix(".xz").or_else(|| name.strip_suffix(".zst")).unwrap_or(name);
    Ok(plain.to_owned())
}

/// A job with the environment that the tests expect on this kernel.
pub(super) fn job(name: &str, command: Vec<String>, wanted: Wanted) -> Job {
    let mut environment = vec![
        "PATH=/usr/bin".to_owned(),
        "HOME=/root".to_owned(),
        format!("{BINARY_VARIABLE}={BINARY}"),
        format!("{INSIDE_VARIABLE}=1"),
    ];
    let transport = wanted.transport.map(str::to_owned);
    for (name, value) in [
        (TRANSPORT_VARIABLE, transport.or_else(|| env::var(TRANSPORT_VARIABLE).ok())),
        ("RUST_BACKTRACE", env::var("RUST_BACKTRACE").ok()),
    ] {
        environment.extend(value.map(|value| format!("{name}={value}")));
    }
    Job { name: name.to_owned(), limit: LIMIT, environment, command }
}

/// A word that no test can guess.
fn nonce() -> Result<String> {
    let uuid = fs::read_to_string("/proc/sys/kernel/random/uuid").context("a random number")?;
    Ok(uuid.trim().to_owned())
}

/// Compiles the first process, which has nothing to lean on inside.
fn build_init() -> Result<PathBuf> {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    const PACKAGE: &str = "vxcsum-vm-init";
    // Its own folder, or everything else would be compiled again with other flags.
    let folder = build::target_folder()?.join("vm-init");
    let mut cargo = process::command("cargo");
    cargo.args(["build", "--quiet", "--package", PACKAGE, "--target", TARGET]);
    cargo.arg("--target-dir").arg(&folder);
    cargo.env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static");
    process::run(&mut cargo)?;
    Ok(folder.join(TARGET).join("debug").join(PACKAGE))
}

/// Where cargo has put the test programs of the package `tests`.
fn test_programs() -> Result<BTreeMap<String, PathBuf>> {
    let mut cargo = test::cargo_test();
    // Its messages go to standard error as ever.
    cargo.args(["--no-run", "--message-format=json-render-diagnostics"]);
    let shown = process::shown(&cargo);
    let output =
        cargo.stderr(Stdio::inherit()).output().with_context(|| format!("cannot run `{shown}`"))?;
    ensure!(output.status.success(), "`{shown}` failed, see its messages above");
    let mut programs = BTreeMap::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let Ok(message) = serde_json::from_str::<serde_json::Value>(line) else { continue };
        let is_test = message["target"]["kind"]
            .as_array()
            .is_some_and(|kinds| kinds.contains(&"test".into()));
        if let (true, Some(name), Some(path)) =
            (is_test, message["target"]["name"].as_str(), message["executable"].as_str())
        {
            programs.insert(name.to_owned(), PathBuf::from(path));
        }
    }
    Ok(programs)
}
