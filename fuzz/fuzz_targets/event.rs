//! What comes from the buffers that the BPF programs fill, up to what is said of it.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vxcsum_fuzz::event::check(data));
