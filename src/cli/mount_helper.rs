//! `mount.embassyfs SPEC DIR [-sfnv] [-o OPTIONS]`: what mount(8) runs for `mount -t embassyfs` and /etc/fstab.
//! SPEC is a config file, or a store's URL with `key=` and `state=` among the options.
//! Invariant: it does what `embassyfs mount` does; only the spelling differs.

use super::exit::{ExitCode, Failure, Outcome};
use super::mount::{self, MountArgs};
use super::mounted;
use super::options::{MountOptions, parse_pair, parse_past};
use super::{StoreArgs, logging};
use crate::fuse::mount::{self as kernel, MountSettings};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

const USAGE: &str = "usage: mount.embassyfs CONFIG_FILE|STORE_URL MOUNTPOINT [-sfnv] [-o OPTION,...]; besides the \
                     mount options: key=FILE, state=DIR, config=FILE, at=SEQ|TIME, log_file=FILE, log_level=LEVEL, \
                     store.NAME=VALUE";

/// What mount(8) runs; see mount.embassyfs.
#[derive(clap::Args)]
#[command(disable_help_flag = true)]
pub struct HelperArgs {
    /// SPEC DIR [-sfnv] [-o OPTIONS]
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(super) words: Vec<OsString>,
}

/// Runs the command with the words behind the program's name.
pub fn run(words: Vec<OsString>) -> Outcome {
    let call = parse(words)?;
    if let Some(words) = call.remount {
        return remount(&call.args, &words, call.fake);
    }
    if call.fake {
        return mount::plan(call.args).map(|_| ExitCode::Ok);
    }
    mount::run(call.args)
}

#[derive(Debug)]
struct Call {
    args: MountArgs,
    /// `-f`: look at everything, mount nothing.
    fake: bool,
    /// `-o remount`, with all the words beside it.
    remount: Option<Vec<String>>,
}

fn parse(words: Vec<OsString>) -> Result<Call, Failure> {
    let mut places = Vec::new();
    let mut lists = Vec::new();
    let (mut fake, mut sloppy) = (false, false);
    let mut words = words.into_iter();
    while let Some(word) = words.next() {
        let text = word.to_string_lossy().into_owned();
        let Some(flags) = text.strip_prefix('-').filter(|f| !f.is_empty()) else {
            places.push(word);
            continue;
        };
        match flags.chars().next() {
            Some('o') if flags.len() > 1 => lists.push(flags.replacen('o', "", 1)),
            Some('o') => {
                lists.push(words.next().map(|w| w.to_string_lossy().into_owned()).unwrap_or_default())
            }
            // The type and the namespace: the former is known, the latter mount(8) has entered already.
            Some('t' | 'N') => drop((flags.len() == 1).then(|| words.next())),
            _ => {
                for flag in flags.chars() {
                    match flag {
                        'f' => fake = true,
                        's' => sloppy = true,
                        'n' | 'v' | 'w' => {}
                        'r' => lists.push("ro".into()),
                        _ => return Err(Failure::usage(format!("unknown flag '-{flag}'")).hint(USAGE)),
                    }
                }
            }
        }
    }
    let [spec, dir]: [OsString; 2] =
        places.try_into().map_err(|_| Failure::usage("SPEC and MOUNTPOINT are needed").hint(USAGE))?;
    let mut args = MountArgs { mountpoint: Some(dir.into()), ..MountArgs::default() };
    let spec_text = spec.to_string_lossy().into_owned();
    match spec_text.contains("://") {
        true => args.store.store = Some(spec_text.clone()),
        false => args.store.config = Some(spec.into()),
    }
    // mount -a finds out by the source whether it is mounted already. A comma cannot stand there.
    args.fstab_source = (!spec_text.contains(',')).then_some(spec_text);
    let words: Vec<&str> =
        lists.iter().flat_map(|list| list.split(',')).filter(|word| !word.is_empty()).collect();
    if words.contains(&"remount") {
        let words = words.into_iter().map(String::from).collect();
        return Ok(Call { args, fake, remount: Some(words) });
    }
    for word in words {
        take_option(&mut args, word, sloppy)?;
    }
    Ok(Call { args, fake, remount: None })
}

