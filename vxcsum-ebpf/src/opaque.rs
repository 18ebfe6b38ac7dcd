//! Numbers of which the compiler knows nothing.
//!
//! LLVM leaves out a mask that cannot change a number, and tests another register than the one that
//! it goes on with. The verifier knows less than LLVM and needs both.

use core::arch::asm;

/// The same number, moved to where it is: without any instruction, two line records would share an
/// offset, which the kernel refuses (`check_btf_line` in kernel/bpf/verifier.c).
#[inline(always)]
pub(crate) fn opaque(number: usize) -> usize {
    let mut number = number;
    // SAFETY: changes nothing.
    unsafe { asm!("{0} = {0}", inout(reg) number, options(pure, nomem, nostack, preserves_flags)) };
    number
}

/// A length of which the caller knows that it is at least 1 and at most `MAX`, a power of two.
///
/// Verifiers before 6.8 learn nothing from a comparison with zero.
#[inline(always)]
pub(crate) fn between_1_and<const MAX: usize>(len: usize) -> usize {
    const { assert!(MAX.is_power_of_two()) }
    (opaque(len).wrapping_sub(1) & (MAX - 1)) + 1
}
