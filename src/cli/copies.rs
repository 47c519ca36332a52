//! Where else a file system is mounted: in other mount namespaces (containers, services with private mounts), and as a
//! second mount of it in this one. As long as one is left, the kernel keeps the file system and its daemon goes on.
//! Invariant: only links and tables in /proc are read, within bounds, and nothing waits for the mount; and no other
//! file system is taken for this one, though its device number is another's as soon as it is free.

use crate::clock::{Clock, Env};
use crate::fuse::identity::MountIdentity;
use crate::fuse::table;
use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The search ends after this time; what was found by then is told.
const SEARCH_MAX: Duration = Duration::from_secs(3);
/// As many are named.
const SHOWN: usize = 4;

/// A process whose mount namespace holds the file system.
#[derive(Debug)]
struct Holder {
    pid: u32,
    name: String,
    at: PathBuf,
}

/// See the module; there is at least one.
#[derive(Debug)]
pub struct Copies {
    here: Vec<PathBuf>,
    holders: Vec<Holder>,
}

/// Where there is still a mount of the file system, if anywhere, when it has been unmounted at its own place.
pub fn of(mount: &MountIdentity) -> Option<Copies> {
    if mount.is_gone() {
        return None;
    }
    let here = mount.shown_in(table::mounts().unwrap_or_default());
    let here = here.into_iter().map(|entry| entry.mount_point).collect();
    let copies = Copies { here, holders: holders(mount, &*Env::system().clock) };
    let none = copies.here.is_empty() && copies.holders.is_empty();
    // Asked again: if it has gone meanwhile, what was found may be another.
    (!none && !mount.is_gone()).then_some(copies)
}

fn holders(mount: &MountIdentity, clock: &dyn Clock) -> Vec<Holder> {
    let namespace = |process: &Path| std::fs::read_link(process.join("ns/mnt")).ok();
    let own = namespace(Path::new("/proc/self"));
    let end = clock.monotonic() + SEARCH_MAX;
    // Where each namespace has it.
    let mut known: HashMap<PathBuf, Option<PathBuf>> = HashMap::new();
    let Ok(processes) = std::fs::read_dir("/proc") else { return Vec::new() };
    let mut found = Vec::new();
    for process in processes.flatten().take_while(|_| clock.monotonic() < end) {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let process = process.path();
        let Some(space) = namespace(&process).filter(|space| Some(space) != own.as_ref()) else {
            continue;
        };
        let there = known.get(&space).cloned().unwrap_or_else(|| {
            let table = table::mounts_of(pid);
            // Of all that are not confined to a part of their namespace's tree, the table is the same.
            let whole = std::fs::read_link(process.join("root")).is_ok_and(|root| root == Path::new("/"));
            let worth_keeping = table.is_ok() && whole;
            let shown = mount.shown_in(table.unwrap_or_default());
            let at = shown.into_iter().next().map(|entry| entry.mount_point);
            if worth_keeping {
                known.insert(space, at.clone());
            }
            at
        });
        if let Some(at) = there {
            let name = std::fs::read_to_string(process.join("comm")).unwrap_or_default();
            found.push(Holder { pid, name: name.trim().to_string(), at });
        }
    }
    found
}

impl fmt::Display for Copies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut places: Vec<String> = self.here.iter().map(|path| format!("at {}", path.display())).collect();
        if !self.holders.is_empty() {
            let mut names: Vec<String> =
                self.holders.iter().take(SHOWN).map(|h| format!("{} ({})", h.name, h.pid)).collect();
            if self.holders.len() > SHOWN {
                names.push(format!("{} more", self.holders.len() - SHOWN));
            }
            places.push(format!("in another mount namespace, that of {}", names.join(", ")));
        }
        f.write_str(&places.join(" and "))
    }
}

impl Copies {
    /// What ends the first of them.
    pub fn way_out(&self) -> String {
        match (self.here.first(), self.holders.first()) {
            (Some(path), _) => format!("unmount it there too: umount {}", path.display()),
            (None, Some(Holder { pid, at, .. })) => {
                format!(
                    "end these processes, or unmount it there: nsenter -t {pid} -m umount {}",
                    at.display()
                )
            }
            (None, None) => String::new(),
        }
    }
}
