//! Every verdict, and what the fix modes make of it.

use anyhow::{Result, ensure};
use etherparse::checksum::Sum16BitWords;
use vxcsum_common::layout::{Action, FixMode};
use vxcsum_common::{Device, Offload, Policy, Proof, Verdict};

use super::{
    After, BAD, Broken, Case, Family, MANGLED, OLD_PORT, ONE_PORT, SOURCE_PORT, complete_tcp,
    inner_ip, open_tcp, stale,
};
use crate::packets::{
    Check, Ethernet, Frame, Network, SegmentSum, Transport, UDP_CHECK, Udp, Vxlan,
};

pub(super) fn healthy(family: Family) -> Result<Vec<Case>> {
    use Verdict::{Missing, OffloadPending, Valid, Zero};
    let (open, complete) = (open_tcp(), complete_tcp());
    let frame = |check, inner| family.frame(check, inner);
    Ok(vec![
        Case::quiet("no sum, as meant", frame(Check::Zero, &complete)?, Zero).policy(Policy::Zero),
        Case::quiet("no sum, inner sum open", frame(Check::Zero, &open)?, Zero)
            .policy(Policy::Zero),
        Case::quiet("no sum of an unknown sender", frame(Check::Zero, &open)?, Zero)
            .policy(Policy::Unknown),
        Case::quiet("no sum, GSO", frame(Check::Zero, &open)?, Zero)
            .policy(Policy::Zero)
            .segments(40),
        Case::quiet("no sum of a summing device", frame(Check::Zero, &open)?, Missing),
        Case::quiet("no sum of a summing device, GSO", frame(Check::Zero, &open)?, Missing)
            .segments(2),
        Case::quiet("sum pending", frame(Check::Pending, &complete)?, OffloadPending),
        Case::quiet("sum pending, GSO", frame(Check::Pending, &open)?, OffloadPending).segments(3),
        Case::quiet(
            "sum pending, GSO, marked for NAT",
            frame(Check::Pending, &open)?,
            OffloadPending,
        )
        .device(ONE_PORT)
        .marked()
        .segments(3),
        Case::quiet("sum pending on a zero device", frame(Check::Pending, &open)?, OffloadPending)
            .policy(Policy::Zero),
        Case::quiet("right, inner sum open", frame(Check::Right, &open)?, Valid),
        Case::quiet("right, inner sum complete", frame(Check::Right, &complete)?, Valid),
        Case::quiet("right on a zero device, inner sum open", frame(Check::Right, &open)?, Valid)
            .policy(Policy::Zero),
        Case::quiet("right on a zero device", frame(Check::Right, &complete)?, Valid)
            .policy(Policy::Zero),
        Case::quiet("right, of an unknown sender", frame(Check::Right, &open)?, Valid)
            .policy(Policy::Unknown),
        Case::quiet("right, marked, port from before NAT", frame(Check::Right, &open)?, Valid)
            .device(ONE_PORT)
            .marked(),
        Case::quiet(
            "fix modes leave a pending sum alone",
            frame(Check::Pending, &open)?,
            OffloadPending,
        )
        .fix(FixMode::Restore)
        .unproven()
        .segments(3),
        Case::quiet("fix modes leave a right sum alone", frame(Check::Right, &open)?, Valid)
            .fix(FixMode::Zero)
            .unproven(),
        Case::quiet("fix modes leave a missing sum alone", frame(Check::Zero, &open)?, Missing)
            .fix(FixMode::Restore)
            .unproven(),
    ])
}

/// What was zero, before somebody wrote to it.
pub(super) fn mangled(family: Family) -> Result<Vec<Case>> {
    let (open, complete) = (open_tcp(), complete_tcp());
    let value = |value| family.frame(Check::Value(value), &open);
    Ok(vec![
        Case::broken("0xffff on a zero device", value(0xffff)?, MANGLED).policy(Policy::Zero),
        Case::broken(
            "0xffff on a zero device, GSO, inner frame of 5 bytes",
            {
                let cut = Vxlan {
                    inner_len: Some(5),
                    ..Vxlan::new(SOURCE_PORT, Check::Value(0xffff), open_tcp())
                };
                Frame::new(&family.ip(Transport::Vxlan(cut)).into())?
            },
            Broken { is_sum_told: false, ..MANGLED },
        )
        .policy(Policy::Zero)
        .segments(2),
        Case::broken("any value on a zero device", value(0x1357)?, MANGLED).policy(Policy::Zero),
        Case::broken(
            "0xffff on a zero device, inner sum complete",
            family.frame(Check::Value(0xffff), &complete)?,
            MANGLED,
        )
        .policy(Policy::Zero),
        Case::broken(
            "0xffff on a zero device, GSO",
            value(0xffff)?,
            Broken { is_sum_told: false, ..MANGLED },
        )
        .policy(Policy::Zero)
        .segments(17),
        // The zero was changed like a pseudo-header sum; that NAT did it, is not asked.
        Case::broken("0xffff on a zero device, marked", value(0xffff)?, MANGLED)
            .policy(Policy::Zero)
            .device(ONE_PORT)
            .marked(),
    ])
}

