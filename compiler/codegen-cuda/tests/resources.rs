//! What kernels of real models' shapes take of a GPU: no registers spilled, limits kept, the instructions that were meant.

mod nvrtc_here;

use attar_artifact::manifest::KvType;
use attar_artifact::program::EntryBlocks;
use attar_codegen_cuda::{Cache, CompiledKernel, CudaSpec, CudaTarget, Widen, compile_kernel};
use attar_format::formats;
use attar_kernel::{
    Activation, AttentionSpec, Elementwise, Epilogue, KernelSpec, LinearSpec, QkvEpilogue, RowTile,
};

/// Of a multiprocessor.
const REGISTERS: u32 = 65536;
/// What a block has without asking for more.
const SHARED: u32 = 48 << 10;

/// Width, width of the FFN, heads, KV heads, width of a head.
type Shape = (usize, usize, usize, usize, usize);

const SMOLLM2_135M: Shape = (576, 1536, 9, 3, 64);
const LLAMA_3_8B: Shape = (4096, 14336, 32, 8, 128);
const LLAMA_3_70B: Shape = (8192, 28672, 64, 8, 128);

fn kernels((dim, ffn, heads, kv_heads, head_dim): Shape) -> Vec<CudaSpec> {
    let mut all = Vec::new();
    for format in formats::ALL {
        let int8 = format.wants_int8_activations();
        let act = if int8 { Activation::Int8 } else { Activation::F32 };
        for rows in [RowTile::One, RowTile::Small, RowTile::Many] {
            for (n, k, epilogue) in [
                ((heads + 2 * kv_heads) * head_dim, dim, Epilogue::Store),
                (2 * ffn, dim, Epilogue::Swiglu { width: ffn, out: act }),
                (dim, ffn, Epilogue::Residual),
            ] {
                let linear = LinearSpec { format, n, k, rows, bias: false, epilogue };
                if int8 && rows == RowTile::One && k == dim {
                    let linear = linear.clone();
                    all.push(CudaSpec::NormLinear { linear, eps: 1e-5, gain: true });
                }
                all.push(CudaSpec::Linear(linear));
            }
        }
        all.push(CudaSpec::Plain(KernelSpec::Embed { format, vocab: 49152, dim }));
    }
    for kv in [KvType::F32, KvType::F16, KvType::Int8, KvType::Int4] {
        let scale = 1.0 / (head_dim as f32).sqrt();
        let attention =
            AttentionSpec { heads, kv_heads, head_dim, scale, window: None, kv, page_len: 32, span: 256 };
        for out in [Activation::F32, Activation::Int8] {
            all.push(CudaSpec::Plain(KernelSpec::Attention { attention, out }));
            all.push(CudaSpec::Plain(KernelSpec::AttentionMerge { attention, out }));
            if kv == KvType::F16 {
                all.push(CudaSpec::AttentionJoined { attention, out });
            }
        }
        all.push(CudaSpec::Plain(KernelSpec::AttentionSpan(attention)));
        all.push(CudaSpec::Plain(KernelSpec::KvWrite { kv_heads, head_dim, kv, page_len: 32 }));
        for qk_norm in [None, Some(1e-6)] {
            let qkv = QkvEpilogue { heads, kv_heads, head_dim, qk_norm, kv, page_len: 32 };
            all.push(CudaSpec::QkvRope(qkv.clone()));
            if kv == KvType::F16 {
                let out = if qk_norm.is_some() { Activation::F32 } else { Activation::Int8 };
                all.push(CudaSpec::AttentionFresh { attention, qkv, out });
            }
        }
    }
    for out in [Activation::F32, Activation::Int8] {
        all.push(CudaSpec::Plain(KernelSpec::RmsNorm { dim, eps: 1e-5, gain: true, out }));
    }
    for (int8, half, run) in [(false, false, 2), (true, false, 4), (true, false, 8), (true, true, 8)] {
        all.push(CudaSpec::Widen(Widen { dim, int8, half, run }));
    }
    all.extend([CudaSpec::Argmax, CudaSpec::TopK, CudaSpec::Clear]);
    all.push(CudaSpec::Plain(KernelSpec::LayerNorm { dim, eps: 1e-5 }));
    all.push(CudaSpec::Plain(KernelSpec::Softmax { dim }));
    all.push(CudaSpec::Plain(KernelSpec::Quantize { dim }));
    all.push(CudaSpec::Plain(KernelSpec::GatherRows { dim }));
    all.push(CudaSpec::Plain(KernelSpec::Slice { dim, start: 64, len: dim / 2 }));
    all.push(CudaSpec::Plain(KernelSpec::Rope { heads, head_dim }));
    for op in [Elementwise::Add, Elementwise::Mul, Elementwise::Silu, Elementwise::Gelu] {
        all.push(CudaSpec::Plain(KernelSpec::Elementwise { op, dim }));
    }
    all
}

