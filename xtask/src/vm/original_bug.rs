//! The bug of the first reports on a kernel that can be had: Debian's, with the module that does
//! NAT built anew from the distribution's own source, as it was before commit ea64d8d6c675
//! ("netfilter: nat: never update the UDP checksum when it's 0", Linux 5.7).

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};

use super::kernels::{Apt, Kernel, Wanted, cache, quiet, unpack};
use crate::process;

/// The module.
const MODULE: &str = "nf_nat.ko";

/// The package of the source, what it holds, and what of that is needed.
const SOURCE: &str = "linux-source-6.1";
const ARCHIVE: &str = "usr/src/linux-source-6.1.tar.xz";
const FOLDER: &str = "linux-source-6.1/net/netfilter";
const FILES: &[&str] = &[
    "nf_internals.h",
    "nf_nat_core.c",
    "nf_nat_helper.c",
    "nf_nat_masquerade.c",
    "nf_nat_proto.c",
    "nf_nat_redirect.c",
];
const MAKEFILE: &str = "obj-m := nf_nat.o\n\
    nf_nat-y := nf_nat_core.o nf_nat_helper.o nf_nat_masquerade.o nf_nat_proto.o nf_nat_redirect.o\n";

/// What is different from the distribution's source.
struct Edit {
    file: &'static str,
    /// Must be there exactly once, or the source is not the one that this was written for.
    from: &'static str,
    to: &'static str,
}

const EDITS: &[Edit] = &[
    // udp_manip_pkt(): the condition that ea64d8d6c675 removed. `ip_summed` tells of the inner
    // checksum here, and a zero that means "no checksum" is updated as if it were one.
    Edit {
        file: "nf_nat_proto.c",
        from: "__udp_manip_pkt(skb, iphdroff, hdr, tuple, maniptype, !!hdr->check);",
        to: "__udp_manip_pkt(skb, iphdroff, hdr, tuple, maniptype,\n\
             \t\t\thdr->check || skb->ip_summed == CHECKSUM_PARTIAL);",
    },
    // nf_nat_init(): BPF functions of the module need its BTF, which is made with the kernel's
    // image, and that is not in the packages.
    Edit { file: "nf_nat_core.c", from: "ret = register_nf_nat_bpf();", to: "ret = 0;" },
];

/// The module for this kernel, from the cache or built now.
pub(super) fn module(wanted: Wanted, kernel: &Kernel) -> Result<PathBuf> {
    let folder = cache()?.join(format!("original-bug-{}", kernel.release));
    let sources = folder.join("sources");
    if !sources.exists() {
        fetch(wanted, kernel, &folder)
            .with_context(|| format!("cannot get the source of {}", kernel.release))?;
    }
    build(&folder, &kernel.release).context("cannot build NAT with the original bug")
}

fn fetch(wanted: Wanted, kernel: &Kernel, folder: &Path) -> Result<()> {
    eprintln!("vm: getting the source of {} (140 MB) …", kernel.release);
    let partial = folder.with_extension("partial");
    let _ = fs::remove_dir_all(&partial);
    fs::create_dir_all(&partial).with_context(|| partial.display().to_string())?;
    let apt = Apt::new(wanted.suite)?;
    let headers = format!("linux-headers-{}", kernel.release);
    let mut packages = apt.closure(&headers, "linux-").context(
        "the distribution has a newer one by now: get that, with `cargo xtask vm --refresh`",
    )?;
    // All that it does is to pull in a compiler, and any will do.
    packages.retain(|package| !package.starts_with("linux-compiler-"));
    packages.push(SOURCE.to_owned());
    let files = apt.download(&packages, &partial)?;
    ensure!(
        version_of(&files, SOURCE)? == version_of(&files, &headers)?,
        "its source and its headers are of different versions"
    );
    for file in &files {
        unpack(file, &partial)?;
        fs::remove_file(file).with_context(|| file.display().to_string())?;
    }
    let archive = partial.join(ARCHIVE);
    let mut tar = process::command("tar");
    tar.arg("--extract").arg("--file").arg(&archive).arg("--directory").arg(&partial);
    quiet(tar.args(FILES.iter().map(|file| format!("{FOLDER}/{file}"))))?;
    fs::remove_file(&archive).with_context(|| archive.display().to_string())?;
    fs::rename(partial.join(FOLDER), partial.join("sources"))?;
    let _ = fs::remove_dir_all(folder);
    fs::rename(&partial, folder).with_context(|| folder.display().to_string())
}

