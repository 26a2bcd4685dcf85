//! Launches of every kernel but the matrix products, over shapes that are multiples of nothing in particular.

use super::linear_cases::weights;
use super::{Arg, Case, Check, Random, bytes_of};
use attar_format::formats;
use attar_kernel::{ActInt8Layout, Activation, Elementwise, KernelSpec};

pub(super) fn floats(random: &mut Random, count: usize) -> Vec<f32> {
    random.f32s(count, 2.0)
}

pub(super) fn input(values: &[f32]) -> Arg {
    Arg::Input(bytes_of(values))
}

pub(super) fn ints(values: &[i32]) -> Arg {
    Arg::Input(bytes_of(values))
}

pub(super) fn output(count: usize, tolerance: f32) -> Arg {
    Arg::Output(vec![0; count * 4], Check::F32 { abs: tolerance, rel: tolerance })
}

/// All of them.
pub(crate) fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    let r = &mut Random(7);
    for format in formats::ALL {
        for dim in [96, 50] {
            if dim % format.group != 0 {
                continue;
            }
            let table = weights(r, format, 37, dim).pack().unwrap();
            cases.push(Case {
                spec: KernelSpec::Embed { format, vocab: 37, dim },
                args: vec![ints(&[0, 36, 5, 16, 15]), Arg::Input(table), output(5 * dim, 0.0)],
                grid: 5,
            });
        }
    }
    for (dim, gain, out) in [
        (576, true, Activation::Int8),
        (96, false, Activation::Int8),
        (576, true, Activation::F32),
        (70, true, Activation::F32),
        (3, false, Activation::F32),
    ] {
        let mut args = vec![input(&floats(r, 3 * dim))];
        if gain {
            args.push(input(&floats(r, dim)));
        }
        args.push(match out {
            Activation::F32 => output(3 * dim, 2e-6),
            Activation::Int8 => {
                Arg::Output(vec![0; 3 * ActInt8Layout::new(dim).stride], Check::Int8 { dim, slack: 1 })
            }
        });
        cases.push(Case { spec: KernelSpec::RmsNorm { dim, eps: 1e-5, gain, out }, args, grid: 3 });
    }
    let mut x = floats(r, 4 * 96);
    x[32..64].fill(0.0);
    x[100] = 1e30;
    x[200] = -1e-30;
    x[300] = f32::NAN;
    x[340] = f32::INFINITY;
    let codes = Arg::Output(vec![0; 4 * ActInt8Layout::new(96).stride], Check::Int8 { dim: 96, slack: 0 });
    cases.push(Case { spec: KernelSpec::Quantize { dim: 96 }, args: vec![input(&x), codes], grid: 4 });
    for dim in [64, 70, 3] {
        let args = vec![
            input(&floats(r, 2 * dim)),
            input(&floats(r, dim)),
            input(&floats(r, dim)),
            output(2 * dim, 1e-5),
        ];
        cases.push(Case { spec: KernelSpec::LayerNorm { dim, eps: 1e-5 }, args, grid: 2 });
        let args = vec![input(&floats(r, 2 * dim)), output(2 * dim, 1e-6)];
        cases.push(Case { spec: KernelSpec::Softmax { dim }, args, grid: 2 });
        for op in [Elementwise::Add, Elementwise::Mul, Elementwise::Silu, Elementwise::Gelu] {
            let mut args = vec![input(&floats(r, 2 * dim))];
            if matches!(op, Elementwise::Add | Elementwise::Mul) {
                args.push(input(&floats(r, 2 * dim)));
            }
            args.push(output(2 * dim, 1e-6));
            cases.push(Case { spec: KernelSpec::Elementwise { op, dim }, args, grid: 2 });
        }
        let args = vec![input(&floats(r, 5 * dim)), ints(&[4, 0, 2]), output(3 * dim, 0.0)];
        cases.push(Case { spec: KernelSpec::GatherRows { dim }, args, grid: 3 });
        let args = vec![input(&floats(r, 2 * dim)), output(2 * (dim - 2), 0.0)];
        cases.push(Case { spec: KernelSpec::Slice { dim, start: 1, len: dim - 2 }, args, grid: 2 });
    }
    for (heads, head_dim) in [(3, 64), (2, 16), (2, 12)] {
        let n = 3 * heads * head_dim;
        let args = vec![input(&floats(r, n)), input(&floats(r, 3 * head_dim)), output(n, 1e-6)];
        cases.push(Case { spec: KernelSpec::Rope { heads, head_dim }, args, grid: 3 });
    }
    cases
}
