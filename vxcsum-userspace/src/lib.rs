//! x
pub mod program;
#[cfg(test)]
mod tests {
    #[test]
    fn loads() {
        match crate::program::Program::load(&crate::program::LoadOptions::default()) {
            Ok(_) => {}
            Err(e) => { let s = format!("{e}"); let n = s.len(); println!("{}", &s[n.saturating_sub(6000)..]); panic!("no") }
        }
    }
}
