//! Finds out what is missing, says so, and installs it.
//!
//! The decisions are a function from facts about the machine to steps. After each step the facts
//! are gathered again: a step may fail where another way is left, and may bring more than asked.

use std::fmt::{self, Display, Formatter};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::{
    packages::{self, Package, PackageManager, Tool},
    process,
    toolchain::{self, Compiler, Linker, Llvm},
};

/// The cargo-deny that is installed where there is none; any that is there will do.
const CARGO_DENY: &str = "cargo-deny@0.20.2";
/// The same of cargo-fuzz.
const CARGO_FUZZ: &str = "cargo-fuzz@0.13.2";
/// The LLVM that Debian packages next to its `rustc-web`.
const DEBIAN_LLVM: u32 = 22;

/// What one can get ready for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Goal {
    /// Compiling vxcsum and the BPF program inside it
    Build,
    /// The lab in which the demo runs
    Demo,
    /// Labs and independent judges for the tests
    Test,
    /// Virtual machines with other kernels
    Vm,
    /// Labs and peers for the benches
    Bench,
    /// Linters
    Lint,
    /// Fuzz targets
    Fuzz,
}

/// What rustup was asked for and has not got.
#[derive(Clone, Copy, Debug, Default)]
struct Refused {
    /// The sources of the standard library.
    sources: bool,
    /// Miri, which has not been built for every nightly.
    miri: bool,
}

/// What is known of the machine.
#[derive(Clone, Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
struct Facts {
    manager: Option<PackageManager>,
    rustup: bool,
    nightly: Option<Compiler>,
    linked: Option<Compiler>,
    distribution_is_fit: bool,
    refused: Refused,
    llvm: Vec<Llvm>,
    linker: Option<Linker>,
    missing_tools: Vec<&'static Tool>,
    cargo_deny: bool,
    cargo_fuzz: bool,
}

impl Facts {
    fn gather(goals: &[Goal], refused: Refused) -> Self {
        Self {
            manager: PackageManager::detect(),
            rustup: process::find("rustup").is_some(),
            nightly: Compiler::of_toolchain(toolchain::NIGHTLY),
            linked: Compiler::of_toolchain(toolchain::LINKED),
            distribution_is_fit: toolchain::distribution_is_fit(),
            refused,
            llvm: toolchain::installed_llvm(),
            linker: Linker::installed(),
            missing_tools: packages::missing_tools(goals),
            cargo_deny: process::find("cargo-deny").is_some(),
            cargo_fuzz: process::find("cargo-fuzz").is_some(),
        }
    }

    /// The LLVM for a linker that reads what this compiler writes: no older than the compiler's,
    /// and as close to it as there is.
    fn llvm_for(&self, compiler_llvm: u32) -> Option<&Llvm> {
        self.llvm.iter().filter(|llvm| llvm.major >= compiler_llvm).min_by_key(|llvm| llvm.major)
    }

    fn has_linker_for(&self, compiler_llvm: u32) -> bool {
        self.linker.as_ref().is_some_and(|linker| linker.reads(compiler_llvm))
    }

    /// Whether a linker for this compiler is there or can be had.
    fn linker_can_be_had(&self, compiler_llvm: u32) -> bool {
        self.has_linker_for(compiler_llvm)
            || self.llvm_for(compiler_llvm).is_some()
            || match self.manager {
                Some(PackageManager::Apt) => compiler_llvm <= DEBIAN_LLVM,
                // Fedora follows LLVM's releases as nightly does; only trying can tell.
                Some(PackageManager::Dnf) => {
                    !self.llvm.iter().any(|llvm| llvm.major < compiler_llvm)
                }
                None => false,
            }
    }
}

/// One thing to install.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    AddLibrarySources,
    InstallPackages(PackageManager, Vec<Package>),
    LinkDistribution,
    AddClippy,
    AddMiri,
    InstallBpfLinker(Option<Llvm>),
    InstallCargoDeny,
    InstallCargoFuzz,
}

