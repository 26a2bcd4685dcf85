//! `norm_linear`: `linear(rms_norm(x, g), w, b)` in one pass.
//! Inputs   `x`: real `[T, K]`, then `g`: `[K]` when `gain`, `w`: `[N, K]`, `b`: `[N]` when `bias`
//! Attributes  `eps`; flags `gain`, `bias`
//! Rules    those of `rms_norm` and `linear`.   Numerics rounding. Result: f32 `[T, N]`.
//! Decomposes into `rms_norm`, `linear`.

use super::{Op, arity};
use crate::attr::{Attr, Attrs};
use crate::error::Result;
use crate::graph::{Graph, ValueId};
use crate::interp::EvalCx;
use crate::tensor::Tensor;
use crate::types::TensorType;

/// See the file's header.
#[derive(Clone, Debug, PartialEq)]
pub struct NormLinear {
    pub eps: f64,
    pub gain: bool,
    pub bias: bool,
}

impl NormLinear {
    pub(crate) fn from_attrs(mut attrs: Attrs) -> Result<NormLinear> {
        let eps = attrs.take_f64("eps")?;
        let (gain, bias) = (attrs.take_flag("gain")?, attrs.take_flag("bias")?);
        attrs.finish()?;
        Ok(NormLinear { eps, gain, bias })
    }
}

impl NormLinear {
    /// Inputs of the norm, and inputs of the linear after its `x`.
    fn split<V: Clone>(&self, inputs: &[V]) -> (Vec<V>, Vec<V>) {
        let (norm, linear) = inputs.split_at(1 + usize::from(self.gain));
        (norm.to_vec(), linear.to_vec())
    }
}

impl Op for NormLinear {
    fn name(&self) -> &'static str {
        "norm_linear"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        let count = 2 + usize::from(self.gain) + usize::from(self.bias);
        arity("norm_linear", count..=count, inputs.len())?;
        let (norm, linear) = self.split(inputs);
        let n = super::RmsNorm { eps: self.eps }.infer(&norm)?;
        let rest: Vec<TensorType> = n.into_iter().chain(linear).collect();
        super::Linear {}.infer(&rest)
    }

    fn attrs(&self) -> Attrs {
        Attrs::new("norm_linear").with("eps", Attr::Float(self.eps)).flag("gain", self.gain).flag("bias", self.bias)
    }

    fn eval(&self, cx: &mut EvalCx<'_>, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let (norm, linear) = self.split(inputs);
        let mut rest = super::RmsNorm { eps: self.eps }.eval(cx, &norm)?;
        rest.extend(linear);
        super::Linear {}.eval(cx, &rest)
    }

    fn decompose(&self, graph: &mut Graph, inputs: &[ValueId]) -> Result<Option<Vec<ValueId>>> {
        let (norm, linear) = self.split(inputs);
        let mut rest = vec![graph.add1(super::RmsNorm { eps: self.eps }, &norm)?];
        rest.extend(linear);
        Ok(Some(vec![graph.add1(super::Linear {}, &rest)?]))
    }
}
