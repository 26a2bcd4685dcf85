//! Execution of a launch: blocks one after the other, the warps of a block in turns.

pub(crate) mod access;
pub(crate) mod async_copy;
pub(crate) mod barrier;
pub(crate) mod collective;
pub(crate) mod execute;
pub(crate) mod mbarrier;
pub(crate) mod tensor;
pub(crate) mod warp;
pub(crate) mod wgmma;

use crate::code::{Code, Special};
use crate::error::{Error, ErrorKind, Result, Site};
use crate::launch::{CopyMode, Options};
use crate::memory::{BlockView, MAX_BLOCKS, Memory};
use crate::shared::{Named, SHARED_BASE, Shared};
use crate::stats::{Count, Stats};
use barrier::Barriers;
use mbarrier::Mbarriers;
use warp::{State, Warp};

/// A warp runs at most so many instructions before others have their turn: one that waits in a loop for another must
/// let it run.
const SLICE: u32 = 50_000;
/// Turns of all warps in which nothing but waiting happened, before that counts as a deadlock.
const IDLE_TURNS: u32 = 64;
/// Largest shared memory of a block, compute capability 9.0.
pub(crate) const MAX_SHARED: usize = 227 * 1024;

/// A fault of the lane it happened in, if it was one lane's.
#[derive(Debug)]
pub(crate) struct Fault(pub(crate) ErrorKind, pub(crate) Option<usize>);

impl From<ErrorKind> for Fault {
    fn from(kind: ErrorKind) -> Fault {
        Fault(kind, None)
    }
}

/// What an instruction leads to.
pub(crate) type Step = std::result::Result<Flow, Fault>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flow {
    Next,
    /// The program counter is set.
    Jumped,
    /// Lanes are missing: others of the warp run first, then this instruction again.
    Stalled,
    /// The next instruction, once a barrier opens.
    Waits,
    /// The next instruction, but nothing will change before others have run.
    Spins,
}

/// What does not change while a block runs.
#[derive(Debug)]
pub(crate) struct Fixed<'l> {
    pub(crate) code: &'l Code,
    pub(crate) options: &'l Options,
    pub(crate) variables: &'l [u64],
    pub(crate) params: &'l [u8],
    pub(crate) dynamic_shared: u64,
    pub(crate) dynamic_bytes: usize,
    pub(crate) ntid: [u32; 3],
    pub(crate) nctaid: [u32; 3],
    pub(crate) ctaid: [u32; 3],
}

impl Fixed<'_> {
    pub(crate) fn special(&self, special: Special) -> u64 {
        match special {
            Special::Ntid(axis) => u64::from(self.ntid[axis]),
            Special::Ctaid(axis) => u64::from(self.ctaid[axis]),
            Special::Nctaid(axis) => u64::from(self.nctaid[axis]),
            Special::NWarpId => u64::from(self.ntid.iter().product::<u32>().div_ceil(32)),
            Special::SmId | Special::GridId | Special::Zero => 0,
            Special::NSmId | Special::One => 1,
            Special::DynamicSharedSize => self.dynamic_bytes as u64,
            Special::TotalSharedSize => (self.code.shared_bytes + self.dynamic_bytes) as u64,
            // Those of a lane or a warp are answered there.
            _ => 0,
        }
    }

    /// The name of a register.
    pub(crate) fn register(&self, reg: u32) -> String {
        self.code.registers[reg as usize].clone()
    }

    #[cold]
    pub(crate) fn unwritten_register(&self, reg: u32) -> ErrorKind {
        ErrorKind::UninitialisedRegister { register: self.register(reg) }
    }

    #[cold]
    pub(crate) fn unwritten_predicate(&self, pred: u32) -> ErrorKind {
        ErrorKind::UninitialisedRegister { register: self.code.predicates[pred as usize].clone() }
    }
}

/// A block while it runs, but for its warps.
pub(crate) struct Block<'l> {
    pub(crate) fixed: Fixed<'l>,
    pub(crate) memory: &'l mut Memory,
    pub(crate) view: BlockView,
    pub(crate) shared: Shared,
    pub(crate) barriers: Barriers,
    pub(crate) mbarriers: Mbarriers,
    /// Tests of mbarriers that held: a turn in which one did was not spent waiting.
    pub(crate) waits_over: u64,
    pub(crate) stats: &'l mut Stats,
    counts: &'l mut [Count],
}

