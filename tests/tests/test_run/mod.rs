//! The loaded BPF program over single packets, and the common crate over the same packets.

use std::path::Path;

use aya::programs::{TestRun as _, TestRunOptions};
use vxcsum::program::{LoadOptions, Program};
use vxcsum::skb_layout::{self, VMLINUX_BTF};
use vxcsum::transport::{Buffer, Taken, Transport};
use vxcsum_common::fix::remedy;
use vxcsum_common::layout::{Action, Config, Counters, DeviceKey, Event, MASQUERADE_MARK, Report};
use vxcsum_common::{Captured, Device, Examined, Finding, Offload, Verdict, examine};
use vxcsum_tests::cases::{Case, counted_verdict};
use vxcsum_tests::packets::UDP_CHECK;

/// What came out for a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// The verdict; none for what is not VXLAN to a watched port.
    pub(crate) verdict: Option<Verdict>,
    /// What is told of a broken packet.
    pub(crate) report: Option<Told>,
    /// The packet in the end.
    pub(crate) after: Vec<u8>,
}

/// What is told of a broken packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Told {
    /// See [`Finding::check`].
    pub(crate) check: u16,
    /// See [`Finding::expected`].
    pub(crate) expected: u16,
    /// See [`Finding::source_port_before_nat`].
    pub(crate) source_port_before_nat: u16,
    /// See [`Finding::proof`].
    pub(crate) proof: u8,
    /// See [`Finding::policy`].
    pub(crate) policy: u8,
    /// What was done.
    pub(crate) action: u8,
}

/// Takes a case through the common crate.
pub(crate) fn in_user_space(case: &Case, offload: Offload) -> Outcome {
    let packet = Captured {
        is_raw_ip: case.frame.is_raw_ip,
        is_gso: case.segments > 1,
        offload,
        flow_hash: case.hash,
        arithmetic_proves_nat: case.mark & MASQUERADE_MARK != 0,
        ..Captured::new(&case.frame.bytes)
    };
    let examined = examine(&packet, &case.known);
    let mut after = case.frame.bytes.clone();
    let report = match &examined {
        Examined::Vxlan(finding, _) if finding.verdict.is_broken() => {
            let remedy = remedy(case.fix, case.fix_unproven, finding);
            if remedy.writes() {
                let field = finding.udp + UDP_CHECK;
                after[field..field + 2].copy_from_slice(&remedy.check.to_be_bytes());
            }
            Some(told(finding, remedy.action))
        }
        _ => None,
    };
    Outcome { verdict: counted_verdict(&examined), report, after }
}

fn told(finding: &Finding, action: Action) -> Told {
    Told {
        check: finding.check,
        expected: finding.expected,
        source_port_before_nat: finding.source_port_before_nat,
        proof: finding.proof as u8,
        policy: finding.policy as u8,
        action: action as u8,
    }
}

/// A way for a packet to come before the program.
pub(crate) trait Way {
    /// Whether the packet can come that way, with its sums in that state.
    fn takes(&self, case: &Case, offload: Offload) -> bool;

    /// Passes the packet through the program; returns it as it is afterwards.
    fn pass(&mut self, program: &mut Program, case: &Case, offload: Offload) -> Vec<u8>;
}

/// A loaded program.
pub(crate) struct Kernel<W> {
    program: Program,
    events: Vec<Buffer>,
    transport: Transport,
    /// It is told where `sk_buff` has the offload state.
    knows_offload: bool,
    counters: Counters,
    devices: Vec<(DeviceKey, Device)>,
    /// What it works by, if it has learned nothing since.
    configured: Option<Config>,
    way: W,
}

impl<W: Way> Kernel<W> {
    /// Every program there is, and what it knows of offloading.
    pub(crate) const ALL: [(Transport, bool); 3] =
        [(Transport::Ring, false), (Transport::Ring, true), (Transport::Perf, false)];

    /// Loads the program, and opens the way to it.
    pub(crate) fn load(
        (transport, knows_offload): (Transport, bool),
        way: impl FnOnce(&mut Program) -> W,
    ) -> Self {
        assert!(nix::unistd::geteuid().is_root(), "the BPF program is for root to load");
        let skb_layout = skb_layout::read(Path::new(VMLINUX_BTF)).unwrap();
        let skb_layout = knows_offload.then_some(skb_layout);
        let options = LoadOptions { transport, skb_layout, ..LoadOptions::default() };
        let (mut program, events) = Program::load(&options).unwrap();
        let way = way(&mut program);
        let counters = program.counters().unwrap();
        Self {
            program,
            events,
            transport,
            knows_offload,
            counters,
            devices: Vec::new(),
            configured: None,
            way,
        }
    }

