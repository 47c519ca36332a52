//! Tests of key files: what is damaged, open to others or from the future is refused by name.

use super::*;
use crate::types::hex;

fn keys() -> KeySet {
    let secret = |n| SecretKey::from_bytes(&[n; 32]);
    let key = VolumeKey::from_bytes([0xab; 32]);
    KeySet::assemble(VolumeId([7; 16]), "land \"register\" \u{f5}", key, secret(0xcd), secret(0xef))
}

fn text(key: &KeyFile) -> String {
    Contents::of_key(key, "t").unwrap().to_text().to_string()
}

fn parse(text: &str) -> Result<KeyFile> {
    KeyFile::parse(text.as_bytes(), "t.key")
}

fn same(a: &KeyFile, b: &KeyFile) -> bool {
    text(a) == text(b) && a.role == b.role
}

#[test]
fn every_role_survives_a_file_and_holds_only_its_own_secrets() {
    let dir = tempfile::tempdir().unwrap();
    let keys = keys();
    for (key, opens, signs) in
        [(&keys.writer, true, true), (&keys.reader, true, false), (&keys.auditor, false, false)]
    {
        let path = dir.path().join(key.role.to_string());
        key.save(&path).unwrap();
        let back = KeyFile::load(&path).unwrap();
        assert!(same(key, &back), "{:?}", key.role);
        assert_eq!((back.volume_key().is_ok(), back.signing_key().is_ok()), (opens, signs));
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.contains(&"ab".repeat(32)), opens);
        assert_eq!(text.contains(&"cd".repeat(32)), signs);
        assert!(!text.contains(&"ef".repeat(32)), "the steward's secret is in no other file");
    }
    let path = dir.path().join("steward");
    keys.steward.save(&path).unwrap();
    let back = StewardKeyFile::load(&path).unwrap();
    assert_eq!(back.signing.public(), keys.writer.steward_public);
    assert_eq!((back.volume, back.name, back.key_id), (VolumeId([7; 16]), keys.writer.name.clone(), 1));
    assert_eq!(back.writer_public, keys.writer.writer_public);
}

#[test]
fn a_role_may_do_what_the_lesser_ones_may_and_no_more() {
    let keys = keys();
    assert!(keys.writer.require(Role::Writer).is_ok());
    assert!(keys.writer.require(Role::Auditor).is_ok());
    assert!(keys.reader.require(Role::Reader).is_ok());
    let message = keys.reader.require(Role::Writer).unwrap_err().to_string();
    assert!(
        message.contains("reader key file") && message.contains("needs the writer key file"),
        "{message}"
    );
    assert!(matches!(keys.auditor.require(Role::Reader), Err(KeyFileError::WrongRole { .. })));
    assert!(matches!(keys.auditor.volume_key(), Err(KeyFileError::WrongRole { .. })));
}

#[test]
fn the_stewards_file_is_no_key_file_of_the_others_and_the_reverse() {
    let keys = keys();
    let steward = Contents::of_steward(&keys.steward, "t").unwrap().to_text();
    assert!(matches!(parse(&steward), Err(KeyFileError::WrongRole { found, .. }) if found == "steward"));
    let writer = text(&keys.writer);
    assert!(matches!(
        StewardKeyFile::parse(writer.as_bytes(), "t"),
        Err(KeyFileError::WrongRole { found, .. }) if found == "writer"
    ));
}

#[test]
fn any_altered_character_and_any_truncation_is_refused() {
    let keys = keys();
    for key in [&keys.writer, &keys.auditor] {
        let good = text(key);
        for i in 0..good.len() {
            for flip in [1, 2, 0x20] {
                let mut bytes = good.clone().into_bytes();
                bytes[i] ^= flip;
                // Another letter case of a digit and other white space between the fields say the same.
                if let Ok(back) = KeyFile::parse(&bytes, "t") {
                    assert!(same(&back, key), "byte {i} flipped by {flip}");
                }
            }
        }
        for len in 0..good.trim_end().len() {
            assert!(KeyFile::parse(&good.as_bytes()[..len], "t").is_err(), "cut to {len}");
        }
    }
}

#[test]
fn a_mistyped_digit_is_told_from_a_cut_off_file() {
    let good = text(&keys().writer);
    let message = parse(&good.replacen("abab", "abac", 1)).unwrap_err().to_string();
    assert!(message.contains("t.key: the check value does not fit"), "{message}");
    let message = parse(&good[..good.len() / 2]).unwrap_err().to_string();
    assert!(message.contains("truncated"), "{message}");
    let message = parse("hello").unwrap_err().to_string();
    assert!(message.contains("no key file"), "{message}");
}

