//! What the daemon does without where the kernel does not have it, and what it says of that.

use std::ffi::OsStr;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;
use std::{fs, io};

use anyhow::{Context as _, Result};
use aya::EbpfLoader;
use aya::programs::SchedClassifier;
use nix::errno::Errno;
use vxcsum::program::{OBJECT, PROGRAM_NAME};
use vxcsum_common::layout::SkbLayout;
use vxcsum_tests::client::Socket;
use vxcsum_tests::daemon::{Daemon, binary, run_to_end};
use vxcsum_tests::folder::Folder;
use vxcsum_tests::kernel;
use vxcsum_tests::lab::{Lab, LabConfig, NIC, Nat};
use vxcsum_tests::traffic::{self, TcpServer};
use vxcsum_tests::wait::wait_until;

const PLENTY: Duration = Duration::from_secs(5);
const STALL: Duration = Duration::from_millis(700);
const VMLINUX_BTF: &str = "/sys/kernel/btf/vmlinux";

fn lab() -> Result<Lab> {
    LabConfig { nat: Nat::Masquerade { random_fully: true }, ..LabConfig::default() }.start()
}

fn missing(status: &serde_json::Value) -> Vec<&str> {
    let missing = status["missing"].as_array().into_iter().flatten();
    missing.filter_map(|it| it["feature"].as_str()).collect()
}

#[test]
fn status_tells_transport_and_what_is_missing() -> Result<()> {
    let lab = lab()?;
    for (transport, segments_are_missing) in [("ring", false), ("perf", true)] {
        let socket = Socket::new()?;
        let args = ["run", "--json", "--interface", NIC, "--transport", transport];
        let command = socket.command_in(&lab.a, args)?;
        let daemon = Daemon::launch(command)?;
        daemon.wait_watching()?;
        wait_until("an answer", PLENTY, || Ok(socket.status().is_ok()))?;
        let status = socket.status_json()?;
        assert_eq!(status["transport"], transport, "{status:#}");
        assert_eq!(missing(&status).contains(&"segments"), segments_are_missing, "{status:#}");
        assert!(!missing(&status).contains(&"ring_buffer"), "this kernel has it: {status:#}");
        // Each was said at the start, with its reason and its cost.
        let said = daemon.stderr();
        for feature in missing(&status) {
            let begin = format!("no {feature} (");
            let lines = said.iter().filter(|line| line.contains(&begin) && line.contains("): "));
            assert_eq!(lines.count(), 1, "{feature}: {said:#?}");
        }
        daemon.stop()?;
    }
    Ok(())
}

/// What each version brought, on a kernel that nobody has taken it from.
#[test]
fn nothing_is_missed_that_this_kernel_has() -> Result<()> {
    let lab = lab()?;
    let socket = Socket::new()?;
    let args = ["run", "--json", "--interface", NIC, "--transport", "auto"];
    let daemon = Daemon::launch(socket.command_in(&lab.a, args)?)?;
    daemon.wait_watching()?;
    wait_until("an answer", PLENTY, || Ok(socket.status().is_ok()))?;
    let status = socket.status_json()?;
    let version = kernel::version()?;
    for (feature, since) in [("ring_buffer", (5, 8)), ("ip_summed", (5, 8)), ("tcx", (6, 6))] {
        assert!(version < since || !missing(&status).contains(&feature), "{feature}: {status:#}");
    }
    // What is said to be missing is not made use of, and the other way round.
    let is_missing = |feature| missing(&status).contains(&feature);
    let transport = if is_missing("ring_buffer") { "perf" } else { "ring" };
    let attach = if is_missing("tcx") { "clsact" } else { "tcx" };
    assert_eq!(status["transport"], transport, "{status:#}");
    assert_eq!(status["interfaces"][0]["attach"], attach, "{status:#}");
    // The reason of drops is there from 5.17 on; before, a word on that is.
    let receive = socket.status()?.receive;
    assert!(receive.attached || version < (5, 17), "{receive:?}");
    assert_eq!(receive.attached, receive.why.is_none(), "{receive:?}");
    let table = socket.vxcsum(["status"])?.stdout;
    let wanted = missing(&status).into_iter().map(|feature| format!("no {feature} ("));
    for part in wanted.chain([format!("events ({transport})"), format!("{NIC} ({attach})")]) {
        assert!(table.contains(&part), "{part:?} is not in {table}");
    }
    daemon.stop()?;
    Ok(())
}

/// As the default seccomp filter of containers does it, and Debian's `kernel.perf_event_paranoid`
/// of 3.
#[test]
fn perf_buffers_that_are_forbidden() -> Result<()> {
    let lab = lab()?;
    for errno in [Errno::EPERM, Errno::EACCES] {
        let socket = Socket::new()?;
        let args = ["run", "--interface", NIC, "--transport", "perf"];
        let mut command = socket.command_in(&lab.a, args)?;
        forbid(&mut command, libc::SYS_perf_event_open, errno)?;
        let ended = run_to_end(&mut command, PLENTY)?;
        assert_eq!((ended.code, ended.stdout.as_str()), (Some(2), ""), "{ended:?}");
        let last = ended.stderr.lines().last().unwrap_or_default();
        for part in ["not permitted to open perf buffers", errno.desc(), "seccomp", "ring"] {
            assert!(last.contains(part), "{part:?} is not in {last:?}");
        }
        let left = lab.a.run(&format!("tc filter show dev {NIC} egress"))?;
        assert_eq!(left, "", "it leaves something");
    }
    Ok(())
}

