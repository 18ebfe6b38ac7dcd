//! The socket of the daemon: whatever a client says.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vxcsum_fuzz::protocol::check(data));
