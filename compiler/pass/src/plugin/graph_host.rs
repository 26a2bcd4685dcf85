//! The host of passes written against `attar-plugin`: answers over the compiler's own graph and weights. Passes that are linked
//! in are run over it directly; behind the C interface the same functions answer.

use super::handles::{GRAPH, Handles, Kind, Space};
use crate::context::{NoteLevel, PassCx, graph_weights};
use crate::decl::{Options, Value as OptionValue};
use crate::error::{Error, ErrorKind, Family};
use crate::globs::TensorGlobs;
use crate::metrics::MetricValue;
use crate::registry::registered;
use attar_format::{Encoded, FormatRef, PackedLayout, Scale, is_described};
use attar_ir::interp::{EvalCx, KvState, Sizes};
use attar_ir::ops::{Custom, Weight};
use attar_ir::{
    Attrs, Elem, Graph, NodeId, Op, OpKind, Sym, Tensor, TensorType, ValueId, WeightInfo, WeightName,
    WeightValues,
};
use attar_plugin::host::{Held, HeldMut, HeldStatistics, Native};
use attar_plugin::{
    Attr, Dim, FormatInfo, FormatKind, Host, Level, Metric, Node, NodeInfo, Result, TensorInfo, Type, Value,
};
use rayon::prelude::*;
use std::any::TypeId;
use std::collections::BTreeMap;

/// Rows that one thread encodes at a time.
const ROWS: usize = 64;
/// Longest text or list that is taken from a plugin.
const MOST_TEXT: usize = 1 << 20;

/// Answers the questions of one run of one pass.
pub struct GraphHost<'r, 'a> {
    graph: &'r mut Graph,
    cx: &'r mut PassCx<'a>,
    handles: Handles,
    /// Bodies of custom ops, by space; `None` once the op has been added.
    bodies: Vec<Option<Body>>,
    buffers: BTreeMap<u64, Buffer>,
    /// The tensor read last, at which revision of the weights.
    last_read: Option<(String, u64, WeightValues)>,
    /// The first thing the pass did that it must not: the call and what was wrong.
    misused: Option<(String, String)>,
    /// What the pass says of its failure.
    failed: Option<String>,
    /// Whose fault the last question that failed was.
    family: Family,
    /// Why work within the compiler failed.
    own: Option<Error>,
}

struct Body {
    name: String,
    graph: Graph,
    /// Values of the graph that the op takes.
    inputs: Vec<ValueId>,
}

enum Buffer {
    View(WeightValues),
    Floats(Vec<f32>),
    Tokens(Vec<u32>),
    Statistics(crate::InputStatistics),
    Edit { tensor: String, shape: Vec<usize>, is_new: bool, values: Vec<f32> },
}

impl std::fmt::Debug for GraphHost<'_, '_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GraphHost").finish_non_exhaustive()
    }
}

impl<'r, 'a> GraphHost<'r, 'a> {
    /// A host for one run over a graph and its weights.
    pub fn new(graph: &'r mut Graph, cx: &'r mut PassCx<'a>) -> GraphHost<'r, 'a> {
        GraphHost {
            graph,
            cx,
            handles: Handles::new(),
            bodies: Vec::new(),
            buffers: BTreeMap::new(),
            last_read: None,
            misused: None,
            failed: None,
            family: Family::Input,
            own: None,
        }
    }

    /// The handle of the run.
    pub fn run(&self) -> u64 {
        self.handles.run()
    }

