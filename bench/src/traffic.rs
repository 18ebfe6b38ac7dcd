//! What healthy traffic through a VXLAN loses by being watched, and by what people do instead.

use std::fs;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::errno::Errno;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrIn, sendmmsg};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;
use serde_json::Value;
use vxcsum_tests::folder::Folder;
use vxcsum_tests::lab::{Lab, LabConfig, NIC, VXLAN};
use vxcsum_tests::netns::NetNs;
use vxcsum_tests::wait::{wait_for, wait_until};

use crate::effort::{Effort, interleaved};
use crate::report::{Findings, Limit, Panel, Series};
use crate::usage;
use crate::vxcsum::Vxcsum;

/// What is to be left of the traffic (product.md §6).
const REACH_TCP: f64 = 0.99;
const REACH_PACKETS: f64 = 0.98;

const TCP: Duration = Duration::from_millis(1200);
const PACKETS: Duration = Duration::from_millis(700);
/// Until connections are at speed and queues are full.
const SETTLE: Duration = Duration::from_millis(200);
/// Data of a small packet: some 160 bytes on the wire.
const SMALL: usize = 64;
/// Where senders run; receivers run on the next one, where there is one.
const SENDER_CPU: usize = 0;

const WITHOUT: &str = "without";

/// What is done to the traffic.
#[derive(Debug, Clone, Copy)]
enum Subject {
    Without,
    Vxcsum(&'static str, &'static [&'static str]),
    Cure,
    Nft,
    Tcpdump,
}

const SUBJECTS: [Subject; 7] = [
    Subject::Without,
    Subject::Vxcsum("vxcsum, tcx", &["--attach", "tcx"]),
    Subject::Vxcsum("vxcsum, clsact", &["--attach", "clsact"]),
    Subject::Vxcsum("vxcsum --fix restore", &["--fix", "restore"]),
    Subject::Cure,
    Subject::Nft,
    Subject::Tcpdump,
];

impl Subject {
    const fn name(self) -> &'static str {
        match self {
            Self::Without => WITHOUT,
            Self::Vxcsum(name, _) => name,
            Self::Cure => "ethtool -K, checksum offload off",
            Self::Nft => "nft, udp checksum set 0",
            Self::Tcpdump => "tcpdump -s 128 -w FILE",
        }
    }

    /// How the README names it.
    fn quoted(self) -> Option<&'static str> {
        match self {
            Self::Vxcsum(_, ["--attach", "tcx"]) => Some("watched by vxcsum"),
            Self::Cure => Some("with checksum offload off (`ethtool -K`) instead"),
            Self::Tcpdump => Some("with tcpdump writing headers instead"),
            _ => None,
        }
    }

    const fn is_vxcsum(self) -> bool {
        matches!(self, Self::Vxcsum(..))
    }
}

/// One measurement.
#[derive(Debug, Clone, Copy)]
struct Sample {
    /// Of what is measured, a second.
    rate: f64,
    /// Of all cores, in cores.
    machine: f64,
    /// Of what watches, in percent of one core.
    watcher: f64,
}

/// Measures TCP and small packets.
pub(crate) fn measure(effort: Effort) -> Result<Findings> {
    let lab = lab()?;
    let server = Server::start(&lab)?;
    let tcp = interleaved("traffic, TCP", effort, &SUBJECTS, |&subject| {
        watched(&lab, subject, |pid| bulk(&lab, effort.duration(TCP), pid))
    })?;
    drop(server);
    close_door(&lab)?;
    let packets = interleaved("traffic, small packets", effort, &SUBJECTS, |&subject| {
        watched(&lab, subject, |pid| small(&lab, effort.duration(PACKETS), pid))
    })?;

    let mut findings = Findings::default();
    for (what, unit, samples, reach) in [
        ("TCP", "Gbit/s", tcp, REACH_TCP),
        ("Small packets", "packets/s of a processor", packets, REACH_PACKETS),
    ] {
        findings.panel(panel(what, unit, &samples, Some(reach), |sample| sample.rate));
        let title = format!("{what}: processors busy");
        findings.panel(panel(&title, "cores", &samples, None, |sample| sample.machine));
        let title = format!("{what}: the watching process");
        let mut watcher = panel(&title, "% of a core", &samples, None, |sample| sample.watcher);
        watcher.series.retain(|series| {
            SUBJECTS.iter().any(|subject| {
                subject.name() == series.name
                    && matches!(subject, Subject::Vxcsum(..) | Subject::Tcpdump)
            })
        });
        findings.panel(watcher);
    }
    findings.note(
        "Two namespaces, joined by a veth pair with all its offload on, and a VXLAN between them: \
         like a NIC with checksum and segmentation offload, it costs the sender's processor nothing \
         per byte, which leaves the cost of watching the least to hide behind. All packets are \
         healthy, so `--fix restore` has nothing to write.",
    );
    findings.note(format!(
        "TCP is one connection of iperf3, sender and receiver on a processor each. Small packets \
         are UDP with {SMALL} bytes of data, by sendmmsg() from one processor; the far NIC drops \
         them at once, so that all the time is the sender's. Ratios are taken within a repetition, \
         of which every other one goes through the rows backwards."
    ));
    findings.note(
        "`ethtool -K flannel.1 tx-checksum-ip-generic off` is the common cure. The nft rule breaks \
         packets that are still to be cut or summed up (a veth does neither); it stands for what a \
         rule costs.",
    );
    Ok(findings)
}