/// Sums from before NAT gave the packet another source port.
pub(super) fn stale_by_port(family: Family) -> Result<Vec<Case>> {
    let open = open_tcp();
    // 0xc0de0000 as a hash: port = 32768 + (0xc0de0000 * 28231 >> 32).
    let hash = 0xc0de_0000;
    let port_of_hash = 32768 + 21268;
    let by_hash = Check::Stale { old_port: port_of_hash, old_address: None };
    // The same with the end of the range in it, as in Linux 7.2: (0xc0de0000 * 28232 >> 32).
    let newer_port_of_hash = 32768 + 21269;
    let by_newer_hash = Check::Stale { old_port: newer_port_of_hash, old_address: None };
    Ok(vec![
        Case::broken("stale, one port", family.stale(&open)?, stale(Proof::FlowHash))
            .device(ONE_PORT),
        Case::broken(
            "stale, one port, of an unknown sender",
            family.stale(&open)?,
            stale(Proof::FlowHash),
        )
        .policy(Policy::Unknown)
        .device(ONE_PORT),
        Case::broken(
            "stale, hash",
            family.frame(by_hash, &open)?,
            Broken { source_port_before_nat: port_of_hash, ..stale(Proof::FlowHash) },
        )
        .hash(hash),
        Case::broken(
            "stale, hash, on a newer kernel",
            family.frame(by_newer_hash, &open)?,
            Broken { source_port_before_nat: newer_port_of_hash, ..stale(Proof::FlowHash) },
        )
        .hash(hash),
        Case::broken("stale, but not by the hash's port", family.stale(&open)?, BAD).hash(hash),
        // The hash is the better witness: the range proves nothing where it disagrees.
        Case::broken("stale, marked, but not by the hash's port", family.stale(&open)?, BAD)
            .hash(hash)
            .marked(),
        Case::broken("stale, marked", family.stale(&open)?, stale(Proof::PortRange)).marked(),
        Case::broken("stale, without a mark or a hash", family.stale(&open)?, BAD),
        Case::broken("stale, marked, port out of range", family.stale(&open)?, BAD)
            .device(Device { source_port_min: 50000, source_port_max: 60000, ..ONE_PORT })
            .marked(),
        Case::broken("stale, beyond the upper end of the range", family.stale(&open)?, BAD)
            .device(Device { source_port_min: 40000, source_port_max: OLD_PORT - 1, ..ONE_PORT })
            .marked(),
        // Only newer kernels send from there, and nobody asks which one this is.
        Case::broken(
            "stale, at the upper end of the range",
            family.stale(&open)?,
            stale(Proof::PortRange),
        )
        .device(Device { source_port_min: 40000, source_port_max: OLD_PORT, ..ONE_PORT })
        .marked(),
        Case::broken(
            "stale, at the lower end of the range",
            family.stale(&open)?,
            stale(Proof::PortRange),
        )
        .device(Device { source_port_min: OLD_PORT, source_port_max: 60000, ..ONE_PORT })
        .marked(),
    ])
}

/// Sums from before NAT gave the packet another source address.
pub(super) fn stale_by_address(family: Family) -> Result<Vec<Case>> {
    let open = open_tcp();
    let both = Check::Stale { old_port: OLD_PORT, old_address: Some(family.old_address()) };
    let address_only =
        Check::Stale { old_port: SOURCE_PORT, old_address: Some(family.old_address()) };
    let same_port = Device {
        source_port_min: SOURCE_PORT,
        source_port_max: SOURCE_PORT + 1,
        ..family.local(Device::UNKNOWN)
    };
    Ok(vec![
        Case::broken(
            "address and port rewritten",
            family.frame(both, &open)?,
            stale(Proof::FlowHashAndAddress),
        )
        .device(family.local(ONE_PORT)),
        Case::broken(
            "address rewritten",
            family.frame(address_only, &open)?,
            Broken { source_port_before_nat: SOURCE_PORT, ..stale(Proof::FlowHashAndAddress) },
        )
        .device(same_port),
        Case::broken("address rewritten, the old one not known", family.frame(both, &open)?, BAD)
            .device(ONE_PORT),
        Case::broken("address rewritten, another one known", family.frame(both, &open)?, BAD)
            .device(Device { local_ipv4: [10, 9, 9, 9], local_ipv6: [0xfe; 16], ..ONE_PORT }),
        Case::broken(
            "one off",
            {
                let right = family.frame(Check::Right, &open)?;
                let check = right.check()?;
                right.with_check(check ^ 1)?
            },
            BAD,
        )
        .device(family.local(ONE_PORT)),
    ])
}

