//! Waits at made-up instants.

use serde_json::json;

use super::*;

const ISN: u32 = 0x1000;
const SYN: u8 = TcpSegment::SYN;
const ACK: u8 = TcpSegment::ACK;
const RST: u8 = TcpSegment::RST;

/// A program that only remembers what it was asked to follow.
#[derive(Default)]
struct Fake {
    followed: Vec<u64>,
    held_back: u32,
}

impl Follow for Fake {
    fn follow(&mut self, flow: u64) -> Result<(), LoadError> {
        assert!(!self.followed.contains(&flow), "{flow} twice");
        self.followed.push(flow);
        Ok(())
    }

    fn held_back(&self, flow: u64) -> Option<u32> {
        self.followed.contains(&flow).then_some(self.held_back)
    }

    fn unfollow(&mut self, flow: u64) -> Result<(), LoadError> {
        self.followed.retain(|&other| other != flow);
        Ok(())
    }
}

struct Table {
    stalls: Stalls,
    fake: Arc<Mutex<Fake>>,
}

/// A packet that the program tells of.
#[derive(Clone, Copy)]
struct Packet {
    at_ms: u64,
    sport: u16,
    flags: u8,
    sequence: u32,
    verdict: &'static str,
    action: &'static str,
    held_back: u32,
}

fn broken(at_ms: u64, flags: u8) -> Packet {
    Packet {
        at_ms,
        sport: 40233,
        flags,
        sequence: ISN,
        verdict: "stale_nat",
        action: "none",
        held_back: 0,
    }
}

fn clean(at_ms: u64, flags: u8) -> Packet {
    Packet { verdict: "valid", ..broken(at_ms, flags) }
}

fn fixed(at_ms: u64, flags: u8) -> Packet {
    Packet { action: "restored", ..broken(at_ms, flags) }
}

impl Packet {
    fn event(self) -> Event {
        let segment =
            TcpSegment { flow: self.sport.into(), sequence: self.sequence, flags: self.flags };
        let packet = Traced::Tcp(segment);
        let boot = Duration::from_millis(self.at_ms);
        let is_followed = self.verdict == "valid";
        let trace = Trace { boot, is_followed, held_back: self.held_back, packet };
        event("tcp", self.sport, self.verdict, self.action, trace)
    }
}

fn event(proto: &str, sport: u16, verdict: &str, action: &str, trace: Trace) -> Event {
    let event = json!({
        "time": "2026-11-20T23:44:26.832436123Z", "direction": "egress", "interface": "eth0", "device": "flannel.1",
        "vni": 1, "verdict": verdict, "action": action, "check": "0x694b", "expected": "0x37cc",
        "outer": {"src": "10.0.0.11", "dst": "10.0.0.13", "sport": 54947, "dport": 8472},
        "inner": {"src": "172.29.0.0", "dst": "172.29.2.3", "proto": proto, "sport": sport,
                  "dport": 9153},
        "mark": "0x4000", "segments": 1, "len": 124,
    });
    let event: Event = serde_json::from_value(event).unwrap();
    Event { trace, ..event }
}

impl Table {
    fn new(bound: usize) -> Self {
        let stalls = Stalls::new(NonZeroUsize::new(bound).unwrap());
        Self { stalls, fake: Arc::default() }
    }

    fn see(&mut self, packet: Packet) -> Vec<Stall> {
        self.see_event(&packet.event())
    }

    fn see_event(&mut self, event: &Event) -> Vec<Stall> {
        let follower: Follower = self.fake.clone();
        let lines = self.stalls.observe(event, &follower);
        lines.into_iter().map(|line| line.stall).collect()
    }

    fn expire(&mut self, at_ms: u64) -> Vec<Stall> {
        let lines = self.stalls.expire(Duration::from_millis(at_ms));
        lines.into_iter().map(|line| line.stall).collect()
    }

    fn followed(&self) -> Vec<u64> {
        self.fake.lock().unwrap().followed.clone()
    }
}

fn one(stalls: &[Stall]) -> &Stall {
    assert_eq!(stalls.len(), 1, "{stalls:#?}");
    &stalls[0]
}

