//! Programs: ordered lists of kernel launches over a planned activation arena.
//!
//! Lowering makes one program per kind of step; the runtime resolves arguments once per step and runs the launches
//! in order, with a barrier after each. Nothing here is specific to an instruction set: kernels are named, and each
//! code section supplies an entry for every name.

use serde::{Deserialize, Serialize};

/// `base + per_token * T + per_row * R + per_token_span * T * S`, in bytes or items.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    pub base: u64,
    /// Times the tokens of the step.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub per_token: u64,
    /// Times the rows whose logits are wanted.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub per_row: u64,
    /// Times the tokens of the step, times the spans of its longest context.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub per_token_span: u64,
}

/// What extents depend on: the size of one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StepSize {
    /// Tokens of the step, T.
    pub tokens: u64,
    /// Rows whose logits are wanted, R.
    pub rows: u64,
    /// Spans of the longest context that a token of the step sees, S; at least 1.
    pub spans: u64,
}

fn is_zero(v: &u64) -> bool {
    *v == 0
}

impl Extent {
    pub fn fixed(base: u64) -> Extent {
        Extent { base, ..Extent::default() }
    }

    pub fn per_token(per_token: u64) -> Extent {
        Extent { per_token, ..Extent::default() }
    }

    pub fn per_row(per_row: u64) -> Extent {
        Extent { per_row, ..Extent::default() }
    }

    pub fn per_token_span(per_token_span: u64) -> Extent {
        Extent { per_token_span, ..Extent::default() }
    }

    /// Value for a step; `None` on overflow.
    pub fn at(&self, step: StepSize) -> Option<u64> {
        let t = self.per_token.checked_mul(step.tokens)?;
        let r = self.per_row.checked_mul(step.rows)?;
        let s = self.per_token_span.checked_mul(step.tokens)?.checked_mul(step.spans)?;
        self.base.checked_add(t)?.checked_add(r)?.checked_add(s)
    }
}

/// What kind of step a program serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ProgramKind {
    /// One token.
    Decode,
    /// 2 to 16 tokens, 32 on GPUs: batched decode and verification of drafts.
    SmallBatch,
    /// Any number of tokens up to the program's limit.
    Prefill,
}

/// What a launch is given at an argument slot. Every argument becomes one u64: an address or a number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Arg {
    /// Address in the activation arena; the kernel touches at most `len` bytes from it.
    Arena { offset: Extent, len: Extent },
    /// Address in the weights section.
    Weight { offset: u64, len: u64 },
    /// Address of the step's input or output.
    Step(StepBuffer),
    /// Address of a layer's keys, see [`crate::manifest::KvType`].
    Keys { layer: u32 },
    /// Address of a layer's values.
    Values { layer: u32 },
    /// A number that does not depend on the step.
    Imm(u64),
    /// A number that does.
    Count(Extent),
    /// Entries of one row of the block tables.
    BlockTableStride,
    /// Spans of the longest context that a token of the step sees.
    Spans,
    /// Bytes that a kernel prefetches ahead of the weights it reads; the runtime chooses it for the machine, and it may
    /// differ from step to step. Results never depend on it.
    PrefetchDistance,
}

/// Buffers the runtime provides for a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepBuffer {
    /// i32 `[T]`: token ids.
    Tokens,
    /// i32 `[T]`: position of each token in its sequence.
    Positions,
    /// i32 `[T]`: row of the block tables of each token's sequence.
    Seqs,
    /// i32 `[R]`: tokens whose logits are wanted.
    Rows,
    /// u32 `[sequences, stride]`: KV pages of each sequence in order of position.
    BlockTables,
    /// f32 `[T, Dh]`: per token `mscale * cos` of its Dh/2 angles, then `mscale * sin`, for rotary table `table`.
    Rope { table: u32 },
    /// f32 `[R, V]`: written by the last launch.
    Logits,
}

