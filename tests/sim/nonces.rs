//! Watches that nothing is sealed twice under one nonce.
//! Invariant: a segment's key comes from its header, which has a salt; so each file has a salt of its own, and under one
//! salt every byte behind the header has one value for ever. Only the index may be sealed again at its place: it has a salt
//! of its own in front (`docs/format.md`).

use embassyfs::log::segment::HEADER_LEN;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// Where the salt lies in a header.
const SALT: std::ops::Range<usize> = 48..80;
/// Kind of a frame: the fifth byte of its prefix.
const INDEX_KIND: u8 = 6;

/// See the module. Shared by all disks of a run.
#[derive(Clone, Default)]
pub struct Nonces(Arc<Mutex<BTreeMap<Vec<u8>, Sealed>>>);

#[derive(Default)]
struct Sealed {
    node: u64,
    /// Bytes ever written at each place behind the header; `None`: never.
    bytes: Vec<Option<u8>>,
}

impl Nonces {
    /// `taken` is written at `offset` of the file `node` of the log, which holds `before`.
    pub fn written(&self, node: u64, before: &[u8], offset: u64, taken: &[u8]) {
        let mut whole = before.to_vec();
        let end = offset as usize + taken.len();
        whole.resize(whole.len().max(end), 0);
        whole[offset as usize..end].copy_from_slice(taken);
        if whole.len() < HEADER_LEN {
            return; // a header in pieces is looked at when it is whole
        }
        let mut all = self.0.lock().unwrap();
        let salt = whole[SALT].to_vec();
        let sealed = all.entry(salt).or_insert_with(|| Sealed { node, bytes: Vec::new() });
        assert_eq!(sealed.node, node, "two files of the log have one salt");
        let mut at = HEADER_LEN;
        let ends = |at: usize| at + PREFIX <= whole.len();
        while ends(at) {
            let (kind, len) = prefix(&whole[at..]);
            // No kind: zeros that were laid out, perhaps behind the first bytes of an index.
            if kind == INDEX_KIND || kind == 0 || len == 0 {
                break;
            }
            let stop = (at + len).min(whole.len());
            let touched = (offset as usize) < stop && at < end;
            if touched {
                sealed.seal(at, &whole[at..stop], offset as usize..end);
            }
            at += len;
        }
    }
}

const PREFIX: usize = 8;

/// Kind and length of the frame that begins here.
fn prefix(bytes: &[u8]) -> (u8, usize) {
    let len = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    (bytes[4], len as usize)
}

impl Sealed {
    /// The frame `frame` lies at `at`; those of its bytes that lie in `written` are new.
    fn seal(&mut self, at: usize, frame: &[u8], written: std::ops::Range<usize>) {
        if self.bytes.len() < at + frame.len() {
            self.bytes.resize(at + frame.len(), None);
        }
        for (i, byte) in frame.iter().enumerate().filter(|(i, _)| written.contains(&(at + i))) {
            let held = &mut self.bytes[at + i];
            assert!(held.is_none_or(|held| held == *byte), "byte {} of a segment was sealed twice", at + i);
            *held = Some(*byte);
        }
    }
}
