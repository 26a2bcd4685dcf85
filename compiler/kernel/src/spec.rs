//! The specs: what each kernel computes, its arguments in order, and its grid.
//!
//! Matrices of activations are row-major f32 `[T, width]` unless said otherwise. "grid T" means item `t` is token `t`.
//! Kernels must not depend on how the grid is cut, and a row's result must not depend on the other rows: every row
//! is accumulated in the same order whatever the number of rows.

use attar_artifact::manifest::KvType;
use attar_format::{CHANNELS, FormatRef};

/// One kernel, completely described.
#[derive(Clone, Debug, PartialEq)]
pub enum KernelSpec {
    /// `out[t, :] = table[tokens[t], :]`. Args: tokens i32, packed table, out f32. Grid T.
    Embed { format: FormatRef, vocab: usize, dim: usize },
    /// RMSNorm of each row. Args: x f32, gain f32 (only with `gain`), out. Grid: rows.
    RmsNorm { dim: usize, eps: f32, gain: bool, out: Activation },
    /// LayerNorm of each row. Args: x, gain, bias, out f32. Grid: rows.
    LayerNorm { dim: usize, eps: f32 },
    /// f32 rows to int8 rows. Args: x f32, out int8 rows. Grid: rows.
    Quantize { dim: usize },
    /// Matrix product with a packed weight and an epilogue.
    Linear(LinearSpec),
    /// Rotates heads. Args: x f32 `[T, heads * head_dim]`, rope f32 `[T, head_dim]` (cosines, then sines), out. Grid T.
    Rope { heads: usize, head_dim: usize },
    /// Stores keys and values. Args: k f32, v f32, positions, seqs, block tables, table stride, keys, values. Grid T.
    KvWrite { kv_heads: usize, head_dim: usize, kv: KvType, page_len: usize },
    /// Causal attention of any number of tokens. Args: q f32 `[T, H, Dh]`, positions, seqs, block tables, table stride,
    /// keys, values, out `[T, H, Dh]`, T. Grid: see [`AttentionSpec::tile`].
    Attention { attention: AttentionSpec, out: Activation },
    /// The part that one span of the context has in a token's attention, see [`AttentionSpec`]. Args: q f32
    /// `[T, H, Dh]`, positions, seqs, block tables, table stride, keys, values, partials f32
    /// `[T, Hk, S, H / Hk, Dh + 4]`, S. Grid T * Hk * S in that order. A head's partial is its sums, its maximum, its
    /// total, and 2 numbers that mean nothing; partials of spans a token does not see are not written.
    AttentionSpan(AttentionSpec),
    /// Joins the partials of a token. Args: partials, positions, out `[T, H, Dh]`, S. Grid T * Hk.
    AttentionMerge { attention: AttentionSpec, out: Activation },
    /// Elementwise over rows. Args: a, (b for the binary ones), out. Grid: rows.
    Elementwise { op: Elementwise, dim: usize },
    /// Softmax of each row. Args: x, out. Grid: rows.
    Softmax { dim: usize },
    /// `out[r, :] = x[rows[r], :]`, bit by bit: rows are `dim` numbers of 32 bits, or whole int8 rows of as many bytes. Args:
    /// x, rows i32, out. Grid R.
    GatherRows { dim: usize },
    /// `out[t, i] = x[t, start + i]`. Args: x, out. Grid: rows.
    Slice { dim: usize, start: usize, len: usize },
}

