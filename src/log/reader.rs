//! Reading frames back: from memory, from the spool, from the ranges cached on disk, and, in [`FrameReader::fetch`]
//! only, from the store.
//! Invariant: a frame is handed out only after it opened at its place; what does not open in the cache is dropped
//! and fetched again, what does not open in the spool or from the store is damage and is named. Files in `log/` are
//! never changed here.

use super::ahead::ReadAhead;
use super::gather::{coalesce, cut};
use super::in_flight::InFlight;
use super::parts::SegmentFile;
use super::segment::{HEADER_LEN, Header, SegmentCipher, UncheckedHeader, VolumeContext, segment_name};
use super::statedir::StateDir;
use super::{Error, Frames, Part, Result};
use crate::cache::frames::FrameCache;
use crate::cache::ranges::Ranges;
use crate::clock::Env;
use crate::disk::{DiskFile, Mode};
use crate::store::Store;
use crate::types::{FrameKind, FramePtr, Seq};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use lru::LruCache;
use parking_lot::Mutex;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io::ErrorKind;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio::time::Instant;

/// Requests to the store that one fetch has in flight.
const REQUESTS_IN_FLIGHT: usize = 8;
/// Headers of segments that are kept in memory.
const CIPHERS_KEPT: NonZeroUsize = NonZeroUsize::new(4096).expect("not zero");
/// Hints about dead frames beyond this number are dropped: eviction finds those bytes by age.
const DEAD_HINTS_MAX: usize = 1 << 20;
const HEADER_RANGE: Range<u64> = 0..HEADER_LEN as u64;

/// What a [`FrameReader`] may use.
#[derive(Clone, Copy, Debug)]
pub struct ReaderLimits {
    /// Opened frames in memory, in bytes.
    pub frame_cache_bytes: usize,
    /// Cached ranges on disk, in bytes; the spool does not count.
    pub disk_cache_bytes: u64,
    /// Segment files held open.
    pub open_files: usize,
}

/// Reads the frames of a volume.
pub struct FrameReader {
    /// Before the state directory, whose lock keeps others out: it is closed when it goes, and that is in this order.
    ranges: Ranges,
    dir: Arc<StateDir>,
    ctx: Arc<VolumeContext>,
    store: Option<Arc<dyn Store>>,
    env: Env,
    limits: ReaderLimits,
    frames: FrameCache,
    files: Mutex<LruCache<Seq, Arc<OpenFile>>>,
    ciphers: Mutex<LruCache<Seq, Arc<SegmentCipher>>>,
    in_flight: InFlight,
    ahead: ReadAhead,
    dead: Mutex<Dead>,
    /// Held while cached files are made, filled, punched or removed. Taken before any other lock here.
    disk: Mutex<()>,
}

pub(super) struct OpenFile {
    pub file: SegmentFile,
    pub cipher: Arc<SegmentCipher>,
    /// An evictable copy: only its cached ranges count.
    pub cached: bool,
}

#[derive(Default)]
struct Dead {
    ranges: HashMap<Seq, Vec<Range<u64>>>,
    count: usize,
}

impl Frames for FrameReader {
    fn get(&self, ptr: FramePtr, kind: FrameKind) -> Result<Bytes> {
        let (found, plain) = self.held_or_read(ptr)?;
        if found != kind {
            let detail = format!("frame at {}+{} is {found:?}, not {kind:?}", ptr.offset, ptr.len);
            return Err(Error::corrupt(segment_name(ptr.seq), detail));
        }
        Ok(plain)
    }

    fn run_onto(&self, parts: &[Part], out: &mut Vec<u8>) -> usize {
        // What is read by itself is not kept: it is in the kernel's cache above.
        self.read_run(parts, out)
    }
}

impl FrameReader {
    /// True when the frame can be read from the open file, and is not in memory.
    pub(super) fn here(&self, open: &OpenFile, ptr: FramePtr) -> bool {
        !self.frames.contains(ptr) && self.holds(open, ptr)
    }

    /// True when the open file has the frame.
    fn holds(&self, open: &OpenFile, ptr: FramePtr) -> bool {
        !open.cached || self.ranges.covers(ptr.seq, &ptr.range())
    }

    /// Takes note that a cached segment was used.
    pub(super) fn touch(&self, seq: Seq) {
        self.ranges.touch(seq, self.now());
    }

