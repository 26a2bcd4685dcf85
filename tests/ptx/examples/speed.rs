//! Thread instructions per second of this interpreter, on the kernels of its tests.
#![expect(clippy::print_stdout, reason = "the report is its purpose")]

use attar_ptx::{CopyMode, Launch, Memory, Module, Options, Param};
use std::time::Instant;

fn main() {
    let module = |name: &str| {
        let path = format!("{}/tests/kernels/{name}.sm_90a.ptx", env!("CARGO_MANIFEST_DIR"));
        let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
        Module::parse(&text).unwrap_or_else(|e| panic!("{path}: {e}"))
    };
    let mut memory = Memory::new();
    let big = memory.alloc("in", &vec![0x11; 1 << 22]);
    let out = memory.alloc("out", &vec![0; 1 << 22]);
    let p = |list: &[Param]| list.to_vec();
    let pointer = || Param::from(big);
    let runs = [
        ("vector", "saxpy", [2048, 1, 1], 256, p(&[1f32.into(), pointer(), out.into(), (1 << 19).into()])),
        (
            "norm",
            "rms_norm",
            [512, 1, 1],
            128,
            p(&[pointer(), pointer(), pointer(), out.into(), 1e-5f32.into()]),
        ),
        (
            "gemv",
            "gemv_4bit",
            [256, 1, 1],
            128,
            p(&[pointer(), pointer(), pointer(), out.into(), 1024.into()]),
        ),
        ("mma", "gemm_bf16", [4, 4, 1], 128, p(&[pointer(), pointer(), out.into(), 256.into(), 512.into()])),
        ("wgmma", "wgmma_bulk", [1, 1, 1], 128, p(&[pointer(), pointer(), out.into(), 200.into()])),
    ];
    let only = std::env::args().nth(1);
    for (name, kernel, grid, threads, params) in runs {
        if only.as_deref().is_some_and(|only| only != kernel) {
            continue;
        }
        let module = module(name);
        let launch = Launch { kernel, grid, block: [threads, 1, 1], dynamic_shared: 0, params: &params };
        for (what, options) in [
            ("checked", Options::checked(CopyMode::Lazy)),
            (
                "unchecked",
                Options { check_races: false, check_registers: false, ..Options::checked(CopyMode::Lazy) },
            ),
        ] {
            let start = Instant::now();
            let stats = module.launch(&mut memory, &launch, &options).unwrap_or_else(|e| panic!("{e}"));
            let (n, s) = (stats.thread_instructions() as f64, start.elapsed().as_secs_f64());
            println!(
                "{kernel:12} {what:10} {:9.0} thread instructions, {:6.1} million per second",
                n,
                n / s / 1e6
            );
        }
    }
}
