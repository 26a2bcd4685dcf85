//! `quantize-gptq`: stores weight matrices in a format, choosing codes that make up for each other's errors.
//!
//! Before: `%w = weight @m : f32[N,K]`.   After: `%w = weight @m : n4[N,K]` (or another format).
//! The error of a row is `d A dᵀ`, with A the second moment of the layer's inputs over calibration text (`curvature.rs`).
//! Scales are searched first (`scale_search.rs`), then codes are chosen column by column, each error spread over the
//! columns to come (`error_feedback.rs`), then codes and scales are refined group by group (`block_descent.rs`). A row
//! that plain rounding serves better keeps plain rounding's codes.
//! Weights are taken in the order the model computes their inputs, and those are computed with what has been encoded
//! before: an error in one layer is seen by the next, and made up for as far as least squares can (`Context::targets`).
//! Blocks of few bits can be moved down the gradient of their error afterwards (`block_reconstruction.rs`).
//! Preconditions: calibration; the rest as in `quantize-rtn`. A matrix no linear layer reads is rounded.
//! Numerics: lossy.   Cost: one run of the model over the calibration text; per matrix about `N K²` multiplications for
//! each round, and `K³` for each distinct input.
//! References: Frantar et al. 2022, arXiv:2210.17323; Behdin et al. 2023, arXiv:2309.01885; Li et al. 2025, arXiv:2504.02692.

use super::block_descent::Descent;
use super::block_reconstruction::{BlockByBlock, Reconstruction};
use super::code_grid::CodeGrid;
use super::curvature::Curvature;
use super::error_feedback::round_with_feedback;
use super::linear_inputs::{Site, sites};
use super::quantize_rtn::{self, CODED_FORMATS, RowCoder, Suitable, elements, first_value};
use super::row_chunk::{ROWS, RowChunk};
use super::scale_search::{GROUP, TableSearch};
use super::vector_level::Level;
use attar_format::{Encoded, FormatRef, PackedLayout};
use attar_ir::{Graph, TensorType};
use attar_pass::plugin::in_compiler;
use attar_pass::{Error, ErrorKind, InputDrift, PassCx, Result, Subject};
use attar_plugin::{About, Numerics, Pass, Phase};
use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

attar_plugin::options! {
    /// Options of the pass.
    pub(crate) struct Options {
        /// weight format the matrices get
        pub(crate) format: String, of CODED_FORMATS;
        /// what is added to the diagonal of the inputs' second moment, as a share of its mean
        pub(crate) damping: f64 = DAMPING, float 0.0..=1.0;
        /// choose the codes of columns with large inputs first; the order is not stored
        pub(crate) act_order: bool = true;
        /// most rounds in which codes and scales are refined group by group
        pub(crate) refine_rounds: usize = ROUNDS, int 0..=64;
        /// share of what layers before have changed in a layer's inputs that its weights make up for
        pub(crate) correct_drift: f64 = FOLLOW, float 0.0..=1.0;
        /// power of what a token matters to predictions that it counts with; 0 counts all alike
        pub(crate) guidance: f64 = GUIDANCE, float 0.0..=1.0;
        /// steps of gradient descent over each decoder layer that holds matrices of at most 3 bits
        pub(crate) reconstruct_steps: usize = 0, int 0..=100_000;
    }
}

/// Defaults of the options.
const DAMPING: f64 = 0.15;
const ROUNDS: i64 = 4;
pub(super) const FOLLOW: f64 = 1.0;
pub(super) const GUIDANCE: f64 = 0.0;
/// Tokens that each column of a matrix needs until half of the drift that they show is believed.
const FITTED: f64 = 10.0;

/// See the file's header.
pub(crate) struct QuantizeGptq;

attar_plugin::plugin! { passes: [QuantizeGptq] }

impl Pass for QuantizeGptq {
    type Options = Options;

    const ABOUT: About = About {
        name: "quantize-gptq",
        summary: "stores matrices in a weight format, choosing codes that make up for each other's errors on calibration text",
        phase: Phase::Compress,
        numerics: Numerics::Lossy,
        takes_tensors: true,
    };

