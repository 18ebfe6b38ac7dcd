//! The packets of the incidents that vxcsum grew from, rebuilt from what tcpdump printed of them.
//!
//! The inner MAC addresses are not printed. They enter a sum as one number that is the same for
//! both directions between two nodes, so it is taken from one line and has to hold for all others.
#![allow(
    clippy::panic,
    clippy::unwrap_used,
    reason = "what these tests are made of fails as they do, by a panic"
)]

use std::net::Ipv4Addr;

use etherparse::TcpHeader;
use internet_checksum::Checksum;
use vxcsum_common::layout::{Config, Port, Ports};
use vxcsum_common::{Captured, Device, Examined, Finding, Policy, Proof, Verdict, Watch, examine};
use vxcsum_tests::capture::Recording;
use vxcsum_tests::check::{Checked, check_json};
use vxcsum_tests::packets::{Check, Ethernet, Frame, Ip, SegmentSum, Tcp, Transport, Udp, Vxlan};

/// All that is known of who sends to port 8472.
struct Sender(Policy);

impl Watch for Sender {
    type Port = ();

    fn port(&self, port: u16) -> Option<()> {
        (port == 8472).then_some(())
    }

    fn policy(&self, (): (), _vni: u32, _is_ipv6: bool) -> Policy {
        self.0
    }

    fn device(&self, _port: u16, _vni: u32) -> Device {
        Device::UNKNOWN
    }
}

fn examined(frame: &[u8], policy: Policy) -> Finding {
    match examine(&Captured::new(frame), &Sender(policy)) {
        Examined::Vxlan(finding, ()) => finding,
        other => panic!("{other:?}"),
    }
}

/// What tcpdump takes for the right sum: over the bytes as they are, finished or not.
fn as_tcpdump_has_it(frame: &Frame) -> u16 {
    let datagram = &frame.bytes[frame.udp..];
    let mut sum = Checksum::new();
    sum.add_bytes(&frame.bytes[frame.ip + 12..frame.ip + 20]);
    sum.add_bytes(&[0, 17]);
    sum.add_bytes(&datagram[4..6]);
    sum.add_bytes(&datagram[..6]);
    sum.add_bytes(&datagram[8..]);
    u16::from_be_bytes(sum.checksum())
}

/// The inner checksum field, and what tcpdump takes for right there. Both are at `at` in the inner
/// segment.
fn inner_sums(frame: &Frame, at: usize) -> (u16, u16) {
    let segment = frame.udp + 16 + 14 + 20;
    let field = |bytes: &[u8]| u16::from_be_bytes([bytes[segment + at], bytes[segment + at + 1]]);
    (field(&frame.bytes), field(&frame.finished))
}

/// An inner frame whose MAC addresses add up to `macs`.
fn inner(macs: u16, ip: Ip) -> Ethernet {
    let [high, low] = macs.to_be_bytes();
    Ethernet { source: [0; 6], destination: [0, 0, 0, 0, high, low], ..ip.into() }
}

/// The word that turns the sum `without` it into the sum `with` it. Sums are complements: what is
/// added to the data is taken away from them.
fn missing_word(without: u16, with: u16) -> u16 {
    let sum = u32::from(without) + u32::from(!with);
    (sum % 0x1_0000 + sum / 0x1_0000) as u16
}

/// The sum of the MAC addresses with which `frame` has the sum `right`.
fn solve(right: u16, frame: impl Fn(u16) -> Frame) -> u16 {
    let macs = missing_word(frame(0).check().unwrap(), right);
    assert_eq!(frame(macs).check().unwrap(), right);
    macs
}

/// What `vxcsum check` makes of a capture of them.
fn checked(frames: impl IntoIterator<Item = Frame>) -> Checked {
    let frames = frames.into_iter().map(|frame| frame.bytes).collect();
    check_json([Recording { frames }.file().unwrap().path()]).unwrap()
}

/// The options of a SYN as Linux writes them: mss, sackOK, TS, nop, wscale.
fn syn_options(mss: u16, timestamps: [u32; 2], scale: u8) -> Vec<u8> {
    let [value, echo] = timestamps.map(u32::to_be_bytes);
    [&[2, 4][..], &mss.to_be_bytes(), &[4, 2, 8, 10], &value, &echo, &[1, 3, 3, scale]].concat()
}

/// Those of any other segment: nop, nop, TS.
fn options(timestamps: [u32; 2]) -> Vec<u8> {
    let [value, echo] = timestamps.map(u32::to_be_bytes);
    [&[1, 1, 8, 10][..], &value, &echo].concat()
}

mod one_minute_to_connect {
    //! Six SYNs with 0xffff where no checksum was meant to be, and the seventh, which has none.

    use super::*;

