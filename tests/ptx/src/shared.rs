//! Shared memory of a block, with what happened to each byte: initialised or not, written and read by whom, and
//! whether an asynchronous operation is under way there.
//!
//! Order between warps is kept as vector clocks (Flanagan and Freund, "FastTrack", 2009). A warp's clock ticks when it
//! synchronises; another warp knows a clock once a barrier has joined them. Two accesses of which one writes race when
//! the later does not know the clock of the earlier. Lanes of one warp are ordered by `bar.warp.sync` and barriers only:
//! that they run in lockstep here is nothing a kernel may rely on.

use crate::error::{Access, ErrorKind};
use crate::memory::Space;
use rustc_hash::FxHashMap;

/// First address of shared memory. Devices of compute capability 9.0 keep the bytes below for themselves.
pub(crate) const SHARED_BASE: u64 = 1024;

/// The lane of an access made for a warp by asynchronous hardware.
pub(crate) const ASYNC_LANE: u8 = 33;
const SEVERAL_LANES: u8 = 32;
/// The warp of a read mark that stands for several warps.
const SEVERAL_WARPS: u8 = 255;

/// Who accesses shared memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Who {
    pub(crate) warp: u8,
    pub(crate) lane: u8,
}

/// Who last read or wrote, and when by that warp's clock. Clock 0 is never.
#[derive(Debug, Clone, Copy, Default)]
struct Mark {
    clock: u32,
    warp: u8,
    lane: u8,
}

#[derive(Debug, Clone, Copy, Default)]
struct Cell {
    write: Mark,
    written: bool,
    /// The last write was made by an atomic.
    atomic: bool,
    /// An asynchronous copy will write here.
    incoming: bool,
    /// Asynchronous operations that still read here.
    outgoing: u16,
    read: Mark,
}

/// An asynchronous operation under way, for the error that names it.
#[derive(Debug, Clone, Copy)]
struct InFlight {
    what: &'static str,
    line: u32,
}

/// Variables by their place, so that errors can name them.
#[derive(Debug, Clone)]
pub(crate) struct Named {
    pub(crate) name: String,
    pub(crate) offset: usize,
    pub(crate) bytes: usize,
}

#[derive(Debug)]
pub(crate) struct Shared {
    data: Vec<u8>,
    /// One per word of four bytes.
    cells: Vec<Cell>,
    /// Words whose bytes differ.
    split: FxHashMap<u32, [Cell; 4]>,
    /// Clocks of the last reads, per warp, of cells that several warps read.
    readers: Vec<Box<[u32]>>,
    /// Per word, the last asynchronous operation there; empty until the first.
    in_flight: Vec<InFlight>,
    variables: Vec<Named>,
    /// Per warp, its own clock.
    clocks: Vec<u32>,
    /// `known[w][v]`: the clock up to which warp `w` knows what warp `v` did.
    known: Vec<Vec<u32>>,
    /// Per warp, the clock of its last `fence.proxy.async`, and what it knew of others then.
    fenced: Vec<u32>,
    known_at_fence: Vec<Vec<u32>>,
    /// What atomics on an address have released.
    released: FxHashMap<u64, Vec<u32>>,
    check_races: bool,
}

impl Shared {
    pub(crate) fn new(bytes: usize, variables: Vec<Named>, warps: usize, check_races: bool) -> Shared {
        Shared {
            data: vec![0xcd; bytes],
            cells: vec![Cell::default(); bytes.div_ceil(4)],
            split: FxHashMap::default(),
            readers: Vec::new(),
            in_flight: Vec::new(),
            variables,
            clocks: vec![1; warps],
            known: vec![vec![0; warps]; warps],
            fenced: vec![0; warps],
            known_at_fence: vec![vec![0; warps]; warps],
            released: FxHashMap::default(),
            check_races,
        }
    }

    /// The variable at an offset, and the offset there.
    pub(crate) fn describe(&self, offset: usize) -> (String, usize) {
        let inside = |v: &&Named| (v.offset..v.offset + v.bytes).contains(&offset);
        match self.variables.iter().find(inside) {
            Some(v) => (v.name.clone(), offset - v.offset),
            None => ("memory".to_owned(), offset),
        }
    }

    /// As [`Shared::describe`], of an address.
    pub(crate) fn describe_address(&self, address: u64) -> (String, usize) {
        self.describe(address.wrapping_sub(SHARED_BASE) as usize)
    }

    fn offset(&self, access: Access, address: u64, len: usize) -> Result<usize, ErrorKind> {
        let offset = address.wrapping_sub(SHARED_BASE) as i64;
        if let Ok(start) = usize::try_from(offset)
            && start.checked_add(len).is_some_and(|end| end <= self.data.len())
        {
            return Ok(start);
        }
        Err(ErrorKind::OutOfBounds {
            access,
            space: Space::Shared,
            buffer: "memory of the block".to_owned(),
            offset,
            len,
            size: self.data.len(),
        })
    }

