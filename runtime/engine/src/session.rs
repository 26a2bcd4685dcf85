//! A session: one sequence of tokens, generated from.
//!
//! The tokens of earlier calls stay in the KV cache; a call whose prompt begins with them computes only what is new.

use crate::engine::{Engine, SequenceId, StepBatch};
use crate::error::{ErrorKind, Result};
use crate::model::Model;
use crate::sampler::{Sampler, SamplingOptions, TokenLogit};
use crate::stop::StopBuffer;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How a session is made.
#[derive(Clone, Debug, Default)]
pub struct SessionOptions {
    /// Most tokens of prompt and answer together; by default the longest the model was made for. Memory for the KV
    /// cache is committed as it fills.
    pub context: Option<usize>,
}

/// How text is generated.
#[derive(Clone, Debug)]
pub struct GenerateOptions {
    /// Most tokens to generate; by default until the context is full.
    pub max_tokens: Option<usize>,
    pub sampling: SamplingOptions,
    /// The text ends before the first of these.
    pub stop: Vec<String>,
    /// Go on after the model's end-of-text tokens.
    pub ignore_eos: bool,
    pub context_overflow: ContextOverflow,
    /// Ends the generation from elsewhere.
    pub cancel: CancelToken,
}

impl Default for GenerateOptions {
    fn default() -> GenerateOptions {
        GenerateOptions {
            max_tokens: None,
            sampling: SamplingOptions::default(),
            stop: Vec::new(),
            ignore_eos: false,
            context_overflow: ContextOverflow::Error,
            cancel: CancelToken::default(),
        }
    }
}

/// What happens when the context is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum ContextOverflow {
    /// A prompt that does not fit is an error; a generation that fills the context ends with
    /// [`FinishReason::Context`].
    #[default]
    Error,
    /// The first `keep` tokens stay, and of the others the newer half; they are computed anew, so that what follows is
    /// what the model says to exactly those tokens.
    Shift { keep: usize },
}

/// Cancels a generation from another thread; clones cancel together.
#[derive(Clone, Debug, Default)]
pub struct CancelToken(Arc<AtomicBool>);

impl CancelToken {
    /// Ends the generation before its next step.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Whether it was cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// A piece of a generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece<'a> {
    /// The token just chosen; `None` for text that was held back and follows at the end.
    pub token: Option<u32>,
    /// New text: whole characters, possibly none. All pieces' texts make the generation's text.
    pub text: &'a str,
}

/// What the caller wants after a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Control {
    Continue,
    /// End here, as if cancelled.
    Stop,
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop string.
    Stop,
    /// The model said so.
    Eos,
    /// `max_tokens`.
    Length,
    /// The caller.
    Cancelled,
    /// The context is full.
    Context,
}

impl FinishReason {
    /// Lower-case name.
    pub fn name(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Eos => "eos",
            FinishReason::Length => "length",
            FinishReason::Cancelled => "cancelled",
            FinishReason::Context => "context",
        }
    }
}

/// What was generated.
#[derive(Clone, Debug, PartialEq)]
pub struct Generation {
    /// All tokens chosen, an end-of-text token included.
    pub tokens: Vec<u32>,
    pub text: String,
    pub finish: FinishReason,
    pub timings: Timings,
}

/// Where the time went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Timings {
    /// Tokens of the prompt, and how many of them were still known from before.
    pub prompt_tokens: usize,
    pub cached_tokens: usize,
    /// Computing the prompt's tokens.
    pub prompt: Duration,
    /// From the call to the first token's choice.
    pub first_token: Duration,
    /// From the first token's choice to the end.
    pub decode: Duration,
    /// Tokens chosen.
    pub generated_tokens: usize,
}

impl Timings {
    /// Prompt tokens computed per second.
    pub fn prompt_rate(&self) -> f64 {
        rate(self.prompt_tokens.saturating_sub(self.cached_tokens), self.prompt)
    }

    /// Tokens per second after the first.
    pub fn decode_rate(&self) -> f64 {
        rate(self.generated_tokens.saturating_sub(1), self.decode)
    }
}

fn rate(tokens: usize, time: Duration) -> f64 {
    if time.is_zero() { 0.0 } else { tokens as f64 / time.as_secs_f64() }
}

