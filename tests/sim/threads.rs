//! Threads that run one at a time, and only when the run gives them a turn.
//! Invariant: at any moment one thread of a run runs. A thread stops at [`Threads::turn`] with no lock held, and at
//! [`Turns::rest_locked`] (a write or a sync of the log) with the log's lock held; while one rests there, no other but the
//! run itself goes on, because it might want that lock. So nothing ever waits for a lock, and the seed alone decides.

use embassyfs::clock::{Thread, Threads, Work};
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum At {
    Rest,
    Locked,
    Ended,
}

/// A thread, from outside.
struct Other {
    id: u64,
    at: At,
    go: SyncSender<()>,
    stops: Receiver<At>,
    thread: Option<std::thread::JoinHandle<bool>>,
}

/// A thread, from inside.
struct Own {
    go: Receiver<()>,
    stops: SyncSender<At>,
}

thread_local! {
    static OWN: RefCell<Option<Own>> = const { RefCell::new(None) };
}

/// See the module.
#[derive(Clone, Default)]
pub struct Turns(Arc<Mutex<Inner>>);

#[derive(Default)]
struct Inner {
    others: Vec<Other>,
    next: u64,
}

fn stop(at: At) {
    OWN.with_borrow(|own| {
        if let Some(own) = own {
            own.stops.send(at).expect("the run is there");
            own.go.recv().expect("the run is there");
        }
    });
}

impl Turns {
    /// Gives way in the middle of the log's work, if a thread of the run calls.
    pub fn rest_locked(&self) {
        stop(At::Locked);
    }

    /// Gives the `n`-th thread a turn; one that rests in the middle of the log's work goes before it.
    pub fn give(&self, n: usize) {
        let (id, locked) = {
            let inner = self.0.lock().unwrap();
            let live: Vec<&Other> = inner.others.iter().filter(|other| other.at != At::Ended).collect();
            let locked = live.iter().find(|other| other.at == At::Locked).map(|other| other.id);
            let Some(chosen) = live.get(n % live.len().max(1)) else { return };
            (chosen.id, locked)
        };
        self.step(locked.unwrap_or(id));
    }

    /// Nobody rests in the middle of the log's work when this returns.
    pub fn unlock(&self) {
        loop {
            let inner = self.0.lock().unwrap();
            let locked = inner.others.iter().find(|other| other.at == At::Locked).map(|other| other.id);
            drop(inner);
            match locked {
                Some(id) => drop(self.step(id)),
                None => return,
            }
        }
    }

    /// Lets a thread run until it stops next; says where.
    fn step(&self, id: u64) -> At {
        let mut other = {
            let mut inner = self.0.lock().unwrap();
            let place = inner.others.iter().position(|other| other.id == id).expect("it was started");
            inner.others.remove(place)
        };
        if other.at != At::Ended {
            other.go.send(()).expect("it rests");
            other.at = other.stops.recv().unwrap_or(At::Ended);
        }
        let at = other.at;
        let mut inner = self.0.lock().unwrap();
        inner.others.push(other);
        inner.others.sort_by_key(|other| other.id);
        at
    }
}

impl Threads for Turns {
    fn spawn(&self, name: &str, work: Work) -> std::io::Result<Box<dyn Thread>> {
        let (go, going) = sync_channel(0);
        let (stops, stopped) = sync_channel(0);
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || {
            let ends = stops.clone();
            going.recv().expect("the run is there");
            OWN.set(Some(Own { go: going, stops }));
            let whole = catch_unwind(AssertUnwindSafe(work)).is_ok();
            OWN.set(None);
            ends.send(At::Ended).expect("the run is there");
            whole
        })?;
        let mut inner = self.0.lock().unwrap();
        let id = inner.next;
        inner.next += 1;
        inner.others.push(Other { id, at: At::Rest, go, stops: stopped, thread: Some(thread) });
        Ok(Box::new(Joined { turns: self.clone(), id }))
    }

    fn take_turns(&self) -> bool {
        true
    }

    fn turn(&self) {
        stop(At::Rest);
    }
}

struct Joined {
    turns: Turns,
    id: u64,
}

impl Thread for Joined {
    fn join(self: Box<Self>) -> bool {
        loop {
            self.turns.unlock();
            if self.turns.step(self.id) == At::Ended {
                break;
            }
        }
        let mut inner = self.turns.0.lock().unwrap();
        let place = inner.others.iter().position(|other| other.id == self.id).expect("it was started");
        let other = inner.others.remove(place);
        drop(inner);
        other.thread.is_some_and(|thread| thread.join().unwrap_or(false))
    }
}
