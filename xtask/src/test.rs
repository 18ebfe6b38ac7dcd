//! Runs all tests and adds up what they say.

use std::{
    env,
    ffi::OsString,
    fmt::{self, Display, Formatter},
    io::{self, Read, Write},
    process::{Command, Stdio},
};

use anyhow::{Context, Result};
use nix::unistd::Uid;

use crate::{
    build, process, root,
    setup::{self, Goal},
    vm,
};

/// The variable that tells the tests where the release binary is.
const BINARY_VARIABLE: &str = "VXCSUM_BIN";
/// The variable that tells the tests how events are to come from the kernel.
const TRANSPORT_VARIABLE: &str = "VXCSUM_TRANSPORT";

/// Sets up, builds and tests, with `vm` on other kernels as well; true if there were tests and all of
/// them passed.
pub(crate) fn run(arguments: &[String], vm: bool) -> Result<bool> {
    // Before anything is built, so that nobody waits for minutes to hear of it.
    root::prefix("testing in network namespaces")?;
    setup::run(&[Goal::Build, Goal::Test])?;
    let binary = build::release()?;
    // On its own, so that what does not compile is told from what fails.
    process::run(cargo_test().arg("--no-run"))?;

    let mut total = Total::default();
    let mut succeeded = true;
    for (mut cargo, transport) in [(cargo_test(), None), (cargo_test_again(), Some("perf"))] {
        if let Some(transport) = transport {
            println!("\nAgain over {transport} buffers, as on kernels before 5.8:");
        }
        let mut variables = vec![(BINARY_VARIABLE, binary.clone().into_os_string())];
        variables.extend(transport.map(|it| (TRANSPORT_VARIABLE, it.into())));
        if let Some(runner) = runner(&variables)? {
            cargo.arg("--config").arg(runner);
        }
        cargo.envs(variables).arg("--").args(arguments);
        let (mut part, part_succeeded) = stream(&mut cargo)?;
        if !part_succeeded {
            // A test program that was killed has not told how many of its tests failed.
            part.failed = part.failed.max(1);
        }
        total.passed += part.passed;
        total.failed += part.failed;
        total.ignored += part.ignored;
        succeeded &= part_succeeded;
    }
    if total.passed + total.failed == 0 {
        eprintln!("error: no test has run");
    }
    let mut passed = succeeded && total.passed > 0;
    if vm {
        let kernels = other_kernels();
        passed &= !matches!(kernels, Kernels::Failed);
        println!("\nother kernels: {kernels}");
    }
    println!("{}", total.line());
    Ok(passed)
}

/// What came of the tests on other kernels.
#[derive(Debug)]
enum Kernels {
    Passed,
    Failed,
    /// They, or some of them, could not be had, and why.
    NotTested(String),
}

impl Display for Kernels {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Passed => formatter.write_str("passed"),
            Self::Failed => formatter.write_str("FAILED"),
            Self::NotTested(why) => write!(formatter, "NOT (ALL) TESTED: {why}"),
        }
    }
}

/// The tests that are different elsewhere, on kernels that are not this one. That a kernel, or what
/// runs it, cannot be had is no failure of vxcsum.
fn other_kernels() -> Kernels {
    println!("\nother kernels, in virtual machines:");
    if let Err(error) = setup::run(&[Goal::Vm]) {
        return Kernels::NotTested(format!("{error:#}"));
    }
    match vm::run(&vm::Options::quick()) {
        Ok(ran) if !ran.passed => Kernels::Failed,
        Ok(ran) if ran.not_had.is_empty() => Kernels::Passed,
        Ok(ran) => Kernels::NotTested(ran.not_had.join("; ")),
        Err(error) => {
            eprintln!("error: {error:#}");
            Kernels::Failed
        }
    }
}

/// Doctests are left out: the last thing said would be an empty run of them.
pub(crate) fn cargo_test() -> Command {
    let mut cargo = process::command("cargo");
    cargo.args(["test", "--workspace", "--exclude=vxcsum-ebpf", "--no-fail-fast"]);
    cargo.args(["--lib", "--bins", "--tests"]);
    cargo
}

/// What depends on how events come from the kernel. Tests of one packet take both programs at once.
fn cargo_test_again() -> Command {
    let mut cargo = process::command("cargo");
    cargo.args(["test", "--package=vxcsum-tests", "--no-fail-fast"]);
    for test in vm::tests_by_transport() {
        cargo.arg("--test").arg(test);
    }
    cargo
}

/// cargo's setting that runs the test programs, and only them, through sudo, with these variables.
pub(crate) fn runner(variables: &[(&str, OsString)]) -> Result<Option<String>> {
    if Uid::effective().is_root() {
        return Ok(None);
    }
    let sudo = root::prefix("testing in network namespaces")?;
    // sudo passes on next to nothing, and its policy may forbid to ask for more.
    let mut words = sudo;
    words.push("env".into());
    words.push(assignment("PATH", &process::SEARCH_PATH));
    words.extend(variables.iter().map(|(name, value)| assignment(name, value)));
    let is_given = |name: &str| variables.iter().any(|(given, _)| *given == name);
    words.extend(
        env::vars_os()
            .filter(|(name, _)| is_for_tests(&name.to_string_lossy()))
            .filter(|(name, _)| !is_given(&name.to_string_lossy()))
            .map(|(name, value)| assignment(&name.to_string_lossy(), &value)),
    );
    let words: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
    // A list of strings reads the same in JSON and in TOML.
    let words = serde_json::to_string(&words).context("cannot write cargo's runner setting")?;
    Ok(Some(format!("target.'cfg(all())'.runner = {words}")))
}

