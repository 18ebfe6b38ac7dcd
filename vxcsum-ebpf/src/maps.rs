//! The maps, and what they tell the verdict.

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{HashMap, PerCpuArray};
use vxcsum_common::layout::{ANY_VNI, Config, Counters, DeviceKey, MAX_FOLLOWED, Port};
use vxcsum_common::verdict::Watch;
use vxcsum_common::{Device, Policy, Verdict};

use crate::kernel;

/// What it has counted; one value a CPU.
#[map]
pub(crate) static COUNTERS: PerCpuArray<Counters> = PerCpuArray::with_max_entries(1, 0);

/// The VXLAN devices that send through the interface.
#[map]
static DEVICES: HashMap<DeviceKey, Device> = HashMap::with_max_entries(4096, 0);

/// Inner TCP flows that user space follows, by the number of the flow: see
/// [`SYN_TOLD`](vxcsum_common::layout::SYN_TOLD). Mostly empty, so its memory comes and goes.
#[map]
pub(crate) static FOLLOWED: HashMap<u64, u32> =
    HashMap::with_max_entries(MAX_FOLLOWED, BPF_F_NO_PREALLOC);

/// What user space has made known.
#[derive(Clone, Copy)]
pub(crate) struct Known {
    config: *mut Config,
}

impl Known {
    #[inline(always)]
    pub(crate) fn get() -> Option<Self> {
        Some(Self { config: kernel::config()? })
    }

    #[inline(always)]
    pub(crate) fn config(&self) -> &Config {
        // SAFETY: a map value lives as long as the program. User space replaces it as a whole; a
        // field that changes between two reads makes one packet be judged by the old and the new
        // value.
        unsafe { &*self.config }
    }

    /// The same number, of which the verifier knows nothing any more.
    ///
    /// It walks on from a place once for every constant that comes there, also where the difference does
    /// not matter. Verifiers before 5.3 have walked enough after 131,072 instructions, and for all
    /// others it is the time that a start takes.
    #[inline(always)]
    pub(crate) fn forget(&self, number: u64) -> u64 {
        let zero = core::ptr::from_ref(&self.config().zero);
        #[expect(clippy::cast_ptr_alignment, reason = "the verifier decides about alignment")]
        let zero = zero.cast::<u64>();
        // SAFETY: a live value of eight bytes. Volatile, so that the compiler leaves it where it is.
        number ^ unsafe { zero.read_volatile() }
    }
}

/// A watched port: what is known of it, and where that is kept.
#[derive(Clone, Copy)]
pub(crate) struct Watched {
    pub(crate) port: Port,
    at: *mut Port,
}

impl Watched {
    /// Whether [`Self::learn`] has nothing to add.
    #[inline(always)]
    pub(crate) const fn has_learned(self, verdict: Verdict, is_ipv6: bool) -> bool {
        let (policy, seen) = if is_ipv6 {
            (self.port.policy_ipv6, self.port.seen_ipv6)
        } else {
            (self.port.policy_ipv4, self.port.seen_ipv4)
        };
        let lesson = Port::lesson(verdict);
        policy != Policy::Unknown as u8 || seen & lesson == lesson
    }

    /// Remembers what a sender of unknown policy sends.
    #[inline(always)]
    pub(crate) fn learn(self, verdict: Verdict, is_ipv6: bool) {
        if self.has_learned(verdict, is_ipv6) {
            return;
        }
        let lesson = Port::lesson(verdict);
        // SAFETY: it points into the configuration, which lives as long as the program. CPUs race for
        // it: each sets bits that are never taken back, so the next packet mends what is lost.
        let port = unsafe { &mut *self.at };
        if is_ipv6 {
            port.seen_ipv6 |= lesson;
        } else {
            port.seen_ipv4 |= lesson;
        }
    }
}

impl Watch for Known {
    type Port = Watched;

    #[inline(always)]
    fn port(&self, port: u16) -> Option<Watched> {
        let at = core::ptr::from_ref(self.config().ports.slot_of(port)).cast_mut();
        // As one number, which it is for the compiler from here on: it would load byte by byte.
        #[expect(clippy::cast_ptr_alignment, reason = "the verifier decides about alignment")]
        // SAFETY: a live value of eight bytes.
        let bits = unsafe { at.cast::<u64>().read_volatile() };
        let watched = Watched { port: bytemuck::cast(bits), at };
        (watched.port.port == port).then_some(watched)
    }

    #[inline(always)]
    fn policy(&self, Watched { port, .. }: Watched, vni: u32, is_ipv6: bool) -> Policy {
        if port.by_vni == 0 {
            return port.policy(is_ipv6);
        }
        self.device(port.port, vni).policy(is_ipv6)
    }

    #[inline(always)]
    fn device(&self, port: u16, vni: u32) -> Device {
        let port = u32::from(port);
        // One after the other: LLVM would fold the two pointers into one test, which the verifier
        // does not follow.
        if let Some(own) = DEVICES.get_ptr(DeviceKey { vni, port }) {
            // SAFETY: a value that user space deletes is not reused before the program is done
            // (RCU); it is replaced as a whole, and read once.
            return unsafe { *own };
        }
        match DEVICES.get_ptr(DeviceKey { vni: ANY_VNI, port }) {
            // SAFETY: as above.
            Some(any) => unsafe { *any },
            None => Device::UNKNOWN,
        }
    }
}
