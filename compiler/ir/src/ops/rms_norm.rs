//! `rms_norm`: root-mean-square normalisation over the last axis.
//!   y[.., i] = x[.., i] / sqrt(mean_j(x[.., j]^2) + eps) (* g[i])
//! Inputs   (I1) `x`: real `[.., D]`   (I2, optional) `g`: real `[D]`; absent means ones.   Attributes `eps`: >= 0
//! Rules    (C1) `x` real, rank >= 1, D fixed   (C2) `x.dim(-1) == g.dim(0)`   (C3) `eps` finite, >= 0
//! Result: f32 of `x`'s shape.
//! Numerics rounding (accumulates in f32 or wider).   Source: Zhang & Sennrich 2019, arXiv:1910.07467.

use super::{Op, arity, require, require_eps, require_real};
use crate::attr::{Attr, Attrs};
use crate::error::Result;
use crate::interp::EvalCx;
use crate::tensor::Tensor;
use crate::types::{Elem, TensorType};

/// See the file's header.
#[derive(Clone, Debug, PartialEq)]
pub struct RmsNorm {
    pub eps: f64,
}

impl RmsNorm {
    pub(crate) fn from_attrs(mut attrs: Attrs) -> Result<RmsNorm> {
        let eps = attrs.take_f64("eps")?;
        attrs.finish()?;
        Ok(RmsNorm { eps })
    }
}

impl Op for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        arity("rms_norm", 1..=2, inputs.len())?;
        let x = &inputs[0];
        require_real("rms_norm", "C1", x, None)?;
        require("rms_norm", "C1", x.last().is_some(), "a fixed last dimension", x)?;
        require_eps("rms_norm", "C3", self.eps)?;
        if let Some(g) = inputs.get(1) {
            require_real("rms_norm", "C2", g, Some(1))?;
            require("rms_norm", "C2", x.shape.last() == g.shape.last(), format!("g to fit {x}"), g)?;
        }
        Ok(vec![TensorType::new(Elem::F32, x.shape.clone())])
    }

    fn attrs(&self) -> Attrs {
        Attrs::new("rms_norm").with("eps", Attr::Float(self.eps))
    }

    fn eval(&self, _cx: &mut EvalCx<'_>, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let x = &inputs[0];
        let gain = inputs.get(1).map(Tensor::as_real);
        let mut out = Vec::with_capacity(x.len());
        for row in x.rows() {
            let mean_square = row.iter().map(|v| v * v).sum::<f64>() / row.len() as f64;
            let factor = 1.0 / (mean_square + self.eps).sqrt();
            out.extend(row.iter().enumerate().map(|(i, v)| v * factor * gain.map_or(1.0, |g| g[i])));
        }
        Ok(vec![Tensor::real(x.shape.clone(), out)])
    }
}
