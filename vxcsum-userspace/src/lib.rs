//! The parts of the `vxcsum` command, for its binary and for the workspace's tests.

pub mod annotate;
pub mod attach;
mod btf;
pub mod cause;
pub mod changes;
pub mod cli;
pub mod client;
pub mod config;
pub mod doctor;
pub mod event;
pub mod links;
pub mod logging;
pub mod metrics;
pub mod modules;
pub mod names;
pub mod netfilter;
pub mod plan;
pub mod privileges;
pub mod program;
pub mod protocol;
pub mod run;
pub mod server;
pub mod skb_layout;
pub mod summary;
pub mod supervisor;
