//! Coming and going: both ways to attach, and that nothing stays behind, however it ends.

use std::time::Duration;

use anyhow::{Context as _, Result};
use vxcsum_tests::daemon::Daemon;
use vxcsum_tests::lab::{Lab, LabConfig, NIC, Nat};
use vxcsum_tests::traffic::{self, TcpServer};

const STALL: Duration = Duration::from_millis(700);

/// Without a fix at work, nothing connects here.
fn lab() -> Result<Lab> {
    let nat = Nat::Masquerade { random_fully: true };
    LabConfig { nat, srcport: Some((40000, 40001)), ..LabConfig::default() }.start()
}

fn connects(lab: &Lab, server: &TcpServer) -> Result<bool> {
    Ok(traffic::try_connect(&lab.a, server.address(), STALL)?.is_some())
}

fn filters(lab: &Lab) -> Result<String> {
    lab.a.run(&format!("tc filter show dev {NIC} egress"))
}

#[test]
fn tcx_leaves_nothing_even_after_a_kill() -> Result<()> {
    let lab = lab()?;
    let server = TcpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
    assert!(!connects(&lab, &server)?);
    let vxcsum = Daemon::start(&lab.a, NIC, ["--attach", "tcx", "--fix", "restore"])?;
    assert!(connects(&lab, &server)?);
    let (_, summary) = vxcsum.stop()?;
    assert_eq!(summary.interface()?.attach.as_deref(), Some("tcx"));
    assert!(!connects(&lab, &server)?);

    let vxcsum = Daemon::start(&lab.a, NIC, ["--attach", "tcx", "--fix", "restore"])?;
    assert!(connects(&lab, &server)?);
    vxcsum.kill()?;
    assert!(!connects(&lab, &server)?);
    Ok(())
}

#[test]
fn clsact_leaves_other_filters_alone_and_clears_up_after_a_kill() -> Result<()> {
    let lab = lab()?;
    let server = TcpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
    lab.a.run(&format!("tc qdisc add dev {NIC} clsact"))?;
    // A classic BPF program of somebody else that matches nothing.
    let mut command = lab.a.command("tc");
    command.args(["filter", "add", "dev", NIC, "egress", "prio", "7", "bpf", "bytecode"]);
    let status = command.arg("1,6 0 0 0").status().context("tc")?;
    assert!(status.success());
    let foreign = filters(&lab)?;
    assert!(foreign.contains("pref 7"), "{foreign}");

    let options = ["--attach", "clsact", "--fix", "restore"];
    let vxcsum = Daemon::start(&lab.a, NIC, options)?;
    assert_ne!(filters(&lab)?, foreign);
    assert!(connects(&lab, &server)?);
    let (_, summary) = vxcsum.stop()?;
    assert_eq!(summary.interface()?.attach.as_deref(), Some("clsact"));
    assert_eq!(filters(&lab)?, foreign);

    Daemon::start(&lab.a, NIC, options)?.kill()?;
    assert_ne!(filters(&lab)?, foreign);
    Daemon::start(&lab.a, NIC, options)?.stop()?;
    assert_eq!(filters(&lab)?, foreign);
    Ok(())
}
