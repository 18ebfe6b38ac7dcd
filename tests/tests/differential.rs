//! Mutated packets, thrown at the BPF programs in the kernel, at the common crate, and at an oracle that
//! shares nothing with either. The same packets every time, and few of them; `cargo xtask fuzz
//! differential` throws millions.
#![allow(
    clippy::panic,
    clippy::unwrap_used,
    reason = "what these tests are made of fails as they do, by a panic"
)]

mod test_run;

use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::str::FromStr;
use std::time::{Duration, Instant};

use test_run::{Kernel, Outcome, TestRun, in_user_space};
use vxcsum_common::{Offload, Verdict};
use vxcsum_tests::cases::Case;
use vxcsum_tests::mutants::{MUTANTS_PER_STEM, Mutation, Stem};
use vxcsum_tests::packets::hex;
use vxcsum_tests::second_opinion::{Opinion, opinion};

/// Packets that are thrown unless `VXCSUM_FUZZ_PACKETS` says how many.
const PACKETS: u64 = 20_000;
/// Unless `VXCSUM_FUZZ_SEED` gives another.
const SEED: u64 = 1;
/// How often to say how far it is.
const REPORT_INTERVAL: Duration = Duration::from_secs(10);

fn setting<T: FromStr<Err: Display>>(name: &str) -> Option<T> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|error| panic!("{name}={text}: {error}")))
}

/// What was met.
#[derive(Default)]
struct Met {
    packets: u64,
    /// Runs of a BPF program.
    runs: u64,
    /// Judgements of which the oracle had an opinion.
    opinions: u64,
    /// By the code of the verdict, over the packets.
    verdicts: [u64; Verdict::ALL.len()],
    not_vxlan: u64,
    written: u64,
}

impl Met {
    fn print(&self, elapsed: Duration) {
        let Self { packets, runs, opinions, .. } = self;
        let seconds = elapsed.as_secs_f64();
        println!(
            "{packets} packets in {seconds:.0} s: {runs} runs of BPF programs, {opinions} opinions of \
             the oracle, {} packets rewritten",
            self.written
        );
        for (verdict, count) in Verdict::ALL.iter().zip(self.verdicts) {
            println!("  {:<16} {count:>12}", verdict.as_str());
        }
        println!("  {:<16} {:>12}", "not VXLAN", self.not_vxlan);
    }
}

struct Differential {
    seed: u64,
    kernels: Vec<Kernel<TestRun>>,
    met: Met,
}

impl Differential {
    fn new(seed: u64) -> Self {
        let kernels = Kernel::<TestRun>::ALL.map(|which| Kernel::load(which, TestRun::open));
        Self { seed, kernels: kernels.into(), met: Met::default() }
    }

    /// Takes a packet through everything, where it is new to it; says what is wrong.
    fn compare(&mut self, case: &Case, is_counted: bool) -> Result<(), String> {
        let mut runs = 0;
        let [unknown, complete] = [Offload::Unknown, Offload::Complete].map(|offload| {
            let outcome = in_user_space(case, offload);
            (outcome.clone(), check_opinion(case, offload, &outcome))
        });
        for kernel in &mut self.kernels {
            for offload in kernel.states(case) {
                kernel.configure(case);
                let bpf = kernel.run(case, offload);
                let common = if offload == Offload::Unknown { &unknown.0 } else { &complete.0 };
                if bpf != *common {
                    return Err(format!("BPF program: {bpf:?}\ncommon crate: {common:?}"));
                }
                runs += 1;
            }
        }
        let open = case.frame.open.map(|(start, field)| Offload::Partial { start, field });
        let open = open.map(|offload| check_opinion(case, offload, &in_user_space(case, offload)));
        let mut opinions = 0;
        let Outcome { verdict, after, .. } = &unknown.0;
        for outcome in [unknown.1, complete.1].into_iter().chain(open) {
            opinions += u64::from(outcome?);
        }
        if is_counted && runs > 0 {
            let met = &mut self.met;
            met.packets += 1;
            met.runs += runs;
            met.opinions += opinions;
            met.written += u64::from(*after != case.frame.bytes);
            match verdict {
                Some(verdict) => met.verdicts[*verdict as usize] += 1,
                None => met.not_vxlan += 1,
            }
        }
        Ok(())
    }

