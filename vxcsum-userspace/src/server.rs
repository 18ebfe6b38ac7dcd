//! The Unix socket of the daemon.

#[cfg(fuzzing)]
pub mod fuzzing;

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use futures_util::{SinkExt as _, StreamExt as _};
use nix::unistd::{Group, chown, getegid};
use serde::Serialize;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, broadcast, mpsc, oneshot};
use tokio::time::{sleep, timeout};
use tokio_util::codec::{Framed, LinesCodec};
use vxcsum_common::layout::FixMode;

use crate::event::Event;
use crate::news::Channels;
use crate::protocol::{Command, Filter, MAX_LINE_LEN, Notice};
use crate::stalls::{self, Totals};
use crate::summary::Summary;
use crate::supervisor::Counts;

/// Where the daemon listens unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/vxcsum/vxcsum.sock";

/// Clients at the same time; one more is told so and turned away. Fewer where files may not be opened
/// that many.
pub const MAX_CLIENTS: usize = 1024;
/// Open files that clients leave to the rest: interfaces that come, rules that are read, scrapers.
const RESERVED_FILES: usize = 256;
/// Longest path of a socket in bytes (unix(7)): one more for its end are the 108 of `sun_path`.
const MAX_PATH_LEN: usize = 107;
/// For a client to say what it wants, and to take what it asked for.
const PATIENCE: Duration = Duration::from_secs(10);

/// Where to listen, and who may connect.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Options {
    /// The path; [`DEFAULT_SOCKET`] where it is left open.
    pub path: Option<PathBuf>,
    /// A group that may read along.
    pub group: Option<String>,
}

/// What only the daemon's own loop can do.
#[derive(Debug)]
pub enum Request {
    /// Sum up.
    Status(oneshot::Sender<Result<Summary>>),
    /// Read the counters.
    Count(oneshot::Sender<Result<Metered>>),
    /// Switch the fix mode.
    Fix(FixMode, oneshot::Sender<Result<()>>),
}

/// Everything that is counted.
#[derive(Debug, Default)]
pub struct Metered {
    /// By the programs.
    pub counts: Counts,
    /// How many connections wait now.
    pub waiting: u64,
    /// What became of those that did.
    pub stalls: Totals,
}

/// A socket that is listened on; its file goes with it.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    path: PathBuf,
}

impl Drop for Server {
    fn drop(&mut self) {
        // Somebody may have removed it already.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Server {
    /// Starts to listen. Where only the default path cannot be used, says so and goes without.
    pub fn bind(options: &Options) -> Result<Option<Self>> {
        let path = options.path.as_deref().unwrap_or(Path::new(DEFAULT_SOCKET));
        let bound = Self::bind_to(path, options.group.as_deref())
            .with_context(|| format!("cannot listen on {}", path.display()));
        match bound {
            Ok(server) => Ok(Some(server)),
            Err(error) if options.path.is_none() && options.group.is_none() => {
                tracing::warn!("{error:#}; going on without tail, status and fix");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn bind_to(path: &Path, group: Option<&str>) -> Result<Self> {
        let group = match group {
            Some(name) => Some(
                Group::from_name(name)?.with_context(|| format!("there is no group {name:?}"))?.gid,
            ),
            None => None,
        };
        ensure!(
            path.as_os_str().len() <= MAX_PATH_LEN,
            "a socket's path has at most {MAX_PATH_LEN} bytes"
        );
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)
                .with_context(|| format!("cannot make the folder {}", folder.display()))?;
        }
        remove_stale(path)?;
        let listener = UnixListener::bind(path)?;
        let server = Self { listener, path: path.to_owned() };
        let mode = if group.is_some() { 0o660 } else { 0o600 };
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
        // The own group needs no CAP_CHOWN, which a service may be without.
        if group.is_some_and(|group| group != getegid()) {
            chown(path, None, group)?;
        }
        Ok(server)
    }

    /// Serves clients, each in a task of its own, so that none waits for another.
    pub async fn serve(self, requests: mpsc::Sender<Request>, channels: Channels) {
        let max_clients = max_clients();
        let places = Arc::new(Semaphore::new(max_clients));
        let mut trouble = Trouble::new("cannot accept a client");
        loop {
            let stream = match self.listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    trouble.wait(&error).await;
                    continue;
                }
            };
            trouble.is_over();
            let client = Client {
                is_root: stream.peer_cred().is_ok_and(|peer| peer.uid() == 0),
                lines: Framed::new(stream, LinesCodec::new_with_max_length(MAX_LINE_LEN)),
                requests: requests.clone(),
            };
            match places.clone().try_acquire_owned() {
                Ok(place) => {
                    let channels = channels.clone();
                    tokio::spawn(async move {
                        client.serve(channels).await;
                        drop(place);
                    });
                }
                Err(_) => _ = tokio::spawn(client.turn_away(max_clients)),
            }
        }
    }
}

/// Raises the limit on open files as far as it may be, and returns how many clients it has room for.
fn max_clients() -> usize {
    let wanted = (MAX_CLIENTS + RESERVED_FILES) as u64;
    let limit = rlimit::increase_nofile_limit(wanted).unwrap_or_default();
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    limit.saturating_sub(RESERVED_FILES).max(limit / 2).min(MAX_CLIENTS)
}

/// Connections that cannot be accepted: for want of file descriptors, most likely. They wait, and so
/// must whoever accepts them, or it would be told of them again at once and for ever.
pub(crate) struct Trouble {
    what: &'static str,
    is_told: bool,
}

