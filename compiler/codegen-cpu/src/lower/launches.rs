//! From graph to launches: walks a prepared graph once per program and emits kernel calls over virtual buffers, which
//! [`super::arena`] then places.
//!
//! Normalised and quantized activations are made when a consumer asks for them and shared by all that ask for the same.

use super::error::{LowerError, LowerErrorKind};
use super::prepare::cache_writers;
use super::tensors::TensorTable;
use super::{LowerOptions, Port, SMALL_BATCH};
use crate::pack::RowOrder;
use attar_artifact::manifest::{KvType, RopeTable};
use attar_artifact::program::{Arg, Extent, StepBuffer, StepSize};
use attar_format::{FormatRef, formats};
use attar_ir::{Dim, Elem, Graph, NodeId, OpKind, Sym, TensorType, ValueId, WeightName};
use attar_kernel::{
    ActInt8Layout, Activation, AttentionSpec, Elementwise, Epilogue, KernelSpec, LinearSpec, QkvEpilogue,
    RowTile,
};
use std::collections::BTreeMap;

/// An activation buffer before it has a place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct BufId(pub(super) usize);

/// An argument before buffers have places.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum VirtualArg {
    Read(BufId),
    Write(BufId),
    Known(Arg),
}

/// A launch before buffers have places.
#[derive(Clone, Debug)]
pub(super) struct VirtualLaunch {
    pub(super) spec: KernelSpec,
    pub(super) args: Vec<VirtualArg>,
    pub(super) grid: Extent,
    pub(super) weight_bytes: u64,
    pub(super) note: String,
    /// An input the kernel may write its result over.
    pub(super) may_overwrite: Option<BufId>,
}

impl VirtualLaunch {
    pub(super) fn reads(&self) -> impl Iterator<Item = BufId> {
        self.args.iter().filter_map(|a| if let VirtualArg::Read(b) = a { Some(*b) } else { None })
    }

    pub(super) fn writes(&self) -> impl Iterator<Item = BufId> {
        self.args.iter().filter_map(|a| if let VirtualArg::Write(b) = a { Some(*b) } else { None })
    }
}

/// All launches of one program, with the buffers they use.
#[derive(Debug, Default)]
pub(super) struct Walk {
    pub(super) launches: Vec<VirtualLaunch>,
    /// Size in bytes of each buffer.
    pub(super) sizes: Vec<Extent>,
    pub(super) inputs: Vec<(Port, BufId)>,
    pub(super) outputs: Vec<(Port, BufId)>,
}

/// What a graph value is at run time.
#[derive(Clone, Debug)]
enum Place {
    Buffer(BufId),
    Step(StepBuffer),
    Weight(WeightName, TensorType),
    /// A normalisation that nobody has asked for yet.
    Norm(Norm),
    /// Stored in the KV cache by the kernel that made it.
    Cached,
    /// Int8 rows, which matrix kernels read as they are.
    Int8(BufId),
}

/// RMSNorm of the rows of a value.
#[derive(Clone, Debug)]
struct Norm {
    x: ValueId,
    dim: usize,
    eps: f32,
    gain: Option<ValueId>,
}

/// A matrix kernel whose epilogue's arguments are still to be added, and its number of rows.
struct MatrixLaunch {
    launch: VirtualLaunch,
    m: Extent,
}

pub(super) fn walk(
    graph: &Graph,
    max_tokens: u32,
    options: &LowerOptions,
    tensors: &mut TensorTable,
    rope: &mut Vec<RopeTable>,
) -> Result<Walk, LowerError> {
    let mut walker = Walker {
        graph,
        max_tokens: u64::from(max_tokens),
        options,
        tensors,
        rope,
        out: Walk::default(),
        places: BTreeMap::new(),
        shared: BTreeMap::new(),
        cached: cache_writers(graph),
        logits: logits_value(graph),
    };
    for id in graph.topo() {
        walker.node(id).map_err(|e| e.at(graph.node(id)))?;
    }
    walker.outputs()?;
    Ok(walker.out)
}

/// The value that is computed straight into the step's logits: the only output, f32 `[R, V]`, behind any reshapes.
fn logits_value(graph: &Graph) -> Option<ValueId> {
    let [output] = graph.outputs() else { return None };
    if !is_logits(graph.ty(*output)) {
        return None;
    }
    Some(behind_reshapes(graph, *output))
}

/// The value that reshapes made this one of.
fn behind_reshapes(graph: &Graph, mut v: ValueId) -> ValueId {
    while let (OpKind::Reshape(_), Some(x)) = (graph.op(v.node), graph.inputs_of(v.node).first()) {
        v = *x;
    }
    v
}