    /// Whether a handle is that of this run.
    pub fn is_run(&self, handle: u64) -> std::result::Result<(), &'static str> {
        self.handles.check(handle, Kind::Run)
    }

    /// Records that the pass did what it must not: it fails whatever it returns.
    pub fn misuse(&mut self, call: &'static str, problem: impl Into<String>) -> attar_plugin::Error {
        let problem = problem.into();
        self.misused.get_or_insert_with(|| (call.to_owned(), problem.clone()));
        attar_plugin::Error::of(attar_plugin::ErrorKind::Misuse, problem).in_call(call)
    }

    /// What a run came to, for a pass that is linked in; `plugin` is what messages call the crate. Its mistakes are the program's
    /// own. The manager verifies what it left behind.
    ///
    /// # Errors
    /// That of the work the pass did within the compiler; [`ErrorKind::Plugin`]; [`ErrorKind::Cancelled`].
    pub(super) fn finish_linked(mut self, plugin: &str, result: Result<()>) -> crate::Result<()> {
        let family = match &result {
            _ if self.misused.is_some() => Family::Bug,
            Err(e) if e.kind == attar_plugin::ErrorKind::Panic => Family::Bug,
            Err(e) if e.call.is_some() => self.family,
            _ => Family::Input,
        };
        match (self.own.take(), &result) {
            (Some(own), Err(_)) => Err(own),
            _ => self.outcome(plugin, result, family),
        }
    }

    /// What a run came to, for a pass of a library; `plugin` is what messages call it.
    ///
    /// # Errors
    /// [`ErrorKind::Plugin`] when the pass failed, or left an invalid graph behind; [`ErrorKind::Cancelled`].
    pub fn finish(self, plugin: &str, result: Result<()>) -> crate::Result<()> {
        let family = match self.family {
            Family::Environment if self.misused.is_none() => Family::Environment,
            _ => Family::Input,
        };
        self.outcome(plugin, result, family)?;
        let Err(e) = attar_ir::verify(self.graph, Some(self.cx.weights)) else { return Ok(()) };
        let after = self.cx.last_rewrite().map_or(String::new(), |r| format!(" after its rewrite of {r}"));
        let problem = format!("it left an invalid graph behind{after}: {e}");
        let plugin = plugin.to_owned();
        Err(Error::new(ErrorKind::Plugin { plugin, call: None, problem, family: Family::Input }))
    }

    fn outcome(&self, plugin: &str, result: Result<()>, family: Family) -> crate::Result<()> {
        self.cx.check_cancelled()?;
        let (call, problem) = match (&self.misused, result) {
            (Some((call, problem)), _) => (Some(call.clone()), problem.clone()),
            (None, Ok(())) => return Ok(()),
            (None, Err(e)) if e.kind == attar_plugin::ErrorKind::Cancelled => {
                return Err(Error::new(ErrorKind::Cancelled));
            }
            (None, Err(e)) => (e.call.map(str::to_owned), self.failed.clone().unwrap_or(e.message)),
        };
        let plugin = plugin.to_owned();
        Err(Error::new(ErrorKind::Plugin { plugin, call, problem, family }))
    }

    /// Graph and context for work within the compiler. No handle is good afterwards.
    pub(super) fn lend<T>(
        &mut self,
        work: impl FnOnce(&mut Graph, &mut PassCx<'_>) -> crate::Result<T>,
    ) -> Result<T> {
        let result = work(self.graph, self.cx);
        self.handles.forget_space(GRAPH);
        result.map_err(|own| {
            let e = self.pass("in_compiler", own.clone());
            self.own = Some(own);
            e
        })
    }

    // ---- handles

    fn space(&self, space: Space) -> Option<&Graph> {
        match space {
            GRAPH => Some(self.graph),
            _ => self.bodies.get(space - 1)?.as_ref().map(|b| &b.graph),
        }
    }

    fn space_mut(&mut self, space: Space) -> Option<&mut Graph> {
        match space {
            GRAPH => Some(self.graph),
            _ => self.bodies.get_mut(space - 1)?.as_mut().map(|b| &mut b.graph),
        }
    }

    fn find_node(&mut self, call: &'static str, node: Node) -> Result<(Space, NodeId)> {
        let found = self.handles.find(node.number(), Kind::Node);
        let found = found.and_then(|(space, id, _)| match self.space(space) {
            Some(graph) if graph.contains(id) => Ok((space, id)),
            _ => Err("its node is no more"),
        });
        found.map_err(|problem| self.misuse(call, format!("node {:#x}: {problem}", node.number())))
    }

    fn find_value(&mut self, call: &'static str, value: Value) -> Result<(Space, ValueId)> {
        let found = self.handles.find(value.number(), Kind::Value);
        let found = found.and_then(|(space, node, slot)| match self.space(space) {
            Some(graph) if !graph.contains(node) => Err("its node is no more"),
            Some(graph) if usize::from(slot) < graph.node(node).outputs.len() => {
                Ok((space, ValueId { node, slot }))
            }
            _ => Err("its node has no such output"),
        });
        found.map_err(|problem| self.misuse(call, format!("value {:#x}: {problem}", value.number())))
    }

    /// A value of the graph itself.
    fn find_outer(&mut self, call: &'static str, value: Value) -> Result<ValueId> {
        match self.find_value(call, value)? {
            (GRAPH, v) => Ok(v),
            _ => Err(refused(call, "a value inside of a custom op means nothing outside of it")),
        }
    }

    /// Values that all belong together.
    fn find_all(&mut self, call: &'static str, values: &[Value]) -> Result<(Space, Vec<ValueId>)> {
        let mut found = Vec::with_capacity(values.len());
        let mut space = None;
        for value in values {
            let (at, v) = self.find_value(call, *value)?;
            if *space.get_or_insert(at) != at {
                let problem =
                    "values of the graph and of a custom op's body; give the op all it takes as inputs";
                return Err(refused(call, problem));
            }
            found.push(v);
        }
        Ok((space.unwrap_or(GRAPH), found))
    }

    fn value(&mut self, space: Space, v: ValueId) -> Value {
        Value::from_number(self.handles.value(space, v.node, v.slot))
    }

    fn node(&mut self, space: Space, id: NodeId) -> Node {
        Node::from_number(self.handles.node(space, id))
    }

    // ---- errors

    fn ir(&mut self, call: &'static str, e: attar_ir::Error) -> attar_plugin::Error {
        let problem = e.to_string();
        self.family = Error::from(e).family();
        refused(call, problem)
    }

    fn pass(&mut self, call: &'static str, e: Error) -> attar_plugin::Error {
        self.family = e.family();
        let kind = match &*e.kind {
            ErrorKind::Cancelled => attar_plugin::ErrorKind::Cancelled,
            ErrorKind::Uncalibrated | ErrorKind::NoModel | ErrorKind::NoTokenizer { .. } => {
                attar_plugin::ErrorKind::Unavailable
            }
            _ => attar_plugin::ErrorKind::Failed,
        };
        attar_plugin::Error::of(kind, e.to_string()).in_call(call)
    }

    // ---- buffers and tensors

    fn hold<T>(&mut self, buffer: Buffer, data: impl Fn(&Buffer) -> &[T]) -> Held<T> {
        let number = self.handles.buffer();
        let kept = self.buffers.entry(number).or_insert(buffer);
        let slice = data(kept);
        Held { data: slice.as_ptr(), len: slice.len(), buffer: number }
    }

    fn edit_of(&mut self, tensor: &str, shape: Vec<usize>, is_new: bool, values: Vec<f32>) -> HeldMut {
        let number = self.handles.buffer();
        let edit = Buffer::Edit { tensor: tensor.to_owned(), shape, is_new, values };
        match self.buffers.entry(number).or_insert(edit) {
            Buffer::Edit { values, .. } => {
                HeldMut { data: values.as_mut_ptr(), len: values.len(), buffer: number }
            }
            _ => HeldMut { data: std::ptr::null_mut(), len: 0, buffer: number },
        }
    }

    /// Nodes of a tensor, with its name as the graph has it.
    fn nodes_of(&self, tensor: &str) -> (Option<WeightName>, Vec<NodeId>) {
        let of = self.graph.weights().filter(|(_, w)| &*w.name == tensor);
        let nodes: Vec<(NodeId, WeightName)> = of.map(|(id, w)| (id, w.name.clone())).collect();
        (nodes.first().map(|(_, n)| n.clone()), nodes.into_iter().map(|(id, _)| id).collect())
    }

    /// Whether a new tensor may have that name.
    fn check_fresh(&self, call: &'static str, tensor: &str) -> Result<()> {
        if tensor.is_empty() || self.cx.weights.contains(tensor) {
            let problem = format!("the name {tensor:?} is taken; give a new tensor one of its own");
            return Err(refused(call, problem));
        }
        Ok(())
    }

    /// Makes the handles of nodes stale that are no more.
    fn forget_removed(&mut self, space: Space) {
        let gone = self.handles.nodes_of(space);
        let gone: Vec<NodeId> = match self.space(space) {
            Some(graph) => gone.filter(|id| !graph.contains(*id)).collect(),
            None => gone.collect(),
        };
        gone.into_iter().for_each(|id| self.handles.forget(space, id));
    }

    /// Shape of an uncompressed matrix, as a format asks for.
    fn matrix(&mut self, call: &'static str, tensor: &str, format: FormatRef) -> Result<(usize, usize)> {
        let info = match self.cx.weights.info(tensor) {
            Ok(info) => info.clone(),
            Err(e) => return Err(self.ir(call, e)),
        };
        if let Elem::Coded(has) = info.elem {
            return Err(refused(call, format!("tensor {tensor} is stored as {} already", has.name)));
        }
        let [n, k] = info.shape[..] else {
            return Err(refused(
                call,
                format!("tensor {tensor} is no matrix; only matrices are stored in formats"),
            ));
        };
        if !k.is_multiple_of(format.group) {
            let problem = format!(
                "tensor {tensor}: its rows of {k} are no multiple of {}, as {} wants",
                format.group, format.name
            );
            return Err(refused(call, problem));
        }
        Ok((n, k))
    }

    /// Stores codes, and records what they cost.
    fn store(&mut self, call: &'static str, tensor: &str, encoded: &Encoded, error: f64) -> Result<()> {
        let (n, k, format) = (encoded.n, encoded.k, encoded.format);
        let stored = self.cx.weights.set_encoded(tensor, encoded).map_err(|e| {
            self.family = Family::Environment;
            refused(call, e.to_string())
        })?;
        let ty = TensorType::new(Elem::coded(format), [n.into(), k.into()]);
        for node in self.nodes_of(tensor).1 {
            let set = self.graph.set_weight(node, stored.clone(), ty.clone());
            set.map_err(|e| refused(call, e.to_string()))?;
        }
        let bytes = PackedLayout::new(format, n, k).map_or(0, |l| l.total_bytes());
        self.cx.metric(
            tensor,
            [
                ("format", format.name.into()),
                ("relative_rmse", error.into()),
                ("bits_per_weight", (8.0 * bytes as f64 / (n as f64 * k as f64)).into()),
                ("bytes", (bytes as u64).into()),
            ],
        );
        Ok(())
    }

    /// Codes of a built-in format, as the pass of the compiler chooses them.
    fn round_to_nearest(&mut self, call: &'static str, tensor: &str, format: FormatRef) -> Result<f64> {
        let Some(decl) = registered().into_iter().find(|d| d.name == "quantize-rtn") else {
            return Err(refused(
                call,
                "this build has no quantize-rtn, which chooses codes of built-in formats",
            ));
        };
        let before = self.cx.metrics().len();
        let run = || -> crate::Result<()> {
            let given = [("format".to_owned(), OptionValue::Text(format.name.to_owned()))];
            let options = Options::new(decl, &given)?;
            let tensors = TensorGlobs::new(&[tensor.to_owned()], &[])?;
            self.cx.run_within(self.graph, decl, &options, &tensors)
        };
        let result = { run }();
        result.map_err(|e| self.pass(call, e))?;
        let made = self.cx.metrics().iter().skip(before).rev();
        let error = made.filter(|m| m.subject == tensor).find_map(|m| match m.values.get("relative_rmse") {
            Some(MetricValue::Number(error)) => Some(*error),
            _ => None,
        });
        Ok(error.unwrap_or(0.0))
    }

    fn format(&self, call: &'static str, name: &str) -> Result<FormatRef> {
        attar_format::by_name(name).ok_or_else(|| refused(call, format!("no format is called {name}")))
    }
}

