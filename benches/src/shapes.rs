//! The matrix products and attentions of two models, as lowering makes them.

/// A model whose shapes are measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Model {
    /// SmolLM2-135M.
    Smollm2,
    /// Llama-3.2-1B.
    #[value(name = "1b")]
    OneB,
}

/// Sizes that all shapes follow from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub(crate) name: &'static str,
    /// Model width.
    pub(crate) d: usize,
    /// FFN width.
    pub(crate) f: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) vocab: usize,
}

impl Model {
    pub(crate) fn sizes(self) -> Sizes {
        match self {
            Model::Smollm2 => {
                Sizes { name: "smollm2", d: 576, f: 1536, heads: 9, kv_heads: 3, head_dim: 64, vocab: 49152 }
            }
            Model::OneB => {
                Sizes { name: "1b", d: 2048, f: 8192, heads: 32, kv_heads: 8, head_dim: 64, vocab: 128_256 }
            }
        }
    }
}

impl Sizes {
    /// Name, output channels and inputs of every matrix of a step: q, k and v are one, so are gate and up.
    pub(crate) fn matrices(&self) -> [(&'static str, usize, usize); 5] {
        let qkv = (self.heads + 2 * self.kv_heads) * self.head_dim;
        [
            ("qkv", qkv, self.d),
            ("o", self.d, self.heads * self.head_dim),
            ("gate-up", 2 * self.f, self.d),
            ("down", self.d, self.f),
            ("head", self.vocab, self.d),
        ]
    }
}
