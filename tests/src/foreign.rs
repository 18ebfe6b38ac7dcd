//! TC programs of somebody else beside that of vxcsum.

use std::os::fd::OwnedFd;

use anyhow::Result;

use crate::netns::NetNs;
use crate::vlan_tag::{BPF_TCX_EGRESS, EXIT, attach, encode, load, mov_value};

const BPF_F_BEFORE: u32 = 1 << 3;

/// What a program has to say about every packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Says {
    /// Nothing: the next program decides (`TCX_NEXT`).
    Next = -1,
    /// The packet goes out, and no other program is asked (`TCX_PASS`).
    Pass = 0,
    /// The packet is dropped (`TCX_DROP`).
    Drop = 2,
}

/// Where among the programs of an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Before all that are there.
    First,
    /// Behind them.
    Last,
}

/// A program on the egress of an interface by TCX; it goes when this is dropped.
#[derive(Debug)]
pub struct ForeignProgram {
    _link: OwnedFd,
}

impl ForeignProgram {
    /// Attaches it to `device` in `ns`.
    pub fn attach(ns: &NetNs, device: &str, says: Says, place: Place) -> Result<Self> {
        let flags = match place {
            Place::First => BPF_F_BEFORE,
            Place::Last => 0,
        };
        let program = encode([mov_value(0, says as i32), EXIT]);
        let link = ns.enter(|| attach(&load(&program)?, device, BPF_TCX_EGRESS, flags))?;
        Ok(Self { _link: link })
    }
}

/// Adds a classic BPF program as a filter to the egress of `device`, which has a clsact qdisc.
pub fn add_filter(ns: &NetNs, device: &str, priority: u16, says: Says) -> Result<()> {
    let mut command = ns.command("tc");
    let priority = priority.to_string();
    command.args(["filter", "add", "dev", device, "egress", "prio", &priority, "bpf", "da"]);
    // A classic program returns an unsigned number, 32 bits of it.
    let code = (says as i32).cast_unsigned();
    crate::sh::output(command.args(["bytecode", &format!("1,6 0 0 {code}")])).map(drop)
}

/// What `tc` knows of the filters on the egress of `device`.
pub fn filters(ns: &NetNs, device: &str) -> Result<String> {
    ns.run(&format!("tc filter show dev {device} egress"))
}
