//! What `tail` and `status` read: lines of a daemon, which may be of another version.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vxcsum_fuzz::client::check(data));
