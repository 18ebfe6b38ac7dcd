//! The vxcsum binary at work inside a namespace.

use std::collections::BTreeMap;
use std::env;
use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead as _, BufReader, Read};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Deserializer};

use crate::client::Socket;
use crate::netns::NetNs;
use crate::sh;
use crate::wait::wait_for;

/// For the start and for the end; both take a fraction of it. In an emulated and busy machine, old
/// kernels take a minute and more to verify the program.
const TIMEOUT: Duration = Duration::from_secs(30);

/// The binary under test: `$VXCSUM_BIN`, or what `cargo xtask build` leaves in the workspace.
pub fn binary() -> Result<PathBuf> {
    let path = match env::var_os("VXCSUM_BIN") {
        Some(path) => PathBuf::from(path),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/release/vxcsum"),
    };
    path.canonicalize().with_context(|| {
        format!(
            "no vxcsum binary at {}: build it with `cargo xtask build`, or name one in VXCSUM_BIN",
            path.display()
        )
    })
}

/// The transport to run every daemon over, `ring` or `perf`, from `$VXCSUM_TRANSPORT`; vxcsum chooses
/// where it is not set.
pub fn transport() -> Option<String> {
    env::var("VXCSUM_TRANSPORT").ok()
}

/// Whether packets on the wire can be counted, not only what the stack hands down: not over perf
/// buffers, which are for kernels that do not tell.
pub fn counts_segments() -> bool {
    transport().is_none_or(|transport| transport == "ring")
}

impl Event {
    /// Whether the packet was still to be cut. The number of segments is known then, or known not to
    /// be.
    pub fn is_gso(&self) -> bool {
        match self.segments {
            Some(segments) => counts_segments() && segments > 1,
            None => !counts_segments(),
        }
    }
}

/// How a program that ran to its end has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// Exit code; none if a signal ended it.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// Runs a command that should end by itself; it is killed and that is an error if it does not.
pub fn run_to_end(command: &mut Command, timeout: Duration) -> Result<Ended> {
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let stdout = child.stdout.take().map(collect);
    let stderr = child.stderr.take().map(collect);
    let status = sh::poll(timeout, || Ok(child.try_wait()?))?;
    if status.is_none() {
        child.kill()?;
        child.wait()?;
    }
    let text = |thread: Option<JoinHandle<String>>| {
        thread.and_then(|thread| thread.join().ok()).unwrap_or_default()
    };
    let (stdout, stderr) = (text(stdout), text(stderr));
    let Some(status) = status else {
        bail!("still running after {timeout:?}; stdout {stdout:?}, stderr {stderr:?}");
    };
    Ok(Ended { code: status.code(), stdout, stderr })
}

fn collect(mut pipe: impl Read + Send + 'static) -> JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// What the summary says, its last line of standard output.
#[derive(Debug, Clone, Deserialize)]
pub struct Summary {
    /// Fix mode.
    pub fix: String,
    /// What became of the events.
    pub events: Events,
    /// Counters of each watched interface.
    pub interfaces: Vec<Interface>,
    /// Connections that wait.
    pub stalls: Stalls,
    /// What was dropped on its way in.
    pub receive: Receive,
}

/// Packets dropped for their UDP checksum.
#[derive(Debug, Clone, Deserialize)]
pub struct Receive {
    /// Whether they are watched.
    pub attached: bool,
    /// Why not.
    pub why: Option<String>,
    /// VXLAN packets.
    pub dropped: u64,
    /// Others.
    pub not_vxlan: u64,
    /// What became of their events.
    pub events: Events,
    /// VXLAN packets by sending node.
    pub peers: Vec<Peer>,
    /// What vxcsum has read of the kernel's own counters.
    pub in_csum_errors: Option<u64>,
}

/// Packets of one sending node.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Peer {
    /// Its outer address, or `other`.
    pub peer: String,
    /// How many.
    pub packets: u64,
}

