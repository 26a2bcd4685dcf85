//! What an import yields, and the step all containers share: checking tensors against the architecture and building
//! graph and weight store.

use crate::arch::{self, Architecture, Blocks, WeightSpec};
use crate::config::ModelConfig;
use crate::container::{RowOrder, TensorReader};
use crate::error::{Error, ErrorKind, Problems, Result};
use crate::rope::RopeTable;
use crate::sketch::Shape;
use attar_ir::{Graph, WeightStore};
use indexmap::IndexMap;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

/// A checkpoint, ready to be compiled.
#[derive(Debug)]
pub struct Imported {
    /// One step of the model in core ops.
    pub graph: Graph,
    /// Every weight the graph names, read from the mapped files when asked for.
    pub weights: WeightStore,
    pub model: ModelInfo,
    /// Text of a `tokenizer.json`; `None` when the checkpoint has no tokenizer.
    pub tokenizer_json: Option<String>,
    /// Jinja source.
    pub chat_template: Option<String>,
    pub source: SourceInfo,
    pub(crate) shape: Shape,
}

/// What the runtime and reports need to know of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelInfo {
    /// As the checkpoint calls itself, or architecture and size.
    pub name: String,
    pub architecture: &'static str,
    pub layers: usize,
    pub hidden: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub ffn: usize,
    pub vocab: usize,
    /// Longest context the model was made for, in tokens.
    pub context_length: usize,
    /// Values of all weights; a head that is the embedding counts once.
    pub parameters: u64,
    /// Distinct rotations, in order of first use.
    pub rope: Vec<RopeTable>,
    /// Attention window of each layer in tokens.
    pub windows: Vec<Option<usize>>,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Tokens that end a text.
    pub eos: Vec<u32>,
    pub bos: Option<u32>,
    /// Whether a text begins with `bos`.
    pub add_bos: bool,
    /// Texts of tokens with a meaning, as chat templates name them: `bos_token`, `eos_token`, `unk_token`, `pad_token`.
    pub special_tokens: BTreeMap<String, String>,
}

/// Where a checkpoint came from.
#[derive(Clone, Debug, PartialEq)]
pub struct SourceInfo {
    /// `safetensors` or `gguf`.
    pub container: &'static str,
    /// Every file that was read.
    pub files: Vec<SourceFile>,
}

/// A file that was read.
#[derive(Clone, Debug, PartialEq)]
pub struct SourceFile {
    pub path: PathBuf,
    pub len: u64,
}

/// Tokenizer, template, and tokens with a meaning.
#[derive(Debug)]
pub(crate) struct Specials {
    pub(crate) eos: Vec<u32>,
    pub(crate) bos: Option<u32>,
    pub(crate) add_bos: bool,
    pub(crate) texts: BTreeMap<String, String>,
    pub(crate) tokenizer_json: Option<String>,
    pub(crate) chat_template: Option<String>,
}

/// Tensors of a checkpoint under the names its files give them.
#[derive(Debug, Default)]
pub(crate) struct Stored {
    pub(crate) tensors: IndexMap<String, TensorReader>,
    /// A file could not be read, so a tensor that is not here may well exist.
    pub(crate) incomplete: bool,
    pub(crate) problems: Problems,
}

/// Everything a container has yielded, and how it names and stores weights.
pub(crate) struct Found {
    pub(crate) arch: &'static Architecture,
    pub(crate) config: ModelConfig,
    pub(crate) stored: Stored,
    pub(crate) rows: fn(&WeightSpec) -> RowOrder,
    pub(crate) name_of: fn(&WeightSpec) -> &String,
    /// Tensors without a use that may be there; told whether the head is tied.
    pub(crate) ignored: fn(&str, bool) -> bool,
    pub(crate) name: Option<String>,
    pub(crate) specials: Specials,
    pub(crate) source: SourceInfo,
}

