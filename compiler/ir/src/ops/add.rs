//! `add`: elementwise `y = a + b`.
//! Inputs   (I1) `a`: real   (I2) `b`: real of the same shape   Rules (C1) both real (C2) shapes equal.
//! Numerics rounding. Result: f32 of that shape.

use super::{Op, arity, require, require_real};
use crate::attr::Attrs;
use crate::error::Result;
use crate::interp::EvalCx;
use crate::tensor::Tensor;
use crate::types::{Elem, TensorType};

/// See the file's header.
#[derive(Clone, Debug, PartialEq)]
pub struct Add {}

impl Add {
    pub(crate) fn from_attrs(attrs: Attrs) -> Result<Add> {
        attrs.finish()?;
        Ok(Add {})
    }
}

impl Op for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        arity("add", 2..=2, inputs.len())?;
        require_real("add", "C1", &inputs[0], None)?;
        require_real("add", "C1", &inputs[1], None)?;
        require("add", "C2", inputs[0].shape == inputs[1].shape, &inputs[0], &inputs[1])?;
        Ok(vec![TensorType::new(Elem::F32, inputs[0].shape.clone())])
    }

    fn attrs(&self) -> Attrs {
        Attrs::new("add")
    }

    fn eval(&self, _cx: &mut EvalCx<'_>, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        Ok(vec![inputs[0].zip(&inputs[1], |a, b| a + b)])
    }
}