    fn run(options: &Options, cx: &attar_plugin::Context<'_>) -> attar_plugin::Result<()> {
        let gptq = Gptq {
            format: attar_format::by_name(&options.format).unwrap_or(&attar_format::formats::N4),
            damping: options.damping,
            by_magnitude: options.act_order,
            rounds: options.refine_rounds,
            follow: options.correct_drift,
            guidance: options.guidance,
            reconstruction: Reconstruction { steps: options.reconstruct_steps },
        };
        // It needs the drift of inputs, gradients of blocks and the journal.
        in_compiler(cx, |graph, cx| gptq.run(graph, cx))
    }
}

/// What chooses codes.
pub(super) struct Gptq {
    format: FormatRef,
    damping: f64,
    by_magnitude: bool,
    rounds: usize,
    /// Share of the drift of inputs that weights make up for.
    follow: f64,
    guidance: f64,
    reconstruction: Reconstruction,
}

impl Gptq {
    fn run(&self, graph: &mut Graph, cx: &mut PassCx<'_>) -> Result<()> {
        let mut subjects = Vec::new();
        for subject in cx.subjects(graph) {
            let suitable =
                quantize_rtn::suitable(self.format, cx, &subject).map_err(|e| e.at_tensor(&subject.name))?;
            if let Some(suitable) = suitable {
                subjects.push((subject, suitable));
            }
        }
        let total: u64 = subjects.iter().map(|(s, _)| elements(graph.ty(first_value(s)))).sum();
        let suits: std::collections::BTreeMap<_, _> =
            subjects.iter().map(|(s, suitable)| (s.name.clone(), suitable.clone())).collect();
        let resumed = subjects.iter().filter(|(s, _)| cx.has_kept(&kept_as(&s.name))).count();
        if resumed > 0 {
            cx.progress(&format!("resumed: {resumed} of {} tensors", subjects.len()), 0, total);
        }
        weigh_tokens(graph, cx, self.guidance)?;
        let mut done = 0;
        let sites = sites(graph, subjects.into_iter().map(|(s, _)| s).collect());
        let few = self.format.code_bits() <= Reconstruction::FEW_BITS;
        let mut blocks = BlockByBlock::new(graph, self.reconstruction, sites.iter().map(|s| (s, few)));
        for site in &sites {
            blocks.before(graph, cx, site)?;
            let first = &site.subjects[0].name;
            let suits: Vec<Suitable> = site.subjects.iter().map(|s| suits[&s.name].clone()).collect();
            cx.progress(first, done, total);
            let source = self.source(graph, cx, site, &suits).map_err(|e| e.at_tensor(first))?;
            for (i, (subject, suitable)) in site.subjects.iter().zip(&suits).enumerate() {
                cx.progress(&subject.name, done, total);
                self.quantize(graph, cx, subject, suitable, source.of(i))
                    .map_err(|e| e.at_tensor(&subject.name))?;
                done += elements(graph.ty(first_value(subject)));
            }
            blocks.after(site);
        }
        blocks.finish(graph, cx)?;
        cx.progress("", done, total);
        Ok(())
    }

    /// What chooses codes site by site, with default options but for one; blocks and tokens are left to whoever calls it.
    pub(super) fn with_format(format: FormatRef, follow: f64) -> Gptq {
        Gptq {
            format,
            damping: DAMPING,
            by_magnitude: true,
            rounds: ROUNDS as usize,
            follow,
            guidance: 0.0,
            reconstruction: Reconstruction::NONE,
        }
    }

