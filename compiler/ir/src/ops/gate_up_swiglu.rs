//! `gate_up_swiglu`: the first half of a SwiGLU MLP.
//!   n = norm ? rms_norm(x, g) : x;  [a | u] = linear(n, w);  y = silu(a) * u
//! Inputs   `x`: real `[T, K]`, `g`: `[K]` when `gain`, `w`: `[2F, K]` (all gate rows, then all up rows)
//! Attributes  `eps`: the norm's, absent means no norm; flag `gain` (needs `eps`)
//! Rules    those of the parts; (C1) `w.dim(0)` fixed and even   Numerics rounding. Result: f32 `[T, F]`.
//! Decomposes into `rms_norm`, `linear`, `slice`, `silu`, `mul`.   Source: Shazeer 2020, arXiv:2002.05202.

use super::{Op, arity, require, with_last};
use crate::attr::{Attr, Attrs};
use crate::error::Result;
use crate::graph::{Graph, ValueId};
use crate::interp::EvalCx;
use crate::tensor::Tensor;
use crate::types::{Dim, TensorType};

/// See the file's header.
#[derive(Clone, Debug, PartialEq)]
pub struct GateUpSwiglu {
    pub eps: Option<f64>,
    pub gain: bool,
}

impl GateUpSwiglu {
    pub(crate) fn from_attrs(mut attrs: Attrs) -> Result<GateUpSwiglu> {
        let eps = if attrs.list.iter().any(|(n, _)| n == "eps") { Some(attrs.take_f64("eps")?) } else { None };
        let gain = attrs.take_flag("gain")?;
        attrs.finish()?;
        Ok(GateUpSwiglu { eps, gain: gain && eps.is_some() })
    }
}

impl Op for GateUpSwiglu {
    fn name(&self) -> &'static str {
        "gate_up_swiglu"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        let count = 2 + usize::from(self.gain);
        arity("gate_up_swiglu", count..=count, inputs.len())?;
        let mut x = inputs[0].clone();
        if let Some(eps) = self.eps {
            x = super::RmsNorm { eps }.infer(&inputs[..1 + usize::from(self.gain)])?.remove(0);
        }
        let w = &inputs[count - 1];
        let y = super::Linear {}.infer(&[x, w.clone()])?;
        let rows = w.shape[0].fixed().unwrap_or(0);
        require("gate_up_swiglu", "C1", rows > 0 && rows % 2 == 0, "an even number of rows", w)?;
        Ok(vec![with_last(&y[0], Dim::Fixed(rows / 2))])
    }

    fn attrs(&self) -> Attrs {
        let attrs = Attrs::new("gate_up_swiglu");
        match self.eps {
            Some(eps) => attrs.with("eps", Attr::Float(eps)).flag("gain", self.gain),
            None => attrs,
        }
    }

    fn eval(&self, cx: &mut EvalCx<'_>, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let _ = (cx, inputs);
        Ok(Vec::new())
    }

    fn decompose(&self, graph: &mut Graph, inputs: &[ValueId]) -> Result<Option<Vec<ValueId>>> {
        let _ = (graph, inputs);
        Ok(None)
    }
}
