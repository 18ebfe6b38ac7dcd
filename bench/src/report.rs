//! What a bench has found, as it is printed, plotted and kept as JSON.

use serde::{Deserialize, Serialize};

use crate::machine::Machine;

/// All that one bench has found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Report {
    /// The bench: a word of the command line, and the name of the files.
    pub(crate) bench: String,
    /// What was measured.
    pub(crate) title: String,
    /// Where.
    pub(crate) machine: Machine,
    /// How often each number was taken.
    pub(crate) repetitions: usize,
    /// How long all of it took.
    pub(crate) seconds: f64,
    /// A look whether it runs at all; the numbers say little.
    pub(crate) quick: bool,
    /// What belongs into one picture each.
    pub(crate) panels: Vec<Panel>,
    /// What one has to know to read the numbers.
    pub(crate) notes: Vec<String>,
}

/// What a bench returns: a report without what is the same for all of them.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    pub(crate) panels: Vec<Panel>,
    pub(crate) notes: Vec<String>,
}

impl Findings {
    /// Adds a panel; one without a series is left out.
    pub(crate) fn panel(&mut self, panel: Panel) {
        if !panel.series.is_empty() {
            self.panels.push(panel);
        }
    }

    /// Adds a sentence that one has to know to read the numbers.
    pub(crate) fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }
}

/// Numbers of one kind and unit, that are compared with each other.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Panel {
    /// What is measured.
    pub(crate) title: String,
    /// Its unit.
    pub(crate) unit: String,
    /// Where series are at a number ([`Series::at`]), what that number is: it makes lines, and bars
    /// otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) axis: Option<String>,
    /// The numbers.
    pub(crate) series: Vec<Series>,
}

impl Panel {
    /// Bars.
    pub(crate) fn new(title: &str, unit: &str) -> Self {
        Self { title: title.to_owned(), unit: unit.to_owned(), axis: None, series: Vec::new() }
    }

    /// Lines, over a number that `axis` names.
    pub(crate) fn over(axis: &str, title: &str, unit: &str) -> Self {
        Self { axis: Some(axis.to_owned()), ..Self::new(title, unit) }
    }

    /// Adds numbers.
    pub(crate) fn push(&mut self, series: Series) {
        self.series.push(series);
    }
}

/// One number, taken over and over.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Series {
    /// What it is of: the label of a bar.
    pub(crate) name: String,
    /// What it is of besides, where each name has several bars: their colour, or the line that a
    /// number is on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) variant: Option<String>,
    /// The number that it is at, in a panel with an axis.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) at: Option<f64>,
    /// One of each repetition, in order.
    pub(crate) samples: Vec<f64>,
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) ratio: Option<Ratio>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reach: Option<Reach>,
    /// What it is, in the README.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) quote: Option<String>,
}

/// How it compares with another series, repetition by repetition.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Ratio {
    /// The name of the other.
    pub(crate) to: String,
    pub(crate) samples: Vec<f64>,
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

/// The number that is to be reached.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Reach {
    pub(crate) of: Of,
    pub(crate) is: Limit,
    pub(crate) limit: f64,
    pub(crate) met: bool,
}

/// What is to reach it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Of {
    Median,
    Ratio,
}

/// Which way is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Limit {
    AtMost,
    AtLeast,
}

impl Limit {
    /// As mathematicians write it.
    pub(crate) const fn sign(self) -> &'static str {
        match self {
            Self::AtMost => "≤",
            Self::AtLeast => "≥",
        }
    }

    fn holds(self, value: f64, limit: f64) -> bool {
        match self {
            Self::AtMost => value <= limit,
            Self::AtLeast => value >= limit,
        }
    }
}

impl Series {
    /// One sample of each repetition, in order.
    pub(crate) fn new(name: impl Into<String>, samples: Vec<f64>) -> Self {
        let [min, max] = extremes(&samples);
        Self {
            name: name.into(),
            variant: None,
            at: None,
            median: median(&samples),
            min,
            max,
            samples,
            ratio: None,
            reach: None,
            quote: None,
        }
    }

    /// Gives it a colour of its own, or puts it on a line: see [`Series::variant`].
    #[must_use]
    pub(crate) fn variant(mut self, variant: impl Into<String>) -> Self {
        self.variant = Some(variant.into());
        self
    }

    /// Puts it at a number, in a panel with an axis.
    #[must_use]
    pub(crate) fn at(mut self, at: f64) -> Self {
        self.at = Some(at);
        self
    }

