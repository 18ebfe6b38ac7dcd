//! The skb as a [`Packet`].

use core::ptr;

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::{bpf_csum_diff, bpf_skb_load_bytes, bpf_skb_pull_data};
use aya_ebpf::macros::map;
use aya_ebpf::maps::PerCpuArray;
use vxcsum_common::layout::{MASQUERADE_MARK, SNAPSHOT_LEN};
use vxcsum_common::outer::Extensions;
use vxcsum_common::packet::Header;
use vxcsum_common::{Cut, Offload, Packet, Sum};

use crate::kernel;
use crate::maps::Known;
use crate::opaque::{between_1_and, opaque};

/// Reach of an offset, in bytes: tells the verifier that it cannot run away. GSO packets are
/// longer, their headers are not.
pub(crate) const OFFSET_MASK: usize = 0x3fff;

/// Bytes that are summed at a time; the most that `bpf_csum_diff` takes on older kernels
/// (`struct bpf_scratchpad` in net/core/filter.c).
const CHUNK_LEN: usize = 512;
/// Chunks that may be summed: a jumbo frame of 9000 bytes and its headers.
const MAX_CHUNKS: usize = 18;
/// Returned instead of a sum, which has 32 bits.
const NO_SUM: u64 = u64::MAX;
/// The bits of a sum.
const SUM_MASK: u64 = 0xffff_ffff;

/// Where bytes are copied to be summed, with room for padding to a multiple of four.
#[map]
static CHUNK: PerCpuArray<[u8; CHUNK_LEN + 4]> = PerCpuArray::with_max_entries(1, 0);

/// A packet on its way out.
#[derive(Clone, Copy)]
pub(crate) struct Skb {
    pub(crate) ctx: *mut __sk_buff,
    data: usize,
    data_end: usize,
    known: Known,
}

impl Skb {
    /// Takes the packet as its linear part lies now: whatever changes the skb makes it stale.
    #[inline(always)]
    pub(crate) fn new(ctx: *mut __sk_buff, known: Known) -> Self {
        // SAFETY: the kernel hands it to the program for the time that it runs.
        let (data, data_end) = unsafe { ((*ctx).data as usize, (*ctx).data_end as usize) };
        Self { ctx, data, data_end, known }
    }

    #[inline(always)]
    fn raw(&self) -> &__sk_buff {
        // SAFETY: as above.
        unsafe { &*self.ctx }
    }

    /// Moves all headers into the linear part, if they may not be there. Every [`Skb`] of the packet
    /// is stale then. Whether anything was moved.
    #[inline(always)]
    pub(crate) fn make_linear(ctx: *mut __sk_buff) -> bool {
        // SAFETY: the kernel hands it to the program for the time that it runs.
        let (data, data_end, len) = unsafe { ((*ctx).data, (*ctx).data_end, (*ctx).len) };
        if data_end.wrapping_sub(data) >= len {
            return false;
        }
        // Fails without memory; the packet then stays as it is and counts as cut short.
        // SAFETY: no reference into the packet is held: the caller looks anew.
        unsafe { bpf_skb_pull_data(ctx, len.min(SNAPSHOT_LEN as u32)) == 0 }
    }

    /// How many packets the skb is on the wire, as far as that is known: at least one.
    #[inline(always)]
    pub(crate) fn segments(&self) -> u32 {
        self.known_segments().max(1)
    }

    /// The same, 0 where it is not known.
    #[inline(always)]
    pub(crate) fn known_segments(&self) -> u32 {
        kernel::segments(self.raw(), self.known.config())
    }

    /// Bytes on the wire, as far as that is known.
    #[inline(always)]
    pub(crate) fn wire_len(&self) -> u32 {
        kernel::wire_len(self.raw())
    }

    /// See [`Known::forget`].
    #[inline(always)]
    fn take(&self, number: usize) -> usize {
        self.known.forget(number as u64) as usize
    }

    /// `skb->mark`.
    #[inline(always)]
    pub(crate) fn mark(&self) -> u32 {
        self.raw().mark
    }

    /// `skb->ip_summed`.
    #[inline(always)]
    pub(crate) fn ip_summed(&self) -> u8 {
        kernel::ip_summed(self.ctx)
    }
}

impl Packet for Skb {
    #[inline(always)]
    fn len(&self) -> usize {
        self.raw().len as usize
    }

    #[inline(always)]
    fn header<const N: usize>(&self, offset: usize) -> Result<Header<'_, N>, Cut> {
        let start = if kernel::KNOWS_SPILLED_NUMBERS {
            self.data + (offset & OFFSET_MASK)
        } else {
            // Masked here, and added here: what is spilled is a pointer, which it does know.
            opaque(self.data + (opaque(offset) & OFFSET_MASK))
        };
        // SAFETY: a packet does not lie at address 0.
        unsafe { core::hint::assert_unchecked(start != 0) };
        if start + N > self.data_end {
            return Err(Cut);
        }
        // SAFETY: within the linear part of the packet, as just compared; the verifier checks it.
        Ok(Header::new(unsafe { &*(start as *const [u8; N]) }))
    }

    #[inline(always)]
    fn sum(&self, offset: usize, len: usize) -> Option<Sum> {
        match sum_bytes(self.ctx, self.take(offset) as u32, self.take(len) as u32) {
            NO_SUM => None,
            sum => Some(Sum::of_memory_u32(sum as u32)),
        }
    }

    #[inline(always)]
    fn is_raw_ip(&self) -> bool {
        self.known.config().is_raw_ip != 0
    }

    #[inline(always)]
    fn forget(&self, offset: usize) -> usize {
        opaque(self.take(offset)) & OFFSET_MASK
    }

    #[inline(always)]
    fn extension_headers(&self, protocol: u8, offset: usize) -> Result<Extensions, Cut> {
        let protocol = self.take(protocol.into()) as u32;
        match extension_headers(self.ctx, protocol, self.take(offset) as u32) {
            CUT => Err(Cut),
            bits => Ok(Extensions::from_bits(bits)),
        }
    }

    #[inline(always)]
    fn is_gso(&self) -> bool {
        self.known_segments() != 1
    }

    #[inline(always)]
    fn offload(&self) -> Offload {
        kernel::offload(self.ctx)
    }

    #[inline(always)]
    fn flow_hash(&self) -> u32 {
        self.raw().hash
    }

    #[inline(always)]
    fn arithmetic_proves_nat(&self) -> bool {
        self.mark() & MASQUERADE_MARK != 0
    }
}

