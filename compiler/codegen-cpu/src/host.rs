//! Runs lowered graphs in this process, single-threaded and slow, so that tests can compare them with the interpreter.
//!
//! Kernels are either the scalar reference of `attar-kernel` (which checks lowering and memory planning alone) or code
//! compiled for this machine. Memory is poisoned before every step, grids are cut unevenly, pages of a sequence are
//! scattered, and writes past the arena or the logits are caught.

use crate::exec::ExecImage;
use crate::lower::{LowerError, LowerOptions, Lowered, Port, lower};
use crate::{Target, compile_blob};
use attar_artifact::manifest::KvType;
use attar_artifact::program::{Arg, Extent, Program, ProgramKind, StepBuffer, StepSize};
use attar_format::DType;
use attar_ir::interp::Step;
use attar_ir::{Dim, Elem, Graph, Sym, Tensor, TensorData, WeightStore};
use attar_kernel::KernelSpec;
use std::collections::BTreeMap;
use std::fmt;

/// Which kernels run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernels {
    /// The scalar reference.
    Reference,
    /// Code generated for a target that this machine can execute, see [`Target::native`].
    Compiled(Target),
}

/// Room for keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    pub sequences: usize,
    /// Positions per sequence.
    pub context: usize,
}

/// Why a graph could not be run.
#[derive(Debug)]
#[non_exhaustive]
pub enum HostError {
    Lower(LowerError),
    Codegen(crate::Error),
    Weights(attar_ir::Error),
    /// The operating system gave no executable memory.
    Memory(std::io::Error),
    /// Inputs do not fit the graph or the room.
    Input {
        expected: String,
        got: String,
    },
    /// A kernel is missing, or one wrote where it must not.
    Kernel {
        kernel: String,
        problem: &'static str,
    },
}

impl fmt::Display for HostError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            HostError::Lower(e) => write!(f, "{e}"),
            HostError::Codegen(e) => write!(f, "{e}"),
            HostError::Weights(e) => write!(f, "{e}"),
            HostError::Memory(e) => write!(f, "executable memory: {e}"),
            HostError::Input { expected, got } => write!(f, "input: expected {expected}, got {got}"),
            HostError::Kernel { kernel, problem } => write!(f, "kernel {kernel}: {problem}"),
        }
    }
}

impl std::error::Error for HostError {}

/// 64-aligned memory that kernels read and write through raw addresses.
#[derive(Debug)]
struct Memory {
    lines: Vec<Line>,
}

#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
struct Line([u8; 64]);

impl Memory {
    fn filled(len: u64, byte: u8) -> Memory {
        Memory { lines: vec![Line([byte; 64]); (len as usize).div_ceil(64)] }
    }

    fn of(bytes: &[u8]) -> Memory {
        let mut memory = Memory::filled(bytes.len() as u64, 0);
        for (line, chunk) in memory.lines.iter_mut().zip(bytes.chunks(64)) {
            line.0[..chunk.len()].copy_from_slice(chunk);
        }
        memory
    }

    fn of_i32(values: &[i32]) -> Memory {
        Memory::of(&values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>())
    }

    fn address(&mut self) -> u64 {
        self.lines.as_mut_ptr() as u64
    }

    fn byte(&mut self, at: usize) -> &mut u8 {
        &mut self.lines[at / 64].0[at % 64]
    }

    fn f32s(&self, offset: u64, count: usize) -> Vec<f64> {
        let at = |b: usize| self.lines[b / 64].0[b % 64];
        let word = |i: usize| {
            let b = offset as usize + 4 * i;
            f64::from(f32::from_le_bytes([at(b), at(b + 1), at(b + 2), at(b + 3)]))
        };
        (0..count).map(word).collect()
    }
}

/// Bytes behind arena and logits that no kernel may touch.
const GUARD: u64 = 256;
/// A byte pattern that is NaN as f32 and f16.
const POISON: u8 = 0xff;
/// Cache that was never written holds large finite numbers, as a page used before may.
const STALE: u8 = 0x7b;

