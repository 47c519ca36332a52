//! A store that does not show what it showed before: an older state, another history, the same state for ever.
//! Invariant: a reader that has seen a state accepts only one that continues it, says which of these it met, and does
//! not forget what it had seen.
#![allow(clippy::unwrap_used)]

mod common;

use bytes::Bytes;
use common::{World, content, create, noise};
use embassyfs::log::volume::Parameters;
use embassyfs::replica::Version;
use embassyfs::replica::volume::{OpenOptions, Volume};
use embassyfs::store::Store;
use embassyfs::store::memory::MemoryStore;
use embassyfs::types::Ino;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// All objects of a store, by name.
type Objects = BTreeMap<String, Bytes>;

struct Scene {
    world: World,
    store: Arc<MemoryStore>,
}

impl Scene {
    fn new() -> Scene {
        let store = Arc::new(MemoryStore::new());
        let world = World::over(store.clone(), tempfile::tempdir().unwrap(), Parameters::default());
        Scene { world, store }
    }

    fn objects_of(&self, store: &MemoryStore) -> Objects {
        self.world.runtime.block_on(async {
            let mut all = Objects::new();
            for prefix in ["log/", "checkpoint/", "volume.json"] {
                for object in store.list(prefix, None, 1000).await.unwrap() {
                    let (body, _) = store.get_suffix(&object.name, object.size).await.unwrap();
                    all.insert(object.name, body);
                }
            }
            all
        })
    }

    fn objects(&self) -> Objects {
        self.objects_of(&self.store)
    }

    /// The store now shows exactly these.
    fn show(&self, objects: &Objects) {
        let now = self.objects();
        self.world.runtime.block_on(async {
            for name in now.keys().filter(|name| !objects.contains_key(*name)) {
                self.store.delete(name).await.unwrap();
            }
        });
        objects.iter().for_each(|(name, body)| self.store.tamper(name, body.clone()));
    }

    /// Home makes a file of each name, each in a segment of its own that reaches the store.
    fn write(&self, home: &Volume, names: &[&str]) {
        for name in names {
            create(&self.world, home, Ino::ROOT, name, &noise(1, 5000));
            self.world.sync(home);
        }
    }

    /// A second home with the state that the first has now, and the store that it left; it writes `names` into its own.
    fn forked(&self, names: &[&str]) -> Objects {
        let store = Arc::new(MemoryStore::new());
        self.objects().iter().for_each(|(name, body)| store.tamper(name, body.clone()));
        copy(&self.world.state("home"), &self.world.state("other"));
        let options = OpenOptions { store: store.clone(), ..self.world.options("other") };
        let home = Volume::open(options, self.world.runtime.handle()).unwrap();
        self.write(&home, names);
        home.close(Duration::from_secs(20));
        self.objects_of(&store)
    }

    fn home(&self) -> Volume {
        self.world.home()
    }

    fn close(&self, home: Volume) {
        home.close(Duration::from_secs(20));
    }

    /// The reader's next look at the volume, with the state directory that it has always had.
    fn look(&self) -> Result<Volume, String> {
        self.world.embassy("embassy", Version::Newest).map_err(|e| e.to_string())
    }

    fn accepts(&self, name: &str) {
        let volume = self.look().unwrap();
        assert_eq!(content(&self.world, &volume, Ino::ROOT, name), noise(1, 5000));
        volume.close(Duration::ZERO);
    }

    fn refuses(&self, words: &[&str]) {
        let message = self.look().map(|_| ()).unwrap_err();
        assert!(words.iter().all(|word| message.contains(word)), "{message}");
    }

    fn pin(&self) -> String {
        std::fs::read_to_string(self.world.state("embassy").join("head")).unwrap()
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(std::fs::copy(entry.path(), target).unwrap()),
        }
    }
}

/// The name of the newest segment.
fn newest(objects: &Objects) -> &str {
    objects.keys().rfind(|name| name.starts_with("log/")).unwrap()
}

