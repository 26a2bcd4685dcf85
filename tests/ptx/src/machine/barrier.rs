//! Barriers of a block: `bar.sync`, `bar.arrive`, `bar.red`.

use super::warp::{State, Warp};
use super::{Block, Fault, Flow, Step};
use crate::code::{Barrier, BarrierReduce};
use crate::decode::CLUSTER;
use crate::error::ErrorKind;
use crate::lanes::WARP;
use std::collections::BTreeMap;

/// A warp at a barrier.
#[derive(Debug, Clone, Copy)]
struct Arrival {
    warp: usize,
    lanes: u32,
    line: u32,
    waits: bool,
    /// Lanes for which the predicate of `bar.red` holds, and what to do with it.
    reduce: Option<(BarrierReduce, u32)>,
}

#[derive(Debug, Default)]
struct Gathering {
    /// Threads that must arrive; absent where all live ones must.
    threads: Option<u32>,
    arrivals: Vec<Arrival>,
}

/// Barriers at which somebody has arrived.
#[derive(Debug, Default)]
pub(crate) struct Barriers {
    gatherings: BTreeMap<u32, Gathering>,
}

impl Block<'_> {
    pub(crate) fn arrive(&mut self, warp: &mut Warp, barrier: &Barrier, mask: u32, line: u32) -> Step {
        if barrier.aligned && !self.gathered(warp, mask, warp.alive, "a barrier")? {
            return Ok(Flow::Stalled);
        }
        let id = self.uniform(warp, barrier.id, mask, "the number of a barrier")?;
        let threads = match barrier.threads {
            Some(src) => Some(self.uniform(warp, src, mask, "the threads of a barrier")? as u32),
            None => None,
        };
        let fail =
            |why: &str| Err(Fault(ErrorKind::Barrier { barrier: id as u32, why: why.to_owned() }, None));
        if id > CLUSTER || (id == CLUSTER && threads.is_some()) {
            return fail("a block has 16 barriers");
        }
        if threads.is_some_and(|t| t == 0 || t % 32 != 0) {
            return fail("the number of threads is a positive multiple of 32");
        }
        let reduce = match barrier.reduce {
            None => None,
            Some(how) => {
                let (BarrierReduce::And(_, from)
                | BarrierReduce::Or(_, from)
                | BarrierReduce::Count(_, from)) = how;
                Some((how, warp.pred(&self.fixed, from, mask)?))
            }
        };
        let gathering = self.barriers.gatherings.entry(id as u32).or_default();
        if !gathering.arrivals.is_empty() && gathering.threads != threads {
            return fail("warps expect different numbers of threads");
        }
        if gathering.arrivals.iter().any(|a| a.warp == warp.index && a.lanes & mask != 0) {
            return fail("a warp arrives twice before the others");
        }
        gathering.threads = threads;
        let lanes = if barrier.aligned { warp.alive } else { mask };
        gathering.arrivals.push(Arrival { warp: warp.index, lanes, line, waits: barrier.waits, reduce });
        if !barrier.waits {
            return Ok(Flow::Next);
        }
        warp.state = State::AtBarrier(id as u32);
        Ok(Flow::Waits)
    }

    /// Opens the barriers at which all have arrived that must.
    pub(crate) fn open_barriers(&mut self, warps: &mut [Warp]) -> Result<(), ErrorKind> {
        let live: u32 = warps.iter().map(|w| w.alive.count_ones()).sum();
        // Warps count as whole where a number is given, whatever lanes have ended.
        let arrived = |g: &Gathering| -> u32 {
            let of = |a: &Arrival| if g.threads.is_some() { WARP as u32 } else { a.lanes.count_ones() };
            g.arrivals.iter().map(of).sum()
        };
        let full = |g: &Gathering| arrived(g) >= g.threads.unwrap_or(live);
        let open: Vec<u32> =
            self.barriers.gatherings.iter().filter(|(_, g)| full(g)).map(|(id, _)| *id).collect();
        for id in open {
            let Some(gathering) = self.barriers.gatherings.remove(&id) else { continue };
            if let Some(threads) = gathering.threads
                && arrived(&gathering) > threads
            {
                let why = format!("{} threads arrived where {threads} were expected", arrived(&gathering));
                return Err(ErrorKind::Barrier { barrier: id, why });
            }
            self.open(id, &gathering, warps)?;
        }
        Ok(())
    }

    fn open(&mut self, id: u32, gathering: &Gathering, warps: &mut [Warp]) -> Result<(), ErrorKind> {
        let mut lines: Vec<u32> = gathering.arrivals.iter().map(|a| a.line).collect();
        lines.sort_unstable();
        lines.dedup();
        if gathering.threads.is_none() && lines.len() > 1 {
            return Err(ErrorKind::BarrierMismatch { barrier: id, lines });
        }
        self.stats.barriers += 1;
        let mut known = Vec::new();
        for arrival in &gathering.arrivals {
            self.shared.release(arrival.warp, &mut known);
        }
        let holds: Vec<(u32, u32)> =
            gathering.arrivals.iter().filter_map(|a| Some((a.lanes, a.reduce?.1))).collect();
        let count: u32 = holds.iter().map(|(_, p)| p.count_ones()).sum();
        let all = holds.iter().all(|(lanes, p)| lanes & !p == 0);
        for arrival in &gathering.arrivals {
            if arrival.waits {
                self.shared.acquire(arrival.warp, &known);
                warps[arrival.warp].state = State::Running;
            }
            let warp = &mut warps[arrival.warp];
            let verdict = |holds: bool| if holds { arrival.lanes } else { 0 };
            match arrival.reduce {
                None => {}
                Some((BarrierReduce::Count(into, _), _)) => {
                    warp.set(into, arrival.lanes, &[u64::from(count); WARP]);
                }
                Some((BarrierReduce::And(into, _), _)) => warp.set_pred(into, arrival.lanes, verdict(all)),
                Some((BarrierReduce::Or(into, _), _)) => {
                    warp.set_pred(into, arrival.lanes, verdict(count > 0));
                }
            }
        }
        Ok(())
    }
}
