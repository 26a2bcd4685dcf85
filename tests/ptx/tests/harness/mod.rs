//! What the tests of this crate share: modules from texts, values as bytes, numbers that look random.
#![allow(dead_code, reason = "each test program uses its part")]

use attar_ptx::{Launch, Memory, Module, Param, Stats};

pub(crate) fn module(name: &str) -> Module {
    let path = format!("{}/tests/kernels/{name}.ptx", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    Module::parse(&text).unwrap_or_else(|e| panic!("{path}: {e}"))
}

pub(crate) fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

pub(crate) fn ints(values: &[i32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

pub(crate) fn as_floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("four bytes"))).collect()
}

pub(crate) fn as_ints(bytes: &[u8]) -> Vec<i32> {
    bytes.chunks_exact(4).map(|b| i32::from_le_bytes(b.try_into().expect("four bytes"))).collect()
}

/// Runs in both modes, which must agree.
pub(crate) fn run(
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
pub(crate) fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..n).map(|_| next() + next()).collect()
}

pub(crate) fn bf16_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect()
}

pub(crate) fn rounded(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| half::bf16::from_f32(*v).to_f64()).collect()
}

/// `a[m, k] b[n, k]ᵀ` in double precision.
pub(crate) fn product(a: &[f64], b: &[f64], n: usize, depth: usize) -> Vec<f64> {
    let rows = a.chunks_exact(depth);
    rows.flat_map(|a| {
        let dot = move |b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        b.chunks_exact(depth).take(n).map(dot)
    })
    .collect()
}

pub(crate) fn assert_close(got: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len());
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!((f64::from(*got) - expected).abs() <= tolerance, "at {i}: {got}, expected {expected}");
    }
}

/// Rows of 16 as core matrices of 8 rows by 16 bytes: the two along a row first, then down.
pub(crate) fn core_matrices(v: &[f32]) -> Vec<f32> {
    let mut out = vec![0.0; 64 * 16];
    for r in 0..64 {
        for k in 0..16 {
            out[r / 8 * 128 + k / 8 * 64 + r % 8 * 8 + k % 8] = v[r * 16 + k];
        }
    }
    out
}

/// The text of a compiled kernel.
pub(crate) fn text(name: &str) -> String {
    let path = format!("{}/tests/kernels/{name}.ptx", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// A kernel `k` of pointers `x` and `y`, which are in `%rd1` and `%rd2`; `%r0` is the thread.
pub(crate) fn written(body: &str) -> String {
    format!(
        ".version 9.0\n.target sm_90a\n.address_size 64\n.visible .entry k(.param .u64 x, .param .u64 y)\n{{\n\
         .reg .pred %p<20>;\n.reg .b16 %h<20>;\n.reg .b32 %r<60>;\n.reg .b64 %rd<40>;\n.reg .f32 %f<40>;\n\
         .reg .f64 %fd<20>;\nld.param.u64 %rd1, [x];\nld.param.u64 %rd2, [y];\nmov.u32 %r0, %tid.x;\n{body}\nret;\n}}\n"
    )
}

/// Runs a written kernel on `threads` threads of each of `blocks` blocks. `x` holds what is given, `y` is not
/// initialised; gives `y`.
pub(crate) fn run_written(
    body: &str,
    blocks: u32,
    threads: u32,
    x: &[u8],
    y: usize,
) -> attar_ptx::Result<Vec<u8>> {
    let module = Module::parse(&written(body))?;
    let mut memory = Memory::new();
    let (x, y) = (memory.alloc("x", x), memory.alloc_uninit("y", y));
    let params = [Param::from(x), y.into()];
    let launch = Launch {
        kernel: "k",
        grid: [blocks, 1, 1],
        block: [threads, 1, 1],
        dynamic_shared: 0,
        params: &params,
    };
    module.launch_both(&mut memory, &launch)?;
    Ok(memory.bytes(y).to_vec())
}