/// One kernel call: the grid's items are shared out among threads in chunks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Launch {
    /// Name of the kernel in the code section's entry table.
    pub kernel: String,
    pub args: Vec<Arg>,
    /// Work items.
    pub grid: Extent,
    /// Bytes of weights the whole launch reads, for profiles.
    #[serde(default)]
    pub weight_bytes: u64,
    /// What it computes, e.g. `layers.3 gate_up_swiglu`.
    #[serde(default)]
    pub note: String,
    /// Too small to be shared out: the thread that finishes the launch before runs the whole of it, and no barrier
    /// stands between the two.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub tail: bool,
    /// How a GPU runs it: every launch of a GPU's program has this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blocks: Option<Blocks>,
}

/// Blocks of threads of a launch on a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blocks {
    /// Threads of a block.
    pub threads: u32,
    pub x: Tiles,
    #[serde(default = "Tiles::one", skip_serializing_if = "Tiles::is_one")]
    pub y: Tiles,
}

/// As many as it takes to cover an extent, `per` of it each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tiles {
    pub extent: Extent,
    pub per: u32,
}

impl Tiles {
    /// One for each.
    pub fn each(extent: Extent) -> Tiles {
        Tiles { extent, per: 1 }
    }

    /// One, whatever the step.
    pub fn one() -> Tiles {
        Tiles::each(Extent::fixed(1))
    }

    fn is_one(&self) -> bool {
        *self == Tiles::one()
    }

    /// How many in a step; `None` on overflow, or when they cover nothing each.
    pub fn at(&self, step: StepSize) -> Option<u64> {
        let extent = self.extent.at(step)?;
        if self.per == 0 { None } else { Some(extent.div_ceil(self.per.into())) }
    }
}

/// An ordered list of launches and the arena they need.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    pub kind: ProgramKind,
    /// Most tokens of one step.
    pub max_tokens: u32,
    /// Size of the activation arena.
    pub arena: Extent,
    pub launches: Vec<Launch>,
}

/// Address of a kernel in a code section: `extern "C" fn(args: *const u64, begin: u64, end: u64)`, which computes the
/// grid items `begin..end`. Kernels keep no state, call nothing and never unwind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    pub kernel: String,
    /// From the start of the section; a multiple of 64.
    pub offset: u64,
    pub len: u64,
    /// How a GPU launches this code.
    #[serde(default, skip_serializing_if = "EntryBlocks::is_plain")]
    pub blocks: EntryBlocks,
}

/// Name of the kernel of a GPU's code sections that finds the likeliest token of every row of logits. Arguments: logits f32
/// `[R, V]`, out u32 `[R]`, V; one block of [`ARGMAX_THREADS`] per row. No program names it.
pub const ARGMAX: &str = "argmax";
/// Threads of a block of [`ARGMAX`].
pub const ARGMAX_THREADS: u32 = 1024;

/// Name of the kernel of a GPU's code sections that finds the largest logits of every row. Arguments: logits f32 `[R, V]`, out
/// `[R, k]`, each a token u32 and its logit f32, V, k (1 to [`TOP_K_MOST`], at most V); one block of [`TOP_K_THREADS`] per row. No
/// program names it.
pub const TOP_K: &str = "top_k";
/// Threads of a block of [`TOP_K`].
pub const TOP_K_THREADS: u32 = 1024;
/// Most logits that [`TOP_K`] finds of a row.
pub const TOP_K_MOST: u64 = 64;

/// What a GPU's code for one target needs beyond what launches say, which are the same for all targets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EntryBlocks {
    /// Bytes of shared memory that a block is given when it is launched.
    #[serde(default)]
    pub shared_bytes: u32,
    /// Blocks of the launch, along x and y, whose work one block of this code does.
    pub merged: [u32; 2],
}

impl EntryBlocks {
    /// As the launch says.
    pub const PLAIN: EntryBlocks = EntryBlocks { shared_bytes: 0, merged: [1, 1] };
    /// Most bytes of shared memory: no GPU has more for a block.
    pub const MOST_SHARED: u32 = 227 << 10;

    fn is_plain(&self) -> bool {
        *self == EntryBlocks::PLAIN
    }

    /// Blocks to launch where the launch has so many along x and y.
    pub fn grid(&self, [x, y]: [u32; 2]) -> [u32; 2] {
        [x.div_ceil(self.merged[0].max(1)), y.div_ceil(self.merged[1].max(1))]
    }
}

impl Default for EntryBlocks {
    fn default() -> EntryBlocks {
        EntryBlocks::PLAIN
    }
}
