//! `slice`: a range of the last axis: `y[.., i] = x[.., start + i]`, `0 <= i < len`.
//! Inputs   (I1) `x`: real `[.., D]`   Attributes `start`, `len`
//! Rules    (C1) real, D fixed   (C2) `start + len <= D`, `len >= 1`   Numerics exact. Result: f32 `[.., len]`.

use super::{Op, arity, require, require_real, with_last};
use crate::attr::{Attr, Attrs};
use crate::error::Result;
use crate::interp::EvalCx;
use crate::tensor::Tensor;
use crate::types::{Dim, TensorType};

/// See the file's header.
#[derive(Clone, Debug, PartialEq)]
pub struct Slice {
    pub start: usize,
    pub len: usize,
}

impl Slice {
    pub(crate) fn from_attrs(mut attrs: Attrs) -> Result<Slice> {
        let start = attrs.take_usize("start")?;
        let len = attrs.take_usize("len")?;
        attrs.finish()?;
        Ok(Slice { start, len })
    }
}

impl Op for Slice {
    fn name(&self) -> &'static str {
        "slice"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        arity("slice", 1..=1, inputs.len())?;
        let x = &inputs[0];
        require_real("slice", "C1", x, None)?;
        require("slice", "C1", x.last().is_some(), "a fixed last dimension", x)?;
        let d = x.last().unwrap_or(0);
        let fits = self.len >= 1 && self.start.checked_add(self.len).is_some_and(|end| end <= d);
        require("slice", "C2", fits, format!("a range within {d}"), format!("{}+{}", self.start, self.len))?;
        Ok(vec![with_last(x, Dim::Fixed(self.len))])
    }

    fn attrs(&self) -> Attrs {
        Attrs::new("slice").with("start", Attr::Int(self.start as i64)).with("len", Attr::Int(self.len as i64))
    }

    fn eval(&self, _cx: &mut EvalCx<'_>, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let x = &inputs[0];
        let mut shape = x.shape.clone();
        if let Some(last) = shape.last_mut() {
            *last = self.len;
        }
        let out = x.rows().flat_map(|row| row[self.start..self.start + self.len].iter().copied()).collect();
        Ok(vec![Tensor::real(shape, out)])
    }
}
