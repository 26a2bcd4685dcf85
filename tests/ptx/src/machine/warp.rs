//! A warp: registers, and which of its lanes are where.
//!
//! Lanes that have parted are groups. The group with the lowest program counter runs, until it reaches another, and
//! both are one again. A group that must wait for lanes elsewhere (an instruction with `.sync`) stands still while the
//! others run: that is how lanes come back which the compiler sent to code behind the end of the function.

use super::Fixed;
use super::async_copy::Queues;
use super::wgmma::Pipeline;
use crate::code::{PredSrc, Special, Src};
use crate::error::ErrorKind;
use crate::lanes::{Lanes, WARP};
use crate::types::truncate;

#[derive(Debug, Clone, Copy)]
pub(crate) struct Group {
    pub(crate) pc: u32,
    pub(crate) mask: u32,
    /// Waits for lanes of other groups.
    stalled: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Running,
    /// At a barrier of the block, by its number.
    AtBarrier(u32),
    Done,
}

#[derive(Debug)]
pub(crate) struct Warp {
    pub(crate) index: usize,
    pub(crate) regs: Vec<Lanes>,
    /// Per register, the lanes that have written it.
    pub(crate) written: Vec<u32>,
    pub(crate) preds: Vec<u32>,
    pub(crate) preds_written: Vec<u32>,
    /// The carry of `add.cc`.
    pub(crate) carry: u32,
    pub(crate) current: Group,
    others: Vec<Group>,
    /// Lanes that have not ended.
    pub(crate) alive: u32,
    pub(crate) state: State,
    /// Local memory, lane after lane.
    pub(crate) local: Vec<u8>,
    pub(crate) local_written: Vec<bool>,
    pub(crate) tid: [Lanes; 3],
    /// Warp instructions executed.
    pub(crate) steps: u64,
    pub(crate) check_registers: bool,
    /// Asynchronous copies of its threads; empty until the first.
    pub(crate) queues: Vec<Queues>,
    pub(crate) pipeline: Pipeline,
}

impl Warp {
    pub(crate) fn new(
        index: usize,
        fixed: &Fixed<'_>,
        registers: usize,
        predicates: usize,
        local_bytes: usize,
        check_registers: bool,
    ) -> Warp {
        let threads = fixed.ntid.iter().product::<u32>();
        let first = index as u32 * WARP as u32;
        let live = (threads - first).min(WARP as u32);
        let alive = if live == 32 { !0 } else { (1 << live) - 1 };
        let [x, y, _] = fixed.ntid;
        let place = |lane: usize| {
            let thread = first + lane as u32;
            [thread % x, thread / x % y, thread / x / y]
        };
        let tid = [0, 1, 2].map(|axis| std::array::from_fn(|lane| u64::from(place(lane)[axis])));
        Warp {
            index,
            regs: vec![[0; WARP]; registers],
            written: vec![0; registers],
            preds: vec![0; predicates],
            preds_written: vec![0; predicates],
            carry: 0,
            current: Group { pc: 0, mask: alive, stalled: false },
            others: Vec::new(),
            alive,
            state: State::Running,
            local: vec![0xcd; local_bytes * WARP],
            local_written: vec![false; local_bytes * WARP],
            tid,
            steps: 0,
            check_registers,
            queues: Vec::new(),
            pipeline: Pipeline::default(),
        }
    }

    /// The asynchronous copies of a lane.
    pub(crate) fn queues(&mut self, lane: usize) -> &mut Queues {
        if self.queues.is_empty() {
            self.queues = vec![Queues::default(); WARP];
        }
        &mut self.queues[lane]
    }

