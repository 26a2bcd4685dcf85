//! Steps: runs a model's programs over a ragged batch of tokens of several sequences.
//!
//! All memory is got when the engine is made; a step allocates nothing.

use crate::device::cuda::{Inputs, Runner, RunnerSizes, Wanted};
use crate::device::threads::{Pool, Task};
use crate::error::{ErrorKind, Result};
use crate::kv::{KvCache, Sequence};
use crate::memory::Region;
use crate::model::{Inner, MOST_ROWS, Model, Runnable};
use crate::prefetch::{self, Weighed};
use crate::sampler::{TokenLogit, likeliest_token, top_logits};
use attar_artifact::manifest::RopeTable;
use attar_artifact::program::{Arg, ProgramKind, StepBuffer, StepSize};
use std::sync::PoisonError;
use std::time::{Duration, Instant};

/// A sequence of an [`Engine`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(u32);

/// The tokens of one step, in any mix of sequences; a sequence's tokens follow each other in its order.
#[derive(Clone, Debug, Default)]
pub struct StepBatch {
    tokens: Vec<StepToken>,
}

#[derive(Clone, Copy, Debug)]
struct StepToken {
    sequence: SequenceId,
    token: u32,
    wanted: bool,
}

impl StepBatch {
    /// An empty batch with room for `tokens` tokens.
    pub fn with_capacity(tokens: usize) -> StepBatch {
        StepBatch { tokens: Vec::with_capacity(tokens) }
    }

    /// Appends a token to a sequence; with `wanted`, the step gives the logits after it.
    pub fn push(&mut self, sequence: SequenceId, token: u32, wanted: bool) {
        self.tokens.push(StepToken { sequence, token, wanted });
    }

    /// Forgets all tokens and keeps the room.
    pub fn clear(&mut self) {
        self.tokens.clear();
    }

    /// Tokens in the batch.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether there is no token.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }
}

/// What one launch of a step took.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaunchTime {
    /// The program it belongs to.
    pub program: ProgramKind,
    /// Name of the kernel.
    pub kernel: String,
    /// What it computes, e.g. `layers.3 gate_up_swiglu`.
    pub note: String,
    /// Weights that it reads.
    pub weight_bytes: u64,
    /// Work items.
    pub grid: u64,
    /// Rows of activations that it works on, as far as its arguments say: tokens, or wanted rows.
    pub rows: u64,
    /// From its start to its end on all threads.
    pub time: Duration,
}

/// Runs steps of one model over up to a fixed number of sequences.
#[derive(Debug)]
pub struct Engine {
    model: Model,
    kv: KvCache,
    sequences: Vec<Option<Sequence>>,
    /// Tokens of the current batch per sequence.
    pending: Vec<usize>,
    context: usize,
    /// Block table entries per sequence.
    stride: usize,
    buffers: Buffers,
    /// Resolved arguments of the program that ran last, and for which step.
    args: Vec<u64>,
    tasks: Vec<Task>,
    resolved: Option<(usize, StepSize)>,
    /// Present when the model is on a GPU; then neither arguments nor tasks are used.
    runner: Option<Runner>,
    /// What [`Engine::step_greedy`] and [`Engine::step_top_k`] found, where it is not the runner that does.
    chosen: Vec<u32>,
    top: Vec<TokenLogit>,
}

// SAFETY: `tasks` point into `args`, which the engine owns and never lets grow after it is made; they are read only
// within `step`, under `&mut self`.
unsafe impl Send for Engine {}
// SAFETY: as above: nothing is read through a shared reference.
unsafe impl Sync for Engine {}

#[derive(Debug)]
struct Buffers {
    arena: Region,
    tokens: Region,
    positions: Region,
    seqs: Region,
    rows: Region,
    block_tables: Region,
    rope: Vec<Region>,
    /// Cosines and sines of positions, `[P, Dh]`, of which the first `angle_rows` are there. With a GPU a prompt of
    /// thousands of tokens takes little longer than to compute them anew; without one nothing is kept.
    angles: Vec<Region>,
    angle_rows: usize,
    logits: Region,
}

/// Cosines, then sines, of a position: a row of a rotary table.
fn rotations(table: &RopeTable, position: usize, row: &mut [f32]) {
    let (cosines, sines) = row.split_at_mut(table.inv_freq.len().min(row.len()));
    for ((f, c), s) in table.inv_freq.iter().zip(cosines).zip(sines) {
        let (sin, cos) = (position as f64 * f).sin_cos();
        *c = (table.mscale * cos) as f32;
        *s = (table.mscale * sin) as f32;
    }
}

