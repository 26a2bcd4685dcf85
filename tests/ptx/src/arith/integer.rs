//! Integer arithmetic. Division by zero gives all ones, the remainder the dividend: what current devices give.

use crate::lanes::{Binary, Ternary, Unary, binary, ternary, unary};
use crate::types::Type;

/// `$name(ty)`: the operation for each integer type; the expression sees the operands in that type.
macro_rules! typed_binary {
    ($name:ident, |$a:ident, $b:ident| $value:expr) => {
        pub(crate) fn $name(ty: Type) -> Option<Binary> {
            macro_rules! of {
                ($int:ty, $unsigned:ty) => {
                    binary!(|x, y| {
                        let ($a, $b) = (x as $int, y as $int);
                        u64::from($value as $unsigned)
                    })
                };
            }
            Some(match ty {
                Type::U16 | Type::B16 => of!(u16, u16),
                Type::S16 => of!(i16, u16),
                Type::U32 | Type::B32 => of!(u32, u32),
                Type::S32 => of!(i32, u32),
                Type::U64 | Type::B64 => of!(u64, u64),
                Type::S64 => of!(i64, u64),
                _ => return None,
            })
        }
    };
}

macro_rules! typed_unary {
    ($name:ident, |$a:ident| $value:expr) => {
        pub(crate) fn $name(ty: Type) -> Option<Unary> {
            Some(match ty {
                Type::S16 => unary!(|x| {
                    let $a = x as i16;
                    u64::from($value as u16)
                }),
                Type::S32 => unary!(|x| {
                    let $a = x as i32;
                    u64::from($value as u32)
                }),
                Type::S64 => unary!(|x| {
                    let $a = x as i64;
                    $value as u64
                }),
                _ => return None,
            })
        }
    };
}

typed_binary!(add, |a, b| a.wrapping_add(b));
typed_binary!(sub, |a, b| a.wrapping_sub(b));
typed_binary!(mul_lo, |a, b| a.wrapping_mul(b));
typed_binary!(min, |a, b| a.min(b));
typed_binary!(max, |a, b| a.max(b));
typed_binary!(div, |a, b| a.checked_div(b).unwrap_or(if b == 0 { !0 } else { a }));
typed_binary!(rem, |a, b| a.checked_rem(b).unwrap_or(if b == 0 { a } else { 0 }));
typed_unary!(neg, |a| a.wrapping_neg());
typed_unary!(abs, |a| a.wrapping_abs());

/// Sum clamped to the range of `s32`.
pub(crate) fn add_sat() -> Binary {
    binary!(|a, b| u64::from((a as i32).saturating_add(b as i32) as u32))
}

/// Difference clamped to the range of `s32`.
pub(crate) fn sub_sat() -> Binary {
    binary!(|a, b| u64::from((a as i32).saturating_sub(b as i32) as u32))
}

/// The whole product, twice as wide as its factors.
pub(crate) fn mul_wide(ty: Type) -> Option<Binary> {
    Some(match ty {
        Type::U16 => binary!(|a, b| u64::from(u32::from(a as u16) * u32::from(b as u16))),
        Type::S16 => binary!(|a, b| u64::from((i32::from(a as i16) * i32::from(b as i16)) as u32)),
        Type::U32 => binary!(|a, b| u64::from(a as u32) * u64::from(b as u32)),
        Type::S32 => binary!(|a, b| (i64::from(a as i32) * i64::from(b as i32)) as u64),
        _ => return None,
    })
}

/// The upper half of the product.
pub(crate) fn mul_hi(ty: Type) -> Option<Binary> {
    Some(match ty {
        Type::U16 => binary!(|a, b| u64::from(u32::from(a as u16) * u32::from(b as u16)) >> 16),
        Type::S16 => {
            binary!(|a, b| u64::from(((i32::from(a as i16) * i32::from(b as i16)) >> 16) as u16))
        }
        Type::U32 => binary!(|a, b| (u64::from(a as u32) * u64::from(b as u32)) >> 32),
        Type::S32 => binary!(|a, b| u64::from(((i64::from(a as i32) * i64::from(b as i32)) >> 32) as u32)),
        Type::U64 => binary!(|a, b| ((u128::from(a) * u128::from(b)) >> 64) as u64),
        Type::S64 => binary!(|a, b| ((i128::from(a as i64) * i128::from(b as i64)) >> 64) as u64),
        _ => return None,
    })
}

