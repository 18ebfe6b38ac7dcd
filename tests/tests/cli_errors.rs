//! Wrong usage and what cannot be done: exit code 2, nothing on standard output, and a line on
//! standard error that names what is wrong and the way out.

use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use vxcsum_tests::client::Socket;
use vxcsum_tests::daemon::{Daemon, Ended, binary, run_to_end};
use vxcsum_tests::lab::NIC;
use vxcsum_tests::netns::NetNs;

const TIMEOUT: Duration = Duration::from_secs(5);

fn namespace_with_nic() -> Result<NetNs> {
    let ns = NetNs::new("cli")?;
    ns.ip(&format!("link add {NIC} type veth peer name peer\nlink set {NIC} up"))?;
    Ok(ns)
}

/// With a socket of its own: the usual path is one for all network namespaces.
fn vxcsum(ns: &NetNs, args: &[&str]) -> Result<Ended> {
    run_to_end(&mut Socket::new()?.command_in(ns, args)?, TIMEOUT)
}

/// All of it in the first line; wrong usage may be followed by a hint at `--help`.
fn assert_refused(ended: &Ended, names: &[&str]) {
    assert_eq!(ended.code, Some(2), "{ended:?}");
    assert_eq!(ended.stdout, "", "{ended:?}");
    let line = ended.stderr.lines().next().unwrap_or_default();
    for name in names {
        assert!(line.contains(name), "{name:?} is not in {line:?}");
    }
}

/// What vxcsum itself has to say is one line.
fn assert_refused_in_a_line(ended: &Ended, names: &[&str]) {
    assert_refused(ended, names);
    assert_eq!(ended.stderr.lines().count(), 1, "{ended:?}");
}

#[test]
fn interface_that_does_not_exist() -> Result<()> {
    let ns = namespace_with_nic()?;
    let ended = vxcsum(&ns, &["run", "--interface", "eth7"])?;
    assert_refused_in_a_line(&ended, &["eth7", NIC]);
    let ended = vxcsum(&ns, &["run", "--interface", NIC, "--interface", "eth7"])?;
    assert!(ended.stderr.contains("eth7"), "{ended:?}");
    assert_eq!(ended.code, Some(2));
    Ok(())
}

#[test]
fn ports_out_of_range() -> Result<()> {
    let ns = namespace_with_nic()?;
    for port in ["0", "65536", "-1", "vxlan", ""] {
        let ended = vxcsum(&ns, &["run", "--interface", NIC, &format!("--port={port}")])?;
        assert_refused(&ended, &["--port", port]);
    }
    Ok(())
}

#[test]
fn too_many_ports() -> Result<()> {
    let ns = namespace_with_nic()?;
    let ports: Vec<String> = (1..=17).map(|port| format!("--port={port}")).collect();
    let mut args = vec!["run", "--interface", NIC];
    args.extend(ports.iter().map(String::as_str));
    assert_refused_in_a_line(&vxcsum(&ns, &args)?, &["16", "ports"]);

    // Sixteen are fine, and so is naming one twice.
    let sixteen = ports.iter().take(16).chain(&ports[..1]);
    Daemon::start(&ns, NIC, sixteen)?.stop()?;
    Ok(())
}

#[test]
fn wrong_or_missing_options() -> Result<()> {
    let ns = namespace_with_nic()?;
    for (args, names) in [
        (vec!["run", "--interface", NIC, "--fix", "maybe"], ["maybe", "--fix"]),
        (vec!["run", "--interface", NIC, "--policy", "none"], ["none", "--policy"]),
        (vec!["run", "--interface", NIC, "--fiks", "off"], ["--fiks", "unexpected"]),
        (vec!["walk"], ["walk", "subcommand"]),
    ] {
        assert_refused(&vxcsum(&ns, &args)?, &names);
    }
    Ok(())
}

/// Neither another user nor root without capabilities.
#[test]
fn missing_privilege() -> Result<()> {
    let ns = namespace_with_nic()?;
    for drop in [
        ["--reuid=65534", "--regid=65534", "--clear-groups"],
        ["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"],
    ] {
        let socket = Socket::new()?;
        if drop.contains(&"--reuid=65534") {
            std::os::unix::fs::chown(socket.folder(), Some(65534), Some(65534))?;
        }
        let mut command: Command = ns.command("setpriv");
        command.args(drop).arg(binary()?).args(["run", "--interface", NIC, "--socket"]);
        command.arg(socket.path());
        let ended = run_to_end(&mut command, TIMEOUT)?;
        assert_refused_in_a_line(&ended, &["not permitted", "root", "CAP_BPF", "CAP_NET_ADMIN"]);
    }
    Ok(())
}

#[test]
fn second_instance_on_an_interface() -> Result<()> {
    let ns = namespace_with_nic()?;
    let first = Daemon::start(&ns, NIC, [""; 0])?;
    let ended = vxcsum(&ns, &["run", "--interface", NIC])?;
    assert_refused_in_a_line(&ended, &[NIC, "already"]);
    // The first one goes on, and its end frees the interface.
    first.stop()?;
    Daemon::start(&ns, NIC, [""; 0])?.stop()?;
    // An interface of the same name in another namespace is another interface.
    let other = namespace_with_nic()?;
    let first = Daemon::start(&ns, NIC, [""; 0])?;
    Daemon::start(&other, NIC, [""; 0])?.stop()?;
    first.stop()?;
    Ok(())
}
