//! Telling the kernel what a follower's step has changed, so that it drops what it kept of that and asks again.
//! Invariant: the kernel is told by a thread that holds no lock and serves no request, only after the step is visible
//! and after every answer that may be from before it has been sent.

use crate::fs::Changed;
use crate::fuse::gate::Gate;
use crate::fuse::serve::Requests;
use fuser::{INodeNo, Notifier};
use parking_lot::{Condvar, Mutex};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::time::Duration;

/// Code of linux/fuse.h: every name that the kernel keeps is to be asked for again. Linux 6.16 and later.
const FUSE_NOTIFY_INC_EPOCH: i32 = 8;
const OUT_HEADER: usize = 16;
/// How long names are kept by a kernel that cannot be told that all of them may have changed.
const NAMES_KEEP_OLD_KERNEL: Duration = Duration::from_secs(1);

/// What is still to be told.
#[derive(Default)]
struct Queue {
    waiting: Mutex<(Changed, bool)>,
    filled: Condvar,
}

/// Ends the telling when dropped.
pub(super) struct Telling {
    requests: Arc<Requests>,
    queue: Arc<Queue>,
}

impl Drop for Telling {
    fn drop(&mut self) {
        self.requests.on_change(None);
        // Not waited for: it may be in the kernel, behind a request that only who goes on can answer.
        self.queue.waiting.lock().1 = true;
        self.queue.filled.notify_one();
    }
}

/// Begins to tell the kernel of changes, if the volume moves on. What the kernel kept from before is told first.
pub(super) fn start(
    requests: &Arc<Requests>,
    notifier: Notifier,
    fd: impl AsFd,
) -> io::Result<Option<Telling>> {
    if !requests.follows() {
        return Ok(None);
    }
    let kernel = Kernel { notifier, fd: fd.as_fd().try_clone_to_owned()?, gate: requests.gate().clone() };
    if let Err(e) = kernel.all_names() {
        ::log::info!("names are kept for a second only: this kernel cannot be told of all at once ({e})");
        requests.set_names_keep(NAMES_KEEP_OLD_KERNEL);
    }
    let queue = Arc::new(Queue::default());
    let filled = queue.clone();
    requests.on_change(Some(Box::new(move |changed| {
        filled.waiting.lock().0.merge(changed);
        filled.filled.notify_one();
    })));
    queue.waiting.lock().0.merge(requests.everything_held());
    let telling = queue.clone();
    std::thread::Builder::new().name("invalidate".into()).spawn(move || kernel.tell_all(&telling))?;
    Ok(Some(Telling { requests: requests.clone(), queue }))
}

struct Kernel {
    notifier: Notifier,
    fd: OwnedFd,
    gate: Arc<Gate>,
}

impl Kernel {
    fn tell_all(&self, queue: &Queue) {
        loop {
            let changed = {
                let mut waiting = queue.waiting.lock();
                while waiting.0.is_empty() && !waiting.1 {
                    queue.filled.wait(&mut waiting);
                }
                if waiting.1 {
                    return;
                }
                std::mem::take(&mut waiting.0)
            };
            self.tell(&changed);
        }
    }

    /// Names come before inodes: to drop a name the kernel waits for the listing of its directory that is under way,
    /// so that what the listing has brought is there to be dropped with the directory.
    fn tell(&self, changed: &Changed) {
        self.gate.pass_by();
        let mut failed = None;
        if changed.all_names
            && let Err(e) = self.all_names()
        {
            ::log::debug!("all names: {e}"); // they are kept for a moment only, see above
        }
        for (dir, name) in &changed.names {
            let told = self.notifier.inval_entry(INodeNo(dir.0), OsStr::from_bytes(name));
            failed = told.err().or(failed);
        }
        for (ino, touched) in &changed.inodes {
            let (at, len) = match &touched.data {
                None => (-1, 0), // attributes and access lists
                Some(range) => (i64::try_from(range.start).unwrap_or(0), length(range.end - range.start)),
            };
            failed = self.notifier.inval_inode(INodeNo(ino.0), at, len).err().or(failed);
        }
        // The mount may be gone. Else it is the kernel's to say what it did not do, and there is no other way.
        if let Some(e) = failed {
            ::log::debug!("the kernel was not told everything: {e}");
        }
    }

    fn all_names(&self) -> io::Result<()> {
        let mut notice = [0u8; OUT_HEADER];
        notice[..4].copy_from_slice(&(OUT_HEADER as u32).to_ne_bytes());
        notice[4..8].copy_from_slice(&FUSE_NOTIFY_INC_EPOCH.to_ne_bytes());
        File::from(self.fd.try_clone()?).write_all(&notice)
    }
}

/// 0 is up to the end.
fn length(len: u64) -> i64 {
    i64::try_from(len).unwrap_or(0)
}
