//! What the BPF programs put into their buffers for a packet.

use vxcsum_common::layout::{Action, Event, SNAPSHOT_LEN};
use vxcsum_common::receive::Dropped;
use vxcsum_common::{Policy, Proof, Verdict};

use crate::cases::{Broken, Case, Expected};

/// Of a broken packet that leaves; none for any other.
pub fn event(case: &Case) -> Option<Vec<u8>> {
    let Expected::Broken(broken) = case.expected else { return None };
    let Broken { verdict, proof, source_port_before_nat, action, .. } = broken;
    let bytes = &case.frame.bytes;
    let mut snapshot = [0; SNAPSHOT_LEN];
    let len = bytes.len().min(SNAPSHOT_LEN);
    snapshot[..len].copy_from_slice(&bytes[..len]);
    let event = Event {
        boot_ns: 1_000_000_000,
        len: bytes.len() as u32,
        segments: case.segments,
        mark: case.mark,
        check: case.frame.check().unwrap_or_default(),
        expected: u16::from(broken.is_sum_told),
        source_port_before_nat,
        snapshot_len: len as u16,
        verdict: verdict as u8,
        action: action as u8,
        proof: proof as u8,
        policy: Policy::Sum as u8,
        ip_summed: Event::IP_SUMMED_UNKNOWN,
        is_followed: 0,
        reserved: [0; 2],
        held_back: 0,
        snapshot,
    };
    Some(bytemuck::bytes_of(&event).to_vec())
}

/// Of a packet that leaves whole, and is told because its flow is followed.
pub fn followed(case: &Case) -> Vec<u8> {
    let whole = Broken {
        verdict: Verdict::Valid,
        is_sum_told: false,
        proof: Proof::None,
        source_port_before_nat: 0,
        action: Action::None,
        after: crate::cases::After::Unchanged,
    };
    let case = Case { expected: Expected::Broken(whole), ..case.clone() };
    let mut record = event(&case).unwrap_or_default();
    if let Some(flag) = record.get_mut(std::mem::offset_of!(Event, is_followed)) {
        *flag = 1;
    }
    record
}

/// Of a packet that was dropped where it arrived.
pub fn dropped(case: &Case) -> Vec<u8> {
    let packet = case.frame.bytes.get(case.frame.ip..).unwrap_or_default();
    let mut interface = [0; 16];
    interface[..4].copy_from_slice(b"eth0");
    let head = Dropped {
        boot_ns: 1_000_000_000,
        len: packet.len() as u32,
        snapshot_len: packet.len() as u32,
        mark: case.mark,
        link_len: case.frame.ip as u32,
        interface,
    };
    [bytemuck::bytes_of(&head), packet].concat()
}