/// A lab whose NICs leave all sums and all cutting to hardware that is not there.
fn lab() -> Result<Lab> {
    let lab = LabConfig::default().start()?;
    for ns in [&lab.a, &lab.b] {
        ns.run(&format!("ethtool -K {NIC} tx on tso on gso on"))?;
    }
    Ok(lab)
}

/// From now on the receiver's NIC takes nothing.
fn close_door(lab: &Lab) -> Result<()> {
    let hook = format!("{{ type filter hook ingress device {NIC} priority 0; policy drop; }}");
    lab.b.run("nft add table netdev door")?;
    lab.b.run(&format!("nft add chain netdev door shut {hook}")).map(drop)
}

/// With `reach`, as ratios to what is without.
fn panel(
    title: &str,
    unit: &str,
    samples: &[Vec<Sample>],
    reach: Option<f64>,
    value: fn(&Sample) -> f64,
) -> Panel {
    let mut panel = Panel::new(title, unit);
    let mut without = None;
    for (subject, samples) in SUBJECTS.into_iter().zip(samples) {
        let mut series = Series::new(subject.name(), samples.iter().map(value).collect());
        match (&without, reach) {
            (None, _) => without = Some(series.clone()),
            (Some(without), Some(reach)) => {
                series = series.against(without);
                if subject.is_vxcsum() {
                    series = series.reach_ratio(Limit::AtLeast, reach);
                }
                if let Some(how) = subject.quoted() {
                    series = series.quote(&format!("{title}, {how}"));
                }
            }
            _ => {}
        }
        panel.push(series);
    }
    panel
}

/// Does to the lab what the subject does, measures, and undoes it. `measure` gets the process that
/// watches, if any.
fn watched(
    lab: &Lab,
    subject: Subject,
    measure: impl FnOnce(Option<u32>) -> Result<Sample>,
) -> Result<Sample> {
    match subject {
        Subject::Without => measure(None),
        Subject::Vxcsum(_, options) => {
            let vxcsum = Vxcsum::start(&lab.a, &[NIC], options)?;
            vxcsum.wait_ready()?;
            let sample = measure(Some(vxcsum.pid()))?;
            vxcsum.stop()?;
            // It leaves the qdisc that it has made, and the next one is to find none.
            if options.contains(&"clsact") {
                lab.a.run(&format!("tc qdisc del dev {NIC} clsact"))?;
            }
            Ok(sample)
        }
        Subject::Cure => {
            let turn = |how| lab.a.run(&format!("ethtool -K {VXLAN} tx-checksum-ip-generic {how}"));
            turn("off")?;
            let sample = measure(None);
            turn("on")?;
            sample
        }
        Subject::Nft => {
            let port = lab.config.dstport;
            for command in [
                "add table ip vxcsum_bench".to_owned(),
                "add chain ip vxcsum_bench post { type filter hook postrouting priority 300; }"
                    .to_owned(),
                format!("add rule ip vxcsum_bench post udp dport {port} udp checksum set 0"),
            ] {
                lab.a.run(&format!("nft {command}"))?;
            }
            let sample = measure(None);
            lab.a.run("nft delete table ip vxcsum_bench")?;
            sample
        }
        Subject::Tcpdump => {
            let folder = Folder::new()?;
            let tcpdump = Tcpdump::start(&lab.a, &folder)?;
            measure(Some(tcpdump.0.id()))
        }
    }
}

/// A running tcpdump as people run it, killed on drop.
struct Tcpdump(Child);

impl Tcpdump {
    fn start(ns: &NetNs, folder: &Folder) -> Result<Self> {
        let log = folder.path().join("log");
        let mut command = ns.command("tcpdump");
        command.args(["-Z", "root", "-n", "-i", NIC, "-s", "128", "-w"]);
        command.arg(folder.path().join("capture.pcap"));
        command.stdin(Stdio::null()).stderr(fs::File::create(&log)?);
        let tcpdump = Self(command.spawn().context("start tcpdump")?);
        wait_until("tcpdump listens", Duration::from_secs(5), || {
            Ok(fs::read_to_string(&log)?.contains("listening on"))
        })?;
        Ok(tcpdump)
    }
}

impl Drop for Tcpdump {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Processor time between two instants.
struct Busy {
    start: Instant,
    machine: Duration,
    watcher: Duration,
    pid: Option<u32>,
}

impl Busy {
    fn start(pid: Option<u32>) -> Result<Self> {
        let watcher = pid.map(usage::process_busy).transpose()?.unwrap_or_default();
        Ok(Self { start: Instant::now(), machine: usage::machine_busy()?, watcher, pid })
    }