/// The version in the name of a package's file, `name_version_architecture.deb`.
fn version_of<'a>(files: &'a [PathBuf], package: &str) -> Result<&'a str> {
    let names = files.iter().filter_map(|file| file.file_name()?.to_str());
    let mut versions =
        names.filter_map(|name| name.strip_prefix(package)?.strip_prefix('_')?.split('_').next());
    versions.next().with_context(|| format!("{package} was not downloaded"))
}

/// Built anew where what it was built from last is not what it is to be built from.
fn build(folder: &Path, release: &str) -> Result<PathBuf> {
    let mut sources = vec![("Makefile", MAKEFILE.to_owned())];
    for file in FILES {
        let path = folder.join("sources").join(file);
        let source = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        sources.push((file, edited(file, source)?));
    }
    let done = folder.join("built");
    let is_the_same = |(file, source): &(&str, String)| {
        fs::read_to_string(done.join(file)).is_ok_and(|last| last == *source)
    };
    if sources.iter().all(is_the_same) {
        return Ok(done.join(MODULE));
    }
    let build = folder.join("build");
    for folder in [&build, &done] {
        let _ = fs::remove_dir_all(folder);
    }
    fs::create_dir_all(&build).with_context(|| build.display().to_string())?;
    for (file, source) in sources {
        fs::write(build.join(file), source)?;
    }
    let headers = folder.join("usr/src").join(format!("linux-headers-{release}"));
    let common = release.strip_suffix("-cloud-amd64").unwrap_or(release);
    let common = folder.join("usr/src").join(format!("linux-headers-{common}-common/Makefile"));
    let mut make = process::command("make");
    // The headers' own Makefile expects the packages to be installed.
    make.arg("-C").arg(&headers).arg("-f").arg(&common).arg(format!("M={}", build.display()));
    quiet(make.args(["CC=gcc", "modules"]))?;
    fs::rename(&build, &done).with_context(|| done.display().to_string())?;
    Ok(done.join(MODULE))
}

fn edited(file: &str, mut source: String) -> Result<String> {
    for edit in EDITS.iter().filter(|edit| edit.file == file) {
        ensure!(
            source.matches(edit.from).count() == 1,
            "{file} does not hold {:?} just once: this source is not the one that the edits in \
             xtask/src/vm/original_bug.rs were written for",
            edit.from
        );
        source = source.replace(edit.from, edit.to);
    }
    Ok(source)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_edit_that_does_not_fit_is_an_error() {
        let edit = &EDITS[0];
        let fits = format!("before\n{}\nafter\n", edit.from);
        assert!(edited(edit.file, fits.clone()).unwrap().contains("CHECKSUM_PARTIAL"));
        let error = edited(edit.file, "another source".to_owned()).unwrap_err();
        assert!(error.to_string().contains("nf_nat_proto.c"), "{error}");
        assert!(edited(edit.file, fits.repeat(2)).is_err());
        assert_eq!(edited("nf_internals.h", "as it is".to_owned()).unwrap(), "as it is");
    }

    #[test]
    fn each_edit_is_of_a_file_that_is_built() {
        assert!(EDITS.iter().all(|edit| FILES.contains(&edit.file)));
    }

    #[test]
    fn versions_come_from_the_names_of_files() {
        let files = [
            "a/linux-headers-6.1.0-50-common_6.1.176-1_all.deb".into(),
            "a/linux-headers-6.1.0-50_6.1.175-1_amd64.deb".into(),
        ];
        assert_eq!(version_of(&files, "linux-headers-6.1.0-50").unwrap(), "6.1.175-1");
        assert!(version_of(&files, "linux-headers").is_err());
    }
}
