//! Singles and doubles. Directed roundings go through doubles rounded to odd; approximate functions are computed in
//! double and rounded once, so they are closer to the truth than a device's.

use crate::arith::small_float::{Rounding, add_odd, div_odd, fma_odd, sqrt_odd, to_f32};
use crate::error::ErrorKind;
use crate::lanes::{Binary, Ternary, Unary, binary, ternary, unary};

/// How a single-precision operation rounds and what it does at the edges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mode {
    pub(crate) rounding: Rounding,
    /// Subnormal operands and results are zeros of their sign.
    pub(crate) flush: bool,
    /// Results are clamped to [0, 1]; NaN becomes 0.
    pub(crate) saturate: bool,
}

pub(crate) fn single(bits: u64) -> f32 {
    f32::from_bits(bits as u32)
}

pub(crate) fn double(bits: u64) -> f64 {
    f64::from_bits(bits)
}

pub(crate) fn flushed(x: f32) -> f32 {
    if x.is_subnormal() { 0f32.copysign(x) } else { x }
}

pub(crate) fn saturated(x: f32) -> f32 {
    // The order makes NaN, and -0, into +0.
    if x > 0.0 { x.min(1.0) } else { 0.0 }
}

/// Bits of `Mode` as a constant, so that each combination is compiled without tests inside its loop.
const FLUSH: u8 = 4;
const SATURATE: u8 = 8;

const fn rounding_of(mode: u8) -> Rounding {
    match mode & 3 {
        0 => Rounding::Nearest,
        1 => Rounding::Zero,
        2 => Rounding::Down,
        _ => Rounding::Up,
    }
}

fn index_of(mode: Mode) -> usize {
    let rounding = match mode.rounding {
        Rounding::Nearest | Rounding::NearestAway => 0,
        Rounding::Zero => 1,
        Rounding::Down => 2,
        Rounding::Up => 3,
    };
    rounding + if mode.flush { FLUSH as usize } else { 0 } + if mode.saturate { SATURATE as usize } else { 0 }
}

fn operand<const MODE: u8>(bits: u64) -> f32 {
    let x = single(bits);
    if MODE & FLUSH != 0 { flushed(x) } else { x }
}

fn result<const MODE: u8>(x: f32) -> u64 {
    let x = if MODE & FLUSH != 0 { flushed(x) } else { x };
    let x = if MODE & SATURATE != 0 { saturated(x) } else { x };
    u64::from(x.to_bits())
}

fn add_f32<const MODE: u8>(a: f32, b: f32) -> f32 {
    if MODE & 3 == 0 {
        return a + b;
    }
    let sum = to_f32(add_odd(f64::from(a), f64::from(b)), rounding_of(MODE));
    // An exact zero is negative when rounding down, unless both operands are positive zeros.
    let positive = a.to_bits() == 0 && b.to_bits() == 0;
    if sum == 0.0 && MODE & 3 == 2 && !positive { -0.0 } else { sum }
}

fn sub_f32<const MODE: u8>(a: f32, b: f32) -> f32 {
    add_f32::<MODE>(a, -b)
}

fn mul_f32<const MODE: u8>(a: f32, b: f32) -> f32 {
    if MODE & 3 == 0 { a * b } else { to_f32(f64::from(a) * f64::from(b), rounding_of(MODE)) }
}

fn div_f32<const MODE: u8>(a: f32, b: f32) -> f32 {
    if MODE & 3 == 0 { a / b } else { to_f32(div_odd(f64::from(a), f64::from(b)), rounding_of(MODE)) }
}

fn fma_f32<const MODE: u8>(a: f32, b: f32, c: f32) -> f32 {
    if MODE & 3 == 0 {
        a.mul_add(b, c)
    } else {
        to_f32(fma_odd(f64::from(a), f64::from(b), f64::from(c)), rounding_of(MODE))
    }
}

fn sqrt_f32<const MODE: u8>(a: f32) -> f32 {
    if MODE & 3 == 0 { a.sqrt() } else { to_f32(sqrt_odd(f64::from(a)), rounding_of(MODE)) }
}

fn rcp_f32<const MODE: u8>(a: f32) -> f32 {
    div_f32::<MODE>(1.0, a)
}

/// One instance per mode.
macro_rules! modes {
    ($mode:expr, $instance:ident) => {
        [
            $instance!(0),
            $instance!(1),
            $instance!(2),
            $instance!(3),
            $instance!(4),
            $instance!(5),
            $instance!(6),
            $instance!(7),
            $instance!(8),
            $instance!(9),
            $instance!(10),
            $instance!(11),
            $instance!(12),
            $instance!(13),
            $instance!(14),
            $instance!(15),
        ][index_of($mode)]
    };
}

macro_rules! unary_f32 {
    ($name:ident, $scalar:ident) => {
        pub(crate) fn $name(mode: Mode) -> Unary {
            macro_rules! instance {
                ($m:literal) => {
                    unary!(|a| result::<$m>($scalar::<$m>(operand::<$m>(a))))
                };
            }
            modes!(mode, instance)
        }
    };
}

