//! Where a step's time goes, launch by launch: single tokens, small batches and prompts.
//!
//! Launches run one by one on all threads, each timed from its start to its end; of several runs each launch counts
//! with its median. They are summed by what they compute (their note without the layer). A step that runs as a whole
//! takes a little less, and is timed beside it.

use crate::failure::Result;
use crate::speed::token_ids;
use crate::terminal::table;
use attar_runtime::{Engine, LaunchTime, Model, SequenceId, StepBatch};
use serde::Serialize;
use std::time::Instant;

/// What to profile.
#[derive(Clone, Copy, Debug)]
pub struct ProfilePlan {
    /// Tokens of a prompt; 0 leaves it out.
    pub prompt: usize,
    /// Sequences of a small batch.
    pub batch: usize,
    /// Tokens held already when single tokens and small batches are computed.
    pub context: usize,
    pub repetitions: usize,
}

/// The profile of one kind of step.
#[derive(Clone, Debug, Serialize)]
pub struct StepProfile {
    /// `decode`, `small_batch`, `prefill`.
    pub program: String,
    pub threads: usize,
    pub tokens: usize,
    /// Tokens of each sequence before the step.
    pub context: usize,
    /// Median time of a step that runs as a whole.
    pub step_us: f64,
    /// Sum over the launches, run one by one.
    pub launches_us: f64,
    pub groups: Vec<Group>,
}

/// All launches that compute the same thing.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Group {
    pub what: String,
    pub launches: usize,
    pub us_per_step: f64,
    pub us_per_token: f64,
    /// Of all launches' time.
    pub share: f64,
    pub weight_bytes: u64,
    pub gb_per_second: f64,
    /// Multiply-adds count as two operations; matrix kernels only.
    pub gop_per_second: Option<f64>,
}

/// Profiles a model; `progress` is told before each kind of step.
///
/// # Errors
/// Those of the engine.
pub fn measure(model: &Model, plan: ProfilePlan, mut progress: impl FnMut(&str)) -> Result<Vec<StepProfile>> {
    let mut out = Vec::new();
    let small = plan.batch.clamp(2, model.small_batch_tokens().max(2));
    let prompt = plan.prompt.min(model.max_step_tokens());
    for (sequences, tokens, context) in [(1, 1, plan.context), (small, 1, plan.context), (1, prompt, 0)] {
        if tokens == 0 {
            continue;
        }
        progress(match (sequences, tokens) {
            (1, 1) => "decode",
            (_, 1) => "small batch",
            _ => "prefill",
        });
        out.push(one_kind(model, plan.repetitions, sequences, tokens, context)?);
    }
    Ok(out)
}

fn one_kind(
    model: &Model,
    repetitions: usize,
    sequences: usize,
    tokens: usize,
    context: usize,
) -> Result<StepProfile> {
    let mut engine = Engine::new(model.clone(), context + tokens, sequences)?;
    let ids = token_ids(context + tokens, model.manifest().model.vocab);
    let all = (0..sequences).map(|_| engine.add_sequence()).collect::<attar_runtime::Result<Vec<_>>>()?;
    fill(&mut engine, &all, &ids[..context])?;
    let mut batch = StepBatch::with_capacity(sequences * tokens);
    for sequence in &all {
        for (i, id) in ids[context..].iter().enumerate() {
            batch.push(*sequence, *id, i + 1 == tokens);
        }
    }
    let back = |engine: &mut Engine| all.iter().try_for_each(|s| engine.truncate(*s, context));
    let (mut whole, mut runs) = (Vec::new(), Vec::new());
    for repetition in 0..=repetitions {
        let start = Instant::now();
        engine.step(&batch)?;
        let time = start.elapsed();
        back(&mut engine)?;
        let mut times = Vec::new();
        engine.step_timed(&batch, &mut times)?;
        back(&mut engine)?;
        if repetition > 0 {
            whole.push(time.as_secs_f64() * 1e6);
            runs.push(times);
        }
    }
    let groups = groups(&runs, sequences * tokens);
    let program = runs.first().and_then(|r| r.first()).map(|l| serde_json::to_value(l.program));
    Ok(StepProfile {
        program: program.and_then(|p| Some(p.ok()?.as_str()?.to_owned())).unwrap_or_default(),
        threads: model.threads(),
        tokens: sequences * tokens,
        context,
        step_us: median(&mut whole),
        launches_us: groups.iter().map(|g| g.us_per_step).sum(),
        groups,
    })
}

/// Appends tokens to every sequence, in steps as large as there are.
///
/// # Errors
/// Those of the engine.
pub fn fill(engine: &mut Engine, sequences: &[SequenceId], ids: &[u32]) -> Result<()> {
    let most = engine.model().max_step_tokens().max(1);
    let mut batch = StepBatch::with_capacity(most);
    for sequence in sequences {
        for chunk in ids.chunks(most) {
            batch.clear();
            chunk.iter().enumerate().for_each(|(i, id)| batch.push(*sequence, *id, i + 1 == chunk.len()));
            engine.step(&batch)?;
        }
    }
    Ok(())
}

