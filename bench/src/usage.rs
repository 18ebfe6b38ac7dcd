//! What processes and the whole machine use.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result};

/// Processor time that the whole machine has spent on anything, whoever for, softirqs among it; to a
/// hundredth of a second (`/proc/stat`, proc(5)).
pub(crate) fn machine_busy() -> Result<Duration> {
    /// Fields 4 and 5 are idle and iowait; guest time, from field 9 on, is in user time.
    const BUSY: [usize; 6] = [0, 1, 2, 5, 6, 7];
    let stat = fs::read_to_string("/proc/stat").context("/proc/stat")?;
    let first = stat.lines().next().context("/proc/stat is empty")?;
    let ticks: Vec<u64> =
        first.split_whitespace().skip(1).map(str::parse).collect::<Result<_, _>>()?;
    let ticks = BUSY.iter().filter_map(|&field| ticks.get(field)).sum::<u64>();
    Ok(Duration::from_millis(ticks * 10))
}

/// Processor time of all threads that a process has now, to the nanosecond
/// (`/proc/PID/task/TID/schedstat`).
pub(crate) fn process_busy(pid: u32) -> Result<Duration> {
    let folder = format!("/proc/{pid}/task");
    let mut busy_ns = 0;
    for entry in fs::read_dir(&folder).with_context(|| folder.clone())? {
        // A thread may have ended.
        let text = fs::read_to_string(entry?.path().join("schedstat")).unwrap_or_default();
        busy_ns += text.split(' ').next().and_then(|ns| ns.parse::<u64>().ok()).unwrap_or(0);
    }
    Ok(Duration::from_nanos(busy_ns))
}

/// Memory that a process has in use, in KiB.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Resident {
    /// Now.
    pub(crate) now: f64,
    /// At most, so far, or since [`forget_peak`].
    pub(crate) peak: f64,
}

/// Reads it (`VmRSS` and `VmHWM`, proc(5)).
pub(crate) fn resident_kib(pid: u32) -> Result<Resident> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).with_context(|| path.clone())?;
    let field = |name: &str| -> Result<f64> {
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        let value = value.and_then(|value| value.trim().strip_suffix(" kB"));
        Ok(value.with_context(|| format!("no {name} in {path}"))?.parse()?)
    };
    Ok(Resident { now: field("VmRSS")?, peak: field("VmHWM")? })
}

/// Starts the peak anew, from what is in use now (`/proc/PID/clear_refs`, proc(5)).
pub(crate) fn forget_peak(pid: u32) -> Result<()> {
    let path = format!("/proc/{pid}/clear_refs");
    fs::write(&path, "5").with_context(|| path.clone())
}

#[cfg(test)]
mod tests {
    use std::process;

    use super::*;

    #[test]
    fn this_process_uses_something() {
        assert!(machine_busy().unwrap() > Duration::ZERO);
        assert!(process_busy(process::id()).unwrap() > Duration::ZERO);
        let resident = resident_kib(process::id()).unwrap();
        assert!(resident.now > 100.0 && resident.peak >= resident.now, "{resident:?}");
    }
}
