//! Tells when network devices, addresses or routes have changed.

use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use rtnetlink::MulticastGroup;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};

/// The kernel's notifications.
pub struct Changes {
    subscription: Subscription,
}

struct Subscription {
    messages: BoxStream<'static, ()>,
    connection: AbortHandle,
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// Changes come in bursts: a device that appears is a message for itself, for its addresses and for
/// its routes. They are followed together.
const QUIET: Duration = Duration::from_millis(30);
/// A burst is not waited for longer.
const MAX_BURST: Duration = Duration::from_millis(300);
/// Before subscribing anew where that has failed.
const RETRY: Duration = Duration::from_secs(1);

impl Changes {
    /// Subscribes.
    pub fn subscribe() -> std::io::Result<Self> {
        Ok(Self { subscription: Subscription::new()? })
    }

    /// Returns after something may have changed. A notification that the kernel had to drop
    /// (ENOBUFS) arrives as a message too, and a lost connection counts as a change.
    pub async fn next(&mut self) {
        if self.subscription.messages.next().await.is_none() {
            self.resubscribe().await;
            return;
        }
        let burst = async {
            while timeout(QUIET, self.subscription.messages.next())
                .await
                .is_ok_and(|it| it.is_some())
            {}
        };
        // Whatever comes later is the next change.
        let _ = timeout(MAX_BURST, burst).await;
    }

    async fn resubscribe(&mut self) {
        loop {
            match Subscription::new() {
                Ok(subscription) => break self.subscription = subscription,
                Err(error) => tracing::warn!("cannot follow network devices: {error}"),
            }
            sleep(RETRY).await;
        }
    }
}

impl Subscription {
    fn new() -> std::io::Result<Self> {
        let (connection, _handle, messages) = rtnetlink::new_multicast_connection(&[
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
        ])?;
        let connection = tokio::spawn(connection).abort_handle();
        Ok(Self { messages: messages.map(drop).boxed(), connection })
    }
}
