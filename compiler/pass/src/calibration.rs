//! What a model's linear layers are fed with: statistics that compression weighs its errors by.
//!
//! Passes ask; whoever runs the pipeline answers, for running a model over text is no business of a pass.

use crate::error::{Error, ErrorKind, Result};
use attar_ir::{Graph, ValueId, WeightName, WeightStore};
use std::ops::Range;

/// Second moments of the rows `X` `[n_tokens, K]` that reach one value during calibration.
#[derive(Clone, Debug, PartialEq)]
pub struct InputStatistics {
    /// Rows seen.
    pub n_tokens: u64,
    /// K, the width of a row.
    pub width: usize,
    /// `H = Xᵀ X`, `[K, K]`, symmetric, row-major; the sum over all rows, not their mean.
    pub second_moment: Vec<f32>,
    /// Least and greatest value in each column of `X`, `[K]`; infinite while there are no rows.
    pub minimum: Vec<f32>,
    pub maximum: Vec<f32>,
    /// Sum of the fourth powers in each column of `X`, `[K]`.
    pub fourth_moment: Vec<f64>,
}

impl InputStatistics {
    /// Statistics of no rows.
    pub fn zeros(width: usize) -> InputStatistics {
        InputStatistics {
            n_tokens: 0,
            width,
            second_moment: vec![0.0; width * width],
            minimum: vec![f32::INFINITY; width],
            maximum: vec![f32::NEG_INFINITY; width],
            fourth_moment: vec![0.0; width],
        }
    }

    /// Mean of the squares in each column of `X`, `[K]`.
    pub fn mean_squares(&self) -> Vec<f32> {
        let count = self.n_tokens.max(1) as f32;
        (0..self.width).map(|i| self.second_moment[i * self.width + i] / count).collect()
    }

    /// Largest magnitude in each column of `X`, `[K]`.
    pub fn max_abs(&self) -> Vec<f32> {
        self.minimum.iter().zip(&self.maximum).map(|(low, high)| high.max(-low).max(0.0)).collect()
    }

    /// Mean of the fourth powers over the square of the mean square, of each column of `X`: 1 when all values are of one size, 3
    /// for normal numbers, more where a few stand out. 0 for a column of zeros.
    pub fn kurtosis(&self) -> Vec<f64> {
        let count = self.n_tokens.max(1) as f64;
        let square = |i: usize| f64::from(self.second_moment[i * self.width + i]) / count;
        (0..self.width).map(|i| ratio(self.fourth_moment[i] / count, square(i))).collect()
    }

    /// The same of all values together: large when some columns are much larger than others, too.
    pub fn layer_kurtosis(&self) -> f64 {
        let count = self.n_tokens.max(1) as f64 * self.width.max(1) as f64;
        ratio(self.fourth_moment.iter().sum::<f64>() / count, self.layer_square())
    }

    /// Mean of the squares of all values.
    pub fn layer_square(&self) -> f64 {
        let count = self.n_tokens.max(1) as f64 * self.width.max(1) as f64;
        (0..self.width).map(|i| f64::from(self.second_moment[i * self.width + i])).sum::<f64>() / count
    }

    /// Adds what another run over the same value has seen.
    ///
    /// Widths must be equal.
    pub fn merge(&mut self, other: &InputStatistics) {
        assert_eq!(self.width, other.width);
        self.n_tokens += other.n_tokens;
        for (a, b) in self.second_moment.iter_mut().zip(&other.second_moment) {
            *a += b;
        }
        for (a, b) in self.minimum.iter_mut().zip(&other.minimum) {
            *a = a.min(*b);
        }
        for (a, b) in self.maximum.iter_mut().zip(&other.maximum) {
            *a = a.max(*b);
        }
        for (a, b) in self.fourth_moment.iter_mut().zip(&other.fourth_moment) {
            *a += b;
        }
    }
}

/// A mean of fourth powers over the square of a mean square.
fn ratio(fourth: f64, square: f64) -> f64 {
    if square > 0.0 { fourth / (square * square) } else { 0.0 }
}

/// How far values have moved from those of the uncompressed model by the time they reach a linear layer. `X̂` `[n_tokens, K]`
/// are the layer's inputs as they are now, `X` those of the uncompressed model on the same text.
#[derive(Clone, Debug, PartialEq)]
pub struct InputDrift {
    /// `(X - X̂)ᵀ X̂`, `[K, K]`, row-major.
    pub of_input: Vec<f32>,
    /// `(R - R̂)ᵀ X̂`, `[M, K]`, for the value R `[n_tokens, M]` that was asked for beside.
    pub of_sum: Option<Vec<f32>>,
    /// Tokens behind it; when they do not count alike, `(Σ c)² / Σ c²` of what they count.
    pub n_effective: f64,
}

