//! Chooses the next token from logits.
//!
//! In order: repetition penalty, top-k, temperature, top-p, min-p, each over what the one before left, then a draw
//! with ChaCha8 seeded by the caller. Temperature 0 takes the largest logit, the lowest id among equals. Sources:
//! repetition penalty Keskar et al. 2019, arXiv:1909.05858; top-p Holtzman et al. 2019, arXiv:1904.09751; min-p
//! Nguyen et al. 2024, arXiv:2407.01082.

use crate::error::{ErrorKind, Result};
use bytemuck::{Pod, Zeroable};
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// How tokens are chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingOptions {
    /// Divides the logits; 0 always takes the likeliest token.
    pub temperature: f32,
    /// Keep this many of the likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the fewest likeliest tokens whose probabilities reach this sum; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens at least this likely, relative to the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Positive logits of recent tokens are divided by this, negative ones multiplied; 1 changes nothing.
    pub repetition_penalty: f32,
    /// How many of the latest tokens, the prompt's included, count as recent.
    pub repetition_last_n: usize,
    /// Starts the random draws.
    pub seed: u64,
}

impl Default for SamplingOptions {
    /// The likeliest token, always.
    fn default() -> SamplingOptions {
        SamplingOptions {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            repetition_last_n: 64,
            seed: 0,
        }
    }
}

impl SamplingOptions {
    /// Whether the token is that of the largest logit, whatever came before.
    pub(crate) fn is_greedy(&self) -> bool {
        self.temperature == 0.0 && self.repetition_penalty == 1.0
    }

    /// How many of the largest logits the token depends on, where it is not one and not all of them.
    pub(crate) fn looks_at(&self) -> Option<usize> {
        let some = self.top_k > 0 && self.temperature > 0.0 && self.repetition_penalty == 1.0;
        some.then_some(self.top_k)
    }

    pub(crate) fn check(&self) -> Result<()> {
        let bad = |name, value: f32, expected: &str| {
            let (value, expected) = (value.to_string(), expected.to_owned());
            Err(ErrorKind::Option { name, value, expected }.into())
        };
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return bad("temperature", self.temperature, "0 or more");
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return bad("top_p", self.top_p, "more than 0 and at most 1");
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return bad("min_p", self.min_p, "0 to 1");
        }
        if !(self.repetition_penalty.is_finite() && self.repetition_penalty > 0.0) {
            return bad("repetition_penalty", self.repetition_penalty, "more than 0");
        }
        Ok(())
    }
}

/// Draws tokens; keeps its working memory, so that nothing is allocated per token.
#[derive(Debug)]
pub struct Sampler {
    options: SamplingOptions,
    rng: ChaCha8Rng,
    candidates: Vec<Candidate>,
    /// The draw in which a token was last penalized.
    penalized: Vec<u64>,
    draw: u64,
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    /// Logit after penalty, then probability relative to the likeliest.
    weight: f32,
    id: u32,
}

/// A token and its logit.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct TokenLogit {
    pub token: u32,
    pub logit: f32,
}

impl Sampler {
    /// A sampler for a vocabulary of `vocab` tokens.
    ///
    /// # Errors
    /// [`ErrorKind::Option`] for a value out of its range.
    pub fn new(options: SamplingOptions, vocab: usize) -> Result<Sampler> {
        options.check()?;
        let rng = ChaCha8Rng::seed_from_u64(options.seed);
        Ok(Sampler {
            options,
            rng,
            candidates: Vec::with_capacity(vocab),
            penalized: vec![0; vocab],
            draw: 0,
        })
    }

    /// The next token after `context`. Logits that are not numbers are never chosen as long as one is; without any
    /// logits the answer is 0.
    pub fn sample(&mut self, logits: &[f32], context: &[u32]) -> u32 {
        self.draw += 1;
        self.candidates.clear();
        let usable = |l: f32| if l.is_nan() { f32::NEG_INFINITY } else { l };
        self.candidates.extend(logits.iter().zip(0..).map(|(l, id)| Candidate { weight: usable(*l), id }));
        self.penalize(context);
        self.choose()
    }

    /// As [`Sampler::sample`], given the largest logits, as many as [`SamplingOptions::looks_at`] says or all there are, largest
    /// first and the lowest token first among equals. The same token comes out.
    pub(crate) fn sample_from(&mut self, top: &[TokenLogit]) -> u32 {
        self.draw += 1;
        self.candidates.clear();
        self.candidates.extend(top.iter().map(|t| Candidate { weight: t.logit, id: t.token }));
        self.choose()
    }

