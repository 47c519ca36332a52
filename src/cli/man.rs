//! `embassyfs man`: writes the manual pages, one for the program and one per command.

use super::exit::{ExitCode, Failure, Outcome};
use super::options::KNOWN;
use clap::builder::Resettable;
use clap_mangen::Man;
use std::io;
use std::path::{Path, PathBuf};

/// What a line of help says that begins the examples; they are the last of it.
const EXAMPLES: &str = "Examples:";
/// A line with a colon at its end that is longer is a sentence and not a heading.
const HEADING_MAX: usize = 24;

/// Write the manual pages (embassyfs.1, embassyfs-mount.1, ...) into a directory.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  embassyfs man --out /usr/local/share/man/man1 && man embassyfs-mount")]
pub struct ManArgs {
    /// The directory; made if it is missing.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// The mount options as a list for help texts.
pub fn option_list() -> String {
    KNOWN.iter().map(|(name, what)| format!("  {name:<26} {what}\n")).collect()
}

/// Runs the command.
pub fn run(args: ManArgs) -> Outcome {
    let mut command = super::command().disable_help_subcommand(true);
    command.build();
    std::fs::create_dir_all(&args.out).and_then(|()| write(&command, &args.out)).map_err(|e| {
        let what = format!("writing manual pages into {}", args.out.display());
        Failure::from_error(ExitCode::Failed, what, &e).hint("--out is a directory that you may write to")
    })?;
    Ok(ExitCode::Ok)
}

/// Writes the page of a command, and those of its subcommands.
fn write(command: &clap::Command, to: &Path) -> io::Result<()> {
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
        write(sub, to)?;
    }
    let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    let man = Man::new(command.clone().after_help(Resettable::Reset));
    let mut page = Vec::new();
    man.render(&mut page)?;
    page.extend_from_slice(sections(&help).as_bytes());
    std::fs::write(to.join(man.get_filename()), page)
}

/// What stands below the options in a help text, as sections of a page. Indented lines keep their form, so that commands
/// can be copied; others are running text.
fn sections(help: &str) -> String {
    let (mut out, mut title, mut after_blank, mut fixed) = (String::new(), "", true, false);
    for line in help.lines() {
        let is_heading = after_blank && line.ends_with(':') && line.len() <= HEADING_MAX;
        after_blank = line.is_empty();
        let indented = line.starts_with(' ');
        if fixed && !indented {
            out.push_str(".fi\n");
        } else if !fixed && indented {
            out.push_str(".nf\n");
        }
        fixed = indented;
        if is_heading && title != EXAMPLES {
            title = line;
            let heading = line.trim_end_matches(':');
            let (words, option) = heading.split_at(heading.find('(').unwrap_or(heading.len()));
            out.push_str(&format!(".SH {}{}\n", text(&words.to_uppercase()), text(option)));
        } else if line.is_empty() {
            out.push_str(".PP\n");
        } else {
            if title.is_empty() {
                title = "Notes";
                out.push_str(".SH NOTES\n");
            }
            out.push_str(&text(line));
            out.push('\n');
        }
    }
    if fixed {
        out.push_str(".fi\n");
    }
    out
}

/// A line as roff takes it for what it says, with the signs of the shell as such.
fn text(line: &str) -> String {
    let mut out = String::new();
    if line.starts_with(['.', '\'']) {
        out.push_str("\\&"); // not a command of roff
    }
    for c in line.chars() {
        match c {
            '\\' => out.push_str("\\e"),
            '-' => out.push_str("\\-"),
            '\'' => out.push_str("\\(aq"),
            '`' => out.push_str("\\(ga"),
            '^' => out.push_str("\\(ha"),
            '~' => out.push_str("\\(ti"),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn help_becomes_sections_and_examples_can_be_copied() {
        let help = "Some words.\n\nExit codes:\n  0  done\n\nExamples:\n  a -x 'b' \\\n    c\nThen:\n  d";
        assert_eq!(
            sections(help),
            ".SH NOTES\nSome words.\n.PP\n.SH EXIT CODES\n.nf\n  0  done\n.fi\n.PP\n.SH EXAMPLES\n.nf\n  a \\-x \\(aqb\\(aq \\e\n    c\n\
             .fi\nThen:\n.nf\n  d\n.fi\n"
        );
        assert_eq!(text(".x"), "\\&.x");
    }
}
