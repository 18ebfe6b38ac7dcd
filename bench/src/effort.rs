//! How much is measured, and in which order.

use std::time::Duration;

use anyhow::{Context as _, Result};

/// How much is to be measured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Effort {
    /// How often each number is taken.
    pub(crate) repetitions: usize,
    /// Only to see that it runs.
    pub(crate) quick: bool,
}

impl Effort {
    /// `whole`, or next to nothing.
    pub(crate) fn duration(self, whole: Duration) -> Duration {
        if self.quick { whole.min(Duration::from_millis(200)) } else { whole }
    }

    /// `whole`, or `little`.
    pub(crate) const fn count(self, whole: usize, little: usize) -> usize {
        if self.quick { little } else { whole }
    }
}

/// Measures each subject in turn, over and over: A B C A B C. What makes the machine slow for a
/// while meets them all. Every other round runs backwards, so that none always comes after the same.
///
/// Returns for each subject what came out, in the order of the repetitions.
pub(crate) fn interleaved<S, T>(
    bench: &str,
    effort: Effort,
    subjects: &[S],
    mut measure: impl FnMut(&S) -> Result<T>,
) -> Result<Vec<Vec<T>>> {
    let mut samples: Vec<Vec<T>> = subjects.iter().map(|_| Vec::new()).collect();
    for repetition in 0..effort.repetitions {
        eprintln!("{bench}: repetition {} of {}", repetition + 1, effort.repetitions);
        let mut order: Vec<_> = (0..subjects.len()).collect();
        if repetition % 2 == 1 {
            order.reverse();
        }
        for index in order {
            let what = || format!("subject {} of {bench}", index + 1);
            samples[index].push(measure(&subjects[index]).with_context(what)?);
        }
    }
    Ok(samples)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subjects_take_turns() {
        let mut order = String::new();
        let effort = Effort { repetitions: 2, quick: false };
        let samples = interleaved("test", effort, &['a', 'b'], |&subject| {
            order.push(subject);
            Ok(order.len())
        });
        assert_eq!(order, "abba");
        assert_eq!(samples.unwrap(), [[1, 4], [2, 3]]);
    }
}
