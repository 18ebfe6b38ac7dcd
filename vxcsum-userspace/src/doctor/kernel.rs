//! Which of the two bugs of `nf_nat` the running kernel has.
//!
//! Class 1: a zero checksum is rewritten as if it were a sum. Fixed by ea64d8d6c675 ("netfilter:
//! nat: never update the UDP checksum when it's 0"), Linux 5.7. Class 2: a finished sum is taken for
//! an unfinished one where the inner sum is still open, and left as it was. Every kernel up to at
//! least 6.18 has it.

use std::fs;

use nix::sys::utsname::uname;

/// The newest series in which class 2 was measured.
pub const CLASS2_MEASURED: (u32, u32) = (6, 18);

/// The first releases of stable series with ea64d8d6c675; 5.7 and newer have it from the start.
const STABLE: &[(u32, u32, u32)] = &[(5, 6, 13), (5, 4, 41), (4, 19, 123), (4, 14, 181)];

/// The first builds of Ubuntu's main kernels with it (kubernetes#88986, comment 640929804).
const UBUNTU: &[(&str, u32)] = &[("5.4.0-", 32), ("4.15.0-", 107)];

/// Marks of vendors that take fixes into a kernel without telling by its version.
const BACKPORTING: &[&str] = &["uek", ".oe", ".an", ".al", ".ky", "-default"];

/// What the kernel says of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kernel {
    /// `uname -r`.
    pub release: String,
    /// `uname -v`, where Debian says which stable release it is made of.
    pub version: String,
    /// `/proc/version_signature`, where Ubuntu says it.
    pub ubuntu: Option<String>,
}

/// Whether a kernel carries ea64d8d6c675.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroSumFix {
    /// It does.
    Carried,
    /// It does not: class 1.
    Lacking,
    /// The version does not tell, for this reason.
    Unknown(&'static str),
}

impl Kernel {
    /// Asks the running kernel.
    pub fn read() -> Self {
        let text = |text: &std::ffi::OsStr| text.to_string_lossy().into_owned();
        let (release, version) =
            uname().map(|name| (text(name.release()), text(name.version()))).unwrap_or_default();
        let ubuntu = fs::read_to_string("/proc/version_signature").ok();
        Self { release, version, ubuntu: ubuntu.map(|text| text.trim().to_owned()) }
    }

    /// The series, for example 6.18.
    pub fn series(&self) -> Option<(u32, u32)> {
        numbers(&self.release).map(|(major, minor, _)| (major, minor))
    }

    /// Whether it carries the fix of class 1, by its version.
    pub fn zero_sum_fix(&self) -> ZeroSumFix {
        let Some(release) = numbers(&self.release) else {
            return ZeroSumFix::Unknown("its release is no version number");
        };
        let stable = self.stable_release().unwrap_or(release);
        let (major, minor, patch) = stable;
        let has_it = (major, minor) >= (5, 7)
            || STABLE.iter().any(|&(a, b, first)| (a, b) == (major, minor) && patch >= first);
        if has_it {
            return ZeroSumFix::Carried;
        }
        if let Some(fix) = self.ubuntu_fix() {
            return fix;
        }
        if self.release.starts_with("3.10.") && self.release.contains(".el7") {
            return ZeroSumFix::Lacking;
        }
        if self.release.contains(".el8") {
            return ZeroSumFix::Unknown(
                "RHEL 8 and its kin took the fix into 4.18, from which release on cannot be told \
                 from the version",
            );
        }
        let is_backporting = BACKPORTING.iter().any(|mark| self.release.contains(mark));
        // 5.3.0-62-generic: a distribution that counts builds instead of stable releases.
        let hides_stable = stable == release && release.2 == 0 && self.release.contains('-');
        if is_backporting || hides_stable {
            return ZeroSumFix::Unknown(
                "it is older than the fix, and its distribution may have taken the fix in without \
                 telling by the version",
            );
        }
        ZeroSumFix::Lacking
    }

    /// The stable release that a distribution's kernel is made of, where it says so.
    fn stable_release(&self) -> Option<(u32, u32, u32)> {
        // "Ubuntu 5.4.0-26.30-generic 5.4.30"
        let ubuntu = self.ubuntu.as_deref().and_then(|text| text.split_whitespace().nth(2));
        // "#1 SMP Debian 4.19.118-2 (2020-04-26)"
        let mut words = self.version.split_whitespace();
        let debian = words.find(|word| *word == "Debian").and_then(|_| words.next());
        ubuntu.or(debian).and_then(numbers)
    }

