//! `silu`: elementwise `y = x / (1 + exp(-x))`.   Source: Elfwing et al. 2017, arXiv:1702.03118.
//! Inputs   (I1) `x`: real   Rules (C1) real.   Numerics rounding. Result: f32 of `x`'s shape.

use super::{Op, arity, require_real};
use crate::attr::Attrs;
use crate::error::Result;
use crate::interp::EvalCx;
use crate::tensor::Tensor;
use crate::types::{Elem, TensorType};

/// See the file's header.
#[derive(Clone, Debug, PartialEq)]
pub struct Silu {}

impl Silu {
    pub(crate) fn from_attrs(attrs: Attrs) -> Result<Silu> {
        attrs.finish()?;
        Ok(Silu {})
    }
}

impl Op for Silu {
    fn name(&self) -> &'static str {
        "silu"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        arity("silu", 1..=1, inputs.len())?;
        require_real("silu", "C1", &inputs[0], None)?;
        Ok(vec![TensorType::new(Elem::F32, inputs[0].shape.clone())])
    }

    fn attrs(&self) -> Attrs {
        Attrs::new("silu")
    }

    fn eval(&self, _cx: &mut EvalCx<'_>, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        Ok(vec![inputs[0].map(|x| x / (1.0 + (-x).exp()))])
    }
}
