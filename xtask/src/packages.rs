//! The tools that labs and tests call, and the distribution packages that hold them.

use std::{
    fmt::{self, Display, Formatter},
    path::Path,
};

use anyhow::{Result, bail};

use crate::{process, root, setup::Goal};

/// A program that something here calls.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Tool {
    /// Its name, or the path of a file that is needed.
    binary: &'static str,
    pub(crate) debian: &'static str,
    fedora: &'static str,
    why: &'static str,
    goals: &'static [Goal],
}

const LAB: &[Goal] = &[Goal::Demo, Goal::Test, Goal::Vm, Goal::Bench];
const VM: &[Goal] = &[Goal::Vm];
const BENCH: &[Goal] = &[Goal::Bench];
const CAPTURES: &[Goal] = &[Goal::Test, Goal::Fuzz];

/// Every tool, in the order in which it is named to the user.
pub(crate) const TOOLS: &[Tool] = &[
    Tool {
        binary: "ip",
        debian: "iproute2",
        fedora: "iproute",
        why: "makes the lab's namespaces and VXLAN devices",
        goals: LAB,
    },
    Tool {
        binary: "tc",
        debian: "iproute2",
        fedora: "iproute-tc",
        why: "shows and sets the filters of the lab's devices",
        goals: LAB,
    },
    Tool {
        binary: "ethtool",
        debian: "ethtool",
        fedora: "ethtool",
        why: "turns off the checksum offload of the lab's underlay",
        goals: LAB,
    },
    Tool {
        binary: "iptables",
        debian: "iptables",
        fedora: "iptables-nft",
        why: "marks and masquerades as kube-proxy does",
        goals: LAB,
    },
    Tool {
        binary: "iptables-legacy",
        debian: "iptables",
        fedora: "iptables-legacy",
        why: "makes rules of the old kind",
        goals: &[Goal::Test],
    },
    Tool {
        binary: "nft",
        debian: "nftables",
        fedora: "nftables",
        why: "stands in for kernels that mangle a zero checksum",
        goals: LAB,
    },
    Tool {
        binary: "tcpdump",
        debian: "tcpdump",
        fedora: "tcpdump",
        why: "captures what the sender and the receiver see",
        goals: LAB,
    },
    Tool {
        binary: "conntrack",
        debian: "conntrack",
        fedora: "conntrack-tools",
        why: "knows the source port before NAT",
        goals: LAB,
    },
    Tool {
        binary: "tshark",
        debian: "tshark",
        fedora: "wireshark-cli",
        why: "adds up the checksums of captures as Wireshark does",
        goals: &[Goal::Test, Goal::Bench],
    },
    Tool {
        binary: "editcap",
        debian: "wireshark-common",
        fedora: "wireshark-cli",
        why: "turns captures into other formats",
        goals: CAPTURES,
    },
    Tool {
        binary: "zstd",
        debian: "zstd",
        fedora: "zstd",
        why: "compresses captures",
        goals: CAPTURES,
    },
    Tool {
        binary: "gzip",
        debian: "gzip",
        fedora: "gzip",
        why: "compresses captures",
        goals: CAPTURES,
    },
    Tool {
        binary: "c++",
        debian: "g++",
        fedora: "gcc-c++",
        why: "compiles libFuzzer, which fuzz targets are linked with",
        goals: &[Goal::Fuzz, Goal::Lint],
    },
    Tool {
        binary: "qemu-system-x86_64",
        debian: "qemu-system-x86",
        fedora: "qemu-system-x86-core",
        why: "runs other kernels",
        goals: VM,
    },
    Tool {
        binary: "modprobe",
        debian: "kmod",
        fedora: "kmod",
        why: "knows which kernel modules need which others",
        goals: VM,
    },
    Tool {
        binary: "xz",
        debian: "xz-utils",
        fedora: "xz",
        why: "uncompresses kernel modules",
        goals: VM,
    },
    Tool {
        binary: "make",
        debian: "make",
        fedora: "make",
        why: "builds the kernel module with the original bug",
        goals: VM,
    },
    Tool {
        binary: "gcc",
        debian: "gcc",
        fedora: "gcc",
        why: "compiles the kernel module with the original bug",
        goals: VM,
    },
    Tool {
        binary: "strip",
        debian: "binutils",
        fedora: "binutils",
        why: "makes test programs small enough for a virtual machine",
        goals: VM,
    },
    Tool {
        binary: "iperf3",
        debian: "iperf3",
        fedora: "iperf3",
        why: "sends as much as it can",
        goals: BENCH,
    },
    Tool {
        binary: "clang",
        debian: "clang",
        fedora: "clang",
        why: "compiles the BPF program in C that ours is compared with",
        goals: BENCH,
    },
    Tool {
        binary: "/usr/include/bpf/bpf_helpers.h",
        debian: "libbpf-dev",
        fedora: "libbpf-devel",
        why: "holds what BPF programs in C include",
        goals: BENCH,
    },
];

