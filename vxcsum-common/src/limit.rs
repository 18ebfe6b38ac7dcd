//! The rate limit of events.

/// The rate limit of events: the generic cell rate algorithm (ITU-T I.371), one cell an event.
///
/// `paid_until` is when the events sent so far are paid for, in nanoseconds of the clock of `now`.
/// Returns the next value of it if an event of `cost_ns` may be sent. Repeats may use half of
/// `burst_ns`, so that something new is still heard of.
#[inline(always)]
pub const fn pay(
    paid_until: u64,
    now: u64,
    cost_ns: u64,
    burst_ns: u64,
    is_repeat: bool,
) -> Option<u64> {
    let from = if paid_until > now { paid_until } else { now };
    let allowance = if is_repeat { burst_ns / 2 } else { burst_ns };
    if from - now >= allowance { None } else { Some(from + cost_ns) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_and_then_the_rate() {
        let (cost, burst) = (100, 1000);
        let mut paid_until = 0;
        let mut send = |now, is_repeat| {
            let paid = pay(paid_until, now, cost, burst, is_repeat);
            paid_until = paid.unwrap_or(paid_until);
            paid.is_some()
        };
        assert_eq!((0..20).filter(|_| send(5000, true)).count(), 5);
        assert_eq!((0..20).filter(|_| send(5000, false)).count(), 5);
        // What is new waits for one event to be paid for, a repeat for half of all.
        assert!(!send(5000, false) && send(5001, false));
        assert!(!send(5600, true) && send(5601, true));
    }
}
