//! `cargo xtask vm`: the tests on the kernels that people have, in virtual machines.

mod initramfs;
mod kernels;
mod kit;
mod machine;
mod original_bug;
mod suite;
mod table;

use std::{collections::BTreeSet, env, sync::Mutex, thread, time::Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use vxcsum_vm_init::Outcome;

use self::{
    kernels::{Kernel, WANTED, Wanted},
    kit::{Kit, Load},
    suite::{Program, SUITE},
    table::Column,
};
use crate::setup::{self, Goal};

/// Command-line options.
#[derive(Default, clap::Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is an option of the command line")]
pub(crate) struct Options {
    /// 5.10, 6.1, original-bug (a 6.1 that is given the bug of the first reports), 6.12, newest, and
    /// 5.10-perf and original-bug-perf, where events come by perf buffers; all of them unless given
    kernels: Vec<String>,
    /// Only some tests of each program, as `cargo xtask test` does
    #[arg(long)]
    quick: bool,
    /// Get the kernels again that are in the cache
    #[arg(long)]
    refresh: bool,
    /// Write the table into README.md
    #[arg(long, conflicts_with_all = ["kernels", "tests"])]
    readme: bool,
    /// Show all that the tests print, as it comes
    #[arg(long)]
    verbose: bool,
    /// Run a command line there instead, in a shell, and show what it prints
    #[arg(long, value_name = "COMMAND", conflicts_with = "tests")]
    run: Option<String>,
    /// Names of test programs; anything else is passed on to them, e.g. a part of a test's name
    #[arg(last = true)]
    tests: Vec<String>,
    /// Go without kernels that cannot be had.
    #[arg(skip)]
    lenient: bool,
}

impl Options {
    /// Some tests of each program on each kernel that can be had.
    pub(crate) fn quick() -> Self {
        Self { quick: true, lenient: true, ..Self::default() }
    }
}

/// What came of it.
#[derive(Debug)]
pub(crate) struct Ran {
    /// Everything that could be run has passed.
    pub(crate) passed: bool,
    /// Which kernels could not be had, and why.
    pub(crate) not_had: Vec<String>,
}

/// Runs the tests on each kernel.
pub(crate) fn run(options: &Options) -> Result<Ran> {
    setup::run(&[Goal::Build, Goal::Vm])?;
    let start = Instant::now();
    let wanted = wanted(&options.kernels)?;
    if let Some(line) = &options.run {
        let passed = run_command(&wanted, line, options.refresh)?;
        return Ok(Ran { passed, not_had: Vec::new() });
    }
    let (programs, arguments) = select(&options.tests);
    let kit = Kit::gather(&programs)?;
    let (mut runs, mut not_had) = (Vec::new(), Vec::new());
    let mut refreshed = BTreeSet::new();
    for wanted in wanted {
        let programs = programs.iter().copied();
        let programs: Vec<_> = programs.filter(|program| program.is_for(&wanted)).collect();
        if !programs.is_empty() {
            match wanted.get(options.refresh && refreshed.insert(wanted.suite)) {
                Ok(kernel) => runs.push(Run { wanted, kernel, programs }),
                Err(error) if options.lenient => {
                    let error = format!("{} cannot be had: {error:#}", wanted.name);
                    eprintln!("vm: {error}");
                    not_had.push(error);
                }
                Err(error) => return Err(error),
            }
        }
    }
    let columns = at_once(&runs, |run| run.column(&kit, options, &arguments))?;
    table::print(&columns, &programs);
    println!("{} kernels in {} s", columns.len(), start.elapsed().as_secs());
    if options.readme {
        table::write_readme(&columns, options.quick)?;
    }
    Ok(Ran { passed: columns.iter().all(Column::is_good), not_had })
}

/// A kernel and what is to run on it.
struct Run {
    wanted: Wanted,
    kernel: Kernel,
    programs: Vec<&'static Program>,
}

impl Run {
    fn column(&self, kit: &Kit, options: &Options, arguments: &[String]) -> Result<Column> {
        let start = Instant::now();
        let version = self.kernel.version()?;
        let jobs = self.programs.iter().map(|program| {
            kit::job(program.name, command(program, version, options, arguments), self.wanted)
        });
        let name = self.wanted.name;
        let boot = kit.boot(self.wanted, &self.kernel, kit.tests(jobs.collect()), &|line| {
            if options.verbose {
                println!("{name}: {line}");
            }
        })?;
        let column = Column::new(self.wanted, boot, &self.programs, version, !arguments.is_empty());
        let said = if column.is_good() { "all well" } else { "FAILED" };
        let (all, booting) = (start.elapsed().as_secs(), column.boot.ready_after.as_secs());
        eprintln!(
            "vm: {} is done after {all} s, {booting} of them to boot: {said}",
            column.title()
        );
        Ok(column)
    }
}

fn command(
    program: &Program,
    version: (u32, u32),
    options: &Options,
    arguments: &[String],
) -> Vec<String> {
    let mut command = vec![format!("/tests/{}", program.name)];
    let mut add = |argument: &str| command.push(argument.to_owned());
    if program.original_bug {
        // On every other kernel they cannot but fail.
        add("--ignored");
    }
    for demand in program.impossible(version) {
        add("--skip");
        add(demand.test);
    }
    for argument in arguments {
        add(argument);
    }
    if options.quick {
        program.quick.iter().copied().for_each(add);
    }
    command
}

/// Does it for each, one more at once than there are processors, since one or the other is always
/// waiting for something; results are in the same order.
fn at_once<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> Result<R> + Sync) -> Result<Vec<R>> {
    let processors = thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let next = Mutex::new(items.iter());
    let (next, work) = (&next, &work);
    let take = || next.lock().ok().and_then(|mut next| next.next());
    let mut results: Vec<(usize, R)> = thread::scope(|scope| {
        let workers: Vec<_> = (0..=processors)
            .map(|_| {
                scope.spawn(move || {
                    let mut results = Vec::new();
                    while let Some(item) = take() {
                        let place = items.iter().position(|other| std::ptr::eq(other, item));
                        results.push((place.unwrap_or_default(), work(item)?));
                    }
                    anyhow::Ok(results)
                })
            })
            .collect();
        let mut results = Vec::new();
        for worker in workers {
            results.extend(worker.join().map_err(|_| anyhow!("a thread panicked"))??);
        }
        anyhow::Ok(results)
    })?;
    results.sort_by_key(|(place, _)| *place);
    Ok(results.into_iter().map(|(_, result)| result).collect())
}

