//! Network namespaces that disappear with the value that made them.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::Path;
use std::process::{self, Command};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use anyhow::{Context as _, Result, anyhow, ensure};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};

use crate::sh;

const PREFIX: &str = "vxc";
const FOLDER: &str = "/run/netns";

static NEXT: AtomicU32 = AtomicU32::new(0);
static STALE: Once = Once::new();

/// A named network namespace, removed on drop together with every device and rule inside.
///
/// The name carries the id of the process that made it, so that [`remove_stale`] can tell what an
/// earlier run left behind when it was killed.
#[derive(Debug)]
pub struct NetNs {
    name: String,
}

impl NetNs {
    /// Makes a namespace whose name ends in `label`, with its loopback up.
    pub fn new(label: &str) -> Result<Self> {
        ensure!(
            geteuid().is_root(),
            "network namespaces need root: run this as root, for example through sudo"
        );
        STALE.call_once(remove_stale);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}{}-{number}-{label}", process::id());
        sh::output(Command::new("ip").args(["netns", "add", &name]))?;
        let ns = Self { name };
        ns.ip("link set lo up")?;
        Ok(ns)
    }

    /// The name under which `ip netns` knows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A program that will run inside, with mounts of its own. It becomes the very process that is
    /// spawned (`ip netns exec` does not fork), so it can be signalled by the id of the child.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name]).arg(program);
        command
    }

    /// Runs a command line, split at spaces, to its end inside; returns its standard output.
    pub fn run(&self, line: &str) -> Result<String> {
        self.run_with_input(line, "")
    }

    /// The same with `input` on its standard input.
    ///
    /// It starts from a thread that is inside: that costs a fraction of `ip netns exec`, which mounts
    /// sysfs anew and lets the kernel clear up after that.
    pub fn run_with_input(&self, line: &str, input: &str) -> Result<String> {
        let mut words = line.split_whitespace();
        let program = words.next().context("an empty command line")?;
        let mut command = Command::new(program);
        command.args(words);
        self.enter(|| sh::output_with_input(&mut command, input))
    }

    /// Runs `ip` commands, one a line, in one go. Stops at the first that fails.
    pub fn ip(&self, lines: &str) -> Result<()> {
        self.run_with_input("ip -batch -", lines)
            .with_context(|| format!("one of these in {}:\n{lines}", self.name))?;
        Ok(())
    }

    /// Sets a sysctl such as `net.ipv4.ip_forward` inside.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = format!("/proc/sys/{}", key.replace('.', "/"));
        self.enter(|| fs::write(&path, value).with_context(|| format!("{path} = {value}")))
    }

    /// Runs a closure on a fresh thread inside and waits for it. Sockets made there stay there.
    ///
    /// `/proc/net` is the caller's even so, because it belongs to the process: read
    /// `/proc/thread-self/net`. `/sys/class/net` belongs to whoever mounted it.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                self.move_this_thread()?;
                work()
            });
            thread.join().map_err(|_| anyhow!("a thread inside {} panicked", self.name))?
        })
    }

    fn move_this_thread(&self) -> Result<()> {
        let path = Path::new(FOLDER).join(&self.name);
        let file = File::open(&path).with_context(|| path.display().to_string())?;
        setns(file, CloneFlags::CLONE_NEWNET).with_context(|| format!("enter {}", self.name))
    }
}

impl Drop for NetNs {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.name) {
            eprintln!("{error:#}");
        }
    }
}

/// Names of the namespaces made by the process `pid` that are there now.
pub fn of_process(pid: u32) -> Vec<String> {
    existing().into_iter().filter(|name| owner(name) == Some(pid)).collect()
}

/// Removes what processes that are gone have left behind, and stops what they left running in it.
/// The first [`NetNs`] of a process does this by itself.
pub fn remove_stale() {
    for name in existing() {
        if owner(&name).is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            remove_with_processes(&name);
        }
    }
}

/// Removes everything this process has made: for a signal handler's thread, before it exits.
pub fn remove_own() {
    for name in of_process(process::id()).into_iter().rev() {
        remove_with_processes(&name);
    }
}

/// In the order in which they were made.
fn existing() -> Vec<String> {
    let Ok(entries) = fs::read_dir(FOLDER) else { return Vec::new() };
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| owner(name).is_some())
        .collect();
    names.sort_by_key(|name| number(name));
    names
}

fn owner(name: &str) -> Option<u32> {
    name.strip_prefix(PREFIX)?.split('-').next()?.parse().ok()
}

fn number(name: &str) -> Option<u32> {
    name.split('-').nth(1)?.parse().ok()
}

fn remove(name: &str) -> Result<()> {
    sh::output(Command::new("ip").args(["netns", "del", name])).map(drop)
}

/// Without the processes inside, a namespace would lose its name only and live on. Another run
/// may be clearing up the same remains, so whatever is gone already is fine.
fn remove_with_processes(name: &str) {
    let pids = sh::output(Command::new("ip").args(["netns", "pids", name])).unwrap_or_default();
    for pid in pids.lines().filter_map(|line| line.parse().ok()).map(Pid::from_raw) {
        if pid != Pid::this() {
            let _ = kill(pid, Signal::SIGKILL);
        }
    }
    let _ = remove(name);
}
