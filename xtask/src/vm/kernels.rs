//! Kernels of the distribution, unpacked into a cache: nothing of them is installed.
//!
//! They come from the mirror that this machine's own apt uses, but from the suites of other
//! releases as well. apt is given a configuration and a memory of its own for that; those of the
//! machine are only read.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};

use super::original_bug;
use crate::process;

/// The package that stands for the suite's kernel for virtual machines.
const IMAGE: &str = "linux-image-cloud-amd64";
/// The keys of all releases, as the package debian-archive-keyring brings them.
const KEYRINGS: [&str; 2] = [
    "/usr/share/keyrings/debian-archive-keyring.pgp",
    "/usr/share/keyrings/debian-archive-keyring.gpg",
];
/// Where to look for the cache instead of in the user's cache folder.
const CACHE_VARIABLE: &str = "VXCSUM_VM_CACHE";

/// A kernel that can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// What the user calls it.
    pub(crate) name: &'static str,
    /// The suite of Debian that has it.
    pub(crate) suite: &'static str,
    /// Whether NAT in it is given the original bug back.
    pub(crate) original_bug: bool,
    /// How events are to come from it, where that is not for vxcsum to find out.
    pub(crate) transport: Option<&'static str>,
}

/// The kernels of the matrix, the oldest first.
pub(crate) const WANTED: &[Wanted] = &[
    Wanted { name: "5.10", suite: "bullseye", ..PLAIN },
    Wanted { name: "5.10-perf", suite: "bullseye", transport: Some("perf"), ..PLAIN },
    Wanted { name: "6.1", suite: "bookworm", ..PLAIN },
    Wanted { name: "original-bug", suite: "bookworm", original_bug: true, ..PLAIN },
    Wanted {
        name: "original-bug-perf",
        suite: "bookworm",
        original_bug: true,
        transport: Some("perf"),
    },
    Wanted { name: "6.12", suite: "trixie", ..PLAIN },
    Wanted { name: "newest", suite: "sid", ..PLAIN },
];

/// A kernel as the distribution has it, and vxcsum as it comes.
const PLAIN: Wanted = Wanted { name: "", suite: "", original_bug: false, transport: None };

/// A kernel in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Kernel {
    /// `uname -r` of it.
    pub(crate) release: String,
    /// What QEMU boots.
    pub(crate) image: PathBuf,
    /// A module to load in place of its own of that name.
    pub(crate) replaced: Option<PathBuf>,
    /// The folder that it was unpacked into.
    root: PathBuf,
}

impl Wanted {
    /// The kernel with this name.
    pub(crate) fn by_name(name: &str) -> Option<Self> {
        WANTED.iter().find(|wanted| wanted.name == name).copied()
    }

    /// Takes it from the cache, or gets it first.
    pub(crate) fn get(self, refresh: bool) -> Result<Kernel> {
        let folder = cache()?.join(self.suite);
        if refresh || !folder.exists() {
            self.fetch(&folder).with_context(|| {
                format!("cannot get the kernel {} of Debian {}", self.name, self.suite)
            })?;
        }
        let mut kernel = Kernel::unpacked(&folder.join("root"))?;
        // A suite may have moved on by the time that somebody starts with an empty cache.
        let version = self.name.split('-').next().unwrap_or_default();
        ensure!(
            !version.starts_with(|first: char| first.is_ascii_digit())
                || kernel.release.starts_with(&format!("{version}.")),
            "Debian {} has {}, which is no {version}: change the suite in xtask/src/vm/kernels.rs",
            self.suite,
            kernel.release,
        );
        if self.original_bug {
            kernel.replaced = Some(original_bug::module(self, &kernel)?);
        }
        Ok(kernel)
    }

    fn fetch(self, folder: &Path) -> Result<()> {
        eprintln!("vm: getting the kernel {} of Debian {} …", self.name, self.suite);
        let apt = Apt::new(self.suite)?;
        let partial = folder.with_extension("partial");
        let _ = fs::remove_dir_all(&partial);
        let root = partial.join("root");
        fs::create_dir_all(&root).with_context(|| root.display().to_string())?;
        let packages = apt.closure(IMAGE, "linux-")?;
        for file in apt.download(&packages, &partial)? {
            unpack(&file, &root)?;
            fs::remove_file(&file).with_context(|| file.display().to_string())?;
        }
        let kernel = Kernel::unpacked(&root)?;
        let mut depmod = process::command("depmod");
        quiet(depmod.arg("-b").arg(&root).arg(&kernel.release))?;
        let _ = fs::remove_dir_all(folder);
        fs::rename(&partial, folder).with_context(|| folder.display().to_string())
    }
}