/// What became of the events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Events {
    /// Written to standard output.
    pub emitted: u64,
    /// Held back by the rate limit.
    pub suppressed: u64,
    /// Lost on the way from the kernel.
    pub lost: u64,
}

/// Counters of a watched interface.
#[derive(Debug, Clone, Deserialize)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// `tcx` or `clsact`; none while it is gone.
    pub attach: Option<String>,
    /// Packets seen, before segmentation.
    pub skbs: u64,
    /// Those of them that are no VXLAN.
    pub not_vxlan: u64,
    /// By verdict, in wire segments.
    pub verdicts: BTreeMap<String, Count>,
    /// Rewritten, in wire segments.
    pub fixed: u64,
}

/// Packets and bytes on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct Count {
    /// Wire segments.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl Interface {
    /// Packets of all verdicts.
    pub fn vxlan(&self) -> Count {
        let sum = |count: fn(&Count) -> u64| self.verdicts.values().map(count).sum();
        Count { packets: sum(|count| count.packets), bytes: sum(|count| count.bytes) }
    }

    /// Packets with this verdict.
    pub fn packets(&self, verdict: &str) -> u64 {
        self.verdicts.get(verdict).map_or(0, |count| count.packets)
    }

    /// Packets with a broken outer checksum.
    pub fn broken(&self) -> u64 {
        ["mangled_zero", "stale_nat", "bad"].iter().map(|verdict| self.packets(verdict)).sum()
    }
}

impl Summary {
    /// The counters of the one interface it watched.
    pub fn interface(&self) -> Result<&Interface> {
        match self.interfaces.as_slice() {
            [interface] => Ok(interface),
            interfaces => bail!("{} interfaces, not one", interfaces.len()),
        }
    }
}

/// A broken packet, as vxcsum reports it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Event {
    /// RFC 3339.
    pub time: String,
    /// `egress` or `receive`.
    pub direction: String,
    /// The interface it left through.
    pub interface: String,
    /// The VXLAN device that sent it.
    pub device: Option<String>,
    /// VXLAN network identifier.
    pub vni: u32,
    /// One of the broken verdicts.
    pub verdict: String,
    /// `none`, `zeroed`, `restored` or `refused:` and the reason.
    pub action: String,
    /// What the field held.
    #[serde(deserialize_with = "hex")]
    pub check: u16,
    /// What the right sum is, where that is known.
    #[serde(deserialize_with = "optional_hex")]
    pub expected: Option<u16>,
    /// `headers` where that comes from headers alone.
    pub expected_from: Option<String>,
    /// What proves NAT.
    pub proof: Option<String>,
    /// The datagram that carries the packet.
    pub outer: OuterView,
    /// The packet inside.
    pub inner: InnerView,
    /// `skb->mark`
    #[serde(deserialize_with = "hex")]
    pub mark: u32,
    /// Packets on the wire; none where that is not known.
    pub segments: Option<u32>,
    /// Length in bytes, link header included.
    pub len: u32,
    /// What led to it.
    pub cause: Option<Cause>,
}

/// What led to a broken packet.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Cause {
    /// In one sentence.
    pub text: String,
    /// Source address before NAT, where that rewrote it.
    pub src_before_nat: Option<IpAddr>,
    /// Source port before NAT.
    pub sport_before_nat: Option<u16>,
    /// kube-proxy's mark is on the tunnel packet.
    pub masquerade_mark: bool,
    /// The rule that rewrote it.
    pub rule: Option<Rule>,
    /// No other may have done it.
    pub rule_certain: bool,
    /// It takes kube-proxy's mark, which this packet has not.
    #[serde(default)]
    pub mark_assumed: bool,
    /// The rule that rewrites the packet inside.
    pub inner_rule: Option<Rule>,
    /// The rule that would take the mark off.
    pub unmark_rule: Option<Rule>,
    /// What could not be read.
    pub rules_unread: Option<String>,
}

