//! Which parts of the kernel are there. To ask a part itself may load it, which changes the node.

use std::fs;
use std::path::Path;

use nix::sys::utsname::uname;

/// Whether the module may be there, loaded or built in. False is certain, true may not be: what is
/// built in shows in no other way than by a file that containers need not have.
pub fn may_be_there(module: &str) -> bool {
    let release = uname().ok().and_then(|name| Some(name.release().to_str()?.to_owned()));
    may_be_in(Path::new("/"), &release.unwrap_or_default(), module)
}

fn may_be_in(root: &Path, release: &str, module: &str) -> bool {
    let is_loaded = || root.join("sys/module").join(module).exists();
    // Without this one, the kernel loads no modules at all.
    let is_modular = root.join("proc/modules").exists() && root.join("sys/module").exists();
    let is_built_in = || {
        let list = root.join("lib/modules").join(release).join("modules.builtin");
        let file = format!("/{module}.ko");
        fs::read_to_string(list).map_or(true, |list| list.lines().any(|it| it.ends_with(&file)))
    };
    !is_modular || is_loaded() || is_built_in()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_is_loaded_or_built_in_or_not_there() {
        let root = std::env::temp_dir().join(format!("vxcsum-modules-{}", std::process::id()));
        let make = |path: &str, text: &str| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let is_there = |module| may_be_in(&root, "5.10.0", module);
        assert!(is_there("nf_nat"), "a kernel without modules");
        make("proc/modules", "");
        make("sys/module/nf_nat/refcnt", "");
        assert!(is_there("nf_nat") && is_there("nf_tables"), "no list of what is built in");
        make("lib/modules/5.10.0/modules.builtin", "kernel/net/ipv6/ipv6.ko\n");
        assert!(is_there("nf_nat") && is_there("ipv6"));
        assert!(!is_there("nf_tables"));
        fs::remove_dir_all(&root).unwrap();
    }
}
