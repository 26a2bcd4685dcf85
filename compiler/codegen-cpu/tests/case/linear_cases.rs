//! Launches of `linear`: every format, epilogue and row tile over odd shapes.

use super::{Arg, Case, Check, Random, bytes_of};
use attar_artifact::manifest::KvType;
use attar_format::described::Codes;
use attar_format::{Description, Encoded, FormatRef, Scale, Value, formats};
use attar_kernel::{
    ActInt8Layout, Activation, Epilogue, KernelSpec, LinearSpec, QkvEpilogue, RowTile, reference,
};

pub(crate) fn weights(random: &mut Random, format: FormatRef, n: usize, k: usize) -> Encoded {
    if format.is_uncompressed() {
        return Encoded::from_f32(format, n, k, &random.f32s(n * k, 0.2)).unwrap();
    }
    let mut e = Encoded::zeros(format, n, k).unwrap();
    for c in &mut e.codes {
        *c = match format.value {
            Value::Table(table) => random.below(1 << table.bits) as u8,
            _ => (random.below(255) as i32 - 127) as i8 as u8,
        };
    }
    for f in &mut e.field {
        *f = match format.scale {
            Scale::RowF32Field8 { .. } => random.below(256) as u16,
            _ => half::bf16::from_f32(0.0005 + 0.001 * random.unit().abs()).to_bits(),
        };
    }
    for s in &mut e.row_scale {
        *s = 1e-5 * (1.5 + random.unit());
    }
    e
}

/// Activations as the format wants them: `rows` rows of `k`.
pub(crate) fn activations(random: &mut Random, format: FormatRef, rows: usize, k: usize) -> Vec<u8> {
    let x = random.f32s(rows * k, 2.0);
    encoded(&x, format, rows, k)
}

/// Given values as activations of a format.
fn encoded(x: &[f32], format: FormatRef, rows: usize, k: usize) -> Vec<u8> {
    if !format.wants_int8_activations() {
        return bytes_of(x);
    }
    let layout = ActInt8Layout::new(k);
    let out = vec![0u64; rows * layout.stride / 8];
    let args = [x.as_ptr() as u64, out.as_ptr() as u64];
    // SAFETY: both buffers are as large as the spec says.
    unsafe { reference::run(&KernelSpec::Quantize { dim: k }, &args, 0..rows as u64) };
    bytes_of(&out)
}

