//! What a pass sees: the graph, tensors, calibration, the model at work, and whoever waits for the result.

use crate::error::{Error, ErrorKind, Result};
use crate::host::{
    Attr, Encoded, FormatInfo, Held, HeldMut, HeldStatistics, Host, Level, Metric, Native, Node, NodeInfo,
    TensorInfo, Type, Value,
};
use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

/// Everything a pass may use while it runs.
///
/// Changes take effect at once and are taken back when the pass fails. Nodes and values are numbers that mean something to this
/// run alone. What is read from a tensor can be looked at while tensors change.
pub struct Context<'h> {
    host: RefCell<&'h mut dyn Host>,
}

impl std::fmt::Debug for Context<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context").finish_non_exhaustive()
    }
}

impl<'h> Context<'h> {
    /// A context over a host.
    pub fn new(host: &'h mut dyn Host) -> Context<'h> {
        Context { host: RefCell::new(host) }
    }

    /// Asks the host. It never calls back, so it is never asked while it answers.
    fn ask<T>(&self, question: impl FnOnce(&mut dyn Host) -> Result<T>) -> Result<T> {
        match self.host.try_borrow_mut() {
            Ok(mut host) => question(&mut **host),
            Err(_) => Err(Error::of(ErrorKind::Misuse, "the host was asked while it answered")),
        }
    }

    /// Lends the host by its own type to what is linked into the same program; see [`Host::native`].
    #[doc(hidden)]
    pub fn native<T>(&self, work: impl FnOnce(Native) -> Result<T>) -> Result<T> {
        self.ask(|h| match h.native() {
            Some(native) => work(native),
            None => {
                let problem = "the pass works only where it is linked into the compiler";
                Err(Error::of(ErrorKind::Unavailable, problem))
            }
        })
    }

    // ---- whoever waits

    /// Tells the user that the pass is at `what`, `done` of `total`.
    ///
    /// # Errors
    /// [`ErrorKind::Cancelled`] when the user stops the compile: hand it on.
    pub fn progress(&self, what: &str, done: u64, total: u64) -> Result<()> {
        self.ask(|h| h.progress(what, done, total))
    }

    /// Tells the user something.
    pub fn info(&self, message: impl AsRef<str>) {
        // A message that does not arrive is no reason to fail.
        let _ = self.ask(|h| h.log(Level::Info, message.as_ref()));
    }

    /// Tells the user something that may want an answer.
    pub fn warn(&self, message: impl AsRef<str>) {
        let _ = self.ask(|h| h.log(Level::Warning, message.as_ref()));
    }

    /// Records measured values about a subject: `cx.metric(name, [("zeros", 0.5.into())])`. They end up in the report and in the
    /// certificate, so they must not differ between two compiles. Units stand in the names.
    ///
    /// # Errors
    /// Those of the host.
    pub fn metric<const N: usize>(&self, subject: &str, values: [(&str, Metric); N]) -> Result<()> {
        self.ask(|h| h.metric(subject, &values))
    }

    /// Records why something was not done. It ends up in the report, not in the certificate.
    ///
    /// # Errors
    /// Those of the host.
    pub fn refused(&self, subject: &str, reason: &str) -> Result<()> {
        self.ask(|h| h.refused(subject, reason))
    }

    /// Asks leave for a rewrite and counts it; `site` says what is rewritten. When the answer is no, the pass leaves that site
    /// alone and goes on: someone is looking for the rewrite that breaks a model.
    ///
    /// # Errors
    /// Those of the host.
    pub fn rewrite(&self, site: &str) -> Result<bool> {
        self.ask(|h| h.rewrite(site))
    }

    /// A seed for random numbers: differs between the steps of a recipe, not between compiles.
    ///
    /// # Errors
    /// Those of the host.
    pub fn seed(&self) -> Result<u64> {
        self.ask(|h| h.seed())
    }

    // ---- the graph

    /// The graph in its text form, `.air`.
    ///
    /// # Errors
    /// Those of the host; so for all that follow.
    pub fn graph_text(&self) -> Result<String> {
        self.ask(|h| h.graph_text())
    }

    /// All nodes, each after those it takes values from.
    pub fn nodes(&self) -> Result<Vec<Node>> {
        self.ask(|h| h.nodes())
    }

    /// All nodes of an op, in the order of [`Context::nodes`].
    pub fn nodes_of(&self, op: &str) -> Result<Vec<Node>> {
        let mut found = Vec::new();
        for node in self.nodes()? {
            if self.node(node)?.op == op {
                found.push(node);
            }
        }
        Ok(found)
    }

    /// The graph's inputs: `tokens`, `positions`, `rows`.
    pub fn inputs(&self) -> Result<Vec<Value>> {
        self.ask(|h| h.inputs())
    }

    /// The graph's outputs; logits come first.
    pub fn outputs(&self) -> Result<Vec<Value>> {
        self.ask(|h| h.outputs())
    }

    /// Makes other values the graph's outputs.
    pub fn set_outputs(&self, values: &[Value]) -> Result<()> {
        self.ask(|h| h.set_outputs(values))
    }

    /// What a node is.
    pub fn node(&self, node: Node) -> Result<NodeInfo> {
        self.ask(|h| h.node_info(node))
    }

    /// The node of that name.
    pub fn node_named(&self, name: &str) -> Result<Node> {
        self.ask(|h| h.node_by_name(name))
    }

    /// What a node takes, in order.
    pub fn inputs_of(&self, node: Node) -> Result<Vec<Value>> {
        self.ask(|h| h.node_inputs(node))
    }

    /// The first output of a node, which for most ops is the only one.
    pub fn output(&self, node: Node) -> Result<Value> {
        self.output_at(node, 0)
    }

    /// An output of a node.
    pub fn output_at(&self, node: Node, slot: usize) -> Result<Value> {
        self.ask(|h| h.node_output(node, slot))
    }

    /// All outputs of a node.
    pub fn outputs_of(&self, node: Node) -> Result<Vec<Value>> {
        (0..self.node(node)?.outputs).map(|slot| self.output_at(node, slot)).collect()
    }

    /// The attributes of a node, in order.
    pub fn attrs(&self, node: Node) -> Result<Vec<(String, Attr)>> {
        let count = self.node(node)?.attrs;
        (0..count).map(|i| self.ask(|h| h.node_attr(node, i))).collect()
    }

    /// An attribute of a node.
    pub fn attr(&self, node: Node, name: &str) -> Result<Option<Attr>> {
        Ok(self.attrs(node)?.into_iter().find(|(n, _)| n == name).map(|(_, a)| a))
    }

    /// The node that a value is an output of.
    pub fn node_of(&self, value: Value) -> Result<Node> {
        self.ask(|h| h.value_node(value))
    }

    /// Type of a value.
    pub fn type_of(&self, value: Value) -> Result<Type> {
        self.ask(|h| h.value_type(value))
    }

    /// Nodes that take a value, with the place they take it in. Outputs of the graph are not among them.
    pub fn uses(&self, value: Value) -> Result<Vec<(Node, usize)>> {
        self.ask(|h| h.value_uses(value))
    }

    /// The one place where a value is taken; `None` where there are more, or none, or the graph gives it.
    pub fn only_use(&self, value: Value) -> Result<Option<(Node, usize)>> {
        match self.uses(value)?[..] {
            [only] if !self.outputs()?.contains(&value) => Ok(Some(only)),
            _ => Ok(None),
        }
    }

    /// The op that makes a value.
    pub fn op_of(&self, value: Value) -> Result<String> {
        Ok(self.node(self.node_of(value)?)?.op)
    }

    /// The tensor behind a value that is a weight.
    pub fn weight_of(&self, value: Value) -> Result<Option<String>> {
        let info = self.node(self.node_of(value)?)?;
        Ok((info.op == "weight").then_some(info.target))
    }

    /// Adds a node and gives it; its output types are inferred and the op's rules checked. Ops and attributes are those of the
    /// text form.
    pub fn add_node(&self, op: &str, inputs: &[Value], attrs: &[(&str, Attr)]) -> Result<Node> {
        self.ask(|h| h.add_node(op, "", inputs, attrs))
    }

    /// Adds a node of one output and gives that.
    pub fn add(&self, op: &str, inputs: &[Value], attrs: &[(&str, Attr)]) -> Result<Value> {
        let node = self.add_node(op, inputs, attrs)?;
        self.output(node)
    }

    /// Adds a node of that name.
    pub fn add_named(&self, name: &str, op: &str, inputs: &[Value], attrs: &[(&str, Attr)]) -> Result<Node> {
        self.ask(|h| h.add_node(op, name, inputs, attrs))
    }

    /// Adds a reference to a weight tensor.
    pub fn add_weight(&self, tensor: &str) -> Result<Value> {
        self.ask(|h| h.add_weight(tensor))
    }

    /// Adds a node of an op of the plugin's own: what it decomposes into is what it means.
    pub fn add_custom(&self, op: &dyn CustomOp, inputs: &[Value]) -> Result<Node> {
        let inside = self.ask(|h| h.custom_begin(op.name(), inputs))?;
        let outputs = op.decompose(self, &inside)?;
        self.ask(|h| h.custom_end(&outputs))
    }

    /// Makes whatever takes `old` take `new`, which has the same type.
    pub fn replace_uses(&self, old: Value, new: Value) -> Result<()> {
        self.ask(|h| h.replace_uses(old, new))
    }

    /// Puts values in the place of a node's outputs, one for each, and removes the node with whatever fed only it. A node that was
    /// added without a name inherits that of the one it replaces.
    pub fn replace(&self, node: Node, values: &[Value]) -> Result<()> {
        self.ask(|h| h.replace_node(node, values))
    }

    /// Removes a node, if nothing uses it, and then whatever fed only it. The graph's inputs stay, and so does `attention`, which
    /// extends the KV cache.
    pub fn remove_unused(&self, node: Node) -> Result<()> {
        self.ask(|h| h.remove_unused(node))
    }

    /// Computes a node of one output whose inputs are uncompressed weights, and keeps the result as a new tensor of that name.
    pub fn evaluate(&self, node: Node, tensor: &str) -> Result<()> {
        self.ask(|h| h.node_evaluate(node, tensor))
    }

    /// Removes a node that nothing uses.
    pub fn remove(&self, node: Node) -> Result<()> {
        self.ask(|h| h.remove_node(node))
    }

    // ---- tensors

    /// Names of the weight tensors the recipe means, by first use.
    pub fn tensors(&self) -> Result<Vec<String>> {
        self.ask(|h| h.tensors(false))
    }

    /// Names of all weight tensors the graph uses, by first use.
    pub fn all_tensors(&self) -> Result<Vec<String>> {
        self.ask(|h| h.tensors(true))
    }

    /// What is known of a tensor without reading it.
    pub fn tensor(&self, name: &str) -> Result<TensorInfo> {
        self.ask(|h| h.tensor_info(name))
    }

    /// The tensor's values as f32, row by row. Not copied where the host has them in memory.
    pub fn read(&self, name: &str) -> Result<Floats<'_, 'h>> {
        self.read_rows(name, 0, usize::MAX)
    }

    /// Values of some rows (of a vector: elements); those beyond the last are left out.
    pub fn read_rows(&self, name: &str, first: usize, rows: usize) -> Result<Floats<'_, 'h>> {
        let held = self.ask(|h| h.tensor_read(name, first as u64, rows as u64))?;
        Ok(Reading { held, context: self })
    }

    /// The values of an uncompressed tensor, to be changed in place and [committed](Edit::commit).
    pub fn edit(&self, name: &str) -> Result<Edit<'_, 'h>> {
        let held = self.ask(|h| h.tensor_edit(name))?;
        Ok(Edit { held, context: self })
    }

    /// Zeros of a shape, which become a new tensor of that name when they are [committed](Edit::commit).
    pub fn create(&self, name: &str, shape: &[usize]) -> Result<Edit<'_, 'h>> {
        let held = self.ask(|h| h.tensor_create(name, shape))?;
        Ok(Edit { held, context: self })
    }

    /// Makes a new tensor of the rows of others, stacked in order, whatever format they have. When they differ in format, in width
    /// or in the table of their codes, the answer is no and nothing is made. The parts are to be left as they are from then on.
    pub fn stack(&self, name: &str, parts: &[&str]) -> Result<bool> {
        self.ask(|h| h.tensor_stack(name, parts))
    }

    /// A name that no tensor has: `stem`, or `stem` with a number.
    pub fn fresh_name(&self, stem: &str) -> String {
        let numbered = (2..).map(|n| format!("{stem}.{n}"));
        let mut names = std::iter::once(stem.to_owned()).chain(numbered);
        names.find(|name| self.tensor(name).is_err()).unwrap_or_default()
    }

    /// Stores a matrix in a weight format and gives the relative error. Codes of the built-in formats are chosen as
    /// `quantize-rtn` does.
    pub fn set_format(&self, name: &str, format: &str) -> Result<f64> {
        self.ask(|h| h.tensor_set_format(name, format, None))
    }

    /// The same with what a squared error in each column counts, for formats of plugins.
    pub fn set_format_weighted(&self, name: &str, format: &str, importance: &[f32]) -> Result<f64> {
        self.ask(|h| h.tensor_set_format(name, format, Some(importance)))
    }

    /// Stores a matrix as codes the pass has chosen.
    pub fn set_codes(&self, name: &str, codes: &Encoded<'_>) -> Result<()> {
        self.ask(|h| h.tensor_set_codes(name, codes))
    }

    /// Layout of a weight format.
    pub fn format(&self, name: &str) -> Result<FormatInfo> {
        self.ask(|h| h.format_info(name))
    }

    // ---- the model at work

    /// What reaches a value on calibration text. Asking in the order of the graph costs one run over the model in all.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] when the compile is without calibration.
    pub fn statistics(&self, value: Value) -> Result<Statistics<'_, 'h>> {
        let held = self.ask(|h| h.statistics(value))?;
        Ok(Statistics { held, context: self })
    }

    /// A window of calibration text, from 0; `None` behind the last.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] when the compile is without calibration text.
    pub fn calibration_window(&self, index: usize) -> Result<Option<Vec<u32>>> {
        let (held, count) = self.ask(|h| h.calibration_window(index))?;
        let tokens: Tokens<'_, 'h> = Reading { held, context: self };
        Ok((index < count).then(|| tokens.to_vec()))
    }

    /// Tokens of a text.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] when the checkpoint has no tokenizer.
    pub fn tokenize(&self, text: &str) -> Result<Vec<u32>> {
        let held = self.ask(|h| h.tokenize(text))?;
        let tokens: Tokens<'_, 'h> = Reading { held, context: self };
        Ok(tokens.to_vec())
    }

    /// Logits `[tokens, V]` of the model as it is now.
    pub fn logits(&self, tokens: &[u32]) -> Result<Floats<'_, 'h>> {
        let held = self.ask(|h| h.run_model(tokens, None))?;
        Ok(Reading { held, context: self })
    }

    /// A value `[tokens, …]` while the model as it is now runs over tokens. Further values of the same tokens cost least in the
    /// order of the graph.
    pub fn activations(&self, tokens: &[u32], value: Value) -> Result<Floats<'_, 'h>> {
        let held = self.ask(|h| h.run_model(tokens, Some(value)))?;
        Ok(Reading { held, context: self })
    }
}

/// An op of a plugin's own: a name, and what it means in core ops.
pub trait CustomOp {
    /// Name in the text form: `sparse.gate`.
    fn name(&self) -> &str;

