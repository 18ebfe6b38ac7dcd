//! Many clients of the daemon at once, that all want every event.

use std::io::{ErrorKind, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde_json::Value;
use vxcsum_tests::client::Socket;
use vxcsum_tests::wait::wait_until;

/// Clients, read by a thread until nothing comes any more.
pub(crate) struct Clients {
    is_over: Arc<AtomicBool>,
    reader: JoinHandle<Result<Vec<Client>>>,
}

/// One of them, and what it was told.
pub(crate) struct Client {
    stream: UnixStream,
    /// What has come of a line.
    line: Vec<u8>,
    /// Events that it got.
    pub(crate) events: u64,
    /// Events that it was told to have missed.
    pub(crate) missed: u64,
}

/// Nothing more comes after that.
const QUIET: Duration = Duration::from_millis(500);

impl Clients {
    /// Connects so many, and waits until the daemon has taken them all.
    pub(crate) fn connect(socket: &Socket, count: usize) -> Result<Self> {
        let mut clients = Vec::new();
        for _ in 0..count {
            let mut stream = socket.connect()?;
            stream.write_all(b"{\"command\":\"tail\"}\n")?;
            stream.set_nonblocking(true)?;
            clients.push(Client { stream, line: Vec::new(), events: 0, missed: 0 });
        }
        let taken = || Ok(socket.clients()? >= count);
        wait_until("the daemon takes all clients", Duration::from_secs(20), taken)?;
        let is_over = Arc::new(AtomicBool::new(false));
        let flag = is_over.clone();
        let reader = thread::spawn(move || read(clients, &flag));
        Ok(Self { is_over, reader })
    }

    /// Says that nothing more will happen; returns what each was told up to then.
    pub(crate) fn stop(self) -> Result<Vec<Client>> {
        self.is_over.store(true, Ordering::Relaxed);
        self.reader.join().map_err(|_| anyhow!("the reader of the clients panicked"))?
    }
}

fn read(mut clients: Vec<Client>, is_over: &AtomicBool) -> Result<Vec<Client>> {
    let mut buffer = vec![0; 1 << 16];
    loop {
        let fds = clients.iter().map(|it| PollFd::new(it.stream.as_fd(), PollFlags::POLLIN));
        let mut fds: Vec<_> = fds.collect();
        let ready = poll(&mut fds, PollTimeout::try_from(QUIET)?).context("wait for the daemon")?;
        if ready == 0 && is_over.load(Ordering::Relaxed) {
            return Ok(clients);
        }
        let is_ready: Vec<_> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        for (client, _) in clients.iter_mut().zip(is_ready).filter(|(_, is_ready)| *is_ready) {
            match client.stream.read(&mut buffer) {
                Ok(0) => return Err(anyhow!("the daemon has closed the connection of a client")),
                Ok(len) => client.take(&buffer[..len])?,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("read from the daemon"),
            }
        }
    }
}

impl Client {
    fn take(&mut self, mut bytes: &[u8]) -> Result<()> {
        while let Some(end) = bytes.iter().position(|&byte| byte == b'\n') {
            self.line.extend(&bytes[..end]);
            bytes = &bytes[end + 1..];
            let line = std::mem::take(&mut self.line);
            self.count(&line)?;
        }
        self.line.extend(bytes);
        Ok(())
    }

    fn count(&mut self, line: &[u8]) -> Result<()> {
        const STALL: &[u8] = br#","stall":{"#;
        const TIMED: &[u8] = br#"{"time":"#;
        if !line.starts_with(TIMED) {
            let notice: Value = serde_json::from_slice(line).context("a line of the daemon")?;
            self.missed += notice["missed"].as_u64().unwrap_or_default();
        } else if !line[..line.len().min(64)].windows(STALL.len()).any(|it| it == STALL) {
            self.events += 1;
        }
        Ok(())
    }
}