/// The nodes that compute one value from another and from weights alone, such as a decoder layer between two states of the
/// residual stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    pub from: ValueId,
    pub to: ValueId,
}

/// How far a part is from what the uncompressed model gives there.
#[derive(Clone, Debug, PartialEq)]
pub struct PartGradient {
    /// Mean over tokens of `|ŷ - y|² / |y|²`.
    pub loss: f64,
    /// Its derivatives by the changed weights, summed over tokens; none when only the loss was asked for.
    pub weights: Vec<Vec<f32>>,
}

/// How far predictions of the compressed model are from the uncompressed model's, and which way factors of its rows lead nearer.
#[derive(Clone, Debug, PartialEq)]
pub struct GainGradient {
    /// Mean Kullback-Leibler divergence over tokens, in nats.
    pub divergence: f64,
    /// Its derivatives by the factors that were given, in the same order; zeros when only the divergence was asked for.
    pub slopes: Vec<Vec<f32>>,
}

impl GainGradient {
    /// That of no text.
    pub fn zeros(gains: &[(WeightName, Vec<f32>)]) -> GainGradient {
        GainGradient { divergence: 0.0, slopes: gains.iter().map(|(_, g)| vec![0.0; g.len()]).collect() }
    }
}

/// Runs the model over calibration text on behalf of passes.
pub trait Calibrator {
    /// Statistics of the value `input`, a real `[.., K]`, computed by the graph and the weights as they are now: weights
    /// that a pass has encoded count as what they decode to. Asking in topological order costs one run over the model
    /// in all; a value before the last one asked for costs a new run.
    ///
    /// `progress` is told what is being done, and how many of how many parts of it are done.
    ///
    /// # Errors
    /// [`ErrorKind::Calibration`](crate::ErrorKind::Calibration) when there is no usable text, a value is not finite, or
    /// saved statistics do not know the value; those of reading weights.
    fn input_statistics(
        &mut self,
        graph: &Graph,
        weights: &WeightStore,
        input: ValueId,
        progress: &mut dyn FnMut(&str, u64, u64),
    ) -> Result<InputStatistics>;

    /// Largest magnitude in each column of the value `input`, a real `[.., K]`, over a part of the text: extremes show after
    /// fewer tokens than second moments. By default that of [`Calibrator::input_statistics`].
    ///
    /// # Errors
    /// As [`Calibrator::input_statistics`].
    fn input_sizes(
        &mut self,
        graph: &Graph,
        weights: &WeightStore,
        input: ValueId,
        progress: &mut dyn FnMut(&str, u64, u64),
    ) -> Result<Vec<f32>> {
        Ok(self.input_statistics(graph, weights, input, progress)?.max_abs())
    }

    /// How far `input` has drifted from what it is without encoded weights, and beside it `sum`, a value computed before it.
    /// To be asked after the statistics of `input`, before anything it depends on changes again. `None` when there is
    /// no text to run both models on, only statistics, as by default.
    ///
    /// # Errors
    /// As [`Calibrator::input_statistics`].
    fn input_drift(
        &mut self,
        graph: &Graph,
        weights: &WeightStore,
        input: ValueId,
        sum: Option<ValueId>,
        progress: &mut dyn FnMut(&str, u64, u64),
    ) -> Result<Option<InputDrift>> {
        let _ = (graph, weights, input, sum, progress);
        Ok(None)
    }

    /// Makes tokens count, from here on, in second moments and drifts by how far the model's predictions move when what a linear
    /// layer gives for the token does, raised to `power` (0 counts all alike), and relative to the mean over tokens. To be
    /// asked before anything is encoded. Whether there is text to measure it on; by default there is none.
    ///
    /// # Errors
    /// As [`Calibrator::input_statistics`].
    fn weigh_tokens(
        &mut self,
        graph: &Graph,
        weights: &WeightStore,
        power: f64,
        progress: &mut dyn FnMut(&str, u64, u64),
    ) -> Result<bool> {
        let _ = (graph, weights, power, progress);
        Ok(false)
    }

    /// Runs the model up to a part, and remembers what goes in: everything before it has been encoded for good. Parts are to be
    /// entered in topological order, before statistics of values within are asked for. Whether there is text to run on; by
    /// default there is none.
    ///
    /// # Errors
    /// As [`Calibrator::input_statistics`].
    fn enter_part(
        &mut self,
        graph: &Graph,
        weights: &WeightStore,
        part: Part,
        progress: &mut dyn FnMut(&str, u64, u64),
    ) -> Result<bool> {
        let _ = (graph, weights, part, progress);
        Ok(false)
    }