#[test]
fn line_breaks_and_letter_case_do_not_matter() {
    let key = keys().writer;
    let typed = text(&key).replace('\n', "\r\n").replace("abab", "ABAB");
    assert!(same(&parse(&typed).unwrap(), &key));
}

#[test]
fn another_version_is_refused_even_if_its_fields_are_unknown() {
    let err = parse("{\"embassyfs_key\": 2, \"hardware\": {}}").unwrap_err();
    assert!(matches!(err, KeyFileError::Version { found: 2, .. }));
    assert!(err.to_string().contains("version 2") && err.to_string().contains("newer"), "{err}");
}

#[test]
fn keys_that_do_not_fit_the_role_or_each_other_are_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("k");
    let keys = keys();
    let too_much = KeyFile { volume_key: keys.writer.volume_key.clone(), ..keys.auditor.clone() };
    assert!(matches!(too_much.save(&path), Err(KeyFileError::Damaged { .. })));
    let foreign = KeyFile { signing: Some(SecretKey::from_bytes(&[1; 32])), ..keys.writer.clone() };
    assert!(matches!(foreign.save(&path), Err(KeyFileError::Damaged { .. })));
    assert!(!path.exists());
}

#[test]
fn errors_never_quote_the_file() {
    let secret = "ab".repeat(32);
    let good = text(&keys().writer);
    for bad in [
        good.replacen("\"key_id\": 1", &format!("\"key_id\": \"{secret}\""), 1),
        good.replacen("\"role\": \"writer\"", &format!("\"role\": \"{secret}\""), 1),
        good.replacen("\"role\"", &format!("\"{secret}\""), 1),
        format!("\"{secret}\""),
    ] {
        let err = parse(&bad).unwrap_err();
        assert!(!format!("{err} {err:?}").contains("abab"), "{err:?}");
    }
}

#[test]
fn a_file_is_created_for_its_owner_only_and_refused_when_others_may_read_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("k");
    keys().reader.save(&path).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    for mode in [0o640, 0o604, 0o620, 0o666] {
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        let err = KeyFile::load(&path).unwrap_err();
        assert!(matches!(err, KeyFileError::TooOpen { mode: found, .. } if found == mode));
        assert!(err.to_string().contains("chmod 600"), "{err}");
    }
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o400)).unwrap();
    assert!(KeyFile::load(&path).is_ok());
    // No advice to close what is no key file: others may need it.
    let err = KeyFile::load(std::path::Path::new("/etc/passwd")).unwrap_err().to_string();
    assert!(err.contains("no key file") && !err.contains("chmod"), "{err}");
}

#[test]
fn a_key_file_is_never_overwritten_nor_written_through_a_link() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("k");
    keys().reader.save(&path).unwrap();
    let before = std::fs::read(&path).unwrap();
    assert!(matches!(keys().writer.save(&path), Err(KeyFileError::Exists { .. })));
    assert_eq!(std::fs::read(&path).unwrap(), before);
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(dir.path().join("elsewhere"), &link).unwrap();
    assert!(matches!(keys().writer.save(&link), Err(KeyFileError::Exists { .. })));
    assert!(!dir.path().join("elsewhere").exists());
}

#[test]
fn what_is_no_file_or_far_too_large_is_refused_without_reading_it() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    assert!(std::process::Command::new("mkfifo").arg("-m600").arg(&fifo).status().unwrap().success());
    assert!(matches!(KeyFile::load(&fifo), Err(KeyFileError::Damaged { .. })));
    let large = dir.path().join("large");
    File::create(&large).unwrap().set_len(1 << 40).unwrap();
    std::fs::set_permissions(&large, std::fs::Permissions::from_mode(0o600)).unwrap();
    assert!(matches!(KeyFile::load(&large), Err(KeyFileError::Damaged { .. })));
    assert!(matches!(KeyFile::load(&dir.path().join("none")), Err(KeyFileError::Io { .. })));
}

#[test]
fn debug_shows_no_secret() {
    let keys = keys();
    let shown = format!("{:?} {:?} {:?}", keys.writer, keys.steward, keys.writer.volume_key);
    for secret in [[0xab; 32], [0xcd; 32], [0xef; 32]] {
        assert!(!shown.contains(&hex(&secret[..4])) && !shown.contains(&format!("{}", secret[0])), "{shown}");
    }
}

#[test]
fn names_are_bounded_and_printable() {
    assert!(check_name("Land register").is_ok());
    assert!(check_name("").is_err());
    assert!(check_name(&"n".repeat(NAME_LEN_MAX + 1)).is_err());
    assert!(check_name("a\nb").is_err());
}
