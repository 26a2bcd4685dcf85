//! Device memory: buffers with bounds, initialisation and the writers of the running launch.

use crate::error::{Access, ErrorKind};
use rustc_hash::FxHashMap;
use std::collections::BTreeMap;
use std::fmt;

/// A state space, as errors name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Space {
    Global,
    Shared,
    Local,
    Const,
    Param,
    /// An address that may point into any of them.
    Generic,
}

impl fmt::Display for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Space::Global => "global",
            Space::Shared => "shared",
            Space::Local => "local",
            Space::Const => "constant",
            Space::Param => "parameter",
            Space::Generic => "generic",
        })
    }
}

/// A buffer of [`Memory`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Buffer(u32);

/// Bits of an address that count inside a buffer's slot.
const SLOT: u32 = 40;
/// Buffers begin in the middle of their slot, so that an index below 0 is told as such.
const BASE: u64 = 1 << (SLOT - 1);

impl Buffer {
    /// The address of its first byte, as kernels see it. It is aligned for every access.
    pub fn address(self) -> u64 {
        (u64::from(self.0) + 1) << SLOT | BASE
    }

    fn of(address: u64) -> Option<(Buffer, i64)> {
        let slot = (address >> SLOT).checked_sub(1)?;
        let buffer = Buffer(u32::try_from(slot).ok()?);
        Some((buffer, address.wrapping_sub(buffer.address()) as i64))
    }
}

/// What wrote a byte last in this launch: block, release epoch, and whether an atomic did. Zero is nobody.
type Mark = u32;

const ATOMIC: Mark = 1 << 31;
/// The mark of atomics of several blocks.
const SEVERAL: Mark = !0xff;

fn mark(block: u32, epoch: u16, atomic: bool) -> Mark {
    (block + 1) << 8 | u32::from(epoch.min(LAST_EPOCH)) | if atomic { ATOMIC } else { 0 }
}

/// Epochs past this one are not told apart: their writes count as released by the next atomic, fence or not.
const LAST_EPOCH: u16 = 255;

fn mark_block(mark: Mark) -> u32 {
    ((mark & !ATOMIC) >> 8) - 1
}

/// Bytes whose marks are kept together.
const PAGE: usize = 4096;
type MarkPage = [Mark; PAGE];

/// Blocks a launch may have, so that a [`Mark`] holds their index.
pub(crate) const MAX_BLOCKS: u64 = (1 << 23) - 2;

#[derive(Debug, Clone)]
struct Allocation {
    name: String,
    data: Vec<u8>,
    /// Which bytes have been written; absent where all have.
    written: Option<Vec<bool>>,
    /// One per byte, in pages that the first write of a launch makes.
    marks: Vec<Option<Box<MarkPage>>>,
    read_only: bool,
    freed: bool,
}

/// What one block of a launch knows of the writes of others.
#[derive(Debug, Clone, Default)]
pub(crate) struct BlockView {
    pub(crate) block: u32,
    /// Fences that had something to order; writes since the last are not released by an atomic.
    epoch: u16,
    /// Whether anything was written since the last fence.
    dirty: bool,
    /// Writes of block `b` in epochs below `seen[b]` happened before what this block does now.
    seen: BTreeMap<u32, u16>,
}

impl BlockView {
    pub(crate) fn new(block: u32) -> BlockView {
        BlockView { block, ..BlockView::default() }
    }

    /// A fence of device scope: an atomic that follows releases what has been written so far.
    pub(crate) fn fence(&mut self) {
        if self.dirty {
            self.epoch = self.epoch.saturating_add(1).min(LAST_EPOCH + 1);
            self.dirty = false;
        }
    }
}

/// Device memory. Addresses are made up; buffers never touch each other.
#[derive(Debug, Clone, Default)]
pub struct Memory {
    allocations: Vec<Allocation>,
    /// What atomics of this launch have released, by address.
    released: FxHashMap<u64, BTreeMap<u32, u16>>,
    /// Buffers of module variables, by module.
    pub(crate) modules: BTreeMap<u64, Vec<Buffer>>,
    check_races: bool,
}

impl Memory {
    pub fn new() -> Memory {
        Memory::default()
    }

    /// A buffer that holds `bytes`. `name` is what errors call it.
    pub fn alloc(&mut self, name: &str, bytes: &[u8]) -> Buffer {
        self.add(name, bytes.to_vec(), true)
    }

    /// A buffer whose bytes must be written before a kernel reads them.
    pub fn alloc_uninit(&mut self, name: &str, len: usize) -> Buffer {
        // A pattern that is no small number in any type.
        self.add(name, vec![0xcd; len], false)
    }