    /// The states of its sums in which the packet can come before the program.
    pub(crate) fn states(&self, case: &Case) -> Vec<Offload> {
        let is_told = |offload| (offload != Offload::Unknown) == self.knows_offload;
        let states = case.offloads.iter().copied();
        states.filter(|&state| is_told(state) && self.way.takes(case, state)).collect()
    }

    /// Configures the program.
    pub(crate) fn configure(&mut self, case: &Case) {
        if self.devices != case.known.devices {
            for (key, _) in self.devices.drain(..) {
                self.program.remove_device(key).unwrap();
            }
            for &(key, device) in &case.known.devices {
                self.program.set_device(key, device).unwrap();
            }
            self.devices.clone_from(&case.known.devices);
        }
        let config = case.config().unwrap();
        if self.configured != Some(config) {
            self.program.configure(&config).unwrap();
            self.configured = Some(config);
        }
    }

    /// What the program works by, with what it has learned.
    pub(crate) fn config(&self) -> Config {
        self.program.config().unwrap()
    }

    /// Runs the program over a packet and checks what holds for every packet.
    pub(crate) fn run(&mut self, case: &Case, offload: Offload) -> Outcome {
        let name = &case.name;
        let config = self.configured.take().unwrap_or_else(|| self.config());
        let after = self.way.pass(&mut self.program, case, offload);
        let counters = self.program.counters().unwrap();
        let on_wire = OnWire::of(case, self.transport);
        let verdict = counted(&self.counters, &counters, case, on_wire);
        let is_broken = verdict.is_some_and(Verdict::is_broken);
        let now = self.config();
        if is_broken || verdict.is_none() {
            assert_eq!(now, config, "{name}: it teaches nothing");
        }
        self.configured = (now == config).then_some(config);
        let events = self.events();
        assert_eq!(events.len(), usize::from(is_broken), "{name}: events");
        let report = events.first().map(|event| told_by(event, case, on_wire, offload, verdict));
        let action = report.and_then(|told| Action::from_u8(told.action));
        let fixed = |wanted| if action == Some(wanted) { on_wire.packets } else { 0 };
        let [zeroed, restored] = [Action::Zeroed, Action::Restored].map(fixed);
        assert_eq!(counters.zeroed - self.counters.zeroed, zeroed, "{name}: zeroed");
        assert_eq!(counters.restored - self.counters.restored, restored, "{name}: restored");
        self.counters = counters;
        Outcome { verdict, report, after }
    }

    fn events(&mut self) -> Vec<Event> {
        let mut taken = Taken::default();
        self.events.iter_mut().for_each(|buffer| buffer.take(&mut taken));
        assert_eq!(taken.lost, 0);
        taken.records.iter().map(|record| bytemuck::pod_read_unaligned(record)).collect()
    }
}

/// Checks what an event says of every broken packet; returns the rest.
fn told_by(
    event: &Event,
    case: &Case,
    on_wire: OnWire,
    offload: Offload,
    verdict: Option<Verdict>,
) -> Told {
    let (name, frame) = (&case.name, &case.frame.bytes);
    assert_eq!(Verdict::from_u8(event.verdict), verdict, "{name}");
    let len = frame.len().min(event.snapshot.len());
    assert_eq!(usize::from(event.snapshot_len), len, "{name}");
    assert_eq!(event.snapshot[..len], frame[..len], "{name}: snapshot");
    assert_eq!(event.len as usize, frame.len(), "{name}");
    assert_eq!(event.segments, on_wire.told_segments, "{name}");
    assert_eq!(event.mark, case.mark, "{name}");
    assert_ne!(event.boot_ns, 0, "{name}");
    let ip_summed = match offload {
        Offload::Unknown => Event::IP_SUMMED_UNKNOWN,
        // CHECKSUM_NONE and CHECKSUM_PARTIAL (include/linux/skbuff.h).
        Offload::Complete => 0,
        Offload::Partial { .. } => 3,
    };
    assert_eq!(event.ip_summed, ip_summed, "{name}");
    Told {
        check: event.check,
        expected: event.expected,
        source_port_before_nat: event.source_port_before_nat,
        proof: event.proof,
        policy: event.policy,
        action: event.action,
    }
}