    /// Draws from the candidates, whose weights are logits.
    fn choose(&mut self) -> u32 {
        let greedy = likeliest(&self.candidates);
        if self.options.temperature == 0.0 || !greedy.weight.is_finite() {
            return greedy.id;
        }
        self.keep_top_k();
        let inverse = 1.0 / self.options.temperature;
        for c in &mut self.candidates {
            // Relative to the largest: exp cannot overflow, and a tiny temperature turns into greedy.
            c.weight = ((c.weight - greedy.weight) * inverse).exp();
            if c.weight.is_nan() {
                c.weight = if c.id == greedy.id { 1.0 } else { 0.0 };
            }
        }
        self.keep_top_p();
        let floor = self.options.min_p;
        if floor > 0.0 {
            self.candidates.retain(|c| c.weight >= floor);
        }
        let total: f64 = self.candidates.iter().map(|c| f64::from(c.weight)).sum();
        // 53 random bits: uniform in [0, 1).
        let uniform = (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let mut left = uniform * total;
        for c in &self.candidates {
            left -= f64::from(c.weight);
            if left < 0.0 {
                return c.id;
            }
        }
        greedy.id
    }

    fn penalize(&mut self, context: &[u32]) {
        let penalty = self.options.repetition_penalty;
        if penalty == 1.0 {
            return;
        }
        let recent = context.len().saturating_sub(self.options.repetition_last_n);
        for &id in context.get(recent..).unwrap_or_default() {
            let at = id as usize;
            let (Some(c), Some(stamp)) = (self.candidates.get_mut(at), self.penalized.get_mut(at)) else {
                continue;
            };
            if *stamp != self.draw {
                *stamp = self.draw;
                c.weight = if c.weight > 0.0 { c.weight / penalty } else { c.weight * penalty };
            }
        }
    }

    fn keep_top_k(&mut self) {
        let k = self.options.top_k;
        if k > 0 && k < self.candidates.len() {
            self.candidates.select_nth_unstable_by(k - 1, by_likelihood);
            self.candidates.truncate(k);
        }
        if k > 0 {
            self.candidates.sort_unstable_by(by_likelihood);
        }
    }

    /// Sorts no more of the candidates than it keeps (to within a factor of four).
    fn keep_top_p(&mut self) {
        if self.options.top_p >= 1.0 {
            return;
        }
        let total: f64 = self.candidates.iter().map(|c| f64::from(c.weight)).sum();
        let wanted = f64::from(self.options.top_p) * total;
        let len = self.candidates.len();
        let mut sorted = 64;
        loop {
            let n = sorted.min(len);
            if n < len {
                self.candidates.select_nth_unstable_by(n, by_likelihood);
            }
            let head = self.candidates.get_mut(..n).unwrap_or_default();
            head.sort_unstable_by(by_likelihood);
            let mut sum = 0.0;
            let enough = head.iter().position(|c| {
                sum += f64::from(c.weight);
                sum >= wanted
            });
            if let Some(last) = enough {
                self.candidates.truncate(last + 1);
                return;
            }
            if n == len {
                return;
            }
            sorted *= 4;
        }
    }
}

fn by_likelihood(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.weight.total_cmp(&a.weight).then(a.id.cmp(&b.id))
}

fn likeliest(candidates: &[Candidate]) -> Candidate {
    let mut best = Candidate { weight: f32::NEG_INFINITY, id: 0 };
    for c in candidates {
        if c.weight > best.weight {
            best = *c;
        }
    }
    best
}

/// What [`Sampler::sample`] takes at temperature 0 without a repetition penalty.
pub(crate) fn likeliest_token(logits: &[f32]) -> u32 {
    let mut best = Candidate { weight: f32::NEG_INFINITY, id: 0 };
    for (&weight, id) in logits.iter().zip(0..) {
        if weight > best.weight {
            best = Candidate { weight, id };
        }
    }
    best.id
}

/// The `n` largest logits with their tokens, largest first, the lowest id first among equals.
pub fn top_logits(logits: &[f32], n: usize) -> Vec<(u32, f32)> {
    let usable = |l: f32| if l.is_nan() { f32::NEG_INFINITY } else { l };
    let mut all: Vec<Candidate> =
        logits.iter().zip(0..).map(|(l, id)| Candidate { weight: usable(*l), id }).collect();
    if n == 0 {
        return Vec::new();
    }
    if n < all.len() {
        all.select_nth_unstable_by(n - 1, by_likelihood);
        all.truncate(n);
    }
    all.sort_unstable_by(by_likelihood);
    all.into_iter().map(|c| (c.id, c.weight)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand::RngCore;

    /// The rules as they are written, in f64, everything sorted: `(id, probability)`.
    fn reference(o: &SamplingOptions, logits: &[f32], context: &[u32]) -> Vec<(u32, f64)> {
        let mut l: Vec<f64> = logits.iter().map(|x| f64::from(*x)).collect();
        let recent: std::collections::BTreeSet<u32> =
            context.iter().rev().take(o.repetition_last_n).copied().collect();
        for id in recent {
            if let Some(x) = l.get_mut(id as usize) {
                let p = f64::from(o.repetition_penalty);
                *x = if *x > 0.0 { *x / p } else { *x * p };
            }
        }
        let mut c: Vec<(u32, f64)> =
            l.iter().enumerate().map(|(i, x)| (i as u32, x / f64::from(o.temperature))).collect();
        c.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        if o.top_k > 0 {
            c.truncate(o.top_k);
        }
        let softmax = |c: &mut Vec<(u32, f64)>| {
            let max = c[0].1;
            let sum: f64 = c.iter().map(|x| (x.1 - max).exp()).sum();
            for x in c.iter_mut() {
                x.1 = (x.1 - max).exp() / sum;
            }
        };
        softmax(&mut c);
        if o.top_p < 1.0 {
            let mut sum = 0.0;
            let keep = c
                .iter()
                .position(|x| {
                    sum += x.1;
                    sum >= f64::from(o.top_p)
                })
                .map_or(c.len(), |i| i + 1);
            c.truncate(keep);
        }
        let best = c[0].1;
        c.retain(|x| x.1 >= f64::from(o.min_p) * best);
        let sum: f64 = c.iter().map(|x| x.1).sum();
        c.iter().map(|x| (x.0, x.1 / sum)).collect()
    }

    fn noise(n: usize, seed: u64) -> Vec<f32> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        (0..n).map(|_| (rng.next_u32() as f32 / u32::MAX as f32) * 8.0 - 4.0).collect()
    }

    fn options() -> SamplingOptions {
        SamplingOptions { temperature: 1.0, ..SamplingOptions::default() }
    }

    #[test]
    fn greedy_takes_the_lowest_of_equals() {
        let mut s = Sampler::new(SamplingOptions::default(), 4).unwrap();
        assert_eq!(s.sample(&[1.0, 3.0, 3.0, 2.0], &[]), 1);
        assert_eq!(s.sample(&[f32::NAN, -1.0, f32::NAN, -2.0], &[]), 1);
        assert_eq!(s.sample(&[f32::NAN; 4], &[]), 0);
        assert_eq!(s.sample(&[], &[]), 0);
        assert_eq!(s.sample(&[1.0, f32::INFINITY], &[]), 1);
        for logits in [&[1.0, 3.0, 3.0, 2.0][..], &[f32::NAN, -1.0, f32::NAN, -2.0], &[f32::NAN; 4], &[]] {
            assert_eq!(likeliest_token(logits), s.sample(logits, &[]), "{logits:?}");
        }
    }

    #[test]
    fn frequencies_match_the_rules() {
        let cases = [
            options(),
            SamplingOptions { temperature: 0.5, ..options() },
            SamplingOptions { top_k: 5, ..options() },
            SamplingOptions { top_p: 0.7, ..options() },
            SamplingOptions { min_p: 0.2, ..options() },
            SamplingOptions { repetition_penalty: 1.5, repetition_last_n: 3, ..options() },
            SamplingOptions {
                temperature: 1.7,
                top_k: 30,
                top_p: 0.9,
                min_p: 0.05,
                repetition_penalty: 1.2,
                ..options()
            },
        ];
        let context = [7, 1, 1, 2, 300];
        for (i, o) in cases.into_iter().enumerate() {
            let logits = noise(40, 5 + i as u64);
            let expected = reference(&o, &logits, &context);
            let mut s = Sampler::new(o.clone(), logits.len()).unwrap();
            let draws = 40_000;
            let mut counts = vec![0u32; logits.len()];
            for _ in 0..draws {
                counts[s.sample(&logits, &context) as usize] += 1;
            }
            for (id, count) in counts.iter().enumerate() {
                let p = expected.iter().find(|e| e.0 as usize == id).map_or(0.0, |e| e.1);
                let got = f64::from(*count) / f64::from(draws);
                // Five standard deviations of a binomial.
                let tolerance = 5.0 * (p * (1.0 - p) / f64::from(draws)).sqrt();
                assert!((got - p).abs() <= tolerance, "case {i} token {id}: {got} against {p}");
            }
        }
    }

    #[test]
    fn the_same_seed_draws_the_same() {
        let logits = noise(1000, 1);
        let draw = |seed| {
            let mut s = Sampler::new(SamplingOptions { seed, top_p: 0.95, ..options() }, 1000).unwrap();
            (0..50).map(|_| s.sample(&logits, &[])).collect::<Vec<_>>()
        };
        assert_eq!(draw(3), draw(3));
        assert_ne!(draw(3), draw(4));
    }

    #[test]
    fn options_are_checked() {
        for o in [
            SamplingOptions { temperature: -1.0, ..options() },
            SamplingOptions { temperature: f32::NAN, ..options() },
            SamplingOptions { top_p: 0.0, ..options() },
            SamplingOptions { top_p: 1.5, ..options() },
            SamplingOptions { min_p: -0.1, ..options() },
            SamplingOptions { repetition_penalty: 0.0, ..options() },
        ] {
            let e = Sampler::new(o, 4).unwrap_err().to_string();
            assert!(e.starts_with("option "), "{e}");
        }
    }

    #[test]
    fn top_logits_are_sorted() {
        assert_eq!(top_logits(&[1.0, 5.0, f32::NAN, 5.0, 2.0], 3), [(1, 5.0), (3, 5.0), (4, 2.0)]);
        assert_eq!(top_logits(&[1.0], 9), [(0, 1.0)]);
        assert!(top_logits(&[1.0], 0).is_empty());
    }

    proptest! {
        /// What is drawn always belongs to what the rules keep, also with ties and hostile logits.
        #[test]
        fn draws_are_among_the_kept(
            logits in proptest::collection::vec(prop_oneof![(-4i8..4).prop_map(f32::from), -5f32..5.0], 1..400),
            top_k in 0usize..20, top_p in prop_oneof![Just(1.0f32), 0.05f32..1.0], min_p in prop_oneof![Just(0f32), 0f32..1.0],
            temperature in 0.2f32..3.0, seed: u64,
        ) {
            let o = SamplingOptions { temperature, top_k, top_p, min_p, seed, ..options() };
            // A hair of slack where f32 and f64 sums may part.
            let slack = SamplingOptions { top_p: (top_p + 1e-4).min(1.0), min_p: (min_p - 1e-4).max(0.0), ..o.clone() };
            let kept = reference(&slack, &logits, &[]);
            let mut s = Sampler::new(o, logits.len()).unwrap();
            for _ in 0..20 {
                let id = s.sample(&logits, &[]);
                prop_assert!(kept.iter().any(|k| k.0 == id), "{} not in {:?}", id, kept);
            }
        }

        /// The largest logits are all that a draw with top-k depends on, also where no number is among them.
        #[test]
        fn the_largest_are_enough(
            logits in proptest::collection::vec(
                prop_oneof![4 => (-4i8..4).prop_map(f32::from), 4 => -5f32..5.0, 1 => any::<f32>()],
                1..100,
            ),
            top_k in 1usize..20, top_p in 0.05f32..=1.0, min_p in 0f32..0.5, temperature in 0.01f32..3.0, seed: u64,
        ) {
            let o = SamplingOptions { temperature, top_k, top_p, min_p, seed, ..options() };
            prop_assert_eq!(o.looks_at(), Some(top_k));
            let top: Vec<TokenLogit> =
                top_logits(&logits, top_k).into_iter().map(|(token, logit)| TokenLogit { token, logit }).collect();
            let mut all = Sampler::new(o.clone(), logits.len()).unwrap();
            let mut some = Sampler::new(o, logits.len()).unwrap();
            for _ in 0..10 {
                prop_assert_eq!(some.sample_from(&top), all.sample(&logits, &[]));
            }
        }

        #[test]
        fn hostile_logits_do_not_panic(bits in proptest::collection::vec(any::<u32>(), 0..60), t in 0f32..2.0, p in 0.01f32..1.0) {
            let logits: Vec<f32> = bits.iter().map(|b| f32::from_bits(*b)).collect();
            let o = SamplingOptions { temperature: t, top_p: p, top_k: 7, ..options() };
            let id = Sampler::new(o, logits.len()).unwrap().sample(&logits, &[0, u32::MAX]);
            prop_assert!((id as usize) < logits.len().max(1));
        }
    }
}
