//! The writer of the log: appends sealed frames to the open segment in the spool and closes it.
//! Invariant: an offset is sealed at most once; what was handed out as a pointer stays valid until a crash; a
//! commit is in the segment whole or not at all; after an error that says nothing of what reached the disk the
//! writer is latched and writes nothing more.
//!
//! A full disk is not such an error: the frames that did not fit stay in the buffer, and the next call writes the
//! same bytes again. An append that fails for want of room has sealed nothing.

use super::blocks::sealed_len;
use super::closing::Ending;
use super::frame::{FRAME_OVERHEAD, FRAME_PLAIN_MAX};
use super::segment::{
    DeltaHeader, HEADER_LEN, Header, Index, IndexedCommit, Kind, SEGMENT_LEN_MAX, SegmentCipher, TRAILER_LEN,
    VolumeContext, segment_name,
};
use super::statedir::StateDir;
use super::steps::Steps;
use super::{Append, ClosedSegment, Error, Result};
use crate::clock::Env;
use crate::crypto::Hasher;
use crate::disk::{DiskFile, Mode};
use crate::types::{CommitNo, Epoch, FrameKind, FramePtr, Head, Seq, Timestamp};
use std::io;
use std::path::Path;
use std::sync::Arc;

/// A segment whose deltas have this many plain bytes is closed, whatever they are packed to. Far below what a reader
/// bounds, for one commit more can follow.
const DELTA_BYTES_MAX: u64 = 64 << 20;
/// The buffer is written out when it holds this many bytes.
const BUFFER_LEN: usize = 1 << 20;
type Create = Box<dyn Fn(&Path) -> io::Result<Arc<dyn DiskFile>> + Send>;

/// How many of the last bytes of an open segment, or of all, were written: behind them lie zeros that were laid out.
pub fn written_len(bytes: &[u8]) -> usize {
    bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1)
}

/// Makes what the segment's file was told durable.
fn sync_file(file: &dyn DiskFile, seq: Seq) -> Result<()> {
    file.sync().map_err(|e| Error::io(format!("sync {}", segment_name(seq)))(e))
}

/// The one writer of a volume's log on this host.
pub struct LogWriter {
    dir: Arc<StateDir>,
    ctx: Arc<VolumeContext>,
    env: Env,
    epoch: Epoch,
    prev: Option<Head>,
    next_seq: Seq,
    last_commit: CommitNo,
    stored: Seq,
    open: Option<OpenSegment>,
    latched: Option<String>,
    create: Create,
}

struct OpenSegment {
    seq: Seq,
    file: Arc<dyn DiskFile>,
    cipher: SegmentCipher,
    /// Sealed bytes that follow the first `written` ones of the file.
    buffer: Vec<u8>,
    written: u64,
    steps: Steps,
    /// Bytes known durable.
    synced: u64,
    dir_synced: bool,
    /// Plain bytes of its deltas: who replays it unpacks so many.
    delta_bytes: u64,
    hasher: Hasher,
    index: Index,
}

impl LogWriter {
    /// A writer that continues behind segment `prev` and commit `last_commit`. It creates no file before the first
    /// append.
    pub fn new(
        dir: Arc<StateDir>,
        ctx: Arc<VolumeContext>,
        env: Env,
        epoch: Epoch,
        prev: Option<Head>,
        next_seq: Seq,
        last_commit: CommitNo,
    ) -> LogWriter {
        let disk = dir.disk().clone();
        let create: Create = Box::new(move |path| disk.open(path, Mode::CreateNew));
        let stored = Seq(0);
        LogWriter {
            dir,
            ctx,
            env,
            epoch,
            prev,
            next_seq,
            last_commit,
            stored,
            open: None,
            latched: None,
            create,
        }
    }

    /// Lets tests put failing files under the writer.
    #[cfg(test)]
    pub(super) fn with_create(mut self, create: Create) -> LogWriter {
        self.create = create;
        self
    }

    /// Appends one commit as deltas with the bodies `parts`: all of it, or on an error nothing.
    pub fn append_commit(&mut self, no: CommitNo, time: Timestamp, parts: &[Vec<u8>]) -> Result<()> {
        if no <= self.last_commit {
            let (no, last) = (no.0, self.last_commit.0);
            return Err(Error::Refused(format!("commit {no} after commit {last}")));
        }
        let bytes = parts.iter().map(|part| part.len() + DeltaHeader::LEN).sum::<usize>();
        let longest = parts.iter().map(Vec::len).max().unwrap_or(0) + DeltaHeader::LEN;
        self.make_room(bytes + parts.len() * FRAME_OVERHEAD, longest)?;
        let open = self.opened()?;
        let first = open.index.frames.len();
        let synced = open.synced as u32;
        let empty = [Vec::new()];
        let parts = if parts.is_empty() { &empty } else { parts };
        let mut plain = Vec::new();
        for (i, part) in parts.iter().enumerate() {
            plain.clear();
            let last = i + 1 == parts.len();
            DeltaHeader { no, time, part: i as u32, last, synced }.encode_onto(&mut plain);
            plain.extend_from_slice(part);
            open.delta_bytes += plain.len() as u64;
            open.seal(FrameKind::Delta, &plain);
        }
        let deltas = first..open.index.frames.len();
        open.index.commits.push(IndexedCommit { no, time, deltas });
        self.last_commit = no;
        Ok(())
    }