/// An error that is no fault of handles or sizes.
fn refused(call: &'static str, problem: impl Into<String>) -> attar_plugin::Error {
    attar_plugin::Error::new(problem).in_call(call)
}

fn dim_of(dim: attar_ir::Dim) -> Dim {
    match dim {
        attar_ir::Dim::Fixed(n) => Dim::Fixed(n),
        attar_ir::Dim::Sym(Sym::T) => Dim::Tokens,
        attar_ir::Dim::Sym(Sym::R) => Dim::Rows,
        attar_ir::Dim::Sym(Sym::S) => Dim::Context,
    }
}

fn ir_dim(dim: Dim) -> attar_ir::Dim {
    match dim {
        Dim::Fixed(n) => attar_ir::Dim::Fixed(n),
        Dim::Tokens => attar_ir::Dim::Sym(Sym::T),
        Dim::Rows => attar_ir::Dim::Sym(Sym::R),
        Dim::Context => attar_ir::Dim::Sym(Sym::S),
    }
}

fn attr_of(attr: attar_ir::Attr) -> Attr {
    match attr {
        attar_ir::Attr::Bool(v) => Attr::Bool(v),
        attar_ir::Attr::Int(v) => Attr::Int(v),
        attar_ir::Attr::Float(v) => Attr::Float(v),
        attar_ir::Attr::Str(v) => Attr::Text(v),
        attar_ir::Attr::Floats(v) => Attr::Floats(v),
        attar_ir::Attr::Dims(v) => Attr::Dims(v.into_iter().map(dim_of).collect()),
    }
}

