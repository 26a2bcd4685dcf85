//! `prune-nm`: keeps N of every M weights along the inputs of a matrix, those that count most.
//!
//! Without calibration what counts is the magnitude. With it, a magnitude is multiplied by how large the inputs of its column
//! are, so that small weights on large inputs stay (Wanda: Sun et al. 2023, arXiv:2306.11695). Kernels compute zeros as they do
//! other weights: the pass shows what a model can lose.

use attar_plugin::{About, Context, Error, ErrorKind, Numerics, Pass, Phase, Result};

attar_plugin::options! {
    /// Options of the pass.
    pub struct Options {
        /// weights that stay in each group
        pub n: usize = 2, int 1..=64;
        /// weights of a group
        pub m: usize = 4, int 2..=64;
        /// weigh magnitudes by the size of the layer's inputs, where calibration is allowed
        pub weigh: bool = true;
    }
}

/// See the crate's documentation.
#[derive(Debug)]
pub struct PruneNm;

attar_plugin::plugin! { passes: [PruneNm] }

impl Pass for PruneNm {
    type Options = Options;

    const ABOUT: About = About {
        name: "prune-nm",
        summary: "keeps N of every M weights, those that count most by magnitude and activations",
        phase: Phase::Compress,
        numerics: Numerics::Lossy,
        takes_tensors: true,
    };

    fn run(options: &Options, cx: &Context<'_>) -> Result<()> {
        if options.n > options.m {
            let Options { n, m, .. } = options;
            return Err(Error::new(format!(
                "n is {n} and m is {m}: no group of {m} keeps {n}; make n smaller"
            )));
        }
        let wanted = cx.tensors()?;
        let linears = cx.nodes_of("linear")?;
        for (done, node) in linears.iter().enumerate() {
            let inputs = cx.inputs_of(*node)?;
            let Some(name) = cx.weight_of(inputs[1])? else { continue };
            cx.progress(&name, done as u64, linears.len() as u64)?;
            let info = cx.tensor(&name)?;
            if !wanted.contains(&name) || info.elem != "f32" || !cx.rewrite(&name)? {
                continue;
            }
            let width = info.shape[1];
            let importance = if options.weigh { importance(cx, inputs[0])? } else { None };
            let importance = importance.unwrap_or_else(|| vec![1.0; width]);
            let mut weights = cx.edit(&name)?;
            for row in weights.chunks_exact_mut(width) {
                for (group, importance) in row.chunks_mut(options.m).zip(importance.chunks(options.m)) {
                    keep(group, importance, options.n);
                }
            }
            let zeros = weights.iter().filter(|w| **w == 0.0).count() as f64 / weights.len() as f64;
            weights.commit()?;
            cx.metric(&name, [("zeros", zeros.into())])?;
        }
        Ok(())
    }
}

/// Root mean squares of the columns of a layer's inputs; `None` without calibration.
fn importance(cx: &Context<'_>, input: attar_plugin::Value) -> Result<Option<Vec<f32>>> {
    match cx.statistics(input) {
        Ok(statistics) => Ok(Some(statistics.mean_squares().into_iter().map(f32::sqrt).collect())),
        Err(e) if e.kind == ErrorKind::Unavailable => Ok(None),
        Err(e) => Err(e),
    }
}

/// Makes all but the `n` weights of a group that count most zero; of equals the first stay.
fn keep(group: &mut [f32], importance: &[f32], n: usize) {
    let mut order: Vec<usize> = (0..group.len()).collect();
    let score = |at: usize| group[at].abs() * importance[at];
    order.sort_by(|a, b| score(*b).total_cmp(&score(*a)).then(a.cmp(b)));
    for at in order.into_iter().skip(n) {
        group[at] = 0.0;
    }
}

#[cfg(test)]
mod tests {
    use super::keep;

    #[test]
    fn importance_outweighs_magnitude() {
        let mut group = [1.0, -2.0, 3.0, 4.0];
        keep(&mut group, &[10.0, 1.0, 1.0, 1.0], 2);
        assert_eq!(group, [1.0, 0.0, 0.0, 4.0]);
    }
}