/// A launch over `rows` rows.
pub(crate) fn case(seed: u64, spec: LinearSpec, rows: usize) -> Case {
    let mut random = Random(seed);
    let mut args = vec![
        Arg::Input(activations(&mut random, spec.format, rows, spec.k)),
        Arg::Input(weights(&mut random, spec.format, spec.n, spec.k).pack().unwrap()),
    ];
    if spec.bias {
        args.push(Arg::Input(bytes_of(&random.f32s(spec.n, 1.0))));
    }
    // Sums of up to a few hundred products of size one, in f32: errors of a few 1e-6.
    let close = Check::F32 { abs: 2e-5, rel: 2e-5 };
    let blank = |len: usize| vec![0x77; len];
    match &spec.epilogue {
        Epilogue::Store => args.push(Arg::Output(blank(rows * spec.n * 4), close)),
        Epilogue::Residual => {
            args.push(Arg::Input(bytes_of(&random.f32s(rows * spec.n, 3.0))));
            args.push(Arg::Output(blank(rows * spec.n * 4), close));
        }
        Epilogue::Swiglu { width, out: Activation::Int8 } => {
            let layout = ActInt8Layout::new(*width);
            // Bytes between rows' parts are not written.
            args.push(Arg::Output(vec![0; rows * layout.stride], Check::Int8 { dim: *width, slack: 1 }));
        }
        Epilogue::Swiglu { width, out: Activation::F32 } => {
            let close = Check::F32 { abs: 5e-5, rel: 5e-5 };
            args.push(Arg::Output(blank(rows * width * 4), close));
        }
        Epilogue::Qkv(q) => {
            if q.qk_norm.is_some() {
                args.push(Arg::Input(bytes_of(&random.f32s(q.head_dim, 2.0))));
                args.push(Arg::Input(bytes_of(&random.f32s(q.head_dim, 2.0))));
            }
            let angles = random.f32s(rows * q.head_dim, 1.0);
            args.push(Arg::Input(bytes_of(&angles)));
            // Three sequences, one page after the other of each in descending order.
            let (sequences, pages_each) = (3, rows / q.page_len + 2);
            let positions: Vec<i32> = (0..rows as i32).map(|r| r + 1).collect();
            let seqs: Vec<i32> = (0..rows as i32).map(|r| r % sequences).collect();
            let pages = sequences as usize * pages_each;
            let tables: Vec<u32> = (0..pages as u32).rev().collect();
            args.push(Arg::Input(bytes_of(&positions)));
            args.push(Arg::Input(bytes_of(&seqs)));
            args.push(Arg::Input(bytes_of(&tables)));
            args.push(Arg::Number(pages_each as u64));
            let cache = vec![
                0;
                pages.next_multiple_of(KvType::RUN)
                    * q.kv_heads
                    * q.kv.block_bytes(q.head_dim, q.page_len)
            ];
            let check = match q.kv {
                KvType::F32 => Check::F32 { abs: 5e-5, rel: 5e-5 },
                // A unit of rounding, and the flush of subnormals.
                KvType::F16 => Check::F16 { abs: 1e-4, rel: 1e-3 },
                kv => Check::Cache { kv, head_dim: q.head_dim, page_len: q.page_len, slack: 1 },
            };
            args.push(Arg::Output(cache.clone(), check));
            args.push(Arg::Output(cache, check));
            let out = blank(rows * q.heads * q.head_dim * 4);
            args.push(Arg::Output(out, Check::F32 { abs: 5e-5, rel: 5e-5 }));
        }
    }
    args.push(Arg::Number(rows as u64));
    args.push(Arg::Number(1024));
    let grid = spec.items() as u64;
    Case { spec: KernelSpec::Linear(spec), args, grid }
}

/// `(epilogue, N)` pairs; `wide` ones have N that is no multiple of 16 where that is allowed.
pub(crate) fn epilogues() -> Vec<(Epilogue, usize)> {
    let qkv = |heads, kv_heads, head_dim, qk_norm, kv| {
        let epilogue = QkvEpilogue { heads, kv_heads, head_dim, qk_norm, kv, page_len: 32 };
        (Epilogue::Qkv(epilogue), (heads + 2 * kv_heads) * head_dim)
    };
    vec![
        (Epilogue::Store, 35),
        (Epilogue::Store, 16),
        (Epilogue::Residual, 21),
        (Epilogue::Swiglu { width: 22, out: Activation::F32 }, 64),
        (Epilogue::Swiglu { width: 16, out: Activation::F32 }, 32),
        (Epilogue::Swiglu { width: 64, out: Activation::Int8 }, 128),
        (Epilogue::Store, 96),
        qkv(3, 1, 16, None, KvType::F16),
        qkv(2, 2, 48, Some(1e-6), KvType::F32),
        qkv(2, 1, 32, None, KvType::Int8),
        qkv(1, 2, 48, None, KvType::Int4),
        qkv(2, 1, 64, None, KvType::F16),
        qkv(1, 1, 32, None, KvType::F32),
    ]
}

/// The built-in formats, and kinds that are only ever described: tables with bf16 scales, other biases and choices.
pub(crate) fn every_kind() -> Vec<FormatRef> {
    let mut all = formats::ALL.to_vec();
    for (bits, shift, scale) in [
        (4, 0, Scale::Bf16),
        (3, 0, Scale::Bf16),
        (6, 0, Scale::Bf16),
        (4, 5, Scale::RowF32Field8 { bias: 16, choice_bits: 2 }),
        (2, 0, Scale::RowF32Field8 { bias: 0, choice_bits: 2 }),
    ] {
        let most = (1i32 << bits) - 1;
        let entries = (0..=most).map(|i| (-100 + 200 * i / most) as i8).collect();
        let described = Description {
            name: format!("kind{bits}_{shift}_{}", u8::from(scale == Scale::Bf16)),
            source: "a test".to_owned(),
            codes: Codes::Table { bits, entries, shift },
            group: 32,
            scale,
        };
        all.push(described.register().expect("a format"));
    }
    all
}