    /// A frame's kind and plain bytes, from memory or from this host's files.
    fn held_or_read(&self, ptr: FramePtr) -> Result<(FrameKind, Bytes)> {
        if let Some(held) = self.frames.get(ptr) {
            return Ok(held);
        }
        let opened = self.read_local(ptr)?.ok_or_else(|| Error::Missing(vec![ptr]))?;
        self.frames.put(ptr, opened.0, opened.1.clone());
        Ok(opened)
    }

    /// A reader over the state directory and, for what is not there, the store.
    pub fn new(
        dir: Arc<StateDir>,
        ctx: Arc<VolumeContext>,
        store: Option<Arc<dyn Store>>,
        env: Env,
        limits: ReaderLimits,
    ) -> Result<FrameReader> {
        let ranges = match dir.disk().is_real() {
            true => Ranges::open(&dir.index_path()),
            false => Ranges::in_memory(),
        };
        let cached: HashSet<Seq> = dir.cache_segments()?.into_iter().collect();
        ranges
            .oldest_first()
            .into_iter()
            .filter(|seq| !cached.contains(seq))
            .for_each(|seq| ranges.forget(seq));
        // A file the index does not know (a crash, an index that was removed) is indexed by what it holds: frames
        // are authenticated when they are opened, so a wrong guess costs a request and never gives wrong bytes.
        for seq in cached.into_iter().filter(|seq| !ranges.contains(*seq)) {
            let path = dir.cache_path(seq);
            let held = dir.disk().open(&path, Mode::Read).and_then(|file| file.data_ranges());
            let held = held.map_err(Error::io(format!("look at {}", path.display())))?;
            held.into_iter().for_each(|range| ranges.insert(seq, range, 0));
        }
        let open_files = NonZeroUsize::new(limits.open_files).unwrap_or(NonZeroUsize::MIN);
        Ok(FrameReader {
            frames: FrameCache::new(limits.frame_cache_bytes),
            ranges,
            files: Mutex::new(LruCache::new(open_files)),
            ciphers: Mutex::new(LruCache::new(CIPHERS_KEPT)),
            in_flight: InFlight::default(),
            ahead: ReadAhead::new(),
            dead: Mutex::new(Dead::default()),
            disk: Mutex::new(()),
            dir,
            ctx,
            store,
            env,
            limits,
        })
    }

    /// Those of `ptrs` that are not on this host, each once.
    pub fn missing_of(&self, ptrs: &[FramePtr]) -> Vec<FramePtr> {
        let mut seen = HashSet::with_capacity(ptrs.len());
        let missing = |ptr: &FramePtr| {
            if self.frames.contains(*ptr) {
                return false;
            }
            match self.open_file(ptr.seq) {
                Ok(Some(file)) => !self.holds(&file, *ptr),
                Ok(None) => true,
                // Damage in the spool: reading it says so, fetching would not mend it.
                Err(_) => false,
            }
        };
        ptrs.iter().filter(|ptr| seen.insert(**ptr)).copied().filter(missing).collect()
    }

    /// Brings frames that are only in the store to this host: neighbours in one request, several requests at a
    /// time, and what another fetch already asks for only once. Who waits for another fetch shares its fate when the store
    /// does not answer that one: many that want the same are told together, not one after the other.
    pub async fn fetch(&self, ptrs: &[FramePtr]) -> Result<()> {
        let begun = Instant::now();
        let mut wanted = self.missing_of(ptrs);
        while !wanted.is_empty() {
            if let Some(error) = self.in_flight.unanswered(&wanted, begun) {
                return Err(error.into());
            }
            let claim = self.in_flight.claim(&wanted);
            if !claim.ptrs.is_empty() {
                let fetched = self.fetch_claimed(&claim.ptrs).await;
                claim.ended(&fetched);
                fetched?;
                wanted.retain(|ptr| !claim.ptrs.contains(ptr));
            }
            drop(claim);
            self.in_flight.wait_for_one(&wanted).await;
            wanted = self.missing_of(&wanted);
        }
        Ok(())
    }

    /// A hint that the newest tree does not refer to the frame any more: its cached copy may go first.
    pub fn dead(&self, ptr: FramePtr) {
        self.frames.remove(ptr);
        let mut dead = self.dead.lock();
        if dead.count < DEAD_HINTS_MAX {
            dead.count += 1;
            dead.ranges.entry(ptr.seq).or_default().push(ptr.range());
        }
    }

