//! Gives events their causes, on their way from the ring buffers to those who want them.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until};

use crate::cause::{Explainer, without_rules};
use crate::clock;
use crate::event::Direction;
use crate::memory;
use crate::netfilter;
use crate::news::News;

/// How old rules may be that packets are explained by.
const FRESH: Duration = Duration::from_secs(5);
/// Reading rules is to take no more than this part of the time.
const MAX_SHARE: u32 = 50;
/// How long an event waits for rules at most.
const PATIENCE: Duration = Duration::from_millis(1500);
/// How many events wait at most.
const MAX_WAITING: usize = 4096;
/// Rules are forgotten when nothing has been explained by them for so long.
const IDLE: Duration = Duration::from_mins(1);

/// Takes events, finds what led to them, and hands them on in the same order, until there are no
/// more. Rules are read when there are events to explain, in a thread of their own. An event that
/// would have to wait for long goes on with what is known, and one that nobody wants, as it is.
pub async fn annotate(
    mut news: mpsc::Receiver<News>,
    annotated: mpsc::Sender<News>,
    is_wanted: impl Fn() -> bool,
) {
    let mut rules = Rules::default();
    let mut waiting: VecDeque<Waiting> = VecDeque::new();
    let mut is_over = false;
    while !(is_over && waiting.is_empty()) {
        let deadline = match waiting.front() {
            Some(first) => first.since + PATIENCE,
            None => rules.used + IDLE,
        };
        tokio::select! {
            item = news.recv(), if !is_over && waiting.len() < MAX_WAITING => match item {
                Some(item) => {
                    let is_wanted = has_cause_here(&item) && is_wanted();
                    if is_wanted {
                        rules.want();
                    }
                    waiting.push_back(Waiting { since: Instant::now(), item, is_wanted });
                }
                None => is_over = true,
            },
            () = rules.arrive(), if rules.reading.is_some() => {}
            () = sleep_until(deadline), if !waiting.is_empty() || rules.explainer.is_some() => {
                if waiting.is_empty() {
                    rules.explainer = None;
                    memory::give_back();
                }
            }
        }
        let now = Instant::now();
        while let Some(first) = waiting.front() {
            let is_late = now >= first.since + PATIENCE || waiting.len() >= MAX_WAITING;
            if first.is_wanted && rules.are_coming() && !is_late {
                break;
            }
            let Some(first) = waiting.pop_front() else { break };
            let item = if first.is_wanted { rules.annotated(first.item) } else { first.item };
            if annotated.send(item).await.is_err() {
                return;
            }
        }
    }
}

/// Whether it is this node's rules that may explain it: what was dropped here was broken by its
/// sender.
fn has_cause_here(item: &News) -> bool {
    matches!(item, News::Event(event) if event.direction == Direction::Egress)
}

/// News on their way.
struct Waiting {
    since: Instant,
    item: News,
    /// It is to be explained.
    is_wanted: bool,
}

/// The rules that packets are explained by.
struct Rules {
    explainer: Option<Explainer>,
    reading: Option<Reading>,
    /// When they have to be read again.
    stale: Instant,
    used: Instant,
}

/// Rules that are being read.
struct Reading {
    began: Instant,
    time: Duration,
    result: oneshot::Receiver<netfilter::Ruleset>,
}

impl Default for Rules {
    fn default() -> Self {
        let now = Instant::now();
        Self { explainer: None, reading: None, stale: now, used: now }
    }
}

impl Rules {
    /// Begins to read them, unless they are fresh.
    fn want(&mut self) {
        let now = Instant::now();
        self.used = now;
        if self.reading.is_some() || now < self.stale {
            return;
        }
        let (send, result) = oneshot::channel();
        let time = clock::boot();
        let reader = thread::Builder::new().name("rules".to_owned()).spawn(move || {
            // Nobody waits for them any more when the daemon ends.
            let _ = send.send(netfilter::read());
        });
        match reader {
            Ok(_) => self.reading = Some(Reading { began: now, time, result }),
            Err(error) => {
                tracing::warn!("cannot read rules: {error}");
                self.stale = now + FRESH;
            }
        }
    }

    /// Waits until rules that are being read are there.
    async fn arrive(&mut self) {
        let Some(reading) = &mut self.reading else { return };
        let result = (&mut reading.result).await;
        if let Some(Reading { began, time, .. }) = self.reading.take() {
            self.stale = Instant::now() + FRESH.max(began.elapsed() * MAX_SHARE);
            if let Ok(rules) = result {
                self.explainer = Some(Explainer::new(rules, time));
            } else {
                tracing::warn!("reading rules failed");
            }
            memory::give_back();
        }
    }

    fn are_coming(&self) -> bool {
        self.reading.is_some()
    }

    fn annotated(&mut self, item: News) -> News {
        let News::Event(mut event) = item else { return item };
        let cause = match &mut self.explainer {
            Some(explainer) => explainer.explain(&event),
            None => without_rules(&event, "reading them takes long"),
        };
        // Nobody else has it yet, so nothing is copied.
        Arc::make_mut(&mut event).cause = Some(cause);
        News::Event(event)
    }
}
