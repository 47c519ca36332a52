//! Finding the version to open: superblock, checkpoint, replay, and the pin against an older or other store.
//! Invariant: home restart, embassy mount and a mount of the past come through here alike; a store that is older
//! than what this host has seen, or different from it, is refused and said to be so.

use super::divergent;
use super::held;
use super::trust;
use super::volume::OpenOptions;
use crate::clock::Env;
use crate::crypto::keyfile::KeyFile;
use crate::fs::Recovery;
use crate::log::chain::{self, ChainStart};
use crate::log::reader::FrameReader;
use crate::log::recovery::{self, Recovered, Role, Step};
use crate::log::segment::{VolumeContext, segment_name};
use crate::log::statedir::StateDir;
use crate::log::volume::{self, Superblock, UnverifiedSuperblock};
use crate::log::{ClosedSegment, Error, Result};
use crate::store::{Store, StoreError};
use crate::tree::checkpoint::{self, Root};
use crate::tree::{Counters, Delta, Tree, delta, key, memtable};
use crate::types::{CommitNo, Ino, Seq, Timestamp};
use bytes::Bytes;
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

/// How long the store may take to show that it is there.
const REACH_TIMEOUT: Duration = Duration::from_secs(10);
/// No checkpoint object is larger, in bytes.
const CHECKPOINT_MAX: u64 = 64 << 10;
/// Segments on their way to the store at a time, at most.
const IN_FLIGHT_MAX: usize = 64;
/// Checkpoint names asked for at once.
const LIST_PAGE: usize = 1000;

/// A replay may take this much memory on any host, in bytes; more only where it is half of what the host has at most.
const REPLAY_MIN: usize = 1 << 30;

/// Which version of the volume to open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// The newest commit.
    Newest,
    /// This commit.
    Commit(CommitNo),
    /// The newest commit made at this time or before.
    Time(Timestamp),
}

impl Version {
    /// True if a commit with this number and time belongs to the version.
    fn includes(&self, no: CommitNo, time: Timestamp) -> bool {
        match self {
            Version::Newest => true,
            Version::Commit(at) => no <= *at,
            Version::Time(at) => time <= *at,
        }
    }
}

/// A version that was found, ready to put a file system over.
pub(super) struct Opened {
    pub recovery: Recovery,
    pub recovered: Recovered,
    /// When the version's last commit was made; `None` for a volume without commits.
    pub time: Option<Timestamp>,
    /// First segment that a replay needs.
    pub replay_seq: Seq,
    /// The checkpoint that it was found by.
    pub root: Option<Root>,
}

/// True for a writer that holds the volume's own copy of everything it needs.
pub(super) fn works_alone(dir: &StateDir, role: Role) -> Result<bool> {
    Ok(role == Role::Writer && dir.read(volume::NAME)?.is_some())
}

/// The store, if it answers. A writer that holds the volume's own copy of everything it needs goes on without it, also
/// when the store refuses it (credentials that have expired): home works, and `status` says what is wrong.
pub(super) async fn reach<'a>(
    store: &'a dyn Store,
    dir: &StateDir,
    role: Role,
) -> Result<Option<&'a dyn Store>> {
    if !works_alone(dir, role)? {
        return Ok(Some(store));
    }
    match crate::store::reachable(store, REACH_TIMEOUT).await {
        // Also when it refuses: credentials that have expired must not keep home from starting.
        Err(e) if e.may_pass() => {
            ::log::warn!("the store does not serve ({e}); opening from what this host holds");
            Ok(None)
        }
        _ => Ok(Some(store)),
    }
}

/// The volume's superblock: from the store, which must agree with the copy pinned here; from the pinned copy alone
/// when the store does not answer. With it what is to be pinned once the volume has been opened.
pub(super) async fn superblock(
    store: Option<&dyn Store>,
    dir: &StateDir,
    key: &KeyFile,
) -> Result<(Superblock, Option<Bytes>)> {
    let pinned = dir.read(volume::NAME)?;
    let (superblock, bytes) = match (store, &pinned) {
        (Some(store), _) => crate::ops::init::load_superblock(store, key).await?,
        (None, Some(pinned)) => return Ok((UnverifiedSuperblock::parse(pinned)?.verify(key)?, None)),
        (None, None) => return Err(Error::Refused("neither the store nor this host has the volume".into())),
    };
    match pinned {
        Some(pinned) if pinned != bytes => Err(Error::corrupt(
            volume::NAME,
            format!(
                "SUBSTITUTION: the store's copy differs from the one pinned in {}: the store, or the volume in it, may \
                 have been exchanged. Check the URL. If the volume was re-keyed on purpose, use a new state directory",
                dir.root().display()
            ),
        )),
        Some(_) => Ok((superblock, None)),
        None => Ok((superblock, Some(bytes))),
    }
}

