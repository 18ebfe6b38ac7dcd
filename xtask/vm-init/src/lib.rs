//! What `cargo xtask vm` and the first process inside of the virtual machine must agree on: the
//! plan that goes in, and the reports that come out.
//!
//! Both are lines of text with tabs between their fields.

use std::{fmt::Write as _, str::FromStr, time::Duration};

use anyhow::{Context, Result, bail, ensure};

/// Where the plan lies in the initramfs.
pub const PLAN: &str = "/plan";
/// The folder of the kernel's modules in the initramfs.
pub const MODULES: &str = "/modules";
/// The serial line for reports and for what the jobs print. The other one is the kernel's console.
pub const REPORTS: &str = "/dev/ttyS1";

/// What to do inside.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// A word that starts each report, so that nothing that a job prints can pass for one.
    pub nonce: String,
    /// Files in [`MODULES`] to load, in this order.
    pub modules: Vec<String>,
    /// Programs to run, one after the other.
    pub jobs: Vec<Job>,
}

/// A program to run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Job {
    /// What the reports call it.
    pub name: String,
    /// It is killed after this time; whole seconds.
    pub limit: Duration,
    /// Its environment, `NAME=value`.
    pub environment: Vec<String>,
    /// Path and arguments.
    pub command: Vec<String>,
}

impl Plan {
    /// The text of the plan. Fails where a field holds what separates fields.
    pub fn text(&self) -> Result<String> {
        let mut text = line(["nonce", &self.nonce])?;
        for module in &self.modules {
            text += &line(["module", module])?;
        }
        for job in &self.jobs {
            text += &line(["job", &job.name, &job.limit.as_secs().to_string()])?;
            for variable in &job.environment {
                text += &line(["environment", variable])?;
            }
            text +=
                &line(std::iter::once("command").chain(job.command.iter().map(String::as_str)))?;
        }
        Ok(text)
    }
}

fn line<'a>(fields: impl IntoIterator<Item = &'a str>) -> Result<String> {
    let mut line = String::new();
    for field in fields {
        ensure!(!field.contains(['\t', '\n']), "{field:?} has a tab or a line break in it");
        let separator = if line.is_empty() { "" } else { "\t" };
        let _ = write!(line, "{separator}{field}");
    }
    Ok(line + "\n")
}

impl FromStr for Plan {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut plan = Self::default();
        for line in text.lines() {
            let fields: Vec<_> = line.split('\t').collect();
            match fields[..] {
                ["nonce", nonce] => nonce.clone_into(&mut plan.nonce),
                ["module", module] => plan.modules.push(module.to_owned()),
                ["job", name, limit] => {
                    let limit = Duration::from_secs(limit.parse().context("limit of a job")?);
                    plan.jobs.push(Job { name: name.to_owned(), limit, ..Job::default() });
                }
                ["environment", variable] => {
                    plan.last_job()?.environment.push(variable.to_owned());
                }
                ["command", ref words @ ..] => {
                    let words = words.iter().map(|&word| word.to_owned());
                    plan.last_job()?.command.extend(words);
                }
                _ => bail!("a plan has no line {line:?}"),
            }
        }
        Ok(plan)
    }
}

impl Plan {
    fn last_job(&mut self) -> Result<&mut Job> {
        self.jobs.last_mut().context("the plan has a command before its job")
    }
}

/// What the first process says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// The modules are loaded; the release of the kernel (`uname -r`).
    Ready(String),
    /// A job starts.
    Start(String),
    /// A job has ended.
    End(String, Outcome),
    /// Every job has ended.
    Finished,
    /// Nothing more can be done, and why.
    Broken(String),
}

/// How a job has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// With this exit code.
    Exit(i32),
    /// By this signal.
    Signal(i32),
    /// It was killed because its time was over.
    TimedOut,
}

impl Report {
    /// The report as a line. Line breaks and tabs inside of a reason become spaces.
    pub fn line(&self, nonce: &str) -> String {
        let plain = |text: &str| text.replace(['\t', '\n'], " ");
        let rest = match self {
            Self::Ready(release) => format!("ready\t{}", plain(release)),
            Self::Start(job) => format!("start\t{}", plain(job)),
            Self::End(job, Outcome::Exit(code)) => format!("exit\t{}\t{code}", plain(job)),
            Self::End(job, Outcome::Signal(signal)) => format!("signal\t{}\t{signal}", plain(job)),
            Self::End(job, Outcome::TimedOut) => format!("timed out\t{}", plain(job)),
            Self::Finished => "finished".to_owned(),
            Self::Broken(reason) => format!("broken\t{}", plain(reason)),
        };
        format!("{nonce}\t{rest}\n")
    }

    /// Reads a line without its end; none where it is no report with this nonce.
    pub fn parse(line: &str, nonce: &str) -> Option<Self> {
        let fields: Vec<_> = line.strip_prefix(nonce)?.strip_prefix('\t')?.split('\t').collect();
        let end = |job: &str, outcome| Some(Self::End(job.to_owned(), outcome));
        match fields[..] {
            ["ready", release] => Some(Self::Ready(release.to_owned())),
            ["start", job] => Some(Self::Start(job.to_owned())),
            ["exit", job, code] => end(job, Outcome::Exit(code.parse().ok()?)),
            ["signal", job, signal] => end(job, Outcome::Signal(signal.parse().ok()?)),
            ["timed out", job] => end(job, Outcome::TimedOut),
            ["finished"] => Some(Self::Finished),
            ["broken", reason] => Some(Self::Broken(reason.to_owned())),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_arrives_as_it_was_sent() {
        let job = |name: &str| Job {
            name: name.to_owned(),
            limit: Duration::from_secs(90),
            environment: vec!["A=b c".to_owned(), "EMPTY=".to_owned()],
            command: vec!["/bin/true".to_owned(), "--an argument".to_owned(), String::new()],
        };
        let plan = Plan {
            nonce: "0f3a".to_owned(),
            modules: vec!["udp_tunnel.ko".to_owned(), "vxlan.ko".to_owned()],
            jobs: vec![job("first"), job("second")],
        };
        assert_eq!(plan.text().unwrap().parse::<Plan>().unwrap(), plan);
    }

    #[test]
    fn what_would_break_the_plan_is_refused() {
        let plan = Plan { modules: vec!["a\tb".to_owned()], ..Plan::default() };
        assert!(plan.text().unwrap_err().to_string().contains("tab"));
        assert!("no such line".parse::<Plan>().is_err());
        assert!("command\t/bin/true".parse::<Plan>().is_err());
    }

    #[test]
    fn a_report_arrives_as_it_was_sent() {
        for report in [
            Report::Ready("6.1.0-50-cloud-amd64".to_owned()),
            Report::Start("class 1".to_owned()),
            Report::End("class 1".to_owned(), Outcome::Exit(101)),
            Report::End("class 1".to_owned(), Outcome::Signal(9)),
            Report::End("class 1".to_owned(), Outcome::TimedOut),
            Report::Finished,
            Report::Broken("cannot load vxlan.ko".to_owned()),
        ] {
            let line = report.line("0f3a");
            assert_eq!(Report::parse(line.trim_end(), "0f3a"), Some(report));
            assert_eq!(Report::parse(line.trim_end(), "0f3b"), None, "another's nonce");
        }
    }

    #[test]
    fn what_a_job_prints_is_no_report() {
        assert_eq!(Report::parse("finished", "0f3a"), None);
        assert_eq!(Report::parse("0f3a finished", "0f3a"), None);
        assert_eq!(Report::parse("0f3a\texit\tjob\tzero", "0f3a"), None);
    }
}
