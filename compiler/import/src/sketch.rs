//! A model of the same shapes with other numbers, and any number of layers: what plans are measured on. No tensor of the
//! checkpoint is read.

use crate::arch::{self, Blocks};
use crate::config::ModelConfig;
use crate::error::Result;
use crate::model::Imported;
use attar_ir::{WeightReader, WeightStore};
use std::sync::Arc;

/// What the graph was built from.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    pub(crate) config: ModelConfig,
    pub(crate) blocks: Blocks,
}

impl Imported {
    /// The same architecture, widths, tokenizer and template with `layers` layers and made-up weights, which are the same every
    /// time.
    ///
    /// # Errors
    /// When an op's rule is broken, which is a bug: the shapes are those of a checked model.
    pub fn into_sketch(self, layers: usize) -> Result<Imported> {
        let Imported { mut model, shape: Shape { mut config, mut blocks }, .. } = self;
        config.layers = layers;
        // Windows of models repeat from layer to layer.
        let windows = &blocks.windows;
        blocks.windows =
            (0..layers).map(|l| windows.get(l % windows.len().max(1)).copied().flatten()).collect();
        let mut weights = WeightStore::new();
        for spec in arch::weights(&config, &blocks, model.tied) {
            weights.add_reader(&spec.name, &spec.shape, Arc::new(MadeUp { shape: spec.shape.clone() }));
        }
        let rope = config.rope.table(config.head_dim);
        let graph = arch::build("step", &config, &blocks, model.tied, &rope)?;
        model.layers = layers;
        model.windows.clone_from(&blocks.windows);
        Ok(Imported { graph, weights, model, shape: Shape { config, blocks }, ..self })
    }
}

/// Numbers from a sequence, evenly spread, with the variance that keeps activations in range; ones where a vector scales.
struct MadeUp {
    shape: Vec<usize>,
}

impl WeightReader for MadeUp {
    fn read_f32(&self) -> attar_ir::Result<Vec<f32>> {
        let len = self.shape.iter().product();
        let [_, k] = self.shape[..] else { return Ok(vec![1.0; len]) };
        let limit = (3.0 / k as f64).sqrt();
        let number = |i: usize| {
            // The upper bits of multiples of an odd constant are as good as random here.
            let bits = (i as u64).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let bits = (bits ^ (bits >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40;
            ((bits as f64 / f64::from(1 << 23) - 1.0) * limit) as f32
        };
        Ok((0..len).map(number).collect())
    }

    fn stored_as(&self) -> String {
        "made up".to_owned()
    }
}
