//! Where else a file system is mounted: in other mount namespaces (containers, services with private mounts), and as a
//! second mount of it in this one. As long as one is left, the kernel keeps the file system and its daemon goes on.
//! Invariant: only links and tables in /proc are read, within bounds, and nothing waits for the mount; and no other
//! file system is taken for this one, though the kernel gives a device number away as soon as it is free.

use crate::clock::{Clock, Env};
use crate::fuse::table::{self, MountEntry};
use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The search ends after this time; what was found by then is told.
const SEARCH_MAX: Duration = Duration::from_secs(3);
/// As many are named.
const SHOWN: usize = 4;

/// A process whose mount namespace holds the file system.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Holder {
    pid: u32,
    name: String,
    mount: (u64, PathBuf),
}

/// See the module: the other mounts, by their numbers and mount points.
#[derive(Debug, PartialEq, Eq)]
pub struct Copies {
    device: (u32, u32),
    here: Vec<(u64, PathBuf)>,
    holders: Vec<Holder>,
}

impl Copies {
    /// The other mounts of the file system of `mount`. To be asked while that one is mounted, and so the device number
    /// surely its own.
    pub fn beside(mount: &MountEntry) -> Copies {
        let mut all = Copies::with_device(mount.device);
        all.here.retain(|(id, _)| *id != mount.id);
        all
    }

    /// What there is still of them, if anything: those of another namespace may have gone with the mount itself.
    pub fn still_there(&self) -> Option<Copies> {
        if self.is_empty() {
            return None;
        }
        let left = Copies::with_device(self.device).known_to(self);
        (!left.is_empty()).then_some(left)
    }

    fn with_device(device: (u32, u32)) -> Copies {
        let here = table::mounts().unwrap_or_default();
        let here = here.into_iter().filter(|m| m.device == device).map(place).collect();
        Copies { device, here, holders: holders(device, &*Env::system().clock) }
    }

    /// Without what has come since `before`: that may be another file system to which the number was given.
    fn known_to(mut self, before: &Copies) -> Copies {
        self.here.retain(|mount| before.here.contains(mount));
        self.holders.retain(|holder| before.holders.iter().any(|b| b.mount == holder.mount));
        self
    }

    fn is_empty(&self) -> bool {
        self.here.is_empty() && self.holders.is_empty()
    }

    /// What ends the first of them.
    pub fn way_out(&self) -> String {
        match (self.here.first(), self.holders.first()) {
            (Some((_, path)), _) => format!("unmount it there too: umount {}", path.display()),
            (None, Some(Holder { pid, mount: (_, at), .. })) => {
                format!(
                    "end these processes, or unmount it there: nsenter -t {pid} -m umount {}",
                    at.display()
                )
            }
            (None, None) => String::new(),
        }
    }
}

fn place(mount: MountEntry) -> (u64, PathBuf) {
    (mount.id, mount.mount_point)
}

fn namespace(process: &Path) -> Option<PathBuf> {
    std::fs::read_link(process.join("ns/mnt")).ok()
}

fn holders(device: (u32, u32), clock: &dyn Clock) -> Vec<Holder> {
    let own = namespace(Path::new("/proc/self"));
    let end = clock.monotonic() + SEARCH_MAX;
    // Where each namespace has it: a table is the same for all its processes.
    let mut known: HashMap<PathBuf, Option<(u64, PathBuf)>> = HashMap::new();
    let Ok(processes) = std::fs::read_dir("/proc") else { return Vec::new() };
    let mut found = Vec::new();
    for process in processes.flatten().take_while(|_| clock.monotonic() < end) {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let Some(space) = namespace(&process.path()).filter(|space| Some(space) != own.as_ref()) else {
            continue;
        };
        let there = known.entry(space).or_insert_with(|| {
            let table = table::mounts_of(pid).unwrap_or_default();
            table.into_iter().find(|m| m.device == device).map(place)
        });
        if let Some(mount) = there {
            let name = std::fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            found.push(Holder { pid, name: name.trim().to_string(), mount: mount.clone() });
        }
    }
    found
}

impl fmt::Display for Copies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut places: Vec<String> =
            self.here.iter().map(|(_, path)| format!("at {}", path.display())).collect();
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

#[cfg(test)]
mod tests {
    use super::*;

    fn copies(here: &[(u64, &str)], holders: &[(u32, u64, &str)]) -> Copies {
        let place = |id: u64, at: &str| (id, PathBuf::from(at));
        Copies {
            device: (0, 52),
            here: here.iter().map(|(id, at)| place(*id, at)).collect(),
            holders: holders
                .iter()
                .map(|(pid, id, at)| Holder { pid: *pid, name: "sh".into(), mount: place(*id, at) })
                .collect(),
        }
    }

    #[test]
    fn what_has_come_since_with_the_same_device_number_is_no_copy() {
        let before = copies(&[(90, "/srv/bound")], &[(7, 91, "/srv/land")]);
        assert!(copies(&[(92, "/srv/other")], &[(8, 93, "/srv/other")]).known_to(&before).is_empty());
        // The mount's number was given away too; at the same place with another number, it was mounted anew.
        assert!(copies(&[(90, "/srv/other")], &[]).known_to(&before).is_empty());
        assert!(copies(&[(94, "/srv/bound")], &[]).known_to(&before).is_empty());
        let left =
            copies(&[(90, "/srv/bound"), (92, "/srv/other")], &[(9, 91, "/srv/land")]).known_to(&before);
        assert_eq!(left, copies(&[(90, "/srv/bound")], &[(9, 91, "/srv/land")]));
        assert_eq!(left.to_string(), "at /srv/bound and in another mount namespace, that of sh (9)");
    }
}
