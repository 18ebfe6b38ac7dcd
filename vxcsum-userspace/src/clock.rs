//! The clock that events are dated by, `CLOCK_BOOTTIME`, and the time of day.

use std::fs;
use std::sync::LazyLock;
use std::time::{Duration, SystemTime};

use nix::time::{ClockId, clock_gettime};

/// `CLOCK_BOOTTIME` as BPF programs see it.
pub(crate) fn boot() -> Duration {
    read(ClockId::CLOCK_BOOTTIME, OFFSETS.boot)
}

/// By how much that is ahead of `CLOCK_MONOTONIC`, which is all that BPF has before 5.8.
pub(crate) fn suspended() -> Duration {
    boot().saturating_sub(read(ClockId::CLOCK_MONOTONIC, OFFSETS.monotonic))
}

/// The time of day of an instant of [`boot`]. Clocks are compared now, so that a step of the time of
/// day since start does not matter.
pub(crate) fn time_of_day(instant: Duration) -> SystemTime {
    Now { boot: boot(), time_of_day: SystemTime::now() }.time_of_day(instant)
}

/// Both clocks at one instant.
struct Now {
    boot: Duration,
    time_of_day: SystemTime,
}

impl Now {
    fn time_of_day(&self, instant: Duration) -> SystemTime {
        let age = self.boot.saturating_sub(instant);
        self.time_of_day.checked_sub(age).unwrap_or(self.time_of_day)
    }
}

/// What a time namespace adds to the clocks of its processes, in nanoseconds; BPF programs see the
/// clocks as they are.
#[derive(Debug, Default, PartialEq, Eq)]
struct Offsets {
    boot: i128,
    monotonic: i128,
}

static OFFSETS: LazyLock<Offsets> = LazyLock::new(|| {
    // Without time namespaces (before Linux 5.6) there is no such file.
    fs::read_to_string("/proc/self/timens_offsets")
        .map_or_else(|_| Offsets::default(), |it| Offsets::parse(&it))
});

impl Offsets {
    /// `boottime 3600 0` is a line of it: seconds, and nanoseconds besides
    /// (`time_namespaces(7)`).
    fn parse(text: &str) -> Self {
        let mut offsets = Self::default();
        for line in text.lines() {
            let words: Vec<_> = line.split_whitespace().collect();
            let &[clock, seconds, nanoseconds] = words.as_slice() else { continue };
            let (Ok(seconds), Ok(nanoseconds)) =
                (seconds.parse::<i128>(), nanoseconds.parse::<i128>())
            else {
                continue;
            };
            let offset = seconds * 1_000_000_000 + nanoseconds;
            match clock {
                "boottime" => offsets.boot = offset,
                "monotonic" => offsets.monotonic = offset,
                _ => {}
            }
        }
        offsets
    }
}

fn read(clock: ClockId, offset_ns: i128) -> Duration {
    let now = clock_gettime(clock).map_or(Duration::ZERO, Duration::from);
    let ns = now.as_nanos().cast_signed() - offset_ns;
    Duration::from_nanos(u64::try_from(ns).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_hours(1);
    const NOON: Duration = Duration::from_hours(500_000);

    fn time_of_day(now_boot: Duration, now: Duration, instant: Duration) -> Duration {
        let now = Now { boot: now_boot, time_of_day: SystemTime::UNIX_EPOCH + now };
        now.time_of_day(instant).duration_since(SystemTime::UNIX_EPOCH).unwrap()
    }

    /// Whoever sets the clock wants it to be right: an event of before is dated as if it had been set
    /// already, and one of after as it is set.
    #[test]
    fn a_step_of_the_time_of_day_moves_all_events_alike() {
        let (event, second) = (2 * HOUR, Duration::from_secs(1));
        assert_eq!(time_of_day(event + second, NOON + second, event), NOON);
        for stepped in [NOON + HOUR, HOUR, Duration::from_hours(3)] {
            let later = event + 3 * second;
            assert_eq!(time_of_day(later, stepped + 3 * second, event), stepped);
            assert_eq!(time_of_day(later, stepped + 3 * second, later), stepped + 3 * second);
        }
    }

    #[test]
    fn no_event_is_from_the_future_or_from_before_all_time() {
        assert_eq!(time_of_day(HOUR, NOON, 2 * HOUR), NOON);
        let early = Duration::from_secs(3);
        // As after a start without a battery.
        let now = Now { boot: 2 * HOUR, time_of_day: SystemTime::UNIX_EPOCH + early };
        assert!(now.time_of_day(HOUR) < SystemTime::UNIX_EPOCH);
    }

    #[test]
    fn offsets_of_a_time_namespace() {
        let text = "monotonic           0         0\nboottime     -86400 250000000\n";
        let offsets = Offsets::parse(text);
        assert_eq!(offsets, Offsets { monotonic: 0, boot: -86_399_750_000_000 });
        assert_eq!(Offsets::parse("clock\nboottime x 0\n"), Offsets::default());
    }
}
