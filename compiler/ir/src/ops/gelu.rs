//! `gelu`: elementwise `y = x/2 (1 + erf(x / sqrt 2))`.   Source: Hendrycks & Gimpel 2016, arXiv:1606.08415.
//! Inputs   (I1) `x`: real   Rules (C1) real.   Numerics rounding. Result: f32 of `x`'s shape.

use super::{Op, arity, require_real};
use crate::attr::Attrs;
use crate::error::Result;
use crate::interp::EvalCx;
use crate::tensor::Tensor;
use crate::types::{Elem, TensorType};

/// See the file's header.
#[derive(Clone, Debug, PartialEq)]
pub struct Gelu {}

impl Gelu {
    pub(crate) fn from_attrs(attrs: Attrs) -> Result<Gelu> {
        attrs.finish()?;
        Ok(Gelu {})
    }
}

impl Op for Gelu {
    fn name(&self) -> &'static str {
        "gelu"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        arity("gelu", 1..=1, inputs.len())?;
        require_real("gelu", "C1", &inputs[0], None)?;
        Ok(vec![TensorType::new(Elem::F32, inputs[0].shape.clone())])
    }

    fn attrs(&self) -> Attrs {
        Attrs::new("gelu")
    }

    fn eval(&self, _cx: &mut EvalCx<'_>, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        Ok(vec![inputs[0].map(|x| 0.5 * x * (1.0 + libm::erf(x * std::f64::consts::FRAC_1_SQRT_2)))])
    }
}