/// A lowered graph with its weights, cache and kernels.
#[derive(Debug)]
pub struct HostRunner {
    lowered: Lowered,
    /// Names of the graph's inputs, in order.
    inputs: Vec<String>,
    weights: Memory,
    keys: BTreeMap<u32, Memory>,
    values: BTreeMap<u32, Memory>,
    specs: BTreeMap<String, KernelSpec>,
    image: Option<ExecImage>,
    room: Room,
    page_len: usize,
    span: usize,
    /// Runs this program for every step it can hold, instead of the smallest one.
    pub program: Option<ProgramKind>,
}

impl HostRunner {
    /// Lowers a graph and makes it ready to run.
    ///
    /// # Errors
    /// When it cannot be lowered, compiled or packed.
    pub fn new(
        graph: &Graph,
        weights: &WeightStore,
        options: &LowerOptions,
        kernels: Kernels,
        room: Room,
    ) -> Result<HostRunner, HostError> {
        let lowered = lower(graph, options).map_err(HostError::Lower)?;
        let image = match kernels {
            Kernels::Reference => None,
            Kernels::Compiled(target) => {
                let blob = compile_blob(target, &lowered.specs).map_err(HostError::Codegen)?;
                Some(ExecImage::load(&blob).map_err(HostError::Memory)?)
            }
        };
        let mut packed = Memory::filled(lowered.weights_len, 0);
        for tensor in &lowered.tensors {
            let bytes = tensor.bytes(weights).map_err(HostError::Weights)?;
            for (line, chunk) in packed.lines[tensor.offset as usize / 64..].iter_mut().zip(bytes.chunks(64))
            {
                line.0[..chunk.len()].copy_from_slice(chunk);
            }
        }
        let specs: BTreeMap<String, KernelSpec> =
            lowered.specs.iter().map(|s| (s.name(), s.clone())).collect();
        let page_len = options.page_len as usize;
        let pages = room.context.div_ceil(page_len) * room.sequences;
        let (mut keys, mut values) = (BTreeMap::new(), BTreeMap::new());
        for launch in lowered.programs.iter().flat_map(|p| &p.launches) {
            let attention = match specs.get(&launch.kernel) {
                Some(KernelSpec::Attention { attention, .. }) => attention,
                Some(KernelSpec::AttentionSpan(attention)) => attention,
                _ => continue,
            };
            let block = attention.kv.block_bytes(attention.head_dim, page_len);
            let bytes = (pages.next_multiple_of(KvType::RUN) * attention.kv_heads * block) as u64;
            for arg in &launch.args {
                let (cache, layer) = match arg {
                    Arg::Keys { layer } => (&mut keys, *layer),
                    Arg::Values { layer } => (&mut values, *layer),
                    _ => continue,
                };
                cache.entry(layer).or_insert(Memory::filled(bytes, STALE));
            }
        }
        let inputs = graph.inputs().iter().map(|i| graph.node(*i).name.clone()).collect();
        Ok(HostRunner {
            lowered,
            inputs,
            weights: packed,
            keys,
            values,
            specs,
            image,
            room,
            page_len,
            span: options.span as usize,
            program: None,
        })
    }

    /// What the graph was lowered to.
    pub fn lowered(&self) -> &Lowered {
        &self.lowered
    }

    /// Runs one step of sequence 0, as [`attar_ir::interp::run`] does: inputs and outputs in the order of the graph's.
    ///
    /// # Errors
    /// When inputs do not fit, or a kernel misbehaves.
    pub fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, HostError> {
        let named = |name: &str| self.inputs.iter().position(|n| n == name).and_then(|i| inputs.get(i));
        let ints = |name: &str| named(name).map_or(Vec::new(), |t| t.as_int().to_vec());
        let mut step = Step {
            tokens: ints("tokens"),
            positions: ints("positions"),
            seqs: Vec::new(),
            rows: ints("rows"),
        };
        let mut sizes = Sizes::default();
        for (port, _) in &self.lowered.ports[0].inputs {
            let tensor = named(&port.name).ok_or_else(|| input("every input of the graph", &port.name))?;
            sizes.bind(port, tensor)?;
        }
        let tokens = sizes.tokens.unwrap_or(step.tokens.len().max(step.positions.len()).max(1));
        step.seqs = vec![0; tokens];
        self.execute(&step, tokens, sizes.rows.unwrap_or(step.rows.len()), inputs)
    }

