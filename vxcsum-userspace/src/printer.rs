//! What the daemon prints on standard output, which may be slow, closed, or full for a while.

use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::AsFd as _;

use serde::Serialize;
use tokio::sync::mpsc;

use crate::cause::Narrator;
use crate::news::News;
use crate::stdio::write_json;
use crate::summary::Summary;

/// What goes to standard output.
pub(crate) enum Line {
    /// As it happens.
    News(News),
    /// The last line.
    Summary(Box<Summary>),
}

impl From<News> for Line {
    fn from(news: News) -> Self {
        Self::News(news)
    }
}

/// Writes what comes, and whenever nothing more is waiting, at once; until there is no more, or
/// nobody reads it. In a thread of its own: a reader that stops reading must not keep signals from
/// being handled. An error only where the last of it cannot be written.
pub(crate) fn print(mut queue: mpsc::Receiver<Line>, json: bool) -> io::Result<()> {
    // Without the buffer of `io::stdout`, which does not tell what it holds back.
    let stdout = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    let mut out = Patient::new(stdout);
    let mut narrator = Narrator::default();
    while let Some(line) = queue.blocking_recv() {
        write_line(out.line(), &line, json, &mut narrator)?;
        // An error where nobody reads any more.
        if out.end_line(queue.is_empty()).is_err() {
            return Ok(());
        }
    }
    out.finish()
}

fn write_line(
    out: &mut impl io::Write,
    line: &Line,
    json: bool,
    narrator: &mut Narrator,
) -> io::Result<()> {
    match line {
        Line::News(News::Event(event)) if json => writeln!(out, "{}", event.json()),
        Line::News(News::Event(event)) => narrator.write(out, event),
        Line::News(News::Stall(line)) if json => write_json(out, line.as_ref()),
        Line::News(News::Stall(line)) => writeln!(out, "{line}"),
        Line::Summary(summary) if json => write_json(out, &SummaryLine { summary }),
        Line::Summary(summary) => writeln!(out, "{summary}"),
    }
}

#[derive(Serialize)]
struct SummaryLine<'a> {
    summary: &'a Summary,
}

/// A full disk is no reason to stop watching: what it does not take is kept for later as far as it
/// fits, and the rest is left out by whole lines.
struct Patient<W> {
    out: W,
    /// Whole lines, but for the first one, whose beginning may be written already.
    pending: Vec<u8>,
    /// The line that is being made.
    line: Vec<u8>,
    /// Lines that were left out since it failed.
    left_out: u64,
    is_failing: bool,
}

/// Written together, in bytes.
const CHUNK_LEN: usize = 16 << 10;
/// Kept while nothing can be written, in bytes.
const MAX_PENDING_LEN: usize = 64 << 10;

impl<W: io::Write> Patient<W> {
    const fn new(out: W) -> Self {
        Self { out, pending: Vec::new(), line: Vec::new(), left_out: 0, is_failing: false }
    }

    /// Where to write the next line, all of it before [`Patient::end_line`].
    const fn line(&mut self) -> &mut Vec<u8> {
        &mut self.line
    }

    /// Takes the line, and writes what there is if there is enough or if it is `urgent`. An error
    /// where nobody reads any more.
    fn end_line(&mut self, urgent: bool) -> io::Result<()> {
        if self.pending.len() + self.line.len() > MAX_PENDING_LEN {
            self.left_out += 1;
        } else {
            self.pending.append(&mut self.line);
        }
        self.line.clear();
        if !urgent && self.pending.len() < CHUNK_LEN {
            return Ok(());
        }
        match self.flush() {
            Ok(()) => {
                if mem::take(&mut self.is_failing) {
                    let left_out = mem::take(&mut self.left_out);
                    tracing::warn!(
                        "standard output is written again; {left_out} lines are not there"
                    );
                }
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(error),
            Err(error) => {
                if !mem::replace(&mut self.is_failing, true) {
                    tracing::warn!("cannot write to standard output, going on without: {error}");
                }
                Ok(())
            }
        }
    }

    /// Writes what is left.
    fn finish(mut self) -> io::Result<()> {
        match self.flush() {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            other => other,
        }
    }

    /// Keeps what cannot be written.
    fn flush(&mut self) -> io::Result<()> {
        while !self.pending.is_empty() {
            match self.out.write(&self.pending) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(len) => drop(self.pending.drain(..len)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk with so much room left.
    struct Disk<'a> {
        room: usize,
        written: &'a mut Vec<u8>,
    }

    impl io::Write for Disk<'_> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let len = bytes.len().min(self.room);
            if len == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.room -= len;
            self.written.extend(&bytes[..len]);
            Ok(len)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn write_lines(out: &mut Patient<Disk<'_>>, numbers: std::ops::Range<usize>) {
        for number in numbers {
            out.line().extend(format!("line {number:06}\n").bytes());
            out.end_line(true).unwrap();
        }
    }

    #[test]
    fn a_full_disk_cuts_no_line_and_what_is_left_out_is_counted() {
        const LINES: usize = 10_000;
        let mut written = Vec::new();
        // Room for eight lines, and four bytes of the ninth.
        let mut out = Patient::new(Disk { room: 100, written: &mut written });
        write_lines(&mut out, 0..LINES);
        let left_out = out.left_out as usize;
        assert!(out.is_failing && left_out > LINES / 4, "{left_out}");
        out.out.room = usize::MAX;
        write_lines(&mut out, LINES..LINES + 1);
        assert!(!out.is_failing);
        out.finish().unwrap();
        let text = String::from_utf8(written).unwrap();
        // The last one finds what is kept full as well.
        assert_eq!(text.lines().count() + left_out, LINES, "{text}");
        assert!(text.lines().all(|line| line.len() == "line 000000".len()), "{text}");
    }

    #[test]
    fn an_end_that_cannot_be_written_is_an_error() {
        let mut written = Vec::new();
        let mut out = Patient::new(Disk { room: 0, written: &mut written });
        write_lines(&mut out, 0..1);
        assert_eq!(out.finish().unwrap_err().kind(), io::ErrorKind::StorageFull);
    }
}
