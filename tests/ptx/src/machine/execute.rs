//! One instruction of a warp.

use super::warp::Warp;
use super::{Block, Fault, Flow, Step};
use crate::arith::bits::{bfi, lop3, prmt};
use crate::arith::compare::compare;
use crate::code::{FloatTest, Logic, Op, Src};
use crate::error::ErrorKind;
use crate::lanes::{Lanes, WARP, each};
use crate::types::{Type, sign_extend, truncate};

fn combine(op: Logic, a: u32, b: u32) -> u32 {
    match op {
        Logic::And => a & b,
        Logic::Or => a | b,
        Logic::Xor => a ^ b,
    }
}

impl Block<'_> {
    /// Executes `op` for the lanes of `mask`, of which there is at least one.
    pub(crate) fn execute(&mut self, warp: &mut Warp, op: &Op, mask: u32, line: u32) -> Step {
        let fixed = &self.fixed;
        let (mut sa, mut sb, mut sc): (Lanes, Lanes, Lanes);
        let mut out: Lanes;
        match op {
            Op::Nop => {}
            Op::Unary { of, into, a } => {
                (sa, out) = ([0; WARP], [0; WARP]);
                of(warp.get(fixed, *a, mask, &mut sa)?, &mut out);
                warp.set(*into, mask, &out);
            }
            Op::Binary { of, into, a, b } => {
                (sa, sb, out) = ([0; WARP], [0; WARP], [0; WARP]);
                of(warp.get(fixed, *a, mask, &mut sa)?, warp.get(fixed, *b, mask, &mut sb)?, &mut out);
                warp.set(*into, mask, &out);
            }
            Op::Ternary { of, into, a, b, c } => {
                (sa, sb, sc, out) = ([0; WARP], [0; WARP], [0; WARP], [0; WARP]);
                let a = warp.get(fixed, *a, mask, &mut sa)?;
                let b = warp.get(fixed, *b, mask, &mut sb)?;
                let c = warp.get(fixed, *c, mask, &mut sc)?;
                of(a, b, c, &mut out);
                warp.set(*into, mask, &out);
            }
            Op::Lop3 { table, into, a, b, c } => {
                (sa, sb, sc, out) = ([0; WARP], [0; WARP], [0; WARP], [0; WARP]);
                let a = warp.get(fixed, *a, mask, &mut sa)?;
                let b = warp.get(fixed, *b, mask, &mut sb)?;
                let c = warp.get(fixed, *c, mask, &mut sc)?;
                lop3(*table, a, b, c, &mut out);
                warp.set(*into, mask, &out);
            }
            Op::Prmt { mode, into, a, b, selector } => {
                let [a, b, s] = self.three(warp, [*a, *b, *selector], mask)?;
                self.per_lane(warp, *into, mask, |l| prmt(*mode, a[l], b[l], s[l]));
            }
            Op::Bfi { bits, into, a, b, position, length } => {
                let [a, b, p] = self.three(warp, [*a, *b, *position], mask)?;
                sa = [0; WARP];
                let n = *warp.get(&self.fixed, *length, mask, &mut sa)?;
                self.per_lane(warp, *into, mask, |l| bfi(*bits, a[l], b[l], p[l], n[l]));
            }
            Op::Carry { into, a, b, bits, subtract, carry_in, carry_out } => {
                let [a, b, _] = self.three(warp, [*a, *b, Src::Imm(0)], mask)?;
                self.carry(warp, *into, mask, (&a, &b), *bits, *subtract, *carry_in, *carry_out);
            }
            Op::MadCarry { into, product, a, b, c, bits, carry_in, carry_out } => {
                let [a, b, c] = self.three(warp, [*a, *b, *c], mask)?;
                out = [0; WARP];
                product(&a, &b, &mut out);
                self.carry(warp, *into, mask, (&out, &c), *bits, false, *carry_in, *carry_out);
            }
            Op::Compare { op, ty, flush, into, not_into, a, b, and } => {
                (sa, sb) = ([0; WARP], [0; WARP]);
                let a = warp.get(fixed, *a, mask, &mut sa)?;
                let b = warp.get(fixed, *b, mask, &mut sb)?;
                let mut holds = compare(*op, *ty, *flush, a, b);
                let mut fails = !holds;
                if let Some((op, with)) = and {
                    let with = warp.pred(fixed, *with, mask)?;
                    holds = combine(*op, holds, with);
                    fails = combine(*op, fails, with);
                }
                if let Some(into) = into {
                    warp.set_pred(*into, mask, holds);
                }
                if let Some(into) = not_into {
                    warp.set_pred(*into, mask, fails);
                }
            }
            Op::Set { op, ty, flush, into, a, b, and, one } => {
                (sa, sb) = ([0; WARP], [0; WARP]);
                let a = warp.get(fixed, *a, mask, &mut sa)?;
                let b = warp.get(fixed, *b, mask, &mut sb)?;
                let mut holds = compare(*op, *ty, *flush, a, b);
                if let Some((op, with)) = and {
                    holds = combine(*op, holds, warp.pred(fixed, *with, mask)?);
                }
                self.per_lane(warp, *into, mask, |l| if holds >> l & 1 == 1 { *one } else { 0 });
            }
            Op::Select { into, a, b, by, bits } => {
                let by = warp.pred(fixed, *by, mask)?;
                (sa, sb) = ([0; WARP], [0; WARP]);
                // A source is read only by the lanes that take it.
                let a = *warp.get(fixed, *a, mask & by, &mut sa)?;
                let b = *warp.get(fixed, *b, mask & !by, &mut sb)?;
                self.per_lane(warp, *into, mask, |l| {
                    truncate(if by >> l & 1 == 1 { a[l] } else { b[l] }, *bits)
                });
            }
            Op::SelectSign { into, a, b, c, c_is_float, bits } => {
                let [a, b, c] = self.three(warp, [*a, *b, *c], mask)?;
                let first =
                    |c: u64| if *c_is_float { f32::from_bits(c as u32) >= 0.0 } else { c as i32 >= 0 };
                self.per_lane(warp, *into, mask, |l| truncate(if first(c[l]) { a[l] } else { b[l] }, *bits));
            }
            Op::Convert { how, into, register_bits, a } => {
                sa = [0; WARP];
                let a = *warp.get(fixed, *a, mask, &mut sa)?;
                let (bits, wide) = (how.to.bits(), *register_bits);
                let extend = how.to.is_signed() && wide > bits;
                self.per_lane(warp, *into, mask, |l| {
                    let value = how.scalar(a[l]);
                    if extend { truncate(sign_extend(value, bits), wide) } else { value }
                });
            }
            Op::ConvertPair { how, into, a, b } => {
                let [a, b, _] = self.three(warp, [*a, *b, Src::Imm(0)], mask)?;
                self.per_lane(warp, *into, mask, |l| how.pack(a[l], b[l]));
            }
            Op::Repack { how, into, a } => {
                sa = [0; WARP];
                let a = *warp.get(fixed, *a, mask, &mut sa)?;
                self.per_lane(warp, *into, mask, |l| how.repack(a[l]));
            }
            Op::PackSaturate { to, into, a, b, c } => {
                let [a, b, c] = self.three(warp, [*a, *b, c.unwrap_or(Src::Imm(0))], mask)?;
                let bits = to.bits();
                self.per_lane(warp, *into, mask, |l| {
                    let (a, b) = (saturate(a[l], *to), saturate(b[l], *to));
                    let pair = a << bits | b;
                    if bits == 8 { truncate(c[l], 16) << 16 | pair } else { pair }
                });
            }
            Op::Join { into, parts, bits } => {
                out = [0; WARP];
                for (i, part) in parts.iter().enumerate() {
                    sa = [0; WARP];
                    let part = warp.get(fixed, *part, mask, &mut sa)?;
                    for (out, part) in out.iter_mut().zip(part) {
                        *out |= truncate(*part, *bits) << (i as u32 * bits);
                    }
                }
                warp.set(*into, mask, &out);
            }
            Op::Split { into, a, bits } => {
                sa = [0; WARP];
                let a = *warp.get(fixed, *a, mask, &mut sa)?;
                for (i, into) in into.iter().enumerate() {
                    if let Some(into) = into {
                        self.per_lane(warp, *into, mask, |l| truncate(a[l] >> (i as u32 * bits), *bits));
                    }
                }
            }
            Op::MovePred { into, from } => {
                let from = warp.pred(fixed, *from, mask)?;
                warp.set_pred(*into, mask, from);
            }
            Op::LogicPred { op, into, a, b } => {
                let (a, b) = (warp.pred(fixed, *a, mask)?, warp.pred(fixed, *b, mask)?);
                warp.set_pred(*into, mask, combine(*op, a, b));
            }
            Op::Test { what, ty, into, a } => {
                sa = [0; WARP];
                let a = warp.get(fixed, *a, mask, &mut sa)?;
                let holds = each(mask).filter(|l| test(*what, *ty, a[*l])).fold(0, |m, l| m | 1 << l);
                warp.set_pred(*into, mask, holds);
            }
            Op::AddressOf { space, to_generic, into, a } => {
                sa = [0; WARP];
                let a = *warp.get(fixed, *a, mask, &mut sa)?;
                let window = super::access::window(*space);
                self.per_lane(warp, *into, mask, |l| {
                    if *to_generic { a[l].wrapping_add(window) } else { a[l].wrapping_sub(window) }
                });
            }
            Op::IsSpace { space, into, a } => {
                sa = [0; WARP];
                let a = warp.get(fixed, *a, mask, &mut sa)?;
                let inside = |l: &usize| super::access::space_of(a[*l]) == *space;
                let holds = each(mask).filter(inside).fold(0, |m, l| m | 1 << l);
                warp.set_pred(*into, mask, holds);
            }
            Op::Load(load) => self.load(warp, load, mask)?,
            Op::Store(store) => self.store(warp, store, mask)?,
            Op::Atomic(atomic) => self.atomic(warp, atomic, mask)?,
            Op::Branch { target } => {
                warp.branch(mask, *target);
                return Ok(Flow::Jumped);
            }
            Op::BranchIndexed { index, targets } => {
                sa = [0; WARP];
                let index = *warp.get(fixed, *index, mask, &mut sa)?;
                let lane = mask.trailing_zeros() as usize;
                let at = index[lane];
                let Some(target) = targets.get(at as usize) else {
                    let why = format!("index {at} of an indexed branch with {} targets", targets.len());
                    return Err(Fault(ErrorKind::Launch(why), Some(lane)));
                };
                // Lanes of one target go; the others execute this again.
                let same = each(mask).filter(|l| index[*l] == at).fold(0u32, |m, l| m | 1 << l);
                let rest = warp.current.mask & !same;
                if rest == 0 {
                    warp.advance(*target);
                } else {
                    let here = warp.current.pc;
                    warp.part(same, *target, here);
                }
                return Ok(Flow::Jumped);
            }
            Op::Exit => {
                warp.exit(mask);
                return Ok(Flow::Jumped);
            }
            Op::Trap => return Err(Fault(ErrorKind::Trap, None)),
            Op::Barrier(barrier) => return self.arrive(warp, barrier, mask, line),
            Op::WarpSync { members } => return self.warp_sync(warp, *members, mask),
            Op::Vote { mode, into, into_pred, from, members } => {
                return self.vote(warp, *mode, (*into, *into_pred), *from, *members, mask);
            }
            Op::Match { all, bits, into, into_pred, a, members } => {
                return self.match_lanes(warp, *all, *bits, (*into, *into_pred), (*a, *members), mask);
            }
            Op::Shuffle { mode, into, into_pred, a, b, c, members } => {
                return self.shuffle(warp, *mode, (*into, *into_pred), [*a, *b, *c, *members], mask);
            }
            Op::Redux { mode, ty, into, a, members } => {
                return self.redux(warp, (*mode, *ty), *into, (*a, *members), mask);
            }
            Op::ActiveMask { into } => warp.set(*into, mask, &[u64::from(mask); WARP]),
            Op::Elect { into, into_pred, members } => {
                return self.elect(warp, (*into, *into_pred), *members, mask);
            }
            Op::Fence { device } => {
                if *device {
                    self.view.fence();
                }
            }
            Op::Tensor(op) => return self.tensor(warp, op, mask, line),
            Op::Async(op) => return self.asynchronous(warp, op, mask, line),
            Op::Mbarrier(op) => return self.mbarrier_op(warp, op, mask),
            Op::ProxyFence => self.shared.proxy_fence(warp.index),
        }
        Ok(Flow::Next)
    }

    /// Copies of three sources.
    pub(crate) fn three(&self, warp: &Warp, [a, b, c]: [Src; 3], mask: u32) -> Result<[Lanes; 3], ErrorKind> {
        let (mut sa, mut sb, mut sc) = ([0; WARP], [0; WARP], [0; WARP]);
        Ok([
            *warp.get(&self.fixed, a, mask, &mut sa)?,
            *warp.get(&self.fixed, b, mask, &mut sb)?,
            *warp.get(&self.fixed, c, mask, &mut sc)?,
        ])
    }

    fn per_lane(&self, warp: &mut Warp, into: u32, mask: u32, of: impl Fn(usize) -> u64) {
        let mut out = [0; WARP];
        for lane in each(mask) {
            out[lane] = of(lane);
        }
        warp.set(into, mask, &out);
    }

    #[expect(clippy::too_many_arguments, reason = "the forms of one instruction")]
    fn carry(
        &self,
        warp: &mut Warp,
        into: u32,
        mask: u32,
        (a, b): (&Lanes, &Lanes),
        bits: u32,
        subtract: bool,
        carry_in: bool,
        carry_out: bool,
    ) {
        let mut out = [0; WARP];
        let mut carry = warp.carry;
        for lane in each(mask) {
            let (a, b) = (u128::from(truncate(a[lane], bits)), u128::from(truncate(b[lane], bits)));
            let c = u128::from(carry_in && carry >> lane & 1 == 1);
            let sum = if subtract { a.wrapping_sub(b).wrapping_sub(c) } else { a + b + c };
            out[lane] = truncate(sum as u64, bits);
            // A borrow leaves the bits above set.
            let over = (sum >> bits) & 1 == 1;
            carry = (carry & !(1 << lane)) | u32::from(over) << lane;
        }
        if carry_out {
            warp.carry = carry;
        }
        warp.set(into, mask, &out);
    }
}

fn saturate(value: u64, to: Type) -> u64 {
    let value = i64::from(value as i32);
    let bits = to.bits();
    let clamped = if to.is_signed() {
        value.clamp(-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    } else {
        value.clamp(0, (1 << bits) - 1)
    };
    truncate(clamped as u64, bits)
}

fn test(what: FloatTest, ty: Type, bits: u64) -> bool {
    let (x, subnormal) = if ty == Type::F64 {
        (f64::from_bits(bits), f64::from_bits(bits).is_subnormal())
    } else {
        (f64::from(f32::from_bits(bits as u32)), f32::from_bits(bits as u32).is_subnormal())
    };
    match what {
        FloatTest::Finite => x.is_finite(),
        FloatTest::Infinite => x.is_infinite(),
        FloatTest::Number => !x.is_nan(),
        FloatTest::NotANumber => x.is_nan(),
        FloatTest::Normal => x.is_finite() && x != 0.0 && !subnormal,
        FloatTest::Subnormal => subnormal,
    }
}
