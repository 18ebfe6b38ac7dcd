//! Tells when network devices, addresses, routes or forwarding entries have changed.

use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::BoxStream;
use netlink_packet_route::neighbour::NeighbourMessage;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::MulticastGroup;
use rtnetlink::packet_core::NetlinkPayload;
use tokio::sync::mpsc;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};

/// Changes come in bursts: a device that appears is a message for itself, for its addresses and for
/// its routes. They are followed together.
const QUIET: Duration = Duration::from_millis(30);
/// A burst is not waited for longer.
const MAX_BURST: Duration = Duration::from_millis(300);
/// Before subscribing anew where that has failed.
const RETRY: Duration = Duration::from_secs(1);

/// Subscribes. A message follows every change, at once or after the burst that it comes in; one
/// that waits to be received stands for all since.
pub fn subscribe() -> std::io::Result<mpsc::Receiver<()>> {
    let mut subscription = Subscription::new()?;
    let (report, changes) = mpsc::channel(1);
    // In a task of its own, so that whoever waits for it may stop waiting without losing anything.
    tokio::spawn(async move {
        loop {
            tokio::select! {
                () = report.closed() => return,
                () = subscription.burst() => {}
            }
            // Full where the last change has not been followed yet, which will do for this one.
            let _ = report.try_send(());
        }
    });
    Ok(changes)
}

/// The kernel's notifications.
struct Subscription {
    messages: BoxStream<'static, ()>,
    connection: AbortHandle,
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.connection.abort();
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
            MulticastGroup::Neigh,
        ])?;
        let connection = tokio::spawn(connection).abort_handle();
        let messages = messages.filter_map(async |(message, _)| {
            (!is_neighbour_of_a_host(&message.payload)).then_some(())
        });
        Ok(Self { messages: messages.boxed(), connection })
    }

    /// Returns after something may have changed. A notification that the kernel had to drop
    /// (ENOBUFS) arrives as a message too, and a lost connection counts as a change.
    async fn burst(&mut self) {
        if self.messages.next().await.is_none() {
            return self.renew().await;
        }
        let burst = async {
            while timeout(QUIET, self.messages.next()).await.is_ok_and(|it| it.is_some()) {}
        };
        // Whatever comes later is the next change.
        let _ = timeout(MAX_BURST, burst).await;
    }

    async fn renew(&mut self) {
        loop {
            match Self::new() {
                Ok(subscription) => break *self = subscription,
                Err(error) => tracing::warn!("cannot follow network devices: {error}"),
            }
            sleep(RETRY).await;
        }
    }
}

/// ARP and neighbour discovery, which never rest; forwarding entries come the same way.
fn is_neighbour_of_a_host(payload: &NetlinkPayload<RouteNetlinkMessage>) -> bool {
    let is_of_a_host =
        |neighbour: &NeighbourMessage| neighbour.header.family != AddressFamily::Bridge;
    match payload {
        NetlinkPayload::InnerMessage(
            RouteNetlinkMessage::NewNeighbour(neighbour)
            | RouteNetlinkMessage::DelNeighbour(neighbour),
        ) => is_of_a_host(neighbour),
        _ => false,
    }
}
