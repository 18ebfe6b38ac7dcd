//! The file system of a virtual machine, as a cpio archive that the kernel unpacks into memory
//! (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::{
    collections::BTreeSet,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

use crate::process;

const FOLDER: u32 = 0o040_755;
const SYMLINK: u32 = 0o120_777;
const CHARACTER_DEVICE: u32 = 0o020_600;
const PROGRAM: u32 = 0o100_755;
const FILE: u32 = 0o100_644;

/// Where programs go that are not asked for by their path.
const BIN: &str = "/usr/bin";

/// An archive in the making.
pub(crate) struct Initramfs {
    /// A file for what passes through other programs.
    scratch: PathBuf,
    bytes: Vec<u8>,
    entries: u32,
    present: BTreeSet<PathBuf>,
}

impl Initramfs {
    /// `scratch` is a file for its own use. What every machine needs: the first process, and the devices that it is started with.
    pub(crate) fn new(init: &Path, scratch: &Path) -> Result<Self> {
        let mut initramfs = Self {
            scratch: scratch.to_owned(),
            bytes: Vec::new(),
            entries: 0,
            present: BTreeSet::new(),
        };
        // Without an open standard output even a program that prints nothing dies.
        initramfs.entry(Path::new("/dev/console"), CHARACTER_DEVICE, (5, 1), &[]);
        initramfs.entry(Path::new("/dev/null"), CHARACTER_DEVICE, (1, 3), &[]);
        let init = initramfs.stripped(init)?;
        initramfs.entry(Path::new("/init"), PROGRAM, (0, 0), &init);
        initramfs
            .text("/etc/passwd", "root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n");
        initramfs.text("/etc/group", "root:x:0:\nnogroup:x:65534:\n");
        // Libraries in folders that only the host's configuration names.
        if let Ok(cache) = fs::read("/etc/ld.so.cache") {
            initramfs.entry(Path::new("/etc/ld.so.cache"), FILE, (0, 0), &cache);
        }
        Ok(initramfs)
    }

    /// Adds a file.
    pub(crate) fn text(&mut self, path: &str, text: &str) {
        self.entry(Path::new(path), FILE, (0, 0), text.as_bytes());
    }

    /// Adds a file with the contents of another.
    pub(crate) fn bytes(&mut self, path: &Path, bytes: &[u8]) {
        self.entry(path, FILE, (0, 0), bytes);
    }

    /// Adds a program without its debug information, and the libraries that it needs.
    pub(crate) fn program(&mut self, at: &Path, from: &Path) -> Result<()> {
        self.libraries(from)?;
        let stripped = self.stripped(from)?;
        self.entry(at, PROGRAM, (0, 0), &stripped);
        Ok(())
    }

    /// Adds a tool of the host under its name, and what it needs.
    pub(crate) fn tool(&mut self, name: &str) -> Result<()> {
        let path = process::find(name).with_context(|| format!("{name} is not installed"))?;
        let real = path.canonicalize().with_context(|| path.display().to_string())?;
        let at = Path::new(BIN).join(real.file_name().context("a tool without a name")?);
        if !self.present.contains(&at) {
            self.libraries(&real)?;
            self.entry(&at, PROGRAM, (0, 0), &read(&real)?);
        }
        // One program of many names looks at the name that it is called by.
        let called = Path::new(BIN).join(name);
        self.entry(&called, SYMLINK, (0, 0), at.as_os_str().as_encoded_bytes());
        Ok(())
    }

