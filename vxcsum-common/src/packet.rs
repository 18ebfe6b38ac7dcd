//! How a packet is reached: from a BPF program, from a capture, from a test.

use crate::Sum;
use crate::outer::Extensions;

/// Reads an integer as it lies in memory; the caller has checked that it is within the array.
///
/// LLVM takes BPF for a machine that cannot load unaligned words and makes four byte loads, shifts
/// and ors out of one. The kernel's verifier decides about alignment for the real machine, so there
/// the load is written as an aligned one, as C programs do by casting a packet pointer.
macro_rules! load {
    ($integer:ty, $bytes:expr, $at:expr) => {{
        let at: usize = $at;
        #[cfg(target_arch = "bpf")]
        #[expect(clippy::cast_ptr_alignment, reason = "explained above")]
        // SAFETY: the bytes are within the array; alignment is the verifier's business (above).
        let value = unsafe { $bytes.as_ptr().add(at).cast::<$integer>().read() };
        #[cfg(not(target_arch = "bpf"))]
        let value = {
            let mut word = [0; size_of::<$integer>()];
            word.copy_from_slice(&$bytes[at..at + size_of::<$integer>()]);
            <$integer>::from_ne_bytes(word)
        };
        value
    }};
}

/// A header lies beyond what [`Packet::header`] can give. The packet ends there, or the rest of it
/// was not captured or does not lie in the linear part of the skb.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut;

/// The checksum that the NIC was asked to finish, from `skb->ip_summed` and its companions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offload {
    /// Cannot be read here.
    Unknown,
    /// Every sum is in its place (`CHECKSUM_NONE`, `CHECKSUM_UNNECESSARY`, `CHECKSUM_COMPLETE`).
    Complete,
    /// `CHECKSUM_PARTIAL`: bytes from `start` to the end are to be summed into the field at
    /// `field`. Both are byte offsets from the start of the packet.
    Partial {
        /// `skb->csum_start`.
        start: usize,
        /// `skb->csum_start + skb->csum_offset`.
        field: usize,
    },
}

/// A packet as it is about to leave, or as it was captured.
///
/// Offsets and lengths are in bytes from the start of the link header, or of the IP header where
/// [`Packet::is_raw_ip`] says that there is no link header.
pub trait Packet {
    /// Whether optional headers count as out of reach ([`Cut`]): VLAN tags, IP options, extension
    /// headers. All others are where they always are then, which the compiler makes use of; most
    /// packets have no others.
    const IS_PLAIN: bool = false;

    /// Length of the whole packet, whether or not all of it can be read.
    fn len(&self) -> usize;

    /// Whether the packet has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The `N` bytes at `offset`.
    fn header<const N: usize>(&self, offset: usize) -> Result<Header<'_, N>, Cut>;

    /// The sum of `len` bytes at `offset`; `None` where they cannot all be read or are more than
    /// may be summed here.
    fn sum(&self, offset: usize, len: usize) -> Option<Sum>;

    /// Whether the packet starts with its IP header (tun, `WireGuard` and other devices without a
    /// link header).
    fn is_raw_ip(&self) -> bool {
        false
    }

    /// Whether a length of 0 in an IP or UDP header stands for "all there is". A packet that the NIC
    /// is still to cut may be longer than those fields can say (BIG TCP, `iph_set_totlen` in
    /// include/linux/ip.h), and captures show it as it was then.
    fn may_lack_length(&self) -> bool {
        false
    }

    /// The same offset, of which the compiler knows nothing any more. A BPF verifier walks a
    /// program once for every combination of constant offsets that optional headers lead to; from
    /// here on it walks it once for all of them.
    fn forget(&self, offset: usize) -> usize {
        offset
    }

    /// Looks through the IPv6 extension headers from `protocol` at `offset` on:
    /// [`Extensions::read`], which a BPF program puts into a function of its own.
    fn extension_headers(&self, protocol: u8, offset: usize) -> Result<Extensions, Cut>
    where
        Self: Sized,
    {
        Extensions::read(self, protocol, offset)
    }

    /// Whether the packet is still to be cut into segments (GSO): it carries one outer header for
    /// all of them.
    fn is_gso(&self) -> bool;

    /// What is left for the NIC to sum.
    fn offload(&self) -> Offload;

    /// `skb->hash`, from which the VXLAN driver takes the source port; 0 where there is none.
    fn flow_hash(&self) -> u32;

    /// Whether, without a flow hash, arithmetic and the range of source ports are enough to call a
    /// wrong sum stale. True of a capture, which never records a hash; of a live packet only where
    /// something else speaks of NAT.
    fn arithmetic_proves_nat(&self) -> bool;
}

