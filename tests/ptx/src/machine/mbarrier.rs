//! Barriers in shared memory: `mbarrier`, which counts arrivals and the bytes of bulk copies.

use super::async_copy::{Copy, shared_address};
use super::warp::Warp;
use super::{Block, Fault, Flow, Step};
use crate::code::{Address, Pred, Reg, Src};
use crate::error::{Access, ErrorKind};
use crate::lanes::{WARP, each};
use crate::shared::Who;
use std::collections::BTreeMap;

/// Bytes of an mbarrier object.
const BYTES: usize = 8;

#[derive(Debug, Clone)]
pub(crate) enum MbarrierOp {
    Init {
        at: Address,
        count: Src,
    },
    Invalidate {
        at: Address,
    },
    /// `expect` bytes first, where there are.
    Arrive {
        at: Address,
        count: Src,
        expect: Option<Src>,
        drop: bool,
        state: Option<Reg>,
    },
    Expect {
        at: Address,
        bytes: Src,
    },
    /// Whether the phase has passed: that of a state, or of a parity.
    Test {
        at: Address,
        phase: Src,
        parity: bool,
        into: Pred,
    },
}

/// Something that happens at the latest when somebody waits.
#[derive(Debug, Clone)]
enum Deferred {
    /// A bulk copy, whose bytes are counted when it lands.
    Bytes(Copy),
    /// The copies of a thread, which arrives then.
    Arrival(Vec<Copy>),
}

#[derive(Debug, Clone, Default)]
struct Mbarrier {
    /// Arrivals of a phase.
    expected: i64,
    pending: i64,
    bytes: i64,
    phase: u64,
    /// What those who arrived in this phase did before.
    arriving: Vec<u32>,
    /// What those who arrived in phases that have passed did before.
    passed: Vec<u32>,
    deferred: Vec<Deferred>,
    /// The first test that found the phase not passed: warp, and its steps by then.
    polled: Option<(usize, u64)>,
}

/// The mbarriers of a block, by address.
#[derive(Debug, Default)]
pub(crate) struct Mbarriers {
    live: BTreeMap<u64, Mbarrier>,
}

