//! Kernels of the GPU, and how the launches of a CPU's programs become launches of them.
//!
//! Both machines run the same programs: the same order, arguments and arena. Where a CPU's kernel does two things that
//! a GPU does better one after the other, a launch becomes several, with their intermediate result behind the arena:
//!
//! - a product with many rows is multiplied as bf16 or f16, so the rows are widened first;
//! - heads of q, k and v are shared out among blocks without regard to heads, so what follows needs a launch of its own;
//! - attention whose heads are no multiples of 32 wide leaves f32 rows, which are then quantized.
//!
//! And several become one where a GPU would wait between them: spans of attention and their merging, and with a single token what
//! finishes the heads of q, k and v.

use crate::attention_tiles::AttentionTiles;
use crate::emit::{SPAN_WARPS, has_span_products, row_threads, small_blocks, takes_one_row, widened_bytes};
use crate::error::{Error, Result};
use attar_artifact::program::{
    ARGMAX, ARGMAX_THREADS, Arg, Blocks, Extent, Launch, Program, ProgramKind, TOP_K, TOP_K_THREADS, Tiles,
};
use attar_format::{CHANNELS, Scale};
use attar_kernel::{Activation, AttentionSpec, Epilogue, KernelSpec, LinearSpec, QkvEpilogue, RowTile};
use std::collections::BTreeMap;

/// Most blocks of a product that do the same norm each, rather than that it is a launch. They run at the same time, more or less.
const MOST_NORMS: usize = 1024;

/// Most tokens of a step of a prompt: enough that products of 4096 channels fill a large GPU twice over.
const PREFILL_TOKENS: u32 = 2048;
/// Most tokens of a program for few: twice as many rows as its products take at a time. With that many the products of the program
/// for many should take longer, whose tiles have 64 rows, and its attention, which has blocks for many tokens of a sequence.
const SMALL_BATCH_TOKENS: u32 = 32;
/// Rows that products with few take at a time.
pub(crate) const FEW_ROWS: usize = 16;

/// One kernel of the GPU, completely described.
#[derive(Clone, Debug, PartialEq)]
pub enum CudaSpec {
    /// A kernel that CPUs have alike, with the same arguments.
    Plain(KernelSpec),
    /// A product with an epilogue other than [`Epilogue::Qkv`]. Arguments as on CPUs; but with [`RowTile::Many`] x is
    /// what [`CudaSpec::Widen`] makes of it, unless the weights are f32.
    Linear(LinearSpec),
    /// A product with one row of int8 activations that are an RMS norm, which it does itself. Args: x f32, gain f32 (only with
    /// `gain`), then what [`CudaSpec::Linear`] has behind its x.
    NormLinear { linear: LinearSpec, eps: f32, gain: bool },
    /// Rows as a product's operand. Args: x (int8 or f32 rows), out. Grid: rows.
    Widen(Widen),
    /// The likeliest token of every row of logits; part of no program. Args: logits f32 `[R, V]`, out u32 `[R]`, V. Grid: R.
    Argmax,
    /// The largest logits of every row; part of no program. Args: logits f32 `[R, V]`, out `[R, k]` of tokens u32 and their logits
    /// f32, V, k. Grid: R.
    TopK,
    /// What follows the product of q, k and v. Args: y f32 `[T, (H + 2 Hk) Dh]`, then those of [`QkvEpilogue`].
    QkvRope(QkvEpilogue),
    /// [`KernelSpec::AttentionSpan`] and [`KernelSpec::AttentionMerge`] in one. Args: those of the former, out, and counters u32
    /// `[T, Hk]` that are zero, before and after. The result may not stand where the queries do: some blocks store theirs before
    /// others have begun.
    AttentionJoined { attention: AttentionSpec, out: Activation },
    /// [`CudaSpec::QkvRope`] and [`CudaSpec::AttentionJoined`] of a single token in one. Args: those of the former but q, then
    /// partials, S, out and counters.
    AttentionFresh { attention: AttentionSpec, qkv: QkvEpilogue, out: Activation },
    /// Sets counters to zero. Args: counters u32, their number. One block.
    Clear,
}