impl Kernel {
    fn unpacked(root: &Path) -> Result<Self> {
        // Newer packages leave it to the system that /lib is /usr/lib.
        if !root.join("lib").exists() {
            std::os::unix::fs::symlink("usr/lib", root.join("lib"))
                .with_context(|| root.display().to_string())?;
        }
        let modules = root.join("lib/modules");
        let mut releases = fs::read_dir(&modules).with_context(|| modules.display().to_string())?;
        let release = releases.next().context("the packages hold no modules")??.file_name();
        let release = release.to_string_lossy().into_owned();
        let image =
            [root.join(format!("boot/vmlinuz-{release}")), modules.join(&release).join("vmlinuz")];
        let image = image.into_iter().find(|path| path.exists());
        let image = image.with_context(|| format!("the packages hold no image of {release}"))?;
        Ok(Self { release, image, replaced: None, root: root.to_owned() })
    }

    /// Major and minor version.
    pub(crate) fn version(&self) -> Result<(u32, u32)> {
        let mut numbers = self.release.split('.').map(str::parse);
        match (numbers.next(), numbers.next()) {
            (Some(Ok(major)), Some(Ok(minor))) => Ok((major, minor)),
            _ => bail!("cannot read the version of {}", self.release),
        }
    }

    /// The files of a module and of what it needs, in the order in which to load them; none where
    /// it is built in, an error where the kernel has no such module.
    pub(crate) fn module(&self, name: &str) -> Result<Vec<PathBuf>> {
        let mut modprobe = process::command("modprobe");
        modprobe.args(["--show-depends", "--config=/dev/null", "--set-version", &self.release]);
        let output = process::capture(modprobe.arg("--dirname").arg(&self.root).arg(name))?;
        if !output.status.success() {
            let reason = String::from_utf8_lossy(&output.stderr);
            bail!("{} has no module {name}: {}", self.release, reason.trim());
        }
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(text.lines().filter_map(|line| line.strip_prefix("insmod ")).map(file_of).collect())
    }
}

/// modprobe names the file and, after a space, the parameters, of which there are none.
fn file_of(line: &str) -> PathBuf {
    line.trim_end().into()
}

/// What the kernel loads: the contents of a module's file, uncompressed.
pub(crate) fn uncompressed(module: &Path) -> Result<Vec<u8>> {
    let tool = match module.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => return fs::read(module).with_context(|| module.display().to_string()),
    };
    let output = process::capture(process::command(tool).args(["-dc"]).arg(module))?;
    ensure!(output.status.success(), "{tool} cannot uncompress {}", module.display());
    Ok(output.stdout)
}

/// Where everything is kept that comes from the network.
pub(super) fn cache() -> Result<PathBuf> {
    let folder = match (env::var_os(CACHE_VARIABLE), env::var_os("XDG_CACHE_HOME")) {
        (Some(folder), _) => PathBuf::from(folder),
        (None, Some(folder)) => PathBuf::from(folder).join("vxcsum/vm"),
        (None, None) => {
            env::home_dir().context("there is no home folder")?.join(".cache/vxcsum/vm")
        }
    };
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    Ok(folder)
}

pub(super) fn unpack(package: &Path, into: &Path) -> Result<()> {
    quiet(process::command("dpkg-deb").arg("--extract").arg(package).arg(into))
}

/// Runs it; what it says matters where it fails.
pub(super) fn quiet(command: &mut Command) -> Result<()> {
    let output = process::capture(command)?;
    if !output.status.success() {
        let reason = String::from_utf8_lossy(&output.stderr);
        bail!("`{}` failed: {}", process::shown(command), reason.trim());
    }
    Ok(())
}

/// apt with a single suite, as if nothing were installed.
pub(super) struct Apt {
    folder: PathBuf,
}

impl Apt {
    pub(super) fn new(suite: &str) -> Result<Self> {
        let apt = Self { folder: cache()?.join(format!("apt-{suite}")) };
        for folder in ["lists/partial", "archives/partial"] {
            let folder = apt.folder.join(folder);
            fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
        }
        let source = format!("{} {suite} main\n", mirror()?);
        for (file, text) in [("status", ""), ("sources.list", source.as_str())] {
            let path = apt.folder.join(file);
            fs::write(&path, text).with_context(|| path.display().to_string())?;
        }
        quiet(apt.command("apt-get").args(["--quiet=2", "--error-on=any", "update"]))?;
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = process::command(program);
        let mut set = |option: &str, value: &Path| {
            command.arg(format!("--option={option}={}", value.display()));
        };
        set("Dir::State", &self.folder);
        set("Dir::State::status", &self.folder.join("status"));
        set("Dir::State::lists", &self.folder.join("lists"));
        set("Dir::Cache", &self.folder);
        set("Dir::Etc::sourcelist", &self.folder.join("sources.list"));
        set("Dir::Etc::sourceparts", Path::new("/dev/null"));
        set("Dir::Etc::preferencesparts", Path::new("/dev/null"));
        set("Acquire::Languages", Path::new("none"));
        set("Acquire::IndexTargets::deb::DEP-11::DefaultEnabled", Path::new("false"));
        set("APT::Architecture", Path::new("amd64"));
        // apt's own user cannot write into ours, and there is nothing to protect.
        set("APT::Sandbox::User", Path::new("root"));
        command
    }

