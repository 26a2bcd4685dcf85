//! Asynchronous copies and the barriers that count them.

use super::modifiers::Modifiers;
use super::{Decoded, Decoder};
use crate::code::{Address, Op, Src};
use crate::machine::async_copy::AsyncOp;
use crate::machine::mbarrier::MbarrierOp;
use crate::syntax::Operand;
use crate::types::Type;

fn op(copy: AsyncOp) -> Op {
    Op::Async(Box::new(copy))
}

/// `2d`.
fn dimensions(name: &str) -> Option<usize> {
    name.strip_suffix('d')?.parse().ok().filter(|n| (1..=5).contains(n))
}

fn constant(operand: &Operand, m: &Modifiers<'_>) -> Decoded<u64> {
    match operand {
        Operand::Int(value) => Ok(*value),
        _ => Err(m.unsupported("with a number that is no constant")),
    }
}

impl Decoder<'_> {
    pub(super) fn copy_op(&mut self, m: &mut Modifiers<'_>, o: &[Operand]) -> Decoded<Op> {
        if !m.take("async") {
            return Err(m.unsupported(""));
        }
        if m.take("bulk") {
            return self.bulk(m, o);
        }
        if m.take("commit_group") {
            return Ok(op(AsyncOp::Commit));
        }
        if m.take("wait_group") {
            let [groups] = self.exactly(o)?;
            return Ok(op(AsyncOp::Wait { groups: constant(groups, m)? }));
        }
        if m.take("wait_all") {
            return Ok(op(AsyncOp::WaitAll));
        }
        if m.take("mbarrier") {
            if !m.take("arrive") {
                return Err(m.unsupported(""));
            }
            let counted = !m.take("noinc");
            let _ = m.take("shared") | m.take("shared::cta");
            m.ty()?;
            let [mbarrier] = self.exactly(o)?;
            return Ok(op(AsyncOp::Arrive { mbarrier: self.address(mbarrier)?, counted }));
        }
        let bypass = m.take("cg");
        if !bypass && !m.take("ca") {
            return Err(m.unsupported(""));
        }
        let _ = m.take("shared") | m.take("shared::cta");
        m.take("global");
        let policy = m.take("L2::cache_hint");
        m.take_prefix("L2::");
        let [into, from, bytes, rest @ ..] = o else { return Err(m.unsupported("without a size")) };
        let bytes = constant(bytes, m)? as usize;
        if !matches!((bypass, bytes), (true, 16) | (false, 4 | 8 | 16)) {
            return Err(m.unsupported(&format!("of {bytes} bytes")));
        }
        let mut rest = rest;
        if policy {
            let [others @ .., _] = rest else { return Err(m.unsupported("without a policy")) };
            rest = others;
        }
        let (mut source_bytes, mut ignore) = (None, None);
        match rest {
            [] => {}
            [pred] if self.is_pred(pred) => ignore = Some(self.pred_src(pred)?),
            [size] => source_bytes = Some(self.src(size, Type::U32)?),
            _ => return Err(m.unsupported("with these operands")),
        }
        let (into, from) = (self.address(into)?, self.address(from)?);
        Ok(op(AsyncOp::Copy { bytes, into, from, source_bytes, ignore }))
    }

    fn bulk(&mut self, m: &mut Modifiers<'_>, o: &[Operand]) -> Decoded<Op> {
        if m.take("commit_group") {
            return Ok(op(AsyncOp::BulkCommit));
        }
        if m.take("wait_group") {
            m.take("read");
            let [groups] = self.exactly(o)?;
            return Ok(op(AsyncOp::BulkWait { groups: constant(groups, m)? }));
        }
        if m.take("prefetch") {
            m.take_prefix("L2");
            m.take("global");
            if m.take("tensor") {
                m.parse(dimensions);
                m.take("tile");
                return Ok(Op::Nop);
            }
            if m.take("L2::cache_hint") {
                return Err(m.unsupported("with a policy"));
            }
            let [from, bytes] = self.exactly(o)?;
            return Ok(op(AsyncOp::Prefetch {
                from: self.address(from)?,
                bytes: self.src(bytes, Type::U32)?,
            }));
        }
        if m.take("tensor") {
            return self.tile(m, o);
        }
        let policy = usize::from(m.take("L2::cache_hint"));
        if m.take("bulk_group") {
            let outward = m.take("global") && (m.take("shared::cta") | m.take("shared"));
            let [into, from, bytes, rest @ ..] = o else { return Err(m.unsupported("without operands")) };
            if !outward || rest.len() != policy {
                return Err(m.unsupported("with these operands"));
            }
            let (into, from) = (self.address(into)?, self.address(from)?);
            return Ok(op(AsyncOp::BulkOut { into, from, bytes: self.src(bytes, Type::U32)? }));
        }
        let inward = (m.take("shared::cluster") | m.take("shared::cta")) && m.take("global");
        if !inward || !m.take("mbarrier::complete_tx::bytes") {
            return Err(m.unsupported(""));
        }
        let [into, from, bytes, mbarrier, rest @ ..] = o else {
            return Err(m.unsupported("without an mbarrier"));
        };
        if rest.len() != policy {
            return Err(m.unsupported("with these operands"));
        }
        let (into, from, mbarrier) = (self.address(into)?, self.address(from)?, self.address(mbarrier)?);
        Ok(op(AsyncOp::BulkIn { into, from, bytes: self.src(bytes, Type::U32)?, mbarrier }))
    }

    fn tile(&mut self, m: &mut Modifiers<'_>, o: &[Operand]) -> Decoded<Op> {
        let rank = m.parse(dimensions);
        m.take("tile");
        let policy = usize::from(m.take("L2::cache_hint"));
        let outward = m.take("bulk_group");
        let counted = m.take("mbarrier::complete_tx::bytes");
        let spaces = m.take("global") && (m.take("shared::cluster") | m.take("shared::cta"));
        let (shared, tensor, rest) = match o {
            [tensor, shared, rest @ ..] if outward => (shared, tensor, rest),
            [shared, tensor, rest @ ..] => (shared, tensor, rest),
            _ => return Err(m.unsupported("without operands")),
        };
        let mbarrier = match rest {
            [mbarrier, rest @ ..] if counted && rest.len() == policy => Some(self.address(mbarrier)?),
            rest if outward && rest.len() == policy => None,
            _ => return Err(m.unsupported("with these operands")),
        };
        let Operand::Address { base, offset, coordinates: Some(coordinates) } = tensor else {
            return Err(m.unsupported("without coordinates"));
        };
        if !spaces || rank != Some(coordinates.len()) {
            return Err(m.unsupported(""));
        }
        let at = coordinates.iter().map(|c| self.src(c, Type::S32)).collect::<Decoded<Vec<Src>>>()?;
        let map = Address { base: self.src(base, Type::U64)?, offset: *offset };
        Ok(op(AsyncOp::Tile { shared: self.address(shared)?, map, at, mbarrier }))
    }

    pub(super) fn mbarrier_op(&mut self, m: &mut Modifiers<'_>, o: &[Operand]) -> Decoded<Op> {
        let what = m.one_of(&[
            ("init", 0),
            ("inval", 1),
            ("arrive", 2),
            ("arrive_drop", 3),
            ("test_wait", 4),
            ("try_wait", 4),
            ("expect_tx", 5),
        ]);
        let Some(what) = what else { return Err(m.unsupported("")) };
        let expects = m.take("expect_tx");
        let (parity, no_complete) = (m.take("parity"), m.take("noComplete"));
        for order in
            ["acquire", "release", "relaxed", "cta", "cluster", "shared", "shared::cta", "shared::cluster"]
        {
            m.take(order);
        }
        m.take("b64");
        let one = Src::Imm(1);
        let operation = match (what, o) {
            (0, [at, count]) => {
                MbarrierOp::Init { at: self.address(at)?, count: self.src(count, Type::U32)? }
            }
            (1, [at]) => MbarrierOp::Invalidate { at: self.address(at)? },
            (2 | 3, o) if !no_complete => {
                // The state is left out of arrivals at another block's mbarrier.
                let (state, rest) = match o {
                    [Operand::Address { .. }, ..] => (None, o),
                    [state, rest @ ..] => (self.reg_or_sink(state)?, rest),
                    [] => return Err(m.unsupported("without operands")),
                };
                let (at, number) = match rest {
                    [at] => (at, None),
                    [at, number] => (at, Some(self.src(number, Type::U32)?)),
                    _ => return Err(m.unsupported("with these operands")),
                };
                let at = self.address(at)?;
                let (count, expect) = if expects { (one, number) } else { (number.unwrap_or(one), None) };
                if expects && expect.is_none() {
                    return Err(m.unsupported("without a number of bytes"));
                }
                MbarrierOp::Arrive { at, count, expect, drop: what == 3, state }
            }
            (4, [into, at, phase, ..]) => {
                let ty = if parity { Type::U32 } else { Type::B64 };
                MbarrierOp::Test {
                    at: self.address(at)?,
                    phase: self.src(phase, ty)?,
                    parity,
                    into: self.pred(into)?,
                }
            }
            (5, [at, bytes]) => {
                MbarrierOp::Expect { at: self.address(at)?, bytes: self.src(bytes, Type::U32)? }
            }
            _ => return Err(m.unsupported("with these operands")),
        };
        Ok(Op::Mbarrier(Box::new(operation)))
    }
}
