//! Targets for what is text, or comes from the kernel or the state directory: superblock, key files, configuration,
//! the control channel, access control lists, what a state directory holds beside the log.
//! Invariant: as in `fuzz.rs`.

use embassyfs::cli::config::Config;
use embassyfs::cli::options::{self, MountOptions};
use embassyfs::crypto::keyfile::{KeyFile, StewardKeyFile};
use embassyfs::crypto::keys::Purpose;
use embassyfs::crypto::sign::SecretKey;
use embassyfs::log::volume::UnverifiedSuperblock;
use embassyfs::ops::control::Request;
use embassyfs::types::hex;
use std::collections::BTreeMap;
use std::path::Path;

/// The bytes as they came, and the same as the signed part of a file whose tag and signature hold.
pub fn superblock(data: &[u8]) {
    let key = writer_key();
    if let Ok(parsed) = UnverifiedSuperblock::parse(data) {
        let _ = (parsed.volume(), parsed.slot_kinds());
        let _ = parsed.verify(&key);
    }
    let (volume_key, signer) = (key.volume_key.clone().expect("a writer's"), key.signing.clone().expect("a writer's"));
    let tag = volume_key.derive(Purpose::Superblock, &key.volume.0).mac(data);
    let message = [&b"embassyfs v1 superblock signature\0"[..], &tag, data].concat();
    let tail = format!(",\n\"tag\": \"{}\",\n\"signature\": \"{}\"\n}}\n", hex(&tag), hex(&signer.sign(&message)));
    let whole = [b"{\n\"superblock\": ", data, tail.as_bytes()].concat();
    if let Ok(parsed) = UnverifiedSuperblock::parse(&whole)
        && let Ok(superblock) = parsed.verify(&key)
        && let Ok(again) = superblock.encode(&volume_key, &signer)
    {
        let parsed = UnverifiedSuperblock::parse(&again).expect("encoded a moment ago");
        assert_eq!(parsed.verify(&key).expect("the same key"), superblock);
    }
}

fn writer_key() -> KeyFile {
    static TEXT: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
    let text = TEXT.get_or_init(|| crate::seeds::fixture("writer.key"));
    KeyFile::parse(text, "writer.key").expect("a fixture")
}

pub fn keyfile(data: &[u8]) {
    if let Ok(key) = KeyFile::parse(data, "a.key") {
        let public = key.signing.as_ref().map(SecretKey::public);
        assert!(public.is_none_or(|public| public == key.writer_public));
    }
    let _ = StewardKeyFile::parse(data, "a.key");
}

/// A config file; the same as one value of each kind; the same as the address of a store.
pub fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let _ = Config::parse(text, Path::new("/etc/embassyfs/land.toml"));
    let _ = MountOptions::default().apply(text);
    let _ = (options::parse_size(text), options::parse_duration(text), options::parse_at(text));
    let _ = options::parse_pair(text);
    embassyfs::store::fuzz_url(text);
    let _ = BTreeMap::from([options::parse_pair(text).unwrap_or_default()]);
}

pub fn control(data: &[u8]) {
    if let Ok(request) = serde_json::from_slice::<Request>(data) {
        let again = serde_json::to_vec(&request).expect("plain data");
        assert_eq!(serde_json::from_slice::<Request>(&again).expect("encoded a moment ago"), request);
    }
    embassyfs::ops::control::fuzz_reply(data);
}

pub fn acl(data: &[u8]) {
    embassyfs::fs::fuzz_acl(data);
}

/// The index of cached ranges, the pin, the names of segments, the kernel's mount table.
pub fn state(data: &[u8]) {
    embassyfs::cache::ranges::fuzz_entry(data);
    embassyfs::replica::fuzz_pin(data);
    embassyfs::fuse::table::parse(data);
    if let Ok(text) = std::str::from_utf8(data) {
        embassyfs::log::fuzz_name(text);
    }
}

/// Inputs that are good, or nearly.
pub fn seeds(mut put: impl FnMut(&str, &[u8])) {
    let superblock = crate::seeds::fixture("volume.json");
    put("superblock", &superblock);
    put("superblock", &superblock[16..superblock.len() - 223]);
    for name in ["writer.key", "reader.key", "auditor.key", "steward.key"] {
        put("keyfile", &crate::seeds::fixture(name));
    }
    let config = "store = 's3://b/p'\nkey = 'writer.key'\nat = 2025-01-31T12:00:00Z\nread-only = true\n\
                  options = ['ro', 'protection=local,uploads=3']\n[store-option]\nretries = 3\n";
    put("config", config.as_bytes());
    put("config", b"[options]\nallow_other = true\nexec = false\ncache_size = '5G'\n");
    for text in ["ro,noexec,cache_size=10G,size=1T", "1h30m", "@17.5", "s3://bucket/a/b", "file:///srv/x", "a=b"] {
        put("config", text.as_bytes());
    }
    for text in [
        "{\"request\":\"status\"}",
        "{\"request\":\"sync\",\"timeout_ms\":5000}",
        "{\"error\":{\"message\":\"no\",\"status\":null}}",
        "{\"ok\":{\"pid\":7}}",
    ] {
        put("control", text.as_bytes());
    }
    let entry = |tag: u16, perm: u16, id: u32| [&tag.to_le_bytes()[..], &perm.to_le_bytes(), &id.to_le_bytes()].concat();
    let all = [(1, 7, u32::MAX), (2, 6, 10), (4, 5, u32::MAX), (16, 3, u32::MAX), (32, 1, u32::MAX)];
    let list: Vec<u8> = all.iter().flat_map(|(tag, perm, id)| entry(*tag, *perm, *id)).collect();
    put("acl", &[&2u32.to_le_bytes()[..], &list].concat());
    put("state", &[&[1][..], &5u64.to_le_bytes(), &0u64.to_le_bytes(), &96u64.to_le_bytes()].concat());
    put("state", format!("{:016x} {}\n", 7, hex(&[3; 32])).as_bytes());
    put("state", b"36 35 0:32 / /mnt/a\\040b rw,nosuid shared:1 - fuse.embassyfs embassyfs:land rw,user_id=0\n");
    put("state", b"log/000000000000000a");
}
