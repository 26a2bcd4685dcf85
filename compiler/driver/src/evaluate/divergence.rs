//! Statistics over scored positions, as llama-perplexity defines them.
//!
//! With logits `a` of the model and `b` of the reference at a position, and the token t that follows it:
//!   nll = ln Σ exp(a) - a[t]     kld = Σ softmax(b) · (ln softmax(b) - ln softmax(a))     Δp = softmax(a)[t] - softmax(b)[t]
//! The standard error of a mean is `sqrt((mean(x²) - mean(x)²) / (n - 1))`, carried through exp and square root to first
//! order; that of `ln(ppl / ppl_reference)` takes the covariance of both nll off. Quantiles are interpolated between the
//! values of rank `f (n - 1)`, rounded down and up. One thing differs: the reference is not rounded to 16 bits.
//!
//! **Invariant:** results do not depend on threads. Rows are judged in parallel and added in their order; exp and ln are
//! those of a library that gives the same bits on every machine.

use super::error::{Error, Result};
use attar_artifact::certificate::Quality;
use rayon::prelude::*;

/// Running sums of a quantity.
#[derive(Clone, Debug, Default)]
struct Moments {
    count: f64,
    sum: f64,
    squares: f64,
}

impl Moments {
    fn add(&mut self, x: f64) {
        self.count += 1.0;
        self.sum += x;
        self.squares += x * x;
    }

    fn mean(&self) -> f64 {
        self.sum / self.count.max(1.0)
    }

    /// Of the mean.
    fn error(&self) -> f64 {
        let mean = self.mean();
        let variance = (self.squares / self.count.max(1.0) - mean * mean).max(0.0);
        (variance / (self.count - 1.0).max(1.0)).sqrt()
    }
}

/// Sums behind the perplexity of one model.
#[derive(Clone, Debug, Default)]
pub(crate) struct Likelihood {
    nll: Moments,
}

impl Likelihood {
    /// Adds logits `[R, V]` and the R tokens that follow.
    pub(crate) fn add_rows(&mut self, logits: &[f32], targets: &[u32]) -> Result<()> {
        let vocab = logits.len() / targets.len().max(1);
        let scores: Vec<f64> = logits
            .par_chunks_exact(vocab.max(1))
            .zip(targets)
            .map(|(row, target)| {
                let top = top(row).1;
                let sum: f64 = row.iter().map(|l| exp(*l - top)).sum();
                f64::from(top) + libm::log(sum) - f64::from(row[*target as usize])
            })
            .collect();
        for nll in scores {
            if !nll.is_finite() {
                return Err(Error::NotFinite { window: None });
            }
            self.nll.add(nll);
        }
        Ok(())
    }

    pub(crate) fn count(&self) -> usize {
        self.nll.count as usize
    }

    pub(crate) fn perplexity(&self) -> f64 {
        libm::exp(self.nll.mean())
    }

    pub(crate) fn standard_error(&self) -> f64 {
        self.nll.error() * self.perplexity()
    }

    /// Mean nll of what was added since.
    pub(crate) fn mean_since(&self, before: &Likelihood) -> f64 {
        (self.nll.sum - before.nll.sum) / (self.nll.count - before.nll.count).max(1.0)
    }
}

/// How far a model strays from a reference, position by position.
#[derive(Clone, Debug, Default)]
pub struct Divergence {
    nll: Moments,
    nll_reference: Moments,
    /// Σ nll · nll_reference.
    product: f64,
    kld: Moments,
    dp: Moments,
    dp_squared: Moments,
    same_top: f64,
    /// Every divergence, for quantiles.
    klds: Vec<f64>,
}

/// One position.
struct Score {
    nll: f64,
    nll_reference: f64,
    kld: f64,
    same_top: bool,
}