    /// Where the codes of a site's matrices come from: the journal when it has all of them, else statistics, which are asked
    /// for only then.
    pub(super) fn source(
        &self,
        graph: &Graph,
        cx: &mut PassCx<'_>,
        site: &Site,
        suits: &[Suitable],
    ) -> Result<Source> {
        if suits.iter().all(|s| s.format != self.format) {
            return Ok(Source::Rounding);
        }
        // A matrix that meets several values may take part in computing the later ones: these have to be computed while it is
        // as it was, or what comes after would differ.
        if site.inputs.len() == 1 {
            let kept: Option<Vec<Kept>> = site
                .subjects
                .iter()
                .zip(suits)
                .map(|(subject, suitable)| Kept::read(&cx.recall(&kept_as(&subject.name))?, suitable))
                .collect();
            if let Some(kept) = kept {
                return Ok(Source::Kept(kept));
            }
        }
        Ok(match site.statistics(graph, cx)? {
            Some(statistics) => {
                let curvature = Curvature::new(&statistics, self.damping, self.by_magnitude)?;
                let drift = if self.follow > 0.0 { site.drift(graph, cx)? } else { None };
                Source::Solving(Box::new(Context { curvature, drift }))
            }
            None => Source::Rounding,
        })
    }

    pub(super) fn quantize(
        &self,
        graph: &mut Graph,
        cx: &mut PassCx<'_>,
        subject: &Subject,
        suitable: &Suitable,
        source: SourceOf<'_>,
    ) -> Result<()> {
        if !cx.rewrite(&subject.name) {
            return Ok(());
        }
        let Suitable { format, n, k, reason } = suitable;
        let Kept { encoded, error, outputs } = match source {
            SourceOf::Kept(kept) => kept.clone(),
            SourceOf::Solving(context) if *format == self.format => {
                let weights = cx.weights.read_f32(&subject.name)?;
                let (curvature, targets) = (&context.curvature, context.targets(&weights, self.follow));
                let chosen = choose(format, *n, curvature, &targets, self.rounds, Level::widest())?;
                let error = quantize_rtn::relative_rmse(&weights, &chosen.encoded);
                let outputs = Some([chosen.relative_error, chosen.rounded_error, curvature.damping()]);
                let kept = Kept { encoded: chosen.encoded, error, outputs };
                if let Some(bytes) = kept.bytes() {
                    cx.keep(&kept_as(&subject.name), &bytes);
                }
                kept
            }
            _ => {
                let weights = cx.weights.read_f32(&subject.name)?;
                let encoded = quantize_rtn::encode(format, *n, *k, true, &weights, None)?;
                Kept { error: quantize_rtn::relative_rmse(&weights, &encoded), encoded, outputs: None }
            }
        };
        let bytes = PackedLayout::new(format, *n, *k).map_or(0, |l| l.total_bytes());
        let name = cx.weights.set_encoded(&subject.name, &encoded)?;
        let elem = cx.weights.info(&name)?.elem;
        for node in &subject.nodes {
            graph.set_weight(*node, name.clone(), TensorType::new(elem, [(*n).into(), (*k).into()]))?;
        }
        cx.metric(
            &subject.name,
            [
                ("format", format.name.into()),
                ("relative_rmse", error.into()),
                ("bits_per_weight", (8.0 * bytes as f64 / (*n as f64 * *k as f64)).into()),
                ("bytes", (bytes as u64).into()),
            ],
        );
        match outputs {
            Some([error, rounded, damping]) => cx.metric(
                &subject.name,
                [
                    ("relative_output_error", error.into()),
                    ("relative_output_error_rounded", rounded.into()),
                    ("damping", damping.into()),
                ],
            ),
            None if *format == self.format => cx.refused(&subject.name, "rounded: no linear layer reads it"),
            None => {}
        }
        if let Some(reason) = reason {
            cx.refused(&subject.name, reason);
        }
        Ok(())
    }
}

/// Lets tokens count by what predictions depend on, where there is calibration, and says where that cannot be known.
pub(super) fn weigh_tokens(graph: &Graph, cx: &mut PassCx<'_>, guidance: f64) -> Result<()> {
    if guidance > 0.0 && cx.is_calibrated() && !cx.weigh_tokens(graph, guidance)? {
        cx.refused("guidance", "all tokens count alike: there is no text, or an op without a known gradient");
    }
    Ok(())
}

