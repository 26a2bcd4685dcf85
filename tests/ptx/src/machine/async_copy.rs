//! Copies that go on while the warp does: `cp.async` of a thread, and `cp.async.bulk`.
//!
//! Lazily, bytes move when somebody waits for them; until then nobody may touch where they go to. Eagerly, they move at
//! once. A kernel that is right gives the same in both.

use super::access::Place;
use super::warp::Warp;
use super::{Block, Fault, Flow, Step};
use crate::code::{Address, PredSrc, Src};
use crate::error::{Access, ErrorKind};
use crate::lanes::{WARP, each};
use crate::launch::CopyMode;
use crate::memory::Space;
use crate::shared::{ASYNC_LANE, Who};
use crate::tensor_map::TensorMap;
use std::collections::VecDeque;

#[derive(Debug, Clone)]
pub(crate) enum AsyncOp {
    /// `cp.async`: `bytes` to shared memory, of which all behind `source_bytes` are zeros.
    Copy {
        bytes: usize,
        into: Address,
        from: Address,
        source_bytes: Option<Src>,
        ignore: Option<PredSrc>,
    },
    Commit,
    /// Until at most so many groups are under way.
    Wait {
        groups: u64,
    },
    WaitAll,
    /// The copies a thread has issued so far arrive at an mbarrier when they have landed.
    Arrive {
        mbarrier: Address,
        counted: bool,
    },
    /// From global to shared memory; an mbarrier counts the bytes.
    BulkIn {
        into: Address,
        from: Address,
        bytes: Src,
        mbarrier: Address,
    },
    /// From shared to global memory, in groups.
    BulkOut {
        into: Address,
        from: Address,
        bytes: Src,
    },
    /// A box of a tensor, to shared memory, or from there where no mbarrier counts it.
    Tile {
        shared: Address,
        map: Address,
        at: Vec<Src>,
        mbarrier: Option<Address>,
    },
    /// Into the L2 cache, which changes nothing; but what is asked for must be there.
    Prefetch {
        from: Address,
        bytes: Src,
    },
    BulkCommit,
    /// `read`: until their sources have been read.
    BulkWait {
        groups: u64,
    },
}

/// The side of a copy that lies in global memory.
#[derive(Debug, Clone)]
enum Global {
    /// Bytes in a row; of a copy inward, those behind them become zeros.
    Row {
        address: u64,
        bytes: usize,
    },
    Tile {
        map: Box<TensorMap>,
        at: Vec<i32>,
    },
}

/// A copy of one thread that has not landed.
#[derive(Debug, Clone)]
pub(crate) struct Copy {
    who: Who,
    shared: u64,
    global: Global,
    pub(crate) bytes: usize,
    /// From shared to global memory.
    outward: bool,
    line: u32,
}

impl Copy {
    /// Pieces of global memory, with their offset in the copy.
    fn segments(&self) -> Vec<(usize, u64, usize)> {
        match &self.global {
            Global::Row { bytes: 0, .. } => Vec::new(),
            Global::Row { address, bytes } => vec![(0, *address, *bytes)],
            Global::Tile { map, at } => map.segments(at),
        }
    }

    /// Pairs of places of sixteen bytes: in the copy, and in shared memory, both from its beginning.
    fn pieces(&self, map: &TensorMap) -> impl Iterator<Item = (usize, usize)> {
        (0..self.bytes).step_by(16).map(|at| (at, (map.swizzled(self.shared, at) - self.shared) as usize))
    }
}

/// Copies of one thread: those not committed, and groups, oldest first.
#[derive(Debug, Clone, Default)]
pub(crate) struct Queue {
    open: Vec<Copy>,
    groups: VecDeque<Vec<Copy>>,
}

impl Queue {
    fn commit(&mut self) {
        let group = std::mem::take(&mut self.open);
        self.groups.push_back(group);
    }

    /// Groups that must have landed when at most `keep` may be under way.
    fn due(&mut self, keep: u64) -> Vec<Copy> {
        let n = self.groups.len().saturating_sub(keep as usize);
        self.groups.drain(..n).flatten().collect()
    }

    fn all(&mut self) -> Vec<Copy> {
        self.commit();
        self.due(0)
    }
}

/// Both kinds of copies of one thread.
#[derive(Debug, Clone, Default)]
pub(crate) struct Queues {
    plain: Queue,
    bulk: Queue,
}

