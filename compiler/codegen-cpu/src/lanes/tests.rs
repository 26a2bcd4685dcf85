//! The emitter's operations on this machine, against plain Rust; kernels exercise them on the other targets.

use super::*;
use crate::blob::compile_body;
use crate::exec::ExecImage;

/// The targets this machine runs.
fn targets() -> Vec<Target> {
    Target::ALL.into_iter().filter(|t| t.runs_here()).collect()
}

/// Runs a body whose grid is `grid` items with the addresses of the buffers as arguments.
fn run(target: Target, args: &[u64], grid: u64, body: impl FnOnce(&mut Lanes<'_>)) {
    let blob = compile_body(target, body).unwrap();
    let image = ExecImage::load(&blob).unwrap();
    // SAFETY: the image is for this machine and the tests below pass live buffers.
    assert!(unsafe { image.call("body", args, 0, grid) });
}

/// `op` applied to `x`, four values at a time.
fn map(target: Target, x: &[f32], op: impl Fn(&mut Lanes<'_>, F32x4) -> F32x4) -> Vec<f32> {
    assert_eq!(x.len() % 4, 0);
    let mut out = vec![0.0f32; x.len()];
    let args = [x.as_ptr() as u64, out.as_mut_ptr() as u64];
    run(target, &args, x.len() as u64 / 4, |cx| {
        let (from, to) = (cx.arg(0), cx.arg(1));
        cx.for_items(|cx, i| {
            let (from, to) = (cx.offset(from, i, 16), cx.offset(to, i, 16));
            let v = cx.load4(from, 0);
            let v = op(cx, v);
            cx.store4(v, to, 0);
        });
    });
    out
}

/// Distance in units of the last place of `want`.
fn ulps(want: f64, got: f32) -> f64 {
    let near = want as f32;
    let unit = f64::from(f32::from_bits(near.abs().to_bits() + 1)) - f64::from(near.abs());
    (f64::from(got) - want).abs() / unit
}

fn sweep(low: f32, high: f32, n: usize) -> Vec<f32> {
    (0..n).map(|i| low + (high - low) * (i as f32 / (n - 1) as f32)).collect()
}

#[test]
fn exp_is_accurate_and_total() {
    for target in targets() {
        let x = sweep(-86.5, 88.7, 40_000);
        let worst = map(target, &x, |cx, v| cx.vexp(v))
            .iter()
            .zip(&x)
            .map(|(y, x)| ulps(f64::from(*x).exp(), *y))
            .fold(0.0, f64::max);
        assert!(worst <= 2.0, "{}: {worst} ulp", target.name());
        let edge = [f32::NEG_INFINITY, -1e30, -87.0, -0.0, 0.0, 88.8, f32::INFINITY, f32::NAN];
        let y = map(target, &edge, |cx, v| cx.vexp(v));
        assert_eq!(y[..7], [0.0, 0.0, 0.0, 1.0, 1.0, f32::INFINITY, f32::INFINITY]);
        assert!(y[7].is_nan());
    }
}

#[test]
fn silu_erf_and_gelu_are_accurate() {
    fn erf(x: f64) -> f64 {
        // Maclaurin series; converges everywhere, and cancels little below 4.
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        sum * std::f64::consts::FRAC_2_SQRT_PI
    }
    for target in targets() {
        let x = sweep(-4.0, 4.0, 10_000);
        let close = |name: &str, got: Vec<f32>, want: &dyn Fn(f64) -> f64, abs: f64| {
            for (x, y) in x.iter().zip(got) {
                let want = want(f64::from(*x));
                assert!((f64::from(y) - want).abs() <= abs, "{} {name}({x}) = {y}", target.name());
            }
        };
        close("erf", map(target, &x, |cx, v| cx.verf(v)), &erf, 7e-7);
        let gelu = |x: f64| x / 2.0 * (1.0 + erf(x * std::f64::consts::FRAC_1_SQRT_2));
        close("gelu", map(target, &x, |cx, v| cx.vgelu(v)), &gelu, 2e-6);
        let silu = |x: f64| x / (1.0 + (-x).exp());
        close("silu", map(target, &x, |cx, v| cx.vsilu(v)), &silu, 1e-6);
        let far = map(target, &[-200.0, -100.0, 100.0, f32::NAN], |cx, v| cx.vsilu(v));
        assert!(far[0] == 0.0 && far[1].abs() < 1e-30 && far[2] == 100.0 && far[3].is_nan(), "{far:?}");
        let far = map(target, &[-50.0, 50.0, -6.0, f32::NAN], |cx, v| cx.vgelu(v));
        assert!(far[0].abs() < 1e-5 && far[1] == 50.0 && far[2].abs() < 1e-5 && far[3].is_nan(), "{far:?}");
    }
}

#[test]
fn every_f16_is_read_exactly() {
    let all: Vec<u16> = (0..=u16::MAX).collect();
    for target in targets() {
        let mut vectors = vec![0.0f32; all.len()];
        let mut scalars = vectors.clone();
        let args = [all.as_ptr() as u64, vectors.as_mut_ptr() as u64, scalars.as_mut_ptr() as u64];
        run(target, &args, all.len() as u64 / 4, |cx| {
            let (from, to, to_scalars) = (cx.arg(0), cx.arg(1), cx.arg(2));
            cx.for_items(|cx, i| {
                let from = cx.offset(from, i, 8);
                let v = cx.load4_f16(from, 0);
                let to = cx.offset(to, i, 16);
                cx.store4(v, to, 0);
                let to = cx.offset(to_scalars, i, 16);
                for lane in 0..4 {
                    let s = cx.load_f16(from, 2 * lane);
                    cx.store_f32(s, to, 4 * lane);
                }
            });
        });
        for got in [&vectors, &scalars] {
            for (h, got) in all.iter().zip(got) {
                let want = half::f16::from_bits(*h).to_f32();
                assert!(want == *got || (want.is_nan() && got.is_nan()), "{h:04x}: {want} {got}");
            }
        }
    }
}

#[test]
fn f16_is_written_to_nearest_even_without_subnormals() {
    // Every f16, the midpoints to its neighbour, and a step beside each.
    let mut x = Vec::new();
    for h in 0..0x7c00u16 {
        let (low, high) = (half::f16::from_bits(h).to_f32(), half::f16::from_bits(h + 1).to_f32());
        let middle = if high.is_finite() { (low + high) / 2.0 } else { 65520.0 };
        for v in [low, middle, f32::from_bits(middle.to_bits() - 1), f32::from_bits(middle.to_bits() + 1)] {
            x.extend([v, -v]);
        }
    }
    x.extend([f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e30, -1e30, 1e-30, f32::MIN_POSITIVE / 2.0, 0.0]);
    for target in targets() {
        let mut out = vec![0u16; x.len()];
        let args = [x.as_ptr() as u64, out.as_mut_ptr() as u64];
        run(target, &args, x.len() as u64 / 4, |cx| {
            let (from, to) = (cx.arg(0), cx.arg(1));
            cx.for_items(|cx, i| {
                let (from, to) = (cx.offset(from, i, 16), cx.offset(to, i, 8));
                let v = cx.load4(from, 0);
                cx.store4_f16(v, to, 0);
            });
        });
        for (x, got) in x.iter().zip(&out) {
            let got = half::f16::from_bits(*got);
            let want = if x.abs() < 2f32.powi(-14) {
                half::f16::from_f32(0f32.copysign(*x))
            } else {
                half::f16::from_f32(*x)
            };
            assert!(
                want.to_bits() == got.to_bits() || (want.is_nan() && got.is_nan()),
                "{}: {x:e}: want {want} got {got}",
                target.name()
            );
        }
    }
}

#[test]
fn min_max_select_and_rounding() {
    let x = [-2.5, -0.5, 1.5, 2.5, 3.4999, -3.5, 0.0, 127.5];
    let want = [-2.0, -0.0, 2.0, 2.0, 3.0, -4.0, 0.0, 128.0];
    for target in targets() {
        assert_eq!(map(target, &x, |cx, v| cx.vround(v).0), want);
        let ints = map(target, &x, |cx, v| {
            let (_, i) = cx.vround(v);
            cx.vint_to_float(i)
        });
        assert_eq!(ints, want);
        let clamped = map(target, &x, |cx, v| {
            let (low, high) = (cx.splat_const(-1.0), cx.splat_const(2.0));
            let v = cx.vmax(v, low);
            cx.vmin(v, high)
        });
        assert_eq!(clamped, x.map(|v: f32| v.clamp(-1.0, 2.0)));
        // NaN in the first operand gives the second.
        let nan = map(target, &[f32::NAN; 4], |cx, v| {
            let three = cx.splat_const(3.0);
            cx.vmax(v, three)
        });
        assert_eq!(nan, [3.0; 4]);
    }
}

#[test]
fn parts_bytes_and_reductions() {
    let x: Vec<f32> = (1..=8).map(|v| v as f32).collect();
    let codes: Vec<u8> = (0..16).map(|i| (i * 16 + (15 - i)) as u8).collect();
    let table: Vec<i8> = (0..16).map(|i| i * 7 - 50).collect();
    for target in targets() {
        let mut out = vec![-1.0f32; 8];
        let mut bytes = vec![0i8; 48];
        let mut number = [0.0f32; 4];
        let args = [
            x.as_ptr() as u64,
            out.as_mut_ptr() as u64,
            codes.as_ptr() as u64,
            table.as_ptr() as u64,
            bytes.as_mut_ptr() as u64,
            number.as_mut_ptr() as u64,
        ];
        run(target, &args, 1, |cx| {
            let [x, out, codes, table, bytes, number] = std::array::from_fn(|i| cx.arg(i));
            let part = cx.load4_part(x, 0, 3, 9.0);
            let doubled = cx.vadd(part, part);
            cx.store4_part(doubled, out, 0, 2);
            cx.store4(part, out, 16);
            let sum = cx.vsum(part);
            cx.store_f32(sum, number, 0);
            let most = cx.vmax_across(part);
            cx.store_f32(most, number, 4);
            let loaded = cx.load16_i8(table, 0);
            let packed = cx.load16_i8(codes, 0);
            let (low, high) = (cx.byte_bits(packed, 0, 0, 15), cx.byte_bits(packed, 4, 0, 15));
            for (i, codes) in [low, high].into_iter().enumerate() {
                let found = cx.lookup(table, &[loaded], codes);
                let at = cx.scratch(16);
                cx.store16_bytes(found, at, 0);
                for quad in 0..4 {
                    let v = cx.load4_i8(at, 4 * quad);
                    cx.store4_i8(v, bytes, 16 * i as i32 + 4 * quad);
                }
            }
            let quads: [I32x4; 4] = std::array::from_fn(|i| {
                let at = cx.load4(x, 16 * (i as i32 % 2));
                let (_, v) = cx.vround(at);
                cx.vineg(v)
            });
            cx.store16_i8(quads, bytes, 32);
            let unsigned = cx.load4_u8(codes, 12);
            let v = cx.vint_to_float(unsigned);
            let last = cx.lane(v, 3);
            cx.store_f32(last, number, 8);
            let mut total = cx.int(0);
            let count = cx.var(total);
            let (begin, end) = (cx.int(3), cx.int(20));
            cx.for_range(begin, end, 5, |cx, i| {
                let odd = cx.iand_imm(i, 1);
                cx.if_(odd, |cx| {
                    let c = cx.get(&count);
                    let c = cx.iadd(c, i);
                    cx.set(&count, c);
                });
            });
            total = cx.get(&count);
            let total = cx.narrow(total);
            let total = cx.int_to_float(total);
            cx.store_f32(total, number, 12);
        });
        assert_eq!(out, [2.0, 4.0, -1.0, -1.0, 1.0, 2.0, 3.0, 9.0]);
        assert_eq!(number, [15.0, 9.0, 240.0, (3 + 13) as f32]);
        let low: Vec<i8> = codes.iter().map(|c| table[usize::from(c & 15)]).collect();
        let high: Vec<i8> = codes.iter().map(|c| table[usize::from(c >> 4)]).collect();
        assert_eq!(bytes[..16], low);
        assert_eq!(bytes[16..32], high);
        assert_eq!(bytes[32..], [-1, -2, -3, -4, -5, -6, -7, -8, -1, -2, -3, -4, -5, -6, -7, -8]);
    }
}

#[test]
fn bodies_compile_on_every_target() {
    for target in Target::ALL {
        compile_body(target, |cx| {
            let (x, out) = (cx.arg(0), cx.arg(1));
            cx.for_items(|cx, i| {
                let at = cx.offset(x, i, 16);
                let v = cx.load4(at, 0);
                let v = cx.vgelu(v);
                let v = cx.vsqrt(v);
                let e = cx.vexp(v);
                let half = cx.load4_f16(at, 0);
                let b = cx.load4_bf16(at, 0);
                let s = cx.vmuladd(half, b, e);
                cx.store4_f16(s, out, 0);
                let (_, n) = cx.vround(s);
                cx.store4_i8(n, out, 8);
                let scalar = cx.vsum(s);
                let scalar = cx.exp(scalar);
                let root = cx.fsqrt(scalar);
                let root = cx.fmuladd(root, scalar, root);
                cx.store_f32(root, out, 12);
                let table = cx.load16_i8(x, 0);
                let codes = cx.load16_i8(at, 16);
                let low = cx.byte_bits(codes, 0, 0, 15);
                let found = cx.lookup(x, &[table], low);
                cx.store16_bytes(found, out, 0);
            });
        })
        .unwrap();
    }
}
