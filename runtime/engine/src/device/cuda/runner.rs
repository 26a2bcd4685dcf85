//! Steps of one engine on a GPU.

use super::device::{ALIGN, Device, Kernel, Memory};
use super::failed;
use crate::error::{ErrorKind, Result};
use crate::sampler::TokenLogit;
use attar_artifact::program::{
    ARGMAX, ARGMAX_THREADS, Arg, Program, StepBuffer, StepSize, TOP_K, TOP_K_MOST, TOP_K_THREADS,
};
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaGraph, CudaStream, DriverError, PinnedHostSlice};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Most tokens of a step whose launches become a graph at once. Larger steps come in many sizes, and take so long that the processor
/// mostly has the next launch ready before the one before is over: they become graphs when their size comes again, as that of
/// many sequences, a token each, does.
const GRAPH_TOKENS: u64 = 16;
/// Graphs kept; the one that was used the longest time ago gives way.
const MOST_GRAPHS: usize = 64;
/// Sizes of larger steps that are remembered.
const MOST_SEEN: usize = 16;
/// Rows of logits that come back through pinned memory.
const PINNED_ROWS: usize = 32;

/// What a step reads, in host memory.
pub(crate) struct Inputs<'a> {
    pub(crate) tokens: &'a [u8],
    pub(crate) positions: &'a [u8],
    pub(crate) seqs: &'a [u8],
    pub(crate) rows: &'a [u8],
    pub(crate) block_tables: &'a [u8],
    pub(crate) rope: Vec<&'a [u8]>,
}

/// What comes back of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// Logits `[R, V]`.
    Logits,
    /// The likeliest tokens `[R]`; logits stay on the device.
    Likeliest,
    /// The largest logits and their tokens, so many of each row; the others stay on the device.
    Top(u64),
}

/// Memory and graphs of one engine.
pub(crate) struct Runner {
    device: Arc<Device>,
    /// Activations, then a step's inputs, its logits, and what was chosen of them.
    memory: Memory,
    /// That of the memory, on which nothing else runs.
    stream: Arc<CudaStream>,
    layout: Layout,
    vocab: u64,
    stride: u64,
    most_spans: u64,
    /// A step's inputs on their way to the device.
    staging: PinnedHostSlice<u8>,
    /// Logits on their way back.
    answers: PinnedHostSlice<f32>,
    /// What was chosen on its way back.
    chosen: PinnedHostSlice<u8>,
    /// Whether a step was started whose results were not received.
    under_way: bool,
    /// The one used last at the end.
    graphs: Vec<(StepKind, CudaGraph)>,
    /// Larger steps of which there is no graph, the last one at the end.
    seen: VecDeque<StepKind>,
}

/// What a graph is for: a program, by its place, the step's size and what comes back.
type StepKind = (usize, StepSize, Wanted);

impl std::fmt::Debug for Runner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Runner").field("device", &self.device).finish_non_exhaustive()
    }
}

// SAFETY: graphs may be used by one thread at a time, from any; whoever runs a step has the runner for itself. Nothing is done
// through a shared reference.
unsafe impl Send for Runner {}
// SAFETY: as above.
unsafe impl Sync for Runner {}

impl Drop for Runner {
    fn drop(&mut self) {
        // After a step that failed some of its launches may still run, on weights and with kernels that the stream knows nothing of.
        if self.under_way {
            let _ = self.stream.synchronize();
        }
    }
}

/// Sizes that the memory of an engine follows from.
pub(crate) struct RunnerSizes {
    /// Most rows of logits of a step.
    pub(crate) rows: u64,
    pub(crate) vocab: u64,
    /// Bytes of all inputs of the largest step.
    pub(crate) input_bytes: u64,
    /// Entries of the block table of a sequence.
    pub(crate) stride: u64,
    /// Spans of the longest context.
    pub(crate) spans: u64,
}

/// One launch of a step, its arguments resolved.
struct Call<'a> {
    kernel: &'a Kernel,
    grid: [u32; 2],
    threads: u32,
    args: Vec<u64>,
}

/// Offsets in the memory of a runner.
#[derive(Clone, Copy)]
struct Layout {
    /// A step's inputs, behind activations.
    inputs: u64,
    logits: u64,
    choices: u64,
    end: u64,
}