impl Divergence {
    /// Adds positions: logits `[R, V]` of model and reference, and the R tokens that follow, each below V.
    ///
    /// # Errors
    /// [`Error::NotFinite`].
    pub fn add_rows(&mut self, logits: &[f32], reference: &[f32], targets: &[u32]) -> Result<()> {
        let vocab = (logits.len() / targets.len().max(1)).max(1);
        let scores: Vec<Score> = logits
            .par_chunks_exact(vocab)
            .zip(reference.par_chunks_exact(vocab))
            .zip(targets)
            .map(|((row, reference), target)| score(row, reference, *target as usize))
            .collect();
        for s in scores {
            if !(s.nll.is_finite() && s.nll_reference.is_finite() && s.kld.is_finite()) {
                return Err(Error::NotFinite { window: None });
            }
            let dp = libm::exp(-s.nll) - libm::exp(-s.nll_reference);
            // Rounding may leave a little less than nothing.
            let kld = s.kld.max(0.0);
            self.nll.add(s.nll);
            self.nll_reference.add(s.nll_reference);
            self.product += s.nll * s.nll_reference;
            self.kld.add(kld);
            self.klds.push(kld);
            self.dp.add(dp);
            self.dp_squared.add(dp * dp);
            self.same_top += f64::from(u8::from(s.same_top));
        }
        Ok(())
    }

    /// Mean divergence so far, in nats.
    pub fn mean(&self) -> f64 {
        self.kld.mean()
    }

    /// Everything that can be said.
    pub fn quality(&self) -> Quality {
        let n = self.nll.count.max(1.0);
        let less_one = (n - 1.0).max(1.0);
        let (ppl, ppl_reference) = (libm::exp(self.nll.mean()), libm::exp(self.nll_reference.mean()));
        let covariance = (self.product / n - self.nll.mean() * self.nll_reference.mean()) / less_one;
        let (error, reference_error) = (self.nll.error(), self.nll_reference.error());
        let ln_ratio = self.nll.mean() - self.nll_reference.mean();
        let ln_ratio_error =
            (error * error + reference_error * reference_error - 2.0 * covariance).max(0.0).sqrt();
        let ratio = libm::exp(ln_ratio);
        let mut sorted = self.klds.clone();
        sorted.sort_by(f64::total_cmp);
        let top1 = self.same_top / n;
        let dp_rms = self.dp_squared.mean().sqrt();
        Quality {
            scores: self.klds.len() as u64,
            ppl,
            ppl_error: error * ppl,
            ppl_reference,
            ppl_reference_error: reference_error * ppl_reference,
            ln_ppl_ratio: ln_ratio,
            ln_ppl_ratio_error: ln_ratio_error,
            ppl_ratio: ratio,
            ppl_ratio_error: ln_ratio_error * ratio,
            kld: self.kld.mean(),
            kld_error: self.kld.error(),
            kld_median: quantile(&sorted, 0.5),
            kld_p90: quantile(&sorted, 0.9),
            kld_p99: quantile(&sorted, 0.99),
            kld_p999: quantile(&sorted, 0.999),
            kld_max: quantile(&sorted, 1.0),
            top1,
            top1_error: (top1 * (1.0 - top1) / less_one).sqrt(),
            dp_rms,
            dp_rms_error: if dp_rms > 0.0 { 0.5 / dp_rms * self.dp_squared.error() } else { 0.0 },
            dp_mean: self.dp.mean(),
            dp_mean_error: self.dp.error(),
        }
    }
}

fn score(a: &[f32], b: &[f32], target: usize) -> Score {
    let ((a_best, a_top), (b_best, b_top)) = (top(a), top(b));
    let (mut a_sum, mut b_sum, mut weighed) = (0.0, 0.0, 0.0);
    for (a, b) in a.iter().zip(b) {
        let e = exp(b - b_top);
        a_sum += exp(a - a_top);
        b_sum += e;
        weighed += e * ((f64::from(*b) - f64::from(b_top)) - (f64::from(*a) - f64::from(a_top)));
    }
    let (a_log, b_log) = (libm::log(a_sum), libm::log(b_sum));
    Score {
        nll: f64::from(a_top) + a_log - f64::from(a[target]),
        nll_reference: f64::from(b_top) + b_log - f64::from(b[target]),
        kld: weighed / b_sum - (b_log - a_log),
        same_top: a_best == b_best,
    }
}

/// The first largest logit and its place.
fn top(logits: &[f32]) -> (usize, f32) {
    let first = (0, f32::NEG_INFINITY);
    logits.iter().enumerate().fold(first, |best, (i, l)| if *l > best.1 { (i, *l) } else { best })
}

fn exp(x: f32) -> f64 {
    f64::from(libm::expf(x))
}

