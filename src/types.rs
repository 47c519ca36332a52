//! The vocabulary every layer shares: numbers that must not be mixed up, and the time stamp.
//! Invariant: nothing here does I/O, and every identifier prints so that names sort like numbers.

use std::fmt;
use std::ops::Range;

/// Number of a segment in the chain, from 1.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Seq(pub u64);

/// Reign of one writer, from 1; a promotion raises it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct Epoch(pub u32);

/// Number of a commit (one atomic step of the whole tree), from 1, never reused within a volume.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct CommitNo(pub u64);

/// Inode number; also the kernel's node id. 64-bit, never reused.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Ino(pub u64);

impl Ino {
    /// The root directory, as the kernel fixes it.
    pub const ROOT: Ino = Ino(1);
}

/// Random identity of a volume, drawn at `init`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct VolumeId(pub [u8; 16]);

/// BLAKE3 hash, 32 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Hash(pub [u8; 32]);

/// Where a sealed frame lies: segment, byte offset in it, sealed length in bytes (prefix and tag included).
/// It never changes meaning; 16 bytes in the formats.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FramePtr {
    /// Segment that holds the frame.
    pub seq: Seq,
    /// Offset of the frame's first byte in the segment.
    pub offset: u32,
    /// Length of the whole frame, in bytes.
    pub len: u32,
}

impl FramePtr {
    /// The bytes of the segment that the frame occupies.
    pub fn range(&self) -> Range<u64> {
        let start = u64::from(self.offset);
        start..start + u64::from(self.len)
    }
}

/// What a frame holds. The numbers are those of the format.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u8)]
pub enum FrameKind {
    /// File bytes.
    Data = 1,
    /// A page of the tree.
    Page = 2,
    /// The changed keys of one commit (or a part of them).
    Delta = 3,
    /// A tree root as of a commit.
    Root = 4,
    /// A statement about the log itself: epoch begin or end, heartbeat.
    Mark = 5,
    /// The index of a closed segment.
    Index = 6,
}

impl FrameKind {
    /// The kind with this number in the format, if there is one.
    pub fn from_u8(n: u8) -> Option<FrameKind> {
        use FrameKind::*;
        [Data, Page, Delta, Root, Mark, Index].into_iter().find(|k| *k as u8 == n)
    }
}

/// The newest closed segment somebody has seen: its number and the hash of its trailer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Head {
    /// Segment number.
    pub seq: Seq,
    /// BLAKE3 of the segment's trailer.
    pub hash: Hash,
}

/// Seconds and nanoseconds since 1970 UTC; `nanos` < 1e9 also before 1970 (time = secs + nanos / 1e9).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Debug)]
pub struct Timestamp {
    /// Whole seconds, negative before 1970.
    pub secs: i64,
    /// Nanoseconds within the second.
    pub nanos: u32,
}

impl fmt::Display for Seq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for Seq {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Seq({})", self.0)
    }
}

impl fmt::Debug for FramePtr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{}:{}", self.seq, self.offset, self.len)
    }
}

/// Lower-case hexadecimal of `bytes`.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// The bytes that `text` spells in hexadecimal; `None` unless it is exactly `N` bytes of it.
pub fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let text = text.as_bytes();
    if text.len() != 2 * N {
        return None;
    }
    let mut out = [0; N];
    for (byte, pair) in out.iter_mut().zip(text.chunks(2)) {
        let digits = std::str::from_utf8(pair).ok()?;
        if !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        *byte = u8::from_str_radix(digits, 16).ok()?;
    }
    Some(out)
}

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VolumeId({self})")
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Hash({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_round_trips_and_refuses_other_text() {
        assert_eq!(unhex::<3>(&hex(&[0, 171, 255])), Some([0, 171, 255]));
        assert_eq!(unhex::<2>("+1ab"), None);
        assert_eq!(unhex::<2>("abc"), None);
    }
}
