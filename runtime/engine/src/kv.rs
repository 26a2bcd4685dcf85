//! The KV cache: pages of a fixed number of tokens, shared between sequences by reference count.
//!
//! What a page holds is the kernels' affair, see `attar_artifact::manifest::KvType`. A sequence lists its pages in order of position. Pages
//! that two sequences share are copied before one of them writes.

use crate::device::cuda::Memory;
use crate::error::{Error, ErrorKind};
use crate::memory::Region;
use attar_artifact::manifest::{KvType, Model};

/// A page of the cache, the same in every layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct PageId(pub(crate) u32);

/// Which pages are free, and how many sequences hold each of the others.
#[derive(Debug)]
pub(crate) struct PagePool {
    refs: Vec<u32>,
    /// Taken from the end; starts in descending order, so pages are used from 0 on.
    free: Vec<PageId>,
}

impl PagePool {
    pub(crate) fn new(pages: u32) -> PagePool {
        PagePool { refs: vec![0; pages as usize], free: (0..pages).rev().map(PageId).collect() }
    }

    pub(crate) fn pages(&self) -> usize {
        self.refs.len()
    }

    /// A free page, now held once.
    pub(crate) fn alloc(&mut self) -> Option<PageId> {
        let page = self.free.pop()?;
        if let Some(refs) = self.refs.get_mut(page.0 as usize) {
            *refs = 1;
        }
        Some(page)
    }

    /// One more holder.
    pub(crate) fn retain(&mut self, page: PageId) {
        if let Some(refs) = self.refs.get_mut(page.0 as usize) {
            *refs += 1;
        }
    }

    /// One holder fewer; the last one frees the page.
    pub(crate) fn release(&mut self, page: PageId) {
        if let Some(refs) = self.refs.get_mut(page.0 as usize)
            && *refs > 0
        {
            *refs -= 1;
            if *refs == 0 {
                // Never grows past its first capacity: a page is in the list at most once.
                self.free.push(page);
            }
        }
    }

    pub(crate) fn holders(&self, page: PageId) -> u32 {
        self.refs.get(page.0 as usize).copied().unwrap_or(0)
    }
}

/// One sequence's tokens in the cache.
#[derive(Debug)]
pub(crate) struct Sequence {
    /// In order of position; room for the whole context is there from the start.
    pages: Vec<PageId>,
    /// Tokens stored.
    len: usize,
}

impl Sequence {
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn pages(&self) -> &[PageId] {
        &self.pages
    }

    /// `tokens` more have been stored.
    pub(crate) fn advance(&mut self, tokens: usize) {
        self.len += tokens;
    }
}

/// Where keys and values are.
#[derive(Debug)]
enum Store {
    Host(Region),
    Device(Memory),
}

/// Keys and values of all layers.
#[derive(Debug)]
pub(crate) struct KvCache {
    pub(crate) pool: PagePool,
    store: Store,
    page_len: usize,
    /// Bytes of a block: one page and KV head of one layer's keys.
    block_bytes: usize,
    kv_heads: usize,
    /// Bytes of one layer's keys.
    plane: usize,
    /// Most tokens of one sequence.
    context: usize,
    layers: usize,
}

/// Sizes of a cache.
struct Shape {
    pages: u32,
    block_bytes: usize,
    plane: usize,
    bytes: u64,
}

impl Shape {
    fn of(m: &Model, context: usize, sequences: usize) -> Result<Shape, Error> {
        let page_len = m.kv.page_len as usize;
        let kv_heads = m.kv_heads as usize;
        let block_bytes = m.kv.dtype.block_bytes(m.head_dim as usize, page_len);
        let pages = context.div_ceil(page_len).checked_mul(sequences).and_then(|p| u32::try_from(p).ok());
        let pages = pages.filter(|p| *p < i32::MAX as u32).ok_or_else(too_large)?;
        let blocks = (pages as usize).next_multiple_of(KvType::RUN).checked_mul(kv_heads);
        let plane = blocks.and_then(|b| b.checked_mul(block_bytes)).ok_or_else(too_large)?;
        let bytes =
            plane.checked_mul(m.layers as usize).and_then(|b| b.checked_mul(2)).ok_or_else(too_large)?;
        Ok(Shape { pages, block_bytes, plane, bytes: bytes as u64 })
    }
}

fn too_large() -> Error {
    let source = std::io::ErrorKind::OutOfMemory.into();
    ErrorKind::Memory { what: "the KV cache", bytes: u64::MAX, hint: HINT, source }.into()
}

impl KvCache {
    /// Room for `sequences` sequences of `context` tokens, in memory of a device, of which it needs [`KvCache::bytes`], or else
    /// of the host.
    pub(crate) fn new(
        m: &Model,
        context: usize,
        sequences: usize,
        device: Option<Memory>,
    ) -> Result<KvCache, Error> {
        let shape = Shape::of(m, context, sequences)?;
        let store = match device {
            Some(memory) if memory.len() < shape.bytes => return Err(too_large()),
            Some(memory) => Store::Device(memory),
            None => Store::Host(Region::zeroed(shape.bytes, "the KV cache", HINT)?),
        };
        Ok(KvCache {
            pool: PagePool::new(shape.pages),
            store,
            page_len: m.kv.page_len as usize,
            block_bytes: shape.block_bytes,
            kv_heads: m.kv_heads as usize,
            plane: shape.plane,
            context,
            layers: m.layers as usize,
        })
    }

