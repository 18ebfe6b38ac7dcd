//! What the daemon and its clients say to each other: JSON, one object a line.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use vxcsum_common::Verdict;
use vxcsum_common::layout::FixMode;

use crate::event::{Direction, Event};
use crate::names;
use crate::stalls::Stall;

/// Longest line in bytes; longer ones end the connection.
pub const MAX_LINE_LEN: usize = 64 * 1024;

/// The first line of a client.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(tag = "command", rename_all = "snake_case", deny_unknown_fields)]
pub enum Command {
    /// Events from now on, one a line, until the client closes.
    Tail(Filter),
    /// A summary.
    Status {},
    /// Switches the fix mode.
    Fix {
        /// To this mode.
        #[serde(with = "names::fix_mode")]
        mode: FixMode,
    },
}

/// Which events a client wants; an empty list stands for all.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Filter {
    /// Names of verdicts.
    pub verdict: Vec<String>,
    /// VXLAN network identifiers.
    pub vni: Vec<u32>,
    /// Outer addresses of the other node.
    pub peer: Vec<IpAddr>,
    /// Who saw it.
    pub direction: Vec<Direction>,
    /// No events, only waits.
    pub stalls: bool,
}

impl Filter {
    /// Whether the client wants an event.
    pub fn matches(&self, event: &Event) -> bool {
        !self.stalls && self.lists(event.verdict, event.vni, event.peer(), event.direction)
    }

    /// Whether the client wants to know of a wait, which shows where packets leave.
    pub fn matches_stall(&self, stall: &Stall) -> bool {
        self.lists(stall.verdict(), Some(stall.vni()), stall.peer(), Direction::Egress)
    }

    fn lists(
        &self,
        verdict: Verdict,
        vni: Option<u32>,
        peer: IpAddr,
        direction: Direction,
    ) -> bool {
        fn is_listed<T: PartialEq<U>, U: ?Sized>(list: &[T], value: &U) -> bool {
            list.is_empty() || list.iter().any(|item| item == value)
        }
        is_listed(&self.verdict, verdict.as_str())
            && (self.vni.is_empty() || vni.is_some_and(|vni| self.vni.contains(&vni)))
            && is_listed(&self.peer, &peer)
            && is_listed(&self.direction, &direction)
    }
}

/// What the daemon says besides events and summaries.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Notice {
    /// It cannot do what was asked.
    Error(String),
    /// The client was too slow: that many events passed it by.
    Missed(u64),
    /// The same of lines about waits.
    MissedStalls(u64),
    /// The fix mode from now on.
    Fix(#[serde(with = "names::fix_mode")] FixMode),
}
