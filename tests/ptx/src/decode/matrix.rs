//! Matrix instructions.

use super::modifiers::Modifiers;
use super::{Decoded, Decoder};
use crate::code::{Op, PredSrc, Reg, Src};
use crate::machine::tensor::{Mma, TensorOp};
use crate::machine::wgmma::{Left, Wgmma};
use crate::syntax::Operand;
use crate::types::Type;

/// `m16n8k32`.
fn shape(name: &str) -> Option<(usize, usize, usize)> {
    let (m, rest) = name.strip_prefix('m')?.split_once('n')?;
    let (n, k) = rest.split_once('k')?;
    Some((m.parse().ok()?, n.parse().ok()?, k.parse().ok()?))
}

fn op(tensor: TensorOp) -> Op {
    Op::Tensor(Box::new(tensor))
}

/// The value of an immediate flag: 0 or 1, or for signs -1 or 1.
fn flag(operand: &Operand, m: &Modifiers<'_>) -> Decoded<i64> {
    match operand {
        Operand::Int(value) => Ok(*value as i64),
        _ => Err(m.unsupported("with a flag that is no constant")),
    }
}

impl Decoder<'_> {
    pub(super) fn matrix_op(&mut self, root: &str, m: &mut Modifiers<'_>, o: &[Operand]) -> Decoded<Op> {
        if root == "wgmma" {
            return self.wgmma(m, o);
        }
        if !m.take("sync") || !m.take("aligned") {
            return Err(m.unsupported("without .sync.aligned"));
        }
        match root {
            "mma" => self.mma(m, o),
            "movmatrix" => {
                if !m.take("m8n8") || !m.take("trans") || m.ty()? != Type::B16 {
                    return Err(m.unsupported(""));
                }
                let [into, from] = self.exactly(o)?;
                Ok(op(TensorOp::Transpose { into: self.reg(into)?, from: self.src(from, Type::B32)? }))
            }
            _ => {
                let count = m.one_of(&[("x1", 1), ("x2", 2), ("x4", 4)]);
                let transposed = m.take("trans");
                let in_shared = m.take("shared") | m.take("shared::cta");
                if !m.take("m8n8") || m.ty()? != Type::B16 || !in_shared {
                    return Err(m.unsupported(""));
                }
                let [first, second] = self.exactly(o)?;
                if root == "ldmatrix" {
                    let into = self.all_regs(first, m)?;
                    if Some(into.len()) != count {
                        return Err(m.unsupported("with a vector of another length"));
                    }
                    let from = self.address(second)?;
                    return Ok(op(TensorOp::Load { into, from, transposed }));
                }
                let from = self.srcs(second, Type::B32)?;
                if Some(from.len()) != count {
                    return Err(m.unsupported("with a vector of another length"));
                }
                let into = self.address(first)?;
                Ok(op(TensorOp::Store { from, into, transposed }))
            }
        }
    }

    fn all_regs(&self, operand: &Operand, m: &Modifiers<'_>) -> Decoded<Vec<Reg>> {
        let regs = self.regs(operand)?.into_iter().collect::<Option<Vec<_>>>();
        regs.ok_or_else(|| m.unsupported("with a result thrown away"))
    }

    fn mma(&mut self, m: &mut Modifiers<'_>, o: &[Operand]) -> Decoded<Op> {
        let Some((rows, columns, depth)) = m.parse(shape) else { return Err(m.unsupported("")) };
        if !m.take("row") || !m.take("col") {
            return Err(m.unsupported(""));
        }
        let saturate = m.take("satfinite");
        let types = [m.ty()?, m.ty()?, m.ty()?, m.ty()?];
        let [sum_type, a_type, b_type, c_type] = types;
        let sixteen = matches!(a_type, Type::F16 | Type::Bf16);
        let known = match sum_type {
            Type::F32 => a_type.is_float() && (a_type == b_type || a_type.bits() == 8),
            Type::F16 => a_type == Type::F16 || a_type.bits() == 8,
            Type::S32 => !a_type.is_float() && a_type.bits() <= 8,
            _ => false,
        };
        let deep = match a_type.bits() {
            32 => a_type == Type::Tf32 && matches!(depth, 4 | 8),
            16 => sixteen && matches!(depth, 8 | 16),
            8 => matches!(depth, 16 | 32),
            4 => matches!(depth, 32 | 64),
            _ => false,
        };
        let fits = a_type.bits() == b_type.bits() && a_type.is_float() == b_type.is_float();
        if (rows, columns) != (16, 8) || !known || !deep || !fits || c_type != sum_type {
            return Err(m.unsupported(""));
        }
        let [d, a, b, c] = self.exactly(o)?;
        let (d, a, b) = (self.all_regs(d, m)?, self.srcs(a, Type::B32)?, self.srcs(b, Type::B32)?);
        let c = self.srcs(c, if sum_type == Type::F32 { Type::F32 } else { Type::B32 })?;
        // A register holds 32 bits of one row, of a quarter of eight rows or columns.
        let per_register = 4 * 32 / a_type.bits() as usize;
        let sums = if sum_type == Type::F16 { 2 } else { 4 };
        let lengths = (d.len(), a.len(), b.len(), c.len());
        if lengths != (sums, depth / per_register * 2, depth / per_register, sums) {
            return Err(m.unsupported("with vectors of other lengths"));
        }
        Ok(op(TensorOp::Mma(Mma { depth, d, a, b, c, a_type, b_type, sum_type, saturate })))
    }

    fn wgmma(&mut self, m: &mut Modifiers<'_>, o: &[Operand]) -> Decoded<Op> {
        let (fence, commit, wait) = (m.take("fence"), m.take("commit_group"), m.take("wait_group"));
        let product = m.take("mma_async");
        if !m.take("sync") || !m.take("aligned") {
            return Err(m.unsupported("without .sync.aligned"));
        }
        match (fence, commit, wait, product) {
            (true, ..) => Ok(op(TensorOp::WgmmaFence)),
            (_, true, ..) => Ok(op(TensorOp::WgmmaCommit)),
            (_, _, true, _) => {
                let [groups] = self.exactly(o)?;
                Ok(op(TensorOp::WgmmaWait { groups: flag(groups, m)? as u64 }))
            }
            (_, _, _, true) => self.wgmma_product(m, o),
            _ => Err(m.unsupported("")),
        }
    }

    fn wgmma_product(&mut self, m: &mut Modifiers<'_>, o: &[Operand]) -> Decoded<Op> {
        let Some((rows, columns, depth)) = m.parse(shape) else { return Err(m.unsupported("")) };
        let saturate = m.take("satfinite");
        let (sum_type, a_type, b_type) = (m.ty()?, m.ty()?, m.ty()?);
        let bits = a_type.bits();
        let known = match sum_type {
            Type::F32 => {
                matches!(a_type, Type::F16 | Type::Bf16 | Type::Tf32) && a_type == b_type
                    || fp8(a_type) && fp8(b_type)
            }
            Type::F16 => a_type == Type::F16 && b_type == Type::F16 || fp8(a_type) && fp8(b_type),
            Type::S32 => bits == 8 && b_type.bits() == 8 && !a_type.is_float() && !b_type.is_float(),
            _ => false,
        };
        let shaped = rows == 64
            && columns.is_multiple_of(8)
            && (8..=256).contains(&columns)
            && depth as u32 * bits == 256;
        if !known || !shaped {
            return Err(m.unsupported(""));
        }
        let [d, a, b, scale, flags @ ..] = o else { return Err(m.unsupported("with these operands")) };
        let d = self.all_regs(d, m)?;
        if d.len() != columns / if sum_type == Type::F16 { 4 } else { 2 } {
            return Err(m.unsupported("with sums of another number"));
        }
        let a = match a {
            Operand::Vector(_) => Left::Registers(self.srcs(a, Type::B32)?),
            a => Left::Shared(self.src(a, Type::B64)?),
        };
        if matches!(&a, Left::Registers(registers) if registers.len() != 4) {
            return Err(m.unsupported("with A of another length"));
        }
        let (accumulate, accumulate_value) = match scale {
            Operand::Int(value) => (PredSrc::Const(*value != 0), None),
            scale if self.is_pred(scale) || matches!(scale, Operand::Not(_)) => (self.pred_src(scale)?, None),
            scale => (PredSrc::Const(true), Some(self.src(scale, Type::B32)?)),
        };
        let flags = flags.iter().map(|f| flag(f, m)).collect::<Decoded<Vec<i64>>>()?;
        // Signs of A and B; then, of 16-bit elements, which of the operands in shared memory are transposed.
        let in_shared = matches!(a, Left::Shared(_));
        let expected = match (bits, sum_type) {
            (_, Type::S32) => 0,
            (16, _) if in_shared => 4,
            (16, _) => 3,
            _ => 2,
        };
        if flags.len() != expected {
            return Err(m.unsupported("with these operands"));
        }
        let (negate_a, negate_b) = (flags.first() == Some(&-1), flags.get(1) == Some(&-1));
        let (transpose_a, transpose_b) = match expected {
            4 => (flags[2] == 1, flags[3] == 1),
            3 => (false, flags[2] == 1),
            _ => (false, false),
        };
        let b: Src = self.src(b, Type::B64)?;
        Ok(op(TensorOp::Wgmma(Wgmma {
            columns,
            d,
            a,
            b,
            accumulate,
            accumulate_value,
            a_type,
            b_type,
            sum_type,
            negate_a,
            negate_b,
            transpose_a,
            transpose_b,
            saturate,
        })))
    }
}

fn fp8(ty: Type) -> bool {
    matches!(ty, Type::E4m3 | Type::E5m2)
}
