//! Which tests run inside, and what their outcome means.

use std::{
    fmt::{self, Display, Formatter},
    time::Duration,
};

use vxcsum_vm_init::Outcome;

use super::{kernels::Wanted, machine::JobRun};

/// A test program of the package `tests`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Program {
    /// Its name.
    pub(crate) name: &'static str,
    /// What it shows, as a row of the README's table.
    pub(crate) shows: &'static str,
    /// Tests that need more than every kernel has.
    pub(crate) demanding: &'static [Demand],
    /// Tests that are enough for a quick look; all where it names none.
    pub(crate) quick: &'static [&'static str],
    /// Whether it is for the kernel with the original bug, and for no other.
    pub(crate) original_bug: bool,
    /// Whether it depends on how events come from the kernel, or on what the BPF program for old
    /// kernels can tell.
    pub(crate) by_transport: bool,
}

/// A test that not every kernel can pass.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Demand {
    /// Its name.
    pub(crate) test: &'static str,
    /// The first version of Linux on which it must pass.
    pub(crate) since: (u32, u32),
    /// What older ones lack.
    pub(crate) lacking: &'static str,
}

/// What runs on each kernel, in this order.
pub(crate) const SUITE: &[Program] = &[
    Program {
        name: "lab_selfcheck",
        shows: "The lab itself: the bugs and their cures without vxcsum",
        quick: &["masquerade_stalls_the_connect_over_ipv4"],
        by_transport: false,
        ..EVERYWHERE
    },
    Program {
        name: "class1_mangled_zero",
        shows: "`mangled_zero` told, and cured by `zero` and `restore`",
        quick: &["gso_packets_are_counted_by_segment", "fix_restore_cures_over_ipv6"],
        ..EVERYWHERE
    },
    Program {
        name: "class2_stale_nat",
        shows: "`stale_nat` after a new source port told, and cured",
        quick: &["each_lost_packet_is_explained_over_ipv4", "fix_restore_cures_over_ipv6"],
        ..EVERYWHERE
    },
    Program {
        name: "class2_address_snat",
        shows: "`stale_nat` after a new source address told, and cured",
        quick: &["is_explained_and_restored_over_ipv4"],
        ..EVERYWHERE
    },
    Program {
        name: "class5_false_alarms",
        shows: "No healthy packet accused",
        quick: &["summing_device_over_ipv4"],
        ..EVERYWHERE
    },
    Program {
        name: "bytes_on_the_wire",
        shows: "Nothing but two bytes written",
        quick: &["fixing_writes_two_bytes_of_mangled_packets_only"],
        ..EVERYWHERE
    },
    Program {
        name: "accounting",
        shows: "Counters exact",
        demanding: &[
            Demand { test: "exact_in_a_storm_by_tcx", since: TCX, lacking: NO_TCX },
            Demand { test: "storm_costs_the_daemon_little", since: NEVER, lacking: EMULATED },
        ],
        quick: &["exact_in_a_storm_by_clsact"],
        ..EVERYWHERE
    },
    Program {
        name: "attach_and_leave",
        shows: "Attached, and nothing left behind",
        demanding: &[Demand {
            test: "tcx_leaves_nothing_even_after_a_kill",
            since: TCX,
            lacking: NO_TCX,
        }],
        ..EVERYWHERE
    },
    Program {
        name: "discovery",
        shows: "Devices followed as they come and go",
        quick: &["device_made_anew_with_another_policy"],
        by_transport: false,
        ..EVERYWHERE
    },
    Program {
        name: "transports",
        shows: "What the kernel lacks costs its own feature, and is told",
        quick: &["nothing_is_missed_that_this_kernel_has"],
        by_transport: false,
        ..EVERYWHERE
    },
    Program {
        name: "original_bug",
        shows: "The bug of the first reports, made by the kernel itself: told, and cured",
        original_bug: true,
        ..EVERYWHERE
    },
];

/// What most programs are like.
const EVERYWHERE: Program = Program {
    name: "",
    shows: "",
    demanding: &[],
    quick: &[],
    original_bug: false,
    by_transport: true,
};

/// The first Linux with TCX.
const TCX: (u32, u32) = (6, 6);
/// What is lacking inside of every machine here, whatever the kernel.
pub(crate) const EMULATED: &str = "cost not measured in emulation";
const NEVER: (u32, u32) = (u32::MAX, 0);
const NO_TCX: &str = "no TCX";

impl Program {
    /// Whether it has something to say of this kernel.
    pub(crate) fn is_for(&self, wanted: &Wanted) -> bool {
        self.original_bug == wanted.original_bug
            && (wanted.transport.is_none() || self.by_transport)
    }

    /// Those of its tests that a kernel of this version cannot pass.
    pub(crate) fn impossible(&self, version: (u32, u32)) -> impl Iterator<Item = &'static Demand> {
        self.demanding.iter().filter(move |demand| version < demand.since)
    }
}

/// What a test program says of a kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Verdict {
    pub(crate) passed: Vec<String>,
    pub(crate) failed: Vec<String>,
    /// What the kernel lacks for tests that were left out.
    pub(crate) impossible: Vec<&'static str>,
    /// Why it counts as failed although no test says so.
    pub(crate) broken: Option<String>,
}

