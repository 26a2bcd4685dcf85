//! Instructions that lanes of a warp execute together.

use super::warp::Warp;
use super::{Block, Fault, Flow, Step};
use crate::code::{Pred, PredSrc, ReduxMode, Reg, ShuffleMode, Src, VoteMode};
use crate::error::ErrorKind;
use crate::lanes::{Lanes, WARP, each};
use crate::types::{Type, truncate};

impl Block<'_> {
    /// Whether all live lanes of `members` are here. Where others of the warp can still come, they run first: false.
    ///
    /// # Errors
    /// They cannot come any more.
    pub(crate) fn gathered(
        &self,
        warp: &mut Warp,
        mask: u32,
        members: u32,
        what: &str,
    ) -> Result<bool, Fault> {
        if members & warp.alive & !mask == 0 {
            return Ok(true);
        }
        if warp.stall() {
            return Ok(false);
        }
        Err(Fault(ErrorKind::Divergent { what: what.to_owned(), active: mask, alive: warp.alive }, None))
    }

    /// A member mask that names the executing lanes, all of them here.
    fn members(&self, warp: &mut Warp, members: Src, mask: u32, what: &str) -> Result<Option<u32>, Fault> {
        let mut scratch = [0; WARP];
        let values = *warp.get(&self.fixed, members, mask, &mut scratch)?;
        let first = truncate(values[mask.trailing_zeros() as usize & 31], 32) as u32;
        let agree = each(mask).all(|lane| values[lane] as u32 == first);
        if !agree || first & mask != mask {
            let kind = ErrorKind::MemberMask { what: what.to_owned(), members: first, active: mask };
            return Err(Fault(kind, None));
        }
        Ok(self.gathered(warp, mask, first, what)?.then_some(first))
    }

    pub(crate) fn uniform(&self, warp: &Warp, src: Src, mask: u32, what: &str) -> Result<u64, Fault> {
        match warp.uniform(&self.fixed, src, mask)? {
            Some(value) => Ok(value),
            None => Err(Fault(ErrorKind::Launch(format!("{what} differs between lanes of a warp")), None)),
        }
    }

    pub(crate) fn warp_sync(&mut self, warp: &mut Warp, members: Src, mask: u32) -> Step {
        if self.members(warp, members, mask, "bar.warp.sync")?.is_none() {
            return Ok(Flow::Stalled);
        }
        self.shared.warp_sync(warp.index);
        Ok(Flow::Next)
    }

    pub(crate) fn vote(
        &mut self,
        warp: &mut Warp,
        mode: VoteMode,
        into: (Option<Reg>, Option<Pred>),
        from: PredSrc,
        members: Src,
        mask: u32,
    ) -> Step {
        let Some(members) = self.members(warp, members, mask, "vote")? else { return Ok(Flow::Stalled) };
        let votes = warp.pred(&self.fixed, from, mask)?;
        let voters = members & mask;
        let verdict = match mode {
            VoteMode::All => votes == voters,
            VoteMode::Any => votes != 0,
            VoteMode::Uniform => votes == 0 || votes == voters,
            VoteMode::Ballot => false,
        };
        if let Some(into) = into.0 {
            warp.set(into, mask, &[u64::from(votes); WARP]);
        }
        if let Some(into) = into.1 {
            warp.set_pred(into, mask, if verdict { !0 } else { 0 });
        }
        Ok(Flow::Next)
    }

    pub(crate) fn match_lanes(
        &mut self,
        warp: &mut Warp,
        all: bool,
        bits: u32,
        into: (Option<Reg>, Option<Pred>),
        (a, members): (Src, Src),
        mask: u32,
    ) -> Step {
        if self.members(warp, members, mask, "match")?.is_none() {
            return Ok(Flow::Stalled);
        }
        let mut scratch = [0; WARP];
        let values = warp.get(&self.fixed, a, mask, &mut scratch)?.map(|v| truncate(v, bits));
        let same = |lane: usize| {
            each(mask).filter(|other| values[*other] == values[lane]).fold(0u32, |m, other| m | 1 << other)
        };
        let mut out = [0; WARP];
        let equal = each(mask).all(|lane| same(lane) == mask);
        for lane in each(mask) {
            out[lane] = u64::from(match (all, equal) {
                (false, _) => same(lane),
                (true, true) => mask,
                (true, false) => 0,
            });
        }
        if let Some(into) = into.0 {
            warp.set(into, mask, &out);
        }
        if let Some(into) = into.1 {
            warp.set_pred(into, mask, if equal { !0 } else { 0 });
        }
        Ok(Flow::Next)
    }

    pub(crate) fn shuffle(
        &mut self,
        warp: &mut Warp,
        mode: ShuffleMode,
        into: (Option<Reg>, Option<Pred>),
        [a, b, c, members]: [Src; 4],
        mask: u32,
    ) -> Step {
        let Some(members) = self.members(warp, members, mask, "shfl")? else { return Ok(Flow::Stalled) };
        let (mut sa, mut sb, mut sc) = ([0; WARP], [0; WARP], [0; WARP]);
        let values = *warp.get(&self.fixed, a, mask, &mut sa)?;
        let by = *warp.get(&self.fixed, b, mask, &mut sb)?;
        let bounds = *warp.get(&self.fixed, c, mask, &mut sc)?;
        let mut out: Lanes = [0; WARP];
        let mut inside = 0u32;
        for lane in each(mask) {
            let (by, clamp) = (by[lane] as usize & 31, bounds[lane] as usize & 31);
            let segment = (bounds[lane] >> 8) as usize & 31;
            let highest = (lane & segment) | (clamp & !segment);
            let lowest = lane & segment;
            let (source, ok) = match mode {
                // The bound of `up` is the lowest lane.
                ShuffleMode::Up => (lane.wrapping_sub(by), lane as i32 - by as i32 >= highest as i32),
                ShuffleMode::Down => (lane + by, lane + by <= highest),
                ShuffleMode::Butterfly => (lane ^ by, lane ^ by <= highest),
                ShuffleMode::Index => {
                    let source = lowest | (by & !segment);
                    (source, source <= highest)
                }
            };
            let source = if ok { source } else { lane };
            if members & mask & 1 << source == 0 {
                let what = format!("shfl from lane {source}, which does not execute it");
                return Err(Fault(ErrorKind::MemberMask { what, members, active: mask }, Some(lane)));
            }
            out[lane] = truncate(values[source], 32);
            inside |= u32::from(ok) << lane;
        }
        if let Some(into) = into.0 {
            warp.set(into, mask, &out);
        }
        if let Some(into) = into.1 {
            warp.set_pred(into, mask, inside);
        }
        Ok(Flow::Next)
    }

    pub(crate) fn redux(
        &mut self,
        warp: &mut Warp,
        (mode, ty): (ReduxMode, Type),
        into: Reg,
        (a, members): (Src, Src),
        mask: u32,
    ) -> Step {
        if self.members(warp, members, mask, "redux")?.is_none() {
            return Ok(Flow::Stalled);
        }
        let mut scratch = [0; WARP];
        let values = warp.get(&self.fixed, a, mask, &mut scratch)?;
        let signed = ty.is_signed();
        let combine = |x: u32, y: u32| match mode {
            ReduxMode::Add => x.wrapping_add(y),
            ReduxMode::And => x & y,
            ReduxMode::Or => x | y,
            ReduxMode::Xor => x ^ y,
            ReduxMode::Min if signed => (x as i32).min(y as i32) as u32,
            ReduxMode::Max if signed => (x as i32).max(y as i32) as u32,
            ReduxMode::Min => x.min(y),
            ReduxMode::Max => x.max(y),
        };
        let total = each(mask).map(|lane| values[lane] as u32).reduce(combine).unwrap_or(0);
        warp.set(into, mask, &[u64::from(total); WARP]);
        Ok(Flow::Next)
    }

    /// The lowest lane is the one elected.
    pub(crate) fn elect(
        &mut self,
        warp: &mut Warp,
        into: (Option<Reg>, Option<Pred>),
        members: Src,
        mask: u32,
    ) -> Step {
        if self.members(warp, members, mask, "elect")?.is_none() {
            return Ok(Flow::Stalled);
        }
        let leader = mask.trailing_zeros();
        if let Some(into) = into.0 {
            warp.set(into, mask, &[u64::from(leader); WARP]);
        }
        if let Some(into) = into.1 {
            warp.set_pred(into, mask, 1 << leader);
        }
        Ok(Flow::Next)
    }
}