/// The same as long as it has no optional headers, and at least `N` bytes in reach.
#[derive(Clone, Copy)]
pub(crate) struct Plain<const N: usize> {
    pub(crate) skb: Skb,
}

impl<const N: usize> Plain<N> {
    #[inline(always)]
    pub(crate) fn of(skb: Skb) -> Result<Self, Cut> {
        if skb.data + N > skb.data_end { Err(Cut) } else { Ok(Self { skb }) }
    }
}

impl<const N: usize> Packet for Plain<N> {
    const IS_PLAIN: bool = true;

    #[inline(always)]
    fn len(&self) -> usize {
        self.skb.len()
    }

    #[inline(always)]
    fn header<const M: usize>(&self, offset: usize) -> Result<Header<'_, M>, Cut> {
        let start = self.skb.data + offset;
        // SAFETY: a packet does not lie at address 0.
        unsafe { core::hint::assert_unchecked(start != 0) };
        if offset + M > N && start + M > self.skb.data_end {
            return Err(Cut);
        }
        // SAFETY: within the linear part of the packet, as just compared; the verifier checks it.
        Ok(Header::new(unsafe { &*(start as *const [u8; M]) }))
    }

    #[inline(always)]
    fn sum(&self, _: usize, _: usize) -> Option<Sum> {
        None
    }

    #[inline(always)]
    fn is_gso(&self) -> bool {
        self.skb.is_gso()
    }

    #[inline(always)]
    fn offload(&self) -> Offload {
        Offload::Unknown
    }

    #[inline(always)]
    fn flow_hash(&self) -> u32 {
        self.skb.flow_hash()
    }

    #[inline(always)]
    fn arithmetic_proves_nat(&self) -> bool {
        self.skb.arithmetic_proves_nat()
    }
}

/// Result of [`extension_headers`]: a header is out of reach.
const CUT: u64 = u64::MAX;

/// [`Extensions::read`] in a register. A global function: the verifier walks it once, for any
/// arguments, not again from every place that calls it.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn extension_headers(ctx: *mut __sk_buff, protocol: u32, offset: u32) -> u64 {
    let Some(known) = Known::get() else { return CUT };
    let skb = Skb::new(ctx, known);
    Extensions::read(&skb, protocol as u8, offset as usize).map_or(CUT, Extensions::to_bits)
}

/// Sums `len` bytes at `offset`, wherever they lie. [`NO_SUM`] where they are too many or end
/// beyond the packet.
///
/// Global, as [`extension_headers`].
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn sum_bytes(skb: *mut __sk_buff, offset: u32, len: u32) -> u64 {
    let Some(chunk) = CHUNK.get_ptr_mut(0) else {
        return NO_SUM;
    };
    let chunk = chunk.cast::<u8>();
    let chunks = len as usize / CHUNK_LEN;
    if chunks > MAX_CHUNKS {
        return NO_SUM;
    }
    let mut sum = 0;
    for index in 0..MAX_CHUNKS {
        if index == chunks {
            break;
        }
        let at = offset + (index * CHUNK_LEN) as u32;
        // SAFETY: a map value of this CPU, which nothing else uses while the program runs; it is
        // longer than CHUNK_LEN.
        if unsafe { bpf_skb_load_bytes(skb.cast(), at, chunk.cast(), CHUNK_LEN as u32) } != 0 {
            return NO_SUM;
        }
        // SAFETY: as above.
        sum = unsafe { add_chunk(chunk, CHUNK_LEN, sum) };
    }
    let rest = len as usize % CHUNK_LEN;
    if rest == 0 {
        return sum & SUM_MASK;
    }
    let at = offset + (chunks * CHUNK_LEN) as u32;
    let rest = between_1_and::<CHUNK_LEN>(rest);
    // SAFETY: `rest` is at most the length of the buffer.
    if unsafe { bpf_skb_load_bytes(skb.cast(), at, chunk.cast(), rest as u32) } != 0 {
        return NO_SUM;
    }
    for pad in 0..3 {
        // SAFETY: at most CHUNK_LEN + 2, within the room for padding.
        unsafe { *chunk.add(rest + pad) = 0 };
    }
    // SAFETY: at most CHUNK_LEN + 3 rounded down, within the buffer.
    unsafe { add_chunk(chunk, (rest + 3) & !3, sum) & SUM_MASK }
}

/// Adds `len` bytes, a multiple of four, to the lower 32 bits of `sum`, and so returns it.
///
/// # Safety
///
/// `len` bytes at `chunk` can be read.
#[inline(always)]
unsafe fn add_chunk(chunk: *mut u8, len: usize, sum: u64) -> u64 {
    // SAFETY: promised by the caller. Fails only for a length that is no multiple of four.
    let outcome =
        unsafe { bpf_csum_diff(ptr::null_mut(), 0, chunk.cast(), len as u32, sum as u32) };
    outcome.cast_unsigned()
}