    /// Has the README tell it, under this name.
    #[must_use]
    pub(crate) fn quote(mut self, name: &str) -> Self {
        self.quote = Some(name.to_owned());
        self
    }

    /// Compares it with `other`, sample by sample: noise that lasts longer than a repetition is in
    /// both and falls out.
    #[must_use]
    pub(crate) fn against(mut self, other: &Self) -> Self {
        let pairs = self.samples.iter().zip(&other.samples);
        let samples: Vec<_> = pairs.map(|(own, other)| own / other).collect();
        let [min, max] = extremes(&samples);
        let (to, median) = (other.name.clone(), median(&samples));
        self.ratio = Some(Ratio { to, samples, median, min, max });
        self
    }

    /// Says what the median is to reach.
    #[must_use]
    pub(crate) fn reach(mut self, is: Limit, limit: f64) -> Self {
        let met = is.holds(self.median, limit);
        self.reach = Some(Reach { of: Of::Median, is, limit, met });
        self
    }

    /// Says what the median of the ratios is to reach; after [`Series::against`].
    #[must_use]
    pub(crate) fn reach_ratio(mut self, is: Limit, limit: f64) -> Self {
        let met = self.ratio.as_ref().is_some_and(|ratio| is.holds(ratio.median, limit));
        self.reach = Some(Reach { of: Of::Ratio, is, limit, met });
        self
    }
}

/// The middle one, or the mean of the two in the middle; not a number where there is none.
pub(crate) fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    match (sorted.len(), sorted.len() / 2) {
        (0, _) => f64::NAN,
        (len, middle) if len % 2 == 1 => sorted[middle],
        (_, middle) => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

/// The value that `percent` of the samples do not exceed; not a number where there is none.
pub(crate) fn percentile(samples: &[f64], percent: usize) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (sorted.len() * percent).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

fn extremes(samples: &[f64]) -> [f64; 2] {
    [
        samples.iter().copied().reduce(f64::min).unwrap_or(f64::NAN),
        samples.iter().copied().reduce(f64::max).unwrap_or(f64::NAN),
    ]
}

/// A number with as many digits as mean something.
pub(crate) fn number(value: f64) -> String {
    let magnitude = value.abs();
    let decimals = match magnitude {
        _ if value.fract() == 0.0 => 0,
        100.0.. => 0,
        10.0.. => 1,
        1.0.. => 2,
        _ => 3,
    };
    let text = format!("{value:.decimals$}");
    let (whole, fraction) = text.split_at(text.find('.').unwrap_or(text.len()));
    let mut grouped = String::new();
    for (index, digit) in whole.chars().enumerate() {
        let left = whole.len() - index;
        // Five digits and more are read in groups.
        if left % 3 == 0 && index > 0 && magnitude >= 10_000.0 && !grouped.ends_with('-') {
            grouped.push(' ');
        }
        grouped.push(digit);
    }
    grouped + fraction
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_of_samples() {
        assert_eq!(median(&[3.0, 1.0, 2.0]).to_bits(), 2.0_f64.to_bits());
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]).to_bits(), 2.5_f64.to_bits());
        assert!(median(&[]).is_nan());
        let hundred: Vec<_> = (1..=100).map(f64::from).collect();
        assert_eq!(percentile(&hundred, 50).to_bits(), 50.0_f64.to_bits());
        assert_eq!(percentile(&hundred, 99).to_bits(), 99.0_f64.to_bits());
    }

    #[test]
    fn ratios_are_taken_pair_by_pair() {
        // The machine became half as fast in the middle; the ratio is what it was.
        let without = Series::new("without", vec![100.0, 50.0, 100.0]);
        let with = Series::new("with", vec![99.0, 49.5, 99.0]).against(&without);
        let with = with.reach_ratio(Limit::AtLeast, 0.99);
        assert!(with.reach.is_some_and(|reach| reach.met));
        let with = with.reach_ratio(Limit::AtLeast, 0.995);
        assert!(with.reach.is_some_and(|reach| !reach.met));
    }

    #[test]
    fn numbers_have_as_many_digits_as_mean_something() {
        let shown = [0.12345, 1.2345, 12.345, 123.45, 1234.5, 12345.6, 1_234_567.0, 3.0, -12345.0];
        let shown: Vec<_> = shown.into_iter().map(number).collect();
        let expected =
            ["0.123", "1.23", "12.3", "123", "1234", "12 346", "1 234 567", "3", "-12 345"];
        assert_eq!(shown, expected);
    }
}
