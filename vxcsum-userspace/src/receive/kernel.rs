//! What the running kernel says of itself, which the program is loaded with.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use vxcsum_common::receive::Kernel;

use crate::btf::{Btf, Struct};

/// The network namespace of this process.
const NETNS: &str = "/proc/self/ns/net";

/// Reads what is known from a BTF file, and which network namespace this is. An error says what the
/// kernel lacks.
pub(super) fn read(path: &Path) -> Result<Kernel, String> {
    let file = fs::read(path).map_err(|error| {
        format!("cannot read the kernel's types from {}: {error}", path.display())
    })?;
    let netns = fs::metadata(NETNS)
        .map_err(|error| format!("cannot tell the network namespace by {NETNS}: {error}"))?;
    // Namespaces are numbered by 32 bits (`struct ns_common`).
    Ok(Kernel { netns: netns.ino() as u32, ..of_btf(&file)? })
}

fn of_btf(file: &[u8]) -> Result<Kernel, String> {
    let btf = Btf::new(file).ok_or("the kernel's types are of an unknown form")?;
    let reason = btf
        .enum_value("skb_drop_reason", "SKB_DROP_REASON_UDP_CSUM")
        .ok_or("the kernel does not say why it drops a packet (Linux 5.17 or newer does)")?;
    let fields = |of| Fields::of(&btf, of);
    let (skb, device) = (fields("sk_buff")?, fields("net_device")?);
    Ok(Kernel {
        reason,
        netns: 0,
        skb_len: skb.offset("len")?,
        skb_data_len: skb.offset("data_len")?,
        skb_head: skb.offset("head")?,
        skb_data: skb.offset("data")?,
        skb_mac_header: skb.offset("mac_header")?,
        skb_network_header: skb.offset("network_header")?,
        skb_mark: skb.offset("mark")?,
        skb_dev: skb.offset("dev")?,
        dev_name: device.offset("name")?,
        dev_net: device.offset("nd_net")?,
        net_inum: fields("net")?.offset("ns")? + fields("ns_common")?.offset("inum")?,
        task_nsproxy: fields("task_struct")?.offset("nsproxy")?,
        nsproxy_net: fields("nsproxy")?.offset("net_ns")?,
        reserved: 0,
    })
}

/// The fields of a struct of the kernel.
struct Fields<'a> {
    of: &'static str,
    btf: Struct<'a>,
}

impl<'a> Fields<'a> {
    fn of(btf: &'a Btf<'a>, of: &'static str) -> Result<Self, String> {
        let btf = btf.struct_named(of).ok_or_else(|| format!("the kernel has no struct {of}"))?;
        Ok(Self { of, btf })
    }

    /// In bytes.
    fn offset(&self, field: &str) -> Result<u16, String> {
        let bits = self.btf.bit_offset(field).filter(|bits| bits.is_multiple_of(8));
        bits.and_then(|bits| u16::try_from(bits / 8).ok())
            .ok_or_else(|| format!("the kernel's struct {} has no usable {field}", self.of))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::skb_layout::VMLINUX_BTF;

    #[test]
    fn this_kernel_tells_all() {
        let kernel = read(Path::new(VMLINUX_BTF)).unwrap();
        assert_eq!(kernel.skb_data, kernel.skb_head + 8, "{kernel:?}");
        assert_eq!(kernel.skb_data_len, kernel.skb_len + 4, "{kernel:?}");
        assert_ne!((kernel.netns, kernel.reason), (0, 0));
    }

    #[test]
    fn a_kernel_without_the_reason_is_told_apart() {
        const REASON: &[u8] = b"SKB_DROP_REASON_UDP_CSUM\0";
        let mut file = fs::read(VMLINUX_BTF).unwrap();
        let at = file.windows(REASON.len()).position(|it| it == REASON).unwrap();
        file[at] = b'X';
        let error = of_btf(&file).unwrap_err();
        assert!(error.contains("5.17"), "{error}");
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = read(Path::new("/nonexistent/btf")).unwrap_err();
        assert!(error.contains("/nonexistent/btf"), "{error}");
    }
}
