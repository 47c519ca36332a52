//! Tests of the superblock: every field is protected, and a passphrase opens it.

use super::*;
use crate::clock::Env;
use crate::crypto::keyfile::KeySet;
use crate::crypto::slots::{Argon2Params, wrap_passphrase};
use serde_json::Value;

const FAST: Argon2Params = Argon2Params { m_cost_kib: 32, t_cost: 1, p_cost: 1 };

fn keys() -> KeySet {
    let secret = |n| SecretKey::from_bytes(&[n; 32]);
    KeySet::assemble(VolumeId([7; 16]), "land", VolumeKey::from_bytes([1; 32]), secret(2), secret(3))
}

fn superblock(keys: &KeySet, passphrase: Option<&[u8]>) -> Superblock {
    let writer = &keys.writer;
    let key = writer.volume_key().unwrap();
    let slot = passphrase.map(|p| wrap_passphrase(&Env::system(), &writer.volume, 1, key, p, FAST).unwrap());
    Superblock {
        volume: writer.volume,
        name: writer.name.clone(),
        key_id: 1,
        writer_public: writer.writer_public,
        steward_public: writer.steward_public,
        slots: slot.into_iter().collect(),
        created: Timestamp { secs: 1_500_000_000, nanos: 123 },
        parameters: Parameters::default(),
    }
}

fn encode(keys: &KeySet, superblock: &Superblock) -> Vec<u8> {
    superblock.encode(keys.writer.volume_key().unwrap(), keys.writer.signing_key().unwrap()).unwrap()
}

fn verify(bytes: &[u8], key: &KeyFile) -> Result<Superblock> {
    UnverifiedSuperblock::parse(bytes)?.verify(key)
}

/// The file with `change` made to its signed part, authenticated by `key` and `writer` if given, else with the
/// codes it had.
fn forge(bytes: &[u8], change: impl FnOnce(&mut Value), by: Option<(&VolumeKey, &SecretKey)>) -> Vec<u8> {
    let (signed, mut tag, mut signature) = split(bytes).unwrap();
    let mut value: Value = serde_json::from_slice(signed).unwrap();
    change(&mut value);
    let signed = serde_json::to_vec_pretty(&value).unwrap();
    if let Some((key, writer)) = by {
        tag = tag_key(key, &VolumeId([7; 16])).mac(&signed);
        signature = writer.sign(&signature_message(&signed, &tag));
    }
    [OPENING.as_bytes(), &signed, tail(&tag, &signature).as_bytes()].concat()
}

#[test]
fn every_role_verifies_what_was_encoded() {
    let keys = keys();
    let superblock = superblock(&keys, Some(b"p"));
    let bytes = encode(&keys, &superblock);
    for key in [&keys.writer, &keys.reader, &keys.auditor] {
        assert_eq!(verify(&bytes, key).unwrap(), superblock, "{}", key.role);
    }
}

#[test]
fn the_file_is_plain_json_that_people_can_read() {
    let keys = keys();
    let bytes = encode(&keys, &superblock(&keys, Some(b"p")));
    let value: Value = serde_json::from_slice(&bytes).unwrap();
    assert_eq!(value["superblock"]["name"], "land");
    assert_eq!(value["superblock"]["created"]["time"], "2017-07-14T02:40:00.000000123Z");
    assert_eq!(value["superblock"]["parameters"]["segment_size"], 16 << 20);
    assert_eq!(value["superblock"]["slots"][0]["kind"], "passphrase-argon2id");
    let text = String::from_utf8(bytes).unwrap();
    assert!(!text.contains(&"01".repeat(32)) && !text.contains(&"02".repeat(32)), "holds a secret");
}

#[test]
fn every_altered_byte_is_refused_for_every_role() {
    let keys = keys();
    let bytes = encode(&keys, &superblock(&keys, Some(b"p")));
    for key in [&keys.reader, &keys.auditor] {
        for i in 0..bytes.len() {
            for flip in [1, 0x20, 0x80] {
                let mut bent = bytes.clone();
                bent[i] ^= flip;
                assert!(verify(&bent, key).is_err(), "byte {i} flipped by {flip} passed as {}", key.role);
            }
        }
        for len in 0..bytes.len() {
            assert!(verify(&bytes[..len], key).is_err(), "cut to {len}");
        }
        assert!(verify(&[&bytes[..], b"\n"].concat(), key).is_err());
    }
}

