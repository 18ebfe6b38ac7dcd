//! The way of news from the ring buffers to those who want them: stalls see each packet at once, then
//! events get their causes ([`crate::annotate`]), then printer and clients get them.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{broadcast, mpsc};
use tokio::time::{MissedTickBehavior, interval};

use crate::clock;
use crate::event::Event;
use crate::stalls::{self, Stalls};
use crate::supervisor::Record;

/// How often to look for connections that have given up.
const STALL_INTERVAL: Duration = Duration::from_secs(1);

/// What is told as it happens.
#[derive(Clone, Debug)]
pub enum News {
    /// A broken packet.
    Event(Arc<Event>),
    /// Somebody waits for one, or does no longer.
    Stall(Arc<stalls::Line>),
}

/// What clients are told. Apart, so that no storm of events hides who waits.
#[derive(Clone, Debug)]
pub struct Channels {
    /// Broken packets.
    pub events: broadcast::Sender<Arc<Event>>,
    /// Who waits, and who does no longer.
    pub stalls: broadcast::Sender<Arc<stalls::Line>>,
}

impl Channels {
    /// For clients that may fall `len` items behind before they miss some.
    pub fn new(len: usize) -> Self {
        Self { events: broadcast::channel(len).0, stalls: broadcast::channel(len).0 }
    }
}

/// Shows each packet to the stalls as it comes, because what waits is to be followed before it tries
/// again. Hands on what there is to tell, in order.
pub async fn observe(
    mut records: mpsc::Receiver<Record>,
    news: mpsc::Sender<News>,
    stalls: Arc<Mutex<Stalls>>,
) {
    let mut look = interval(STALL_INTERVAL);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let (event, lines) = tokio::select! {
            // A retry that has been told already is no silence.
            biased;
            record = records.recv() => match record {
                Some(Record::Event(event, follower)) => {
                    let lines = lock(&stalls).observe(&event, &follower);
                    ((!event.trace.is_followed).then_some(event), lines)
                }
                Some(Record::Dropped(event)) => (Some(event), Vec::new()),
                Some(Record::Undecodable(interface)) => {
                    tracing::warn!("an event of {interface} cannot be decoded");
                    continue;
                }
                None => return,
            },
            _ = look.tick() => (None, lock(&stalls).expire(clock::boot())),
        };
        let lines = lines.into_iter().map(|line| News::Stall(Arc::new(line)));
        for item in event.into_iter().map(News::Event).chain(lines) {
            if news.send(item).await.is_err() {
                return;
            }
        }
    }
}

/// Hands news to the printer, which is waited for, and to clients, which are not.
pub async fn distribute<Line: From<News>>(
    mut news: mpsc::Receiver<News>,
    mut printing: Option<mpsc::Sender<Line>>,
    clients: Channels,
) {
    while let Some(item) = news.recv().await {
        // To send fails while there is no client.
        match item.clone() {
            News::Event(event) => _ = clients.events.send(event),
            News::Stall(line) => _ = clients.stalls.send(line),
        }
        if let Some(printer) = &printing
            && printer.send(item.into()).await.is_err()
        {
            printing = None;
        }
    }
}

/// A panic elsewhere has left the table as it was between two packets.
pub fn lock(stalls: &Mutex<Stalls>) -> MutexGuard<'_, Stalls> {
    stalls.lock().unwrap_or_else(PoisonError::into_inner)
}
