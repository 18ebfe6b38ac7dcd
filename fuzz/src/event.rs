//! What comes from the buffers that the BPF programs fill, up to what is said of it.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use vxcsum::event::{Event, Source};
use vxcsum::links::{Link, Links};
use vxcsum::plan::{Plan, Wish};
use vxcsum::program::LoadError;
use vxcsum::receive;
use vxcsum::stalls::{Follow, Line, Stalls};
use vxcsum_common::Policy;
use vxcsum_common::layout::FixMode;

use crate::assert_one_line;

/// Checks records, each after two bytes with its length and one with its program.
pub fn check(data: &[u8]) {
    let wish = Wish {
        ports: vec![8472, 4789],
        policy: Some(Policy::Sum),
        fix: FixMode::Off,
        fix_unproven: false,
        events_per_second: 0,
    };
    let link = Link { is_raw_ip: data.len().is_multiple_of(7), ..Link::default() };
    let plan = Plan::new(&wish, &link, &Links::default(), (32768, 60999)).expect("two ports");
    let source = Source { interface: "eth0".to_owned(), plan };
    let follower: Arc<Mutex<dyn Follow>> = Arc::new(Mutex::new(Nobody));
    let mut stalls = Stalls::default();
    let mut rest = data;
    while let Some((&[low, high, program], after)) = rest.split_first_chunk() {
        let len = usize::from(u16::from_le_bytes([low, high])).min(after.len());
        let (record, after) = after.split_at(len);
        rest = after;
        if program & 1 == 0 {
            let Some(event) = source.decode(record) else { continue };
            event_holds(&event);
            stalls.observe(&event, &follower).iter().for_each(line_holds);
        } else if let Some(event) = receive::fuzzing::decode(&source.plan, record) {
            event_holds(&event);
        }
    }
    let overview = serde_json::to_string(&stalls.overview(Duration::MAX)).expect("JSON");
    assert!(overview.contains("waiting"));
    stalls.expire(Duration::from_secs(u64::from(u32::MAX))).iter().for_each(line_holds);
}

fn event_holds(event: &Event) {
    let json = serde_json::to_string(event).expect("JSON");
    let again: Event = serde_json::from_str(&json).expect("an event");
    assert_eq!(again.json(), json);
    assert_eq!(again.to_string(), event.to_string());
    assert_one_line(&event.outer.to_string());
    assert_one_line(&event.inner.to_string());
    if event.verdict.is_broken() {
        assert_eq!(event.outer.src.is_ipv4(), event.outer.dst.is_ipv4());
    }
}

fn line_holds(line: &Line) {
    assert_one_line(&line.to_string());
    let json = serde_json::to_string(line).expect("JSON");
    let again: Line = serde_json::from_str(&json).expect("a line");
    assert_eq!(serde_json::to_string(&again).expect("JSON"), json);
}

/// Follows nothing.
struct Nobody;

impl Follow for Nobody {
    fn follow(&mut self, _: u64) -> Result<(), LoadError> {
        Ok(())
    }

    fn held_back(&self, _: u64) -> Option<u32> {
        Some(0)
    }

    fn unfollow(&mut self, _: u64) -> Result<(), LoadError> {
        Ok(())
    }
}