macro_rules! binary_f32 {
    ($name:ident, $scalar:ident) => {
        pub(crate) fn $name(mode: Mode) -> Binary {
            macro_rules! instance {
                ($m:literal) => {
                    binary!(|a, b| result::<$m>($scalar::<$m>(operand::<$m>(a), operand::<$m>(b))))
                };
            }
            modes!(mode, instance)
        }
    };
}

binary_f32!(add_single, add_f32);
binary_f32!(sub_single, sub_f32);
binary_f32!(mul_single, mul_f32);
binary_f32!(div_single, div_f32);
unary_f32!(sqrt_single, sqrt_f32);
unary_f32!(rcp_single, rcp_f32);

pub(crate) fn fma_single(mode: Mode) -> Ternary {
    macro_rules! instance {
        ($m:literal) => {
            ternary!(|a, b, c| result::<$m>(fma_f32::<$m>(
                operand::<$m>(a),
                operand::<$m>(b),
                operand::<$m>(c)
            )))
        };
    }
    modes!(mode, instance)
}

/// Minimum or maximum; a NaN loses against a number unless `nan`.
fn extreme_f32(a: f32, b: f32, max: bool, nan: bool) -> f32 {
    if a.is_nan() || b.is_nan() {
        if nan || (a.is_nan() && b.is_nan()) {
            return f32::from_bits(0x7fff_ffff);
        }
        return if a.is_nan() { b } else { a };
    }
    // -0 is below +0.
    let a_below = a < b || (a == b && a.is_sign_negative());
    if a_below == max { b } else { a }
}

pub(crate) fn extreme_single(max: bool, nan: bool, flush: bool, xorsign: bool) -> Result<Binary, ErrorKind> {
    if xorsign {
        return Err(ErrorKind::Unsupported("min and max with .xorsign".to_owned()));
    }
    macro_rules! instance {
        ($max:literal, $nan:literal) => {
            if flush {
                binary!(|a, b| u64::from(
                    extreme_f32(flushed(single(a)), flushed(single(b)), $max, $nan).to_bits()
                ))
            } else {
                binary!(|a, b| u64::from(extreme_f32(single(a), single(b), $max, $nan).to_bits()))
            }
        };
    }
    Ok(match (max, nan) {
        (false, false) => instance!(false, false),
        (false, true) => instance!(false, true),
        (true, false) => instance!(true, false),
        (true, true) => instance!(true, true),
    })
}

/// An approximate function, with or without flushing of subnormals.
macro_rules! approximate {
    ($name:ident, |$x:ident| $value:expr) => {
        pub(crate) fn $name(flush: bool) -> Unary {
            fn of(x: f32) -> f32 {
                let $x = f64::from(x);
                $value as f32
            }
            if flush {
                unary!(|a| u64::from(flushed(of(flushed(single(a)))).to_bits()))
            } else {
                unary!(|a| u64::from(of(single(a)).to_bits()))
            }
        }
    };
}

approximate!(ex2, |x| x.exp2());
approximate!(lg2, |x| x.log2());
approximate!(sin, |x| x.sin());
approximate!(cos, |x| x.cos());
approximate!(tanh, |x| x.tanh());
approximate!(rsqrt, |x| 1.0 / x.sqrt());

pub(crate) fn neg_single(flush: bool) -> Unary {
    if flush {
        unary!(|a| u64::from((-flushed(single(a))).to_bits()))
    } else {
        unary!(|a| u64::from((-single(a)).to_bits()))
    }
}

pub(crate) fn abs_single(flush: bool) -> Unary {
    if flush {
        unary!(|a| u64::from(flushed(single(a)).abs().to_bits()))
    } else {
        unary!(|a| u64::from(single(a).abs().to_bits()))
    }
}

/// The size of `b` with the sign of `a`.
pub(crate) fn copysign_single() -> Binary {
    binary!(|a, b| u64::from(single(b).copysign(single(a)).to_bits()))
}

pub(crate) fn copysign_double() -> Binary {
    binary!(|a, b| double(b).copysign(double(a)).to_bits())
}

/// Doubles round to nearest only; kernels use them for little more than constants.
pub(crate) fn double_binary(name: &str) -> Option<Binary> {
    Some(match name {
        "add" => binary!(|a, b| (double(a) + double(b)).to_bits()),
        "sub" => binary!(|a, b| (double(a) - double(b)).to_bits()),
        "mul" => binary!(|a, b| (double(a) * double(b)).to_bits()),
        "div" => binary!(|a, b| (double(a) / double(b)).to_bits()),
        "min" => binary!(|a, b| double(a).min(double(b)).to_bits()),
        "max" => binary!(|a, b| double(a).max(double(b)).to_bits()),
        _ => return None,
    })
}

pub(crate) fn double_unary(name: &str) -> Option<Unary> {
    Some(match name {
        "neg" => unary!(|a| (-double(a)).to_bits()),
        "abs" => unary!(|a| double(a).abs().to_bits()),
        "sqrt" => unary!(|a| double(a).sqrt().to_bits()),
        "rcp" => unary!(|a| (1.0 / double(a)).to_bits()),
        "rsqrt" => unary!(|a| (1.0 / double(a).sqrt()).to_bits()),
        _ => return None,
    })
}

pub(crate) fn fma_double() -> Ternary {
    ternary!(|a, b, c| double(a).mul_add(double(b), double(c)).to_bits())
}