    /// Adds the plugins of iptables, which lie next to its library.
    pub(crate) fn xtables_plugins(&mut self) -> Result<()> {
        let library = self.present.iter().find(|path| {
            path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("libxtables.so"))
        });
        let library = library.context("iptables does not use libxtables")?.canonicalize()?;
        let folder = library.with_file_name("xtables");
        for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            let path = entry?.path();
            self.libraries(&path)?;
            let real = path.canonicalize().with_context(|| path.display().to_string())?;
            self.entry(&path, PROGRAM, (0, 0), &read(&real)?);
        }
        Ok(())
    }

    fn libraries(&mut self, program: &Path) -> Result<()> {
        let mut ldd = process::command("ldd");
        let output = process::capture(ldd.arg(program))?;
        let text = String::from_utf8_lossy(&output.stdout);
        for line in text.lines() {
            let Some(library) = library(line)? else { continue };
            if !self.present.contains(library) {
                self.entry(library, PROGRAM, (0, 0), &read(library)?);
            }
        }
        Ok(())
    }

    /// The program without its debug information, which is most of it.
    fn stripped(&self, program: &Path) -> Result<Vec<u8>> {
        let mut strip = process::command("strip");
        let output =
            process::capture(strip.arg("--strip-debug").arg("-o").arg(&self.scratch).arg(program))?;
        if !output.status.success() {
            let reason = String::from_utf8_lossy(&output.stderr);
            bail!("`{}` failed: {}", process::shown(&strip), reason.trim());
        }
        read(&self.scratch)
    }

    /// Appends an entry, after the folders that it is in; one that is there already stays.
    fn entry(&mut self, path: &Path, mode: u32, device: (u32, u32), contents: &[u8]) {
        if let Some(folder) = path.parent()
            && folder != Path::new("/")
            && !self.present.contains(folder)
        {
            self.entry(folder, FOLDER, (0, 0), &[]);
        }
        if !self.present.insert(path.to_owned()) {
            return;
        }
        self.entries += 1;
        let name = path.strip_prefix("/").unwrap_or(path);
        self.raw(name.as_os_str().as_encoded_bytes(), mode, device, contents);
    }

    fn raw(&mut self, name: &[u8], mode: u32, (major, minor): (u32, u32), contents: &[u8]) {
        let links = 1;
        let number = self.entries;
        // The kernel takes a file of this size for truncated; ours are a thousand times smaller.
        let size = u32::try_from(contents.len()).unwrap_or(u32::MAX);
        let fields =
            [number, mode, 0, 0, links, 0, size, 0, 0, major, minor, name.len() as u32 + 1, 0];
        self.bytes.extend(b"070701");
        for field in fields {
            // Writing to memory does not fail.
            let _ = write!(self.bytes, "{field:08x}");
        }
        self.bytes.extend(name);
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(contents);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// Writes the archive into a file.
    pub(crate) fn write(mut self, path: &Path) -> Result<()> {
        self.raw(b"TRAILER!!!", 0, (0, 0), &[]);
        fs::write(path, &self.bytes).with_context(|| path.display().to_string())
    }
}

/// The path in a line of what ldd says; none for what the kernel itself provides.
fn library(line: &str) -> Result<Option<&Path>> {
    let line = line.trim();
    let path = match line.split_once(" => ") {
        Some((name, "not found")) => bail!("the library {name} is not installed"),
        Some((_, rest)) => rest,
        None => line,
    };
    let path = path.split(" (").next().unwrap_or(path);
    Ok(path.starts_with('/').then_some(Path::new(path)))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_ldd_says() {
        let path = |line| library(line).unwrap().map(Path::to_owned);
        assert_eq!(
            path("\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f0000000000)"),
            Some("/lib/x86_64-linux-gnu/libc.so.6".into())
        );
        assert_eq!(
            path("\t/lib64/ld-linux-x86-64.so.2 (0x00007f0000000000)"),
            Some("/lib64/ld-linux-x86-64.so.2".into())
        );
        assert_eq!(path("\tlinux-vdso.so.1 (0x00007ffc00000000)"), None);
        assert_eq!(path("\tnot a dynamic executable"), None);
        let missing = library("\tlibnftables.so.1 => not found").unwrap_err();
        assert_eq!(missing.to_string(), "the library libnftables.so.1 is not installed");
    }
}
