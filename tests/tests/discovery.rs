//! Without `--interface`: which interfaces are watched, and that devices which come, change and go
//! are followed within a second.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use vxcsum_tests::client::Socket;
use vxcsum_tests::daemon::{Daemon, Interface, Summary};
use vxcsum_tests::held::attached;
use vxcsum_tests::lab::{Lab, LabConfig, NIC, Nat, OuterSum, Underlay, VXLAN};
use vxcsum_tests::packets::Check;
use vxcsum_tests::storm::{Packet, SOURCE_PORTS};
use vxcsum_tests::traffic::{ping, send_frames};
use vxcsum_tests::wait::wait_until;

/// The promise is a second, on a machine that has nothing else to do; tests share theirs. Below the
/// five seconds after which vxcsum looks around unasked: it is the kernel's notices that are tested.
const SOON: Duration = Duration::from_secs(3);
const PLENTY: Duration = Duration::from_secs(5);
/// Long enough for an answer, if there were one.
const LOST: Duration = Duration::from_millis(50);

const NO_ARGS: [&str; 0] = [];

fn lab(underlay: Underlay, outer_sum: OuterSum) -> Result<Lab> {
    LabConfig { underlay, outer_sum, srcport: Some(SOURCE_PORTS), ..LabConfig::default() }.start()
}

fn names(summary: &Summary) -> Vec<&str> {
    summary.interfaces.iter().map(|interface| interface.name.as_str()).collect()
}

/// The counters of the NIC, whose name is that of the first NIC still.
fn nic(summary: &Summary) -> Result<&Interface> {
    summary.interfaces.iter().find(|interface| interface.name == NIC).context("no NIC")
}

/// Watches the NIC and nothing else, once, and knows the device.
fn assert_nic_is_watched(lab: &Lab, socket: &Socket, daemon: &Daemon) -> Result<()> {
    send_frames(&lab.a, NIC, &[Packet::stale().frame()?])?;
    let event = daemon.wait_events(1, PLENTY)?.remove(0);
    assert_eq!((event.interface.as_str(), event.device.as_deref()), (NIC, Some(VXLAN)));
    assert_eq!(event.verdict, "stale_nat");
    assert_eq!(names(&socket.status()?), [NIC]);
    assert_eq!(attached(&lab.a, NIC)?, 1);
    Ok(())
}

#[test]
fn underlay_that_is_set() -> Result<()> {
    let lab = lab(Underlay::Nic, OuterSum::Sum)?;
    let socket = Socket::new()?;
    let daemon = socket.run(&lab.a, NO_ARGS)?;
    let said = daemon.stderr().join("\n");
    assert!(said.contains(&format!("watching {NIC} (")), "{said}");
    assert!(said.contains(VXLAN) && said.contains("policy sum"), "{said}");
    assert!(said.contains("fix off"), "{said}");
    assert_nic_is_watched(&lab, &socket, &daemon)
}

/// The packets are final on the NIC below.
#[test]
fn nic_below_a_macvlan() -> Result<()> {
    let lab = lab(Underlay::Macvlan, OuterSum::Sum)?;
    let socket = Socket::new()?;
    let daemon = socket.run(&lab.a, NO_ARGS)?;
    assert_eq!(attached(&lab.a, lab.underlay_device())?, 0);
    assert_nic_is_watched(&lab, &socket, &daemon)
}

/// A device that is not set to an underlay: by the routes to where it sends.
#[test]
fn underlay_by_the_route_to_the_remote() -> Result<()> {
    let lab = lab(Underlay::Nic, OuterSum::Sum)?;
    lab.remove_vxlan()?;
    let (local, remote) = (lab.outer_a(), lab.outer_b());
    lab.a.ip(&format!(
        "link add {VXLAN} type vxlan id 1 local {local} remote {remote} dstport 8472 srcport 40000 40001 udpcsum\n\
         link set {VXLAN} up"
    ))?;
    let socket = Socket::new()?;
    let daemon = socket.run(&lab.a, NO_ARGS)?;
    assert_nic_is_watched(&lab, &socket, &daemon)
}

