//! Who opens a hostile volume: a reader abroad that looks at everything, and home, which also changes things.
//! Invariant: what they are told is collected; nothing is taken for granted of what they see.

use crate::common::{ROOT_USER, node};
use crate::evil::Evil;
use embassyfs::clock::Env;
use embassyfs::crypto::keyfile::{KeyFile, Role};
use embassyfs::fs::{self, Fs, Seek, SetAttr, Settings, XattrMode};
use embassyfs::log::volume::{Parameters, Superblock};
use embassyfs::replica::Version;
use embassyfs::replica::durable::Protection;
use embassyfs::replica::volume::{OpenOptions, Volume};
use embassyfs::store::Store;
use embassyfs::store::memory::MemoryStore;
use embassyfs::tree::value::FileType;
use embassyfs::types::Ino;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::runtime::Runtime;

/// Inodes looked at in one volume, and bytes read of one file, at most.
const INODES_MAX: usize = 300;
const READ: usize = 1 << 20;

/// What was logged of what is wrong.
static LOGGED: Mutex<Vec<String>> = Mutex::new(Vec::new());

struct Logger;

impl log::Log for Logger {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        LOGGED.lock().unwrap().push(record.args().to_string());
    }

    fn flush(&self) {}
}

struct Victim {
    volume: Volume,
    runtime: Arc<Runtime>,
    complaints: Vec<String>,
}

/// Opens the volume as a reader and as its writer; what they were told is wrong.
pub fn suffer(evil: Evil) -> Vec<String> {
    let _ = log::set_logger(&Logger).map(|()| log::set_max_level(log::LevelFilter::Warn));
    LOGGED.lock().unwrap().clear();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let runtime = Arc::new(runtime);
    let dir = tempfile::tempdir_in(scratch()).unwrap();
    let store = Arc::new(MemoryStore::new());
    let key = key(&evil);
    let superblock = Superblock {
        volume: key.volume,
        name: key.name.clone(),
        key_id: key.key_id,
        writer_public: key.writer_public,
        steward_public: key.steward_public,
        slots: Vec::new(),
        created: crate::forge::TIME,
        parameters: Parameters { segment_size: 1 << 20, ..Parameters::default() },
    };
    let bytes = superblock.encode(&evil.ctx.key, evil.ctx.signer.as_ref().unwrap()).unwrap();
    store.tamper(embassyfs::log::volume::NAME, bytes.into());
    let home = dir.path().join("home");
    for (name, body) in evil.objects {
        let path = home.join(&name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, &body).unwrap();
        store.tamper(&name, body.into());
    }
    let mut complaints = Vec::new();
    for read_only in [true, false, true] {
        let state = if read_only { tempfile::tempdir_in(dir.path()).unwrap().keep() } else { home.clone() };
        match Volume::open(options(store.clone(), &key, &state, read_only), runtime.handle()) {
            Err(e) => complaints.push(e.to_string()),
            Ok(volume) => {
                let mut victim = Victim { volume, runtime: runtime.clone(), complaints: Vec::new() };
                let seen = victim.walk();
                if !read_only {
                    victim.poke(&seen);
                }
                victim.volume.close(Duration::from_secs(5));
                complaints.append(&mut victim.complaints);
            }
        }
    }
    complaints.append(&mut LOGGED.lock().unwrap());
    complaints
}

/// The disk is not what is tested here; memory is faster where there is a place for it.
fn scratch() -> std::path::PathBuf {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { memory.into() } else { std::env::temp_dir() }
}

fn key(evil: &Evil) -> KeyFile {
    KeyFile {
        role: Role::Writer,
        volume: evil.ctx.id,
        name: "land".into(),
        key_id: evil.ctx.key_id,
        volume_key: Some(evil.ctx.key.clone()),
        signing: evil.ctx.signer.clone(),
        writer_public: evil.ctx.writer_public,
        steward_public: evil.ctx.writer_public,
    }
}

fn options(store: Arc<dyn Store>, key: &KeyFile, state: &Path, read_only: bool) -> OpenOptions {
    OpenOptions {
        store,
        key: key.clone(),
        state: state.into(),
        env: Env::system(),
        version: Version::Newest,
        trust: Default::default(),
        protection: Protection::Local,
        sync_timeout: Duration::from_secs(2),
        disk_cache: 64 << 20,
        frame_cache: 8 << 20,
        uploads: 2,
        settings: Settings { read_only, dirty_max: 16 << 20, root_owner: ROOT_USER, ..Settings::default() },
    }
}

impl Victim {
    /// Asks as the FUSE side does: what is missing is fetched, and then asked for again.
    fn ask<T>(&mut self, op: impl Fn(&Fs) -> fs::Result<T>) -> Option<T> {
        for _ in 0..1000 {
            match op(&self.volume.fs) {
                Ok(answer) => return Some(answer),
                Err(e) => match e.missing() {
                    Some(ptrs) => {
                        if let Err(e) = self.runtime.block_on(self.volume.fetch(ptrs)) {
                            self.complaints.push(e.to_string());
                            return None;
                        }
                    }
                    None => {
                        // What POSIX foresees is an answer; the rest is a complaint.
                        if !matches!(e, fs::Error::Os(_)) || e.errno() == libc::ESTALE {
                            self.complaints.push(e.to_string());
                        }
                        return None;
                    }
                },
            }
        }
        self.complaints.push("it wants frames again and again".into());
        None
    }

