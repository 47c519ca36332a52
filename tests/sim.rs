//! The whole core under one seed: a disk, a store, threads, time and chance of its own, and all of them do their worst.
//!
//! The steps and the model are those of `tests/model.rs`. What may go wrong stands at the top of `sim/disk.rs` (a disk),
//! `sim/store.rs` (a store); threads stop and go on between any two writes of the log (`sim/threads.rs`).
//!
//! Invariant, looked at after every step and every end of home:
//! - what `fsync` acknowledged at its level is there;
//! - home shows one of its commits, whole, and a reader a commit that home had;
//! - nothing is sealed twice under one nonce, and no two segments of one number are offered to the store;
//! - nothing panics, and nothing waits for ever;
//! - one seed gives the same run, to the byte.
//!
//! ```text
//! EMBASSYFS_SIM_SEED=N    cargo test --release --test sim other_seeds -- --nocapture   this run alone
//! EMBASSYFS_SIM_SECONDS=N cargo test --release --test sim other_seeds -- --nocapture   fresh seeds for that long
//! EMBASSYFS_SIM_STEPS=N   the length of each run
//! EMBASSYFS_SIM_TRACE=1   every event of the run
//! ```
#![allow(clippy::unwrap_used)]

#[path = "sim/chance.rs"]
mod chance;
#[path = "sim/world.rs"]
mod common;
#[path = "model/compare.rs"]
mod compare;
#[path = "model/contents.rs"]
mod contents;
#[path = "sim/cuts.rs"]
mod cuts;
#[path = "sim/disk.rs"]
mod disk;
#[path = "model/ends.rs"]
mod ends;
#[path = "common/forge.rs"]
mod forge;
#[path = "sim/host.rs"]
mod host;
#[path = "sim/life.rs"]
mod life;
#[path = "sim/nonces.rs"]
mod nonces;
#[path = "model/ops.rs"]
mod ops;
#[path = "sim/promotion.rs"]
mod promotion;
#[path = "model/reference.rs"]
mod reference;
#[path = "model/rng.rs"]
mod rng;
#[path = "model/run.rs"]
mod run;
#[path = "model/sparse.rs"]
mod sparse;
#[path = "sim/store.rs"]
mod store;
#[path = "sim/threads.rs"]
mod threads;

use embassyfs::clock::Env;
use embassyfs::fs::Settings;
use embassyfs::log::volume::Parameters;
use embassyfs::replica::durable::Protection;
use host::Sizes;
use run::{Counts, Run};
use std::collections::BTreeMap;
use std::time::Duration;

/// How the runs are asked for.
const NAME: &str = "sim";

/// What a run came to.
#[derive(Default)]
struct Came {
    counts: Counts,
    faults: BTreeMap<&'static str, u64>,
    /// Events, and what they come to.
    trace: (u64, u64),
}

/// Sizes and taste of a run come from its seed.
fn sizes(seed: u64) -> Sizes {
    let protections = [Protection::Local, Protection::Available, Protection::Strict];
    let settings = Settings {
        dirty_max: if seed.is_multiple_of(5) { 8 << 20 } else { 128 << 10 },
        memtable_max: if seed.is_multiple_of(2) { 64 << 10 } else { 1 << 20 },
        replay_max: 2 << 20,
        ..Settings::default()
    };
    // Long records are read in blocks, several at once, and past the cache.
    let record_size = if (seed / 2).is_multiple_of(4) { 128 << 10 } else { 4 << 10 };
    Sizes {
        seed,
        parameters: Parameters { record_size, segment_size: 1 << 20, page_size: 4 << 10 },
        settings,
        disk_cache: if seed.is_multiple_of(7) { 32 << 20 } else { 1 << 20 },
        protection: protections[(seed % 3) as usize],
        rough: [0, 1, 3, 6][(seed / 3 % 4) as usize],
    }
}

fn run(seed: u64, steps: u64) -> Came {
    println!("seed {seed} begins"); // a run that hangs tells nothing later
    let mut run = Run::new(seed, sizes(seed), false);
    let counts = run.go(steps);
    if seed % 2 == 1 {
        run.promotion().unwrap_or_else(|difference| run.tell(&difference));
    }
    let chance = &run.host.world.chance;
    let (faults, trace) = (chance.faults(), chance.trace());
    println!("seed {seed}: {counts:?} {faults:?}, {} events, {:016x}", trace.0, trace.1);
    Came { counts, faults, trace }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is no number")))
}

fn steps() -> u64 {
    number("EMBASSYFS_SIM_STEPS").unwrap_or(1500)
}

fn run_all(seeds: impl Iterator<Item = u64>) -> Came {
    let mut all = Came::default();
    for seed in seeds {
        let came = run(seed, steps());
        all.counts = all.counts.plus(came.counts);
        came.faults.into_iter().for_each(|(kind, n)| *all.faults.entry(kind).or_default() += n);
        all.trace.0 += came.trace.0;
    }
    println!("in all: {:?} {:?}, {} events", all.counts, all.faults, all.trace.0);
    all
}

#[test]
fn one_seed_gives_the_same_run_to_the_byte() {
    for seed in [5, 10, 23, 58] {
        let (first, second) = (run(seed, steps()), run(seed, steps()));
        assert!(first.trace.0 > 500, "{} events are no run", first.trace.0);
        assert_eq!(first.trace, second.trace, "seed {seed}");
    }
}

/// The same runs each time. They must also have done what they are for.
#[test]
fn named_seeds() {
    let all = run_all(0..24);
    for kind in [
        "power cut",
        "kill",
        "lost request",
        "lost answer",
        "late put",
        "outage",
        "stale list",
        "full disk",
        "failing sync",
        "no room for a write",
        "read past the cache",
        "refused read past the cache",
        "refused write past the cache",
        "damaged answer",
        "throttled request",
        "bit rot, borne",
        "promotion",
    ] {
        assert!(all.faults.get(kind).is_some_and(|n| *n > 0), "no {kind} in all runs");
    }
    assert!(all.counts.lost > 0 && all.counts.readers > 0 && all.counts.checkpoints > 0);
}

/// A seed that was asked for; else fresh ones, for the seconds asked for or a few.
#[test]
fn other_seeds() {
    if let Some(seed) = number("EMBASSYFS_SIM_SEED") {
        run(seed, steps());
        return;
    }
    let seconds = number("EMBASSYFS_SIM_SECONDS").unwrap_or(5);
    let clock = Env::system().clock;
    let end = clock.monotonic() + Duration::from_secs(seconds);
    let fresh = || u64::from_le_bytes(Env::system().random_bytes()) >> 16;
    run_all(std::iter::from_fn(|| (clock.monotonic() < end).then(fresh)));
}
