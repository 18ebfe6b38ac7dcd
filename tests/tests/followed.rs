//! What the BPF program tells of a flow that user space follows: little, exact, and nothing while
//! nothing is followed.
#![allow(
    clippy::panic,
    clippy::unwrap_used,
    reason = "what these tests are made of fails as they do, by a panic"
)]

use std::sync::{Arc, Mutex};

use aya::programs::{TestRun as _, TestRunOptions};
use vxcsum::program::{Followed, LoadOptions, Program};
use vxcsum::transport::{Buffer, Taken, Transport};
use vxcsum_common::layout::{
    Action, Config, Counters, DeviceKey, Event, FixMode, MAX_FOLLOWED, Ports, Report,
};
use vxcsum_common::outer::{self, Outer};
use vxcsum_common::{Captured, Device, Policy, Verdict, inner};
use vxcsum_tests::cases::{self, PORT};
use vxcsum_tests::packets::Check;
use vxcsum_tests::segment::Segment;
use vxcsum_tests::storm::PORT_BEFORE_NAT;

const SPORT: u16 = 40233;
/// The least that the kernel takes; a test needs no more.
const SMALL_RING: u32 = 4096;

struct Kernel {
    program: Program,
    events: Vec<Buffer>,
    followed: Arc<Mutex<Followed>>,
    ports: Ports,
}

impl Kernel {
    fn load(ring_len: u32) -> Self {
        Self::load_over(Transport::Ring, ring_len)
    }

    fn load_over(transport: Transport, ring_len: u32) -> Self {
        assert!(nix::unistd::geteuid().is_root(), "the BPF program is for root to load");
        let options = LoadOptions { transport, ring_len, ..LoadOptions::default() };
        let (mut program, events) = Program::load(&options).unwrap();
        let device = Device {
            source_port_min: PORT_BEFORE_NAT,
            source_port_max: PORT_BEFORE_NAT + 1,
            ..Device::UNKNOWN
        };
        program.set_device(DeviceKey { vni: 1, port: PORT.into() }, device).unwrap();
        let followed = program.followed();
        let ports = Ports::new(&[cases::port(PORT, Policy::Sum)]).unwrap();
        let mut kernel = Self { program, events, followed, ports };
        kernel.configure(FixMode::Off, 1);
        kernel
    }

    /// As the daemon does: what the running program holds is carried over.
    fn configure(&mut self, fix: FixMode, event_cost_ns: u32) {
        let mut config = Config {
            ports: self.ports,
            fix: fix as u8,
            fix_unproven: 0,
            is_raw_ip: 0,
            following: 0,
            max_frame_len: u32::MAX,
            zero: [0; 2],
            event_cost_ns,
        };
        config.carry(&self.program.config().unwrap());
        self.program.configure(&config).unwrap();
    }

    fn pass(&mut self, segment: Segment) -> &mut Self {
        self.pass_frame(&segment.frame().unwrap())
    }

    fn pass_frame(&mut self, frame: &[u8]) -> &mut Self {
        let options = TestRunOptions { data_in: Some(frame), ..TestRunOptions::default() };
        self.program.classifier().unwrap().test_run(options).unwrap();
        self
    }

    fn follow(&self, segment: Segment) -> u64 {
        let flow = number(&segment.frame().unwrap());
        self.followed.lock().unwrap().insert(flow).unwrap();
        flow
    }

    fn held_back(&self, flow: u64) -> Option<u32> {
        self.followed.lock().unwrap().held_back(flow)
    }

    /// What came since the last call: events, and packets of followed flows.
    fn told(&mut self) -> (Vec<Event>, Vec<Event>) {
        let mut taken = Taken::default();
        self.events.iter_mut().for_each(|buffer| buffer.take(&mut taken));
        let told = taken.records.iter().map(|it| bytemuck::pod_read_unaligned::<Event>(it));
        told.partition(|event| event.is_followed == 0)
    }

    fn counters(&self) -> Counters {
        self.program.counters().unwrap()
    }
}