fn ir_attr(attr: &Attr) -> attar_ir::Attr {
    match attr {
        Attr::Bool(v) => attar_ir::Attr::Bool(*v),
        Attr::Int(v) => attar_ir::Attr::Int(*v),
        Attr::Float(v) => attar_ir::Attr::Float(*v),
        Attr::Text(v) => attar_ir::Attr::Str(v.clone()),
        Attr::Floats(v) => attar_ir::Attr::Floats(v.clone()),
        Attr::Dims(v) => attar_ir::Attr::Dims(v.iter().map(|d| ir_dim(*d)).collect()),
    }
}

/// `|w - decoded| / |w|`; 0 for a zero matrix.
fn relative_error(weights: &[f32], encoded: &Encoded) -> f64 {
    let per_row = weights.par_chunks(encoded.k).enumerate().map(|(row, w)| {
        let mut decoded = vec![0.0; encoded.k];
        encoded.decode_row(row, &mut decoded);
        w.iter().zip(&decoded).fold((0.0, 0.0), |(error, square), (w, d)| {
            let (w, d) = (f64::from(*w), f64::from(*d));
            (error + (w - d) * (w - d), square + w * w)
        })
    });
    // Added in order: the sum must not depend on threads.
    let per_row: Vec<(f64, f64)> = per_row.collect();
    let (error, square) = per_row.iter().fold((0.0, 0.0), |(e, s), (a, b)| (e + a, s + b));
    if square > 0.0 { (error / square).sqrt() } else { 0.0 }
}

// SAFETY: pointers are to vectors and mappings that `buffers` keeps as they are until the buffer is released: nothing else
// refers to those of edits, and the others are never written to. Moving a `Buffer` does not move what it points to.
unsafe impl Host for GraphHost<'_, '_> {
    fn fail(&mut self, message: &str) -> Result<()> {
        self.failed = Some(message.chars().take(MOST_TEXT).collect());
        Ok(())
    }

    fn log(&mut self, level: Level, message: &str) -> Result<()> {
        let level = match level {
            Level::Debug => NoteLevel::Debug,
            Level::Info => NoteLevel::Info,
            Level::Warning => NoteLevel::Warning,
        };
        self.cx.note(level, message);
        Ok(())
    }

    fn progress(&mut self, what: &str, done: u64, total: u64) -> Result<()> {
        self.cx.check_cancelled().map_err(|e| self.pass("progress", e))?;
        self.cx.progress(what, done, total);
        Ok(())
    }

    fn metric(&mut self, subject: &str, values: &[(&str, Metric)]) -> Result<()> {
        let value = |metric: &Metric| match metric {
            Metric::Count(n) => Ok(MetricValue::Count(*n)),
            Metric::Number(x) if x.is_finite() => Ok(MetricValue::Number(*x)),
            Metric::Number(x) => Err(refused("metric", format!("{x} is no measured value"))),
            Metric::Text(text) => Ok(MetricValue::Text(text.clone())),
        };
        let values = values.iter().map(|(name, m)| Ok(((*name).to_owned(), value(m)?)));
        self.cx.certified_metric(subject, values.collect::<Result<_>>()?);
        Ok(())
    }

    fn rewrite(&mut self, site: &str) -> Result<bool> {
        self.cx.check_cancelled().map_err(|e| self.pass("rewrite", e))?;
        Ok(self.cx.rewrite(site))
    }

    fn seed(&mut self) -> Result<u64> {
        Ok(self.cx.seed)
    }

    fn release(&mut self, buffer: u64) -> Result<()> {
        if let Err(problem) = self.handles.check(buffer, Kind::Buffer) {
            return Err(self.misuse("release", format!("buffer {buffer:#x}: {problem}")));
        }
        match self.buffers.remove(&buffer) {
            Some(_) => Ok(()),
            None => Err(self.misuse("release", format!("buffer {buffer:#x}: it was released before"))),
        }
    }

    fn graph_text(&mut self) -> Result<String> {
        Ok(attar_ir::text::print(self.graph))
    }

    fn nodes(&mut self) -> Result<Vec<Node>> {
        Ok(self.graph.topo().into_iter().map(|id| self.node(GRAPH, id)).collect())
    }

    fn inputs(&mut self) -> Result<Vec<Value>> {
        let inputs = self.graph.inputs().to_vec();
        Ok(inputs.into_iter().map(|node| self.value(GRAPH, ValueId { node, slot: 0 })).collect())
    }

    fn outputs(&mut self) -> Result<Vec<Value>> {
        Ok(self.graph.outputs().to_vec().into_iter().map(|v| self.value(GRAPH, v)).collect())
    }

    fn set_outputs(&mut self, values: &[Value]) -> Result<()> {
        let outputs = values.iter().map(|v| self.find_outer("set_outputs", *v)).collect::<Result<_>>()?;
        self.graph.set_outputs(outputs);
        Ok(())
    }

    fn node_by_name(&mut self, name: &str) -> Result<Node> {
        match self.graph.by_name(name) {
            Some(id) => Ok(self.node(GRAPH, id)),
            None => Err(refused("node_by_name", format!("no node is called {name}"))),
        }
    }

    fn node_info(&mut self, node: Node) -> Result<NodeInfo> {
        let (space, id) = self.find_node("node_info", node)?;
        let Some(graph) = self.space(space) else { return Err(self.misuse("node_info", "no such node")) };
        let node = graph.node(id);
        let target = match &node.op {
            OpKind::Weight(w) => w.name.to_string(),
            OpKind::Custom(c) => c.name().to_owned(),
            _ => String::new(),
        };
        Ok(NodeInfo {
            op: node.op.name().to_owned(),
            name: node.name.clone(),
            target,
            inputs: graph.inputs_of(id).len(),
            outputs: node.outputs.len(),
            attrs: node.op.attrs().list.len(),
        })
    }

    fn node_inputs(&mut self, node: Node) -> Result<Vec<Value>> {
        let (space, id) = self.find_node("node_inputs", node)?;
        let inputs = self.space(space).map_or_else(Vec::new, |g| g.inputs_of(id));
        Ok(inputs.into_iter().map(|v| self.value(space, v)).collect())
    }

