//! What broken packets do to people: connections that wait because their SYNs are dropped, and
//! queries that are lost again.
//!
//! A connection starts to wait with a broken SYN (or SYN-ACK) that nothing put right. From then on
//! the BPF program is asked to tell when its packets leave whole. Time is `CLOCK_BOOTTIME`
//! throughout, so a step of the time of day makes no difference.

use std::fmt::{self, Display};
use std::net::{IpAddr, SocketAddr};
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use lru::LruCache;
use serde::{Deserialize, Serialize};
use vxcsum_common::inner::{self, TcpSegment};
use vxcsum_common::layout::{self, Action, MAX_FOLLOWED};
use vxcsum_common::outer::{Outer, UDP, UDP_LEN};
use vxcsum_common::{Captured, Verdict};

use crate::clock;
use crate::dns::{self, Question};
use crate::event::{Event, rfc3339, time_of_day};
use crate::names;
use crate::program::{Followed, LoadError};

/// Connections, and lost datagrams, that are remembered at a time. The oldest make room.
const BOUND: NonZeroUsize = NonZeroUsize::new(MAX_FOLLOWED as usize).expect("it is not 0");
/// A first retransmission comes after this (RFC 6298 §2).
const FIRST_INTERVAL: Duration = Duration::from_secs(1);
/// How much later than twice the expected interval a try may come.
const SLACK: Duration = Duration::from_secs(3);
/// The same datagram lost after a longer time is not the same wait.
const LOST_AGAIN_WITHIN: Duration = Duration::from_mins(1);
/// Between two lines about the same wait: retries are rarer, anything else is a flood.
const LINE_INTERVAL: Duration = Duration::from_millis(500);
/// What tells datagrams of a flow apart, in bytes: their start.
const PAYLOAD_LEN: usize = 64;
/// Waiting connections that a table for people lists.
const LISTED: usize = 20;

/// What is known of a packet beyond its event: enough to recognize it when it comes again.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    /// When it left, by `CLOCK_BOOTTIME`.
    boot: Duration,
    /// It is no event, but told because its flow is followed.
    pub is_followed: bool,
    /// Broken SYNs of the flow before it that had no event.
    held_back: u32,
    packet: Traced,
}

#[derive(Clone, Debug, Default)]
enum Traced {
    #[default]
    Other,
    Tcp(TcpSegment),
    Udp(Datagram),
}

/// A UDP datagram, as it will be when it is sent again.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Datagram {
    /// Resolvers may ask again from another port, and under another id.
    Dns { vni: u32, ends: [IpAddr; 2], question: Question },
    /// Any other, by its flow and how it starts.
    Other { flow: u64, payload: Vec<u8> },
}

impl Trace {
    /// When the packet left, by `CLOCK_BOOTTIME`.
    pub(crate) const fn boot(&self) -> Duration {
        self.boot
    }

    /// Reads what an event leaves out.
    pub(crate) fn read(
        raw: &layout::Event,
        packet: &Captured<'_>,
        outer: &Outer,
        ends: Option<[IpAddr; 2]>,
    ) -> Self {
        Self {
            boot: Duration::from_nanos(raw.boot_ns),
            is_followed: raw.is_followed != 0,
            held_back: raw.held_back,
            packet: Traced::read(packet, outer, ends).unwrap_or_default(),
        }
    }
}

impl Traced {
    fn read(packet: &Captured<'_>, outer: &Outer, ends: Option<[IpAddr; 2]>) -> Option<Self> {
        if let Some(segment) = inner::tcp_segment(packet, outer).ok()? {
            return Some(Self::Tcp(segment));
        }
        let ip = inner::parse(packet, outer).ok()?.ip?;
        if ip.protocol != UDP || ip.fragment_offset != 0 {
            return None;
        }
        let header = packet.bytes.get(ip.payload..)?.first_chunk::<UDP_LEN>()?;
        let end = packet.bytes.len().min(ip.end);
        let payload = packet.bytes.get(ip.payload + UDP_LEN..end)?;
        let is_dns = u16::from_be_bytes([header[2], header[3]]) == dns::PORT;
        let question = is_dns.then(|| Question::read(payload)).flatten();
        Some(Self::Udp(match question {
            Some(question) => Datagram::Dns { vni: outer.vni, ends: ends?, question },
            None => Datagram::Other {
                flow: inner::flow(packet, outer).ok()?,
                payload: payload[..payload.len().min(PAYLOAD_LEN)].to_vec(),
            },
        }))
    }
}

