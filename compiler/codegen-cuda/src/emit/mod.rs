//! CUDA C++ of kernels: one template per kernel, in the `.cu` files beside this one, behind constants that are generated from the
//! kernel's spec. The text is what `--emit-ir` writes, so templates and constants are meant to be read.

mod constants;

use crate::arch::CudaTarget;
use crate::attention_tiles::AttentionTiles;
use crate::error::{Error, Result};
use crate::spec::{CudaSpec, FEW_ROWS, Widen};
use attar_artifact::manifest::KvType;
use attar_artifact::program::EntryBlocks;
use attar_format::{FormatRef, Scale};
use attar_kernel::{
    Activation, AttentionSpec, Elementwise, Epilogue, KernelSpec, LinearSpec, QkvEpilogue, RowTile,
};
use constants::Constants;

const PRELUDE: &str = include_str!("prelude.cu");
const WEIGHTS: &str = include_str!("weights.cu");
const PRODUCTS: &str = include_str!("products_of_codes.cu");
const ROW_OF_BLOCK: &str = include_str!("row_of_block.cu");
const EPILOGUE: &str = include_str!("epilogue.cu");
const CACHE: &str = include_str!("cache.cu");
const ATTENTION: &str = include_str!("attention.cu");
const ATTENTION_JOIN: &str = include_str!("attention_join.cu");
const ATTENTION_HAND_ON: &str = include_str!("attention_hand_on.cu");

/// Warps of a block of the kernels for few rows.
const SMALL_WARPS: usize = 8;
/// Warps of a block of the kernel for spans of attention that has tensor cores, and of a span as a rule.
pub(crate) const SPAN_WARPS: usize = 8;
/// Widest head whose queries and partial sums fit the shared memory that every GPU gives a block.
const WIDEST_HEAD: usize = 256;

/// A kernel in CUDA C++.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Emitted {
    /// Name of the function, as [`CudaSpec::name`].
    pub name: String,
    pub source: String,
    /// How it is launched.
    pub blocks: EntryBlocks,
}

/// The kernel for many rows with `wgmma`: a block has a multiprocessor to itself, and the work of two blocks along y.
const WGMMA_BLOCKS: EntryBlocks = EntryBlocks { shared_bytes: EntryBlocks::MOST_SHARED, merged: [1, 2] };

/// Blocks of 16 channels that a block of threads multiplies with few rows: as many as its epilogue needs, which finishes pairs of
/// gate and up, and groups of 32 of them where they are quantized. With more than one row, two of a tall matrix otherwise, which
/// share what they read of the rows.
pub(crate) fn small_blocks(linear: &LinearSpec) -> usize {
    match linear.epilogue {
        Epilogue::Store | Epilogue::Residual | Epilogue::Qkv(_) => {
            let tall = linear.n >= TALL && !linear.format.is_uncompressed();
            1 + usize::from(linear.rows == RowTile::Small && tall)
        }
        Epilogue::Swiglu { out: Activation::F32, .. } => 2,
        Epilogue::Swiglu { out: Activation::Int8, .. } => 4,
    }
}

/// Whether spans of attention are multiplied by tensor cores.
pub(crate) fn has_span_products(a: &AttentionSpec) -> bool {
    a.kv == KvType::F16 && a.head_dim.is_multiple_of(16) && a.span <= SPAN_WARPS * 32
}

/// How spans are launched whose values lie in shared memory: 32 for each warp, an odd number of 16 bytes apart.
fn span_blocks(a: &AttentionSpec) -> EntryBlocks {
    let stride = ((a.head_dim / 8) | 1) * 16;
    EntryBlocks { shared_bytes: (SPAN_WARPS * 32 * stride) as u32, ..EntryBlocks::PLAIN }
}

