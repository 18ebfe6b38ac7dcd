//! Where the running kernel's `struct sk_buff` holds its offload state, from BTF.

use std::path::Path;

use btf_rs::{Backend, Btf, BtfType as _, Member, Type};
use thiserror::Error;
use vxcsum_common::layout::SkbLayout;

/// The kernel's description of its own types (since 5.4, where built in).
pub const VMLINUX_BTF: &str = "/sys/kernel/btf/vmlinux";

/// Why the layout is not known.
#[derive(Debug, Error)]
pub enum LayoutError {
    /// The file is missing or no BTF.
    #[error("cannot read the kernel's types from {path}: {source}")]
    Btf {
        /// The file.
        path: String,
        /// Why not.
        source: btf_rs::Error,
    },
    /// The types are not what any known kernel has.
    #[error("the kernel's struct sk_buff has no usable field {0}")]
    Field(&'static str),
}

/// Reads the layout from a BTF file.
pub fn read(path: &Path) -> Result<SkbLayout, LayoutError> {
    let of_file = |source| LayoutError::Btf { path: path.display().to_string(), source };
    let btf = Btf::from_file_with_backend(path, Backend::Mmap).map_err(of_file)?;
    let sk_buff = btf
        .resolve_types_by_name("sk_buff")
        .map_err(of_file)?
        .into_iter()
        .find_map(|found| match found {
            Type::Struct(sk_buff) => Some(sk_buff),
            _ => None,
        })
        .ok_or(LayoutError::Field("(the struct itself)"))?;
    let bits = |field| bit_offset(&btf, &sk_buff.members, field).ok_or(LayoutError::Field(field));
    let bytes = |field| {
        let bits = bits(field)?;
        if bits.is_multiple_of(8) {
            to_u16(bits / 8, field)
        } else {
            Err(LayoutError::Field(field))
        }
    };
    let ip_summed = bits("ip_summed")?;
    // Two bits that must lie in one byte; bit fields count from the lowest on little-endian
    // machines, the only ones that the object is built for.
    if ip_summed % 8 > 6 || cfg!(target_endian = "big") {
        return Err(LayoutError::Field("ip_summed"));
    }
    Ok(SkbLayout {
        ip_summed: to_u16(ip_summed / 8, "ip_summed")?,
        ip_summed_shift: to_u16(ip_summed % 8, "ip_summed")?,
        csum_start: bytes("csum_start")?,
        csum_offset: bytes("csum_offset")?,
        head: bytes("head")?,
        data: bytes("data")?,
        is_known: 1,
    })
}

fn to_u16(value: u32, field: &'static str) -> Result<u16, LayoutError> {
    u16::try_from(value).map_err(|_| LayoutError::Field(field))
}

/// Offset of a field in bits, also within anonymous structs and unions.
fn bit_offset(btf: &Btf, members: &[Member], field: &str) -> Option<u32> {
    members.iter().find_map(|member| {
        let name = btf.resolve_name(member).unwrap_or_default();
        if name == field {
            return Some(member.bit_offset());
        }
        if !name.is_empty() {
            return None;
        }
        match btf.resolve_type_by_id(member.get_type_id()?).ok()? {
            Type::Struct(inner) | Type::Union(inner) => {
                Some(member.bit_offset() + bit_offset(btf, &inner.members, field)?)
            }
            _ => None,
        }
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
    fn a_missing_file_is_named() {
        let error = read(Path::new("/nonexistent/btf")).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/btf"), "{error}");
    }
}