    /// Adds nodes that compute the op's outputs from `inputs`, and gives the outputs. Weights are among the inputs.
    ///
    /// # Errors
    /// Those of adding nodes.
    fn decompose(&self, cx: &Context<'_>, inputs: &[Value]) -> Result<Vec<Value>>;
}

/// Memory of the host that is read as a slice, and released when it is dropped.
pub struct Reading<'c, 'h, T> {
    held: Held<T>,
    context: &'c Context<'h>,
}

/// f32 values.
pub type Floats<'c, 'h> = Reading<'c, 'h, f32>;
/// Tokens.
pub type Tokens<'c, 'h> = Reading<'c, 'h, u32>;

impl<T> Deref for Reading<'_, '_, T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the host keeps `len` elements readable and unchanged until the buffer is released, which `drop` does.
        unsafe { slice(self.held.data, self.held.len) }
    }
}

impl<T: std::fmt::Debug> std::fmt::Debug for Reading<'_, '_, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reading").field("len", &self.held.len).finish_non_exhaustive()
    }
}

impl<T> Drop for Reading<'_, '_, T> {
    fn drop(&mut self) {
        // What cannot be released now is when the run ends.
        let _ = self.context.ask(|h| h.release(self.held.buffer));
    }
}

/// Values of a tensor that are being changed. Dropped without a commit, the tensor stays as it was.
pub struct Edit<'c, 'h> {
    held: HeldMut,
    context: &'c Context<'h>,
}

