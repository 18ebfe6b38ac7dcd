//! What vxcsum does to the bytes that leave: nothing when it watches, and two bytes of a broken
//! packet when it fixes.
//!
//! The VXLAN device sits on a macvlan device here. NAT is over when a packet leaves through that,
//! and TC egress of the NIC below, where vxcsum is, comes next: the two captures on the sender
//! show each packet before and after.

use std::time::Duration;

use anyhow::{Context as _, Result};
use vxcsum_tests::capture::{Capture, Direction};
use vxcsum_tests::counters;
use vxcsum_tests::daemon::{Daemon, Event, Summary};
use vxcsum_tests::lab::{Family, Lab, LabConfig, NIC, Nat, OuterSum, PodSums, Underlay};
use vxcsum_tests::oracle;
use vxcsum_tests::traffic::{self, TcpServer, UdpServer};
use vxcsum_tests::workload::everything;

const STALL: Duration = Duration::from_millis(700);
const LOST: Duration = Duration::from_millis(50);
const MASQUERADE: Nat = Nat::Masquerade { random_fully: true };

fn config() -> LabConfig {
    LabConfig {
        underlay: Underlay::Macvlan,
        nic_offload: true,
        pod: Some(PodSums::Open),
        ..LabConfig::default()
    }
}

type Frames = Vec<Vec<u8>>;

/// Frames before and after vxcsum, its events and its summary.
struct Seen {
    before: Frames,
    after: Frames,
    events: Vec<Event>,
    summary: Summary,
}

fn watch(lab: &Lab, options: &[&str], traffic: impl FnOnce(&Lab) -> Result<()>) -> Result<Seen> {
    let before = Capture::start(&lab.a, lab.underlay_device(), Direction::Out)?;
    let after = Capture::start(&lab.a, NIC, Direction::Out)?;
    let vxcsum = Daemon::start(&lab.a, NIC, options)?;
    traffic(lab)?;
    counters::wait_quiet(&lab.a, NIC)?;
    let (events, summary) = vxcsum.stop()?;
    let (before, after) = (before.stop()?.frames, after.stop()?.frames);
    assert_eq!(before.len(), after.len());
    Ok(Seen { before, after, events, summary })
}

/// A connect that stalls, and questions that are not answered.
fn lost_traffic(lab: &Lab) -> Result<()> {
    let tcp = TcpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
    let udp = UdpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
    assert_eq!(traffic::try_connect(&lab.a, tcp.address(), STALL)?, None);
    for len_bytes in [1, 2, 33, 1400] {
        assert!(traffic::udp_request(&lab.a, udp.address(), &vec![1; len_bytes], LOST).is_err());
    }
    Ok(())
}

#[test]
fn watching_changes_nothing_over_ipv4() -> Result<()> {
    watching_changes_nothing(config())
}

#[test]
fn watching_changes_nothing_over_ipv6() -> Result<()> {
    watching_changes_nothing(LabConfig { outer: Family::V6, ..config() })
}

fn watching_changes_nothing(config: LabConfig) -> Result<()> {
    let lab = config.start()?;
    let seen = watch(&lab, &[], |lab| {
        everything(lab)?;
        lab.enable_nat(MASQUERADE)?;
        lost_traffic(lab)
    })?;
    assert!(seen.events.len() >= 5, "{} events", seen.events.len());
    assert!(seen.before.iter().any(|frame| frame.len() > 10_000), "no GSO packet");
    // Two processors may send at once, and pass one device in another order than the other.
    let sorted = |frames: &Frames| {
        let mut frames = frames.clone();
        frames.sort();
        frames
    };
    assert!(sorted(&seen.before) == sorted(&seen.after), "watching has changed a frame");
    Ok(())
}

#[test]
fn fixing_writes_two_bytes_of_stale_packets_only() -> Result<()> {
    for (outer, fix) in [(Family::V4, "zero"), (Family::V4, "restore"), (Family::V6, "restore")] {
        let lab = LabConfig { outer, nat: MASQUERADE, ..config() }.start()?;
        let seen = watch(&lab, &["--fix", fix], everything)?;
        assert!(seen.before.iter().any(|frame| frame.len() > 10_000), "no GSO packet");
        only_checks_differ(&lab, &seen)?;
    }
    Ok(())
}

#[test]
fn fixing_writes_two_bytes_of_mangled_packets_only() -> Result<()> {
    for fix in ["zero", "restore"] {
        let outer_sum = OuterSum::Zero;
        let lab = LabConfig { outer_sum, nat: Nat::ZeroMangle, ..config() }.start()?;
        let seen = watch(&lab, &["--fix", fix], everything)?;
        only_checks_differ(&lab, &seen)?;
    }
    Ok(())
}