/// Has the BPF program tell of the packets of a flow.
pub trait Follow: Send {
    /// From now on, or anew.
    fn follow(&mut self, flow: u64) -> Result<(), LoadError>;
    /// How many broken SYNs have had no event since; none once the flow has got through.
    fn held_back(&self, flow: u64) -> Option<u32>;
    /// No longer.
    fn unfollow(&mut self, flow: u64) -> Result<(), LoadError>;
}

impl Follow for Followed {
    fn follow(&mut self, flow: u64) -> Result<(), LoadError> {
        self.insert(flow)
    }

    fn held_back(&self, flow: u64) -> Option<u32> {
        self.held_back(flow)
    }

    fn unfollow(&mut self, flow: u64) -> Result<(), LoadError> {
        self.remove(flow)
    }
}

/// The program of one interface.
pub type Follower = Arc<Mutex<dyn Follow>>;

/// All that wait, and what became of those that did.
pub struct Stalls {
    /// By the number of the flow.
    connections: LruCache<u64, Connection>,
    datagrams: LruCache<Datagram, Losses>,
    totals: Totals,
}

/// What became of those that waited, since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Totals {
    /// Got through.
    pub connected: u64,
    /// Did not try again, or were reset.
    pub gave_up: u64,
    /// Made room for others; what became of them is not known.
    pub evicted: u64,
    /// Datagrams that were lost although they had been sent before.
    pub lost_again: u64,
}

/// What `status` shows.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Overview {
    /// Those that wait, the longest waiting first.
    pub waiting: Vec<Stall>,
    /// The others.
    #[serde(flatten)]
    pub totals: Totals,
}

/// An inner TCP connection whose SYNs were broken.
struct Connection {
    about: About,
    follower: Follower,
    /// That of its SYN: another one is another connection.
    sequence: u32,
    /// It is the answer, a SYN-ACK, that is broken.
    is_answer: bool,
    /// Broken SYNs.
    tries: u32,
    /// Those of them that had no event.
    held_back: u32,
    /// SYNs that left whole.
    whole: u32,
    /// The time of its first event.
    since: SystemTime,
    first: Duration,
    last: Duration,
    longest_interval: Duration,
    last_line: Option<Duration>,
}

/// A datagram that was lost.
struct Losses {
    count: u32,
    /// The time of its first event.
    since: SystemTime,
    first: Duration,
    last: Duration,
    last_line: Option<Duration>,
}

/// Who waits, and where.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
struct About {
    proto: String,
    src: IpAddr,
    sport: u16,
    dst: IpAddr,
    dport: u16,
    vni: u32,
    /// The node that drops the packets.
    peer: IpAddr,
    interface: String,
    device: Option<String>,
    #[serde(with = "names::verdict")]
    verdict: Verdict,
}

/// Where a wait has got to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It will be tried again.
    Waiting,
    /// It got through.
    Connected,
    /// It was not tried again, or was reset.
    GaveUp,
    /// The same datagram was lost once more.
    LostAgain,
}

/// A line about a wait.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Line {
    /// When.
    #[serde(with = "rfc3339")]
    pub time: SystemTime,
    /// What.
    pub stall: Stall,
}

