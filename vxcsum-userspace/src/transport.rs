//! How events come from the kernel: by a ring buffer, or by one perf buffer a CPU.

use std::fs;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsRawFd, RawFd};

use aya::maps::perf::{PerfBufferError, PerfEvent, PerfEventArrayBuffer};
use aya::maps::{MapData, PerfEventArray, RingBuf};
use aya::util::online_cpus;
use thiserror::Error;
use vxcsum_common::layout::Event;

use crate::clock;

/// A way for events, and the BPF object that takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// A ring buffer (Linux 5.8).
    Ring,
    /// Perf buffers: every kernel that has what the rest of vxcsum needs.
    Perf,
}

impl Transport {
    /// Both, the better one first.
    pub const ALL: [Self; 2] = [Self::Ring, Self::Perf];

    /// The word that the command line and JSON use.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ring => "ring",
            Self::Perf => "perf",
        }
    }
}

/// Where the events of one program arrive: one ring buffer, or the perf buffers of all CPUs.
pub enum Buffer {
    /// All events.
    Ring(RingBuf<MapData>),
    /// Those of one CPU.
    Perf(PerfEventArrayBuffer<MapData>),
}

/// The perf buffers cannot be opened.
#[derive(Debug, Error)]
pub enum OpenError {
    /// The CPUs are not known.
    #[error("cannot read {0}")]
    Cpus(&'static str, #[source] io::Error),
    /// One of them.
    #[error("cannot open the perf buffer of CPU {0}")]
    Buffer(u32, #[source] PerfBufferError),
    /// None of them.
    #[error(
        "not permitted to open perf buffers: {}; or use --transport ring, where the \
         kernel has a ring buffer (Linux 5.8)",
        remedy(*.paranoid)
    )]
    Forbidden {
        /// `kernel.perf_event_paranoid`, if it can be read.
        paranoid: Option<i32>,
        /// What the kernel said.
        source: io::Error,
    },
    /// They hold more than a user may lock.
    #[error(
        "no more memory for perf buffers: raise the limit of locked memory (`ulimit -l \
         unlimited`, LimitMEMLOCK=infinity), or ask for less by --ring-kib"
    )]
    Memory(#[source] io::Error),
}

/// What there is to do about perf buffers that are forbidden.
fn remedy(paranoid: Option<i32>) -> String {
    match paranoid {
        Some(level @ DEBIANS_PARANOID..) => format!(
            "kernel.perf_event_paranoid is {level} here, `sysctl kernel.perf_event_paranoid=2` \
             permits it"
        ),
        _ => "a seccomp filter, as containers have one, or another policy of this system forbids \
              perf_event_open"
            .to_owned(),
    }
}

/// The level of `kernel.perf_event_paranoid` that Debian adds to those of Linux: it asks for
/// `CAP_SYS_ADMIN`, which vxcsum does not keep where there is `CAP_PERFMON`.
const DEBIANS_PARANOID: i32 = 3;

impl OpenError {
    fn new(cpu: u32, error: PerfBufferError) -> Self {
        let is_forbidden =
            |error: &io::Error| matches!(error.raw_os_error(), Some(libc::EPERM | libc::EACCES));
        match error {
            PerfBufferError::OpenError { io_error } if is_forbidden(&io_error) => {
                let paranoid = fs::read_to_string("/proc/sys/kernel/perf_event_paranoid");
                let paranoid = paranoid.ok().and_then(|level| level.trim().parse().ok());
                Self::Forbidden { paranoid, source: io_error }
            }
            // perf_mmap() says no more than that when it counts what a user has locked.
            PerfBufferError::MMapError { io_error } if is_forbidden(&io_error) => {
                Self::Memory(io_error)
            }
            error => Self::Buffer(cpu, error),
        }
    }
}

/// What was taken out of a buffer.
#[derive(Debug, Default)]
pub struct Taken {
    /// Records, each a [`vxcsum_common::layout::Event`], in the order of their time where they come
    /// from one CPU.
    pub records: Vec<Vec<u8>>,
    /// Records that had found no room, as far as perf buffers have told since the last look.
    pub lost: u64,
}

impl Taken {
    /// Those of the records that the program has counted as events.
    pub fn events(&self) -> u64 {
        let is_followed = |record: &Vec<u8>| {
            bytemuck::try_pod_read_unaligned::<Event>(record).is_ok_and(|it| it.is_followed != 0)
        };
        self.records.iter().filter(|&record| !is_followed(record)).count() as u64
    }
}

impl Buffer {
    /// Opens a perf buffer for every CPU that is online. One that comes later has none: its events
    /// count as lost. Together they hold about `len` bytes.
    pub fn open_all(mut array: PerfEventArray<MapData>, len: u32) -> Result<Vec<Self>, OpenError> {
        /// A few hundred events.
        const MIN_PAGES: usize = 16;
        let cpus = online_cpus().map_err(|(path, error)| OpenError::Cpus(path, error))?;
        let pages = len as usize / cpus.len().max(1) / page_size();
        let pages = pages.max(MIN_PAGES).next_power_of_two();
        let open = |cpu| {
            array.open(cpu, Some(pages)).map(Self::Perf).map_err(|it| OpenError::new(cpu, it))
        };
        cpus.into_iter().map(open).collect()
    }

    /// Takes some of what there is, and adds it to `taken`: nothing where there is nothing.
    pub fn take(&mut self, taken: &mut Taken) {
        /// So that a storm is not copied as a whole before the first event of it is read.
        const MOST: usize = 256;
        let enough = taken.records.len() + MOST;
        match self {
            Self::Ring(ring) => {
                while taken.records.len() < enough
                    && let Some(record) = ring.next()
                {
                    taken.records.push(record.to_vec());
                }
            }
            Self::Perf(buffer) => {
                let suspended_ns = clock::suspended().as_nanos() as u64;
                let _: ControlFlow<()> = buffer.try_fold((), |(), event| match event {
                    PerfEvent::Sample { head, tail } => {
                        let mut record = [head, tail].concat();
                        // The kernel fills it up to the next 8 bytes, counted with its length
                        // of 4; a record of ours is a multiple of 8.
                        record.truncate(record.len() & !7);
                        // Events are dated by the other clock in their first field.
                        if let Some(time) = record.first_chunk_mut() {
                            *time = (u64::from_ne_bytes(*time) + suspended_ns).to_ne_bytes();
                        }
                        taken.records.push(record);
                        if taken.records.len() < enough {
                            ControlFlow::Continue(())
                        } else {
                            ControlFlow::Break(())
                        }
                    }
                    PerfEvent::Lost { count } => {
                        taken.lost += count;
                        ControlFlow::Continue(())
                    }
                });
            }
        }
    }
}

impl AsRawFd for Buffer {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Self::Ring(ring) => ring.as_raw_fd(),
            Self::Perf(buffer) => buffer.as_raw_fd(),
        }
    }
}

fn page_size() -> usize {
    // SAFETY: only asks for a number.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).unwrap_or(4096)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_forbids_perf_buffers_is_named() {
        let forbidden = |paranoid| {
            let source = io::Error::from_raw_os_error(libc::EACCES);
            OpenError::Forbidden { paranoid, source }.to_string()
        };
        let debian = forbidden(Some(3));
        assert!(debian.contains("kernel.perf_event_paranoid is 3 here"), "{debian}");
        assert!(debian.contains("`sysctl kernel.perf_event_paranoid=2`"), "{debian}");
        for paranoid in [None, Some(2), Some(-1)] {
            let other = forbidden(paranoid);
            assert!(other.contains("seccomp") && !other.contains("sysctl"), "{other}");
        }
    }
}