#[test]
fn underlay_by_the_route_to_a_forwarding_entry() -> Result<()> {
    let lab = lab(Underlay::Nic, OuterSum::Sum)?;
    lab.remove_vxlan()?;
    let (local, remote) = (lab.outer_a(), lab.outer_b());
    lab.a.ip(&format!(
        "link add {VXLAN} type vxlan id 1 local {local} dstport 8472 srcport 40000 40001 udpcsum\n\
         link set {VXLAN} up"
    ))?;
    // As a CNI does it: first the device, its peers as they become known.
    let socket = Socket::new()?;
    let daemon = socket.launch(&lab.a, NO_ARGS)?;
    daemon.wait_says(0, "waiting", PLENTY)?;
    lab.a.run(&format!("bridge fdb append 02:00:00:00:02:0b dev {VXLAN} dst {remote}"))?;
    daemon.wait_says(0, "watching", SOON)?;
    assert_nic_is_watched(&lab, &socket, &daemon)
}

/// A second device on the same NIC is no reason for a second program.
#[test]
fn two_devices_on_one_nic() -> Result<()> {
    let lab = lab(Underlay::Nic, OuterSum::Sum)?;
    let socket = Socket::new()?;
    let daemon = socket.run(&lab.a, NO_ARGS)?;
    let said = daemon.said();
    let local = lab.outer_a();
    lab.a.ip(&format!(
        "link add vx2 type vxlan id 2 local {local} dev {NIC} dstport 4789 noudpcsum\n\
         link set vx2 up"
    ))?;
    daemon.wait_says(said, "vx2", SOON)?;
    assert_nic_is_watched(&lab, &socket, &daemon)
}

/// Two devices of one port that differ in policy.
#[test]
fn policy_of_each_device() -> Result<()> {
    let lab = lab(Underlay::Nic, OuterSum::Sum)?;
    let local = lab.outer_a();
    lab.a.ip(&format!(
        "link add vx2 type vxlan id 2 local {local} dev {NIC} dstport 8472 noudpcsum\n\
         link set vx2 up"
    ))?;
    let socket = Socket::new()?;
    let daemon = socket.run(&lab.a, NO_ARGS)?;
    let of_vni = |vni| Packet { vni, ..Packet::new(Check::Value(0xffff)) }.frame();
    send_frames(&lab.a, NIC, &[of_vni(1)?, of_vni(2)?])?;
    let events = daemon.wait_events(2, PLENTY)?;
    let seen: Vec<_> = events
        .iter()
        .map(|event| (event.vni, event.device.as_deref(), event.verdict.as_str()))
        .collect();
    assert_eq!(seen, [(1, Some(VXLAN), "bad"), (2, Some("vx2"), "mangled_zero")]);
    Ok(())
}

#[test]
fn waits_for_the_first_device() -> Result<()> {
    let lab = lab(Underlay::Nic, OuterSum::Sum)?;
    lab.remove_vxlan()?;
    let socket = Socket::new()?;
    let daemon = socket.launch(&lab.a, NO_ARGS)?;
    daemon.wait_says(0, "no VXLAN device", PLENTY)?;
    assert!(daemon.stderr().concat().contains("waiting"), "{:?}", daemon.stderr());
    wait_until("the daemon answers", PLENTY, || Ok(socket.status().is_ok()))?;
    assert!(socket.status()?.interfaces.is_empty());
    assert_eq!(attached(&lab.a, NIC)?, 0);

    lab.add_vxlan(OuterSum::Sum)?;
    daemon.wait_says(0, "watching", SOON)?;
    assert_nic_is_watched(&lab, &socket, &daemon)
}

/// Sends a packet with 0xffff in the field and returns its verdict.
fn verdict_on_ffff(lab: &Lab, daemon: &Daemon) -> Result<String> {
    let before = daemon.events()?.len();
    assert!(ping(&lab.a, lab.inner_b(), 56, LOST).is_err());
    let events = daemon.wait_events(before + 1, PLENTY)?;
    Ok(events[before].verdict.clone())
}

