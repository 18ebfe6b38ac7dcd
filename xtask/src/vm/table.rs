//! What the kernels have to say, as a table.

use std::{collections::BTreeMap, fs, time::Duration};

use anyhow::{Context, Result};

use super::{
    kernels::Wanted,
    machine::Boot,
    suite::{EMULATED, Program, SUITE, Verdict},
};
use crate::process;

/// What one kernel has to say.
pub(super) struct Column {
    wanted: Wanted,
    pub(super) boot: Boot,
    verdicts: BTreeMap<&'static str, Verdict>,
}

impl Column {
    /// `may_be_empty` where the user has asked for tests that not every program has.
    pub(super) fn new(
        wanted: Wanted,
        boot: Boot,
        programs: &[&'static Program],
        version: (u32, u32),
        may_be_empty: bool,
    ) -> Self {
        let mut verdicts = BTreeMap::new();
        for program in programs {
            let impossible = program.impossible(version).map(|demand| demand.lacking).collect();
            let mut verdict = match boot.jobs.iter().find(|job| job.name == program.name) {
                Some(run) => Verdict::of(run, impossible),
                None => Verdict {
                    broken: Some("it was never started".to_owned()),
                    ..Verdict::default()
                },
            };
            if verdict.is_empty() && !may_be_empty {
                verdict.broken.get_or_insert_with(|| "none of its tests has run".to_owned());
            }
            verdicts.insert(program.name, verdict);
        }
        Self { wanted, boot, verdicts }
    }

    pub(super) fn is_good(&self) -> bool {
        self.boot.failure.is_none() && self.verdicts.values().all(Verdict::is_good)
    }
}

/// Prints what failed and how, and the table.
pub(super) fn print(columns: &[Column], programs: &[&Program]) {
    for column in columns {
        for run in &column.boot.jobs {
            let Some(verdict) = column.verdicts.get(run.name.as_str()) else { continue };
            if !verdict.is_good() {
                println!("\n== {} on {}:\n{}", run.name, column.title(), run.output.trim());
            }
        }
        if let Some(failure) = &column.boot.failure {
            println!("\n== {}: {failure}", column.title());
        }
    }
    let width =
        |cells: &mut dyn Iterator<Item = String>| cells.map(|cell| cell.len()).max().unwrap_or(0);
    let first = width(&mut programs.iter().map(|program| program.name.to_owned()));
    let widths: Vec<_> = columns
        .iter()
        .map(|column| {
            let cells = programs.iter().map(|program| column.cell(program));
            width(&mut cells.chain([column.title()]))
        })
        .collect();
    print!("\n{:first$}", "");
    for (column, width) in columns.iter().zip(&widths) {
        print!("  {:width$}", column.title());
    }
    println!();
    for program in programs {
        print!("{:first$}", program.name);
        for (column, width) in columns.iter().zip(&widths) {
            print!("  {:width$}", column.cell(program));
        }
        println!();
    }
    for column in columns {
        for (name, verdict) in &column.verdicts {
            for test in &verdict.failed {
                println!("failed on {}: {name}::{test}", column.title());
            }
            if let Some(reason) = &verdict.broken {
                println!("failed on {}: {name}: {reason}", column.title());
            }
        }
    }
}

impl Column {
    /// What it says of a program, and how long that took.
    fn cell(&self, program: &Program) -> String {
        match self.verdicts.get(program.name) {
            Some(verdict) => format!("{verdict}, {:.0?}", self.took(program)),
            None if program.original_bug => "bug fixed".to_owned(),
            None => String::new(),
        }
    }

    fn took(&self, program: &Program) -> Duration {
        let run = self.boot.jobs.iter().find(|run| run.name == program.name);
        run.map(|run| run.took).unwrap_or_default()
    }

    pub(super) fn title(&self) -> String {
        let release = self.boot.release.as_deref().unwrap_or(self.wanted.name);
        let release = release.trim_end_matches("-cloud-amd64");
        let bug = if self.wanted.original_bug { ", bug put back" } else { "" };
        let transport = self.wanted.transport.map(|it| format!(", {it} buffers"));
        format!("{release}{bug}{}", transport.unwrap_or_default())
    }
}

/// Where the README holds the table.
const START: &str = "<!-- written by `cargo xtask vm --readme`: -->\n";
const END: &str = "<!-- end of what it has written -->\n";

/// Writes the table into the README; after a quick look it says that it comes of one.
pub(super) fn write_readme(columns: &[Column], quick: bool) -> Result<()> {
    let path = process::workspace().join("README.md");
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let (before, _, after) = parts(&text).context("README.md has no place for the table")?;
    let table = markdown(columns);
    let said =
        if quick { "\nSo far only some tests of each row were tried (`--quick`).\n" } else { "" };
    fs::write(&path, format!("{before}{START}{table}{said}{END}{after}"))
        .with_context(|| path.display().to_string())
}

/// What is before the table, the table, and what is after it.
fn parts(readme: &str) -> Option<(&str, &str, &str)> {
    let (before, rest) = readme.split_once(START)?;
    let (table, after) = rest.split_once(END)?;
    Some((before, table, after))
}

fn markdown(columns: &[Column]) -> String {
    let row = |first: &str, cells: &mut dyn Iterator<Item = String>| {
        cells.fold(format!("| {first} |"), |row, cell| row + " " + &cell + " |") + "\n"
    };
    let mut table = row("", &mut columns.iter().map(Column::title));
    table += &row("---", &mut columns.iter().map(|_| "---".to_owned()));
    for program in SUITE {
        table += &row(program.shows, &mut columns.iter().map(|column| column.answer(program)));
    }
    table
}

impl Column {
    /// What it says of a program, for somebody who does not know the tests.
    fn answer(&self, program: &Program) -> String {
        let Some(verdict) = self.verdicts.get(program.name) else {
            return if program.original_bug { "bug fixed" } else { "-" }.to_owned();
        };
        // The kernel is not to blame for what emulation lacks.
        let lacking = verdict.impossible.iter().copied().filter(|&lacking| lacking != EMULATED);
        match (verdict.is_good(), lacking.collect::<Vec<_>>().join(", ").as_str()) {
            (false, _) => "**no**".to_owned(),
            (true, "") => "yes".to_owned(),
            (true, lacking) => format!("yes ({lacking})"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vm::kernels::WANTED;

    /// The numbers in it come from a run and nowhere else; its shape can be compared.
    #[test]
    fn the_readme_has_a_row_for_each_program_and_a_column_for_each_kernel() {
        let readme = fs::read_to_string(process::workspace().join("README.md")).unwrap();
        let (_, table, _) = parts(&readme).unwrap();
        let rows = table.lines().filter(|line| line.starts_with('|'));
        let rows: Vec<Vec<_>> =
            rows.map(|row| row.trim_matches('|').split('|').collect()).collect();
        assert!(rows.iter().all(|row| row.len() == 1 + WANTED.len()), "{table}");
        let first: Vec<_> = rows.iter().skip(2).map(|row| row[0].trim()).collect();
        let shows: Vec<_> = SUITE.iter().map(|program| program.shows).collect();
        assert_eq!(first, shows, "run `cargo xtask vm --readme`");
        assert!(!table.contains("**no**"), "something does not work; the table is to say what");
    }
}
