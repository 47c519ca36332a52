//! The house rules that a machine can check: layers, who may use which crate, lengths, time, ASCII.
//! Invariant: reads the sources only; what it allows beyond the rules is listed here, and an entry that is no longer
//! needed fails the test, so the lists can only shrink.

use std::fs;
use std::path::{Path, PathBuf};

/// The layers, lowest first: a module uses only what has a smaller number. `types` and `disk` know nobody.
const LAYERS: &[(&str, u32)] = &[
    ("types", 0),
    ("disk", 1),
    ("clock", 2),
    ("crypto", 3),
    ("store", 4),
    ("cache", 5),
    ("log", 6),
    ("tree", 7),
    ("fs", 8),
    ("ops", 9),
    ("replica", 10),
    ("fuse", 11),
    ("cli", 12),
];

/// Crates that only one place may know: a module, or a part of one.
const CRATES: &[(&str, &str)] = &[
    ("fuser", "fuse/adapter"),
    ("object_store", "store"),
    ("aes_gcm", "crypto"),
    ("blake3", "crypto"),
    ("ed25519_dalek", "crypto"),
    ("argon2", "crypto"),
    ("sled", "cache"),
    ("clap", "cli"),
];

const FILE_LINES_MAX: usize = 600;
const FUNCTION_LINES_MAX: usize = 100;

/// Files (tests aside) that are longer, with the length that they must not exceed.
const LONG_FILES: &[(&str, usize)] = &[];
/// Functions that are longer: file, name, length.
const LONG_FUNCTIONS: &[(&str, &str, usize)] = &[];
/// Uses of a layer above: file, module.
const UPWARD: &[(&str, &str)] = &[];

/// A word or a sign of the source, and the line it stands on.
#[derive(Clone, PartialEq, Debug)]
struct Token {
    text: String,
    line: usize,
}

/// A source file without comments and literals.
struct Source {
    name: String,
    module: String,
    text: String,
    tokens: Vec<Token>,
}

impl Source {
    fn is_test(&self) -> bool {
        self.name.ends_with("tests.rs") || self.name.contains("/tests/")
    }

    /// What a layer or crate rule looks at, and how many lines the file has: both without its `mod tests`.
    fn without_tests(&self) -> (&[Token], usize) {
        let mark = ["#", "[", "cfg", "(", "test", ")", "]", "mod"];
        let start = (0..self.tokens.len()).find(|&i| starts_with(&self.tokens[i..], &mark));
        match start {
            Some(i) => (&self.tokens[..i], self.tokens[i].line - 1),
            None => (&self.tokens, self.text.lines().count()),
        }
    }
}

fn starts_with(tokens: &[Token], words: &[&str]) -> bool {
    tokens.len() >= words.len() && tokens.iter().zip(words).all(|(t, w)| t.text == *w)
}

fn starts_with_anywhere(tokens: &[Token], words: &[&str]) -> bool {
    (0..tokens.len()).any(|i| starts_with(&tokens[i..], words))
}

/// Splits a source into words and signs; comments, strings and characters are left out.
fn tokens(text: &str) -> Vec<Token> {
    let bytes = text.as_bytes();
    let (mut out, mut i, mut line) = (Vec::new(), 0, 1);
    while i < bytes.len() {
        let rest = &bytes[i..];
        let end = i + match rest[0] {
            b'/' if rest.starts_with(b"//") => rest.iter().position(|b| *b == b'\n').unwrap_or(rest.len()),
            b'/' if rest.starts_with(b"/*") => block_comment(rest),
            b'"' => string(rest),
            b'\'' => character_or_lifetime(rest),
            b if b.is_ascii_alphabetic() || b == b'_' => match raw_or_byte_literal(rest) {
                Some(len) => len,
                None => {
                    let len = rest.iter().take_while(|b| b.is_ascii_alphanumeric() || **b == b'_').count();
                    out.push(Token { text: text[i..i + len].to_string(), line });
                    len
                }
            },
            b if b.is_ascii_whitespace() || !b.is_ascii() => 1,
            b => {
                out.push(Token { text: (b as char).to_string(), line });
                1
            }
        };
        line += bytes[i..end].iter().filter(|b| **b == b'\n').count();
        i = end;
    }
    out
}