    /// Bytes of all keys and values.
    pub(crate) fn bytes(m: &Model, context: usize, sequences: usize) -> Result<u64, Error> {
        Shape::of(m, context, sequences).map(|shape| shape.bytes)
    }

    /// An empty sequence.
    pub(crate) fn sequence(&self) -> Sequence {
        Sequence { pages: Vec::with_capacity(self.context.div_ceil(self.page_len)), len: 0 }
    }

    /// Makes room for `tokens` more tokens, in pages that no other sequence holds.
    ///
    /// Pages got before an error stay with the sequence.
    pub(crate) fn reserve(&mut self, seq: &mut Sequence, tokens: usize) -> Result<(), Error> {
        let needed = seq.len.saturating_add(tokens);
        if needed > self.context {
            return Err(ErrorKind::ContextOverflow { needed, capacity: self.context }.into());
        }
        let out_of_pages = ErrorKind::OutOfPages { pages: self.pool.pages() };
        let partial = seq.len / self.page_len;
        if tokens > 0
            && let Some(&shared) = seq.pages.get(partial)
            && self.pool.holders(shared) > 1
        {
            let Some(own) = self.pool.alloc() else { return Err(out_of_pages.into()) };
            if let Err(e) = self.copy_page(shared, own) {
                self.pool.release(own);
                return Err(e);
            }
            self.pool.release(shared);
            if let Some(slot) = seq.pages.get_mut(partial) {
                *slot = own;
            }
        }
        while seq.pages.len() * self.page_len < needed {
            let Some(page) = self.pool.alloc() else { return Err(out_of_pages.into()) };
            seq.pages.push(page);
        }
        Ok(())
    }

    /// Forgets all tokens from position `len` on.
    pub(crate) fn truncate(&mut self, seq: &mut Sequence, len: usize) {
        seq.len = seq.len.min(len);
        let keep = seq.len.div_ceil(self.page_len);
        while seq.pages.len() > keep {
            if let Some(page) = seq.pages.pop() {
                self.pool.release(page);
            }
        }
    }

    /// A sequence with the same tokens, sharing the pages.
    pub(crate) fn fork(&mut self, seq: &Sequence) -> Sequence {
        let mut out = self.sequence();
        let used = seq.len.div_ceil(self.page_len);
        for &page in seq.pages.iter().take(used) {
            self.pool.retain(page);
            out.pages.push(page);
        }
        out.len = seq.len;
        out
    }

    /// Address of a layer's keys, then of its values; 0 for a layer that is not there.
    pub(crate) fn addresses(&mut self, layer: usize) -> (u64, u64) {
        let start = match &mut self.store {
            Store::Host(region) => region.address(),
            Store::Device(memory) => memory.address(),
        };
        self.planes(start, layer)
    }

    /// As [`KvCache::addresses`], of a cache that is on a device; 0 for one that is not.
    pub(crate) fn device_addresses(&self, layer: usize) -> (u64, u64) {
        match &self.store {
            Store::Host(_) => (0, 0),
            Store::Device(memory) => self.planes(memory.address(), layer),
        }
    }

    fn planes(&self, start: u64, layer: usize) -> (u64, u64) {
        if layer >= self.layers {
            return (0, 0);
        }
        let plane = self.plane as u64;
        let keys = start + 2 * layer as u64 * plane;
        (keys, keys + plane)
    }

    fn copy_page(&mut self, from: PageId, to: PageId) -> Result<(), Error> {
        let (len, plane) = (self.block_bytes, self.plane);
        for head in 0..self.kv_heads {
            let at = |page: PageId| KvType::block_index(page.0 as usize, self.kv_heads, head) * len;
            let (from, to) = (at(from), at(to));
            for i in 0..2 * self.layers {
                let (start, to) = (i * plane + from, i * plane + to);
                match &mut self.store {
                    Store::Host(region) => region.bytes_mut().copy_within(start..start + len, to),
                    Store::Device(memory) => memory.copy_within(start, to, len)?,
                }
            }
        }
        Ok(())
    }
}

const HINT: &str = "; open a smaller context";

#[cfg(test)]
mod tests {
    use super::*;
    use attar_artifact::manifest::KvSpec;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn model() -> Model {
        Model {
            name: String::new(),
            architecture: String::new(),
            layers: 2,
            hidden: 4,
            heads: 2,
            kv_heads: 2,
            head_dim: 2,
            vocab: 8,
            context_length: 64,
            parameters: 0,
            rope: Vec::new(),
            kv: KvSpec { dtype: KvType::F16, page_len: 4, span: 16 },
            eos: Vec::new(),
            bos: None,
        }
    }

