//! Measures vxcsum against its limits and its peers, for `cargo xtask bench`.
//!
//! Measuring needs root, and writing must not be done by it: `vxcsum-bench measure | vxcsum-bench
//! show`, with one report a line between them.

#![expect(clippy::cast_precision_loss, reason = "what is counted here stays far below 2^52")]

mod benches;
mod check;
mod clients;
mod cost;
mod docs;
mod effort;
mod growth;
mod machine;
mod plot;
mod reference;
mod report;
mod start;
mod storm;
mod table;
mod tail;
mod test_run;
mod traffic;
mod usage;
mod vxcsum;

use std::io::{self, BufRead as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};
use vxcsum_tests::netns;

use crate::benches::{BENCHES, Bench};
use crate::report::Report;

/// A number was not reached.
const MISSED: u8 = 1;
/// Something stands in the way of running at all.
const CANNOT_RUN: u8 = 2;

/// Measures vxcsum against its limits and its peers.
#[derive(Parser)]
#[command(name = "vxcsum-bench")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Takes numbers and writes them to standard output, a JSON object for each bench; as root
    Measure {
        /// What to measure; everything unless given
        names: Vec<String>,
        /// How often each number is taken; as each bench needs it unless given
        #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
        repetitions: Option<u16>,
        /// Only to see that it runs
        #[arg(long)]
        quick: bool,
        /// The commit that vxcsum was built from
        #[arg(long, default_value = "unknown commit")]
        commit: String,
    },
    /// Prints numbers from standard input as tables, and keeps them with pictures of them
    Show {
        /// Where to keep them
        #[arg(long)]
        out: PathBuf,
        /// Write them into docs/ and the README as well
        #[arg(long)]
        docs: bool,
    },
}

fn main() -> ExitCode {
    let reached = match Arguments::parse().task {
        Task::Measure { names, repetitions, quick, commit } => {
            measure(&names, repetitions.map(usize::from), quick, &commit).map(|()| true)
        }
        Task::Show { out, docs } => show(&out, docs),
    };
    match reached {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => MISSED.into(),
        Err(error) => {
            eprintln!("error: {error:#}");
            CANNOT_RUN.into()
        }
    }
}

fn measure(names: &[String], repetitions: Option<usize>, quick: bool, commit: &str) -> Result<()> {
    ctrlc::set_handler(|| {
        netns::remove_own();
        std::process::exit(130);
    })
    .context("cannot catch Ctrl-C")?;
    for bench in wanted(names)? {
        let report = benches::run(bench, repetitions, quick, commit)?;
        let mut stdout = io::stdout().lock();
        serde_json::to_writer(&mut stdout, &report)?;
        stdout.write_all(b"\n")?;
        stdout.flush()?;
    }
    Ok(())
}

fn wanted(names: &[String]) -> Result<Vec<&'static Bench>> {
    if names.is_empty() {
        return Ok(BENCHES.iter().collect());
    }
    let find = |name: &String| {
        BENCHES.iter().find(|bench| bench.name == name).with_context(|| {
            let known: Vec<_> = BENCHES.iter().map(|bench| bench.name).collect();
            format!("there is no bench {name}: there are {}", known.join(", "))
        })
    };
    names.iter().map(find).collect()
}

/// True if all numbers are reached that there are to reach.
fn show(out: &std::path::Path, docs: bool) -> Result<bool> {
    let mut reaches = Vec::new();
    for line in io::stdin().lock().lines() {
        let report: Report = serde_json::from_str(&line?).context("not a report")?;
        table::print(&report);
        docs::save(&report, out)?;
        if docs {
            docs::save(&report, &docs::folder())?;
        }
        // A quick look reaches nothing.
        let all = report.panels.iter().flat_map(|panel| &panel.series);
        reaches.extend(all.filter_map(|series| series.reach).filter(|_| !report.quick));
    }
    if docs {
        docs::write_pages()?;
    }
    let met = reaches.iter().filter(|reach| reach.met).count();
    println!(
        "\n{met} of {} numbers reached; all numbers and plots: {}",
        reaches.len(),
        out.display()
    );
    Ok(met == reaches.len())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn an_unknown_bench_is_told_which_there_are() {
        let error = wanted(&["nonsense".to_owned()]).err().unwrap().to_string();
        assert!(error.starts_with("there is no bench nonsense: there are "), "{error}");
    }
}
