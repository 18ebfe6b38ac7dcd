//! The TC egress program for older kernels, from 4.19 on: the same modules, and another `kernel`.
//!
//! What 4.19 does not have must not be in the object: no global data, no BTF beyond types, no ring
//! buffer, no loop, no more than 4096 instructions (`tests/tests/legacy_object.rs`).
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]
#![allow(
    clippy::inline_always,
    reason = "a packet pointer cannot be handed to a global BPF function"
)]

mod broken;
mod count;
mod egress;
mod follow;
#[path = "kernel/legacy.rs"]
mod kernel;
mod limit;
mod maps;
mod object;
mod opaque;
mod quick;
mod skb;
mod thorough;