/// Activations as tensor cores multiply them with the weights of a format. With `wgmma` they are slabs in shared memory's own
/// order, see the template; else rows of bf16, padded with zeros to a multiple of 32 numbers, whatever `half` and `run` are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Widen {
    pub dim: usize,
    /// Of int8 rows; else of f32 rows.
    pub int8: bool,
    /// Numbers are f16, with a factor for each row; else bf16.
    pub half: bool,
    /// Neighbouring inputs of a channel that a thread takes out of the packed weights at a time.
    pub run: usize,
}

impl Widen {
    /// For the product with these weights.
    pub(crate) fn of(linear: &LinearSpec) -> Widen {
        let format = linear.format;
        let bits = format.code_bits();
        let whole_scales = matches!(format.scale, Scale::RowF32Field8 { .. });
        Widen {
            dim: linear.k,
            int8: format.wants_int8_activations(),
            // Groups' scales are whole numbers then, and f16 holds their products with codes.
            half: bits <= 6 && whole_scales,
            run: if bits <= 6 { 8 } else { 32 / bits },
        }
    }
}

impl CudaSpec {
    /// Name of the function; equal specs have equal names and different specs different ones.
    pub fn name(&self) -> String {
        match self {
            CudaSpec::Plain(kernel) => kernel.name(),
            CudaSpec::Linear(linear) => KernelSpec::Linear(linear.clone()).name(),
            CudaSpec::NormLinear { linear, eps, gain } => {
                let gain = if *gain { "g_" } else { "" };
                format!("norm_e{:08x}_{gain}{}", eps.to_bits(), KernelSpec::Linear(linear.clone()).name())
            }
            CudaSpec::Widen(Widen { dim, int8, half, run }) => {
                let (from, to) = (if *int8 { "i8" } else { "f32" }, if *half { "f16" } else { "bf16" });
                format!("widen_{from}_{to}_r{run}_{dim}")
            }
            CudaSpec::Argmax => ARGMAX.to_owned(),
            CudaSpec::TopK => TOP_K.to_owned(),
            CudaSpec::AttentionJoined { attention, out } => {
                let merge = KernelSpec::AttentionMerge { attention: *attention, out: *out };
                merge.name().replacen("attention_merge", "attention_joined", 1)
            }
            CudaSpec::AttentionFresh { attention, qkv, out } => {
                let norm = qkv.qk_norm.map_or(String::new(), |e| format!("_n{:08x}", e.to_bits()));
                let merge = KernelSpec::AttentionMerge { attention: *attention, out: *out };
                merge.name().replacen("attention_merge", "attention_fresh", 1) + &norm
            }
            CudaSpec::Clear => "clear".to_owned(),
            CudaSpec::QkvRope(q) => {
                let norm = q.qk_norm.map_or(String::new(), |e| format!("_n{:08x}", e.to_bits()));
                let kv = format!("{:?}", q.kv).to_lowercase();
                format!("qkv_rope_{}_{}x{}{norm}_kv{kv}_p{}", q.heads, q.kv_heads, q.head_dim, q.page_len)
            }
        }
    }
}

impl CudaSpec {
    /// Threads of a block.
    pub fn threads(&self) -> u32 {
        match self {
            CudaSpec::Linear(_) | CudaSpec::NormLinear { .. } | CudaSpec::Widen(_) => 256,
            CudaSpec::Argmax => ARGMAX_THREADS,
            CudaSpec::TopK => TOP_K_THREADS,
            CudaSpec::QkvRope(_) => 128,
            CudaSpec::Clear => 256,
            CudaSpec::AttentionJoined { .. } | CudaSpec::AttentionFresh { .. } => SPAN_WARPS as u32 * 32,
            CudaSpec::Plain(kernel) => match kernel {
                KernelSpec::AttentionSpan(a) if has_span_products(a) => SPAN_WARPS as u32 * 32,
                KernelSpec::Embed { .. }
                | KernelSpec::KvWrite { .. }
                | KernelSpec::Attention { .. }
                | KernelSpec::AttentionSpan(_)
                | KernelSpec::AttentionMerge { .. } => 128,
                KernelSpec::RmsNorm { dim, .. }
                | KernelSpec::LayerNorm { dim, .. }
                | KernelSpec::Softmax { dim }
                | KernelSpec::Quantize { dim }
                | KernelSpec::Slice { len: dim, .. }
                | KernelSpec::Elementwise { dim, .. } => row_threads(*dim),
                KernelSpec::GatherRows { .. } | KernelSpec::Rope { .. } | KernelSpec::Linear(_) => 256,
            },
        }
    }
}