fn is_logits(ty: &TensorType) -> bool {
    ty.elem == Elem::F32 && matches!(ty.shape[..], [Dim::R, Dim::Fixed(_)])
}

struct Walker<'a> {
    graph: &'a Graph,
    max_tokens: u64,
    options: &'a LowerOptions,
    tensors: &'a mut TensorTable,
    rope: &'a mut Vec<RopeTable>,
    out: Walk,
    places: BTreeMap<ValueId, Place>,
    /// Normalised and quantized rows by the kernel and arguments that made them.
    shared: BTreeMap<String, BufId>,
    /// `qkv_rope` nodes that store their keys and values, and the attention each serves.
    cached: BTreeMap<NodeId, NodeId>,
    logits: Option<ValueId>,
}

impl Walker<'_> {
    fn node(&mut self, id: NodeId) -> Result<(), LowerError> {
        let graph = self.graph;
        let inputs = graph.inputs_of(id);
        let y = ValueId { node: id, slot: 0 };
        match graph.op(id) {
            OpKind::Input(op) => self.input(y, &graph.node(id).name, &op.ty)?,
            OpKind::Weight(op) => {
                self.places.insert(y, Place::Weight(op.name.clone(), op.ty.clone()));
            }
            OpKind::Reshape(_) => {
                let place = self.place(inputs[0])?;
                // A pending norm keeps its row length only in its own shape.
                if let Place::Norm(norm) = place {
                    let arg = self.norm(&norm, Activation::F32)?;
                    self.alias(y, arg);
                } else {
                    self.places.insert(y, place);
                }
            }
            OpKind::Embed(_) => self.embed(y, inputs[0], inputs[1])?,
            OpKind::RmsNorm(op) => {
                let dim = width(graph.ty(y));
                let norm = Norm { x: inputs[0], dim, eps: op.eps as f32, gain: inputs.get(1).copied() };
                if self.logits == Some(y) {
                    self.norm_into(&norm, Activation::F32, VirtualArg::Known(Arg::Step(StepBuffer::Logits)))?;
                    self.places.insert(y, Place::Step(StepBuffer::Logits));
                } else {
                    self.places.insert(y, Place::Norm(norm));
                }
            }
            OpKind::LayerNorm(op) => {
                let spec = KernelSpec::LayerNorm { dim: width(graph.ty(y)), eps: op.eps as f32 };
                let args = inputs.iter().map(|v| self.read(*v)).collect::<Result<Vec<_>, _>>()?;
                self.simple(y, spec, args)?;
            }
            OpKind::Linear(_) => {
                self.linear(y, inputs[0], inputs[1], inputs.get(2).copied(), None, None)?;
            }
            OpKind::LinearResidual(_) => {
                let residual = inputs.last().copied();
                let bias = if inputs.len() == 4 { Some(inputs[2]) } else { None };
                self.linear(y, inputs[0], inputs[1], bias, residual, None)?;
            }
            OpKind::NormLinear(op) => {
                let rest = &inputs[1 + usize::from(op.gain)..];
                let gain = op.gain.then(|| inputs[1]);
                let norm = self.prologue(inputs[0], op.eps, gain);
                self.linear(y, inputs[0], rest[0], rest.get(1).copied(), None, Some(norm))?;
            }
            OpKind::GateUpSwiglu(op) => self.gate_up(y, op, &inputs)?,
            OpKind::QkvRope(op) => self.qkv(id, op, &inputs)?,
            OpKind::Rope(op) => {
                let [_, Dim::Fixed(heads), Dim::Fixed(head_dim)] = graph.ty(y).shape[..] else {
                    return Err(shape_error(graph.ty(y), "rotary embedding of [T, H, Dh]"));
                };
                self.require_positions(inputs[1])?;
                let table = self.rope_table(&op.inv_freq, op.mscale);
                let args = vec![self.read(inputs[0])?, VirtualArg::Known(Arg::Step(table))];
                self.per_token(y, KernelSpec::Rope { heads, head_dim }, args)?;
            }
            OpKind::Attention(op) => self.attention(y, op, &inputs)?,
            OpKind::Add(_) => self.elementwise(y, Elementwise::Add, &inputs)?,
            OpKind::Mul(_) => self.elementwise(y, Elementwise::Mul, &inputs)?,
            OpKind::Silu(_) => self.elementwise(y, Elementwise::Silu, &inputs)?,
            OpKind::Gelu(_) => self.elementwise(y, Elementwise::Gelu, &inputs)?,
            OpKind::Softmax(_) => {
                let ty = graph.ty(y);
                if ty.last().is_none() {
                    return Err(shape_error(ty, "softmax over a fixed last dimension"));
                }
                let args = vec![self.read(inputs[0])?];
                self.simple(y, KernelSpec::Softmax { dim: width(ty) }, args)?;
            }
            OpKind::GatherRows(_) => self.gather(y, inputs[0], inputs[1])?,
            OpKind::Slice(op) => {
                let dim = width(graph.ty(inputs[0]));
                let args = vec![self.read(inputs[0])?];
                self.simple(y, KernelSpec::Slice { dim, start: op.start, len: op.len }, args)?;
            }
            // `prepare` leaves none.
            OpKind::Custom(_) => return Err(shape_error(graph.ty(y), "core ops")),
        }
        Ok(())
    }

    fn input(&mut self, y: ValueId, name: &str, ty: &TensorType) -> Result<(), LowerError> {
        let place = match (name, &ty.shape[..], ty.elem) {
            ("tokens", [Dim::T], Elem::I32) => Place::Step(StepBuffer::Tokens),
            ("positions", [Dim::T], Elem::I32) => Place::Step(StepBuffer::Positions),
            ("rows", [Dim::R], Elem::I32) => Place::Step(StepBuffer::Rows),
            _ => {
                let buf = self.buffer(elements(ty, 4)?);
                self.out.inputs.push((Port { name: name.to_owned(), ty: ty.clone() }, buf));
                Place::Buffer(buf)
            }
        };
        self.places.insert(y, place);
        Ok(())
    }

    fn embed(&mut self, y: ValueId, tokens: ValueId, table: ValueId) -> Result<(), LowerError> {
        let (name, ty) = self.weight(table)?;
        let [Dim::Fixed(vocab), Dim::Fixed(dim)] = ty.shape[..] else {
            return Err(shape_error(&ty, "a table [V, D]"));
        };
        let table = self.tensors.matrix(&name, &ty, RowOrder::Natural)?;
        let args = vec![self.read(tokens)?, VirtualArg::Known(table)];
        self.simple(y, KernelSpec::Embed { format: format_of(&ty), vocab, dim }, args)
    }

    /// Rows are copied as they are, int8 ones too.
    fn gather(&mut self, y: ValueId, x: ValueId, at: ValueId) -> Result<(), LowerError> {
        let ty = self.graph.ty(y);
        let Place::Int8(from) = self.place(x)? else {
            let args = vec![self.read(x)?, self.read(at)?];
            return self.simple(y, KernelSpec::GatherRows { dim: width(ty) }, args);
        };
        let bytes = activation_bytes(width(ty), Activation::Int8)?;
        let to = self.buffer(row_bytes(rows(ty)?, bytes)?);
        self.places.insert(y, Place::Int8(to));
        let args = vec![VirtualArg::Read(from), self.read(at)?, VirtualArg::Write(to)];
        self.push(VirtualLaunch {
            spec: KernelSpec::GatherRows { dim: bytes as usize / 4 },
            args,
            grid: rows(ty)?,
            weight_bytes: 0,
            note: note(self.graph, y.node),
            may_overwrite: None,
        });
        Ok(())
    }

    fn elementwise(&mut self, y: ValueId, op: Elementwise, inputs: &[ValueId]) -> Result<(), LowerError> {
        let args = inputs.iter().map(|v| self.read(*v)).collect::<Result<Vec<_>, _>>()?;
        self.simple(y, KernelSpec::Elementwise { op, dim: width(self.graph.ty(y)) }, args)
    }

    fn linear(
        &mut self,
        y: ValueId,
        x: ValueId,
        w: ValueId,
        bias: Option<ValueId>,
        residual: Option<ValueId>,
        norm: Option<Norm>,
    ) -> Result<(), LowerError> {
        let epilogue = if residual.is_some() { Epilogue::Residual } else { Epilogue::Store };
        let mut linear = self.matrix(x, w, RowOrder::Natural, bias, norm, epilogue)?;
        if let Some(r) = residual {
            let r = self.read(r)?;
            linear.launch.args.push(r);
            linear.launch.may_overwrite = if let VirtualArg::Read(b) = r { Some(b) } else { None };
        }
        self.finish_matrix(y, linear)
    }

    fn gate_up(
        &mut self,
        y: ValueId,
        op: &attar_ir::ops::GateUpSwiglu,
        inputs: &[ValueId],
    ) -> Result<(), LowerError> {
        let gain = op.gain.then(|| inputs[1]);
        let norm = op.eps.map(|eps| self.prologue(inputs[0], eps, gain));
        let w = inputs.last().copied().ok_or_else(missing_input)?;
        let width = width(self.graph.ty(y));
        let int8 = width.is_multiple_of(ActInt8Layout::GROUP) && self.only_int8_readers(y, width);
        let out = if int8 { Activation::Int8 } else { Activation::F32 };
        let epilogue = Epilogue::Swiglu { width, out };
        let linear = self.matrix(inputs[0], w, RowOrder::GateUp, None, norm, epilogue)?;
        if int8 {
            let buf = self.buffer(row_bytes(linear.m, activation_bytes(width, out)?)?);
            self.places.insert(y, Place::Int8(buf));
            self.finish_matrix_into(y, linear, VirtualArg::Write(buf));
            return Ok(());
        }
        self.finish_matrix(y, linear)
    }

    fn qkv(&mut self, id: NodeId, op: &attar_ir::ops::QkvRope, inputs: &[ValueId]) -> Result<(), LowerError> {
        let value = |slot| ValueId { node: id, slot };
        let attention = self.cached.get(&id).map(|a| self.graph.op(*a));
        let (Some(OpKind::Attention(attention)), [x, rest @ .., positions]) = (attention, inputs) else {
            return Err(LowerError::unsupported(
                "a qkv_rope without its attention",
                "it is decomposed first",
            ));
        };
        if rows(self.graph.ty(*x))? != Extent::per_token(1) {
            return Err(shape_error(self.graph.ty(*x), "x of [T, K]"));
        }
        let mut rest = rest.iter().copied();
        let gain = if op.gain { rest.next() } else { None };
        let norm = op.eps.map(|eps| self.prologue(*x, eps, gain));
        let w = rest.next().ok_or_else(missing_input)?;
        let bias = if op.bias { rest.next() } else { None };
        let layer = attention.layer as u32;
        let epilogue = Epilogue::Qkv(QkvEpilogue {
            heads: op.heads,
            kv_heads: op.kv_heads,
            head_dim: op.head_dim,
            qk_norm: op.qk_norm.map(|e| e as f32),
            kv: self.options.kv,
            page_len: self.options.page_len as usize,
        });
        let mut linear = self.matrix(*x, w, RowOrder::Natural, bias, norm, epilogue)?;
        let args = &mut linear.launch.args;
        for head_gain in rest {
            args.push(self.read(head_gain)?);
        }
        let table = self.rope_table(&op.inv_freq, op.mscale);
        args.push(VirtualArg::Known(Arg::Step(table)));
        args.push(self.read(*positions)?);
        args.extend(paging(layer));
        self.finish_matrix(value(0), linear)?;
        self.places.insert(value(1), Place::Cached);
        self.places.insert(value(2), Place::Cached);
        Ok(())
    }

    fn attention(
        &mut self,
        y: ValueId,
        op: &attar_ir::ops::Attention,
        inputs: &[ValueId],
    ) -> Result<(), LowerError> {
        let graph = self.graph;
        let [q, k, v, positions] = inputs[..] else { return Err(missing_input()) };
        let ([t, Dim::Fixed(heads), Dim::Fixed(head_dim)], [_, Dim::Fixed(kv_heads), _]) =
            (&graph.ty(q).shape[..], &graph.ty(k).shape[..])
        else {
            return Err(shape_error(graph.ty(q), "attention over q [T, H, Dh]"));
        };
        if *t != Dim::T {
            return Err(shape_error(graph.ty(q), "attention over the tokens of the step, [T, H, Dh]"));
        }
        let (heads, head_dim, kv_heads) = (*heads, *head_dim, *kv_heads);
        let (kv, page_len) = (self.options.kv, self.options.page_len as usize);
        if kv == KvType::Int4 && !head_dim.is_multiple_of(KvType::INT4_HEAD) {
            let problem = format!("an int4 KV cache for heads of width {head_dim}");
            return Err(LowerError::unsupported(problem, "widths that are multiples of 16, or f16 and int8"));
        }
        let layer = op.layer as u32;
        let note = note(graph, y.node);
        let positions = self.read(positions)?;
        if !matches!(self.place(k)?, Place::Cached) {
            let mut args = vec![self.read(k)?, self.read(v)?, positions];
            args.extend(paging(layer));
            self.push(VirtualLaunch {
                spec: KernelSpec::KvWrite { kv_heads, head_dim, kv, page_len },
                args,
                grid: Extent::per_token(1),
                weight_bytes: 0,
                note: note.replace("attention", "kv_write"),
                may_overwrite: None,
            });
        }
        let (scale, window, span) = (op.scale as f32, op.window, self.options.span as usize);
        let attention = AttentionSpec { heads, kv_heads, head_dim, scale, window, kv, page_len, span };
        let mut args = vec![self.read(q)?, positions];
        args.extend(paging(layer));
        let width = heads * head_dim;
        let groups = (attention.group() * head_dim).is_multiple_of(ActInt8Layout::GROUP);
        let (out, result) = if groups && self.only_int8_readers(y, width) {
            let buf =
                self.buffer(row_bytes(Extent::per_token(1), activation_bytes(width, Activation::Int8)?)?);
            self.places.insert(y, Place::Int8(buf));
            (Activation::Int8, VirtualArg::Write(buf))
        } else {
            (Activation::F32, self.result(y)?)
        };
        let launch = |spec, args, grid, note| VirtualLaunch {
            spec,
            args,
            grid,
            weight_bytes: 0,
            note,
            may_overwrite: None,
        };
        let kv_heads = kv_heads as u64;
        if self.max_tokens > SMALL_BATCH.into() {
            args.extend([result, VirtualArg::Known(count(Extent::per_token(1)))]);
            let more = kv_heads * (attention.tile_tokens() as u64 - 1);
            let grid = Extent { base: more, ..Extent::per_token(kv_heads) };
            self.push(launch(KernelSpec::Attention { attention, out }, args, grid, note));
            return Ok(());
        }
        // Few tokens do not occupy the threads: their contexts are shared out by spans.
        let partials = kv_heads * (attention.group() * attention.partial_len() * 4) as u64;
        let partials = self.buffer(Extent::per_token_span(partials));
        let spans = VirtualArg::Known(Arg::Spans);
        args.extend([VirtualArg::Write(partials), spans]);
        let grid = Extent::per_token_span(kv_heads);
        let span_note = note.replace("attention", "attention_span");
        self.push(launch(KernelSpec::AttentionSpan(attention), args, grid, span_note));
        let args = vec![VirtualArg::Read(partials), positions, result, spans];
        let grid = Extent::per_token(kv_heads);
        self.push(launch(KernelSpec::AttentionMerge { attention, out }, args, grid, note));
        Ok(())
    }

    /// Whether all that is made of a value, seen as rows of `width`, is matrix products that want int8 rows.
    fn only_int8_readers(&self, v: ValueId, width: usize) -> bool {
        let graph = self.graph;
        let reads = |(user, slot): (NodeId, u16)| match graph.op(user) {
            OpKind::Reshape(_) => self.only_int8_readers(ValueId { node: user, slot: 0 }, width),
            OpKind::GatherRows(_) if slot == 0 => {
                self.only_int8_readers(ValueId { node: user, slot: 0 }, width)
            }
            OpKind::Linear(_) | OpKind::LinearResidual(_) if slot == 0 => {
                let weight = graph.inputs_of(user)[1];
                let format = format_of(graph.ty(weight));
                // As a residual it would be read as f32.
                let once = graph.inputs_of(user).iter().filter(|i| **i == v).count() == 1;
                once && graph.ty(v).last() == Some(width) && format.wants_int8_activations()
            }
            _ => false,
        };
        let mut users = graph.users(v).into_iter().peekable();
        users.peek().is_some() && !graph.outputs().contains(&v) && users.all(reads)
    }

    /// A matrix kernel with its activations, weight and bias as arguments; the epilogue's follow.
    fn matrix(
        &mut self,
        x: ValueId,
        w: ValueId,
        order: RowOrder,
        bias: Option<ValueId>,
        norm: Option<Norm>,
        epilogue: Epilogue,
    ) -> Result<MatrixLaunch, LowerError> {
        let graph = self.graph;
        let (name, ty) = self.weight(w)?;
        let ([Dim::Fixed(n), Dim::Fixed(k)], format) = (&ty.shape[..], format_of(&ty)) else {
            return Err(shape_error(&ty, "a weight [N, K]"));
        };
        let m = rows(graph.ty(x))?;
        let weight = self.tensors.matrix(&name, &ty, order)?;
        let activation = if format.wants_int8_activations() { Activation::Int8 } else { Activation::F32 };
        let pending = match (norm, self.place(x)?) {
            (Some(norm), _) => Some(norm),
            (None, Place::Norm(norm)) => Some(norm),
            (None, _) => None,
        };
        let x = match (pending, activation) {
            (Some(norm), _) => self.norm(&norm, activation)?,
            (None, Activation::F32) => self.read(x)?,
            (None, Activation::Int8) => self.quantized(x, *k)?,
        };
        let mut args = vec![x, VirtualArg::Known(weight)];
        if let Some(bias) = bias {
            args.push(self.read(bias)?);
        }
        let rows = self.tile(m)?;
        let spec = LinearSpec { format, n: *n, k: *k, rows, bias: bias.is_some(), epilogue };
        let weight_bytes = if let Arg::Weight { len, .. } = weight { len } else { 0 };
        let launch = VirtualLaunch {
            grid: Extent::fixed(spec.items() as u64),
            spec: KernelSpec::Linear(spec),
            args,
            weight_bytes,
            note: String::new(),
            may_overwrite: None,
        };
        Ok(MatrixLaunch { launch, m })
    }

    /// Adds the output and the number of rows, and emits the launch.
    fn finish_matrix(&mut self, y: ValueId, matrix: MatrixLaunch) -> Result<(), LowerError> {
        let to = self.result(y)?;
        self.finish_matrix_into(y, matrix, to);
        Ok(())
    }

    fn finish_matrix_into(&mut self, y: ValueId, matrix: MatrixLaunch, to: VirtualArg) {
        let MatrixLaunch { mut launch, m } = matrix;
        launch.args.push(to);
        launch.args.push(VirtualArg::Known(count(m)));
        launch.args.push(VirtualArg::Known(Arg::PrefetchDistance));
        launch.note = note(self.graph, y.node);
        self.push(launch);
    }

    /// How many rows a matrix kernel of this program must be ready for.
    fn tile(&self, m: Extent) -> Result<RowTile, LowerError> {
        let step = StepSize { tokens: self.max_tokens, rows: self.max_tokens, spans: 1 };
        let most = m.at(step).ok_or(LowerErrorKind::Overflow)?;
        Ok(match most {
            1 => RowTile::One,
            2..=16 => RowTile::Small,
            _ => RowTile::Many,
        })
    }

    /// A launch over the rows of its result, whose last argument is the result.
    fn simple(&mut self, y: ValueId, spec: KernelSpec, args: Vec<VirtualArg>) -> Result<(), LowerError> {
        let grid = rows(self.graph.ty(y))?;
        self.launch(y, spec, args, grid)
    }

    fn per_token(&mut self, y: ValueId, spec: KernelSpec, args: Vec<VirtualArg>) -> Result<(), LowerError> {
        self.launch(y, spec, args, Extent::per_token(1))
    }

    fn launch(
        &mut self,
        y: ValueId,
        spec: KernelSpec,
        mut args: Vec<VirtualArg>,
        grid: Extent,
    ) -> Result<(), LowerError> {
        args.push(self.result(y)?);
        let note = note(self.graph, y.node);
        self.push(VirtualLaunch { spec, args, grid, weight_bytes: 0, note, may_overwrite: None });
        Ok(())
    }

    fn push(&mut self, launch: VirtualLaunch) {
        self.out.launches.push(launch);
    }

    /// Where a node's result goes: the step's logits, or a buffer of its own.
    fn result(&mut self, y: ValueId) -> Result<VirtualArg, LowerError> {
        if self.logits == Some(y) {
            self.places.insert(y, Place::Step(StepBuffer::Logits));
            return Ok(VirtualArg::Known(Arg::Step(StepBuffer::Logits)));
        }
        let buf = self.buffer(elements(self.graph.ty(y), 4)?);
        self.places.insert(y, Place::Buffer(buf));
        Ok(VirtualArg::Write(buf))
    }

    fn buffer(&mut self, size: Extent) -> BufId {
        self.out.sizes.push(size);
        BufId(self.out.sizes.len() - 1)
    }

    fn place(&self, v: ValueId) -> Result<Place, LowerError> {
        let unknown =
            || LowerError::unsupported("a value that was never computed", "the graph must be acyclic");
        self.places.get(&v).cloned().ok_or_else(unknown)
    }

    fn alias(&mut self, y: ValueId, arg: VirtualArg) {
        if let VirtualArg::Read(buf) = arg {
            self.places.insert(y, Place::Buffer(buf));
        }
    }

    /// A value as f32 (or i32) rows.
    fn read(&mut self, v: ValueId) -> Result<VirtualArg, LowerError> {
        match self.place(v)? {
            Place::Buffer(buf) => Ok(VirtualArg::Read(buf)),
            Place::Step(buffer) => Ok(VirtualArg::Known(Arg::Step(buffer))),
            Place::Weight(name, ty) => Ok(VirtualArg::Known(self.tensors.plain(&name, &ty)?)),
            Place::Norm(norm) => self.norm(&norm, Activation::F32),
            Place::Int8(_) => {
                Err(LowerError::unsupported("int8 rows read as f32", "only matrix products read them"))
            }
            Place::Cached => {
                Err(LowerError::unsupported("a second reader of cached keys", "only attention reads them"))
            }
        }
    }

    fn weight(&self, v: ValueId) -> Result<(WeightName, TensorType), LowerError> {
        match self.place(v)? {
            Place::Weight(name, ty) => Ok((name, ty)),
            _ => Err(LowerError::unsupported(
                "a matrix product of two activations",
                "one side must be a weight",
            )),
        }
    }

    fn prologue(&self, x: ValueId, eps: f64, gain: Option<ValueId>) -> Norm {
        Norm { x, dim: width(self.graph.ty(x)), eps: eps as f32, gain }
    }

    /// Normalised rows, computed once per layout.
    fn norm(&mut self, norm: &Norm, out: Activation) -> Result<VirtualArg, LowerError> {
        let x = self.read(norm.x)?;
        let gain = norm.gain.map(|g| self.read(g)).transpose()?;
        let spec = KernelSpec::RmsNorm { dim: norm.dim, eps: norm.eps, gain: gain.is_some(), out };
        let key = format!("{} {x:?} {gain:?}", spec.name());
        if let Some(buf) = self.shared.get(&key) {
            return Ok(VirtualArg::Read(*buf));
        }
        let size = row_bytes(rows(self.graph.ty(norm.x))?, activation_bytes(norm.dim, out)?)?;
        let buf = self.buffer(size);
        self.norm_into(norm, out, VirtualArg::Write(buf))?;
        self.shared.insert(key, buf);
        Ok(VirtualArg::Read(buf))
    }

    fn norm_into(&mut self, norm: &Norm, out: Activation, to: VirtualArg) -> Result<(), LowerError> {
        let mut args = vec![self.read(norm.x)?];
        if let Some(g) = norm.gain {
            args.push(self.read(g)?);
        }
        let spec = KernelSpec::RmsNorm { dim: norm.dim, eps: norm.eps, gain: norm.gain.is_some(), out };
        args.push(to);
        let grid = rows(self.graph.ty(norm.x))?;
        let note = norm.gain.map_or("rms_norm".to_owned(), |g| weight_note(self.graph, g, "rms_norm"));
        self.push(VirtualLaunch { spec, args, grid, weight_bytes: 0, note, may_overwrite: None });
        Ok(())
    }

    /// Rows of a value quantized to int8, computed once.
    fn quantized(&mut self, x: ValueId, k: usize) -> Result<VirtualArg, LowerError> {
        if let Place::Int8(buf) = self.place(x)? {
            return Ok(VirtualArg::Read(buf));
        }
        let arg = self.read(x)?;
        let spec = KernelSpec::Quantize { dim: k };
        let key = format!("{} {arg:?}", spec.name());
        if let Some(buf) = self.shared.get(&key) {
            return Ok(VirtualArg::Read(*buf));
        }
        let m = rows(self.graph.ty(x))?;
        let buf = self.buffer(row_bytes(m, activation_bytes(k, Activation::Int8)?)?);
        self.push(VirtualLaunch {
            spec,
            args: vec![arg, VirtualArg::Write(buf)],
            grid: m,
            weight_bytes: 0,
            note: note(self.graph, behind_reshapes(self.graph, x).node) + " to int8",
            may_overwrite: None,
        });
        self.shared.insert(key, buf);
        Ok(VirtualArg::Read(buf))
    }

    fn rope_table(&mut self, inv_freq: &[f64], mscale: f64) -> StepBuffer {
        let table = RopeTable { inv_freq: inv_freq.to_vec(), mscale };
        let at = self.rope.iter().position(|t| *t == table).unwrap_or_else(|| {
            self.rope.push(table);
            self.rope.len() - 1
        });
        StepBuffer::Rope { table: at as u32 }
    }

    /// The runtime makes rotary tables from the step's positions and no others.
    fn require_positions(&self, v: ValueId) -> Result<(), LowerError> {
        match self.place(v)? {
            Place::Step(StepBuffer::Positions) => Ok(()),
            _ => Err(LowerError::unsupported(
                "rotary embedding of other positions than the step's",
                "name the input `positions`",
            )),
        }
    }

    /// Makes sure every function output stands where the caller looks for it.
    fn outputs(&mut self) -> Result<(), LowerError> {
        let graph = self.graph;
        for (at, v) in graph.outputs().iter().enumerate() {
            let ty = graph.ty(*v);
            let at_node = |e: LowerError| e.at(graph.node(v.node));
            if ty.elem != Elem::F32 {
                return Err(at_node(shape_error(ty, "outputs of f32")));
            }
            let logits = graph.outputs().len() == 1 && is_logits(ty);
            match self.place(*v).map_err(at_node)? {
                Place::Step(StepBuffer::Logits) if logits => continue,
                Place::Buffer(buf) if !logits && self.out.inputs.iter().all(|(_, b)| *b != buf) => {
                    self.out.outputs.push((Port { name: format!("{at}"), ty: ty.clone() }, buf));
                    continue;
                }
                _ => {}
            }
            // Anything else is computed or copied: a norm nobody asked for, an input, a weight, other logits.
            let from = self.read(*v).map_err(at_node)?;
            let dim = width(ty);
            let to = if logits {
                VirtualArg::Known(Arg::Step(StepBuffer::Logits))
            } else {
                let buf = self.buffer(elements(ty, 4)?);
                self.out.outputs.push((Port { name: format!("{at}"), ty: ty.clone() }, buf));
                VirtualArg::Write(buf)
            };
            self.push(VirtualLaunch {
                spec: KernelSpec::Slice { dim, start: 0, len: dim },
                args: vec![from, to],
                grid: rows(ty)?,
                weight_bytes: 0,
                note: format!("output {at}"),
                may_overwrite: None,
            });
        }
        Ok(())
    }
}

