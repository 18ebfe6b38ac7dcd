//! `vxcsum check`: the verdicts of the kernel's side over capture files.

pub(crate) mod args;
#[cfg(fuzzing)]
pub mod fuzzing;
mod input;
mod judge;
mod link;
mod output;
mod reader;
mod report;

use std::io::{self, Write as _};
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use nix::sys::signal::{SigHandler, Signal, signal};
use serde::Serialize;
use vxcsum_common::Policy;

use self::args::CheckArgs;
use self::input::Source;
use self::judge::{Judge, Judged};
use self::link::Link;
use self::output::Output;
use self::reader::{Frame, Reader};
use self::report::{FileSummary, Found, Summary, Totals};
use crate::stdio::write_json;

/// A packet is broken.
const BROKEN: u8 = 1;
/// A file cannot be read.
const UNUSABLE: u8 = 2;
/// Packets after which a file is started over, if some were judged too early: what its senders send has
/// mostly shown by then, and to read all of it again would take as long as the first time.
const FIRST_LOOK: u64 = 10_000;

/// Judges every packet of every file and prints what was found.
pub fn run(args: &CheckArgs) -> Result<ExitCode> {
    let ports = args.ports()?;
    let mut check = Check { args, ports: ports.clone(), output: Output::new() };
    let mut summary = Summary { totals: Totals::default(), files: Vec::new(), ports };
    let mut is_unusable = false;
    for source in args.files.iter().map(|path| Source::from(path.as_path())) {
        let outcome = match check.source(&source) {
            Ok(outcome) => outcome,
            Err(error) => return closed(error, &summary.totals),
        };
        is_unusable |= outcome.is_unusable;
        summary.totals.add(&outcome.summary.totals);
        summary.files.push(outcome.summary);
    }
    check.output.bar.finish_and_clear();
    let broken = summary.totals.broken();
    // Without a single packet, the errors have said it all.
    if !is_unusable || summary.totals.frames > 0 {
        let json = args.json;
        let written = check.output.line(|out| {
            if json {
                write_json(out, &SummaryLine { summary: &summary })
            } else {
                writeln!(out, "{summary}")
            }
        });
        if let Err(error) = written.and_then(|()| check.output.flush()) {
            return closed(error, &summary.totals);
        }
    }
    Ok(match (is_unusable, broken) {
        (true, _) => ExitCode::from(UNUSABLE),
        (false, 0) => ExitCode::SUCCESS,
        (false, _) => ExitCode::from(BROKEN),
    })
}

/// Ends quietly when nobody reads any more.
fn closed(error: io::Error, totals: &Totals) -> Result<ExitCode> {
    if error.kind() != io::ErrorKind::BrokenPipe {
        return Err(error).context("cannot write to standard output");
    }
    Ok(if totals.broken() == 0 { ExitCode::SUCCESS } else { ExitCode::from(BROKEN) })
}

#[derive(Serialize)]
struct SummaryLine<'a> {
    summary: &'a Summary,
}

struct Check<'a> {
    args: &'a CheckArgs,
    ports: Vec<u16>,
    output: Output,
}

/// What became of one file.
struct Outcome {
    summary: FileSummary,
    is_unusable: bool,
}

/// What one reading of a file has brought.
struct Reading {
    totals: Totals,
    is_repeatable: bool,
    /// It is to be started over.
    is_broken_off: bool,
    error: Option<(String, Severity)>,
}

/// Which reading of a file it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pass {
    /// What is found may change. Ends after the first look if some of it does already.
    First,
    /// What is found may change.
    Second,
    /// It stays. No more packets than before: the file may still be written to.
    Last { max_frames: u64 },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Severity {
    /// What was read is good.
    Warning,
    /// It may not be.
    Unusable,
}

