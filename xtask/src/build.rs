//! Builds the vxcsum binary with the BPF program inside it.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result};

use crate::{
    process,
    setup::{self, Goal},
};

/// The crate of the vxcsum binary.
const PACKAGE: &str = "vxcsum-userspace";
/// The binary's name.
const BINARY: &str = "vxcsum";

/// Sets up, builds, and says what came out.
pub(crate) fn run(debug: bool) -> Result<()> {
    setup::run(&[Goal::Build])?;
    let binary = if debug { build("debug", &[])? } else { release()? };
    let size = fs::metadata(&binary)
        .with_context(|| format!("cannot find what was built, {}", binary.display()))?
        .len();
    println!("{} ({} KiB)", binary.display(), size.div_ceil(1024));
    Ok(())
}

/// Builds the release binary and returns its absolute path.
pub(crate) fn release() -> Result<PathBuf> {
    build("release", &["--release"])
}

fn build(folder: &str, arguments: &[&str]) -> Result<PathBuf> {
    let mut cargo = process::command("cargo");
    process::run(cargo.args(["build", "--package", PACKAGE]).args(arguments))?;
    Ok(target_folder()?.join(folder).join(BINARY))
}

/// Where cargo leaves what it builds: `target`, unless the user has told it otherwise.
pub(crate) fn target_folder() -> Result<PathBuf> {
    let mut cargo = process::command("cargo");
    cargo.args(["metadata", "--format-version=1", "--no-deps"]);
    let output = process::capture(&mut cargo)?;
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("cannot read what `{}` says", process::shown(&cargo)))?;
    let folder = metadata["target_directory"].as_str();
    folder.map(PathBuf::from).context("cargo does not say where its target folder is")
}