/// One sequence of tokens of a model.
#[derive(Debug)]
pub struct Session {
    engine: Engine,
    sequence: SequenceId,
    /// The tokens in the KV cache.
    history: Vec<u32>,
    batch: StepBatch,
    /// Logits after the last token of `history`.
    logits: Vec<f32>,
}

impl Session {
    pub(crate) fn new(model: Model, options: &SessionOptions) -> Result<Session> {
        let m = &model.manifest().model;
        let context = options.context.unwrap_or(m.context_length as usize);
        let logits = Vec::with_capacity(m.vocab as usize);
        let batch = StepBatch::with_capacity(model.max_step_tokens());
        let mut engine = Engine::new(model, context, 1)?;
        let sequence = engine.add_sequence()?;
        let history = Vec::with_capacity(context);
        Ok(Session { engine, sequence, history, batch, logits })
    }

    /// The model.
    pub fn model(&self) -> &Model {
        self.engine.model()
    }

    /// Most tokens the session holds.
    pub fn context(&self) -> usize {
        self.engine.context()
    }

    /// The tokens held.
    pub fn tokens(&self) -> &[u32] {
        &self.history
    }

    /// Logits `[V]` after the last token held; empty before the first.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// Forgets the tokens from position `len` on. [`Session::logits`] is empty until the next token.
    ///
    /// # Errors
    /// None in practice.
    pub fn truncate(&mut self, len: usize) -> Result<()> {
        if len < self.history.len() {
            self.engine.truncate(self.sequence, len)?;
            self.history.truncate(len);
            self.logits.clear();
        }
        Ok(())
    }

    /// Appends tokens; afterwards [`Session::logits`] holds what follows them.
    ///
    /// # Errors
    /// [`ErrorKind::ContextOverflow`] before anything is computed; [`ErrorKind::Token`].
    pub fn append(&mut self, tokens: &[u32]) -> Result<()> {
        self.append_unless(tokens, None).map(|_| ())
    }

    /// As [`Session::append`], giving `sink` the logits `[V]` after each token: its index in `tokens`, then the logits.
    ///
    /// # Errors
    /// As [`Session::append`].
    pub fn append_with_logits(&mut self, tokens: &[u32], mut sink: impl FnMut(usize, &[f32])) -> Result<()> {
        self.check_room(tokens.len())?;
        let vocab = self.model().manifest().model.vocab as usize;
        let step = self.engine.model().max_step_tokens().max(1);
        let mut index = 0;
        for chunk in tokens.chunks(step) {
            self.batch.clear();
            for &token in chunk {
                self.batch.push(self.sequence, token, true);
            }
            let logits = self.engine.step(&self.batch)?;
            self.history.extend_from_slice(chunk);
            for row in logits.chunks_exact(vocab) {
                sink(index, row);
                index += 1;
            }
            keep_last(&mut self.logits, logits, vocab);
        }
        Ok(())
    }

    /// Appends tokens, or stops between two steps when cancelled and returns false.
    fn append_unless(&mut self, tokens: &[u32], cancel: Option<&CancelToken>) -> Result<bool> {
        self.check_room(tokens.len())?;
        let vocab = self.model().manifest().model.vocab as usize;
        let step = self.engine.model().max_step_tokens().max(1);
        for chunk in tokens.chunks(step) {
            if cancel.is_some_and(CancelToken::is_cancelled) {
                return Ok(false);
            }
            self.batch.clear();
            for (i, &token) in chunk.iter().enumerate() {
                // Of every chunk the last row's logits are wanted, though only the last chunk's are used: programs
                // need not work without any row.
                self.batch.push(self.sequence, token, i + 1 == chunk.len());
            }
            let logits = self.engine.step(&self.batch)?;
            self.history.extend_from_slice(chunk);
            keep_last(&mut self.logits, logits, vocab);
        }
        Ok(true)
    }

    /// Appends a token and returns the likeliest to follow it. Logits stay where they are computed.
    fn append_greedy(&mut self, token: u32) -> Result<Option<u32>> {
        self.check_room(1)?;
        self.batch.clear();
        self.batch.push(self.sequence, token, true);
        self.logits.clear();
        let next = self.engine.step_greedy(&self.batch)?.first().copied();
        self.history.push(token);
        Ok(next)
    }

