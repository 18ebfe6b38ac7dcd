//! What can be measured.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use vxcsum_tests::daemon;

use crate::check;
use crate::cost;
use crate::effort::Effort;
use crate::growth;
use crate::machine::Machine;
use crate::report::{Findings, Report};
use crate::start;
use crate::storm;
use crate::traffic;

/// Something that can be measured.
pub(crate) struct Bench {
    /// On the command line, and of the files.
    pub(crate) name: &'static str,
    /// What is measured.
    pub(crate) title: &'static str,
    /// How often each number is taken unless said otherwise: as often as it takes until the median
    /// is the same in the next run.
    pub(crate) repetitions: usize,
    /// Measures it, inside of this process.
    pub(crate) measure: fn(Effort) -> Result<Findings>,
}

/// All of them, in the order in which they are run and shown.
pub(crate) const BENCHES: &[Bench] = &[
    Bench { name: "cost", title: "Cost per packet", repetitions: 9, measure: cost::measure },
    Bench {
        name: "traffic",
        title: "TCP and small packets through a VXLAN",
        repetitions: 15,
        measure: traffic::measure,
    },
    Bench {
        name: "storm",
        title: "A storm of nothing but broken packets",
        repetitions: 5,
        measure: storm::measure,
    },
    Bench { name: "growth", title: "How the cost grows", repetitions: 3, measure: growth::measure },
    Bench {
        name: "check",
        title: "vxcsum check, tshark and tcpdump over the same capture",
        repetitions: 3,
        measure: check::measure,
    },
    Bench {
        name: "start",
        title: "Start to attached, and sizes",
        repetitions: 11,
        measure: start::measure,
    },
];

/// Takes the numbers of one of them.
pub(crate) fn run(
    bench: &Bench,
    repetitions: Option<usize>,
    quick: bool,
    commit: &str,
) -> Result<Report> {
    let binary = daemon::binary()?;
    let machine = Machine::this(Path::new(&binary), commit)?;
    let usual = if quick { 1 } else { bench.repetitions };
    let effort = Effort { repetitions: repetitions.unwrap_or(usual), quick };
    let start = Instant::now();
    let Findings { panels, notes } =
        (bench.measure)(effort).with_context(|| format!("the bench {}", bench.name))?;
    for panel in &panels {
        for series in &panel.series {
            let ratios = series.ratio.iter().flat_map(|ratio| &ratio.samples);
            let is_measured = series.samples.iter().chain(ratios).all(|value| value.is_finite());
            ensure!(is_measured, "{}: nothing was measured of {}", panel.title, series.name);
        }
    }
    Ok(Report {
        bench: bench.name.to_owned(),
        title: bench.title.to_owned(),
        machine,
        repetitions: effort.repetitions,
        seconds: start.elapsed().as_secs_f64(),
        quick,
        panels,
        notes,
    })
}