    /// Runs one step of a model, as [`attar_ir::interp::run_step`] does.
    ///
    /// # Errors
    /// As [`HostRunner::run`].
    pub fn step(&mut self, step: &Step) -> Result<Vec<Tensor>, HostError> {
        self.execute(step, step.seqs.len(), step.rows.len(), &[])
    }

    fn execute(
        &mut self,
        step: &Step,
        tokens: usize,
        rows: usize,
        inputs: &[Tensor],
    ) -> Result<Vec<Tensor>, HostError> {
        self.check(step, tokens, rows)?;
        let at = self.choose(tokens, rows)?;
        let (program, ports) = (self.lowered.programs[at].clone(), self.lowered.ports[at].clone());
        let longest = step.positions.iter().map(|p| *p as usize + 1).max().unwrap_or(1);
        let spans = longest.div_ceil(self.span) as u64;
        let of_step = StepSize { tokens: tokens as u64, rows: rows as u64, spans };
        let size = |e: &Extent| e.at(of_step).unwrap_or(u64::MAX);

        let arena_len = size(&program.arena).next_multiple_of(64);
        let mut arena = Memory::filled(arena_len + GUARD, POISON);
        for (port, offset) in &ports.inputs {
            let tensor = self.inputs.iter().position(|n| *n == port.name).and_then(|i| inputs.get(i));
            let tensor = tensor.ok_or_else(|| input("every input of the graph", &port.name))?;
            for (i, b) in element_bytes(tensor).into_iter().enumerate() {
                *arena.byte(size(offset) as usize + i) = b;
            }
        }
        let vocab = self.vocab(&program);
        let logits_len = ((rows * vocab * 4) as u64).next_multiple_of(64);
        let mut buffers = StepMemory {
            tokens: Memory::of_i32(&step.tokens),
            positions: Memory::of_i32(&step.positions),
            seqs: Memory::of_i32(&step.seqs),
            rows: Memory::of_i32(&step.rows),
            tables: Memory::of_i32(&self.block_tables()),
            rope: self.rope(&step.positions),
            logits: Memory::filled(logits_len + GUARD, POISON),
        };
        for launch in &program.launches {
            let args: Vec<u64> =
                launch.args.iter().map(|a| self.resolve(a, spans, &size, &mut arena, &mut buffers)).collect();
            let grid = size(&launch.grid);
            // Uneven pieces, last one first: kernels must not depend on how the grid is cut.
            let cut = grid / 3;
            for (begin, end) in [(cut, grid), (0, cut)] {
                if begin < end {
                    self.call(&launch.kernel, &args, begin, end)?;
                }
            }
            let touched =
                |m: &mut Memory, len: u64| (len..len + GUARD).any(|b| *m.byte(b as usize) != POISON);
            if touched(&mut arena, arena_len) || touched(&mut buffers.logits, logits_len) {
                let problem = "wrote past the arena or the logits";
                return Err(HostError::Kernel { kernel: launch.kernel.clone(), problem });
            }
        }
        if ports.outputs.is_empty() {
            let data = buffers.logits.f32s(0, rows * vocab);
            return Ok(vec![Tensor::real([rows, vocab], data)]);
        }
        let output = |(port, offset): &(Port, Extent)| {
            let dim = |d: &Dim| match d {
                Dim::Fixed(n) => *n,
                Dim::Sym(Sym::R) => rows,
                Dim::Sym(_) => tokens,
            };
            let shape: Vec<usize> = port.ty.shape.iter().map(dim).collect();
            let data = arena.f32s(size(offset), shape.iter().product());
            Tensor::real(shape, data)
        };
        Ok(ports.outputs.iter().map(output).collect())
    }

