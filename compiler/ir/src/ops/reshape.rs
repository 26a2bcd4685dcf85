//! `reshape`: the same elements in the same order under another shape.
//! Inputs   (I1) `x`   Attributes `shape`: dimensions
//! Rules    (C1) symbolic dimensions are the same, in order   (C2) the products of the fixed ones are equal
//! Numerics exact. Result: `x`'s element, the new shape.

use super::{Op, arity, require};
use crate::attr::{Attr, Attrs};
use crate::error::Result;
use crate::interp::EvalCx;
use crate::tensor::Tensor;
use crate::types::{Dim, TensorType};

/// See the file's header.
#[derive(Clone, Debug, PartialEq)]
pub struct Reshape {
    pub shape: Vec<Dim>,
}

impl Reshape {
    pub(crate) fn from_attrs(mut attrs: Attrs) -> Result<Reshape> {
        let shape = attrs.take_dims("shape")?;
        attrs.finish()?;
        Ok(Reshape { shape })
    }
}

impl Op for Reshape {
    fn name(&self) -> &'static str {
        "reshape"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        arity("reshape", 1..=1, inputs.len())?;
        let x = &inputs[0];
        let syms = |s: &[Dim]| s.iter().copied().filter(|d| d.fixed().is_none()).collect::<Vec<_>>();
        let product = |s: &[Dim]| s.iter().filter_map(|d| d.fixed()).try_fold(1usize, |a, n| a.checked_mul(n));
        let to = TensorType::new(x.elem, self.shape.clone());
        require("reshape", "C1", syms(&x.shape) == syms(&self.shape), x, &to)?;
        let (a, b) = (product(&x.shape), product(&self.shape));
        require("reshape", "C2", a.is_some() && a == b, x, &to)?;
        Ok(vec![to])
    }

    fn attrs(&self) -> Attrs {
        Attrs::new("reshape").with("shape", Attr::Dims(self.shape.clone()))
    }

    fn eval(&self, cx: &mut EvalCx<'_>, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let x = &inputs[0];
        let shape = self.shape.iter().map(|d| cx.sizes.resolve(*d)).collect::<Result<Vec<_>>>()?;
        Ok(vec![Tensor { shape, data: x.data.clone() }])
    }
}