impl Layout {
    fn of(device: &Device, sizes: &RunnerSizes) -> Layout {
        let arena = device.programs.iter().map(|p| {
            let most = u64::from(p.max_tokens);
            p.arena.at(StepSize { tokens: most, rows: most, spans: sizes.spans }).unwrap_or(0)
        });
        let inputs = arena.max().unwrap_or(0).next_multiple_of(ALIGN);
        // Every buffer begins at a multiple of the alignment.
        let logits = inputs + (sizes.input_bytes + 64 * ALIGN).next_multiple_of(ALIGN);
        let choices = logits + sizes.rows * sizes.vocab * 4;
        let end = choices + sizes.rows.max(1) * TOP_K_MOST * size_of::<TokenLogit>() as u64;
        Layout { inputs, logits, choices, end }
    }
}

impl Runner {
    /// Bytes of device memory that a runner needs.
    pub(crate) fn bytes(device: &Device, sizes: &RunnerSizes) -> u64 {
        Layout::of(device, sizes).end
    }

    /// `memory` has [`Runner::bytes`].
    pub(crate) fn new(device: Arc<Device>, sizes: &RunnerSizes, memory: Memory) -> Result<Runner> {
        let layout = Layout::of(&device, sizes);
        let stream = memory.stream().clone();
        let context = stream.context();
        let fail = |e| failed(device.index, "allocating memory", e);
        let rows = PINNED_ROWS.min(sizes.rows as usize);
        // SAFETY: numbers of any value; they are written before they are read.
        let staging =
            unsafe { context.alloc_pinned((layout.logits - layout.inputs) as usize) }.map_err(fail)?;
        // SAFETY: as above. Not write-combined, for the processor reads it.
        let answers =
            unsafe { context.alloc_pinned_with_flags(rows * sizes.vocab as usize, 0) }.map_err(fail)?;
        // SAFETY: as above.
        let chosen = unsafe { context.alloc_pinned_with_flags((layout.end - layout.choices) as usize, 0) }
            .map_err(fail)?;
        let (vocab, stride, most_spans) = (sizes.vocab, sizes.stride, sizes.spans);
        let (graphs, seen) = (Vec::new(), VecDeque::new());
        Ok(Runner {
            device,
            memory,
            stream,
            layout,
            vocab,
            stride,
            most_spans,
            staging,
            answers,
            chosen,
            under_way: false,
            graphs,
            seen,
        })
    }

    /// Whether that can be had.
    pub(crate) fn gives(&self, wanted: Wanted) -> bool {
        match wanted {
            Wanted::Logits => true,
            Wanted::Likeliest => self.device.kernels.contains_key(ARGMAX),
            Wanted::Top(k) => (1..=TOP_K_MOST).contains(&k) && self.device.kernels.contains_key(TOP_K),
        }
    }

    /// Starts a program. With `times`, launches run one by one, and the time of each is appended.
    pub(crate) fn run(
        &mut self,
        index: usize,
        size: StepSize,
        inputs: &Inputs<'_>,
        keys: &dyn Fn(usize) -> (u64, u64),
        wanted: Wanted,
        times: Option<&mut Vec<Duration>>,
    ) -> Result<()> {
        let size = self.rounded(size);
        let places = self.send(inputs)?;
        let device = self.device.clone();
        let fail = |e| failed(device.index, "running a step", e);
        let program = device.programs.get(index).ok_or(ErrorKind::NoCudaCode)?;
        if let Some(times) = times {
            self.stream.synchronize().map_err(fail)?;
            for call in self.calls(program, size, &places, keys, wanted)? {
                let start = Instant::now();
                self.launch(&call, false).and_then(|()| self.stream.synchronize()).map_err(fail)?;
                times.push(start.elapsed());
            }
            return Ok(());
        }
        let kind = (index, size, wanted);
        if let Some(at) = self.graphs.iter().position(|(k, _)| *k == kind) {
            self.graphs[at..].rotate_left(1);
            return self.graphs.last().map_or(Ok(()), |(_, graph)| graph.launch()).map_err(fail);
        }
        let calls = self.calls(program, size, &places, keys, wanted)?;
        if size.tokens > GRAPH_TOKENS && !self.seen.contains(&kind) {
            self.launch_all(&calls).map_err(fail)?;
            if self.seen.len() == MOST_SEEN {
                self.seen.pop_front();
            }
            self.seen.push_back(kind);
        } else if let Some(graph) = self.capture(&calls).map_err(fail)? {
            graph.launch().map_err(fail)?;
            self.seen.retain(|k| *k != kind);
            if self.graphs.len() == MOST_GRAPHS {
                self.graphs.remove(0);
            }
            self.graphs.push((kind, graph));
        }
        Ok(())
    }