impl Edit<'_, '_> {
    /// Makes the values the tensor's own. They must be finite.
    ///
    /// # Errors
    /// Those of the host.
    pub fn commit(self) -> Result<()> {
        self.context.ask(|h| h.tensor_commit(self.held.buffer))?;
        // The buffer is gone; dropping would release it once more.
        std::mem::forget(self);
        Ok(())
    }
}

impl Deref for Edit<'_, '_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        // SAFETY: as in `deref_mut`.
        unsafe { slice(self.held.data.cast_const(), self.held.len) }
    }
}

impl DerefMut for Edit<'_, '_> {
    fn deref_mut(&mut self) -> &mut [f32] {
        if self.held.data.is_null() || self.held.len == 0 {
            return &mut [];
        }
        // SAFETY: the host keeps `len` elements for this edit alone until its buffer is committed or released, which takes
        // `self`.
        unsafe { std::slice::from_raw_parts_mut(self.held.data, self.held.len) }
    }
}

impl std::fmt::Debug for Edit<'_, '_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Edit").field("len", &self.held.len).finish_non_exhaustive()
    }
}

impl Drop for Edit<'_, '_> {
    fn drop(&mut self) {
        let _ = self.context.ask(|h| h.release(self.held.buffer));
    }
}

/// Second moments and ranges of the rows `X` `[n_tokens, width]` that reach a value on calibration text.
pub struct Statistics<'c, 'h> {
    held: HeldStatistics,
    context: &'c Context<'h>,
}

