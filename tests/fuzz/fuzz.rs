//! The fuzz targets, all in one program (`scripts/fuzz.sh` builds and runs it): `FUZZ_TARGET` names the one to run, and
//! `FUZZ_SEEDS=DIR` writes the first inputs of all of them instead.
//! Invariant: a target takes any bytes; it fails by a panic, by more memory than `MEMORY_MAX` at once, or, with
//! libFuzzer's help, by time. Whatever decodes must also survive being encoded and decoded again.
#![no_main]

#[path = "../common/forge.rs"]
mod forge;
mod log;
mod seeds;
mod text;
mod tree;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

type Target = fn(&[u8]);

/// Every target, by name.
const TARGETS: &[(&str, Target)] = &[
    ("segment", log::segment),
    ("frame", log::frame),
    ("index", log::index),
    ("torn", log::torn),
    ("checkpoint", log::checkpoint),
    ("page", tree::page),
    ("tree", tree::tree),
    ("delta", tree::delta),
    ("key", tree::key),
    ("value", tree::value),
    ("superblock", text::superblock),
    ("keyfile", text::keyfile),
    ("config", text::config),
    ("control", text::control),
    ("acl", text::acl),
    ("state", text::state),
];

/// No input makes a decoder hold more than this, in bytes. Inputs are a few KiB.
const MEMORY_MAX: usize = 24 << 20;

static HELD: AtomicUsize = AtomicUsize::new(0);
static LIMIT: AtomicUsize = AtomicUsize::new(usize::MAX);

/// Counts what is held. Above the limit it ends the program, which libFuzzer takes for a find: also where the system
/// would have promised memory that nobody has.
struct Counted;

fn count(len: usize) {
    if HELD.fetch_add(len, Relaxed) + len > LIMIT.load(Relaxed) {
        LIMIT.store(usize::MAX, Relaxed); // what follows needs memory too
        eprintln!("an input makes it hold more than {MEMORY_MAX} bytes ({len} more at once)");
        std::process::abort();
    }
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

fn target() -> Target {
    if let Some(dir) = std::env::var_os("FUZZ_SEEDS") {
        seeds::write(dir.as_ref());
        leave(0);
    }
    let name = std::env::var("FUZZ_TARGET").unwrap_or_default();
    let found = TARGETS.iter().find(|(other, _)| *other == name);
    let Some((_, target)) = found else {
        let known: Vec<&str> = TARGETS.iter().map(|(name, _)| *name).collect();
        eprintln!("FUZZ_TARGET must be one of: {}", known.join(" "));
        leave(2);
    };
    *target
}

/// Ends the program without libFuzzer taking it for a find.
fn leave(code: i32) -> ! {
    // SAFETY: takes an integer and does not return; nothing is left to be done.
    unsafe { libc::_exit(code) }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    static CHOSEN: OnceLock<Target> = OnceLock::new();
    let target = CHOSEN.get_or_init(target);
    LIMIT.store(HELD.load(Relaxed) + MEMORY_MAX, Relaxed);
    target(data);
    LIMIT.store(usize::MAX, Relaxed);
});
