//! Loads, stores and atomics, whatever the state space.

use super::warp::Warp;
use super::{Block, Fault};
use crate::arith::half_float::{self, HalfMode};
use crate::code::{Address, Atomic, AtomicOp, Load, Store};
use crate::error::{Access, ErrorKind};
use crate::lanes::{Lanes, WARP, each};
use crate::memory::Space;
use crate::shared::Who;
use crate::stats::{SharedTraffic, Traffic};
use crate::types::{Type, sign_extend, truncate};

/// Generic addresses of the spaces that are not global: their lower half is the address in the space.
const SHARED_WINDOW: u64 = 0xffff_0001_0000_0000;
const LOCAL_WINDOW: u64 = 0xffff_0002_0000_0000;
const PARAM_WINDOW: u64 = 0xffff_0003_0000_0000;

/// What is added to an address of `space` to make it generic.
pub(crate) fn window(space: Space) -> u64 {
    match space {
        Space::Shared => SHARED_WINDOW,
        Space::Local => LOCAL_WINDOW,
        Space::Param => PARAM_WINDOW,
        Space::Global | Space::Const | Space::Generic => 0,
    }
}

/// The space a generic address points into.
pub(crate) fn space_of(address: u64) -> Space {
    match address & !0xffff_ffff {
        SHARED_WINDOW => Space::Shared,
        LOCAL_WINDOW => Space::Local,
        PARAM_WINDOW => Space::Param,
        _ => Space::Global,
    }
}

/// Longest access in bytes, and most components.
const LONGEST: usize = 16;
const COMPONENTS: usize = 4;