    fn add(&mut self, name: &str, data: Vec<u8>, initialised: bool) -> Buffer {
        let written = (!initialised).then(|| vec![false; data.len()]);
        self.allocations.push(Allocation {
            name: name.to_owned(),
            data,
            written,
            marks: Vec::new(),
            read_only: false,
            freed: false,
        });
        Buffer(self.allocations.len() as u32 - 1)
    }

    /// Kernels that write to `buffer` fail from now on.
    pub fn set_read_only(&mut self, buffer: Buffer) {
        self.allocations[buffer.0 as usize].read_only = true;
    }

    /// Every later use of `buffer` is an error. Its storage is given back.
    pub fn free(&mut self, buffer: Buffer) {
        let allocation = &mut self.allocations[buffer.0 as usize];
        *allocation = Allocation {
            name: std::mem::take(&mut allocation.name),
            data: Vec::new(),
            written: None,
            marks: Vec::new(),
            read_only: false,
            freed: true,
        };
    }

    /// The bytes of `buffer`, written or not.
    pub fn bytes(&self, buffer: Buffer) -> &[u8] {
        &self.allocations[buffer.0 as usize].data
    }

    /// The bytes of `buffer`, to be changed by the host. Counts as written.
    pub fn bytes_mut(&mut self, buffer: Buffer) -> &mut [u8] {
        let allocation = &mut self.allocations[buffer.0 as usize];
        allocation.written = None;
        &mut allocation.data
    }

