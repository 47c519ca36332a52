//! Reading and writing the fixed-width fields that the tree's formats are made of. Numbers are little endian.
//! Invariant: no input makes a read panic; what is short, long or out of range is [`Error::Corrupt`].

use crate::log::segment::{FRAME_SEALED_MAX, NUMBER_MAX};
use crate::log::{Error, Result};
use crate::types::{FramePtr, Seq, Timestamp};

/// Length of an encoded [`FramePtr`].
pub(super) const PTR_LEN: usize = 16;

/// Takes fields off the front of a byte slice.
pub(super) struct Reader<'a> {
    rest: &'a [u8],
    what: &'a str,
}

impl<'a> Reader<'a> {
    /// A reader of `bytes`, which errors call `what`.
    pub fn new(bytes: &'a [u8], what: &'a str) -> Reader<'a> {
        Reader { rest: bytes, what }
    }

    /// A reader of `bytes` after their first byte, which must be the format version `version`.
    pub fn versioned(bytes: &'a [u8], what: &'a str, version: u8) -> Result<Reader<'a>> {
        let mut reader = Reader::new(bytes, what);
        match reader.u8()? {
            found if found == version => Ok(reader),
            found => Err(reader.bad(format!("format version {found}; this program knows {version}"))),
        }
    }

    /// The error that says `detail` about what is being read.
    pub fn bad(&self, detail: impl ToString) -> Error {
        Error::corrupt(self.what, detail)
    }

    /// The next `n` bytes.
    pub fn take(&mut self, n: usize) -> Result<&'a [u8]> {
        match self.rest.split_at_checked(n) {
            Some((head, rest)) => {
                self.rest = rest;
                Ok(head)
            }
            None => Err(self.bad(format!("ends {} bytes too early", n - self.rest.len()))),
        }
    }

    /// The next `N` bytes.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        match self.rest.split_first_chunk::<N>() {
            Some((head, rest)) => {
                self.rest = rest;
                Ok(*head)
            }
            None => Err(self.bad(format!("ends {} bytes too early", N - self.rest.len()))),
        }
    }

    pub fn u8(&mut self) -> Result<u8> {
        Ok(u8::from_le_bytes(self.array()?))
    }

    pub fn u16(&mut self) -> Result<u16> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub fn ptr(&mut self) -> Result<FramePtr> {
        let ptr = FramePtr { seq: Seq(self.u64()?), offset: self.u32()?, len: self.u32()? };
        // Who reads the frame makes room for it first.
        if ptr.len as usize > FRAME_SEALED_MAX {
            return Err(self.bad(format!("points to a frame of {} bytes", ptr.len)));
        }
        Ok(ptr)
    }

    /// A number that one can count on from: it is not near the end of all numbers.
    pub fn number(&mut self) -> Result<u64> {
        match self.u64()? {
            number if number <= NUMBER_MAX => Ok(number),
            number => Err(self.bad(format!("counts to {number}"))),
        }
    }

    pub fn time(&mut self) -> Result<Timestamp> {
        let time = Timestamp { secs: i64::from_le_bytes(self.array()?), nanos: self.u32()? };
        if time.nanos < 1_000_000_000 { Ok(time) } else { Err(self.bad("a second has too many nanoseconds")) }
    }

    /// How many bytes are left.
    pub fn left(&self) -> usize {
        self.rest.len()
    }

    /// All that is left.
    pub fn rest(self) -> &'a [u8] {
        self.rest
    }

    /// Fails unless everything has been read.
    pub fn finish(&self) -> Result<()> {
        match self.rest.len() {
            0 => Ok(()),
            n => Err(self.bad(format!("{n} bytes too many"))),
        }
    }
}

/// Appends `ptr` to `out`.
pub(super) fn put_ptr(out: &mut Vec<u8>, ptr: FramePtr) {
    out.extend_from_slice(&ptr_bytes(ptr));
}

/// The 16 bytes of `ptr`.
pub(super) fn ptr_bytes(ptr: FramePtr) -> [u8; PTR_LEN] {
    let number = u128::from(ptr.seq.0) | u128::from(ptr.offset) << 64 | u128::from(ptr.len) << 96;
    number.to_le_bytes()
}

/// Appends `time` to `out`.
pub(super) fn put_time(out: &mut Vec<u8>, time: Timestamp) {
    out.extend_from_slice(&time.secs.to_le_bytes());
    out.extend_from_slice(&time.nanos.to_le_bytes());
}