    fn call(&self, kernel: &str, args: &[u64], begin: u64, end: u64) -> Result<(), HostError> {
        let missing =
            || HostError::Kernel { kernel: kernel.to_owned(), problem: "the image has no such entry" };
        match &self.image {
            Some(image) => {
                // SAFETY: lowering gives every kernel the arguments its spec asks for, in buffers of the sizes it
                // states; tokens, positions, sequences and rows have been checked against table, room and step.
                let found = unsafe { image.call(kernel, args, begin, end) };
                if found { Ok(()) } else { Err(missing()) }
            }
            None => {
                let spec = self.specs.get(kernel).ok_or_else(missing)?;
                // SAFETY: as above.
                unsafe { attar_kernel::reference::run(spec, args, begin..end) };
                Ok(())
            }
        }
    }

    fn resolve(
        &mut self,
        arg: &Arg,
        spans: u64,
        size: &impl Fn(&Extent) -> u64,
        arena: &mut Memory,
        step: &mut StepMemory,
    ) -> u64 {
        let missing = 0;
        match arg {
            Arg::Arena { offset, .. } => arena.address() + size(offset),
            Arg::Weight { offset, .. } => self.weights.address() + offset,
            Arg::Step(buffer) => match buffer {
                StepBuffer::Tokens => step.tokens.address(),
                StepBuffer::Positions => step.positions.address(),
                StepBuffer::Seqs => step.seqs.address(),
                StepBuffer::Rows => step.rows.address(),
                StepBuffer::BlockTables => step.tables.address(),
                StepBuffer::Rope { table } => {
                    step.rope.get_mut(*table as usize).map_or(missing, Memory::address)
                }
                StepBuffer::Logits => step.logits.address(),
            },
            Arg::Keys { layer } => self.keys.get_mut(layer).map_or(missing, Memory::address),
            Arg::Values { layer } => self.values.get_mut(layer).map_or(missing, Memory::address),
            Arg::Imm(v) => *v,
            Arg::Count(e) => size(e),
            Arg::BlockTableStride => self.pages_per_sequence() as u64,
            Arg::Spans => spans,
            Arg::PrefetchDistance => 4096,
        }
    }

    fn choose(&self, tokens: usize, rows: usize) -> Result<usize, HostError> {
        let fits = |p: &Program| {
            tokens <= p.max_tokens as usize && (p.kind != ProgramKind::Decode || rows == 1 || !uses_rows(p))
        };
        let wanted = |p: &Program| self.program.is_none_or(|kind| p.kind == kind) && fits(p);
        let programs = &self.lowered.programs;
        let at = programs.iter().position(wanted).or_else(|| programs.iter().position(fits));
        at.ok_or_else(|| input("a step of at most the prefill program's tokens", &tokens.to_string()))
    }

    /// Checks what kernels use as indices.
    fn check(&self, step: &Step, tokens: usize, rows: usize) -> Result<(), HostError> {
        let within = |what: &str, values: &[i32], bound: usize| match values
            .iter()
            .find(|v| usize::try_from(**v).map_or(true, |v| v >= bound))
        {
            Some(v) => Err(input(&format!("{what} below {bound}"), &v.to_string())),
            None => Ok(()),
        };
        let length = |what: &str, got: usize, expected: usize| {
            let used = self.inputs.iter().any(|n| n == what);
            if got == expected || !used {
                return Ok(());
            }
            Err(input(&format!("{expected} {what}"), &got.to_string()))
        };
        length("tokens", step.tokens.len(), tokens)?;
        length("positions", step.positions.len(), tokens)?;
        within("sequences", &step.seqs, self.room.sequences)?;
        within("positions", &step.positions, self.room.context)?;
        within("rows", &step.rows, tokens)?;
        for spec in &self.lowered.specs {
            if let KernelSpec::Embed { vocab, .. } = spec {
                within("tokens", &step.tokens, *vocab)?;
            }
        }
        if rows > tokens || tokens == 0 {
            return Err(input("1 or more tokens and no more rows than tokens", &format!("{tokens}, {rows}")));
        }
        Ok(())
    }