impl Queues {
    /// What a thread that ends has not waited for. Copies that only read what it wrote may outlive it.
    pub(crate) fn forgotten(&self) -> Option<String> {
        let copies = self.plain.open.iter().chain(self.plain.groups.iter().flatten());
        let lines: Vec<u32> = copies.map(|c| c.line).collect();
        lines.first().map(|line| format!("{} asynchronous copies, the first of line {line},", lines.len()))
    }
}

/// Where shared memory operands of asynchronous instructions lie: 32-bit addresses, or generic ones.
pub(crate) fn shared_address(address: u64) -> u64 {
    address & 0xffff_ffff
}

impl Block<'_> {
    pub(crate) fn is_eager(&self) -> bool {
        self.fixed.options.copies == CopyMode::Eager
    }

    pub(crate) fn asynchronous(&mut self, warp: &mut Warp, op: &AsyncOp, mask: u32, line: u32) -> Step {
        match op {
            AsyncOp::Copy { bytes, into, from, source_bytes, ignore } => {
                let into = self.addresses(warp, *into, mask)?;
                let from = self.addresses(warp, *from, mask)?;
                let mut scratch = [0; WARP];
                let sizes = match source_bytes {
                    Some(src) => *warp.get(&self.fixed, *src, mask, &mut scratch)?,
                    None => [*bytes as u64; WARP],
                };
                let ignored = match ignore {
                    Some(pred) => warp.pred(&self.fixed, *pred, mask)?,
                    None => 0,
                };
                for lane in each(mask) {
                    let size = if ignored >> lane & 1 == 1 { 0 } else { sizes[lane] as usize & 0xffff_ffff };
                    if size > *bytes {
                        let why = format!("cp.async of {size} bytes into {bytes}");
                        return Err(Fault(ErrorKind::Matrix(why), Some(lane)));
                    }
                    let copy = Copy {
                        who: Who { warp: warp.index as u8, lane: lane as u8 },
                        shared: shared_address(into[lane]),
                        global: Global::Row { address: from[lane], bytes: size },
                        bytes: *bytes,
                        outward: false,
                        line,
                    };
                    self.issue(&copy, *bytes).map_err(|kind| Fault(kind, Some(lane)))?;
                    if !self.is_eager() {
                        warp.queues(lane).plain.open.push(copy);
                    }
                }
                super::access::count_sectors(&mut self.stats.global_read, &from, mask, *bytes);
                super::access::count_banks(&mut self.stats.shared_written, &into, mask, *bytes);
                self.stats.async_bytes += each(mask).map(|l| sizes[l].min(*bytes as u64)).sum::<u64>();
            }
            AsyncOp::Commit => {
                for lane in each(mask) {
                    warp.queues(lane).plain.commit();
                }
            }
            AsyncOp::Wait { groups } => self.wait(warp, mask, |q| q.plain.due(*groups))?,
            AsyncOp::WaitAll => self.wait(warp, mask, |q| q.plain.all())?,
            AsyncOp::Arrive { mbarrier, counted } => {
                let at = self.addresses(warp, *mbarrier, mask)?;
                for lane in each(mask) {
                    let copies = warp.queues(lane).plain.all();
                    let address = shared_address(at[lane]);
                    self.arrive_behind(warp.index, lane, address, copies, *counted)
                        .map_err(|kind| Fault(kind, Some(lane)))?;
                }
            }
            AsyncOp::BulkIn { into, from, bytes, mbarrier } => {
                let into = self.addresses(warp, *into, mask)?;
                let from = self.addresses(warp, *from, mask)?;
                let at = self.addresses(warp, *mbarrier, mask)?;
                let mut scratch = [0; WARP];
                let sizes = *warp.get(&self.fixed, *bytes, mask, &mut scratch)?;
                for lane in each(mask) {
                    let copy = self.bulk(warp, into[lane], from[lane], sizes[lane], false, line);
                    let address = shared_address(at[lane]);
                    self.issue(&copy, 16)
                        .and_then(|()| self.count_bytes(warp.index, lane, address, copy))
                        .map_err(|kind| Fault(kind, Some(lane)))?;
                }
            }
            AsyncOp::BulkOut { into, from, bytes } => {
                let into = self.addresses(warp, *into, mask)?;
                let from = self.addresses(warp, *from, mask)?;
                let mut scratch = [0; WARP];
                let sizes = *warp.get(&self.fixed, *bytes, mask, &mut scratch)?;
                for lane in each(mask) {
                    let copy = self.bulk(warp, from[lane], into[lane], sizes[lane], true, line);
                    self.issue(&copy, 16).map_err(|kind| Fault(kind, Some(lane)))?;
                    if !self.is_eager() {
                        warp.queues(lane).bulk.open.push(copy);
                    }
                }
            }
            AsyncOp::Prefetch { from, bytes } => {
                let from = self.addresses(warp, *from, mask)?;
                let mut scratch = [0; WARP];
                let sizes = *warp.get(&self.fixed, *bytes, mask, &mut scratch)?;
                for lane in each(mask) {
                    let (address, len) = (from[lane], (sizes[lane] & 0xffff_ffff) as usize);
                    let fault = |kind| Fault(kind, Some(lane));
                    if let Some(odd) = [address, len as u64].into_iter().find(|v| !v.is_multiple_of(16)) {
                        let (access, space) = (Access::Read, Space::Global);
                        let address = odd;
                        return Err(fault(ErrorKind::Misaligned { access, space, len, align: 16, address }));
                    }
                    self.memory.read(address, len).map_err(fault)?;
                }
            }
            AsyncOp::Tile { shared, map, at, mbarrier } => {
                let shared = self.addresses(warp, *shared, mask)?;
                let maps = self.addresses(warp, *map, mask)?;
                let mut places = vec![[0; WARP]; at.len()];
                for (place, src) in places.iter_mut().zip(at) {
                    let mut scratch = [0; WARP];
                    *place = *warp.get(&self.fixed, *src, mask, &mut scratch)?;
                }
                let barriers = match mbarrier {
                    Some(mbarrier) => Some(self.addresses(warp, *mbarrier, mask)?),
                    None => None,
                };
                for lane in each(mask) {
                    let at: Vec<i32> = places.iter().map(|p| p[lane] as i32).collect();
                    let copy = self.tile(warp, lane, shared[lane], maps[lane], at, barriers.is_none(), line);
                    let done = copy.and_then(|copy| {
                        self.issue(&copy, 128)?;
                        match &barriers {
                            Some(barriers) => {
                                self.count_bytes(warp.index, lane, shared_address(barriers[lane]), copy)
                            }
                            None => {
                                if !self.is_eager() {
                                    warp.queues(lane).bulk.open.push(copy);
                                }
                                Ok(())
                            }
                        }
                    });
                    done.map_err(|kind| Fault(kind, Some(lane)))?;
                }
            }
            AsyncOp::BulkCommit => {
                for lane in each(mask) {
                    warp.queues(lane).bulk.commit();
                }
            }
            AsyncOp::BulkWait { groups } => self.wait(warp, mask, |q| q.bulk.due(*groups))?,
        }
        Ok(Flow::Next)
    }

    fn bulk(&mut self, warp: &Warp, shared: u64, global: u64, bytes: u64, outward: bool, line: u32) -> Copy {
        let bytes = (bytes & 0xffff_ffff) as usize;
        let who = Who { warp: warp.index as u8, lane: ASYNC_LANE };
        let global = Global::Row { address: global, bytes };
        let copy = Copy { who, shared: shared_address(shared), global, bytes, outward, line };
        self.count_bulk(&copy);
        copy
    }

    #[expect(clippy::too_many_arguments, reason = "the operands of one instruction")]
    fn tile(
        &mut self,
        warp: &Warp,
        lane: usize,
        shared: u64,
        map: u64,
        at: Vec<i32>,
        outward: bool,
        line: u32,
    ) -> Result<Copy, ErrorKind> {
        let mut bytes = [0; 128];
        for (i, word) in bytes.chunks_exact_mut(8).enumerate() {
            let place = Place { space: Space::Generic, address: map + 8 * i as u64, lane, strong: false };
            self.read(warp, place, word)?;
        }
        let map = TensorMap::decode(&bytes)?;
        if map.dims.len() != at.len() {
            let why = format!("{} coordinates for a tensor of {} dimensions", at.len(), map.dims.len());
            return Err(ErrorKind::Matrix(why));
        }
        let bytes = map.box_bytes();
        let who = Who { warp: warp.index as u8, lane: ASYNC_LANE };
        let shared = shared_address(shared);
        // What is swizzled must begin where the pattern does, or the box would lie outside of its bytes.
        let pattern = 8 * map.swizzle.max(16) as u64;
        if map.swizzle > 0 && !shared.is_multiple_of(pattern) {
            let (access, space, len) = (Access::Write, Space::Shared, bytes);
            return Err(ErrorKind::Misaligned {
                access,
                space,
                len,
                align: pattern as usize,
                address: shared,
            });
        }
        let global = Global::Tile { map: Box::new(map), at };
        let copy = Copy { who, shared, global, bytes, outward, line };
        self.count_bulk(&copy);
        Ok(copy)
    }

    fn count_bulk(&mut self, copy: &Copy) {
        self.stats.async_bytes += copy.bytes as u64;
        let traffic = if copy.outward { &mut self.stats.global_written } else { &mut self.stats.global_read };
        traffic.requests += 1;
        for (_, _, bytes) in copy.segments() {
            traffic.bytes += bytes as u64;
            traffic.sectors += bytes.div_ceil(32) as u64;
        }
    }

    fn wait(
        &mut self,
        warp: &mut Warp,
        mask: u32,
        due: impl Fn(&mut Queues) -> Vec<Copy>,
    ) -> Result<(), Fault> {
        if warp.queues.is_empty() {
            return Ok(());
        }
        for lane in each(mask) {
            for copy in due(warp.queues(lane)) {
                self.land(&copy, true).map_err(|kind| Fault(kind, Some(lane)))?;
            }
        }
        Ok(())
    }

    /// Checks a copy when it is issued, and eagerly does it.
    fn issue(&mut self, copy: &Copy, align: usize) -> Result<(), ErrorKind> {
        let (inward, outward) =
            if copy.outward { (Access::Read, Access::Write) } else { (Access::Write, Access::Read) };
        let misaligned = |access, space, align, address| {
            let len = copy.bytes;
            Err(ErrorKind::Misaligned { access, space, len, align, address })
        };
        if !copy.shared.is_multiple_of(align as u64) {
            return misaligned(inward, Space::Shared, align, copy.shared);
        }
        if let Global::Row { address, bytes } = copy.global
            && bytes > 0
            && !address.is_multiple_of(align as u64)
        {
            return misaligned(outward, Space::Global, align, address);
        }
        if align >= 16 && !copy.bytes.is_multiple_of(16) {
            return misaligned(outward, Space::Global, 16, copy.bytes as u64);
        }
        // What is out of bounds is told where it is issued.
        for (_, address, bytes) in copy.segments() {
            self.memory.read(address, bytes)?;
        }
        let what = if copy.who.lane == ASYNC_LANE { "bulk copy" } else { "copy" };
        if copy.outward {
            self.shared.begin_read(copy.who, copy.shared, copy.bytes, what, copy.line)?;
        } else {
            self.shared.expect_copy(copy.who, copy.shared, copy.bytes, what, copy.line)?;
        }
        if self.is_eager() { self.land(copy, false) } else { Ok(()) }
    }

    /// The bytes move. `waited`: a thread waits for its own copy and sees it from now on.
    pub(crate) fn land(&mut self, copy: &Copy, waited: bool) -> Result<(), ErrorKind> {
        let mut bytes = vec![0; copy.bytes];
        if copy.outward {
            bytes.copy_from_slice(self.shared.peek(copy.shared, copy.bytes)?);
            self.shared.end_read(copy.who, copy.shared, copy.bytes)?;
            if let Global::Tile { map, .. } = &copy.global {
                let image = bytes.clone();
                for (at, place) in copy.pieces(map) {
                    bytes[at..at + 16].copy_from_slice(&image[place..place + 16]);
                }
            }
            for (at, address, len) in copy.segments() {
                let bytes = &bytes[at..at + len];
                self.memory.store(&mut self.view, Space::Global, address, false, bytes)?;
            }
            return Ok(());
        }
        for (at, address, len) in copy.segments() {
            self.memory.load(&self.view, Space::Global, address, false, &mut bytes[at..at + len])?;
        }
        if let Global::Tile { map, .. } = &copy.global {
            let packed = bytes.clone();
            for (at, place) in copy.pieces(map) {
                bytes[place..place + 16].copy_from_slice(&packed[at..at + 16]);
            }
        }
        self.shared.land(copy.who, copy.shared, &bytes, waited && copy.who.lane != ASYNC_LANE)
    }
}