    fn node_output(&mut self, node: Node, slot: usize) -> Result<Value> {
        let (space, node) = self.find_node("node_output", node)?;
        let count = self.space(space).map_or(0, |g| g.node(node).outputs.len());
        match u16::try_from(slot) {
            Ok(slot) if usize::from(slot) < count => Ok(self.value(space, ValueId { node, slot })),
            _ => Err(refused("node_output", format!("the node has {count} outputs, and no output {slot}"))),
        }
    }

    fn node_attr(&mut self, node: Node, index: usize) -> Result<(String, Attr)> {
        let (space, id) = self.find_node("node_attr", node)?;
        let attrs = self.space(space).map(|g| g.op(id).attrs().list).unwrap_or_default();
        let count = attrs.len();
        match attrs.into_iter().nth(index) {
            Some((name, attr)) => Ok((name, attr_of(attr))),
            None => Err(refused("node_attr", format!("the node has {count} attributes, and no {index}"))),
        }
    }

    fn value_node(&mut self, value: Value) -> Result<Node> {
        let (space, v) = self.find_value("value_node", value)?;
        Ok(self.node(space, v.node))
    }

    fn value_type(&mut self, value: Value) -> Result<Type> {
        let (space, v) = self.find_value("value_type", value)?;
        let Some(graph) = self.space(space) else { return Err(self.misuse("value_type", "no such value")) };
        let ty = graph.ty(v);
        Ok(Type { elem: ty.elem.name().to_owned(), dims: ty.shape.iter().map(|d| dim_of(*d)).collect() })
    }

    fn value_uses(&mut self, value: Value) -> Result<Vec<(Node, usize)>> {
        let (space, v) = self.find_value("value_uses", value)?;
        let users = self.space(space).map_or_else(Vec::new, |g| g.users(v));
        Ok(users.into_iter().map(|(id, slot)| (self.node(space, id), usize::from(slot))).collect())
    }

    fn add_node(&mut self, op: &str, name: &str, inputs: &[Value], attrs: &[(&str, Attr)]) -> Result<Node> {
        const CALL: &str = "add_node";
        if op == "weight" || op == "input" {
            return Err(refused(CALL, format!("{op} is no op to add; weights are added with add_weight")));
        }
        let (space, inputs) = self.find_all(CALL, inputs)?;
        let list = attrs.iter().fold(Attrs::new(op), |all, (name, attr)| all.with(name, ir_attr(attr)));
        let kind = OpKind::from_attrs(op, list).map_err(|e| self.ir(CALL, e))?;
        let name = (!name.is_empty()).then_some(name);
        let added = match self.space_mut(space) {
            Some(graph) => graph.add_named(kind, &inputs, name),
            None => return Err(refused(CALL, "the custom op these values belong to has ended")),
        };
        let id = added.map_err(|e| self.ir(CALL, e))?;
        Ok(self.node(space, id))
    }

    fn add_weight(&mut self, tensor: &str) -> Result<Value> {
        let info = self.cx.weights.info(tensor).cloned().map_err(|e| self.ir("add_weight", e))?;
        let ty = TensorType::new(info.elem, info.shape.iter().map(|d| (*d).into()));
        let name = self.nodes_of(tensor).0.unwrap_or_else(|| tensor.into());
        let v = self.graph.add_weight(&name, ty);
        Ok(self.value(GRAPH, v))
    }

    fn replace_uses(&mut self, old: Value, new: Value) -> Result<()> {
        const CALL: &str = "replace_uses";
        let (space, values) = self.find_all(CALL, &[old, new])?;
        let Some(graph) = self.space_mut(space) else { return Err(refused(CALL, "the custom op has ended")) };
        graph.replace_uses(values[0], values[1]).map_err(|e| self.ir(CALL, e))
    }

    fn remove_node(&mut self, node: Node) -> Result<()> {
        const CALL: &str = "remove_node";
        let (space, id) = self.find_node(CALL, node)?;
        let Some(graph) = self.space_mut(space) else { return Err(refused(CALL, "the custom op has ended")) };
        graph.remove(id).map_err(|e| self.ir(CALL, e))?;
        self.handles.forget(space, id);
        Ok(())
    }

    fn custom_begin(&mut self, name: &str, inputs: &[Value]) -> Result<Vec<Value>> {
        const CALL: &str = "custom_begin";
        if name.is_empty() {
            return Err(refused(CALL, "a custom op needs a name"));
        }
        let outer = inputs.iter().map(|v| self.find_outer(CALL, *v)).collect::<Result<Vec<_>>>()?;
        let mut graph = Graph::new(name);
        let mut inside = Vec::with_capacity(outer.len());
        for (i, v) in outer.iter().enumerate() {
            inside.push(graph.add_input(&format!("in{i}"), self.graph.ty(*v).clone()));
        }
        self.bodies.push(Some(Body { name: name.to_owned(), graph, inputs: outer }));
        let space = self.bodies.len();
        Ok(inside.into_iter().map(|v| self.value(space, v)).collect())
    }

    fn custom_end(&mut self, outputs: &[Value]) -> Result<Node> {
        const CALL: &str = "custom_end";
        let (space, outputs) = self.find_all(CALL, outputs)?;
        let body = match space {
            GRAPH => None,
            _ => self.bodies.get_mut(space - 1).and_then(Option::take),
        };
        let Some(mut body) = body else {
            return Err(refused(CALL, "a custom op gives values of its own body"));
        };
        self.handles.forget_space(space);
        body.graph.set_outputs(outputs);
        let op = Custom::new(&body.name, body.graph).map_err(|e| self.ir(CALL, e))?;
        let id = self.graph.add(op, &body.inputs).map_err(|e| self.ir(CALL, e))?;
        Ok(self.node(GRAPH, id))
    }

    fn tensors(&mut self, all: bool) -> Result<Vec<String>> {
        let subjects = if all { graph_weights(self.graph) } else { self.cx.subjects(self.graph) };
        Ok(subjects.into_iter().map(|s| s.name.to_string()).collect())
    }