/// Emits a kernel for a target.
///
/// # Errors
/// [`Error::Spec`] for shapes that no template serves.
pub fn emit(spec: &CudaSpec, target: CudaTarget) -> Result<Emitted> {
    let name = spec.name();
    let fail = |problem: String| Error::Spec { kernel: name.clone(), problem };
    let mut blocks = EntryBlocks::PLAIN;
    let parts = match spec {
        CudaSpec::Linear(linear) => {
            if target.has_wgmma() && linear.rows == RowTile::Many && linear.format.code_bits() != 32 {
                blocks = WGMMA_BLOCKS;
            }
            linear_parts(linear, target, &mut blocks, None)
        }
        CudaSpec::NormLinear { linear, eps, gain } => {
            linear_parts(linear, target, &mut blocks, Some(NormOfRow { eps: *eps, gain: *gain }))
        }
        CudaSpec::Widen(widen) => {
            let mut c = Constants::new();
            c.int("K", widen.dim).flag("INT8", widen.int8);
            let template = if target.has_wgmma() {
                c.int("PADDED", padded_slabs(widen.dim)).flag("HALF", widen.half).int("RUN", widen.run);
                include_str!("widen_slabs.cu")
            } else {
                c.int("PADDED", padded(widen.dim));
                include_str!("widen.cu")
            };
            vec![c.finish(), template.to_owned()]
        }
        CudaSpec::Argmax => vec![include_str!("argmax.cu").to_owned()],
        CudaSpec::TopK => vec![include_str!("top_k.cu").to_owned()],
        CudaSpec::Clear => vec![include_str!("clear.cu").to_owned()],
        CudaSpec::QkvRope(q) => {
            check_head(q.head_dim, q.page_len).map_err(fail)?;
            qkv_parts(q)
        }
        CudaSpec::AttentionJoined { attention, out } => {
            blocks = span_blocks(attention);
            span_parts(attention, Some(*out), None).map_err(fail)?
        }
        CudaSpec::AttentionFresh { attention, qkv, out } => {
            blocks = span_blocks(attention);
            span_parts(attention, Some(*out), Some(qkv)).map_err(fail)?
        }
        CudaSpec::Plain(kernel) => {
            if let KernelSpec::AttentionSpan(a) = kernel
                && has_span_products(a)
            {
                blocks = span_blocks(a);
            }
            if let KernelSpec::Attention { attention, .. } = kernel
                && let Some(tiles) = AttentionTiles::of(attention)
            {
                blocks.shared_bytes = tiles.shared_bytes(attention) as u32;
            }
            plain_parts(kernel).map_err(fail)?
        }
    };
    let source = std::iter::once(PRELUDE.to_owned()).chain(parts).collect::<Vec<_>>().join("\n");
    Ok(Emitted { source: source.replace("KERNEL(", &format!("{name}(")), name, blocks })
}

/// Numbers of a row of bf16 activations.
fn padded(k: usize) -> usize {
    k.next_multiple_of(32)
}

/// Numbers of a row of activations in slabs.
fn padded_slabs(k: usize) -> usize {
    k.next_multiple_of(64)
}

/// Bytes that any target needs for each row of widened activations: in slabs, with the row's factor behind.
pub(crate) fn widened_bytes(k: usize) -> usize {
    padded_slabs(k) * 2 + 4
}

/// The RMS norm that the row of a product is made by.
#[derive(Clone, Copy)]
struct NormOfRow {
    eps: f32,
    gain: bool,
}

/// Bytes of weights that a warp has on their way, as far as whole fours of groups come near: two of `w8`, which then reads as fast as
/// memory gives.
const RING_BYTES: usize = 4544;

/// Most fours of groups that a warp has on their way beside rows.
const MOST_STAGES: usize = 4;
/// Channels of a matrix of which there are about as many pairs of blocks as multiprocessors of a large GPU. With fewer pairs some
/// would have nothing to do; with single blocks what is read of the rows would be twice as much, and more than the weights.
const TALL: usize = 4096;

/// Bytes of a four of groups of a block of channels.
fn piece_bytes(format: FormatRef) -> usize {
    let fields = if format.scale == Scale::Bf16 { 32 } else { 16 };
    4 * (format.group_rows() * 64 + fields)
}

/// Fours of groups of a product with one row that a warp has on their way, and bytes of one.
fn ring(linear: &LinearSpec) -> (usize, usize) {
    // Between groups' codes are 32 bytes.
    let piece = piece_bytes(linear.format) + 3 * 32;
    ((RING_BYTES.div_ceil(piece)).clamp(2, 8), piece)
}

/// Shared memory of a product with one row: `Shared` of its template.
fn one_row_shared(linear: &LinearSpec) -> usize {
    let (stages, piece) = ring(linear);
    let blocks = small_blocks(linear);
    let (splits, stride) = (SMALL_WARPS / blocks, 16 * blocks + 1);
    let fours = (linear.k / 32).div_ceil(4);
    let row = fours * (128 + 4 * 8) + 32 + 4 * (splits * stride + SMALL_WARPS);
    (SMALL_WARPS * stages * piece + row).next_multiple_of(16)
}