/// Key of the journal for a matrix.
pub(super) fn kept_as(name: &str) -> String {
    format!("codes/{name}")
}

/// Where the codes of a site's matrices come from.
pub(super) enum Source {
    /// No statistics are needed, or there are none.
    Rounding,
    Solving(Box<Context>),
    /// Of every matrix.
    Kept(Vec<Kept>),
}

/// The same for one matrix.
#[derive(Clone, Copy)]
pub(super) enum SourceOf<'a> {
    Rounding,
    Solving(&'a Context),
    Kept(&'a Kept),
}

impl Source {
    /// Of the `i`-th matrix of the site.
    pub(super) fn of(&self, i: usize) -> SourceOf<'_> {
        match self {
            Source::Rounding => SourceOf::Rounding,
            Source::Solving(context) => SourceOf::Solving(context),
            Source::Kept(all) => SourceOf::Kept(&all[i]),
        }
    }
}

/// Codes that were chosen, and what is told of them.
#[derive(Clone)]
pub(super) struct Kept {
    encoded: Encoded,
    /// Relative to the weights.
    error: f64,
    /// Relative error of the outputs, that of plain rounding, and damping; nothing for what was rounded.
    outputs: Option<[f64; 3]>,
}

impl Kept {
    /// For the journal; `None` when the codes do not suit their format.
    fn bytes(&self) -> Option<Vec<u8>> {
        let outputs = self.outputs?;
        let mut bytes: Vec<u8> =
            std::iter::once(self.error).chain(outputs).flat_map(f64::to_le_bytes).collect();
        bytes.extend(self.encoded.pack().ok()?);
        Some(bytes)
    }

    fn read(bytes: &[u8], suitable: &Suitable) -> Option<Kept> {
        let (numbers, packed) = bytes.split_at_checked(4 * size_of::<f64>())?;
        let mut numbers = numbers.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b));
        let (error, outputs) = (numbers.next()?, [numbers.next()?, numbers.next()?, numbers.next()?]);
        let encoded = Encoded::unpack(suitable.format, suitable.n, suitable.k, packed).ok()?;
        Some(Kept { encoded, error, outputs: Some(outputs) })
    }
}

/// What calibration tells of a site.
pub(super) struct Context {
    curvature: Curvature,
    drift: Option<InputDrift>,
}

impl Context {
    /// What codes are to stand for: weights `[N, K]` that give, from inputs as they are now, what the original weights gave from
    /// the original inputs, as nearly as least squares can with A as the damped second moment.
    ///
    /// Reference: Li et al. 2025, arXiv:2504.02692 (GPTAQ), with the sum that the output is added to included.
    fn targets(&self, weights: &[f32], follow: f64) -> Vec<f32> {
        let Some(drift) = &self.drift else { return weights.to_vec() };
        const ROWS: usize = 64;
        let k = self.curvature.width();
        // What is fitted to noise grows with the numbers that are fitted, so little text is trusted little.
        let trust = 1.0 / (1.0 + (FITTED * k as f64 / drift.n_effective).powi(2));
        let share = (follow * trust / self.curvature.n_tokens()) as f32;
        let mut targets = weights.to_vec();
        targets.par_chunks_mut(ROWS * k).enumerate().for_each(|(chunk, rows)| {
            let n = rows.len() / k;
            let mut moved = match &drift.of_sum {
                Some(sum) => sum[chunk * ROWS * k..][..rows.len()].to_vec(),
                None => vec![0.0; rows.len()],
            };
            matmul(
                MatMut::from_row_major_slice_mut(&mut moved, n, k),
                Accum::Add,
                MatRef::from_row_major_slice(&*rows, n, k),
                MatRef::from_row_major_slice(&drift.of_input, k, k),
                1.0,
                Par::Seq,
            );
            rows.iter_mut().zip(self.curvature.divided(&moved)).for_each(|(w, m)| *w += share * m);
        });
        targets
    }
}