/// A connection that waits or has waited, or a datagram that was lost again.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Stall {
    /// Where it has got to.
    pub state: State,
    #[serde(flatten)]
    about: About,
    /// Broken SYNs, or lost datagrams.
    tries: u32,
    /// When the first of them left.
    #[serde(with = "rfc3339")]
    since: SystemTime,
    /// From the first of them to now, to the end, or to the last of them where it gave up.
    waited_seconds: f64,
    /// The next try should come within this time.
    #[serde(skip_serializing_if = "Option::is_none")]
    next_within_seconds: Option<f64>,
    /// `SYN`, or `SYN-ACK` where the answer is broken.
    #[serde(skip_serializing_if = "Option::is_none")]
    segment: Option<String>,
    /// SYNs that left whole afterwards.
    #[serde(default, skip_serializing_if = "is_zero")]
    whole_tries: u32,
    /// What ended the wait was put right by vxcsum.
    #[serde(default, skip_serializing_if = "is_false")]
    fixed: bool,
    /// It was reset.
    #[serde(default, skip_serializing_if = "is_false")]
    reset: bool,
    /// Of a DNS query.
    #[serde(skip_serializing_if = "Option::is_none")]
    question: Option<Asked>,
}

#[derive(Clone, Debug, Deserialize, Serialize)]
struct Asked {
    name: String,
    #[serde(rename = "type")]
    kind: String,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature is serde's")]
const fn is_zero(number: &u32) -> bool {
    *number == 0
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature is serde's")]
const fn is_false(flag: &bool) -> bool {
    !*flag
}

impl Default for Stalls {
    fn default() -> Self {
        Self::new(BOUND)
    }
}

impl Stalls {
    fn new(bound: NonZeroUsize) -> Self {
        Self {
            connections: LruCache::new(bound),
            datagrams: LruCache::new(bound),
            totals: Totals::default(),
        }
    }

    /// Takes an event, or a packet of a followed flow, from the program of `follower`. Returns what
    /// there is to say.
    pub fn observe(&mut self, event: &Event, follower: &Follower) -> Vec<Line> {
        let is_fixed = matches!(event.action, Action::Zeroed | Action::Restored);
        let seen = Seen { event, follower, is_fixed, at: event.trace.boot };
        let stalls = match &event.trace.packet {
            Traced::Tcp(segment) if segment.flags & TcpSegment::SYN != 0 => {
                self.syn(&seen, *segment)
            }
            Traced::Tcp(segment) => self.no_syn(&seen, *segment).into_iter().collect(),
            Traced::Udp(datagram) if seen.is_lost() => {
                self.lost(&seen, datagram).into_iter().collect()
            }
            Traced::Udp(_) | Traced::Other => Vec::new(),
        };
        stalls.into_iter().map(|stall| Line { time: event.time, stall }).collect()
    }

    fn syn(&mut self, seen: &Seen<'_>, segment: TcpSegment) -> Vec<Stall> {
        let mut stalls = Vec::new();
        let is_answer = segment.flags & TcpSegment::ACK != 0;
        // Ports are used again; the sequence number is new then (RFC 6528).
        let is_another = |connection: &Connection| {
            (connection.sequence, connection.is_answer) != (segment.sequence, is_answer)
        };
        if self.connections.peek(&segment.flow).is_some_and(is_another) {
            stalls.extend(self.end(segment.flow, State::GaveUp, seen.at, Ending::Silence));
        }
        let Some(connection) = self.connections.peek_mut(&segment.flow) else {
            if seen.is_lost() {
                self.start(seen, segment, is_answer);
            }
            return stalls;
        };
        connection.longest_interval =
            connection.longest_interval.max(seen.at.saturating_sub(connection.last));
        connection.last = connection.last.max(seen.at);
        if seen.is_lost() {
            connection.tries += 1;
        } else {
            connection.whole += 1;
        }
        if !Arc::ptr_eq(&connection.follower, seen.follower) {
            // The route leads through another interface now.
            unfollow(&connection.follower, segment.flow);
            connection.follower = Arc::clone(seen.follower);
            follow(&connection.follower, segment.flow);
            connection.held_back = 0;
        }
        // One that left whole is most likely answered at once.
        if seen.is_lost() && is_due(&mut connection.last_line, seen.at) {
            stalls.push(connection.stall(State::Waiting, seen.at, Ending::Silence));
        }
        stalls
    }

    fn start(&mut self, seen: &Seen<'_>, segment: TcpSegment, is_answer: bool) {
        let Some(about) = About::new(seen.event) else { return };
        let connection = Connection {
            about,
            follower: Arc::clone(seen.follower),
            sequence: segment.sequence,
            is_answer,
            tries: 1,
            held_back: 0,
            whole: 0,
            since: seen.event.time,
            first: seen.at,
            last: seen.at,
            longest_interval: Duration::ZERO,
            last_line: None,
        };
        // First, or the program's table would have to hold one more.
        if self.connections.len() == self.connections.cap().get()
            && let Some((flow, oldest)) = self.connections.pop_lru()
        {
            unfollow(&oldest.follower, flow);
            self.totals.evicted += 1;
        }
        follow(&connection.follower, segment.flow);
        self.connections.put(segment.flow, connection);
    }

    fn no_syn(&mut self, seen: &Seen<'_>, segment: TcpSegment) -> Option<Stall> {
        let connection = self.connections.peek_mut(&segment.flow)?;
        if segment.flags & TcpSegment::RST != 0 {
            connection.count_held_back(seen.event.trace.held_back);
            return self.end(segment.flow, State::GaveUp, seen.at, Ending::Reset);
        }
        // It has its answer; but it waits on while what it says to that is dropped.
        if segment.flags & TcpSegment::ACK == 0 || seen.is_lost() {
            return None;
        }
        connection.count_held_back(seen.event.trace.held_back);
        let ending = if seen.is_fixed { Ending::Fixed } else { Ending::Whole };
        self.end(segment.flow, State::Connected, seen.at, ending)
    }

    /// Ends the wait of a connection that is there.
    fn end(&mut self, flow: u64, state: State, at: Duration, ending: Ending) -> Option<Stall> {
        let connection = self.connections.pop(&flow)?;
        unfollow(&connection.follower, flow);
        match state {
            State::Connected => self.totals.connected += 1,
            _ => self.totals.gave_up += 1,
        }
        Some(connection.stall(state, at, ending))
    }

    fn lost(&mut self, seen: &Seen<'_>, datagram: &Datagram) -> Option<Stall> {
        let known = self.datagrams.get_mut(datagram);
        let known = known.filter(|it| seen.at.saturating_sub(it.last) < LOST_AGAIN_WITHIN);
        let Some(losses) = known else {
            let losses = Losses {
                count: 1,
                since: seen.event.time,
                first: seen.at,
                last: seen.at,
                last_line: None,
            };
            self.datagrams.put(datagram.clone(), losses);
            return None;
        };
        losses.count += 1;
        losses.last = losses.last.max(seen.at);
        self.totals.lost_again += 1;
        if !is_due(&mut losses.last_line, seen.at) {
            return None;
        }
        let question = match datagram {
            Datagram::Dns { question: Question { name, kind }, .. } => {
                Some(Asked { name: name.clone(), kind: kind.clone() })
            }
            Datagram::Other { .. } => None,
        };
        let stall = Stall {
            state: State::LostAgain,
            about: About::new(seen.event)?,
            tries: losses.count,
            since: losses.since,
            waited_seconds: seconds(losses.last.saturating_sub(losses.first)),
            next_within_seconds: None,
            segment: None,
            whole_tries: 0,
            fixed: false,
            reset: false,
            question,
        };
        Some(stall)
    }

    /// Ends the waits of those that should have tried again long ago.
    pub fn expire(&mut self, now: Duration) -> Vec<Line> {
        let mut silent = Vec::new();
        for (&flow, connection) in &mut self.connections {
            if now < connection.deadline() {
                continue;
            }
            // Tries without an event show here only.
            let held_back = lock(&connection.follower).held_back(flow);
            if connection.count_held_back(held_back.unwrap_or_default()) {
                connection.last = now;
            } else {
                silent.push((flow, connection.silence()));
            }
        }
        let ended = silent.into_iter().filter_map(|(flow, state)| {
            let last = self.connections.peek(&flow)?.last;
            self.end(flow, state, last, Ending::Silence)
        });
        let time = clock::time_of_day(now);
        ended.map(|stall| Line { time, stall }).collect()
    }

    /// Those that wait at this instant, and the rest.
    pub fn overview(&self, now: Duration) -> Overview {
        let mut waiting: Vec<_> = self.connections.iter().map(|(_, it)| it).collect();
        waiting.sort_by_key(|connection| connection.first);
        let stall = |it: &Connection| it.stall(State::Waiting, now, Ending::Silence);
        Overview { waiting: waiting.into_iter().map(stall).collect(), totals: self.totals }
    }

    /// How many wait.
    pub fn waiting(&self) -> u64 {
        self.connections.len() as u64
    }

    /// What became of the others.
    pub const fn totals(&self) -> Totals {
        self.totals
    }
}

/// A packet as it is taken.
struct Seen<'a> {
    event: &'a Event,
    follower: &'a Follower,
    is_fixed: bool,
    at: Duration,
}

impl Seen<'_> {
    /// Whether the receiver drops it.
    const fn is_lost(&self) -> bool {
        self.event.verdict.is_broken() && !self.is_fixed
    }
}