/// A launch as the machine takes it: everything checked that can be before it runs.
pub(crate) struct Work<'l> {
    pub(crate) code: &'l Code,
    pub(crate) grid: [u32; 3],
    pub(crate) block: [u32; 3],
    pub(crate) dynamic_bytes: usize,
    pub(crate) params: &'l [u8],
    pub(crate) variables: &'l [u64],
    pub(crate) options: &'l Options,
}

/// Runs all blocks.
///
/// # Errors
/// The first fault, with its place.
pub(crate) fn run(work: &Work<'_>, memory: &mut Memory) -> Result<Stats> {
    let code = work.code;
    let blocks = work.grid.iter().map(|n| u64::from(*n)).product::<u64>();
    debug_assert!(blocks <= MAX_BLOCKS);
    memory.begin_launch(work.options.check_races);
    let mut stats = Stats::default();
    let mut counts = vec![Count::default(); code.spellings.len()];
    let mut steps_left = work.options.step_limit;
    for index in 0..blocks {
        // The other order shows reads that a later block's write would have made wrong.
        let index = match work.options.copies {
            CopyMode::Lazy => index,
            CopyMode::Eager => blocks - 1 - index,
        };
        let [x, y, _] = work.grid.map(u64::from);
        let ctaid = [index % x, index / x % y, index / x / y].map(|i| i as u32);
        run_block(work, memory, &mut stats, &mut counts, &mut steps_left, index as u32, ctaid)?;
    }
    for (spelling, count) in code.spellings.iter().zip(counts).filter(|(_, c)| c.warps > 0) {
        *stats.opcodes.entry(spelling.clone()).or_default() += count;
    }
    Ok(stats)
}

fn run_block(
    work: &Work<'_>,
    memory: &mut Memory,
    stats: &mut Stats,
    counts: &mut [Count],
    steps_left: &mut u64,
    index: u32,
    ctaid: [u32; 3],
) -> Result<()> {
    let (code, options) = (work.code, work.options);
    let n_warps = work.block.iter().product::<u32>().div_ceil(32) as usize;
    // Addresses count from SHARED_BASE, which is a multiple of every alignment in use.
    let dynamic_offset = code.shared_bytes.next_multiple_of(code.dynamic_align.unwrap_or(16));
    let mut variables = code.shared.clone();
    variables.push(Named {
        name: "dynamic shared memory".to_owned(),
        offset: dynamic_offset,
        bytes: work.dynamic_bytes,
    });
    let shared_bytes = dynamic_offset + work.dynamic_bytes;
    let fixed = Fixed {
        code,
        options,
        variables: work.variables,
        params: work.params,
        dynamic_shared: SHARED_BASE + dynamic_offset as u64,
        dynamic_bytes: work.dynamic_bytes,
        ntid: work.block,
        nctaid: work.grid,
        ctaid,
    };
    let mut warps: Vec<Warp> = (0..n_warps)
        .map(|w| {
            let (registers, predicates) = (code.registers.len(), code.predicates.len());
            Warp::new(w, &fixed, registers, predicates, code.local_bytes, options.check_registers)
        })
        .collect();
    let mut block = Block {
        fixed,
        memory,
        view: BlockView::new(index),
        shared: Shared::new(shared_bytes, variables, n_warps, options.check_races),
        barriers: Barriers::default(),
        mbarriers: Mbarriers::default(),
        waits_over: 0,
        stats,
        counts,
    };
    let mut idle = 0;
    loop {
        let mut progress = false;
        let before = block.waits_over;
        for turn in 0..n_warps {
            let w = match options.copies {
                CopyMode::Lazy => turn,
                CopyMode::Eager => n_warps - 1 - turn,
            };
            if warps[w].state != State::Running {
                continue;
            }
            let pause = block.run_warp(&mut warps[w], steps_left)?;
            progress |= pause != Pause::Spins;
            block.open_barriers(&mut warps).map_err(|kind| block.whole_block(kind))?;
        }
        if warps.iter().all(|w| w.state == State::Done) {
            return block.check_end(&warps).map_err(|kind| block.whole_block(kind));
        }
        if warps.iter().all(|w| w.state != State::Running) {
            return Err(block.whole_block(ErrorKind::Deadlock(block.waiting(&warps))));
        }
        progress |= block.waits_over != before;
        idle = if progress { 0 } else { idle + 1 };
        if idle > IDLE_TURNS {
            return Err(block.whole_block(ErrorKind::Deadlock(block.waiting(&warps))));
        }
    }
}