/// Of sorted values; 0 of none.
fn quantile(sorted: &[f64], fraction: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let rank = fraction * last as f64;
    let (below, above) = (rank.floor() as usize, rank.ceil() as usize);
    let part = rank - rank.floor();
    sorted[below] * (1.0 - part) + sorted[above.min(last)] * part
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows of numbers between -4 and 4 that look arbitrary.
    fn rows(seed: u32, count: usize) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 21) as f32 - 4.0
        };
        (0..count).map(|_| next()).collect()
    }

    #[test]
    fn likelihoods_are_those_of_softmax() {
        let logits = [1.0f32, 2.0, 3.0];
        let sum: f64 = logits.iter().map(|l| f64::from(*l).exp()).sum();
        for (t, logit) in (0u32..).zip(&logits) {
            let mut one = Likelihood::default();
            one.add_rows(&logits, &[t]).expect("finite");
            let expected = -(f64::from(*logit).exp() / sum).ln();
            assert!((one.nll.mean() - expected).abs() < 1e-6);
        }
    }

    #[test]
    fn a_coin_has_perplexity_two() {
        let mut sums = Likelihood::default();
        (0..100).for_each(|i| sums.add_rows(&[3.0, 3.0], &[i % 2]).expect("finite"));
        assert!((sums.perplexity() - 2.0).abs() < 1e-12);
        assert!(sums.standard_error() < 1e-6);
        assert_eq!(sums.count(), 100);
    }

    #[test]
    fn a_model_does_not_stray_from_itself() {
        let logits = rows(1, 50 * 40);
        let targets: Vec<u32> = (0..40).map(|i| i % 50).collect();
        let mut d = Divergence::default();
        d.add_rows(&logits, &logits, &targets).expect("finite");
        let q = d.quality();
        assert_eq!((q.kld, q.kld_max, q.ln_ppl_ratio, q.dp_rms), (0.0, 0.0, 0.0, 0.0));
        assert_eq!((q.ppl_ratio, q.top1, q.scores), (1.0, 1.0, 40));
        assert!(q.ln_ppl_ratio_error < 1e-7 && q.ppl == q.ppl_reference);
    }

    #[test]
    fn how_rows_come_does_not_matter() {
        let (a, b) = (rows(2, 30 * 64), rows(3, 30 * 64));
        let targets: Vec<u32> = (0..64).map(|i| i % 30).collect();
        let mut whole = Divergence::default();
        whole.add_rows(&a, &b, &targets).expect("finite");
        let mut parts = Divergence::default();
        for i in [0..1, 1..17, 17..64] {
            let rows = i.start * 30..i.end * 30;
            parts.add_rows(&a[rows.clone()], &b[rows], &targets[i]).expect("finite");
        }
        assert_eq!(whole.quality(), parts.quality());
    }

    #[test]
    fn a_shift_of_all_logits_changes_nothing() {
        let (a, b) = (rows(4, 30 * 20), rows(5, 30 * 20));
        let shifted: Vec<f32> = a.iter().map(|x| x + 64.0).collect();
        let targets = vec![7; 20];
        let of = |a: &[f32]| {
            let mut d = Divergence::default();
            d.add_rows(a, &b, &targets).expect("finite");
            d.quality()
        };
        let (plain, shifted) = (of(&a), of(&shifted));
        for ((name, x), (_, y)) in plain.numbers().into_iter().zip(shifted.numbers()) {
            assert!((x - y).abs() <= 1e-4 * x.abs().max(1e-2), "{name}: {x} {y}");
        }
    }

    #[test]
    fn what_is_not_finite_is_refused() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let good = [0.0f32, 1.0, 2.0];
            let mut row = good;
            row[1] = bad;
            // A token of no chance at all is no fault unless it comes.
            let fault = |a: &[f32], b: &[f32]| Divergence::default().add_rows(a, b, &[1]).is_err();
            assert!(fault(&row, &good) && fault(&good, &row), "{bad}");
            assert!(Likelihood::default().add_rows(&row, &[1]).is_err());
        }
    }

    #[test]
    fn quantiles_are_interpolated() {
        let sorted = [0.0, 1.0, 2.0, 10.0];
        assert_eq!(quantile(&sorted, 0.5), 1.5);
        assert_eq!(quantile(&sorted, 1.0), 10.0);
        assert!((quantile(&sorted, 0.9) - 7.6).abs() < 1e-12);
        assert_eq!(quantile(&[], 0.9), 0.0);
        assert_eq!(quantile(&[3.0], 0.999), 3.0);
    }
}