/// What ends a wait.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ending {
    /// A packet that left whole.
    Whole,
    /// A packet that was put right.
    Fixed,
    Reset,
    /// Nothing, or not yet.
    Silence,
}

impl Connection {
    /// How long the next try takes at the most: intervals double, but for the first ones since
    /// Linux 6.5 (`tcp_syn_linear_timeouts`).
    fn next_interval(&self) -> Duration {
        FIRST_INTERVAL.max(self.longest_interval * 2)
    }

    /// When it will be clear that it does not try again.
    fn deadline(&self) -> Duration {
        self.last + self.next_interval() * 2 + SLACK
    }

    /// What silence means.
    const fn silence(&self) -> State {
        // A client that has its SYN-ACK need not say more; without it, it would be sent again.
        if self.is_answer && self.whole > 0 { State::Connected } else { State::GaveUp }
    }

    /// Takes over how many broken SYNs had no event; whether these are more than before.
    const fn count_held_back(&mut self, held_back: u32) -> bool {
        let more = held_back.saturating_sub(self.held_back);
        self.tries += more;
        self.held_back += more;
        more > 0
    }

    fn stall(&self, state: State, at: Duration, ending: Ending) -> Stall {
        let until = if state == State::GaveUp { self.last } else { at };
        let next = (self.last + self.next_interval()).saturating_sub(at);
        Stall {
            state,
            about: self.about.clone(),
            tries: self.tries,
            since: self.since,
            waited_seconds: seconds(until.saturating_sub(self.first)),
            next_within_seconds: (state == State::Waiting).then(|| seconds(next)),
            segment: Some(if self.is_answer { "SYN-ACK" } else { "SYN" }.to_owned()),
            whole_tries: self.whole,
            fixed: ending == Ending::Fixed,
            reset: ending == Ending::Reset,
            question: None,
        }
    }
}