/// Causal attention over a paged cache.
///
/// A token sees the positions from `position - window + 1` (or 0) to its own. They are cut into spans of `span`
/// positions, and within the span a head's numbers are
///
/// ```text
/// score[s] = sum_d (log2(e) * scale * q[d]) * k[s, d]          over ascending d
/// most = max_s score[s],  weight[s] = 2^(score[s] - most)
/// total = sum_s weight[s]                                      16 sums of every 16th s, then those in pairs
/// sums[d] = sum_s weight[s] * v[s, d]                          over ascending s
/// ```
///
/// Spans are joined in ascending order: the first is taken as it is, and each later one joins by
///
/// ```text
/// most' = max(most, span.most),  a = 2^(most - most'),  b = 2^(span.most - most')
/// total' = total * a + span.total * b,  sums'[d] = sums[d] * a + span.sums[d] * b
/// ```
///
/// The result is `sums[d] / total`. Where a maximum is minus infinity it counts as 0 in the differences, so that a span
/// without any weight adds nothing. The kernels share this definition, so that a token's result does not depend on how
/// many tokens are computed with it.
///
/// Int8 keys meet queries rounded to int8, one scale per head: a score is an exact sum of products of codes, times both
/// scales. Values count with `weight[s] * scale[s]` in place of `weight[s]`; a kernel may round these to 16 bits, relative
/// to the largest of the span. Positions without weight do not count, whatever their value.
///
/// A 4-bit cache holds keys and values rotated, see [`crate::hadamard`]. Queries are rotated after they are scaled, and then
/// all is as with an int8 cache; the result of a head, `sums[d] / total`, is rotated back.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionSpec {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Factor on scores.
    pub scale: f32,
    /// Positions a token sees; all up to its own when absent.
    pub window: Option<usize>,
    pub kv: KvType,
    pub page_len: usize,
    /// Positions of a span, a multiple of `page_len` and of 16.
    pub span: usize,
}

impl AttentionSpec {
    /// What queries are multiplied by: scores are exponents of 2.
    pub fn query_scale(&self) -> f32 {
        (f64::from(self.scale) * std::f64::consts::LOG2_E) as f32
    }

    /// Query heads per KV head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Floats of one head's partial.
    pub fn partial_len(&self) -> usize {
        self.head_dim + 4
    }

    /// Tokens of a tile of [`KernelSpec::Attention`]: their query heads of one KV head share what is loaded and converted.
    pub fn tile_tokens(&self) -> usize {
        match self.group() {
            1 => 32,
            2..=4 => 16,
            5..=8 => 8,
            9..=16 => 4,
            _ => 1,
        }
    }

    /// First token and KV head of the tile that belongs to a grid item of [`KernelSpec::Attention`].
    ///
    /// The grid has `Hk` items per token and `Hk * (tile_tokens - 1)` more, so that every `tile_tokens`-th can stand for a
    /// tile; the others are empty. Later tokens come first: they see most and should not be what threads wait for.
    pub fn tile(&self, item: usize, tokens: usize) -> Option<(usize, usize)> {
        let (index, rest) = (item / self.tile_tokens(), item % self.tile_tokens());
        let tiles = tokens.div_ceil(self.tile_tokens());
        let tile = tiles.checked_sub(1 + index / self.kv_heads).filter(|_| rest == 0)?;
        Some((tile * self.tile_tokens(), index % self.kv_heads))
    }

    fn name(&self) -> String {
        let AttentionSpec { heads, kv_heads, head_dim, kv, page_len, span, .. } = self;
        let window = self.window.map_or(String::new(), |w| format!("_w{w}"));
        let scale = self.scale.to_bits();
        format!("{heads}_{kv_heads}x{head_dim}_s{scale:08x}{window}_{}_p{page_len}_n{span}", kv_name(*kv))
    }
}

/// How a kernel hands activations on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Activation {
    F32,
    /// Rows laid out as [`ActInt8Layout`].
    Int8,
}

/// Elementwise operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Elementwise {
    Add,
    Mul,
    Silu,
    Gelu,
}

/// Rows handled together by a matrix kernel: each weight is decoded once per tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RowTile {
    /// Exactly one row.
    One,
    /// A few rows, 1 to 16 on CPUs and to 32 on GPUs: the weights of a block are decoded once for 16 of them.
    Small,
    /// Any number of rows.
    Many,
}

