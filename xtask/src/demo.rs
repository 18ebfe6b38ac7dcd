//! The demonstration: the real bug of this machine's kernel, seen, proved and cured.

use std::{
    io::{BufRead, BufReader, Read},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc,
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, Uid},
};
use vxcsum_tests::{
    capture::{Capture, Direction},
    counters,
    lab::{Lab, LabConfig, NIC, Nat, OuterSum, VXLAN},
    netns,
    traffic::{TcpServer, send_small, try_connect},
};

use crate::{
    build, process, root,
    setup::{self, Goal},
    vm,
};

/// Where the program that is to be shown is handed to ourselves, run as root.
const BINARY_VARIABLE: &str = "VXCSUM_BIN";
/// Long enough for three lost SYNs: they are sent after 0, 1 and 3 seconds.
const PATIENCE: Duration = Duration::from_secs(4);
/// Long enough for seven SYNs, the last of which follows 63 seconds after the first.
const SEVEN_SYNS: Duration = Duration::from_mins(2);
/// For what should happen at once.
const AT_ONCE: Duration = Duration::from_secs(10);
/// The port that the connection goes to, that of `CoreDNS`'s metrics as in the first report of the bug.
const SERVICE_PORT: u16 = 9153;
/// The port of the tunnel.
const VXLAN_PORT: u16 = 8472;

/// Shows the bug and the cure in a lab of two network namespaces: the bug of this machine's kernel,
/// or the one of the first reports in a virtual machine.
pub(crate) fn run(original_bug: bool) -> Result<()> {
    if original_bug && !vm::is_inside() {
        return vm::demo();
    }
    if !vm::is_inside() {
        setup::run(&[Goal::Build, Goal::Demo])?;
    }
    let binary = match std::env::var_os(BINARY_VARIABLE) {
        Some(binary) => PathBuf::from(binary),
        None => build::release()?,
    };
    if !Uid::effective().is_root() {
        return again_as_root(&binary);
    }
    ctrlc::set_handler(|| {
        netns::remove_own();
        // Where vxcsum did not come to it, having been killed with its namespace.
        let _ = std::fs::remove_file(socket());
        eprintln!("\ninterrupted; what the demo made is removed");
        std::process::exit(130);
    })
    .context("cannot catch Ctrl-C")?;
    if original_bug { show_original_bug(&binary) } else { show(&binary) }
}

/// Network namespaces need root; what cargo builds must not belong to root.
fn again_as_root(binary: &Path) -> Result<()> {
    let own = std::env::current_exe().context("cannot tell the path of xtask")?;
    let binary = binary.to_string_lossy();
    let mut command =
        root::command("the demo", &[(BINARY_VARIABLE, &binary)], &own.to_string_lossy())?;
    process::run(command.arg("demo"))
}

fn show(binary: &Path) -> Result<()> {
    let nat = Nat::Masquerade { random_fully: true };
    let demo = Demo::new(binary, LabConfig { nat, ..LabConfig::default() })?;
    demo.setting()?;
    demo.stall()?;
    demo.cure("zero", "write 0 (\"no checksum\") into what is proved to be broken")?;
    demo.cure("restore", "write the sum that the device should have sent")?;
    drop(demo);
    // With a NIC that fills in sums, as in the field: they are still open where tcpdump looks.
    Demo::new(binary, LabConfig { nic_offload: true, ..LabConfig::default() })?.false_alarm()?;
    heading("Removed: the namespaces, with all rules and devices in them.");
    Ok(())
}

/// Inside of the virtual machine.
fn show_original_bug(binary: &Path) -> Result<()> {
    let config = LabConfig {
        // As CNIs on RHEL 7 and many others have it.
        outer_sum: OuterSum::Zero,
        nat: Nat::KubeProxy,
        // Without it, each SYN that is sent again leaves by another port, and the third passes.
        srcport: Some((40000, 40001)),
        ..LabConfig::default()
    };
    let demo = Demo::new(binary, config)?;
    demo.setting()?;
    say("NAT in this kernel is as it was before commit ea64d8d6c675 (Linux 5.7). The VXLAN device");
    say(
        "sends no checksums; its source port is pinned, so that the kernel takes what is sent again",
    );
    say("for the same flow.");
    demo.minute()?;
    // The kernel remembers of the tunnel's flow that the last packet needed no NAT.
    demo.lab.enable_nat(demo.lab.config.nat)?;
    demo.cure("zero", "write 0 (\"no checksum\"), which is what the device had sent")?;
    demo.lab.enable_nat(demo.lab.config.nat)?;
    demo.cure("restore", "write what the device should have sent, which is the same here")
}

