//! What healthy traffic through a VXLAN loses by being watched, and by what people do instead.

mod bulk;
mod small;
mod subject;

use std::time::Duration;

use anyhow::Result;

use self::bulk::Bulk;
use self::small::Small;
use self::subject::{SUBJECTS, Sample, Subject};
use crate::effort::{Effort, interleaved};
use crate::report::{Findings, Limit, Panel, Series};

/// What is to be left of the traffic (product.md §6).
const REACH_TCP: f64 = 0.99;
const REACH_PACKETS: f64 = 0.98;

const PACKETS: Duration = Duration::from_millis(700);
/// Until connections are at speed and queues are full.
const SETTLE: Duration = Duration::from_millis(200);
/// Where senders run; receivers run on the next one, where there is one.
const SENDER_CPU: usize = 0;

/// Measures TCP and small packets.
pub(crate) fn measure(effort: Effort) -> Result<Findings> {
    let bulk = Bulk::new()?;
    let twice = Effort { repetitions: effort.count(2, 1) * effort.repetitions, ..effort };
    let tcp = interleaved("traffic, TCP", twice, &SUBJECTS, |&subject| {
        subject.measured(&bulk.lab.a, |pid| bulk.send(subject, pid))
    })?;
    drop(bulk);
    let small = Small::new()?;
    let packets = interleaved("traffic, small packets", effort, &SUBJECTS, |&subject| {
        subject.measured(&small.node, |pid| small.send(effort.duration(PACKETS), pid))
    })?;

    let mut findings = Findings::default();
    for (what, unit, samples, reach) in [
        ("TCP", "Gbit/s", tcp, REACH_TCP),
        ("Small packets", "packets/s of a processor", packets, REACH_PACKETS),
    ] {
        findings.panel(panel(what, unit, &samples, Some(reach), |sample| sample.rate));
        let title = format!("{what}: processors busy");
        findings.panel(panel(&title, "cores", &samples, None, |sample| sample.machine));
        let title = format!("{what}: the watching process");
        let mut watcher = panel(&title, "% of a core", &samples, None, |sample| sample.watcher);
        watcher.series.retain(|series| {
            SUBJECTS.iter().any(|subject| {
                subject.name() == series.name
                    && matches!(subject, Subject::Vxcsum(..) | Subject::Tcpdump)
            })
        });
        findings.panel(watcher);
    }
    findings.note(
        "TCP is a connection of iperf3 between two namespaces, sender and receiver on a processor \
         each: the same one for all but `ethtool -K`, which connections notice when they start. The veth pair between them has all its offload on: like a NIC with checksum and \
         segmentation offload it costs the sender's processor nothing per byte, which leaves the cost \
         of watching the least to hide behind. Of four looks in a row, the fastest counts. Some \
         seconds a connection is slower than others, also without anything: twice the repetitions.",
    );
    findings.note(format!(
        "Small packets are UDP with {} bytes of data, by sendmmsg() from one processor, to a NIC that \
         takes everything and has no queue: all the time is the sender's way through the stack. They \
         are counted by the second of processor time.",
        small::LEN
    ));
    findings.note(
        "The empty program shows what the kernel's hook takes by itself, of which nothing is vxcsum's to \
         save.",
    );
    findings.note(
        "All packets are healthy, so `--fix restore` has nothing to write. The cure is `ethtool -K \
         flannel.1 tx-checksum-ip-generic off`. The nft rule breaks packets that are still to be cut or \
         summed up (which is not done here); it stands for what a rule costs.",
    );
    Ok(findings)
}

/// With `reach`, as ratios to what is without.
fn panel(
    title: &str,
    unit: &str,
    samples: &[Vec<Sample>],
    reach: Option<f64>,
    value: fn(&Sample) -> f64,
) -> Panel {
    let mut panel = Panel::new(title, unit);
    let mut without = None;
    for (subject, samples) in SUBJECTS.into_iter().zip(samples) {
        let mut series = Series::new(subject.name(), samples.iter().map(value).collect());
        match (&without, reach) {
            (None, _) => without = Some(series.clone()),
            (Some(without), Some(reach)) => {
                series = series.against(without);
                if subject.is_vxcsum() {
                    series = series.reach_ratio(Limit::AtLeast, reach);
                }
                if let Some(how) = subject.quoted() {
                    series = series.quote(&format!("{title}, {how}"));
                }
            }
            _ => {}
        }
        panel.push(series);
    }
    panel
}