    /// Of Ubuntu's main kernels, by the number of the build.
    fn ubuntu_fix(&self) -> Option<ZeroSumFix> {
        if !self.version.contains("Ubuntu") {
            return None;
        }
        let is_main = ["-generic", "-lowlatency"].iter().any(|it| self.release.ends_with(it));
        let (build, first) = UBUNTU.iter().find_map(|(series, first)| {
            let build = self.release.strip_prefix(series)?.split('-').next()?;
            Some((build.parse::<u32>().ok()?, *first))
        })?;
        match build >= first {
            true if is_main => Some(ZeroSumFix::Carried),
            false if is_main => Some(ZeroSumFix::Lacking),
            _ => None,
        }
    }
}

/// The first two or three numbers of a version: `5.10.0-29-amd64` is 5, 10, 0.
fn numbers(version: &str) -> Option<(u32, u32, u32)> {
    let mut parts = version.split(|c: char| !c.is_ascii_digit());
    let major = parts.next()?.parse().ok()?;
    let minor = parts.next()?.parse().ok()?;
    Some((major, minor, parts.next().and_then(|patch| patch.parse().ok()).unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fix(release: &str, version: &str, ubuntu: Option<&str>) -> ZeroSumFix {
        let kernel = Kernel {
            release: release.to_owned(),
            version: version.to_owned(),
            ubuntu: ubuntu.map(str::to_owned),
        };
        kernel.zero_sum_fix()
    }

    #[test]
    fn mainline_and_stable() {
        for carried in
            ["5.7.0", "6.18.44-fc-v595", "5.6.13", "5.4.41", "5.4.290", "4.19.123", "4.14.181"]
        {
            assert_eq!(fix(carried, "#1 SMP", None), ZeroSumFix::Carried, "{carried}");
        }
        for lacking in
            ["5.6.12", "5.5.19", "5.4.40", "4.19.122", "4.14.180", "4.9.337", "3.10.108", "5.6.0"]
        {
            assert_eq!(fix(lacking, "#1 SMP", None), ZeroSumFix::Lacking, "{lacking}");
        }
    }

    #[test]
    fn distributions() {
        use ZeroSumFix::{Carried, Lacking};
        let el7 = "3.10.0-1160.119.1.el7.x86_64";
        assert_eq!(fix(el7, "#1 SMP Tue Jun 4 14:43:51 UTC 2024", None), Lacking);
        assert_eq!(fix("5.14.0-427.13.1.el9_4.x86_64", "#1 SMP", None), Carried);
        let debian = |stable: &str| format!("#1 SMP Debian {stable} (2020-04-26)");
        assert_eq!(fix("4.19.0-9-amd64", &debian("4.19.118-2"), None), Lacking);
        assert_eq!(fix("4.19.0-10-amd64", &debian("4.19.132-1"), None), Carried);
        let ubuntu = "#30-Ubuntu SMP Mon Apr 20 16:58:30 UTC 2020";
        let signature = "Ubuntu 5.4.0-26.30-generic 5.4.30";
        assert_eq!(fix("5.4.0-26-generic", ubuntu, Some(signature)), Lacking);
        assert_eq!(fix("5.4.0-26-generic", ubuntu, None), Lacking);
        assert_eq!(fix("5.4.0-48-generic", ubuntu, None), Carried);
        assert_eq!(fix("4.15.0-106-generic", ubuntu, None), Lacking);
        assert_eq!(fix("4.15.0-107-generic", ubuntu, None), Carried);
        assert_eq!(fix("4.14.186-146.268.amzn2.x86_64", "#1 SMP", None), Carried);
    }

    #[test]
    fn where_the_version_does_not_tell() {
        for unknown in [
            "4.18.0-193.el8.x86_64",
            "5.4.17-2011.1.2.el8uek.x86_64",
            "5.3.18-24.12-default",
            "5.3.0-62-generic",
            "4.19.90-52.22.v2207.ky10.x86_64",
            "unknown",
        ] {
            assert!(matches!(fix(unknown, "#1 SMP", None), ZeroSumFix::Unknown(_)), "{unknown}");
        }
    }
}
