//! `distil-gains`: moves the scales of matrix rows and the gains of norms until the model predicts more nearly what the
//! uncompressed model does.
//!
//! Before and after: the same graph and the same codes; the scale of each row of coded matrices, and each gain of a norm, times
//! a factor near 1.
//! Passes that choose codes serve one matrix or one layer at a time. Factors of rows are few (one for some hundred weights),
//! and all of them together follow the gradient of the divergence of the model's predictions from the uncompressed model's
//! over calibration text, two windows a step, by Adam; steps rise at first and shrink to nothing in the end. Some windows
//! are not trained on: an outcome that diverges more there is thrown away.
//! Preconditions: calibration by text; to come after the passes that choose codes. Formats whose scales are no f32 numbers per row
//! (`w8`, floats), and the matrix that gives the logits, stay as they are.
//! Numerics: lossy.   Cost: for each window a run of both models and one way back, about four times a run.
//! References: Chen et al. 2024, arXiv:2407.11062, section 3.3 (step sizes trained end to end); Hinton et al. 2015,
//! arXiv:1503.02531 (distillation); Kingma and Ba 2014, arXiv:1412.6980 (Adam).

use attar_format::Scale;
use attar_ir::{Elem, Graph, OpKind, ValueId, WeightName};
use attar_pass::plugin::in_compiler;
use attar_pass::{Error, ErrorKind, PassCx, Result, Subject};
use attar_plugin::{About, Context, Numerics, Pass, Phase};
use std::ops::Range;

attar_plugin::options! {
    /// Options of the pass.
    pub(crate) struct Options {
        /// most windows of calibration text that are trained on, once each
        pub(crate) windows: usize = 32, int 1..=1_000_000;
        /// largest relative step of a row's scale; gains of norms take twice as large ones
        pub(crate) rate: f64 = 0.0005, float 0.0..=0.1;
    }
}

/// See the file's header.
pub(crate) struct DistilGains;

attar_plugin::plugin! { passes: [DistilGains] }

impl Pass for DistilGains {
    type Options = Options;

    const ABOUT: About = About {
        name: "distil-gains",
        summary: "moves scales of rows and gains of norms until the model predicts more nearly what the uncompressed one does",
        phase: Phase::Compress,
        numerics: Numerics::Lossy,
        takes_tensors: true,
    };

    fn run(options: &Options, cx: &Context<'_>) -> attar_plugin::Result<()> {
        // It needs the gradient of the model's predictions, and the journal.
        in_compiler(cx, |graph, cx| options.distil(graph, cx))
    }
}

/// Windows of one step.
const BATCH: usize = 2;
/// Of so many batches one is not trained on.
const HELD_OUT: usize = 12;
/// Steps in which the rate rises.
const RISE: usize = 3;
/// How far scales of rows and gains of norms move relative to the rate.
const ROWS: f32 = 1.0;
const NORMS: f32 = 2.0;
const MEAN_DECAY: f32 = 0.9;
const SQUARE_DECAY: f32 = 0.95;
/// Factors stay between this and one over it.
const LEAST: f32 = 0.5;

/// Factors on their way, with the running means of Adam.
#[derive(Clone, Debug, PartialEq)]
struct Factors {
    names: Vec<WeightName>,
    /// [`ROWS`] or [`NORMS`].
    pace: Vec<f32>,
    values: Vec<Vec<f32>>,
    mean: Vec<Vec<f32>>,
    square: Vec<Vec<f32>>,
    /// Steps taken.
    steps: usize,
}