    fn write(kv: &mut KvCache, seq: &mut Sequence, value: u8) -> Result<(), Error> {
        kv.reserve(seq, 1)?;
        let (page, slot) = (seq.pages[seq.len / 4], seq.len % 4);
        for i in 0..4 {
            for head in 0..2 {
                // Two elements of two bytes per token; where in the block is of no concern here.
                let block = KvType::block_index(page.0 as usize, 2, head) * kv.block_bytes;
                let at = i * kv.plane + block + slot * 4;
                host(&mut kv.store)[at..at + 4].fill(value.wrapping_add((2 * i + head) as u8));
            }
        }
        seq.advance(1);
        Ok(())
    }

    fn host(store: &mut Store) -> &mut [u8] {
        match store {
            Store::Host(region) => region.bytes_mut(),
            Store::Device(_) => panic!("these caches are the host's"),
        }
    }

    fn stored(store: &Store) -> &[u8] {
        match store {
            Store::Host(region) => region.bytes(),
            Store::Device(_) => panic!("these caches are the host's"),
        }
    }

    fn read(kv: &KvCache, seq: &Sequence) -> Vec<u8> {
        let at = |p: usize, head: usize| {
            KvType::block_index(seq.pages[p / 4].0 as usize, 2, head) * kv.block_bytes + p % 4 * 4
        };
        (0..seq.len)
            .map(|p| {
                let value = |i: usize| stored(&kv.store)[i / 2 * kv.plane + at(p, i % 2)];
                let values: Vec<u8> = (0..8).map(value).collect();
                assert!(
                    (1..8).all(|i| values[i] == values[0].wrapping_add(i as u8)),
                    "all layers and heads move together"
                );
                values[0]
            })
            .collect()
    }

    #[test]
    fn overflow_and_exhaustion_are_told_apart() {
        let mut kv = KvCache::new(&model(), 16, 1, None).unwrap();
        let (mut a, mut b) = (kv.sequence(), kv.sequence());
        kv.reserve(&mut a, 16).unwrap();
        a.advance(16);
        assert!(matches!(
            *kv.reserve(&mut a, 1).unwrap_err().kind,
            ErrorKind::ContextOverflow { needed: 17, capacity: 16 }
        ));
        assert!(matches!(*kv.reserve(&mut b, 1).unwrap_err().kind, ErrorKind::OutOfPages { pages: 4 }));
        kv.truncate(&mut a, 5);
        assert_eq!(a.pages().len(), 2);
        kv.reserve(&mut b, 8).unwrap();
    }

    #[test]
    fn absurd_sizes_are_refused() {
        assert!(KvCache::new(&model(), usize::MAX, 1, None).is_err());
        assert!(KvCache::new(&model(), 1 << 40, 1 << 10, None).is_err());
    }

    #[derive(Clone, Debug)]
    enum Op {
        Write(u8, u8),
        Fork(u8),
        Truncate(u8, u8),
        Remove(u8),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            6 => (any::<u8>(), any::<u8>()).prop_map(|(s, v)| Op::Write(s, v)),
            1 => any::<u8>().prop_map(Op::Fork),
            1 => (any::<u8>(), 0u8..40).prop_map(|(s, l)| Op::Truncate(s, l)),
            1 => any::<u8>().prop_map(Op::Remove),
        ]
    }

    proptest! {
        /// Against plain vectors: no write shows in another sequence, no page is lost or freed twice.
        #[test]
        fn sequences_behave_as_if_they_shared_nothing(ops in proptest::collection::vec(op(), 1..200)) {
            let mut kv = KvCache::new(&model(), 32, 3, None).unwrap();
            let mut live: Vec<(Sequence, Vec<u8>)> = vec![(kv.sequence(), Vec::new())];
            for op in ops {
                let n = live.len().max(1);
                match op {
                    Op::Write(s, v) if !live.is_empty() => {
                        let (seq, mirror) = &mut live[s as usize % n];
                        if write(&mut kv, seq, v).is_ok() { mirror.push(v) }
                    }
                    Op::Fork(s) if !live.is_empty() => {
                        let (seq, mirror) = &live[s as usize % n];
                        let mirror = mirror.clone();
                        let forked = kv.fork(seq);
                        live.push((forked, mirror));
                    }
                    Op::Truncate(s, l) if !live.is_empty() => {
                        let (seq, mirror) = &mut live[s as usize % n];
                        kv.truncate(seq, l.into());
                        mirror.truncate(l.into());
                    }
                    Op::Remove(s) if !live.is_empty() => {
                        let (mut seq, _) = live.swap_remove(s as usize % n);
                        kv.truncate(&mut seq, 0);
                    }
                    _ => live.push((kv.sequence(), Vec::new())),
                }
                let mut holders: BTreeMap<PageId, u32> = BTreeMap::new();
                for (seq, mirror) in &live {
                    prop_assert_eq!(&read(&kv, seq), mirror);
                    for p in seq.pages() { *holders.entry(*p).or_default() += 1; }
                }
                for p in 0..kv.pool.pages() as u32 {
                    prop_assert_eq!(kv.pool.holders(PageId(p)), holders.get(&PageId(p)).copied().unwrap_or(0));
                }
                prop_assert_eq!(kv.pool.free.len() + holders.len(), kv.pool.pages());
            }
        }
    }
}
