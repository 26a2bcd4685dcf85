//! The manifest: what the runtime must know about a model and where its sections stand.

use crate::program::Entry;
use attar_format::described::Codes;
use attar_format::{Description, FormatRef, Scale};
use serde::{Deserialize, Serialize};

/// Everything about the file that is not bulk data. Unknown fields are ignored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// `attar` and its version.
    pub generator: String,
    pub model: Model,
    pub sections: Vec<Section>,
    /// Weight tensors as packed, in file order.
    pub tensors: Vec<TensorEntry>,
    /// Weight formats of tensors that are not built in.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub formats: Vec<FormatEntry>,
    /// Why there is no certificate section; for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uncertified: Option<String>,
    /// Names of abilities beyond this version's that a reader must have; it refuses the file when it lacks one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub requires: Vec<String>,
}

/// The model as the runtime sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Model {
    /// Name for people.
    pub name: String,
    /// `llama`, `qwen3`, …
    pub architecture: String,
    pub layers: u32,
    pub hidden: u32,
    pub heads: u32,
    pub kv_heads: u32,
    pub head_dim: u32,
    /// Rows of the logits.
    pub vocab: u32,
    /// Longest context the model was made for, in tokens.
    pub context_length: u32,
    pub parameters: u64,
    pub rope: Vec<RopeTable>,
    pub kv: KvSpec,
    /// Generation stops at any of these; the first is the chat template's `eos_token`.
    pub eos: Vec<u32>,
    /// The chat template's `bos_token`. Whether it is put before a plain text is the tokenizer's affair.
    pub bos: Option<u32>,
}

/// Angles of one rotary embedding: `angle[i] = position * inv_freq[i]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RopeTable {
    pub inv_freq: Vec<f64>,
    /// Factor on cosine and sine.
    pub mscale: f64,
}

/// How keys and values are cached.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KvSpec {
    /// `f32`, `f16`, `int8` or `int4`.
    pub dtype: KvType,
    /// Tokens of one page.
    pub page_len: u32,
    /// Positions of one span, a multiple of `page_len`: attention sums span by span, whatever the batch.
    pub span: u32,
}

impl KvSpec {
    /// Spans of a context of that many tokens; at least 1.
    pub fn spans(&self, context: u64) -> u64 {
        context.div_ceil(u64::from(self.span).max(1)).max(1)
    }
}

/// Element type of the KV cache.
///
/// A layer's keys are blocks of `[Dh, page_len]` elements, one per page and KV head: the keys of a page stand side by side,
/// element by element, so that as many scores as a vector has lanes are summed at once. Values are blocks of
/// `[page_len, Dh]`. [`KvType::Int8`] keeps fours of what is summed over together, as dot products of bytes take them: keys
/// are `[Dh / 4, page_len, 4]`, values `[page_len / 4, Dh, 4]`, and a block ends, at the next multiple of 4, in `page_len`
/// f32 scales, one per token. [`KvType::Int4`] does the same with two codes to a byte, which belong to one token: keys are
/// `[Dh / 8, page_len, 4]` bytes, element `i` of an eight in the lower half of byte `i` and element `4 + i` in the upper one;
/// values are `[page_len / 4, Dh / 2, 4]` bytes, elements `d` and `Dh / 2 + d` in the two halves. [`KvType::element`] says where
/// an element stands in its block, [`KvType::block_index`] where a block does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KvType {
    F32,
    F16,
    /// A head's keys, or values, at one position: `x ~ scale * code`, `scale` is `amax / 127`, or NaN when one of them is NaN
    /// or infinite.
    Int8,
    /// `x ~ scale * (code - 8)`. What is stored are the head's numbers rotated by a Hadamard transform, see
    /// `attar_kernel::hadamard`: kernels rotate queries alike, and results back. `scale` is the number of the largest size, with
    /// its sign, divided by [`KvType::INT4_REACH`].
    Int4,
}

impl KvType {
    /// Bits of one element.
    pub fn bits(self) -> usize {
        match self {
            KvType::F32 => 32,
            KvType::F16 => 16,
            KvType::Int8 => 8,
            KvType::Int4 => 4,
        }
    }