    fn tensor_info(&mut self, tensor: &str) -> Result<TensorInfo> {
        let is_explicit = self.cx.tensors.names_exactly(tensor);
        match self.cx.weights.info(tensor) {
            Ok(info) => Ok(TensorInfo {
                shape: info.shape.clone(),
                elem: info.elem.name().to_owned(),
                stored_as: info.stored_as.clone(),
                is_explicit,
            }),
            Err(e) => Err(self.ir("tensor_info", e)),
        }
    }

    fn tensor_read(&mut self, tensor: &str, first: u64, rows: u64) -> Result<Held<f32>> {
        const CALL: &str = "tensor_read";
        let shape = match self.cx.weights.info(tensor) {
            Ok(info) => info.shape.clone(),
            Err(e) => return Err(self.ir(CALL, e)),
        };
        let width: usize = shape.iter().skip(1).product();
        let count = shape.first().copied().unwrap_or(1);
        let first = usize::try_from(first).unwrap_or(usize::MAX).min(count);
        let end = first.saturating_add(usize::try_from(rows).unwrap_or(usize::MAX)).min(count);
        // Whoever reads row by row reads the same tensor again, which may have to be decoded.
        let revision = self.cx.weights.revision();
        let view = match &self.last_read {
            Some((name, at, view)) if name == tensor && *at == revision => view.clone(),
            _ => self.cx.weights.view_f32(tensor).map_err(|e| self.ir(CALL, e))?,
        };
        self.last_read = Some((tensor.to_owned(), revision, view.clone()));
        Ok(self.hold(Buffer::View(view), |b| match b {
            Buffer::View(view) => view.get(first * width..end * width).unwrap_or(&[]),
            _ => &[],
        }))
    }

    fn tensor_edit(&mut self, tensor: &str) -> Result<HeldMut> {
        const CALL: &str = "tensor_edit";
        let info = self.cx.weights.info(tensor).cloned().map_err(|e| self.ir(CALL, e))?;
        if info.elem != Elem::F32 {
            let has = info.elem.name();
            return Err(refused(
                CALL,
                format!("tensor {tensor} is stored as {has} already; run the pass before that"),
            ));
        }
        let values = self.cx.weights.read_f32(tensor).map_err(|e| self.ir(CALL, e))?;
        Ok(self.edit_of(tensor, info.shape, false, values))
    }