/// Whether a row of codes, or of numbers that become codes, finds room in shared memory beside weights.
pub(crate) fn takes_one_row(linear: &LinearSpec) -> bool {
    linear.format.wants_int8_activations() && one_row_shared(linear) <= CudaTarget::LEAST_SHARED
}

/// Bytes of a row's activations of four groups beside weights: codes, scales and sums.
const SLICE_BYTES: usize = 160;

/// How a product with a few rows is shared out.
#[derive(Clone, Copy, Debug)]
struct FewRows {
    /// Blocks of 16 channels of a warp.
    own: usize,
    /// Tiles of eight rows.
    tiles: usize,
    /// Fours of groups on their way.
    stages: usize,
    /// `Shared` of its template.
    shared: usize,
}

impl FewRows {
    fn of(linear: &LinearSpec, target: CudaTarget) -> FewRows {
        let blocks = small_blocks(linear);
        let tiles = if linear.rows == RowTile::One { 1 } else { FEW_ROWS / 8 };
        let stage = |own: usize| SMALL_WARPS * (own * piece_bytes(linear.format) + tiles * 8 * SLICE_BYTES);
        let (room, scales) = (target.shared_bytes(), 4 * 16 * blocks);
        // As many as two stages have room for; four of wide codes would take too many registers.
        let most = if linear.format.code_bits() <= 4 { 4 } else { 2 };
        let fits = |own: usize| own <= most && 2 * stage(own) + scales <= room;
        let own = [4, 2].into_iter().find(|own| blocks.is_multiple_of(*own) && fits(*own)).unwrap_or(1);
        let stages = ((room - scales) / stage(own)).clamp(2, MOST_STAGES);
        let splits = SMALL_WARPS * own / blocks;
        let parts = 4 * splits * tiles * 8 * (16 * blocks + 1);
        let shared = (stages * stage(own)).max(parts).next_multiple_of(16) + scales;
        FewRows { own, tiles, stages, shared }
    }
}

fn linear_parts(
    linear: &LinearSpec,
    target: CudaTarget,
    blocks: &mut EntryBlocks,
    norm: Option<NormOfRow>,
) -> Vec<String> {
    let mut c = Constants::new();
    c.weights(linear.format, linear.n, linear.k);
    let floats = linear.format.is_uncompressed();
    let exact = linear.format.code_bits() == 32;
    let mut products =
        if floats || linear.rows == RowTile::Many { String::new() } else { PRODUCTS.to_owned() };
    let template = match linear.rows {
        RowTile::One | RowTile::Small => {
            let rows = if linear.rows == RowTile::One { 1 } else { FEW_ROWS };
            c.int("ROWS", rows).int("WARPS", SMALL_WARPS).int("BLOCKS", small_blocks(linear));
            let one = linear.rows == RowTile::One && takes_one_row(linear);
            if one {
                let shared = one_row_shared(linear);
                blocks.shared_bytes = shared as u32;
                c.int("STAGES", ring(linear).0).int("SHARED_BYTES", shared);
            } else if !floats {
                let few = FewRows::of(linear, target);
                blocks.shared_bytes = few.shared as u32;
                c.int("OWN", few.own).int("TILES_OF_ROWS", few.tiles);
                c.int("STAGES", few.stages).int("SHARED_BYTES", few.shared);
            }
            match (floats, one) {
                (true, _) => include_str!("linear_small_floats.cu"),
                (false, true) => include_str!("linear_one_codes.cu"),
                (false, false) => include_str!("linear_small_codes.cu"),
            }
        }
        RowTile::Many if exact => include_str!("linear_many_floats.cu"),
        RowTile::Many if *blocks == WGMMA_BLOCKS => {
            c.int("PADDED", padded_slabs(linear.k)).int("SHARED_BYTES", blocks.shared_bytes as usize);
            products = wgmma(if Widen::of(linear).half { "f16" } else { "bf16" });
            include_str!("linear_many_wgmma.cu")
        }
        RowTile::Many => {
            c.int("PADDED", padded(linear.k));
            include_str!("linear_many_tiles.cu")
        }
    };
    let (kind, width) = match &linear.epilogue {
        Epilogue::Store | Epilogue::Qkv(_) => ("STORE", 0),
        Epilogue::Residual => ("RESIDUAL", 0),
        Epilogue::Swiglu { width, out: Activation::F32 } => ("SWIGLU_F32", *width),
        Epilogue::Swiglu { width, out: Activation::Int8 } => ("SWIGLU_INT8", *width),
    };
    c.int("WIDTH", width);
    let residual = linear.epilogue == Epilogue::Residual;
    let (row_parameters, row_call) = match norm {
        Some(NormOfRow { gain: true, .. }) => (
            "const float *x, const float *__restrict__ gains",
            "take_row(shared.row, x, gains, shared.sums);",
        ),
        Some(_) => ("const float *x", "take_row(shared.row, x, nullptr, shared.sums);"),
        None => ("const u8 *x", "take_row(shared.row, x, shared.sums);"),
    };
    if let Some(norm) = norm {
        c.int("DIM", linear.k)
            .int("THREADS", 32 * SMALL_WARPS)
            .int("NEAR", 8)
            .flag("GAIN", norm.gain)
            .float("EPS", norm.eps);
    }
    let pick = |there: bool, yes: &str, no: &str| if there { yes.to_owned() } else { no.to_owned() };
    let template = template
        .replace(" BIAS_PARAMETER", &pick(linear.bias, ", const float *__restrict__ bias", ""))
        // The result may stand where the residual does.
        .replace(" RESIDUAL_PARAMETER", &pick(residual, ", const float *residual", ""))
        .replace("X_PARAMETERS", row_parameters)
        .replace("X_ROW", row_call)
        .replace("BIAS_ARGUMENT", &pick(linear.bias, "bias", "nullptr"))
        .replace("RESIDUAL_ARGUMENT", &pick(residual, "residual", "nullptr"));
    let epilogue =
        EPILOGUE.replace("SWIGLU_INT8 };", &format!("SWIGLU_INT8 }};\nconstexpr int EPILOGUE = {kind};"));
    let mut parts = vec![c.finish(), WEIGHTS.to_owned(), products, epilogue];
    match norm {
        Some(_) => parts.extend(
            [include_str!("row_of_codes.cu"), ROW_OF_BLOCK, include_str!("row_normalized.cu")]
                .map(str::to_owned),
        ),
        None if linear.rows == RowTile::One && takes_one_row(linear) => {
            parts.extend(
                [include_str!("row_of_codes.cu"), include_str!("row_quantized.cu")].map(str::to_owned),
            );
        }
        None => {}
    }
    parts.push(template);
    parts
}

