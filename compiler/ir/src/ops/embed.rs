//! `embed`: rows of a table by token id.
//!   y[t, :] = table[tokens[t], :]
//! Inputs   (I1) `tokens`: i32 `[T]`   (I2) `table`: real `[V, D]`
//! Rules    (C1) `tokens` is i32 of rank 1   (C2) `table` is real of rank 2   Result: f32 `[T, D]`.
//! Numerics exact. An id outside 0..V is an error.

use super::{Op, arity, pick_rows, require, require_real};
use crate::attr::Attrs;
use crate::error::Result;
use crate::interp::EvalCx;
use crate::tensor::Tensor;
use crate::types::{Elem, TensorType};

/// See the file's header.
#[derive(Clone, Debug, PartialEq)]
pub struct Embed {}

impl Embed {
    pub(crate) fn from_attrs(attrs: Attrs) -> Result<Embed> {
        attrs.finish()?;
        Ok(Embed {})
    }
}

impl Op for Embed {
    fn name(&self) -> &'static str {
        "embed"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        arity("embed", 2..=2, inputs.len())?;
        require("embed", "C1", inputs[0].elem == Elem::I32 && inputs[0].rank() == 1, "i32 of rank 1", &inputs[0])?;
        require_real("embed", "C2", &inputs[1], Some(2))?;
        Ok(vec![TensorType::f32([inputs[0].shape[0], inputs[1].shape[1]])])
    }

    fn attrs(&self) -> Attrs {
        Attrs::new("embed")
    }

    fn eval(&self, _cx: &mut EvalCx<'_>, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        Ok(vec![pick_rows("embed", &inputs[1], &inputs[0])?])
    }
}
