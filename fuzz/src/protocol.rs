//! The socket of the daemon: whatever a client says.

use serde_json::{Value, json};
use vxcsum::protocol::{Command, MAX_LINE_LEN};
use vxcsum::server::fuzzing::answer;

/// Checks what a client says, after a byte that says whether it is root.
pub fn check(data: &[u8]) {
    let Some((&who, said)) = data.split_first() else { return };
    let is_root = who & 1 == 1;
    let answer = answer(said, is_root).expect("sockets of this process work");
    let answer = String::from_utf8(answer).expect("UTF-8");
    let lines: Vec<Value> =
        answer.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert!(answer.is_empty() || answer.ends_with('\n'));
    // To the codec, this is the end of a line that is not there.
    if said.is_empty() || said == b"\r" {
        assert!(lines.is_empty());
        return;
    }
    match command(said) {
        Some(Command::Tail(_)) => assert!(lines.is_empty(), "there is nothing to tell"),
        Some(Command::Status {}) => assert_eq!(lines, [json!({"error": "nothing is known"})]),
        Some(Command::Fix { mode }) if is_root => {
            assert_eq!(lines, [json!({"fix": mode.as_str()})]);
        }
        Some(Command::Fix { .. }) | None => {
            assert_eq!(lines.len(), 1);
            assert!(lines[0]["error"].is_string(), "{lines:?}");
        }
    }
}

/// The command in the first line, if there is one.
fn command(said: &[u8]) -> Option<Command> {
    let line = said.split(|&byte| byte == b'\n').next()?;
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let command: Command = serde_json::from_slice(line).ok()?;
    // What is longer is refused; whether the end of the line counts is not of interest.
    if line.len() + 2 > MAX_LINE_LEN {
        return None;
    }
    let text = serde_json::to_string(&command).expect("JSON");
    let again: Command = serde_json::from_str(&text).expect("a command");
    assert_eq!(serde_json::to_string(&again).expect("JSON"), text);
    Some(command)
}
