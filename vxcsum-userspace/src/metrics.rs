//! `--metrics`: counters over HTTP, for Prometheus.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ACCEPT, CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method as HttpMethod, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::timeout;
use vxcsum_common::Verdict;
use vxcsum_common::layout::Report;

use crate::receive;
use crate::server::{Metered, Request, Trouble};
use crate::stalls::Totals;
use crate::supervisor::Counted;

/// For a scraper to ask, and to take its answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Scrapers at the same time; others wait. Whoever reaches the port is one, and may not take all file
/// descriptors.
const MAX_SCRAPERS: usize = 64;

/// Answers scrapes from now on.
pub async fn serve(address: SocketAddr, requests: mpsc::Sender<Request>) -> Result<()> {
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("cannot serve metrics on {address}"))?;
    tokio::spawn(async move {
        let places = Arc::new(Semaphore::new(MAX_SCRAPERS));
        let mut trouble = Trouble::new("cannot accept a scraper");
        loop {
            // Never closed.
            let Ok(place) = places.clone().acquire_owned().await else { return };
            match listener.accept().await {
                Ok((stream, _)) => {
                    trouble.is_over();
                    let requests = requests.clone();
                    let service = service_fn(move |request| answer(request, requests.clone()));
                    let connection = hyper::server::conn::http1::Builder::new()
                        .timer(TokioTimer::new())
                        .keep_alive(false)
                        .serve_connection(TokioIo::new(stream), service);
                    tokio::spawn(async move {
                        // A scraper that goes away or speaks no HTTP is no concern of ours.
                        let _ = timeout(PATIENCE, connection).await;
                        drop(place);
                    });
                }
                Err(error) => trouble.wait(&error).await,
            }
        }
    });
    Ok(())
}

async fn answer(
    request: hyper::Request<Incoming>,
    requests: mpsc::Sender<Request>,
) -> Result<hyper::Response<Full<Bytes>>, Infallible> {
    let is_known = request.uri().path() == "/metrics";
    let is_get = request.method() == HttpMethod::GET;
    let (status, content_type, body) = match (is_known, is_get) {
        (true, true) => match counted(&requests).await {
            Some(counted) => {
                let accept = request.headers().get(ACCEPT).and_then(|it| it.to_str().ok());
                let format = Format::accepted(accept.unwrap_or_default());
                (StatusCode::OK, format.content_type(), format.encode(counted))
            }
            None => (StatusCode::SERVICE_UNAVAILABLE, PLAIN, "vxcsum cannot count\n".to_owned()),
        },
        (true, false) => (StatusCode::METHOD_NOT_ALLOWED, PLAIN, "only GET\n".to_owned()),
        (false, _) => (StatusCode::NOT_FOUND, PLAIN, "see /metrics\n".to_owned()),
    };
    let mut response = hyper::Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    Ok(response)
}

async fn counted(requests: &mpsc::Sender<Request>) -> Option<Metered> {
    let (reply, counted) = oneshot::channel();
    requests.send(Request::Count(reply)).await.ok()?;
    counted.await.ok()?.ok()
}

const PLAIN: &str = "text/plain; charset=utf-8";

/// What a scraper understands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    /// Prometheus text 0.0.4.
    Text,
    /// `OpenMetrics` 1.0.
    OpenMetrics,
}

impl Format {
    fn accepted(accept: &str) -> Self {
        if accept.contains("application/openmetrics-text") { Self::OpenMetrics } else { Self::Text }
    }

    const fn content_type(self) -> &'static str {
        match self {
            Self::Text => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }

    fn encode(self, metered: Metered) -> String {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Snapshot::new(metered)));
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = prometheus_client::encoding::text::encode(&mut text, &registry);
        match self {
            Self::OpenMetrics => text,
            Self::Text => to_prometheus_text(&text),
        }
    }
}

/// `OpenMetrics` names a counter's family without the suffix that its samples have, and ends with a
/// mark; the older text format does neither.
fn to_prometheus_text(open_metrics: &str) -> String {
    let mut counters = Vec::new();
    for line in open_metrics.lines() {
        if let Some(name) = line.strip_prefix("# TYPE ").and_then(|it| it.strip_suffix(" counter"))
        {
            counters.push(name);
        }
    }
    let mut text = String::with_capacity(open_metrics.len());
    for line in open_metrics.lines().filter(|&line| line != "# EOF") {
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some(kind), Some(name), Some(rest)) if counters.contains(&name) => {
                for part in ["# ", kind, " ", name, "_total ", rest, "\n"] {
                    text.push_str(part);
                }
            }
            _ => {
                text.push_str(line);
                text.push('\n');
            }
        }
    }
    text
}