/// Sequences, block tables, their stride, keys and values of a layer.
fn paging(layer: u32) -> [VirtualArg; 5] {
    [
        Arg::Step(StepBuffer::Seqs),
        Arg::Step(StepBuffer::BlockTables),
        Arg::BlockTableStride,
        Arg::Keys { layer },
        Arg::Values { layer },
    ]
    .map(VirtualArg::Known)
}

fn count(m: Extent) -> Arg {
    if m == Extent::fixed(m.base) { Arg::Imm(m.base) } else { Arg::Count(m) }
}

fn format_of(ty: &TensorType) -> FormatRef {
    match ty.elem {
        Elem::Coded(format) => format,
        Elem::Plain(_) => &formats::F32,
    }
}

/// Length of the rows of a value: its last dimension, or 1 when that is symbolic.
fn width(ty: &TensorType) -> usize {
    ty.last().unwrap_or(1)
}

/// Number of rows of a value: the product of the dimensions before the last fixed one.
fn rows(ty: &TensorType) -> Result<Extent, LowerError> {
    let leading = if ty.last().is_some() { &ty.shape[..ty.rank() - 1] } else { &ty.shape[..] };
    product(leading).map_err(|e| e.unwrap_or_else(|| shape_error(ty, "at most one of T and R in a shape")))
}