    /// A source for all lanes, initialised for those of `mask`.
    #[inline]
    pub(crate) fn get<'a>(
        &'a self,
        fixed: &Fixed<'_>,
        src: Src,
        mask: u32,
        scratch: &'a mut Lanes,
    ) -> Result<&'a Lanes, ErrorKind> {
        match src {
            Src::Reg(reg) => {
                if self.written[reg as usize] & mask != mask && self.check_registers {
                    return Err(self.pipeline.unwritten(fixed, reg));
                }
                return Ok(&self.regs[reg as usize]);
            }
            Src::Imm(value) => *scratch = [value; WARP],
            Src::Variable(index, offset) => {
                *scratch = [fixed.variables[index as usize].wrapping_add_signed(offset); WARP];
            }
            Src::DynamicShared(offset) => {
                *scratch = [fixed.dynamic_shared.wrapping_add_signed(offset); WARP];
            }
            Src::Special(special) => match special {
                Special::Tid(axis) => return Ok(&self.tid[axis]),
                Special::LaneId => each_lane(scratch, |lane| lane),
                Special::LaneMaskEq => each_lane(scratch, |lane| 1 << lane),
                Special::LaneMaskLt => each_lane(scratch, |lane| (1 << lane) - 1),
                Special::LaneMaskLe => each_lane(scratch, |lane| (2 << lane) - 1),
                Special::LaneMaskGt => each_lane(scratch, |lane| truncate(!((2 << lane) - 1), 32)),
                Special::LaneMaskGe => each_lane(scratch, |lane| truncate(!((1 << lane) - 1), 32)),
                Special::WarpId => *scratch = [self.index as u64; WARP],
                Special::Clock => *scratch = [self.steps; WARP],
                uniform => *scratch = [fixed.special(uniform); WARP],
            },
        }
        Ok(scratch)
    }

    /// A source that all lanes of `mask` must agree on.
    pub(crate) fn uniform(&self, fixed: &Fixed<'_>, src: Src, mask: u32) -> Result<Option<u64>, ErrorKind> {
        let mut scratch = [0; WARP];
        let values = self.get(fixed, src, mask, &mut scratch)?;
        let first = values[mask.trailing_zeros() as usize & 31];
        Ok(crate::lanes::each(mask).all(|lane| values[lane] == first).then_some(first))
    }

    /// Lanes for which a predicate holds, among those of `mask`.
    pub(crate) fn pred(&self, fixed: &Fixed<'_>, src: PredSrc, mask: u32) -> Result<u32, ErrorKind> {
        match src {
            PredSrc::Const(value) => Ok(if value { mask } else { 0 }),
            PredSrc::Pred { index, negated } => {
                if self.preds_written[index as usize] & mask != mask && self.check_registers {
                    return Err(fixed.unwritten_predicate(index));
                }
                let value = self.preds[index as usize];
                Ok(if negated { !value } else { value } & mask)
            }
        }
    }

    #[inline]
    pub(crate) fn set(&mut self, reg: u32, mask: u32, values: &Lanes) {
        let slot = &mut self.regs[reg as usize];
        self.written[reg as usize] |= mask;
        if mask == !0 {
            *slot = *values;
            return;
        }
        for (lane, (slot, value)) in slot.iter_mut().zip(values).enumerate() {
            if mask >> lane & 1 == 1 {
                *slot = *value;
            }
        }
    }

    pub(crate) fn set_pred(&mut self, pred: u32, mask: u32, values: u32) {
        let slot = &mut self.preds[pred as usize];
        *slot = (*slot & !mask) | (values & mask);
        self.preds_written[pred as usize] |= mask;
    }

    /// The running group goes on at `pc`, and joins or gives way to others.
    #[inline]
    pub(crate) fn advance(&mut self, pc: u32) {
        self.current.pc = pc;
        if !self.others.is_empty() {
            self.settle();
        }
    }

    /// Lanes of `taken` go to `target`, the rest of the running group to the next instruction.
    pub(crate) fn branch(&mut self, taken: u32, target: u32) {
        let next = self.current.pc + 1;
        let rest = self.current.mask & !taken;
        if rest == 0 {
            self.advance(target);
            return;
        }
        self.part(taken, target, next);
    }

    /// Lanes of `away` go to `target`, the rest of the running group to `stay`.
    pub(crate) fn part(&mut self, away: u32, target: u32, stay: u32) {
        self.others.push(Group { pc: target, mask: away, stalled: false });
        self.current.mask &= !away;
        self.current.pc = stay;
        self.settle();
    }

    /// Joins what stands at the same instruction and runs the lowest group that can run.
    fn settle(&mut self) {
        let pc = self.current.pc;
        let mut joined = 0;
        self.others.retain(|g| {
            if g.pc == pc {
                joined |= g.mask;
            }
            g.pc != pc
        });
        self.current.mask |= joined;
        let lowest = self.others.iter().enumerate().filter(|(_, g)| !g.stalled).min_by_key(|(_, g)| g.pc);
        if let Some((at, group)) = lowest
            && group.pc < pc
        {
            std::mem::swap(&mut self.current, &mut self.others[at]);
            // What has just become the running group may stand where another does.
            self.settle();
        }
    }

    /// The running group waits for others. False where no other can run.
    pub(crate) fn stall(&mut self) -> bool {
        let lowest = self.others.iter().enumerate().filter(|(_, g)| !g.stalled).min_by_key(|(_, g)| g.pc);
        let Some((at, _)) = lowest else { return false };
        self.current.stalled = true;
        std::mem::swap(&mut self.current, &mut self.others[at]);
        true
    }

    /// Gives another group a turn, where there is one that can run.
    pub(crate) fn rotate(&mut self) {
        if let Some(at) = self.others.iter().position(|g| !g.stalled) {
            let next = self.others.remove(at);
            let last = std::mem::replace(&mut self.current, next);
            self.others.push(last);
        }
    }

    /// Lanes end.
    pub(crate) fn exit(&mut self, lanes: u32) {
        self.alive &= !lanes;
        self.current.mask &= !lanes;
        if self.current.mask != 0 {
            let next = self.current.pc + 1;
            self.advance(next);
        } else if self.alive == 0 {
            self.state = State::Done;
        } else {
            // Who waited for these lanes waits no longer.
            for group in &mut self.others {
                group.stalled = false;
            }
            let lowest = self.others.iter().enumerate().min_by_key(|(_, g)| g.pc).map(|(at, _)| at);
            if let Some(at) = lowest {
                self.current = self.others.swap_remove(at);
                self.settle();
            }
        }
    }

    /// Number of groups the live lanes are in.
    pub(crate) fn is_divergent(&self) -> bool {
        !self.others.is_empty()
    }
}

fn each_lane(out: &mut Lanes, of: impl Fn(u64) -> u64) {
    for (lane, out) in out.iter_mut().enumerate() {
        *out = of(lane as u64);
    }
}