fn assignment(name: &str, value: &std::ffi::OsStr) -> OsString {
    let mut assignment = OsString::from(format!("{name}="));
    assignment.push(value);
    assignment
}

fn is_for_tests(variable: &str) -> bool {
    ["RUST_", "PROPTEST_", "VXCSUM_"].iter().any(|prefix| variable.starts_with(prefix))
        && ![BINARY_VARIABLE, TRANSPORT_VARIABLE].contains(&variable)
}

/// Runs it, passes on what it prints as it comes, and adds up the results in there.
fn stream(command: &mut Command) -> Result<(Total, bool)> {
    let shown = process::shown(command);
    let mut child =
        command.stdout(Stdio::piped()).spawn().with_context(|| format!("cannot run `{shown}`"))?;
    let mut output = child.stdout.take().context("cannot read what the tests print")?;
    let total = count(&mut output, &mut io::stdout().lock());
    let status = child.wait().with_context(|| format!("cannot wait for `{shown}`"))?;
    Ok((total.context("cannot pass on what the tests print")?, status.success()))
}

/// Copies by chunks rather than lines: the name of a test that hangs is not yet a line.
fn count(from: &mut impl Read, to: &mut impl Write) -> io::Result<Total> {
    let mut total = Total::default();
    let mut line = Vec::new();
    let mut chunk = [0; 8192];
    loop {
        let read = match from.read(&mut chunk) {
            Ok(0) => break,
            Ok(read) => &chunk[..read],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        to.write_all(read)?;
        to.flush()?;
        for &byte in read {
            if byte == b'\n' {
                total.add(&String::from_utf8_lossy(&line));
                line.clear();
            } else {
                line.push(byte);
            }
        }
    }
    total.add(&String::from_utf8_lossy(&line));
    Ok(total)
}

/// The sum over all test programs.
#[derive(Debug, Default, PartialEq, Eq)]
struct Total {
    passed: u64,
    failed: u64,
    ignored: u64,
}

impl Total {
    /// Adds a line such as `test result: ok. 3 passed; 0 failed; 1 ignored; …`, and no other.
    fn add(&mut self, line: &str) {
        let Some(counts) =
            line.strip_prefix("test result: ").and_then(|rest| rest.split_once(". "))
        else {
            return;
        };
        for count in counts.1.split("; ") {
            let Some((number, what)) = count.split_once(' ') else { continue };
            let Ok(number) = number.parse::<u64>() else { continue };
            match what {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.ignored += number,
                _ => {}
            }
        }
    }

    fn line(&self) -> String {
        let Self { passed, failed, ignored } = self;
        let skipped = if *ignored > 0 { format!(", {ignored} skipped") } else { String::new() };
        format!("total: {passed} passed, {failed} failed{skipped}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "\nrunning 3 tests\ntest a ... ok\n\n\
        test result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 7 filtered out; finished in 0.01s\n\n\
        running 2 tests\n\
        test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.20s";

    #[test]
    fn adds_up_every_program_and_passes_on_every_byte() {
        let mut copy = Vec::new();
        let total = count(&mut OUTPUT.as_bytes(), &mut copy).unwrap();
        assert_eq!(total, Total { passed: 3, failed: 1, ignored: 1 });
        assert_eq!(copy, OUTPUT.as_bytes());
        assert_eq!(total.line(), "total: 3 passed, 1 failed, 1 skipped");
    }

    #[test]
    fn a_line_cut_by_the_pipe_counts_once() {
        struct ByteByByte<'a>(&'a [u8]);
        impl Read for ByteByByte<'_> {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                let take = self.0.len().min(1);
                buffer[..take].copy_from_slice(&self.0[..take]);
                self.0 = &self.0[take..];
                Ok(take)
            }
        }
        let total = count(&mut ByteByByte(OUTPUT.as_bytes()), &mut Vec::new()).unwrap();
        assert_eq!(total, Total { passed: 3, failed: 1, ignored: 1 });
    }

    #[test]
    fn says_nothing_of_skipped_tests_where_there_are_none() {
        let mut total = Total::default();
        total.add("test result: ok. 5 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out");
        total.add("a test that prints: test result: ok. 9 passed; 0 failed");
        assert_eq!(total.line(), "total: 5 passed, 0 failed");
    }

    #[test]
    fn only_what_the_tests_read_goes_through_sudo() {
        assert!(is_for_tests("RUST_BACKTRACE"));
        assert!(is_for_tests("PROPTEST_CASES"));
        assert!(!is_for_tests(BINARY_VARIABLE));
        assert!(!is_for_tests("HOME"));
    }
}
