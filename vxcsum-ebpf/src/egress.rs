//! The TC egress program: finds VXLAN packets with a broken outer UDP checksum, counts, reports
//! and may fix them.
//!
//! It never decides about a packet's way: every path returns `TC_ACT_UNSPEC`, so that the programs
//! after it run.
use aya_ebpf::bindings::{__sk_buff, TC_ACT_UNSPEC};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use vxcsum_common::Cut;

use crate::maps::Known;
use crate::skb::Skb;
use crate::{quick, thorough};

/// Runs for every packet that leaves through the interface.
#[classifier]
#[expect(clippy::needless_pass_by_value, reason = "the signature is aya's")]
fn vxcsum_egress(ctx: TcContext) -> i32 {
    examine(ctx.skb.skb);
    TC_ACT_UNSPEC
}

/// Examines and counts a packet. Without its maps, which always exist, it does nothing.
#[inline(always)]
fn examine(ctx: *mut __sk_buff) -> Option<()> {
    let known = Known::get()?;
    if let Err(Cut) = quick::examine(Skb::new(ctx, known), known) {
        thorough::examine(ctx);
    }
    Some(())
}