impl Block<'_> {
    /// Addresses of an access, for the lanes of `mask`.
    pub(crate) fn addresses(&self, warp: &Warp, address: Address, mask: u32) -> Result<Lanes, ErrorKind> {
        let mut scratch = [0; WARP];
        let mut lanes = *warp.get(&self.fixed, address.base, mask, &mut scratch)?;
        for lane in &mut lanes {
            *lane = lane.wrapping_add_signed(address.offset);
        }
        Ok(lanes)
    }

    pub(crate) fn load(&mut self, warp: &mut Warp, load: &Load, mask: u32) -> Result<(), Fault> {
        let addresses = self.addresses(warp, load.address, mask)?;
        let bytes = load.element.bytes();
        let len = bytes * load.into.len();
        let mut out = [[0u64; WARP]; COMPONENTS];
        let mut buffer = [0u8; LONGEST];
        for lane in each(mask) {
            let place = Place { space: load.space, address: addresses[lane], lane, strong: load.strong };
            self.read(warp, place, &mut buffer[..len]).map_err(|kind| Fault(kind, Some(lane)))?;
            for (i, out) in out.iter_mut().enumerate().take(load.into.len()) {
                out[lane] = little_endian(&buffer[i * bytes..(i + 1) * bytes]);
            }
            if load.acquire {
                self.memory.synchronise(&mut self.view, addresses[lane], true, false);
            }
        }
        let bits = load.element.bits();
        let extend = load.element.is_signed() && load.register_bits > bits;
        for (into, values) in load.into.iter().zip(&mut out) {
            let Some(into) = into else { continue };
            if extend {
                for value in values.iter_mut() {
                    *value = truncate(sign_extend(*value, bits), load.register_bits);
                }
            }
            warp.set(*into, mask, values);
        }
        self.count(load.space, Access::Read, &addresses, mask, len);
        Ok(())
    }

    pub(crate) fn store(&mut self, warp: &mut Warp, store: &Store, mask: u32) -> Result<(), Fault> {
        let addresses = self.addresses(warp, store.address, mask)?;
        let bytes = store.element.bytes();
        let len = bytes * store.from.len();
        let mut values = [[0u64; WARP]; COMPONENTS];
        for (values, from) in values.iter_mut().zip(&store.from) {
            let mut scratch = [0; WARP];
            *values = *warp.get(&self.fixed, *from, mask, &mut scratch)?;
        }
        let mut buffer = [0u8; LONGEST];
        for lane in each(mask) {
            for (i, values) in values.iter().enumerate().take(store.from.len()) {
                buffer[i * bytes..(i + 1) * bytes].copy_from_slice(&values[lane].to_le_bytes()[..bytes]);
            }
            let place = Place { space: store.space, address: addresses[lane], lane, strong: store.strong };
            if store.release {
                self.view.fence();
                self.memory.synchronise(&mut self.view, addresses[lane], false, true);
            }
            self.write(warp, place, &buffer[..len]).map_err(|kind| Fault(kind, Some(lane)))?;
        }
        self.count(store.space, Access::Write, &addresses, mask, len);
        Ok(())
    }

    /// One lane's read.
    pub(crate) fn read(&mut self, warp: &Warp, place: Place, out: &mut [u8]) -> Result<(), ErrorKind> {
        let place = place.resolve();
        place.check_alignment(Access::Read, out.len())?;
        match place.space {
            Space::Shared => {
                let who = Who { warp: warp.index as u8, lane: place.lane as u8 };
                if place.strong {
                    let bytes = self.shared.load_atomic(who, place.address, out.len())?;
                    out.copy_from_slice(bytes);
                    self.shared.synchronise(warp.index, place.address);
                } else {
                    out.copy_from_slice(self.shared.load(who, place.address, out.len())?);
                }
                Ok(())
            }
            Space::Local => {
                let at = local(warp, place.lane, Access::Read, place.address, out.len())?;
                if let Some(i) = warp.local_written[at..at + out.len()].iter().position(|w| !w) {
                    let offset = place.address as usize + i;
                    return Err(ErrorKind::Uninitialised {
                        space: Space::Local,
                        buffer: "memory of the thread".to_owned(),
                        offset,
                    });
                }
                out.copy_from_slice(&warp.local[at..at + out.len()]);
                Ok(())
            }
            Space::Param => {
                let params = self.fixed.params;
                let start = place.address as usize;
                let Some(bytes) = start.checked_add(out.len()).and_then(|end| params.get(start..end)) else {
                    return Err(outside(Access::Read, Space::Param, place.address, out.len(), params.len()));
                };
                out.copy_from_slice(bytes);
                Ok(())
            }
            space => self.memory.load(&self.view, space, place.address, place.strong, out),
        }
    }

    /// One lane's write.
    pub(crate) fn write(&mut self, warp: &mut Warp, place: Place, bytes: &[u8]) -> Result<(), ErrorKind> {
        let place = place.resolve();
        place.check_alignment(Access::Write, bytes.len())?;
        match place.space {
            Space::Shared => {
                let who = Who { warp: warp.index as u8, lane: place.lane as u8 };
                let access = if place.strong { Access::Atomic } else { Access::Write };
                if place.strong {
                    self.shared.synchronise(warp.index, place.address);
                }
                self.shared.store(who, access, place.address, bytes)
            }
            Space::Local => {
                let at = local(warp, place.lane, Access::Write, place.address, bytes.len())?;
                warp.local[at..at + bytes.len()].copy_from_slice(bytes);
                warp.local_written[at..at + bytes.len()].fill(true);
                Ok(())
            }
            Space::Param | Space::Const => {
                Err(ErrorKind::ReadOnly { buffer: "parameters".to_owned(), offset: place.address as usize })
            }
            space => self.memory.store(&mut self.view, space, place.address, place.strong, bytes),
        }
    }

    pub(crate) fn atomic(&mut self, warp: &mut Warp, atomic: &Atomic, mask: u32) -> Result<(), Fault> {
        let addresses = self.addresses(warp, atomic.address, mask)?;
        let bytes = atomic.ty.bytes();
        let mut outs = [[0u64; WARP]; COMPONENTS];
        for (i, value) in atomic.value.iter().enumerate() {
            let mut scratch = [0; WARP];
            let values = *warp.get(&self.fixed, *value, mask, &mut scratch)?;
            let replacements = match atomic.replacement {
                Some(src) => *warp.get(&self.fixed, src, mask, &mut scratch)?,
                None => [0; WARP],
            };
            // Lanes take their turns; which comes first is not defined, and eager mode turns it around.
            let mut lanes: Vec<usize> = each(mask).collect();
            if self.fixed.options.copies == crate::launch::CopyMode::Eager {
                lanes.reverse();
            }
            for lane in lanes {
                let address = addresses[lane].wrapping_add((i * bytes) as u64);
                let place = Place { space: atomic.space, address, lane, strong: true };
                let update = |old| updated(atomic.op, atomic.ty, old, values[lane], replacements[lane]);
                outs[i][lane] = self
                    .update(warp, place, bytes, atomic.acquire, atomic.release, update)
                    .map_err(|kind| Fault(kind, Some(lane)))?;
            }
        }
        for (into, values) in atomic.into.iter().zip(&outs) {
            if let Some(into) = into {
                warp.set(*into, mask, values);
            }
        }
        self.count(atomic.space, Access::Atomic, &addresses, mask, bytes * atomic.value.len());
        Ok(())
    }

    /// Replaces the value at a place and returns the old one.
    fn update(
        &mut self,
        warp: &Warp,
        place: Place,
        bytes: usize,
        acquire: bool,
        release: bool,
        new: impl Fn(u64) -> u64,
    ) -> Result<u64, ErrorKind> {
        let place = place.resolve();
        place.check_alignment(Access::Atomic, bytes)?;
        let mut buffer = [0u8; 8];
        match place.space {
            Space::Shared => {
                let who = Who { warp: warp.index as u8, lane: place.lane as u8 };
                buffer[..bytes].copy_from_slice(self.shared.load_atomic(who, place.address, bytes)?);
                let old = u64::from_le_bytes(buffer);
                let value = new(old).to_le_bytes();
                self.shared.store(who, Access::Atomic, place.address, &value[..bytes])?;
                self.shared.synchronise(warp.index, place.address);
                Ok(old)
            }
            Space::Global => {
                if release {
                    self.view.fence();
                }
                self.memory.load(&self.view, Space::Global, place.address, true, &mut buffer[..bytes])?;
                let old = u64::from_le_bytes(buffer);
                let value = new(old).to_le_bytes();
                let access = Access::Atomic;
                self.memory.update(&mut self.view, Space::Global, place.address, access, &value[..bytes])?;
                // Relaxed atomics order what fences beside them order; the fence behind one is not checked.
                let _ = acquire;
                self.memory.synchronise(&mut self.view, place.address, true, true);
                Ok(old)
            }
            space => Err(ErrorKind::Unsupported(format!("atomics on {space} memory"))),
        }
    }

    fn count(&mut self, space: Space, access: Access, addresses: &Lanes, mask: u32, len: usize) {
        let space = match space {
            Space::Generic => space_of(addresses[mask.trailing_zeros() as usize]),
            space => space,
        };
        match (space, access) {
            (Space::Global, Access::Read) => count_sectors(&mut self.stats.global_read, addresses, mask, len),
            (Space::Global, Access::Write) => {
                count_sectors(&mut self.stats.global_written, addresses, mask, len);
            }
            (Space::Global, Access::Atomic) => {
                count_sectors(&mut self.stats.global_atomic, addresses, mask, len);
            }
            (Space::Shared, Access::Read) => count_banks(&mut self.stats.shared_read, addresses, mask, len),
            (Space::Shared, _) => count_banks(&mut self.stats.shared_written, addresses, mask, len),
            _ => {}
        }
    }
}