/// A rule, and where it stands.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Rule {
    /// `iptables-legacy`, `iptables-nft` or `nft`.
    pub backend: String,
    /// `ip`, `ip6` or `inet`.
    pub family: String,
    /// Table.
    pub table: String,
    /// Chain.
    pub chain: String,
    /// Number in the chain, from 1.
    pub position: usize,
    /// From the base chain to it.
    pub path: Vec<String>,
    /// The rule.
    pub text: String,
    /// Packets that it has matched.
    pub packets: Option<u64>,
}

/// Outer addresses and ports.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct OuterView {
    /// Source address.
    pub src: IpAddr,
    /// Destination address.
    pub dst: IpAddr,
    /// Source port.
    pub sport: u16,
    /// Destination port.
    pub dport: u16,
    /// Source address before NAT, where that rewrote it and it is known.
    pub src_before_nat: Option<IpAddr>,
    /// Source port before NAT, where that is known.
    pub sport_before_nat: Option<u16>,
}

/// Inner addresses and ports, as far as there are any.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct InnerView {
    /// Source address.
    pub src: Option<IpAddr>,
    /// Destination address.
    pub dst: Option<IpAddr>,
    /// `tcp`, `udp`, `icmp`, `arp`, …
    pub proto: String,
    /// Source port.
    pub sport: Option<u16>,
    /// Destination port.
    pub dport: Option<u16>,
    /// As tcpdump writes them.
    pub tcp_flags: Option<String>,
}

fn hex<'de, D: Deserializer<'de>, T: TryFrom<u32>>(deserializer: D) -> Result<T, D::Error> {
    let text = String::deserialize(deserializer)?;
    parse_hex(&text).ok_or_else(|| wrong_hex(&text))
}

fn optional_hex<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u16>, D::Error> {
    let text = Option::<String>::deserialize(deserializer)?;
    text.map(|text| parse_hex(&text).ok_or_else(|| wrong_hex(&text))).transpose()
}

fn parse_hex<T: TryFrom<u32>>(text: &str) -> Option<T> {
    let value = u32::from_str_radix(text.strip_prefix("0x")?, 16).ok()?;
    value.try_into().ok()
}

fn wrong_hex<E: serde::de::Error>(text: &str) -> E {
    E::custom(format!("{text:?} is no hexadecimal number that fits"))
}

/// Memory that a process has in use now (`VmRSS`, proc(5)).
pub fn resident_kib(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).with_context(|| path.clone())?;
    let value = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let value = value.and_then(|value| value.trim().strip_suffix(" kB")).context("no VmRSS")?;
    Ok(value.trim().parse()?)
}

/// What a running vxcsum has printed so far, a line each.
#[derive(Debug, Default)]
struct Printed {
    stdout: Mutex<Vec<String>>,
    /// Apart from the rest of standard output: they come whenever somebody waits.
    stalls: Mutex<Vec<String>>,
    stderr: Mutex<Vec<String>>,
    more: Condvar,
}

/// A running `vxcsum run --json`, killed on drop. Also a running `vxcsum tail --json`.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    printed: Arc<Printed>,
    readers: Vec<JoinHandle<()>>,
    /// The path of a socket that no test asked for, so that it is not the one that all share.
    own_socket: Option<Socket>,
}

impl Daemon {
    /// Starts it inside `ns` on `interface` and waits until it watches.
    pub fn start<S: AsRef<OsStr>>(
        ns: &NetNs,
        interface: &str,
        extra: impl IntoIterator<Item = S>,
    ) -> Result<Self> {
        let socket = Socket::new()?;
        let mut command = socket.command_in(ns, ["run", "--interface", interface, "--json"])?;
        command.args(extra);
        let mut daemon = Self::launch(command)?;
        daemon.own_socket = Some(socket);
        daemon.wait_watching()?;
        Ok(daemon)
    }