    /// Looks at everything that can be reached: directories (and inode) with their names.
    fn walk(&mut self) -> Vec<(Ino, Vec<u8>, Ino)> {
        let (mut seen, mut names) = (BTreeSet::from([Ino::ROOT]), Vec::new());
        let mut left = vec![Ino::ROOT];
        while let Some(ino) = left.pop() {
            self.look_at(ino);
            let (mut cookie, mut pages) = (0, 0);
            while let Some(items) = self.ask(|fs| fs.readdir(ino, cookie, 50)) {
                pages += 1;
                assert!(items.iter().all(|item| item.cookie > cookie), "a position of readdir goes back");
                let Some(last) = items.last() else { break };
                if pages > 100 {
                    break;
                }
                cookie = last.cookie;
                for item in items {
                    assert!(
                        item.name.len() <= fs::NAME_MAX
                            && !item.name.contains(&b'/')
                            && !item.name.contains(&0)
                    );
                    self.ask(|fs| fs.lookup(ino, &item.name));
                    if !matches!(&item.name[..], b"." | b"..") {
                        names.push((ino, item.name, item.ino));
                    }
                    if seen.len() < INODES_MAX && seen.insert(item.ino) {
                        left.push(item.ino);
                    }
                }
            }
            self.ask(|fs| fs.readdir_plus(ino, 0, 50));
        }
        names
    }

    fn look_at(&mut self, ino: Ino) {
        let Some(attr) = self.ask(|fs| fs.getattr(ino)) else { return };
        self.ask(|fs| fs.lookup(ino, b".."));
        self.ask(|fs| fs.readlink(ino));
        if let Some(list) = self.ask(|fs| fs.listxattr(ino)) {
            for name in list.split(|b| *b == 0).filter(|name| !name.is_empty()) {
                self.ask(|fs| fs.getxattr(ino, name));
            }
        }
        let size = attr.inode.size;
        assert!(i64::try_from(size).is_ok() && i64::try_from(attr.blocks).is_ok(), "{attr:?}");
        for at in [0, 4096, size / 2, size.saturating_sub(100), u64::MAX - 10] {
            if let Some(bytes) = self.ask(|fs| fs.read(ino, at, READ)) {
                assert!(bytes.len() <= READ);
            }
            self.ask(|fs| fs.frames_of(ino, at..at.saturating_add(1 << 20)));
            self.ask(|fs| fs.seek(ino, at, Seek::Data));
            self.ask(|fs| fs.seek(ino, at, Seek::Hole));
        }
    }

    /// Changes what there is, commits it, and makes a checkpoint of it when the volume is closed.
    fn poke(&mut self, seen: &[(Ino, Vec<u8>, Ino)]) {
        let regular = node(FileType::Regular, 0o644);
        let directory = node(FileType::Directory, 0o755);
        let made = self.ask(|fs| fs.make(Ino::ROOT, b"made", &regular, ROOT_USER)).map(|attr| attr.ino);
        let new_dir = self.ask(|fs| fs.make(Ino::ROOT, b"new", &directory, ROOT_USER)).map(|attr| attr.ino);
        let into = new_dir.unwrap_or(Ino::ROOT);
        self.ask(|fs| fs.make(Ino::ROOT, b"wanderer", &directory, ROOT_USER));
        let mut stands = Ino::ROOT;
        for (i, (dir, name, ino)) in seen.iter().take(20).enumerate() {
            let (dir, ino) = (*dir, *ino);
            let moved = format!("moved{i}").into_bytes();
            if self.ask(|fs| fs.rename((stands, b"wanderer"), (ino, b"wanderer"), 0, ROOT_USER)).is_some() {
                stands = ino;
            }
            let mode = SetAttr { mode: Some(0o700), ..SetAttr::default() };
            self.ask(|fs| fs.setattr(ino, &mode));
            self.ask(|fs| fs.write(ino, 100_000, b"changed", true));
            self.ask(|fs| fs.write(ino, (1 << 62) + 5, b"far", true));
            self.ask(|fs| fs.setxattr(ino, b"user.a", b"1", XattrMode::Any));
            self.ask(|fs| fs.set_acl(ino, fs::AclKind::Access, None, |_| true));
            self.ask(|fs| {
                fs.fallocate(ino, 4096, 4096, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, true)
            });
            if let Some(made) = made {
                self.ask(|fs| fs.copy_range((ino, 0), (made, 0), 1 << 20, true));
            }
            self.ask(|fs| fs.make(ino, b"below", &regular, ROOT_USER));
            self.ask(|fs| fs.link(ino, into, format!("link{i}").as_bytes()));
            self.ask(|fs| fs.rename((dir, name), (into, &moved), 0, ROOT_USER));
            for other in seen.iter().take(5) {
                self.ask(|fs| fs.rename((into, &moved), (other.2, b"deeper"), 0, ROOT_USER));
            }
            self.commit();
            let size = SetAttr { size: Some(10), ..SetAttr::default() };
            self.ask(|fs| fs.setattr(ino, &size));
            if i % 2 == 0 {
                self.ask(|fs| fs.unlink(into, &moved));
                self.ask(|fs| fs.rmdir(into, &moved));
            }
        }
        self.commit();
        if let Some(reason) = self.volume.fs.failure() {
            self.complaints.push(reason);
        }
    }

    fn commit(&mut self) {
        let commit = self.volume.fs.sync_point();
        self.volume.fs.request_commit(commit, false);
        let (sender, receiver) = std::sync::mpsc::channel();
        let durable = self.volume.durable().unwrap();
        durable.wait(commit, Box::new(move |done| drop(sender.send(done))));
        if let Ok(Err(e)) = receiver.recv_timeout(Duration::from_secs(20)) {
            self.complaints.push(format!("{e:?}"));
        }
    }
}
