//! What an error in a row of weights costs: `E(d) = d A dᵀ`, and the factor that spreads an error over later columns.
//!
//! `A = H / n + λ I` with `H = XᵀX` over `n` calibration tokens. The damping λ stands for all inputs calibration did not
//! see; it starts as a share of the mean diagonal and grows tenfold while A has no Cholesky factor.
//! Columns are solved in the order of falling diagonal, so that what matters most is rounded while most columns can
//! still make up for it; the order is not stored, since scales are chosen beforehand.
//! Reference: Frantar et al. 2022, arXiv:2210.17323, section 3 and its `act-order` option.

use attar_pass::{Error, ErrorKind, InputStatistics, Result};
use faer::linalg::matmul::matmul;
use faer::linalg::solvers::DenseSolveCore;
use faer::{Accum, Mat, MatMut, MatRef, Par, Side};

/// The quadratic form of one linear input, and its factor in solve order.
#[derive(Clone, Debug)]
pub struct Curvature {
    /// A, `[K, K]`, symmetric.
    matrix: Vec<f32>,
    /// Column solved first, second, …
    order: Vec<usize>,
    /// U, `[K, K]`, upper triangular in solve order: `A⁻¹ = Uᵀ U`.
    factor: Vec<f32>,
    /// λ as a share of the mean diagonal, as it was in the end.
    damping: f64,
    /// n.
    n_tokens: f64,
}

/// Largest share of the mean diagonal that damping may grow to.
const MOST_DAMPING: f64 = 1.0;

impl Curvature {
    /// The form for given statistics. `damping` is λ as a share of the mean diagonal; with `by_magnitude` columns are
    /// solved by falling diagonal, else from the first to the last.
    ///
    /// Inputs that were zero throughout leave nothing to weigh errors by: A is then the identity.
    ///
    /// # Errors
    /// [`ErrorKind::Calibration`] when the statistics hold what is no number, or A stays singular.
    pub fn new(statistics: &InputStatistics, damping: f64, by_magnitude: bool) -> Result<Curvature> {
        let k = statistics.width;
        if let Some(at) = statistics.second_moment.iter().position(|v| !v.is_finite()) {
            let problem = format!(
                "the inputs' second moment is {} at {}, {}",
                statistics.second_moment[at],
                at / k,
                at % k
            );
            return Err(Error::new(ErrorKind::Calibration { problem }));
        }
        let count = statistics.n_tokens.max(1) as f64;
        let mut matrix: Vec<f64> = statistics.second_moment.iter().map(|v| f64::from(*v) / count).collect();
        let mut mean = (0..k).map(|i| matrix[i * k + i]).sum::<f64>() / k as f64;
        if mean <= 0.0 {
            matrix.fill(0.0);
            (0..k).for_each(|i| matrix[i * k + i] = 1.0);
            mean = 1.0;
        }
        let mut order: Vec<usize> = (0..k).collect();
        if by_magnitude {
            order.sort_by(|a, b| matrix[b * k + b].total_cmp(&matrix[a * k + a]).then(a.cmp(b)));
        }
        let mut share = damping;
        let mut added = 0.0;
        while share <= MOST_DAMPING * (1.0 + 1e-9) {
            (0..k).for_each(|i| matrix[i * k + i] += share * mean - added);
            added = share * mean;
            if let Some(factor) = inverse_factor(&matrix, &order) {
                let matrix = matrix.iter().map(|v| *v as f32).collect();
                return Ok(Curvature { matrix, order, factor, damping: share, n_tokens: count });
            }
            share = (share * 10.0).max(1e-6);
        }
        let problem = format!(
            "the inputs' second moment is singular even with {:.0} % of its mean diagonal added",
            100.0 * added / mean
        );
        Err(Error::new(ErrorKind::Calibration { problem }))
    }

    /// K.
    pub fn width(&self) -> usize {
        self.order.len()
    }

    /// λ as a share of the mean diagonal, as it was in the end.
    pub fn damping(&self) -> f64 {
        self.damping
    }

    /// n, the tokens behind it.
    pub(super) fn n_tokens(&self) -> f64 {
        self.n_tokens
    }

    /// Columns in the order they are solved.
    pub(super) fn order(&self) -> &[usize] {
        &self.order
    }