/// The number of the inner flow of a frame.
fn number(frame: &[u8]) -> u64 {
    struct Any;
    impl vxcsum_common::Watch for Any {
        type Port = ();
        fn port(&self, _: u16) -> Option<()> {
            Some(())
        }
        fn policy(&self, (): (), _: u32, _: bool) -> Policy {
            Policy::Unknown
        }
        fn device(&self, _: u16, _: u32) -> Device {
            Device::UNKNOWN
        }
    }
    let packet = Captured::new(frame);
    let (at, ()) = outer::locate(&packet, &Any).unwrap().unwrap();
    let outer = Outer::read(&packet, at).unwrap();
    let segment = inner::tcp_segment(&packet, &outer).unwrap().unwrap();
    assert_eq!(segment.flow, inner::flow(&packet, &outer).unwrap());
    segment.flow
}

fn flags(event: &Event) -> u8 {
    let at = usize::from(event.snapshot_len);
    // TCP without options and without data ends the packet.
    event.snapshot[at - 20 + 13]
}

#[test]
fn nothing_is_told_while_nothing_is_followed() {
    let mut kernel = Kernel::load(1 << 16);
    kernel.pass(Segment::broken_syn(SPORT)).pass(Segment::clean_syn(SPORT));
    kernel.pass(Segment::ack(SPORT));
    let (events, told) = kernel.told();
    assert_eq!((events.len(), told.len()), (1, 0));
    assert_eq!(kernel.program.config().unwrap().following, 0);
}

#[test]
fn the_first_whole_syn_and_what_ends_the_wait_are_told() {
    for transport in Transport::ALL {
        first_syn_and_end_are_told(Kernel::load_over(transport, 1 << 16));
    }
}

fn first_syn_and_end_are_told(mut kernel: Kernel) {
    let flow = kernel.follow(Segment::broken_syn(SPORT));
    // Others are none of its business, in any state.
    for other in [Segment::clean_syn(SPORT + 1), Segment::ack(SPORT + 1)] {
        kernel.pass(other);
    }
    kernel.pass(Segment::clean_syn(SPORT)).pass(Segment::clean_syn(SPORT));
    assert_eq!(kernel.held_back(flow), Some(0));
    kernel.pass(Segment::ack(SPORT)).pass(Segment::ack(SPORT));
    let (events, told) = kernel.told();
    assert_eq!(events.len(), 0);
    assert_eq!(told.iter().map(flags).collect::<Vec<_>>(), [0x02, 0x10]);
    for packet in &told {
        assert_eq!(packet.verdict, Verdict::Valid as u8);
        assert_eq!((packet.action, packet.held_back), (Action::None as u8, 0));
    }
    assert_eq!(kernel.held_back(flow), None, "it ended");
    assert_eq!(kernel.counters().of(Verdict::Valid).skbs, 6);
    assert_eq!(kernel.counters().reported(Report::Emitted).skbs, 0);
}

#[test]
fn a_configuration_keeps_what_is_followed() {
    let mut kernel = Kernel::load(1 << 16);
    kernel.follow(Segment::broken_syn(SPORT));
    kernel.configure(FixMode::Restore, 1);
    assert_eq!(kernel.pass(Segment::ack(SPORT)).told().1.len(), 1);
}

#[test]
fn a_reset_and_verdicts_from_outer_headers_alone_end_it_as_well() {
    let mut kernel = Kernel::load(1 << 16);
    for (segment, check, verdict) in [
        (Segment { flags: "R", ..Segment::ack(SPORT) }, Check::Right, Verdict::Valid),
        (Segment { flags: "F.", ..Segment::ack(SPORT) }, Check::Zero, Verdict::Missing),
        (Segment { len: 900, ..Segment::ack(SPORT) }, Check::Pending, Verdict::OffloadPending),
    ] {
        kernel.follow(segment);
        kernel.pass_frame(&segment.frame_with(check).unwrap());
        let (_, told) = kernel.told();
        let verdicts: Vec<_> = told.iter().map(|packet| packet.verdict).collect();
        assert_eq!(verdicts, [verdict as u8], "{segment:?}");
    }
}

