//! Kernels that NVRTC compiled (`kernels/*.cu` and the text it made of them), against what they should compute.

mod harness;

use attar_ptx::{Launch, Memory};
use harness::*;

#[test]
fn saxpy() {
    let module = module("vector.sm_90a");
    let mut memory = Memory::new();
    let (x, y) = (noise(1000, 1), noise(1000, 2));
    let (bx, by) = (memory.alloc("x", &floats(&x)), memory.alloc("y", &floats(&y)));
    let params = [2.5f32.into(), bx.into(), by.into(), 1000i32.into()];
    let stats = run(&module, &mut memory, "saxpy", 8, 128, 0, &params);
    let expected: Vec<f32> = x.iter().zip(&y).map(|(x, y)| 2.5f32.mul_add(*x, *y)).collect();
    assert_eq!(as_floats(memory.bytes(by)), expected);
    assert_eq!((stats.global_read.bytes, stats.global_written.bytes), (8000, 4000));
    // 31 full warps and one of 8 lanes: four sectors each, but one.
    assert_eq!(stats.global_written.sectors, 31 * 4 + 1);
}

#[test]
fn sums_over_dynamic_shared_memory() {
    let module = module("vector.sm_90a");
    let mut memory = Memory::new();
    let x = noise(1000, 3);
    let bx = memory.alloc("x", &floats(&x));
    let out = memory.alloc_uninit("out", 16);
    run(&module, &mut memory, "block_sum", 4, 256, 1024, &[bx.into(), out.into(), 1000i32.into()]);
    assert_eq!(memory.unwritten(out), None);
    for (got, part) in as_floats(memory.bytes(out)).iter().zip(x.chunks(256)) {
        let expected: f64 = part.iter().map(|v| f64::from(*v)).sum();
        assert!((f64::from(*got) - expected).abs() < 1e-5, "{got} {expected}");
    }
}

#[test]
fn the_last_block_reads_what_others_have_released() {
    let module = module("vector.sm_90a");
    let mut memory = Memory::new();
    let x = noise(5000, 4);
    let bx = memory.alloc("x", &floats(&x));
    let (partial, out) = (memory.alloc_uninit("partial", 40), memory.alloc_uninit("out", 4));
    let params = [bx.into(), partial.into(), out.into(), 5000i32.into()];
    run(&module, &mut memory, "last_block_sum", 10, 256, 0, &params);
    let expected: f64 = x.iter().map(|v| f64::from(*v)).sum();
    assert!((f64::from(as_floats(memory.bytes(out))[0]) - expected).abs() < 1e-4);
}

#[test]
fn histogram_by_atomics() {
    let module = module("vector.sm_90a");
    let mut memory = Memory::new();
    let x: Vec<u8> = noise(3000, 5).iter().map(|v| (v * 120.0) as i32 as u8).collect();
    let (bx, bins) = (memory.alloc("x", &x), memory.alloc("bins", &[0; 1024]));
    run(&module, &mut memory, "histogram", 3, 128, 0, &[bx.into(), bins.into(), 3000i32.into()]);
    let mut expected = [0i32; 256];
    x.iter().for_each(|v| expected[*v as usize] += 1);
    assert_eq!(as_ints(memory.bytes(bins)), expected);
}

#[test]
fn calls_local_arrays_and_tables() {
    let module = module("math.sm_90a");
    let mut memory = Memory::new();
    let x = noise(64 * 8, 6);
    let bx = memory.alloc("x", &floats(&x));
    let out = memory.alloc_uninit("out", 64 * 8);
    run(&module, &mut memory, "local_argmax", 1, 64, 0, &[bx.into(), out.into(), 3i32.into()]);
    let weights = [0.5f32, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5];
    for (t, got) in memory.bytes(out).chunks_exact(8).enumerate() {
        let scaled: Vec<f32> = (0..8).map(|i| x[t * 8 + i] * weights[i]).collect();
        let mine: Vec<f32> = (0..8).map(|i| scaled[(i + 5) % 8]).collect();
        let mut best = 0;
        (1..8).filter(|i| mine[*i] > mine[best]).collect::<Vec<_>>().iter().for_each(|i| {
            if mine[*i] > mine[best] {
                best = *i;
            }
        });
        let letter = b"PTX!"[t % 4];
        assert_eq!(as_floats(&got[..4])[0], mine[best] + f32::from(letter));
        assert_eq!(as_ints(&got[4..])[0], best as i32);
    }
    let calls = module.variable(&mut memory, "calls").expect("a variable");
    assert_eq!(as_ints(memory.bytes(calls)), [64]);
}