/// Every combination, small.
pub(crate) fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut seed = 0;
    for format in every_kind() {
        let ks: &[usize] = if format.group == 1 { &[33, 96, 5] } else { &[96, 32, 352] };
        for (e, (epilogue, n)) in epilogues().into_iter().enumerate() {
            let k = ks[e % ks.len()];
            for rows in [RowTile::One, RowTile::Small, RowTile::Many] {
                let counts: &[usize] = match rows {
                    RowTile::One => &[1],
                    RowTile::Small => &[1, 2, 7, 16],
                    RowTile::Many => &[3, 17, 33],
                };
                for &count in counts {
                    seed += 1;
                    let bias = seed % 2 == 0;
                    let spec = LinearSpec { format, n, k, rows, bias, epilogue: epilogue.clone() };
                    cases.push(case(seed, spec, count));
                }
            }
        }
    }
    cases
}

/// Row counts at the edges of tiles and chunks.
const COUNTS: [usize; 21] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 63, 64, 65, 512];

/// Shapes that are multiples of nothing, in numbers that are too large for slow emulators: K of 32 times an odd number,
/// N not a multiple of 16, many row counts.
pub(crate) fn odd_shapes() -> Vec<Case> {
    let mut cases = Vec::new();
    let mut seed = 1000;
    for format in formats::ALL {
        for (i, k) in [32, 96, 160, 352, 800].into_iter().enumerate() {
            let (epilogue, n) = epilogues().swap_remove([0, 2, 3, 5, 8][i]);
            for count in COUNTS {
                // The largest count is for the smaller matrices.
                if count == 512 && k > 160 {
                    continue;
                }
                let all = [RowTile::One, RowTile::Small, RowTile::Many];
                let rows = match count {
                    1 => all[i % 3],
                    2..=16 => all[1 + (count + i) % 2],
                    _ => RowTile::Many,
                };
                seed += 1;
                let spec = LinearSpec { format, n, k, rows, bias: seed % 3 == 0, epilogue: epilogue.clone() };
                cases.push(case(seed, spec, count));
            }
        }
    }
    cases
}

/// Rows of activations that are all zero, zero but for one, or subnormal, or hold a NaN or an infinity, among usual ones.
pub(crate) fn special_rows() -> Vec<Case> {
    let (n, k) = (35, 96);
    let mut cases = Vec::new();
    for format in formats::ALL {
        for (rows, count) in
            [(RowTile::One, 1), (RowTile::Small, 13), (RowTile::Many, 13), (RowTile::Many, 40)]
        {
            // With one row, each kind has its turn.
            for turn in 0..if count == 1 { SPECIALS } else { 1 } {
                let spec = LinearSpec { format, n, k, rows, bias: false, epilogue: Epilogue::Store };
                let mut case = case(77, spec, count);
                let mut x = Random(78).f32s(count * k, 2.0);
                for (r, row) in x.chunks_mut(k).enumerate() {
                    make_special(row, r + turn);
                }
                case.args[0] = Arg::Input(encoded(&x, format, count, k));
                cases.push(case);
            }
        }
    }
    cases
}

/// Kinds of rows.
const SPECIALS: usize = 8;

fn make_special(row: &mut [f32], kind: usize) {
    match kind % SPECIALS {
        1 => row.fill(0.0),
        2 => row.iter_mut().for_each(|v| *v *= 1e-39),
        3 => row[37] = f32::NAN,
        4 => row[64] = f32::INFINITY,
        5 => row[..32].fill(0.0),
        6 => {
            row[40] = f32::NEG_INFINITY;
            row[41] = f32::INFINITY;
        }
        7 => {
            row.fill(0.0);
            row[50] = 1e3;
        }
        _ => {}
    }
}