    /// With this rate.
    fn stop(self, rate: f64) -> Result<Sample> {
        let took = self.start.elapsed().as_secs_f64();
        let watcher = self.pid.map(usage::process_busy).transpose()?.unwrap_or_default();
        let share = |after: Duration, before| after.saturating_sub(before).as_secs_f64() / took;
        Ok(Sample {
            rate,
            machine: share(usage::machine_busy()?, self.machine),
            watcher: 100.0 * share(watcher, self.watcher),
        })
    }
}

const IPERF_PORT: &str = "5201";

/// A running `iperf3 -s`, killed on drop.
struct Server(Child);

impl Server {
    fn start(lab: &Lab) -> Result<Self> {
        let mut command = lab.b.command("iperf3");
        command.args(["-s", "-p", IPERF_PORT]).stdin(Stdio::null()).stdout(Stdio::null());
        let server = Self(command.spawn().context("start iperf3")?);
        wait_until("iperf3 listens", Duration::from_secs(5), || {
            Ok(lab.b.run("ss -Hltn")?.contains(&format!(":{IPERF_PORT}")))
        })?;
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.0.id().cast_signed()), Signal::SIGTERM);
        let _ = self.0.wait();
    }
}

/// One connection; Gbit/s from when it is at speed.
fn bulk(lab: &Lab, duration: Duration, pid: Option<u32>) -> Result<Sample> {
    let (from, to) = (SENDER_CPU, (SENDER_CPU + 1) % cpus()?);
    let mut command = lab.a.command("iperf3");
    command.args(["-c", &lab.inner_b().to_string(), "-p", IPERF_PORT, "-J", "-i", "0.1"]);
    command.args(["-A", &format!("{from},{to}")]);
    command.args(["-t", &format!("{:.1}", (SETTLE + duration).as_secs_f64())]);
    // The server may not be through with the connection before.
    let (busy, answer) = wait_for("iperf3 has time", Duration::from_secs(5), || {
        let busy = Busy::start(pid)?;
        let output = command.output().context("cannot start iperf3")?;
        let answer: Value = serde_json::from_slice(&output.stdout).context("iperf3's answer")?;
        let is_busy = answer["error"].as_str().is_some_and(|error| error.contains("busy"));
        ensure!(output.status.success() || is_busy, "iperf3: {}", answer["error"]);
        Ok((!is_busy).then_some((busy, answer)))
    })?;
    let seconds = |interval: &Value, name: &str| interval[name].as_f64().unwrap_or_default();
    let intervals = answer["intervals"].as_array().context("iperf3 tells of no interval")?;
    let (mut bytes, mut took) = (0.0, 0.0);
    for interval in intervals.iter().map(|interval| &interval["sum"]) {
        if seconds(interval, "start") >= SETTLE.as_secs_f64() - 0.01 {
            bytes += seconds(interval, "bytes");
            took += seconds(interval, "seconds");
        }
    }
    ensure!(took > 0.0, "iperf3 tells of no interval after the first {SETTLE:?}");
    busy.stop(8.0 * bytes / took / 1e9)
}

/// Datagrams from one processor as fast as it can; packets a second of that processor's time, which
/// is that of the clock unless others want the processor, too.
fn small(lab: &Lab, duration: Duration, pid: Option<u32>) -> Result<Sample> {
    let to = SocketAddr::from((lab.inner_b(), 9));
    lab.a.enter(|| {
        let mut cpu = CpuSet::new();
        cpu.set(SENDER_CPU)?;
        sched_setaffinity(Pid::from_raw(0), &cpu).context("stay on one processor")?;
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.connect(to)?;
        send_for(&socket, SETTLE)?;
        let busy = Busy::start(pid)?;
        let cpu_time =
            || anyhow::Ok(Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?));
        let before = cpu_time()?;
        let sent = send_for(&socket, duration)?;
        busy.stop(sent as f64 / cpu_time()?.saturating_sub(before).as_secs_f64())
    })
}

/// How many could be sent.
fn send_for(socket: &UdpSocket, duration: Duration) -> Result<usize> {
    const BATCH: usize = 64;
    let data = [0x5a; SMALL];
    let slices = [[std::io::IoSlice::new(&data)]; BATCH];
    let nowhere_else: [Option<SockaddrIn>; BATCH] = [None; BATCH];
    let mut headers = MultiHeaders::preallocate(BATCH, None);
    let (end, mut sent) = (Instant::now() + duration, 0);
    while Instant::now() < end {
        let flags = MsgFlags::empty();
        let fd = socket.as_raw_fd();
        match sendmmsg(fd, &mut headers, &slices, nowhere_else, [], flags) {
            Ok(results) => sent += results.count(),
            Err(Errno::ENOBUFS) => {}
            Err(error) => return Err(error).context("send datagrams"),
        }
    }
    Ok(sent)
}

fn cpus() -> Result<usize> {
    Ok(std::thread::available_parallelism()?.get())
}