fn product(dims: &[Dim]) -> Result<Extent, Option<LowerError>> {
    let mut fixed = 1u64;
    let mut symbol = None;
    for d in dims {
        match d {
            Dim::Fixed(n) => {
                fixed = fixed.checked_mul(*n as u64).ok_or(Some(LowerErrorKind::Overflow.into()))?;
            }
            Dim::Sym(s @ (Sym::T | Sym::R)) if symbol.is_none() => symbol = Some(*s),
            Dim::Sym(_) => return Err(None),
        }
    }
    Ok(match symbol {
        None => Extent::fixed(fixed),
        Some(Sym::R) => Extent::per_row(fixed),
        Some(_) => Extent::per_token(fixed),
    })
}

fn elements(ty: &TensorType, element_bytes: u64) -> Result<Extent, LowerError> {
    row_bytes(rows(ty)?, (width(ty) as u64).checked_mul(element_bytes).ok_or(LowerErrorKind::Overflow)?)
}

fn row_bytes(rows: Extent, bytes: u64) -> Result<Extent, LowerError> {
    let times = |v: u64| v.checked_mul(bytes).ok_or(LowerErrorKind::Overflow);
    Ok(Extent {
        base: times(rows.base)?,
        per_token: times(rows.per_token)?,
        per_row: times(rows.per_row)?,
        per_token_span: times(rows.per_token_span)?,
    })
}

