//! What a writer signs about its volume: receipts, and the ends of manifests.
//! Invariant: nothing is signed but for a commit that the store has just been asked for and holds; contents are read from
//! that commit, never through the mount; every wait ends at its deadline, or when somebody else is to go on.

use super::audit::auditor as audit_context;
use super::io::Io;
use super::opening::Version;
use super::views::Place;
use super::volume::Volume;
use crate::clock::Env;
use crate::crypto::Hasher;
use crate::fs::{self, Attr, Fs};
use crate::log::segment::segment_name;
use crate::log::{self, Error, audit};
use crate::ops::init::load_superblock;
use crate::ops::names::shown;
use crate::ops::reader::Reader;
use crate::ops::receipt::{Asked, FORMAT, Manifest, Receipt, Stand, head_text};
use crate::ops::signed::{Kind, seal};
use crate::ops::status::CommitPoint;
use crate::tree::value::FileType;
use crate::types::{CommitNo, FramePtr, Hash, Head, Seq, Timestamp};
use futures::StreamExt;
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

/// How often it is looked whether to go on.
const LOOK: Duration = Duration::from_millis(100);
/// Segments that the store is asked for at a time.
const ASKED_AT_ONCE: usize = 32;
/// Holes are hashed in pieces of so many bytes.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Says when to give up.
pub struct Patience<'a> {
    /// After how long.
    pub timeout: Duration,
    /// Somebody else is to go on with the mount.
    pub leaving: &'a dyn Fn() -> bool,
}

impl Volume {
    /// Signs what was asked for. The error says why not.
    pub fn sign(&self, asked: &Asked, patience: &Patience<'_>) -> Result<String, String> {
        let deadline = self.env.clock.monotonic().saturating_add(patience.timeout);
        Signing { volume: self, patience, deadline }.sign(asked)
    }
}

struct Signing<'a> {
    volume: &'a Volume,
    patience: &'a Patience<'a>,
    /// On the volume's clock.
    deadline: Duration,
}

/// An older state of the volume, and its commit.
struct Past {
    fs: Arc<Fs>,
    commit: CommitNo,
    time: Timestamp,
}