    /// Appends a token and returns the `k` largest logits behind it. The others stay where they are computed.
    fn append_top_k(&mut self, token: u32, k: usize) -> Result<&[TokenLogit]> {
        self.check_room(1)?;
        self.batch.clear();
        self.batch.push(self.sequence, token, true);
        self.logits.clear();
        let top = self.engine.step_top_k(&self.batch, k)?;
        self.history.push(token);
        Ok(top)
    }

    fn check_room(&self, more: usize) -> Result<()> {
        let (needed, capacity) = (self.history.len().saturating_add(more), self.context());
        if needed > capacity {
            return Err(ErrorKind::ContextOverflow { needed, capacity }.into());
        }
        Ok(())
    }

    /// Generates from a prompt, given as tokens. What the session held before is forgotten, but for a beginning that
    /// it shares with the prompt. Every token and its text go to `on_piece` at once.
    ///
    /// After the first token nothing is allocated.
    ///
    /// # Errors
    /// An empty prompt, one that does not fit the context (under [`ContextOverflow::Error`]), a token outside the
    /// vocabulary, a sampling option out of its range, an artifact without tokenizer.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        options: &GenerateOptions,
        mut on_piece: impl FnMut(Piece<'_>) -> Control,
    ) -> Result<Generation> {
        let start = Instant::now();
        let model = self.engine.model().clone();
        let m = &model.manifest().model;
        let tokenizer = model.tokenizer()?;
        let mut sampler = Sampler::new(options.sampling.clone(), m.vocab as usize)?;
        let mut stream = tokenizer.stream();
        let shifted = self.fit_prompt(prompt, options.context_overflow)?;
        let prompt = shifted.as_deref().unwrap_or(prompt);

        let cached_tokens = self.keep_prefix(prompt)?;
        let mut timings = Timings { prompt_tokens: prompt.len(), cached_tokens, ..Timings::default() };
        let fresh = prompt.get(cached_tokens..).unwrap_or_default();
        let complete = self.append_unless(fresh, Some(&options.cancel))?;
        timings.prompt = start.elapsed();

        let most = options.max_tokens.unwrap_or(usize::MAX);
        let room = match options.context_overflow {
            ContextOverflow::Error => self.context() - prompt.len() + 1,
            // Not bounded by the context; a round number that later growth doubles.
            ContextOverflow::Shift { .. } => self.context(),
        }
        .min(most);
        let mut tokens: Vec<u32> = Vec::with_capacity(room);
        let longest = tokenizer.longest_token() + 4;
        let mut text = StopBuffer::new(&options.stop, room.saturating_mul(longest).min(MOST_TEXT));
        let mut finish = None;
        if !complete {
            finish = Some(FinishReason::Cancelled);
        } else if most == 0 {
            finish = Some(FinishReason::Length);
        }
        let greedy = options.sampling.is_greedy() && self.engine.chooses_on_device();
        let top = options.sampling.looks_at().filter(|k| self.engine.finds_on_device(*k));
        // Chosen with the step before; its logits are on the device.
        let (mut chosen, mut left) = (None, false);
        let mut decode_start = start;
        let finish = loop {
            if let Some(finish) = finish {
                break finish;
            }
            if options.cancel.is_cancelled() {
                break FinishReason::Cancelled;
            }
            let token = chosen.take().unwrap_or_else(|| sampler.sample(&self.logits, &self.history));
            if tokens.is_empty() {
                decode_start = Instant::now();
                timings.first_token = decode_start - start;
            }
            tokens.push(token);
            let eos = !options.ignore_eos && m.eos.contains(&token);
            if !eos {
                stream.push(token, text.text_mut());
            }
            let control = on_piece(Piece { token: Some(token), text: text.advance() });
            finish = if text.stopped() {
                Some(FinishReason::Stop)
            } else if eos {
                Some(FinishReason::Eos)
            } else if control == Control::Stop {
                Some(FinishReason::Cancelled)
            } else if tokens.len() >= most {
                Some(FinishReason::Length)
            } else if self.history.len() >= self.context() {
                match options.context_overflow {
                    ContextOverflow::Error => Some(FinishReason::Context),
                    ContextOverflow::Shift { keep } => {
                        left = false;
                        let shorter = shift(&self.history, keep, self.context());
                        let known = self.keep_prefix(&shorter)?;
                        let fresh = shorter.get(known..).unwrap_or_default();
                        if !self.append_unless(fresh, Some(&options.cancel))? {
                            Some(FinishReason::Cancelled)
                        } else {
                            None
                        }
                    }
                }
            } else {
                None
            };
            if finish.is_none() {
                if greedy {
                    (chosen, left) = (self.append_greedy(token)?, true);
                } else if let Some(k) = top {
                    (chosen, left) = (Some(sampler.sample_from(self.append_top_k(token, k)?)), true);
                } else {
                    self.append_unless(&[token], None)?;
                }
            }
        };
        if left {
            keep_last(&mut self.logits, self.engine.logits_left()?, m.vocab as usize);
        }
        if !text.stopped() {
            stream.finish(text.text_mut());
            // A stop string may be completed by the replacement of an unfinished character.
            let last = text.advance().len();
            let held = if text.stopped() { 0 } else { text.release().len() };
            if last + held > 0 {
                on_piece(Piece { token: None, text: text.tail(last + held) });
            }
        }
        timings.generated_tokens = tokens.len();
        timings.decode = if tokens.is_empty() { Duration::ZERO } else { decode_start.elapsed() };
        Ok(Generation { tokens, text: text.into_text(), finish, timings })
    }

