//! The question of a DNS query: what a lost datagram was about.

use std::fmt::Write as _;

/// Where name servers listen.
pub const PORT: u16 = 53;

/// Length of the header in bytes (RFC 1035 §4.1.1).
const HEADER_LEN: usize = 12;
/// Longest name in bytes, lengths of labels included (RFC 1035 §2.3.4).
const MAX_NAME_LEN: usize = 255;
/// Longest label in bytes; what says more is a pointer, which no question needs.
const MAX_LABEL_LEN: u8 = 63;

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Question {
    /// The name, in lower case and without its last dot; bytes that are no letter, digit, `-`, `_`
    /// or `*` as `\` and three decimal digits (RFC 1035 §5.1), so it can do no harm in a terminal.
    pub name: String,
    /// The type by its mnemonic, or `TYPE` and its number (RFC 3597 §5).
    pub kind: String,
}

impl Question {
    /// Reads the first question of a query; `None` for what is none, or is cut short before its
    /// end.
    pub fn read(message: &[u8]) -> Option<Self> {
        const IS_RESPONSE: u8 = 0x80;
        let header = message.get(..HEADER_LEN)?;
        let questions = u16::from_be_bytes([header[4], header[5]]);
        if header[2] & IS_RESPONSE != 0 || questions == 0 {
            return None;
        }
        let mut rest = message.get(HEADER_LEN..)?;
        let mut name = String::new();
        let mut name_len = 0;
        loop {
            let (&len, after) = rest.split_first()?;
            if len == 0 {
                rest = after;
                break;
            }
            name_len += 1 + usize::from(len);
            if len > MAX_LABEL_LEN || name_len >= MAX_NAME_LEN {
                return None;
            }
            let (label, after) = after.split_at_checked(len.into())?;
            if !name.is_empty() {
                name.push('.');
            }
            for &byte in label {
                escape(byte, &mut name);
            }
            rest = after;
        }
        if name.is_empty() {
            name.push('.');
        }
        let kind = u16::from_be_bytes(*rest.first_chunk()?);
        Some(Self { name, kind: mnemonic(kind) })
    }
}

fn escape(byte: u8, out: &mut String) {
    if byte.is_ascii_alphanumeric() || b"-_*".contains(&byte) {
        out.push(byte.to_ascii_lowercase().into());
    } else {
        // Writing to a string cannot fail.
        let _ = write!(out, "\\{byte:03}");
    }
}

/// Those that resolvers in a cluster ask for (IANA, "Resource Record (RR) TYPEs").
fn mnemonic(kind: u16) -> String {
    match kind {
        1 => "A",
        2 => "NS",
        5 => "CNAME",
        6 => "SOA",
        12 => "PTR",
        15 => "MX",
        16 => "TXT",
        28 => "AAAA",
        33 => "SRV",
        64 => "SVCB",
        65 => "HTTPS",
        255 => "ANY",
        other => return format!("TYPE{other}"),
    }
    .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(labels: &[&[u8]], kind: u16) -> Vec<u8> {
        let mut query = vec![0x1d, 0x2b, 0x01, 0x00, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in labels {
            query.push(label.len() as u8);
            query.extend(*label);
        }
        query.push(0);
        query.extend(kind.to_be_bytes());
        query.extend([0, 1]);
        query
    }

    fn read(labels: &[&[u8]], kind: u16) -> Option<(String, String)> {
        Question::read(&query(labels, kind)).map(|question| (question.name, question.kind))
    }

    fn question(name: &str, kind: &str) -> (String, String) {
        (name.to_owned(), kind.to_owned())
    }

    #[test]
    fn names_and_types_are_read() {
        let name: [&[u8]; 4] = [b"Example", b"svc", b"cluster", b"local"];
        assert_eq!(read(&name, 1), Some(question("example.svc.cluster.local", "A")));
        assert_eq!(read(&[b"_http", b"_tcp", b"a"], 33), Some(question("_http._tcp.a", "SRV")));
        assert_eq!(read(&[], 2), Some(question(".", "NS")));
        assert_eq!(read(&[b"a"], 4711), Some(question("a", "TYPE4711")));
    }

    #[test]
    fn nothing_in_a_name_reaches_a_terminal_as_it_is() {
        let name: [&[u8]; 2] = [b"a.b\\", b"\x1b[31m\xc3\xa4"];
        assert_eq!(read(&name, 28), Some(question(r"a\046b\092.\027\09131m\195\164", "AAAA")));
    }

    #[test]
    fn what_is_no_question_or_not_whole_is_none() {
        let whole = query(&[b"example", b"org"], 1);
        for len in 0..whole.len() - 2 {
            assert_eq!(Question::read(&whole[..len]), None, "{len}");
        }
        let mut response = whole.clone();
        response[2] |= 0x80;
        assert_eq!(Question::read(&response), None);
        let mut empty = whole.clone();
        empty[5] = 0;
        assert_eq!(Question::read(&empty), None);
        let mut pointer = whole;
        pointer[12] = 0xc0;
        assert_eq!(Question::read(&pointer), None);
        assert_eq!(read(&[[b'a'; 63].as_slice(); 4], 1), None, "longer than a name may be");
        assert!(read(&[[b'a'; 63].as_slice(); 3], 1).is_some());
    }
}