impl Check<'_> {
    /// Judges one file; fails only where nothing can be printed.
    ///
    /// What a sender sends may show only after the packets that it matters to. A file is read again
    /// then, by what is known at its end; what was found the first time is held back until it is
    /// clear that it stays.
    fn source(&mut self, source: &Source) -> io::Result<Outcome> {
        let name = source.to_string();
        self.output.bar.set_message(name.clone());
        let mut judge = match Judge::new(&self.ports, self.args.policy(), self.args.device()) {
            Ok(judge) => judge,
            Err(error) => return Err(io::Error::other(error)),
        };
        let first = match self.args.policy() {
            Policy::Unknown => Pass::First,
            _ => Pass::Last { max_frames: u64::MAX },
        };
        let mut reading = self.read(source, &name, &mut judge, first)?;
        if reading.is_broken_off {
            self.output.discard();
            judge.start_over();
            reading = self.read(source, &name, &mut judge, Pass::Second)?;
        }
        let premature = judge.premature();
        if reading.is_repeatable && (premature > 0 || self.output.is_overfull()) {
            self.output.discard();
            judge.finish_learning();
            let last = Pass::Last { max_frames: reading.totals.frames };
            let again = self.read(source, &name, &mut judge, last)?;
            reading.totals = again.totals;
            reading.error = reading.error.or(again.error);
        } else {
            self.output.release()?;
            reading.totals.premature = premature;
        }
        let Reading { totals, error, .. } = reading;
        if let Some((error, _)) = &error {
            self.output.warn(&format!("{name}: {error}"))?;
        }
        let is_unusable = matches!(error, Some((_, Severity::Unusable)));
        let error = error.map(|(error, _)| error);
        let learned = judge.lessons();
        Ok(Outcome { summary: FileSummary { file: name, totals, learned, error }, is_unusable })
    }

    /// Reads a file and judges its packets. What is found is held back where it may change and the
    /// file can be read again.
    fn read(
        &mut self,
        source: &Source,
        name: &str,
        judge: &mut Judge,
        pass: Pass,
    ) -> io::Result<Reading> {
        let mut totals = Totals::default();
        let input = match source.open(&self.output.bar) {
            Ok(input) => input,
            Err(error) => {
                let error = Some((error.to_string(), Severity::Unusable));
                let is_repeatable = false;
                return Ok(Reading { totals, is_repeatable, is_broken_off: false, error });
            }
        };
        let is_repeatable = input.is_repeatable;
        let (first_look, max_frames) = match pass {
            Pass::First if is_repeatable => (FIRST_LOOK, u64::MAX),
            Pass::First | Pass::Second => (u64::MAX, u64::MAX),
            Pass::Last { max_frames } => (u64::MAX, max_frames),
        };
        if matches!(pass, Pass::First | Pass::Second) && is_repeatable {
            self.output.hold();
        }
        if !is_repeatable {
            leave_interrupt_to_writer();
        }
        let mut reader = Reader::new(input.stream);
        let mut closed = None;
        let mut unknown_link = None;
        let mut is_broken_off = false;
        let error = loop {
            if reader.frames == first_look {
                is_broken_off = judge.premature() > 0;
            }
            if reader.frames >= max_frames || is_broken_off {
                break None;
            }
            let flush = || {
                self.output.flush().map_err(|error| {
                    closed = Some(error);
                    io::ErrorKind::BrokenPipe.into()
                })
            };
            match reader.next(flush) {
                Ok(Some(frame)) => {
                    if let Link::Other(number) = frame.link {
                        unknown_link.get_or_insert(number);
                    }
                    self.frame(name, &frame, judge, &mut totals)?;
                }
                Ok(None) => break None,
                Err(error) => break Some(error),
            }
        };
        if let Some(error) = closed {
            return Err(error);
        }
        totals.frames = reader.frames;
        totals.unreadable += reader.obsolete;
        totals.not_vxlan += reader.others;
        let error = match error {
            Some(error) if error.is_cut() => Some((error.to_string(), Severity::Warning)),
            Some(error) => Some((error.to_string(), Severity::Unusable)),
            None => unknown_link.map(|number| {
                let all = totals.unreadable == totals.frames;
                let severity = if all { Severity::Unusable } else { Severity::Warning };
                (unknown_link_message(number), severity)
            }),
        };
        Ok(Reading { totals, is_repeatable, is_broken_off, error })
    }

    fn frame(
        &mut self,
        name: &str,
        frame: &Frame<'_>,
        judge: &mut Judge,
        totals: &mut Totals,
    ) -> io::Result<()> {
        if matches!(frame.link, Link::Other(_)) {
            totals.unreadable += 1;
            return Ok(());
        }
        let packet = frame.link.packet(frame.bytes, frame.len);
        let Some(packet) = packet else {
            totals.not_vxlan += 1;
            return Ok(());
        };
        let (verdict, details) = match judge.judge(&packet) {
            Judged::NotVxlan => {
                totals.not_vxlan += 1;
                return Ok(());
            }
            Judged::CutShort => {
                totals.cut_short += 1;
                return Ok(());
            }
            Judged::Vxlan(verdict, details) => (verdict, details),
        };
        totals.count(verdict, frame.len, details.as_ref());
        if !(verdict.is_broken() || self.args.all) || !self.output.is_wanted() {
            return Ok(());
        }
        let found = Found::new(name, frame, &packet, verdict, details.as_ref());
        let (json, is_one_of_many) = (self.args.json, self.args.files.len() > 1);
        self.output.line(|out| match json {
            true => write_json(out, &found),
            false if is_one_of_many => writeln!(out, "{name}: {found}"),
            false => writeln!(out, "{found}"),
        })
    }
}

fn unknown_link_message(number: i32) -> String {
    let what = match number {
        0 | 108 => " (BSD loopback)",
        105 | 127 => " (Wi-Fi)",
        _ => "",
    };
    format!(
        "packets of link type {number}{what} are left out: Ethernet, Linux cooked and raw IP are read"
    )
}

/// In `tcpdump -w - | vxcsum check -`, Ctrl-C is for the one that writes: what it has left in the
/// pipe is still to be judged, and summed up.
fn leave_interrupt_to_writer() {
    // SAFETY: no handler of ours is installed, the signal is only ignored.
    let _ = unsafe { signal(Signal::SIGINT, SigHandler::SigIgn) };
}
