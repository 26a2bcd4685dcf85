//! Copies that go on while the warp does: `cp.async` of a thread, and `cp.async.bulk`.
//!
//! Lazily, bytes move when somebody waits for them; until then nobody may touch where they go to. Eagerly, they move at
//! once. A kernel that is right gives the same in both.

use super::warp::Warp;
use super::{Block, Fault, Flow, Step};
use crate::code::{Address, PredSrc, Src};
use crate::error::{Access, ErrorKind};
use crate::lanes::{WARP, each};
use crate::launch::CopyMode;
use crate::memory::Space;
use crate::shared::{ASYNC_LANE, Who};
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
    BulkCommit,
    /// `read`: until their sources have been read.
    BulkWait {
        groups: u64,
    },
}

/// A copy of one thread that has not landed.
#[derive(Debug, Clone)]
pub(crate) struct Copy {
    who: Who,
    into: u64,
    from: u64,
    pub(crate) bytes: usize,
    source_bytes: usize,
    /// From shared to global memory.
    outward: bool,
    line: u32,
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
                        into: shared_address(into[lane]),
                        from: from[lane],
                        bytes: *bytes,
                        source_bytes: size,
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
                    let copy = self.bulk(warp, into[lane], from[lane], sizes[lane], true, line);
                    self.issue(&copy, 16).map_err(|kind| Fault(kind, Some(lane)))?;
                    if !self.is_eager() {
                        warp.queues(lane).bulk.open.push(copy);
                    }
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

    fn bulk(&mut self, warp: &Warp, into: u64, from: u64, bytes: u64, outward: bool, line: u32) -> Copy {
        let bytes = (bytes & 0xffff_ffff) as usize;
        self.stats.async_bytes += bytes as u64;
        let traffic = if outward { &mut self.stats.global_written } else { &mut self.stats.global_read };
        traffic.requests += 1;
        traffic.bytes += bytes as u64;
        traffic.sectors += bytes.div_ceil(32) as u64;
        let (into, from) = if outward { (into, shared_address(from)) } else { (shared_address(into), from) };
        let who = Who { warp: warp.index as u8, lane: ASYNC_LANE };
        Copy { who, into, from, bytes, source_bytes: bytes, outward, line }
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
        let misaligned = |access, space, address: u64| {
            let len = copy.bytes;
            Err(ErrorKind::Misaligned { access, space, len, align, address })
        };
        let (inner, outer) = if copy.outward { (copy.from, copy.into) } else { (copy.into, copy.from) };
        if !inner.is_multiple_of(align as u64) {
            return misaligned(if copy.outward { Access::Read } else { Access::Write }, Space::Shared, inner);
        }
        if !outer.is_multiple_of(align as u64) && copy.source_bytes > 0 {
            return misaligned(if copy.outward { Access::Write } else { Access::Read }, Space::Global, outer);
        }
        if align == 16 && !copy.bytes.is_multiple_of(16) {
            return misaligned(Access::Read, Space::Global, copy.bytes as u64);
        }
        let what = if copy.who.lane == ASYNC_LANE { "bulk copy" } else { "copy" };
        if copy.outward {
            // What is stored where must be known now, even where it happens later.
            self.memory.read(copy.into, copy.bytes)?;
            self.shared.begin_read(copy.who, copy.from, copy.bytes, what, copy.line)?;
        } else {
            if copy.source_bytes > 0 {
                self.memory.read(copy.from, copy.source_bytes)?;
            }
            self.shared.expect_copy(copy.who, copy.into, copy.bytes, what, copy.line)?;
        }
        if self.is_eager() { self.land(copy, false) } else { Ok(()) }
    }

    /// The bytes move. `waited`: a thread waits for its own copy and sees it from now on.
    pub(crate) fn land(&mut self, copy: &Copy, waited: bool) -> Result<(), ErrorKind> {
        if copy.outward {
            let bytes = self.shared.peek(copy.from, copy.bytes)?.to_vec();
            self.shared.end_read(copy.who, copy.from, copy.bytes)?;
            return self.memory.store(&mut self.view, Space::Global, copy.into, false, &bytes);
        }
        let mut bytes = vec![0; copy.bytes];
        if copy.source_bytes > 0 {
            let source = &mut bytes[..copy.source_bytes];
            self.memory.load(&self.view, Space::Global, copy.from, false, source)?;
        }
        self.shared.land(copy.who, copy.into, &bytes, waited && copy.who.lane != ASYNC_LANE)
    }
}
