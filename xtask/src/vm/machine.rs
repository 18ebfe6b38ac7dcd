//! A virtual machine: boots a kernel in QEMU without any help of the processor, so that it works
//! wherever tests run, and reads the reports of its first process.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use vxcsum_vm_init::{Outcome, Report};

use crate::process;

/// The emulator, from the package qemu-system-x86.
pub(crate) const QEMU: &str = "qemu-system-x86_64";
/// Enough to boot, load modules and turn off on a machine that is busy; it takes some seconds.
const BOOT_LIMIT: Duration = Duration::from_mins(2);
/// How much of the console is shown after a failure.
const CONSOLE_LINES: usize = 40;

/// What to boot.
pub(crate) struct Machine<'a> {
    pub(crate) image: &'a Path,
    pub(crate) initramfs: &'a Path,
    /// The word that starts each report.
    pub(crate) nonce: &'a str,
    /// All jobs together are given this time.
    pub(crate) limit: Duration,
    /// Where the kernel's messages go.
    pub(crate) console: PathBuf,
}

/// What became of it.
#[derive(Debug, Default)]
pub(crate) struct Boot {
    /// `uname -r`, once the modules were loaded.
    pub(crate) release: Option<String>,
    /// From the start to there.
    pub(crate) ready_after: Duration,
    /// The jobs that were started.
    pub(crate) jobs: Vec<JobRun>,
    /// Why it ended before its time; none where the first process said that all is done.
    pub(crate) failure: Option<String>,
}

/// What became of a job.
#[derive(Debug, Default)]
pub(crate) struct JobRun {
    pub(crate) name: String,
    /// How it ended; none where the machine did not live to tell.
    pub(crate) outcome: Option<Outcome>,
    /// What it printed.
    pub(crate) output: String,
    pub(crate) took: Duration,
}

impl Machine<'_> {
    /// Runs it to its end. Each line that a job prints is shown to `see`.
    pub(crate) fn run(&self, see: &dyn Fn(&str)) -> Result<Boot> {
        let mut emulator = self.start()?;
        let mut boot = Boot::default();
        let outcome = self.watch(&emulator.lines, &mut boot, see);
        emulator.stop();
        match outcome {
            Ok(()) => {}
            Err(reason) => boot.failure = Some(self.with_console(&reason)),
        }
        Ok(boot)
    }

    fn start(&self) -> Result<Emulator> {
        File::create(&self.console).with_context(|| self.console.display().to_string())?;
        let mut qemu = process::command(QEMU);
        qemu.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"])
            .args(["-accel", "tcg", "-cpu", CPU, "-m", "1G"])
            .arg("-kernel")
            .arg(self.image)
            .arg("-initrd")
            .arg(self.initramfs)
            .args(["-append", COMMAND_LINE])
            .arg("-serial")
            .arg(format!("file:{}", self.console.display()))
            .args(["-chardev", "stdio,id=reports,signal=off", "-serial", "chardev:reports"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let shown = process::shown(&qemu);
        let mut child = qemu.spawn().with_context(|| format!("cannot run `{shown}`"))?;
        let output = child.stdout.take().context("no output of QEMU")?;
        Ok(Emulator { child, lines: lines(output) })
    }

    /// Follows the reports; the error is the reason why they ended too early.
    fn watch(
        &self,
        lines: &Receiver<String>,
        boot: &mut Boot,
        see: &dyn Fn(&str),
    ) -> Result<(), String> {
        let start = Instant::now();
        let mut job_start = start;
        let deadline = start + BOOT_LIMIT + self.limit;
        loop {
            let limit = match boot.release {
                None => start + BOOT_LIMIT,
                Some(_) => deadline,
            };
            let line = match lines.recv_timeout(limit.saturating_duration_since(Instant::now())) {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => {
                    let seconds = start.elapsed().as_secs();
                    return Err(format!("no verdict after {seconds} s: {}", boot.whereabouts()));
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(format!(
                        "the kernel panicked or QEMU died: {}",
                        boot.whereabouts()
                    ));
                }
            };
            match Report::parse(&line, self.nonce) {
                Some(Report::Ready(release)) => {
                    boot.release = Some(release);
                    boot.ready_after = start.elapsed();
                }
                Some(Report::Start(name)) => {
                    job_start = Instant::now();
                    boot.jobs.push(JobRun { name, ..JobRun::default() });
                }
                Some(Report::End(name, outcome)) => {
                    if let Some(job) = boot.jobs.last_mut().filter(|job| job.name == name) {
                        job.outcome = Some(outcome);
                        job.took = job_start.elapsed();
                    }
                }
                Some(Report::Finished) => return Ok(()),
                Some(Report::Broken(reason)) => return Err(reason),
                None => {
                    if let Some(job) = boot.jobs.last_mut() {
                        job.output.push_str(&line);
                        job.output.push('\n');
                        see(&line);
                    }
                }
            }
        }
    }

    fn with_console(&self, reason: &str) -> String {
        let console = fs::read(&self.console).unwrap_or_default();
        let console = String::from_utf8_lossy(&console);
        let lines: Vec<_> = console.lines().map(str::trim_end).collect();
        let last = lines[lines.len().saturating_sub(CONSOLE_LINES)..].join("\n");
        format!("{reason}\nthe end of its console ({}):\n{last}", self.console.display())
    }
}

/// The plain one, with a source of random numbers, for which the first processes would else wait.
/// Just one: where a kernel changes its own code while another processor runs it, QEMU 7.2 lets it die
/// of the breakpoint in between now and then, and two take no less of the machine's time than one.
/// Not cmpxchg16b, after which QEMU 7.2 restores wrong flags now and then: Linux 6.12 dies of that.
const CPU: &str = "qemu64,-cx16,+rdrand";
/// `panic=-1` with QEMU's `-no-reboot` ends the machine when the kernel panics. On a busy machine,
/// emulated timers tick too late for the kernel to believe that they work (`no_timer_check`), or that
/// the processor's clock is right (`tsc=reliable`), after which each look at the time takes long. The
/// defences against speculation cost time and defend nobody here. Debian's `perf_event_paranoid` of 3
/// forbids perf buffers; 2 is what vxcsum tells a user to set then.
const COMMAND_LINE: &str = "console=ttyS0 panic=-1 oops=panic no_timer_check tsc=reliable \
     random.trust_cpu=on mitigations=off init_on_alloc=0 rcupdate.rcu_expedited=1 audit=0 nowatchdog \
     lsm= net.ifnames=0 sysctl.kernel.perf_event_paranoid=2";

impl Boot {
    fn whereabouts(&self) -> String {
        match (&self.release, self.jobs.last()) {
            (None, _) => "it has not come to the end of loading modules".to_owned(),
            (Some(_), Some(job)) if job.outcome.is_none() => format!("it was running {}", job.name),
            (Some(_), _) => "between two jobs".to_owned(),
        }
    }
}

struct Emulator {
    child: Child,
    lines: Receiver<String>,
}

impl Emulator {
    /// It may be about to end by itself; there is nothing in it to lose.
    fn stop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The lines as they come, so that waiting for one can have a limit.
fn lines(output: ChildStdout) -> Receiver<String> {
    let (send, receive) = mpsc::channel();
    thread::spawn(move || {
        let mut output = BufReader::new(output);
        let mut line = Vec::new();
        while output.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
            let text = String::from_utf8_lossy(&line).trim_end_matches(['\r', '\n']).to_owned();
            if send.send(text).is_err() {
                break;
            }
            line.clear();
        }
    });
    receive
}