struct Demo<'a> {
    binary: &'a Path,
    server: TcpServer,
    lab: Lab,
}

impl<'a> Demo<'a> {
    fn new(binary: &'a Path, config: LabConfig) -> Result<Self> {
        let lab = config.start().context("cannot make the two nodes")?;
        let server = TcpServer::start(&lab.b, (lab.inner_b(), SERVICE_PORT).into())?;
        Ok(Self { binary, server, lab })
    }

    fn service(&self) -> SocketAddr {
        self.server.address()
    }

    fn setting(&self) -> Result<()> {
        heading("Two nodes of a cluster, made of network namespaces on this kernel");
        let kernel = process::capture(Command::new("uname").arg("-sr"))?;
        say(&format!(
            "{}; sender {} and receiver {}, a VXLAN device {VXLAN} over {NIC} on each.",
            String::from_utf8_lossy(&kernel.stdout).trim(),
            self.lab.outer_a(),
            self.lab.outer_b(),
        ));
        say(
            "The sender's NAT rules, as kube-proxy and a CNI leave them. The mark is meant for the",
        );
        say("inner packet, outlives the encapsulation, and the tunnel packet is masqueraded too:");
        for (table, chain) in [("mangle", "OUTPUT"), ("nat", "OUTPUT"), ("nat", "POSTROUTING")] {
            let rules = self.lab.a.run(&format!("iptables -t {table} -S {chain}"))?;
            for rule in rules.lines().filter(|rule| rule.starts_with("-A")) {
                quote(&format!("iptables -t {table} {rule}"));
            }
        }
        Ok(())
    }

    /// The bug, and what vxcsum says of it.
    fn stall(&self) -> Result<()> {
        heading(&format!("A TCP connection to {}, watched by vxcsum", self.service()));
        let watching = Watching::start(self.binary, &self.lab, &[])?;
        let before = self.receiver_drops()?;
        let connected = self.connect(PATIENCE)?;
        let drops = self.receiver_drops()? - before;
        let events = watching.stop()?;
        ensure!(
            connected.is_none() && events > 0,
            "the connection did not stall: this kernel does not have the bug"
        );
        say(&format!("Receiver: Udp InCsumErrors rose by {drops}. It drops each SYN in silence."));
        Ok(())
    }

    /// The stall in its full length.
    fn minute(&self) -> Result<()> {
        heading(&format!(
            "A TCP connection to {}, watched by vxcsum; this takes a minute",
            self.service()
        ));
        let watching = Watching::start(self.binary, &self.lab, &[])?;
        let connected = self.connect(SEVEN_SYNS)?;
        let drops = self.receiver_drops()?;
        let events = watching.stop()?;
        ensure!(
            connected.is_some_and(|time| time > PATIENCE) && events > 0,
            "the connection did not stall: this kernel does not have the bug"
        );
        say(&format!("Receiver: Udp InCsumErrors rose by {drops}. It drops each SYN in silence."));
        say("The last SYN passes because the kernel has forgotten by then that it did NAT.");
        Ok(())
    }

    /// The same connection with a fix mode.
    fn cure(&self, mode: &str, what: &str) -> Result<()> {
        heading(&format!("The same connection with --fix {mode}: {what}"));
        let watching = Watching::start(self.binary, &self.lab, &["--fix", mode])?;
        // While it watches: the last connection may still be saying goodbye before, unfixed.
        let before = self.receiver_drops()?;
        let connected = self.connect(PATIENCE)?;
        let drops = self.receiver_drops()? - before;
        watching.stop()?;
        ensure!(connected.is_some(), "the connection stalls with --fix {mode} as well");
        say(&format!("Receiver: Udp InCsumErrors rose by {drops}."));
        Ok(())
    }

    /// What makes people chase the wrong packets: a capture on the sender.
    fn false_alarm(&self) -> Result<()> {
        heading("Healthy nodes: no NAT, NICs that fill in checksums. What does tcpdump say?");
        let before = self.receiver_drops()?;
        let watching = Watching::start(self.binary, &self.lab, &[])?;
        let capture = Capture::start(&self.lab.a, NIC, Direction::Out)?;
        self.connect(PATIENCE)?;
        send_small(&self.lab.a, self.service(), 3, 100, AT_ONCE)?;
        let recording = capture.stop()?;
        let events = watching.stop()?;
        let drops = self.receiver_drops()? - before;
        let verdicts = recording.tcpdump_verdicts(VXLAN_PORT)?;
        say("sender# tcpdump -vv, of the very same packets:");
        let text = recording.tcpdump_text()?;
        for line in text.lines().filter(|line| line.contains("bad udp cksum")).take(3) {
            quote(line.trim());
        }
        say(&format!("tcpdump on the sender calls {} of these packets bad.", verdicts.bad));
        say(&format!(
            "vxcsum reports {events} broken, and the receiver dropped {drops}: their outer"
        ));
        say("sums are right. tcpdump adds up inner sums that the NIC has yet to fill in.");
        Ok(())
    }