    /// IP identification, timestamp and the TCP checksum that goes with them.
    const SYNS: [(u16, u32, u16); 7] = [
        (42199, 19_658_463, 0xd480),
        (42200, 19_659_464, 0xd097),
        (42201, 19_661_469, 0xc8c2),
        (42202, 19_665_472, 0xb91f),
        (42203, 19_673_488, 0x99cf),
        (42204, 19_689_536, 0x5b1f),
        (42205, 19_721_600, 0xddde),
    ];
    /// IP identifications of the outer packets.
    const OUTER: [u16; 7] = [43516, 44011, 45443, 46574, 50068, 65085, 19809];
    /// The inner sum before the NIC fills it in.
    const OPEN: u16 = 0x5a6c;
    const EXPECTED: u16 = 0x4b80;

    fn syn(number: usize, macs: u16, source_port: u16, check: Check, sum: SegmentSum) -> Frame {
        let (identification, timestamp, _) = SYNS[number];
        let mut header = TcpHeader::new(40233, 9153, 1_769_165_320, 43690);
        header.syn = true;
        header.set_options_raw(&syn_options(65495, [timestamp, 0], 9)).unwrap();
        let segment = Transport::Tcp(Tcp { header, payload: Vec::new(), sum });
        let [from, to] = [Ipv4Addr::new(172, 29, 0, 0), Ipv4Addr::new(172, 29, 2, 3)];
        let ip = Ip::new(from.into(), to.into(), segment);
        let ip = Ip { identification, dont_fragment: true, ..ip };
        let vxlan = Transport::Vxlan(Vxlan::new(source_port, check, inner(macs, ip)));
        let [from, to] = [11, 13].map(|host| Ipv4Addr::new(10, 0, 0, host));
        let outer = Ip::new(from.into(), to.into(), vxlan);
        Frame::new(&Ip { identification: OUTER[number], ..outer }.into()).unwrap()
    }

    fn macs() -> u16 {
        solve(EXPECTED, |macs| syn(0, macs, 60142, Check::Right, SegmentSum::Complete))
    }

    #[test]
    fn the_syns_are_those_that_were_printed() {
        for (number, (_, _, right)) in SYNS.into_iter().enumerate() {
            let frame = syn(number, 0, 60142, Check::Zero, SegmentSum::Open);
            assert_eq!(inner_sums(&frame, 16), (OPEN, right), "SYN {number}");
            // "length 110", and "length 60" inside.
            assert_eq!(frame.bytes.len(), 14 + 110);
        }
    }

    #[test]
    fn six_expect_the_same_sum() {
        let macs = macs();
        for number in 0..6 {
            for sum in [SegmentSum::Open, SegmentSum::Complete] {
                let frame = syn(number, macs, 60142, Check::Value(0xffff), sum);
                let finding = examined(&frame.bytes, Policy::Zero);
                assert_eq!(finding.verdict, Verdict::MangledZero, "SYN {number}, {sum:?}");
                assert_eq!(finding.check, 0xffff);
                assert_eq!(finding.expected, EXPECTED, "SYN {number}, {sum:?}");
                // "0xffff -> 0x4b80": at the receiver tcpdump was right.
                if sum == SegmentSum::Complete {
                    assert_eq!(as_tcpdump_has_it(&frame), EXPECTED, "SYN {number}");
                }
            }
        }
    }

    #[test]
    fn the_capture_explains_itself() {
        // What the device sends is told by the last of them only.
        let mangled = Check::Value(0xffff);
        let six = (0..6).map(|number| syn(number, macs(), 60142, mangled, SegmentSum::Complete));
        let seventh = syn(6, macs(), 50024, Check::Zero, SegmentSum::Complete);
        let checked = checked(six.chain([seventh]));
        assert_eq!((checked.count("mangled_zero"), checked.count("zero")), (6, 1));
        assert_eq!((checked.ended.code, checked.packets.len()), (Some(1), 6));
        for packet in checked.packets {
            assert_eq!(
                (&packet["check"], &packet["expected"]),
                (&"0xffff".into(), &"0x4b80".into())
            );
        }
    }

    #[test]
    fn the_seventh_has_none() {
        for policy in [Policy::Zero, Policy::Unknown] {
            let frame = syn(6, macs(), 50024, Check::Zero, SegmentSum::Complete);
            assert_eq!(examined(&frame.bytes, policy).verdict, Verdict::Zero);
        }
    }

