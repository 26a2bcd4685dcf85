//! Kernels that reduce a row: rms_norm, layer_norm, softmax, quantize.

use super::Args;
use crate::spec::{ActInt8Layout, Activation};

/// # Safety
/// As [`super::run`].
pub(super) unsafe fn rms_norm(dim: usize, eps: f32, gain: bool, out: Activation, args: Args<'_>, t: usize) {
    // SAFETY: the caller's contract.
    unsafe {
        let x = args.values::<f32>(0, t * dim, dim);
        let inverse = rms_factor(x, f64::from(eps));
        let row: Vec<f32> = if gain {
            let g = args.values::<f32>(1, 0, dim);
            x.iter().zip(g).map(|(x, g)| (f64::from(*x) * inverse * f64::from(*g)) as f32).collect()
        } else {
            x.iter().map(|x| (f64::from(*x) * inverse) as f32).collect()
        };
        let slot = 1 + usize::from(gain);
        match out {
            Activation::F32 => args.values_mut::<f32>(slot, t * dim, dim).copy_from_slice(&row),
            Activation::Int8 => store_int8(&row, args, slot, t),
        }
    }
}

/// `1 / sqrt(mean(x^2) + eps)`.
pub(super) fn rms_factor(x: &[f32], eps: f64) -> f64 {
    let squares: f64 = x.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
    1.0 / (squares / x.len() as f64 + eps).sqrt()
}

/// # Safety
/// As [`super::run`].
pub(super) unsafe fn layer_norm(dim: usize, eps: f32, args: Args<'_>, t: usize) {
    // SAFETY: the caller's contract.
    unsafe {
        let x = args.values::<f32>(0, t * dim, dim);
        let (g, b) = (args.values::<f32>(1, 0, dim), args.values::<f32>(2, 0, dim));
        let mean = x.iter().map(|v| f64::from(*v)).sum::<f64>() / dim as f64;
        let variance = x.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum::<f64>() / dim as f64;
        let inverse = 1.0 / (variance + f64::from(eps)).sqrt();
        let out = args.values_mut::<f32>(3, t * dim, dim);
        for i in 0..dim {
            out[i] = ((f64::from(x[i]) - mean) * inverse * f64::from(g[i]) + f64::from(b[i])) as f32;
        }
    }
}

/// # Safety
/// As [`super::run`].
pub(super) unsafe fn softmax(dim: usize, args: Args<'_>, t: usize) {
    // SAFETY: the caller's contract.
    unsafe {
        let x = args.values::<f32>(0, t * dim, dim);
        let largest = x.iter().fold(f64::NEG_INFINITY, |m, v| m.max(f64::from(*v)));
        let exps: Vec<f64> = x.iter().map(|v| (f64::from(*v) - largest).exp()).collect();
        let sum: f64 = exps.iter().sum();
        for (o, e) in args.values_mut::<f32>(1, t * dim, dim).iter_mut().zip(exps) {
            *o = (e / sum) as f32;
        }
    }
}

/// # Safety
/// As [`super::run`].
pub(super) unsafe fn quantize(dim: usize, args: Args<'_>, t: usize) {
    // SAFETY: the caller's contract.
    unsafe { store_int8(args.values::<f32>(0, t * dim, dim), args, 1, t) }
}

/// Writes row `t` of int8 activations.
///
/// # Safety
/// Slot `slot` must hold the address of int8 rows as wide as `row`.
unsafe fn store_int8(row: &[f32], args: Args<'_>, slot: usize, t: usize) {
    // SAFETY: the caller's contract.
    unsafe { store_int8_part(row, row.len(), 0, args, slot, t) }
}

/// Writes the channels from `first` on (whole groups) of row `t` of int8 activations that are `dim` wide.
///
/// # Safety
/// Slot `slot` must hold the address of int8 rows of width `dim`.
pub(super) unsafe fn store_int8_part(
    part: &[f32],
    dim: usize,
    first: usize,
    args: Args<'_>,
    slot: usize,
    t: usize,
) {
    let layout = ActInt8Layout::new(dim);
    for (g, group) in (first / ActInt8Layout::GROUP..).zip(part.chunks_exact(ActInt8Layout::GROUP)) {
        let (codes, scale) = quantize_group(group);
        let base = t * layout.stride;
        // SAFETY: the caller's contract; offsets are multiples of 4.
        unsafe {
            let out = args.values_mut::<i8>(slot, base + g * ActInt8Layout::GROUP, ActInt8Layout::GROUP);
            out.copy_from_slice(&codes);
            args.values_mut::<f32>(slot, (base + layout.scales_offset) / 4 + g, 1)[0] = scale;
            args.values_mut::<i32>(slot, (base + layout.sums_offset) / 4 + g, 1)[0] =
                codes.iter().map(|c| i32::from(*c)).sum();
        }
    }
}

/// Codes and scale of one group, in f32 arithmetic step by step as the contract says, so that compiled code agrees
/// bit for bit. A NaN or infinity makes the scale NaN.
pub(super) fn quantize_group(x: &[f32]) -> ([i8; ActInt8Layout::GROUP], f32) {
    let mut out = [0i8; ActInt8Layout::GROUP];
    let (codes, scale) = quantize_run(x);
    out.iter_mut().zip(codes).for_each(|(o, c)| *o = c);
    (out, scale)
}

/// Codes and scale of numbers that share it; see [`quantize_group`].
pub(super) fn quantize_run(x: &[f32]) -> (impl Iterator<Item = i8>, f32) {
    let amax = x.iter().fold(0.0f32, |m, v| if v.abs() > m { v.abs() } else { m });
    let inverse = if amax > 0.0 { 127.0 / amax } else { 0.0 };
    let codes = x.iter().map(move |v| {
        // Not `clamp`: NaN becomes -127 here, as in compiled code.
        let low = if v * inverse > -127.0 { v * inverse } else { -127.0 };
        (if low < 127.0 { low } else { 127.0 }).round_ties_even() as i8
    });
    let poison: f32 = x.iter().map(|v| v * 0.0).sum();
    (codes, amax / 127.0 + poison)
}