/// Programs for the GPU, and the kernels that they name and that go with any.
#[derive(Clone, Debug, PartialEq)]
pub struct CudaPrograms {
    pub programs: Vec<Program>,
    /// Each once, sorted by name.
    pub kernels: Vec<CudaSpec>,
}

/// Translates a CPU's programs; `specs` are the kernels they name.
///
/// # Errors
/// [`Error::Spec`] when a launch does not have the arguments that its kernel documents.
pub fn translate(specs: &[KernelSpec], programs: &[Program]) -> Result<CudaPrograms> {
    let specs: BTreeMap<String, &KernelSpec> = specs.iter().map(|s| (s.name(), s)).collect();
    let mut kernels = BTreeMap::from([CudaSpec::Argmax, CudaSpec::TopK].map(|k| (k.name(), k)));
    let mut out = Vec::new();
    for program in programs {
        let spare = [Extent::default(); 4];
        let mut work = Translation { kind: program.kind, arena: program.arena, spare, launches: Vec::new() };
        let mut launches = program.launches.iter();
        while let Some(launch) = launches.next() {
            let bad = || Error::Spec {
                kernel: launch.kernel.clone(),
                problem: "its launch is not as documented".to_owned(),
            };
            let spec = specs.get(&launch.kernel).ok_or_else(bad)?;
            if program.kind == ProgramKind::Decode
                && let Some(norm) = Norm::of(spec, launch)
                && let [next, later @ ..] = launches.as_slice()
                && let Some(KernelSpec::Linear(linear)) = specs.get(&next.kernel)
                && norm.is_for(linear, next)
                && !is_read(norm.out, later, &specs)
            {
                launches.next();
                work.linear(linear, next, Some(norm)).ok_or_else(bad)?;
            } else {
                work.launch(spec, launch).ok_or_else(bad)?;
            }
        }
        let (arena, steps) = work.finish();
        let launches = steps.into_iter().map(|(spec, launch)| {
            kernels.entry(launch.kernel.clone()).or_insert(spec);
            launch
        });
        let max_tokens = match program.kind {
            ProgramKind::Prefill => program.max_tokens.max(PREFILL_TOKENS),
            ProgramKind::SmallBatch => program.max_tokens.max(SMALL_BATCH_TOKENS),
            ProgramKind::Decode => program.max_tokens,
        };
        out.push(Program { launches: launches.collect(), arena, max_tokens, ..program.clone() });
    }
    Ok(CudaPrograms { programs: out, kernels: kernels.into_values().collect() })
}

/// A norm that may become part of the product behind it.
#[derive(Clone, Copy)]
struct Norm {
    eps: f32,
    dim: usize,
    x: Arg,
    gain: Option<Arg>,
    out: Arg,
}

impl Norm {
    fn of(spec: &KernelSpec, launch: &Launch) -> Option<Norm> {
        let KernelSpec::RmsNorm { dim, eps, gain, out: Activation::Int8 } = *spec else { return None };
        let (x, gain, out) = match (gain, launch.args.as_slice()) {
            (true, &[x, gain, out]) => (x, Some(gain), out),
            (false, &[x, out]) => (x, None, out),
            _ => return None,
        };
        Some(Norm { eps, dim, x, gain, out })
    }

    /// Whether it is the row of a product with one row.
    fn is_for(&self, linear: &LinearSpec, launch: &Launch) -> bool {
        linear.rows == RowTile::One
            && takes_one_row(linear)
            && linear.k == self.dim
            && linear.n.div_ceil(CHANNELS * small_blocks(linear)) <= MOST_NORMS
            && launch.args.first() == Some(&self.out)
    }
}

