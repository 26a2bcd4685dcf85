//! Logic, shifts, bit fields, permutation of bytes.

use crate::lanes::{Binary, Lanes, Ternary, Unary, WARP, binary, ternary, unary};
use crate::types::{Type, sign_extend, truncate};

pub(crate) fn and() -> Binary {
    binary!(|a, b| a & b)
}

pub(crate) fn or() -> Binary {
    binary!(|a, b| a | b)
}

pub(crate) fn xor() -> Binary {
    binary!(|a, b| a ^ b)
}

pub(crate) fn not(ty: Type) -> Option<Unary> {
    Some(match ty {
        Type::B16 => unary!(|a| u64::from(!(a as u16))),
        Type::B32 => unary!(|a| u64::from(!(a as u32))),
        Type::B64 => unary!(|a| !a),
        _ => return None,
    })
}

/// One where the operand is zero.
pub(crate) fn cnot(ty: Type) -> Option<Unary> {
    Some(match ty {
        Type::B16 => unary!(|a| u64::from(a as u16 == 0)),
        Type::B32 => unary!(|a| u64::from(a as u32 == 0)),
        Type::B64 => unary!(|a| u64::from(a == 0)),
        _ => return None,
    })
}

/// Amounts past the width shift everything out.
pub(crate) fn shl(ty: Type) -> Option<Binary> {
    Some(match ty {
        Type::B16 => binary!(|a, b| u64::from((a as u16).checked_shl(b as u32).unwrap_or(0))),
        Type::B32 => binary!(|a, b| u64::from((a as u32).checked_shl(b as u32).unwrap_or(0))),
        Type::B64 => binary!(|a, b| a.checked_shl(b as u32).unwrap_or(0)),
        _ => return None,
    })
}

pub(crate) fn shr(ty: Type) -> Option<Binary> {
    Some(match ty {
        Type::B16 | Type::U16 => binary!(|a, b| u64::from((a as u16).checked_shr(b as u32).unwrap_or(0))),
        Type::B32 | Type::U32 => binary!(|a, b| u64::from((a as u32).checked_shr(b as u32).unwrap_or(0))),
        Type::B64 | Type::U64 => binary!(|a, b| a.checked_shr(b as u32).unwrap_or(0)),
        Type::S16 => binary!(|a, b| u64::from(((a as i16) >> (b as u32).min(15)) as u16)),
        Type::S32 => binary!(|a, b| u64::from(((a as i32) >> (b as u32).min(31)) as u32)),
        Type::S64 => binary!(|a, b| ((a as i64) >> (b as u32).min(63)) as u64),
        _ => return None,
    })
}

/// Funnel shifts of `[b:a]`: the upper word of a left shift, the lower of a right one.
pub(crate) fn shf(left: bool, clamp: bool) -> Ternary {
    match (left, clamp) {
        (true, false) => ternary!(|a, b, c| funnel(a, b) << (c & 31) >> 32 & 0xffff_ffff),
        (true, true) => {
            ternary!(|a, b, c| ((u128::from(funnel(a, b)) << (c as u32).min(32)) >> 32) as u64 & 0xffff_ffff)
        }
        (false, false) => ternary!(|a, b, c| funnel(a, b) >> (c & 31) & 0xffff_ffff),
        (false, true) => ternary!(|a, b, c| funnel(a, b) >> (c as u32).min(32) & 0xffff_ffff),
    }
}

fn funnel(a: u64, b: u64) -> u64 {
    truncate(a, 32) | b << 32
}

/// Any function of three bits, by its truth table `table`.
pub(crate) fn lop3(table: u8, a: &Lanes, b: &Lanes, c: &Lanes, out: &mut Lanes) {
    // Minterms that the table holds are united; tables as kernels use them hold few after factoring by `a`.
    let half = |table: u8, b: u64, c: u64| -> u64 {
        let mut r = 0;
        if table & 1 != 0 {
            r |= !b & !c;
        }
        if table & 2 != 0 {
            r |= !b & c;
        }
        if table & 4 != 0 {
            r |= b & !c;
        }
        if table & 8 != 0 {
            r |= b & c;
        }
        r
    };
    for i in 0..WARP {
        let r = (!a[i] & half(table & 15, b[i], c[i])) | (a[i] & half(table >> 4, b[i], c[i]));
        out[i] = r & 0xffff_ffff;
    }
}

pub(crate) fn popc(ty: Type) -> Option<Unary> {
    Some(match ty {
        Type::B32 => unary!(|a| u64::from((a as u32).count_ones())),
        Type::B64 => unary!(|a| u64::from(a.count_ones())),
        _ => return None,
    })
}

pub(crate) fn clz(ty: Type) -> Option<Unary> {
    Some(match ty {
        Type::B32 => unary!(|a| u64::from((a as u32).leading_zeros())),
        Type::B64 => unary!(|a| u64::from(a.leading_zeros())),
        _ => return None,
    })
}