    /// Replaces bytes from `offset` on; they count as written, the others stay as they are.
    ///
    /// # Errors
    /// Out of bounds, or freed.
    pub fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), ErrorKind> {
        let (buffer, offset) = self.locate(Access::Write, Space::Global, address, bytes.len())?;
        let allocation = &mut self.allocations[buffer.0 as usize];
        allocation.data[offset..offset + bytes.len()].copy_from_slice(bytes);
        if let Some(written) = &mut allocation.written {
            written[offset..offset + bytes.len()].fill(true);
        }
        Ok(())
    }

    /// Bytes at an address, written or not.
    ///
    /// # Errors
    /// Out of bounds, or freed.
    pub fn read(&self, address: u64, len: usize) -> Result<&[u8], ErrorKind> {
        let (buffer, offset) = self.locate(Access::Read, Space::Global, address, len)?;
        Ok(&self.allocations[buffer.0 as usize].data[offset..offset + len])
    }

    /// Offsets `[from, to)` of the first bytes that nobody has written, if any.
    pub fn unwritten(&self, buffer: Buffer) -> Option<(usize, usize)> {
        let written = self.allocations[buffer.0 as usize].written.as_ref()?;
        let from = written.iter().position(|w| !w)?;
        let to = written[from..].iter().position(|w| *w).map_or(written.len(), |n| from + n);
        Some((from, to))
    }

    /// The name of `buffer`.
    pub fn name(&self, buffer: Buffer) -> &str {
        &self.allocations[buffer.0 as usize].name
    }

    /// All buffers that are not freed.
    pub fn buffers(&self) -> impl Iterator<Item = Buffer> + '_ {
        let live = self.allocations.iter().enumerate().filter(|(_, a)| !a.freed);
        live.map(|(i, _)| Buffer(i as u32))
    }

    /// The buffer an address lies in, and the offset there.
    pub fn buffer_at(&self, address: u64) -> Option<(Buffer, usize)> {
        let (buffer, offset) = self.locate(Access::Read, Space::Global, address, 0).ok()?;
        Some((buffer, offset))
    }

    fn locate(
        &self,
        access: Access,
        space: Space,
        address: u64,
        len: usize,
    ) -> Result<(Buffer, usize), ErrorKind> {
        let found = Buffer::of(address).and_then(|(b, o)| Some((b, o, self.allocations.get(b.0 as usize)?)));
        let Some((buffer, offset, allocation)) = found else {
            return Err(ErrorKind::NoBuffer { access, len, address });
        };
        if let Ok(start) = usize::try_from(offset)
            && start.checked_add(len).is_some_and(|end| end <= allocation.data.len())
            && !allocation.freed
        {
            return Ok((buffer, start));
        }
        let name = allocation.name.clone();
        Err(if allocation.freed {
            ErrorKind::Freed { access, buffer: name, offset }
        } else {
            ErrorKind::OutOfBounds { access, space, buffer: name, offset, len, size: allocation.data.len() }
        })
    }

    /// Forgets the writers of the launch before.
    pub(crate) fn begin_launch(&mut self, check_races: bool) {
        self.check_races = check_races;
        self.released.clear();
        for allocation in &mut self.allocations {
            allocation.marks = Vec::new();
        }
    }

    /// A kernel's read. `strong` reads (volatile, relaxed, acquire, atomic) do not race with atomics.
    #[inline]
    pub(crate) fn load(
        &mut self,
        view: &BlockView,
        space: Space,
        address: u64,
        strong: bool,
        out: &mut [u8],
    ) -> Result<(), ErrorKind> {
        let len = out.len();
        let (buffer, offset) = self.locate(Access::Read, space, address, len)?;
        let allocation = &self.allocations[buffer.0 as usize];
        if let Some(written) = &allocation.written
            && let Some(at) = written[offset..offset + len].iter().position(|w| !w)
        {
            let buffer = allocation.name.clone();
            return Err(ErrorKind::Uninitialised { space, buffer, offset: offset + at });
        }
        if !allocation.marks.is_empty() {
            let (mut at, end) = (offset, offset + len);
            while at < end {
                let stop = end.min((at / PAGE + 1) * PAGE);
                // Most of what is read was not written by this launch: pages without marks cost nothing.
                if let Some(page) = &allocation.marks[at / PAGE] {
                    let marks = &page[at % PAGE..at % PAGE + (stop - at)];
                    if let Some(i) = marks.iter().position(|mark| conflicts(*mark, view, strong)) {
                        return Err(race(allocation, at + i, Access::Read, marks[i], view));
                    }
                }
                at = stop;
            }
        }
        out.copy_from_slice(&allocation.data[offset..offset + len]);
        Ok(())
    }

    /// A kernel's write.
    #[inline]
    pub(crate) fn store(
        &mut self,
        view: &mut BlockView,
        space: Space,
        address: u64,
        strong: bool,
        bytes: &[u8],
    ) -> Result<(), ErrorKind> {
        self.update(view, space, address, if strong { Access::Atomic } else { Access::Write }, bytes)
    }

    pub(crate) fn update(
        &mut self,
        view: &mut BlockView,
        space: Space,
        address: u64,
        access: Access,
        bytes: &[u8],
    ) -> Result<(), ErrorKind> {
        let len = bytes.len();
        let (buffer, offset) = self.locate(access, space, address, len)?;
        let check_races = self.check_races;
        let allocation = &mut self.allocations[buffer.0 as usize];
        if allocation.read_only {
            return Err(ErrorKind::ReadOnly { buffer: allocation.name.clone(), offset });
        }
        view.dirty = true;
        if check_races {
            if allocation.marks.is_empty() {
                allocation.marks = vec![None; allocation.data.len().div_ceil(PAGE)];
            }
            let atomic = access == Access::Atomic;
            let mine = mark(view.block, view.epoch, atomic);
            for at in offset..offset + len {
                let page = allocation.marks[at / PAGE].get_or_insert_with(|| Box::new([0; PAGE]));
                let earlier = page[at % PAGE];
                if conflicts(earlier, view, atomic) {
                    return Err(race(allocation, at, access, earlier, view));
                }
                let others = atomic && earlier & ATOMIC != 0 && mark_block(earlier) != view.block;
                page[at % PAGE] = if others { SEVERAL } else { mine };
            }
        }
        allocation.data[offset..offset + len].copy_from_slice(bytes);
        if let Some(written) = &mut allocation.written {
            written[offset..offset + len].fill(true);
        }
        Ok(())
    }

    /// An atomic of this block makes its fenced writes known to whoever reads the address by an atomic, and learns
    /// what others have made known there.
    pub(crate) fn synchronise(&mut self, view: &mut BlockView, address: u64, acquire: bool, release: bool) {
        if !self.check_races {
            return;
        }
        if acquire && let Some(released) = self.released.get(&address) {
            for (&block, &epoch) in released {
                let seen = view.seen.entry(block).or_insert(0);
                *seen = (*seen).max(epoch);
            }
        }
        if release && (view.epoch > 0 || !view.seen.is_empty()) {
            let released = self.released.entry(address).or_default();
            for (&block, &epoch) in view.seen.iter().chain([(&view.block, &view.epoch)]) {
                let known = released.entry(block).or_insert(0);
                *known = (*known).max(epoch);
            }
        }
    }
}

fn conflicts(mark: Mark, view: &BlockView, strong: bool) -> bool {
    if mark == 0 || (strong && mark & ATOMIC != 0) {
        return false;
    }
    if mark == SEVERAL {
        // Whose updates are known is not told apart: who has synchronised with anybody may read.
        return view.seen.is_empty();
    }
    let block = mark_block(mark);
    block != view.block && view.seen.get(&block).is_none_or(|epoch| *epoch <= (mark & 0xff) as u16)
}

fn race(allocation: &Allocation, offset: usize, access: Access, mark: Mark, view: &BlockView) -> ErrorKind {
    ErrorKind::GlobalRace {
        buffer: allocation.name.clone(),
        offset,
        access,
        block: view.block,
        earlier: if mark & ATOMIC != 0 { Access::Atomic } else { Access::Write },
        earlier_block: mark_block(mark),
    }
}