#[test]
fn float_functions() {
    let module = module("math.sm_90a");
    let mut memory = Memory::new();
    let mut x: Vec<f32> = noise(100, 7).iter().map(|v| v * 8.0).collect();
    // Also where the compiler's expansions take another path.
    x.extend([1e6, -3e5, 88.0, -100.0, 0.3e-38]);
    let n = x.len();
    let bx = memory.alloc("x", &floats(&x));
    let y = memory.alloc_uninit("y", n * 64);
    run(&module, &mut memory, "float_functions", 2, 64, 0, &[bx.into(), y.into(), (n as i32).into()]);
    let y = as_floats(memory.bytes(y));
    for (i, &x) in x.iter().enumerate() {
        let v = f64::from(x);
        let expected = [
            v.exp(),
            v.abs().ln(),
            v.sin(),
            v.cos(),
            v.tanh(),
            v.abs().powf(f64::from(1.7f32)),
            libm_erf(v),
            1.0 / v.abs().sqrt(),
            v.abs().sqrt(),
            v / f64::from(3.7f32),
            v.exp(),
            v / f64::from(3.7f32),
            v.round(),
            v.round_ties_even(),
            v.floor() + v.ceil() + v.trunc(),
            v.clamp(-2.0, 2.0) + 1f64.copysign(v) + v.clamp(0.0, 1.0),
        ];
        for (k, expected) in expected.into_iter().enumerate() {
            let got = f64::from(y[i * 16 + k]);
            let expected = f64::from(expected as f32);
            let close = (got - expected).abs() <= 3e-6 * expected.abs() + 2e-6 || got == expected;
            assert!(close, "function {k} of {x}: {got}, expected {expected}");
        }
    }
}