/// The event of a broken packet tells all; without one, SYNs are counted and a packet that was put
/// right ends the wait.
#[test]
fn what_the_rate_limit_holds_back_is_not_forgotten() {
    let mut kernel = Kernel::load(1 << 16);
    kernel.pass(Segment::broken_syn(SPORT));
    let flow = kernel.follow(Segment::broken_syn(SPORT));
    kernel.pass(Segment::broken_syn(SPORT));
    assert_eq!(kernel.told().0.len(), 2);
    // The next event would cost more than a burst allows.
    kernel.configure(FixMode::Off, u32::MAX);
    kernel.pass(Segment::broken_syn(SPORT + 1));
    assert_eq!(kernel.told().0.len(), 1);
    for held_back in 1..=3 {
        kernel.pass(Segment::broken_syn(SPORT));
        assert_eq!(kernel.held_back(flow), Some(held_back));
    }
    // It is not through as long as what it says is broken.
    kernel.pass(Segment { is_stale: true, ..Segment::ack(SPORT) });
    let (events, told) = kernel.told();
    assert_eq!((events.len(), told.len()), (0, 0));
    kernel.configure(FixMode::Restore, u32::MAX);
    kernel.pass(Segment::broken_syn(SPORT));
    kernel.pass(Segment { is_stale: true, ..Segment::ack(SPORT) });
    let (events, told) = kernel.told();
    assert_eq!(events.len(), 0);
    let told: Vec<_> =
        told.iter().map(|it| (flags(it), it.verdict, it.action, it.held_back)).collect();
    let (stale, restored) = (Verdict::StaleNat as u8, Action::Restored as u8);
    assert_eq!(told, [(0x02, stale, restored, 3), (0x10, stale, restored, 3)]);

    let counters = kernel.counters();
    let reported = Report::ALL.map(|report| counters.reported(report).skbs);
    assert_eq!(reported, [0, 3, 6, 0], "what is told is no event");
    assert_eq!(counters.of(Verdict::StaleNat).skbs, 9);
}

/// A flow stays followed until its end has found room.
#[test]
fn an_end_that_finds_no_room_is_told_later() {
    let mut kernel = Kernel::load(SMALL_RING);
    kernel.configure(FixMode::Off, 0);
    let flow = kernel.follow(Segment::broken_syn(SPORT));
    let frame = Segment::broken_syn(SPORT + 1).frame().unwrap();
    while kernel.counters().reported(Report::Lost).skbs == 0 {
        kernel.pass_frame(&frame);
    }
    kernel.pass(Segment::clean_syn(SPORT)).pass(Segment::ack(SPORT));
    assert_eq!(kernel.held_back(flow), Some(0));
    kernel.pass(Segment::broken_syn(SPORT));
    assert_eq!(kernel.held_back(flow), Some(1), "a lost event as well");
    let counters = kernel.counters();
    let (events, told) = kernel.told();
    assert_eq!(events.len() as u64, counters.reported(Report::Emitted).skbs);
    assert_eq!((counters.reported(Report::Lost).skbs, told.len()), (2, 0));
    kernel.pass(Segment::ack(SPORT));
    let (_, told) = kernel.told();
    assert_eq!(told.iter().map(|it| it.held_back).collect::<Vec<_>>(), [1]);
    assert_eq!(kernel.held_back(flow), None);
}

#[test]
fn flows_come_and_go_up_to_the_bound() {
    let kernel = Kernel::load(SMALL_RING);
    let mut followed = kernel.followed.lock().unwrap();
    for flow in 0..u64::from(MAX_FOLLOWED) {
        followed.insert(flow).unwrap();
    }
    assert!(followed.insert(u64::MAX).is_err());
    followed.remove(7).unwrap();
    followed.remove(7).unwrap();
    followed.insert(u64::MAX).unwrap();
    assert_eq!(kernel.program.config().unwrap().following, 1);
    for flow in (0..u64::from(MAX_FOLLOWED)).chain([u64::MAX]) {
        followed.remove(flow).unwrap();
    }
    assert_eq!(kernel.program.config().unwrap().following, 0);
}