pub(crate) fn mad_lo(ty: Type) -> Option<Ternary> {
    Some(match ty {
        Type::U16 | Type::S16 => {
            ternary!(|a, b, c| u64::from((a as u16).wrapping_mul(b as u16).wrapping_add(c as u16)))
        }
        Type::U32 | Type::S32 => {
            ternary!(|a, b, c| u64::from((a as u32).wrapping_mul(b as u32).wrapping_add(c as u32)))
        }
        Type::U64 | Type::S64 => ternary!(|a, b, c| a.wrapping_mul(b).wrapping_add(c)),
        _ => return None,
    })
}

pub(crate) fn mad_wide(ty: Type) -> Option<Ternary> {
    Some(match ty {
        Type::U16 => {
            ternary!(|a, b, c| u64::from((u32::from(a as u16) * u32::from(b as u16)).wrapping_add(c as u32)))
        }
        Type::S16 => ternary!(|a, b, c| u64::from(
            (i32::from(a as i16) * i32::from(b as i16)).wrapping_add(c as i32) as u32
        )),
        Type::U32 => ternary!(|a, b, c| (u64::from(a as u32) * u64::from(b as u32)).wrapping_add(c)),
        Type::S32 => {
            ternary!(|a, b, c| (i64::from(a as i32) * i64::from(b as i32)).wrapping_add(c as i64) as u64)
        }
        _ => return None,
    })
}

pub(crate) fn mad_hi(ty: Type) -> Option<Ternary> {
    Some(match ty {
        Type::U32 => ternary!(|a, b, c| u64::from(
            ((u64::from(a as u32) * u64::from(b as u32)) >> 32).wrapping_add(c) as u32
        )),
        Type::S32 => ternary!(|a, b, c| u64::from(
            (((i64::from(a as i32) * i64::from(b as i32)) >> 32) as u32).wrapping_add(c as u32)
        )),
        Type::U64 => ternary!(|a, b, c| (((u128::from(a) * u128::from(b)) >> 64) as u64).wrapping_add(c)),
        Type::S64 => {
            ternary!(|a, b, c| (((i128::from(a as i64) * i128::from(b as i64)) >> 64) as u64).wrapping_add(c))
        }
        _ => return None,
    })
}

/// `c + |a - b|`.
pub(crate) fn sad(ty: Type) -> Option<Ternary> {
    Some(match ty {
        Type::U32 => ternary!(|a, b, c| u64::from((a as u32).abs_diff(b as u32).wrapping_add(c as u32))),
        Type::S32 => ternary!(|a, b, c| u64::from((a as i32).abs_diff(b as i32).wrapping_add(c as u32))),
        _ => return None,
    })
}

/// Products of four bytes each, added to `c`.
pub(crate) fn dp4a(a: Type, b: Type) -> Option<Ternary> {
    macro_rules! dot {
        ($a:ty, $b:ty) => {
            ternary!(|a, b, c| {
                let (a, b) = ((a as u32).to_le_bytes(), (b as u32).to_le_bytes());
                let dot = a.iter().zip(b).map(|(a, b)| i32::from(*a as $a) * i32::from(b as $b)).sum::<i32>();
                u64::from((c as u32).wrapping_add(dot as u32))
            })
        };
    }
    Some(match (a, b) {
        (Type::U32, Type::U32) => dot!(u8, u8),
        (Type::U32, Type::S32) => dot!(u8, i8),
        (Type::S32, Type::U32) => dot!(i8, u8),
        (Type::S32, Type::S32) => dot!(i8, i8),
        _ => return None,
    })
}

/// Products of the two halves of `a` with two bytes of `b`, the lower or the upper, added to `c`.
pub(crate) fn dp2a(a: Type, b: Type, upper: bool) -> Option<Ternary> {
    macro_rules! dot {
        ($a:ty, $b:ty, $shift:expr) => {
            ternary!(|a, b, c| {
                let (a, b) = (a as u32, b as u32 >> $shift);
                let low = i32::from(a as u16 as $a).wrapping_mul(i32::from(b as u8 as $b));
                let high = i32::from((a >> 16) as u16 as $a).wrapping_mul(i32::from((b >> 8) as u8 as $b));
                u64::from((c as u32).wrapping_add(low as u32).wrapping_add(high as u32))
            })
        };
    }
    Some(match (a, b, upper) {
        (Type::U32, Type::U32, false) => dot!(u16, u8, 0),
        (Type::U32, Type::U32, true) => dot!(u16, u8, 16),
        (Type::U32, Type::S32, false) => dot!(u16, i8, 0),
        (Type::U32, Type::S32, true) => dot!(u16, i8, 16),
        (Type::S32, Type::U32, false) => dot!(i16, u8, 0),
        (Type::S32, Type::U32, true) => dot!(i16, u8, 16),
        (Type::S32, Type::S32, false) => dot!(i16, i8, 0),
        (Type::S32, Type::S32, true) => dot!(i16, i8, 16),
        _ => return None,
    })
}
