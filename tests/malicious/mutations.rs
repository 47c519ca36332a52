//! Volumes that were honest until a few things in them were changed at random: by its seed, the same each time.
//! Invariant: every seed gives a volume that authenticates.

use crate::evil::{Evil, State};
use embassyfs::tree::Value;
use embassyfs::tree::key;
use embassyfs::types::Ino;

/// xorshift64*.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() >> 33) as usize % n
    }

    /// Numbers at which something may break.
    fn number(&mut self) -> u64 {
        let bases = [0, 1, 2, 3, 7, 255, 4096, 1 << 17, 1 << 31, 1 << 32, i64::MAX as u64, 1 << 63, u64::MAX];
        bases[self.below(bases.len())].wrapping_add(self.below(3) as u64).wrapping_sub(1)
    }
}

pub fn of_seed(seed: u64) -> Evil {
    let mut rng = Rng((seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut state = Evil::honest();
    for _ in 0..1 + rng.below(3) {
        change(&mut rng, &mut state);
    }
    match rng.below(3) {
        0 => Evil::replayed(state),
        1 => Evil::in_pages(state),
        _ => {
            let victim = rng.below(4);
            Evil::in_pages_but(state, |number, page| {
                let mut page = page.to_vec();
                if number == victim {
                    for _ in 0..1 + rng.below(3) {
                        bend(&mut rng, &mut page);
                    }
                }
                page
            })
        }
    }
}

fn change(rng: &mut Rng, state: &mut State) {
    let keys: Vec<Vec<u8>> = state.changes.keys().cloned().collect();
    let at = keys[rng.below(keys.len())].clone();
    let other = keys[rng.below(keys.len())].clone();
    match rng.below(8) {
        0..=3 => {
            let mut value = state.changes[&at].as_ref().map_or(Vec::new(), |value| value.to_vec());
            bend(rng, &mut value);
            state.changes.insert(at, Some(Value::from(value)));
        }
        4 => {
            let value = state.changes[&other].clone();
            state.changes.insert(at, value);
        }
        5 => {
            let value = state.changes.remove(&at).flatten();
            let mut key = at;
            bend(rng, &mut key);
            key.truncate(60_000);
            key.push(0);
            state.changes.insert(key, Some(value.unwrap_or_else(|| Value::from(&b""[..]))));
        }
        6 => {
            let ino = Ino([1, 2, 3, rng.number()][rng.below(4)]);
            state.put(key::orphan(ino), embassyfs::tree::value::encode_orphan());
        }
        _ => {
            let number = rng.number();
            match rng.below(3) {
                0 => state.counters.next_ino = number,
                1 => state.counters.live_bytes = number,
                _ => state.counters.inodes = number,
            }
        }
    }
}

fn bend(rng: &mut Rng, bytes: &mut Vec<u8>) {
    if bytes.is_empty() {
        return bytes.push(rng.below(256) as u8);
    }
    let at = rng.below(bytes.len());
    match rng.below(5) {
        0 => bytes[at] ^= 1 << rng.below(8),
        1 => bytes.truncate(at),
        2 => bytes.extend_from_slice(&rng.number().to_le_bytes()),
        _ => {
            // The fields of values lie at multiples of two; half of all changes take the place of one.
            let at = at & !1;
            let number = rng.number().to_le_bytes();
            let len = [1, 2, 4, 8][rng.below(4)].min(bytes.len() - at);
            bytes[at..at + len].copy_from_slice(&number[..len]);
        }
    }
}
