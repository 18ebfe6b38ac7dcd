//! The compiler and the linker of the BPF program.
//!
//! Nothing that rustup calls stable compiles for BPF as it comes: the standard library's sources
//! are needed. They are a component of nightly, or a package of the distribution next to its own
//! compiler. The build script of vxcsum-userspace takes nightly where that has the sources, and
//! else the toolchain linked here; both must agree.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

use crate::process::{self, command};

/// rustup's name for the distribution's compiler once it is linked.
pub(crate) const LINKED: &str = "vxcsum-bpf";
/// rustup's own compiler that may have the sources of the standard library.
pub(crate) const NIGHTLY: &str = "nightly";
/// Where the distribution's compiler lives.
const DISTRIBUTION_PREFIX: &str = "/usr";
/// The oldest compiler that the workspace builds with.
const MINIMUM_RUST: (u32, u32) = (1, 95);
/// Where a compiler keeps the sources of the standard library, below its sysroot.
const LIBRARY_SOURCES: &str = "lib/rustlib/src/rust/library";

/// The version of bpf-linker that this was tried with.
pub(crate) const BPF_LINKER: &str = "0.13.0";
/// The LLVM versions that this bpf-linker can be built with.
const LINKER_LLVM: [u32; 3] = [21, 22, 23];

/// A compiler that rustup knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Compiler {
    /// Whether the sources of the standard library are there.
    pub(crate) library_sources: bool,
    /// The major version of the LLVM inside it.
    pub(crate) llvm: u32,
    /// Whether clippy is there.
    pub(crate) clippy: bool,
    /// Whether Miri is there.
    pub(crate) miri: bool,
}

impl Compiler {
    /// Looks at a toolchain by its name in rustup.
    pub(crate) fn of_toolchain(name: &str) -> Option<Self> {
        let ask = |program: &str, arguments: &[&str]| {
            process::answer(command("rustup").args(["run", name, program]).args(arguments))
        };
        let sysroot = ask("rustc", &["--print", "sysroot"])?;
        Some(Self {
            library_sources: Path::new(&sysroot).join(LIBRARY_SOURCES).is_dir(),
            llvm: llvm_of(&ask("rustc", &["-vV"])?)?,
            clippy: ask("cargo-clippy", &["--version"]).is_some(),
            miri: ask("cargo-miri", &["miri", "--version"]).is_some(),
        })
    }
}

/// Whether the distribution's compiler and sources are installed and new enough.
pub(crate) fn distribution_is_fit() -> bool {
    let prefix = Path::new(DISTRIBUTION_PREFIX);
    let Some(version) =
        process::answer(command(&prefix.join("bin/rustc").to_string_lossy()).arg("-vV"))
    else {
        return false;
    };
    let new_enough = field(&version, "release").and_then(major_and_minor) >= Some(MINIMUM_RUST);
    new_enough && prefix.join(LIBRARY_SOURCES).is_dir()
}

fn llvm_of(rustc_version: &str) -> Option<u32> {
    major(field(rustc_version, "LLVM version")?)
}

fn field<'a>(rustc_version: &'a str, name: &str) -> Option<&'a str> {
    rustc_version.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
}

fn major(version: &str) -> Option<u32> {
    version.split('.').next()?.parse().ok()
}

fn major_and_minor(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// An LLVM that bpf-linker can be built with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Llvm {
    /// Its major version.
    pub(crate) major: u32,
    /// The folder that holds `lib`.
    pub(crate) prefix: PathBuf,
}

/// Those that are installed with what linking to them needs.
pub(crate) fn installed_llvm() -> Vec<Llvm> {
    LINKER_LLVM
        .iter()
        .map(|major| format!("llvm-config-{major}"))
        .chain(["llvm-config".to_owned()])
        .filter_map(|llvm_config| {
            let ask = |option| process::answer(command(&llvm_config).arg(option));
            let major = major(&ask("--version")?)?;
            let prefix = PathBuf::from(ask("--prefix")?);
            let linkable =
                ["lib64", "lib"].iter().any(|lib| prefix.join(lib).join("libLLVM.so").exists());
            (LINKER_LLVM.contains(&major) && linkable).then_some(Llvm { major, prefix })
        })
        .collect()
}

/// The right version of bpf-linker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Linker {
    /// The major version of the LLVM it was built with, where cargo has a record of that.
    pub(crate) llvm: Option<u32>,
}

impl Linker {
    /// The one that is installed.
    pub(crate) fn installed() -> Option<Self> {
        let version = process::answer(command("bpf-linker").arg("--version"))?;
        if version.split_whitespace().nth(1) != Some(BPF_LINKER) {
            return None;
        }
        let record = process::cargo_home().map(|home| home.join(".crates2.json"));
        let record = record.and_then(|path| fs::read_to_string(path).ok());
        Some(Self { llvm: record.and_then(|record| recorded_llvm(&record)) })
    }

    /// Whether it reads what a compiler with this LLVM writes: LLVM reads older bitcode, never newer.
    pub(crate) fn reads(&self, compiler_llvm: u32) -> bool {
        self.llvm.is_none_or(|llvm| llvm >= compiler_llvm)
    }
}