    /// The prompt shortened to the context, when the policy says so.
    fn fit_prompt(&self, prompt: &[u32], policy: ContextOverflow) -> Result<Option<Vec<u32>>> {
        if prompt.is_empty() {
            return Err(ErrorKind::EmptyPrompt.into());
        }
        let vocab = self.model().manifest().model.vocab;
        if let Some(&token) = prompt.iter().find(|t| **t >= vocab) {
            return Err(ErrorKind::Token { token, vocab }.into());
        }
        let capacity = self.context();
        match policy {
            _ if prompt.len() <= capacity => Ok(None),
            ContextOverflow::Error => {
                Err(ErrorKind::ContextOverflow { needed: prompt.len(), capacity }.into())
            }
            ContextOverflow::Shift { keep } => Ok(Some(shift(prompt, keep, capacity))),
        }
    }

    /// Keeps what the session and `tokens` have in common, but not all of `tokens`: the last one must be computed to
    /// know what follows. Returns how many are kept.
    fn keep_prefix(&mut self, tokens: &[u32]) -> Result<usize> {
        let common = self.history.iter().zip(tokens).take_while(|(a, b)| a == b).count();
        let known = common == tokens.len() && common == self.history.len() && !self.logits.is_empty();
        let keep = if known { common } else { common.min(tokens.len().saturating_sub(1)) };
        self.truncate(keep)?;
        Ok(keep)
    }
}

/// Most bytes of text that room is made for in advance.
const MOST_TEXT: usize = 16 << 20;

fn keep_last(into: &mut Vec<f32>, logits: &[f32], vocab: usize) {
    let last = logits.len().saturating_sub(vocab);
    into.clear();
    into.extend_from_slice(logits.get(last..).unwrap_or_default());
}