    fn connect(&self, patience: Duration) -> Result<Option<Duration>> {
        let connected = try_connect(&self.lab.a, self.service(), patience)?;
        let service = self.service();
        match connected {
            Some(time) if time > Duration::from_secs(1) => {
                say(&format!("connect {service}: connected after {:.1} s", time.as_secs_f64()));
            }
            Some(time) => {
                let milliseconds = time.as_secs_f64() * 1e3;
                say(&format!("connect {service}: connected after {milliseconds:.1} ms"));
            }
            None => {
                say(&format!(
                    "connect {service}: no answer, gave up after {} s",
                    patience.as_secs()
                ));
            }
        }
        Ok(connected)
    }

    fn receiver_drops(&self) -> Result<u64> {
        Ok(counters::udp(&self.lab.b, self.lab.config.outer)?.in_csum_errors)
    }
}

/// `vxcsum run` on the sender, its output shown as it comes.
struct Watching {
    child: Child,
    stdout: JoinHandle<usize>,
    stderr: JoinHandle<usize>,
}

impl Watching {
    /// Returns when it watches.
    fn start(binary: &Path, lab: &Lab, options: &[&str]) -> Result<Self> {
        let mut arguments = vec!["run", "--interface", NIC, "--port", "8472"];
        arguments.extend(options);
        say(&format!("sender# vxcsum {}", arguments.join(" ")));
        let mut child = lab
            .a
            .command(binary)
            .args(arguments)
            // Out of the way of a vxcsum that runs on this machine.
            .arg("--socket")
            .arg(socket())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {}", binary.display()))?;
        let (ready, is_ready) = mpsc::channel();
        let stdout = child.stdout.take().context("no output of vxcsum")?;
        let stderr = child.stderr.take().context("no messages of vxcsum")?;
        let watching = Self {
            child,
            stdout: quote_lines(stdout, |_| ()),
            stderr: quote_lines(stderr, move |line| {
                if line.starts_with("watching ") {
                    // Fails if nobody waits any more.
                    let _ = ready.send(());
                }
            }),
        };
        if is_ready.recv_timeout(AT_ONCE).is_err() {
            let (status, _) = watching.end()?;
            bail!("vxcsum did not start ({status}), see its messages above");
        }
        Ok(watching)
    }

    /// Ends it as Ctrl-C would. Returns how many events it printed.
    fn stop(self) -> Result<usize> {
        let (status, events) = self.end()?;
        ensure!(status.success(), "vxcsum ended with {status}");
        Ok(events)
    }

    fn end(mut self) -> Result<(ExitStatus, usize)> {
        // `ip netns exec` has become the program: the signal reaches vxcsum itself.
        let pid = Pid::from_raw(i32::try_from(self.child.id()).context("pid out of range")?);
        // Fails if it has ended by itself, which its status then tells.
        let _ = kill(pid, Signal::SIGINT);
        let status = self.child.wait().context("cannot wait for vxcsum")?;
        let events = self.stdout.join().unwrap_or_default();
        let _ = self.stderr.join();
        Ok((status, events))
    }
}

/// Where the demo's vxcsum listens.
fn socket() -> PathBuf {
    std::env::temp_dir().join(format!("vxcsum-demo-{}.sock", std::process::id()))
}

/// Shows lines as they come. Returns how many of them were events: those start with the time.
fn quote_lines(
    source: impl Read + Send + 'static,
    see: impl Fn(&str) + Send + 'static,
) -> JoinHandle<usize> {
    thread::spawn(move || {
        let mut events = 0;
        for line in BufReader::new(source).lines().map_while(std::result::Result::ok) {
            quote(&line);
            see(&line);
            events += usize::from(line.starts_with(|first: char| first.is_ascii_digit()));
        }
        events
    })
}

fn heading(text: &str) {
    println!("\n== {text}");
}

fn say(text: &str) {
    println!("   {text}");
}

fn quote(text: &str) {
    println!("     | {text}");
}