/// Has a system call fail in the program that `command` starts, by a filter for seccomp(2).
fn forbid(command: &mut Command, call: libc::c_long, errno: Errno) -> Result<()> {
    const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
    let statement = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let filter = [
        // The number of the call is what comes first of `struct seccomp_data`.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, 0),
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, u32::try_from(call)?),
        statement(RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | errno as u32),
        statement(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let install = move || {
        let mut filter = filter;
        let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
        // SAFETY: the kernel copies the filter, which `program` points at, within the call.
        let outcome =
            unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) };
        Errno::result(outcome).map(drop).map_err(io::Error::from)
    };
    // SAFETY: between fork and exec it makes one system call and takes no lock or memory.
    unsafe { command.pre_exec(install) };
    Ok(())
}

/// BTF from a file is as good as the kernel's own.
#[test]
fn btf_may_come_from_a_file() -> Result<()> {
    let lab = lab()?;
    let folder = Folder::new()?;
    let copy = folder.path().join("btf");
    fs::copy(VMLINUX_BTF, &copy)?;
    let path = copy.to_str().context("a path that is no text")?;
    let tcp = TcpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
    let socket = Socket::new()?;
    let args = ["run", "--json", "--interface", NIC, "--transport", "ring", "--btf", path];
    let daemon = Daemon::launch(socket.command_in(&lab.a, args)?)?;
    daemon.wait_watching()?;
    assert_eq!(traffic::try_connect(&lab.a, tcp.address(), STALL)?, None);
    daemon.wait_events(1, PLENTY)?;
    for line in daemon.lines() {
        let event: serde_json::Value = serde_json::from_str(&line)?;
        assert_eq!(event["ip_summed"], "partial", "{line}");
    }
    daemon.stop()?;
    Ok(())
}

/// A kernel without types costs what is read by them, and nothing else.
#[test]
fn a_kernel_without_btf() -> Result<()> {
    let lab = lab()?;
    let tcp = TcpServer::start(&lab.b, (lab.inner_b(), 0).into())?;
    let socket = Socket::new()?;
    // `ip netns exec` gives it mounts of its own.
    let mut command = lab.a.command("sh");
    let script = format!("mount --bind /dev/null {VMLINUX_BTF} && exec \"$@\"");
    command.args(["-c", &script, "sh"]).arg(binary()?);
    command.args(["run", "--json", "--interface", NIC, "--transport", "ring", "--socket"]);
    command.arg(socket.path());
    let daemon = Daemon::launch(command)?;
    daemon.wait_watching()?;
    wait_until("an answer", PLENTY, || Ok(socket.status().is_ok()))?;
    assert_eq!(traffic::try_connect(&lab.a, tcp.address(), STALL)?, None);
    let event = daemon.wait_events(1, PLENTY)?.remove(0);
    assert_eq!(event.verdict, "stale_nat");
    for line in daemon.lines() {
        let event: serde_json::Value = serde_json::from_str(&line)?;
        assert!(event["ip_summed"].is_null(), "{line}");
    }
    let status = socket.status_json()?;
    assert!(missing(&status).contains(&"ip_summed"), "{status:#}");
    let said = daemon.stderr().join("\n");
    assert!(said.contains("no ip_summed (") && said.contains("--btf"), "{said}");
    daemon.stop()?;
    Ok(())
}

#[test]
fn btf_that_is_none_is_refused() -> Result<()> {
    let lab = lab()?;
    let folder = Folder::new()?;
    let text = folder.path().join("text");
    fs::write(&text, "no types")?;
    for path in [text.as_path(), Path::new("/nonexistent/btf")] {
        let socket = Socket::new()?;
        let args = ["run", "--interface", NIC, "--transport", "ring", "--btf"];
        let mut command =
            socket.command_in(&lab.a, args.map(OsStr::new).iter().chain([&path.as_os_str()]))?;
        let ended = run_to_end(&mut command, PLENTY)?;
        assert_eq!(ended.code, Some(2), "{ended:?}");
        assert!(ended.stderr.contains(&path.display().to_string()), "{ended:?}");
    }
    Ok(())
}

/// The object as a kernel sees it that has no such helper as `bpf_probe_read_kernel`, or that is
/// locked down.
#[test]
fn a_kernel_that_does_not_let_bpf_read_its_memory_takes_the_rest() -> Result<()> {
    const CALL: [u8; 4] = [0x85, 0, 0, 0];
    const PROBE_READ_KERNEL: [u8; 4] = 113_u32.to_ne_bytes();
    const NO_HELPER: [u8; 4] = 0x7fff_u32.to_ne_bytes();
    let mut object = OBJECT.to_vec();
    let mut calls = 0;
    for instruction in object.chunks_exact_mut(8) {
        if instruction == [CALL, PROBE_READ_KERNEL].concat() {
            instruction[4..].copy_from_slice(&NO_HELPER);
            calls += 1;
        }
    }
    assert!(calls >= 5, "{calls} calls");
    let load = |is_known: u16| -> Result<()> {
        let layout = SkbLayout { is_known, ..SkbLayout::default() };
        let mut loader = EbpfLoader::new();
        let bytes = bytemuck::bytes_of(&layout);
        let mut ebpf = loader.override_global("SKB_LAYOUT", bytes, true).load(&object)?;
        let program = ebpf.program_mut(PROGRAM_NAME).context("no program")?;
        let program: &mut SchedClassifier = program.try_into()?;
        Ok(program.load()?)
    };
    load(0)?;
    assert!(load(1).is_err(), "the helper is not missed");
    Ok(())
}