/// The tools for these goals that are not installed.
pub(crate) fn missing_tools(goals: &[Goal]) -> Vec<&'static Tool> {
    TOOLS
        .iter()
        .filter(|tool| tool.goals.iter().any(|goal| goals.contains(goal)))
        .filter(|tool| !tool.is_there())
        .collect()
}

impl Tool {
    fn is_there(&self) -> bool {
        let path = Path::new(self.binary);
        if path.is_absolute() { path.is_file() } else { process::find(self.binary).is_some() }
    }
}

/// The tools for a goal by their names.
pub(crate) fn tools_for(goal: Goal) -> impl Iterator<Item = &'static str> {
    TOOLS.iter().filter(move |tool| tool.goals.contains(&goal)).map(|tool| tool.binary)
}

/// How the distribution installs software.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PackageManager {
    Apt,
    Dnf,
}

impl PackageManager {
    /// The one of this machine.
    pub(crate) fn detect() -> Option<Self> {
        [(Self::Apt, "apt-get"), (Self::Dnf, "dnf")]
            .into_iter()
            .find_map(|(manager, binary)| process::find(binary).map(|_| manager))
    }

    /// The package that holds a tool.
    pub(crate) fn package(self, tool: &Tool) -> Package {
        let name = match self {
            Self::Apt => tool.debian,
            Self::Dnf => tool.fedora,
        };
        Package { name: name.to_owned(), why: tool.why }
    }
}

/// A package to install, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) why: &'static str,
}

impl Display for Package {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: {}", self.name, self.why)
    }
}

/// The names of the tools, for a machine whose package manager we do not know.
pub(crate) fn names(tools: &[&Tool]) -> String {
    let names: Vec<_> = tools.iter().map(|tool| tool.binary).collect();
    names.join(", ")
}

/// Installs packages, as root.
pub(crate) fn install(manager: PackageManager, packages: &[Package]) -> Result<()> {
    let names: Vec<_> = packages.iter().map(|package| package.name.as_str()).collect();
    let what = format!("installing the packages {}", names.join(", "));
    let (program, arguments): (_, &[_]) = match manager {
        PackageManager::Apt => {
            update_apt_lists(&what)?;
            // A conflicting package, say the distribution's own rustup, is for its owner to remove.
            // And another apt at work, as after every boot, is worth waiting for.
            let arguments = &[
                "--yes",
                "--quiet=2",
                "--no-install-recommends",
                "--no-remove",
                "--option=DPkg::Lock::Timeout=300",
                "install",
            ];
            ("apt-get", arguments)
        }
        PackageManager::Dnf => ("dnf", &["--assumeyes", "--quiet", "install"]),
    };
    let mut command = root::command(&what, &[("DEBIAN_FRONTEND", "noninteractive")], program)?;
    let output = process::capture(command.args(arguments).args(&names))?;
    if !output.status.success() {
        // What a package says while it is installed matters to nobody unless it fails.
        eprint!("{}", String::from_utf8_lossy(&output.stdout));
        eprint!("{}", String::from_utf8_lossy(&output.stderr));
        bail!(
            "{what} failed, see above: install them by hand (`{program} install {}`)",
            names.join(" ")
        );
    }
    Ok(())
}

/// Lists that are old name versions that the archive no longer has; a fresh machine has none.
fn update_apt_lists(what: &str) -> Result<()> {
    let mut command = root::command(what, &[], "apt-get")?;
    command.args(["--quiet=2", "--option=DPkg::Lock::Timeout=300", "update"]);
    let output = process::capture(&mut command)?;
    if !output.status.success() {
        eprintln!("setup: `apt-get update` failed; going on with the package lists as they are");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_tool_is_known_to_both_package_managers() {
        for tool in TOOLS {
            assert!(!PackageManager::Apt.package(tool).name.is_empty(), "{tool:?}");
            assert!(!PackageManager::Dnf.package(tool).name.is_empty(), "{tool:?}");
            assert!(!tool.goals.is_empty(), "{tool:?}");
        }
    }

    #[test]
    fn what_is_needed_may_be_a_file() {
        let of = |binary| Tool { binary, debian: "", fedora: "", why: "", goals: BENCH };
        assert!(of("/proc/self/status").is_there());
        assert!(!of("/proc/self/no-such-file").is_there());
        assert!(of("sh").is_there());
    }

    #[test]
    fn building_needs_none_of_the_lab_tools() {
        assert_eq!(missing_tools(&[Goal::Build]), Vec::<&Tool>::new());
    }
}
