//! What --help says must work when it is pasted.

use super::{Cli, command};
use clap::Parser;

/// A terminal is seldom narrower.
const WIDTH: usize = 80;

#[test]
fn the_command_line_is_consistent() {
    command().debug_assert();
}

/// Every command and subcommand with its name, as clap has built it.
fn all() -> Vec<(String, clap::Command)> {
    let mut root = command();
    root.build();
    let mut all = vec![("embassyfs".to_string(), root)];
    let mut next = 0;
    while let Some((name, command)) = all.get(next).cloned() {
        let subs = command.get_subcommands().filter(|sub| !sub.is_hide_set() && sub.get_name() != "help");
        all.extend(subs.map(|sub| (format!("{name} {}", sub.get_name()), sub.clone())));
        next += 1;
    }
    all
}

/// The lines of commands, those that go on after a backslash joined with `\n`.
fn examples(help: &str) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    let mut goes_on = false;
    for line in help.lines() {
        match found.last_mut().filter(|_| goes_on) {
            Some(last) => *last += &format!("\n{line}"),
            None if line.trim_start().starts_with("embassyfs ") => found.push(line.to_string()),
            None => continue,
        }
        goes_on = line.ends_with('\\');
    }
    found
}

/// The words of the first command in a line, as a shell splits it.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quoted) = (Vec::new(), None::<String>, false);
    let mut chars = line.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\'' => {
                quoted = !quoted;
                word.get_or_insert_default();
            }
            _ if quoted => word.get_or_insert_default().push(c),
            '\\' if chars.peek() == Some(&'\n') => drop(chars.next()),
            '#' if word.is_none() => break,
            '<' | '>' | '|' | '&' => break,
            c if c.is_whitespace() => words.extend(word.take()),
            c => word.get_or_insert_default().push(c),
        }
    }
    assert!(!quoted, "{line}");
    words.extend(word);
    words
}

fn mistakes(line: &str) -> Option<String> {
    let mut words = words(line);
    for word in &mut words {
        // Left out for the reader's sake; it is 64 digits.
        if word.ends_with("...") {
            *word = "5d".repeat(32);
        }
    }
    Cli::try_parse_from(words).err().map(|e| e.to_string())
}

#[test]
fn every_example_is_a_command() {
    let mut seen = 0;
    for (name, command) in all() {
        let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        let found = examples(&help);
        assert!(!found.is_empty() || name.split(' ').count() > 2, "{name} has no example");
        for line in found {
            assert_eq!(mistakes(&line), None, "{name}: {line}");
            seen += 1;
        }
    }
    assert!(seen > 40, "{seen}");
}

#[test]
fn no_example_is_broken_by_the_width_of_the_terminal() {
    for (name, command) in all() {
        let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        for width in [WIDTH, 100, 110] {
            let shown = command.clone().term_width(width).render_long_help().to_string();
            for line in examples(&help) {
                assert!(shown.contains(&line), "{name} at {width}: {line}");
            }
        }
    }
}

#[test]
fn a_wrong_example_is_found() {
    assert!(mistakes("  embassyfs umount /srv/land wait longer").is_some());
    assert!(mistakes("  embassyfs mount --read-only --store\n    --state /x").is_some());
    assert_eq!(words("a 'b c' \\\n  d # e"), ["a", "b c", "d"]);
    assert_eq!(examples("x\n  embassyfs a \\\n    b\n  c").len(), 1);
}
