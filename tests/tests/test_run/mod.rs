//! The loaded BPF program, run over packets that never leave (`BPF_PROG_TEST_RUN`), and the common
//! crate over the same packets.

use std::path::Path;

use aya::maps::{MapData, RingBuf};
use aya::programs::{TestRun as _, TestRunOptions};
use vxcsum::program::{LoadOptions, Program};
use vxcsum::skb_layout::{self, VMLINUX_BTF};
use vxcsum_common::fix::remedy;
use vxcsum_common::layout::{Action, Counters, Event, MASQUERADE_MARK, Report};
use vxcsum_common::{Captured, Examined, Finding, Offload, Verdict, examine};
use vxcsum_tests::cases::{Case, Known};

/// `TC_ACT_UNSPEC` (include/uapi/linux/pkt_cls.h).
const TC_ACT_UNSPEC: u32 = u32::MAX;
/// Most bytes that the kernel takes for a test run: less than a page with headroom and
/// `skb_shared_info` (net/bpf/test_run.c).
const MAX_LEN: usize = 3500;
/// Offset of the checksum field in a UDP header.
const UDP_CHECK: usize = 6;

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
    let finding = match examine(&packet, &case.known) {
        Examined::Vxlan(finding, _) => finding,
        unjudged => {
            return Outcome {
                verdict: verdict(&unjudged),
                report: None,
                after: case.frame.bytes.clone(),
            };
        }
    };
    let mut after = case.frame.bytes.clone();
    let report = finding.verdict.is_broken().then(|| {
        let remedy = remedy(case.fix, case.fix_unproven, &finding);
        if remedy.writes() {
            let field = finding.udp + UDP_CHECK;
            after[field..field + 2].copy_from_slice(&remedy.check.to_be_bytes());
        }
        told(&finding, remedy.action)
    });
    Outcome { verdict: Some(finding.verdict), report, after }
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

/// The verdict that is counted.
pub(crate) fn verdict<Port>(examined: &Examined<Port>) -> Option<Verdict> {
    use vxcsum_common::outer::Beyond;
    match examined {
        Examined::NotVxlan | Examined::Cut(Beyond::Outer) => None,
        Examined::Cut(Beyond::Vxlan) => Some(Verdict::Unverified),
        Examined::Vxlan(finding, _) => Some(finding.verdict),
    }
}

/// A loaded program that knows certain devices.
pub(crate) struct Kernel {
    program: Program,
    events: RingBuf<MapData>,
    /// How it is told what is open.
    offload: Offload,
    counters: Counters,
}

impl Kernel {
    /// Loads the program; with the layout of `sk_buff` or without.
    pub(crate) fn load(offload: Offload, known: &Known) -> Self {
        let uid = std::fs::read_to_string("/proc/self/status").unwrap();
        assert!(uid.contains("\nUid:\t0\t0"), "BPF_PROG_TEST_RUN needs root");
        let skb_layout = match offload {
            Offload::Unknown => None,
            // All that is ever seen here: a test run's skb is CHECKSUM_NONE.
            Offload::Complete => Some(skb_layout::read(Path::new(VMLINUX_BTF)).unwrap()),
            Offload::Partial { .. } => panic!("BPF_PROG_TEST_RUN makes no CHECKSUM_PARTIAL"),
        };
        let options = LoadOptions { skb_layout, ..LoadOptions::default() };
        let (mut program, events) = Program::load(&options).unwrap();
        for &(key, device) in &known.devices {
            program.set_device(key, device).unwrap();
        }
        Self { program, events, offload, counters: Counters::default() }
    }

    /// Whether the kernel takes the packet for a test run, in which it has no hash.
    pub(crate) fn takes(&self, case: &Case) -> bool {
        // It wants what follows the Ethernet header to be there, or the whole of a first IP header.
        let min_len = match case.frame.bytes.get(12..14) {
            Some([0x08, 0x00]) => 14 + 20,
            Some([0x86, 0xdd]) => 14 + 40,
            _ => 14 + 1,
        };
        case.hash == 0
            && (min_len..=MAX_LEN).contains(&case.frame.bytes.len())
            && case.offloads.contains(&self.offload)
    }

    /// Configures the program.
    pub(crate) fn configure(&mut self, case: &Case) {
        self.program.configure(&case.config().unwrap()).unwrap();
    }

