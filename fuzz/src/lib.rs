//! What must hold whatever comes from outside: one module for each way in, and one fuzz target for
//! each module. A check that fails panics; `cargo xtask fuzz` tells of it.

pub mod capture;
pub mod client;
pub mod config;
pub mod dns;
pub mod event;
pub mod protocol;
pub mod rules;
pub mod verdict;

/// Checks that nothing in a text can move a terminal's cursor or end a line early.
fn assert_one_line(text: &str) {
    assert!(!text.chars().any(char::is_control), "{text:?}");
}