#[test]
fn sixty_three_seconds_are_one_line() {
    let mut table = Table::new(8);
    assert!(table.see(broken(0, SYN)).is_empty(), "one lost packet is no stall yet");
    assert_eq!(table.followed(), [40233]);
    for (tries, at, next) in [(2, 1, 2_u32), (3, 3, 4), (4, 7, 8), (5, 15, 16), (6, 31, 32)] {
        let lines = table.see(broken(at * 1000, SYN));
        let line = one(&lines);
        assert_eq!((line.state, line.tries), (State::Waiting, tries));
        assert_eq!(line.next_within_seconds, Some(f64::from(next)));
        assert!(table.expire(at * 1000 + 2000 * u64::from(next)).is_empty(), "{at}");
    }
    assert_eq!(table.stalls.waiting(), 1);
    assert!(table.see(clean(63_198, SYN)).is_empty());
    let lines = table.see(clean(63_204, ACK));
    assert_eq!(
        one(&lines).to_string(),
        "172.29.0.0:40233 > 172.29.2.3:9153 (tcp, vni 1) connected after 63.2 s: its first 6 SYNs \
         left with a broken checksum and were dropped by 10.0.0.13"
    );
    assert_eq!(table.followed(), [0; 0]);
    assert!(table.see(clean(64_000, ACK)).is_empty(), "it waits no more");
    let totals = Totals { connected: 1, ..Totals::default() };
    assert_eq!((table.stalls.waiting(), table.stalls.totals()), (0, totals));
}

#[test]
fn a_line_says_what_waits_and_until_when() {
    let mut table = Table::new(8);
    table.see(broken(0, SYN));
    table.see(broken(1000, SYN));
    let overview = |table: &Table, at| table.stalls.overview(Duration::from_millis(at)).to_string();
    let text = overview(&table, 1500);
    assert!(
        text.starts_with("stalls: 1 waiting, 0 connected, 0 gave up\n  since ")
            && text.ends_with(
                "Z 172.29.0.0:40233 > 172.29.2.3:9153 (tcp, vni 1) has been waiting for 1.5 s: its \
                 first 2 SYNs left with a broken checksum and were dropped by 10.0.0.13; next try \
                 within 1.5 s\n"
            ),
        "{text}"
    );
    assert!(overview(&table, 4000).ends_with("; the next try is overdue\n"));
    table.see(clean(3000, SYN));
    let text = overview(&table, 3500);
    assert!(text.contains("; one left whole since, not answered yet; next try"), "{text}");
    assert_eq!(overview(&Table::new(8), 0), "");
}

#[test]
fn silence_longer_than_any_pause_is_giving_up() {
    // Two intervals more, and 3 s.
    for (tries, deadline) in [(&[0][..], 5000), (&[0, 1000], 8000), (&[0, 1000, 3000], 14_000)] {
        let mut table = Table::new(8);
        for &at in tries {
            table.see(broken(at, SYN));
        }
        assert!(table.expire(deadline - 1).is_empty());
        let lines = table.expire(deadline);
        let line = one(&lines);
        assert_eq!((line.state, line.tries as usize), (State::GaveUp, tries.len()));
        let waited = Duration::from_secs_f64(line.waited_seconds).as_millis() as u64;
        assert_eq!(Some(&waited), tries.last(), "up to the last try");
        assert_eq!((table.followed(), table.stalls.totals().gave_up), (vec![], 1));
    }
}

/// Since Linux 6.5 the first retries are a second apart.
#[test]
fn linear_retries_are_no_silence() {
    let mut table = Table::new(8);
    for at in [0, 1, 2, 3, 4, 5, 7, 11, 19, 35] {
        assert!(table.expire(at * 1000).is_empty(), "{at}");
        table.see(broken(at * 1000, SYN));
    }
    assert!(table.expire(67_000).is_empty());
    table.see(clean(67_000, SYN));
    assert_eq!(one(&table.see(clean(67_001, ACK))).tries, 10);
}

#[test]
fn one_that_leaves_whole_in_the_end_may_give_up_for_other_reasons() {
    let mut table = Table::new(8);
    table.see(broken(0, SYN));
    table.see(clean(1000, SYN));
    let lines = table.expire(8000);
    assert_eq!(
        one(&lines).to_string(),
        "172.29.0.0:40233 > 172.29.2.3:9153 (tcp, vni 1) gave up after 1.0 s: its first SYN left \
         with a broken checksum and was dropped by 10.0.0.13; one left whole since, and had no \
         answer either"
    );
}