impl Found {
    /// Checks tensors and builds the graph, unless something is wrong.
    ///
    /// # Errors
    /// All problems, those found before included.
    pub(crate) fn import(mut self, mut problems: Problems) -> Result<Imported> {
        problems.extend(std::mem::take(&mut self.stored.problems));
        let (blocks, tied) = self.blocks();
        let specs = arch::weights(&self.config, &blocks, tied);
        let mut weights = WeightStore::new();
        let mut used = BTreeSet::new();
        let mut parameters = 0u64;
        for spec in &specs {
            let name = (self.name_of)(spec);
            used.insert(name.as_str());
            let Some(reader) = self.stored.tensors.get(name) else {
                if !self.stored.incomplete {
                    let kind = ErrorKind::MissingTensor { shape: spec.shape.clone() };
                    problems.push(Error::new(kind).at_tensor(name));
                }
                continue;
            };
            if reader.entry.shape != spec.shape {
                let kind = ErrorKind::Shape { expected: spec.shape.clone(), got: reader.entry.shape.clone() };
                problems.push(Error::new(kind).at_tensor(name).at_file(&reader.file.path));
                continue;
            }
            parameters += spec.shape.iter().product::<usize>() as u64;
            let reader = TensorReader {
                file: reader.file.clone(),
                entry: reader.entry.clone(),
                rows: (self.rows)(spec),
            };
            weights.add_reader(&spec.name, &spec.shape, Arc::new(reader));
        }
        for (name, reader) in &self.stored.tensors {
            if !used.contains(name.as_str()) && !(self.ignored)(name, tied) {
                let kind = ErrorKind::UnexpectedTensor { shape: reader.entry.shape.clone() };
                problems.push(Error::new(kind).at_tensor(name).at_file(&reader.file.path));
            }
        }
        problems.finish(())?;

        let rope = self.config.rope.table(self.config.head_dim);
        let graph = arch::build("step", &self.config, &blocks, tied, &rope)?;
        let Found { arch, config, specials, source, name, .. } = self;
        let name = name.filter(|n| !n.trim().is_empty()).unwrap_or_else(|| described(arch.name, parameters));
        let model = ModelInfo {
            name,
            architecture: arch.name,
            layers: config.layers,
            hidden: config.hidden,
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            ffn: config.ffn,
            vocab: config.vocab,
            context_length: config.context_length,
            parameters,
            rope: vec![rope],
            windows: blocks.windows.clone(),
            tied,
            eos: specials.eos,
            bos: specials.bos,
            add_bos: specials.add_bos,
            special_tokens: specials.texts,
        };
        Ok(Imported {
            graph,
            weights,
            model,
            tokenizer_json: specials.tokenizer_json,
            chat_template: specials.chat_template,
            source,
            shape: Shape { config, blocks },
        })
    }

    /// The blocks, and whether the head is the embedding: as the configuration says, else as the tensors are.
    fn blocks(&self) -> (Blocks, bool) {
        let everything =
            Blocks { qkv_bias: true, o_bias: true, mlp_bias: true, qk_norm: true, windows: Vec::new() };
        // One layer tells the names of all: what is asked for is in layer 0 or above the layers.
        let first = ModelConfig { layers: 1, ..self.config.clone() };
        let specs = arch::weights(&first, &everything, false);
        let has = |name: &str| {
            let spec = specs.iter().find(|s| s.name == name);
            spec.is_some_and(|s| self.stored.tensors.contains_key((self.name_of)(s)))
        };
        let tied = self.config.tied.unwrap_or_else(|| !has("lm_head.weight"));
        ((self.arch.blocks)(&self.config, &has), tied)
    }
}

/// `llama 134.5M`.
fn described(arch: &str, parameters: u64) -> String {
    let n = parameters as f64;
    match parameters {
        0..1_000_000 => format!("{arch} {:.1}K", n / 1e3),
        1_000_000..1_000_000_000 => format!("{arch} {:.1}M", n / 1e6),
        _ => format!("{arch} {:.1}B", n / 1e9),
    }
}