/// Those of [`kernels`] that norm a row, of which a thread keeps the more the longer it is.
fn norms(shape: Shape) -> Vec<CudaSpec> {
    kernels(shape).into_iter().filter(|spec| matches!(spec, CudaSpec::NormLinear { .. })).collect()
}

/// Attention at every shape of its tiles: what is unrolled there takes most registers of all.
fn attention() -> Vec<CudaSpec> {
    let mut all = Vec::new();
    let shapes: [(usize, usize, usize); 7] =
        [(32, 8, 128), (8, 1, 128), (32, 8, 64), (32, 32, 96), (24, 8, 112), (8, 1, 224), (8, 1, 256)];
    for (heads, kv_heads, head_dim) in shapes {
        for (kv, window, out) in [
            (KvType::F16, None, Activation::Int8),
            (KvType::F16, Some(4096), Activation::F32),
            (KvType::Int8, Some(4096), Activation::Int8),
            (KvType::Int4, None, Activation::F32),
        ] {
            let out = if head_dim.is_multiple_of(32) { out } else { Activation::F32 };
            let scale = 1.0 / (head_dim as f32).sqrt();
            let attention =
                AttentionSpec { heads, kv_heads, head_dim, scale, window, kv, page_len: 32, span: 256 };
            all.push(CudaSpec::Plain(KernelSpec::Attention { attention, out }));
            if kv == KvType::F16 {
                all.push(CudaSpec::AttentionJoined { attention, out });
                let qk_norm = window.map(|_| 1e-6);
                let qkv = QkvEpilogue { heads, kv_heads, head_dim, qk_norm, kv, page_len: 32 };
                all.push(CudaSpec::AttentionFresh { attention, qkv, out });
            }
        }
    }
    all
}

/// Instructions of PTX that a kernel must have.
fn meant(spec: &CudaSpec, target: CudaTarget) -> &'static [&'static str] {
    const BYTES: &[&str] = &["mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"];
    const TILES: &[&str] = &[
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
        "cp.async.cg.shared.global",
        "cp.async.wait_group",
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16",
    ];
    const WARPGROUPS: &[&str] = &[
        "wgmma.mma_async.sync.aligned.m64n64k16.f32",
        "wgmma.mma_async.sync.aligned.m64n128k16.f32",
        "wgmma.mma_async.sync.aligned.m64n256k16.f32",
        "wgmma.wait_group.sync.aligned 2;",
        "fence.proxy.async.shared::cta",
        "cp.async.cg.shared.global",
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes",
    ];
    const ATTENTION: &[&str] = &[
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
        "cp.async.cg.shared.global",
        "ldmatrix.sync.aligned.m8n8.x4",
    ];
    match spec {
        CudaSpec::Plain(KernelSpec::Attention { attention, .. }) if attention.kv != KvType::F32 => ATTENTION,
        CudaSpec::Plain(KernelSpec::AttentionSpan(attention)) if attention.kv == KvType::F16 => ATTENTION,
        CudaSpec::AttentionJoined { .. } | CudaSpec::AttentionFresh { .. } => ATTENTION,
        CudaSpec::Linear(l) => match l.rows {
            RowTile::Many if l.format.code_bits() == 32 => &[],
            RowTile::Many if target.has_wgmma() => WARPGROUPS,
            RowTile::Many => TILES,
            _ if l.format.is_uncompressed() => &[],
            _ => BYTES,
        },
        _ => &[],
    }
}