    /// Starts a command that prints lines as `vxcsum run --json` does, and waits for nothing.
    pub fn launch(mut command: Command) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("start vxcsum")?;
        let printed = Arc::new(Printed::default());
        let mut readers = Vec::new();
        if let Some(pipe) = child.stdout.take() {
            readers.push(read_lines(pipe, Arc::clone(&printed), |printed, line| {
                let is_stall = line.contains(r#","stall":{"#);
                lock(if is_stall { &printed.stalls } else { &printed.stdout }).push(line);
                printed.more.notify_all();
            }));
        }
        if let Some(pipe) = child.stderr.take() {
            readers.push(read_lines(pipe, Arc::clone(&printed), |printed, line| {
                lock(&printed.stderr).push(line);
            }));
        }
        Ok(Self { child, printed, readers, own_socket: None })
    }

    /// Waits until it says that it watches an interface.
    pub fn wait_watching(&self) -> Result<()> {
        self.wait_says(0, "watching ", TIMEOUT).map(drop)
    }

    /// Waits for a line on standard error that contains `text`, from the line numbered `from` on,
    /// and returns the number of the line after it.
    pub fn wait_says(&self, from: usize, text: &str, timeout: Duration) -> Result<usize> {
        let said = sh::poll(timeout, || {
            // Both end with the process, after everything it has printed.
            let is_over = self.readers.iter().all(JoinHandle::is_finished);
            let lines = lock(&self.printed.stderr);
            match lines.iter().skip(from).position(|line| line.contains(text)) {
                Some(at) => Ok(Some(from + at + 1)),
                None if is_over => bail!("vxcsum ended: {}", lines.join("; ")),
                None => Ok(None),
            }
        });
        let what = || format!("vxcsum does not say {text:?}: {}", self.stderr().join("; "));
        said.with_context(what)?.with_context(what)
    }

    /// How many lines it has written to standard error.
    pub fn said(&self) -> usize {
        lock(&self.printed.stderr).len()
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(self.pid().cast_signed()), signal)
            .with_context(|| format!("send {signal} to vxcsum"))
    }

    /// Memory that it has in use now.
    pub fn resident_kib(&self) -> Result<u64> {
        resident_kib(self.pid())
    }

    /// Waits for it to end by itself, and returns how, and all it has printed that was not waited
    /// for before.
    pub fn wait_end(mut self, timeout: Duration) -> Result<Ended> {
        let status = wait_for("vxcsum ends", timeout, || Ok(self.child.try_wait()?))?;
        self.join_readers()?;
        let text = |lines: &Mutex<Vec<String>>| {
            lock(lines).iter().fold(String::new(), |text, line| text + line + "\n")
        };
        let (stdout, stderr) = (text(&self.printed.stdout), text(&self.printed.stderr));
        Ok(Ended { code: status.code(), stdout, stderr })
    }

    /// What it has written to standard error.
    pub fn stderr(&self) -> Vec<String> {
        lock(&self.printed.stderr).clone()
    }

    /// The events so far.
    pub fn events(&self) -> Result<Vec<Event>> {
        parse_events(&lock(&self.printed.stdout))
    }

    /// The lines about connections that wait, so far.
    pub fn stalls(&self) -> Result<Vec<Stall>> {
        let parse = |line: &String| {
            let line: StallLine =
                serde_json::from_str(line).with_context(|| format!("not a stall: {line}"))?;
            Ok(line.stall)
        };
        lock(&self.printed.stalls).iter().map(parse).collect()
    }

    /// Waits for a line in this state, from the flow with this source port.
    pub fn wait_stall(&self, state: &str, sport: u16, timeout: Duration) -> Result<Stall> {
        wait_for(&format!("{state} of port {sport}"), timeout, || {
            let is_it = |stall: &Stall| stall.state == state && stall.sport == sport;
            Ok(self.stalls()?.into_iter().find(is_it))
        })
        .with_context(|| format!("lines: {:#?}", lock(&self.printed.stalls)))
    }

    /// The lines on standard output so far, but for those about connections that wait.
    pub fn lines(&self) -> Vec<String> {
        lock(&self.printed.stdout).clone()
    }

    /// Waits until there are `count` events or more and returns all.
    pub fn wait_events(&self, count: usize, timeout: Duration) -> Result<Vec<Event>> {
        let deadline = Instant::now() + sh::patience(timeout);
        let mut lines = lock(&self.printed.stdout);
        while lines.len() < count {
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "{} events of {count} after {timeout:?}", lines.len());
            lines = self
                .printed
                .more
                .wait_timeout(lines, left)
                .map_or_else(|poisoned| poisoned.into_inner().0, |(lines, _)| lines);
        }
        parse_events(&lines)
    }

    /// Ends it with SIGINT and returns all its events and its summary.
    pub fn stop(mut self) -> Result<(Vec<Event>, Summary)> {
        self.signal(Signal::SIGINT)?;
        let status = sh::poll(TIMEOUT, || Ok(self.child.try_wait()?))?
            .context("vxcsum does not end on SIGINT")?;
        self.join_readers()?;
        let stderr = self.stderr().join("; ");
        ensure!(status.success(), "vxcsum ended with {status}: {stderr}");
        let mut lines = lock(&self.printed.stdout);
        let last = lines.pop().with_context(|| format!("vxcsum printed no summary: {stderr}"))?;
        let last: LastLine =
            serde_json::from_str(&last).with_context(|| format!("not a summary: {last}"))?;
        Ok((parse_events(&lines)?, last.summary))
    }

    /// Ends it with SIGKILL, without a chance to clear up.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    fn join_readers(&mut self) -> Result<()> {
        for reader in self.readers.drain(..) {
            reader.join().map_err(|_| anyhow!("a reader of vxcsum's output panicked"))?;
        }
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn parse_events(lines: &[String]) -> Result<Vec<Event>> {
    let parse =
        |line: &String| serde_json::from_str(line).with_context(|| format!("not an event: {line}"));
    lines.iter().map(parse).collect()
}