/// `multiply` for tiles of every height: the instruction names all registers of its operands.
fn wgmma(element: &str) -> String {
    let list = |range: std::ops::Range<usize>, item: &dyn Fn(usize) -> String| {
        range.map(item).collect::<Vec<_>>().join(", ")
    };
    let product = |rows: usize| {
        let sums = rows / 2;
        let number = |i| format!("%{i}");
        format!(
            "/// c += a b for 64 channels by {rows} rows by 16 inputs.\n\
             __device__ __forceinline__ void multiply(float (&c)[{sums}], const u32 (&a)[4], u64 b) {{\n  asm volatile(\n      \
             \"wgmma.mma_async.sync.aligned.m64n{rows}k16.f32.{element}.{element} \"\n      \
             \"{{{}}}, {{{}}}, %{}, 1, 1, 1, 0;\"\n      : {}\n      : {}, \"l\"(b));\n}}\n",
            list(0..sums, &number),
            list(sums..sums + 4, &number),
            sums + 4,
            list(0..sums, &|i| format!("\"+f\"(c[{i}])")),
            list(0..4, &|i| format!("\"r\"(a[{i}])")),
        )
    };
    [64, 128, 256].map(product).join("\n")
}

fn qkv_parts(q: &QkvEpilogue) -> Vec<String> {
    let mut c = Constants::new();
    c.cache(q.kv, q.head_dim, q.kv_heads, q.page_len).int("HEADS", q.heads);
    c.flag("QK_NORM", q.qk_norm.is_some()).float("EPS", q.qk_norm.unwrap_or(0.0));
    let gains = if q.qk_norm.is_some() {
        ", const float *__restrict__ q_gain, const float *__restrict__ k_gain"
    } else {
        ""
    };
    let gain = |name| if q.qk_norm.is_some() { name } else { "nullptr" };
    let kernel = include_str!("qkv_rope.cu")
        .replace(" GAIN_PARAMETERS", gains)
        .replace("Q_GAIN : K_GAIN", &format!("({}) : ({})", gain("q_gain"), gain("k_gain")))
        .replace("const float *gain = is_query ? (nullptr) : (nullptr);", "const float *gain = nullptr;");
    vec![c.finish(), CACHE.to_owned(), kernel]
}