/// Why a warp stopped running for now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pause {
    Ended,
    Waits,
    Spins,
    SliceOver,
}

impl Block<'_> {
    fn run_warp(&mut self, warp: &mut Warp, steps_left: &mut u64) -> Result<Pause> {
        for _ in 0..SLICE {
            let pc = warp.current.pc;
            let code = self.fixed.code;
            let inst = &code.insts[pc as usize];
            let mut mask = warp.current.mask;
            if let Some((index, negated)) = inst.guard {
                let guard = crate::code::PredSrc::Pred { index, negated };
                mask = match warp.pred(&self.fixed, guard, mask) {
                    Ok(mask) => mask,
                    Err(kind) => return Err(self.fault(Fault(kind, None), warp, inst.line)),
                };
            }
            if *steps_left == 0 {
                let limit = ErrorKind::StepLimit(self.fixed.options.step_limit);
                return Err(self.fault(Fault(limit, None), warp, inst.line));
            }
            *steps_left -= 1;
            warp.steps += 1;
            if mask == 0 {
                self.counts[inst.spelling as usize].warps += 1;
                warp.advance(pc + 1);
                continue;
            }
            match self.execute(warp, &inst.op, mask, inst.line) {
                Ok(flow) => {
                    if flow != Flow::Stalled {
                        let count = &mut self.counts[inst.spelling as usize];
                        count.warps += 1;
                        count.threads += u64::from(mask.count_ones());
                    }
                    match flow {
                        Flow::Next => warp.advance(pc + 1),
                        Flow::Jumped => {
                            if warp.state == State::Done {
                                return Ok(Pause::Ended);
                            }
                        }
                        Flow::Stalled => {}
                        Flow::Waits => {
                            warp.advance(pc + 1);
                            return Ok(Pause::Waits);
                        }
                        Flow::Spins => {
                            warp.advance(pc + 1);
                            if warp.is_divergent() {
                                warp.rotate();
                            }
                            return Ok(Pause::Spins);
                        }
                    }
                }
                Err(fault) => return Err(self.fault(fault, warp, inst.line)),
            }
        }
        Ok(Pause::SliceOver)
    }

    /// What must not be left when all threads have ended.
    fn check_end(&self, warps: &[Warp]) -> std::result::Result<(), ErrorKind> {
        let copies = warps.iter().flat_map(|w| &w.queues).find_map(|q| q.forgotten());
        let products = warps.iter().find_map(|w| w.pipeline.forgotten());
        if let Some(what) = copies.or(products).or_else(|| self.forgotten_copies()) {
            return Err(ErrorKind::NotWaited(what));
        }
        for group in warps.chunks(4) {
            if group.iter().any(|w| w.pipeline.issued() != group[0].pipeline.issued()) {
                let why = "the warps of a warpgroup have executed different wgmma instructions";
                return Err(ErrorKind::Matrix(why.to_owned()));
            }
        }
        Ok(())
    }

    fn site(&self) -> Site {
        Site { kernel: Some(self.fixed.code.name.clone()), block: Some(self.fixed.ctaid), ..Site::default() }
    }

    fn whole_block(&self, kind: ErrorKind) -> Error {
        Error { kind, at: Box::new(self.site()) }
    }

    fn fault(&self, Fault(kind, lane): Fault, warp: &Warp, line: u32) -> Error {
        let lane = lane.unwrap_or(warp.current.mask.trailing_zeros() as usize & 31);
        let thread = [0, 1, 2].map(|axis| warp.tid[axis][lane] as u32);
        let at =
            Site { line: Some(line), warp: Some(warp.index as u32), thread: Some(thread), ..self.site() };
        Error { kind, at: Box::new(at) }
    }

    /// Which warps wait where, for the error that says so.
    fn waiting(&self, warps: &[Warp]) -> String {
        let code = self.fixed.code;
        let line = |pc: u32| code.insts.get(pc as usize).map_or(0, |i| i.line);
        let mut parts = Vec::new();
        for warp in warps {
            let pc = warp.current.pc;
            match warp.state {
                State::Done => {}
                State::AtBarrier(id) => {
                    parts.push(format!("warp {} waits at barrier {id} (line {})", warp.index, line(pc - 1)));
                }
                State::Running => parts.push(format!("warp {} waits near line {}", warp.index, line(pc))),
            }
        }
        let ended = warps.iter().filter(|w| w.state == State::Done).count();
        if ended > 0 {
            parts.push(format!("{ended} warps have ended"));
        }
        parts.join("; ")
    }
}