    /// The packages whose names start with `prefix` among those that `package` needs, with itself.
    pub(super) fn closure(&self, package: &str, prefix: &str) -> Result<Vec<String>> {
        let mut apt_get = self.command("apt-get");
        let output = process::capture(apt_get.args([
            "--simulate",
            "--no-install-recommends",
            "install",
            package,
        ]))?;
        if !output.status.success() {
            let reason = String::from_utf8_lossy(&output.stderr);
            bail!("`apt-get install {package}` would fail: {}", reason.trim());
        }
        let text = String::from_utf8_lossy(&output.stdout);
        let names = text.lines().filter_map(|line| line.strip_prefix("Inst ")?.split(' ').next());
        Ok(names.filter(|name| name.starts_with(prefix)).map(str::to_owned).collect())
    }

    /// Downloads packages, whose sums apt verifies, into a folder that has no others.
    pub(super) fn download(&self, packages: &[String], into: &Path) -> Result<Vec<PathBuf>> {
        let mut apt_get = self.command("apt-get");
        quiet(apt_get.args(["--quiet=2", "download"]).args(packages).current_dir(into))?;
        let mut files = Vec::new();
        for entry in fs::read_dir(into).with_context(|| into.display().to_string())? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "deb") {
                files.push(path);
            }
        }
        ensure!(files.len() >= packages.len(), "apt-get has not downloaded all packages");
        Ok(files)
    }
}

/// How this machine's apt reaches Debian, as a line of sources.list without suite and component.
fn mirror() -> Result<String> {
    const FORMAT: &str = "$(CREATED_BY)\t$(ORIGIN)\t$(LABEL)\t$(COMPONENT)\t$(REPO_URI)";
    let mut targets = process::command("apt-get");
    targets.args(["indextargets", "--format", FORMAT]);
    let output =
        process::capture(&mut targets).context("kernels come as Debian packages, through apt")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let uri = mirror_among(&text).context(
        "apt on this machine has no source of Debian's main archive, or has not read it yet \
         (`apt-get update`): the kernels come from there",
    )?;
    // Where the keys are not in apt's own folder, a source has to name them.
    let keys = KEYRINGS.iter().find(|keys| Path::new(keys).exists());
    let keys = keys.map(|keys| format!("[signed-by={keys}] ")).unwrap_or_default();
    Ok(format!("deb {keys}{uri}"))
}

fn mirror_among(targets: &str) -> Option<&str> {
    targets.lines().find_map(|line| line.strip_prefix("Packages\tDebian\tDebian\tmain\t"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_that_of_debians_main_archive() {
        let targets = "Packages\tDebian\tDebian-Security\tmain\thttp://a.test/s/\n\
            Translations\tDebian\tDebian\tmain\thttp://b.test/d/\n\
            Packages\tOther\tOther\tmain\thttp://c.test/\n\
            Packages\tDebian\tDebian\tmain\thttp://d.test/d/\n";
        assert_eq!(mirror_among(targets), Some("http://d.test/d/"));
        assert_eq!(mirror_among("Packages\tUbuntu\tUbuntu\tmain\thttp://e.test/"), None);
    }

    #[test]
    fn versions_are_read_from_releases() {
        let version = |release: &str| {
            let release = release.to_owned();
            let (image, root) = (PathBuf::new(), PathBuf::new());
            Kernel { release, image, replaced: None, root }.version().ok()
        };
        assert_eq!(version("5.10.0-32-cloud-amd64"), Some((5, 10)));
        assert_eq!(version("7.2.13+deb14-cloud-amd64"), Some((7, 2)));
        assert_eq!(version("linux"), None);
    }

    #[test]
    fn kernels_are_found_by_name() {
        assert_eq!(Wanted::by_name("6.1").unwrap().suite, "bookworm");
        assert_eq!(Wanted::by_name("6"), None);
    }
}