    fn tensor_create(&mut self, tensor: &str, shape: &[usize]) -> Result<HeldMut> {
        const CALL: &str = "tensor_create";
        self.check_fresh(CALL, tensor)?;
        let size = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d)).filter(|n| *n > 0);
        let ty = TensorType::f32(shape.iter().map(|d| (*d).into()));
        let Some(size) = size.filter(|_| ty.is_bounded() && !shape.is_empty()) else {
            return Err(refused(CALL, format!("no tensor has shape {shape:?}")));
        };
        let mut values = Vec::new();
        if values.try_reserve_exact(size).is_err() {
            self.family = Family::Environment;
            return Err(refused(CALL, format!("there is no memory for {size} values")));
        }
        values.resize(size, 0.0);
        Ok(self.edit_of(tensor, shape.to_vec(), true, values))
    }

    fn tensor_commit(&mut self, buffer: u64) -> Result<()> {
        const CALL: &str = "tensor_commit";
        if let Err(problem) = self.handles.check(buffer, Kind::Buffer) {
            return Err(self.misuse(CALL, format!("buffer {buffer:#x}: {problem}")));
        }
        let bad = match self.buffers.get(&buffer) {
            Some(Buffer::Edit { tensor, values, .. }) => values
                .iter()
                .find(|v| !v.is_finite())
                .map(|v| refused(CALL, format!("tensor {tensor} would hold {v}"))),
            Some(_) => Some(self.misuse(CALL, format!("buffer {buffer:#x}: it is for reading"))),
            None => Some(self.misuse(CALL, format!("buffer {buffer:#x}: it was released before"))),
        };
        if let Some(e) = bad {
            return Err(e);
        }
        let Some(Buffer::Edit { tensor, shape, is_new, values }) = self.buffers.remove(&buffer) else {
            return Ok(());
        };
        let done = if is_new {
            self.cx.weights.add_spilled(&tensor, &shape, values)
        } else {
            self.cx.weights.replace_values(&tensor, values)
        };
        done.map(|_| ()).map_err(|e| self.ir(CALL, e))
    }

    fn tensor_set_format(&mut self, tensor: &str, format: &str, importance: Option<&[f32]>) -> Result<f64> {
        const CALL: &str = "tensor_set_format";
        let format = self.format(CALL, format)?;
        let (n, k) = self.matrix(CALL, tensor, format)?;
        if importance.is_some_and(|i| i.len() != k || i.iter().any(|v| !v.is_finite() || *v < 0.0)) {
            let problem = format!("importance: expected {k} numbers of 0 or more, one for each column");
            return Err(refused(CALL, problem));
        }
        if !is_described(format) {
            return self.round_to_nearest(CALL, tensor, format);
        }
        let weights = self.cx.weights.view_f32(tensor).map_err(|e| self.ir(CALL, e))?;
        if let Some(at) = weights.iter().position(|w| !w.is_finite()) {
            return Err(refused(CALL, format!("tensor {tensor} holds {} at row {}", weights[at], at / k)));
        }
        let parts =
            weights.par_chunks(ROWS * k).map(|w| Encoded::nearest(format, w.len() / k, k, w, importance));
        let parts = parts.collect::<std::result::Result<Vec<_>, _>>();
        let joined = parts.and_then(|p| Encoded::concat_rows(&p.iter().collect::<Vec<_>>()));
        let encoded = joined.map_err(|e| refused(CALL, e.to_string()))?;
        debug_assert_eq!(encoded.n, n);
        let error = relative_error(&weights, &encoded);
        drop(weights);
        self.store(CALL, tensor, &encoded, error)?;
        Ok(error)
    }

    fn tensor_set_codes(&mut self, tensor: &str, codes: &attar_plugin::Encoded<'_>) -> Result<()> {
        const CALL: &str = "tensor_set_codes";
        let format = self.format(CALL, codes.format)?;
        let (n, k) = self.matrix(CALL, tensor, format)?;
        if (codes.n, codes.k) != (n, k) {
            let problem =
                format!("codes of [{}, {}] for tensor {tensor}, which is [{n}, {k}]", codes.n, codes.k);
            return Err(self.misuse(CALL, problem));
        }
        if format.is_uncompressed() {
            let problem = format!("{} has no codes to choose; use tensor_set_format", format.name);
            return Err(refused(CALL, problem));
        }
        let mut encoded = Encoded::zeros(format, n, k).map_err(|e| refused(CALL, e.to_string()))?;
        let lengths = [
            ("codes", encoded.codes.len(), codes.codes.len()),
            ("fields", encoded.field.len(), codes.fields.len()),
            ("row_scales", encoded.row_scale.len(), codes.row_scales.len()),
        ];
        for (what, expected, got) in lengths {
            if expected != got {
                return Err(
                    self.misuse(CALL, format!("{what}: {} wants {expected} of them, got {got}", format.name))
                );
            }
        }
        encoded.codes.copy_from_slice(codes.codes);
        encoded.field.copy_from_slice(codes.fields);
        encoded.row_scale.copy_from_slice(codes.row_scales);
        if let Some((entries, shift)) = codes.table {
            let count = format.table().map_or(0, |t| 1usize << t.bits);
            if entries.len() != count {
                return Err(self.misuse(
                    CALL,
                    format!("table: {} has {count} entries, got {}", format.name, entries.len()),
                ));
            }
            if matches!(format.scale, Scale::Bf16) && shift != 0 {
                return Err(refused(CALL, "a shift needs choices, which bf16 scales leave no room for"));
            }
            encoded.table[..count].copy_from_slice(entries);
            encoded.shift = shift;
        }
        check_codes(&encoded).map_err(|problem| refused(CALL, problem))?;
        let weights = self.cx.weights.view_f32(tensor).map_err(|e| self.ir(CALL, e))?;
        let error = relative_error(&weights, &encoded);
        drop(weights);
        self.store(CALL, tensor, &encoded, error)
    }

    fn format_info(&mut self, name: &str) -> Result<FormatInfo> {
        let format = self.format("format_info", name)?;
        let kind = match (format.value, format.table()) {
            (_, Some(t)) => FormatKind::Table { entries: t.entries.to_vec(), shift: t.shift },
            (attar_format::Value::Int8, _) => FormatKind::Int8,
            _ => FormatKind::Float,
        };
        let row_fields = match format.scale {
            Scale::RowF32Field8 { bias, choice_bits } => Some((bias, choice_bits)),
            Scale::None | Scale::Bf16 => None,
        };
        Ok(FormatInfo {
            name: format.name.to_owned(),
            source: format.source.to_owned(),
            bits: format.code_bits(),
            group: format.group,
            kind,
            row_fields,
        })
    }

    fn statistics(&mut self, value: Value) -> Result<HeldStatistics> {
        const CALL: &str = "statistics";
        let v = self.find_outer(CALL, value)?;
        if !self.graph.ty(v).elem.is_float() || self.graph.ty(v).last().is_none() {
            let ty = self.graph.ty(v).to_string();
            return Err(refused(CALL, format!("a value of type {ty} has no statistics")));
        }
        let statistics = self.cx.input_statistics(self.graph, v).map_err(|e| self.pass(CALL, e))?;
        let number = self.handles.buffer();
        match self.buffers.entry(number).or_insert(Buffer::Statistics(statistics)) {
            Buffer::Statistics(s) => Ok(HeldStatistics {
                n_tokens: s.n_tokens,
                width: s.width,
                second_moment: s.second_moment.as_ptr(),
                minimum: s.minimum.as_ptr(),
                maximum: s.maximum.as_ptr(),
                buffer: number,
            }),
            _ => Err(refused(CALL, "the buffer is taken")),
        }
    }

    fn calibration_window(&mut self, index: usize) -> Result<(Held<u32>, usize)> {
        let asked = self.cx.calibration_window(index);
        let (tokens, count) = asked.map_err(|e| self.pass("calibration_window", e))?;
        Ok((self.hold_tokens(tokens), count))
    }

    fn tokenize(&mut self, text: &str) -> Result<Held<u32>> {
        let tokens = self.cx.tokenize(text).map_err(|e| self.pass("tokenize", e))?;
        Ok(self.hold_tokens(tokens))
    }

    fn run_model(&mut self, tokens: &[u32], value: Option<Value>) -> Result<Held<f32>> {
        const CALL: &str = "run_model";
        let v = match value {
            Some(value) => self.find_outer(CALL, value)?,
            None => match self.graph.outputs().first() {
                Some(v) => *v,
                None => return Err(refused(CALL, "the graph has no output")),
            },
        };
        if !self.graph.ty(v).elem.is_float() || self.graph.node(v.node).outputs.len() != 1 {
            return Err(refused(CALL, "only real values of nodes with one output can be looked at"));
        }
        if tokens.is_empty() {
            return Err(refused(CALL, "there is nothing to run over: no tokens"));
        }
        let values = self.cx.run_model(self.graph, tokens, v).map_err(|e| self.pass(CALL, e))?;
        Ok(self.hold(Buffer::Floats(values), |b| match b {
            Buffer::Floats(values) => values,
            _ => &[],
        }))
    }

    fn refused(&mut self, subject: &str, reason: &str) -> Result<()> {
        self.cx.refused(subject, reason);
        Ok(())
    }

    fn replace_node(&mut self, node: Node, values: &[Value]) -> Result<()> {
        const CALL: &str = "replace_node";
        let (space, id) = self.find_node(CALL, node)?;
        let (from, with) = self.find_all(CALL, values)?;
        if from != space || with.iter().any(|v| v.node == id) {
            return Err(refused(CALL, "the values are the node's own, or of another graph"));
        }
        let replaced = self.space_mut(space).map_or(Ok(()), |graph| graph.replace_and_clean(id, &with));
        self.forget_removed(space);
        replaced.map_err(|e| self.ir(CALL, e))
    }

    fn remove_unused(&mut self, node: Node) -> Result<()> {
        const CALL: &str = "remove_unused";
        let (space, id) = self.find_node(CALL, node)?;
        let removed = self.space_mut(space).map_or(Ok(()), |graph| graph.remove_unused(id));
        self.forget_removed(space);
        removed.map_err(|e| self.ir(CALL, e))
    }

    fn node_evaluate(&mut self, node: Node, tensor: &str) -> Result<()> {
        const CALL: &str = "node_evaluate";
        let (space, id) = self.find_node(CALL, node)?;
        self.check_fresh(CALL, tensor)?;
        if space != GRAPH
            || !self.graph.op(id).is_pure()
            || self.graph.node(id).outputs.len() != 1
            || self.graph.inputs_of(id).is_empty()
        {
            return Err(refused(
                CALL,
                "only nodes of the graph with inputs, one output and no effect are computed",
            ));
        }
        let mut inputs = Vec::new();
        for v in self.graph.inputs_of(id) {
            let OpKind::Weight(Weight { name, .. }) = self.graph.op(v.node).clone() else {
                return Err(refused(CALL, "it takes what is known when the model runs only"));
            };
            let info = self.cx.weights.info(&name).cloned().map_err(|e| self.ir(CALL, e))?;
            if info.elem != Elem::F32 {
                let has = info.elem.name();
                return Err(refused(CALL, format!("tensor {name} is stored as {has} already")));
            }
            let values = self.cx.weights.read_f32(&name).map_err(|e| self.ir(CALL, e))?;
            inputs.push(Tensor::real(info.shape, values.into_iter().map(f64::from).collect()));
        }
        let mut cache = KvState::default();
        let mut cx =
            EvalCx { weights: self.cx.weights, cache: &mut cache, seqs: &[], sizes: Sizes::default() };
        let results = self.graph.op(id).eval(&mut cx, &inputs).map_err(|e| self.ir(CALL, e))?;
        let Some(result) = results.first() else { return Err(refused(CALL, "the node gives nothing")) };
        let values = result.as_real().iter().map(|v| *v as f32).collect();
        self.cx.weights.add_values(tensor, &result.shape, values);
        Ok(())
    }

    fn tensor_stack(&mut self, tensor: &str, parts: &[&str]) -> Result<bool> {
        const CALL: &str = "tensor_stack";
        self.check_fresh(CALL, tensor)?;
        let mut first: Option<WeightInfo> = None;
        for part in parts {
            let info = self.cx.weights.info(part).cloned().map_err(|e| self.ir(CALL, e))?;
            let first = first.get_or_insert_with(|| info.clone());
            if info.elem != first.elem || info.shape.get(1..) != first.shape.get(1..) {
                return Ok(false);
            }
        }
        let Some(first) = first else { return Err(refused(CALL, "there is nothing to stack")) };
        if matches!(first.elem, Elem::Coded(format) if format.table().is_some()) {
            let mut table = None;
            for part in parts {
                let coded = self.cx.weights.read_encoded(part).map_err(|e| self.ir(CALL, e))?;
                if *table.get_or_insert((coded.table, coded.shift)) != (coded.table, coded.shift) {
                    return Ok(false);
                }
            }
        }
        let names: Vec<WeightName> = parts.iter().map(|p| (*p).into()).collect();
        self.cx.weights.add_concat_rows(tensor, &names).map_err(|e| self.ir(CALL, e))?;
        Ok(true)
    }

    fn native(&mut self) -> Option<Native> {
        Some(Native { of: TypeId::of::<GraphHost<'static, 'static>>(), at: (&raw mut *self).cast() })
    }
}