/// Sums that nothing explains.
pub(super) fn bad(family: Family) -> Result<Vec<Case>> {
    let (open, complete) = (open_tcp(), complete_tcp());
    let value = |value| family.frame(Check::Value(value), &open);
    let mut cases = vec![
        Case::broken("0xffff on a summing device", value(0xffff)?, BAD),
        Case::broken("a wrong sum of an unknown sender", value(0x1357)?, BAD)
            .policy(Policy::Unknown),
        // Neither pending nor zero: GSO makes no right sum of it, and there is none yet.
        Case::broken(
            "GSO, neither pending nor zero",
            value(0x1357)?,
            Broken { is_sum_told: false, ..BAD },
        )
        .device(ONE_PORT)
        .marked()
        .segments(2),
        Case::broken(
            "GSO, what would be right if it were none",
            family.frame(Check::Right, &open)?,
            Broken { is_sum_told: false, ..BAD },
        )
        .segments(2),
    ];
    // The NIC is to sum from the outer UDP header on, into a field that does not hold what it
    // starts from. What it will make of that is wrong, and there is no right sum before.
    for before in [0, 8] {
        let frame = family.frame(Check::Value(0x1357), &complete)?;
        let start = frame.udp - before;
        let name = format!("open from {before} bytes before the outer UDP header, not pending");
        let mut case = Case::broken(name, frame, Broken { is_sum_told: false, ..BAD });
        case.offloads = vec![Offload::Partial { start, field: case.frame.udp + UDP_CHECK }];
        cases.push(case);
    }
    Ok(cases)
}

pub(super) fn fixes(family: Family) -> Result<Vec<Case>> {
    use Action::{None, RefusedIpv6, RefusedUnknownSum, RefusedUnproven, Restored, Zeroed};
    use FixMode::{Off, Restore, Zero};
    let open = open_tcp();
    let is_v6 = family == Family::V6;
    let zeroed = if is_v6 { (RefusedIpv6, After::Unchanged) } else { (Zeroed, After::Zero) };
    let unknown_sum = (RefusedUnknownSum, After::Unchanged);
    let unproven = (RefusedUnproven, After::Unchanged);
    let unproven_sum = if is_v6 { (RefusedIpv6, After::Unchanged) } else { unknown_sum };
    let mangled = family.frame(Check::Value(0xffff), &open)?;
    let stale_frame = family.stale(&open)?;
    let both = Check::Stale { old_port: OLD_PORT, old_address: Some(family.old_address()) };
    let bad = family.frame(Check::Value(0x2468), &open)?;
    let mut cases = Vec::new();
    for (mode, mangled_then, stale_then, bad_then, gso_then) in [
        (
            Off,
            (None, After::Unchanged),
            (None, After::Unchanged),
            (None, After::Unchanged),
            (None, After::Unchanged),
        ),
        (Zero, zeroed, zeroed, zeroed, unproven_sum),
        (
            Restore,
            (Restored, After::Zero),
            (Restored, After::Right),
            (Restored, After::Right),
            unknown_sum,
        ),
    ] {
        let name = |what: &str| format!("{what}, fix mode {}", mode.as_str());
        let unproven = if mode == Off { (None, After::Unchanged) } else { unproven };
        let gso = Broken { is_sum_told: false, ..BAD };
        let then = |broken: Broken, (action, after)| broken.then(action, after);
        cases.extend([
            Case::broken(name("mangled"), mangled.clone(), then(MANGLED, mangled_then))
                .policy(Policy::Zero)
                .fix(mode),
            Case::broken(
                name("mangled, GSO"),
                mangled.clone(),
                then(Broken { is_sum_told: false, ..MANGLED }, mangled_then),
            )
            .policy(Policy::Zero)
            .segments(9)
            .fix(mode),
            Case::broken(
                name("stale by port"),
                stale_frame.clone(),
                then(stale(Proof::FlowHash), stale_then),
            )
            .device(ONE_PORT)
            .fix(mode),
            Case::broken(
                name("stale by mark"),
                stale_frame.clone(),
                then(stale(Proof::PortRange), stale_then),
            )
            .marked()
            .fix(mode),
            Case::broken(
                name("stale by address"),
                family.frame(both, &open)?,
                then(stale(Proof::FlowHashAndAddress), stale_then),
            )
            .device(family.local(ONE_PORT))
            .fix(mode),
            Case::broken(name("bad"), bad.clone(), then(BAD, unproven)).fix(mode),
            Case::broken(name("bad, unproven too"), bad.clone(), then(BAD, bad_then))
                .fix(mode)
                .unproven(),
            Case::broken(name("bad, GSO"), bad.clone(), then(gso, unproven)).segments(4).fix(mode),
            Case::broken(name("bad, GSO, unproven too"), bad.clone(), then(gso, gso_then))
                .segments(4)
                .fix(mode)
                .unproven(),
        ]);
    }
    Ok(cases)
}