    fn vocab(&self, program: &Program) -> usize {
        let writes = |a: &Arg| *a == Arg::Step(StepBuffer::Logits);
        let last = program.launches.iter().rfind(|l| l.args.iter().any(writes));
        match last.and_then(|l| self.specs.get(&l.kernel)) {
            Some(KernelSpec::Linear(l)) => l.n,
            Some(KernelSpec::Embed { dim, .. } | KernelSpec::RmsNorm { dim, .. }) => *dim,
            Some(KernelSpec::LayerNorm { dim, .. } | KernelSpec::Softmax { dim }) => *dim,
            Some(KernelSpec::Elementwise { dim, .. } | KernelSpec::GatherRows { dim }) => *dim,
            Some(KernelSpec::Slice { len, .. }) => *len,
            _ => 0,
        }
    }

    fn pages_per_sequence(&self) -> usize {
        self.room.context.div_ceil(self.page_len)
    }

    /// Pages of different sequences alternate, so that a page's neighbour belongs to somebody else.
    fn block_tables(&self) -> Vec<i32> {
        let (sequences, pages) = (self.room.sequences, self.pages_per_sequence());
        (0..sequences).flat_map(|s| (0..pages).map(move |p| (p * sequences + s) as i32)).collect()
    }

    fn rope(&self, positions: &[i32]) -> Vec<Memory> {
        let table = |t: &attar_artifact::manifest::RopeTable| {
            let mut bytes = Vec::new();
            for position in positions {
                let angles = t.inv_freq.iter().map(|f| f64::from(*position) * f);
                let (cos, sin): (Vec<f64>, Vec<f64>) = angles.map(|a| (a.cos(), a.sin())).unzip();
                for v in cos.into_iter().chain(sin) {
                    bytes.extend(((t.mscale * v) as f32).to_le_bytes());
                }
            }
            Memory::of(&bytes)
        };
        self.lowered.rope.iter().map(table).collect()
    }
}

#[derive(Debug)]
struct StepMemory {
    tokens: Memory,
    positions: Memory,
    seqs: Memory,
    rows: Memory,
    tables: Memory,
    rope: Vec<Memory>,
    logits: Memory,
}

/// T and R as the inputs have them.
#[derive(Default)]
struct Sizes {
    tokens: Option<usize>,
    rows: Option<usize>,
}

impl Sizes {
    fn bind(&mut self, port: &Port, tensor: &Tensor) -> Result<(), HostError> {
        let mut fits = tensor.shape.len() == port.ty.rank();
        for (dim, size) in port.ty.shape.iter().zip(&tensor.shape) {
            fits &= match dim {
                Dim::Fixed(n) => n == size,
                Dim::Sym(Sym::R) => self.rows.get_or_insert(*size) == size,
                Dim::Sym(_) => self.tokens.get_or_insert(*size) == size,
            };
        }
        let int = port.ty.elem == Elem::Plain(DType::I32);
        fits &= int == matches!(tensor.data, TensorData::Int(_));
        if fits { Ok(()) } else { Err(input(&port.ty.to_string(), &format!("{:?}", tensor.shape))) }
    }
}

fn uses_rows(p: &Program) -> bool {
    p.launches.iter().any(|l| l.args.iter().any(|a| matches!(a, Arg::Count(e) if e.per_row > 0)))
}

fn element_bytes(t: &Tensor) -> Vec<u8> {
    match &t.data {
        TensorData::Real(v) => v.iter().flat_map(|x| (*x as f32).to_le_bytes()).collect(),
        TensorData::Int(v) => v.iter().flat_map(|x| x.to_le_bytes()).collect(),
    }
}

fn input(expected: &str, got: &str) -> HostError {
    HostError::Input { expected: expected.to_owned(), got: got.to_owned() }
}
