//! The parser and the verdict: any bytes, with any knowledge of their sender.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vxcsum_fuzz::verdict::check(data));
