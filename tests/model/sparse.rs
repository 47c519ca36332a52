//! The content of a file as the model has it: which bytes are data, and what they are.
//! Invariant: chunks do not overlap and end at or before `size`; what no chunk covers is a hole and reads as zeros.

use bytes::Bytes;
use std::collections::BTreeMap;
use std::ops::Range;

#[derive(Clone, Default, Debug)]
pub struct Sparse {
    pub size: u64,
    chunks: BTreeMap<u64, Bytes>,
}

impl Sparse {
    /// A byte is data once it is written, also if it is zero.
    pub fn write(&mut self, at: u64, data: Bytes) {
        let end = at + data.len() as u64;
        self.punch(at..end);
        if !data.is_empty() {
            self.chunks.insert(at, data);
        }
        self.size = self.size.max(end);
    }

    /// Makes a range a hole; the size stays.
    pub fn punch(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let mut touched: Vec<u64> = self.chunks.range(range.clone()).map(|(at, _)| *at).collect();
        touched.extend(self.chunks.range(..range.start).next_back().map(|(at, _)| *at));
        for at in touched {
            let chunk = self.chunks.remove(&at).unwrap();
            let end = at + chunk.len() as u64;
            if at < range.start {
                let keep = (range.start.min(end) - at) as usize;
                self.chunks.insert(at, chunk.slice(..keep));
            }
            if end > range.end {
                self.chunks.insert(range.end, chunk.slice((range.end - at) as usize..));
            }
        }
    }

    pub fn truncate(&mut self, size: u64) {
        self.punch(size..u64::MAX);
        self.size = size;
    }

    /// At most `len` bytes at `at`, fewer at the end of the file.
    pub fn read(&self, at: u64, len: u64) -> Vec<u8> {
        let end = self.size.min(at.saturating_add(len)).max(at);
        let mut out = vec![0; (end - at) as usize];
        for (start, chunk) in self.pieces(at..end) {
            let to = (start - at) as usize;
            out[to..to + chunk.len()].copy_from_slice(&chunk);
        }
        out
    }

    /// The data in a range, cut to it.
    pub fn pieces(&self, range: Range<u64>) -> Vec<(u64, Bytes)> {
        let before = self.chunks.range(..range.start).next_back();
        let mut out = Vec::new();
        for (at, chunk) in before.into_iter().chain(self.chunks.range(range.clone())) {
            let (from, to) = ((*at).max(range.start), (at + chunk.len() as u64).min(range.end));
            if from < to {
                out.push((from, chunk.slice((from - at) as usize..(to - at) as usize)));
            }
        }
        out
    }

    /// The stretches of data, as long as they go.
    pub fn stretches(&self) -> Vec<Range<u64>> {
        let mut out: Vec<Range<u64>> = Vec::new();
        for (at, chunk) in &self.chunks {
            let end = at + chunk.len() as u64;
            match out.last_mut() {
                Some(last) if last.end == *at => last.end = end,
                _ => out.push(*at..end),
            }
        }
        out
    }

    /// Number of bytes that are data.
    pub fn data_bytes(&self) -> u64 {
        self.chunks.values().map(|chunk| chunk.len() as u64).sum()
    }

    /// lseek(2) with `SEEK_DATA` (`data`) or `SEEK_HOLE`; `None` is `ENXIO`.
    pub fn seek(&self, at: u64, data: bool) -> Option<u64> {
        if at >= self.size {
            return None;
        }
        let next = self.stretches().into_iter().find(|stretch| stretch.end > at);
        match (next, data) {
            (Some(stretch), true) => Some(stretch.start.max(at)),
            (None, true) => None,
            (Some(stretch), false) if stretch.start <= at => Some(stretch.end),
            (_, false) => Some(at),
        }
    }
}