    /// Makes an uploaded segment that is older than the newest checkpoint evictable: it moves from `log/` to the
    /// cache.
    pub fn retire(&self, seq: Seq) -> Result<()> {
        let _disk = self.disk.lock();
        let (from, to) = (self.dir.log_path(seq), self.dir.cache_path(seq));
        let wrap = |e| Error::io(format!("move {} to the cache", from.display()))(e);
        let len = match self.dir.disk().size(&from) {
            Ok(len) => len,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(wrap(e)),
        };
        self.make_parent(&to).and_then(|()| self.dir.disk().rename(&from, &to)).map_err(wrap)?;
        self.ranges.insert(seq, 0..len, self.now());
        self.ranges.flush();
        self.files.lock().pop(&seq);
        Ok(())
    }

    /// Writes the index of cached ranges to the disk.
    pub fn flush_index(&self) {
        self.ranges.flush_to_disk();
    }

    /// Brings the cached ranges under their limit: dead frames are punched out first, then the segments that were
    /// used longest ago go. The newest cached segment stays: a restart without the store needs its trailer.
    pub fn evict(&self) -> Result<()> {
        let _disk = self.disk.lock();
        let limit = self.limits.disk_cache_bytes;
        if self.ranges.bytes() <= limit {
            return Ok(());
        }
        self.punch_dead();
        // A little more than must be, so that the next few writes do not evict again.
        let target = limit - limit / 16;
        let segments = self.ranges.oldest_first();
        let newest = segments.iter().max().copied();
        for seq in segments.into_iter().filter(|seq| Some(*seq) != newest) {
            if self.ranges.bytes() <= target {
                break;
            }
            self.files.lock().pop(&seq);
            let path = self.dir.cache_path(seq);
            match self.dir.disk().remove(&path) {
                Err(e) if e.kind() != ErrorKind::NotFound => {
                    return Err(Error::io(format!("remove {}", path.display()))(e));
                }
                _ => self.ranges.forget(seq),
            }
        }
        Ok(())
    }

    /// Bytes cached on disk, the spool not counted.
    pub fn disk_cache_bytes(&self) -> u64 {
        self.ranges.bytes()
    }

    /// Bytes of opened frames in memory.
    pub fn frame_cache_bytes(&self) -> usize {
        self.frames.bytes()
    }

    fn now(&self) -> u64 {
        self.env.clock.now().secs.max(0).cast_unsigned()
    }

    fn punch_dead(&self) {
        let mut dead = self.dead.lock();
        let segments: BTreeSet<Seq> =
            dead.ranges.keys().copied().filter(|seq| self.ranges.contains(*seq)).collect();
        if segments.is_empty() {
            return;
        }
        // A power cut may give a file its old name in `log/` back, where nothing may have holes.
        let groups: BTreeSet<PathBuf> =
            segments.iter().filter_map(|seq| Some(self.dir.cache_path(*seq).parent()?.to_owned())).collect();
        let moved = groups.iter().try_for_each(|group| self.dir.disk().sync_dir(group));
        if let Err(e) = moved.map_err(Error::io("sync the cache")).and_then(|()| self.dir.sync_dir("log")) {
            return ::log::warn!("nothing is punched out of the cache: {e}");
        }
        for seq in segments {
            let ranges = dead.ranges.remove(&seq).unwrap_or_default();
            dead.count -= ranges.len();
            let Ok(file) = self.dir.disk().open(&self.dir.cache_path(seq), Mode::Write) else { continue };
            for range in merge(ranges) {
                // Forgotten first: what is being punched must not be taken for frames.
                self.ranges.remove(seq, &range);
                if let Err(e) = file.punch(range) {
                    ::log::debug!("cannot punch holes into {seq}: {e}");
                }
            }
        }
    }