/// Whether any launch reads what stands at `place` before one writes there.
fn is_read(place: Arg, launches: &[Launch], specs: &BTreeMap<String, &KernelSpec>) -> bool {
    for launch in launches {
        let found = launch.args.iter().position(|arg| match (arg, &place) {
            (Arg::Arena { offset: a, .. }, Arg::Arena { offset: b, .. }) => a == b,
            (a, b) => a == b,
        });
        if let Some(at) = found {
            return specs.get(&launch.kernel).and_then(|s| result_slot(s, launch.args.len())) != Some(at);
        }
    }
    false
}

/// Which of so many arguments is the result of a launch, if there is one result and it is known.
fn result_slot(spec: &KernelSpec, args: usize) -> Option<usize> {
    match spec {
        KernelSpec::Linear(linear) if !matches!(linear.epilogue, Epilogue::Qkv(_)) => args.checked_sub(3),
        KernelSpec::RmsNorm { .. } | KernelSpec::LayerNorm { .. } | KernelSpec::Quantize { .. } => {
            args.checked_sub(1)
        }
        KernelSpec::Attention { .. } | KernelSpec::AttentionSpan(_) => Some(7),
        KernelSpec::AttentionMerge { .. } => Some(2),
        _ => None,
    }
}

/// Memory behind the arena for what one launch hands to the next.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Spare {
    /// Widened rows, and f32 rows that are quantized next.
    Rows,
    /// Sums of q, k and v.
    Sums,
    /// Queries of [`CudaSpec::AttentionJoined`].
    Queries,
    /// Blocks that have finished. Nothing else may stand there: they are cleared once in a step.
    Counters,
}

/// An argument, possibly in spare memory whose place is not known before all launches are.
#[derive(Clone, Copy, PartialEq)]
enum Given {
    Arg(Arg),
    Spare(Spare, Extent),
}

struct Step {
    spec: CudaSpec,
    args: Vec<Given>,
    grid: Extent,
    blocks: Blocks,
    weight_bytes: u64,
    note: String,
}

/// One program on its way.
struct Translation {
    kind: ProgramKind,
    arena: Extent,
    spare: [Extent; 4],
    launches: Vec<Step>,
}

impl Translation {
    /// Translates one launch; `None` when its arguments are not those of its kernel.
    fn launch(&mut self, spec: &KernelSpec, launch: &Launch) -> Option<()> {
        let given = |args: &[Arg]| args.iter().map(|a| Given::Arg(*a)).collect::<Vec<_>>();
        let all = given(&launch.args);
        let rows = (Tiles::each(launch.grid), Tiles::one());
        match spec {
            KernelSpec::Linear(linear) => self.linear(linear, launch, None)?,
            KernelSpec::Attention { attention, out } => {
                let group = Extent::per_token(attention.group() as u64);
                let x = Tiles::each(Extent::fixed(attention.kv_heads as u64));
                let y = AttentionTiles::of(attention).map_or(Tiles { extent: group, per: 16 }, |tiles| {
                    let spare = (tiles.rows() * AttentionTiles::SPARE_BLOCKS) as u64;
                    Tiles { extent: Extent { base: spare, ..group }, per: tiles.rows() as u32 }
                });
                let blocks = (x, y);
                let make = |out| KernelSpec::Attention { attention: *attention, out };
                self.attention(make, *out, attention.heads * attention.head_dim, 7, blocks, launch)?;
            }
            KernelSpec::AttentionMerge { attention, out } if self.join(attention, *out, launch).is_some() => {
            }
            KernelSpec::AttentionMerge { attention, out } => {
                let x = Tiles { extent: Extent::fixed(attention.heads as u64), per: 4 };
                let blocks = (x, Tiles::each(Extent::per_token(1)));
                let make = |out| KernelSpec::AttentionMerge { attention: *attention, out };
                self.attention(make, *out, attention.heads * attention.head_dim, 2, blocks, launch)?;
            }
            KernelSpec::KvWrite { kv_heads, .. } => {
                let x = Tiles { extent: Extent::fixed(2 * *kv_heads as u64), per: 4 };
                let blocks = (x, Tiles::each(launch.grid));
                self.push(CudaSpec::Plain(spec.clone()), all, launch.grid, blocks, launch);
            }
            KernelSpec::Embed { .. }
            | KernelSpec::RmsNorm { .. }
            | KernelSpec::LayerNorm { .. }
            | KernelSpec::Quantize { .. }
            | KernelSpec::Rope { .. }
            | KernelSpec::AttentionSpan(_)
            | KernelSpec::Elementwise { .. }
            | KernelSpec::Softmax { .. }
            | KernelSpec::GatherRows { .. }
            | KernelSpec::Slice { .. } => {
                self.push(CudaSpec::Plain(spec.clone()), all, launch.grid, rows, launch);
            }
        }
        Some(())
    }

