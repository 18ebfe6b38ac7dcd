//! The Internet checksum (RFC 1071) and its incremental forms (RFC 1624).

use core::ops::Add;

/// A ones' complement sum of 16-bit words, not yet folded.
///
/// Words are added as they lie in memory: the sum does not depend on byte order until it is
/// folded (RFC 1071 §2(B)), so nothing is swapped on the way. Exact for fewer than 2^32 words.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum(u64);

impl Sum {
    /// The sum of no words.
    pub const ZERO: Self = Self(0);

    /// One 16-bit word, given in host byte order.
    #[inline(always)]
    pub const fn of_u16(host_order: u16) -> Self {
        Self(host_order.to_be() as u64)
    }

    /// Two 16-bit words as they lie in memory.
    #[inline(always)]
    pub const fn of_memory_u32(memory_order: u32) -> Self {
        Self(memory_order as u64)
    }

    /// One 16-bit word as it lies in memory.
    #[inline(always)]
    pub const fn of_memory_u16(memory_order: u16) -> Self {
        Self(memory_order as u64)
    }

    /// The words of `bytes`, which start at an even offset of what is summed; an odd last byte is
    /// padded with zero (RFC 1071 §1).
    pub fn of_bytes(bytes: &[u8]) -> Self {
        // Four words at a time, carries kept beside: an addition with carry for each 8 bytes. 2^16 is
        // 1 in ones' complement, so parts of 32 bits may be added up as they are.
        let (quads, rest) = bytes.as_chunks::<8>();
        let sum =
            quads.iter().fold(0_u128, |sum, &quad| sum + u128::from(u64::from_ne_bytes(quad)));
        let parts = [sum, sum >> 32, sum >> 64, sum >> 96];
        let sum = parts
            .into_iter()
            .fold(Self::ZERO, |sum, part| sum + Self::of_memory_u32((part & 0xffff_ffff) as u32));
        let (words, last) = rest.as_chunks::<2>();
        let sum = words
            .iter()
            .fold(sum, |sum, &word| sum + Self::of_memory_u16(u16::from_ne_bytes(word)));
        last.first().map_or(sum, |&last| sum + Self::of_memory_u16(u16::from_ne_bytes([last, 0])))
    }

    /// Takes `other` away.
    #[inline(always)]
    #[must_use]
    pub const fn minus(self, other: Self) -> Self {
        // The negative of a ones' complement number is its complement.
        Self(self.0.wrapping_add((!other.fold_memory()) as u64))
    }

    /// The sum folded to 16 bits, in host byte order.
    #[inline(always)]
    pub const fn folded(self) -> u16 {
        u16::from_be(self.fold_memory())
    }

    /// The value for a UDP checksum field, in host byte order: the complement, with 0 sent as
    /// 0xffff because 0 means "no checksum" (RFC 768).
    #[inline(always)]
    pub const fn checksum(self) -> u16 {
        match !self.folded() {
            0 => 0xffff,
            checksum => checksum,
        }
    }

    /// Whether the sum is a ones' complement zero, of which there are two.
    #[inline(always)]
    pub const fn is_zero(self) -> bool {
        // 2^16 is 1 modulo 0xffff, so folding changes nothing of the remainder. The compiler makes a
        // multiplication of it, which is faster than folding.
        self.0.is_multiple_of(0xffff)
    }

    /// Whether it folds to `word` (host byte order), without folding it. Not for [`Sum::ZERO`].
    #[inline(always)]
    pub const fn folds_to(self, word: u16) -> bool {
        // A sum of any words but zeros folds to what is left modulo 0xffff, and to 0xffff for 0.
        word != 0 && Self(self.0.wrapping_add((!word.to_be()) as u64)).is_zero()
    }

    #[inline(always)]
    const fn fold_memory(self) -> u16 {
        // 64 bits to 33, 18, 17 and 16: each step adds the carries back in (RFC 1071 §2(A)).
        let sum = (self.0 >> 32) + (self.0 & 0xffff_ffff);
        let sum = (sum >> 16) + (sum & 0xffff);
        let sum = (sum >> 16) + (sum & 0xffff);
        let sum = (sum >> 16) + (sum & 0xffff);
        sum as u16
    }
}

impl Add for Sum {
    type Output = Self;

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(self.0.wrapping_add(other.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rfc_1071_section_3_example() {
        let sum = Sum::of_bytes(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]);
        assert_eq!(sum.folded(), 0xddf2);
    }

    #[test]
    fn odd_last_byte_is_the_high_half_of_its_word() {
        assert_eq!(Sum::of_bytes(&[0x12, 0x34, 0x56]).folded(), 0x1234 + 0x5600);
    }

    #[test]
    fn word_sizes_agree() {
        let bytes = [0xde, 0xad, 0xbe, 0xef];
        assert_eq!(
            Sum::of_memory_u32(u32::from_ne_bytes(bytes)).folded(),
            Sum::of_bytes(&bytes).folded()
        );
    }

    #[test]
    fn length_does_not_matter() {
        let bytes: [u8; 67] = core::array::from_fn(|at| (at as u8).wrapping_mul(0xb5) | 0x81);
        for len in 0..bytes.len() {
            let words = bytes[..len].chunks(2).map(|word| {
                let low = word.get(1).copied().unwrap_or_default();
                Sum::of_u16(u16::from_be_bytes([word[0], low]))
            });
            let one_by_one = words.fold(Sum::ZERO, |sum, word| sum + word);
            assert_eq!(Sum::of_bytes(&bytes[..len]).folded(), one_by_one.folded(), "{len} bytes");
        }
    }

    #[test]
    fn minus_undoes_add() {
        let sum = Sum::of_u16(0x1234) + Sum::of_u16(0xfedc);
        assert_eq!(sum.minus(Sum::of_u16(0xfedc)).folded(), 0x1234);
        assert!(sum.minus(sum).is_zero());
    }

    #[test]
    fn folding_need_not_be_done() {
        for sum in [1, 0xfffe, 0xffff, 0x1_0000, 0x1_fffe, 0xffff_0001, u64::from(u32::MAX) * 40] {
            let sum = Sum(sum);
            for word in 0..=u16::MAX {
                assert_eq!(sum.folds_to(word), sum.folded() == word, "{sum:?} {word}");
            }
            assert_eq!(sum.is_zero(), matches!(sum.folded(), 0 | 0xffff), "{sum:?}");
        }
    }

    #[test]
    fn zero_is_sent_as_all_ones() {
        assert_eq!(Sum::of_u16(0xffff).checksum(), 0xffff);
        assert_eq!(Sum::of_u16(0xfffe).checksum(), 0x0001);
    }
}
