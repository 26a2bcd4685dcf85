//! Architectures, one file each: what a configuration means for the blocks of the decoder.

mod decoder;
mod llama;
mod mistral;
mod qwen2;
mod qwen3;

pub use decoder::{Blocks, WeightSpec, build, weights};

use crate::config::ModelConfig;

/// One architecture.
pub struct Architecture {
    /// `model_type` of `config.json`, and name in messages.
    pub name: &'static str,
    /// Class of `architectures` in `config.json`.
    pub class: &'static str,
    /// `general.architecture` of a GGUF file, if files of it call themselves so.
    pub gguf: Option<&'static str>,
    /// Whether llama.cpp's converter interleaves the rows of queries and keys.
    pub gguf_interleaves: bool,
    /// What its blocks look like.
    pub blocks: fn(&ModelConfig, &Has<'_>) -> Blocks,
}

/// Tells whether the checkpoint holds a tensor of that (Hugging Face) name.
pub type Has<'a> = dyn Fn(&str) -> bool + 'a;

/// Every architecture that can be imported.
pub const ALL: [&Architecture; 4] =
    [&llama::ARCHITECTURE, &mistral::ARCHITECTURE, &qwen2::ARCHITECTURE, &qwen3::ARCHITECTURE];

/// Names for messages.
pub fn names() -> Vec<&'static str> {
    ALL.map(|a| a.name).to_vec()
}

/// The architecture of a `model_type` and, when given, the class that was saved.
pub fn by_model_type(model_type: &str, class: Option<&str>) -> Option<&'static Architecture> {
    ALL.into_iter().find(|a| a.name == model_type && class.is_none_or(|c| c == a.class))
}

/// The architecture of that class.
pub fn by_class(class: &str) -> Option<&'static Architecture> {
    ALL.into_iter().find(|a| a.class == class)
}

/// The architecture a GGUF file calls `name`.
pub fn by_gguf(name: &str) -> Option<&'static Architecture> {
    ALL.into_iter().find(|a| a.gguf == Some(name))
}

impl std::fmt::Debug for Architecture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}