impl Display for Step {
    fn fmt(&self, formatter: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::AddLibrarySources => write!(
                formatter,
                "installing rust-src for {} through rustup: compiles the BPF program",
                toolchain::NIGHTLY
            ),
            Self::InstallPackages(_, packages) => {
                write!(formatter, "installing packages of the distribution:")?;
                packages.iter().try_for_each(|package| write!(formatter, "\n  {package}"))
            }
            Self::LinkDistribution => write!(
                formatter,
                "naming the distribution's compiler {} in rustup: compiles the BPF program",
                toolchain::LINKED
            ),
            Self::AddClippy => write!(
                formatter,
                "installing clippy for {} through rustup: lints the BPF program",
                toolchain::NIGHTLY
            ),
            Self::AddMiri => write!(
                formatter,
                "installing Miri for {} through rustup: looks for undefined behaviour",
                toolchain::NIGHTLY
            ),
            Self::InstallBpfLinker(_) => write!(
                formatter,
                "installing bpf-linker {} through cargo, which takes about a minute: \
                 links the BPF program",
                toolchain::BPF_LINKER
            ),
            Self::InstallCargoDeny => write!(
                formatter,
                "installing {CARGO_DENY} through cargo, which takes some minutes: checks licences \
                 and sources of dependencies"
            ),
            Self::InstallCargoFuzz => write!(
                formatter,
                "installing {CARGO_FUZZ} through cargo, which takes a minute: builds fuzz targets \
                 with coverage and sanitizers, and runs them"
            ),
        }
    }
}

