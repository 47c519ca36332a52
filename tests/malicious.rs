//! Somebody with the keys means harm: volumes whose sealed and signed contents are hostile are opened, walked, read
//! and written to. Invariant: whoever opens one gets errors that name what is wrong, or answers; never a panic, never
//! an endless wait, and memory within `MEMORY_MAX`.
#![allow(clippy::unwrap_used)]

#[path = "malicious/cases.rs"]
mod cases;
mod common;
#[path = "malicious/evil.rs"]
mod evil;
#[path = "common/forge.rs"]
mod forge;
#[path = "malicious/mutations.rs"]
mod mutations;
#[path = "malicious/structures.rs"]
mod structures;
#[path = "malicious/victim.rs"]
mod victim;

use evil::Evil;
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, Once, PoisonError, mpsc};
use std::time::Duration;

/// No case may take longer, with both hosts that open the volume.
const CASE_TIME: Duration = Duration::from_secs(30);
/// What the process may hold at any moment of a case beyond what it held before, in bytes.
const MEMORY_MAX: usize = 640 << 20;

static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// Counts what is held.
struct Counted;

fn count(len: usize) {
    PEAK.fetch_max(HELD.fetch_add(len, Relaxed) + len, Relaxed);
}

// SAFETY: everything is handed to the system's allocator as it came.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: as the caller promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Relaxed);
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counted = Counted;

static PANICS: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn panics() -> MutexGuard<'static, Vec<String>> {
    PANICS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Panics on all threads are kept, also where somebody catches them; the tests run one after the other.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    static HOOK: Once = Once::new();
    let guard = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            panics().push(info.to_string());
            before(info);
        }));
    });
    panics().clear();
    guard
}

/// What became of a case: everything that somebody was told is wrong, and the most memory held.
struct Outcome {
    complaints: Vec<String>,
    peak: usize,
}

/// Runs a case on a thread of its own; an error says what the volume did to who opened it.
fn run(evil: Evil) -> Result<Outcome, String> {
    let before = HELD.load(Relaxed);
    PEAK.store(before, Relaxed);
    let (sender, receiver) = mpsc::channel();
    let thread = std::thread::spawn(move || sender.send(victim::suffer(evil)));
    let answer = receiver.recv_timeout(CASE_TIME);
    let found = std::mem::take(&mut *panics());
    if !found.is_empty() {
        return Err(format!("a panic: {}", found.join("; ")));
    }
    let Ok(complaints) = answer else { return Err(format!("not done after {CASE_TIME:?}")) };
    let _ = thread.join();
    let peak = PEAK.load(Relaxed) - before;
    if peak > MEMORY_MAX {
        return Err(format!("it held {} MiB", peak >> 20));
    }
    Ok(Outcome { complaints, peak })
}

#[test]
fn what_is_sealed_is_not_believed() {
    let _guard = alone();
    let (mut bad, mut peak) = (Vec::new(), 0);
    let only = std::env::var("MALICIOUS_CASE").ok();
    let cases = cases::all();
    for (name, needle, evil) in cases {
        if only.as_ref().is_some_and(|only| !name.contains(only.as_str())) {
            continue;
        }
        match run(evil) {
            Err(why) => bad.push(format!("{name}: {why}")),
            Ok(outcome) => {
                peak = peak.max(outcome.peak);
                if !needle.is_empty() && !outcome.complaints.iter().any(|text| text.contains(needle)) {
                    bad.push(format!(
                        "{name}: nobody complains of {needle:?}, but of {:#?}",
                        outcome.complaints
                    ));
                }
            }
        }
    }
    println!("at most {} MiB", peak >> 20);
    assert!(bad.is_empty(), "\n{}\n", bad.join("\n"));
}

#[test]
fn an_honest_volume_of_the_same_making_gives_no_cause_for_complaint() {
    let _guard = alone();
    for evil in [Evil::replayed(Evil::honest()), Evil::in_pages(Evil::honest())] {
        let outcome = run(evil).unwrap();
        assert!(outcome.complaints.is_empty(), "{:#?}", outcome.complaints);
    }
}

/// `MALICIOUS_SEED=N` runs one again; `MALICIOUS_SEEDS=N` runs so many.
#[test]
fn random_changes_of_a_valid_tree_do_no_harm() {
    let _guard = alone();
    let number = |name| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let seeds = match (number("MALICIOUS_SEED"), number("MALICIOUS_SEEDS").unwrap_or(300)) {
        (Some(seed), _) => seed..seed + 1,
        (None, count) => 0..count,
    };
    let (mut bad, mut told) = (Vec::new(), 0);
    for seed in seeds.clone() {
        match run(mutations::of_seed(seed)) {
            Err(why) => bad.push(format!("seed {seed}: {why}")),
            Ok(outcome) => told += usize::from(!outcome.complaints.is_empty()),
        }
    }
    println!("{} volumes, {told} of them with something to complain of", seeds.end - seeds.start);
    assert!(bad.is_empty(), "\n{}\n", bad.join("\n"));
}