    /// The segment's file on this host, if there is one that can be read from.
    pub(super) fn open_file(&self, seq: Seq) -> Result<Option<Arc<OpenFile>>> {
        if let Some(file) = self.files.lock().get(&seq) {
            return Ok(Some(file.clone()));
        }
        let path = self.dir.log_path(seq);
        let found = match self.dir.disk().open(&path, Mode::Read) {
            Ok(file) => {
                let header = self.read_header(&*file, seq, &path.display().to_string())?;
                Some((file, header, false))
            }
            Err(e) if e.kind() == ErrorKind::NotFound => self.open_cached(seq),
            Err(e) => return Err(Error::io(format!("open {}", path.display()))(e)),
        };
        Ok(found.map(|(file, header, cached)| {
            let cipher = Arc::new(SegmentCipher::new(&self.ctx, header));
            let whole = self.dir.file(if cached { self.dir.cache_path(seq) } else { path });
            let open = Arc::new(OpenFile { file: SegmentFile::new(file, whole), cipher, cached });
            self.files.lock().put(seq, open.clone());
            open
        }))
    }

    fn open_cached(&self, seq: Seq) -> Option<(Arc<dyn DiskFile>, Header, bool)> {
        if !self.ranges.covers(seq, &HEADER_RANGE) {
            return None;
        }
        let path = self.dir.cache_path(seq);
        let read = || {
            let file = self.dir.disk().open(&path, Mode::Read);
            let file = file.map_err(Error::io(format!("open {}", path.display())))?;
            let header = self.read_header(&*file, seq, &path.display().to_string())?;
            Ok::<_, Error>((file, header, true))
        };
        read()
            .inspect_err(|e| {
                ::log::warn!("cached copy dropped: {e}");
                self.ranges.remove(seq, &HEADER_RANGE);
            })
            .ok()
    }

    fn read_header(&self, file: &dyn DiskFile, seq: Seq, object: &str) -> Result<Header> {
        let mut bytes = [0; HEADER_LEN];
        file.read_exact_at(&mut bytes, 0).map_err(|e| Error::corrupt(object, format!("header: {e}")))?;
        UncheckedHeader::parse(&bytes, object)?.verify(&self.ctx, seq, object)
    }

    fn read_local(&self, ptr: FramePtr) -> Result<Option<(FrameKind, Bytes)>> {
        let Some(open) = self.open_file(ptr.seq)? else { return Ok(None) };
        if !self.holds(&open, ptr) {
            return Ok(None);
        }
        let mut sealed = vec![0; ptr.len as usize];
        let opened = open
            .file
            .cached()
            .read_exact_at(&mut sealed, ptr.offset.into())
            .map_err(|e| {
                let detail = format!("frame at {}+{}: {e}", ptr.offset, ptr.len);
                Error::corrupt(segment_name(ptr.seq), detail)
            })
            .and_then(|()| open.cipher.open_any(ptr, sealed));
        match opened {
            Ok(opened) => {
                if open.cached {
                    self.touch(ptr.seq);
                }
                Ok(Some(opened))
            }
            Err(e) => {
                let path = self.dir.log_path(ptr.seq);
                // A file that was retired while it was open may have holes by now.
                if !open.cached && self.dir.disk().size(&path).is_ok() {
                    return Err(match e {
                        Error::Corrupt { detail, .. } => Error::corrupt(path.display(), detail),
                        other => other,
                    });
                }
                ::log::warn!("cached copy dropped: {e}");
                self.files.lock().pop(&ptr.seq);
                self.ranges.remove(ptr.seq, &ptr.range());
                Ok(None)
            }
        }
    }