/// The test programs that have something else to say over another transport, on any kernel.
pub(crate) fn tests_by_transport() -> impl Iterator<Item = &'static str> {
    let any = SUITE.iter().filter(|program| program.by_transport && !program.original_bug);
    any.map(|program| program.name)
}

/// Whether this runs inside of a virtual machine that it has started.
pub(crate) fn is_inside() -> bool {
    env::var_os(kit::INSIDE_VARIABLE).is_some()
}

/// Shows the original bug, in a virtual machine that has it.
pub(crate) fn demo() -> Result<()> {
    setup::run(&[Goal::Build, Goal::Vm])?;
    let kit = Kit::gather(&[])?;
    let wanted = WANTED.iter().find(|wanted| wanted.original_bug).context("no kernel has it")?;
    let own = env::current_exe().context("cannot tell the path of xtask")?;
    let inside = "/usr/bin/xtask";
    let command = [inside, "demo", "--original-bug"].map(str::to_owned).to_vec();
    let job = kit::job("demo", command, *wanted);
    let load = Load { jobs: vec![job], programs: vec![(inside.into(), own)], ..Load::default() };
    let boot = kit.boot(*wanted, &wanted.get(false)?, load, &|line| println!("{line}"))?;
    if let Some(failure) = boot.failure {
        bail!("{failure}");
    }
    let outcome = boot.jobs.first().and_then(|job| job.outcome);
    ensure!(outcome == Some(Outcome::Exit(0)), "the demo has failed inside, see above");
    Ok(())
}

/// Runs a command line on each kernel; true if it succeeded everywhere.
fn run_command(wanted: &[Wanted], line: &str, refresh: bool) -> Result<bool> {
    let kit = Kit::gather(&[])?;
    let mut succeeded = true;
    for wanted in wanted {
        let command = ["/usr/bin/sh", kit::SCRIPT].map(str::to_owned).to_vec();
        let job = kit::job("command", command, *wanted);
        let load = Load { jobs: vec![job], script: Some(line), ..Load::default() };
        let boot = kit.boot(*wanted, &wanted.get(refresh)?, load, &|line| println!("{line}"))?;
        if let Some(failure) = &boot.failure {
            eprintln!("{}: {failure}", wanted.name);
        }
        let outcome = boot.jobs.first().and_then(|job| job.outcome);
        succeeded &= boot.failure.is_none() && outcome == Some(Outcome::Exit(0));
    }
    Ok(succeeded)
}

fn wanted(names: &[String]) -> Result<Vec<Wanted>> {
    if names.is_empty() {
        return Ok(WANTED.to_vec());
    }
    names
        .iter()
        .map(|name| {
            let known: Vec<_> = WANTED.iter().map(|wanted| wanted.name).collect();
            Wanted::by_name(name)
                .with_context(|| format!("no kernel {name} here, only {}", known.join(", ")))
        })
        .collect()
}

/// The programs that are named, or all; and the arguments for them.
fn select(tests: &[String]) -> (Vec<&'static Program>, Vec<String>) {
    let is_named = |program: &&Program| tests.iter().any(|test| test == program.name);
    let named: Vec<_> = SUITE.iter().filter(is_named).collect();
    let arguments = tests.iter().filter(|test| !SUITE.iter().any(|program| program.name == **test));
    let programs = if named.is_empty() { SUITE.iter().collect() } else { named };
    (programs, arguments.cloned().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_program_is_passed_on() {
        let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let (programs, arguments) = select(&words("class2_stale_nat over_ipv6 accounting"));
        let names: Vec<_> = programs.iter().map(|program| program.name).collect();
        assert_eq!(names, ["class2_stale_nat", "accounting"]);
        assert_eq!(arguments, ["over_ipv6"]);
        assert_eq!(select(&[]).0.len(), SUITE.len());
    }

    #[test]
    fn results_keep_their_order() {
        let items: Vec<u32> = (0..20).collect();
        assert_eq!(at_once(&items, |item| Ok(item * 2)).unwrap()[19], 38);
        assert!(at_once(&items, |item| Err::<(), _>(anyhow!("{item}"))).is_err());
    }
}