    /// The step with its spans rounded up to a power of two, so that few graphs serve a growing context. Blocks of spans that
    /// no token sees end at once.
    fn rounded(&self, size: StepSize) -> StepSize {
        StepSize { spans: size.spans.next_power_of_two().min(self.most_spans.max(size.spans)), ..size }
    }

    /// Puts a step's inputs one behind the other and sends them with one copy. Returns their addresses, in the order of
    /// [`Inputs`]. They depend on nothing but the step's size.
    fn send(&mut self, inputs: &Inputs<'_>) -> Result<Vec<u64>> {
        let index = self.device.index;
        let fail = |e| failed(index, "sending a step's inputs", e);
        let parts = [inputs.tokens, inputs.positions, inputs.seqs, inputs.rows].into_iter();
        let parts = parts.chain(inputs.rope.iter().copied()).chain([inputs.block_tables]);
        let start = self.memory.address() + self.layout.inputs;
        let (mut at, mut places) = (0u64, Vec::with_capacity(5 + inputs.rope.len()));
        if std::mem::replace(&mut self.under_way, true) {
            // A step that failed left its copy alone.
            self.stream.synchronize().map_err(fail)?;
        }
        let staging = self.staging.as_mut_slice().map_err(fail)?;
        for part in parts {
            let to = staging.get_mut(at as usize..at as usize + part.len());
            to.ok_or_else(|| {
                fail(DriverError(cudarc::driver::sys::cudaError_enum::CUDA_ERROR_INVALID_VALUE))
            })?
            .copy_from_slice(part);
            places.push(start + at);
            at = (at + part.len() as u64).next_multiple_of(ALIGN);
        }
        let sent = staging.get(..at as usize).unwrap_or_default();
        // SAFETY: the next step's inputs wait for this copy, see above.
        unsafe { self.memory.receive(self.layout.inputs as usize, sent) }.map_err(fail)?;
        Ok(places)
    }

    /// What was chosen in the step that was started, `count` of them: tokens with [`Wanted::Likeliest`], with [`Wanted::Top`]
    /// the largest logits of one row after the other.
    pub(crate) fn receive_chosen<T: bytemuck::Pod>(&mut self, count: u64) -> Result<&[T]> {
        let index = self.device.index;
        let fail = |e| failed(index, "running a step", e);
        let to = self.chosen.as_mut_slice().map_err(fail)?;
        let to = to.get_mut(..count as usize * size_of::<T>()).unwrap_or_default();
        if !to.is_empty() {
            // SAFETY: nobody uses them before the stream is done.
            unsafe { self.memory.send(self.layout.choices as usize, to) }.map_err(fail)?;
        }
        // Errors of kernels show here.
        self.stream.synchronize().map_err(fail)?;
        self.under_way = false;
        // Pinned memory begins at a page.
        Ok(bytemuck::cast_slice(to))
    }

    /// The logits `[R, V]` of the step that was started, or done, last, which has so many rows. More than a few of them come in
    /// `many`.
    pub(crate) fn receive_logits<'a>(&'a mut self, rows: u64, many: &'a mut [f32]) -> Result<&'a [f32]> {
        let index = self.device.index;
        let fail = |e| failed(index, "running a step", e);
        let count = (rows * self.vocab) as usize;
        let small = rows as usize <= PINNED_ROWS;
        let to = if small { self.answers.as_mut_slice().map_err(fail)? } else { many };
        let to = to.get_mut(..count).unwrap_or_default();
        if count > 0 {
            // SAFETY: as above.
            unsafe { self.memory.send(self.layout.logits as usize, to) }.map_err(fail)?;
        }
        // Errors of kernels show here.
        self.stream.synchronize().map_err(fail)?;
        self.under_way = false;
        Ok(to)
    }