#[derive(Deserialize)]
struct StallLine {
    stall: Stall,
}

/// A connection that waits or has waited, or a datagram that was lost again.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Stall {
    /// `waiting`, `connected`, `gave_up` or `lost_again`.
    pub state: String,
    /// `tcp` or `udp`.
    pub proto: String,
    /// Inner source address.
    pub src: IpAddr,
    /// Inner source port.
    pub sport: u16,
    /// Inner destination address.
    pub dst: IpAddr,
    /// Inner destination port.
    pub dport: u16,
    /// VXLAN network identifier.
    pub vni: u32,
    /// The node that drops.
    pub peer: IpAddr,
    /// The interface it leaves through.
    pub interface: String,
    /// The VXLAN device.
    pub device: Option<String>,
    /// One of the broken verdicts.
    pub verdict: String,
    /// Broken SYNs, or lost datagrams.
    pub tries: u32,
    /// RFC 3339.
    pub since: String,
    /// From the first of them on.
    pub waited_seconds: f64,
    /// Of one that waits.
    pub next_within_seconds: Option<f64>,
    /// SYNs that left whole.
    #[serde(default)]
    pub whole_tries: u32,
    /// Ended by a packet that vxcsum put right.
    #[serde(default)]
    pub fixed: bool,
    /// Ended by a reset.
    #[serde(default)]
    pub reset: bool,
    /// Of a DNS query.
    pub question: Option<Question>,
}

/// What a DNS query asks for.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Question {
    /// Name.
    pub name: String,
    /// Type.
    #[serde(rename = "type")]
    pub kind: String,
}

/// Connections that wait, and what became of the others.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Stalls {
    /// Now.
    pub waiting: Vec<Stall>,
    /// Got through.
    pub connected: u64,
    /// Gave up.
    pub gave_up: u64,
    /// Made room for others.
    pub evicted: u64,
    /// Datagrams lost again.
    pub lost_again: u64,
}

#[derive(Deserialize)]
struct LastLine {
    summary: Summary,
}

fn read_lines(
    pipe: impl Read + Send + 'static,
    printed: Arc<Printed>,
    take: impl Fn(&Printed, String) + Send + 'static,
) -> JoinHandle<()> {
    thread::spawn(move || {
        for line in BufReader::new(pipe).lines().map_while(Result::ok) {
            take(&printed, line);
        }
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
