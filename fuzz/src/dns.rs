//! The question of a DNS query.

use vxcsum::dns::Question;

/// Checks a message.
pub fn check(data: &[u8]) {
    let Some(question) = Question::read(data) else { return };
    let is_harmless =
        |char: char| char.is_ascii_lowercase() || char.is_ascii_digit() || "-_*.\\".contains(char);
    assert!(question.name.chars().all(is_harmless), "{question:?}");
    assert!(!question.kind.is_empty());
    // What is left of the message does not matter, and the name says all of it but the case.
    let mut query = data[..12].to_vec();
    if question.name != "." {
        for label in question.name.split('.') {
            let label = unescaped(label);
            assert!((1..64).contains(&label.len()));
            query.push(label.len() as u8);
            query.extend(label);
        }
    }
    query.push(0);
    let end = query.len();
    query.extend(&data[end..end + 2]);
    assert_eq!(Question::read(&query), Some(question));
    assert_eq!(Question::read(&query[..=end]), None);
}

fn unescaped(label: &str) -> Vec<u8> {
    let mut parts = label.split('\\');
    let mut bytes = parts.next().unwrap_or_default().as_bytes().to_vec();
    for part in parts {
        bytes.push(part[..3].parse().expect("three digits"));
        bytes.extend(&part.as_bytes()[3..]);
    }
    bytes
}
