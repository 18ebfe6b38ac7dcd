//! The pages that quote numbers: written from the reports, never by hand.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::benches::BENCHES;
use crate::plot;
use crate::report::{Panel, Report, Series, number};
use crate::table::{heading, reach_cell, row};

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
    let reports = kept()?;
    write_section(&root().join("docs/benchmarks.md"), &results(&reports))?;
    write_section(&root().join("README.md"), &quoted(&reports))
}

/// The reports that are kept there, in the order of the benches.
fn kept() -> Result<Vec<Report>> {
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
    Ok(reports)
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

/// The few numbers that a user decides by.
fn quoted(reports: &[Report]) -> String {
    let Some(first) = reports.first() else { return String::new() };
    let mut text = "| | measured | to reach |\n| --- | --: | --- |\n".to_owned();
    for report in reports {
        for panel in &report.panels {
            let rows = panel.series.iter().filter_map(|series| quoted_row(panel, series));
            text.extend(rows);
        }
    }
    let _ = write!(text, "\n{}\n", first.machine.line());
    text
}

fn quoted_row(panel: &Panel, series: &Series) -> Option<String> {
    let name = series.quote.as_ref()?;
    let value = format!("{} {}", number(series.median), panel.unit);
    let value = match &series.ratio {
        Some(ratio) => format!("{} of {} ({value})", number(ratio.median), ratio.to),
        None => value,
    };
    let reach = series.reach.map(reach_cell).unwrap_or_default();
    Some(format!("| {name} | {value} | {reach} |\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Limit;

    fn section(page: &str) -> String {
        let text = fs::read_to_string(root().join(page)).unwrap();
        let (_, rest) = text.split_once(START).unwrap();
        rest.split_once(END).unwrap().0.to_owned()
    }

    /// What the pages say comes from the reports beside them and from nowhere else.
    #[test]
    fn the_pages_say_what_the_reports_say() {
        let reports = kept().unwrap();
        assert_eq!(section("docs/benchmarks.md"), results(&reports), "cargo xtask bench --docs");
        assert_eq!(section("README.md"), quoted(&reports), "cargo xtask bench --docs");
    }

    #[test]
    fn a_row_is_quoted_with_its_unit_and_what_it_is_compared_with() {
        let without = Series::new("without", vec![10.0]);
        let with = Series::new("with", vec![9.95]).against(&without).quote("TCP");
        let with = with.reach_ratio(Limit::AtLeast, 0.99);
        let panel = Panel::new("TCP", "Gbit/s");
        assert_eq!(quoted_row(&panel, &without), None);
        let row = quoted_row(&panel, &with).unwrap();
        assert_eq!(row, "| TCP | 0.995 of without (9.95 Gbit/s) | ratio ≥ 0.990: met |\n");
    }
}
