//! What the running kernel offers, found out by trying, never by its version: distributions carry
//! features back, and locked-down systems take them away.

use std::fmt::{self, Display};
use std::fs;
use std::path::{Path, PathBuf};

use aya::maps::MapType;
use aya::programs::{ProgramType, SchedClassifier, TcAttachType};
use aya::sys::{BpfHelper, is_helper_supported, is_map_supported};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use vxcsum_common::layout::SkbLayout;

use crate::attach::{Method, is_unknown_to_kernel};
use crate::skb_layout::{self, LayoutError, VMLINUX_BTF};
use crate::transport::Transport;

/// What there is, and what is done without.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// How events come.
    pub transport: Transport,
    /// Where the kernel keeps the offload state, where it can be read.
    pub skb_layout: Option<SkbLayout>,
    /// The file that describes its types, if it can be read.
    pub btf: PathBuf,
    /// What is done without.
    pub missing: Vec<Missing>,
}

/// Something that is done without.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct Missing {
    /// Its name in JSON.
    pub feature: String,
    /// Why it is missing.
    pub reason: String,
    /// What that costs.
    pub cost: String,
}

/// What the user said about it.
#[derive(Clone, Copy, Debug)]
pub struct Wish<'a> {
    /// This transport and no other.
    pub transport: Option<Transport>,
    /// This description of the kernel's types instead of its own.
    pub btf: Option<&'a Path>,
    /// This way to attach and no other.
    pub method: Option<Method>,
}

/// What was asked for cannot be had.
#[derive(Debug, Error)]
pub enum KernelError {
    /// The named BTF file is of no use.
    #[error(transparent)]
    Btf(#[from] LayoutError),
    /// The kernel has no ring buffer.
    #[error(
        "this kernel has no BPF ring buffer ({0}): use --transport perf, or auto, which finds out"
    )]
    NoRing(String),
}

impl Kernel {
    /// Tries it out. Needs the privileges that loading takes.
    pub fn probe(wish: &Wish<'_>) -> Result<Self, KernelError> {
        let mut missing = Vec::new();
        let transport = match (wish.transport, no_ring_buffer()) {
            (Some(Transport::Perf), _) => Transport::Perf,
            (_, None) => Transport::Ring,
            (Some(Transport::Ring), Some(reason)) => return Err(KernelError::NoRing(reason)),
            (None, Some(reason)) => {
                missing.push(Missing::new("ring_buffer", &reason, "events come by perf buffers"));
                Transport::Perf
            }
        };
        if transport == Transport::Perf {
            missing.push(Missing::new(
                "segments",
                "kernels that need perf buffers do not tell",
                "packets are counted as the stack hands them down, before they are cut",
            ));
        }
        let skb_layout = match offload_state(transport, wish.btf)? {
            Ok(layout) => Some(layout),
            Err(reason) => {
                let cost =
                    "events go without it; packets with a tunnel in the tunnel are unverified";
                missing.push(Missing::new("ip_summed", &reason, cost));
                None
            }
        };
        if wish.method.is_none()
            && let Some(reason) = no_tcx()
        {
            let cost =
                "attached by clsact, whose filter stays behind after SIGKILL until the next start";
            missing.push(Missing::new("tcx", &reason, cost));
        }
        if is_jit_off() {
            let reason = "net.core.bpf_jit_enable is 0";
            let cost = "every packet takes longer: `sysctl net.core.bpf_jit_enable=1` turns it on";
            missing.push(Missing::new("jit", reason, cost));
        }
        let btf = wish.btf.unwrap_or(Path::new(VMLINUX_BTF)).to_owned();
        Ok(Self { transport, skb_layout, btf, missing })
    }
}

impl Missing {
    fn new(feature: &str, reason: &str, cost: &str) -> Self {
        Self { feature: feature.to_owned(), reason: reason.to_owned(), cost: cost.to_owned() }
    }
}

/// `no tcx (the kernel does not know it): attached by clsact`
impl Display for Missing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { feature, reason, cost } = self;
        write!(f, "no {feature} ({reason}): {cost}")
    }
}

/// Why there is no ring buffer.
fn no_ring_buffer() -> Option<String> {
    match is_map_supported(MapType::RingBuf) {
        Ok(true) => None,
        Ok(false) => Some("the kernel does not know this kind of map".to_owned()),
        Err(error) => Some(error.io_error.to_string()),
    }
}

/// Where the offload state is, or why it cannot be read. An error only where the user named a file
/// that is of no use.
fn offload_state(
    transport: Transport,
    btf: Option<&Path>,
) -> Result<Result<SkbLayout, String>, LayoutError> {
    if transport == Transport::Perf {
        return Ok(Err("the BPF object for old kernels does not read it".to_owned()));
    }
    let helper =
        is_helper_supported(ProgramType::SchedClassifier, BpfHelper::BPF_FUNC_probe_read_kernel);
    match helper {
        Ok(true) => {}
        Ok(false) => {
            let why = "the kernel does not let BPF read its memory: it is locked down, or too old";
            return Ok(Err(why.to_owned()));
        }
        Err(error) => return Ok(Err(error.to_string())),
    }
    match btf {
        Some(path) => skb_layout::read(path).map(Ok),
        None => Ok(skb_layout::read(Path::new(VMLINUX_BTF))
            .map_err(|error| format!("{error}; --btf names another file"))),
    }
}

/// Why there is no TCX. Every network namespace has a loopback device to ask at.
fn no_tcx() -> Option<String> {
    match SchedClassifier::query_tcx("lo", TcAttachType::Egress) {
        Err(error) if is_unknown_to_kernel(&error) => {
            Some("the kernel does not know it, which came with 6.6".to_owned())
        }
        // Whatever else is wrong shows when a program is attached.
        _ => None,
    }
}

/// Kernels before 5.7 interpret programs unless told otherwise. The file is only there in the first
/// network namespace.
fn is_jit_off() -> bool {
    fs::read_to_string("/proc/sys/net/core/bpf_jit_enable").is_ok_and(|text| text.trim() == "0")
}