impl Options {
    fn distil(&self, graph: &mut Graph, cx: &mut PassCx<'_>) -> Result<()> {
        let Some(mut factors) = Factors::new(graph, cx)? else {
            cx.refused("all tensors", "none is coded with a scale per row");
            return Ok(());
        };
        if cx.gain_gradient(graph, &[], 0..0, false)?.is_none() {
            cx.refused("all tensors", "there is no text, or an op without a known gradient");
            return Ok(());
        }
        let (trained, held_out) = batches(cx.calibration_window(0)?.1, self.windows);
        let total = trained.len() as u64;
        if let Some(bytes) = cx.recall("factors")
            && factors.read(&bytes)
            && factors.steps > 0
        {
            cx.progress(&format!("resumed: {} of {total} steps", factors.steps), factors.steps as u64, total);
        }
        cx.progress("text held out", factors.steps as u64, total);
        let before = divergence(graph, cx, &factors.ones(), &held_out)?;
        for batch in trained.iter().skip(factors.steps) {
            cx.progress("predictions", factors.steps as u64, total);
            let found =
                cx.gain_gradient(graph, &factors.named(), batch.clone(), true)?.ok_or_else(no_text)?;
            factors.step(&found.slopes, self.rate as f32, trained.len());
            cx.keep("factors", &factors.bytes());
        }
        cx.progress("text held out", total, total);
        let after = divergence(graph, cx, &factors.named(), &held_out)?;
        cx.metric("predictions", [("divergence", after.into()), ("divergence_before", before.into())]);
        if after >= before {
            cx.refused("all tensors", "predictions on text that was not trained on became no better");
            return Ok(());
        }
        for (name, by) in factors.names.iter().zip(&factors.values) {
            if cx.rewrite(name) {
                apply(cx, name, by)?;
            }
        }
        cx.progress("", total, total);
        Ok(())
    }
}

fn no_text() -> Error {
    Error::new(ErrorKind::Uncalibrated)
}

/// Mean divergence over the windows that are not trained on.
fn divergence(
    graph: &Graph,
    cx: &mut PassCx<'_>,
    factors: &[(WeightName, Vec<f32>)],
    windows: &[Range<usize>],
) -> Result<f64> {
    let mut sum = 0.0;
    for range in windows {
        sum += cx.gain_gradient(graph, factors, range.clone(), false)?.ok_or_else(no_text)?.divergence;
    }
    Ok(sum / windows.len().max(1) as f64)
}

/// Batches of windows: those to train on, at most so many windows, neighbours in the text far from each other; and those not
/// to. Of text for one batch alone both are all of it.
fn batches(count: usize, most: usize) -> (Vec<Range<usize>>, Vec<Range<usize>>) {
    let all: Vec<Range<usize>> =
        (0..count).step_by(BATCH).map(|first| first..(first + BATCH).min(count)).collect();
    if all.len() < 2 {
        return (all.clone(), all);
    }
    let (held_out, mut trained): (Vec<_>, Vec<_>) =
        all.into_iter().enumerate().partition(|(i, _)| i % HELD_OUT == 1);
    // Multiples of the golden ratio, without their integers, are spread evenly however many are taken.
    let place = |i: usize| (i as f64 * 0.618_033_988_749_895).fract();
    trained.sort_by(|a, b| place(a.0).total_cmp(&place(b.0)));
    trained.truncate(most.div_ceil(BATCH));
    let ranges = |batches: Vec<(usize, Range<usize>)>| batches.into_iter().map(|(_, b)| b).collect();
    (ranges(trained), ranges(held_out))
}

/// Multiplies rows of a coded matrix, or elements of a vector.
fn apply(cx: &mut PassCx<'_>, name: &WeightName, by: &[f32]) -> Result<()> {
    if cx.weights.info(name)?.shape.len() == 1 {
        let mut values = cx.weights.read_f32(name)?;
        values.iter_mut().zip(by).for_each(|(v, f)| *v *= f);
        cx.weights.set_stand_in(name, values)?;
    } else {
        let mut encoded = cx.weights.read_encoded(name)?;
        encoded.row_scale.iter_mut().zip(by).for_each(|(s, f)| *s *= f);
        cx.weights.set_encoded(name, &encoded)?;
    }
    Ok(())
}

