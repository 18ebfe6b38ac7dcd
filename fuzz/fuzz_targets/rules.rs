//! What nft, iptables-save and the kernel say of rules, and the way of packets through them.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| vxcsum_fuzz::rules::check(data));
