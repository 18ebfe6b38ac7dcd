//! The TC egress program for kernels with the ring buffer (5.8).
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
#[path = "kernel/current.rs"]
mod kernel;
mod limit;
mod maps;
mod object;
mod opaque;
mod quick;
mod skb;
mod thorough;