/// Bytes of one row of activations.
fn activation_bytes(dim: usize, layout: Activation) -> Result<u64, LowerError> {
    match layout {
        Activation::F32 => Ok(dim as u64 * 4),
        Activation::Int8 => Ok(ActInt8Layout::new(dim).stride as u64),
    }
}

fn missing_input() -> LowerError {
    LowerError::unsupported("a node with too few inputs", "the verifier finds them")
}

fn shape_error(ty: &TensorType, supported: &'static str) -> LowerError {
    LowerError::unsupported(format!("a value of type {ty}"), supported)
}

/// `layers.3 linear_residual`: what a launch computes, for people.
fn note(graph: &Graph, id: NodeId) -> String {
    let op = graph.op(id);
    let name = attar_ir::Op::name(op);
    if let OpKind::Attention(a) = op {
        return format!("layers.{} {name}", a.layer);
    }
    let weights = graph.inputs_of(id);
    weights
        .into_iter()
        .find_map(|v| layer_of(graph, v))
        .map_or(name.to_owned(), |l| format!("layers.{l} {name}"))
}

fn weight_note(graph: &Graph, v: ValueId, what: &str) -> String {
    layer_of(graph, v).map_or(what.to_owned(), |l| format!("layers.{l} {what}"))
}

/// The layer a weight's name speaks of.
fn layer_of(graph: &Graph, v: ValueId) -> Option<usize> {
    let OpKind::Weight(w) = graph.op(v.node) else { return None };
    let (_, after) = w.name.split_once("layers.")?;
    after.split('.').next()?.parse().ok()
}