/// Codes, and `sqrt(Σ d A dᵀ / Σ w A wᵀ)` of them and of plain rounding.
pub struct Chosen {
    pub encoded: Encoded,
    pub relative_error: f64,
    pub rounded_error: f64,
}

/// Chooses scales and codes of a format with codes for `weights` `[n, K]` under a curvature, refined in at most `rounds` rounds.
/// No row is worse than with plain rounding. Results do not depend on the level.
///
/// # Errors
/// [`ErrorKind::NotFinite`], [`ErrorKind::OutOfRange`], [`ErrorKind::FormatDoesNotFit`].
pub fn choose(
    format: FormatRef,
    n: usize,
    curvature: &Curvature,
    weights: &[f32],
    rounds: usize,
    level: Level,
) -> Result<Chosen> {
    let k = curvature.width();
    let does_not_fit =
        |problem: String| Error::new(ErrorKind::FormatDoesNotFit { format: format.name, problem });
    quantize_rtn::check_finite(weights, k)?;
    let mut encoded = Encoded::zeros(format, n, k).map_err(|e| does_not_fit(e.to_string()))?;
    let Some(grid) = CodeGrid::of(format).filter(|_| format.group == GROUP) else {
        return Err(does_not_fit("its codes are of a kind this pass does not know".to_owned()));
    };
    let mut coder = RowCoder::new(format, true)?;
    coder.search = coder.search.map(|s| s.at_level(level));
    let has_row_scale = !encoded.row_scale.is_empty();
    let search = coder.search.as_ref().map(TableSearch::brief);
    let chooser = Chooser {
        format,
        curvature,
        grid: &grid,
        coder,
        importance: curvature.importance(),
        alike: vec![1.0; k],
        descent: Descent::new(curvature, &grid, search, has_row_scale, level),
        rounds,
        level,
    };
    let groups = encoded.groups();
    let mut row_scale = std::mem::take(&mut encoded.row_scale);
    row_scale.resize(n, 0.0);
    let chunks = encoded.codes.par_chunks_mut(ROWS * k).zip(encoded.field.par_chunks_mut(ROWS * groups));
    let chunks = chunks.zip(row_scale.par_chunks_mut(ROWS)).zip(weights.par_chunks(ROWS * k)).enumerate();
    let sums: Vec<Sums> = chunks
        .map(|(chunk, (((codes, fields), row_scale), weights))| {
            chooser.rows(weights, Rows { codes, fields, row_scale }, has_row_scale, chunk * ROWS)
        })
        .collect::<Result<_>>()?;
    if has_row_scale {
        encoded.row_scale = row_scale;
    }
    // Added in order: the sums must not depend on threads.
    let total = sums.iter().fold(Sums::default(), |a, b| Sums {
        square: a.square + b.square,
        rounded: a.rounded + b.rounded,
        chosen: a.chosen + b.chosen,
    });
    let relative = |e: f64| if total.square > 0.0 { (e / total.square).max(0.0).sqrt() } else { 0.0 };
    Ok(Chosen { relative_error: relative(total.chosen), rounded_error: relative(total.rounded), encoded })
}

/// `Σ w A wᵀ`, and `Σ d A dᵀ` of plain rounding and of the codes that were chosen.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    square: f64,
    rounded: f64,
    chosen: f64,
}

/// Where codes and scales of some rows go.
struct Rows<'a> {
    codes: &'a mut [u8],
    fields: &'a mut [u16],
    row_scale: &'a mut [f32],
}

/// What choosing codes needs, whatever the rows.
struct Chooser<'a> {
    format: FormatRef,
    curvature: &'a Curvature,
    grid: &'a CodeGrid,
    coder: RowCoder,
    importance: Vec<f32>,
    alike: Vec<f32>,
    descent: Descent<'a>,
    rounds: usize,
    level: Level,
}