    /// Row `i` of U, in solve order; zero before `i`.
    pub(super) fn factor_row(&self, i: usize) -> &[f32] {
        &self.factor[i * self.width()..(i + 1) * self.width()]
    }

    /// What a squared error in each column costs when all columns solved later make up for it as well as they can,
    /// `1 / U_ii²`, relative to the mean over columns.
    pub(super) fn importance(&self) -> Vec<f32> {
        let mut importance = vec![0.0f32; self.width()];
        for (i, column) in self.order.iter().enumerate() {
            let u = f64::from(self.factor[i * self.width() + i]);
            importance[*column] = (1.0 / (u * u)) as f32;
        }
        let mean = importance.iter().map(|v| f64::from(*v)).sum::<f64>() / importance.len().max(1) as f64;
        importance.iter_mut().for_each(|v| *v = (f64::from(*v) / mean) as f32);
        importance
    }

    /// Inverses of `A_GG` for all groups G of so many columns, one after the other.
    pub(super) fn group_inverses(&self, group: usize) -> Vec<f32> {
        let mut inverses = Vec::with_capacity(self.width() * group);
        for start in (0..self.width()).step_by(group) {
            let form = Mat::from_fn(group, group, |i, j| f64::from(self.row(start + i)[start + j]));
            // A part of a positive definite matrix is one too; only rounding to f32 could have changed that.
            match form.llt(Side::Lower) {
                Ok(llt) => {
                    let inverse = llt.inverse();
                    inverses.extend((0..group * group).map(|at| inverse[(at / group, at % group)] as f32));
                }
                Err(_) => {
                    let diagonal = |at: usize| {
                        if at.is_multiple_of(group + 1) { 1.0 / form[(at / group, at / group)] } else { 0.0 }
                    };
                    inverses.extend((0..group * group).map(|at| diagonal(at) as f32));
                }
            }
        }
        inverses
    }

    /// Rows `rows` of U from column `from` on, as a matrix.
    pub(super) fn factor_part(&self, rows: std::ops::Range<usize>, from: usize) -> MatRef<'_, f32> {
        let k = self.width();
        MatRef::from_row_major_slice(&self.factor, k, k).get(rows, from..k)
    }

    /// A part of A.
    pub(super) fn part(
        &self,
        rows: std::ops::Range<usize>,
        columns: std::ops::Range<usize>,
    ) -> MatRef<'_, f32> {
        let k = self.width();
        MatRef::from_row_major_slice(&self.matrix, k, k).get(rows, columns)
    }

    /// Row `i` of A.
    pub(super) fn row(&self, i: usize) -> &[f32] {
        &self.matrix[i * self.width()..(i + 1) * self.width()]
    }

    /// `rows · A⁻¹`; `rows` is `[n, K]`.
    pub(super) fn divided(&self, rows: &[f32]) -> Vec<f32> {
        let k = self.width();
        let n = rows.len() / k;
        // A⁻¹ = Uᵀ U in solve order.
        let ordered: Vec<f32> =
            rows.chunks_exact(k).flat_map(|row| self.order.iter().map(|c| row[*c])).collect();
        let u = MatRef::from_row_major_slice(&self.factor, k, k);
        let (mut half, mut solved) = (vec![0.0f32; rows.len()], vec![0.0f32; rows.len()]);
        let product = |out: &mut [f32], left: &[f32], right: MatRef<'_, f32>| {
            let out = MatMut::from_row_major_slice_mut(out, n, k);
            matmul(out, Accum::Replace, MatRef::from_row_major_slice(left, n, k), right, 1.0, Par::Seq);
        };
        product(&mut half, &ordered, u.transpose());
        product(&mut solved, &half, u);
        let mut out = vec![0.0f32; rows.len()];
        for (out, solved) in out.chunks_exact_mut(k).zip(solved.chunks_exact(k)) {
            self.order.iter().zip(solved).for_each(|(column, v)| out[*column] = *v);
        }
        out
    }

    /// `d A dᵀ` for each row `d` of `errors` `[rows, K]`.
    pub fn row_errors(&self, errors: &[f32]) -> Vec<f64> {
        let k = self.width();
        let rows = errors.len() / k;
        let mut gradient = vec![0.0; errors.len()];
        let out = MatMut::from_row_major_slice_mut(&mut gradient, rows, k);
        let errors_of = MatRef::from_row_major_slice(errors, rows, k);
        matmul(out, Accum::Replace, errors_of, self.part(0..k, 0..k), 1.0, Par::Seq);
        let dot =
            |(a, b): (&[f32], &[f32])| a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
        errors.chunks_exact(k).zip(gradient.chunks_exact(k)).map(dot).collect()
    }
}