impl Statistics<'_, '_> {
    /// Rows seen.
    pub fn n_tokens(&self) -> u64 {
        self.held.n_tokens
    }

    /// Columns of `X`.
    pub fn width(&self) -> usize {
        self.held.width
    }

    /// `H = XᵀX`, `[width, width]`, symmetric, row by row; the sum over rows, not their mean.
    pub fn second_moment(&self) -> &[f32] {
        // SAFETY: the host keeps `width * width` elements until the buffer is released, which `drop` does; so below.
        unsafe { slice(self.held.second_moment, self.held.width * self.held.width) }
    }

    /// Least value of each column.
    pub fn minimum(&self) -> &[f32] {
        // SAFETY: as above, `width` elements.
        unsafe { slice(self.held.minimum, self.held.width) }
    }

    /// Greatest value of each column.
    pub fn maximum(&self) -> &[f32] {
        // SAFETY: as above, `width` elements.
        unsafe { slice(self.held.maximum, self.held.width) }
    }

    /// Mean square of each column.
    pub fn mean_squares(&self) -> Vec<f32> {
        let (h, width, count) = (self.second_moment(), self.held.width, self.held.n_tokens.max(1) as f32);
        (0..width).map(|i| h[i * width + i] / count).collect()
    }

    /// Largest magnitude of each column.
    pub fn max_abs(&self) -> Vec<f32> {
        self.minimum().iter().zip(self.maximum()).map(|(low, high)| high.max(-low).max(0.0)).collect()
    }
}

