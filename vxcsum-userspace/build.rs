//! Compiles the BPF program and leaves its object in `OUT_DIR`, from where it is embedded.
use std::process::Command;

use anyhow::Result;
use aya_build::{Package, Toolchain};

/// The toolchain that `cargo xtask setup` links where the distribution provides the BPF compiler.
const LINKED_TOOLCHAIN: &str = "vxcsum-bpf";

fn main() -> Result<()> {
    // SAFETY: a build script has one thread here; nothing else reads the environment. aya-build
    // turns each line of the nested cargo into a warning.
    unsafe { std::env::set_var("CARGO_TERM_QUIET", "true") };
    let toolchain = if toolchain_has_rust_src("nightly") {
        Toolchain::Nightly
    } else {
        // SAFETY: as above.
        unsafe { std::env::set_var("RUSTC_BOOTSTRAP", "1") };
        Toolchain::Custom(LINKED_TOOLCHAIN)
    };
    // aya-build asks for a rebuild when the package itself changes; what it depends on is ours to name.
    println!("cargo:rerun-if-changed=../vxcsum-common/src");
    println!("cargo:rerun-if-changed=../Cargo.lock");
    aya_build::build_ebpf(
        [Package { name: "vxcsum-ebpf", root_dir: "../vxcsum-ebpf", ..Package::default() }],
        toolchain,
    )
}

/// Building `core` for the BPF target needs the sources of the standard library.
fn toolchain_has_rust_src(toolchain: &str) -> bool {
    Command::new("rustup")
        .args(["run", toolchain, "rustc", "--print", "sysroot"])
        .output()
        .ok()
        .filter(|output| output.status.success())
        .and_then(|output| String::from_utf8(output.stdout).ok())
        .is_some_and(|sysroot| {
            std::path::Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library").is_dir()
        })
}