    /// The same, with failed assertions along the way.
    fn fails(&mut self, case: &Case) -> Option<String> {
        match catch_unwind(AssertUnwindSafe(|| self.compare(case, false))) {
            Ok(Ok(())) => None,
            Ok(Err(what)) => Some(what),
            Err(panic) => {
                // What a kernel has counted is not known any more.
                *self = Self::new(self.seed);
                let what = panic.downcast_ref::<String>().cloned();
                Some(what.unwrap_or_else(|| "a panic, see above".to_owned()))
            }
        }
    }

    /// Leaves out all that a failure does not need.
    fn shrink(&mut self, stem: &Stem, mut mutation: Mutation) -> Mutation {
        let mut at = 0;
        while at < mutation.edits.len() {
            let mut smaller = mutation.clone();
            smaller.edits.remove(at);
            match self.fails(&stem.mutant(&smaller)) {
                Some(_) => mutation = smaller,
                None => at += 1,
            }
        }
        let smaller = Mutation { check: None, ..mutation.clone() };
        if self.fails(&stem.mutant(&smaller)).is_some() { smaller } else { mutation }
    }

    fn stem(&mut self, number: u64, only: Option<u64>) {
        let stem = Stem::grow(self.seed, number).unwrap();
        for mutant in (0..MUTANTS_PER_STEM).filter(|&it| only.is_none_or(|only| only == it)) {
            let mutation = stem.mutation(mutant);
            let case = stem.mutant(&mutation);
            let outcome = catch_unwind(AssertUnwindSafe(|| self.compare(&case, true)));
            if matches!(outcome, Ok(Ok(()))) {
                continue;
            }
            *self = Self::new(self.seed);
            let mutation = self.shrink(&stem, mutation);
            let case = stem.mutant(&mutation);
            let what = self.fails(&case).unwrap_or_else(|| "nothing, the second time".to_owned());
            panic!(
                "{what}\n{mutation:?}\n{:?}, {} segments, mark {:#x}, hash {:#x}, fix {:?} ({}), raw \
                 IP: {}, open: {:?}\n{}\nagain: cargo xtask fuzz differential --seed {} --only {}",
                case.known,
                case.segments,
                case.mark,
                case.hash,
                case.fix,
                case.fix_unproven,
                case.frame.is_raw_ip,
                case.frame.open,
                hex(&case.frame.bytes),
                self.seed,
                number * MUTANTS_PER_STEM + mutant
            );
        }
    }
}

/// Whether the oracle has an opinion; what is wrong where it has another one.
fn check_opinion(case: &Case, offload: Offload, outcome: &Outcome) -> Result<bool, String> {
    let Some(opinion) = opinion(case, offload) else { return Ok(false) };
    let Opinion { verdict, expected, proof, source_port_before_nat } = opinion;
    let agrees = outcome.verdict == Some(verdict)
        && outcome.report.is_some() == verdict.is_broken()
        && outcome.report.is_none_or(|told| {
            (told.expected, told.proof, told.source_port_before_nat)
                == (expected, proof as u8, source_port_before_nat)
        });
    if agrees {
        return Ok(true);
    }
    Err(format!("oracle: {opinion:?} ({offload:?})\ncommon crate: {outcome:?}"))
}

#[test]
fn bpf_programs_common_crate_and_oracle_agree() {
    let packets = setting("VXCSUM_FUZZ_PACKETS").unwrap_or(PACKETS);
    let seed = setting("VXCSUM_FUZZ_SEED").unwrap_or(SEED);
    let mut differential = Differential::new(seed);
    if let Some(only) = setting::<u64>("VXCSUM_FUZZ_ONLY") {
        return differential.stem(only / MUTANTS_PER_STEM, Some(only % MUTANTS_PER_STEM));
    }
    let start = Instant::now();
    let mut next_report = start + REPORT_INTERVAL;
    let mut stem = 0;
    while differential.met.packets < packets {
        differential.stem(stem, None);
        stem += 1;
        if Instant::now() >= next_report {
            next_report += REPORT_INTERVAL;
            println!("{} packets", differential.met.packets);
        }
    }
    let met = differential.met;
    met.print(start.elapsed());
    // To compare packets that are all refused would say nothing.
    assert!(met.verdicts.iter().all(|&count| count >= packets / 200), "too few of a verdict");
    assert!(met.opinions >= packets, "the oracle has too few opinions");
    assert!(met.written >= packets / 100, "too few packets were rewritten");
}
