//! Speed as llama-bench counts it: `pp` tokens of a prompt at once, `tg` tokens one at a time from an empty cache.

use crate::failure::Result;
use attar_runtime::{Model, Session, SessionOptions};
use serde::Serialize;
use std::time::Instant;

/// One measurement, repeated.
#[derive(Clone, Debug, Serialize)]
pub struct Speed {
    /// `pp512`, `tg128`.
    pub test: String,
    pub threads: usize,
    pub tokens: usize,
    /// Median of the samples, in tokens per second.
    pub tokens_per_second: f64,
    pub min: f64,
    pub max: f64,
    /// `(max - min) / median`.
    pub spread: f64,
    /// In the order they were taken.
    pub samples: Vec<f64>,
}

/// What to measure.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub prompt: usize,
    pub generate: usize,
    pub repetitions: usize,
}

/// Measures; `progress` is told before each repetition. One run of each kind comes before those that count.
///
/// # Errors
/// Those of the engine.
pub fn measure(model: &Model, plan: Plan, mut progress: impl FnMut(&str)) -> Result<Vec<Speed>> {
    let most = plan.prompt.max(plan.generate).max(1);
    let mut session = model.session(&SessionOptions { context: Some(most) })?;
    let mut results = Vec::new();
    for (name, tokens, at_once) in [("pp", plan.prompt, true), ("tg", plan.generate, false)] {
        if tokens == 0 {
            continue;
        }
        let test = format!("{name}{tokens}");
        let ids = token_ids(tokens, model.manifest().model.vocab);
        let mut samples = Vec::with_capacity(plan.repetitions);
        for repetition in 0..=plan.repetitions {
            progress(&test);
            let rate = tokens as f64 / one_run(&mut session, &ids, at_once)?;
            if repetition > 0 {
                samples.push(rate);
            }
        }
        results.push(Speed::new(test, model.threads(), tokens, samples));
    }
    Ok(results)
}

/// Seconds for one run from an empty cache.
fn one_run(session: &mut Session, ids: &[u32], at_once: bool) -> Result<f64> {
    session.truncate(0)?;
    let start = Instant::now();
    if at_once {
        session.append(ids)?;
    } else {
        for id in ids {
            session.append(&[*id])?;
        }
    }
    Ok(start.elapsed().as_secs_f64())
}

impl Speed {
    fn new(test: String, threads: usize, tokens: usize, samples: Vec<f64>) -> Speed {
        let mut sorted = samples.clone();
        sorted.sort_by(f64::total_cmp);
        let at = |i: usize| sorted.get(i).copied().unwrap_or(0.0);
        let last = sorted.len().saturating_sub(1);
        let median = (at(last / 2) + at(last.div_ceil(2))) / 2.0;
        let spread = if median > 0.0 { (at(last) - at(0)) / median } else { 0.0 };
        Speed { test, threads, tokens, tokens_per_second: median, min: at(0), max: at(last), spread, samples }
    }
}

/// Ids that look random and are the same every time.
fn token_ids(count: usize, vocab: u32) -> Vec<u32> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % u64::from(vocab.max(1))) as u32
    };
    std::iter::repeat_with(next).take(count).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_and_spread() {
        let s = Speed::new("tg1".into(), 1, 1, vec![4.0, 1.0, 3.0, 2.0]);
        assert_eq!((s.tokens_per_second, s.min, s.max, s.spread), (2.5, 1.0, 4.0, 1.2));
        let s = Speed::new("tg1".into(), 1, 1, vec![3.0]);
        assert_eq!((s.tokens_per_second, s.spread), (3.0, 0.0));
    }

    #[test]
    fn ids_are_in_range_and_repeatable() {
        let ids = token_ids(1000, 77);
        assert!(ids.iter().all(|i| *i < 77));
        assert_eq!(ids, token_ids(1000, 77));
        assert!(ids.iter().collect::<std::collections::BTreeSet<_>>().len() > 50);
    }
}