    /// How far the output of the part entered last, computed with other values of some of its weights, is from what the
    /// uncompressed model gives there; with derivatives for a `batch` of the text, numbered without end, and without
    /// them for all of it. The same weights are to be changed each time.
    ///
    /// # Errors
    /// [`ErrorKind::Calibration`](crate::ErrorKind::Calibration) when no part was entered; as
    /// [`Calibrator::input_statistics`].
    fn part_gradient(
        &mut self,
        graph: &Graph,
        weights: &WeightStore,
        changed: &[(WeightName, Vec<f32>)],
        batch: Option<u64>,
        progress: &mut dyn FnMut(&str, u64, u64),
    ) -> Result<PartGradient> {
        let _ = (graph, weights, changed, batch, progress);
        Err(Error::new(ErrorKind::Uncalibrated))
    }

    /// Forgets what was computed behind the beginning of the part entered last: its weights have changed since.
    ///
    /// # Errors
    /// As [`Calibrator::input_statistics`].
    fn leave_part(&mut self) -> Result<()> {
        Ok(())
    }

    /// How far predictions over some `windows` of the text are from the uncompressed model's when each row of some matrices, as
    /// they are encoded by now, and each element of some vectors is multiplied by a factor; with derivatives by the
    /// factors when `slopes` are wanted. Factors of matrices that give the logits have no derivatives. `None` when there is no
    /// text, only statistics, or an op without a known gradient; by default there is no text.
    ///
    /// # Errors
    /// As [`Calibrator::input_statistics`].
    fn gain_gradient(
        &mut self,
        graph: &Graph,
        weights: &WeightStore,
        gains: &[(WeightName, Vec<f32>)],
        (windows, slopes): (Range<usize>, bool),
        progress: &mut dyn FnMut(&str, u64, u64),
    ) -> Result<Option<GainGradient>> {
        let _ = (graph, weights, gains, windows, slopes, progress);
        Ok(None)
    }

    /// A window of calibration text, from 0, and how many windows there are; no tokens behind the last. By default there is no
    /// text, only statistics.
    ///
    /// # Errors
    /// As [`Calibrator::input_statistics`].
    fn window(
        &mut self,
        index: usize,
        progress: &mut dyn FnMut(&str, u64, u64),
    ) -> Result<(Vec<u32>, usize)> {
        let _ = (index, progress);
        Err(Error::new(ErrorKind::Uncalibrated))
    }

    /// Mean Kullback-Leibler divergence, in nats, of the model's predictions with the values of some weights changed from those
    /// with the weights as they are, over a part of the calibration text. `from` is a value computed before any of
    /// the weights is read; without it the model runs from its beginning. Asking in topological order costs least.
    /// To be asked before a pass encodes anything.
    ///
    /// # Errors
    /// As [`Calibrator::input_statistics`]; [`ErrorKind::Calibration`](crate::ErrorKind::Calibration) when only statistics are
    /// at hand.
    fn divergence(
        &mut self,
        graph: &Graph,
        weights: &WeightStore,
        from: Option<ValueId>,
        changed: &[(WeightName, Vec<f32>)],
        progress: &mut dyn FnMut(&str, u64, u64),
    ) -> Result<f64>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merging_adds_moments_and_widens_ranges() {
        let one = |x: f32| InputStatistics {
            n_tokens: 1,
            width: 2,
            second_moment: vec![x * x, -x, -x, 1.0],
            minimum: vec![x, -1.0],
            maximum: vec![x, -1.0],
            fourth_moment: vec![f64::from(x).powi(4), 1.0],
        };
        let mut sum = InputStatistics::zeros(2);
        sum.merge(&one(2.0));
        sum.merge(&one(3.0));
        assert_eq!((sum.n_tokens, sum.mean_squares()), (2, vec![6.5, 1.0]));
        assert_eq!(sum.second_moment, vec![13.0, -5.0, -5.0, 2.0]);
        assert_eq!((&sum.minimum[..], &sum.maximum[..]), (&[2.0, -1.0][..], &[3.0, -1.0][..]));
        assert_eq!((sum.max_abs(), &sum.fourth_moment[..]), (vec![3.0, 1.0], &[97.0, 2.0][..]));
        // Two rows: (97 / 2) / (13 / 2)², and over all four values (99 / 4) / (15 / 4)².
        assert_eq!(sum.kurtosis(), vec![48.5 / 42.25, 1.0]);
        assert_eq!(sum.layer_kurtosis(), 24.75 / (3.75 * 3.75));
        assert_eq!(InputStatistics::zeros(3).max_abs(), vec![0.0; 3]);
    }
}