fn check_head(head_dim: usize, page_len: usize) -> std::result::Result<(), String> {
    if head_dim > WIDEST_HEAD {
        return Err(format!("heads of width {head_dim}; CUDA kernels take heads of up to {WIDEST_HEAD}"));
    }
    if !page_len.is_multiple_of(32) {
        return Err(format!("pages of {page_len} tokens; CUDA kernels take multiples of 32"));
    }
    Ok(())
}

/// Parts of the source of a kernel that CPUs have alike.
fn plain_parts(kernel: &KernelSpec) -> std::result::Result<Vec<String>, String> {
    let mut c = Constants::new();
    Ok(match kernel {
        KernelSpec::Embed { format, vocab, dim } => {
            c.weights(format, *vocab, *dim);
            vec![c.finish(), WEIGHTS.to_owned(), include_str!("embed.cu").to_owned()]
        }
        KernelSpec::RmsNorm { dim, eps, gain, out } => {
            c.flag("GAIN", *gain).float("EPS", *eps);
            rows(c, "RMS_NORM", *dim, if *gain { 2 } else { 1 }, *out)
        }
        KernelSpec::LayerNorm { dim, eps } => {
            c.float("EPS", *eps);
            rows(c, "LAYER_NORM", *dim, 3, Activation::F32)
        }
        KernelSpec::Softmax { dim } => rows(c, "SOFTMAX", *dim, 1, Activation::F32),
        KernelSpec::Quantize { dim } => rows(c, "QUANTIZE", *dim, 1, Activation::Int8),
        KernelSpec::Slice { dim, start, len } => {
            c.int("START", *start).int("WHOLE", *dim);
            rows(c, "SLICE", *len, 1, Activation::F32)
        }
        KernelSpec::Elementwise { op, dim } => {
            let (operation, inputs) = match op {
                Elementwise::Add => ("ADD", 2),
                Elementwise::Mul => ("MUL", 2),
                Elementwise::Silu => ("SILU", 1),
                Elementwise::Gelu => ("GELU", 1),
            };
            rows(c, operation, *dim, inputs, Activation::F32)
        }
        KernelSpec::GatherRows { dim } => {
            c.int("DIM", *dim);
            vec![c.finish(), include_str!("gather_rows.cu").to_owned()]
        }
        KernelSpec::Rope { heads, head_dim } => {
            c.int("HEADS", *heads).int("HEAD_DIM", *head_dim);
            vec![c.finish(), include_str!("rope.cu").to_owned()]
        }
        KernelSpec::KvWrite { kv_heads, head_dim, kv, page_len } => {
            check_head(*head_dim, *page_len)?;
            c.cache(*kv, *head_dim, *kv_heads, *page_len);
            vec![c.finish(), CACHE.to_owned(), include_str!("kv_write.cu").to_owned()]
        }
        KernelSpec::Attention { attention, out } => match AttentionTiles::of(attention) {
            Some(tiles) => prompt_parts(attention, *out, tiles)?,
            None => attention_parts(attention, *out, include_str!("attention_tiles.cu"))?,
        },
        KernelSpec::AttentionSpan(attention) if has_span_products(attention) => {
            span_parts(attention, None, None)?
        }
        KernelSpec::AttentionSpan(attention) => {
            attention_parts(attention, Activation::F32, include_str!("attention_span.cu"))?
        }
        KernelSpec::AttentionMerge { attention, out } => {
            let mut parts = attention_parts(attention, *out, include_str!("attention_merge.cu"))?;
            parts.insert(parts.len() - 1, ATTENTION_JOIN.to_owned());
            parts
        }
        KernelSpec::Linear(_) => return Err("matrix products have specs of their own".to_owned()),
    })
}

/// Neighbours that a thread of a kernel over rows has.
fn row_neighbours(dim: usize) -> usize {
    if dim.is_multiple_of(4) { 4 } else { 1 }
}

/// Threads for a row of so many numbers, as far as a block has threads.
pub(crate) fn row_threads(dim: usize) -> u32 {
    (dim / row_neighbours(dim)).next_multiple_of(32).clamp(32, 1024) as u32
}

