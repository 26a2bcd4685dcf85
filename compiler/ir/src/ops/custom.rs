//! `custom`: an op that a plugin has named; its body says what it means, in core ops.
//!   outputs = body(inputs)
//! Inputs   as many as the body has, of its types     Attributes  `name`: the op's; `body`: a function in the text form
//! Rules    (C1) inputs are of the types of the body's inputs   (C2) the body is one valid function, without weights,
//!          attention and custom ops in it
//! Numerics those of the body. Results: those of the body.
//! Decomposes into its body: no kernel knows it, so it is gone before kernels are chosen.

use super::{Op, OpKind, arity, require};
use crate::attr::{Attr, Attrs};
use crate::error::{Error, ErrorKind, Result};
use crate::graph::{Graph, ValueId};
use crate::interp::{self, EvalCx, Precision};
use crate::tensor::Tensor;
use crate::types::TensorType;
use std::collections::BTreeMap;
use std::sync::Arc;

/// See the file's header.
#[derive(Clone, Debug, PartialEq)]
pub struct Custom {
    name: String,
    body: Arc<Graph>,
}

impl Custom {
    /// An op of that name and meaning.
    ///
    /// # Errors
    /// [`ErrorKind::Rule`] `C2`, and what the verifier says of the body.
    pub fn new(name: &str, body: Graph) -> Result<Custom> {
        crate::verify(&body, None)?;
        for id in body.ids() {
            let op = body.op(id);
            let is_pure = !matches!(op, OpKind::Weight(_) | OpKind::Attention(_) | OpKind::Custom(_));
            require("custom", "C2", is_pure, "a body of core ops over its inputs", body.describe(id))?;
        }
        Ok(Custom { name: name.to_owned(), body: Arc::new(body) })
    }

    pub(crate) fn from_attrs(mut attrs: Attrs) -> Result<Custom> {
        let (name, text) = (attrs.take_str("name")?, attrs.take_str("body")?);
        attrs.finish()?;
        let mut functions = crate::text::parse(&text)?;
        require("custom", "C2", functions.len() == 1, "one function", functions.len())?;
        Custom::new(&name, functions.remove(0))
    }

    /// Name that the plugin gave it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What it means.
    pub fn body(&self) -> &Graph {
        &self.body
    }
}

impl Op for Custom {
    fn name(&self) -> &'static str {
        "custom"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        let expected = self.body.inputs();
        arity("custom", expected.len()..=expected.len(), inputs.len())?;
        for (node, got) in expected.iter().zip(inputs) {
            let ty = self.body.ty(ValueId { node: *node, slot: 0 });
            require("custom", "C1", ty == got, ty, got)?;
        }
        Ok(self.body.outputs().iter().map(|v| self.body.ty(*v).clone()).collect())
    }

    fn attrs(&self) -> Attrs {
        Attrs::new("custom")
            .with("name", Attr::Str(self.name.clone()))
            .with("body", Attr::Str(crate::text::print(&self.body)))
    }

    fn eval(&self, cx: &mut EvalCx<'_>, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        interp::run(&self.body, cx.weights, Precision::F64, cx.cache, inputs)
    }

    fn decompose(&self, graph: &mut Graph, inputs: &[ValueId]) -> Result<Option<Vec<ValueId>>> {
        let body = &self.body;
        let mut values: BTreeMap<ValueId, ValueId> = BTreeMap::new();
        for (node, input) in body.inputs().iter().zip(inputs) {
            values.insert(ValueId { node: *node, slot: 0 }, *input);
        }
        let known = |values: &BTreeMap<ValueId, ValueId>, v: &ValueId| {
            let found = values.get(v).copied();
            found.ok_or_else(|| Error::new(ErrorKind::UnknownValue { name: format!("{}.{}", v.node.0, v.slot) }))
        };
        for id in body.topo() {
            if matches!(body.op(id), OpKind::Input(_)) {
                continue;
            }
            let operands =
                body.inputs_of(id).iter().map(|v| known(&values, v)).collect::<Result<Vec<_>>>()?;
            let node = graph.add(body.op(id).clone(), &operands)?;
            for slot in 0..body.node(id).outputs.len() as u16 {
                values.insert(ValueId { node: id, slot }, ValueId { node, slot });
            }
        }
        body.outputs().iter().map(|v| known(&values, v)).collect::<Result<Vec<_>>>().map(Some)
    }
}
