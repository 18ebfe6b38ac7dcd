//! `cargo xtask`: sets up what is missing, builds, demonstrates, tests, measures and lints vxcsum.
//!
//! Exit codes follow those of vxcsum itself: 0 all well, 1 a problem was found, 2 cannot run.

mod bench;
mod build;
mod demo;
mod fuzz;
mod lint;
mod packages;
mod process;
mod root;
mod setup;
mod test;
mod toolchain;
mod vm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::setup::Goal;

/// A problem was found: a test failed, a lint spoke up.
const PROBLEM_FOUND: u8 = 1;
/// Something stands in the way of running at all.
const CANNOT_RUN: u8 = 2;

/// Sets up what is missing, builds, demonstrates, tests and lints vxcsum.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Installs what is missing, naming each thing and why; the other tasks do this by themselves
    Setup {
        /// What to get ready for
        #[arg(value_enum, default_values = ["build", "demo", "test"])]
        goals: Vec<Goal>,
        /// Only say what would be done
        #[arg(long)]
        dry_run: bool,
    },
    /// Builds the vxcsum binary with the BPF program inside it
    Build {
        /// Without optimisation of the user side, into target/debug
        #[arg(long)]
        debug: bool,
    },
    /// Shows the checksum bug of this machine's kernel, and its cure
    Demo {
        /// Show the bug of the first reports instead, on a kernel that has it, in a virtual machine
        #[arg(long)]
        original_bug: bool,
    },
    /// Runs all tests, as root since they make network namespaces
    Test {
        /// Then also try some of the tests on other kernels, in virtual machines
        #[arg(long)]
        vm: bool,
        /// Passed on to the test programs, e.g. a part of a test's name
        #[arg(last = true)]
        arguments: Vec<String>,
    },
    /// Runs tests on other kernels, in virtual machines
    Vm(vm::Options),
    /// Measures vxcsum against its limits and its peers, and plots it
    Bench(bench::Options),
    /// Throws all sorts of things at what vxcsum reads from outside
    Fuzz(fuzz::Options),
    /// Formatting, clippy, licences and sources of dependencies, undefined behaviour
    Lint,
}

fn main() -> ExitCode {
    let all_well = match Arguments::parse().task {
        Task::Setup { goals, dry_run: true } => setup::show_plan(&goals),
        Task::Setup { goals, dry_run: false } => setup::run(&goals).map(|()| true),
        Task::Build { debug } => build::run(debug).map(|()| true),
        Task::Demo { original_bug } => demo::run(original_bug).map(|()| true),
        Task::Test { vm, arguments } => test::run(&arguments, vm),
        Task::Vm(options) => vm::run(&options).map(|ran| ran.passed),
        Task::Bench(options) => bench::run(&options),
        Task::Fuzz(options) => fuzz::run(&options),
        Task::Lint => lint::run(),
    };
    match all_well {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => PROBLEM_FOUND.into(),
        Err(error) => {
            eprintln!("error: {error:#}");
            CANNOT_RUN.into()
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::Arguments;

    #[test]
    fn command_line_is_consistent() {
        Arguments::command().debug_assert();
    }
}