/// The error function by its series and, far out, its limit.
fn libm_erf(x: f64) -> f64 {
    if x.abs() > 5.0 {
        return 1f64.copysign(x);
    }
    let (mut term, mut sum) = (x, x);
    for n in 1..200 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

#[test]
fn integer_functions() {
    let module = module("math.sm_90a");
    let mut memory = Memory::new();
    let words = |seed| noise(200, seed).iter().map(|v| (v * 2e9) as i32).collect::<Vec<_>>();
    let (mut x, mut y) = (words(8), words(9));
    for i in 0..100 {
        x[i] >>= i % 31;
        y[i] >>= (i * 7) % 31;
    }
    y.iter_mut().for_each(|v| *v = if *v == 0 { 3 } else { *v });
    let (bx, by) = (memory.alloc("x", &ints(&x)), memory.alloc("y", &ints(&y)));
    let out = memory.alloc_uninit("out", 200 * 256);
    run(
        &module,
        &mut memory,
        "integer_functions",
        2,
        128,
        0,
        &[bx.into(), by.into(), out.into(), 200i32.into()],
    );
    let got: Vec<i64> =
        memory.bytes(out).chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().expect("eight"))).collect();
    for i in 0..200 {
        let (a, b) = (x[i], y[i]);
        let (u, v) = (a as u32, b as u32);
        let w = (i64::from(a) << 20) + i64::from(b);
        let w3 = w.wrapping_mul(3);
        let bytes = [u.to_le_bytes(), v.to_le_bytes()].concat();
        let dot =
            |f: fn(u8) -> i32| (0..4).map(|k| f(u.to_le_bytes()[k]) * f(v.to_le_bytes()[k])).sum::<i32>();
        let pair = u64::from(v) << 32 | u64::from(u);
        let expected = [
            i64::from(a.wrapping_div(b)),
            i64::from(a.wrapping_rem(b)),
            i64::from(u / v),
            i64::from(u % v),
            w / i64::from(b),
            w % i64::from(b),
            (w as u64 / u64::from(v)) as i64,
            (w as u64 % u64::from(v)) as i64,
            (i64::from(a) * i64::from(b)) >> 32,
            ((u64::from(u) * u64::from(v)) >> 32) as i64,
            ((u128::from(w as u64) * u128::from(w3 as u64)) >> 64) as i64,
            ((i128::from(w) * i128::from(w3)) >> 64) as i64,
            i64::from(u.count_ones()),
            i64::from(u.leading_zeros()),
            if a == 0 { 0 } else { i64::from(u.trailing_zeros()) + 1 },
            i64::from(u.reverse_bits()),
            i64::from(u32::from_le_bytes([bytes[0], bytes[4], bytes[1], bytes[5]])),
            ((pair << (v & 31)) >> 32) as i64 & 0xffff_ffff,
            (pair >> 7) as u32 as i64,
            i64::from(5 + dot(|b| i32::from(b as i8))),
            i64::from(5 + dot(i32::from)),
            i64::from(a.abs_diff(b).wrapping_add(3)),
            i64::from(a.wrapping_abs().wrapping_add(a.min(b)).wrapping_add(a.max(b))),
            i64::from(a as i8),
            i64::from(b as u16),
            w >> 3,
            i64::from(a >> (b & 31)),
            i64::from(u << (v & 31)),
            (a as f32) as i64,
            i64::from((b as f32 * 0.37) as i32),
            i64::from((b as f32 * 0.37).ceil() as i32),
            (w as f64 * 0.25).round_ties_even() as i64,
        ];
        for (k, expected) in expected.into_iter().enumerate() {
            assert_eq!(got[i * 32 + k], expected, "function {k} of {a} and {b}");
        }
    }
}

#[test]
fn lanes_part_and_come_back() {
    let module = module("math.sm_90a");
    let mut memory = Memory::new();
    let x: Vec<i32> = (0..64).map(|i| (i * 37 + 11) % 100).collect();
    let (bx, y) = (memory.alloc("x", &ints(&x)), memory.alloc_uninit("y", 256));
    run(&module, &mut memory, "divergence", 1, 64, 0, &[bx.into(), y.into()]);
    let steps: Vec<i32> = x
        .iter()
        .map(|&v| match v % 3 {
            0 => v / 3,
            1 => v.count_ones() as i32,
            _ if v > 50 => -1,
            _ => v * v,
        })
        .collect();
    let expected: Vec<i32> =
        (0..64).map(|t| steps[t] + steps[t ^ 1] + i32::from(steps[t / 32 * 32] > 3)).collect();
    assert_eq!(as_ints(memory.bytes(y)), expected);
}

#[test]
fn rms_norm() {
    let module = module("norm.sm_90a");
    let mut memory = Memory::new();
    let (rows, width) = (3, 1024);
    let (x, residual, weight) = (noise(rows * width, 10), noise(rows * width, 11), noise(width, 12));
    let buffers = [&x, &residual, &weight].map(|v| memory.alloc("input", &bf16_bytes(v)));
    let out = memory.alloc_uninit("out", rows * width * 2);
    let params = [buffers[0].into(), buffers[1].into(), buffers[2].into(), out.into(), 1e-5f32.into()];
    let stats = run(&module, &mut memory, "rms_norm", 3, 128, 0, &params);
    assert_eq!(memory.unwritten(out), None);
    // Every input once, in whole sectors.
    let bytes = (3 * rows * width * 2) as u64;
    assert_eq!((stats.global_read.bytes, stats.global_read.sectors * 32), (bytes, bytes));
    let (x, residual, weight) = (rounded(&x), rounded(&residual), rounded(&weight));
    for r in 0..rows {
        let sum: Vec<f64> = (0..width).map(|i| x[r * width + i] + residual[r * width + i]).collect();
        let scale = 1.0 / (sum.iter().map(|v| v * v).sum::<f64>() / width as f64 + 1e-5).sqrt();
        for i in 0..width {
            let at = (r * width + i) * 2;
            let got =
                half::bf16::from_le_bytes(memory.bytes(out)[at..at + 2].try_into().expect("two")).to_f64();
            let expected = sum[i] * scale * weight[i];
            // Half a unit in the last of 8 bits, and a little for single precision.
            assert!((got - expected).abs() <= 2.0f64.powi(-8) * expected.abs() + 1e-6, "{got} {expected}");
        }
    }
}