/// A step of one token, the first of its sequence.
const ONE_TOKEN: StepSize = StepSize { tokens: 1, rows: 1, spans: 1 };

const HINT: &str = "; open a smaller context or fewer sequences";

impl Engine {
    /// An engine for up to `sequences` sequences of up to `context` tokens each.
    ///
    /// # Errors
    /// [`ErrorKind::Option`] for a size the model was not made for; [`ErrorKind::Memory`].
    pub fn new(model: Model, context: usize, sequences: usize) -> Result<Engine> {
        let inner = &model.inner;
        let m = &inner.manifest.model;
        let most = m.context_length as usize;
        if !(1..=most).contains(&context) {
            let expected = format!("1 to {most}, the longest context the model was made for");
            return Err(ErrorKind::Option { name: "context", value: context.to_string(), expected }.into());
        }
        if !(1..=65536).contains(&sequences) {
            let expected = "1 to 65536".to_owned();
            return Err(
                ErrorKind::Option { name: "sequences", value: sequences.to_string(), expected }.into()
            );
        }
        let stride = context.div_ceil(m.kv.page_len as usize);
        let (tokens, rows) = (model.max_step_tokens() as u64, model.max_step_rows() as u64);
        let device = inner.device.as_ref();
        // On a GPU activations are the runner's.
        let arena = inner.programs.iter().filter(|_| device.is_none()).map(|p| {
            let (most, spans) = (p.max_tokens as u64, m.kv.spans(context as u64));
            p.arena.at(StepSize { tokens: most, rows: most, spans }).unwrap_or(0)
        });
        let region = |bytes, what| Region::zeroed(bytes, what, HINT);
        let rope_bytes = tokens * u64::from(m.head_dim) * 4;
        let buffers = Buffers {
            arena: region(arena.max().unwrap_or(0), "activations")?,
            tokens: region(tokens * 4, "step inputs")?,
            positions: region(tokens * 4, "step inputs")?,
            seqs: region(tokens * 4, "step inputs")?,
            rows: region(tokens * 4, "step inputs")?,
            block_tables: region(stride as u64 * sequences as u64 * 4, "block tables")?,
            rope: m.rope.iter().map(|_| region(rope_bytes, "rotary tables")).collect::<Result<_>>()?,
            angles: m
                .rope
                .iter()
                .filter(|_| device.is_some())
                .map(|_| region(context as u64 * u64::from(m.head_dim) * 4, "rotary tables"))
                .collect::<Result<_>>()?,
            angle_rows: 0,
            logits: region(rows * u64::from(m.vocab) * 4, "logits")?,
        };
        let (kv, runner) = match device {
            None => (KvCache::new(m, context, sequences, None)?, None),
            Some(device) => {
                let tables = stride as u64 * sequences as u64 * 4;
                let input_bytes = tokens * 16 + tables + rope_bytes * m.rope.len() as u64;
                let spans = m.kv.spans(context as u64);
                let sizes =
                    RunnerSizes { rows, vocab: m.vocab.into(), input_bytes, stride: stride as u64, spans };
                let bytes = [KvCache::bytes(m, context, sequences)?, Runner::bytes(device, &sizes)];
                let [cache, rest] = device.arena(bytes, "the KV cache and activations", HINT)?;
                let kv = KvCache::new(m, context, sequences, Some(cache))?;
                (kv, Some(Runner::new(device.clone(), &sizes, rest)?))
            }
        };
        let args = inner.programs.iter().map(|p| p.args).max().unwrap_or(0);
        let launches = inner.programs.iter().map(|p| p.launches.len()).max().unwrap_or(0);
        let mut engine = Engine {
            kv,
            sequences: (0..sequences).map(|_| None).collect(),
            pending: vec![0; sequences],
            context,
            stride,
            buffers,
            args: Vec::with_capacity(args),
            tasks: Vec::with_capacity(launches),
            resolved: None,
            runner,
            chosen: Vec::with_capacity(model.max_step_tokens()),
            top: Vec::new(),
            model,
        };
        engine.tune_prefetch();
        Ok(engine)
    }