    /// Writes what is buffered to the file, so that it can be read.
    pub fn flush(&mut self) -> Result<()> {
        self.check_latch()?;
        let Some(open) = &mut self.open else { return Ok(()) };
        match open.flush() {
            Ok(()) => Ok(()),
            Err(e) => Err(self.failed("write", e)),
        }
    }

    /// Makes everything appended so far durable. A failure of the disk latches the writer: what reached it is not known
    /// any more, and asking again would get a false yes.
    pub fn sync(&mut self) -> Result<()> {
        self.check_latch()?;
        let Some(open) = &mut self.open else { return Ok(()) };
        if let Err(e) = open.write_step() {
            return Err(self.failed("write", e));
        }
        let (dir, seq) = (&self.dir, open.seq);
        let direct = || dir.disk().open(&dir.log_path(seq), Mode::Direct);
        open.steps.lay_out(&*open.file, (open.synced, open.written), direct);
        if open.synced == open.written && open.dir_synced {
            return Ok(());
        }
        let synced = if open.dir_synced { Ok(()) } else { self.dir.sync_dir("log") };
        match synced.and_then(|()| sync_file(&*open.file, seq)) {
            Ok(()) => {
                (open.synced, open.dir_synced) = (open.written, true);
                Ok(())
            }
            Err(e) => {
                self.latch(&e);
                Err(e)
            }
        }
    }

    /// Closes the open segment: index, trailer, durable. `None` when none is open.
    pub fn close(&mut self) -> Result<Option<ClosedSegment>> {
        self.flush()?;
        let Some(open) = &self.open else { return Ok(None) };
        let end = Ending {
            ctx: &self.ctx,
            kind: Kind::Ordinary,
            prev: self.prev,
            last_commit: self.last_commit,
            stored: self.stored,
        };
        let closing = end.bytes(
            *open.cipher.header(),
            &open.index,
            open.hasher.clone(),
            open.written,
            open.synced,
            self.env.random_bytes(),
        )?;
        let (file, seq, written) = (open.file.clone(), open.seq, open.written);
        let end = written + closing.bytes.len() as u64;
        let whole = file.write_all_at(&closing.bytes, written).map_err(|(_, e)| e);
        // A segment ends with its trailer: what was laid out behind it goes.
        if let Err(e) =
            whole.and_then(|()| if open.steps.laid_out() > end { file.set_len(end) } else { Ok(()) })
        {
            let error = self.failed("write", e);
            // Nothing of the index is needed: the next attempt seals it anew, under a key of its own. What of it reached
            // the disk must not come back below what is written there next.
            let cut = file.set_len(written).map_err(Error::io(format!("cut {}", segment_name(seq))));
            cut.and_then(|()| sync_file(&*file, seq)).inspect_err(|e| self.latch(e))?;
            self.open.iter_mut().for_each(|open| open.steps.cut(written));
            return Err(error);
        }
        let durable = sync_file(&*file, seq).and_then(|()| {
            if self.open.as_ref().is_some_and(|o| o.dir_synced) { Ok(()) } else { self.dir.sync_dir("log") }
        });
        if let Err(e) = durable {
            self.latch(&e);
            return Err(e);
        }
        self.open = None;
        self.prev = Some(closing.head);
        self.next_seq = Seq(seq.0 + 1);
        Ok(Some(ClosedSegment {
            file: self.dir.file(self.dir.log_path(seq)),
            len: end,
            head: closing.head,
            last_commit: self.last_commit,
            stored: self.stored,
            closed_at: Some(self.env.clock.monotonic()),
        }))
    }

    /// Bytes in the open segment; 0 when none is open.
    pub fn open_len(&self) -> u64 {
        self.open.as_ref().map_or(0, OpenSegment::len)
    }

    /// True when the open segment ought to be closed: for its bytes, of which it shall have `target`, or for what its
    /// deltas unpack to, which a reader bounds.
    pub fn is_full(&self, target: u64) -> bool {
        self.open.as_ref().is_some_and(|open| open.len() >= target || open.delta_bytes >= DELTA_BYTES_MAX)
    }

    /// The newest closed segment.
    pub fn last_closed(&self) -> Option<Head> {
        self.prev
    }

    /// Number of the open segment.
    pub fn open_seq(&self) -> Option<Seq> {
        self.open.as_ref().map(|open| open.seq)
    }

    /// Number of the segment that the next append goes to.
    pub fn current_seq(&self) -> Seq {
        self.open_seq().unwrap_or(self.next_seq)
    }

    /// The newest commit appended.
    pub fn last_commit(&self) -> CommitNo {
        self.last_commit
    }