/// Recovers `version`: newest usable checkpoint, then the commits behind it.
pub(super) async fn recover(
    ctx: &VolumeContext,
    dir: &StateDir,
    env: &Env,
    store: Option<&dyn Store>,
    role: Role,
    version: Version,
) -> Result<Opened> {
    let root = newest_checkpoint(ctx, dir, store, version).await?;
    let start = root.map_or_else(ChainStart::default, |root| root.chain_start());
    let mut replayed = Replayed { map: Delta::new(), weight: 0, limit: memory() / 2 };
    let mut counters = root.map(|root| root.counters);
    let mut time = root.map(|root| root.time);
    let mut last = root.map_or(CommitNo(0), |root| root.commit);
    let mut apply = |no: CommitNo, at: Timestamp, seq: Seq, bodies: &[Bytes]| {
        if !version.includes(no, at) {
            return Ok(Step::Stop);
        }
        if no > last {
            let (new, changes) = delta::decode(bodies).map_err(|e| of_commit(no, seq, e))?;
            replayed.take(changes).map_err(|detail| Error::corrupt(segment_name(seq), detail))?;
            counters = Some(new);
            (time, last) = (Some(at), no);
        }
        Ok(if version == Version::Commit(no) { Step::Last } else { Step::Continue })
    };
    let recovered = recovery::recover(ctx, dir, env, store, start, role, &mut apply).await?;
    if last == CommitNo(0) && version != Version::Newest {
        return Err(Error::Refused("the volume has no version that old; `versions` lists them".into()));
    }
    if let Version::Commit(asked) = version
        && last < asked
    {
        return Err(Error::Refused(format!(
            "the volume has no commit {} yet; its newest is {}",
            asked.0, last.0
        )));
    }
    let counters = counters.unwrap_or(Counters { next_ino: 2, live_bytes: 0, inodes: 0 });
    Ok(Opened {
        recovery: Recovery {
            tree: Tree { root: root.and_then(|root| root.tree) },
            replayed: replayed.map,
            last_commit: last,
            next_ino: counters.next_ino,
            live_bytes: counters.live_bytes,
            inodes: counters.inodes,
            orphans: Vec::new(),
        },
        recovered,
        time,
        replay_seq: start.replay_seq,
        root,
    })
}

/// The changes behind a checkpoint, and about how much memory they take.
struct Replayed {
    map: Delta,
    weight: usize,
    limit: usize,
}

impl Replayed {
    /// Takes the changes of the next commit, or says why there are too many: better than to be killed for them.
    fn take(&mut self, changes: Vec<delta::Change>) -> std::result::Result<(), String> {
        for (key, value) in changes {
            self.weight += memtable::weight(&key, &value);
            if let Some(old) = self.map.get(&key) {
                self.weight -= memtable::weight(&key, old);
            }
            self.map.insert(key, value);
        }
        let mib = |bytes| bytes >> 20;
        match self.weight > self.limit.max(REPLAY_MIN) {
            false => Ok(()),
            true => Err(format!(
                "the changes behind the newest checkpoint take {} MiB up to here, and this host has {} MiB",
                mib(self.weight),
                mib(2 * self.limit)
            )),
        }
    }
}

/// Memory of this host, in bytes.
pub(super) fn memory() -> usize {
    // SAFETY: takes an integer and returns one, or -1.
    let [pages, size] = [libc::_SC_PHYS_PAGES, libc::_SC_PAGESIZE].map(|name| unsafe { libc::sysconf(name) });
    usize::try_from(pages).unwrap_or(0).saturating_mul(usize::try_from(size).unwrap_or(0))
}

