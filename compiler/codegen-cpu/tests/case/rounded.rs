//! Comparison of results whose operands were rounded to 16 bits: what tile products give.

use super::{Case, Check, cache_codes, f32s};
use attar_artifact::manifest::KvType;
use attar_kernel::ActInt8Layout;

/// What errors are expected of results, relative to their usual size.
#[derive(Clone, Copy)]
pub(crate) struct Rounding {
    /// The root of their mean square.
    mean: f32,
    largest: f32,
}

impl Rounding {
    /// Either factor of each product is off by 2^-9 at most, evenly spread, so a sum of products with signs at random is off
    /// by 2^-9 * sqrt(2 / 3) of its own size, the root of the mean square over many sums: 0.16 %. Epilogues multiply such
    /// sums with each other; a sixfold leaves room for them. The largest of many thousand errors is some five times their
    /// root mean square, and of products of such sums some thirty times.
    pub(crate) const BF16: Rounding = Rounding { mean: 0.01, largest: 0.06 };
    /// As [`Rounding::BF16`], for products of f16, which has three bits more.
    pub(crate) const F16_PRODUCTS: Rounding = Rounding { mean: 0.01 / 8.0, largest: 0.06 / 8.0 };
    /// Attention with queries and weights in f16, which has eleven bits: either is off by 2^-11 at most. A score, of some units,
    /// is off by as much as a sum of such products, and changes its weight by a factor of 2^error; what comes of both in sums of
    /// values with signs at random is 2^-12 of their size. A result has few large weights, so the largest error is some ten
    /// times that.
    pub(crate) const F16: Rounding = Rounding { mean: 0.0006, largest: 0.004 };
}

impl Case {
    /// As [`Case::check`], for operands that were rounded.
    pub(crate) fn check_rounded(&self, what: &str, want: &[Vec<u8>], got: &[Vec<u8>], rounding: Rounding) {
        let checks = self.args.iter().filter_map(|a| match a {
            super::Arg::Output(_, check) => Some(*check),
            _ => None,
        });
        for (o, ((want, got), check)) in want.iter().zip(got).zip(checks).enumerate() {
            let at = format!("{what}: {}: output {o}", self.spec.name());
            assert_eq!(want.len(), got.len(), "{at}");
            for (want, got) in values(check, want).iter().zip(values(check, got)) {
                near(&at, want, &got, rounding);
            }
        }
    }
}

/// Numbers of one kind, and how far apart those are that can be written.
struct Numbers {
    values: Vec<f32>,
    steps: Vec<f32>,
}

impl From<Vec<f32>> for Numbers {
    fn from(values: Vec<f32>) -> Numbers {
        Numbers { steps: vec![0.0; values.len()], values }
    }
}

/// An output's numbers.
fn values(check: Check, bytes: &[u8]) -> Vec<Numbers> {
    let codes = |bytes: &[u8]| -> Vec<f32> { bytes.iter().map(|c| f32::from(*c as i8)).collect() };
    match check {
        Check::Bytes => vec![bytes.iter().map(|b| f32::from(*b)).collect::<Vec<f32>>().into()],
        Check::F32 { .. } => vec![f32s(bytes).into()],
        Check::F16 { .. } => {
            let pairs = bytes.chunks_exact(2);
            let values: Vec<f32> = pairs.map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f32()).collect();
            vec![values.into()]
        }
        Check::Int8 { dim, .. } => {
            let layout = ActInt8Layout::new(dim);
            let (mut values, mut steps) = (Vec::new(), Vec::new());
            for row in bytes.chunks(layout.stride) {
                let scales = f32s(&row[layout.scales_offset..layout.sums_offset]);
                for (group, scale) in row[..dim].chunks(ActInt8Layout::GROUP).zip(scales) {
                    values.extend(codes(group).iter().map(|c| c * scale));
                    steps.extend([scale; ActInt8Layout::GROUP]);
                }
            }
            vec![Numbers { values, steps }]
        }
        Check::Cache { kv, head_dim, page_len, .. } => {
            let block = kv.block_bytes(head_dim, page_len);
            let scales = kv.scales_offset(head_dim, page_len);
            let blocks = || bytes.chunks(block);
            let mut codes: Vec<f32> = blocks().flat_map(|b| codes(&cache_codes(kv, &b[..scales]))).collect();
            let mut scales: Vec<f32> = blocks().flat_map(|b| f32s(&b[scales..])).collect();
            if kv == KvType::Int4 {
                // Where the largest number and the smallest are of nearly one size, rounding decides about all signs.
                codes.iter_mut().for_each(|c| *c = (*c - 8.0).abs());
                scales.iter_mut().for_each(|s| *s = s.abs());
            }
            vec![Numbers { steps: vec![1.0; codes.len()], values: codes }, scales.into()]
        }
    }
}

fn near(at: &str, want: &Numbers, got: &Numbers, rounding: Rounding) {
    let counts = |w: &f32| w.is_finite() && *w != 0.0;
    let size = root_mean_square(want.values.iter().copied().filter(counts));
    let step = root_mean_square(want.steps.iter().copied().filter(counts));
    let pairs = || want.values.iter().zip(&got.values);
    for (i, ((w, g), step)) in pairs().zip(&want.steps).enumerate() {
        let most = rounding.largest * (size + w.abs()) + step;
        let same = if w.is_finite() { (w - g).abs() <= most } else { !g.is_finite() };
        assert!(same, "{at} element {i}: want {w}, got {g}, usual size {size}");
    }
    let error = root_mean_square(pairs().filter(|(w, _)| counts(w)).map(|(w, g)| w - g));
    assert!(error <= rounding.mean * size + step, "{at}: errors of {error} in values of {size}");
}

fn root_mean_square(values: impl Iterator<Item = f32>) -> f32 {
    let (sum, count) = values.fold((0.0, 0), |(s, n), v| (s + f64::from(v) * f64::from(v), n + 1));
    (sum / f64::from(count.max(1))).sqrt() as f32
}