impl Block<'_> {
    fn mbarrier_fault(&self, address: u64, why: impl Into<String>) -> ErrorKind {
        let (buffer, offset) = self.shared.describe_address(address);
        ErrorKind::Mbarrier { buffer, offset, why: why.into() }
    }

    fn mbarrier(&mut self, address: u64) -> Result<&mut Mbarrier, ErrorKind> {
        if !self.mbarriers.live.contains_key(&address) {
            return Err(self.mbarrier_fault(address, "it is used without mbarrier.init"));
        }
        Ok(self.mbarriers.live.entry(address).or_default())
    }

    /// Checks that the initialisation of an mbarrier happened before this use.
    fn touch(&mut self, warp: usize, lane: usize, address: u64) -> Result<(), ErrorKind> {
        self.mbarrier(address)?;
        let who = Who { warp: warp as u8, lane: lane as u8 };
        self.shared.load_atomic(who, address, BYTES).map(|_| ())
    }

    pub(crate) fn mbarrier_op(&mut self, warp: &mut Warp, op: &MbarrierOp, mask: u32) -> Step {
        let (MbarrierOp::Init { at, .. }
        | MbarrierOp::Invalidate { at }
        | MbarrierOp::Arrive { at, .. }
        | MbarrierOp::Expect { at, .. }
        | MbarrierOp::Test { at, .. }) = op;
        let at = self.addresses(warp, *at, mask)?.map(shared_address);
        let (mut sa, mut sb) = ([0; WARP], [0; WARP]);
        match op {
            MbarrierOp::Init { count, .. } => {
                let counts = *warp.get(&self.fixed, *count, mask, &mut sa)?;
                for lane in each(mask) {
                    self.init(warp.index, lane, at[lane], counts[lane])
                        .map_err(|kind| Fault(kind, Some(lane)))?;
                }
            }
            MbarrierOp::Invalidate { .. } => {
                for lane in each(mask) {
                    self.touch(warp.index, lane, at[lane]).map_err(|kind| Fault(kind, Some(lane)))?;
                    self.mbarriers.live.remove(&at[lane]);
                }
            }
            MbarrierOp::Arrive { count, expect, drop, state, .. } => {
                let counts = *warp.get(&self.fixed, *count, mask, &mut sa)?;
                let bytes = match expect {
                    Some(src) => *warp.get(&self.fixed, *src, mask, &mut sb)?,
                    None => [0; WARP],
                };
                let mut phases = [0; WARP];
                for lane in each(mask) {
                    let mut arrive = || {
                        self.touch(warp.index, lane, at[lane])?;
                        self.release_to(warp.index, at[lane])?;
                        let barrier = self.mbarrier(at[lane])?;
                        phases[lane] = barrier.phase;
                        barrier.bytes += i64::from(bytes[lane] as u32);
                        if *drop {
                            barrier.expected -= 1;
                        }
                        self.complete(at[lane], i64::from(counts[lane] as u32), 0)
                    };
                    arrive().map_err(|kind| Fault(kind, Some(lane)))?;
                }
                if let Some(state) = state {
                    warp.set(*state, mask, &phases);
                }
            }
            MbarrierOp::Expect { bytes, .. } => {
                let bytes = *warp.get(&self.fixed, *bytes, mask, &mut sa)?;
                for lane in each(mask) {
                    self.touch(warp.index, lane, at[lane]).map_err(|kind| Fault(kind, Some(lane)))?;
                    self.mbarrier(at[lane])?.bytes += i64::from(bytes[lane] as u32);
                }
            }
            MbarrierOp::Test { phase, parity, into, .. } => {
                let phases = *warp.get(&self.fixed, *phase, mask, &mut sa)?;
                let mut passed = 0u32;
                for lane in each(mask) {
                    let holds = self
                        .test((warp.index, warp.steps), lane, at[lane], phases[lane], *parity)
                        .map_err(|kind| Fault(kind, Some(lane)))?;
                    passed |= u32::from(holds) << lane;
                }
                warp.set_pred(*into, mask, passed);
                if passed != mask {
                    return Ok(Flow::Spins);
                }
            }
        }
        Ok(Flow::Next)
    }

    fn init(&mut self, warp: usize, lane: usize, address: u64, count: u64) -> Result<(), ErrorKind> {
        if !address.is_multiple_of(BYTES as u64) {
            let (space, len) = (crate::memory::Space::Shared, BYTES);
            return Err(ErrorKind::Misaligned { access: Access::Write, space, len, align: BYTES, address });
        }
        let expected = i64::from(count as u32);
        if !(1..1 << 20).contains(&expected) {
            return Err(self.mbarrier_fault(address, format!("a count of {expected}")));
        }
        let who = Who { warp: warp as u8, lane: lane as u8 };
        self.shared.store(who, Access::Write, address, &[0; BYTES])?;
        let barrier = Mbarrier { expected, pending: expected, ..Mbarrier::default() };
        self.mbarriers.live.insert(address, barrier);
        Ok(())
    }

    /// What a warp has done so far is known to whoever waits for the phase.
    fn release_to(&mut self, warp: usize, address: u64) -> Result<(), ErrorKind> {
        let mut arriving = std::mem::take(&mut self.mbarrier(address)?.arriving);
        self.shared.release(warp, &mut arriving);
        self.mbarrier(address)?.arriving = arriving;
        Ok(())
    }

    /// Arrivals and bytes that are done; the phase passes when none are missing.
    fn complete(&mut self, address: u64, arrivals: i64, bytes: i64) -> Result<(), ErrorKind> {
        let barrier = self.mbarrier(address)?;
        barrier.pending -= arrivals;
        barrier.bytes -= bytes;
        if barrier.pending < 0 {
            let why = format!("more arrivals than the {} of a phase", barrier.expected);
            return Err(self.mbarrier_fault(address, why));
        }
        if barrier.pending == 0 && barrier.bytes == 0 {
            barrier.phase += 1;
            barrier.pending = barrier.expected;
            let arrived = std::mem::take(&mut barrier.arriving);
            barrier.passed.resize(arrived.len().max(barrier.passed.len()), 0);
            for (passed, arrived) in barrier.passed.iter_mut().zip(arrived) {
                *passed = (*passed).max(arrived);
            }
        } else if barrier.pending == 0 && barrier.bytes < 0 {
            let why = format!("{} bytes more than expected arrived", -barrier.bytes);
            return Err(self.mbarrier_fault(address, why));
        }
        Ok(())
    }

    fn test(
        &mut self,
        (warp, step): (usize, u64),
        lane: usize,
        address: u64,
        phase: u64,
        parity: bool,
    ) -> Result<bool, ErrorKind> {
        self.touch(warp, lane, address)?;
        let passed = |b: &Mbarrier| if parity { b.phase & 1 != phase & 1 } else { b.phase > phase };
        if !passed(self.mbarrier(address)?) {
            // Copies land when they are waited for. A test may fail, and the first one does: who does not test again
            // has not waited.
            let barrier = self.mbarrier(address)?;
            if *barrier.polled.get_or_insert((warp, step)) == (warp, step) {
                return Ok(false);
            }
            barrier.polled = None;
            for deferred in std::mem::take(&mut self.mbarrier(address)?.deferred) {
                match deferred {
                    Deferred::Bytes(copy) => {
                        self.land(&copy, false)?;
                        self.complete(address, 0, copy.bytes as i64)?;
                    }
                    Deferred::Arrival(copies) => {
                        for copy in copies {
                            self.land(&copy, false)?;
                        }
                        self.complete(address, 1, 0)?;
                    }
                }
            }
        }
        let barrier = self.mbarrier(address)?;
        if !passed(barrier) {
            return Ok(false);
        }
        let known = barrier.passed.clone();
        self.waits_over += 1;
        self.shared.acquire(warp, &known);
        Ok(true)
    }

    /// `cp.async.mbarrier.arrive`: an arrival behind copies. Counted ones are added to those of the phase first.
    pub(crate) fn arrive_behind(
        &mut self,
        warp: usize,
        lane: usize,
        address: u64,
        copies: Vec<Copy>,
        counted: bool,
    ) -> Result<(), ErrorKind> {
        self.touch(warp, lane, address)?;
        self.release_to(warp, address)?;
        if counted {
            self.mbarrier(address)?.pending += 1;
        }
        if copies.is_empty() {
            return self.complete(address, 1, 0);
        }
        self.mbarrier(address)?.deferred.push(Deferred::Arrival(copies));
        Ok(())
    }

    /// A bulk copy was issued whose bytes an mbarrier counts. Eagerly it has landed.
    pub(crate) fn count_bytes(
        &mut self,
        warp: usize,
        lane: usize,
        address: u64,
        copy: Copy,
    ) -> Result<(), ErrorKind> {
        self.touch(warp, lane, address)?;
        self.release_to(warp, address)?;
        if self.is_eager() {
            return self.complete(address, 0, copy.bytes as i64);
        }
        self.mbarrier(address)?.deferred.push(Deferred::Bytes(copy));
        Ok(())
    }

    /// Copies that mbarriers still count when the block ends.
    pub(crate) fn forgotten_copies(&self) -> Option<String> {
        let deferred: usize = self.mbarriers.live.values().map(|b| b.deferred.len()).sum();
        (deferred > 0).then(|| format!("{deferred} copies that mbarriers count"))
    }
}