    /// Attention of which argument `slot` is the result.
    fn attention(
        &mut self,
        make: impl Fn(Activation) -> KernelSpec,
        out: Activation,
        width: usize,
        slot: usize,
        blocks: (Tiles, Tiles),
        launch: &Launch,
    ) -> Option<()> {
        let mut args: Vec<Given> = launch.args.iter().map(|a| Given::Arg(*a)).collect();
        let spec = make(out);
        let (KernelSpec::Attention { attention, .. } | KernelSpec::AttentionMerge { attention, .. }) = &spec
        else {
            return None;
        };
        if out == Activation::F32 || attention.head_dim.is_multiple_of(32) {
            self.push(CudaSpec::Plain(spec), args, launch.grid, blocks, launch);
            return Some(());
        }
        let tokens = Extent::per_token(1);
        let result =
            std::mem::replace(args.get_mut(slot)?, self.spare(Spare::Rows, tokens, width as u64 * 4)?);
        let between = args[slot];
        self.push(CudaSpec::Plain(make(Activation::F32)), args, launch.grid, blocks, launch);
        let quantize = CudaSpec::Plain(KernelSpec::Quantize { dim: width });
        self.push(quantize, vec![between, result], tokens, (Tiles::each(tokens), Tiles::one()), launch);
        Some(())
    }

    /// Joins partials where they are made; `None`, and nothing done, when they are not made of queries right before.
    fn join(&mut self, a: &AttentionSpec, out: Activation, merge: &Launch) -> Option<()> {
        let [partials, _, result, _] = merge.args[..] else { return None };
        let [partials, result] = [partials, result].map(Given::Arg);
        let [.., rope, span] = &self.launches[..] else { return None };
        let CudaSpec::QkvRope(qkv) = rope.spec.clone() else { return None };
        let same = span.spec == CudaSpec::Plain(KernelSpec::AttentionSpan(*a))
            && rope.args.last() == span.args.first()
            && span.args.get(7) == Some(&partials);
        let fits = out == Activation::F32 || a.head_dim.is_multiple_of(32);
        if !same || !fits || !has_span_products(a) {
            return None;
        }
        let tokens = Extent::per_token(1);
        let counters = self.spare(Spare::Counters, tokens, a.kv_heads as u64 * 4)?;
        self.clear(counters, a.kv_heads as u64, merge);
        let mut span = self.launches.pop()?;
        let mut rope = self.launches.pop()?;
        if self.kind == ProgramKind::Decode {
            // Nothing but attention reads q, which therefore need not be anywhere.
            rope.args.pop();
            span.args.splice(..7, rope.args);
            span.spec = CudaSpec::AttentionFresh { attention: *a, qkv, out };
        } else {
            // Elsewhere than where the result may stand.
            let queries = self.spare(Spare::Queries, tokens, (a.heads * a.head_dim * 4) as u64)?;
            (*rope.args.last_mut()?, *span.args.first_mut()?) = (queries, queries);
            span.spec = CudaSpec::AttentionJoined { attention: *a, out };
            self.launches.push(rope);
        }
        span.args.extend([result, counters]);
        span.blocks.threads = span.spec.threads();
        self.launches.push(span);
        Some(())
    }

    /// Clears so many counters for each token, and more where another launch needs more, before all else.
    fn clear(&mut self, counters: Given, per_token: u64, launch: &Launch) {
        if self.launches.first().is_none_or(|first| first.spec != CudaSpec::Clear) {
            let none = Given::Arg(Arg::Count(Extent::default()));
            let one = (Tiles::one(), Tiles::one());
            let launch = Launch { note: "clear counters".to_owned(), ..launch.clone() };
            self.push(CudaSpec::Clear, vec![counters, none], Extent::fixed(1), one, &launch);
            self.launches.rotate_right(1);
        }
        if let Some(Given::Arg(Arg::Count(count))) = self.launches.first_mut().and_then(|l| l.args.last_mut())
            && count.per_token <= per_token
        {
            *count = Extent::per_token(per_token);
            self.launches[0].args[0] = counters;
        }
    }

