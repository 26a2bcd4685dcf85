//! `softmax`: `y[.., i] = exp(x[.., i] - m) / sum_j exp(x[.., j] - m)`, `m` the largest of the row.
//! Inputs   (I1) `x`: real `[.., D]`   Rules (C1) real, rank >= 1.   Numerics rounding. Result: f32 of `x`'s shape.

use super::{Op, arity, require, require_real};
use crate::attr::Attrs;
use crate::error::Result;
use crate::interp::EvalCx;
use crate::tensor::Tensor;
use crate::types::{Elem, TensorType};

/// See the file's header.
#[derive(Clone, Debug, PartialEq)]
pub struct Softmax {}

impl Softmax {
    pub(crate) fn from_attrs(attrs: Attrs) -> Result<Softmax> {
        attrs.finish()?;
        Ok(Softmax {})
    }
}

impl Op for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        arity("softmax", 1..=1, inputs.len())?;
        require_real("softmax", "C1", &inputs[0], None)?;
        require("softmax", "C1", inputs[0].rank() >= 1, "rank 1 or more", &inputs[0])?;
        Ok(vec![TensorType::new(Elem::F32, inputs[0].shape.clone())])
    }

    fn attrs(&self) -> Attrs {
        Attrs::new("softmax")
    }

    fn eval(&self, _cx: &mut EvalCx<'_>, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let mut out = Vec::with_capacity(inputs[0].len());
        for row in inputs[0].rows() {
            let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let powers: Vec<f64> = row.iter().map(|x| (x - largest).exp()).collect();
            let total: f64 = powers.iter().sum();
            out.extend(powers.iter().map(|p| p / total));
        }
        Ok(vec![Tensor::real(inputs[0].shape.clone(), out)])
    }
}
