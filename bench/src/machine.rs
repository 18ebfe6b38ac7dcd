//! Where the numbers were taken.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;

use anyhow::{Context as _, Result};
use nix::sys::utsname::uname;
use serde::{Deserialize, Serialize};

/// What numbers depend on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Machine {
    pub(crate) cpu: String,
    pub(crate) cores: usize,
    pub(crate) memory_mib: u64,
    /// `uname -r`
    pub(crate) kernel: String,
    /// `net.core.bpf_jit_enable`
    pub(crate) bpf_jit: String,
    /// Of a minute, before the bench started: how busy others kept the machine.
    pub(crate) load: f64,
    /// What `vxcsum --version` says.
    pub(crate) vxcsum: String,
    /// The commit that it was built from.
    pub(crate) commit: String,
    /// When, in UTC.
    pub(crate) time: String,
}

impl Machine {
    /// This one, now.
    pub(crate) fn this(binary: &Path, commit: &str) -> Result<Self> {
        let cpuinfo = read("/proc/cpuinfo")?;
        let meminfo = read("/proc/meminfo")?;
        let memory = field(&meminfo, "MemTotal").and_then(|value| value.strip_suffix(" kB"));
        let load = read("/proc/loadavg")?;
        let version = Command::new(binary).arg("--version").output().context("vxcsum --version")?;
        let now = std::time::SystemTime::now();
        Ok(Self {
            cpu: field(&cpuinfo, "model name").unwrap_or("unknown").to_owned(),
            cores: thread::available_parallelism()?.get(),
            memory_mib: memory.context("no MemTotal")?.parse::<u64>()? / 1024,
            kernel: uname()?.release().to_string_lossy().into_owned(),
            bpf_jit: fs::read_to_string("/proc/sys/net/core/bpf_jit_enable")
                .map_or_else(|_| "unknown".to_owned(), |value| value.trim().to_owned()),
            load: load.split(' ').next().unwrap_or_default().parse().context("/proc/loadavg")?,
            vxcsum: String::from_utf8_lossy(&version.stdout).trim().to_owned(),
            commit: commit.to_owned(),
            time: humantime::format_rfc3339_seconds(now).to_string(),
        })
    }

    /// In one line.
    pub(crate) fn line(&self) -> String {
        let Self { cpu, cores, memory_mib, kernel, vxcsum, commit, load, .. } = self;
        let jit = if self.bpf_jit == "0" { ", BPF JIT off" } else { "" };
        format!(
            "{cpu}, {cores} cores, {memory_mib} MiB; Linux {kernel}{jit}; {vxcsum} ({commit}); \
             {time}, load {load}",
            time = self.time
        )
    }
}

fn read(path: &str) -> Result<String> {
    fs::read_to_string(path).context(path.to_owned())
}

fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then_some(value.trim())
    })
}
