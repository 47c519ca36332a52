//! Looking a whole volume through in its store: superblock, chain, bodies, checkpoints and, with a key that reads, every
//! frame and the tree.
//! Invariant: nothing is changed; damage is a finding that names its object, and an error means that the store could not
//! be asked.

use super::opening::list_checkpoints;
use super::trust;
use super::views::{Place, Views};
use super::{Io, Version};
use crate::crypto::keyfile::{KeyFile, Role};
use crate::crypto::keys::VolumeKey;
use crate::log::audit::{self, Finding};
use crate::log::segment::{VolumeContext, segment_name};
use crate::log::statedir::StateDir;
use crate::log::{Error, Result};
use crate::ops::init::load_superblock;
use crate::ops::treecheck::{self, Checked};
use crate::store::counted::CountedStore;
use crate::tree::checkpoint;
use crate::types::{CommitNo, FrameKind, FramePtr, Head, Seq, Timestamp};
use futures::StreamExt;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// What is remembered of frames takes at most this much memory; what is not remembered is opened once more.
const CATALOGUE_MAX: usize = 128 << 20;
/// Checkpoints are small: so many are asked for at a time.
const CHECKPOINTS_AT_ONCE: usize = 8;
const CHECKPOINT_MAX: u64 = 64 << 10;

/// What to look at.
#[derive(Clone, Copy, Debug, Default)]
pub struct Depth {
    /// Read every body; with a reader's key open every frame, and walk the tree.
    pub full: bool,
    /// The newest commit must not be older.
    pub max_age: Option<Duration>,
}

/// What was looked at, and what is wrong.
#[derive(Debug, Default, serde::Serialize)]
pub struct Audit {
    /// Segments in the chain, and their bytes.
    pub segments: u64,
    /// See `segments`.
    pub segment_bytes: u64,
    /// Bodies read, and frames opened in them.
    pub bodies: u64,
    /// See `bodies`.
    pub frames: u64,
    /// Checkpoint objects.
    pub checkpoints: u64,
    /// Commits in the chain.
    pub commits: u64,
    /// The newest segment: number and hash.
    pub head: Option<(u64, String)>,
    /// The newest commit.
    pub newest_commit: Option<u64>,
    /// How old it is, in seconds, by this host's clock.
    pub age_seconds: Option<i64>,
    /// Inodes, keys and pieces of files in the newest tree.
    pub inodes: u64,
    /// See `inodes`.
    pub keys: u64,
    /// See `inodes`.
    pub extents: u64,
    /// Requests to the store, and bytes that came from it.
    pub requests: u64,
    /// See `requests`.
    pub bytes_read: u64,
    /// What is wrong.
    pub findings: Vec<Finding>,
    /// What is no damage, but worth knowing.
    pub notes: Vec<Finding>,
}