/// Whether every use of a weight is as operand `slot` of such a node, none of which is an output of the graph.
fn used_by(graph: &Graph, subject: &Subject, slot: usize, is: fn(&OpKind) -> bool) -> bool {
    let mut users = subject.nodes.iter().flat_map(|node| graph.users(ValueId { node: *node, slot: 0 }));
    users.all(|(user, at)| {
        let output = graph.outputs().contains(&ValueId { node: user, slot: 0 });
        usize::from(at) == slot && is(graph.op(user)) && !output
    })
}

impl Factors {
    /// Factors of 1 for everything that the recipe means and that has scales or gains to move; `None` when no matrix has.
    fn new(graph: &Graph, cx: &PassCx<'_>) -> Result<Option<Factors>> {
        let (mut names, mut pace, mut lens) = (Vec::new(), Vec::new(), Vec::new());
        for subject in cx.subjects(graph) {
            let info = cx.weights.info(&subject.name)?;
            let of_norm = |op: &OpKind| matches!(op, OpKind::RmsNorm(_) | OpKind::LayerNorm(_));
            let of_linear = |op: &OpKind| matches!(op, OpKind::Linear(_));
            let found = match (info.elem, &info.shape[..]) {
                (Elem::F32, [_]) if used_by(graph, &subject, 1, of_norm) => NORMS,
                (elem, [_, _]) if has_row_scales(elem) && used_by(graph, &subject, 1, of_linear) => ROWS,
                _ => continue,
            };
            lens.push(info.shape[0]);
            pace.push(found);
            names.push(subject.name);
        }
        let all = |v: f32| lens.iter().map(|len| vec![v; *len]).collect::<Vec<_>>();
        let (values, mean, square) = (all(1.0), all(0.0), all(0.0));
        let has_matrices = pace.contains(&ROWS);
        Ok(has_matrices.then_some(Factors { names, pace, values, mean, square, steps: 0 }))
    }

    fn named(&self) -> Vec<(WeightName, Vec<f32>)> {
        self.names.iter().cloned().zip(self.values.iter().cloned()).collect()
    }

    fn ones(&self) -> Vec<(WeightName, Vec<f32>)> {
        self.names.iter().cloned().zip(self.values.iter().map(|v| vec![1.0; v.len()])).collect()
    }

    /// One step of Adam down the slopes, of `total`.
    fn step(&mut self, slopes: &[Vec<f32>], rate: f32, total: usize) {
        let at = self.steps as f32;
        let rise = ((at + 1.0) / RISE as f32).min(1.0);
        let fall = 0.5 * (1.0 + (std::f32::consts::PI * at / total.max(1) as f32).cos());
        self.steps += 1;
        let correction = |decay: f32| 1.0 - decay.powi(self.steps as i32);
        let (of_mean, of_square) = (correction(MEAN_DECAY), correction(SQUARE_DECAY));
        for (i, slopes) in slopes.iter().enumerate() {
            let step = rate * rise * fall * self.pace[i];
            let moments = self.mean[i].iter_mut().zip(&mut self.square[i]);
            for ((value, (mean, square)), slope) in self.values[i].iter_mut().zip(moments).zip(slopes) {
                *mean = MEAN_DECAY * *mean + (1.0 - MEAN_DECAY) * slope;
                *square = SQUARE_DECAY * *square + (1.0 - SQUARE_DECAY) * slope * slope;
                let size = (*square / of_square).sqrt();
                if size > 0.0 {
                    *value = (*value - step * (*mean / of_mean) / size).clamp(LEAST, 1.0 / LEAST);
                }
            }
        }
    }

    /// For the journal.
    fn bytes(&self) -> Vec<u8> {
        let numbers = self.values.iter().chain(&self.mean).chain(&self.square).flatten();
        let steps = (self.steps as u64).to_le_bytes();
        steps.into_iter().chain(numbers.flat_map(|v| v.to_le_bytes())).collect()
    }

