//! The config file: TOML that holds what the flags say, under the same names.
//! Invariant: a key that is not known, or a value of the wrong type, is refused with the key's and the file's name.
//! Relative paths in it count from the file's directory.

use super::exit::{ExitCode, Failure};
use super::options::MountOptions;
use crate::store::open::CREDENTIALS;
use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use toml::Value;

/// What a config file said.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// `store`
    pub store: Option<String>,
    /// `store-option`
    pub store_options: BTreeMap<String, String>,
    /// `key`
    pub key: Option<PathBuf>,
    /// `keys`
    pub keys: Option<PathBuf>,
    /// `name`
    pub name: Option<String>,
    /// `passphrase-file`
    pub passphrase_file: Option<PathBuf>,
    /// `state`
    pub state: Option<PathBuf>,
    /// `mountpoint`
    pub mountpoint: Option<PathBuf>,
    /// `at`
    pub at: Option<String>,
    /// `read-only`
    pub read_only: Option<bool>,
    /// `foreground`
    pub foreground: Option<bool>,
    /// `log-file`
    pub log_file: Option<PathBuf>,
    /// `log-level`
    pub log_level: Option<String>,
    /// `options`, one word each, in the order of the file.
    pub options: Vec<String>,
}

const KEYS: &str = "store, store-option, key, keys, name, passphrase-file, state, mountpoint, at, read-only, \
                    foreground, log-file, log-level, options";

/// A message about a secret in a config file that others can read, if that is the case.
pub fn secrets_exposed(path: &Path, config: &Config) -> Option<String> {
    let secret =
        |name: &String| ["secret", "password", "token", "account_key"].iter().any(|w| name.contains(w));
    let name = config.store_options.keys().find(|n| secret(&n.to_ascii_lowercase()))?;
    let mode = std::fs::metadata(path).ok()?.mode();
    (mode & 0o004 != 0)
        .then(|| format!("{}: everybody can read '{name}' in it; chmod 600 it", path.display()))
}

impl Config {
    /// Reads the file, or nothing when there is none.
    pub fn load(path: Option<&Path>) -> Result<Config, Failure> {
        let Some(path) = path else { return Ok(Config::default()) };
        let text = std::fs::read_to_string(path).map_err(|e| {
            Failure::from_error(ExitCode::Usage, format!("config file {}", path.display()), &e)
        })?;
        Config::parse(&text, path)
    }

    /// Parses the text of the file at `path`, which is only used in messages and for relative paths.
    pub fn parse(text: &str, path: &Path) -> Result<Config, Failure> {
        let fail = |what: String| Failure::usage(format!("config file {}: {what}", path.display()));
        let table: toml::Table = text.parse().map_err(|e: toml::de::Error| {
            let line = e.span().and_then(|s| text.get(..s.start)).map_or(1, |t| t.matches('\n').count() + 1);
            fail(format!("line {line}: {}", e.message()))
        })?;
        let base = std::path::absolute(path).unwrap_or_else(|_| path.into());
        let base = base.parent().unwrap_or(Path::new("/"));
        let mut config = Config::default();
        for (key, value) in &table {
            config.set(key, value, base).map_err(|why| fail(format!("{key}: {why}")))?;
        }
        // A wrong option is found here, where the file can still be named.
        let mut probe = MountOptions::default();
        for word in &config.options {
            probe.apply_one(word).map_err(|f| Failure { message: fail(f.message).message, ..f })?;
        }
        Ok(config)
    }

    fn set(&mut self, key: &str, value: &Value, base: &Path) -> Result<(), String> {
        let path = || string(value).map(|text| Some(base.join(text)));
        match key {
            "store" => self.store = Some(string(value)?),
            "store-option" => {
                self.store_options = pairs(value)?;
                if let Some(file) = self.store_options.get_mut(CREDENTIALS) {
                    *file = base.join(&*file).display().to_string();
                }
            }
            "key" => self.key = path()?,
            "keys" => self.keys = path()?,
            "name" => self.name = Some(string(value)?),
            "passphrase-file" => self.passphrase_file = path()?,
            "state" => self.state = path()?,
            "mountpoint" => self.mountpoint = path()?,
            "at" => self.at = Some(scalar(value)?),
            "read-only" => self.read_only = Some(boolean(value)?),
            "foreground" => self.foreground = Some(boolean(value)?),
            "log-file" => self.log_file = path()?,
            "log-level" => self.log_level = Some(string(value)?),
            "options" => self.options = options(value)?,
            _ => return Err(format!("unknown key; known keys are {KEYS}")),
        }
        Ok(())
    }
}

