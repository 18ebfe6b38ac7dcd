//! VLAN tags on a kernel that was built without 802.1Q devices.
//!
//! A VLAN device puts its tag into the `sk_buff` and queues it on the NIC below. A macvlan device
//! with a TC program that calls `bpf_skb_vlan_push` does the same, so what runs on egress of the
//! NIC below sees the same packets: tag beside the data or in it, sums still open, GSO.

use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use anyhow::{Context as _, Result, ensure};
use nix::net::if_::if_nametoindex;

use crate::netns::NetNs;

/// The two programs of one end; they are detached when this is dropped.
#[derive(Debug)]
pub(crate) struct Tagger {
    _links: [OwnedFd; 2],
}

/// An `EtherType` and a VLAN id, outermost first.
pub(crate) type Tag = (u16, u16);

impl Tagger {
    /// Tags what leaves through `upper` and takes as many tags off what arrives at `nic`.
    pub(crate) fn start(ns: &NetNs, upper: &str, nic: &str, tags: &[Tag]) -> Result<Self> {
        ns.enter(|| {
            let push = attach(&load(&push_tags(tags))?, upper, BPF_TCX_EGRESS, 0)?;
            let pop = attach(&load(&pop_tags(tags.len()))?, nic, BPF_TCX_INGRESS, 0)?;
            Ok(Self { _links: [push, pop] })
        })
    }
}

/// `struct bpf_insn`: opcode, registers (source in the high half), offset, immediate.
pub(crate) type Instruction = (u8, u8, i16, i32);

const BPF_FUNC_SKB_VLAN_PUSH: i32 = 18;
const BPF_FUNC_SKB_VLAN_POP: i32 = 19;

fn push_tags(tags: &[Tag]) -> Vec<u8> {
    let calls = tags.iter().rev().flat_map(|&(ethertype, vlan)| {
        [
            mov(1, 6),
            mov_value(2, i32::from(ethertype.to_be())),
            mov_value(3, i32::from(vlan)),
            call(BPF_FUNC_SKB_VLAN_PUSH),
        ]
    });
    program(calls)
}

fn pop_tags(count: usize) -> Vec<u8> {
    let calls = (0..count).flat_map(|_| [mov(1, 6), call(BPF_FUNC_SKB_VLAN_POP)]);
    program(calls)
}

/// Keeps the context in r6 for the calls and returns `TCX_NEXT` after them.
fn program(calls: impl Iterator<Item = Instruction>) -> Vec<u8> {
    let all = std::iter::once(mov(6, 1)).chain(calls).chain([mov_value(0, -1), EXIT]);
    encode(all)
}

pub(crate) const EXIT: Instruction = (0x95, 0, 0, 0);

pub(crate) fn encode(instructions: impl IntoIterator<Item = Instruction>) -> Vec<u8> {
    let all = instructions.into_iter();
    all.flat_map(|(opcode, registers, offset, immediate)| {
        let mut bytes = vec![opcode, registers];
        bytes.extend(offset.to_ne_bytes());
        bytes.extend(immediate.to_ne_bytes());
        bytes
    })
    .collect()
}

fn mov(to: u8, from: u8) -> Instruction {
    (0xbf, to | from << 4, 0, 0)
}

pub(crate) fn mov_value(to: u8, value: i32) -> Instruction {
    (0xb7, to, 0, value)
}

fn call(function: i32) -> Instruction {
    (0x85, 0, 0, function)
}

const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_LINK_CREATE: libc::c_long = 28;
const BPF_PROG_TYPE_SCHED_CLS: u32 = 3;
const BPF_TCX_INGRESS: u32 = 46;
pub(crate) const BPF_TCX_EGRESS: u32 = 47;

/// The start of `union bpf_attr` for `BPF_PROG_LOAD`.
#[repr(C)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
}

/// The start of `union bpf_attr` for `BPF_LINK_CREATE`.
#[repr(C)]
struct LinkCreate {
    prog_fd: i32,
    target_ifindex: u32,
    attach_type: u32,
    flags: u32,
}

pub(crate) fn load(instructions: &[u8]) -> Result<OwnedFd> {
    let attr = ProgLoad {
        prog_type: BPF_PROG_TYPE_SCHED_CLS,
        insn_cnt: u32::try_from(instructions.len() / 8)?,
        insns: instructions.as_ptr() as u64,
        license: c"GPL".as_ptr() as u64,
    };
    bpf(BPF_PROG_LOAD, &attr).context("load a TC program of the lab's")
}

/// Hangs a program on a device, behind those that are there unless `flags` say otherwise.
pub(crate) fn attach(
    program: &OwnedFd,
    device: &str,
    attach_type: u32,
    flags: u32,
) -> Result<OwnedFd> {
    let attr = LinkCreate {
        prog_fd: program.as_raw_fd(),
        target_ifindex: if_nametoindex(device).with_context(|| device.to_owned())?,
        attach_type,
        flags,
    };
    let link = bpf(BPF_LINK_CREATE, &attr);
    link.with_context(|| format!("attach a program to {device} (TCX, kernel 6.6)"))
}

fn bpf<T>(command: libc::c_long, attr: &T) -> Result<OwnedFd> {
    // SAFETY: `attr` is a live, fully initialised prefix of `union bpf_attr` and its size is passed
    // with it; the kernel takes what lies beyond as zero. It is only read.
    let fd =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attr), size_of::<T>()) };
    ensure!(fd >= 0, io::Error::last_os_error());
    // SAFETY: the call has succeeded, so this is a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(i32::try_from(fd)?) })
}
