//! Counters and attachment of all interfaces.

use std::fmt::{self, Display};

use serde::ser::SerializeMap as _;
use serde::{Serialize, Serializer};
use vxcsum_common::Verdict;
use vxcsum_common::layout::{Counters, FixMode, Report};

use crate::attach::Method;

/// All interfaces.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    #[serde(serialize_with = "fix")]
    fix: FixMode,
    events: Events,
    interfaces: Vec<Interface>,
}

/// Events of all interfaces, one for each broken skb.
#[derive(Clone, Copy, Debug, Default, Serialize)]
struct Events {
    emitted: u64,
    suppressed: u64,
    lost: u64,
}

/// One interface.
#[derive(Clone, Debug, Serialize)]
pub struct Interface {
    name: String,
    #[serde(serialize_with = "method")]
    attach: Method,
    skbs: u64,
    not_vxlan: u64,
    #[serde(serialize_with = "verdicts")]
    verdicts: Counters,
    fixed: u64,
}

impl Interface {
    /// Of what its program has counted.
    pub fn new(name: &str, attach: Method, counters: Counters) -> Self {
        Self {
            name: name.to_owned(),
            attach,
            skbs: counters.skbs(),
            not_vxlan: counters.not_vxlan,
            fixed: counters.zeroed + counters.restored,
            verdicts: counters,
        }
    }
}

impl Summary {
    /// Of all interfaces.
    pub fn new(fix: FixMode, interfaces: Vec<Interface>) -> Self {
        let events = interfaces.iter().fold(Events::default(), |sum, interface| Events {
            emitted: sum.emitted + interface.verdicts.reported(Report::Emitted).skbs,
            suppressed: sum.suppressed + interface.verdicts.reported(Report::Suppressed).skbs,
            lost: sum.lost + interface.verdicts.reported(Report::Lost).skbs,
        });
        Self { fix, events, interfaces }
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature is serde's")]
fn fix<S: Serializer>(fix: &FixMode, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(fix.as_str())
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature is serde's")]
fn method<S: Serializer>(method: &Method, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(method.as_str())
}

#[derive(Serialize)]
struct OnWire {
    packets: u64,
    bytes: u64,
}

fn verdicts<S: Serializer>(counters: &Counters, serializer: S) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(Some(Verdict::ALL.len()))?;
    for verdict in Verdict::ALL {
        let tally = counters.of(verdict);
        let on_wire = OnWire { packets: tally.packets, bytes: tally.bytes };
        map.serialize_entry(verdict.as_str(), &on_wire)?;
    }
    map.end()
}

/// A table for people.
impl Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for interface in &self.interfaces {
            writeln!(
                f,
                "{} ({}): {} skbs, {} of them not VXLAN",
                interface.name,
                interface.attach.as_str(),
                interface.skbs,
                interface.not_vxlan
            )?;
            for verdict in Verdict::ALL {
                let tally = interface.verdicts.of(verdict);
                if tally.skbs == 0 {
                    continue;
                }
                let note = if verdict.is_broken() { "  broken" } else { "" };
                writeln!(
                    f,
                    "  {:<16} {:>10} packets {:>14} bytes{note}",
                    verdict.as_str(),
                    tally.packets,
                    tally.bytes
                )?;
            }
            if interface.fixed != 0 {
                writeln!(f, "  fixed            {:>10} packets", interface.fixed)?;
            }
        }
        let Events { emitted, suppressed, lost } = self.events;
        write!(f, "events: {emitted} emitted, {suppressed} suppressed, {lost} lost")
    }
}
