//! Kernels that NVRTC compiled (`kernels/*.cu` and the text it made of them), against what they should compute.

use attar_ptx::{Launch, Memory, Module, Param, Stats};

fn module(name: &str) -> Module {
    let path = format!("{}/tests/kernels/{name}.ptx", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    Module::parse(&text).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn ints(values: &[i32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn as_floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("four bytes"))).collect()
}

fn as_ints(bytes: &[u8]) -> Vec<i32> {
    bytes.chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().expect("four bytes"))).collect()
}

/// Runs in both modes, which must agree.
fn run(
    module: &Module,
    memory: &mut Memory,
    kernel: &str,
    grid: u32,
    block: u32,
    dynamic_shared: usize,
    params: &[Param],
) -> Stats {
    let launch = Launch { kernel, grid: [grid, 1, 1], block: [block, 1, 1], dynamic_shared, params };
    let both = module.launch_both(memory, &launch).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(both.differing, Vec::<String>::new(), "{kernel}");
    both.stats
}

/// Numbers that look random and are the same everywhere.
fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..n).map(|_| next() + next()).collect()
}

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
