//! `cvt`: between integers and floating-point formats, in every direction of rounding.

use crate::arith::float::{flushed, saturated, single};
use crate::arith::half_float::{self, Half};
use crate::arith::small_float::{BF16, E4M3, E5M2, F16, Rounding, Small, int_odd, to_f32};
use crate::types::{Kind, Type, sign_extend, truncate};

/// One conversion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Convert {
    pub(crate) to: Type,
    pub(crate) from: Type,
    /// Of the result where it is a float, to an integral value where `integral`.
    pub(crate) rounding: Rounding,
    /// `rni`, `rzi`, `rmi`, `rpi`: the result is a whole number.
    pub(crate) integral: bool,
    pub(crate) flush: bool,
    pub(crate) saturate: bool,
    /// Overflow gives the largest finite number.
    pub(crate) finite: bool,
    /// Negative results become 0.
    pub(crate) relu: bool,
}

pub(crate) fn small_of(ty: Type) -> Option<Small> {
    Some(match ty {
        Type::F16 | Type::F16x2 => F16,
        Type::Bf16 | Type::Bf16x2 => BF16,
        Type::E4m3 | Type::E4m3x2 => E4M3,
        Type::E5m2 | Type::E5m2x2 => E5M2,
        _ => return None,
    })
}

impl Convert {
    /// The converted value of one lane, for all but packed types.
    pub(crate) fn scalar(&self, value: u64) -> u64 {
        match (self.from.is_float(), self.to.is_float()) {
            (false, false) => self.int_to_int(value),
            (false, true) => self.int_to_float(value),
            (true, false) => self.float_to_int(value),
            (true, true) => self.float_to_float(self.decode(value)),
        }
    }

    /// A packed result of two operands: `high` goes to the upper half.
    pub(crate) fn pack(&self, high: u64, low: u64) -> u64 {
        let half = self.to.bits() / 2;
        let one = |value| truncate(self.float_to_float(self.decode(value)), half);
        one(high) << half | one(low)
    }

    /// A packed result of a packed operand.
    pub(crate) fn repack(&self, value: u64) -> u64 {
        let half = self.from.bits() / 2;
        self.pack(value >> half, truncate(value, half))
    }

    fn integer(&self, value: u64) -> i128 {
        let bits = self.from.bits();
        if self.from.kind() == Kind::Signed {
            i128::from(sign_extend(value, bits) as i64)
        } else {
            i128::from(truncate(value, bits))
        }
    }

    /// Least and greatest value of the target.
    fn range(&self) -> (i128, i128) {
        let bits = self.to.bits();
        if self.to.kind() == Kind::Signed {
            (-(1i128 << (bits - 1)), (1i128 << (bits - 1)) - 1)
        } else {
            (0, (1i128 << bits) - 1)
        }
    }

    fn int_to_int(&self, value: u64) -> u64 {
        let mut value = self.integer(value);
        if self.saturate {
            let (least, greatest) = self.range();
            value = value.clamp(least, greatest);
        }
        truncate(value as u64, self.to.bits())
    }

    fn int_to_float(&self, value: u64) -> u64 {
        let value = self.integer(value);
        if self.to == Type::F64 {
            // Directed roundings to doubles are refused when the instruction is decoded.
            return (value as f64).to_bits();
        }
        let size = int_odd(value.unsigned_abs() as u64);
        self.float_to_float(if value < 0 { -size } else { size })
    }

    /// The operand as a double, exactly.
    fn decode(&self, value: u64) -> f64 {
        match self.from {
            Type::F32 | Type::Tf32 => {
                let x = single(value);
                f64::from(if self.flush { flushed(x) } else { x })
            }
            Type::F64 => f64::from_bits(value),
            Type::F16 | Type::F16x2 => f64::from(crate::arith::half_float::f16_value(value as u16)),
            Type::Bf16 | Type::Bf16x2 => f64::from(crate::arith::half_float::bf16_value(value as u16)),
            _ => small_of(self.from).map_or(f64::NAN, |s| s.decode(value as u32)),
        }
    }

    /// To nearest, from a single, whose conversion to a double and back loses nothing.
    fn is_plain(&self) -> bool {
        self.from == Type::F32 && self.rounding == Rounding::Nearest && !self.finite
    }

    fn whole(&self, x: f64) -> f64 {
        match self.rounding {
            Rounding::Nearest => x.round_ties_even(),
            Rounding::NearestAway => x.round(),
            Rounding::Zero => x.trunc(),
            Rounding::Down => x.floor(),
            Rounding::Up => x.ceil(),
        }
    }

    fn float_to_int(&self, value: u64) -> u64 {
        let x = self.decode(value);
        let bits = self.to.bits();
        if x.is_nan() {
            let wide = self.from == Type::F64 || bits == 64;
            return if wide { 1 << (bits - 1) } else { 0 };
        }
        let (least, greatest) = self.range();
        // Casts saturate, at bounds far outside of every target's.
        let whole = self.whole(x) as i128;
        truncate(whole.clamp(least, greatest) as u64, bits)
    }

    fn float_to_float(&self, x: f64) -> u64 {
        let mut x = x;
        if self.integral {
            x = self.whole(x);
        }
        if self.relu && x < 0.0 {
            x = 0.0;
        }
        if self.saturate {
            x = if x > 0.0 { x.min(1.0) } else { 0.0 };
        }
        let rounding = if self.integral { Rounding::Nearest } else { self.rounding };
        match self.to {
            Type::F64 => x.to_bits(),
            Type::F32 => {
                if x.is_nan() {
                    return 0x7fff_ffff;
                }
                let y = to_f32(x, rounding);
                let y = if self.flush { flushed(y) } else { y };
                u64::from(if self.saturate { saturated(y) } else { y }.to_bits())
            }
            // Ten bits of mantissa; the lower 13 bits of the register are zero.
            Type::Tf32 => {
                if x.is_nan() {
                    return 0x7fff_ffff;
                }
                let bits = (x as f32).to_bits();
                let rest = bits & 0x1fff;
                let up = match rounding {
                    Rounding::Zero => false,
                    Rounding::Nearest => rest > 0x1000 || (rest == 0x1000 && bits >> 13 & 1 == 1),
                    _ => rest >= 0x1000,
                };
                u64::from((bits & !0x1fff).wrapping_add(if up { 0x2000 } else { 0 }))
            }
            Type::F16 | Type::F16x2 if self.is_plain() => u64::from(half_float::F16::put(x as f32)),
            Type::Bf16 | Type::Bf16x2 if self.is_plain() => u64::from(half_float::Bf16::put(x as f32)),
            _ => small_of(self.to).map_or(0, |s| u64::from(s.encode(x, rounding, self.finite))),
        }
    }
}
