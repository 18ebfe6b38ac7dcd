//! TC egress.
#![no_std]
#![no_main]
#![allow(missing_docs)]
use aya_ebpf::{macros::classifier, programs::TcContext};
#[classifier]
pub fn vxcsum_egress(_ctx: TcContext) -> i32 { -1 }
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! { loop {} }
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