    /// Checks and marks a read, and returns the bytes.
    pub(crate) fn load(&mut self, who: Who, address: u64, len: usize) -> Result<&[u8], ErrorKind> {
        let offset = self.offset(Access::Read, address, len)?;
        self.visit(who, Access::Read, offset, len, false, None)?;
        Ok(&self.data[offset..offset + len])
    }

    /// Checks and marks a write or an atomic update, and stores the bytes.
    pub(crate) fn store(
        &mut self,
        who: Who,
        access: Access,
        address: u64,
        bytes: &[u8],
    ) -> Result<(), ErrorKind> {
        let offset = self.offset(access, address, bytes.len())?;
        self.visit(who, access, offset, bytes.len(), true, Some(bytes))?;
        self.data[offset..offset + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    /// Bytes as they are, for operations that have checked the access themselves.
    pub(crate) fn peek(&self, address: u64, len: usize) -> Result<&[u8], ErrorKind> {
        let offset = self.offset(Access::Read, address, len)?;
        Ok(&self.data[offset..offset + len])
    }

    /// The value an atomic updates: it must be initialised, and races with plain accesses only.
    pub(crate) fn load_atomic(&mut self, who: Who, address: u64, len: usize) -> Result<&[u8], ErrorKind> {
        let offset = self.offset(Access::Atomic, address, len)?;
        self.visit(who, Access::Atomic, offset, len, false, None)?;
        Ok(&self.data[offset..offset + len])
    }

    fn visit(
        &mut self,
        who: Who,
        access: Access,
        offset: usize,
        len: usize,
        writes: bool,
        bytes: Option<&[u8]>,
    ) -> Result<(), ErrorKind> {
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let word = at / 4;
            let whole = at.is_multiple_of(4) && end - at >= 4;
            let same = |from: usize, len: usize, data: &[u8]| {
                bytes.is_some_and(|b| b[from - offset..from - offset + len] == data[from..from + len])
            };
            if whole && (self.split.is_empty() || !self.split.contains_key(&(word as u32))) {
                let unchanged = same(at, 4, &self.data);
                let mut cell = self.cells[word];
                self.check(&mut cell, who, access, at, writes, unchanged)?;
                self.cells[word] = cell;
                at += 4;
                continue;
            }
            let stop = end.min((word + 1) * 4);
            let mut cells = *self.split.entry(word as u32).or_insert([self.cells[word]; 4]);
            for at in at..stop {
                let unchanged = same(at, 1, &self.data);
                self.check(&mut cells[at % 4], who, access, at, writes, unchanged)?;
            }
            if whole && writes && cells.iter().all(|c| c.outgoing == 0) {
                // Written as one: the bytes are alike again.
                self.split.remove(&(word as u32));
                self.cells[word] = cells[0];
            } else {
                self.split.insert(word as u32, cells);
            }
            at = stop;
        }
        Ok(())
    }

    /// Whether what `mark` stands for happened before what `who` does now.
    #[inline]
    fn before(&self, mark: Mark, who: Who) -> bool {
        if mark.clock == 0 {
            return true;
        }
        if mark.warp == who.warp {
            mark.clock < self.clocks[who.warp as usize] || mark.lane == who.lane
        } else {
            mark.clock <= self.known[who.warp as usize][mark.warp as usize]
        }
    }

    #[inline]
    fn check(
        &mut self,
        cell: &mut Cell,
        who: Who,
        access: Access,
        offset: usize,
        writes: bool,
        unchanged: bool,
    ) -> Result<(), ErrorKind> {
        if cell.incoming || (writes && cell.outgoing > 0) {
            return Err(self.pending(access, offset));
        }
        if !writes && !cell.written {
            let (buffer, offset) = self.describe(offset);
            return Err(ErrorKind::Uninitialised { space: Space::Shared, buffer, offset });
        }
        if self.check_races {
            let atomics = access == Access::Atomic && cell.atomic;
            // Several lanes may write the same value: whoever comes last, the value is that.
            let harmless = atomics || (access == Access::Write && unchanged);
            if !harmless && !self.before(cell.write, who) {
                let earlier = if cell.atomic { Access::Atomic } else { Access::Write };
                return Err(self.race(offset, access, who, earlier, cell.write));
            }
            if writes && let Some(mark) = self.unordered_read(cell.read, who) {
                return Err(self.race(offset, access, who, Access::Read, mark));
            }
            let now = Mark { clock: self.clocks[who.warp as usize], warp: who.warp, lane: who.lane };
            if writes {
                cell.write = now;
                cell.read = Mark::default();
            } else if access == Access::Read {
                self.mark_read(cell, now);
            }
        }
        if writes {
            cell.written = true;
            cell.atomic = access == Access::Atomic;
        }
        Ok(())
    }

    fn unordered_read(&self, mark: Mark, who: Who) -> Option<Mark> {
        if mark.clock == 0 {
            return None;
        }
        if mark.warp != SEVERAL_WARPS {
            return (!self.before(mark, who)).then_some(mark);
        }
        let clocks = self.readers[mark.clock as usize - 1].iter().enumerate();
        let marks = clocks.map(|(warp, &clock)| Mark { clock, warp: warp as u8, lane: SEVERAL_LANES });
        marks.into_iter().find(|m| !self.before(*m, who))
    }

    fn mark_read(&mut self, cell: &mut Cell, now: Mark) {
        let old = cell.read;
        if old.warp == SEVERAL_WARPS && old.clock != 0 {
            self.readers[old.clock as usize - 1][now.warp as usize] = now.clock;
        } else if old.clock == 0 || self.before(old, Who { warp: now.warp, lane: now.lane }) {
            // Whoever is ordered after this read is ordered after the one before it.
            cell.read = now;
        } else if old.warp == now.warp {
            cell.read.lane = SEVERAL_LANES;
            cell.read.clock = now.clock;
        } else {
            let mut clocks = vec![0; self.clocks.len()].into_boxed_slice();
            clocks[old.warp as usize] = old.clock;
            clocks[now.warp as usize] = now.clock;
            self.readers.push(clocks);
            cell.read = Mark { clock: self.readers.len() as u32, warp: SEVERAL_WARPS, lane: SEVERAL_LANES };
        }
    }

    fn race(&self, offset: usize, access: Access, who: Who, earlier: Access, mark: Mark) -> ErrorKind {
        let (buffer, offset) = self.describe(offset);
        let earlier_lane = match mark.lane {
            ASYNC_LANE => " (asynchronously)".to_owned(),
            SEVERAL_LANES => String::new(),
            lane => format!(" lane {lane}"),
        };
        ErrorKind::SharedRace {
            buffer,
            offset,
            access,
            warp: u32::from(who.warp),
            lane: u32::from(who.lane),
            earlier,
            earlier_warp: u32::from(mark.warp),
            earlier_lane,
        }
    }

    fn pending(&self, access: Access, offset: usize) -> ErrorKind {
        let flight = self.in_flight.get(offset / 4).copied();
        let flight = flight.unwrap_or(InFlight { what: "operation", line: 0 });
        let (buffer, offset) = self.describe(offset);
        ErrorKind::AsyncPending { access, buffer, offset, what: flight.what, line: flight.line }
    }

    fn note_flight(&mut self, offset: usize, len: usize, flight: InFlight) {
        if self.in_flight.is_empty() {
            self.in_flight = vec![InFlight { what: "operation", line: 0 }; self.cells.len()];
        }
        self.in_flight[offset / 4..(offset + len).div_ceil(4)].fill(flight);
    }

    fn each_cell(&mut self, offset: usize, len: usize, mut with: impl FnMut(&mut Cell)) {
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let word = at / 4;
            let whole = at.is_multiple_of(4) && end - at >= 4;
            let stop = end.min((word + 1) * 4);
            if whole && (self.split.is_empty() || !self.split.contains_key(&(word as u32))) {
                with(&mut self.cells[word]);
            } else {
                let cells = self.split.entry(word as u32).or_insert([self.cells[word]; 4]);
                cells[at % 4..=(stop - 1) % 4].iter_mut().for_each(&mut with);
            }
            at = stop;
        }
    }