impl std::fmt::Debug for Statistics<'_, '_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Statistics").field("width", &self.held.width).finish_non_exhaustive()
    }
}

impl Drop for Statistics<'_, '_> {
    fn drop(&mut self) {
        let _ = self.context.ask(|h| h.release(self.held.buffer));
    }
}

/// A slice of memory of the host; of nothing, where there is nothing.
///
/// # Safety
/// `data` must be valid for reads of `len` elements for as long as the result lives.
unsafe fn slice<'a, T>(data: *const T, len: usize) -> &'a [T] {
    if data.is_null() || len == 0 {
        return &[];
    }
    // SAFETY: as the caller promises.
    unsafe { std::slice::from_raw_parts(data, len) }
}

impl From<bool> for Attr {
    fn from(v: bool) -> Attr {
        Attr::Bool(v)
    }
}

impl From<i64> for Attr {
    fn from(v: i64) -> Attr {
        Attr::Int(v)
    }
}

impl From<f64> for Attr {
    fn from(v: f64) -> Attr {
        Attr::Float(v)
    }
}

impl From<&str> for Attr {
    fn from(v: &str) -> Attr {
        Attr::Text(v.to_owned())
    }
}

impl From<u64> for Metric {
    fn from(v: u64) -> Metric {
        Metric::Count(v)
    }
}

impl From<f64> for Metric {
    fn from(v: f64) -> Metric {
        Metric::Number(v)
    }
}

impl From<&str> for Metric {
    fn from(v: &str) -> Metric {
        Metric::Text(v.to_owned())
    }
}