/// A kernel over rows with so many inputs.
fn rows(mut c: Constants, operation: &str, dim: usize, inputs: usize, out: Activation) -> Vec<String> {
    c.int("DIM", dim).int("THREADS", row_threads(dim) as usize).int("NEAR", row_neighbours(dim));
    c.flag("INT8", out == Activation::Int8);
    // The template mentions all that any of the operations has.
    c.int("START", 0).int("WHOLE", 0).flag("GAIN", false).float("EPS", 0.0);
    let names = ["a", "b", "c"];
    let parameters: Vec<String> = names[..inputs].iter().map(|n| format!("const float *{n}, ")).collect();
    for name in &names[inputs..] {
        c.line(&format!("constexpr const float *{name} = nullptr;"));
    }
    let template = include_str!("rows.cu")
        .replace("PARAMETERS", &format!("{}void *out", parameters.concat()))
        .replace("SLICE };", &format!("SLICE }};\nconstexpr int OPERATION = {operation};"));
    vec![c.finish(), ROW_OF_BLOCK.to_owned(), template]
}

/// A span of attention with tensor cores; with `out` the partials are joined as well, with `fresh` of what is made here.
fn span_parts(
    a: &AttentionSpec,
    out: Option<Activation>,
    fresh: Option<&QkvEpilogue>,
) -> std::result::Result<Vec<String>, String> {
    let norm = fresh.and_then(|q| q.qk_norm);
    let mut c = Constants::new();
    c.flag("JOINED", out.is_some()).flag("FRESH", fresh.is_some());
    c.flag("QK_NORM", norm.is_some()).float("EPS", norm.unwrap_or(0.0));
    let mut absent = |names: &[&str], kind: &str| {
        for name in names {
            c.line(&format!("constexpr {kind} *{name} = nullptr;"));
        }
    };
    if out.is_none() {
        absent(&["out"], "void");
        absent(&["counters"], "u32");
    }
    if norm.is_none() {
        absent(&["q_gain", "k_gain"], "const float");
    }
    absent(if fresh.is_some() { &["q"] } else { &["y", "rope"] }, "const float");
    let queries = match (fresh, norm) {
        (None, _) => "q",
        (Some(_), None) => "y, const float *rope",
        (Some(_), Some(_)) => "y, const float *q_gain, const float *k_gain, const float *rope",
    };
    let results = if out.is_some() { ", void *out, u32 *counters" } else { "" };
    let template = include_str!("attention_span_halves.cu")
        .replace("QUERY_PARAMETERS", queries)
        .replace(" RESULT_PARAMETERS", results);
    let mut parts = attention_parts(a, out.unwrap_or(Activation::F32), &template)?;
    let pieces = [include_str!("fragments.cu"), ATTENTION_JOIN, ATTENTION_HAND_ON].map(str::to_owned);
    let at = parts.len() - 1;
    parts.splice(at..at, std::iter::once(c.finish()).chain(pieces));
    Ok(parts)
}

fn attention_parts(
    a: &AttentionSpec,
    out: Activation,
    template: &str,
) -> std::result::Result<Vec<String>, String> {
    check_head(a.head_dim, a.page_len)?;
    if out == Activation::Int8 && !a.head_dim.is_multiple_of(32) {
        return Err("int8 results of heads whose width is no multiple of 32".to_owned());
    }
    let mut c = Constants::new();
    c.cache(a.kv, a.head_dim, a.kv_heads, a.page_len);
    c.int("HEADS", a.heads).int("GROUP", a.group()).int("SPAN", a.span);
    c.int("WINDOW", a.window.unwrap_or(0)).float("QUERY_SCALE", a.query_scale());
    c.flag("INT8", out == Activation::Int8);
    Ok(vec![c.finish(), CACHE.to_owned(), ATTENTION.to_owned(), template.to_owned()])
}

fn prompt_parts(
    a: &AttentionSpec,
    out: Activation,
    tiles: AttentionTiles,
) -> std::result::Result<Vec<String>, String> {
    let mut c = Constants::new();
    c.int("ROW_TILES", tiles.row_tiles).int("POSITIONS", tiles.positions);
    c.int("SHARED_BYTES", tiles.shared_bytes(a)).int("MIN_BLOCKS", tiles.blocks(a));
    let mut parts = attention_parts(a, out, include_str!("attention_mma.cu"))?;
    let at = parts.len() - 1;
    let cache = if a.kv.has_scales() {
        include_str!("kv_tiles_codes.cu")
    } else {
        include_str!("kv_tiles_halves.cu")
    };
    parts.splice(at..at, [c.finish(), include_str!("fragments.cu").to_owned(), cache.to_owned()]);
    Ok(parts)
}