/// The verdict that was counted between two readings: one, for one packet.
fn counted(before: &Counters, after: &Counters, case: &Case, on_wire: OnWire) -> Option<Verdict> {
    let name = &case.name;
    assert_eq!(after.skbs() - before.skbs(), 1, "{name}: packets counted");
    let mut counted = None;
    for verdict in Verdict::ALL {
        let (before, after) = (before.of(verdict), after.of(verdict));
        if after != before {
            assert_eq!(after.skbs - before.skbs, 1, "{name}: {}", verdict.as_str());
            let packets = after.packets() - before.packets();
            assert_eq!(packets, on_wire.packets, "{name}: packets");
            let bytes = after.bytes - before.bytes;
            assert_eq!(bytes, on_wire.bytes, "{name}: bytes");
            counted = Some(verdict);
        }
    }
    let not_vxlan = u64::from(counted.is_none());
    assert_eq!(after.not_vxlan - before.not_vxlan, not_vxlan, "{name}: not VXLAN");
    let is_broken = u64::from(counted.is_some_and(Verdict::is_broken));
    for (report, expected) in
        [(Report::Emitted, is_broken), (Report::Suppressed, 0), (Report::Lost, 0)]
    {
        let reported = after.reported(report).skbs - before.reported(report).skbs;
        assert_eq!(reported, expected, "{name}: {report:?}");
    }
    counted
}

/// What is counted of a packet, and told of its segments.
#[derive(Clone, Copy)]
struct OnWire {
    packets: u64,
    bytes: u64,
    told_segments: u32,
}

impl OnWire {
    fn of(case: &Case, transport: Transport) -> Self {
        match transport {
            Transport::Ring => Self {
                packets: case.segments.into(),
                bytes: wire_len(case).into(),
                told_segments: case.segments,
            },
            // As the stack hands it down: old kernels do not tell what becomes of it.
            Transport::Perf => Self {
                packets: 1,
                bytes: case.frame.bytes.len() as u64,
                told_segments: u32::from(case.segments == 1),
            },
        }
    }
}

/// Bytes on the wire: every segment but the first repeats the headers. How many bytes these are is
/// what the program is told.
fn wire_len(case: &Case) -> u32 {
    case.frame.bytes.len() as u32 + 120 * (case.segments - 1)
}

/// `BPF_PROG_TEST_RUN`: any length of linear skb, any mark, any number of segments; no open sum
/// and no hash.
pub(crate) struct TestRun;

impl TestRun {
    /// For [`Kernel::load`].
    pub(crate) fn open(_: &mut Program) -> Self {
        Self
    }
}

impl Way for TestRun {
    fn takes(&self, case: &Case, offload: Offload) -> bool {
        // The kernel wants the whole of a first IP header, and something behind any other, and no
        // more than a page with headroom and `skb_shared_info` (net/bpf/test_run.c).
        let min_len = match case.frame.bytes.get(12..14) {
            Some([0x08, 0x00]) => 14 + 20,
            Some([0x86, 0xdd]) => 14 + 40,
            _ => 14 + 1,
        };
        case.hash == 0
            && (min_len..=3500).contains(&case.frame.bytes.len())
            && matches!(offload, Offload::Unknown | Offload::Complete)
    }

    fn pass(&mut self, program: &mut Program, case: &Case, _: Offload) -> Vec<u8> {
        /// `TC_ACT_UNSPEC` of `include/uapi/linux/pkt_cls.h`.
        const TC_ACT_UNSPEC: u32 = u32::MAX;

        let frame = &case.frame.bytes;
        let mut after = vec![0; frame.len() + 64];
        let context = Context::new(case);
        let mut context_after = Context::default();
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut after),
            ctx_in: Some(&context.0),
            ctx_out: Some(&mut context_after.0),
            ..TestRunOptions::default()
        };
        let result = program.classifier().unwrap().test_run(options);
        let result = result.unwrap_or_else(|error| panic!("{}: {error:?}", case.name));
        assert_eq!(result.return_value, TC_ACT_UNSPEC, "{}", case.name);
        assert_eq!(context_after.get(Context::MARK), case.mark, "{}", case.name);
        after.truncate(result.data_size_out as usize);
        after
    }
}

/// A `struct __sk_buff` (include/uapi/linux/bpf.h).
struct Context([u8; 192]);

impl Default for Context {
    fn default() -> Self {
        Self([0; 192])
    }
}

impl Context {
    const MARK: usize = 8;
    const WIRE_LEN: usize = 160;
    const GSO_SEGS: usize = 164;
    const GSO_SIZE: usize = 176;

    fn new(case: &Case) -> Self {
        let mut context = Self::default();
        context.set(Self::MARK, case.mark);
        if case.segments > 1 {
            context.set(Self::WIRE_LEN, wire_len(case));
            context.set(Self::GSO_SEGS, case.segments);
            context.set(Self::GSO_SIZE, 1400);
        }
        context
    }

    fn set(&mut self, at: usize, value: u32) {
        self.0[at..at + 4].copy_from_slice(&value.to_ne_bytes());
    }

    fn get(&self, at: usize) -> u32 {
        let [a, b, c, d] = [0, 1, 2, 3].map(|byte| self.0[at + byte]);
        u32::from_ne_bytes([a, b, c, d])
    }
}