    /// A product, with the norm that its row is.
    fn linear(&mut self, linear: &LinearSpec, launch: &Launch, norm: Option<Norm>) -> Option<()> {
        let product = |linear: LinearSpec, mut args: Vec<Given>| match norm {
            None => (CudaSpec::Linear(linear), args),
            Some(norm) => {
                let row = std::iter::once(norm.x).chain(norm.gain).map(Given::Arg);
                args.splice(..1, row);
                (CudaSpec::NormLinear { linear, eps: norm.eps, gain: norm.gain.is_some() }, args)
            }
        };
        let mut args: Vec<Given> = launch.args.iter().map(|a| Given::Arg(*a)).collect();
        let (count_slot, prefetch) = (args.len().checked_sub(2)?, args.len() - 1);
        let rows = match launch.args[count_slot] {
            Arg::Count(extent) => extent,
            Arg::Imm(n) => Extent::fixed(n),
            _ => return None,
        };
        // GPUs hide latencies otherwise.
        args[prefetch] = Given::Arg(Arg::Imm(0));
        if linear.rows == RowTile::Many && linear.format.code_bits() != 32 {
            let wide = self.spare(Spare::Rows, rows, widened_bytes(linear.k) as u64)?;
            let x = std::mem::replace(args.first_mut()?, wide);
            let widen = CudaSpec::Widen(Widen::of(linear));
            self.push(widen, vec![x, wide], rows, (Tiles::each(rows), Tiles::one()), launch);
        }
        let blocks = match linear.rows {
            RowTile::One | RowTile::Small => {
                let per = CHANNELS * small_blocks(linear);
                let x = Tiles { extent: Extent::fixed(linear.n as u64), per: per as u32 };
                let few = Tiles { extent: rows, per: FEW_ROWS as u32 };
                (x, if linear.rows == RowTile::One { Tiles::one() } else { few })
            }
            RowTile::Many => {
                let per = if linear.format.code_bits() == 32 { 64 } else { 128 };
                let x = Tiles { extent: Extent::fixed(linear.n as u64), per: 64 };
                (x, Tiles { extent: rows, per })
            }
        };
        let Epilogue::Qkv(q) = &linear.epilogue else {
            let (spec, args) = product(linear.clone(), args);
            self.push(spec, args, launch.grid, blocks, launch);
            return Some(());
        };
        let head = 2 + usize::from(linear.bias);
        let sums = self.spare(Spare::Sums, rows, linear.n as u64 * 4)?;
        let mut inputs = args.get(..head)?.to_vec();
        inputs.extend([sums, args[count_slot], args[prefetch]]);
        let (spec, inputs) = product(LinearSpec { epilogue: Epilogue::Store, ..linear.clone() }, inputs);
        self.push(spec, inputs, launch.grid, blocks, launch);
        let mut rest = vec![sums];
        rest.extend_from_slice(args.get(head..count_slot)?);
        let x = Tiles { extent: Extent::fixed((q.heads + 2 * q.kv_heads) as u64), per: 4 };
        let blocks = (x, Tiles::each(rows));
        self.push(CudaSpec::QkvRope(q.clone()), rest, rows, blocks, launch);
        Some(())
    }

    /// `bytes` for each of so many rows.
    fn spare(&mut self, spare: Spare, rows: Extent, bytes: u64) -> Option<Given> {
        let times = |v: u64| v.checked_mul(bytes)?.checked_next_multiple_of(64);
        let size = Extent {
            base: times(rows.base)?,
            per_token: times(rows.per_token)?,
            per_row: times(rows.per_row)?,
            per_token_span: times(rows.per_token_span)?,
        };
        let most = &mut self.spare[spare as usize];
        *most = Extent {
            base: most.base.max(size.base),
            per_token: most.per_token.max(size.per_token),
            per_row: most.per_row.max(size.per_row),
            per_token_span: most.per_token_span.max(size.per_token_span),
        };
        Some(Given::Spare(spare, size))
    }