    /// Runs the program over a packet and checks what holds for every packet.
    pub(crate) fn run(&mut self, case: &Case) -> Outcome {
        let frame = &case.frame.bytes;
        let (after, context) = self.test_run(case);
        let counters = self.program.counters().unwrap();
        let verdict = counted(&self.counters, &counters, case);
        let events = self.events();
        let is_broken = verdict.is_some_and(Verdict::is_broken);
        assert_eq!(events.len(), usize::from(is_broken), "{}: events", case.name);
        let report = events.first().map(|event| {
            assert_eq!(Verdict::from_u8(event.verdict), verdict, "{}", case.name);
            let len = frame.len().min(event.snapshot.len());
            assert_eq!(usize::from(event.snapshot_len), len, "{}", case.name);
            assert_eq!(event.snapshot[..len], frame[..len], "{}: snapshot", case.name);
            assert_eq!(event.len as usize, frame.len(), "{}", case.name);
            assert_eq!(event.segments, case.segments, "{}", case.name);
            assert_eq!(event.mark, case.mark, "{}", case.name);
            assert_ne!(event.boot_ns, 0, "{}", case.name);
            let ip_summed = match self.offload {
                Offload::Unknown => Event::IP_SUMMED_UNKNOWN,
                _ => 0,
            };
            assert_eq!(event.ip_summed, ip_summed, "{}", case.name);
            Told {
                check: event.check,
                expected: event.expected,
                source_port_before_nat: event.source_port_before_nat,
                proof: event.proof,
                policy: event.policy,
                action: event.action,
            }
        });
        let segments = u64::from(case.segments);
        let action = report.and_then(|told| Action::from_u8(told.action));
        let fixed = |wanted| if action == Some(wanted) { segments } else { 0 };
        assert_eq!(counters.zeroed - self.counters.zeroed, fixed(Action::Zeroed), "{}", case.name);
        assert_eq!(
            counters.restored - self.counters.restored,
            fixed(Action::Restored),
            "{}",
            case.name
        );
        assert_eq!(context.mark(), case.mark, "{}: mark", case.name);
        self.counters = counters;
        Outcome { verdict, report, after }
    }

    /// What the program has learned of the first watched port: over IPv4, over IPv6.
    pub(crate) fn learned(&self, port: u16) -> (u8, u8) {
        let config = self.program.config().unwrap();
        let port = config.ports.get(port).unwrap();
        (port.seen_ipv4, port.seen_ipv6)
    }

    fn test_run(&mut self, case: &Case) -> (Vec<u8>, Context) {
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
        let result = self.program.classifier().unwrap().test_run(options);
        let result = result.unwrap_or_else(|error| panic!("{}: {error:?}", case.name));
        assert_eq!(result.return_value, TC_ACT_UNSPEC, "{}", case.name);
        after.truncate(result.data_size_out as usize);
        (after, context_after)
    }

    fn events(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        while let Some(event) = self.events.next() {
            events.push(bytemuck::pod_read_unaligned(&event));
        }
        events
    }
}

/// The verdict that was counted between two readings: one, for one packet.
fn counted(before: &Counters, after: &Counters, case: &Case) -> Option<Verdict> {
    let name = &case.name;
    assert_eq!(after.skbs() - before.skbs(), 1, "{name}: packets counted");
    let mut counted = None;
    for verdict in Verdict::ALL {
        let (before, after) = (before.of(verdict), after.of(verdict));
        if after != before {
            assert_eq!(after.skbs - before.skbs, 1, "{name}: {}", verdict.as_str());
            let packets = after.packets - before.packets;
            assert_eq!(packets, u64::from(case.segments), "{name}: packets");
            assert_eq!(after.bytes - before.bytes, u64::from(wire_len(case)), "{name}: bytes");
            counted = Some(verdict);
        }
    }
    let not_vxlan = u64::from(counted.is_none());
    assert_eq!(after.not_vxlan - before.not_vxlan, not_vxlan, "{name}: not VXLAN");
    let emitted =
        after.reported(Report::Emitted).skbs - before.reported(Report::Emitted).skbs;
    let is_broken = counted.is_some_and(Verdict::is_broken);
    assert_eq!(emitted, u64::from(is_broken), "{name}: events counted");
    counted
}

/// Bytes on the wire: every segment but the first repeats the headers, of which there may be more
/// than are told here.
fn wire_len(case: &Case) -> u32 {
    case.frame.bytes.len() as u32 + 120 * (case.segments - 1)
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

    fn mark(&self) -> u32 {
        let [a, b, c, d] = [0, 1, 2, 3].map(|at| self.0[Self::MARK + at]);
        u32::from_ne_bytes([a, b, c, d])
    }
}
