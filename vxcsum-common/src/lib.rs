//! What the BPF program and user space must agree on: packet parsing, checksum arithmetic, the
//! verdict on a VXLAN packet's outer UDP checksum, and the layouts that cross the boundary.
//!
//! The crate knows nothing of BPF or of an operating system. It reaches a packet only through
//! [`Packet`], so one verdict is compiled into the BPF program, into the command line and into
//! the tests. Everything is inlined into the function that uses it: a BPF program cannot hand a
//! packet pointer to a function that the verifier walks on its own.
#![no_std]
#![allow(
    clippy::inline_always,
    reason = "a packet pointer cannot be handed to a global BPF function"
)]

pub mod checksum;
pub mod device;
pub mod fix;
pub mod inner;
pub mod layout;
pub mod limit;
pub mod outer;
pub mod packet;
pub mod receive;
pub mod verdict;

pub use checksum::Sum;
pub use device::{Device, Policy};
pub use packet::{Captured, Cut, Offload, Packet};
pub use verdict::{Examined, Finding, Proof, Verdict, Watch, examine};
