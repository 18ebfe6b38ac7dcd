//! Single packets through the loaded program, over and over (`BPF_PROG_TEST_RUN`).

use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use aya::programs::{TestRun as _, TestRunOptions};
use vxcsum::program::{LoadOptions, Program};
use vxcsum::skb_layout::{self, VMLINUX_BTF};
use vxcsum::transport::{Buffer, Transport};
use vxcsum_common::Verdict;
use vxcsum_common::layout::Config;

use crate::effort::Effort;

/// A loaded program, attached to nothing.
pub(crate) struct Loaded {
    program: Program,
    /// Nobody reads them, but without them there would be no room for events.
    _events: Vec<Buffer>,
}

impl Loaded {
    /// As the daemon loads it.
    pub(crate) fn new(transport: Transport, config: &Config) -> Result<Self> {
        let skb_layout = match transport {
            Transport::Ring => Some(skb_layout::read(Path::new(VMLINUX_BTF))?),
            Transport::Perf => None,
        };
        let options = LoadOptions { transport, skb_layout, ..LoadOptions::default() };
        let (mut program, events) = Program::load(&options)?;
        program.configure(config)?;
        Ok(Self { program, _events: events })
    }

    /// What a packet takes, in nanoseconds, with the few that the loop in the kernel takes. The
    /// fastest of some batches: whatever interrupts one makes it slower, and nothing makes it
    /// faster. It is an error if the verdict is another one, or that it is VXLAN where none is
    /// expected.
    pub(crate) fn nanoseconds(
        &mut self,
        frame: &[u8],
        expected: Option<Verdict>,
        effort: Effort,
    ) -> Result<f64> {
        let repeat = effort.count(100_000, 1000) as u32;
        let batches = effort.count(12, 2);
        let before = self.program.counters()?;
        let mut fastest = f64::INFINITY;
        for _ in 0..batches {
            let options =
                TestRunOptions { data_in: Some(frame), repeat, ..TestRunOptions::default() };
            let result = self.program.classifier()?.test_run(options).context("test run")?;
            // The kernel tells the mean of a batch in whole nanoseconds.
            fastest = fastest.min(result.duration.as_nanos() as f64);
        }
        let after = self.program.counters()?;
        let counted = match expected {
            Some(verdict) => after.of(verdict).skbs - before.of(verdict).skbs,
            None => after.not_vxlan - before.not_vxlan,
        };
        ensure!(counted == u64::from(repeat) * batches as u64, "not all of them are {expected:?}");
        Ok(fastest)
    }
}
