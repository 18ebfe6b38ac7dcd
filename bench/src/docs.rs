//! The pages that quote numbers: written from the reports, never by hand.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::benches::BENCHES;
use crate::plot;
use crate::report::{Panel, Report, Series};
use crate::table::{heading, row};

/// Between these, a page is written by the benches.
const START: &str = "<!-- written by `cargo xtask bench --docs`: -->\n";
const END: &str = "<!-- end of what it has written -->\n";

/// Where a report and its picture are kept.
pub(crate) fn save(report: &Report, folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    let save = |ending: &str, text: String| {
        let path = folder.join(format!("{}.{ending}", report.bench));
        fs::write(&path, text).with_context(|| path.display().to_string())
    };
    save("json", serde_json::to_string_pretty(report)? + "\n")?;
    save("svg", plot::svg(report)?)
}

/// The folder of the reports that the pages show, in the checkout.
pub(crate) fn folder() -> PathBuf {
    root().join("docs/benchmarks")
}

/// Writes the results into the pages, of all reports that are kept there.
pub(crate) fn write_pages() -> Result<()> {
    let mut reports = Vec::new();
    for bench in BENCHES {
        let path = folder().join(format!("{}.json", bench.name));
        if path.exists() {
            let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
            let report: Report =
                serde_json::from_str(&text).with_context(|| path.display().to_string())?;
            reports.push(report);
        }
    }
    write_section(&root().join("docs/benchmarks.md"), &results(&reports))?;
    write_section(&root().join("README.md"), &quoted(&reports))
}

fn root() -> &'static Path {
    let bench = Path::new(env!("CARGO_MANIFEST_DIR"));
    bench.parent().unwrap_or(bench)
}

fn write_section(page: &Path, text: &str) -> Result<()> {
    let what = || page.display().to_string();
    let old = fs::read_to_string(page).with_context(what)?;
    let (before, rest) = old.split_once(START).with_context(what).context("no place for it")?;
    // The README has another section of that kind behind it.
    let (_, after) = rest.split_once(END).with_context(what).context("no end of its place")?;
    fs::write(page, format!("{before}{START}{text}{END}{after}")).with_context(what)
}

/// The results of all benches, for the page about them.
fn results(reports: &[Report]) -> String {
    let mut text = String::new();
    for report in reports {
        let Report { bench, title, repetitions, seconds, machine, .. } = report;
        let _ = write!(
            text,
            "\n### `{bench}`: {title}\n\n{}.\nMedians of {repetitions} repetitions, {seconds:.0} s \
             in all. All numbers: [{bench}.json](benchmarks/{bench}.json).\n\n\
             ![{title}](benchmarks/{bench}.svg)\n",
            machine.line()
        );
        for panel in &report.panels {
            text += &markdown(panel);
        }
        text.push('\n');
        for note in &report.notes {
            let _ = writeln!(text, "- {note}");
        }
    }
    text
}

fn markdown(panel: &Panel) -> String {
    let heading = heading(panel);
    let rows: Vec<_> = panel.series.iter().map(|series| row(panel, series)).collect();
    let is_used = |column: usize| rows.iter().any(|row| !row[column].is_empty());
    let columns: Vec<_> = (0..heading.len()).filter(|&column| is_used(column)).collect();
    let line = |cells: &[&str]| {
        columns.iter().fold("|".to_owned(), |line, &column| line + " " + cells[column] + " |")
    };
    let mut text = format!("\n**{}**, {}\n\n{}\n", panel.title, panel.unit, line(&heading));
    let rule = ["---", "--:", "--:", "--:", "--:", "---"];
    text += &(line(&rule) + "\n");
    for row in &rows {
        text += &(line(&row.each_ref().map(String::as_str)) + "\n");
    }
    text
}

/// The few numbers that a user decides by: all that have something to reach.
fn quoted(reports: &[Report]) -> String {
    let mut text = "| | | to reach |\n| --- | --: | --- |\n".to_owned();
    for report in reports {
        for panel in &report.panels {
            for series in panel.series.iter().filter(|series| series.reach.is_some()) {
                let _ = writeln!(text, "{}", quoted_row(panel, series));
            }
        }
    }
    if let Some(report) = reports.first() {
        let _ = write!(text, "\n{}\n", report.machine.line());
    }
    text
}

fn quoted_row(panel: &Panel, series: &Series) -> String {
    let [label, median, _, _, ratio, reach] = row(panel, series);
    let value = if ratio.is_empty() { format!("{median} {}", panel.unit) } else { ratio };
    format!("| {}: {label} | {value} | {reach} |", panel.title)
}