/// `y[m, n] = sum_k x[m, k] w[n, k]`, then the epilogue.
///
/// Args: x (f32 rows of width K, or int8 rows when the format wants them), packed weight, then the epilogue's, then
/// `M` (number of rows) and the prefetch distance in bytes (which changes nothing but speed) as numbers. The grid runs
/// over channels, see [`LinearSpec::items`].
#[derive(Clone, Debug, PartialEq)]
pub struct LinearSpec {
    pub format: FormatRef,
    /// Output channels of the weight as packed.
    pub n: usize,
    pub k: usize,
    pub rows: RowTile,
    /// Adds a bias f32 `[N]` (in packed channel order) first; its address comes right after the weight's.
    pub bias: bool,
    pub epilogue: Epilogue,
}

/// What happens to the sums before they are stored.
#[derive(Clone, Debug, PartialEq)]
pub enum Epilogue {
    /// Args: out f32 `[M, N]`. Item: two blocks of 16 channels, or one where N is no multiple of 32.
    Store,
    /// `out = r + y`. Args: r f32 `[M, N]`, out f32 `[M, N]` (may be r itself). Item: as for `Store`.
    Residual,
    /// Blocks alternate: 16 gate channels, then the 16 up channels that belong to them. `out[m, f] = silu(gate) * up`.
    /// Args: out `[M, width]`, f32 or int8 rows (then `width` is a multiple of 32). Item: a pair of blocks, with int8 rows
    /// two pairs. N / 2 is F padded to 16 and `out` has `width` columns, the true F.
    Swiglu { width: usize, out: Activation },
    /// See [`QkvEpilogue`].
    Qkv(QkvEpilogue),
}

/// Heads come as whole multiples of `head_dim` channels (a multiple of 16): H query heads, Hk key heads, Hk value heads.
/// Optional per-head RMSNorm of q and k, rotary embedding of q and k, store of k and v in the cache.
///
/// Args: (q gain f32 `[Dh]`, k gain f32 `[Dh]` with `qk_norm`), rope f32 `[M, Dh]`, positions, seqs, block tables, table
/// stride, keys, values, out q f32 `[M, H, Dh]`, which nothing but the layer's attention reads. Item: a head.
#[derive(Clone, Debug, PartialEq)]
pub struct QkvEpilogue {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Eps of the head norms.
    pub qk_norm: Option<f32>,
    pub kv: KvType,
    pub page_len: usize,
}

impl LinearSpec {
    /// Grid items of one launch.
    pub fn items(&self) -> usize {
        self.n.div_ceil(CHANNELS).div_ceil(self.blocks_per_item())
    }

    /// Blocks of 16 channels of one grid item.
    pub fn blocks_per_item(&self) -> usize {
        match &self.epilogue {
            Epilogue::Store | Epilogue::Residual if self.n.is_multiple_of(2 * CHANNELS) => 2,
            Epilogue::Store | Epilogue::Residual => 1,
            Epilogue::Swiglu { out: Activation::F32, .. } => 2,
            Epilogue::Swiglu { out: Activation::Int8, .. } => 4,
            Epilogue::Qkv(q) => q.head_dim / CHANNELS,
        }
    }
}

/// A row of activations quantized to int8 in groups of 32: codes, one f32 scale per group, one i32 sum of the codes per
/// group. `x[k] ~ scale[k / 32] * code[k]`; scale is `amax / 127` (NaN when a
/// value of the group is NaN or infinite), codes round to nearest even.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ActInt8Layout {
    pub k: usize,
    pub groups: usize,
    /// Offset of the scales; the codes stand at 0.
    pub scales_offset: usize,
    /// Offset of the sums.
    pub sums_offset: usize,
    /// Bytes from one row to the next; a multiple of 64. At least 64 bytes follow the start of every sum, so that sums
    /// can be read as vectors.
    pub stride: usize,
}

impl ActInt8Layout {
    /// Weights and activations share their groups.
    pub const GROUP: usize = 32;

