//! What `tail` and `status` read: lines of a daemon, which may be of another version.

use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use vxcsum::cause::Narrator;
use vxcsum::event::Event;
use vxcsum::protocol::{Filter, Notice};
use vxcsum::stalls::Line;
use vxcsum::summary::Summary;

/// Checks lines.
pub fn check(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let mut narrator = Narrator::default();
    for line in text.lines() {
        if let Some(event) = stable::<Event>(line) {
            narrator.write(&mut Vec::new(), &event).expect("memory can be written to");
            let peer = vec![event.peer()];
            assert!(Filter { peer, ..Filter::default() }.matches(&event));
        }
        if let Some(line) = stable::<Line>(line) {
            assert!(!line.to_string().is_empty());
        }
        if let Some(summary) = stable::<Summary>(line) {
            assert!(!summary.to_string().is_empty());
            assert!(!summary.table(&summary, Duration::from_secs(1)).to_string().is_empty());
        }
        stable::<Notice>(line);
    }
}

/// What a line says, if it says that, and is the same once written and read again.
fn stable<T: DeserializeOwned + Serialize>(line: &str) -> Option<T> {
    let said: T = serde_json::from_str(line).ok()?;
    let written = serde_json::to_string(&said).expect("JSON");
    let again: T = serde_json::from_str(&written).expect("what was written");
    assert_eq!(serde_json::to_string(&again).expect("JSON"), written);
    Some(said)
}