#[test]
fn device_made_anew_with_another_policy() -> Result<()> {
    let lab = lab(Underlay::Nic, OuterSum::Zero)?;
    lab.enable_nat(Nat::ZeroMangle)?;
    let socket = Socket::new()?;
    let daemon = socket.run(&lab.a, NO_ARGS)?;
    assert_eq!(verdict_on_ffff(&lab, &daemon)?, "mangled_zero");
    for (outer_sum, policy, verdict) in [
        (OuterSum::Sum, "policy sum (flannel.1)", "bad"),
        (OuterSum::Zero, "policy zero (flannel.1)", "mangled_zero"),
    ] {
        let said = daemon.said();
        lab.remove_vxlan()?;
        lab.add_vxlan(outer_sum)?;
        daemon.wait_says(said, policy, SOON)?;
        assert_eq!(verdict_on_ffff(&lab, &daemon)?, verdict);
    }
    Ok(())
}

/// With the last device its NIC is left, too.
#[test]
fn device_that_goes_for_good() -> Result<()> {
    let lab = lab(Underlay::Nic, OuterSum::Sum)?;
    let socket = Socket::new()?;
    let daemon = socket.run(&lab.a, NO_ARGS)?;
    assert_nic_is_watched(&lab, &socket, &daemon)?;
    lab.remove_vxlan()?;
    daemon.wait_says(0, &format!("no longer watching {NIC}"), SOON)?;
    wait_until("detached", SOON, || Ok(attached(&lab.a, NIC)? == 0))?;
    // What it has counted stays.
    let status = socket.status()?;
    assert_eq!((nic(&status)?.attach.as_deref(), nic(&status)?.broken()), (None, 1));
    let (events, summary) = daemon.stop()?;
    assert_eq!((events.len(), nic(&summary)?.broken()), (1, 1));
    Ok(())
}

#[test]
fn discovered_nic_made_anew() -> Result<()> {
    nic_made_anew(&[])
}

#[test]
fn named_nic_made_anew() -> Result<()> {
    nic_made_anew(&["--interface", NIC])
}

fn nic_made_anew(args: &[&str]) -> Result<()> {
    let lab = lab(Underlay::Nic, OuterSum::Sum)?;
    let socket = Socket::new()?;
    let daemon = socket.run(&lab.a, args)?;
    let stale = Packet::stale().frame()?;
    let mut least = 0;
    for round in 1..=3 {
        send_frames(&lab.a, NIC, &[&stale; 5])?;
        daemon.wait_events(5 * round, PLENTY)?;
        let said = daemon.said();
        lab.remove_nics()?;
        daemon.wait_says(said, "no longer watching", SOON)?;
        let status = socket.status()?;
        assert_eq!(nic(&status)?.attach, None);
        assert_eq!(nic(&status)?.broken(), 5 * round as u64);

        let said = daemon.said();
        lab.add_nics()?;
        let start = Instant::now();
        loop {
            let status = socket.status()?;
            let now = nic(&status)?;
            assert!(now.skbs >= least, "{} skbs after {least}", now.skbs);
            assert_eq!(now.broken(), 5 * round as u64);
            assert_eq!(now.skbs, now.vxlan().packets + now.not_vxlan);
            least = now.skbs;
            if now.attach.is_some() {
                break;
            }
            let stderr = daemon.stderr().join("\n");
            assert!(start.elapsed() < SOON, "round {round}, {:?}: {stderr}", start.elapsed());
        }
        // A NIC that is named is watched before its VXLAN device is there.
        daemon.wait_says(said, VXLAN, SOON.saturating_sub(start.elapsed()))?;
    }
    send_frames(&lab.a, NIC, &[&stale])?;
    daemon.wait_events(16, PLENTY)?;
    let (events, summary) = daemon.stop()?;
    assert_eq!(events.len(), 16);
    assert!(events.iter().all(|event| event.device.as_deref() == Some(VXLAN)), "{events:#?}");
    assert_eq!((nic(&summary)?.broken(), summary.events.emitted), (16, 16));
    assert_eq!(names(&summary), [NIC]);
    Ok(())
}

