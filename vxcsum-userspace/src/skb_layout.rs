//! Where the running kernel's `struct sk_buff` holds its offload state, from BTF.

use std::path::{Path, PathBuf};
use std::{fs, io};

use thiserror::Error;
use vxcsum_common::layout::SkbLayout;

use crate::btf::Btf;

/// The kernel's description of its own types (since 5.4, where built in).
pub const VMLINUX_BTF: &str = "/sys/kernel/btf/vmlinux";

/// Why the layout is not known.
#[derive(Debug, Error)]
pub enum LayoutError {
    /// The file cannot be read.
    #[error("cannot read the kernel's types from {path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The file is no BTF, or not that of a kernel.
    #[error("{path} does not describe a kernel's types: {reason}")]
    Btf {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
}

/// Reads the layout from a BTF file.
pub fn read(path: &Path) -> Result<SkbLayout, LayoutError> {
    let bytes =
        fs::read(path).map_err(|source| LayoutError::File { path: path.to_owned(), source })?;
    of_btf(&bytes).map_err(|reason| LayoutError::Btf { path: path.to_owned(), reason })
}

fn of_btf(bytes: &[u8]) -> Result<SkbLayout, String> {
    let btf = Btf::new(bytes).ok_or("it is no BTF, or that of a later kernel")?;
    let unusable = |field: &str| format!("struct sk_buff has no usable {field}");
    let bits = |field| btf.bit_offset("sk_buff", field).ok_or_else(|| unusable(field));
    let bytes = |field| match (bits(field)?, u16::try_from(bits(field)? / 8)) {
        (bits, Ok(bytes)) if bits.is_multiple_of(8) => Ok(bytes),
        _ => Err(unusable(field)),
    };
    // Two bits that must lie in one byte; bit fields count from the lowest on little-endian
    // machines, the only ones that the object is built for.
    let ip_summed = bits("ip_summed")?;
    if ip_summed % 8 > 6 {
        return Err(unusable("ip_summed"));
    }
    Ok(SkbLayout {
        ip_summed: u16::try_from(ip_summed / 8).map_err(|_| unusable("ip_summed"))?,
        ip_summed_shift: (ip_summed % 8) as u16,
        csum_start: bytes("csum_start")?,
        csum_offset: bytes("csum_offset")?,
        head: bytes("head")?,
        data: bytes("data")?,
        is_known: 1,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_kernel_has_a_plausible_layout() {
        let layout = read(Path::new(VMLINUX_BTF)).unwrap();
        assert_eq!(layout.is_known, 1);
        assert_eq!(layout.csum_offset, layout.csum_start + 2, "{layout:?}");
        assert_eq!(layout.data, layout.head + 8, "{layout:?}");
    }

    #[test]
    fn bytes_that_are_no_btf_are_refused() {
        let mut bytes = fs::read(VMLINUX_BTF).unwrap();
        assert!(of_btf(b"").is_err());
        assert!(of_btf(&[0xff; 64]).is_err());
        // Every type becomes one that no kernel has yet.
        for byte in &mut bytes[24..4096] {
            *byte = 0xff;
        }
        assert!(of_btf(&bytes).is_err());
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = read(Path::new("/nonexistent/btf")).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/btf"), "{error}");
    }

    #[test]
    fn a_file_that_ends_too_early_is_refused() {
        let whole = fs::read(VMLINUX_BTF).unwrap();
        for len in [0, 1, 24, 1000, whole.len() / 2] {
            assert!(of_btf(&whole[..len]).is_err(), "{len} bytes");
        }
    }
}
