//! The configuration file of the daemon: the long options of `vxcsum run`, in TOML.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use thiserror::Error;

use crate::cli::{AttachArg, FixArg, LogFormat, PolicyArg, TransportArg};
use crate::receive;

/// Read where no other file is named; need not be there.
pub const DEFAULT_CONFIG: &str = "/etc/vxcsum/vxcsum.toml";

/// What a file may say. What it does not say is left to options and defaults.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, rename_all = "kebab-case", deny_unknown_fields)]
#[expect(missing_docs, reason = "each is the option of the same name")]
pub struct Config {
    pub interface: Option<Vec<String>>,
    pub port: Option<Vec<u16>>,
    pub policy: Option<PolicyArg>,
    pub fix: Option<FixArg>,
    pub fix_unproven: Option<bool>,
    pub events_per_second: Option<u32>,
    pub attach: Option<AttachArg>,
    pub receive: Option<receive::Mode>,
    pub transport: Option<TransportArg>,
    pub btf: Option<PathBuf>,
    pub ring_kib: Option<u32>,
    pub socket: Option<PathBuf>,
    pub socket_group: Option<String>,
    pub metrics: Option<SocketAddr>,
    pub json: Option<bool>,
    pub quiet: Option<bool>,
    pub log_format: Option<LogFormat>,
}

/// Every key, for suggestions.
const KEYS: [&str; 17] = [
    "interface",
    "port",
    "policy",
    "fix",
    "fix-unproven",
    "events-per-second",
    "attach",
    "receive",
    "transport",
    "btf",
    "ring-kib",
    "socket",
    "socket-group",
    "metrics",
    "json",
    "quiet",
    "log-format",
];

/// A file that cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// It cannot be read.
    #[error("cannot read {path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It says something that is not understood.
    #[error("{path}, line {line}: {reason}")]
    Content {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What, and what to write instead.
        reason: String,
    },
}

impl Config {
    /// Reads the file that is named, or else the default one if there is one. Returns which.
    pub fn read(named: Option<&Path>) -> Result<(Self, Option<PathBuf>), ConfigError> {
        let path = named.unwrap_or(Path::new(DEFAULT_CONFIG));
        match fs::read_to_string(path) {
            Ok(text) => Ok((Self::parse(path, &text)?, Some(path.to_owned()))),
            Err(error) if named.is_none() && error.kind() == io::ErrorKind::NotFound => {
                Ok((Self::default(), None))
            }
            Err(source) => Err(ConfigError::File { path: path.to_owned(), source }),
        }
    }

    /// Reads what is in a file of that name.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        toml::from_str(text).map_err(|error| {
            let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
            ConfigError::Content {
                path: path.to_owned(),
                line: before.matches('\n').count() + 1,
                reason: explain(error.message()),
            }
        })
    }
}

/// Adds what was probably meant to a complaint about an unknown key.
fn explain(message: &str) -> String {
    /// Less alike, and a suggestion only confuses.
    const ALIKE: f64 = 0.7;
    let Some(unknown) =
        message.strip_prefix("unknown field `").and_then(|rest| rest.split('`').next())
    else {
        return message.trim().replace('\n', ", ");
    };
    let likeness = |key: &&str| strsim::jaro_winkler(key, unknown);
    let nearest = KEYS.into_iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
    match nearest.filter(|key| likeness(key) > ALIKE) {
        Some(key) => format!("there is no key {unknown:?}, did you mean {key:?}?"),
        None => format!("there is no key {unknown:?}; the keys are {}", KEYS.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(Path::new("vxcsum.toml"), text).map_err(|error| error.to_string())
    }

    #[test]
    fn every_key_is_understood() {
        let config = parse(
            r#"
            interface = ["eth0", "bond0"]
            port = [8472]
            policy = "sum"
            fix = "restore"
            fix-unproven = false
            events-per-second = 10
            attach = "clsact"
            receive = "off"
            transport = "perf"
            btf = "/boot/btf"
            ring-kib = 256
            socket = "/run/x.sock"
            socket-group = "adm"
            metrics = "127.0.0.1:9100"
            json = true
            quiet = true
            log-format = "json"
            "#,
        )
        .unwrap();
        assert_eq!(config.interface.unwrap().len(), 2);
        assert_eq!(config.events_per_second, Some(10));
        for key in KEYS {
            assert!(!parse(&format!("{key} = []")).is_err_and(|it| it.contains("no key")), "{key}");
        }
    }

    #[test]
    fn errors_name_line_and_way_out() {
        assert_eq!(
            parse("\nintreface = []\n").unwrap_err(),
            "vxcsum.toml, line 2: there is no key \"intreface\", did you mean \"interface\"?"
        );
        let error = parse("colour = 1").unwrap_err();
        assert!(error.contains("the keys are interface, port"), "{error}");
        let error = parse("port = [8472]\nfix = \"never\"").unwrap_err();
        assert!(error.starts_with("vxcsum.toml, line 2: ") && error.contains("restore"), "{error}");
        let error = parse("port = [70000]").unwrap_err();
        assert!(error.starts_with("vxcsum.toml, line 1: "), "{error}");
        assert!(parse("port = [").unwrap_err().starts_with("vxcsum.toml, line 1: "));
    }

    #[test]
    fn a_named_file_must_be_there() {
        let error = Config::read(Some(Path::new("/nonexistent/vxcsum.toml"))).unwrap_err();
        assert!(error.to_string().contains("/nonexistent/vxcsum.toml"), "{error}");
    }
}
