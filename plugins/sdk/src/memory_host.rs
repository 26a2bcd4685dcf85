//! A host for unit tests of passes: tensors in memory, and nothing else. Passes that look at the graph or run the model are
//! tried with `attar plugin check` and on real models.

use crate::error::{Error, ErrorKind, Result};
use crate::host::{
    Attr, Encoded, FormatInfo, Held, HeldMut, HeldStatistics, Host, Level, Metric, Node, NodeInfo,
    TensorInfo, Type, Value,
};
use std::collections::BTreeMap;

/// Tensors by name, in the order of their names. All belong to the recipe.
#[derive(Debug, Default)]
pub struct MemoryHost {
    tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
    edits: BTreeMap<u64, Edit>,
    next: u64,
    /// What the pass measured: subject and values.
    pub metrics: Vec<(String, Vec<(String, Metric)>)>,
    /// Sites of the rewrites the pass asked for.
    pub rewrites: Vec<String>,
    /// What the pass told the user.
    pub messages: Vec<String>,
}

#[derive(Debug)]
struct Edit {
    name: String,
    shape: Vec<usize>,
    values: Vec<f32>,
}

impl MemoryHost {
    /// A host without tensors.
    pub fn new() -> MemoryHost {
        MemoryHost::default()
    }

    /// Adds a tensor.
    ///
    /// # Panics
    /// When the values do not fill the shape: a test that is wrong.
    pub fn add_tensor(&mut self, name: &str, shape: &[usize], values: Vec<f32>) {
        assert_eq!(shape.iter().product::<usize>(), values.len(), "values of {name}");
        self.tensors.insert(name.to_owned(), (shape.to_vec(), values));
    }

    /// Values of a tensor; none when there is no such tensor.
    pub fn values(&self, name: &str) -> &[f32] {
        self.tensors.get(name).map_or(&[], |(_, values)| values)
    }

    fn tensor(&self, name: &str) -> Result<&(Vec<usize>, Vec<f32>)> {
        self.tensors.get(name).ok_or_else(|| Error::new(format!("there is no tensor {name}")))
    }

    fn keep(&mut self, name: &str, shape: Vec<usize>, values: Vec<f32>) -> u64 {
        self.next += 1;
        self.edits.insert(self.next, Edit { name: name.to_owned(), shape, values });
        self.next
    }

    fn edit_of(&mut self, name: &str, shape: Vec<usize>, values: Vec<f32>) -> HeldMut {
        let buffer = self.keep(name, shape, values);
        match self.edits.get_mut(&buffer) {
            Some(edit) => HeldMut { data: edit.values.as_mut_ptr(), len: edit.values.len(), buffer },
            None => HeldMut { data: std::ptr::null_mut(), len: 0, buffer },
        }
    }
}

fn missing<T>(what: &str) -> Result<T> {
    Err(Error::of(ErrorKind::Unavailable, format!("a host in memory has no {what}; use attar plugin check")))
}

// SAFETY: pointers are to vectors in `edits`, which nobody changes until they are released or committed; moving an `Edit` does
// not move what its vector points to.
unsafe impl Host for MemoryHost {
    fn fail(&mut self, message: &str) -> Result<()> {
        self.log(Level::Warning, message)
    }

    fn log(&mut self, _: Level, message: &str) -> Result<()> {
        self.messages.push(message.to_owned());
        Ok(())
    }

    fn progress(&mut self, _: &str, _: u64, _: u64) -> Result<()> {
        Ok(())
    }

    fn metric(&mut self, subject: &str, values: &[(&str, Metric)]) -> Result<()> {
        let values = values.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
        self.metrics.push((subject.to_owned(), values));
        Ok(())
    }

    fn rewrite(&mut self, site: &str) -> Result<bool> {
        self.rewrites.push(site.to_owned());
        Ok(true)
    }

    fn seed(&mut self) -> Result<u64> {
        Ok(0)
    }

    fn release(&mut self, buffer: u64) -> Result<()> {
        match self.edits.remove(&buffer) {
            Some(_) => Ok(()),
            None => Err(Error::of(ErrorKind::Misuse, "the buffer was released before")),
        }
    }

    fn graph_text(&mut self) -> Result<String> {
        missing("graph")
    }

    fn nodes(&mut self) -> Result<Vec<Node>> {
        missing("graph")
    }

    fn inputs(&mut self) -> Result<Vec<Value>> {
        missing("graph")
    }

    fn outputs(&mut self) -> Result<Vec<Value>> {
        missing("graph")
    }

    fn set_outputs(&mut self, _: &[Value]) -> Result<()> {
        missing("graph")
    }

    fn node_by_name(&mut self, _: &str) -> Result<Node> {
        missing("graph")
    }

    fn node_info(&mut self, _: Node) -> Result<NodeInfo> {
        missing("graph")
    }

    fn node_inputs(&mut self, _: Node) -> Result<Vec<Value>> {
        missing("graph")
    }

    fn node_output(&mut self, _: Node, _: usize) -> Result<Value> {
        missing("graph")
    }

    fn node_attr(&mut self, _: Node, _: usize) -> Result<(String, Attr)> {
        missing("graph")
    }

    fn value_node(&mut self, _: Value) -> Result<Node> {
        missing("graph")
    }

