//! For fuzz targets: the decoder of what comes from the ring buffer.

use super::decode;
use crate::event::Event;
use crate::plan::Plan;

/// Decodes a record; `None` for what no program of this version sends.
pub fn decode(plan: &Plan, record: &[u8]) -> Option<Event> {
    decode::decode(plan, record)
}