fn block_comment(rest: &[u8]) -> usize {
    let (mut depth, mut i) = (0, 0);
    while i < rest.len() {
        if rest[i..].starts_with(b"/*") {
            depth += 1;
            i += 2;
        } else if rest[i..].starts_with(b"*/") {
            depth -= 1;
            i += 2;
            if depth == 0 {
                return i;
            }
        } else {
            i += 1;
        }
    }
    rest.len()
}

fn string(rest: &[u8]) -> usize {
    let mut i = 1;
    while i < rest.len() {
        match rest[i] {
            b'\\' => i += 2,
            b'"' => return i + 1,
            _ => i += 1,
        }
    }
    rest.len()
}

fn character_or_lifetime(rest: &[u8]) -> usize {
    if rest.get(1) == Some(&b'\\') {
        let close = rest[3..].iter().position(|b| *b == b'\'').unwrap_or(0);
        return 3 + close + 1;
    }
    let width = rest.get(1).map_or(1, |b| if b.is_ascii() { 1 } else { b.leading_ones() as usize });
    if rest.get(1 + width) == Some(&b'\'') { width + 2 } else { 1 }
}

/// The length of `r"..."`, `r#"..."#`, `b"..."`, `c"..."`, `br"..."` or `b'x'`, if that is what begins here.
fn raw_or_byte_literal(rest: &[u8]) -> Option<usize> {
    let letters = rest.iter().take(2).take_while(|b| matches!(b, b'r' | b'b' | b'c')).count();
    let raw = rest[..letters].contains(&b'r');
    let hashes = if raw { rest[letters..].iter().take_while(|b| **b == b'#').count() } else { 0 };
    let body = &rest[letters + hashes..];
    match body.first()? {
        b'"' if raw => {
            let close: Vec<u8> = std::iter::once(b'"').chain(std::iter::repeat_n(b'#', hashes)).collect();
            let end = body[1..].windows(close.len()).position(|w| w == close)?;
            Some(letters + hashes + 1 + end + close.len())
        }
        b'"' if letters > 0 => Some(letters + string(body)),
        b'\'' if rest[0] == b'b' && letters == 1 => Some(1 + character_or_lifetime(body)),
        _ => None,
    }
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    collect(&root.join("src"), &mut files);
    files.sort();
    files
        .into_iter()
        .map(|path| {
            let name =
                path.strip_prefix(root).expect("found below it").to_str().expect("ASCII names").to_string();
            let inner = name.strip_prefix("src/").expect("found there");
            let module = inner.split('/').next().expect("not empty").trim_end_matches(".rs").to_string();
            let text = fs::read_to_string(&path).expect("a readable source in UTF-8");
            let tokens = tokens(&text);
            Source { name, module, text, tokens }
        })
        .collect()
}

fn collect(directory: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).expect("a readable directory") {
        let path = entry.expect("a readable entry").path();
        if path.is_dir() {
            collect(&path, into);
        } else if path.extension().is_some_and(|e| e == "rs") {
            into.push(path);
        }
    }
}

fn layer(module: &str) -> Option<u32> {
    LAYERS.iter().find(|(name, _)| *name == module).map(|(_, n)| *n)
}

/// The modules of this crate that a token run refers to by `crate::x` or `crate::{x, y::z}`, with their lines.
fn crate_uses(tokens: &[Token]) -> Vec<(String, usize)> {
    let mut out = Vec::new();
    for i in 0..tokens.len() {
        if !starts_with(&tokens[i..], &["crate", ":", ":"]) {
            continue;
        }
        let after = &tokens[i + 3..];
        match after.first() {
            Some(t) if t.text == "{" => out.extend(group_heads(after)),
            Some(t) => out.push((t.text.clone(), t.line)),
            None => {}
        }
    }
    out
}

/// The first words of the members of a `{a::b, c, d::{e, f}}` that begins here.
fn group_heads(tokens: &[Token]) -> Vec<(String, usize)> {
    let (mut depth, mut at_head, mut out) = (0, false, Vec::new());
    for token in tokens {
        match token.text.as_str() {
            "{" => {
                depth += 1;
                at_head = depth == 1;
            }
            "}" => {
                depth -= 1;
                if depth == 0 {
                    break;
                }
            }
            "," => at_head = depth == 1,
            _ if at_head => {
                out.push((token.text.clone(), token.line));
                at_head = false;
            }
            _ => {}
        }
    }
    out
}