    fn value_type(&mut self, _: Value) -> Result<Type> {
        missing("graph")
    }

    fn value_uses(&mut self, _: Value) -> Result<Vec<(Node, usize)>> {
        missing("graph")
    }

    fn add_node(&mut self, _: &str, _: &str, _: &[Value], _: &[(&str, Attr)]) -> Result<Node> {
        missing("graph")
    }

    fn add_weight(&mut self, _: &str) -> Result<Value> {
        missing("graph")
    }

    fn replace_uses(&mut self, _: Value, _: Value) -> Result<()> {
        missing("graph")
    }

    fn remove_node(&mut self, _: Node) -> Result<()> {
        missing("graph")
    }

    fn custom_begin(&mut self, _: &str, _: &[Value]) -> Result<Vec<Value>> {
        missing("graph")
    }

    fn custom_end(&mut self, _: &[Value]) -> Result<Node> {
        missing("graph")
    }

    fn tensors(&mut self, _: bool) -> Result<Vec<String>> {
        Ok(self.tensors.keys().cloned().collect())
    }

    fn tensor_info(&mut self, tensor: &str) -> Result<TensorInfo> {
        let shape = self.tensor(tensor)?.0.clone();
        Ok(TensorInfo { shape, elem: "f32".to_owned(), stored_as: "f32".to_owned(), is_explicit: false })
    }

    fn tensor_read(&mut self, tensor: &str, first: u64, rows: u64) -> Result<Held<f32>> {
        let (shape, values) = self.tensor(tensor)?;
        let width: usize = shape.iter().skip(1).product();
        let count = shape.first().copied().unwrap_or(1);
        let first = usize::try_from(first).unwrap_or(usize::MAX).min(count);
        let end = first.saturating_add(usize::try_from(rows).unwrap_or(usize::MAX)).min(count);
        let part = values[first * width..end * width].to_vec();
        let held = self.edit_of(tensor, Vec::new(), part);
        Ok(Held { data: held.data.cast_const(), len: held.len, buffer: held.buffer })
    }

    fn tensor_edit(&mut self, tensor: &str) -> Result<HeldMut> {
        let (shape, values) = self.tensor(tensor)?.clone();
        Ok(self.edit_of(tensor, shape, values))
    }

    fn tensor_create(&mut self, tensor: &str, shape: &[usize]) -> Result<HeldMut> {
        if self.tensors.contains_key(tensor) {
            return Err(Error::new(format!("the name {tensor} is taken")));
        }
        let values = vec![0.0; shape.iter().product()];
        Ok(self.edit_of(tensor, shape.to_vec(), values))
    }

    fn tensor_commit(&mut self, buffer: u64) -> Result<()> {
        match self.edits.remove(&buffer) {
            Some(edit) => {
                self.tensors.insert(edit.name, (edit.shape, edit.values));
                Ok(())
            }
            None => Err(Error::of(ErrorKind::Misuse, "the buffer was released before")),
        }
    }

    fn tensor_set_format(&mut self, _: &str, _: &str, _: Option<&[f32]>) -> Result<f64> {
        missing("encoders")
    }

    fn tensor_set_codes(&mut self, _: &str, _: &Encoded<'_>) -> Result<()> {
        missing("encoders")
    }

    fn format_info(&mut self, _: &str) -> Result<FormatInfo> {
        missing("formats")
    }

    fn statistics(&mut self, _: Value) -> Result<HeldStatistics> {
        missing("calibration")
    }

    fn calibration_window(&mut self, _: usize) -> Result<(Held<u32>, usize)> {
        missing("calibration")
    }

    fn tokenize(&mut self, _: &str) -> Result<Held<u32>> {
        missing("tokenizer")
    }

    fn run_model(&mut self, _: &[u32], _: Option<Value>) -> Result<Held<f32>> {
        missing("model")
    }

    fn refused(&mut self, subject: &str, reason: &str) -> Result<()> {
        self.metric(subject, &[("refused", reason.into())])
    }

    fn replace_node(&mut self, _: Node, _: &[Value]) -> Result<()> {
        missing("graph")
    }

    fn remove_unused(&mut self, _: Node) -> Result<()> {
        missing("graph")
    }

    fn node_evaluate(&mut self, _: Node, _: &str) -> Result<()> {
        missing("graph")
    }

    fn tensor_stack(&mut self, tensor: &str, parts: &[&str]) -> Result<bool> {
        if self.tensors.contains_key(tensor) {
            return Err(Error::new(format!("the name {tensor} is taken")));
        }
        let parts = parts.iter().map(|p| self.tensor(p)).collect::<Result<Vec<_>>>()?;
        let tail = |shape: &Vec<usize>| shape.get(1..).map(<[usize]>::to_vec);
        let Some(shape) = parts.first().map(|(shape, _)| shape) else { return Ok(false) };
        if parts.iter().any(|(other, _)| tail(other) != tail(shape)) {
            return Ok(false);
        }
        let mut shape = shape.clone();
        if let Some(rows) = shape.first_mut() {
            *rows = parts.iter().filter_map(|(shape, _)| shape.first()).sum();
        }
        let values = parts.iter().flat_map(|(_, values)| values.iter().copied()).collect();
        self.tensors.insert(tensor.to_owned(), (shape, values));
        Ok(true)
    }
}