#[test]
fn an_older_state_is_called_a_rollback_and_what_was_seen_is_not_forgotten() {
    let scene = Scene::new();
    let home = scene.home();
    let empty = scene.objects();
    scene.write(&home, &["a"]);
    let first = scene.objects();
    scene.write(&home, &["b", "c"]);
    scene.close(home);
    let newest_state = scene.objects();
    let mut without_last = newest_state.clone();
    without_last.remove(newest(&newest_state));
    scene.accepts("c");
    let seen = scene.pin();
    for (older, has) in [(&first, newest(&first)), (&without_last, newest(&without_last)), (&empty, "none")] {
        scene.show(older);
        // Twice: the refusal itself must not lower what the reader remembers.
        for _ in 0..2 {
            scene.refuses(&[newest(&newest_state), "this host has seen", has, "rolled back", "operator"]);
        }
        assert_eq!(scene.pin(), seen);
    }
    scene.show(&newest_state);
    scene.accepts("c");
}

#[test]
fn another_segment_of_the_same_number_is_called_a_fork() {
    let scene = Scene::new();
    let home = scene.home();
    scene.write(&home, &["a"]);
    scene.close(home);
    let fork = scene.forked(&["theirs"]);
    let home = scene.home();
    scene.write(&home, &["ours"]);
    scene.close(home);
    scene.accepts("ours");
    let (ours, seen) = (scene.objects(), scene.pin());
    // As long as what was seen or longer: both end in the other history.
    let numbers = |objects: &Objects| objects.keys().filter(|name| name.starts_with("log/")).count();
    assert_eq!(numbers(&ours), numbers(&fork));
    scene.show(&fork);
    scene.refuses(&[newest(&ours), "this host has seen", "forked"]);
    assert_eq!(scene.pin(), seen);
    scene.show(&ours);
    scene.accepts("ours");
}

#[test]
fn another_history_that_has_grown_longer_is_still_a_fork() {
    let scene = Scene::new();
    let home = scene.home();
    scene.write(&home, &["a"]);
    scene.close(home);
    let fork = scene.forked(&["theirs", "more", "and more"]);
    let home = scene.home();
    scene.write(&home, &["ours"]);
    scene.close(home);
    scene.accepts("ours");
    let ours = scene.objects();
    assert!(newest(&fork) > newest(&ours));
    scene.show(&fork);
    scene.refuses(&[newest(&ours), "this host has seen", "forked"]);
    // Ours with the other one's continuation: the two do not hang together.
    let mut mixed = fork.clone();
    mixed.extend(ours.clone());
    mixed.retain(|name, _| !name.starts_with("checkpoint/"));
    scene.show(&mixed);
    scene.refuses(&["log/", "fork"]);
}

#[test]
fn the_newest_segment_exchanged_for_one_that_is_genuine_elsewhere_is_refused() {
    let scene = Scene::new();
    let home = scene.home();
    scene.write(&home, &["a", "b"]);
    scene.close(home);
    scene.accepts("b");
    let all = scene.objects();
    let last = newest(&all).to_string();
    let other = all.iter().find(|(name, _)| name.starts_with("log/")).unwrap();
    let mut exchanged = all.clone();
    exchanged.insert(last.clone(), other.1.clone());
    exchanged.retain(|name, _| !name.starts_with("checkpoint/"));
    scene.show(&exchanged);
    scene.refuses(&[&last, "says it is segment"]);
}

#[test]
fn a_head_that_stands_still_is_accepted_because_a_quiet_store_looks_the_same() {
    let scene = Scene::new();
    let home = scene.home();
    scene.write(&home, &["a"]);
    scene.close(home);
    let frozen = scene.objects();
    scene.accepts("a");
    let home = scene.home();
    scene.write(&home, &["b"]);
    scene.close(home);
    let grown = scene.objects();
    // Shown to nobody yet: whoever has seen only the frozen state cannot know of the other.
    scene.show(&frozen);
    scene.accepts("a");
    scene.show(&grown);
    scene.accepts("b");
    scene.show(&frozen);
    scene.refuses(&[newest(&grown), "rolled back"]);
}