/// U with `A⁻¹ = Uᵀ U`, A taken in `order`; `None` when A is not positive definite.
///
/// With J the reversal of rows, `J A J = L Lᵀ` gives `A = (J L J)(J L J)ᵀ`, so `U = (J L J)⁻¹ = J L⁻¹ J`.
fn inverse_factor(matrix: &[f64], order: &[usize]) -> Option<Vec<f32>> {
    let k = order.len();
    let at = |i: usize| order[k - 1 - i];
    let reversed = Mat::from_fn(k, k, |i, j| matrix[at(i) * k + at(j)]);
    let llt = reversed.llt(Side::Lower).ok()?;
    let mut inverse = Mat::<f64>::zeros(k, k);
    faer::linalg::triangular_inverse::invert_lower_triangular(inverse.as_mut(), llt.L(), Par::Seq);
    let mut factor = vec![0.0f32; k * k];
    for i in 0..k {
        for j in i..k {
            let v = inverse[(k - 1 - i, k - 1 - j)];
            if !v.is_finite() {
                return None;
            }
            factor[i * k + j] = v as f32;
        }
    }
    Some(factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn statistics(rows: &[&[f32]]) -> InputStatistics {
        let k = rows[0].len();
        let mut s = InputStatistics::zeros(k);
        s.n_tokens = rows.len() as u64;
        for row in rows {
            for i in 0..k {
                for j in 0..k {
                    s.second_moment[i * k + j] += row[i] * row[j];
                }
            }
        }
        s
    }

    #[test]
    fn the_factor_is_that_of_the_inverse() {
        let s = statistics(&[&[1.0, 2.0, 0.5], &[0.0, 3.0, 1.0], &[2.0, 1.0, -1.0], &[1.0, 0.0, 4.0]]);
        let c = Curvature::new(&s, 0.01, true).unwrap();
        assert_eq!(c.order(), [2, 1, 0]);
        // A Uᵀ U = 1, in solve order.
        for i in 0..3 {
            for j in 0..3 {
                let mut sum = 0.0;
                for l in 0..3 {
                    let inverse: f32 = (0..3).map(|m| c.factor_row(m)[l] * c.factor_row(m)[j]).sum();
                    sum += c.row(c.order()[i])[c.order()[l]] * inverse;
                }
                assert!((sum - f32::from(i == j)).abs() < 1e-4, "{i} {j}: {sum}");
            }
        }
    }

    #[test]
    fn damping_escalates_on_a_singular_form_and_dead_channels_are_no_problem() {
        let s = statistics(&[&[1.0, 1.0, 0.0], &[2.0, 2.0, 0.0]]);
        assert!((Curvature::new(&s, 0.01, true).unwrap().damping() - 0.01).abs() < 1e-12);
        assert!(Curvature::new(&s, 0.0, true).unwrap().damping() > 0.0);
        let zero = InputStatistics::zeros(4);
        assert_eq!(
            Curvature::new(&zero, 0.01, true).unwrap().row_errors(&[1.0, 0.0, 0.0, 1.0]),
            [2.02f32 as f64]
        );
    }

    #[test]
    fn what_is_no_moment_is_refused() {
        let mut s = InputStatistics::zeros(2);
        s.second_moment = vec![1.0, 50.0, 50.0, 1.0];
        s.n_tokens = 1;
        let e = Curvature::new(&s, 0.0, true).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(e.contains("singular"), "{e}");
        s.second_moment[1] = f32::NAN;
        let e = Curvature::new(&s, 0.01, true).err().map(|e| e.to_string()).unwrap_or_default();
        assert!(e.contains("NaN at 0, 1"), "{e}");
    }
}
