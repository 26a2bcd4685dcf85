//! `gather_rows`: some rows of a matrix: `y[r, :] = x[rows[r], :]`.
//! Inputs   (I1) `x`: real `[T, D]`   (I2) `rows`: i32 `[R]`   Rules (C1) `x` real of rank 2 (C2) `rows` i32 of rank 1.
//! Numerics exact. Result: f32 `[R, D]`. A row outside 0..T is an error.

use super::{Op, arity, pick_rows, require, require_real};
use crate::attr::Attrs;
use crate::error::Result;
use crate::interp::EvalCx;
use crate::tensor::Tensor;
use crate::types::{Elem, TensorType};

/// See the file's header.
#[derive(Clone, Debug, PartialEq)]
pub struct GatherRows {}

impl GatherRows {
    pub(crate) fn from_attrs(attrs: Attrs) -> Result<GatherRows> {
        attrs.finish()?;
        Ok(GatherRows {})
    }
}

impl Op for GatherRows {
    fn name(&self) -> &'static str {
        "gather_rows"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        arity("gather_rows", 2..=2, inputs.len())?;
        require_real("gather_rows", "C1", &inputs[0], Some(2))?;
        let rows = &inputs[1];
        require("gather_rows", "C2", rows.elem == Elem::I32 && rows.rank() == 1, "i32 of rank 1", rows)?;
        Ok(vec![TensorType::f32([rows.shape[0], inputs[0].shape[1]])])
    }

    fn attrs(&self) -> Attrs {
        Attrs::new("gather_rows")
    }

    fn eval(&self, _cx: &mut EvalCx<'_>, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        Ok(vec![pick_rows("gather_rows", &inputs[0], &inputs[1])?])
    }
}