    /// Whether elements are codes, and blocks end in their scales.
    pub fn has_scales(self) -> bool {
        matches!(self, KvType::Int8 | KvType::Int4)
    }

    /// What the number of the largest size becomes before it is rounded to the lowest code, -8. A little beyond it: of numbers
    /// that are spread normally, as rotation leaves them, the others gain more than the largest loses.
    pub const INT4_REACH: f32 = -8.5;

    /// Head dimensions of [`KvType::Int4`] are multiples of this.
    pub const INT4_HEAD: usize = 16;

    /// Pages whose blocks of one KV head stand together. Sequences mostly get neighbouring pages, so a head is read
    /// in long runs, which memory answers much faster than as many short ones.
    pub const RUN: usize = 8;

    /// Place of the block of a page and KV head among all blocks of a layer's keys, or values: `[pages / RUN, Hk, RUN]`.
    pub fn block_index(page: usize, kv_heads: usize, head: usize) -> usize {
        (page / Self::RUN * kv_heads + head) * Self::RUN + page % Self::RUN
    }

    /// Index within a block of element `d` of the key (`values` false) or value of the token at `place`. Of two elements
    /// in a byte the lower half comes first.
    pub fn element(self, values: bool, head_dim: usize, page_len: usize, place: usize, d: usize) -> usize {
        match (self, values) {
            (KvType::F32 | KvType::F16, false) => d * page_len + place,
            (KvType::F32 | KvType::F16, true) => place * head_dim + d,
            (KvType::Int8, false) => (d / 4 * page_len + place) * 4 + d % 4,
            (KvType::Int8, true) => (place / 4 * head_dim + d) * 4 + place % 4,
            (KvType::Int4, false) => (d / 8 * page_len + place) * 8 + d % 4 * 2 + d / 4 % 2,
            (KvType::Int4, true) => {
                let half = head_dim / 2;
                (place / 4 * half + d % half) * 8 + place % 4 * 2 + d / half
            }
        }
    }

    /// Offset of the scales in a block of one page and KV head.
    pub fn scales_offset(self, head_dim: usize, page_len: usize) -> usize {
        (head_dim * page_len * self.bits()).div_ceil(8).next_multiple_of(4)
    }

    /// Bytes of a block: the keys, or the values, of one page and KV head.
    pub fn block_bytes(self, head_dim: usize, page_len: usize) -> usize {
        let scales = if self.has_scales() { page_len * 4 } else { 0 };
        self.scales_offset(head_dim, page_len) + scales
    }
}

/// What a section holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum SectionKind {
    /// All packed tensors.
    Weights,
    /// Machine code for one target: a flat position-independent image.
    Code {
        /// `x86-64-v3`, `aarch64+dotprod`, …
        target: String,
        /// CPU features the code uses, as the loader probes them.
        features: Vec<String>,
        entries: Vec<Entry>,
        /// Prefill programs compute rows with other arithmetic than the other programs do, so that logits depend on
        /// how a prompt is cut into steps. Whoever wants them not to leaves that program out.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        prefill_differs: bool,
    },
    /// JSON list of [`crate::program::Program`] for a device class.
    Programs {
        /// `cpu`, `cuda`.
        device: String,
    },
    /// `tokenizer.json` as the `tokenizers` crate reads it.
    Tokenizer,
    /// The tokenizer again, in the form of [`crate::vocabulary`], which opens faster.
    Vocabulary,
    /// The chat template (Jinja).
    ChatTemplate,
    /// `.air` text of the final graph.
    Graph,
    /// The resolved recipe (TOML) with the hashes of all inputs.
    Recipe,
    /// The measured quality certificate (JSON).
    Certificate,
    /// A kind this version does not know.
    #[serde(other)]
    Unknown,
}

