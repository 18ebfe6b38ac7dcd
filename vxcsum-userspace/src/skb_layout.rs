//! Where the running kernel's `struct sk_buff` holds its offload state, from BTF.

use std::path::{Path, PathBuf};
use std::{fs, io};

use btfparse::{ErrorKind, Offset, Readable, TypeInformation};
use thiserror::Error;
use vxcsum_common::layout::SkbLayout;

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
    let types = TypeInformation::new(&Bytes(bytes)).map_err(|error| error.message().to_owned())?;
    let sk_buff = types.id_of("sk_buff").ok_or("there is no struct sk_buff")?;
    let bits = |field: &str| match types.offset_of(sk_buff, field) {
        Ok((_, Offset::ByteOffset(bytes))) => Ok(bytes * 8),
        Ok((_, Offset::BitOffsetAndSize(bits, _))) => Ok(bits),
        Err(error) => Err(format!("struct sk_buff has no usable {field}: {}", error.message())),
    };
    let unusable = |field: &str| format!("struct sk_buff has {field} where it cannot be read");
    let bytes = |field: &str| match (bits(field)?, u16::try_from(bits(field)? / 8)) {
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

/// Bytes as the BTF parser wants them.
struct Bytes<'a>(&'a [u8]);

impl Readable for Bytes<'_> {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> btfparse::Result<()> {
        let bytes = usize::try_from(offset)
            .ok()
            .and_then(|offset| self.0.get(offset..)?.get(..buffer.len()))
            .ok_or_else(|| btfparse::Error::new(ErrorKind::IOError, "the file ends too early"))?;
        buffer.copy_from_slice(bytes);
        Ok(())
    }
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
