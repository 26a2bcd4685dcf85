//! Floating-point formats of 16 bits and fewer, and correct rounding into them from any of the four directions.

/// A binary format narrower than `f32`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Small {
    /// Bits of the stored mantissa.
    pub(crate) mantissa: u32,
    /// Exponent of the smallest normal number.
    pub(crate) min_exponent: i32,
    /// Code of the largest finite number, without sign.
    pub(crate) max_finite: u32,
    /// Code of infinity, where there is one.
    pub(crate) infinity: Option<u32>,
    /// The canonical NaN.
    pub(crate) nan: u32,
    /// Position of the sign.
    pub(crate) sign: u32,
}

pub(crate) const F16: Small = Small {
    mantissa: 10,
    min_exponent: -14,
    max_finite: 0x7bff,
    infinity: Some(0x7c00),
    nan: 0x7fff,
    sign: 15,
};
pub(crate) const BF16: Small = Small {
    mantissa: 7,
    min_exponent: -126,
    max_finite: 0x7f7f,
    infinity: Some(0x7f80),
    nan: 0x7fff,
    sign: 15,
};
pub(crate) const E4M3: Small =
    Small { mantissa: 3, min_exponent: -6, max_finite: 0x7e, infinity: None, nan: 0x7f, sign: 7 };
pub(crate) const E5M2: Small =
    Small { mantissa: 2, min_exponent: -14, max_finite: 0x7b, infinity: Some(0x7c), nan: 0x7f, sign: 7 };

/// Direction of rounding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rounding {
    /// To nearest, ties to even.
    Nearest,
    /// To nearest, ties away from zero.
    NearestAway,
    Zero,
    Down,
    Up,
}

/// `integer + fraction` for a magnitude, rounded; `negative` turns the directions around.
fn round_magnitude(integer: u64, fraction: f64, rounding: Rounding, negative: bool) -> u64 {
    let up = match rounding {
        Rounding::Nearest => fraction > 0.5 || (fraction == 0.5 && integer & 1 == 1),
        Rounding::NearestAway => fraction >= 0.5,
        Rounding::Zero => false,
        Rounding::Down => negative && fraction > 0.0,
        Rounding::Up => !negative && fraction > 0.0,
    };
    integer + u64::from(up)
}

impl Small {
    /// The code of `x`. Overflow gives infinity where there is one and the direction leads there; with
    /// `saturate`, or without infinity, the largest finite number.
    pub(crate) fn encode(&self, x: f64, rounding: Rounding, saturate: bool) -> u32 {
        if x.is_nan() {
            return self.nan;
        }
        let sign = u32::from(x.is_sign_negative()) << self.sign;
        let size = x.abs();
        if size.is_infinite() {
            return sign
                | match self.infinity {
                    Some(infinity) if !saturate => infinity,
                    None if !saturate => self.nan,
                    _ => self.max_finite,
                };
        }
        if size == 0.0 {
            return sign;
        }
        // Subnormal doubles lie far below every quantum, and round as any tiny number does.
        let exponent = ((size.to_bits() >> 52) as i32 - 1023).max(self.min_exponent);
        let scaled = size * 2f64.powi(self.mantissa as i32 - exponent);
        let whole = scaled.floor();
        let rounded = round_magnitude(whole as u64, scaled - whole, rounding, x < 0.0) as u32;
        // A carry out of the mantissa goes into the exponent by itself.
        let code = ((exponent - self.min_exponent) as u32 * (1 << self.mantissa)) + rounded;
        if code <= self.max_finite {
            return sign | code;
        }
        let towards_zero = match rounding {
            Rounding::Nearest | Rounding::NearestAway => false,
            Rounding::Zero => true,
            Rounding::Down => x > 0.0,
            Rounding::Up => x < 0.0,
        };
        sign | match self.infinity {
            Some(infinity) if !saturate && !towards_zero => infinity,
            None if !saturate && !towards_zero => self.nan,
            _ => self.max_finite,
        }
    }

    /// The value of a code.
    pub(crate) fn decode(&self, code: u32) -> f64 {
        let sign = if code >> self.sign & 1 == 1 { -1.0 } else { 1.0 };
        let code = code & ((1 << self.sign) - 1);
        if code > self.max_finite {
            return if self.infinity == Some(code) { sign * f64::INFINITY } else { f64::NAN };
        }
        let mantissa = f64::from(code & ((1 << self.mantissa) - 1));
        let exponent = (code >> self.mantissa) as i32;
        let quantum = 2f64.powi(self.min_exponent - self.mantissa as i32);
        if exponent == 0 {
            return sign * mantissa * quantum;
        }
        sign * (mantissa + f64::from(1u32 << self.mantissa)) * quantum * 2f64.powi(exponent - 1)
    }
}

/// `x` as a single, rounded in any direction. `x` must be exact, or rounded to odd.
pub(crate) fn to_f32(x: f64, rounding: Rounding) -> f32 {
    let near = x as f32;
    let back = f64::from(near);
    match rounding {
        Rounding::Nearest => near,
        _ if back == x || x.is_nan() => near,
        Rounding::Zero => {
            if back.abs() > x.abs() {
                toward_zero(near)
            } else {
                near
            }
        }
        Rounding::Down => {
            if back > x {
                near.next_down()
            } else {
                near
            }
        }
        Rounding::Up => {
            if back < x {
                near.next_up()
            } else {
                near
            }
        }
        Rounding::NearestAway => {
            let (low, high) = if back < x { (near, near.next_up()) } else { (near.next_down(), near) };
            let middle = (f64::from(low) + f64::from(high)) / 2.0;
            if x == middle { if x > 0.0 { high } else { low } } else { near }
        }
    }
}

fn toward_zero(x: f32) -> f32 {
    if x > 0.0 { x.next_down() } else { x.next_up() }
}

/// `sum`, which is off by `error`, with its last bit set: rounding it once more gives what rounding the exact sum
/// would give (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
fn to_odd(sum: f64, error: f64) -> f64 {
    let bits = sum.to_bits();
    if error == 0.0 || !error.is_finite() || !sum.is_finite() || bits & 1 == 1 {
        return sum;
    }
    // Bits of a magnitude grow with it, whatever the sign.
    f64::from_bits(if (error > 0.0) == (sum > 0.0) { bits + 1 } else { bits - 1 })
}

/// `a + b`, rounded to odd.
pub(crate) fn add_odd(a: f64, b: f64) -> f64 {
    let sum = a + b;
    let from_b = sum - a;
    to_odd(sum, (a - (sum - from_b)) + (b - from_b))
}

/// `a * b + c` of singles or narrower, rounded to odd.
pub(crate) fn fma_odd(a: f64, b: f64, c: f64) -> f64 {
    add_odd(a * b, c)
}

/// `a / b` of singles, rounded to odd.
pub(crate) fn div_odd(a: f64, b: f64) -> f64 {
    let quotient = a / b;
    let rest = (-quotient).mul_add(b, a);
    to_odd(quotient, if b < 0.0 { -rest } else { rest })
}

/// The square root of a single, rounded to odd.
pub(crate) fn sqrt_odd(a: f64) -> f64 {
    let root = a.sqrt();
    to_odd(root, (-root).mul_add(root, a))
}

/// An integer as a double that rounds further as the integer itself would.
pub(crate) fn int_odd(magnitude: u64) -> f64 {
    let spare = (64 - magnitude.leading_zeros()).saturating_sub(52);
    let lost = magnitude & ((1 << spare) - 1) != 0;
    ((magnitude >> spare) << 1 | u64::from(lost)) as f64 * 2f64.powi(spare as i32 - 1)
}