impl About {
    fn new(event: &Event) -> Option<Self> {
        let inner = &event.inner;
        Some(Self {
            proto: inner.proto.clone(),
            src: inner.src?,
            sport: inner.sport?,
            dst: inner.dst?,
            dport: inner.dport?,
            vni: event.vni?,
            peer: event.outer.dst,
            interface: event.interface.clone(),
            device: event.device.clone(),
            verdict: event.verdict,
        })
    }
}

impl Stall {
    /// The verdict on the packets that were lost.
    pub const fn verdict(&self) -> Verdict {
        self.about.verdict
    }

    /// VXLAN network identifier.
    pub const fn vni(&self) -> u32 {
        self.about.vni
    }

    /// The node that dropped them.
    pub const fn peer(&self) -> IpAddr {
        self.about.peer
    }
}

/// Whether a line may follow the last one; takes note of it.
fn is_due(last: &mut Option<Duration>, at: Duration) -> bool {
    let is_due = last.is_none_or(|last| at.saturating_sub(last) >= LINE_INTERVAL);
    if is_due {
        *last = Some(at);
    }
    is_due
}

fn lock(follower: &Mutex<dyn Follow>) -> MutexGuard<'_, dyn Follow + 'static> {
    follower.lock().unwrap_or_else(PoisonError::into_inner)
}