#[test]
fn gemv_of_4_bits() {
    let module = module("gemv.sm_90a");
    let mut memory = Memory::new();
    let (rows, depth) = (10, 2048);
    let q: Vec<u32> = noise(rows * depth, 13).iter().map(|v| ((v + 1.0) * 8.0) as u32 & 15).collect();
    let places = [0, 4, 1, 5, 2, 6, 3, 7];
    let word = |q: &[u32]| q.iter().zip(places).fold(0u32, |w, (q, p)| w | q << (4 * p)).to_le_bytes();
    let w: Vec<u8> = q.chunks_exact(8).flat_map(word).collect();
    let f16_bytes =
        |v: &[f32]| v.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect::<Vec<_>>();
    let scales: Vec<f32> = noise(rows * depth / 128, 14).iter().map(|v| 0.02 + v.abs() * 0.01).collect();
    let x = noise(depth, 15);
    let params = [
        memory.alloc("w", &w).into(),
        memory.alloc("scales", &f16_bytes(&scales)).into(),
        memory.alloc("x", &f16_bytes(&x)).into(),
    ];
    let y = memory.alloc_uninit("y", rows * 4);
    let params = [&params[..], &[y.into(), (rows as i32).into()]].concat();
    run(&module, &mut memory, "gemv_4bit", 3, 128, 0, &params);
    let narrow = |v: f32| half::f16::from_f32(v).to_f64();
    let expected: Vec<f64> = (0..rows)
        .map(|r| {
            let term = |k: usize| {
                (f64::from(q[r * depth + k]) - 8.0) * narrow(scales[(r * depth + k) / 128]) * narrow(x[k])
            };
            (0..depth).map(term).sum()
        })
        .collect();
    // Sums of four products in f16.
    assert_close(&as_floats(memory.bytes(y)), &expected, 0.02);
}

#[test]
fn gemm_by_mma_over_a_double_buffer() {
    for target in ["sm_80", "sm_90a"] {
        let module = module(&format!("mma.{target}"));
        let mut memory = Memory::new();
        let (m, n, depth) = (128, 64, 128);
        let (a, b) = (noise(m * depth, 16), noise(n * depth, 17));
        let (ba, bb) = (memory.alloc("a", &bf16_bytes(&a)), memory.alloc("b", &bf16_bytes(&b)));
        let c = memory.alloc_uninit("c", m * n * 4);
        let params = [ba.into(), bb.into(), c.into(), (n as i32).into(), (depth as i32).into()];
        let launch = Launch {
            kernel: "gemm_bf16",
            grid: [1, 2, 1],
            block: [128, 1, 1],
            dynamic_shared: 0,
            params: &params,
        };
        let both = module.launch_both(&mut memory, &launch).unwrap_or_else(|e| panic!("{e}"));
        assert_close(&as_floats(memory.bytes(c)), &product(&rounded(&a), &rounded(&b), n, depth), 1e-5);
        assert_eq!(both.stats.matrix_macs, (m * n * depth) as u64);
        assert_eq!(both.stats.count("mma.sync").warps, (m * n * depth / (16 * 8 * 16)) as u64);
        // The padding keeps ldmatrix free of conflicts.
        assert_eq!(both.stats.shared_read.wavefronts, both.stats.shared_read.ideal_wavefronts);
    }
}