    #[test]
    fn what_was_sent_before_tells_the_policy() {
        // Nobody had rtnetlink's word, but every healthy packet was "no cksum".
        let learned =
            Port { port: 8472, seen_ipv4: Port::lesson(Verdict::Zero), ..Port::default() };
        let config =
            Config { ports: Ports::new(&[learned]).unwrap(), ..bytemuck::Zeroable::zeroed() };
        let policy = config.ports.get(8472).unwrap().policy(false);
        let frame = syn(0, macs(), 60142, Check::Value(0xffff), SegmentSum::Complete);
        assert_eq!(examined(&frame.bytes, policy).verdict, Verdict::MangledZero);
    }
}

mod name_server_out_of_reach {
    //! Captured on 192.168.189.3, which is the receiver of the requests and the sender of the
    //! replies.

    use super::*;

    /// Where the pod and the name server are.
    const POD: Ipv4Addr = Ipv4Addr::new(172, 30, 17, 0);
    const SERVER: Ipv4Addr = Ipv4Addr::new(172, 30, 44, 4);

    fn outer(from_pod: bool, vxlan: Vxlan) -> Frame {
        let nodes = [5, 3].map(|host| Ipv4Addr::new(192, 168, 189, host).into());
        let [source, destination] = if from_pod { nodes } else { [nodes[1], nodes[0]] };
        Frame::new(&Ip::new(source, destination, Transport::Vxlan(vxlan)).into()).unwrap()
    }

    fn packet(from_pod: bool, port: u16, check: Check, macs: u16, inner_ip: Ip) -> Frame {
        outer(from_pod, Vxlan::new(port, check, inner(macs, inner_ip)))
    }

    fn ip(from_pod: bool, identification: u16, transport: Transport) -> Ip {
        let [source, destination] = if from_pod { [POD, SERVER] } else { [SERVER, POD] };
        let ip = Ip::new(source.into(), destination.into(), transport);
        Ip { identification, ttl: 63, ..ip }
    }

    /// A question: 75 bytes, of which no more is known than that their sum is right.
    fn question(port: u16, check: Check, macs: u16, identification: u16, from: u16) -> Frame {
        let udp = Udp {
            source_port: from,
            destination_port: 53,
            payload: (0..75).collect(),
            sum: SegmentSum::Complete,
        };
        packet(true, port, check, macs, ip(true, identification, Transport::Udp(udp)))
    }

    /// A TCP segment of the server's, its sum left to the NIC.
    struct Reply {
        identification: u16,
        flags: &'static str,
        ack: u32,
        timestamps: [u32; 2],
        /// "cksum … (incorrect -> …)".
        inner: (u16, u16),
        /// "[bad udp cksum … -> …]".
        outer: (u16, u16),
    }

    const REPLIES: [Reply; 4] = [
        Reply {
            identification: 0,
            flags: "S.",
            ack: 1_333_049_523,
            timestamps: [3_396_801_268, 115_443_102],
            inner: (0x956f, 0xcbab),
            outer: (0x4a95, 0x80d1),
        },
        Reply {
            identification: 4244,
            flags: ".",
            ack: 1_333_049_600,
            timestamps: [3_396_801_269, 115_443_103],
            inner: (0x9567, 0xf335),
            outer: (0x4a9d, 0xa86b),
        },
        Reply {
            identification: 4245,
            flags: "F.",
            ack: 1_333_049_600,
            timestamps: [3_396_803_269, 115_443_103],
            inner: (0x9567, 0xeb64),
            outer: (0x4a9d, 0xa09a),
        },
        Reply {
            identification: 4246,
            flags: ".",
            ack: 1_333_049_601,
            timestamps: [3_396_803_269, 115_445_103],
            inner: (0x9567, 0xe393),
            outer: (0x4a9d, 0x98c9),
        },
    ];

    fn reply(number: usize, check: Check, macs: u16) -> Frame {
        let Reply { identification, flags, ack, timestamps, .. } = REPLIES[number];
        let syn = flags.contains('S');
        // A FIN takes a number too.
        let sequence = 2_031_558_188 + u32::from(!syn) + u32::from(number == 3);
        let mut header = TcpHeader::new(53, 57972, sequence, if syn { 64308 } else { 502 });
        header.ack = true;
        header.acknowledgment_number = ack;
        header.syn = syn;
        header.fin = flags.contains('F');
        let options = if syn { syn_options(1410, timestamps, 7) } else { options(timestamps) };
        header.set_options_raw(&options).unwrap();
        let tcp = Tcp { header, payload: Vec::new(), sum: SegmentSum::Open };
        let ip = Ip { dont_fragment: true, ..ip(false, identification, Transport::Tcp(tcp)) };
        packet(false, 50170, check, macs, ip)
    }

    /// From the first of the replies; everything else has to agree.
    fn macs() -> u16 {
        solve(REPLIES[0].outer.0, |macs| reply(0, Check::Right, macs))
    }