pub(crate) fn brev(ty: Type) -> Option<Unary> {
    Some(match ty {
        Type::B32 => unary!(|a| u64::from((a as u32).reverse_bits())),
        Type::B64 => unary!(|a| a.reverse_bits()),
        _ => return None,
    })
}

/// Position of the highest bit that is not a sign bit, or all ones; with `shift`, the shift that would bring it to
/// the top.
pub(crate) fn bfind(ty: Type, shift: bool) -> Option<Unary> {
    fn find(value: u64, bits: u32, signed: bool, shift: bool) -> u64 {
        let value = truncate(value, bits);
        let value = if signed && value >> (bits - 1) & 1 == 1 { truncate(!value, bits) } else { value };
        if value == 0 {
            return 0xffff_ffff;
        }
        let position = 63 - value.leading_zeros();
        u64::from(if shift { bits - 1 - position } else { position })
    }
    Some(match (ty, shift) {
        (Type::U32, false) => unary!(|a| find(a, 32, false, false)),
        (Type::U32, true) => unary!(|a| find(a, 32, false, true)),
        (Type::S32, false) => unary!(|a| find(a, 32, true, false)),
        (Type::S32, true) => unary!(|a| find(a, 32, true, true)),
        (Type::U64, false) => unary!(|a| find(a, 64, false, false)),
        (Type::U64, true) => unary!(|a| find(a, 64, false, true)),
        (Type::S64, false) => unary!(|a| find(a, 64, true, false)),
        (Type::S64, true) => unary!(|a| find(a, 64, true, true)),
        _ => return None,
    })
}

/// Bits `[position, position + length)` of `a`, extended by type; what lies past the width is sign or zero.
pub(crate) fn bfe(ty: Type) -> Option<Ternary> {
    Some(match ty {
        Type::U32 => ternary!(|a, p, l| truncate(
            truncate(a, 32).checked_shr(p as u32 & 255).unwrap_or(0),
            l as u32 & 255
        )),
        Type::U64 => ternary!(|a, p, l| truncate(a.checked_shr(p as u32 & 255).unwrap_or(0), l as u32 & 255)),
        Type::S32 => ternary!(|a, p, l| truncate(signed_field(sign_extend(a, 32), p, l, 31), 32)),
        Type::S64 => ternary!(|a, p, l| signed_field(a, p, l, 63)),
        _ => return None,
    })
}

/// The sign is the field's highest bit, or that of `value` where the field reaches past it.
fn signed_field(value: u64, position: u64, length: u64, top: u32) -> u64 {
    let (position, length) = (position as u32 & 255, length as u32 & 255);
    if length == 0 {
        return 0;
    }
    if position > top {
        return ((value as i64) >> 63) as u64;
    }
    sign_extend(((value as i64) >> position) as u64, length.min(top + 1 - position))
}

/// `b` with bits `[position, position + length)` replaced by the low bits of `a`.
pub(crate) fn bfi(bits: u32, a: u64, b: u64, position: u64, length: u64) -> u64 {
    let (position, length) = (position as u32 & 255, length as u32 & 255);
    if position >= bits || length == 0 {
        return truncate(b, bits);
    }
    let field = truncate(!0, length) << position;
    truncate((b & !field) | (a << position & field), bits)
}

/// How `prmt` reads its selector.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Permute {
    Index,
    Forward4,
    Backward4,
    Replicate8,
    EdgeLeft,
    EdgeRight,
    Replicate16,
}

/// Four bytes chosen out of the eight of `[b:a]`.
pub(crate) fn prmt(mode: Permute, a: u64, b: u64, selector: u64) -> u64 {
    let bytes = funnel(a, b).to_le_bytes();
    let s = selector as usize & 3;
    let order: [usize; 4] = match mode {
        Permute::Index => {
            let mut out = [0u8; 4];
            for (i, out) in out.iter_mut().enumerate() {
                let nibble = selector >> (4 * i);
                let byte = bytes[nibble as usize & 7];
                *out = if nibble & 8 == 0 { byte } else { ((byte as i8) >> 7) as u8 };
            }
            return u64::from(u32::from_le_bytes(out));
        }
        Permute::Forward4 => [s, s + 1, s + 2, s + 3],
        Permute::Backward4 => [s, (s + 7) & 7, (s + 6) & 7, (s + 5) & 7],
        Permute::Replicate8 => [s; 4],
        Permute::EdgeLeft => [s, s.max(1), s.max(2), s.max(3)],
        Permute::EdgeRight => [0, s.min(1), s.min(2), s],
        Permute::Replicate16 => {
            let s = (s & 1) * 2;
            [s, s + 1, s, s + 1]
        }
    };
    u64::from(u32::from_le_bytes(order.map(|i| bytes[i])))
}
