//! `f16` and `bf16`, alone and in pairs. Sums and products are computed in single precision and rounded once more,
//! which is harmless there: 24 bits are at least twice 11, plus two. Fused operations go through numbers rounded to odd.

use crate::arith::float::flushed;
use crate::arith::small_float::{Rounding, fma_odd, to_f32};
use crate::lanes::{Binary, Ternary, Unary, binary, ternary, unary};
use crate::types::Type;

/// What `f16` and `bf16` have in common here. Conversions are a few integer operations, so that loops over lanes become
/// vector instructions.
pub(crate) trait Half {
    fn get(bits: u16) -> f32;
    /// Rounds to nearest, ties to even; NaN becomes the canonical one.
    fn put(x: f32) -> u16;
    /// Smallest positive normal number.
    const MIN_NORMAL: f32;
}

#[derive(Debug)]
pub(crate) enum F16 {}
#[derive(Debug)]
pub(crate) enum Bf16 {}

impl Half for F16 {
    #[inline]
    fn get(bits: u16) -> f32 {
        let size = u32::from(bits & 0x7fff);
        // Moved to the exponent of a single, then scaled by the difference of the biases; subnormals come out right.
        let scaled = (f32::from_bits(size << 13) * f32::from_bits(0x7780_0000)).to_bits();
        let special = if size >= 0x7c00 { 0x7f80_0000 } else { 0 };
        f32::from_bits(scaled | special | u32::from(bits & 0x8000) << 16)
    }

    #[inline]
    fn put(x: f32) -> u16 {
        let bits = x.to_bits();
        let (sign, size) = ((bits >> 16) as u16 & 0x8000, bits & 0x7fff_ffff);
        if size > 0x7f80_0000 {
            return 0x7fff;
        }
        let magnitude = if size >= 0x4780_0000 {
            0x7c00
        } else if size < 0x3880_0000 {
            // A sum with one half rounds at the place of subnormals.
            (f32::from_bits(size) + 0.5).to_bits() - 0x3f00_0000
        } else {
            let odd = size >> 13 & 1;
            (size - 0x3800_0000 + 0xfff + odd) >> 13
        };
        sign | magnitude as u16
    }

    const MIN_NORMAL: f32 = 6.103_515_6e-5;
}

impl Half for Bf16 {
    #[inline]
    fn get(bits: u16) -> f32 {
        f32::from_bits(u32::from(bits) << 16)
    }

    #[inline]
    fn put(x: f32) -> u16 {
        let bits = x.to_bits();
        if bits & 0x7fff_ffff > 0x7f80_0000 {
            return 0x7fff;
        }
        ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
    }

    const MIN_NORMAL: f32 = f32::MIN_POSITIVE;
}

/// A single that rounds to any half as `a * b + c` itself does.
#[inline]
fn fused(a: f32, b: f32, c: f32) -> f32 {
    let (a, b, c) = (f64::from(a), f64::from(b), f64::from(c));
    odd_single(fma_odd(a, b, c))
}

/// A single that rounds to any half as `x` itself does.
#[inline]
fn odd_single(x: f64) -> f32 {
    let near = x as f32;
    if f64::from(near) == x {
        return near;
    }
    let low = to_f32(x, Rounding::Zero);
    if low.is_finite() { f32::from_bits(low.to_bits() | 1) } else { low }
}

fn flush<H: Half>(x: f32) -> f32 {
    if x.abs() < H::MIN_NORMAL { 0f32.copysign(x) } else { flushed(x) }
}

/// Edges of a half-precision operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HalfMode {
    pub(crate) flush: bool,
    pub(crate) saturate: bool,
    /// Negative results become 0 (`fma.relu`).
    pub(crate) relu: bool,
}

const FLUSH: u8 = 1;
const SATURATE: u8 = 2;
const RELU: u8 = 4;

fn get<H: Half, const MODE: u8>(bits: u64) -> f32 {
    let x = H::get(bits as u16);
    if MODE & FLUSH != 0 { flush::<H>(x) } else { x }
}

fn put<H: Half, const MODE: u8>(x: f32) -> u64 {
    let mut x = x;
    if MODE & FLUSH != 0 {
        x = flush::<H>(x);
    }
    if MODE & SATURATE != 0 {
        x = crate::arith::float::saturated(x);
    }
    if MODE & RELU != 0 && x < 0.0 {
        x = 0.0;
    }
    u64::from(H::put(x))
}

/// `of` on both halves of packed operands.
fn both(of: impl Fn(u64) -> u64) -> u64 {
    of(0) | of(16) << 16
}

fn index_of(mode: HalfMode) -> usize {
    usize::from(mode.flush) + 2 * usize::from(mode.saturate) + 4 * usize::from(mode.relu)
}

