//! Running other programs, so that a failure names the program and what it was told to do.

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::LazyLock,
};

use anyhow::{Context, Result, bail};

/// What tools are looked up in, for us and for everything we start.
///
/// cargo's own folder comes first, since a bpf-linker that set-up has just installed must be found
/// even by somebody whose shell does not know that folder; the system ones come last, since a
/// plain user's PATH on Debian lacks them.
pub(crate) static SEARCH_PATH: LazyLock<OsString> = LazyLock::new(|| {
    let inherited = env::var_os("PATH").unwrap_or_default();
    let folders = cargo_home()
        .map(|home| home.join("bin"))
        .into_iter()
        .chain(env::split_paths(&inherited))
        .chain([PathBuf::from("/usr/sbin"), PathBuf::from("/sbin")]);
    // Joining fails only on a folder with a colon in its name, and only cargo's can be new here.
    env::join_paths(folders).unwrap_or(inherited)
});

/// Where cargo keeps what it installs.
pub(crate) fn cargo_home() -> Option<PathBuf> {
    env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::home_dir().map(|home| home.join(".cargo")))
}

/// The root folder of the checkout.
pub(crate) fn workspace() -> &'static Path {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask)
}

/// A command that runs in the root folder of the checkout and finds the tools that set-up installs.
pub(crate) fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    command.current_dir(workspace()).env("PATH", &*SEARCH_PATH);
    command
}

/// The program's path, if it is installed.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    which::which_in(program, Some(&*SEARCH_PATH), workspace()).ok()
}

/// The command as one would type it.
pub(crate) fn shown(command: &Command) -> String {
    let arguments = command.get_args().map(|argument| argument.to_string_lossy());
    let words: Vec<_> =
        std::iter::once(command.get_program().to_string_lossy()).chain(arguments).collect();
    words.join(" ")
}

/// Runs it with our own input and output; false where it says that it failed.
pub(crate) fn succeeds(command: &mut Command) -> Result<bool> {
    let status = command.status().with_context(|| format!("cannot run `{}`", shown(command)))?;
    Ok(status.success())
}

/// Runs it with our own input and output, and insists on success.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    if !succeeds(command)? {
        bail!("`{}` failed, see its messages above", shown(command));
    }
    Ok(())
}

/// Runs it in silence, without input.
pub(crate) fn capture(command: &mut Command) -> Result<Output> {
    command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run `{}`", shown(command)))
}

/// What it prints, if it can be run and succeeds.
pub(crate) fn answer(command: &mut Command) -> Option<String> {
    let output = capture(command).ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_names_the_command() {
        let error = run(command("false").arg("--now")).unwrap_err();
        assert_eq!(error.to_string(), "`false --now` failed, see its messages above");
        let error = run(&mut command("vxcsum-no-such-program")).unwrap_err();
        assert_eq!(error.to_string(), "cannot run `vxcsum-no-such-program`");
    }

    #[test]
    fn only_a_success_is_an_answer() {
        assert_eq!(answer(command("echo").arg("yes")).as_deref(), Some("yes"));
        assert_eq!(answer(&mut command("false")), None);
        assert_eq!(answer(&mut command("vxcsum-no-such-program")), None);
    }
}
