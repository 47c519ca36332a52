//! How often the kernel holds each inode (FUSE `nlookup`).
//! Invariant: a count is what the replies have handed out less what FORGET gave back; one byte an inode, because
//! inode numbers are dense and nearly every count is one.

use crate::types::Ino;
use std::collections::HashMap;

const BLOCK: u64 = 4096;

/// Counts per inode; inodes never looked up cost nothing.
#[derive(Default)]
pub struct Lookups {
    blocks: HashMap<u64, Box<[u8; BLOCK as usize]>>,
    /// What exceeds 255.
    overflow: HashMap<Ino, u64>,
}

impl Lookups {
    /// One more reference was handed to the kernel.
    pub fn add(&mut self, ino: Ino) {
        let cell = self.cell(ino);
        if *cell == u8::MAX {
            *self.overflow.entry(ino).or_default() += 1;
        } else {
            *cell += 1;
        }
    }

    /// The kernel gave back `n`; true when it holds none any more.
    pub fn forget(&mut self, ino: Ino, n: u64) -> bool {
        let mut n = n;
        if let Some(more) = self.overflow.get_mut(&ino) {
            let taken = n.min(*more);
            *more -= taken;
            n -= taken;
            if *more == 0 {
                self.overflow.remove(&ino);
            }
        }
        let cell = self.cell(ino);
        *cell = cell.saturating_sub(n.min(255) as u8);
        *cell == 0
    }

    /// True when the kernel holds the inode.
    pub fn holds(&self, ino: Ino) -> bool {
        self.blocks.get(&(ino.0 / BLOCK)).is_some_and(|b| b[(ino.0 % BLOCK) as usize] > 0)
    }

    /// All inodes that the kernel holds, in order.
    pub fn held(&self) -> Vec<Ino> {
        let mut held = Vec::new();
        for (number, block) in &self.blocks {
            let cells = block.iter().zip(number * BLOCK..).filter(|(count, _)| **count > 0);
            held.extend(cells.map(|(_, ino)| Ino(ino)));
        }
        held.sort_unstable();
        held
    }

    /// All counts, for another process. Block by block: its number, and a byte for each inode; then, behind a number that
    /// no block has, inodes and what exceeds their bytes. Integers are little-endian.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for (number, block) in self.blocks.iter().filter(|(_, block)| block.iter().any(|count| *count > 0)) {
            out.extend(number.to_le_bytes());
            out.extend_from_slice(&block[..]);
        }
        out.extend(u64::MAX.to_le_bytes());
        for (ino, more) in &self.overflow {
            out.extend(ino.0.to_le_bytes());
            out.extend(more.to_le_bytes());
        }
        out
    }

    /// What [`Lookups::encode`] gave.
    pub fn decode(mut bytes: &[u8]) -> Option<Lookups> {
        fn number(bytes: &mut &[u8]) -> Option<u64> {
            let (first, rest) = bytes.split_first_chunk()?;
            *bytes = rest;
            Some(u64::from_le_bytes(*first))
        }
        let mut lookups = Lookups::default();
        loop {
            let number = number(&mut bytes)?;
            if number == u64::MAX {
                break;
            }
            let (block, rest) = bytes.split_first_chunk::<{ BLOCK as usize }>()?;
            lookups.blocks.insert(number, Box::new(*block));
            bytes = rest;
        }
        while !bytes.is_empty() {
            let ino = Ino(number(&mut bytes)?);
            lookups.overflow.insert(ino, number(&mut bytes)?);
        }
        Some(lookups)
    }

    fn cell(&mut self, ino: Ino) -> &mut u8 {
        let block = self.blocks.entry(ino.0 / BLOCK).or_insert_with(|| Box::new([0; BLOCK as usize]));
        &mut block[(ino.0 % BLOCK) as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_beyond_a_byte_are_kept() {
        let mut lookups = Lookups::default();
        let ino = Ino(70_000);
        for _ in 0..300 {
            lookups.add(ino);
        }
        assert!(!lookups.forget(ino, 299));
        assert!(lookups.holds(ino));
        assert!(lookups.forget(ino, 1));
        assert!(!lookups.holds(ino));
    }

    #[test]
    fn counts_survive_the_way_to_another_process() {
        let mut lookups = Lookups::default();
        for (ino, n) in [(1, 1), (4095, 3), (4096, 255), (70_000, 300)] {
            (0..n).for_each(|_| lookups.add(Ino(ino)));
        }
        let bytes = lookups.encode();
        let mut there = Lookups::decode(&bytes).expect("understood");
        assert!(!there.holds(Ino(2)) && !there.forget(Ino(4095), 2) && there.forget(Ino(4095), 1));
        assert!(!there.forget(Ino(70_000), 299) && there.forget(Ino(70_000), 1));
        assert!(Lookups::decode(&bytes[..bytes.len() - 1]).is_none() && Lookups::decode(b"").is_none());
    }
}
