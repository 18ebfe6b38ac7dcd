//! Formatting, clippy for both sides and the fuzz targets, cargo-deny, and Miri.

use std::{env::consts::ARCH, process::Command};

use anyhow::Result;

use crate::{
    fuzz,
    process::{self, command, workspace},
    setup::{self, Goal},
    toolchain::{self, Compiler},
};

/// The crate that is compiled for BPF only.
const BPF_PACKAGE: &str = "vxcsum-ebpf";

/// Runs all checks, also after one has spoken up, and tells whether none did.
pub(crate) fn run() -> Result<bool> {
    setup::run(&[Goal::Build, Goal::Lint])?;
    let mut checks = vec![
        ("formatting", formatting()),
        ("clippy", clippy()),
        ("clippy of the BPF program", bpf_clippy()),
        ("formatting of the fuzz targets", fuzz_formatting()),
        ("clippy of the fuzz targets", fuzz_clippy()),
        ("licences, bans and sources of dependencies", deny(&["licenses", "bans", "sources"])),
    ];
    let has_miri = Compiler::of_toolchain(toolchain::NIGHTLY).is_some_and(|it| it.miri);
    if has_miri {
        checks.push(("undefined behaviour", miri()));
    }
    let advisories = advisories_can_be_fetched()?;
    if advisories {
        checks.push(("advisories on dependencies", deny(&["advisories"])));
    }
    let mut failed = Vec::new();
    for (name, mut check) in checks {
        eprintln!("lint: {name}");
        if !process::succeeds(&mut check)? {
            failed.push(name);
        }
    }
    if !has_miri {
        eprintln!(
            "lint: NOT checked: undefined behaviour, since there is no Miri for {}",
            toolchain::NIGHTLY
        );
    }
    if !advisories {
        eprintln!(
            "lint: NOT checked: advisories on dependencies, since the advisory database cannot be \
             fetched (`cargo deny fetch db` tells why)"
        );
    }
    if failed.is_empty() {
        eprintln!("lint: nothing found");
    } else {
        eprintln!("lint: see above for {}", failed.join(", "));
    }
    Ok(failed.is_empty())
}

fn formatting() -> Command {
    let mut cargo = command("cargo");
    cargo.args(["fmt", "--all", "--check"]);
    cargo
}

fn clippy() -> Command {
    let mut cargo = command("cargo");
    cargo
        .args(["clippy", "--workspace", "--exclude", BPF_PACKAGE, "--all-targets"])
        .args(["--", "--deny=warnings"]);
    cargo
}

/// The fuzz targets are a workspace of their own.
fn fuzz_formatting() -> Command {
    let mut cargo = command("cargo");
    cargo.args(["fmt", "--all", "--check"]).current_dir(workspace().join(fuzz::FOLDER));
    cargo
}

/// With what only they may see of the rest.
fn fuzz_clippy() -> Command {
    let mut cargo = command("cargo");
    cargo
        .args(["clippy", "--all-targets", "--target-dir=../target/fuzz-clippy"])
        .args(["--", "--deny=warnings"])
        .env("RUSTFLAGS", "--cfg=fuzzing")
        .current_dir(workspace().join(fuzz::FOLDER));
    cargo
}

/// Clippy with the compiler, the target and the configuration that the build script uses.
fn bpf_clippy() -> Command {
    let nightly = Compiler::of_toolchain(toolchain::NIGHTLY);
    let nightly_is_used = nightly.is_some_and(|compiler| compiler.library_sources);
    let toolchain = if nightly_is_used { toolchain::NIGHTLY } else { toolchain::LINKED };
    let target = if cfg!(target_endian = "big") { "bpfeb" } else { "bpfel" };
    let mut cargo = command("rustup");
    cargo
        .args(["run", toolchain, "cargo", "clippy", "--package", BPF_PACKAGE])
        .args(["-Z", "build-std=core", "--target", &format!("{target}-unknown-none")])
        // Its own folder, so that it neither waits for the main build nor makes it start over.
        .args(["--target-dir", "target/bpf-clippy"])
        .args(["--", "--deny=warnings"])
        .env("CARGO_ENCODED_RUSTFLAGS", format!("--cfg=bpf_target_arch=\"{}\"", bpf_arch(ARCH)));
    if !nightly_is_used {
        // The distribution's compiler is a stable one.
        cargo.env("RUSTC_BOOTSTRAP", "1");
    }
    cargo
}

/// Miri over the crate that takes bytes apart. What is unsafe in the others asks the kernel for
/// something, and Miri has no kernel.
fn miri() -> Command {
    let mut cargo = command("rustup");
    cargo
        .args(["run", toolchain::NIGHTLY, "cargo", "miri", "test", "--package=vxcsum-common"])
        .arg("--target-dir=target/miri")
        // Millions of look-ups, which take Miri an hour.
        .args(["--", "--skip=every_port_is_found_and_no_other"])
        .arg("--skip=only_what_is_given_is_watched");
    cargo
}

/// The architecture's name as aya's bindings know it.
fn bpf_arch(arch: &str) -> &str {
    if arch.starts_with("riscv64") { "riscv64" } else { arch }
}

fn deny(checks: &[&str]) -> Command {
    let mut cargo = command("cargo");
    cargo.args(["deny", "--log-level=warn", "check", "--hide-inclusion-graph"]).args(checks);
    cargo
}

/// The list of advisories comes over the network; without it the rest is still worth checking.
fn advisories_can_be_fetched() -> Result<bool> {
    let output = process::capture(command("cargo").args(["deny", "fetch", "db"]))?;
    Ok(output.status.success())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn architectures_have_the_names_of_ayas_bindings() {
        assert_eq!(bpf_arch("x86_64"), "x86_64");
        assert_eq!(bpf_arch("aarch64"), "aarch64");
        assert_eq!(bpf_arch("riscv64gc"), "riscv64");
    }
}
