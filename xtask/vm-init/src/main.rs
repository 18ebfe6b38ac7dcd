//! The first process of the virtual machine: loads modules, runs the jobs of the plan, reports how
//! each has ended, and turns the machine off.

use std::{
    fs::{self, File, OpenOptions},
    io::Write as _,
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    path::Path,
    process::{Command, ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    errno::Errno,
    kmod::{ModuleInitFlags, finit_module},
    mount::{MsFlags, mount},
    sys::{
        reboot::{RebootMode, reboot},
        signal::{Signal, killpg},
        termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr},
        utsname::uname,
    },
    unistd::{Pid, getpid},
};
use vxcsum_vm_init::{Job, MODULES, Outcome, PLAN, Plan, REPORTS, Report};

/// How often a running job is looked at.
const GLANCE: Duration = Duration::from_millis(10);

fn main() {
    if getpid() != Pid::from_raw(1) {
        eprintln!("this is the first process of a virtual machine: start it by `cargo xtask vm`");
        std::process::exit(2);
    }
    // Nobody is left to tell where even reporting fails; the one outside sees no verdict then.
    if let Err(error) = run() {
        eprintln!("vm-init: {error:#}");
    }
    let Err(error) = reboot(RebootMode::RB_POWER_OFF);
    eprintln!("vm-init: cannot turn the machine off: {error}");
}

fn run() -> Result<()> {
    mount_all()?;
    let plan = fs::read_to_string(PLAN).with_context(|| PLAN.to_owned())?;
    // The nonce is not for the jobs.
    fs::remove_file(PLAN).with_context(|| PLAN.to_owned())?;
    let plan: Plan = plan.parse()?;
    let mut reports = Reports::open(&plan.nonce)?;
    let outcome = work(&plan, &mut reports);
    reports.say(&match outcome {
        Ok(()) => Report::Finished,
        Err(error) => Report::Broken(format!("{error:#}")),
    })
}

fn work(plan: &Plan, reports: &mut Reports) -> Result<()> {
    for module in &plan.modules {
        load(module)?;
    }
    let release = uname().context("uname")?.release().to_string_lossy().into_owned();
    reports.say(&Report::Ready(release))?;
    for job in &plan.jobs {
        reports.say(&Report::Start(job.name.clone()))?;
        let outcome = run_job(job, reports).with_context(|| format!("run {}", job.name))?;
        reports.say(&Report::End(job.name.clone(), outcome))?;
    }
    Ok(())
}

fn mount_all() -> Result<()> {
    for (kind, folder) in [
        ("devtmpfs", "/dev"),
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("tmpfs", "/tmp"),
        ("tmpfs", "/run"),
        ("bpf", "/sys/fs/bpf"),
        ("tracefs", "/sys/kernel/tracing"),
    ] {
        fs::create_dir_all(folder).with_context(|| folder.to_owned())?;
        mount(Some(kind), folder, Some(kind), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("mount {folder}"))?;
    }
    Ok(())
}

/// Loads a module. One that says that its device is not there is passed over as modprobe does: such
/// are the faster variants of something.
fn load(module: &str) -> Result<()> {
    let path = Path::new(MODULES).join(module);
    let file = File::open(&path).with_context(|| path.display().to_string())?;
    match finit_module(&file, c"", ModuleInitFlags::empty()) {
        Ok(()) | Err(Errno::EEXIST | Errno::ENODEV) => Ok(()),
        Err(error) => Err(error).with_context(|| format!("load {module}; see the console")),
    }
}

fn run_job(job: &Job, reports: &Reports) -> Result<Outcome> {
    let Some((program, arguments)) = job.command.split_first() else { bail!("it has no command") };
    let mut command = Command::new(program);
    command.args(arguments).current_dir("/").env_clear();
    command.envs(job.environment.iter().filter_map(|variable| variable.split_once('=')));
    command.stdin(Stdio::null()).stdout(reports.output()?).stderr(reports.output()?);
    let mut child = command.process_group(0).spawn().context(program.clone())?;
    let group = Pid::from_raw(child.id().cast_signed());
    let deadline = Instant::now() + job.limit;
    let outcome = loop {
        if let Some(status) = child.try_wait()? {
            break ended(status);
        }
        if Instant::now() >= deadline {
            break Outcome::TimedOut;
        }
        thread::sleep(GLANCE);
    };
    // Also what it may have left behind; nothing there is no failure.
    let _ = killpg(group, Signal::SIGKILL);
    if outcome == Outcome::TimedOut {
        child.wait()?;
    }
    Ok(outcome)
}

fn ended(status: ExitStatus) -> Outcome {
    match (status.code(), status.signal()) {
        (Some(code), _) => Outcome::Exit(code),
        (None, signal) => Outcome::Signal(signal.unwrap_or_default()),
    }
}

/// The serial line to the one outside.
struct Reports {
    line: File,
    nonce: String,
}

impl Reports {
    fn open(nonce: &str) -> Result<Self> {
        let line = OpenOptions::new().read(true).write(true).open(REPORTS).context(REPORTS)?;
        let mut settings = tcgetattr(&line).context(REPORTS)?;
        cfmakeraw(&mut settings);
        tcsetattr(&line, SetArg::TCSANOW, &settings).context(REPORTS)?;
        Ok(Self { line, nonce: nonce.to_owned() })
    }

    /// A line of its own, whatever a job has left unfinished before.
    fn say(&mut self, report: &Report) -> Result<()> {
        let text = format!("\n{}", report.line(&self.nonce));
        self.line.write_all(text.as_bytes()).context(REPORTS)?;
        nix::sys::termios::tcdrain(&self.line).context(REPORTS)
    }

    fn output(&self) -> Result<Stdio> {
        Ok(self.line.try_clone().context(REPORTS)?.into())
    }
}
