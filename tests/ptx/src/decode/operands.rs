//! Operands: registers, constants, addresses.

use super::{Binding, Decoded, Decoder};
use crate::code::{Address, Pred, PredSrc, Reg, Special, Src};
use crate::error::ErrorKind;
use crate::syntax::Operand;
use crate::types::{Type, truncate};

fn special(name: &str) -> Option<Special> {
    let axis = |rest: &str| ["x", "y", "z"].iter().position(|a| *a == rest);
    if let Some((root, rest)) = name.split_once('.') {
        let axis = axis(rest)?;
        return Some(match root {
            "%tid" => Special::Tid(axis),
            "%ntid" => Special::Ntid(axis),
            "%ctaid" | "%clusterid" => Special::Ctaid(axis),
            "%nctaid" | "%nclusterid" => Special::Nctaid(axis),
            "%cluster_ctaid" => Special::Zero,
            "%cluster_nctaid" => Special::One,
            _ => return None,
        });
    }
    Some(match name {
        "%laneid" => Special::LaneId,
        "%warpid" => Special::WarpId,
        "%nwarpid" => Special::NWarpId,
        "%lanemask_eq" => Special::LaneMaskEq,
        "%lanemask_lt" => Special::LaneMaskLt,
        "%lanemask_le" => Special::LaneMaskLe,
        "%lanemask_gt" => Special::LaneMaskGt,
        "%lanemask_ge" => Special::LaneMaskGe,
        "%smid" => Special::SmId,
        "%nsmid" => Special::NSmId,
        "%gridid" => Special::GridId,
        "%clock" | "%clock64" | "%clock_hi" | "%globaltimer" | "%globaltimer_lo" => Special::Clock,
        "%dynamic_smem_size" => Special::DynamicSharedSize,
        "%total_smem_size" => Special::TotalSharedSize,
        "%cluster_ctarank" | "%is_explicit_cluster" => Special::Zero,
        "%cluster_nctarank" => Special::One,
        _ => return None,
    })
}