fn follow(follower: &Follower, flow: u64) {
    if let Err(error) = lock(follower).follow(flow) {
        tracing::warn!("the end of a wait will not be seen: {error}");
    }
}

fn unfollow(follower: &Follower, flow: u64) {
    if let Err(error) = lock(follower).unfollow(flow) {
        tracing::warn!("a flow that waits no more is still followed: {error}");
    }
}

/// To the millisecond.
#[expect(clippy::cast_precision_loss, reason = "exact for 285 000 years")]
fn seconds(duration: Duration) -> f64 {
    duration.as_millis() as f64 / 1000.0
}

/// `10:32:06.002312Z eth0 connected  172.29.0.0:40233 > …`, for people.
impl Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", time_of_day(self.time), self.stall.about.interface, self.stall)
    }
}

impl Display for Stall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { state, about, tries, waited_seconds: waited, .. } = self;
        let (peer, many) = (about.peer, *tries != 1);
        let were = if many { "were" } else { "was" };
        let flow = format!(
            "{} > {} ({}, vni {})",
            SocketAddr::new(about.src, about.sport),
            SocketAddr::new(about.dst, about.dport),
            about.proto,
            about.vni
        );
        if *state == State::LostAgain {
            match &self.question {
                Some(Asked { name, kind }) => write!(f, "dns {kind}? {name} ")?,
                None => write!(f, "the same datagram ")?,
            }
            return write!(
                f,
                "lost {tries} times in {waited:.1} s: {flow} left with a broken checksum and was \
                 dropped by {peer}"
            );
        }
        let outcome = match state {
            State::Connected => "connected after",
            State::GaveUp if self.reset => "was reset after",
            State::GaveUp => "gave up after",
            State::Waiting | State::LostAgain => "has been waiting for",
        };
        write!(f, "{flow} {outcome} {waited:.1} s: its first ")?;
        let segment = self.segment.as_deref().unwrap_or("SYN");
        if many {
            write!(f, "{tries} {segment}s")?;
        } else {
            write!(f, "{segment}")?;
        }
        write!(f, " left with a broken checksum and {were} dropped by {peer}")?;
        match (state, self.whole_tries) {
            (State::Connected, _) if self.fixed => write!(f, ", until vxcsum put it right")?,
            (State::Connected, _) | (_, 0) => {}
            (State::Waiting, _) => write!(f, "; one left whole since, not answered yet")?,
            _ => write!(f, "; one left whole since, and had no answer either")?,
        }
        match self.next_within_seconds {
            Some(next) if next > 0.0 => write!(f, "; next try within {next:.1} s"),
            Some(_) => write!(f, "; the next try is overdue"),
            None => Ok(()),
        }
    }
}

/// Nothing where nothing has waited.
impl Display for Overview {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Totals { connected, gave_up, evicted, lost_again } = self.totals;
        if self.waiting.is_empty() && self.totals == Totals::default() {
            return Ok(());
        }
        write!(
            f,
            "stalls: {} waiting, {connected} connected, {gave_up} gave up",
            self.waiting.len()
        )?;
        if lost_again != 0 {
            write!(f, "; {lost_again} datagrams lost again")?;
        }
        if evicted != 0 {
            write!(f, "; {evicted} more than can be followed")?;
        }
        writeln!(f)?;
        for stall in self.waiting.iter().take(LISTED) {
            writeln!(f, "  since {} {stall}", time_of_day(stall.since))?;
        }
        if let Some(more) = self.waiting.len().checked_sub(LISTED).filter(|&more| more > 0) {
            writeln!(f, "  and {more} more")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
