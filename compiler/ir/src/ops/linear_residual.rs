//! `linear_residual`: `r + linear(x, w, b)`, the end of every attention and MLP block.
//! Inputs   `x`: real `[T, K]`, `w`: `[N, K]`, `b`: `[N]` when `bias`, `r`: real `[T, N]`   Attributes  flag `bias`
//! Rules    those of `linear` and `add`.   Numerics rounding. Result: f32 `[T, N]`.   Decomposes into `linear`, `add`.

use super::{Op, arity, missing};
use crate::attr::Attrs;
use crate::error::Result;
use crate::graph::{Graph, ValueId};
use crate::interp::EvalCx;
use crate::tensor::Tensor;
use crate::types::TensorType;

/// See the file's header.
#[derive(Clone, Debug, PartialEq)]
pub struct LinearResidual {
    pub bias: bool,
}

impl LinearResidual {
    pub(crate) fn from_attrs(mut attrs: Attrs) -> Result<LinearResidual> {
        let bias = attrs.take_flag("bias")?;
        attrs.finish()?;
        Ok(LinearResidual { bias })
    }
}

impl Op for LinearResidual {
    fn name(&self) -> &'static str {
        "linear_residual"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        let count = 3 + usize::from(self.bias);
        arity("linear_residual", count..=count, inputs.len())?;
        let (r, linear) = inputs.split_last().ok_or_else(|| missing("linear_residual"))?;
        let y = super::Linear {}.infer(linear)?;
        super::Add {}.infer(&[y[0].clone(), r.clone()])
    }

    fn attrs(&self) -> Attrs {
        Attrs::new("linear_residual").flag("bias", self.bias)
    }

    fn eval(&self, cx: &mut EvalCx<'_>, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let (r, linear) = inputs.split_last().ok_or_else(|| missing("linear_residual"))?;
        let y = super::Linear {}.eval(cx, linear)?;
        Ok(vec![y[0].zip(r, |y, r| y + r)])
    }

    fn decompose(&self, graph: &mut Graph, inputs: &[ValueId]) -> Result<Option<Vec<ValueId>>> {
        let (r, linear) = inputs.split_last().ok_or_else(|| missing("linear_residual"))?;
        let y = graph.add1(super::Linear {}, linear)?;
        Ok(Some(vec![graph.add1(super::Add {}, &[y, *r])?]))
    }
}