    /// Chooses the prefetch distance, unless that was done for this model. Runs before the first step, when all buffers
    /// are zero: the launches then see token 0 at position 0 in page 0, and nothing of what they write is read later.
    fn tune_prefetch(&mut self) {
        let model = self.model.clone();
        let inner = &*model.inner;
        let decode = inner.programs.iter().position(|p| p.kind == ProgramKind::Decode);
        let Some((index, program)) = decode.and_then(|i| Some((i, inner.programs.get(i)?))) else { return };
        if inner.prefetch.get().is_some() || inner.device.is_some() {
            return;
        }
        let mut names: Vec<&str> = Vec::new();
        let mut weighed = Vec::new();
        for (launch, call) in program.launches.iter().enumerate() {
            if !call.args.contains(&Arg::PrefetchDistance) {
                continue;
            }
            let group = names.iter().position(|n| *n == call.name).unwrap_or(names.len());
            if group == names.len() {
                names.push(&call.name);
            }
            let grid = call.grid.at(ONE_TOKEN).unwrap_or(0);
            weighed.push(Weighed { launch, group, weight_bytes: call.weight_bytes, grid });
        }
        if weighed.is_empty() {
            return;
        }
        let mut pool = inner.pool.lock().unwrap_or_else(PoisonError::into_inner);
        self.resolve(inner, index, ONE_TOKEN);
        let best = prefetch::tune(&weighed, |launch, items, distance| {
            let before: usize = program.launches.iter().take(launch).map(|c| c.args.len()).sum();
            let (Some(call), Some(task)) = (program.launches.get(launch), self.tasks.get(launch)) else {
                return Duration::ZERO;
            };
            for (slot, arg) in self.args.iter_mut().skip(before).zip(&call.args) {
                if *arg == Arg::PrefetchDistance {
                    *slot = distance;
                }
            }
            let task = Task {
                grid: items.min(task.grid),
                args: self.args.as_ptr().wrapping_add(before),
                tail: false,
                ..*task
            };
            let start = Instant::now();
            // SAFETY: as in `step`, for a step of one token; buffers are zero, which is a valid one.
            unsafe { pool.run(&[task]) };
            start.elapsed()
        });
        drop(pool);
        inner.prefetch.get_or_init(|| best);
        self.resolved = None;
        self.args.clear();
        self.tasks.clear();
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    #[cfg(test)]
    pub(crate) fn model_mut(&mut self) -> &mut Model {
        &mut self.model
    }

    /// Most tokens of one sequence.
    pub fn context(&self) -> usize {
        self.context
    }

    /// A new, empty sequence.
    ///
    /// # Errors
    /// [`ErrorKind::TooManySequences`].
    pub fn add_sequence(&mut self) -> Result<SequenceId> {
        let (index, id) = self.free_slot()?;
        let fresh = self.kv.sequence();
        if let Some(slot) = self.sequences.get_mut(index) {
            *slot = Some(fresh);
        }
        Ok(id)
    }

    /// A new sequence with the tokens of another; they share memory until one of them changes it.
    ///
    /// # Errors
    /// [`ErrorKind::TooManySequences`], [`ErrorKind::NoSequence`].
    pub fn fork(&mut self, id: SequenceId) -> Result<SequenceId> {
        let (index, new) = self.free_slot()?;
        let from = self.sequences.get(id.0 as usize).and_then(Option::as_ref);
        let forked = self.kv.fork(from.ok_or(ErrorKind::NoSequence { id: id.0 })?);
        if let Some(slot) = self.sequences.get_mut(index) {
            *slot = Some(forked);
        }
        Ok(new)
    }

    /// Ends a sequence and frees its memory.
    pub fn remove(&mut self, id: SequenceId) {
        if let Some(slot) = self.sequences.get_mut(id.0 as usize)
            && let Some(mut seq) = slot.take()
        {
            self.kv.truncate(&mut seq, 0);
        }
    }

    /// Forgets a sequence's tokens from position `len` on.
    ///
    /// # Errors
    /// [`ErrorKind::NoSequence`].
    pub fn truncate(&mut self, id: SequenceId, len: usize) -> Result<()> {
        let seq = self.sequences.get_mut(id.0 as usize).and_then(Option::as_mut);
        self.kv.truncate(seq.ok_or(ErrorKind::NoSequence { id: id.0 })?, len);
        Ok(())
    }

    /// Tokens of a sequence; 0 when there is none of that id.
    pub fn len(&self, id: SequenceId) -> usize {
        self.sequences.get(id.0 as usize).and_then(Option::as_ref).map_or(0, Sequence::len)
    }

    /// Whether the sequence has no tokens.
    pub fn is_empty(&self, id: SequenceId) -> bool {
        self.len(id) == 0
    }

    /// Runs one step. Returns the logits `[R, V]` after the R tokens that were pushed as wanted, in their order.
    ///
    /// # Errors
    /// A token outside the vocabulary, a sequence that is not there, a batch larger than
    /// [`Model::max_step_tokens`], a sequence that outgrows its context. No token has been added to any sequence then.
    pub fn step(&mut self, batch: &StepBatch) -> Result<&[f32]> {
        if self.runner.is_some() {
            return self.step_on_device(batch, None);
        }
        // SAFETY: nothing but the pool's own conditions, which are handed through.
        self.step_by(batch, |pool, tasks, _| unsafe { pool.run(tasks) })
    }

    /// As [`Engine::step`], with the launches run one by one on all threads; appends the time of each to `times`. A step
    /// takes a little longer this way.
    ///
    /// # Errors
    /// As [`Engine::step`].
    pub fn step_timed(&mut self, batch: &StepBatch, times: &mut Vec<LaunchTime>) -> Result<&[f32]> {
        if self.runner.is_some() {
            return self.step_on_device(batch, Some(times));
        }
        self.step_by(batch, |pool, tasks, program| {
            let mut each = vec![Duration::ZERO; tasks.len()];
            // SAFETY: nothing but the pool's own conditions, which are handed through.
            unsafe { pool.run_timed(tasks, &mut each) };
            let wanted = batch.tokens.iter().filter(|t| t.wanted).count() as u64;
            // How long contexts are says nothing of rows.
            let size = StepSize { tokens: batch.len() as u64, rows: wanted, spans: 1 };
            for ((task, call), time) in tasks.iter().zip(&program.launches).zip(each) {
                times.push(LaunchTime {
                    program: program.kind,
                    kernel: call.name.clone(),
                    note: call.note.clone(),
                    weight_bytes: call.weight_bytes,
                    grid: task.grid,
                    rows: call.rows(size),
                    time,
                });
            }
        })
    }

    /// As [`Engine::step`], for the likeliest tokens `[R]` instead of logits: the lowest id among equals, never one whose logit
    /// is not a number as long as another's is one. A GPU finds them itself, and copies nothing else back.
    ///
    /// # Errors
    /// As [`Engine::step`].
    pub fn step_greedy(&mut self, batch: &StepBatch) -> Result<&[u32]> {
        if !self.gives(Wanted::Likeliest) {
            let vocab = self.model.inner.manifest.model.vocab.max(1) as usize;
            let mut chosen = std::mem::take(&mut self.chosen);
            chosen.clear();
            let stepped = self.step(batch);
            let stepped = stepped.map(|l| chosen.extend(l.chunks_exact(vocab).map(likeliest_token)));
            self.chosen = chosen;
            return stepped.map(|()| &*self.chosen);
        }
        let model = self.model.clone();
        let (_, size) = self.run_on_device(batch, &model.inner, Wanted::Likeliest, None)?;
        let Some(runner) = &mut self.runner else { return Ok(&[]) };
        let tokens = runner.receive_chosen(size.rows)?;
        advance(&mut self.sequences, batch);
        Ok(tokens)
    }

    /// As [`Engine::step`], for the `k` largest logits of each row (all of them, where there are fewer), `[R, k]`: largest first, the
    /// lowest token first among equals. What is not a number counts as minus infinity. A GPU finds up to 64 itself, and copies nothing
    /// else back.
    ///
    /// # Errors
    /// As [`Engine::step`].
    pub fn step_top_k(&mut self, batch: &StepBatch, k: usize) -> Result<&[TokenLogit]> {
        let model = self.model.clone();
        let vocab = model.inner.manifest.model.vocab.max(1);
        let wanted = Wanted::Top(k as u64);
        if !self.gives(wanted) {
            let mut top = std::mem::take(&mut self.top);
            top.clear();
            let of_row =
                |row| top_logits(row, k).into_iter().map(|(token, logit)| TokenLogit { token, logit });
            let stepped = self.step(batch);
            let stepped = stepped.map(|l| top.extend(l.chunks_exact(vocab as usize).flat_map(of_row)));
            self.top = top;
            return stepped.map(|()| &*self.top);
        }
        let (_, size) = self.run_on_device(batch, &model.inner, wanted, None)?;
        let Some(runner) = &mut self.runner else { return Ok(&[]) };
        let top = runner.receive_chosen(size.rows * (k as u64).min(u64::from(vocab)))?;
        advance(&mut self.sequences, batch);
        Ok(top)
    }

    /// Whether a GPU finds the likeliest token itself.
    pub(crate) fn chooses_on_device(&self) -> bool {
        self.gives(Wanted::Likeliest)
    }

    /// Whether a GPU finds the `k` largest logits itself.
    pub(crate) fn finds_on_device(&self, k: usize) -> bool {
        self.gives(Wanted::Top(k as u64))
    }

    fn gives(&self, wanted: Wanted) -> bool {
        self.runner.as_ref().is_some_and(|r| r.gives(wanted))
    }

    /// Logits of the last step, which had one row, where it has left them on the device.
    pub(crate) fn logits_left(&mut self) -> Result<&[f32]> {
        match &mut self.runner {
            Some(runner) => runner.receive_logits(1, self.buffers.logits.words_mut::<f32>()),
            None => Ok(&[]),
        }
    }

    /// Starts a step on the GPU. Returns the program that runs it, and its size.
    fn run_on_device(
        &mut self,
        batch: &StepBatch,
        inner: &Inner,
        wanted: Wanted,
        times: Option<&mut Vec<Duration>>,
    ) -> Result<(usize, StepSize)> {
        let size = self.fill(batch, inner)?;
        let tokens = batch.len();
        let too_large = ErrorKind::StepTooLarge { tokens, most: self.model.max_step_tokens() };
        let index = pick(&inner.programs, tokens);
        let (Some(runner), Some(index)) = (&mut self.runner, index) else { return Err(too_large.into()) };
        let b = &self.buffers;
        let rope_bytes = size.tokens * u64::from(inner.manifest.model.head_dim) * 4;
        let inputs = Inputs {
            tokens: prefix(&b.tokens, size.tokens * 4),
            positions: prefix(&b.positions, size.tokens * 4),
            seqs: prefix(&b.seqs, size.tokens * 4),
            rows: prefix(&b.rows, size.rows * 4),
            block_tables: b.block_tables.bytes(),
            rope: b.rope.iter().map(|region| prefix(region, rope_bytes)).collect(),
        };
        let keys = |layer| self.kv.device_addresses(layer);
        runner.run(index, size, &inputs, &keys, wanted, times)?;
        Ok((index, size))
    }

    /// Runs a step on the GPU; with `times`, launch by launch.
    fn step_on_device(&mut self, batch: &StepBatch, times: Option<&mut Vec<LaunchTime>>) -> Result<&[f32]> {
        let model = self.model.clone();
        let inner = &*model.inner;
        let mut each = Vec::new();
        let measured = times.is_some().then_some(&mut each);
        let (index, size) = self.run_on_device(batch, inner, Wanted::Logits, measured)?;
        let Some(runner) = &mut self.runner else { return Ok(&[]) };
        let logits = runner.receive_logits(size.rows, self.buffers.logits.words_mut::<f32>())?;
        advance(&mut self.sequences, batch);
        if let (Some(times), Some(program)) = (times, inner.programs.get(index)) {
            let plain = StepSize { spans: 1, ..size };
            for (call, time) in program.launches.iter().zip(each) {
                times.push(LaunchTime {
                    program: program.kind,
                    kernel: call.name.clone(),
                    note: call.note.clone(),
                    weight_bytes: call.weight_bytes,
                    grid: call.grid.at(size).unwrap_or(0),
                    rows: call.rows(plain),
                    time,
                });
            }
        }
        Ok(logits)
    }

    /// Runs a step whose launches `run` executes. What `run` is given meets the conditions of [`Pool::run`].
    fn step_by(
        &mut self,
        batch: &StepBatch,
        run: impl FnOnce(&mut Pool, &[Task], &Runnable),
    ) -> Result<&[f32]> {
        let model = self.model.clone();
        let inner = &*model.inner;
        let size = self.fill(batch, inner)?;
        let tokens = batch.len();
        let index = pick(&inner.programs, tokens)
            .ok_or(ErrorKind::StepTooLarge { tokens, most: model.max_step_tokens() })?;
        if self.resolved != Some((index, size)) {
            self.resolve(inner, index, size);
            self.resolved = Some((index, size));
        }
        if let Some(program) = inner.programs.get(index) {
            let mut pool = inner.pool.lock().unwrap_or_else(PoisonError::into_inner);
            // The conditions of `Pool::run` hold: the programs were checked by the artifact's reader: every arena range
            // lies inside the arena for this T, R and S, every weight range inside the weights, layers and tables exist.
            // Step buffers are as large
            // as the programs' token limit, tokens and rows are in range, and block tables name pages of the cache.
            // Kernels share out their grid without overlap, which is the compiler's contract.
            run(&mut pool, &self.tasks, program);
        }
        advance(&mut self.sequences, batch);
        let logits = self.buffers.logits.words();
        Ok(logits.get(..size.rows as usize * inner.manifest.model.vocab as usize).unwrap_or_default())
    }

    fn free_slot(&self) -> Result<(usize, SequenceId)> {
        let most = self.sequences.len();
        let index =
            self.sequences.iter().position(Option::is_none).ok_or(ErrorKind::TooManySequences { most })?;
        Ok((index, SequenceId(index as u32)))
    }

    /// Checks the batch, reserves pages and writes the step's inputs. Returns what extents depend on.
    fn fill(&mut self, batch: &StepBatch, inner: &Inner) -> Result<StepSize> {
        let m = &inner.manifest.model;
        if batch.is_empty() {
            return Err(ErrorKind::EmptyPrompt.into());
        }
        let most = inner.programs.iter().map(|p| p.max_tokens).max().unwrap_or(0);
        if batch.len() > most {
            return Err(ErrorKind::StepTooLarge { tokens: batch.len(), most }.into());
        }
        let (rows, most) = (batch.tokens.iter().filter(|t| t.wanted).count(), most.min(MOST_ROWS));
        if rows > most {
            return Err(ErrorKind::TooManyRows { rows, most }.into());
        }
        self.pending.fill(0);
        for t in &batch.tokens {
            if t.token >= m.vocab {
                return Err(ErrorKind::Token { token: t.token, vocab: m.vocab }.into());
            }
            let index = t.sequence.0 as usize;
            let live = self.sequences.get(index).is_some_and(Option::is_some);
            let count = self.pending.get_mut(index).filter(|_| live);
            *count.ok_or(ErrorKind::NoSequence { id: t.sequence.0 })? += 1;
        }
        for (seq, count) in self.sequences.iter_mut().zip(&self.pending) {
            if let Some(seq) = seq
                && *count > 0
            {
                self.kv.reserve(seq, *count)?;
            }
        }
        self.pending.fill(0);
        let b = &mut self.buffers;
        let tables = b.block_tables.words_mut::<u32>();
        for (seq, table) in self.sequences.iter().zip(tables.chunks_mut(self.stride)) {
            if let Some(seq) = seq {
                for (entry, page) in table.iter_mut().zip(seq.pages()) {
                    *entry = page.0;
                }
            }
        }
        let (mut rows, mut longest) = (0, 0);
        for (i, t) in batch.tokens.iter().enumerate() {
            let index = t.sequence.0 as usize;
            let len = self.sequences.get(index).and_then(Option::as_ref).map_or(0, Sequence::len);
            let mut position = len;
            if let Some(before) = self.pending.get_mut(index) {
                position += *before;
                *before += 1;
            }
            longest = longest.max(position as u64 + 1);
            put(&mut b.tokens, i, t.token as i32);
            put(&mut b.positions, i, position as i32);
            put(&mut b.seqs, i, t.sequence.0 as i32);
            if t.wanted {
                put(&mut b.rows, rows, i as i32);
                rows += 1;
            }
            let width = m.head_dim as usize;
            let place = |row: usize| row * width..(row + 1) * width;
            if !b.angles.is_empty() {
                for new in b.angle_rows..=position {
                    for (table, region) in m.rope.iter().zip(&mut b.angles) {
                        let row = region.words_mut::<f32>().get_mut(place(new)).unwrap_or_default();
                        rotations(table, new, row);
                    }
                }
                b.angle_rows = b.angle_rows.max(position + 1);
            }
            for (at, (table, region)) in m.rope.iter().zip(&mut b.rope).enumerate() {
                let row = region.words_mut::<f32>().get_mut(place(i)).unwrap_or_default();
                match b.angles.get_mut(at).and_then(|known| known.words_mut::<f32>().get(place(position))) {
                    Some(known) if known.len() == row.len() => row.copy_from_slice(known),
                    _ => rotations(table, position, row),
                }
            }
        }
        Ok(StepSize { tokens: batch.len() as u64, rows: rows as u64, spans: m.kv.spans(longest) })
    }

    /// Turns every launch's arguments into numbers for a step of this size.
    fn resolve(&mut self, inner: &Inner, index: usize, size: StepSize) {
        self.args.clear();
        self.tasks.clear();
        let Some(program) = inner.programs.get(index) else { return };
        let weights = inner.weights.address();
        let b = &mut self.buffers;
        for call in &program.launches {
            for arg in &call.args {
                // Extents were checked not to overflow for any step of this program.
                let value = match *arg {
                    Arg::Arena { offset, .. } => b.arena.address() + offset.at(size).unwrap_or(0),
                    Arg::Weight { offset, .. } => weights + offset,
                    Arg::Step(buffer) => match buffer {
                        StepBuffer::Tokens => b.tokens.address(),
                        StepBuffer::Positions => b.positions.address(),
                        StepBuffer::Seqs => b.seqs.address(),
                        StepBuffer::Rows => b.rows.address(),
                        StepBuffer::BlockTables => b.block_tables.address(),
                        StepBuffer::Rope { table } => {
                            b.rope.get_mut(table as usize).map_or(0, Region::address)
                        }
                        StepBuffer::Logits => b.logits.address(),
                    },
                    Arg::Keys { layer } => self.kv.addresses(layer as usize).0,
                    Arg::Values { layer } => self.kv.addresses(layer as usize).1,
                    Arg::Imm(value) => value,
                    Arg::Count(extent) => extent.at(size).unwrap_or(0),
                    Arg::BlockTableStride => self.stride as u64,
                    Arg::Spans => size.spans,
                    Arg::PrefetchDistance => inner.prefetch.get().copied().unwrap_or(prefetch::DEFAULT),
                };
                self.args.push(value);
            }
        }
        let mut rest = self.args.as_slice();
        for call in &program.launches {
            let Some(kernel) = call.kernel else { continue };
            let (args, after) = rest.split_at_checked(call.args.len()).unwrap_or_default();
            rest = after;
            let grid = call.grid.at(size).unwrap_or(0);
            let tail = call.tail && !self.tasks.is_empty();
            // Steps of few tokens write little, and read weights faster from one place.
            let apart = program.kind == ProgramKind::Prefill && call.weight_bytes > 0;
            self.tasks.push(Task { kernel, args: args.as_ptr(), grid, chunks: program.chunks, apart, tail });
        }
    }
}

/// Notes that a batch's tokens have been added.
fn advance(sequences: &mut [Option<Sequence>], batch: &StepBatch) {
    for t in &batch.tokens {
        if let Some(seq) = sequences.get_mut(t.sequence.0 as usize).and_then(Option::as_mut) {
            seq.advance(1);
        }
    }
}

/// The first bytes of a region.
fn prefix(region: &Region, len: u64) -> &[u8] {
    region.bytes().get(..len as usize).unwrap_or_default()
}

fn put(region: &mut Region, index: usize, value: i32) {
    if let Some(slot) = region.words_mut::<i32>().get_mut(index) {
        *slot = value;
    }
}

/// The program for a step of that many tokens: the one meant for it, else the smallest that takes it.
fn pick(programs: &[Runnable], tokens: usize) -> Option<usize> {
    let fits = |p: &Runnable| p.max_tokens >= tokens;
    let meant = match tokens {
        1 => ProgramKind::Decode,
        _ if programs.iter().any(|p| p.kind == ProgramKind::SmallBatch && fits(p)) => ProgramKind::SmallBatch,
        _ => ProgramKind::Prefill,
    };
    programs.iter().position(|p| p.kind == meant && fits(p)).or_else(|| {
        let smallest = programs.iter().enumerate().filter(|(_, p)| fits(p)).min_by_key(|(_, p)| p.max_tokens);
        smallest.map(|(i, _)| i)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::toy;
    use proptest::prelude::*;

    fn engine(sequences: usize) -> Engine {
        Engine::new(toy::model(2), 40, sequences).unwrap()
    }

    fn says(logits: &[f32]) -> Vec<u32> {
        logits.chunks_exact(toy::VOCAB).map(|row| top_logits(row, 1)[0].0).collect()
    }

    #[derive(Clone, Debug)]
    enum Op {
        Step(Vec<(u8, u8, bool)>),
        Add,
        Fork(u8),
        Truncate(u8, u8),
        Remove(u8),
    }

    fn op() -> impl Strategy<Value = Op> {
        let token = (0u8..4, any::<u8>(), any::<bool>());
        prop_oneof![
            8 => proptest::collection::vec(token, 1..30).prop_map(Op::Step),
            2 => Just(Op::Add),
            1 => any::<u8>().prop_map(Op::Fork),
            1 => (any::<u8>(), 0u8..40).prop_map(|(s, l)| Op::Truncate(s, l)),
            1 => any::<u8>().prop_map(Op::Remove),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]

        /// Any mix of sequences, steps of any size, forks and cuts: every wanted row sees its own history only, and a
        /// refused step changes nothing.
        #[test]
        fn ragged_steps_see_their_own_histories(ops in proptest::collection::vec(op(), 1..40)) {
            let mut engine = engine(4);
            let mut live: Vec<(SequenceId, Vec<u32>)> = Vec::new();
            for op in ops {
                let n = live.len();
                match op {
                    Op::Step(tokens) if n > 0 => {
                        let mut batch = StepBatch::default();
                        let mut after: Vec<Vec<u32>> = live.iter().map(|l| l.1.clone()).collect();
                        let mut expected = Vec::new();
                        for (s, token, wanted) in tokens {
                            let s = s as usize % n;
                            batch.push(live[s].0, token.into(), wanted);
                            after[s].push(token.into());
                            if wanted { expected.push(toy::next(&after[s])) }
                        }
                        let fits = batch.len() <= toy::MOST_TOKENS && after.iter().all(|h| h.len() <= 40);
                        match engine.step(&batch) {
                            Ok(logits) => {
                                prop_assert_eq!(says(logits), expected);
                                for (l, h) in live.iter_mut().zip(after) { l.1 = h }
                            }
                            // Forks share pages, so together they may also run out.
                            Err(e) => prop_assert!(!fits || matches!(*e.kind, ErrorKind::OutOfPages { .. }), "{}", e),
                        }
                    }
                    Op::Fork(s) if n > 0 => {
                        let (id, tokens) = live[s as usize % n].clone();
                        match engine.fork(id) {
                            Ok(new) => live.push((new, tokens)),
                            Err(e) => { prop_assert!(n == 4, "{}", e); }
                        }
                    }
                    Op::Truncate(s, len) if n > 0 => {
                        let (id, tokens) = &mut live[s as usize % n];
                        engine.truncate(*id, len.into()).unwrap();
                        tokens.truncate(len.into());
                    }
                    Op::Remove(s) if n > 0 => {
                        let (id, _) = live.swap_remove(s as usize % n);
                        engine.remove(id);
                        prop_assert!(engine.truncate(id, 0).is_err());
                    }
                    _ => match engine.add_sequence() {
                        Ok(id) => live.push((id, Vec::new())),
                        Err(e) => prop_assert!(n == 4, "{}", e),
                    },
                }
                for (id, tokens) in &live { prop_assert_eq!(engine.len(*id), tokens.len()) }
            }
        }
    }

    #[test]
    fn bad_batches_are_refused() {
        let mut engine = engine(1);
        let seq = engine.add_sequence().unwrap();
        let refused = |engine: &mut Engine, tokens: &[(SequenceId, u32)]| {
            let mut batch = StepBatch::with_capacity(1);
            tokens.iter().for_each(|(s, t)| batch.push(*s, *t, true));
            engine.step(&batch).unwrap_err().to_string()
        };
        assert!(refused(&mut engine, &[]).contains("no tokens"));
        assert!(refused(&mut engine, &[(seq, 256)]).contains("token 256 is not in the vocabulary of 256"));
        assert!(refused(&mut engine, &[(SequenceId(7), 1)]).contains("no sequence 7"));
        assert!(refused(&mut engine, &[(seq, 1); 25]).contains("at most 24"));
        assert!(engine.add_sequence().unwrap_err().to_string().contains("all 1 sequences"));
        for _ in 0..2 {
            let mut batch = StepBatch::default();
            (0..20).for_each(|t| batch.push(seq, t, t == 19));
            engine.step(&batch).unwrap();
        }
        assert!(refused(&mut engine, &[(seq, 1)]).contains("41 tokens do not fit the context of 40"));
        assert_eq!(engine.len(seq), 40);
    }

    #[test]
    fn sizes_are_checked() {
        for (context, sequences) in [(0, 1), (201, 1), (10, 0), (10, 1 << 20)] {
            let e = Engine::new(toy::model(1), context, sequences).unwrap_err().to_string();
            assert!(e.starts_with("option "), "{e}");
        }
    }

    #[test]
    fn a_model_serves_several_engines_at_once() {
        let model = toy::model(3);
        std::thread::scope(|scope| {
            for i in 0..4u32 {
                let model = model.clone();
                scope.spawn(move || {
                    let mut engine = Engine::new(model, 100, 1).unwrap();
                    let seq = engine.add_sequence().unwrap();
                    let mut history = vec![i];
                    for _ in 0..50 {
                        let mut batch = StepBatch::default();
                        batch.push(seq, *history.last().unwrap(), true);
                        let said = says(engine.step(&batch).unwrap());
                        assert_eq!(said, [toy::next(&history)]);
                        history.extend(said);
                    }
                });
            }
        });
    }
}
