//! Fuzzing: what comes from outside through cargo-fuzz, and the BPF programs against the common crate
//! and an oracle.

mod corpus;

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};

use crate::{
    build, process, root,
    setup::{self, Goal},
    test,
    toolchain::{self, Compiler},
};

/// The folder of cargo-fuzz's workspace.
pub(crate) const FOLDER: &str = "fuzz";
/// For one input, in seconds: whatever takes longer hangs.
const TIMEOUT: u32 = 20;

/// What is fuzzed, and for how long.
#[derive(Args)]
pub(crate) struct Options {
    /// Only this; all but `differential` otherwise
    #[arg(value_enum)]
    target: Option<Target>,
    /// For each target, in seconds
    #[arg(long, value_name = "N", default_value_t = 60)]
    seconds: u32,
    /// How many packets `differential` throws
    #[arg(long, value_name = "N", default_value_t = 10_000_000)]
    packets: u64,
    /// What the packets of `differential` are made from
    #[arg(long, value_name = "S", default_value_t = 1)]
    seed: u64,
    /// Only the packet of this number, of `differential`
    #[arg(long, value_name = "N")]
    only: Option<u64>,
}

/// A way in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Target {
    /// Parser and verdict of the common crate, against an oracle
    Verdict,
    /// Captures that `vxcsum check` reads
    Capture,
    /// The configuration file
    Config,
    /// What clients say to the daemon
    Protocol,
    /// What the daemon says to its clients
    Client,
    /// Records from the buffers of the BPF programs
    Event,
    /// What nft, iptables and the kernel say of rules
    Rules,
    /// DNS queries in lost packets
    Dns,
    /// The BPF programs in the kernel, the common crate and an oracle, over the same packets
    Differential,
}

/// Fuzzes; true if nothing was found.
pub(crate) fn run(options: &Options) -> Result<bool> {
    if options.target == Some(Target::Differential) {
        return differential(options);
    }
    setup::run(&[Goal::Build, Goal::Fuzz])?;
    let seeds = build::target_folder()?.join("fuzz-seeds");
    corpus::write(&seeds)?;
    let wanted = |target: &&Target| match options.target {
        Some(only) => **target == only,
        None => **target != Target::Differential,
    };
    let targets: Vec<_> = Target::value_variants().iter().filter(wanted).copied().collect();
    // On its own, so that what does not compile is told from what is found.
    process::run(&mut cargo_fuzz("build"))?;
    let mut found = Vec::new();
    for target in targets {
        println!("\n{} for {} s", target.name(), options.seconds);
        if !process::succeeds(&mut target.command(&seeds, options.seconds)?)? {
            found.push(target);
        }
    }
    for target in &found {
        println!("found in {}: {}", target.name(), target.latest_artifact()?);
    }
    if found.is_empty() {
        println!("nothing found");
    }
    Ok(found.is_empty())
}

impl Target {
    fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    fn folder(self, of: &str) -> PathBuf {
        process::workspace().join(FOLDER).join(of).join(self.name())
    }

    /// What is learned on the way goes into the first of the folders.
    fn command(self, generated: &Path, seconds: u32) -> Result<Command> {
        let corpus = self.folder("corpus");
        fs::create_dir_all(&corpus).with_context(|| corpus.display().to_string())?;
        let mut cargo = cargo_fuzz("run");
        cargo.arg(self.name()).arg(corpus);
        let seeds = [self.folder("seeds"), generated.join(self.name())];
        cargo.args(seeds.iter().filter(|folder| folder.is_dir()));
        cargo.args([
            "--",
            &format!("-max_total_time={seconds}"),
            &format!("-timeout={TIMEOUT}"),
            "-print_final_stats=1",
        ]);
        Ok(cargo)
    }

    /// The input that was written last, and what to do with it.
    fn latest_artifact(self) -> Result<String> {
        let folder = self.folder("artifacts");
        let mut latest = None;
        for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            let entry = entry?;
            latest = latest.max(Some((entry.metadata()?.modified()?, entry.path())));
        }
        let (_, path) = latest.with_context(|| format!("nothing in {}", folder.display()))?;
        let (path, name) = (path.display(), self.name());
        Ok(format!("{path}; again: cargo +{} fuzz run {name} {path}", toolchain::NIGHTLY))
    }
}

/// Sanitizers and coverage are not for stable compilers. Where there is no nightly, the stable one is
/// told to forget that it is one.
fn cargo_fuzz(verb: &str) -> Command {
    if Compiler::of_toolchain(toolchain::NIGHTLY).is_some() {
        let mut cargo = process::command("rustup");
        cargo.args(["run", toolchain::NIGHTLY, "cargo", "fuzz", verb]);
        return cargo;
    }
    eprintln!(
        "fuzz: there is no {} here, so the stable compiler is used with RUSTC_BOOTSTRAP=1",
        toolchain::NIGHTLY
    );
    let mut cargo = process::command("cargo");
    cargo.args(["fuzz", verb]).env("RUSTC_BOOTSTRAP", "1");
    cargo
}

/// Runs the test of that name with optimisation, and with as many packets as are asked for.
fn differential(options: &Options) -> Result<bool> {
    root::prefix("running BPF programs")?;
    setup::run(&[Goal::Build])?;
    let mut cargo = process::command("cargo");
    cargo.args(["test", "--release", "--package=vxcsum-tests", "--test=differential"]);
    process::run(cargo.arg("--no-run"))?;
    let mut cargo = process::command("cargo");
    cargo.args(["test", "--release", "--package=vxcsum-tests", "--test=differential"]);
    let mut variables = vec![
        ("VXCSUM_FUZZ_PACKETS", OsString::from(options.packets.to_string())),
        ("VXCSUM_FUZZ_SEED", options.seed.to_string().into()),
    ];
    variables.extend(options.only.map(|only| ("VXCSUM_FUZZ_ONLY", only.to_string().into())));
    if let Some(runner) = test::runner(&variables)? {
        cargo.arg("--config").arg(runner);
    }
    cargo.envs(variables).args(["--", "--nocapture"]);
    process::succeeds(&mut cargo)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_is_one_of_cargo_fuzz_and_the_other_way_round() {
        let manifest = fs::read_to_string(process::workspace().join(FOLDER).join("Cargo.toml"));
        let mut known: Vec<_> = manifest
            .unwrap()
            .lines()
            .filter_map(|line| line.strip_prefix("path = \"fuzz_targets/")?.strip_suffix(".rs\""))
            .map(str::to_owned)
            .collect();
        let all = Target::value_variants().iter();
        let mut ours: Vec<_> =
            all.filter(|target| **target != Target::Differential).map(|it| it.name()).collect();
        known.sort();
        ours.sort();
        assert_eq!(known, ours);
    }
}