    fn push(
        &mut self,
        spec: CudaSpec,
        args: Vec<Given>,
        grid: Extent,
        (x, y): (Tiles, Tiles),
        launch: &Launch,
    ) {
        // What prepares or finishes a product reads no weights.
        let weighs = !matches!(spec, CudaSpec::Widen(_) | CudaSpec::QkvRope(_) | CudaSpec::Clear);
        let weight_bytes = if weighs { launch.weight_bytes } else { 0 };
        let blocks = Blocks { threads: spec.threads(), x, y };
        self.launches.push(Step { spec, args, grid, blocks, weight_bytes, note: launch.note.clone() });
    }

    /// Places spare memory behind the arena.
    fn finish(self) -> (Extent, Vec<(CudaSpec, Launch)>) {
        let add = |a: Extent, b: Extent| Extent {
            base: a.base + b.base,
            per_token: a.per_token + b.per_token,
            per_row: a.per_row + b.per_row,
            per_token_span: a.per_token_span + b.per_token_span,
        };
        let mut arena = self.arena;
        let places = self.spare.map(|size| {
            let place = arena;
            arena = add(arena, size);
            place
        });
        let launches = self.launches.into_iter().map(|step| {
            let resolve = |given: &Given| match *given {
                Given::Arg(arg) => arg,
                Given::Spare(spare, len) => Arg::Arena { offset: places[spare as usize], len },
            };
            let launch = Launch {
                kernel: step.spec.name(),
                args: step.args.iter().map(resolve).collect(),
                grid: step.grid,
                weight_bytes: step.weight_bytes,
                note: step.note,
                tail: false,
                blocks: Some(step.blocks),
            };
            (step.spec, launch)
        });
        (arena, launches.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use attar_format::formats::N4;

    fn place(offset: u64) -> Arg {
        Arg::Arena { offset: Extent::fixed(offset), len: Extent::fixed(256) }
    }

    fn launch(spec: &KernelSpec, args: &[Arg]) -> Launch {
        Launch {
            kernel: spec.name(),
            args: args.to_vec(),
            grid: Extent::fixed(1),
            weight_bytes: 0,
            note: String::new(),
            tail: false,
            blocks: None,
        }
    }

    /// A norm goes into the product behind it only if no other launch reads it before its place is written again.
    #[test]
    fn a_norm_that_others_read_stays_a_launch() {
        let norm = KernelSpec::RmsNorm { dim: 64, eps: 1e-5, gain: false, out: Activation::Int8 };
        let product = KernelSpec::Linear(LinearSpec {
            format: &N4,
            n: 64,
            k: 64,
            rows: RowTile::One,
            bias: false,
            epilogue: Epilogue::Store,
        });
        let multiply = |x: u64, out: u64| {
            launch(&product, &[place(x), Arg::Imm(0), place(out), Arg::Imm(1), Arg::Imm(0)])
        };
        let normed = launch(&norm, &[place(0), place(1024)]);
        let launches = |kind, later: &[Launch]| -> Vec<bool> {
            let launches = [std::slice::from_ref(&normed), later].concat();
            let program = Program { kind, max_tokens: 1, arena: Extent::fixed(8192), launches };
            let made =
                translate(&[norm.clone(), product.clone()], &[program]).expect("launches as documented");
            made.programs[0].launches.iter().map(|l| l.kernel.starts_with("norm_")).collect()
        };
        let decode = ProgramKind::Decode;
        assert_eq!(launches(decode, &[multiply(1024, 2048)]), [true]);
        assert_eq!(launches(decode, &[multiply(1024, 2048), multiply(2048, 1024)]), [true, false]);
        assert_eq!(launches(decode, &[multiply(1024, 2048), multiply(1024, 4096)]), [false; 3]);
        assert_eq!(launches(decode, &[multiply(2048, 4096)]), [false; 2]);
        assert_eq!(launches(ProgramKind::SmallBatch, &[multiply(1024, 2048)]), [false; 2]);
    }
}
