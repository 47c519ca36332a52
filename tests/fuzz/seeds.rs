//! The first inputs: the golden fixtures of the formats, and small things made with the program's own encoders.
//! Invariant: they are the same in each run, one file for each, in a directory for each target.

use embassyfs::types::{CommitNo, hex};
use embassyfs::tree::checkpoint;
use std::path::Path;

/// A golden file of format version 1.
pub fn fixture(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/v1").join(name);
    std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The golden bytes of the tree, by name.
pub fn tree_fixtures() -> Vec<(String, Vec<u8>)> {
    let text = String::from_utf8(fixture("tree.txt")).expect("text");
    let bytes = |digits: &str| {
        let pair = |i| u8::from_str_radix(&digits[i..i + 2], 16).expect("hexadecimal");
        (0..digits.len()).step_by(2).map(pair).collect()
    };
    text.lines().filter_map(|line| line.split_once(' ')).map(|(name, hex)| (name.into(), bytes(hex))).collect()
}

/// Header and root record of a checkpoint of commit 1 as the target wants them: not sealed yet.
pub fn checkpoint_plain(root: &[u8]) -> Vec<u8> {
    let mut root = root.to_vec();
    root[2..10].copy_from_slice(&1u64.to_le_bytes());
    let ctx = crate::forge::volume();
    [b"EmbFSckp\x01", &ctx.id.0[..], &1u64.to_le_bytes(), &7u32.to_le_bytes(), &[3; 32], &root].concat()
}

/// Writes them all.
pub fn write(dir: &Path) {
    let mut put = |target: &str, bytes: &[u8]| {
        let dir = dir.join(target);
        std::fs::create_dir_all(&dir).expect("a directory for seeds");
        let name = hex(&embassyfs::crypto::hash(bytes).0[..8]);
        std::fs::write(dir.join(name), bytes).expect("a seed");
    };
    crate::log::seeds(&mut put);
    crate::tree::seeds(&mut put);
    crate::text::seeds(&mut put);
    put("checkpoint", checkpoint::name(CommitNo(1)).as_bytes());
}