#[test]
fn what_vxcsum_puts_right_is_whole() {
    let mut table = Table::new(8);
    assert!(table.see(fixed(0, SYN)).is_empty());
    assert_eq!(table.stalls.waiting(), 0, "it need not wait");
    table.see(broken(0, SYN));
    table.see(fixed(1000, SYN));
    // Broken again before it could say that it is through.
    assert!(table.see(broken(1001, ACK)).is_empty());
    let lines = table.see(fixed(1300, ACK));
    assert!(one(&lines).to_string().ends_with("dropped by 10.0.0.13, until vxcsum put it right"));
    assert_eq!((one(&lines).tries, one(&lines).whole_tries), (1, 1));
}

#[test]
fn a_reset_is_an_end() {
    let mut table = Table::new(8);
    table.see(broken(0, SYN));
    table.see(broken(1000, SYN));
    let lines = table.see(broken(2000, RST));
    assert_eq!((one(&lines).state, one(&lines).reset), (State::GaveUp, true));
    assert!(one(&lines).to_string().contains(" was reset after 1.0 s: "));
}

#[test]
fn ports_that_are_used_again_are_another_connection() {
    let mut table = Table::new(8);
    table.see(broken(0, SYN));
    table.see(broken(1000, SYN));
    let lines = table.see(Packet { sequence: 7, ..broken(1500, SYN) });
    assert_eq!((one(&lines).state, one(&lines).tries), (State::GaveUp, 2));
    assert_eq!((table.stalls.waiting(), table.followed()), (1, vec![40233]));
    // And one that is not broken needs no following.
    let lines = table.see(Packet { sequence: 9, ..clean(2000, SYN) });
    assert_eq!((one(&lines).state, one(&lines).tries), (State::GaveUp, 1));
    assert_eq!((table.stalls.waiting(), table.followed()), (0, vec![]));
}

/// A server whose answers are dropped: when they are not, it hears from the client, and need not say
/// more.
#[test]
fn an_answer_that_is_not_sent_again_has_arrived() {
    let mut table = Table::new(8);
    table.see(broken(0, SYN | ACK));
    let lines = table.see(broken(1000, SYN | ACK));
    assert!(one(&lines).to_string().contains("its first 2 SYN-ACKs left"), "{lines:#?}");
    table.see(clean(3000, SYN | ACK));
    let lines = table.expire(60_000);
    assert_eq!(one(&lines).state, State::Connected);
    assert!(one(&lines).to_string().contains("connected after 3.0 s"), "{lines:#?}");
}

#[test]
fn the_oldest_makes_room() {
    let mut table = Table::new(3);
    for sport in 1..=5 {
        table.see(Packet { sport, ..broken(sport.into(), SYN) });
        if sport <= 3 {
            // What is tried again does not become younger.
            table.see(Packet { sport: 1, ..broken(u64::from(sport) + 1000, SYN) });
        }
    }
    assert_eq!(table.stalls.waiting(), 3);
    assert_eq!(table.followed().len(), 3);
    assert_eq!(table.stalls.totals().evicted, 2);
    let overview = table.stalls.overview(Duration::from_secs(2));
    let waited: Vec<_> = overview.waiting.iter().map(|stall| stall.waited_seconds).collect();
    assert_eq!(waited, [1.997, 1.996, 1.995], "the longest first");
}

#[test]
fn tries_without_an_event_count() {
    let mut table = Table::new(8);
    table.see(broken(0, SYN));
    table.fake.lock().unwrap().held_back = 2;
    assert!(table.expire(5000).is_empty(), "it has tried");
    assert_eq!(table.stalls.overview(Duration::from_secs(5)).waiting[0].tries, 3);
    let lines = table.see(Packet { held_back: 4, ..clean(8000, ACK) });
    assert_eq!(one(&lines).tries, 5);
}

#[test]
fn a_flood_is_not_a_line_each() {
    let mut table = Table::new(8);
    let lines: usize = (0..1000).map(|at| table.see(broken(at, SYN)).len()).sum();
    assert_eq!(lines, 2);
}

