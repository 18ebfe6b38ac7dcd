//! How long it takes until every packet is seen, and how large what does it is.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context as _, Result};
use aya::programs::{ProgramInfo, loaded_programs};
use vxcsum_tests::daemon;
use vxcsum_tests::netns::NetNs;

use crate::effort::{Effort, interleaved};
use crate::report::{Findings, Limit, Panel, Series};
use crate::vxcsum::Vxcsum;

/// The longest start (product.md §6), in milliseconds.
const REACH_MS: f64 = 200.0;
const TRANSPORTS: [&str; 2] = ["ring", "perf"];

/// Measures both.
pub(crate) fn measure(effort: Effort) -> Result<Findings> {
    let mut findings = Findings::default();
    findings.panel(start_to_attached(effort)?);
    let [walked, sizes] = programs()?;
    findings.panel(walked);
    findings.panel(sizes);
    findings.panel(binary()?);
    findings.note(
        "Start to attached: from before `ip netns exec` starts vxcsum until it says of the last \
         interface that it watches it. It has looked at the kernel and at the devices by then, and \
         has loaded one program for each interface and one for the receiver's side.",
    );
    Ok(findings)
}

fn start_to_attached(effort: Effort) -> Result<Panel> {
    let mut panel = Panel::new("Start to attached", "ms");
    let mut subjects = Vec::new();
    for count in [1, 8] {
        subjects.extend(TRANSPORTS.map(|transport| (count, transport)));
    }
    let samples = interleaved("start", effort, &subjects, |&(count, transport)| {
        let (ns, names) = interfaces(count)?;
        let names: Vec<_> = names.iter().map(String::as_str).collect();
        // Small buffers: those of perf count against what root may lock, on some machines 8 MiB.
        let options = ["--transport", transport, "--ring-kib", "256"];
        let vxcsum = Vxcsum::start(&ns, &names, &options)?;
        let took = vxcsum.started_in;
        vxcsum.stop()?;
        Ok(took.as_secs_f64() * 1000.0)
    })?;
    for ((count, transport), samples) in subjects.into_iter().zip(samples) {
        let plural = if count == 1 { "" } else { "s" };
        let series = Series::new(format!("{count} interface{plural}"), samples);
        let mut series = series.variant(transport).reach(Limit::AtMost, REACH_MS);
        if (count, transport) == (1, TRANSPORTS[0]) {
            series = series.quote("Start to attached");
        }
        panel.push(series);
    }
    Ok(panel)
}

/// A namespace with so many interfaces that can be watched, and their names.
pub(crate) fn interfaces(count: usize) -> Result<(NetNs, Vec<String>)> {
    let ns = NetNs::new("many")?;
    let names: Vec<_> = (0..count).map(|index| format!("nic{index}")).collect();
    // Each needs another end, which nobody watches.
    let pair = |name: &String| format!("link add {name} up type veth peer name far-{name}\n");
    ns.ip(&names.iter().map(pair).collect::<String>())?;
    Ok((ns, names))
}

/// What the verifier walked, and what came out of it.
fn programs() -> Result<[Panel; 2]> {
    let mut walked = Panel::new("Instructions that the verifier walked", "instructions");
    let mut sizes = Panel::new("Machine code of the program", "bytes");
    for transport in TRANSPORTS {
        let (ns, names) = interfaces(1)?;
        let vxcsum = Vxcsum::start(&ns, &[&names[0]], &["--transport", transport])?;
        vxcsum.wait_ready()?;
        let programs = programs_of(vxcsum.pid())?;
        vxcsum.stop()?;
        for program in programs {
            let name = program.name_as_str().unwrap_or_default().to_owned();
            // The one for drops is the same over both.
            if name.contains("receive") && transport != TRANSPORTS[0] {
                continue;
            }
            let name = if name.contains("receive") { name } else { format!("{name}, {transport}") };
            let count = program.verified_instruction_count().context("Linux 5.16 tells this")?;
            walked.push(Series::new(name.clone(), vec![f64::from(count)]));
            sizes.push(Series::new(name, vec![f64::from(program.size_jitted())]));
        }
    }
    Ok([walked, sizes])
}

/// The programs that a process holds.
fn programs_of(pid: u32) -> Result<Vec<ProgramInfo>> {
    let folder = format!("/proc/{pid}/fdinfo");
    let mut ids = BTreeSet::new();
    for entry in fs::read_dir(&folder).with_context(|| folder.clone())? {
        // One may be closed by now.
        let text = fs::read_to_string(entry?.path()).unwrap_or_default();
        let id = text.lines().find_map(|line| line.strip_prefix("prog_id:"));
        ids.extend(id.and_then(|id| id.trim().parse::<u32>().ok()));
    }
    let mut programs = Vec::new();
    for program in loaded_programs() {
        let program = program?;
        if ids.contains(&program.id()) {
            programs.push(program);
        }
    }
    Ok(programs)
}

fn binary() -> Result<Panel> {
    let mut panel = Panel::new("The binary, all BPF programs inside", "KiB");
    let len = fs::metadata(daemon::binary()?)?.len();
    panel.push(Series::new("vxcsum", vec![len as f64 / 1024.0]));
    Ok(panel)
}