/// The lines where a crate is named as the beginning of a path or imported as a whole.
fn external_uses(tokens: &[Token], name: &str) -> Vec<usize> {
    let is = |i: usize, text: &str| tokens.get(i).is_some_and(|t| t.text == text);
    (0..tokens.len())
        .filter(|&i| {
            let leads = is(i + 1, ":") && is(i + 2, ":");
            let imported = i > 0 && is(i - 1, "use") && (is(i + 1, ";") || is(i + 1, "as"));
            // `a::name::` is somebody else's; `::name::` is the crate again.
            let inner = i >= 2 && is(i - 1, ":") && is(i - 2, ":") && i >= 3 && is_word(&tokens[i - 3].text);
            tokens[i].text == name && (leads || imported) && !inner
        })
        .map(|i| tokens[i].line)
        .collect()
}

fn is_word(text: &str) -> bool {
    !matches!(text, "use" | "in" | "as") && text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
}

/// Every function with a body: its name, its first line, its number of lines.
fn functions(tokens: &[Token]) -> Vec<(String, usize, usize)> {
    let mut out = Vec::new();
    for i in 0..tokens.len() {
        let named = tokens.get(i + 1).filter(|t| tokens[i].text == "fn" && is_word(&t.text));
        let Some(name) = named else { continue };
        let (mut round, mut curly) = (0i32, 0i32);
        for token in &tokens[i + 2..] {
            match token.text.as_str() {
                "(" | "[" => round += 1,
                ")" | "]" => round -= 1,
                ";" if round == 0 && curly == 0 => break,
                "{" => curly += 1,
                "}" => curly -= 1,
                _ => continue,
            }
            if token.text == "}" && curly == 0 && round == 0 {
                out.push((name.text.clone(), tokens[i].line, token.line - tokens[i].line + 1));
                break;
            }
        }
    }
    out
}

/// Fails with all of them, one a line.
fn none(broken: Vec<String>) {
    assert!(broken.is_empty(), "\n{}\n", broken.join("\n"));
}

#[test]
fn a_module_uses_only_what_stands_below_it() {
    let (mut broken, mut excused) = (Vec::new(), Vec::new());
    for source in sources().iter().filter(|s| !s.is_test()) {
        if matches!(source.module.as_str(), "lib" | "main") {
            continue;
        }
        let Some(own) = layer(&source.module) else {
            broken.push(format!("{}: module {} has no layer in tests/tidy.rs", source.name, source.module));
            continue;
        };
        for (used, line) in crate_uses(source.without_tests().0) {
            if layer(&used).is_none_or(|n| n <= own || used == source.module) {
                continue;
            }
            if UPWARD.contains(&(&source.name, &used)) {
                excused.push((source.name.clone(), used));
            } else {
                broken.push(format!(
                    "{}:{line}: {} uses {used}, which stands above it",
                    source.name, source.module
                ));
            }
        }
    }
    let idle = UPWARD.iter().filter(|(f, m)| !excused.iter().any(|(ef, em)| ef == f && em == m));
    broken.extend(idle.map(|(f, m)| format!("{f}: no longer uses {m}: take it off the list UPWARD")));
    none(broken);
}

#[test]
fn an_outside_crate_is_known_to_one_module() {
    let mut broken = Vec::new();
    for source in sources() {
        for (name, home) in
            CRATES.iter().filter(|(_, home)| !source.name.starts_with(&format!("src/{home}/")))
        {
            let lines = external_uses(&source.tokens, name);
            broken.extend(lines.iter().map(|l| format!("{}:{l}: {name} is for {home} only", source.name)));
        }
    }
    none(broken);
}

