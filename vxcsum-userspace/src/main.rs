//! The `vxcsum` command.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Parser as _;
use tokio::runtime::Runtime;
use vxcsum::attach::chain;
use vxcsum::cli::{Cli, Command};
use vxcsum::{check, client, doctor, logging, run, stdio};

/// Wrong usage, or it cannot run.
const CANNOT_RUN: u8 = 2;

fn main() -> ExitCode {
    match execute(Cli::parse()) {
        Ok(code) => code,
        Err(error) => {
            stdio::say(chain(error.as_ref()));
            ExitCode::from(CANNOT_RUN)
        }
    }
}

fn execute(cli: Cli) -> Result<ExitCode> {
    match cli.command {
        Command::Run(args) => {
            let (options, path) = args.options()?;
            if args.check_config {
                match path {
                    Some(path) => stdio::print(format_args!("{}: all well", path.display()))?,
                    None => stdio::print("there is no configuration file: all well")?,
                }
                return Ok(ExitCode::SUCCESS);
            }
            logging::start(options.log_format);
            event_loop()?
                .block_on(run::run(options, || args.options().map(|(options, _)| options)))?;
        }
        Command::Tail(args) => {
            client::tail(&args.socket.socket, args.filter(), args.limit, args.json)?;
        }
        Command::Status(args) => client::status(&args.socket.socket, args.json)?,
        Command::Fix(args) => client::fix(&args.socket.socket, args.mode())?,
        Command::Check(args) => return check::run(&args),
        Command::Doctor(args) => {
            let watch = Duration::from_secs(args.seconds.into());
            let report = event_loop()?.block_on(doctor::diagnose(watch));
            report.print(args.json).context("cannot write to standard output")?;
            return Ok(ExitCode::from(report.verdict.exit_code()));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn event_loop() -> Result<Runtime> {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    builder.enable_all().build().context("cannot start the event loop")
}