    /// An asynchronous copy into `[address, address + len)` was issued: until it lands nobody may touch these bytes.
    pub(crate) fn expect_copy(
        &mut self,
        who: Who,
        address: u64,
        len: usize,
        what: &'static str,
        line: u32,
    ) -> Result<(), ErrorKind> {
        let offset = self.offset(Access::Write, address, len)?;
        // The copy may land at once: what others do here without being ordered before it is a race.
        self.visit(who, Access::Write, offset, len, true, None)?;
        self.each_cell(offset, len, |cell| cell.incoming = true);
        self.note_flight(offset, len, InFlight { what, line });
        Ok(())
    }

    /// The copy lands. With `mark` it counts as a write of `who` made now: of copies a thread itself waits for. The
    /// others were made known to an mbarrier when they were issued.
    pub(crate) fn land(&mut self, who: Who, address: u64, bytes: &[u8], mark: bool) -> Result<(), ErrorKind> {
        let offset = self.offset(Access::Write, address, bytes.len())?;
        self.each_cell(offset, bytes.len(), |cell| cell.incoming = false);
        if mark {
            self.visit(who, Access::Write, offset, bytes.len(), true, Some(bytes))?;
        }
        self.data[offset..offset + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    /// An asynchronous operation reads these bytes from now on until [`Shared::end_read`].
    pub(crate) fn begin_read(
        &mut self,
        who: Who,
        address: u64,
        len: usize,
        what: &'static str,
        line: u32,
    ) -> Result<(), ErrorKind> {
        let offset = self.offset(Access::Read, address, len)?;
        self.check_proxy(who, offset, len, what)?;
        self.visit(who, Access::Read, offset, len, false, None)?;
        self.each_cell(offset, len, |cell| cell.outgoing = cell.outgoing.saturating_add(1));
        self.note_flight(offset, len, InFlight { what, line });
        Ok(())
    }

    /// The reader is done; its last read was just now.
    pub(crate) fn end_read(&mut self, who: Who, address: u64, len: usize) -> Result<(), ErrorKind> {
        let offset = self.offset(Access::Read, address, len)?;
        self.each_cell(offset, len, |cell| cell.outgoing = cell.outgoing.saturating_sub(1));
        if self.check_races {
            let now = Mark { clock: self.clocks[who.warp as usize], warp: who.warp, lane: who.lane };
            for word in offset / 4..(offset + len).div_ceil(4) {
                if let Some(mut cells) = self.split.get(&(word as u32)).copied() {
                    cells.iter_mut().for_each(|cell| self.mark_read(cell, now));
                    self.split.insert(word as u32, cells);
                } else {
                    let mut cell = self.cells[word];
                    self.mark_read(&mut cell, now);
                    self.cells[word] = cell;
                }
            }
        }
        Ok(())
    }

    /// What the generic proxy wrote is seen by asynchronous readers only behind `fence.proxy.async`, of the writer or,
    /// once it knows the write, of the reader.
    fn check_proxy(
        &self,
        who: Who,
        offset: usize,
        len: usize,
        reader: &'static str,
    ) -> Result<(), ErrorKind> {
        if !self.check_races {
            return Ok(());
        }
        let fenced = |mark: Mark| {
            mark.clock == 0
                || mark.lane == ASYNC_LANE
                || mark.clock < self.fenced[mark.warp as usize]
                || mark.clock <= self.known_at_fence[who.warp as usize][mark.warp as usize]
        };
        for at in (offset..offset + len).step_by(4) {
            let word = at as u32 / 4;
            let cell = match self.split.get(&word) {
                Some(cells) => cells.iter().find(|c| !fenced(c.write)).copied(),
                None => Some(self.cells[word as usize]).filter(|c| !fenced(c.write)),
            };
            if let Some(cell) = cell {
                let (buffer, offset) = self.describe(at);
                return Err(ErrorKind::ProxyFence {
                    buffer,
                    offset,
                    writer: u32::from(cell.write.warp),
                    reader,
                });
            }
        }
        Ok(())
    }

    /// `fence.proxy.async` of a warp.
    pub(crate) fn proxy_fence(&mut self, warp: usize) {
        self.clocks[warp] += 1;
        self.fenced[warp] = self.clocks[warp];
        self.known_at_fence[warp] = self.known[warp].clone();
    }

    /// Lanes of a warp synchronise among themselves.
    pub(crate) fn warp_sync(&mut self, warp: usize) {
        self.clocks[warp] += 1;
    }

    /// What a warp has done and knows, for others to join. Ticks its clock.
    pub(crate) fn release(&mut self, warp: usize, into: &mut Vec<u32>) {
        into.resize(self.clocks.len(), 0);
        for (slot, known) in into.iter_mut().zip(&self.known[warp]) {
            *slot = (*slot).max(*known);
        }
        into[warp] = into[warp].max(self.clocks[warp]);
        self.clocks[warp] += 1;
    }

    /// A warp learns what others have released.
    pub(crate) fn acquire(&mut self, warp: usize, from: &[u32]) {
        for (known, released) in self.known[warp].iter_mut().zip(from) {
            *known = (*known).max(*released);
        }
        // Its own lanes have met there too.
        self.clocks[warp] += 1;
    }

    /// An atomic on an address: it learns what atomics before it knew, and tells what it knows.
    pub(crate) fn synchronise(&mut self, warp: usize, address: u64) {
        let mut released = self.released.remove(&address).unwrap_or_default();
        for (known, released) in self.known[warp].iter_mut().zip(&released) {
            *known = (*known).max(*released);
        }
        self.release(warp, &mut released);
        self.released.insert(address, released);
    }
}
