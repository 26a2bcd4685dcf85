//! Elementwise kernels.

use super::Args;
use crate::spec::Elementwise;

/// # Safety
/// As [`super::run`].
pub(super) unsafe fn elementwise(op: Elementwise, dim: usize, args: Args<'_>, t: usize) {
    // SAFETY: the caller's contract.
    unsafe {
        let a = args.values::<f32>(0, t * dim, dim);
        match op {
            Elementwise::Add | Elementwise::Mul => {
                let b = args.values::<f32>(1, t * dim, dim);
                let out = args.values_mut::<f32>(2, t * dim, dim);
                for i in 0..dim {
                    out[i] = if op == Elementwise::Add { a[i] + b[i] } else { a[i] * b[i] };
                }
            }
            Elementwise::Silu | Elementwise::Gelu => {
                let out = args.values_mut::<f32>(1, t * dim, dim);
                for i in 0..dim {
                    let x = f64::from(a[i]);
                    out[i] = if op == Elementwise::Silu { silu(x) } else { gelu(x) } as f32;
                }
            }
        }
    }
}

/// `x / (1 + exp(-x))`.
pub(super) fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// `x/2 (1 + erf(x / sqrt 2))`.
fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + erf(x * std::f64::consts::FRAC_1_SQRT_2))
}

/// Error function by its Taylor series near zero and a continued fraction for the complement elsewhere.
fn erf(x: f64) -> f64 {
    let a = x.abs();
    let value = if a < 2.5 {
        let (mut term, mut sum, mut n) = (a, a, 0.0);
        while term.abs() > 1e-17 * sum.abs() {
            n += 1.0;
            term *= -a * a / n;
            sum += term / (2.0 * n + 1.0);
        }
        sum * std::f64::consts::FRAC_2_SQRT_PI
    } else {
        let fraction = (1..=60).rev().fold(0.0, |f, k| f64::from(k) / 2.0 / (a + f));
        1.0 - (-a * a).exp() / (a + fraction) * std::f64::consts::FRAC_2_SQRT_PI / 2.0
    };
    value.copysign(x)
}

#[cfg(test)]
mod tests {
    use super::erf;

    #[test]
    fn erf_has_its_published_values() {
        // Abramowitz & Stegun, table 7.1.
        for (x, y) in
            [(0.5, 0.520_499_877_8), (1.0, 0.842_700_792_9), (2.0, 0.995_322_265_0), (3.0, 0.999_977_909_5)]
        {
            assert!((erf(x) - y).abs() < 1e-9, "erf({x}) = {}", erf(x));
            assert!((erf(-x) + y).abs() < 1e-9);
        }
    }
}