/// `N` bytes of a packet, read at offsets that the compiler checks.
#[derive(Clone, Copy, Debug)]
pub struct Header<'a, const N: usize>(&'a [u8; N]);

impl<'a, const N: usize> Header<'a, N> {
    /// Takes the bytes of a header.
    #[inline(always)]
    pub const fn new(bytes: &'a [u8; N]) -> Self {
        Self(bytes)
    }

    /// The byte at `AT`.
    #[inline(always)]
    pub const fn u8<const AT: usize>(self) -> u8 {
        const { assert!(AT < N) }
        self.0[AT]
    }

    /// The big-endian 16-bit word at `AT`, in host byte order.
    #[inline(always)]
    pub fn be16<const AT: usize>(self) -> u16 {
        u16::from_be(self.memory16::<AT>())
    }

    /// Whether the big-endian 16-bit word at `AT` is this one, given in host byte order.
    #[inline(always)]
    pub fn is_be16<const AT: usize>(self, word: u16) -> bool {
        self.memory16::<AT>() == word.to_be()
    }

    /// Those bits of the big-endian 16-bit word at `AT` that are set in `mask`, both in host byte order.
    /// A comparison of them needs no bytes swapped.
    #[inline(always)]
    pub fn be16_bits<const AT: usize>(self, mask: u16) -> u16 {
        u16::from_be(self.memory16::<AT>() & mask.to_be())
    }

    /// The big-endian 32-bit word at `AT`, in host byte order.
    #[inline(always)]
    pub fn be32<const AT: usize>(self) -> u32 {
        u32::from_be(self.memory32::<AT>())
    }

    /// The sum of the `LEN` bytes at `AT`, an even number of them.
    #[inline(always)]
    pub fn sum<const AT: usize, const LEN: usize>(self) -> Sum {
        const { assert!(AT + LEN <= N && LEN.is_multiple_of(2)) }
        let mut sum = Sum::ZERO;
        let mut at = AT;
        while at + 4 <= AT + LEN {
            sum = sum + Sum::of_memory_u32(load!(u32, self.0, at));
            at += 4;
        }
        if at < AT + LEN {
            sum = sum + Sum::of_memory_u16(load!(u16, self.0, at));
        }
        sum
    }

    #[inline(always)]
    fn memory16<const AT: usize>(self) -> u16 {
        const { assert!(AT + 2 <= N) }
        load!(u16, self.0, AT)
    }

    #[inline(always)]
    fn memory32<const AT: usize>(self) -> u32 {
        const { assert!(AT + 4 <= N) }
        load!(u32, self.0, AT)
    }
}

/// A packet in a buffer: from a capture, from an event, from a test.
#[derive(Clone, Copy, Debug)]
pub struct Captured<'a> {
    /// What there is of it.
    pub bytes: &'a [u8],
    /// Length of the whole packet in bytes.
    pub len: usize,
    /// See [`Packet::is_raw_ip`].
    pub is_raw_ip: bool,
    /// See [`Packet::is_gso`].
    pub is_gso: bool,
    /// See [`Packet::offload`].
    pub offload: Offload,
    /// See [`Packet::flow_hash`].
    pub flow_hash: u32,
    /// See [`Packet::arithmetic_proves_nat`].
    pub arithmetic_proves_nat: bool,
}

impl<'a> Captured<'a> {
    /// A whole Ethernet frame of which nothing else is known.
    pub const fn new(bytes: &'a [u8]) -> Self {
        Self {
            bytes,
            len: bytes.len(),
            is_raw_ip: false,
            is_gso: false,
            offload: Offload::Unknown,
            flow_hash: 0,
            arithmetic_proves_nat: true,
        }
    }
}

impl Packet for Captured<'_> {
    fn len(&self) -> usize {
        self.len
    }

    fn header<const N: usize>(&self, offset: usize) -> Result<Header<'_, N>, Cut> {
        self.bytes.get(offset..).and_then(<[u8]>::first_chunk).map(Header::new).ok_or(Cut)
    }

    fn sum(&self, offset: usize, len: usize) -> Option<Sum> {
        self.bytes.get(offset..)?.get(..len).map(Sum::of_bytes)
    }

    fn is_raw_ip(&self) -> bool {
        self.is_raw_ip
    }

    fn is_gso(&self) -> bool {
        self.is_gso
    }

    fn offload(&self) -> Offload {
        self.offload
    }

    fn flow_hash(&self) -> u32 {
        self.flow_hash
    }

    fn arithmetic_proves_nat(&self) -> bool {
        self.arithmetic_proves_nat
    }
}
