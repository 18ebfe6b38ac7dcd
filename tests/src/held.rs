//! What processes hold of the kernel, and whether it is gone once they are.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::net::if_::if_nametoindex;

use crate::foreign::filters;
use crate::netns::NetNs;
use crate::vlan_tag::BPF_TCX_EGRESS;
use crate::wait::wait_for;

/// The kernel frees BPF objects some time after the last reference to them has gone.
const SOON: Duration = Duration::from_secs(5);

/// A kind of BPF object.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A program.
    Program,
    /// A map.
    Map,
    /// What a program hangs on something with.
    Link,
}

impl Kind {
    const ALL: [Self; 3] = [Self::Program, Self::Map, Self::Link];

    /// What a file descriptor of it says in /proc/PID/fdinfo.
    const fn field(self) -> &'static str {
        match self {
            Self::Program => "prog_id:",
            Self::Map => "map_id:",
            Self::Link => "link_id:",
        }
    }

    /// The command of bpf(2) that lists them: `BPF_PROG_GET_NEXT_ID` and its kin.
    const fn next_id(self) -> libc::c_long {
        match self {
            Self::Program => 11,
            Self::Map => 12,
            Self::Link => 31,
        }
    }
}

/// A BPF object by its id, which is not used again for long.
pub type Object = (Kind, u32);

/// What a process holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Held {
    /// BPF objects that it has a file descriptor of.
    pub objects: BTreeSet<Object>,
    /// Numbers of its file descriptors by what they are: `socket`, `anon_inode:bpf-map`, a path.
    pub files: BTreeMap<String, usize>,
}

impl Held {
    /// By a process that runs, or is stopped.
    pub fn by(pid: u32) -> Result<Self> {
        let mut held = Self::default();
        let folder = format!("/proc/{pid}/fd");
        for entry in fs::read_dir(&folder).context(folder)? {
            let path = entry?.path();
            // It may have been closed meanwhile.
            let Ok(file) = fs::read_link(&path) else { continue };
            *held.files.entry(kind_of_file(&file)).or_default() += 1;
            let info = path.to_string_lossy().replace("/fd/", "/fdinfo/");
            let info = fs::read_to_string(info).unwrap_or_default();
            held.objects.extend(info.lines().filter_map(object));
        }
        Ok(held)
    }

    /// By a process that has nothing to do: what it holds for a moment only is not there.
    pub fn at_rest(pid: u32) -> Result<Self> {
        const REST: Duration = Duration::from_millis(100);
        let mut last = Self::by(pid)?;
        wait_for("it holds the same for a while", SOON, || {
            thread::sleep(REST);
            let now = Self::by(pid)?;
            let is_at_rest = now == last;
            last = now.clone();
            Ok(is_at_rest.then_some(now))
        })
    }

    /// How many files are open.
    pub fn open_files(&self) -> usize {
        self.files.values().sum()
    }

    /// How many BPF objects of each kind.
    pub fn counts(&self) -> BTreeMap<Kind, usize> {
        let count = |kind| self.objects.iter().filter(|(other, _)| *other == kind).count();
        Kind::ALL.into_iter().map(|kind| (kind, count(kind))).collect()
    }

    /// Waits until none of the BPF objects is in the kernel any more, whoever else may have held it.
    pub fn wait_gone(&self) -> Result<()> {
        let is_there = |&&object: &&Object| exists(object);
        wait_for("the kernel has freed its BPF objects", SOON, || {
            Ok(self.objects.iter().all(|object| !is_there(&object)).then_some(()))
        })
        .with_context(|| {
            let left: Vec<_> = self.objects.iter().filter(is_there).collect();
            format!("of {self:?} {left:?} are left")
        })
    }
}

/// Waits until a process holds as many files of each kind, and BPF objects, as it did `before`.
pub fn wait_as_before(pid: u32, before: &Held) -> Result<()> {
    let is_as_before = || -> Result<bool> {
        let now = Held::by(pid)?;
        Ok(now.files == before.files && now.counts() == before.counts())
    };
    wait_for("it holds what it did before", SOON, || Ok(is_as_before()?.then_some(())))
        .with_context(|| {
            format!("before {:?}, now {:?}", before.files, Held::by(pid).map(|it| it.files))
        })
}

fn kind_of_file(file: &Path) -> String {
    let name = file.to_string_lossy();
    // Those of sockets and pipes have numbers.
    match name.split_once(":[") {
        Some((kind, _)) => kind.to_owned(),
        None => name.into_owned(),
    }
}

fn object(line: &str) -> Option<Object> {
    let number = |kind: Kind| line.strip_prefix(kind.field())?.trim().parse().ok();
    Kind::ALL.into_iter().find_map(|kind| Some((kind, number(kind)?)))
}

/// The start of `union bpf_attr` for the commands that list.
#[repr(C)]
struct List {
    after: u32,
    next: u32,
    open_flags: u32,
}

fn exists((kind, id): Object) -> bool {
    let mut attr = List { after: id.saturating_sub(1), next: 0, open_flags: 0 };
    bpf(kind.next_id(), &mut attr).is_ok() && attr.next == id
}

/// The start of `union bpf_attr` for `BPF_PROG_QUERY`.
#[repr(C)]
struct Query {
    target_ifindex: u32,
    attach_type: u32,
    flags: [u32; 2],
    prog_ids: u64,
    count: u32,
    padding: u32,
}

/// How many programs hang on the egress of an interface: by TCX any, and filters of vxcsum.
pub fn attached(ns: &NetNs, interface: &str) -> Result<usize> {
    const BPF_PROG_QUERY: libc::c_long = 16;
    let filters = filters(ns, interface)?;
    let filters = filters.lines().filter(|line| line.contains("vxcsum_egress")).count();
    let by_tcx = ns.enter(|| {
        let mut attr = Query {
            target_ifindex: if_nametoindex(interface).with_context(|| interface.to_owned())?,
            attach_type: BPF_TCX_EGRESS,
            flags: [0; 2],
            prog_ids: 0,
            count: 0,
            padding: 0,
        };
        match bpf(BPF_PROG_QUERY, &mut attr) {
            Ok(()) => Ok(attr.count),
            // Kernels before 6.6 know nothing of TCX, and no program is attached by it.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(0),
            Err(error) => Err(error).context("ask for the programs of an interface"),
        }
    })?;
    Ok(filters + by_tcx as usize)
}

fn bpf<T>(command: libc::c_long, attr: &mut T) -> io::Result<()> {
    // SAFETY: `attr` is a live, fully initialised prefix of `union bpf_attr` and its size is passed
    // with it. The kernel writes no further, and only numbers.
    let done =
        unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// User and system time that a process has taken (proc(5)), in hundredths of a second.
pub fn cpu_ticks(pid: u32) -> Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, fields) = stat.rsplit_once(')').context("no name")?;
    let fields: Vec<_> = fields.split_whitespace().collect();
    ensure!(fields.len() > 12, "{stat}");
    Ok(fields[11].parse::<u64>()? + fields[12].parse::<u64>()?)
}