    /// Takes back what [`Factors::bytes`] gave of the same weights; whether it could be.
    fn read(&mut self, bytes: &[u8]) -> bool {
        let Some((steps, numbers)) = bytes.split_first_chunk() else { return false };
        let (numbers, rest) = numbers.as_chunks();
        let all = || self.values.iter().chain(&self.mean).chain(&self.square).map(Vec::len);
        if !rest.is_empty() || numbers.len() != all().sum::<usize>() {
            return false;
        }
        let mut numbers = numbers.iter().map(|b| f32::from_le_bytes(*b));
        let every = self.values.iter_mut().chain(&mut self.mean).chain(&mut self.square).flatten();
        every.for_each(|v| *v = numbers.next().unwrap_or(1.0));
        self.steps = u64::from_le_bytes(*steps) as usize;
        true
    }
}

/// Whether a format has an f32 scale for each row.
fn has_row_scales(elem: Elem) -> bool {
    match elem {
        Elem::Coded(format) => matches!(format.scale, Scale::RowF32Field8 { .. }),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn factors(lens: &[usize]) -> Factors {
        let all = |v: f32| lens.iter().map(|len| vec![v; *len]).collect::<Vec<_>>();
        let names = (0..lens.len()).map(|i| format!("w{i}").as_str().into()).collect();
        let pace = (0..lens.len()).map(|i| 1.0 + i as f32).collect();
        Factors { names, pace, values: all(1.0), mean: all(0.0), square: all(0.0), steps: 0 }
    }

    #[test]
    fn windows_are_trained_on_or_held_out() {
        for (count, most) in [(1, 8), (2, 8), (3, 8), (4, 2), (24, 100), (25, 100), (96, 32), (97, 1)] {
            let (trained, held_out) = batches(count, most);
            assert!(!trained.is_empty() && !held_out.is_empty(), "{count} {most}");
            assert!(trained.len() <= most.div_ceil(BATCH), "{count} {most}: {trained:?}");
            assert!(trained.iter().chain(&held_out).all(|b| b.end <= count && !b.is_empty()));
            if count > BATCH {
                assert!(trained.iter().all(|b| !held_out.contains(b)), "{count} {most}");
            }
            let mut all: Vec<_> = trained.iter().map(|b| b.start).collect();
            all.sort_unstable();
            all.dedup();
            assert_eq!(all.len(), trained.len(), "{count} {most}: one twice");
        }
        // A few of many come from everywhere.
        let (trained, _) = batches(960, 40);
        let mut starts: Vec<_> = trained.iter().map(|b| b.start).collect();
        starts.sort_unstable();
        assert!(starts.windows(2).all(|w| w[1] - w[0] < 120), "{starts:?}");
    }

    /// The minimum of a parabola is found, and nothing leaves its bounds.
    #[test]
    fn steps_lead_to_where_slopes_vanish() {
        let mut found = factors(&[3, 2]);
        let goal = [vec![1.02f32, 0.97, 1.0], vec![1.04, 0.99]];
        for _ in 0..200 {
            let slopes: Vec<Vec<f32>> = found
                .values
                .iter()
                .zip(&goal)
                .map(|(v, g)| v.iter().zip(g).map(|(v, g)| v - g).collect())
                .collect();
            found.step(&slopes, 0.002, 200);
        }
        for (v, g) in found.values.iter().flatten().zip(goal.iter().flatten()) {
            assert!((v - g).abs() < 2e-3, "{v} for {g}");
        }
        for _ in 0..50 {
            found.step(&[vec![1e9; 3], vec![-1e9; 2]], 0.1, 1000);
        }
        assert_eq!(found.values, [vec![LEAST; 3], vec![1.0 / LEAST; 2]]);
    }

    #[test]
    fn what_was_kept_comes_back() {
        let mut found = factors(&[3, 2]);
        found.step(&[vec![1.0, -2.0, 0.0], vec![3.0, 4.0]], 0.01, 10);
        let mut again = factors(&[3, 2]);
        assert!(again.read(&found.bytes()));
        assert_eq!(again, found);
        assert!(!factors(&[3, 3]).read(&found.bytes()));
        assert!(!factors(&[3, 2]).read(&found.bytes()[..7]));
    }
}
