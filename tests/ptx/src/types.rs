//! Types of PTX instructions and declarations.

/// A fundamental, packed or alternate type of an instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Type {
    Pred,
    B8,
    B16,
    B32,
    B64,
    B128,
    U8,
    U16,
    U32,
    U64,
    S8,
    S16,
    S32,
    S64,
    F16,
    F16x2,
    Bf16,
    Bf16x2,
    F32,
    F64,
    Tf32,
    E4m3,
    E5m2,
    E4m3x2,
    E5m2x2,
    S4,
    U4,
    /// One bit; matrix instructions know it, this interpreter does not execute it.
    B1,
}

/// Family of a type, which decides extension and arithmetic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Bits,
    Unsigned,
    Signed,
    Float,
}

impl Type {
    /// The type an opcode suffix or a declaration names, without the leading dot.
    pub(crate) fn parse(name: &str) -> Option<Type> {
        Some(match name {
            "pred" => Type::Pred,
            "b8" => Type::B8,
            "b16" => Type::B16,
            "b32" => Type::B32,
            "b64" => Type::B64,
            "b128" => Type::B128,
            "u8" => Type::U8,
            "u16" => Type::U16,
            "u32" => Type::U32,
            "u64" => Type::U64,
            "s8" => Type::S8,
            "s16" => Type::S16,
            "s32" => Type::S32,
            "s64" => Type::S64,
            "f16" => Type::F16,
            "f16x2" => Type::F16x2,
            "bf16" => Type::Bf16,
            "bf16x2" => Type::Bf16x2,
            "f32" => Type::F32,
            "f64" => Type::F64,
            "tf32" => Type::Tf32,
            "e4m3" => Type::E4m3,
            "e5m2" => Type::E5m2,
            "e4m3x2" => Type::E4m3x2,
            "e5m2x2" => Type::E5m2x2,
            "s4" => Type::S4,
            "u4" => Type::U4,
            "b1" => Type::B1,
            _ => return None,
        })
    }

    /// Width in bits; a predicate has one.
    pub(crate) fn bits(self) -> u32 {
        match self {
            Type::Pred | Type::B1 => 1,
            Type::S4 | Type::U4 => 4,
            Type::B8 | Type::U8 | Type::S8 | Type::E4m3 | Type::E5m2 => 8,
            Type::B16 | Type::U16 | Type::S16 | Type::F16 | Type::Bf16 | Type::E4m3x2 | Type::E5m2x2 => 16,
            Type::B32 | Type::U32 | Type::S32 | Type::F32 | Type::F16x2 | Type::Bf16x2 | Type::Tf32 => 32,
            Type::B64 | Type::U64 | Type::S64 | Type::F64 => 64,
            Type::B128 => 128,
        }
    }

    /// Bytes that memory holds of one value.
    pub(crate) fn bytes(self) -> usize {
        (self.bits() as usize).div_ceil(8)
    }

    pub(crate) fn kind(self) -> Kind {
        match self {
            Type::Pred | Type::B1 | Type::B8 | Type::B16 | Type::B32 | Type::B64 | Type::B128 => Kind::Bits,
            Type::U4 | Type::U8 | Type::U16 | Type::U32 | Type::U64 => Kind::Unsigned,
            Type::S4 | Type::S8 | Type::S16 | Type::S32 | Type::S64 => Kind::Signed,
            Type::F16
            | Type::F16x2
            | Type::Bf16
            | Type::Bf16x2
            | Type::F32
            | Type::F64
            | Type::Tf32
            | Type::E4m3
            | Type::E5m2
            | Type::E4m3x2
            | Type::E5m2x2 => Kind::Float,
        }
    }

    pub(crate) fn is_float(self) -> bool {
        self.kind() == Kind::Float
    }

    pub(crate) fn is_signed(self) -> bool {
        self.kind() == Kind::Signed
    }
}

/// The low `bits` bits of `value`.
pub(crate) fn truncate(value: u64, bits: u32) -> u64 {
    if bits >= 64 { value } else { value & ((1 << bits) - 1) }
}

/// `value`, whose low `bits` bits are a two's complement number, as one of 64 bits.
pub(crate) fn sign_extend(value: u64, bits: u32) -> u64 {
    if bits >= 64 {
        return value;
    }
    let shift = 64 - bits;
    (((value << shift) as i64) >> shift) as u64
}
