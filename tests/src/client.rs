//! What talks to a running daemon: its socket, by hand and by `vxcsum tail`, `status` and `fix`.

use std::ffi::OsStr;
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::daemon::{Daemon, Ended, Summary, binary, run_to_end, transport};
use crate::folder::Folder;
use crate::netns::NetNs;
use crate::sh;
use crate::wait::wait_until;

/// For anything a client does; all of it takes a fraction of that.
const TIMEOUT: Duration = Duration::from_secs(5);

/// A path for the socket of one daemon, in a folder of its own. Clients reach it from any network
/// namespace.
#[derive(Debug)]
pub struct Socket {
    folder: Folder,
    path: PathBuf,
}

impl Socket {
    /// Nothing listens there yet.
    pub fn new() -> Result<Self> {
        let folder = Folder::new()?;
        let path = folder.path().join("vxcsum.sock");
        Ok(Self { folder, path })
    }

    /// The path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder that holds it and nothing else.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// `vxcsum` with these arguments and this socket, inside `ns`; `run` with the transport that
    /// the tests are run over.
    pub fn command_in<S: AsRef<OsStr>>(
        &self,
        ns: &NetNs,
        args: impl IntoIterator<Item = S>,
    ) -> Result<Command> {
        let mut command = ns.command(binary()?);
        let args: Vec<_> = args.into_iter().collect();
        let is_run = args.first().is_some_and(|first| first.as_ref() == "run")
            && !args.iter().any(|arg| arg.as_ref() == "--transport");
        command.args(args).arg("--socket").arg(&self.path);
        if let Some(transport) = transport().filter(|_| is_run) {
            command.arg("--transport").arg(transport);
        }
        Ok(command)
    }

    /// Starts `vxcsum run --json` with these arguments inside `ns`, and waits until it watches.
    pub fn run<S: AsRef<OsStr>>(
        &self,
        ns: &NetNs,
        args: impl IntoIterator<Item = S>,
    ) -> Result<Daemon> {
        let daemon = self.launch(ns, args)?;
        daemon.wait_watching()?;
        // It watches before it answers.
        wait_until("the daemon answers", TIMEOUT, || Ok(self.status().is_ok()))?;
        Ok(daemon)
    }

    /// The same without waiting for anything.
    pub fn launch<S: AsRef<OsStr>>(
        &self,
        ns: &NetNs,
        args: impl IntoIterator<Item = S>,
    ) -> Result<Daemon> {
        let mut command = self.command_in(ns, ["run", "--json"])?;
        command.args(args);
        Daemon::launch(command)
    }

    /// `vxcsum` with these arguments and this socket, to its end.
    pub fn vxcsum<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Result<Ended> {
        run_to_end(Command::new(binary()?).args(args).arg("--socket").arg(&self.path), TIMEOUT)
    }

    /// Connects as a client that speaks for itself.
    pub fn connect(&self) -> Result<UnixStream> {
        let stream = UnixStream::connect(&self.path).context("connect to the daemon")?;
        stream.set_read_timeout(Some(sh::patience(TIMEOUT)))?;
        stream.set_write_timeout(Some(sh::patience(TIMEOUT)))?;
        Ok(stream)
    }

    /// Sends one line and returns all that comes back, until the daemon has closed.
    pub fn ask(&self, line: &str) -> Result<String> {
        let mut stream = self.connect()?;
        stream.write_all(format!("{line}\n").as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).context("an answer of the daemon")?;
        Ok(answer)
    }

    /// The status, straight from the socket: quicker than by a client.
    pub fn status(&self) -> Result<Summary> {
        let answer = self.ask(r#"{"command":"status"}"#)?;
        serde_json::from_str(&answer).with_context(|| format!("not a status: {answer:?}"))
    }

    /// What `vxcsum status --json` prints.
    pub fn status_json(&self) -> Result<serde_json::Value> {
        let ended = self.vxcsum(["status", "--json"])?;
        anyhow::ensure!(ended.code == Some(0), "{ended:?}");
        serde_json::from_str(&ended.stdout).with_context(|| format!("{ended:?}"))
    }

    /// Starts `vxcsum tail` with these arguments and waits until the daemon has taken it as a
    /// client. What happens from then on is what it sees.
    pub fn tail<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Result<Daemon> {
        let mut command = Command::new(binary()?);
        command.arg("tail").args(args).arg("--socket").arg(&self.path);
        self.with_one_more_client(|| Daemon::launch(command))
    }

    /// Does something that makes the daemon have one more client, and waits until it has.
    pub fn with_one_more_client<T>(&self, act: impl FnOnce() -> Result<T>) -> Result<T> {
        let before = self.clients()?;
        let value = act()?;
        wait_until("the daemon takes the client", TIMEOUT, || Ok(self.clients()? > before))?;
        Ok(value)
    }

    /// How many clients the daemon has taken. Its ends of their connections have its path, and the
    /// network namespace that clients connect from, which is ours.
    pub fn clients(&self) -> Result<usize> {
        const CONNECTED: &str = "03";
        let path = self.path.to_str().context("a path that is no UTF-8")?;
        let text = fs::read_to_string("/proc/thread-self/net/unix")?;
        let is_client = |line: &&str| {
            let columns: Vec<_> = line.split_whitespace().collect();
            columns.get(5) == Some(&CONNECTED) && columns.get(7) == Some(&path)
        };
        Ok(text.lines().filter(is_client).count())
    }
}
