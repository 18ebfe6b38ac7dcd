//! The parts of the `vxcsum` command, for its binary and for the workspace's tests.

pub mod attach;
mod btf;
pub mod changes;
pub mod cli;
pub mod client;
pub mod config;
pub mod dns;
pub mod event;
pub mod kernel;
pub mod links;
pub mod logging;
pub mod metrics;
pub mod names;
pub mod plan;
pub mod privileges;
pub mod program;
pub mod protocol;
pub mod run;
pub mod server;
pub mod skb_layout;
pub mod stalls;
pub mod summary;
pub mod supervisor;
pub mod transport;