#[test]
fn every_altered_field_is_refused_for_every_role() {
    let keys = keys();
    let bytes = encode(&keys, &superblock(&keys, Some(b"p")));
    let fields: &[(&str, Value)] = &[
        ("/format", 2.into()),
        ("/volume", hex(&[8; 16]).into()),
        ("/name", "sea".into()),
        ("/suite", "aes-128-gcm".into()),
        ("/required_features", vec!["packs"].into()),
        ("/key_id", 2.into()),
        ("/writer_public", hex(&keys.writer.steward_public.to_bytes()).into()),
        ("/steward_public", hex(&keys.writer.writer_public.to_bytes()).into()),
        ("/created/time", "2018-07-14T02:40:00Z".into()),
        ("/created/secs", 0.into()),
        ("/created/nanos", 0.into()),
        ("/parameters/record_size", 65536.into()),
        ("/parameters/segment_size", (1 << 20).into()),
        ("/parameters/page_size", 4096.into()),
        ("/slots/0/kind", "x25519".into()),
        ("/slots/0/m_cost_kib", 64.into()),
        ("/slots/0/t_cost", 2.into()),
        ("/slots/0/p_cost", 2.into()),
        ("/slots/0/salt", hex(&[0; 16]).into()),
        ("/slots/0/wrapped", hex(&[0; 48]).into()),
        ("/slots", Value::Array(Vec::new())),
    ];
    for (field, other) in fields {
        let bent = forge(&bytes, |value| *value.pointer_mut(field).unwrap() = other.clone(), None);
        for key in [&keys.writer, &keys.auditor] {
            assert!(verify(&bent, key).is_err(), "{field} altered passed as {}", key.role);
        }
    }
    let same = forge(&bytes, |_| (), None);
    assert!(verify(&same, &keys.writer).is_err(), "other order and white space are another text");
}

#[test]
fn a_superblock_of_other_keys_is_refused_with_what_differs() {
    let keys = keys();
    let bytes = encode(&keys, &superblock(&keys, None));
    let message = |key: &KeyFile| verify(&bytes, key).unwrap_err().to_string();
    let other = KeyFile { volume: VolumeId([8; 16]), ..keys.reader.clone() };
    assert!(message(&other).contains("the key file is of volume 0808"), "{}", message(&other));
    let public = SecretKey::from_bytes(&[9; 32]).public();
    let other = KeyFile { writer_public: public, ..keys.auditor.clone() };
    assert!(message(&other).contains("another writer key"), "{}", message(&other));
    let other = KeyFile { steward_public: public, ..keys.auditor.clone() };
    assert!(message(&other).contains("another steward key"), "{}", message(&other));
    let other = KeyFile { key_id: 2, ..keys.reader.clone() };
    assert!(message(&other).contains("key 2"), "{}", message(&other));
    let other = KeyFile { volume_key: Some(VolumeKey::from_bytes([9; 32])), ..keys.reader.clone() };
    assert!(message(&other).contains("tag does not fit"), "{}", message(&other));
}

#[test]
fn neither_the_volume_key_nor_the_writers_key_alone_makes_a_superblock() {
    let keys = keys();
    let bytes = encode(&keys, &superblock(&keys, None));
    let (key, writer) = (keys.writer.volume_key().unwrap(), keys.writer.signing_key().unwrap());
    let rename = |value: &mut Value| value["name"] = "sea".into();
    let whole = forge(&bytes, rename, Some((key, writer)));
    assert_eq!(verify(&whole, &keys.reader).unwrap().name, "sea", "the forgery itself is well made");
    let by_a_reader = forge(&bytes, rename, Some((key, &keys.steward.signing)));
    assert!(verify(&by_a_reader, &keys.reader).is_err());
    assert!(verify(&by_a_reader, &keys.auditor).is_err());
    let without_volume_key = forge(&bytes, rename, Some((&VolumeKey::from_bytes([9; 32]), writer)));
    assert!(verify(&without_volume_key, &keys.reader).is_err());
}

#[test]
fn what_is_not_known_is_refused_with_its_name_and_the_way_out() {
    let keys = keys();
    let bytes = encode(&keys, &superblock(&keys, None));
    let by = Some((keys.writer.volume_key().unwrap(), keys.writer.signing_key().unwrap()));
    for (field, value, word) in [
        ("format", Value::from(2), "format version 2"),
        ("suite", "xchacha20".into(), "xchacha20"),
        ("required_features", vec!["packs"].into(), "\"packs\""),
    ] {
        let message = verify(&forge(&bytes, |v| v[field] = value, by), &keys.writer).unwrap_err().to_string();
        assert!(message.starts_with("volume.json: "), "{message}");
        assert!(message.contains(word) && message.contains("newer"), "{message}");
    }
    let future = b"{\"superblock\": {\"format\": 3, \"cbor\": true}, \"quantum\": []}";
    assert!(verify(future, &keys.writer).unwrap_err().to_string().contains("format version 3"));
}