    /// Every launch that has something to do, its arguments resolved.
    fn calls<'p>(
        &'p self,
        program: &'p Program,
        size: StepSize,
        places: &[u64],
        keys: &dyn Fn(usize) -> (u64, u64),
        wanted: Wanted,
    ) -> Result<Vec<Call<'p>>> {
        let [tokens, positions, seqs, rows, rest @ ..] = places else { return Ok(Vec::new()) };
        let (tables, rope) = rest.split_last().ok_or(ErrorKind::NoCudaCode)?;
        let base = self.memory.address();
        let mut calls = Vec::with_capacity(program.launches.len());
        for launch in &program.launches {
            let resolve = |arg: &Arg| match *arg {
                Arg::Arena { offset, .. } => base + offset.at(size).unwrap_or(0),
                Arg::Weight { offset, .. } => self.device.weights.address() + offset,
                Arg::Step(StepBuffer::Tokens) => *tokens,
                Arg::Step(StepBuffer::Positions) => *positions,
                Arg::Step(StepBuffer::Seqs) => *seqs,
                Arg::Step(StepBuffer::Rows) => *rows,
                Arg::Step(StepBuffer::BlockTables) => *tables,
                Arg::Step(StepBuffer::Rope { table }) => rope.get(table as usize).copied().unwrap_or(0),
                Arg::Step(StepBuffer::Logits) => base + self.layout.logits,
                Arg::Keys { layer } => keys(layer as usize).0,
                Arg::Values { layer } => keys(layer as usize).1,
                Arg::Imm(value) => value,
                Arg::Count(extent) => extent.at(size).unwrap_or(0),
                Arg::BlockTableStride => self.stride,
                Arg::Spans => size.spans,
                Arg::PrefetchDistance => 0,
            };
            // The reader has checked that these are there, and fit.
            let blocks = launch.blocks.as_ref();
            let Some((blocks, kernel)) = blocks.zip(self.device.kernels.get(&launch.kernel)) else {
                continue;
            };
            let grid = [&blocks.x, &blocks.y].map(|tiles| tiles.at(size).unwrap_or(0) as u32);
            if grid.contains(&0) {
                continue;
            }
            calls.push(Call {
                kernel,
                grid: kernel.blocks.grid(grid),
                threads: blocks.threads,
                args: launch.args.iter().map(resolve).collect(),
            });
        }
        let mut args = vec![base + self.layout.logits, base + self.layout.choices, self.vocab];
        let chooser = match wanted {
            Wanted::Logits => None,
            Wanted::Likeliest => Some((ARGMAX, ARGMAX_THREADS)),
            Wanted::Top(k) => {
                args.push(k.min(self.vocab));
                Some((TOP_K, TOP_K_THREADS))
            }
        };
        if let Some((name, threads)) = chooser.filter(|_| size.rows > 0) {
            let kernel = self.device.kernels.get(name).ok_or(ErrorKind::NoCudaCode)?;
            calls.push(Call { kernel, grid: [size.rows as u32, 1], threads, args });
        }
        Ok(calls)
    }

    fn launch(&self, call: &Call<'_>, early: bool) -> std::result::Result<(), DriverError> {
        // SAFETY: the reader has checked that every range lies in the memory it is in, for this step; kernels write nothing
        // else, which is the compiler's word, covered by the section's hash. A kernel takes 8 bytes for each argument.
        unsafe { call.kernel.launch(&self.stream, call.grid, call.threads, &call.args, early) }
    }

    /// Launches a step, each launch as early as it may.
    fn launch_all(&self, calls: &[Call<'_>]) -> std::result::Result<(), DriverError> {
        let overlaps = self.device.overlaps;
        // What comes before the first is no kernel of this step.
        calls.iter().enumerate().try_for_each(|(at, call)| self.launch(call, overlaps && at > 0))
    }

    fn capture(&self, calls: &[Call<'_>]) -> std::result::Result<Option<CudaGraph>, DriverError> {
        let stream = &self.stream;
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        let launched = self.launch_all(calls);
        // The capture must be ended, whatever happened in it.
        let graph = stream.end_capture(CUgraphInstantiate_flags(0));
        launched?;
        graph
    }
}