impl Chooser<'_> {
    /// Rounds some rows, of which the first is row `first` of the matrix.
    fn encode(&self, weights: &[f32], importance: &[f32], out: &mut Rows<'_>, first: usize) -> Result<()> {
        let k = self.curvature.width();
        let rows = out.codes.chunks_exact_mut(k).zip(out.fields.chunks_exact_mut(k / GROUP));
        let rows = rows.zip(&mut *out.row_scale).zip(weights.chunks_exact(k));
        for (row, (((codes, fields), scale), w)) in rows.enumerate() {
            let encoded = self.coder.encode(w, importance, codes, fields);
            *scale = encoded.map_err(|w| quantize_rtn::out_of_range(self.format, first + row, w))?;
        }
        Ok(())
    }

    /// Chooses for at most [`ROWS`] rows, of which the first is row `first` of the matrix.
    fn rows(&self, weights: &[f32], mut out: Rows<'_>, has_row_scale: bool, first: usize) -> Result<Sums> {
        let k = self.curvature.width();
        let groups = k / GROUP;
        let each = || weights.chunks_exact(k).enumerate();
        self.encode(weights, &self.importance, &mut out, first)?;
        let scales: &[f32] = if has_row_scale { out.row_scale } else { &[] };
        let mut chunk = RowChunk::new(weights, k, self.grid, out.fields, scales);
        round_with_feedback(self.curvature, self.grid, &mut chunk, self.level);
        let square = self.descent.descend(&mut chunk, self.rounds);
        self.encode(weights, &self.alike, &mut out, first)?;
        let Rows { codes, fields, row_scale } = out;
        let mut errors = Vec::with_capacity(weights.len());
        for (row, w) in each() {
            for (column, (code, w)) in codes[row * k..(row + 1) * k].iter().zip(w).enumerate() {
                let s = self.grid.group_scale(fields[row * groups + column / GROUP], row_scale[row]);
                errors.push(s.scale * self.grid.value(s.choice, *code) - w);
            }
            // Rounding up near the largest f32 can leave the range of numbers.
            if errors[row * k..].iter().any(|e| !e.is_finite()) {
                return Err(quantize_rtn::out_of_range(self.format, first + row, w));
            }
        }
        let rounded = self.curvature.row_errors(&errors);
        let now = chunk.errors();
        for (row, errors) in errors.chunks_exact_mut(k).enumerate() {
            errors.iter_mut().zip(&now).for_each(|(e, now)| *e = now[row]);
        }
        let mut chosen = self.curvature.row_errors(&errors);
        for row in 0..chunk.rows {
            if chosen[row] <= rounded[row] {
                let (codes, fields) =
                    (&mut codes[row * k..(row + 1) * k], &mut fields[row * groups..(row + 1) * groups]);
                chunk.store(row, self.grid, codes, fields);
                row_scale[row] = chunk.row_scale[row];
            } else {
                chosen[row] = rounded[row];
            }
        }
        let square = match square {
            Some(square) => square[..chunk.rows].to_vec(),
            None => self.curvature.row_errors(weights),
        };
        let sum = |errors: &[f64]| errors.iter().sum();
        Ok(Sums { square: sum(&square), rounded: sum(&rounded), chosen: sum(&chosen) })
    }
}

/// `d A dᵀ` of each row of what the codes stand for, less the weights.
pub fn row_errors(curvature: &Curvature, weights: &[f32], encoded: &Encoded) -> Vec<f64> {
    let k = encoded.k;
    let mut errors = vec![0.0f32; weights.len()];
    errors.par_chunks_mut(k).zip(weights.par_chunks(k)).enumerate().for_each(|(row, (error, w))| {
        encoded.decode_row(row, error);
        error.iter_mut().zip(w).for_each(|(e, w)| *e -= w);
    });
    parallel_row_errors(curvature, &errors)
}