    #[test]
    fn the_senders_replies_are_healthy() {
        let macs = macs();
        for (number, line) in REPLIES.iter().enumerate() {
            let frame = reply(number, Check::Value(line.outer.0), macs);
            assert_eq!(inner_sums(&frame, 16), line.inner, "reply {number}");
            assert_eq!(as_tcpdump_has_it(&frame), line.outer.1, "reply {number}");
            let finding = examined(&frame.bytes, Policy::Unknown);
            assert_eq!(finding.verdict, Verdict::Valid, "reply {number}");
        }
    }

    #[test]
    fn the_senders_answer_is_healthy() {
        // 125 bytes, sent with the sum open: "[bad udp cksum 0x95d7 -> 0x8437!]", and outside
        // "[bad udp cksum 0x7427 -> 0x6287!]".
        let macs = macs();
        let answer = |last: u16| {
            let payload = [&[0xda; 123][..], &last.to_be_bytes()].concat();
            let udp =
                Udp { source_port: 53, destination_port: 6570, payload, sum: SegmentSum::Open };
            let ip = ip(false, 61091, Transport::Udp(udp));
            let ip = Ip { dont_fragment: true, ..ip };
            packet(false, 39446, Check::Value(0x7427), macs, ip)
        };
        // The data is not printed, but its sum is. It ends in the middle of a word.
        let last = missing_word(inner_sums(&answer(0), 6).1, 0x8437).swap_bytes();
        let frame = answer(last);
        assert_eq!(inner_sums(&frame, 6), (0x95d7, 0x8437));
        assert_eq!(as_tcpdump_has_it(&frame), 0x6287);
        assert_eq!(examined(&frame.bytes, Policy::Unknown).verdict, Verdict::Valid);
    }

    #[test]
    fn the_received_questions_are_stale() {
        let macs = macs();
        // Port after NAT, sum seen, sum expected, port before NAT; inner identification and port.
        for (port, seen, expected, before, identification, from) in [
            (54947, 0x694b, 0x37cc, 42276, 29991, 42230),
            (29594, 0x3c0a, 0x9ad5, 53861, 1772, 60334),
        ] {
            let frame = question(port, Check::Value(seen), macs, identification, from);
            assert_eq!(frame.bytes.len(), 14 + 153);
            assert_eq!(as_tcpdump_has_it(&frame), expected);
            for policy in [Policy::Unknown, Policy::Sum] {
                let finding = examined(&frame.bytes, policy);
                assert_eq!(finding.verdict, Verdict::StaleNat, "{port}");
                assert_eq!(finding.proof, Proof::PortRange);
                assert_eq!(finding.check, seen);
                assert_eq!(finding.expected, expected);
                assert_eq!(finding.source_port_before_nat, before);
            }
            // That is also what NAT makes of a question from the old port.
            let stale = Check::Stale { old_port: before, old_address: None };
            let stale = question(port, stale, macs, identification, from);
            assert_eq!(stale.bytes, frame.bytes);
        }
    }

    #[test]
    fn the_capture_tells_stale_questions_from_healthy_replies() {
        let macs = macs();
        let stale = [(54947, 0x694b, 29991, 42230), (29594, 0x3c0a, 1772, 60334)];
        let questions = stale.map(|(port, check, identification, from)| {
            question(port, Check::Value(check), macs, identification, from)
        });
        let replies =
            (0..4).map(|number| reply(number, Check::Value(REPLIES[number].outer.0), macs));
        let checked = checked(questions.into_iter().chain(replies));
        assert_eq!((checked.count("stale_nat"), checked.count("valid")), (2, 4));
        // "[bad udp cksum …]" was printed of all six.
        assert_eq!(checked.looks_bad(), 4);
        let before = checked.packets.iter().map(|packet| &packet["outer"]["sport_before_nat"]);
        assert_eq!(before.collect::<Vec<_>>(), [42276, 53861]);
    }

    #[test]
    fn the_received_syn_is_healthy() {
        // "[udp sum ok]", inner "cksum 0x3e44 (correct)".
        let mut header = TcpHeader::new(57972, 53, 1_333_049_522, 64860);
        header.syn = true;
        header.set_options_raw(&syn_options(1410, [115_443_102, 0], 7)).unwrap();
        let tcp = Tcp { header, payload: Vec::new(), sum: SegmentSum::Complete };
        let ip = Ip { dont_fragment: true, ..ip(true, 57662, Transport::Tcp(tcp)) };
        let frame = packet(true, 60121, Check::Right, macs(), ip);
        assert_eq!(inner_sums(&frame, 16).0, 0x3e44);
        assert_eq!(frame.bytes.len(), 14 + 110);
        assert_eq!(examined(&frame.bytes, Policy::Unknown).verdict, Verdict::Valid);
    }
}
