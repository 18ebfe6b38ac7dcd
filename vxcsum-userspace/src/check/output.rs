//! Standard output, beside a progress bar on standard error.

use std::io::{self, Write as _};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::stdio;

/// Written at a time.
const BUFFER_LEN: usize = 64 * 1024;
/// What is held back at most until it is known whether it stays true.
const MAX_HELD: usize = 4 * 1024 * 1024;

/// Lines on their way to standard output.
pub(super) struct Output {
    buffer: Vec<u8>,
    /// Where the progress is shown; nowhere but on a terminal.
    pub(super) bar: ProgressBar,
    /// Nothing is written yet.
    is_holding: bool,
    /// More had to be held back than there is room for.
    is_overfull: bool,
}

impl Output {
    pub(super) fn new() -> Self {
        // Hidden by itself where standard error is no terminal.
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
        let style = "{msg} [{wide_bar}] {percent:>3} %  {binary_bytes_per_sec}  {eta} left";
        if let Ok(style) = ProgressStyle::with_template(style) {
            bar.set_style(style.progress_chars("=> "));
        }
        Self { buffer: Vec::new(), bar, is_holding: false, is_overfull: false }
    }

    /// Keeps what comes, until [`Output::release`] or [`Output::discard`].
    pub(super) const fn hold(&mut self) {
        self.is_holding = true;
    }

    /// Whether what comes is still worth the making.
    pub(super) const fn is_wanted(&self) -> bool {
        !self.is_overfull
    }

    /// Whether something that was held back is lost.
    pub(super) const fn is_overfull(&self) -> bool {
        self.is_overfull
    }

    /// Writes what was held back, and what comes.
    pub(super) fn release(&mut self) -> io::Result<()> {
        self.is_holding = false;
        self.flush()
    }

    /// Forgets what was held back; what comes is written.
    pub(super) fn discard(&mut self) {
        self.buffer.clear();
        (self.is_holding, self.is_overfull) = (false, false);
    }

    /// Takes a line.
    pub(super) fn line(
        &mut self,
        write: impl FnOnce(&mut Vec<u8>) -> io::Result<()>,
    ) -> io::Result<()> {
        write(&mut self.buffer)?;
        if self.is_holding {
            self.is_overfull |= self.buffer.len() > MAX_HELD;
            return Ok(());
        }
        if self.buffer.len() >= BUFFER_LEN { self.flush() } else { Ok(()) }
    }

    /// Writes what is there, unless it is held back.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        if self.is_holding || self.buffer.is_empty() {
            return Ok(());
        }
        let mut stdout = io::stdout().lock();
        self.bar.suspend(|| stdout.write_all(&self.buffer).and_then(|()| stdout.flush()))?;
        self.buffer.clear();
        Ok(())
    }

    /// Says something on standard error, after what was found before it.
    pub(super) fn warn(&mut self, message: &str) -> io::Result<()> {
        self.flush()?;
        self.bar.suspend(|| stdio::say(message));
        Ok(())
    }
}
