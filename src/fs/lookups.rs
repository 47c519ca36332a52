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
}