/// How far it is: what is being done, and how many of how many.
pub type Progress<'a> = &'a mut (dyn FnMut(&'static str, u64, u64) + Send);

/// Looks the volume in `place` through, with `state` for copies and for the newest head seen.
pub fn run(place: &Place, state: &Path, depth: Depth, runtime: &Io, progress: Progress<'_>) -> Result<Audit> {
    let store = Arc::new(CountedStore::new(place.store.clone()));
    let place = Place { store: store.clone(), ..place.clone() };
    let ctx = auditor(&place.key);
    let mut audit = Audit::default();
    runtime.block_on(superblock(&place, &mut audit))?;
    progress("chain", 0, 1);
    // Before the chain: home may go on meanwhile, and what a checkpoint stands on is in the store before it.
    let names = runtime.block_on(list_checkpoints(&*store))?;
    let chain = runtime.block_on(audit::chain(&ctx, &*store))?;
    audit.segments = chain.members.len() as u64;
    audit.segment_bytes = chain.members.iter().map(|(_, size)| size).sum();
    audit.commits = chain.commits;
    audit.head = chain.head.map(|head| (head.seq.0, head.hash.to_string()));
    audit.findings.extend(chain.findings);
    audit.notes.extend(chain.notes);
    if chain.members.is_empty() {
        audit.notes.push(Finding::new("log/", "the volume holds no segment yet"));
    }
    freshness(&place, chain.commit, depth.max_age, &mut audit);
    runtime.block_on(checkpoints(&ctx, &place, names, chain.head, &mut audit))?;
    pinned(&place, state, chain.head, runtime, &mut audit)?;
    let opens = place.key.role >= Role::Reader;
    let mut catalogue = Catalogue::default();
    if depth.full {
        for (i, (seq, _)) in chain.members.iter().enumerate() {
            progress("segments", i as u64, chain.members.len() as u64);
            let mut note = |ptr: FramePtr, kind: FrameKind, len: usize| catalogue.note(ptr, kind, len);
            let on_frame: Option<audit::OnFrame<'_>> = if opens { Some(&mut note) } else { None };
            let body = runtime.block_on(audit::body(&ctx, &*store, *seq, on_frame))?;
            audit.bodies += 1;
            audit.frames += body.frames;
            audit.findings.extend(body.findings);
        }
        if opens {
            tree(&place, state, runtime, &catalogue, &mut audit, progress)?;
        }
    }
    let mut seen = std::collections::HashSet::new();
    audit.findings.retain(|finding| seen.insert((finding.object.clone(), finding.detail.clone())));
    (audit.requests, audit.bytes_read) = store.counts();
    Ok(audit)
}

/// What the log needs to check signatures. An auditor has no key to open frames with, and none is opened for it.
pub fn auditor(key: &KeyFile) -> VolumeContext {
    VolumeContext {
        id: key.volume,
        key: key.volume_key.clone().unwrap_or_else(|| VolumeKey::from_bytes([0; 32])),
        key_id: key.key_id,
        writer_public: key.writer_public,
        signer: None,
    }
}

async fn superblock(place: &Place, audit: &mut Audit) -> Result<()> {
    if let Err(e) = load_superblock(&*place.store, &place.key).await {
        audit.findings.push(Finding::from_error(e, crate::log::volume::NAME)?);
    }
    Ok(())
}

fn freshness(place: &Place, newest: Option<(CommitNo, Timestamp)>, max: Option<Duration>, audit: &mut Audit) {
    let Some((no, time)) = newest else { return };
    let age = place.env.clock.now().secs.saturating_sub(time.secs);
    audit.newest_commit = Some(no.0);
    audit.age_seconds = Some(age);
    if let Some(max) = max.filter(|max| age > max.as_secs().cast_signed()) {
        let detail = format!(
            "the newest commit ({}) is {age} s old, more than the {} s that are allowed: nothing was written, or what was \
             written does not arrive",
            no.0,
            max.as_secs()
        );
        audit.findings.push(Finding::new("log/", detail));
    }
}

/// Every checkpoint's signature and, with a key that opens it, what it says of the chain.
async fn checkpoints(
    ctx: &VolumeContext,
    place: &Place,
    names: Vec<String>,
    head: Option<Head>,
    audit: &mut Audit,
) -> Result<()> {
    let opens = place.key.volume_key.is_some();
    let mut answers = futures::stream::iter(names)
        .map(|name| async move {
            let got = place.store.get_suffix(&name, CHECKPOINT_MAX).await.map_err(Error::from);
            (name, got)
        })
        .buffered(CHECKPOINTS_AT_ONCE);
    while let Some((name, got)) = answers.next().await {
        audit.checkpoints += 1;
        let looked = got.and_then(|(bytes, _)| {
            let header = checkpoint::verify(&bytes, &name, ctx.id, &ctx.writer_public)?;
            if header.key_id != ctx.key_id {
                return Err(Error::corrupt(&name, format!("sealed under key {}", header.key_id)));
            }
            if !opens {
                return Ok(None);
            }
            checkpoint::open(&bytes, &name, ctx.id, &ctx.key, &ctx.writer_public).map(Some)
        });
        match looked {
            Err(e) => audit.findings.push(Finding::from_error(e, &name)?),
            Ok(Some(root)) if head.is_none_or(|head| head.seq < root.root_seq) => {
                let detail =
                    format!("missing, though {name} stands on it: the newest part of the log is gone");
                audit.findings.push(Finding::new(segment_name(root.root_seq), detail));
            }
            Ok(_) => {}
        }
    }
    Ok(())
}

/// Holds the chain against the newest head that was seen with this state directory, and remembers the newest.
fn pinned(place: &Place, state: &Path, head: Option<Head>, runtime: &Io, audit: &mut Audit) -> Result<()> {
    let dir = StateDir::open_on(place.env.disk.clone(), state)?;
    let found = runtime.block_on(trust::check_pin(&auditor(&place.key), &dir, &*place.store, head));
    if let Err(e) = found {
        audit.findings.push(Finding::from_error(e, "log/")?);
    }
    Ok(())
}

/// Which DATA frames opened, and how much they hold.
#[derive(Default)]
struct Catalogue {
    frames: HashMap<Seq, Vec<(u32, u32, u32)>>,
    bytes: usize,
    /// Segments that there was no room for.
    full: bool,
}

impl Catalogue {
    fn note(&mut self, ptr: FramePtr, kind: FrameKind, len: usize) {
        if kind != FrameKind::Data {
            return;
        }
        if self.bytes >= CATALOGUE_MAX {
            self.full = true;
            return;
        }
        let of_segment = self.frames.entry(ptr.seq).or_default();
        of_segment.push((ptr.offset, ptr.len, len as u32));
        self.bytes += size_of::<(u32, u32, u32)>();
    }

    fn len_of(&self, ptr: FramePtr) -> Option<u64> {
        let frames = self.frames.get(&ptr.seq)?;
        let at = frames.binary_search_by_key(&ptr.offset, |(offset, ..)| *offset).ok()?;
        frames.get(at).filter(|(_, len, _)| *len == ptr.len).map(|(.., plain)| u64::from(*plain))
    }
}

fn tree(
    place: &Place,
    state: &Path,
    runtime: &Io,
    catalogue: &Catalogue,
    audit: &mut Audit,
    progress: Progress<'_>,
) -> Result<()> {
    // The version whose segments were looked through, though home may have gone on.
    let version = audit.newest_commit.map_or(Version::Newest, |no| Version::Commit(CommitNo(no)));
    let views = match Views::open(place.clone(), state, &[version], runtime) {
        Ok(views) => views,
        Err(e) => {
            audit.findings.push(Finding::from_error(e, "the newest version")?);
            return Ok(());
        }
    };
    let Some(view) = views.views.first() else { return Ok(()) };
    let fetch = |ptrs: &[FramePtr]| views.fetch(ptrs);
    let mut frame = |ptr: FramePtr| match catalogue.len_of(ptr) {
        Some(len) => Ok(len),
        None if !catalogue.full => Err(Error::corrupt(
            segment_name(ptr.seq),
            format!("the frame at {}+{} is not there, or does not open", ptr.offset, ptr.len),
        )),
        None => {
            views.fetch(&[ptr])?;
            Ok(views.frames().get(ptr, FrameKind::Data)?.len() as u64)
        }
    };
    let mut show = |checked: &Checked| progress("tree", checked.inodes, view.counters.inodes);
    let checked = match views
        .with(view, |levels| treecheck::check(levels, view.counters, &fetch, &mut frame, &mut show))
    {
        Ok(checked) => checked,
        Err(e) => {
            audit.findings.push(Finding::from_error(e, "the newest version")?);
            return Ok(());
        }
    };
    (audit.inodes, audit.keys, audit.extents) = (checked.inodes, checked.keys, checked.extents);
    audit.findings.extend(checked.findings);
    Ok(())
}
