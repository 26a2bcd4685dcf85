//! Instructions in which the lanes of a warp take part together.

use super::modifiers::Modifiers;
use super::{Decoded, Decoder};
use crate::code::{Op, Pred, ReduxMode, Reg, ShuffleMode, VoteMode};
use crate::syntax::Operand;
use crate::types::Type;

impl Decoder<'_> {
    pub(super) fn collective_op(&mut self, root: &str, m: &mut Modifiers<'_>, o: &[Operand]) -> Decoded<Op> {
        if root == "activemask" {
            m.ty()?;
            let [into] = self.exactly(o)?;
            return Ok(Op::ActiveMask { into: self.reg(into)? });
        }
        if !m.take("sync") {
            return Err(m.unsupported("without .sync"));
        }
        match root {
            "vote" => {
                let mode = m.one_of(&[
                    ("all", VoteMode::All),
                    ("any", VoteMode::Any),
                    ("uni", VoteMode::Uniform),
                    ("ballot", VoteMode::Ballot),
                ]);
                let Some(mode) = mode else { return Err(m.unsupported("")) };
                m.ty()?;
                let [into, from, members] = self.exactly(o)?;
                let ballot = mode == VoteMode::Ballot;
                Ok(Op::Vote {
                    mode,
                    into: if ballot { self.reg_or_sink(into)? } else { None },
                    into_pred: if ballot { None } else { self.pred_or_sink(into)? },
                    from: self.pred_src(from)?,
                    members: self.src(members, Type::B32)?,
                })
            }
            "match" => {
                let all = m.take("all");
                if !all && !m.take("any") {
                    return Err(m.unsupported(""));
                }
                let ty = m.ty()?;
                let [into, a, members] = self.exactly(o)?;
                let (into, into_pred) = self.with_pred(into)?;
                let (a, members) = (self.src(a, ty)?, self.src(members, Type::B32)?);
                Ok(Op::Match { all, bits: ty.bits(), into, into_pred, a, members })
            }
            "shfl" => {
                let mode = m.one_of(&[
                    ("up", ShuffleMode::Up),
                    ("down", ShuffleMode::Down),
                    ("bfly", ShuffleMode::Butterfly),
                    ("idx", ShuffleMode::Index),
                ]);
                let Some(mode) = mode else { return Err(m.unsupported("")) };
                m.ty()?;
                let [into, a, b, c, members] = self.exactly(o)?;
                let (into, into_pred) = self.with_pred(into)?;
                let src = |o| self.src(o, Type::B32);
                Ok(Op::Shuffle {
                    mode,
                    into,
                    into_pred,
                    a: src(a)?,
                    b: src(b)?,
                    c: src(c)?,
                    members: src(members)?,
                })
            }
            "redux" => {
                let mode = m.one_of(&[
                    ("add", ReduxMode::Add),
                    ("min", ReduxMode::Min),
                    ("max", ReduxMode::Max),
                    ("and", ReduxMode::And),
                    ("or", ReduxMode::Or),
                    ("xor", ReduxMode::Xor),
                ]);
                let Some(mode) = mode else { return Err(m.unsupported("")) };
                let ty = m.ty()?;
                if ty.is_float() {
                    return Err(m.unsupported("of floats"));
                }
                let [into, a, members] = self.exactly(o)?;
                let (a, members) = (self.src(a, ty)?, self.src(members, Type::B32)?);
                Ok(Op::Redux { mode, ty, into: self.reg(into)?, a, members })
            }
            _ => {
                let [into, members] = self.exactly(o)?;
                let (into, into_pred) = self.with_pred(into)?;
                Ok(Op::Elect { into, into_pred, members: self.src(members, Type::B32)? })
            }
        }
    }

    /// `d` or `d|p`.
    fn with_pred(&self, operand: &Operand) -> Decoded<(Option<Reg>, Option<Pred>)> {
        match operand {
            Operand::Pair(d, p) => Ok((self.reg_or_sink(d)?, self.pred_or_sink(p)?)),
            d => Ok((self.reg_or_sink(d)?, None)),
        }
    }
}