#[test]
fn signed_values_out_of_bounds_are_refused() {
    let keys = keys();
    let bytes = encode(&keys, &superblock(&keys, None));
    let by = Some((keys.writer.volume_key().unwrap(), keys.writer.signing_key().unwrap()));
    for (field, value) in [
        ("/parameters/record_size", Value::from(2048)),
        ("/parameters/record_size", 131_073.into()),
        ("/parameters/record_size", (2 << 20).into()),
        ("/parameters/segment_size", ((1 << 20) - 1).into()),
        ("/parameters/segment_size", ((256 << 20) + 1).into()),
        ("/parameters/page_size", 4095.into()),
        ("/parameters/page_size", ((128 << 10) + 1).into()),
        ("/parameters/page_size", (-1).into()),
        ("/created/nanos", 1_000_000_000.into()),
        ("/name", "".into()),
        ("/slots", vec![serde_json::json!({"kind": "x"}); SLOTS_MAX + 1].into()),
    ] {
        let bent = forge(&bytes, |v| *v.pointer_mut(field).unwrap() = value.clone(), by);
        let error = verify(&bent, &keys.writer).expect_err(field);
        assert!(matches!(error, Error::Corrupt { .. }), "{field} {value}: {error}");
    }
    let parameters = Parameters { record_size: 1 << 20, segment_size: 1 << 20, ..Parameters::default() };
    assert!(parameters.check().is_err(), "a segment must hold some records");
}

#[test]
fn optional_additions_of_a_later_program_are_passed_over() {
    let keys = keys();
    let bytes = encode(&keys, &superblock(&keys, None));
    let by = Some((keys.writer.volume_key().unwrap(), keys.writer.signing_key().unwrap()));
    let added = forge(&bytes, |v| v["contact"] = "registry office".into(), by);
    assert!(verify(&added, &keys.writer).is_ok());
}

#[test]
fn a_reformatted_file_is_refused_with_a_hint() {
    let keys = keys();
    let bytes = encode(&keys, &superblock(&keys, None));
    let value: Value = serde_json::from_slice(&bytes).unwrap();
    let message = verify(&serde_json::to_vec(&value).unwrap(), &keys.writer).unwrap_err().to_string();
    assert!(message.contains("exact copy"), "{message}");
    for junk in [&b""[..], b"{}", b"[]", b"\xff\xfe", b"{\"superblock\": 1}", &[b'['; 100_000]] {
        assert!(matches!(verify(junk, &keys.writer), Err(Error::Corrupt { .. })));
    }
}

#[test]
fn a_passphrase_recovers_a_readers_key_file() {
    let keys = keys();
    let superblock = superblock(&keys, Some(b"correct horse"));
    let bytes = encode(&keys, &superblock);
    let (found, key) = open_with_passphrase(&bytes, b"correct horse").unwrap();
    assert_eq!(found, superblock);
    assert_eq!((key.role, key.volume, key.key_id), (Role::Reader, keys.reader.volume, 1));
    assert_eq!(key.volume_key().unwrap().expose(), keys.reader.volume_key().unwrap().expose());
    assert!(key.signing_key().is_err());
    assert_eq!(verify(&bytes, &key).unwrap(), superblock);

    let message = open_with_passphrase(&bytes, b"battery staple").unwrap_err().to_string();
    assert!(message.contains("passphrase"), "{message}");
    let message = open_with_passphrase(&encode(&keys, &self::superblock(&keys, None)), b"p").unwrap_err();
    assert!(message.to_string().contains("no passphrase slot (it has: none)"), "{message}");
}

#[test]
fn a_passphrase_does_not_open_an_altered_superblock() {
    let keys = keys();
    let bytes = encode(&keys, &superblock(&keys, Some(b"p")));
    let stranger = SecretKey::from_bytes(&[9; 32]);
    let usurp = |v: &mut Value| v["writer_public"] = hex(&stranger.public().to_bytes()).into();
    let forged = forge(&bytes, usurp, Some((&VolumeKey::from_bytes([9; 32]), &stranger)));
    let message = open_with_passphrase(&forged, b"p").unwrap_err().to_string();
    assert!(message.contains("tag does not fit"), "{message}");
}

#[test]
fn an_unknown_slot_does_not_hinder_the_known_ones() {
    let keys = keys();
    let mut superblock = superblock(&keys, Some(b"p"));
    let future: Slot = serde_json::from_str("{\"kind\":\"shares\",\"k\":3}").unwrap();
    superblock.slots.insert(0, future);
    let bytes = encode(&keys, &superblock);
    assert_eq!(open_with_passphrase(&bytes, b"p").unwrap().0.slots, superblock.slots);
}