impl SectionKind {
    /// Name for messages: the kind, and what tells sections of one kind apart.
    pub fn name(&self) -> String {
        match self {
            SectionKind::Weights => "weights".to_owned(),
            SectionKind::Code { target, .. } => format!("code {target}"),
            SectionKind::Programs { device } => format!("programs {device}"),
            SectionKind::Tokenizer => "tokenizer".to_owned(),
            SectionKind::Vocabulary => "vocabulary".to_owned(),
            SectionKind::ChatTemplate => "chat_template".to_owned(),
            SectionKind::Graph => "graph".to_owned(),
            SectionKind::Recipe => "recipe".to_owned(),
            SectionKind::Certificate => "certificate".to_owned(),
            SectionKind::Unknown => "of unknown kind".to_owned(),
        }
    }
}

/// The device class whose programs a code target runs: `cuda` for `cuda:sm_90a` and its like, else `cpu`.
pub fn device_of_target(target: &str) -> &'static str {
    if target == "cuda" || target.starts_with("cuda:") { "cuda" } else { "cpu" }
}

/// One section of the file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Section {
    #[serde(flatten)]
    pub kind: SectionKind,
    /// From the start of the file; a multiple of the page size 4096.
    pub offset: u64,
    pub len: u64,
    /// BLAKE3 of the section's bytes, hexadecimal.
    pub hash: String,
    /// BLAKE3 of each 1 MiB chunk, hexadecimal; only for large sections.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub chunks: Vec<String>,
    /// A reader that does not know the kind must refuse the file.
    #[serde(default, skip_serializing_if = "is_false")]
    pub required: bool,
    /// The section is a zlib stream (RFC 1950) of a text of so many bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inflated: Option<u64>,
}

/// A packed weight tensor within the weights section.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TensorEntry {
    pub name: String,
    /// Name of the weight format; vectors are plain `f32`.
    pub format: String,
    /// `[N, K]`, or `[D]`.
    pub shape: Vec<u64>,
    /// From the start of the weights section; a multiple of 64.
    pub offset: u64,
    pub len: u64,
}

/// The layout of a weight format that a plugin has described.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FormatEntry {
    pub name: String,
    /// Where the idea comes from.
    pub source: String,
    /// Weights along K that share a scale.
    pub group: usize,
    pub codes: FormatCodes,
    pub scale: FormatScale,
}

/// What the codes of a [`FormatEntry`] stand for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum FormatCodes {
    /// Signed bytes.
    Int8,
    /// Indices into a table; entries and shift are those a tensor has unless it brings its own.
    Table { bits: usize, entries: Vec<i8>, shift: i8 },
}

/// How the scales of a [`FormatEntry`] are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum FormatScale {
    /// One bf16 per group.
    Bf16,
    /// One f32 per row and a byte per group.
    RowF32Field8 { bias: i32, choice_bits: u32 },
}

impl FormatEntry {
    /// The entry of a described format; `None` for a built-in one.
    pub(crate) fn of(format: FormatRef) -> Option<FormatEntry> {
        let d = Description::of(format).filter(|_| attar_format::is_described(format))?;
        Some(FormatEntry {
            name: d.name,
            source: d.source,
            group: d.group,
            codes: match d.codes {
                Codes::Int8 => FormatCodes::Int8,
                Codes::Table { bits, entries, shift } => FormatCodes::Table { bits, entries, shift },
            },
            scale: match d.scale {
                Scale::RowF32Field8 { bias, choice_bits } => FormatScale::RowF32Field8 { bias, choice_bits },
                Scale::Bf16 | Scale::None => FormatScale::Bf16,
            },
        })
    }

    /// The description it is; not checked.
    pub fn description(&self) -> Description {
        Description {
            name: self.name.clone(),
            source: self.source.clone(),
            group: self.group,
            codes: match &self.codes {
                FormatCodes::Int8 => Codes::Int8,
                FormatCodes::Table { bits, entries, shift } => {
                    Codes::Table { bits: *bits, entries: entries.clone(), shift: *shift }
                }
            },
            scale: match self.scale {
                FormatScale::Bf16 => Scale::Bf16,
                FormatScale::RowF32Field8 { bias, choice_bits } => Scale::RowF32Field8 { bias, choice_bits },
            },
        }
    }
}

fn is_false(b: &bool) -> bool {
    !*b
}
