//! Comparisons of `setp`, `set` and `slct`.

use crate::arith::float::{flushed, single};
use crate::arith::half_float::{bf16_value, f16_value};
use crate::lanes::{Lanes, WARP};
use crate::types::Type;

/// An operator of `setp`. The last eight are true also where an operand is NaN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compare {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    Equ,
    Neu,
    Ltu,
    Leu,
    Gtu,
    Geu,
    Num,
    Nan,
}

impl Compare {
    /// The operator named; `lo`, `ls`, `hi` and `hs` are those of unsigned integers.
    pub(crate) fn parse(name: &str) -> Option<Compare> {
        Some(match name {
            "eq" => Compare::Eq,
            "ne" => Compare::Ne,
            "lt" | "lo" => Compare::Lt,
            "le" | "ls" => Compare::Le,
            "gt" | "hi" => Compare::Gt,
            "ge" | "hs" => Compare::Ge,
            "equ" => Compare::Equ,
            "neu" => Compare::Neu,
            "ltu" => Compare::Ltu,
            "leu" => Compare::Leu,
            "gtu" => Compare::Gtu,
            "geu" => Compare::Geu,
            "num" => Compare::Num,
            "nan" => Compare::Nan,
            _ => return None,
        })
    }

    pub(crate) fn is_float_only(self) -> bool {
        !matches!(self, Compare::Eq | Compare::Ne | Compare::Lt | Compare::Le | Compare::Gt | Compare::Ge)
    }
}

fn mask(a: &Lanes, b: &Lanes, of: impl Fn(u64, u64) -> bool) -> u32 {
    let mut out = 0;
    for i in 0..WARP {
        out |= u32::from(of(a[i], b[i])) << i;
    }
    out
}

fn ordered<T: PartialOrd>(op: Compare, a: &Lanes, b: &Lanes, of: impl Fn(u64) -> T) -> u32 {
    match op {
        Compare::Eq => mask(a, b, |a, b| of(a) == of(b)),
        // False where an operand is NaN, unlike Rust's.
        Compare::Ne => mask(a, b, |a, b| of(a) < of(b) || of(a) > of(b)),
        Compare::Lt => mask(a, b, |a, b| of(a) < of(b)),
        Compare::Le => mask(a, b, |a, b| of(a) <= of(b)),
        Compare::Gt => mask(a, b, |a, b| of(a) > of(b)),
        Compare::Ge => mask(a, b, |a, b| of(a) >= of(b)),
        Compare::Equ => mask(a, b, |a, b| of(a).partial_cmp(&of(b)).is_none_or(|o| o.is_eq())),
        Compare::Neu => mask(a, b, |a, b| of(a) != of(b)),
        Compare::Ltu => mask(a, b, |a, b| of(a).partial_cmp(&of(b)).is_none_or(|o| o.is_lt())),
        Compare::Leu => mask(a, b, |a, b| of(a).partial_cmp(&of(b)).is_none_or(|o| o.is_le())),
        Compare::Gtu => mask(a, b, |a, b| of(a).partial_cmp(&of(b)).is_none_or(|o| o.is_gt())),
        Compare::Geu => mask(a, b, |a, b| of(a).partial_cmp(&of(b)).is_none_or(|o| o.is_ge())),
        Compare::Num => mask(a, b, |a, b| of(a).partial_cmp(&of(b)).is_some()),
        Compare::Nan => mask(a, b, |a, b| of(a).partial_cmp(&of(b)).is_none()),
    }
}

/// The lanes for which `a op b` holds. Types are those [`supported`] allows.
pub(crate) fn compare(op: Compare, ty: Type, flush: bool, a: &Lanes, b: &Lanes) -> u32 {
    match ty {
        Type::U16 | Type::B16 => ordered(op, a, b, |x| x as u16),
        Type::S16 => ordered(op, a, b, |x| x as i16),
        Type::U32 | Type::B32 => ordered(op, a, b, |x| x as u32),
        Type::S32 => ordered(op, a, b, |x| x as i32),
        Type::S64 => ordered(op, a, b, |x| x as i64),
        Type::F16 => ordered(op, a, b, |x| f16_value(x as u16)),
        Type::Bf16 => ordered(op, a, b, |x| bf16_value(x as u16)),
        Type::F32 if flush => ordered(op, a, b, |x| flushed(single(x))),
        Type::F32 => ordered(op, a, b, single),
        Type::F64 => ordered(op, a, b, f64::from_bits),
        _ => ordered(op, a, b, |x| x),
    }
}

pub(crate) fn supported(ty: Type) -> bool {
    matches!(
        ty,
        Type::U16
            | Type::B16
            | Type::S16
            | Type::U32
            | Type::B32
            | Type::S32
            | Type::U64
            | Type::B64
            | Type::S64
            | Type::F16
            | Type::Bf16
            | Type::F32
            | Type::F64
    )
}