impl Decoder<'_> {
    fn shape<T>(&self, expected: &str, found: &Operand) -> Decoded<T> {
        let found = match found {
            Operand::Name(name) => name.clone(),
            other => format!("{other:?}"),
        };
        Err(ErrorKind::Syntax { expected: expected.to_owned(), found })
    }

    /// Exactly `N` operands.
    pub(super) fn exactly<'o, const N: usize>(&self, operands: &'o [Operand]) -> Decoded<&'o [Operand; N]> {
        operands.try_into().map_err(|_| ErrorKind::Syntax {
            expected: format!("{N} operands"),
            found: operands.len().to_string(),
        })
    }

    pub(super) fn src(&self, operand: &Operand, ty: Type) -> Decoded<Src> {
        let bits = ty.bits();
        Ok(match operand {
            Operand::Int(value) => Src::Imm(match ty {
                // Whole numbers where floats are meant are numbers, but for the formats written as bits.
                Type::F32 => u64::from((*value as i64 as f32).to_bits()),
                Type::F64 => (*value as i64 as f64).to_bits(),
                _ => truncate(*value, bits),
            }),
            Operand::F32(value) => Src::Imm(match ty {
                Type::F64 => f64::from(f32::from_bits(*value)).to_bits(),
                _ => u64::from(*value),
            }),
            Operand::F64(value) => Src::Imm(match ty {
                Type::F32 => u64::from((f64::from_bits(*value) as f32).to_bits()),
                _ => *value,
            }),
            Operand::Name(name) => match self.lookup(name) {
                Some(Binding::Reg(reg)) => Src::Reg(reg),
                Some(Binding::Shared(address)) => Src::Imm(address),
                Some(Binding::Local(offset) | Binding::CallParam(offset) | Binding::Param(offset)) => {
                    Src::Imm(offset)
                }
                Some(Binding::DynamicShared) => Src::DynamicShared(0),
                Some(Binding::Variable(index)) => Src::Variable(index, 0),
                Some(Binding::Pred(_)) => return self.shape("a register or a constant", operand),
                Some(Binding::Label(_)) => return self.shape("a value", operand),
                None if name == "WARP_SZ" => Src::Imm(32),
                None => match special(name) {
                    Some(special) => Src::Special(special),
                    None => return Err(ErrorKind::Undeclared(name.clone())),
                },
            },
            other => return self.shape("a register or a constant", other),
        })
    }

    pub(super) fn reg(&self, operand: &Operand) -> Decoded<Reg> {
        match operand {
            Operand::Name(name) => match self.lookup(name) {
                Some(Binding::Reg(reg)) => Ok(reg),
                None => Err(ErrorKind::Undeclared(name.clone())),
                _ => self.shape("a register", operand),
            },
            _ => self.shape("a register", operand),
        }
    }

    pub(super) fn reg_bits(&self, reg: Reg) -> u32 {
        self.register_bits[reg as usize]
    }

    /// A register, or `_`.
    pub(super) fn reg_or_sink(&self, operand: &Operand) -> Decoded<Option<Reg>> {
        if *operand == Operand::Sink { Ok(None) } else { self.reg(operand).map(Some) }
    }

    pub(super) fn pred(&self, operand: &Operand) -> Decoded<Pred> {
        match operand {
            Operand::Name(name) => match self.lookup(name) {
                Some(Binding::Pred(pred)) => Ok(pred),
                None => Err(ErrorKind::Undeclared(name.clone())),
                _ => self.shape("a predicate", operand),
            },
            _ => self.shape("a predicate", operand),
        }
    }

    pub(super) fn pred_or_sink(&self, operand: &Operand) -> Decoded<Option<Pred>> {
        if *operand == Operand::Sink { Ok(None) } else { self.pred(operand).map(Some) }
    }

    /// A predicate, its negation, or a constant.
    pub(super) fn pred_src(&self, operand: &Operand) -> Decoded<PredSrc> {
        Ok(match operand {
            Operand::Not(inner) => match self.pred_src(inner)? {
                PredSrc::Pred { index, negated } => PredSrc::Pred { index, negated: !negated },
                PredSrc::Const(value) => PredSrc::Const(!value),
            },
            Operand::Int(value) => PredSrc::Const(*value != 0),
            _ => PredSrc::Pred { index: self.pred(operand)?, negated: false },
        })
    }

    pub(super) fn is_pred(&self, operand: &Operand) -> bool {
        matches!(operand, Operand::Name(name) if matches!(self.lookup(name), Some(Binding::Pred(_))))
    }

    /// The operands of a vector, or the one operand there is.
    pub(super) fn components<'o>(&self, operand: &'o Operand) -> &'o [Operand] {
        match operand {
            Operand::Vector(parts) => parts,
            one => std::slice::from_ref(one),
        }
    }

    pub(super) fn srcs(&self, operand: &Operand, ty: Type) -> Decoded<Vec<Src>> {
        self.components(operand).iter().map(|o| self.src(o, ty)).collect()
    }

    pub(super) fn regs(&self, operand: &Operand) -> Decoded<Vec<Option<Reg>>> {
        self.components(operand).iter().map(|o| self.reg_or_sink(o)).collect()
    }

    pub(super) fn address(&self, operand: &Operand) -> Decoded<Address> {
        let Operand::Address { base, offset, coordinates: None } = operand else {
            return self.shape("an address", operand);
        };
        Ok(Address { base: self.src(base, Type::U64)?, offset: *offset })
    }

    /// Whether an address names a parameter of a device function, which lies in local memory.
    pub(super) fn is_call_param(&self, operand: &Operand) -> bool {
        let Operand::Address { base, .. } = operand else { return false };
        matches!(&**base, Operand::Name(name) if matches!(self.lookup(name), Some(Binding::CallParam(_))))
    }
}