/// Says of damage found in a commit's deltas where they lie.
pub(super) fn of_commit(no: CommitNo, seq: Seq, error: Error) -> Error {
    match error {
        Error::Corrupt { object, detail } => {
            Error::corrupt(segment_name(seq), format!("{object} of commit {}: {detail}", no.0))
        }
        other => other,
    }
}

/// The newest checkpoint that belongs to `version`, from here or from the store. One that is damaged is passed
/// over, loudly: the log behind an older one leads to the same state.
async fn newest_checkpoint(
    ctx: &VolumeContext,
    dir: &StateDir,
    store: Option<&dyn Store>,
    version: Version,
) -> Result<Option<Root>> {
    let mut names: Vec<String> = dir.checkpoints()?.iter().map(|name| full_name(name)).collect();
    if let Some(store) = store {
        // The newest come first, and one of a page full will do; for older versions all are looked through.
        names.extend(match version {
            Version::Newest => {
                let page = store.list("checkpoint/", None, LIST_PAGE).await?;
                page.into_iter().map(|object| object.name).collect()
            }
            _ => list_checkpoints(store).await?,
        });
    }
    names.sort(); // the inverted number puts the newest first
    names.dedup();
    if let Version::Commit(at) = version {
        names.retain(|name| checkpoint::commit_of(name).is_some_and(|no| no <= at));
    }
    if let Version::Time(at) = version {
        names = checkpoints_before(ctx, dir, store, names, at).await?;
    }
    for name in names {
        if let Some(root) = usable_checkpoint(ctx, dir, store, &name).await?
            // The newest is held against the end of the chain when that is known.
            && (version == Version::Newest || held::has_root(ctx, dir, store, &root).await?)
        {
            return Ok(Some(root));
        }
    }
    Ok(None)
}

/// The newest checkpoint in the store, whatever this host holds.
pub(super) async fn stored_checkpoint(ctx: &VolumeContext, store: &dyn Store) -> Result<Option<Root>> {
    for name in list_checkpoints(store).await? {
        match stored_root(ctx, store, &name).await {
            Ok(root) => return Ok(Some(root)),
            Err(Error::Store(StoreError::NotFound { .. })) => {}
            Err(Error::Store(e)) => return Err(e.into()),
            Err(e) => ::log::error!("{e}; passing it over for an older checkpoint"),
        }
    }
    Ok(None)
}

/// What the checkpoint of that name in the store says.
pub(super) async fn stored_root(ctx: &VolumeContext, store: &dyn Store, name: &str) -> Result<Root> {
    let (bytes, _) = store.get_suffix(name, CHECKPOINT_MAX).await?;
    checkpoint::open(&bytes, name, ctx.id, &ctx.key, &ctx.writer_public)
}

/// Of the names, the newest first, those of checkpoints made at `at` or before; few requests among many (they are in
/// order of time).
async fn checkpoints_before(
    ctx: &VolumeContext,
    dir: &StateDir,
    store: Option<&dyn Store>,
    mut names: Vec<String>,
    at: Timestamp,
) -> Result<Vec<String>> {
    let (mut low, mut high) = (0, names.len());
    while low < high {
        let middle = (low + high) / 2;
        match usable_checkpoint(ctx, dir, store, &names[middle]).await? {
            Some(root) if root.time <= at => high = middle,
            Some(_) => low = middle + 1,
            None => {
                names.remove(middle);
                high -= 1;
            }
        }
    }
    Ok(names.split_off(high))
}

/// The checkpoint of that name; `None`, loudly, if it is damaged or gone.
pub(super) async fn usable_checkpoint(
    ctx: &VolumeContext,
    dir: &StateDir,
    store: Option<&dyn Store>,
    name: &str,
) -> Result<Option<Root>> {
    match read_checkpoint(ctx, dir, store, name).await {
        Ok(root) => Ok(Some(root)),
        Err(Error::Corrupt { object, detail }) => {
            ::log::error!("{object}: {detail}; passing it over for an older checkpoint");
            Ok(None)
        }
        Err(Error::Store(StoreError::NotFound { name })) => {
            ::log::warn!("{name}: listed, but not there; passing it over");
            Ok(None)
        }
        Err(e) => Err(e),
    }
}

