//! Lowering: a graph becomes kernels to generate, programs to run and tensors to pack.
//!
//! One graph serves every program; programs differ in how many rows their matrix kernels are made for. Fused nodes
//! map to kernels where a kernel's constraints hold and are decomposed where they do not, so every valid graph over
//! weights, tokens and positions can be lowered.
//!
//! Steps: `prepare` decomposes, `early_rows` leaves out rows of a prompt that nobody asks for, `launches` emits launches
//! over virtual buffers, `arena` places the buffers, `tensors` lists the weights.

mod arena;
mod early_rows;
mod error;
mod launches;
mod prepare;
mod tensors;
#[cfg(test)]
mod tests;
mod text;

pub use error::{LowerError, LowerErrorKind};

use crate::pack::PackedTensor;
use attar_artifact::manifest::{KvType, RopeTable};
use attar_artifact::program::{Arg, Extent, Launch, Program, ProgramKind};
use attar_ir::{Graph, TensorType};
use attar_kernel::KernelSpec;
use launches::{BufId, VirtualArg, Walk};
use std::collections::BTreeMap;
use tensors::TensorTable;

/// Most tokens of a step of the small-batch program.
pub const SMALL_BATCH: u32 = 16;

/// Choices that belong to the machine side, not to the graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LowerOptions {
    /// Element of cached keys and values.
    pub kv: KvType,
    /// Tokens of one page of the cache.
    pub page_len: u32,
    /// Positions of one span of attention, a multiple of `page_len`.
    pub span: u32,
    /// Most tokens of one prefill step.
    pub max_prefill_tokens: u32,
}

impl LowerOptions {
    /// The page and step sizes of the engine's programs.
    pub const PAGE_LEN: u32 = 32;
    pub const SPAN: u32 = 256;
    pub const MAX_PREFILL_TOKENS: u32 = 512;

    /// Standard sizes with the given cache element.
    pub fn new(kv: KvType) -> LowerOptions {
        LowerOptions {
            kv,
            page_len: Self::PAGE_LEN,
            span: Self::SPAN,
            max_prefill_tokens: Self::MAX_PREFILL_TOKENS,
        }
    }
}

/// What lowering makes of a graph.
#[derive(Clone, Debug, PartialEq)]
pub struct Lowered {
    /// Kernels the programs name, each once, sorted by name.
    pub specs: Vec<KernelSpec>,
    /// Decode, small batch, prefill.
    pub programs: Vec<Program>,
    /// Tensors of the weights section, by offset.
    pub tensors: Vec<PackedTensor>,
    /// Size of the weights section.
    pub weights_len: u64,
    /// Rotary tables by the number programs call them.
    pub rope: Vec<RopeTable>,
    /// Inputs and outputs that are no part of a model's step, for each program. Empty for models.
    pub ports: Vec<Ports>,
}

/// Where a program finds inputs other than tokens, positions and rows, and leaves outputs other than logits.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ports {
    pub inputs: Vec<(Port, Extent)>,
    pub outputs: Vec<(Port, Extent)>,
}

/// A function input or output in the arena, row-major; its offset stands beside it.
#[derive(Clone, Debug, PartialEq)]
pub struct Port {
    /// Name of the input, or index of the output.
    pub name: String,
    pub ty: TensorType,
}

/// Lowers a graph to its three programs.
///
/// # Errors
/// When no kernel serves a node and it does not decompose, or a weight does not fit its format.
pub fn lower(graph: &Graph, options: &LowerOptions) -> Result<Lowered, LowerError> {
    let graph = prepare::prepare(graph)?;
    let mut of_prompts = graph.clone();
    early_rows::gather_early(&mut of_prompts)?;
    let mut tensors = TensorTable::default();
    let mut specs = BTreeMap::new();
    let (mut rope, mut programs, mut ports) = (Vec::new(), Vec::new(), Vec::new());
    let kinds = [
        (ProgramKind::Decode, 1),
        (ProgramKind::SmallBatch, SMALL_BATCH),
        (ProgramKind::Prefill, options.max_prefill_tokens),
    ];
    for (kind, max_tokens) in kinds {
        // Steps of few tokens mostly want all rows, and a launch more costs them more than rows.
        let graph = if kind == ProgramKind::Prefill { &of_prompts } else { &graph };
        let walk = launches::walk(graph, max_tokens, options, &mut tensors, &mut rope)?;
        for launch in &walk.launches {
            specs.entry(launch.spec.name()).or_insert_with(|| launch.spec.clone());
        }
        let (program, program_ports) = finish(walk, kind, max_tokens);
        programs.push(program);
        ports.push(program_ports);
    }
    Ok(Lowered {
        specs: specs.into_values().collect(),
        programs,
        tensors: tensors.list,
        weights_len: tensors.len,
        rope,
        ports,
    })
}

/// Whether a launch over one token is over before threads could share it: a row's normalisation costs less than a
/// barrier.
fn is_tail(spec: &KernelSpec) -> bool {
    match spec {
        KernelSpec::Linear(_) | KernelSpec::Attention { .. } | KernelSpec::AttentionSpan(_) => false,
        KernelSpec::Embed { .. }
        | KernelSpec::RmsNorm { .. }
        | KernelSpec::LayerNorm { .. }
        | KernelSpec::Quantize { .. }
        | KernelSpec::Rope { .. }
        | KernelSpec::KvWrite { .. }
        | KernelSpec::AttentionMerge { .. }
        | KernelSpec::Elementwise { .. }
        | KernelSpec::Softmax { .. }
        | KernelSpec::GatherRows { .. }
        | KernelSpec::Slice { .. } => true,
    }
}

/// Places the buffers and resolves the arguments.
fn finish(walk: Walk, kind: ProgramKind, max_tokens: u32) -> (Program, Ports) {
    let bufs = |ports: &[(Port, BufId)]| ports.iter().map(|(_, b)| *b).collect::<Vec<_>>();
    let (from_start, to_end) = (bufs(&walk.inputs), bufs(&walk.outputs));
    let lives = arena::lifetimes(&walk.sizes, &walk.launches, &from_start, &to_end);
    let kept: Vec<BufId> = from_start.into_iter().chain(to_end).collect();
    let same = arena::in_place(&lives, &walk.launches, &kept);
    let plan = arena::place(&lives, &same);
    let resolve = |arg: &VirtualArg| match *arg {
        VirtualArg::Read(b) | VirtualArg::Write(b) => {
            Arg::Arena { offset: plan.offsets[b.0], len: walk.sizes[b.0] }
        }
        VirtualArg::Known(arg) => arg,
    };
    let launches = walk
        .launches
        .iter()
        .enumerate()
        .map(|(i, l)| Launch {
            kernel: l.spec.name(),
            args: l.args.iter().map(resolve).collect(),
            grid: l.grid,
            weight_bytes: l.weight_bytes,
            note: l.note.clone(),
            tail: i > 0 && kind == ProgramKind::Decode && is_tail(&l.spec),
            blocks: None,
        })
        .collect();
    let at = |ports: Vec<(Port, BufId)>| ports.into_iter().map(|(p, b)| (p, plan.offsets[b.0])).collect();
    let ports = Ports { inputs: at(walk.inputs), outputs: at(walk.outputs) };
    (Program { kind, max_tokens, arena: plan.arena, launches }, ports)
}
