//! `prune-magnitude`: makes the weights of least magnitude zero.
//!
//! Before and after: the same graph; matrices hold zeros where their weights were small.
//! `unstructured` makes a share `sparsity` of the weights of each row (or of the whole matrix) zero. `N:M` keeps the N largest
//! of every M neighbours along K, whatever `sparsity` says. Of equal magnitudes the earlier one stays.
//! Preconditions: matrices that no pass has encoded. Rows of `N:M` patterns end in a shorter group where K is no multiple
//! of M; that keeps at most N.
//! Numerics: lossy.   Cost: one sort of each row.
//! What it is worth: weights that are zero cost no less than others in the kernels there are, so the pass is for studies of what
//! a model can lose, for formats that store zeros well, and as the first step of healing. It says so in its metrics: nothing
//! is claimed but the share of zeros.
//! References: Han et al. 2015, arXiv:1506.02626 (magnitudes); Mishra et al. 2021, arXiv:2104.08378 (N:M patterns).
//!
//! Written against `attar-plugin`: the same file, built as a shared library, is a plugin.

use attar_plugin::{About, Context, Error, Numerics, Pass, Phase, Result};

attar_plugin::options! {
    /// Options of the pass.
    pub(crate) struct Options {
        /// share of the weights that become zero, with the pattern `unstructured`
        pub(crate) sparsity: f64 = 0.5, float 0.0..=1.0;
        /// which weights may be zero together: any, or all but the N largest of every M along K
        pub(crate) pattern: String = "unstructured", of ["unstructured", "1:4", "2:4", "4:8"];
        /// what weights are compared with, with the pattern `unstructured`: their row, or the whole matrix
        pub(crate) scope: String = "row", of ["row", "tensor"];
    }
}

/// See the file's header.
pub(crate) struct PruneMagnitude;

attar_plugin::plugin! { passes: [PruneMagnitude] }

impl Pass for PruneMagnitude {
    type Options = Options;

    const ABOUT: About = About {
        name: "prune-magnitude",
        summary: "makes the weights of least magnitude zero, in any place or N of every M",
        phase: Phase::Compress,
        numerics: Numerics::Lossy,
        takes_tensors: true,
    };

    fn run(options: &Options, cx: &Context<'_>) -> Result<()> {
        let names = cx.tensors()?;
        for (done, name) in names.iter().enumerate() {
            cx.progress(name, done as u64, names.len() as u64)?;
            let info = cx.tensor(name)?;
            if info.shape.len() != 2 || info.elem != "f32" {
                if info.is_explicit {
                    return Err(Error::new(format!("tensor {name} is no uncompressed matrix; leave it out")));
                }
                continue;
            }
            let mut weights = cx.edit(name)?;
            let width = info.shape[1];
            let zeros_before = count_zeros(&weights);
            match options.pattern.split_once(':') {
                Some((n, m)) => {
                    let number = |text: &str| text.parse::<usize>().map_err(|e| Error::new(e.to_string()));
                    let (n, m) = (number(n)?, number(m)?);
                    for row in weights.chunks_exact_mut(width) {
                        row.chunks_mut(m).for_each(|group| keep_largest(group, n));
                    }
                }
                None => {
                    let scope = if options.scope == "row" { width } else { weights.len() };
                    for part in weights.chunks_exact_mut(scope) {
                        let lost = (part.len() as f64 * options.sparsity).round() as usize;
                        keep_largest(part, part.len() - lost.min(part.len()));
                    }
                }
            }
            let zeros = count_zeros(&weights);
            if zeros == zeros_before || !cx.rewrite(name)? {
                continue;
            }
            let share = zeros as f64 / weights.len() as f64;
            weights.commit()?;
            cx.metric(name, [("zeros", share.into())])?;
        }
        cx.progress("", names.len() as u64, names.len() as u64)
    }
}

fn count_zeros(weights: &[f32]) -> usize {
    weights.iter().filter(|w| **w == 0.0).count()
}

/// Makes all but the `count` numbers of largest magnitude zero.
fn keep_largest(numbers: &mut [f32], count: usize) {
    if count >= numbers.len() {
        return;
    }
    let mut order: Vec<usize> = (0..numbers.len()).collect();
    // By magnitude, and among equals by place: the order is one and the same everywhere.
    let later = |a: &usize, b: &usize| numbers[*b].abs().total_cmp(&numbers[*a].abs()).then(a.cmp(b));
    order.select_nth_unstable_by(count, later);
    for at in &order[count..] {
        numbers[*at] = 0.0;
    }
}

#[cfg(test)]
mod tests {
    use super::keep_largest;

    #[test]
    fn the_largest_stay_and_of_equals_the_first() {
        let mut numbers = [3.0, -5.0, 1.0, 4.0, -3.0];
        keep_largest(&mut numbers, 3);
        assert_eq!(numbers, [3.0, -5.0, 0.0, 4.0, 0.0]);
        keep_largest(&mut numbers, 0);
        assert_eq!(numbers, [0.0; 5]);
        let mut all = [1.0, 2.0];
        keep_largest(&mut all, 2);
        assert_eq!(all, [1.0, 2.0]);
    }
}