/// What is not known is learned from the traffic, and is said to be.
#[test]
fn policy_of_an_external_device() -> Result<()> {
    for (first, verdict) in [(Check::Zero, "mangled_zero"), (Check::Right, "bad")] {
        let lab = lab(Underlay::Nic, OuterSum::Sum)?;
        lab.remove_vxlan()?;
        lab.a.ip(&format!(
            "link add vx0 type vxlan external dev {NIC} dstport 8472\nlink set vx0 up"
        ))?;
        let socket = Socket::new()?;
        let daemon = socket.run(&lab.a, NO_ARGS)?;
        let said = daemon.stderr().concat();
        assert!(said.contains("external") && said.contains("learned from traffic"), "{said}");
        let mangled = Packet { vni: 77, ..Packet::new(Check::Value(0xffff)) };
        send_frames(&lab.a, NIC, &[Packet::new(first).frame()?, mangled.frame()?])?;
        let event = daemon.wait_events(1, PLENTY)?.remove(0);
        assert_eq!(event.verdict, verdict, "{event:#?}");
        assert_eq!((event.vni, event.device.as_deref()), (77, Some("vx0")));
    }
    Ok(())
}

/// As Cilium and OVN make it: nothing is set but the port. Its packets go by the default route.
#[test]
fn external_device_without_underlay() -> Result<()> {
    let lab = lab(Underlay::Nic, OuterSum::Sum)?;
    lab.remove_vxlan()?;
    let gateway = lab.outer_b();
    lab.a.ip(&format!(
        "route add default via {gateway} dev {NIC}\n\
         link add vx0 type vxlan external dstport 8472\nlink set vx0 up"
    ))?;
    let socket = Socket::new()?;
    let daemon = socket.run(&lab.a, NO_ARGS)?;
    assert_eq!(names(&socket.status()?), [NIC]);
    send_frames(&lab.a, NIC, &[Packet::new(Check::Value(0xffff)).frame()?])?;
    wait_until("counted", PLENTY, || Ok(nic(&socket.status()?)?.skbs > 0))?;
    daemon.stop()?;
    Ok(())
}

/// The same, but no route to take yet: there is a device, and it would be wrong to deny it.
#[test]
fn device_whose_underlay_is_not_known_yet() -> Result<()> {
    let lab = lab(Underlay::Nic, OuterSum::Sum)?;
    lab.remove_vxlan()?;
    lab.a.ip("link add vx0 type vxlan external dstport 8472\nlink set vx0 up")?;
    let socket = Socket::new()?;
    let daemon = socket.launch(&lab.a, NO_ARGS)?;
    daemon.wait_says(0, "waiting", PLENTY)?;
    let said = daemon.stderr().concat();
    assert!(!said.contains("no VXLAN device") && said.contains("vx0"), "{said}");
    lab.a.ip(&format!("route add default via {} dev {NIC}", lab.outer_b()))?;
    daemon.wait_says(0, &format!("watching {NIC}"), SOON)?;
    Ok(())
}

/// Devices of other network namespaces are none of its business.
#[test]
fn network_namespaces_are_apart() -> Result<()> {
    let lab = lab(Underlay::Nic, OuterSum::Sum)?;
    let sockets = [Socket::new()?, Socket::new()?];
    let daemons = [sockets[0].run(&lab.a, NO_ARGS)?, sockets[1].run(&lab.b, NO_ARGS)?];
    send_frames(&lab.a, NIC, &[Packet::stale().frame()?])?;
    daemons[0].wait_events(1, PLENTY)?;
    assert_eq!(nic(&sockets[0].status()?)?.broken(), 1);
    assert_eq!(nic(&sockets[1].status()?)?.broken(), 0);
    Ok(())
}
