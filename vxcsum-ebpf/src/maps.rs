//! The maps, and what they tell the verdict.

use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, PerCpuArray};
use vxcsum_common::layout::{ANY_VNI, Config, Counters, DeviceKey, MAX_FOLLOWED, Port};
use vxcsum_common::verdict::Watch;
use vxcsum_common::{Device, Policy};

use crate::kernel::Oblivion;

/// What the program works by; one value.
#[map]
pub(crate) static CONFIG: Array<Config> = Array::with_max_entries(1, 0);

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
    pub(crate) oblivion: Oblivion,
}

impl Known {
    #[inline(always)]
    pub(crate) fn get() -> Option<Self> {
        Some(Self { config: CONFIG.get_ptr_mut(0)?, oblivion: Oblivion::get()? })
    }

    #[inline(always)]
    pub(crate) fn config(&self) -> &Config {
        // SAFETY: a map value lives as long as the program. User space replaces it as a whole; a
        // field that changes between two reads makes one packet be judged by the old and the new
        // value.
        unsafe { &*self.config }
    }
}

impl Watch for Known {
    type Port = *mut Port;

    #[inline(always)]
    fn port(&self, port: u16) -> Option<*mut Port> {
        self.config().ports.get(port).map(|port| core::ptr::from_ref(port).cast_mut())
    }

    #[inline(always)]
    fn policy(&self, port: *mut Port, vni: u32, is_ipv6: bool) -> Policy {
        // SAFETY: as in `learn`.
        let port = unsafe { &*port };
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