    /// Tells the writer that the store holds every segment up to `seq`; trailers from here on say so, which lets a
    /// reader abroad tell uploads that a disaster cut off from objects that the store has lost.
    pub fn set_stored(&mut self, seq: Seq) {
        self.stored = self.stored.max(seq);
    }

    /// Stops the writer for good, as when it has been fenced.
    pub fn latch_because(&mut self, reason: &str) {
        self.latched.get_or_insert_with(|| reason.to_owned());
    }

    fn check_latch(&self) -> Result<()> {
        match &self.latched {
            Some(reason) => Err(Error::Latched(reason.clone())),
            None => Ok(()),
        }
    }

    fn latch(&mut self, error: &Error) {
        self.latch_because(&error.to_string());
    }

    /// The error to return for a failed system call; latches unless the disk is only full.
    fn failed(&mut self, doing: &str, source: io::Error) -> Error {
        let error = Error::io(format!("{doing} {}", segment_name(self.current_seq())))(source);
        if !error.is_no_space() {
            self.latch(&error);
        }
        error
    }

    /// Makes sure that frames of `bytes` in all, none with more than `longest` plain bytes, can be appended without
    /// an error: everything that can fail, fails here.
    fn make_room(&mut self, bytes: usize, longest: usize) -> Result<()> {
        self.check_latch()?;
        let full =
            self.open_len().max(HEADER_LEN as u64) + bytes as u64 + TRAILER_LEN as u64 > SEGMENT_LEN_MAX;
        if longest > FRAME_PLAIN_MAX || full {
            return Err(Error::Refused(format!(
                "{bytes} bytes do not fit the open segment ({} bytes); close it first",
                self.open_len()
            )));
        }
        if self.open.as_ref().is_some_and(|open| open.buffer.len() >= BUFFER_LEN) {
            self.flush()?;
        }
        if self.open.is_none() {
            self.begin()?;
        }
        Ok(())
    }

    fn opened(&mut self) -> Result<&mut OpenSegment> {
        self.open.as_mut().ok_or_else(|| Error::Refused("no segment is open".into()))
    }

    fn begin(&mut self) -> Result<()> {
        if self.ctx.signer.is_none() {
            return Err(Error::Refused("this key file cannot write: it holds no signing key".into()));
        }
        let seq = self.next_seq;
        let file = match (self.create)(&self.dir.log_path(seq)) {
            Ok(file) => file,
            Err(e) => return Err(self.failed("create", e)),
        };
        let header = Header {
            volume: self.ctx.id,
            seq,
            epoch: self.epoch,
            key_id: self.ctx.key_id,
            salt: self.env.random_bytes(),
        };
        let mut buffer = Vec::with_capacity(BUFFER_LEN + BUFFER_LEN / 4);
        buffer.extend_from_slice(&header.encode());
        self.open = Some(OpenSegment {
            seq,
            file,
            cipher: SegmentCipher::new(&self.ctx, header),
            buffer,
            written: 0,
            steps: Steps::default(),
            synced: 0,
            dir_synced: false,
            delta_bytes: 0,
            hasher: Hasher::default(),
            index: Index::default(),
        });
        Ok(())
    }
}

impl Append for LogWriter {
    fn append(&mut self, kind: FrameKind, plain: &[u8]) -> Result<FramePtr> {
        assert!(
            !matches!(kind, FrameKind::Delta | FrameKind::Index),
            "deltas go through append_commit, indexes through close"
        );
        self.make_room(sealed_len(plain.len()), plain.len())?;
        Ok(self.opened()?.seal(kind, plain))
    }
}

impl OpenSegment {
    fn len(&self) -> u64 {
        self.written + self.buffer.len() as u64
    }

    /// Seals one frame into the buffer. Cannot fail; the caller has made room.
    fn seal(&mut self, kind: FrameKind, plain: &[u8]) -> FramePtr {
        let offset = u32::try_from(self.len()).expect("a segment stays below SEGMENT_LEN_MAX");
        let ptr = self.cipher.seal_into(offset, kind, plain, &mut self.buffer);
        self.index.frames.push((kind, ptr.offset, ptr.len));
        ptr
    }

    /// Writes out the buffer for a sync that follows at once.
    fn write_step(&mut self) -> io::Result<()> {
        match self.steps.write(&self.buffer, (self.synced, self.written))? {
            true => self.wrote(self.buffer.len()),
            false => self.flush()?,
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let outcome = self.file.write_all_at(&self.buffer, self.written);
        let done = match &outcome {
            Ok(()) => self.buffer.len(),
            Err((done, _)) => *done,
        };
        self.wrote(done);
        outcome.map_err(|(_, e)| e)
    }

    /// Takes note that the first `len` bytes of the buffer are in the file.
    fn wrote(&mut self, len: usize) {
        let bytes = &self.buffer[..len];
        self.hasher.update(bytes);
        self.written += len as u64;
        self.steps.wrote(bytes, self.written);
        self.buffer.drain(..len);
    }
}

#[cfg(test)]
#[path = "writer_tests.rs"]
mod tests;
