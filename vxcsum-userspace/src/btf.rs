//! Just enough of BTF to find a field of a struct and a value of an enum
//! (Documentation/bpf/btf.rst; include/uapi/linux/btf.h).
//!
//! A library would read all 130,000 types of a kernel to find five fields: btfparse took 110 ms and
//! 60 MiB for that, this takes a pass over the file and half a megabyte.

/// BTF of a kernel.
pub(crate) struct Btf<'a> {
    types: &'a [u8],
    strings: &'a [u8],
    /// Offsets in `types`, by type id less one.
    offsets: Vec<u32>,
}

/// What stands before every type (`struct btf_type`).
#[derive(Clone, Copy)]
struct Header {
    name: u32,
    kind: u8,
    /// Members, parameters, values.
    count: usize,
    /// Member offsets share their word with the size of a bit field.
    is_flagged: bool,
}

const HEADER_LEN: usize = 12;
const MEMBER_LEN: usize = 12;

const STRUCT: u8 = 4;
const UNION: u8 = 5;
const ENUM: u8 = 6;

impl<'a> Btf<'a> {
    /// Takes the contents of a BTF file; `None` where it is none of this machine's byte order.
    pub(crate) fn new(file: &'a [u8]) -> Option<Self> {
        const MAGIC: u16 = 0xeb9f;
        if u16::from_ne_bytes(*file.first_chunk()?) != MAGIC {
            return None;
        }
        let word = |at| usize::try_from(u32_at(file, at)?).ok();
        let sections = file.get(word(4)?..)?;
        let types = sections.get(word(8)?..)?.get(..word(12)?)?;
        let strings = sections.get(word(16)?..)?.get(..word(20)?)?;
        let mut btf = Self { types, strings, offsets: Vec::new() };
        let mut at = 0;
        while at < types.len() {
            btf.offsets.push(u32::try_from(at).ok()?);
            at += HEADER_LEN + btf.header(at)?.rest_len()?;
        }
        Some(btf)
    }

    /// Offset in bits of a field of the first struct of that name, also within anonymous structs
    /// and unions.
    pub(crate) fn bit_offset(&self, name: &str, field: &str) -> Option<u32> {
        self.struct_named(name)?.bit_offset(field)
    }

    /// The first struct of that name, to ask for several of its fields.
    pub(crate) fn struct_named(&self, name: &str) -> Option<Struct<'_>> {
        Some(Struct { btf: self, at: self.find(STRUCT, name)? })
    }

    fn find(&self, kind: u8, name: &str) -> Option<usize> {
        self.offsets
            .iter()
            .map(|&at| at as usize)
            .find(|&at| self.header(at).is_some_and(|it| it.kind == kind && self.is(it.name, name)))
    }

    fn member_offset(&self, at: usize, field: &str, depth: usize) -> Option<u32> {
        /// Far deeper than any kernel nests them; a file that is no kernel's may nest without end.
        const MAX_DEPTH: usize = 16;
        let header = self.header(at)?;
        if !matches!(header.kind, STRUCT | UNION) || depth > MAX_DEPTH {
            return None;
        }
        (0..header.count).find_map(|index| {
            let member = at + HEADER_LEN + index * MEMBER_LEN;
            let name = u32_at(self.types, member)?;
            let id = u32_at(self.types, member + 4)?;
            let offset = u32_at(self.types, member + 8)?;
            let offset = if header.is_flagged { offset & 0x00ff_ffff } else { offset };
            if self.is(name, field) {
                return Some(offset);
            }
            if !self.is(name, "") {
                return None;
            }
            let inner = *self.offsets.get(usize::try_from(id).ok()?.checked_sub(1)?)?;
            offset.checked_add(self.member_offset(inner as usize, field, depth + 1)?)
        })
    }

    /// Value of an enumerator of the first enum of that name.
    pub(crate) fn enum_value(&self, name: &str, enumerator: &str) -> Option<u32> {
        const VALUE_LEN: usize = 8;
        let at = self.find(ENUM, name)?;
        (0..self.header(at)?.count).find_map(|index| {
            let value = at + HEADER_LEN + index * VALUE_LEN;
            let is_it = self.is(u32_at(self.types, value)?, enumerator);
            is_it.then(|| u32_at(self.types, value + 4))?
        })
    }

    fn header(&self, at: usize) -> Option<Header> {
        let info = u32_at(self.types, at + 4)?;
        Some(Header {
            name: u32_at(self.types, at)?,
            kind: (info >> 24 & 0x1f) as u8,
            count: (info & 0xffff) as usize,
            is_flagged: info >> 31 != 0,
        })
    }

    /// Whether the string at `offset` is `text`.
    fn is(&self, offset: u32, text: &str) -> bool {
        self.strings.get(offset as usize..).is_some_and(|string| {
            string.strip_prefix(text.as_bytes()).is_some_and(|rest| rest.first() == Some(&0))
        })
    }
}

/// A struct of a kernel.
#[derive(Clone, Copy)]
pub(crate) struct Struct<'a> {
    btf: &'a Btf<'a>,
    at: usize,
}

impl Struct<'_> {
    /// As [`Btf::bit_offset`].
    pub(crate) fn bit_offset(&self, field: &str) -> Option<u32> {
        self.btf.member_offset(self.at, field, 0)
    }
}

impl Header {
    /// Length in bytes of what follows the header; `None` for a kind from a later kernel.
    const fn rest_len(self) -> Option<usize> {
        Some(match self.kind {
            // Integers, variables, declaration tags.
            1 | 14 | 17 => 4,
            // Pointers, forward declarations, typedefs, volatile, const, restrict, functions,
            // floats, type tags.
            2 | 7..=12 | 16 | 18 => 0,
            // Arrays.
            3 => 12,
            // Structs, unions, data sections, 64-bit enums.
            STRUCT | UNION | 15 | 19 => self.count * 12,
            // Enums, function prototypes.
            ENUM | 13 => self.count * 8,
            _ => return None,
        })
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().copied().map(u32::from_ne_bytes)
}
