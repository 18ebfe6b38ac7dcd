//! The question of a DNS query.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vxcsum_fuzz::dns::check(data));
