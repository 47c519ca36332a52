//! The core without a kernel against a plain model: random steps on both, their answers and the whole tree compared.
//! Invariant: what `model/reference.rs` and `model/contents.rs` say is the specification; a difference is a bug in one
//! of the two, and the step that first shows it is told.
//!
//! | file | room for |
//! |---|---|
//! | `model/reference.rs`, `contents.rs`, `sparse.rs` | the model |
//! | `model/ops.rs` | the steps, and how they are drawn |
//! | `model/run.rs` | a step on both sides |
//! | `model/compare.rs` | a whole volume against the model |
//! | `model/host.rs` | home, its ends, the embassy, the clock |
//!
//! A failure prints seed, step, the last steps and what differs. Again:
//!
//! ```text
//! EMBASSYFS_MODEL_SEED=N    cargo test --release --test model one_seed -- --nocapture
//! EMBASSYFS_MODEL_SECONDS=N cargo test --release --test model soak -- --nocapture     fresh seeds for that long
//! ```
//!
//! The seed gives the steps; when the committer works beside them is the machine's choice, so a difference that needs
//! a commit at one moment may want several runs (`EMBASSYFS_MODEL_STEPS=N` sets the length of one).
#![allow(clippy::unwrap_used)]

mod common;
#[path = "model/compare.rs"]
mod compare;
#[path = "model/contents.rs"]
mod contents;
#[path = "model/host.rs"]
mod host;
#[path = "model/ops.rs"]
mod ops;
#[path = "model/reference.rs"]
mod reference;
#[path = "model/rng.rs"]
mod rng;
#[path = "model/run.rs"]
mod run;
#[path = "model/sparse.rs"]
mod sparse;

use embassyfs::clock::Env;
use run::{Counts, Run};
use std::time::Duration;

/// Sizes and taste of a run come from its seed: small sizes for most.
fn run(seed: u64, steps: u64) -> Counts {
    let (sizes, floods) = match seed % 6 {
        0 => (host::usual(), false),
        1 => (host::FLOODED, true),
        _ => (host::SMALL, false),
    };
    let clock = Env::system().clock;
    let begun = clock.monotonic();
    println!("seed {seed} begins"); // a run that hangs tells nothing later
    let counts = Run::new(seed, sizes, floods).go(steps);
    println!("seed {seed}: {counts:?} in {:?}", clock.monotonic() - begun);
    counts
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is no number")))
}

fn steps() -> u64 {
    number("EMBASSYFS_MODEL_STEPS").unwrap_or(2500)
}

#[test]
fn one_seed() {
    run(number("EMBASSYFS_MODEL_SEED").unwrap_or(1), steps());
}

#[test]
fn soak() {
    let Some(seconds) = number("EMBASSYFS_MODEL_SECONDS") else { return };
    let clock = Env::system().clock;
    let end = clock.monotonic() + Duration::from_secs(seconds);
    while clock.monotonic() < end {
        run(u64::from_le_bytes(Env::system().random_bytes()) >> 16, steps());
    }
}
