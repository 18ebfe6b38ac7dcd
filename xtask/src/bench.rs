//! Measures vxcsum against its limits and its peers.

use std::{
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context, Result, bail};

use crate::{
    build, process, root,
    setup::{self, Goal},
};

const PACKAGE: &str = "vxcsum-bench";
/// The variable that tells the benches where the release binary is.
const BINARY_VARIABLE: &str = "VXCSUM_BIN";

/// What to measure, and how.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// What to measure: cost, traffic, storm, growth, check, start; everything unless given
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// How often each number is taken; as each bench needs it unless given
    #[arg(long, value_name = "N")]
    repetitions: Option<u16>,
    /// Only to see that it runs: the numbers say little
    #[arg(long)]
    quick: bool,
    /// Where to keep numbers and plots; target/bench unless given
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Write them into docs/ and the README as well
    #[arg(long, conflicts_with = "quick")]
    docs: bool,
}

/// Sets up, builds and measures; true if all numbers are reached that there are to reach.
pub(crate) fn run(options: &Options) -> Result<bool> {
    // Before anything is built, so that nobody waits for minutes to hear of it.
    root::prefix("measuring in network namespaces")?;
    setup::run(&[Goal::Build, Goal::Bench])?;
    let binary = build::release()?;
    process::run(process::command("cargo").args(["build", "--release", "--package", PACKAGE]))?;
    let bench = binary.with_file_name(PACKAGE);
    let out = match &options.out {
        Some(out) => std::path::absolute(out).with_context(|| out.display().to_string())?,
        None => build::target_folder()?.join("bench"),
    };
    measure_and_show(options, &binary, &bench, &out)
}

/// Measuring is for root, keeping what came out for whoever has called.
fn measure_and_show(options: &Options, binary: &Path, bench: &Path, out: &Path) -> Result<bool> {
    let (binary, bench) = (binary.to_string_lossy(), bench.to_string_lossy());
    let path = process::SEARCH_PATH.to_string_lossy();
    let variables = [(BINARY_VARIABLE, &*binary), ("PATH", &*path)];
    let mut measure = root::command("measuring in network namespaces", &variables, &bench)?;
    measure.args(["measure", "--commit", &commit()]).args(&options.names);
    if let Some(repetitions) = options.repetitions {
        measure.args(["--repetitions", &repetitions.to_string()]);
    }
    if options.quick {
        measure.arg("--quick");
    }
    let shown = process::shown(&measure);
    let mut measuring =
        measure.stdout(Stdio::piped()).spawn().with_context(|| format!("cannot run `{shown}`"))?;
    let reports = measuring.stdout.take().context("no pipe to the benches")?;

    let mut show = process::command(&bench);
    show.arg("show").arg("--out").arg(out).stdin(reports);
    if options.docs {
        show.arg("--docs");
    }
    let status =
        show.status().with_context(|| format!("cannot run `{}`", process::shown(&show)))?;
    if !measuring.wait()?.success() {
        bail!("`{shown}` failed, see its messages above");
    }
    match status.code() {
        Some(0) => Ok(true),
        Some(1) => Ok(false),
        _ => bail!("`{}` failed, see its messages above", process::shown(&show)),
    }
}

/// What is checked out, and whether something was changed since.
fn commit() -> String {
    let mut git = process::command("git");
    process::answer(git.args(["describe", "--always", "--dirty", "--abbrev=10"]))
        .unwrap_or_else(|| "unknown commit".to_owned())
}