fn check(spec: &CudaSpec, kernel: &CompiledKernel, target: CudaTarget) {
    let at = format!("{} on {target}", spec.name());
    let used =
        kernel.resources.unwrap_or_else(|| panic!("{at}: no numbers in the log: {}", kernel.output.log));
    let most = match spec {
        // Wide heads beside a cache of codes: what is spilled is needed before and behind the loop over positions, not in it.
        CudaSpec::Plain(KernelSpec::Attention { attention, .. }) if attention.kv.has_scales() => 32,
        _ => 0,
    };
    assert!(used.spill_stores.max(used.spill_loads) <= most, "{at}: {used:?}");
    assert!(used.registers * spec.threads() <= REGISTERS, "{at}: {used:?}");
    assert!(used.shared <= SHARED, "{at}: {used:?}");
    let given = kernel.emitted.blocks.shared_bytes;
    assert!(used.shared + given <= EntryBlocks::MOST_SHARED, "{at}: {used:?} and {given}");
    // The assembler says when products cannot overlap with anything else.
    assert!(!kernel.output.log.contains("serialized"), "{at}: {}", kernel.output.log);
    for instruction in meant(spec, target) {
        assert!(kernel.output.ptx.contains(instruction), "{at}: no {instruction}");
    }
    assert!(!kernel.output.log.contains("warning"), "{at}: {}", kernel.output.log);
    if let CudaSpec::Linear(l) | CudaSpec::NormLinear { linear: l, .. } = spec
        && l.rows == RowTile::One
        && !l.format.is_uncompressed()
    {
        // Few enough for four blocks at a time, three with the largest table, so that loads of many threads are under way.
        let most = if l.format.code_bits() == 6 { 80 } else { 64 };
        assert!(used.registers <= most, "{at}: {used:?}");
        if target.has_wgmma() && l.format.code_bits() <= 4 && l.k <= 14336 {
            // Of shared memory there is enough for as many, each of which is charged 1 KiB beside.
            assert!(4 * (used.shared + given + 1024) <= 228 << 10, "{at}: {used:?} and {given}");
        }
    }
    if let CudaSpec::Linear(l) = spec
        && l.rows == RowTile::Small
        && l.format.wants_int8_activations()
        && target.has_wgmma()
    {
        assert!(2 * (used.shared + given + 1024) <= 228 << 10, "{at}: {used:?} and {given}");
    }
}

#[test]
fn kernels_of_real_shapes_keep_within_the_machine() {
    let Some(nvrtc) = nvrtc_here::find() else { return };
    let cache = Cache::new(std::path::PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("kernels"));
    let mut faults = Vec::new();
    for (target, specs) in [
        ("cuda:sm_80", kernels(SMOLLM2_135M)),
        ("cuda:sm_90a", kernels(LLAMA_3_8B)),
        ("cuda:sm_90a", norms(LLAMA_3_70B)),
        ("cuda:sm_80", attention()),
        ("cuda:sm_90a", attention()),
    ] {
        let target = CudaTarget::by_name(target).expect("a target");
        for spec in specs {
            let kernel =
                compile_kernel(&nvrtc, Some(&cache), &spec, target).unwrap_or_else(|e| panic!("{e}"));
            let checked = std::panic::catch_unwind(|| check(&spec, &kernel, target));
            if let Err(fault) = checked {
                faults.push(fault.downcast::<String>().map(|s| *s).unwrap_or_default());
            }
        }
    }
    assert!(faults.is_empty(), "{} faults\n{}", faults.len(), faults.join("\n"));
}

#[test]
fn the_same_source_gives_the_same_bytes() {
    let Some(nvrtc) = nvrtc_here::find() else { return };
    let spec = CudaSpec::Widen(Widen { dim: 96, int8: true, half: true, run: 8 });
    let target = CudaTarget::by_name("cuda:sm_90a").expect("a target");
    let once = compile_kernel(&nvrtc, None, &spec, target).expect("compiles");
    let again = compile_kernel(&nvrtc, None, &spec, target).expect("compiles");
    // The log says how long it took.
    assert_eq!((&once.output.ptx, &once.output.cubin), (&again.output.ptx, &again.output.cubin));
    assert!(once.output.cubin.starts_with(b"\x7fELF"));
}
