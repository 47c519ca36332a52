//! The core without a kernel against a plain model: random steps on both, their answers and the whole tree compared.
//! Invariant: what `model/reference.rs` and `model/contents.rs` say is the specification; a difference is a bug in one
//! of the two, and the step that first shows it is told.
//!
//! | file | room for |
//! |---|---|
//! | `model/reference.rs`, `contents.rs`, `sparse.rs` | the model |
//! | `model/ops.rs` | the steps, and how they are drawn |
//! | `model/run.rs` | a step on both sides |
//! | `model/ends.rs` | what home shows, now and after an end |
//! | `model/life.rs` | crashes, restarts, readers |
//! | `model/compare.rs` | a whole volume against the model |
//! | `model/host.rs` | home, its ends, the embassy, the clock |
//!
//! A failure prints seed, step, the last steps and what differs. Again, and for longer:
//!
//! ```text
//! EMBASSYFS_MODEL_SEED=N    cargo test --release --test model other_seeds -- --nocapture   this run alone
//! EMBASSYFS_MODEL_SECONDS=N cargo test --release --test model other_seeds -- --nocapture   fresh seeds for that long
//! EMBASSYFS_MODEL_STEPS=N   the length of each run
//! ```
//!
//! The seed gives the steps. When the committer works beside them is the machine's choice, so a difference that needs a
//! commit at one moment may want several tries. A run that hangs has said `seed N begins`.
#![allow(clippy::unwrap_used)]

mod common;
#[path = "model/compare.rs"]
mod compare;
#[path = "model/contents.rs"]
mod contents;
#[path = "model/ends.rs"]
mod ends;
#[path = "model/host.rs"]
mod host;
#[path = "model/life.rs"]
mod life;
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

use common::{World, create};
use embassyfs::clock::Env;
use embassyfs::log::volume::Parameters;
use embassyfs::types::Ino;
use run::{Counts, Run};
use std::time::Duration;

/// How the runs are asked for.
const NAME: &str = "model";

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

/// Runs `seeds`; what they came to together.
fn run_all(seeds: impl Iterator<Item = u64>) -> Counts {
    seeds.map(|seed| run(seed, steps())).fold(Counts::default(), Counts::plus)
}

/// The same runs each time. They must also have done what they are for.
#[test]
fn named_seeds_with_small_sizes() {
    let counts = run_all((0..48).filter(|seed| seed % 6 > 1));
    println!("{counts:?}");
    for (what, n) in [
        ("refused requests", counts.errors),
        ("commits", counts.commits),
        ("clean restarts", counts.reopened),
        ("crashes that lost something", counts.lost),
        ("readers", counts.readers),
    ] {
        assert!(n >= 10, "only {n} {what} in all runs");
    }
}

#[test]
fn named_seeds_with_usual_sizes_and_with_checkpoints_beside_them() {
    let counts = run_all((0..36).filter(|seed| seed % 6 <= 1));
    println!("{counts:?}");
    assert!(counts.checkpoints > 0, "no checkpoint was made beside a run");
}

/// A seed that was asked for; else fresh ones, for the seconds asked for or a few.
#[test]
fn other_seeds() {
    if let Some(seed) = number("EMBASSYFS_MODEL_SEED") {
        run(seed, steps());
        return;
    }
    let fresh = || u64::from_le_bytes(Env::system().random_bytes()) >> 16;
    let Some(seconds) = number("EMBASSYFS_MODEL_SECONDS") else {
        run_all((0..8).map(|_| fresh()));
        return;
    };
    let clock = Env::system().clock;
    let end = clock.monotonic() + Duration::from_secs(seconds);
    while clock.monotonic() < end {
        run(fresh(), steps());
    }
}

/// Too many names for the runs: they are counted, and the last is refused.
#[test]
fn an_inode_has_at_most_65000_names() {
    let world = World::new(Parameters::default());
    let home = world.home();
    let file = create(&world, &home, Ino::ROOT, "n0", b"x");
    let link = |name: &str| world.run(&home, |fs| fs.link(file, Ino::ROOT, name.as_bytes()));
    for i in 1..65_000 {
        link(&format!("n{i}")).unwrap();
    }
    assert_eq!(link("one more").unwrap_err().errno(), libc::EMLINK);
    assert_eq!(home.fs.getattr(file).unwrap().inode.nlink, 65_000);
    world.run(&home, |fs| fs.unlink(Ino::ROOT, b"n7")).unwrap();
    assert_eq!(link("one more").unwrap().inode.nlink, 65_000);
    home.close(Duration::ZERO);
}

/// The model's own content against an array of bytes, each a hole or data.
#[test]
fn the_model_of_content_equals_an_array() {
    let mut rng = rng::Rng::new(7);
    for _ in 0..300 {
        let mut sparse = sparse::Sparse::default();
        let mut array: Vec<Option<u8>> = Vec::new();
        for step in 0..40u8 {
            let (at, len) = (rng.below(200) as usize, rng.below(60) as usize + 1);
            match rng.below(4) {
                0 => {
                    sparse.punch(at as u64..(at + len) as u64);
                    array.iter_mut().skip(at).take(len).for_each(|byte| *byte = None);
                }
                1 => {
                    sparse.truncate(at as u64);
                    array.resize(at, None);
                }
                _ => {
                    sparse.write(at as u64, vec![step; len].into());
                    array.resize(array.len().max(at + len), None);
                    array[at..at + len].fill(Some(step));
                }
            }
            let from = rng.below(250) as usize;
            let expected: Vec<u8> = array.iter().skip(from).take(50).map(|byte| byte.unwrap_or(0)).collect();
            assert_eq!(sparse.read(from as u64, 50), expected);
            assert_eq!(sparse.data_bytes(), array.iter().flatten().count() as u64);
            let next = |data: bool| {
                let found = (from..array.len()).find(|at| array[*at].is_some() == data);
                found.or((!data && from < array.len()).then_some(array.len())).map(|at| at as u64)
            };
            assert_eq!(sparse.seek(from as u64, true), next(true));
            assert_eq!(sparse.seek(from as u64, false), next(false));
        }
    }
}
