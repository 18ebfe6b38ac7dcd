//! What the end-to-end tests and `cargo xtask demo` are made of: network namespaces that hold the
//! real kernel bug, traffic through them, and ways to see what happened that share no code with
//! vxcsum itself.

pub mod capture;
pub mod cases;
pub mod check;
pub mod client;
pub mod conntrack;
pub mod counters;
pub mod daemon;
pub mod evidence;
pub mod folder;
pub mod foreign;
pub mod held;
pub mod kernel;
pub mod lab;
pub mod mutants;
pub mod netns;
pub mod oracle;
pub mod packets;
pub mod records;
pub mod scene;
pub mod second_opinion;
pub mod segment;
pub mod storm;
pub mod traffic;
pub mod wait;
pub mod workload;

mod packet;
mod sh;
mod vlan_tag;