    async fn fetch_claimed(&self, ptrs: &BTreeSet<FramePtr>) -> Result<()> {
        let store = self.store.as_ref().ok_or_else(|| {
            let names: Vec<String> = ptrs.iter().take(1).map(|ptr| segment_name(ptr.seq)).collect();
            Error::Refused(format!("{} is not on this host, and no store was given", names.join(", ")))
        })?;
        let mut by_segment: BTreeMap<Seq, Vec<FramePtr>> = BTreeMap::new();
        ptrs.iter().for_each(|ptr| by_segment.entry(ptr.seq).or_default().push(*ptr));
        let (mut requests, mut unsized_segments) = (Vec::new(), Vec::new());
        for (seq, ptrs) in &by_segment {
            let mut wanted: Vec<Range<u64>> = ptrs.iter().map(FramePtr::range).collect();
            if self.known_cipher(*seq).is_none() {
                wanted.push(HEADER_RANGE);
            }
            let mut planned = coalesce(wanted);
            if self.limits.disk_cache_bytes > 0 && self.ahead.extend(*seq, &mut planned) {
                unsized_segments.push(*seq);
            }
            requests.extend(planned.into_iter().map(|range| (*seq, range)));
        }
        let learn = unsized_segments.into_iter().map(|seq| async move {
            // Only reading ahead wants it: no size, no reading ahead.
            if let Ok((_, size)) = store.get_suffix(&segment_name(seq), 1).await {
                self.ahead.learned(seq, size);
            }
        });
        let learn = futures::future::join_all(learn);
        let pieces = futures::stream::iter(requests)
            .map(|(seq, range)| async move {
                let start = range.start;
                let bytes = store.get_range(&segment_name(seq), range).await?;
                Ok::<_, Error>((seq, start, bytes))
            })
            .buffer_unordered(REQUESTS_IN_FLIGHT)
            .try_collect::<Vec<(Seq, u64, Bytes)>>();
        let (pieces, _) = futures::join!(pieces, learn);
        let pieces = pieces?;
        let mut of_segment: HashMap<Seq, Vec<(u64, Bytes)>> = HashMap::new();
        for (seq, start, bytes) in pieces {
            of_segment.entry(seq).or_default().push((start, bytes));
        }
        for (seq, ptrs) in by_segment {
            self.admit(seq, &ptrs, of_segment.remove(&seq).unwrap_or_default())?;
        }
        self.evict().unwrap_or_else(|e| ::log::warn!("the cache stays over its limit: {e}"));
        Ok(())
    }

    fn known_cipher(&self, seq: Seq) -> Option<Arc<SegmentCipher>> {
        if let Some(cipher) = self.ciphers.lock().get(&seq) {
            return Some(cipher.clone());
        }
        self.files.lock().peek(&seq).map(|open| open.cipher.clone())
    }

    /// Opens the frames in what came from the store, and only then keeps any of it.
    fn admit(&self, seq: Seq, ptrs: &[FramePtr], pieces: Vec<(u64, Bytes)>) -> Result<()> {
        let object = segment_name(seq);
        let short = || Error::corrupt(&object, "the store sent other bytes than were asked for");
        let cipher = match self.known_cipher(seq) {
            Some(cipher) => cipher,
            None => {
                let head = cut(&pieces, &HEADER_RANGE).ok_or_else(short)?;
                let header = UncheckedHeader::parse(&head, &object)?.verify(&self.ctx, seq, &object)?;
                Arc::new(SegmentCipher::new(&self.ctx, header))
            }
        };
        let mut opened = Vec::with_capacity(ptrs.len());
        for ptr in ptrs {
            let sealed = cut(&pieces, &ptr.range()).ok_or_else(short)?.to_vec();
            opened.push((*ptr, cipher.open_any(*ptr, sealed)?));
        }
        self.ciphers.lock().put(seq, cipher.clone());
        if self.limits.disk_cache_bytes > 0
            && let Err(e) = self.keep(seq, cipher.header(), &pieces)
        {
            ::log::warn!("{object} is not cached on disk: {e}");
        }
        for (ptr, (kind, plain)) in opened {
            self.frames.put(ptr, kind, plain);
        }
        Ok(())
    }

    fn keep(&self, seq: Seq, header: &Header, pieces: &[(u64, Bytes)]) -> Result<()> {
        let _disk = self.disk.lock();
        let path = self.dir.cache_path(seq);
        let wrap = |e| Error::io(format!("write {}", path.display()))(e);
        self.make_parent(&path).map_err(wrap)?;
        let file = self.dir.disk().open(&path, Mode::WriteOrCreate).map_err(wrap)?;
        let now = self.now();
        if !self.ranges.covers(seq, &HEADER_RANGE) {
            file.write_all_at(&header.encode(), 0).map_err(|(_, e)| wrap(e))?;
            self.ranges.insert(seq, HEADER_RANGE, now);
        }
        for (start, bytes) in pieces {
            file.write_all_at(bytes, *start).map_err(|(_, e)| wrap(e))?;
            self.ranges.insert(seq, *start..*start + bytes.len() as u64, now);
        }
        Ok(())
    }

    fn make_parent(&self, path: &Path) -> std::io::Result<()> {
        path.parent().map_or(Ok(()), |parent| self.dir.disk().create_dirs(parent))
    }
}

fn merge(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut merged: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

#[cfg(test)]
#[path = "reader_tests.rs"]
mod tests;