fn full_name(name: &str) -> String {
    if name.starts_with("checkpoint/") { name.into() } else { format!("checkpoint/{name}") }
}

/// Names of all checkpoints in the store, the newest first.
pub(super) async fn list_checkpoints(store: &dyn Store) -> std::result::Result<Vec<String>, StoreError> {
    let mut names: Vec<String> = Vec::new();
    loop {
        let page = store.list("checkpoint/", names.last().map(String::as_str), LIST_PAGE).await?;
        let more = page.len() >= LIST_PAGE;
        names.extend(page.into_iter().map(|object| object.name));
        if !more {
            return Ok(names);
        }
    }
}

async fn read_checkpoint(
    ctx: &VolumeContext,
    dir: &StateDir,
    store: Option<&dyn Store>,
    name: &str,
) -> Result<Root> {
    let bytes = match (dir.read(name)?, store) {
        (Some(bytes), _) => Bytes::from(bytes),
        (None, Some(store)) => store.get_suffix(name, CHECKPOINT_MAX).await?.0,
        (None, None) => return Err(Error::corrupt(name, "is gone from the state directory")),
    };
    checkpoint::open(&bytes, name, ctx.id, &ctx.key, &ctx.writer_public)
}

/// A new inode must not get the number of one that is there.
pub(super) async fn check_next_ino(opened: &Opened, reader: &FrameReader) -> Result<()> {
    let maps = [&opened.recovery.replayed];
    let levels = crate::tree::Levels { maps: &maps, tree: &opened.recovery.tree, frames: reader };
    let all = key::everything();
    let last = loop {
        match levels.last(&all.start, &all.end) {
            Err(Error::Missing(ptrs)) => match reader.fetch(&ptrs).await {
                Err(Error::Store(e)) if e.may_pass() => {
                    ::log::warn!("the number of the next inode is not held against the tree: {e}");
                    return Ok(());
                }
                fetched => fetched?,
            },
            found => break found?,
        }
    };
    let mut number = [0; 8];
    last.iter().flat_map(|(key, _)| key).zip(&mut number).for_each(|(byte, place)| *place = *byte);
    let (found, next) = (u64::from_be_bytes(number), opened.recovery.next_ino);
    if found < next && next > Ino::ROOT.0 {
        return Ok(());
    }
    Err(Error::corrupt("the tree", format!("it says that the next inode is {next}, but holds inode {found}")))
}

/// Which of the local segments the store has, up to the first that it has not. When it does not answer, none: they are offered again, and the
/// uploader finds out that they are the same.
pub(super) async fn split_sent(
    ctx: &VolumeContext,
    store: Option<&dyn Store>,
    opened: &Opened,
) -> (Vec<ClosedSegment>, Vec<ClosedSegment>) {
    let local = opened.recovered.local.clone();
    let (Some(first), Some(store)) = (local.first(), store) else { return (Vec::new(), local) };
    let mut there = HashSet::new();
    let mut after = segment_name(Seq(first.head.seq.0.saturating_sub(1)));
    while let Ok(page) = store.list("log/", Some(&after), 1000).await {
        let Some(last) = page.last() else { break };
        after = last.name.clone();
        there.extend(page.into_iter().map(|object| (object.name, object.size)));
    }
    // Uploads run side by side: what lies behind a gap is offered again, and found to be there already.
    let missing = |segment: &&ClosedSegment| !there.contains(&(segment_name(segment.head.seq), segment.len));
    let mut sent = local.iter().take_while(|segment| !missing(segment)).count();
    // Another writer's can be as long. What is newer than what is known to be stored is looked at; and not more than can
    // have been on its way.
    let known = local.iter().map(|segment| segment.stored).max().unwrap_or_default();
    let newer = |(_, segment): &(usize, &ClosedSegment)| segment.head.seq > known;
    let newer: Vec<_> = local.iter().enumerate().take(sent).rev().take(IN_FLIGHT_MAX).filter(newer).collect();
    for (at, segment) in &newer {
        match chain::stored_head(ctx, store, segment.head.seq).await {
            Ok(head) if head == segment.head => {}
            // The next would be waited for as long.
            Err(Error::Store(e)) if e.is_transient() => {
                sent = newer.last().map_or(sent, |(first, _)| *first);
                break;
            }
            // One that cannot be read now is offered again, too.
            _ => sent = *at,
        }
    }
    let unsent = local.get(sent..).unwrap_or_default().to_vec();
    (local.into_iter().take(sent).collect(), unsent)
}

