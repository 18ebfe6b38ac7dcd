//! The configuration file.

use std::path::Path;

use vxcsum::config::Config;

use crate::assert_one_line;

/// Checks a file.
pub fn check(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match Config::parse(Path::new("vxcsum.toml"), text) {
        Ok(_) => assert!(toml::from_str::<toml::Table>(text).is_ok(), "it is no TOML"),
        Err(error) => {
            let message = error.to_string();
            assert_one_line(&message);
            let line = message.strip_prefix("vxcsum.toml, line ").expect("the place");
            let (line, reason) = line.split_once(": ").expect("the reason");
            let line: usize = line.parse().expect("a number");
            assert!((1..=text.matches('\n').count() + 1).contains(&line), "{message}");
            assert!(!reason.is_empty());
        }
    }
}