    /// Layout for rows of `k` values, a multiple of 32.
    pub fn new(k: usize) -> ActInt8Layout {
        let groups = k / Self::GROUP;
        let scales_offset = k.next_multiple_of(64);
        let sums_offset = scales_offset + groups * 4;
        let stride = (sums_offset + groups * 4 + 60).next_multiple_of(64);
        ActInt8Layout { k, groups, scales_offset, sums_offset, stride }
    }
}

impl KernelSpec {
    /// Name in entry tables; equal specs have equal names and different specs different ones.
    pub fn name(&self) -> String {
        match self {
            KernelSpec::Embed { format, vocab, dim } => format!("embed_{}_{vocab}x{dim}", format.name),
            KernelSpec::RmsNorm { dim, eps, gain, out } => {
                format!(
                    "rms_norm_{dim}_e{:08x}{}_{}",
                    eps.to_bits(),
                    if *gain { "_g" } else { "" },
                    out.name()
                )
            }
            KernelSpec::LayerNorm { dim, eps } => format!("layer_norm_{dim}_e{:08x}", eps.to_bits()),
            KernelSpec::Quantize { dim } => format!("quantize_{dim}"),
            KernelSpec::Linear(l) => l.name(),
            KernelSpec::Rope { heads, head_dim } => format!("rope_{heads}x{head_dim}"),
            KernelSpec::KvWrite { kv_heads, head_dim, kv, page_len } => {
                format!("kv_write_{kv_heads}x{head_dim}_{}_p{page_len}", kv_name(*kv))
            }
            KernelSpec::Attention { attention, out } => {
                format!("attention_{}_{}", attention.name(), out.name())
            }
            KernelSpec::AttentionSpan(attention) => format!("attention_span_{}", attention.name()),
            KernelSpec::AttentionMerge { attention, out } => {
                format!("attention_merge_{}_{}", attention.name(), out.name())
            }
            KernelSpec::Elementwise { op, dim } => format!("{}_{dim}", op.name()),
            KernelSpec::Softmax { dim } => format!("softmax_{dim}"),
            KernelSpec::GatherRows { dim } => format!("gather_rows_{dim}"),
            KernelSpec::Slice { dim, start, len } => format!("slice_{dim}_{start}_{len}"),
        }
    }
}

impl LinearSpec {
    fn name(&self) -> String {
        let rows = match self.rows {
            RowTile::One => "r1",
            RowTile::Small => "r16",
            RowTile::Many => "rn",
        };
        let bias = if self.bias { "_bias" } else { "" };
        let epilogue = match &self.epilogue {
            Epilogue::Store => String::new(),
            Epilogue::Residual => "_residual".to_owned(),
            Epilogue::Swiglu { width, out } => format!("_swiglu{width}_{}", out.name()),
            Epilogue::Qkv(q) => {
                let norm = q.qk_norm.map_or(String::new(), |e| format!("_n{:08x}", e.to_bits()));
                let kv = kv_name(q.kv);
                format!("_qkv{}_{}x{}{norm}_{kv}_p{}", q.heads, q.kv_heads, q.head_dim, q.page_len)
            }
        };
        format!("linear_{}_{}x{}_{rows}{bias}{epilogue}", self.format.name, self.n, self.k)
    }
}

impl Activation {
    fn name(self) -> &'static str {
        match self {
            Activation::F32 => "f32",
            Activation::Int8 => "i8",
        }
    }
}

impl Elementwise {
    fn name(self) -> &'static str {
        match self {
            Elementwise::Add => "add",
            Elementwise::Mul => "mul",
            Elementwise::Silu => "silu",
            Elementwise::Gelu => "gelu",
        }
    }
}

fn kv_name(kv: KvType) -> &'static str {
    match kv {
        KvType::F32 => "kvf32",
        KvType::F16 => "kvf16",
        KvType::Int8 => "kvi8",
        KvType::Int4 => "kvi4",
    }
}