impl Trouble {
    pub(crate) const fn new(what: &'static str) -> Self {
        Self { what, is_told: false }
    }

    /// Waits until some may be free again. Says why, once.
    pub(crate) async fn wait(&mut self, error: &io::Error) {
        const RETRY: Duration = Duration::from_millis(500);
        if !std::mem::replace(&mut self.is_told, true) {
            tracing::warn!("{}, trying again: {error}", self.what);
        }
        sleep(RETRY).await;
    }

    /// One was accepted.
    pub(crate) const fn is_over(&mut self) {
        self.is_told = false;
    }
}

/// A daemon that was killed leaves its socket's file behind.
fn remove_stale(path: &Path) -> Result<()> {
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => bail!("another vxcsum listens there: name another path with --socket"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            // A regular file refuses as well; only a socket is ours to remove.
            let kind = std::fs::symlink_metadata(path)?.file_type();
            if !std::os::unix::fs::FileTypeExt::is_socket(&kind) {
                bail!("there is a file that is no socket");
            }
            Ok(std::fs::remove_file(path)?)
        }
        Err(error) => Err(error.into()),
    }
}

/// A client that is served.
struct Client {
    is_root: bool,
    lines: Framed<UnixStream, LinesCodec>,
    requests: mpsc::Sender<Request>,
}

/// The client is gone, or takes nothing any more.
struct Gone;

fn json(value: &impl Serialize) -> Result<String, Gone> {
    serde_json::to_string(value).map_err(|_| Gone)
}

impl Client {
    async fn serve(mut self, channels: Channels) {
        // Subscribed first: what happens from now on is what the client sees.
        let (events, stalls) = (channels.events.subscribe(), channels.stalls.subscribe());
        drop(channels);
        let command = match timeout(PATIENCE, self.lines.next()).await {
            Ok(Some(Ok(line))) => serde_json::from_str(&line)
                .map_err(|error| format!("not a command that vxcsum knows: {error}")),
            Ok(Some(Err(error))) => Err(format!("not a line: {error}")),
            Ok(None) => return,
            Err(_) => Err("no command came".to_owned()),
        };
        // A client that is gone needs no answer.
        let _ = match command {
            Ok(Command::Tail(filter)) => self.tail(&filter, events, stalls).await,
            Ok(Command::Status {}) => self.status().await,
            Ok(Command::Fix { mode }) => self.fix(mode).await,
            Err(error) => self.say(&Notice::Error(error)).await,
        };
    }

    async fn turn_away(mut self, max_clients: usize) {
        let error = format!("there are {max_clients} clients already");
        let _ = self.say(&Notice::Error(error)).await;
    }

    async fn say(&mut self, value: &impl Serialize) -> Result<(), Gone> {
        timeout(PATIENCE, self.tell(&json(value)?)).await.map_err(|_| Gone)?
    }

    async fn tell(&mut self, line: &str) -> Result<(), Gone> {
        self.lines.send(line).await.map_err(|_| Gone)
    }

    /// A client that does not read is waited for, as long as it is there: it may have been stopped, and
    /// is told later what it has missed.
    async fn tail(
        &mut self,
        filter: &Filter,
        mut events: broadcast::Receiver<Arc<Event>>,
        mut stalls: broadcast::Receiver<Arc<stalls::Line>>,
    ) -> Result<(), Gone> {
        // What is left in one is still told when the other has ended.
        let (mut has_events, mut has_stalls) = (!filter.stalls, true);
        while has_events || has_stalls {
            tokio::select! {
                event = events.recv(), if has_events => match event {
                    Ok(event) if filter.matches(&event) => self.tell(event.json()).await?,
                    Ok(_) => {}
                    Err(broadcast::error::RecvError::Lagged(count)) => {
                        self.tell(&json(&Notice::Missed(count))?).await?;
                    }
                    Err(broadcast::error::RecvError::Closed) => has_events = false,
                },
                line = stalls.recv(), if has_stalls => match line {
                    Ok(line) if filter.matches_stall(&line.stall) => {
                        self.tell(&json(line.as_ref())?).await?;
                    }
                    Ok(_) => {}
                    Err(broadcast::error::RecvError::Lagged(count)) => {
                        self.tell(&json(&Notice::MissedStalls(count))?).await?;
                    }
                    Err(broadcast::error::RecvError::Closed) => has_stalls = false,
                },
                // It has nothing more to say: whatever comes is its end.
                _ = self.lines.next() => return Err(Gone),
            }
        }
        Ok(())
    }

    async fn status(&mut self) -> Result<(), Gone> {
        match self.ask(Request::Status).await {
            Ok(summary) => self.say(&summary).await,
            Err(error) => self.say(&Notice::Error(error)).await,
        }
    }

    async fn fix(&mut self, mode: FixMode) -> Result<(), Gone> {
        if !self.is_root {
            let error = "only root may switch the fix mode".to_owned();
            return self.say(&Notice::Error(error)).await;
        }
        match self.ask(|reply| Request::Fix(mode, reply)).await {
            Ok(()) => self.say(&Notice::Fix(mode)).await,
            Err(error) => self.say(&Notice::Error(error)).await,
        }
    }

    async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<T>>) -> Request,
    ) -> Result<T, String> {
        let (reply, answer) = oneshot::channel();
        let ending = || "the daemon is ending".to_owned();
        self.requests.send(request(reply)).await.map_err(|_| ending())?;
        answer.await.map_err(|_| ending())?.map_err(|error| format!("{error:#}"))
    }
}