/// What the volume is, and where its history ends.
pub(super) struct Found {
    pub superblock: Superblock,
    /// The superblock's bytes, if they are not pinned yet.
    pub to_pin: Option<Bytes>,
    pub ctx: Arc<VolumeContext>,
    pub opened: Opened,
}

/// Finds both in the store, or with none in what this host holds.
pub(super) async fn find(
    options: &OpenOptions,
    dir: &StateDir,
    store: Option<&dyn Store>,
    role: Role,
) -> Result<Found> {
    let (superblock, to_pin) = self::superblock(store, dir, &options.key).await?;
    let ctx = Arc::new(context(&options.key, &superblock)?);
    if let (Role::Reader, Some(store)) = (role, store) {
        divergent::refuse_reader(&ctx, dir, store).await?;
    }
    let opened = recover(&ctx, dir, &options.env, store, role, options.version).await?;
    if role == Role::Writer {
        held::refuse_unfinished(&ctx, dir, &opened.recovered)?;
        held::stands(opened.root.as_ref(), opened.recovered.head)?;
    }
    if let (Role::Reader, Some(store)) = (role, store) {
        let head = opened.recovered.head;
        if options.version == Version::Newest {
            trust::check_pin(&ctx, dir, store, head).await?;
            held::stands(opened.root.as_ref(), head)?;
        }
        options
            .trust
            .check_expected(&ctx, store, head.filter(|_| options.version == Version::Newest))
            .await?;
    }
    Ok(Found { superblock, to_pin, ctx, opened })
}

/// What the log is read with, from the store's superblock.
pub async fn context_of(store: &dyn Store, key: &KeyFile) -> Result<VolumeContext> {
    let (superblock, _) = crate::ops::init::load_superblock(store, key).await?;
    context(key, &superblock)
}

pub(super) fn context(key: &KeyFile, superblock: &Superblock) -> Result<VolumeContext> {
    let volume_key = key.volume_key().map_err(|e| Error::Refused(e.to_string()))?;
    Ok(VolumeContext {
        id: superblock.volume,
        key: volume_key.clone(),
        key_id: superblock.key_id,
        writer_public: superblock.writer_public,
        signer: key.signing.clone(),
    })
}

/// The newest checkpoint on this host that the store does not have, and the segment it needs: an upload that the last
/// run did not get to.
pub(super) async fn unsent_checkpoint(
    ctx: &VolumeContext,
    dir: &StateDir,
    store: Option<&dyn Store>,
) -> Result<Option<(String, Bytes, Seq)>> {
    let Some(name) = dir.checkpoints()?.first().map(|name| full_name(name)) else { return Ok(None) };
    if let Some(store) = store {
        match list_checkpoints(store).await {
            Ok(names) if names.contains(&name) => return Ok(None),
            // It is offered again, and found to be there.
            Err(e) => ::log::warn!("whether {name} was sent is not known: {e}"),
            Ok(_) => {}
        }
    }
    let Some(root) = usable_checkpoint(ctx, dir, None, &name).await? else { return Ok(None) };
    Ok(dir.read(&name)?.map(|bytes| (name, Bytes::from(bytes), root.root_seq)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::Value;

    #[test]
    fn a_replay_ends_when_its_changes_take_too_much_memory() {
        let mut replayed = Replayed { map: Delta::new(), weight: 0, limit: 0 };
        // One buffer behind all values: the account is of what they would take.
        let value = Value::from(vec![0; 16 << 20]);
        let change = |n: u8| vec![(vec![n], Some(value.clone()))];
        for _ in 0..100 {
            replayed.take(change(0)).expect("the same key again and again");
        }
        let refused = (1..100).find(|n| replayed.take(change(*n)).is_err());
        assert_eq!(refused, Some(63), "64 values of 16 MiB and what stands around them are more than 1 GiB");
        assert!(memory() > REPLAY_MIN / 16);
    }
}