#[test]
fn integer_mma() {
    let module = module("mma.sm_90a");
    let mut memory = Memory::new();
    let bytes = |n, seed| noise(n, seed).iter().map(|v| (v * 127.0) as i8).collect::<Vec<_>>();
    let (a, b) = (bytes(16 * 32, 18), bytes(8 * 32, 19));
    let raw = |v: &[i8]| v.iter().map(|b| *b as u8).collect::<Vec<_>>();
    let (ba, bb) = (memory.alloc("a", &raw(&a)), memory.alloc("b", &raw(&b)));
    let c = memory.alloc_uninit("c", 16 * 8 * 4);
    run(&module, &mut memory, "mma_s8", 1, 32, 0, &[ba.into(), bb.into(), c.into()]);
    let wide = |v: &[i8]| v.iter().map(|b| f64::from(*b)).collect::<Vec<_>>();
    let expected: Vec<i32> = product(&wide(&a), &wide(&b), 8, 32).iter().map(|v| *v as i32 + 7).collect();
    assert_eq!(as_ints(memory.bytes(c)), expected);
}

#[test]
fn matrices_are_transposed_on_the_way() {
    for target in ["sm_80", "sm_90a"] {
        let module = module(&format!("mma.{target}"));
        let mut memory = Memory::new();
        let values: Vec<u8> = (0..64u16).flat_map(|v| (v * 257).to_le_bytes()).collect();
        let (from, into) = (memory.alloc("in", &values), memory.alloc_uninit("out", 128));
        run(&module, &mut memory, "transpose", 1, 32, 0, &[from.into(), into.into()]);
        let expected: Vec<u8> = (0..64u16).flat_map(|i| ((i % 8 * 8 + i / 8) * 257).to_le_bytes()).collect();
        assert_eq!(memory.bytes(into), expected);
    }
}

#[test]
fn wgmma_behind_bulk_copies() {
    let module = module("wgmma.sm_90a");
    let mut memory = Memory::new();
    let steps = 5;
    let (a, b) = (noise(steps * 1024, 20), noise(steps * 1024, 21));
    let cores = |v: &[f32]| v.chunks(1024).flat_map(core_matrices).collect::<Vec<_>>();
    let (ba, bb) = (memory.alloc("a", &bf16_bytes(&cores(&a))), memory.alloc("b", &bf16_bytes(&cores(&b))));
    let c = memory.alloc_uninit("c", 64 * 64 * 4);
    let params = [ba.into(), bb.into(), c.into(), (steps as i32).into()];
    let stats = run(&module, &mut memory, "wgmma_bulk", 1, 128, 0, &params);
    let mut expected = vec![0.0; 64 * 64];
    for (a, b) in a.chunks(1024).zip(b.chunks(1024)) {
        let part = product(&rounded(a), &rounded(b), 64, 16);
        expected.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
    }
    assert_close(&as_floats(memory.bytes(c)), &expected, 1e-5);
    assert_eq!(stats.async_bytes, (steps * 4096) as u64);
}

#[test]
fn wgmma_of_swizzled_tiles() {
    let module = module("wgmma.sm_90a");
    let mut memory = Memory::new();
    let (a, b) = (noise(4096, 22), noise(4096, 23));
    let (ba, bb) = (memory.alloc("a", &bf16_bytes(&a)), memory.alloc("b", &bf16_bytes(&b)));
    let c = memory.alloc_uninit("c", 64 * 64 * 4);
    run(&module, &mut memory, "wgmma_swizzled", 1, 128, 0, &[ba.into(), bb.into(), c.into()]);
    assert_close(&as_floats(memory.bytes(c)), &product(&rounded(&a), &rounded(&b), 64, 64), 1e-5);
}

#[test]
fn bulk_copies_both_ways() {
    let module = module("wgmma.sm_90a");
    let mut memory = Memory::new();
    let values: Vec<u8> = (0..3 * 4096).map(|i| (i * 7 % 251) as u8).collect();
    let (from, into) = (memory.alloc("in", &values), memory.alloc_uninit("out", 3 * 4096));
    run(&module, &mut memory, "bulk_through", 3, 64, 0, &[from.into(), into.into()]);
    let expected: Vec<u8> = values.iter().map(|v| v.wrapping_add(1)).collect();
    assert_eq!(memory.bytes(into), expected);
}