#[test]
fn files_and_functions_stay_short() {
    let mut broken = Vec::new();
    for source in sources() {
        let (tokens, lines) = source.without_tests();
        let allowed = LONG_FILES.iter().find(|(f, _)| *f == source.name).map(|(_, n)| *n);
        if lines > allowed.unwrap_or(FILE_LINES_MAX) {
            broken.push(format!("{}: {lines} lines", source.name));
        } else if allowed.is_some() && lines <= FILE_LINES_MAX {
            broken.push(format!("{}: short enough now: take it off the list LONG_FILES", source.name));
        }
        for (name, line, lines) in functions(tokens) {
            let entry = LONG_FUNCTIONS.iter().find(|(f, n, _)| *f == source.name && *n == name);
            if lines > entry.map_or(FUNCTION_LINES_MAX, |e| e.2) {
                broken.push(format!("{}:{line}: fn {name} has {lines} lines", source.name));
            } else if entry.is_some() && lines <= FUNCTION_LINES_MAX {
                broken.push(format!("{}: fn {name}: take it off the list LONG_FUNCTIONS", source.name));
            }
        }
    }
    none(broken);
}

#[test]
fn time_comes_through_the_clock() {
    let calls = [["SystemTime", "now"], ["Instant", "now"], ["thread", "sleep"]];
    let mut broken = Vec::new();
    for source in sources().iter().filter(|s| !s.is_test() && !matches!(s.module.as_str(), "clock" | "cli")) {
        let tokens = source.without_tests().0;
        // tokio's own clock stands still and jumps when a test says so.
        let tokio = starts_with_anywhere(tokens, &["tokio", ":", ":", "time", ":", ":", "Instant"]);
        for (i, token) in tokens.iter().enumerate() {
            let hit = calls.iter().find(|[a, b]| starts_with(&tokens[i..], &[a, ":", ":", b]));
            if let Some([a, b]) = hit.filter(|[a, _]| *a != "Instant" || !tokio) {
                broken.push(format!("{}:{}: {a}::{b}", source.name, token.line));
            }
        }
    }
    none(broken);
}

#[test]
fn nothing_is_ignored_or_left_undone() {
    let mut broken = Vec::new();
    for source in sources() {
        for (i, token) in source.tokens.iter().enumerate() {
            let rest = &source.tokens[i..];
            let undone = ["todo", "unimplemented"].iter().any(|word| starts_with(rest, &[word, "!", "("]));
            if undone || starts_with(rest, &["#", "[", "ignore"]) {
                broken.push(format!("{}:{}: {}", source.name, token.line, token.text));
            }
        }
    }
    none(broken);
}

#[test]
fn sources_are_ascii_and_open_with_what_they_own() {
    let mut broken = Vec::new();
    for source in sources() {
        if !source.text.starts_with("//!") {
            broken.push(format!("{}: does not open with //!", source.name));
        }
        let odd = source.text.lines().position(|line| !line.is_ascii());
        broken.extend(odd.map(|n| format!("{}:{}: not ASCII", source.name, n + 1)));
    }
    none(broken);
}

#[test]
fn the_rules_can_fail() {
    let of = |text: &str| tokens(text);
    let uses: Vec<String> =
        crate_uses(&of("use crate::{fs::x, log}; // crate::cli\nlet a = crate::tree::b(\"crate::ops\");"))
            .into_iter()
            .map(|(module, _)| module)
            .collect();
    assert_eq!(uses, ["fs", "log", "tree"]);
    assert_eq!(
        external_uses(&of("use sled;\nsled::open();\n::sled::open();\na::sled::b();"), "sled"),
        [1, 2, 3]
    );
    assert!(
        external_uses(
            &of("let a = \"sled::\"; /* sled:: /* sled:: */ */ r#\"sled::\"# b'\\'' 'a' x.sled"),
            "sled"
        )
        .is_empty()
    );
    let found = functions(&of(
        "fn one(a: [u8; 3]) -> u8 {\n let c = '{';\n 1\n}\ntrait T { fn two(); fn three() {} }\ntype F = fn(u8);",
    ));
    assert_eq!(found, [("one".to_string(), 1, 4), ("three".to_string(), 5, 1)]);
    let module = Source {
        name: String::new(),
        module: String::new(),
        tokens: of("use a;\n\n#[cfg(test)]\nmod tests { use crate::cli; }"),
        text: String::new(),
    };
    assert!(crate_uses(module.without_tests().0).is_empty() && module.without_tests().1 == 2);
}