fn string(value: &Value) -> Result<String, String> {
    value.as_str().map(str::to_string).ok_or_else(|| format!("must be a string, not {}", value.type_str()))
}

fn boolean(value: &Value) -> Result<bool, String> {
    value.as_bool().ok_or_else(|| format!("must be true or false, not {}", value.type_str()))
}

/// A value that may be written with or without quotes.
fn scalar(value: &Value) -> Result<String, String> {
    match value {
        Value::String(s) => Ok(s.clone()),
        Value::Integer(n) => Ok(n.to_string()),
        Value::Float(x) => Ok(x.to_string()),
        Value::Boolean(b) => Ok(b.to_string()),
        Value::Datetime(t) => Ok(t.to_string()),
        _ => Err(format!("must be a single value, not {}", value.type_str())),
    }
}

fn pairs(value: &Value) -> Result<BTreeMap<String, String>, String> {
    let table = value.as_table().ok_or("must be a table of names and values")?;
    table.iter().map(|(k, v)| Ok((k.clone(), scalar(v).map_err(|e| format!("{k}: {e}"))?))).collect()
}

/// Mount options as one string, a list of strings, or a table.
fn options(value: &Value) -> Result<Vec<String>, String> {
    let words =
        |text: &str| text.split(',').map(|w| w.trim().to_string()).filter(|w| !w.is_empty()).collect();
    match value {
        Value::String(text) => Ok(words(text)),
        Value::Array(list) => {
            let lists: Result<Vec<Vec<String>>, String> =
                list.iter().map(|item| string(item).map(|text| words(&text))).collect();
            Ok(lists?.concat())
        }
        Value::Table(table) => {
            let mut out = Vec::new();
            for (name, value) in table {
                match value {
                    Value::Boolean(true) => out.push(name.clone()),
                    Value::Boolean(false) => out.extend(switched_off(name)?),
                    value => out.push(format!("{name}={}", scalar(value)?)),
                }
            }
            Ok(out)
        }
        _ => Err(format!("must be a string, a list or a table, not {}", value.type_str())),
    }
}

/// The word that undoes a switch.
fn switched_off(name: &str) -> Result<Option<String>, String> {
    match name {
        "ro" => Ok(Some("rw".into())),
        "exec" | "suid" | "dev" | "atime" => Ok(Some(format!("no{name}"))),
        "allow_other" => Ok(None), // off is how it starts
        _ => Err(format!("{name} cannot be switched off")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, Failure> {
        Config::parse(text, Path::new("/etc/embassyfs/land.toml"))
    }

    #[test]
    fn all_keys_and_all_shapes_of_options() {
        let config = parse(
            "store = 's3://b/p'\nkey = 'writer.key'\nstate = '/var/s'\nat = 17\nread-only = true\n\
             options = ['ro', 'protection=local,uploads=3']\n[store-option]\naws_region = 'eu'\nretries = 3\n",
        )
        .expect("valid");
        assert_eq!(config.key.as_deref(), Some(Path::new("/etc/embassyfs/writer.key")));
        assert_eq!(config.at.as_deref(), Some("17"));
        assert_eq!(config.options, ["ro", "protection=local", "uploads=3"]);
        assert_eq!(config.store_options["retries"], "3");
        let table = parse("[options]\nallow_other = true\nexec = false\ncache_size = '5G'\nuploads = 2\n");
        assert_eq!(table.expect("valid").options, ["allow_other", "cache_size=5G", "noexec", "uploads=2"]);
        assert_eq!(
            parse("at = 2025-01-31T12:00:00Z").expect("valid").at.as_deref(),
            Some("2025-01-31T12:00:00Z")
        );
    }

    #[test]
    fn mistakes_name_the_key_and_the_file() {
        let cases = [
            ("stroe = 'x'", "stroe"),
            ("store = 5", "store"),
            ("read-only = 'yes'", "read-only"),
            ("options = ['bogus=1']", "bogus"),
            ("[options]\nnope = false", "nope"),
            ("a = = 2", "line 1"),
        ];
        for (text, word) in cases {
            let failure = parse(text).expect_err(text);
            let message = failure.to_string();
            assert!(message.contains(word) && message.contains("land.toml"), "{message}");
            assert_eq!(failure.code, ExitCode::Usage);
            assert_eq!(message.lines().count(), 1);
        }
    }
}