/// The first `keep` tokens (less when they would fill the context) and the last of the others, half of what the
/// context has left.
fn shift(tokens: &[u32], keep: usize, capacity: usize) -> Vec<u32> {
    let keep = keep.min(capacity.saturating_sub(2)).min(tokens.len());
    let newest = ((capacity - keep) / 2).max(1).min(tokens.len() - keep);
    let mut out = Vec::with_capacity(capacity);
    out.extend_from_slice(tokens.get(..keep).unwrap_or_default());
    out.extend_from_slice(tokens.get(tokens.len() - newest..).unwrap_or_default());
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::toy;

    fn session(context: usize) -> Session {
        toy::model(2).session(&SessionOptions { context: Some(context) }).unwrap()
    }

    fn greedy(most: usize) -> GenerateOptions {
        GenerateOptions { max_tokens: Some(most), ignore_eos: true, ..GenerateOptions::default() }
    }

    fn expected(prompt: &[u32], n: usize) -> Vec<u32> {
        let mut all = prompt.to_vec();
        for _ in 0..n {
            all.push(toy::next(&all));
        }
        all.split_off(prompt.len())
    }

    fn generate(s: &mut Session, prompt: &[u32], options: &GenerateOptions) -> Generation {
        let mut pieces = String::new();
        let mut tokens = Vec::new();
        let g = s.generate(prompt, options, |p| {
            pieces.push_str(p.text);
            tokens.extend(p.token);
            Control::Continue
        });
        let g = g.unwrap();
        assert_eq!((pieces, tokens), (g.text.clone(), g.tokens.clone()), "pieces add up");
        assert_eq!(g.timings.generated_tokens, g.tokens.len());
        g
    }

    #[test]
    fn greedy_generation_is_the_models_own() {
        for prompt in
            [vec![5], vec![1, 2, 3], (0..24).collect(), (0..25).collect(), (0..77).collect::<Vec<u32>>()]
        {
            let mut s = session(150);
            let g = generate(&mut s, &prompt, &greedy(20));
            assert_eq!(g.tokens, expected(&prompt, 20));
            assert_eq!(g.finish, FinishReason::Length);
            assert_eq!(g.text, s.model().tokenizer().unwrap().decode(&g.tokens));
            assert_eq!(g.timings.prompt_tokens, prompt.len());
        }
    }

    #[test]
    fn what_is_known_is_not_computed_again() {
        let mut s = session(150);
        let prompt: Vec<u32> = (0..40).collect();
        let first = generate(&mut s, &prompt, &greedy(10));
        assert_eq!(first.timings.cached_tokens, 0);
        let mut longer = [prompt.as_slice(), &first.tokens].concat();
        longer.push(9);
        let second = generate(&mut s, &longer, &greedy(10));
        assert_eq!(second.timings.cached_tokens, 49, "all but the last token chosen and the new one");
        assert_eq!(second.tokens, expected(&longer, 10));
        let other: Vec<u32> = (0..20).chain([200, 201]).collect();
        let third = generate(&mut s, &other, &greedy(10));
        assert_eq!((third.timings.cached_tokens, third.tokens), (20, expected(&other, 10)));
        assert_eq!(generate(&mut s, &prompt[..10], &greedy(3)).tokens, expected(&prompt[..10], 3));
    }

    #[test]
    fn end_of_text_ends_the_text() {
        let prompt = [5, 6];
        let tokens = expected(&prompt, 8);
        let eos = tokens[5];
        let first = tokens.iter().position(|t| *t == eos).unwrap();
        let mut s = session(50);
        let inner = std::sync::Arc::get_mut(&mut s.engine.model_mut().inner).unwrap();
        inner.manifest.model.eos = vec![0, eos];
        let mut options = greedy(8);
        options.ignore_eos = false;
        let g = generate(&mut s, &prompt, &options);
        assert_eq!((g.finish, g.tokens.as_slice()), (FinishReason::Eos, &tokens[..=first]));
        assert_eq!(
            g.text,
            s.model().tokenizer().unwrap().decode(&tokens[..first]),
            "the token itself is no text"
        );
        assert_eq!(generate(&mut s, &prompt, &greedy(8)).tokens, tokens);
    }

    #[test]
    fn stop_strings_end_the_text_before_them() {
        let prompt = [40, 41, 42];
        let whole = generate(&mut session(150), &prompt, &greedy(60)).text;
        let chars: Vec<(usize, char)> = whole.char_indices().collect();
        for (i, len) in [(10, 1), (11, 3), (20, 5), (3, 2)] {
            let (from, to) = (chars[i].0, chars[i + len].0);
            let stop = whole[from..to].to_owned();
            let mut options = greedy(60);
            options.stop = vec!["never there".to_owned(), stop.clone()];
            let g = generate(&mut session(150), &prompt, &options);
            assert_eq!(g.text, whole[..whole.find(&stop).unwrap()]);
            assert_eq!(g.finish, FinishReason::Stop);
        }
    }

    #[test]
    fn a_full_context_ends_or_shifts() {
        let prompt = [1, 2, 3];
        let mut s = session(20);
        let g = generate(&mut s, &prompt, &greedy(100));
        assert_eq!((g.finish, g.tokens.len()), (FinishReason::Context, 18), "the last token needs no room");
        assert_eq!(g.tokens, expected(&prompt, 18));

        let too_long: Vec<u32> = (0..21).collect();
        let e = s.generate(&too_long, &greedy(1), |_| Control::Continue).unwrap_err().to_string();
        assert!(e.contains("21 tokens do not fit the context of 20"), "{e}");

        let mut options = greedy(100);
        options.context_overflow = ContextOverflow::Shift { keep: 4 };
        let g = generate(&mut s, &prompt, &options);
        assert_eq!((g.finish, g.tokens.len()), (FinishReason::Length, 100));
        // Replays the policy: whenever 20 tokens are held, keep 4 and the newest 8, then go on.
        let mut held = prompt.to_vec();
        for (i, t) in g.tokens.iter().enumerate() {
            assert_eq!(*t, toy::next(&held), "token {i}");
            if held.len() == 20 {
                held = [&held[..4], &held[12..]].concat();
            }
            held.push(*t);
        }
        let g = generate(&mut s, &too_long, &options);
        assert_eq!(g.tokens[0], toy::next(&[&too_long[..4], &too_long[13..]].concat()));
    }

    #[test]
    fn shifting_keeps_within_bounds() {
        for (len, keep, capacity) in [(5, 9, 5), (1, 0, 1), (100, 50, 40), (3, 3, 2), (10, 0, 2), (7, 7, 8)] {
            let tokens: Vec<u32> = (0..len).collect();
            let out = shift(&tokens, keep, capacity);
            assert!(!out.is_empty() && out.len() <= capacity.max(1), "{len} {keep} {capacity}: {out:?}");
            assert_eq!(out.last(), tokens.last());
        }
    }

    #[test]
    fn cancelling_ends_between_steps() {
        let mut s = session(150);
        let options = greedy(50);
        options.cancel.cancel();
        let g = generate(&mut s, &[1, 2], &options);
        assert_eq!((g.finish, g.tokens.len()), (FinishReason::Cancelled, 0));

        let options = greedy(50);
        let mut n = 0;
        let g = s.generate(&[1, 2], &options, |_| {
            n += 1;
            if n == 5 {
                options.cancel.cancel();
            }
            Control::Continue
        });
        let g = g.unwrap();
        assert_eq!((g.finish, g.tokens), (FinishReason::Cancelled, expected(&[1, 2], 5)));
        let g = s.generate(&[1, 2], &greedy(50), |_| Control::Stop).unwrap();
        assert_eq!((g.finish, g.tokens.len()), (FinishReason::Cancelled, 1));
        assert!(generate(&mut s, &[1, 2], &greedy(0)).tokens.is_empty());
    }

    #[test]
    fn bad_requests_are_refused_and_harm_nothing() {
        let mut s = session(50);
        let mut fail = |prompt: &[u32], options: &GenerateOptions| {
            s.generate(prompt, options, |_| Control::Continue).unwrap_err().to_string()
        };
        assert!(fail(&[], &greedy(1)).contains("no tokens"));
        assert!(fail(&[1, 999], &greedy(1)).contains("token 999"));
        let mut hot = greedy(1);
        hot.sampling.temperature = -1.0;
        assert!(fail(&[1], &hot).contains("temperature"));
        assert_eq!(generate(&mut s, &[1], &greedy(3)).tokens, expected(&[1], 3));
        assert!(toy::model(1).session(&SessionOptions { context: Some(201) }).is_err());
    }

    #[test]
    fn logits_of_every_position() {
        let mut s = session(150);
        let tokens: Vec<u32> = (0..60).map(|i| i * 4).collect();
        let mut rows = Vec::new();
        s.append_with_logits(&tokens, |i, row| rows.push((i, crate::top_logits(row, 1)[0].0))).unwrap();
        let expected: Vec<(usize, u32)> = (0..60).map(|i| (i, toy::next(&tokens[..=i]))).collect();
        assert_eq!(rows, expected);
        assert_eq!(s.tokens(), tokens);
        assert_eq!(crate::top_logits(s.logits(), 1)[0].0, expected[59].1);
        s.truncate(10).unwrap();
        s.append(&[3]).unwrap();
        assert_eq!(crate::top_logits(s.logits(), 1)[0].0, toy::next(&[&tokens[..10], &[3]].concat()));
        assert!(s.append(&[0; 140]).is_err());
    }

    #[test]
    fn sampling_repeats_with_its_seed() {
        let mut options = greedy(30);
        options.sampling = SamplingOptions { temperature: 5.0, seed: 11, ..SamplingOptions::default() };
        let a = generate(&mut session(150), &[1], &options).tokens;
        assert_eq!(generate(&mut session(150), &[1], &options).tokens, a);
        options.sampling.seed = 12;
        assert_ne!(generate(&mut session(150), &[1], &options).tokens, a);
    }
}