#[test]
fn another_interface_is_followed_when_the_route_changes() {
    let mut table = Table::new(8);
    table.see(broken(0, SYN));
    let first = std::mem::take(&mut table.fake);
    table.see(broken(1000, SYN));
    assert_eq!((first.lock().unwrap().followed.len(), table.followed().len()), (0, 1));
    assert_eq!(one(&table.see(clean(3000, ACK))).tries, 2);
}

fn query(at_ms: u64, sport: u16, name: &str, action: &str) -> Event {
    let question = Question { name: name.to_owned(), kind: "A".to_owned() };
    let ends = [1, 2].map(|host| IpAddr::from([172, 29, 0, host]));
    let packet = Traced::Udp(Datagram::Dns { vni: 1, ends, question });
    let boot = Duration::from_millis(at_ms);
    event("udp", sport, "stale_nat", action, Trace { boot, packet, ..Trace::default() })
}

#[test]
fn a_query_is_the_same_whatever_its_port() {
    let mut table = Table::new(8);
    assert!(table.see_event(&query(0, 1000, "example.org", "none")).is_empty());
    assert!(table.see_event(&query(0, 1001, "other.org", "none")).is_empty());
    assert_eq!(one(&table.see_event(&query(5000, 1002, "example.org", "none"))).tries, 2);
    let lines = table.see_event(&query(10_000, 1003, "example.org", "none"));
    assert_eq!(
        one(&lines).to_string(),
        "dns A? example.org lost 3 times in 10.0 s: 172.29.0.0:1003 > 172.29.2.3:9153 (udp, vni 1) \
         left with a broken checksum and was dropped by 10.0.0.13"
    );
    assert!(table.see_event(&query(11_000, 1004, "example.org", "zeroed")).is_empty());
    assert!(table.see_event(&query(75_000, 1005, "example.org", "none")).is_empty(), "much later");
    assert_eq!(table.stalls.totals().lost_again, 2);
    assert_eq!(table.stalls.waiting(), 0);
}

#[test]
fn a_datagram_is_known_by_its_flow_and_its_start() {
    let mut table = Table::new(8);
    let datagram = |at_ms, flow, payload: &[u8]| {
        let packet = Traced::Udp(Datagram::Other { flow, payload: payload.to_vec() });
        let boot = Duration::from_millis(at_ms);
        event("udp", 4000, "bad", "none", Trace { boot, packet, ..Trace::default() })
    };
    assert!(table.see_event(&datagram(0, 1, b"ping")).is_empty());
    assert!(table.see_event(&datagram(1000, 1, b"pong")).is_empty());
    assert!(table.see_event(&datagram(1000, 2, b"ping")).is_empty());
    let lines = table.see_event(&datagram(2500, 1, b"ping"));
    assert!(one(&lines).to_string().starts_with("the same datagram lost 2 times in 2.5 s: 172."));
}

#[test]
fn json_is_as_documented() {
    let mut table = Table::new(8);
    table.see(broken(0, SYN));
    let follower: Follower = table.fake.clone();
    let line = table.stalls.observe(&broken(1000, SYN).event(), &follower).remove(0);
    let json = serde_json::to_value(&line).unwrap();
    let keys = |value: &serde_json::Value| {
        value.as_object().unwrap().keys().cloned().collect::<Vec<_>>().join(" ")
    };
    assert_eq!(keys(&json), "stall time");
    assert_eq!(
        keys(&json["stall"]),
        "device dport dst interface next_within_seconds peer proto segment since sport src state \
         tries verdict vni waited_seconds"
    );
    assert_eq!(json["stall"]["state"], "waiting");
    assert_eq!(json["stall"]["waited_seconds"], 1.0);
    let back: Line = serde_json::from_value(json.clone()).unwrap();
    assert_eq!(serde_json::to_value(&back).unwrap(), json);

    let overview = table.stalls.overview(Duration::from_secs(1));
    let json = serde_json::to_value(&overview).unwrap();
    assert_eq!(keys(&json), "connected evicted gave_up lost_again waiting");
    assert_eq!(json["waiting"].as_array().map(Vec::len), Some(1));
}