/// For each of the four types, an instance per mode.
macro_rules! typed {
    ($ty:expr, $mode:expr, $one:ident, $pair:ident) => {{
        macro_rules! eight {
            ($what:ident, $half:ty) => {
                [
                    $what!($half, 0),
                    $what!($half, 1),
                    $what!($half, 2),
                    $what!($half, 3),
                    $what!($half, 4),
                    $what!($half, 5),
                    $what!($half, 6),
                    $what!($half, 7),
                ][index_of($mode)]
            };
        }
        Some(match $ty {
            Type::F16 => eight!($one, F16),
            Type::Bf16 => eight!($one, Bf16),
            Type::F16x2 => eight!($pair, F16),
            Type::Bf16x2 => eight!($pair, Bf16),
            _ => return None,
        })
    }};
}

macro_rules! half_binary {
    ($name:ident, |$x:ident, $y:ident| $value:expr) => {
        pub(crate) fn $name(ty: Type, mode: HalfMode) -> Option<Binary> {
            macro_rules! one {
                ($half:ty, $m:literal) => {
                    binary!(|a, b| {
                        let ($x, $y) = (get::<$half, $m>(a), get::<$half, $m>(b));
                        put::<$half, $m>($value)
                    })
                };
            }
            macro_rules! pair {
                ($half:ty, $m:literal) => {
                    binary!(|a, b| both(|s| {
                        let ($x, $y) = (get::<$half, $m>(a >> s), get::<$half, $m>(b >> s));
                        put::<$half, $m>($value)
                    }))
                };
            }
            typed!(ty, mode, one, pair)
        }
    };
}

half_binary!(add, |x, y| x + y);
half_binary!(sub, |x, y| x - y);
half_binary!(mul, |x, y| x * y);
half_binary!(min, |x, y| extreme(x, y, false, false));
half_binary!(max, |x, y| extreme(x, y, true, false));
half_binary!(min_nan, |x, y| extreme(x, y, false, true));
half_binary!(max_nan, |x, y| extreme(x, y, true, true));

fn extreme(a: f32, b: f32, max: bool, nan: bool) -> f32 {
    if a.is_nan() || b.is_nan() {
        return if nan || (a.is_nan() && b.is_nan()) {
            f32::NAN
        } else if a.is_nan() {
            b
        } else {
            a
        };
    }
    let a_below = a < b || (a == b && a.is_sign_negative());
    if a_below == max { b } else { a }
}

pub(crate) fn fma(ty: Type, mode: HalfMode) -> Option<Ternary> {
    macro_rules! one {
        ($half:ty, $m:literal) => {
            ternary!(|a, b, c| {
                let x = fused(get::<$half, $m>(a), get::<$half, $m>(b), get::<$half, $m>(c));
                put::<$half, $m>(x)
            })
        };
    }
    macro_rules! pair {
        ($half:ty, $m:literal) => {
            ternary!(|a, b, c| both(|s| {
                let x = fused(get::<$half, $m>(a >> s), get::<$half, $m>(b >> s), get::<$half, $m>(c >> s));
                put::<$half, $m>(x)
            }))
        };
    }
    typed!(ty, mode, one, pair)
}

macro_rules! half_unary {
    ($name:ident, |$x:ident| $value:expr) => {
        pub(crate) fn $name(ty: Type, flush: bool) -> Option<Unary> {
            let mode = HalfMode { flush, saturate: false, relu: false };
            macro_rules! one {
                ($half:ty, $m:literal) => {
                    unary!(|a| {
                        let $x = get::<$half, $m>(a);
                        put::<$half, $m>($value)
                    })
                };
            }
            macro_rules! pair {
                ($half:ty, $m:literal) => {
                    unary!(|a| both(|s| {
                        let $x = get::<$half, $m>(a >> s);
                        put::<$half, $m>($value)
                    }))
                };
            }
            typed!(ty, mode, one, pair)
        }
    };
}

half_unary!(ex2, |x| odd_single(f64::from(x).exp2()));
half_unary!(tanh, |x| odd_single(f64::from(x).tanh()));

pub(crate) fn neg(ty: Type) -> Option<Unary> {
    Some(match ty {
        Type::F16 | Type::Bf16 => unary!(|a| (a ^ 0x8000) & 0xffff),
        Type::F16x2 | Type::Bf16x2 => unary!(|a| (a ^ 0x8000_8000) & 0xffff_ffff),
        _ => return None,
    })
}

pub(crate) fn abs(ty: Type) -> Option<Unary> {
    Some(match ty {
        Type::F16 | Type::Bf16 => unary!(|a| a & 0x7fff),
        Type::F16x2 | Type::Bf16x2 => unary!(|a| a & 0x7fff_7fff),
        _ => return None,
    })
}

pub(crate) fn f16_value(bits: u16) -> f32 {
    F16::get(bits)
}

pub(crate) fn bf16_value(bits: u16) -> f32 {
    Bf16::get(bits)
}