/// Values that are equal by chance.
pub(super) fn coincidences(family: Family) -> Result<Vec<Case>> {
    let coincident = equal_to_its_pseudo_header()?;
    let right = family.frame(Check::Right, &coincident)?;
    let wrong = right.clone().with_check(right.check()? ^ 0x8000)?;
    let tuned = |check, target| tuned_frame(family, check, target);
    Ok(vec![
        Case::quiet("a complete inner sum that looks open, right", right, Verdict::Valid),
        Case::broken("a complete inner sum that looks open, wrong", wrong, BAD),
        Case::broken(
            "a complete inner sum that looks open, stale",
            family.stale(&coincident)?,
            stale(Proof::FlowHash),
        )
        .device(ONE_PORT),
        Case::quiet(
            "a sum that is zero is sent as 0xffff",
            tuned(Check::Right, 0xffff)?,
            Verdict::Valid,
        ),
        Case::broken("0xffff would be right", tuned(Check::Value(0x1111), 0xffff)?, BAD),
        Case::broken(
            "0xffff would be right, restored",
            tuned(Check::Value(0x1111), 0xffff)?,
            BAD.then(Action::Restored, After::Right),
        )
        .fix(FixMode::Restore)
        .unproven(),
        // Nobody can tell the two apart, and pending is left alone.
        Case::quiet(
            "a right sum that equals the pseudo-header sum",
            tuned(Check::Right, pending(family)?)?,
            Verdict::OffloadPending,
        ),
        Case::quiet(
            "a right sum of 0xffff on a zero device",
            tuned(Check::Right, 0xffff)?,
            Verdict::Valid,
        )
        .policy(Policy::Zero),
    ])
}

/// An inner UDP packet whose complete sum is that of its pseudo-header.
fn equal_to_its_pseudo_header() -> Result<Ethernet> {
    let inner = |sum, last: u16| {
        let payload = [&[7; 40][..], &last.to_be_bytes()].concat();
        Ethernet::from(inner_ip(Transport::Udp(Udp {
            source_port: 1000,
            destination_port: 2000,
            payload,
            sum,
        })))
    };
    let open = Frame::new(&inner(SegmentSum::Open, 0))?;
    let Some((start, field)) = open.open else { anyhow::bail!("no open sum") };
    // The pseudo-header's sum is in the field, and once more in the pseudo-header. What is missing
    // to all ones goes into the last word.
    let sum = Sum16BitWords::new()
        .add_slice(&open.bytes[start..])
        .add_slice(&open.bytes[field..field + 2]);
    let last = u16::from_be(sum.ones_complement());
    let complete = inner(SegmentSum::Complete, last);
    let frame = Frame::new(&complete)?;
    ensure!(frame.bytes[field..field + 2] == open.bytes[field..field + 2], "no coincidence");
    Ok(complete)
}

/// The pseudo-header sum of what [`tuned_frame`] makes.
fn pending(family: Family) -> Result<u16> {
    tuned_frame(family, Check::Pending, 1)?.check()
}

/// A frame whose right sum is `right`.
fn tuned_frame(family: Family, check: Check, right: u16) -> Result<Frame> {
    let frame = |check, word: u16| {
        let bytes = [&word.to_be_bytes()[..], &[0x5a; 44]].concat();
        // In ARP no sum is ever open.
        family.frame(check, &Ethernet::of(Network::Other { ethertype: 0x0806, bytes }))
    };
    // Adding a word to the data takes it away from the sum, which is the complement.
    let untuned = frame(Check::Right, 0)?.check()?;
    let sum =
        Sum16BitWords::new().add_2bytes(untuned.to_be_bytes()).add_2bytes((!right).to_be_bytes());
    let word = !u16::from_be(sum.ones_complement());
    ensure!(frame(Check::Right, word)?.check()? == right, "no frame with the sum {right:#06x}");
    frame(check, word)
}
