//! `gate_up_swiglu`: the first half of a SwiGLU MLP.
//!   n = norm ? rms_norm(x, g) : x;  [a | u] = linear(n, w);  y = silu(a) * u
//! Inputs   `x`: real `[T, K]`, `g`: `[K]` when `gain`, `w`: `[2F, K]` (all gate rows, then all up rows)
//! Attributes  `eps`: the norm's, absent means no norm; flag `gain` (needs `eps`)
//! Rules    those of the parts; (C1) `w.dim(0)` fixed and even   (C2) `gain` only with `eps`
//! Numerics rounding. Result: f32 `[T, F]`.
//! Decomposes into `rms_norm`, `linear`, `slice`, `silu`, `mul`.   Source: Shazeer 2020, arXiv:2002.05202.

use super::{Op, arity, missing, require, with_last};
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
        Ok(GateUpSwiglu { eps, gain })
    }
}

impl Op for GateUpSwiglu {
    fn name(&self) -> &'static str {
        "gate_up_swiglu"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        require("gate_up_swiglu", "C2", self.eps.is_some() || !self.gain, "eps beside gain", "gain alone")?;
        let count = 2 + usize::from(self.gain);
        arity("gate_up_swiglu", count..=count, inputs.len())?;
        let mut x = inputs[0].clone();
        if let Some(eps) = self.eps {
            x = super::RmsNorm { eps }.infer(&inputs[..1 + usize::from(self.gain)])?.remove(0);
        }
        let w = &inputs[count - 1];
        let y = super::Linear {}.infer(&[x, w.clone()])?;
        let rows = w.shape[0].fixed().unwrap_or(0);
        require("gate_up_swiglu", "C1", rows > 0 && rows.is_multiple_of(2), "an even number of rows", w)?;
        Ok(vec![with_last(&y[0], Dim::Fixed(rows / 2))])
    }

    fn attrs(&self) -> Attrs {
        let attrs = Attrs::new("gate_up_swiglu");
        match self.eps {
            Some(eps) => attrs.with("eps", Attr::Float(eps)),
            None => attrs,
        }
        .flag("gain", self.gain)
    }

    fn eval(&self, cx: &mut EvalCx<'_>, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let (w, norm) = inputs.split_last().ok_or_else(|| missing("gate_up_swiglu"))?;
        let n = match self.eps {
            Some(eps) => super::RmsNorm { eps }.eval(cx, norm)?.remove(0),
            None => inputs[0].clone(),
        };
        let both = super::Linear {}.eval(cx, &[n, w.clone()])?.remove(0);
        let mut out = Vec::with_capacity(both.len() / 2);
        for row in both.rows() {
            let (gate, up) = row.split_at(row.len() / 2);
            out.extend(gate.iter().zip(up).map(|(a, u)| a / (1.0 + (-a).exp()) * u));
        }
        let mut shape = both.shape.clone();
        if let Some(last) = shape.last_mut() {
            *last /= 2;
        }
        Ok(vec![Tensor::real(shape, out)])
    }

    fn decompose(&self, graph: &mut Graph, inputs: &[ValueId]) -> Result<Option<Vec<ValueId>>> {
        let (w, norm) = inputs.split_last().ok_or_else(|| missing("gate_up_swiglu"))?;
        let n = match self.eps {
            Some(eps) => graph.add1(super::RmsNorm { eps }, norm)?,
            None => inputs[0],
        };
        let both = graph.add1(super::Linear {}, &[n, *w])?;
        let len = graph.ty(both).last().unwrap_or(0) / 2;
        let gate = graph.add1(super::Slice { start: 0, len }, &[both])?;
        let up = graph.add1(super::Slice { start: len, len }, &[both])?;
        let act = graph.add1(super::Silu {}, &[gate])?;
        Ok(Some(vec![graph.add1(super::Mul {}, &[act, up])?]))
    }
}
