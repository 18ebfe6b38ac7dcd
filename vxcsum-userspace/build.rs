//! Compiles the BPF programs and leaves their objects in `OUT_DIR`, from where they are embedded.
use std::path::Path;
use std::process::Command;
use std::{env, fs};

use anyhow::{Context as _, Result};
use aya_build::{Package, Toolchain};
use object::build::elf::{Builder, SectionData};

/// The toolchain that `cargo xtask setup` links where the distribution provides the BPF compiler.
const LINKED_TOOLCHAIN: &str = "vxcsum-bpf";

fn main() -> Result<()> {
    // SAFETY: a build script has one thread here; nothing else reads the environment. aya-build
    // turns each line of the nested cargo into a warning.
    unsafe { env::set_var("CARGO_TERM_QUIET", "true") };
    let toolchain = if toolchain_has_rust_src("nightly") {
        Toolchain::Nightly
    } else {
        // SAFETY: as above.
        unsafe { env::set_var("RUSTC_BOOTSTRAP", "1") };
        Toolchain::Custom(LINKED_TOOLCHAIN)
    };
    // aya-build asks for a rebuild when the package itself changes; what it depends on is ours to name.
    println!("cargo:rerun-if-changed=../vxcsum-common/src");
    println!("cargo:rerun-if-changed=../Cargo.lock");
    aya_build::build_ebpf(
        [Package { name: "vxcsum-ebpf", root_dir: "../vxcsum-ebpf", ..Package::default() }],
        toolchain,
    )?;
    let out = env::var_os("OUT_DIR").context("OUT_DIR is not set")?;
    remove_types(&Path::new(&out).join("vxcsum-ebpf-legacy"))
}

/// Takes BTF out of the object for old kernels, which know but a part of it, and debug information
/// with it. aya-build knows only one way to link.
fn remove_types(path: &Path) -> Result<()> {
    let object = fs::read(path).with_context(|| path.display().to_string())?;
    let mut builder = Builder::read(object.as_slice())?;
    for section in &mut builder.sections {
        let name = section.name.to_string();
        let name = name.strip_prefix(".rel").unwrap_or(&name);
        section.delete = [".BTF", ".debug_"].iter().any(|types| name.starts_with(types));
    }
    builder.delete_orphans();
    // LLVM keeps the names of sections among those of symbols; the builder wants them apart.
    let names = builder.sections.add();
    names.name = ".shstrtab".into();
    names.sh_type = object::elf::SHT_STRTAB;
    names.data = SectionData::SectionString;
    let mut stripped = Vec::new();
    builder.write(&mut stripped)?;
    fs::write(path, stripped).with_context(|| path.display().to_string())
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
            Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library").is_dir()
        })
}