/// The feature of bpf-linker that cargo has recorded when it installed it.
fn recorded_llvm(record: &str) -> Option<u32> {
    let record: serde_json::Value = serde_json::from_str(record).ok()?;
    let installed = record.get("installs")?.as_object()?;
    let ours = format!("bpf-linker {BPF_LINKER} ");
    let (_, linker) = installed.iter().find(|(package, _)| package.starts_with(&ours))?;
    linker
        .get("features")?
        .as_array()?
        .iter()
        .find_map(|feature| feature.as_str()?.strip_prefix("llvm-")?.parse().ok())
}

/// Asks rustup for nightly's sources of the standard library.
pub(crate) fn add_library_sources() -> Result<()> {
    add_component("rust-src")
}

/// Asks rustup for nightly's clippy.
pub(crate) fn add_clippy() -> Result<()> {
    add_component("clippy")
        .with_context(|| format!("rustup cannot add clippy to {NIGHTLY}, to lint the BPF program"))
}

/// Asks rustup for nightly's Miri.
pub(crate) fn add_miri() -> Result<()> {
    add_component("miri")
}

fn add_component(component: &str) -> Result<()> {
    let mut rustup = command("rustup");
    rustup.args(["component", "add", component, "--toolchain", NIGHTLY]);
    // A stack trace of rustup is no use to anybody here.
    let output = process::capture(rustup.env("RUST_BACKTRACE", "0"))?;
    if !output.status.success() {
        bail!(main_message(&String::from_utf8_lossy(&output.stderr)));
    }
    Ok(())
}

/// What rustup says is wrong, and the root of it; in between it tells the whole way down.
fn main_message(stderr: &str) -> String {
    let message = stderr.lines().find_map(|line| line.strip_prefix("error: "));
    let message = message.or_else(|| stderr.lines().next_back()).unwrap_or("no reason given");
    match (message.split_once(": "), message.rsplit_once(": ")) {
        (Some((first, _)), Some((_, last))) => format!("{first}: {last}"),
        _ => message.to_owned(),
    }
}

/// Makes the distribution's compiler known to rustup.
pub(crate) fn link_distribution() -> Result<()> {
    let mut rustup = command("rustup");
    process::run(rustup.args(["toolchain", "link", LINKED, DISTRIBUTION_PREFIX]))
}

/// Compiles and installs bpf-linker.
pub(crate) fn install_bpf_linker(llvm: &Llvm) -> Result<()> {
    let mut cargo = command("cargo");
    cargo
        // Another version's binary may be in the way, and need not be cargo's own.
        .args(["install", "--locked", "--force", "--no-default-features"])
        .arg(format!("--features=llvm-{}", llvm.major))
        .arg(format!("bpf-linker@{BPF_LINKER}"))
        .env("LLVM_PREFIX", &llvm.prefix);
    process::run(&mut cargo)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUSTC: &str = "rustc 1.96.0 (ac68faa20 2026-05-25) (built from a source tarball)\n\
        binary: rustc\nhost: x86_64-unknown-linux-gnu\nrelease: 1.96.0\nLLVM version: 22.1.8";

    #[test]
    fn reads_what_rustc_says_of_itself() {
        assert_eq!(llvm_of(RUSTC), Some(22));
        assert_eq!(field(RUSTC, "release").and_then(major_and_minor), Some((1, 96)));
        assert_eq!(major_and_minor("1.97.0-nightly"), Some((1, 97)));
        assert_eq!(llvm_of("rustc 1.96.0\nrelease: 1.96.0"), None);
        assert_eq!(llvm_of(""), None);
    }

    #[test]
    fn an_unknown_version_is_not_new_enough() {
        assert!(field("", "release").and_then(major_and_minor) < Some(MINIMUM_RUST));
        assert!(major_and_minor("1.63.0") < Some(MINIMUM_RUST));
        assert!(major_and_minor("1.95.0") >= Some(MINIMUM_RUST));
    }

    #[test]
    fn a_toolchain_that_is_not_there_is_none() {
        assert_eq!(Compiler::of_toolchain("vxcsum-no-such-toolchain"), None);
    }

    #[test]
    fn the_linkers_llvm_is_in_cargos_record() {
        let record = |features| {
            format!(r#"{{"installs":{{"bpf-linker {BPF_LINKER} (registry+x)":{features}}}}}"#)
        };
        assert_eq!(recorded_llvm(&record(r#"{"features":["llvm-22"]}"#)), Some(22));
        assert_eq!(recorded_llvm(&record(r#"{"features":[]}"#)), None);
        assert_eq!(recorded_llvm(r#"{"installs":{}}"#), None);
        assert_eq!(recorded_llvm("not JSON"), None);
    }

    #[test]
    fn a_linker_reads_its_own_and_older_bitcode() {
        assert!(Linker { llvm: Some(22) }.reads(22));
        assert!(Linker { llvm: Some(22) }.reads(21));
        assert!(!Linker { llvm: Some(22) }.reads(23));
        assert!(Linker { llvm: None }.reads(23));
    }

    #[test]
    fn one_line_of_what_rustup_says_is_kept() {
        let stderr = "info: downloading component rust-src\n\
            error: component download failed for rust-src: could not download file from \
            'https://host/file' to '/file': client error (Connect): connection refused\n";
        assert_eq!(
            main_message(stderr),
            "component download failed for rust-src: connection refused"
        );
        assert_eq!(main_message("out of luck"), "out of luck");
        assert_eq!(main_message(""), "no reason given");
    }
}