/// All metrics at one instant.
#[derive(Debug)]
struct Snapshot {
    metered: Metered,
    /// Of the peers in `metered`.
    peers: Vec<String>,
}

/// A sample: its labels and its value.
type Sample<'a> = (Vec<(&'static str, &'a str)>, u64);

/// A metric: its name, its help and its samples.
type Family<'a> = (&'static str, &'static str, Vec<Sample<'a>>);

impl Snapshot {
    fn new(metered: Metered) -> Self {
        let peers = metered.counts.receive.peers.iter().map(|&(peer, _)| receive::peer_name(peer));
        Self { peers: peers.collect(), metered }
    }

    fn samples<'a, Samples: IntoIterator<Item = Sample<'a>>>(
        &'a self,
        of_interface: impl Fn(&'a Counted) -> Samples,
    ) -> Vec<Sample<'a>> {
        self.metered.counts.interfaces.iter().flat_map(of_interface).collect()
    }

    fn events(&self, report: Report) -> Vec<Sample<'_>> {
        let counters = self.metered.counts.interfaces.iter().map(|it| &it.counters);
        vec![(Vec::new(), counters.map(|it| it.reported(report).skbs).sum())]
    }

    fn receive_events(&self, report: Report) -> Vec<Sample<'_>> {
        vec![(Vec::new(), self.metered.counts.receive.reported(report))]
    }

    fn dropped(&self) -> Vec<Sample<'_>> {
        let drops = self.metered.counts.receive.peers.iter().map(|(_, drops)| drops.packets());
        let names = self.peers.iter();
        names.zip(drops).map(|(name, packets)| (vec![("peer", &**name)], packets)).collect()
    }

    fn stalls(&self) -> Vec<Sample<'_>> {
        let Totals { connected, gave_up, evicted, lost_again } = self.metered.stalls;
        let by_outcome = [
            ("connected", connected),
            ("gave_up", gave_up),
            ("evicted", evicted),
            ("lost_again", lost_again),
        ];
        by_outcome.map(|(outcome, count)| (vec![("outcome", outcome)], count)).to_vec()
    }

    fn counters(&self) -> Vec<Family<'_>> {
        let by_verdict = |value: fn(vxcsum_common::layout::Tally) -> u64| {
            self.samples(move |it| {
                Verdict::ALL.map(|verdict| {
                    let labels = vec![("interface", &*it.name), ("verdict", verdict.as_str())];
                    (labels, value(it.counters.of(verdict)))
                })
            })
        };
        vec![
            (
                "vxcsum_skbs",
                "Packets seen on their way out, as the stack hands them down",
                self.samples(|it| [(vec![("interface", &*it.name)], it.counters.skbs())]),
            ),
            (
                "vxcsum_packets",
                "VXLAN packets on the wire by the verdict on their outer UDP checksum",
                by_verdict(|tally| tally.packets()),
            ),
            (
                "vxcsum_bytes",
                "Bytes of VXLAN packets on the wire by the verdict on their outer UDP checksum",
                by_verdict(|tally| tally.bytes),
            ),
            (
                "vxcsum_fixed_packets",
                "Packets on the wire whose outer UDP checksum was rewritten",
                self.samples(|it| {
                    [("zeroed", it.counters.zeroed), ("restored", it.counters.restored)].map(
                        |(action, value)| {
                            (vec![("interface", &*it.name), ("action", action)], value)
                        },
                    )
                }),
            ),
            ("vxcsum_events_emitted", "Events sent to user space", self.events(Report::Emitted)),
            (
                "vxcsum_events_suppressed",
                "Events held back by the rate limit",
                self.events(Report::Suppressed),
            ),
            ("vxcsum_events_lost", "Events that found no room", self.events(Report::Lost)),
            (
                "vxcsum_stalls",
                "Connections that have waited for a broken packet, and datagrams lost again",
                self.stalls(),
            ),
            (
                "vxcsum_receive_dropped_packets",
                "VXLAN packets that this node dropped for their UDP checksum, by the sending node",
                self.dropped(),
            ),
            (
                "vxcsum_receive_not_vxlan_packets",
                "Other packets that this node dropped for their UDP checksum",
                vec![(Vec::new(), self.metered.counts.receive.not_vxlan)],
            ),
            (
                "vxcsum_receive_events_emitted",
                "Events of dropped packets sent to user space",
                self.receive_events(Report::Emitted),
            ),
            (
                "vxcsum_receive_events_suppressed",
                "Events of dropped packets held back by the rate limit",
                self.receive_events(Report::Suppressed),
            ),
            (
                "vxcsum_receive_events_lost",
                "Events of dropped packets that found no room",
                self.receive_events(Report::Lost),
            ),
        ]
    }

    fn gauges(&self) -> Vec<Family<'_>> {
        let attached = self.samples(|it| {
            it.method.map(|method| (vec![("interface", &*it.name), ("method", method.as_str())], 1))
        });
        let waiting = vec![(Vec::new(), self.metered.waiting)];
        let receive = vec![(Vec::new(), u64::from(self.metered.counts.receive.why_not.is_none()))];
        let build = vec![(vec![("version", env!("CARGO_PKG_VERSION"))], 1)];
        vec![
            ("vxcsum_attached", "Interfaces that are watched", attached),
            ("vxcsum_stalls_waiting", "Connections that wait for a broken packet now", waiting),
            ("vxcsum_receive_attached", "Whether drops on this node are watched", receive),
            ("vxcsum_build_info", "The version that is running", build),
        ]
    }
}

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        for (name, help, samples) in self.counters() {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for (labels, value) in samples {
                // An empty set of labels would be written as "{}".
                if labels.is_empty() {
                    family.encode_counter::<NoLabelSet, u64, f64>(&value, None)?;
                } else {
                    ConstCounter::new(value).encode(family.encode_family(&labels)?)?;
                }
            }
        }
        for (name, help, samples) in self.gauges() {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for (labels, value) in samples {
                let value = i64::try_from(value).unwrap_or(i64::MAX);
                if labels.is_empty() {
                    family.encode_gauge(&value)?;
                } else {
                    ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use vxcsum_common::layout::Counters;
    use vxcsum_common::receive::Drops;

    use super::*;
    use crate::attach::Method;
    use crate::supervisor::Counts;

    fn counted() -> Metered {
        let mut counters = Counters { not_vxlan: 5, restored: 2, ..Counters::default() };
        let tally = &mut counters.tallies[Verdict::StaleNat as usize][Report::Emitted as usize];
        (tally.skbs, tally.further_segments, tally.bytes) = (3, 1, 500);
        let eth0 = Counted {
            name: "eth0".to_owned(),
            method: Some(Method::Tcx),
            counters,
            sent_packets: None,
        };
        let receive = receive::Counted {
            why_not: None,
            not_vxlan: 7,
            peers: vec![
                (Some([10, 0, 0, 11].into()), Drops([0, 1, 2, 0])),
                (None, Drops([0, 0, 0, 4])),
            ],
            in_csum_errors: None,
        };
        let stalls = Totals { connected: 7, gave_up: 1, ..Totals::default() };
        Metered { counts: Counts { interfaces: vec![eth0], receive }, waiting: 2, stalls }
    }

    #[test]
    fn names_are_those_of_the_documentation() {
        let text = Format::Text.encode(counted());
        for line in [
            "# TYPE vxcsum_skbs_total counter",
            r#"vxcsum_skbs_total{interface="eth0"} 8"#,
            r#"vxcsum_packets_total{interface="eth0",verdict="stale_nat"} 4"#,
            r#"vxcsum_bytes_total{interface="eth0",verdict="stale_nat"} 500"#,
            r#"vxcsum_fixed_packets_total{interface="eth0",action="restored"} 2"#,
            "vxcsum_events_emitted_total 3",
            "vxcsum_events_suppressed_total 0",
            "vxcsum_events_lost_total 0",
            "vxcsum_stalls_waiting 2",
            "# TYPE vxcsum_stalls_total counter",
            r#"vxcsum_stalls_total{outcome="connected"} 7"#,
            r#"vxcsum_stalls_total{outcome="gave_up"} 1"#,
            r#"vxcsum_stalls_total{outcome="evicted"} 0"#,
            r#"vxcsum_attached{interface="eth0",method="tcx"} 1"#,
            r#"vxcsum_receive_dropped_packets_total{peer="10.0.0.11"} 3"#,
            r#"vxcsum_receive_dropped_packets_total{peer="other"} 4"#,
            "vxcsum_receive_not_vxlan_packets_total 7",
            "vxcsum_receive_events_emitted_total 1",
            "vxcsum_receive_events_suppressed_total 2",
            "vxcsum_receive_events_lost_total 4",
            "vxcsum_receive_attached 1",
        ] {
            assert!(text.lines().any(|it| it == line), "{line} is not in\n{text}");
        }
        assert!(text.contains("vxcsum_build_info{version="), "{text}");
        assert!(!text.contains("# EOF"), "{text}");
    }

    #[test]
    fn open_metrics_for_those_who_ask() {
        let accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5";
        assert_eq!(Format::accepted(accept), Format::OpenMetrics);
        assert_eq!(Format::accepted("*/*"), Format::Text);
        let text = Format::OpenMetrics.encode(counted());
        assert!(text.contains("# TYPE vxcsum_skbs counter\n"), "{text}");
        assert!(text.ends_with("# EOF\n"), "{text}");
    }
}