/// The compiler of the BPF program, had or to be had.
#[derive(Debug, PartialEq, Eq)]
enum Choice<'a> {
    Nightly(&'a Compiler),
    NightlyWithSources(&'a Compiler),
    Linked(&'a Compiler),
    Distribution,
}

fn choose(facts: &Facts) -> Result<Choice<'_>> {
    if !facts.rustup {
        bail!(
            "rustup is missing, which the build uses to reach the compiler of the BPF program: \
               install it from https://rustup.rs"
        );
    }
    // The build script takes nightly whenever that has the sources, so nothing else may come first.
    if let Some(nightly) = facts.nightly.as_ref().filter(|nightly| nightly.library_sources) {
        return Ok(Choice::Nightly(nightly));
    }
    if let Some(linked) = facts.linked.as_ref().filter(|linked| linked.library_sources) {
        return Ok(Choice::Linked(linked));
    }
    if let Some(nightly) = &facts.nightly
        && !facts.refused.sources
        && facts.linker_can_be_had(nightly.llvm)
    {
        return Ok(Choice::NightlyWithSources(nightly));
    }
    if facts.distribution_is_fit || facts.manager == Some(PackageManager::Apt) {
        return Ok(Choice::Distribution);
    }
    bail!(
        "no compiler for the BPF program: it takes a nightly with the sources of the standard \
         library, and this distribution's packages are not known here: run `rustup toolchain \
         install nightly --component rust-src` where rustup's network can be reached, and install \
         the LLVM of that nightly with its development files"
    )
}

/// What to do, in this order, if each step does what it should.
fn plan(facts: &Facts, goals: &[Goal]) -> Result<Vec<Step>> {
    let choice = choose(facts)?;
    let mut steps = Vec::new();
    if let Choice::NightlyWithSources(_) = choice {
        steps.push(Step::AddLibrarySources);
    }
    let packages = packages_for(facts, goals, &choice)?;
    if let Some(manager) = facts.manager
        && !packages.is_empty()
    {
        steps.push(Step::InstallPackages(manager, packages));
    }
    if choice == Choice::Distribution {
        steps.push(Step::LinkDistribution);
    }
    if let Choice::Nightly(nightly) | Choice::NightlyWithSources(nightly) = choice
        && goals.contains(&Goal::Lint)
        && !nightly.clippy
    {
        steps.push(Step::AddClippy);
    }
    // It takes the sources of the standard library as well.
    if let Choice::Nightly(nightly) | Choice::NightlyWithSources(nightly) = choice
        && goals.contains(&Goal::Lint)
        && !nightly.miri
        && !facts.refused.miri
    {
        steps.push(Step::AddMiri);
    }
    let compiler_llvm = llvm_of(&choice);
    if !facts.has_linker_for(compiler_llvm) {
        steps.push(Step::InstallBpfLinker(facts.llvm_for(compiler_llvm).cloned()));
    }
    if goals.contains(&Goal::Lint) && !facts.cargo_deny {
        steps.push(Step::InstallCargoDeny);
    }
    if goals.contains(&Goal::Fuzz) && !facts.cargo_fuzz {
        steps.push(Step::InstallCargoFuzz);
    }
    Ok(steps)
}

fn llvm_of(choice: &Choice) -> u32 {
    match choice {
        Choice::Nightly(compiler)
        | Choice::NightlyWithSources(compiler)
        | Choice::Linked(compiler) => compiler.llvm,
        Choice::Distribution => DEBIAN_LLVM,
    }
}

fn packages_for(facts: &Facts, goals: &[Goal], choice: &Choice) -> Result<Vec<Package>> {
    let mut packages = Vec::new();
    let mut need = |name: &str, why| {
        // iproute2 holds more than one of the tools.
        if !packages.iter().any(|package: &Package| package.name == name) {
            packages.push(Package { name: name.to_owned(), why });
        }
    };
    if *choice == Choice::Distribution && !facts.distribution_is_fit {
        need("rustc-web", "compiles the BPF program");
        need("rust-web-src", "holds the sources of the standard library, which BPF needs");
    }
    let compiler_is_debians = matches!(choice, Choice::Distribution)
        || matches!(choice, Choice::Linked(linked) if !linked.clippy);
    if goals.contains(&Goal::Lint)
        && compiler_is_debians
        && facts.manager == Some(PackageManager::Apt)
    {
        need("rust-web-clippy", "lints the BPF program");
    }
    let wanted = llvm_of(choice);
    if !facts.has_linker_for(wanted) && facts.llvm_for(wanted).is_none() {
        match facts.manager {
            Some(manager) if facts.linker_can_be_had(wanted) => {
                let name = match manager {
                    PackageManager::Apt => format!("llvm-{DEBIAN_LLVM}-dev"),
                    PackageManager::Dnf => "llvm-devel".to_owned(),
                };
                need(&name, "the library that bpf-linker is made of");
            }
            _ => bail!(
                "bpf-linker {} for LLVM {wanted} is missing, and so is an LLVM {wanted} to build \
                 it with: install that LLVM with its development files, so that \
                 `llvm-config-{wanted}` or `llvm-config` is found{}",
                toolchain::BPF_LINKER,
                another_way(facts, choice)
            ),
        }
    }
    match facts.manager {
        Some(manager) => {
            for tool in &facts.missing_tools {
                let package = manager.package(tool);
                need(&package.name, package.why);
            }
        }
        None if !facts.missing_tools.is_empty() => bail!(
            "neither apt-get nor dnf is here to install {}: install them by hand",
            packages::names(&facts.missing_tools)
        ),
        None => {}
    }
    Ok(packages)
}

/// A nightly that is ahead of the distribution need not be used where that has a compiler itself.
fn another_way(facts: &Facts, choice: &Choice) -> String {
    if matches!(choice, Choice::Nightly(_)) && facts.manager == Some(PackageManager::Apt) {
        let nightly = toolchain::NIGHTLY;
        format!(
            ", or do without this nightly: `rustup component remove rust-src --toolchain {nightly}`"
        )
    } else {
        String::new()
    }
}

/// Says what [`run`] would do.
pub(crate) fn show_plan(goals: &[Goal]) -> Result<bool> {
    let steps = plan(&Facts::gather(goals, Refused::default()), goals)?;
    if steps.is_empty() {
        println!("nothing is missing");
    }
    for step in &steps {
        println!("to do: {step}");
    }
    if steps.contains(&Step::AddLibrarySources) {
        println!("where rustup cannot: the distribution's compiler instead");
    }
    Ok(true)
}

/// Installs what these goals need and is missing. Says nothing if that is nothing.
pub(crate) fn run(goals: &[Goal]) -> Result<()> {
    let mut refused = Refused::default();
    let mut previous = None;
    loop {
        let steps = plan(&Facts::gather(goals, refused), goals)?;
        let Some(step) = steps.into_iter().next() else {
            return Ok(());
        };
        if previous.as_ref() == Some(&step) {
            bail!("this is done, and yet its outcome is not found or too old: {step}");
        }
        eprintln!("setup: {step}");
        match perform(&step) {
            // The two things that may fail, since there is another way, or less is checked.
            Err(reason) if step == Step::AddLibrarySources => {
                eprintln!("setup: rustup cannot ({reason:#}); trying the distribution's compiler");
                refused.sources = true;
            }
            Err(reason) if step == Step::AddMiri => {
                eprintln!("setup: rustup cannot ({reason:#}); going on without it");
                refused.miri = true;
            }
            outcome => outcome?,
        }
        previous = Some(step);
    }
}

fn perform(step: &Step) -> Result<()> {
    match step {
        Step::AddLibrarySources => toolchain::add_library_sources(),
        Step::InstallPackages(manager, packages) => packages::install(*manager, packages),
        Step::LinkDistribution => toolchain::link_distribution(),
        Step::AddClippy => toolchain::add_clippy(),
        Step::AddMiri => toolchain::add_miri(),
        Step::InstallBpfLinker(llvm) => {
            let llvm = llvm.as_ref().context("there is no LLVM to build bpf-linker with")?;
            toolchain::install_bpf_linker(llvm)
        }
        Step::InstallCargoDeny => {
            process::run(process::command("cargo").args(["install", "--locked", CARGO_DENY]))
        }
        Step::InstallCargoFuzz => {
            process::run(process::command("cargo").args(["install", "--locked", CARGO_FUZZ]))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const BUILD: &[Goal] = &[Goal::Build];
    const LINT: &[Goal] = &[Goal::Lint];
    const NO_SOURCES: Refused = Refused { sources: true, miri: false };

    fn compiler(library_sources: bool, llvm: u32) -> Compiler {
        Compiler { library_sources, llvm, clippy: true, miri: true }
    }

    fn llvm(major: u32) -> Llvm {
        Llvm { major, prefix: format!("/usr/lib/llvm-{major}").into() }
    }

    /// Debian with nothing but rustup's stable and nightly.
    fn fresh() -> Facts {
        Facts {
            manager: Some(PackageManager::Apt),
            rustup: true,
            nightly: Some(compiler(false, 22)),
            ..Facts::default()
        }
    }

    /// Debian once the distribution's compiler has been set up.
    fn distribution_ready() -> Facts {
        Facts {
            linked: Some(Compiler { clippy: false, ..compiler(true, 22) }),
            distribution_is_fit: true,
            llvm: vec![llvm(22)],
            linker: Some(Linker { llvm: Some(22) }),
            ..fresh()
        }
    }

    /// A machine once nightly has been set up.
    fn nightly_ready() -> Facts {
        Facts {
            nightly: Some(compiler(true, 22)),
            llvm: vec![llvm(22)],
            linker: Some(Linker { llvm: Some(22) }),
            ..fresh()
        }
    }

    fn package_names(steps: &[Step]) -> Vec<&str> {
        steps
            .iter()
            .filter_map(|step| match step {
                Step::InstallPackages(_, packages) => Some(packages),
                _ => None,
            })
            .flatten()
            .map(|package| package.name.as_str())
            .collect()
    }

    #[test]
    fn rustup_is_asked_first() {
        let steps = plan(&fresh(), BUILD).unwrap();
        assert_eq!(steps[0], Step::AddLibrarySources);
        assert_eq!(package_names(&steps), ["llvm-22-dev"]);
        assert_eq!(steps[2..], [Step::InstallBpfLinker(None)]);
    }

    #[test]
    fn the_distribution_steps_in_where_rustup_refuses() {
        let steps = plan(&Facts { refused: NO_SOURCES, ..fresh() }, BUILD).unwrap();
        assert_eq!(package_names(&steps), ["rustc-web", "rust-web-src", "llvm-22-dev"]);
        assert_eq!(steps[1..], [Step::LinkDistribution, Step::InstallBpfLinker(None)]);
    }

    #[test]
    fn without_nightly_the_distribution_is_asked_at_once() {
        let steps = plan(&Facts { nightly: None, ..fresh() }, BUILD).unwrap();
        assert_eq!(package_names(&steps), ["rustc-web", "rust-web-src", "llvm-22-dev"]);
    }

    #[test]
    fn nothing_is_done_twice() {
        assert_eq!(plan(&distribution_ready(), BUILD).unwrap(), []);
        assert_eq!(plan(&nightly_ready(), BUILD).unwrap(), []);
    }

    #[test]
    fn installed_packages_are_only_linked() {
        let facts = Facts { linked: None, refused: NO_SOURCES, ..distribution_ready() };
        assert_eq!(plan(&facts, BUILD).unwrap(), [Step::LinkDistribution]);
    }

    #[test]
    fn the_linker_alone_is_built_from_the_installed_llvm() {
        let facts = Facts { linker: None, llvm: vec![llvm(23), llvm(22)], ..distribution_ready() };
        assert_eq!(plan(&facts, BUILD).unwrap(), [Step::InstallBpfLinker(Some(llvm(22)))]);
    }

    #[test]
    fn a_nightly_ahead_of_debians_llvm_is_left_alone() {
        let facts = Facts { nightly: Some(compiler(false, 23)), ..fresh() };
        let steps = plan(&facts, BUILD).unwrap();
        assert_eq!(package_names(&steps), ["rustc-web", "rust-web-src", "llvm-22-dev"]);
    }

    #[test]
    fn a_nightly_that_outgrew_the_linker_gets_another_or_says_what_to_do() {
        let outgrown = Facts { nightly: Some(compiler(true, 23)), ..nightly_ready() };
        let message = plan(&outgrown, BUILD).unwrap_err().to_string();
        assert!(message.contains("LLVM 23"), "{message}");
        assert!(message.contains("rustup component remove rust-src"), "{message}");

        let facts = Facts { llvm: vec![llvm(22), llvm(23)], ..outgrown };
        assert_eq!(plan(&facts, BUILD).unwrap(), [Step::InstallBpfLinker(Some(llvm(23)))]);
    }

    #[test]
    fn linting_needs_clippy_of_the_compiler_in_use_and_cargo_deny() {
        let steps = plan(&distribution_ready(), LINT).unwrap();
        assert_eq!(package_names(&steps), ["rust-web-clippy"]);
        assert_eq!(steps[1..], [Step::InstallCargoDeny]);

        let bare = Compiler { clippy: false, miri: false, ..compiler(true, 22) };
        let facts = Facts { nightly: Some(bare), cargo_deny: true, ..nightly_ready() };
        assert_eq!(plan(&facts, LINT).unwrap(), [Step::AddClippy, Step::AddMiri]);
        let refused = Refused { miri: true, ..Refused::default() };
        assert_eq!(plan(&Facts { refused, ..facts }, LINT).unwrap(), [Step::AddClippy]);
    }

    #[test]
    fn fuzzing_needs_cargo_fuzz() {
        let steps = plan(&nightly_ready(), &[Goal::Fuzz]).unwrap();
        assert_eq!(steps, [Step::InstallCargoFuzz]);
        let facts = Facts { cargo_fuzz: true, ..nightly_ready() };
        assert_eq!(plan(&facts, &[Goal::Fuzz]).unwrap(), []);
    }

    #[test]
    fn missing_tools_become_packages_once_each() {
        let missing_tools = packages::TOOLS.iter().collect();
        let steps = plan(&Facts { missing_tools, ..distribution_ready() }, BUILD).unwrap();
        let names = package_names(&steps);
        let wanted: BTreeSet<_> = packages::TOOLS.iter().map(|tool| tool.debian).collect();
        assert!(wanted.len() < packages::TOOLS.len(), "no package has two of the tools");
        assert_eq!(names.len(), wanted.len(), "{names:?}");
        assert_eq!(names.into_iter().collect::<BTreeSet<_>>(), wanted);
    }

    #[test]
    fn fedora_gets_its_own_names() {
        let facts = Facts { manager: Some(PackageManager::Dnf), ..fresh() };
        let steps = plan(&facts, BUILD).unwrap();
        assert_eq!(steps[0], Step::AddLibrarySources);
        assert_eq!(package_names(&steps), ["llvm-devel"]);
        let message = plan(&Facts { refused: NO_SOURCES, ..facts }, BUILD).unwrap_err();
        assert!(message.to_string().contains("rustup toolchain install"), "{message}");
    }

    #[test]
    fn an_unknown_package_manager_gets_the_names_to_install() {
        let facts = Facts {
            manager: None,
            missing_tools: packages::TOOLS.iter().take(2).collect(),
            ..nightly_ready()
        };
        let message = plan(&facts, BUILD).unwrap_err().to_string();
        assert!(message.contains("ip, tc"), "{message}");
    }

    #[test]
    fn no_rustup_is_said_before_anything_is_installed() {
        let message = plan(&Facts { rustup: false, ..fresh() }, BUILD).unwrap_err().to_string();
        assert!(message.contains("rustup is missing"), "{message}");
    }
}