/// Each frame that differs does so in its outer checksum, and there is an event that says so.
fn only_checks_differ(lab: &Lab, seen: &Seen) -> Result<()> {
    let (before, after) = (by_the_rest(lab, &seen.before)?, by_the_rest(lab, &seen.after)?);
    assert_eq!(before.len(), after.len());
    let mut written = Vec::new();
    for ((rest, before), (rest_after, after)) in before.iter().zip(&after) {
        assert_eq!(rest, rest_after, "more than the checksum has changed");
        if before == after {
            continue;
        }
        let outer = oracle::outer(before, lab.config.dstport)?.context("not a VXLAN frame")?;
        assert_ne!(outer.check, outer.pseudo, "the field was pending");
        let now = u16::from_be_bytes([after[outer.check_at], after[outer.check_at + 1]]);
        written.push((outer.sport, outer.check, now));
    }
    assert!(written.len() >= 20, "{} frames written to", written.len());
    assert_eq!(written.len(), seen.events.len());
    written.sort_unstable();
    let mut events = seen.events.clone();
    events.sort_by_key(|event| (event.outer.sport, event.check, event.expected));
    for ((sport, was, now), event) in written.iter().zip(&events) {
        assert_eq!((event.outer.sport, event.check), (*sport, *was), "{event:#?}");
        match event.action.as_str() {
            "zeroed" => assert_eq!(*now, 0, "{event:#?}"),
            "restored" if lab.config.outer_sum == OuterSum::Zero => assert_eq!(*now, 0),
            "restored" => assert_eq!(Some(*now), event.expected, "{event:#?}"),
            other => anyhow::bail!("{other}: {event:#?}"),
        }
    }
    assert!(seen.summary.interface()?.fixed >= written.len() as u64);
    Ok(())
}

/// Frames beside what is left of them without the outer checksum, in order of that: two processors
/// may send at once, and pass one device in another order than the other.
fn by_the_rest(lab: &Lab, frames: &Frames) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut keyed = Vec::new();
    for frame in frames {
        let mut rest = frame.clone();
        if let Some(outer) = oracle::outer(frame, lab.config.dstport)? {
            rest[outer.check_at..outer.check_at + 2].fill(0);
        }
        keyed.push((rest, frame.clone()));
    }
    keyed.sort();
    Ok(keyed)
}

/// The same frames sent with and without vxcsum arrive the same.
#[test]
fn replayed_frames_arrive_the_same_with_and_without() -> Result<()> {
    let lab = LabConfig { nat: MASQUERADE, ..LabConfig::default() }.start()?;
    let frames = frames_to_replay(&lab)?;
    let replay = || -> Result<Frames> {
        let capture = Capture::start(&lab.b, NIC, Direction::In)?;
        traffic::send_frames(&lab.a, NIC, &frames)?;
        Ok(capture.stop()?.frames)
    };
    let without = replay()?;
    assert_eq!(without, frames);
    let vxcsum = Daemon::start(&lab.a, NIC, [""; 0])?;
    let with = replay()?;
    let (_, summary) = vxcsum.stop()?;
    assert_eq!(with, without);
    let interface = summary.interface()?;
    assert_eq!(interface.skbs, frames.len() as u64);
    assert_eq!(interface.vxlan().packets + interface.not_vxlan, frames.len() as u64);
    assert!(interface.broken() > 0 && interface.packets("unverified") > 0, "{interface:?}");
    Ok(())
}

/// Stale frames as they were seen on the wire, and each of them cut short everywhere, with a tag,
/// and with other bytes in it.
fn frames_to_replay(lab: &Lab) -> Result<Frames> {
    let capture = Capture::start(&lab.a, NIC, Direction::Out)?;
    lost_traffic(lab)?;
    let seen = capture.stop()?.frames;
    let mut frames = seen.clone();
    for frame in &seen {
        let cuts = (14..frame.len().min(120)).map(|len| frame[..len].to_vec());
        frames.extend(cuts);
        let mut tagged = frame.clone();
        tagged.splice(12..12, [0x81, 0x00, 0x00, 0x64]);
        frames.push(tagged);
        for at in 14..frame.len().min(120) {
            let mut changed = frame.clone();
            changed[at] ^= 0xff;
            frames.push(changed);
        }
    }
    Ok(frames)
}