impl Verdict {
    /// Believes only a program that ended by itself and has told the result of each of its tests.
    pub(crate) fn of(run: &JobRun, impossible: Vec<&'static str>) -> Self {
        let mut verdict = Self { impossible, ..Self::default() };
        let mut counted = None;
        for line in run.output.lines() {
            if let Some((name, result)) =
                line.strip_prefix("test ").and_then(|rest| rest.split_once(" ... "))
            {
                match result {
                    "ok" => verdict.passed.push(name.to_owned()),
                    "FAILED" => verdict.failed.push(name.to_owned()),
                    _ => {}
                }
            } else if let Some(rest) = line.strip_prefix("test result: ") {
                counted = rest.split_once(". ").and_then(|(_, counts)| passed_and_failed(counts));
            }
        }
        let seen = (verdict.passed.len(), verdict.failed.len());
        verdict.broken = match (run.outcome, counted) {
            (None, _) => Some("the machine ended while it ran".to_owned()),
            (Some(Outcome::TimedOut), _) => Some(format!("not done after {:?}", run.took)),
            (Some(Outcome::Signal(signal)), _) => Some(format!("killed by signal {signal}")),
            (Some(Outcome::Exit(code)), None) => Some(format!("exit code {code} without a result")),
            (Some(Outcome::Exit(_)), Some(counted)) if counted != seen => Some(format!(
                "it counts {} passed and {} failed, but named {} and {}",
                counted.0, counted.1, seen.0, seen.1
            )),
            (Some(Outcome::Exit(0)), Some(_)) => None,
            (Some(Outcome::Exit(code)), Some(_)) if verdict.failed.is_empty() => {
                Some(format!("exit code {code}"))
            }
            (Some(Outcome::Exit(_)), Some(_)) => None,
        };
        verdict
    }

    /// Whether no test has run.
    pub(crate) fn is_empty(&self) -> bool {
        self.passed.is_empty() && self.failed.is_empty()
    }

    pub(crate) fn is_good(&self) -> bool {
        self.failed.is_empty() && self.broken.is_none()
    }
}

impl Display for Verdict {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        let ran = self.passed.len() + self.failed.len();
        match (&self.broken, self.is_good()) {
            (Some(_), _) => write!(formatter, "FAILED")?,
            (None, false) => write!(formatter, "FAILED {} of {ran}", self.failed.len())?,
            (None, true) if ran > 0 => write!(formatter, "ok {ran}")?,
            (None, true) => write!(formatter, "-")?,
        }
        if !self.impossible.is_empty() {
            write!(formatter, " ({})", self.impossible.join(", "))?;
        }
        Ok(())
    }
}

fn passed_and_failed(counts: &str) -> Option<(usize, usize)> {
    let number =
        |what| counts.split("; ").find_map(|count| count.strip_suffix(what)?.trim().parse().ok());
    Some((number("passed")?, number("failed")?))
}

/// Each program is given this time inside: the emulation is some ten times slower than the machine,
/// which may be busy besides.
pub(crate) const LIMIT: Duration = Duration::from_mins(15);

#[cfg(test)]
mod tests {
    use super::*;

    fn run(outcome: Option<Outcome>, output: &str) -> Verdict {
        let run = JobRun { outcome, output: output.to_owned(), ..JobRun::default() };
        Verdict::of(&run, Vec::new())
    }

    const GOOD: &str = "\nrunning 2 tests\ntest a ... ok\ntest b ... ok\n\n\
        test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 1 filtered out; finished in 1s\n";
    const BAD: &str = "test a ... ok\ntest b ... FAILED\n\
        test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out\n";

    #[test]
    fn a_program_that_says_so_has_passed() {
        let verdict = run(Some(Outcome::Exit(0)), GOOD);
        assert!(verdict.is_good());
        assert_eq!(verdict.to_string(), "ok 2");
        let verdict = Verdict { impossible: vec![NO_TCX], ..verdict };
        assert_eq!(verdict.to_string(), "ok 2 (no TCX)");
    }

    #[test]
    fn failed_tests_have_names() {
        let verdict = run(Some(Outcome::Exit(101)), BAD);
        assert_eq!((verdict.failed.as_slice(), &verdict.broken), (&["b".to_owned()][..], &None));
        assert_eq!(verdict.to_string(), "FAILED 1 of 2");
    }

    #[test]
    fn nothing_is_believed_without_a_word_on_the_end() {
        assert!(run(None, GOOD).broken.is_some());
        assert!(run(Some(Outcome::TimedOut), GOOD).broken.is_some());
        assert!(run(Some(Outcome::Signal(9)), GOOD).broken.is_some());
        assert!(run(Some(Outcome::Exit(101)), GOOD).broken.is_some());
        assert!(run(Some(Outcome::Exit(0)), "test a ... ok\n").broken.is_some());
        let cut = GOOD.replace("test b ... ok\n", "");
        assert!(run(Some(Outcome::Exit(0)), &cut).broken.is_some());
    }
}