impl Signing<'_> {
    fn sign(&self, asked: &Asked) -> Result<String, String> {
        let key = self.volume.ctx.signer.as_ref();
        let key = key.ok_or("this mount has no key that signs; ask the one that writes the volume")?;
        let text = match asked {
            Asked::File { path } => {
                let past = self.open(self.durable()?.remote)?;
                let (file, hash, segments) = self.contents(&past.fs, path)?;
                self.held(segments)?; // what was read may have come from this host
                let stand = self.stand(&past)?;
                let receipt = Receipt {
                    path: shown(path),
                    size: file.inode.size,
                    blake3: hash.to_string(),
                    mtime: file.inode.mtime,
                    stand,
                };
                seal(Kind::Receipt, &receipt, key)
            }
            Asked::Manifest { commit, holds } => {
                let past = self.open(CommitNo(*commit))?;
                let stand = self.stand(&past)?;
                seal(Kind::Manifest, &Manifest { stand, holds: holds.clone() }, key)
            }
        };
        text.map_err(|e| e.to_string())
    }

    fn env(&self) -> &Env {
        &self.volume.env
    }

    fn go_on(&self) -> Result<(), String> {
        if (self.patience.leaving)() {
            return Err("another process goes on with the mount; ask again".into());
        }
        match self.env().clock.monotonic() < self.deadline {
            true => Ok(()),
            false => Err("not within the time allowed; give more with --timeout".into()),
        }
    }

    /// Waits for `work`, but no longer than there is patience.
    fn wait<T>(&self, work: impl Future<Output = T>) -> Result<T, String> {
        let io: &Io = &self.volume.runtime;
        io.block_on(async {
            let mut work = std::pin::pin!(work);
            loop {
                self.go_on()?;
                tokio::select! {
                    done = &mut work => return Ok(done),
                    () = tokio::time::sleep(LOOK) => {}
                }
            }
        })
    }

    /// The account, if this host may still speak for the volume.
    fn durable(&self) -> Result<super::Snapshot, String> {
        let account = self.volume.durable().ok_or("this mount does not write the volume")?.snapshot();
        match account.fenced {
            Some(reason) => Err(reason),
            None => Ok(account),
        }
    }

    fn open(&self, commit: CommitNo) -> Result<Past, String> {
        let durable = self.durable()?.remote;
        if commit > durable || durable == CommitNo(0) {
            return Err(format!(
                "commit {} is not durable in the store; its newest is {}",
                commit.0, durable.0
            ));
        }
        let (fs, found, time) =
            self.wait(self.volume.version(Version::Commit(commit)))?.map_err(|e| e.to_string())?;
        match found == commit {
            true => Ok(Past { fs, commit, time }),
            false => Err(format!("there is no commit {}; the one before it is {}", commit.0, found.0)),
        }
    }

    /// What the store holds now, asked of the store.
    fn stand(&self, past: &Past) -> Result<Stand, String> {
        let head = self.durable()?.remote_head.ok_or("the store holds nothing of the volume yet")?;
        let (ctx, store) = (&self.volume.ctx, &self.volume.store);
        let (found, epoch) = self
            .wait(audit::stored(ctx, &**store, head.seq))?
            .map_err(|e| format!("asking the store: {e}"))?;
        if found != head {
            return Err(format!("the store holds another segment under {}: nothing is signed", head.seq));
        }
        let durable = self.env().clock.now();
        self.durable()?; // nobody has taken over meanwhile, as far as is known
        Ok(Stand {
            format: FORMAT,
            volume: self.volume.superblock.volume.to_string(),
            name: self.volume.superblock.name.clone(),
            commit: CommitPoint { no: past.commit.0, time: past.time },
            head: head_text(head),
            epoch: epoch.0,
            durable,
        })
    }

    /// Fails unless the store still has each of the segments.
    fn held(&self, segments: BTreeSet<Seq>) -> Result<(), String> {
        let (ctx, store) = (&self.volume.ctx, &self.volume.store);
        let mut asked = futures::stream::iter(segments)
            .map(|seq| async move { (seq, audit::stored(ctx, &**store, seq).await) })
            .buffer_unordered(ASKED_AT_ONCE);
        while let Some((seq, found)) = self.wait(asked.next())? {
            found.map_err(|e| {
                format!(
                    "{} holds part of the contents, and the store does not give it: {e}",
                    segment_name(seq)
                )
            })?;
        }
        Ok(())
    }

    /// The file at `path`, the hash of what is in it, and the segments where it lies.
    fn contents(&self, fs: &Fs, path: &[u8]) -> Result<(Attr, Hash, BTreeSet<Seq>), String> {
        let segments = RefCell::new(BTreeSet::new());
        let fetch = |ptrs: &[FramePtr]| -> log::Result<()> {
            segments.borrow_mut().extend(ptrs.iter().map(|ptr| ptr.seq));
            self.wait(self.volume.fetch(ptrs)).map_err(Error::Refused)?
        };
        let reader = Reader { fs, fetch: &fetch };
        let named = |e: fs::Error| match e {
            fs::Error::Os(libc::ENOENT | libc::ENOTDIR) => {
                format!("'{}' is not in the newest commit that the store holds", shown(path))
            }
            e => format!("'{}': {e}", shown(path)),
        };
        let file = reader.find(path).map_err(named)?;
        if file.inode.kind() != FileType::Regular {
            return Err(format!(
                "'{}' is no regular file: a receipt is for one file's contents",
                shown(path)
            ));
        }
        let (mut hasher, mut at) = (Hasher::default(), 0);
        let refused = |why: String| fs::Error::Log(Error::Refused(why));
        let zeros = |hasher: &mut Hasher, from: u64, to: u64| -> Result<(), String> {
            let mut left = to - from;
            while left > 0 {
                self.go_on()?;
                let piece = left.min(ZEROS.len() as u64) as usize;
                hasher.update(&ZEROS[..piece]);
                left -= piece as u64;
            }
            Ok(())
        };
        let read = reader.data(&file, &mut |offset, bytes| {
            self.go_on().map_err(refused)?;
            zeros(&mut hasher, at, offset).map_err(refused)?;
            hasher.update(bytes);
            at = offset + bytes.len() as u64;
            Ok(())
        });
        read.map_err(named)?;
        zeros(&mut hasher, at, file.inode.size)?;
        Ok((file, hasher.finish(), segments.take()))
    }
}

/// Whether the chain that the store holds now contains this segment, and if not, why; and what else is wrong with it.
pub fn chain_holds(
    place: &Place,
    head: Head,
    runtime: &Io,
) -> log::Result<(Result<(), String>, Vec<audit::Finding>)> {
    let ctx = audit_context(&place.key);
    runtime.block_on(async {
        load_superblock(&*place.store, &place.key).await?;
        let ended = match audit::stored(&ctx, &*place.store, head.seq).await {
            Ok((found, _)) if found == head => Ok(()),
            Ok(_) => Err(format!("the store holds another segment {}", head.seq)),
            Err(e) => Err(audit::Finding::from_error(e, &segment_name(head.seq))?.detail),
        };
        if ended.is_err() {
            return Ok((ended.map_err(|e| format!("segment {}: {e}", head.seq)), Vec::new()));
        }
        let chain = audit::chain(&ctx, &*place.store).await?;
        let member = chain.members.iter().any(|(seq, _)| *seq == head.seq);
        // A hole before the segment may be where the contents were.
        let hole = chain.findings.iter().find(|finding| {
            crate::log::segment::seq_of_name(&finding.object).is_some_and(|seq| seq <= head.seq)
        });
        let holds = match hole {
            _ if !member => Err(format!("segment {} is there, but not part of the history", head.seq)),
            Some(hole) => {
                Err(format!("the history before segment {} is not whole: {}", head.seq, hole.object))
            }
            None => Ok(()),
        };
        Ok((holds, chain.findings))
    })
}