/// [`Curvature::row_errors`], some rows at a time.
fn parallel_row_errors(curvature: &Curvature, errors: &[f32]) -> Vec<f64> {
    const ROWS: usize = 64;
    errors.par_chunks(ROWS * curvature.width()).flat_map_iter(|rows| curvature.row_errors(rows)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use attar_pass::InputStatistics;

    /// Numbers between -1 and 1.
    fn noise(len: usize, seed: u64) -> Vec<f64> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
        };
        (0..len).map(|_| next()).collect()
    }

    /// `Yᵀ X`, `[m, k]`.
    fn product(y: &[f64], m: usize, x: &[f64], k: usize) -> Vec<f64> {
        let mut sum = vec![0.0; m * k];
        for (y, x) in y.chunks_exact(m).zip(x.chunks_exact(k)) {
            for (i, j) in (0..m).flat_map(|i| (0..k).map(move |j| (i, j))) {
                sum[i * k + j] += y[i] * x[j];
            }
        }
        sum
    }

    /// `X Wᵀ`, `[tokens, n]`.
    fn linear(x: &[f64], w: &[f64], k: usize) -> Vec<f64> {
        let row = |x: &[f64], w: &[f64]| x.iter().zip(w).map(|(x, w)| x * w).sum::<f64>();
        x.chunks_exact(k).flat_map(|x| w.chunks_exact(k).map(move |w| row(x, w))).collect()
    }

    /// What is left of the drift is orthogonal to the inputs: no other weights would leave less.
    #[test]
    fn targets_are_those_of_least_squares() {
        let (n, k, tokens) = (70, 6, 200);
        let (x, w) = (noise(tokens * k, 1), noise(n * k, 2));
        let shifts = noise(tokens * k, 3);
        // Inputs that lost a fifth of their size and gained noise; a sum that lost some of what the inputs tell.
        let now: Vec<f64> = x.iter().zip(&shifts).map(|(x, d)| 0.8 * x + 0.2 * d).collect();
        let lost = linear(&x, &noise(n * k, 4), k);
        let f32s = |v: &[f64]| v.iter().map(|v| *v as f32).collect::<Vec<f32>>();
        let statistics = InputStatistics {
            n_tokens: tokens as u64,
            second_moment: f32s(&product(&now, k, &now, k)),
            ..InputStatistics::zeros(k)
        };
        let change: Vec<f64> = x.iter().zip(&now).map(|(a, b)| a - b).collect();
        for of_sum in [None, Some(f32s(&product(&lost, n, &now, k)))] {
            let goal: Vec<f64> = match of_sum {
                None => linear(&x, &w, k),
                Some(_) => linear(&x, &w, k).iter().zip(&lost).map(|(a, b)| a + b).collect(),
            };
            let context = Context {
                curvature: Curvature::new(&statistics, 1e-7, true).unwrap(),
                drift: Some(InputDrift {
                    of_input: f32s(&product(&change, k, &now, k)),
                    of_sum,
                    n_effective: f64::INFINITY,
                }),
            };
            let found: Vec<f64> = context.targets(&f32s(&w), 1.0).iter().map(|v| f64::from(*v)).collect();
            let left = |w: &[f64]| -> Vec<f64> {
                goal.iter().zip(linear(&now, w, k)).map(|(goal, y)| goal - y).collect()
            };
            let size = |v: &[f64]| v.iter().map(|v| v * v).sum::<f64>();
            assert!(size(&left(&found)) < 0.95 * size(&left(&w)));
            let along = product(&left(&found), n, &now, k);
            let before = product(&left(&w), n, &now, k);
            assert!(size(&along) < 1e-8 * size(&before), "{} of {}", size(&along), size(&before));
            assert_eq!(context.targets(&f32s(&w), 0.0), f32s(&w));
            // Of what few tokens show, half is believed.
            let mut few = context;
            if let Some(drift) = &mut few.drift {
                drift.n_effective = FITTED * k as f64;
            }
            for ((half, full), w) in few.targets(&f32s(&w), 1.0).iter().zip(&found).zip(&w) {
                assert!((f64::from(*half) - 0.5 * (full + w)).abs() < 1e-5, "{half} between {w} and {full}");
            }
        }
    }
}