impl GraphHost<'_, '_> {
    fn hold_tokens(&mut self, tokens: Vec<u32>) -> Held<u32> {
        self.hold(Buffer::Tokens(tokens), |b| match b {
            Buffer::Tokens(tokens) => tokens,
            _ => &[],
        })
    }
}

/// Whether codes, fields and scales are such as kernels expect.
fn check_codes(e: &Encoded) -> std::result::Result<(), String> {
    let most = match e.format.table() {
        Some(table) => (1u16 << table.bits) as u8 - 1,
        None => u8::MAX,
    };
    let is_int8 = e.format.table().is_none();
    if let Some(code) = e.codes.iter().find(|c| **c > most || (is_int8 && **c == 0x80)) {
        return Err(format!("codes: {code} is no code of {}", e.format.name));
    }
    match e.format.scale {
        Scale::Bf16 if e.field.iter().any(|f| f & 0x7f80 == 0x7f80) => {
            Err("fields: a scale is infinite or no number".to_owned())
        }
        Scale::RowF32Field8 { .. } if e.field.iter().any(|f| *f > 0xff) => {
            Err("fields: a field byte is above 255".to_owned())
        }
        _ if e.row_scale.iter().any(|s| !s.is_finite()) => Err("row_scales: one is not finite".to_owned()),
        _ => {
            let (least, largest) = e.table.iter().fold((0, 0), |(l, m), t| (l.min(*t), m.max(*t)));
            let choices = match e.format.scale {
                Scale::RowF32Field8 { choice_bits, .. } => (1 << choice_bits) - 1,
                _ => 0,
            };
            let moved = i32::from(e.shift) * choices;
            let ends = [i32::from(least) + moved.min(0), i32::from(largest) + moved.max(0)];
            if ends.iter().any(|v| v.abs() > 127) {
                return Err("table: entries leave -127..=127 where choices move them".to_owned());
            }
            Ok(())
        }
    }
}
