//! Reports as text.

use std::fmt::Write as _;

use crate::report::{Limit, Of, Panel, Ratio, Reach, Report, Series, number};

/// Prints a report.
pub(crate) fn print(report: &Report) {
    let Report { bench, title, repetitions, seconds, .. } = report;
    let quick = if report.quick { ", a quick look only: the numbers say little" } else { "" };
    println!("\n{bench}: {title}");
    println!("  {}", report.machine.line());
    println!("  medians of {repetitions} interleaved repetitions, {seconds:.0} s in all{quick}");
    for panel in &report.panels {
        print_panel(panel);
    }
    println!();
    for note in &report.notes {
        println!("  * {note}");
    }
}

fn print_panel(panel: &Panel) {
    let mut rows = vec![heading(panel).map(str::to_owned)];
    rows.extend(panel.series.iter().map(|series| row(panel, series)));
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: Vec<_> = (0..COLUMNS).map(|column| width(column).unwrap_or_default()).collect();
    println!("\n  {}, {}", panel.title, panel.unit);
    for row in &rows {
        let mut line = String::new();
        for (index, (cell, &width)) in row.iter().zip(&widths).enumerate() {
            // Names to the left, numbers to the right.
            let cell = if index == 0 || index == COLUMNS - 1 {
                format!("{cell:width$}")
            } else {
                format!("{cell:>width$}")
            };
            let _ = write!(line, "  {cell}");
        }
        println!("  {}", line.trim_end());
    }
}

const COLUMNS: usize = 6;

/// The names of the columns of a panel.
pub(crate) fn heading(panel: &Panel) -> [&str; COLUMNS] {
    let first = panel.axis.as_deref().unwrap_or_default();
    let has_ratio = panel.series.iter().any(|series| series.ratio.is_some());
    let has_reach = panel.series.iter().any(|series| series.reach.is_some());
    let ratio = if has_ratio { "ratio" } else { "" };
    let reach = if has_reach { "to reach" } else { "" };
    [first, "median", "min", "max", ratio, reach]
}

/// A series in those columns.
pub(crate) fn row(panel: &Panel, series: &Series) -> [String; COLUMNS] {
    [
        label(panel, series),
        number(series.median),
        number(series.min),
        number(series.max),
        series.ratio.as_ref().map(ratio_cell).unwrap_or_default(),
        series.reach.map(reach_cell).unwrap_or_default(),
    ]
}

fn label(panel: &Panel, series: &Series) -> String {
    let name = match (series.at, &panel.axis) {
        (Some(at), Some(_)) => number(at),
        _ => series.name.clone(),
    };
    match &series.variant {
        Some(variant) => format!("{name}, {variant}"),
        None => name,
    }
}

fn ratio_cell(ratio: &Ratio) -> String {
    format!("{:.3} of {}", ratio.median, ratio.to)
}

/// What is to be reached, and whether it is.
pub(crate) fn reach_cell(reach: Reach) -> String {
    let of = if reach.of == Of::Ratio { "ratio " } else { "" };
    let sign = Limit::sign(reach.is);
    let met = if reach.met { "met" } else { "MISSED" };
    format!("{of}{sign} {}: {met}", number(reach.limit))
}
