//! How events come from the kernel: by a ring buffer, or by one perf buffer a CPU.

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
    #[error("cannot read {0}: {1}")]
    Cpus(&'static str, #[source] io::Error),
    /// One of them. Debian has a fourth level of that setting, which asks for `CAP_SYS_ADMIN`.
    #[error(
        "cannot open the perf buffer of CPU {0} (where that is forbidden: `sysctl \
         kernel.perf_event_paranoid=2`, or --transport ring; where no more memory may be locked: \
         `ulimit -l unlimited`, or a smaller --ring-kib): {1}"
    )]
    Buffer(u32, #[source] PerfBufferError),
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
            array.open(cpu, Some(pages)).map(Self::Perf).map_err(|it| OpenError::Buffer(cpu, it))
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