/// Sums the launches of several equal runs, in the order of their first appearance.
fn groups(runs: &[Vec<LaunchTime>], tokens: usize) -> Vec<Group> {
    let mut out: Vec<Group> = Vec::new();
    let mut operations: Vec<f64> = Vec::new();
    for (i, launch) in runs.first().into_iter().flatten().enumerate() {
        let mut times: Vec<f64> =
            runs.iter().filter_map(|r| r.get(i)).map(|l| l.time.as_secs_f64() * 1e6).collect();
        let what = without_layer(&launch.note);
        let at = out.iter().position(|g| g.what == what).unwrap_or(out.len());
        if at == out.len() {
            out.push(Group {
                what: what.to_owned(),
                launches: 0,
                us_per_step: 0.0,
                us_per_token: 0.0,
                share: 0.0,
                weight_bytes: 0,
                gb_per_second: 0.0,
                gop_per_second: None,
            });
            operations.push(0.0);
        }
        out[at].launches += 1;
        out[at].us_per_step += median(&mut times);
        out[at].weight_bytes += launch.weight_bytes;
        operations[at] += multiply_adds(&launch.kernel).unwrap_or(0) as f64 * 2.0 * launch.rows as f64;
    }
    let sum: f64 = out.iter().map(|g| g.us_per_step).sum();
    for (g, operations) in out.iter_mut().zip(operations) {
        let seconds = (g.us_per_step * 1e-6).max(1e-12);
        g.us_per_token = g.us_per_step / tokens as f64;
        g.share = if sum > 0.0 { g.us_per_step / sum } else { 0.0 };
        g.gb_per_second = g.weight_bytes as f64 / seconds / 1e9;
        g.gop_per_second = (operations > 0.0).then_some(operations / seconds / 1e9);
    }
    out
}

/// `layers.3 gate_up_swiglu` becomes `gate_up_swiglu`.
fn without_layer(note: &str) -> &str {
    match note.split_once(' ') {
        Some((layer, what)) if layer.starts_with("layers.") => what,
        _ => note,
    }
}

/// Multiply-adds for one row, from the name of a matrix kernel: `linear_n4_960x576_r1_…` has 960 · 576.
fn multiply_adds(kernel: &str) -> Option<u64> {
    let mut parts = kernel.split('_');
    if parts.next() != Some("linear") {
        return None;
    }
    let (n, k) = parts.nth(1)?.split_once('x')?;
    n.parse::<u64>().ok()?.checked_mul(k.parse().ok()?)
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    let last = values.len().saturating_sub(1);
    let at = |i: usize| values.get(i).copied().unwrap_or(0.0);
    (at(last / 2) + at(last.div_ceil(2))) / 2.0
}

/// The profile as a table.
pub fn render(p: &StepProfile) -> String {
    let mut rows = vec![
        ["LAUNCHES OF", "COUNT", "US/TOKEN", "SHARE", "WEIGHTS", "GB/S", "GOP/S"].map(str::to_owned).to_vec(),
    ];
    for g in &p.groups {
        let weights =
            if g.weight_bytes > 0 { crate::terminal::bytes_text(g.weight_bytes) } else { String::new() };
        rows.push(vec![
            g.what.clone(),
            g.launches.to_string(),
            format!("{:.2}", g.us_per_token),
            format!("{:.1} %", g.share * 100.0),
            weights,
            if g.weight_bytes > 0 { format!("{:.1}", g.gb_per_second) } else { String::new() },
            g.gop_per_second.map_or(String::new(), |x| format!("{x:.0}")),
        ]);
    }
    format!(
        "{}: {} tokens at context {}, {} threads; a step takes {:.0} us, its launches one by one {:.0} us\n{}",
        p.program,
        p.tokens,
        p.context,
        p.threads,
        p.step_us,
        p.launches_us,
        table(&rows)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use attar_runtime::ProgramKind;
    use std::time::Duration;

    #[test]
    fn names_say_how_much_is_computed() {
        assert_eq!(multiply_adds("linear_n4_960x576_r1_qkv9_3x64_kvf16_p32"), Some(960 * 576));
        assert_eq!(multiply_adds("attention_9_3x64_s3e000000"), None);
        assert_eq!(multiply_adds("linear_n4_wide"), None);
        assert_eq!(without_layer("layers.12 attention to int8"), "attention to int8");
        assert_eq!(without_layer("gather_rows"), "gather_rows");
    }

    #[test]
    fn launches_are_summed_over_layers_with_the_median_of_runs() {
        let launch = |note: &str, kernel: &str, us: u64| LaunchTime {
            program: ProgramKind::Prefill,
            kernel: kernel.to_owned(),
            note: note.to_owned(),
            weight_bytes: 1000,
            grid: 1,
            rows: 10,
            time: Duration::from_micros(us),
        };
        let run = |a, b| {
            vec![
                launch("layers.0 o", "linear_w8_100x50_rn", a),
                launch("layers.0 attention", "attention", 5),
                launch("layers.1 o", "linear_w8_100x50_rn", b),
            ]
        };
        let groups = groups(&[run(10, 20), run(12, 1000), run(11, 22)], 10);
        assert_eq!(groups.len(), 2);
        let (o, attention) = (&groups[0], &groups[1]);
        assert_eq!((o.what.as_str(), o.launches, o.us_per_step, o.weight_bytes), ("o", 2, 33.0, 2000));
        assert_eq!(o.us_per_token, 3.3);
        assert!((o.gop_per_second.unwrap() - 2.0 * 5000.0 * 10.0 * 2.0 / 33e-6 / 1e9).abs() < 1e-9);
        assert!((o.share + attention.share - 1.0).abs() < 1e-12);
        assert_eq!(attention.gop_per_second, None);
    }
}