/// Changes what the kernel keeps of a mount: `ro`, `suid`, `dev`, `exec` and their opposites. mount(8) passes all the
/// options of the mount, changed ones and others; the others are the daemon's, which keeps those it was started with.
fn remount(args: &MountArgs, words: &[String], fake: bool) -> Outcome {
    let place = args.mountpoint.as_deref().unwrap_or(Path::new("."));
    let mount = mounted::find(place)?;
    let has = |name: &str| mount.identity.entry().options.split(',').any(|option| option == name);
    // What mount(8) does not name is to be off: it leaves a word out to take it back.
    let mut options = MountOptions { suid: true, dev: true, ..MountOptions::default() };
    for word in words.iter().filter(|word| !word.contains('=') && *word != "remount") {
        let _ = options.apply_one(word); // no concern of the kernel's
    }
    if !options.read_only && has("ro") && mount.status()?.role != "writer" {
        return Err(Failure::usage(format!("{} was mounted to read only", mount.path.display()))
            .hint("unmount it, and mount it with the writer's key"));
    }
    let settings = MountSettings {
        read_only: options.read_only,
        suid: options.suid,
        dev: options.dev,
        exec: options.exec,
        relatime: !has("noatime"),
        ..MountSettings::new(mount.path.clone(), String::new())
    };
    if !fake {
        let failed =
            |e| Failure::from_error(ExitCode::Failed, format!("cannot remount {}", mount.path.display()), &e);
        kernel::remount(&settings).map_err(failed)?;
    }
    Ok(ExitCode::Ok)
}

/// One option: either what is a flag elsewhere, or a mount option.
fn take_option(args: &mut MountArgs, word: &str, sloppy: bool) -> Result<(), Failure> {
    let bad = |name: &str| {
        let name = name.to_string();
        move |why: String| Failure::usage(format!("option '{name}': {why}"))
    };
    let StoreArgs { store_options, config, .. } = &mut args.store;
    match word.split_once('=') {
        Some(("key", path)) => args.key = Some(PathBuf::from(path)),
        Some(("state", path)) => args.state = Some(PathBuf::from(path)),
        Some(("config", path)) => *config = Some(PathBuf::from(path)),
        Some(("log_file", path)) => args.log_file = Some(PathBuf::from(path)),
        Some(("log_level", level)) => {
            args.log_level = Some(logging::parse_level(level).map_err(bad("log_level"))?);
        }
        Some(("at", text)) => args.at = Some(parse_past(text).map_err(bad("at"))?),
        Some((name, _)) if name.starts_with("store.") => {
            let pair = word.strip_prefix("store.").unwrap_or(word);
            store_options.push(parse_pair(pair).map_err(bad(name))?);
        }
        _ => match MountOptions::default().apply_one(word) {
            Err(_) if sloppy => {}
            Err(failure) => return Err(failure),
            Ok(()) => args.options.push(word.into()),
        },
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_words(line: &str) -> Result<Call, Failure> {
        parse(line.split(' ').map(OsString::from).collect())
    }

    #[test]
    fn what_mount8_passes_is_understood() {
        let call = parse_words(
            "s3://b/p /srv/land -v -o rw,_netdev,key=/k,state=/s,store.aws_region=eu,allow_other",
        )
        .expect("valid");
        let args = call.args;
        assert_eq!(args.store.store.as_deref(), Some("s3://b/p"));
        assert_eq!(args.store.store_options, [("aws_region".to_string(), "eu".to_string())]);
        assert_eq!((args.key, args.state), (Some("/k".into()), Some("/s".into())));
        assert_eq!(args.options, ["rw", "_netdev", "allow_other"]);
        assert_eq!(args.fstab_source.as_deref(), Some("s3://b/p"));
        assert!(!call.fake);
    }

    #[test]
    fn a_config_file_is_a_spec_and_flags_combine() {
        let call = parse_words("/etc/x.toml /m -fn -t fuse.embassyfs -sr -o bogus").expect("sloppy");
        assert_eq!(call.args.store.config.as_deref(), Some(std::path::Path::new("/etc/x.toml")));
        // -s comes before -o here as mount(8) does it.
        assert!(call.fake && call.args.options == ["ro"]);
        assert!(parse_words("/etc/x.toml /m -o bogus").expect_err("strict").message.contains("'bogus'"));
        assert!(parse_words("/etc/x.toml").is_err() && parse_words("a b c").is_err());
        assert!(parse_words("a b -q").expect_err("flag").message.contains("-q"));
    }
}
