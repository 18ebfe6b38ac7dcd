//! `vxcsum check`: captures in any format, compressed or not, damaged or not.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vxcsum_fuzz::capture::check(data));