/// Where one lane accesses memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    pub(crate) space: Space,
    pub(crate) address: u64,
    pub(crate) lane: usize,
    pub(crate) strong: bool,
}

impl Place {
    /// Generic addresses become those of their space.
    fn resolve(self) -> Place {
        match self.space {
            Space::Generic => {
                let space = space_of(self.address);
                Place { space, address: self.address.wrapping_sub(window(space)), ..self }
            }
            // Pointers into shared memory are 32 bits wide.
            Space::Shared => Place { address: self.address & 0xffff_ffff, ..self },
            _ => self,
        }
    }

    fn check_alignment(&self, access: Access, len: usize) -> Result<(), ErrorKind> {
        if self.address.is_multiple_of(len as u64) {
            return Ok(());
        }
        let (space, address) = (self.space, self.address);
        Err(ErrorKind::Misaligned { access, space, len, align: len, address })
    }
}

fn little_endian(bytes: &[u8]) -> u64 {
    let mut value = [0; 8];
    value[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(value)
}

fn outside(access: Access, space: Space, address: u64, len: usize, size: usize) -> ErrorKind {
    let (buffer, offset) = ("memory".to_owned(), address as i64);
    ErrorKind::OutOfBounds { access, space, buffer, offset, len, size }
}

/// Index of a lane's local byte.
fn local(warp: &Warp, lane: usize, access: Access, address: u64, len: usize) -> Result<usize, ErrorKind> {
    let size = warp.local.len() / WARP;
    let start = address as usize;
    if start.checked_add(len).is_none_or(|end| end > size) {
        return Err(outside(access, Space::Local, address, len, size));
    }
    Ok(lane * size + start)
}

fn updated(op: AtomicOp, ty: Type, old: u64, value: u64, replacement: u64) -> u64 {
    let (bits, mode) = (ty.bits(), HalfMode { flush: false, saturate: false, relu: false });
    let new = match op {
        AtomicOp::Add => match ty {
            Type::F32 => u64::from((f32::from_bits(old as u32) + f32::from_bits(value as u32)).to_bits()),
            Type::F64 => (f64::from_bits(old) + f64::from_bits(value)).to_bits(),
            Type::F16 | Type::F16x2 | Type::Bf16 | Type::Bf16x2 => {
                let mut out = [0; WARP];
                if let Some(add) = half_float::add(ty, mode) {
                    add(&[old; WARP], &[value; WARP], &mut out);
                }
                out[0]
            }
            _ => old.wrapping_add(value),
        },
        AtomicOp::And => old & value,
        AtomicOp::Or => old | value,
        AtomicOp::Xor => old ^ value,
        AtomicOp::Min | AtomicOp::Max => {
            let below = if ty.is_signed() {
                (sign_extend(old, bits) as i64) < (sign_extend(value, bits) as i64)
            } else {
                truncate(old, bits) < truncate(value, bits)
            };
            if below == (op == AtomicOp::Min) { old } else { value }
        }
        AtomicOp::Inc => {
            if old >= truncate(value, bits) {
                0
            } else {
                old + 1
            }
        }
        AtomicOp::Dec => {
            let limit = truncate(value, bits);
            if old == 0 || old > limit { limit } else { old - 1 }
        }
        AtomicOp::Exchange => value,
        AtomicOp::CompareExchange => {
            if old == truncate(value, bits) {
                replacement
            } else {
                old
            }
        }
    };
    truncate(new, bits)
}

/// Distinct values, of at most 64.
fn distinct(values: impl Iterator<Item = u64>) -> u64 {
    let mut seen = [0u64; 2 * WARP];
    let mut n = 0;
    let mut sorted = true;
    for value in values {
        if n > 0 && seen[n - 1] == value {
            continue;
        }
        sorted &= n == 0 || seen[n - 1] < value;
        seen[n] = value;
        n += 1;
    }
    if sorted {
        return n as u64;
    }
    let seen = &mut seen[..n];
    seen.sort_unstable();
    1 + seen.windows(2).filter(|w| w[0] != w[1]).count() as u64
}

pub(crate) fn count_sectors(traffic: &mut Traffic, addresses: &Lanes, mask: u32, len: usize) {
    traffic.requests += 1;
    traffic.bytes += u64::from(mask.count_ones()) * len as u64;
    // Accesses are aligned, so only those longer than a sector touch two.
    traffic.sectors += distinct(each(mask).map(|lane| addresses[lane] / 32));
}

/// Passes over the banks: lanes that share one take as many as the fullest bank has distinct words. Accesses of 8 and 16
/// bytes per lane go in two and four parts.
pub(crate) fn count_banks(traffic: &mut SharedTraffic, addresses: &Lanes, mask: u32, len: usize) {
    traffic.requests += 1;
    traffic.bytes += u64::from(mask.count_ones()) * len as u64;
    let parts = len.div_ceil(4).max(1);
    let lanes = WARP / parts.min(WARP);
    for part in 0..parts {
        let group = mask & (if lanes == WARP { !0 } else { ((1u32 << lanes) - 1) << (part * lanes) });
        if group == 0 {
            continue;
        }
        // The first word of each bank, and the further ones of all.
        let mut first = [u64::MAX; WARP];
        let mut banks = [0u8; WARP];
        let mut further = [0u64; 4 * WARP];
        let mut n = 0;
        for lane in each(group) {
            for word in 0..parts {
                let word = addresses[lane] / 4 + word as u64;
                let bank = (word % 32) as usize;
                if first[bank] == u64::MAX {
                    first[bank] = word;
                    banks[bank] = 1;
                } else if first[bank] != word && !further[..n].contains(&word) && n < further.len() {
                    further[n] = word;
                    n += 1;
                    banks[bank] += 1;
                }
            }
        }
        traffic.wavefronts += u64::from(banks.iter().copied().max().unwrap_or(1));
        traffic.ideal_wavefronts += 1;
    }
}
