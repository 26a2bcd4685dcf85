//! Matrix products and their epilogues.

use super::attention::{CacheArgs, Shape, rotate};
use super::norm::{rms_factor, store_int8_part};
use super::{Args, elementwise::silu};
use crate::spec::{ActInt8Layout, Activation, Epilogue, LinearSpec};
use attar_format::{CHANNELS, Encoded, PackedLayout};

/// # Safety
/// As [`super::run`].
pub(super) unsafe fn linear(spec: &LinearSpec, args: Args<'_>, item: usize) {
    let layout = PackedLayout::new(spec.format, spec.n, spec.k).expect("the spec's shape fits its format");
    // SAFETY: the caller's contract.
    let packed = unsafe { args.values::<u8>(1, 0, layout.total_bytes()) };
    let weights = Encoded::unpack(spec.format, spec.n, spec.k, packed).expect("lengths agree");
    let first = 2 + usize::from(spec.bias);
    let rows = args.number(args.0.len() - 2);
    for m in 0..rows {
        // SAFETY: the caller's contract.
        let sum = |n: usize| unsafe {
            let bias = if spec.bias { f64::from(args.values::<f32>(2, n, 1)[0]) } else { 0.0 };
            dot(spec, &weights, args, m, n) + bias
        };
        match &spec.epilogue {
            Epilogue::Store | Epilogue::Residual => {
                let residual = spec.epilogue == Epilogue::Residual;
                let channels = spec.blocks_per_item() * CHANNELS;
                for n in (item * channels..(item + 1) * channels).take_while(|n| *n < spec.n) {
                    let at = m * spec.n + n;
                    // SAFETY: the caller's contract.
                    unsafe {
                        let r = if residual { f64::from(args.values::<f32>(first, at, 1)[0]) } else { 0.0 };
                        args.values_mut::<f32>(first + usize::from(residual), at, 1)[0] = (r + sum(n)) as f32;
                    }
                }
            }
            Epilogue::Swiglu { width, out: Activation::Int8 } => {
                const GROUP: usize = ActInt8Layout::GROUP;
                let y: [f32; GROUP] = std::array::from_fn(|i| {
                    let pair = item * GROUP / CHANNELS + i / CHANNELS;
                    let gate = 2 * pair * CHANNELS + i % CHANNELS;
                    (silu(sum(gate)) * sum(gate + CHANNELS)) as f32
                });
                // SAFETY: the caller's contract.
                unsafe { store_int8_part(&y, *width, item * GROUP, args, first, m) };
            }
            Epilogue::Swiglu { width, out: Activation::F32 } => {
                for f in (item * CHANNELS..(item + 1) * CHANNELS).take_while(|f| f < width) {
                    let gate = 2 * item * CHANNELS + f % CHANNELS;
                    let y = silu(sum(gate)) * sum(gate + CHANNELS);
                    // SAFETY: the caller's contract.
                    unsafe { args.values_mut::<f32>(first, m * width + f, 1)[0] = y as f32 };
                }
            }
            Epilogue::Qkv(q) => {
                let dh = q.head_dim;
                let shape = Shape { kv_heads: q.kv_heads, head_dim: dh, kv: q.kv, page_len: q.page_len };
                let mut x: Vec<f64> = (item * dh..(item + 1) * dh).map(sum).collect();
                let rope_slot = first + 2 * usize::from(q.qk_norm.is_some());
                let is_value = item >= q.heads + q.kv_heads;
                if !is_value {
                    if let Some(eps) = q.qk_norm {
                        let narrow: Vec<f32> = x.iter().map(|v| *v as f32).collect();
                        let inverse = rms_factor(&narrow, f64::from(eps));
                        // SAFETY: the caller's contract.
                        let gain = unsafe { args.values::<f32>(first + usize::from(item >= q.heads), 0, dh) };
                        x.iter_mut().zip(gain).for_each(|(x, g)| *x *= inverse * f64::from(*g));
                    }
                    // SAFETY: the caller's contract.
                    rotate(&mut x, unsafe { args.values::<f32>(rope_slot, m * dh, dh) });
                }
                // SAFETY: the caller's contract.
                unsafe {
                    if item < q.heads {
                        let out = args.values_mut::<f32>(rope_slot + 7, (m * q.heads + item) * dh, dh);
                        out.iter_mut().zip(x).for_each(|(o, v)| *o = v as f32);
                    } else {
                        let head = (item - q.heads) % q.kv_heads;
                        CacheArgs(rope_slot + 1).store(&shape, args, m, head, is_value, &x);
                    }
                }
            }
        }
    }
}

/// `sum_k x[m, k] w[n, k]`.
///
/// # Safety
/// As [`super::run`].
unsafe fn dot(spec: &LinearSpec, w: &Encoded, args: Args<'_>, m: usize, n: usize) -> f64 {
    if !spec.format.wants_int8_activations() {
        // SAFETY: the caller's contract.
        let x = unsafe { args.values::<f32>(0, m * spec.k, spec.k) };
        let mut row = vec![0.0; spec.k];
        w.decode_row(n, &mut row);
        return x.iter().zip(row).map(|(x, w)| f64::from(*x) * f64::from(w)).sum();
    }
    let layout = ActInt8Layout::new(spec.k);
    let base = m * layout.stride;
    // SAFETY: the caller's contract.
    let (codes, scales) = unsafe {
        (
            args.values::<i8>(0, base, spec.k),
            args.values::<f32>(0, (base + layout.scales_offset) / 4, layout.groups),
        )
    };
    let mut total = 0.0;
    for (g, scale_x) in scales.iter().enumerate() {
        let (scale, shift) = w.scale(n, g);
        let span = g * ActInt8Layout::GROUP..(g + 1) * ActInt8Layout::GROUP;
        let wide = |c: u8| w.integer(c) + shift;
        let weights = &w.codes[n * spec.k..(n + 1) * spec.k][span.clone()];
        let sum: i32 = weights.iter().zip(&codes[span]).map(|(w, x)| wide(*w) * i32::from(*x)).sum();
        total += f64::from(scale) * f64::from(*scale_x) * f64::from(sum);
    }
    total
}
