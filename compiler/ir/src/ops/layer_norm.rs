//! `layer_norm`: normalisation to zero mean and unit variance over the last axis.
//!   y[.., i] = (x[.., i] - mean) / sqrt(var + eps) * g[i] + b[i]
//! Inputs   (I1) `x`: real `[.., D]`   (I2) `g`: real `[D]`   (I3) `b`: real `[D]`   Attributes `eps`: >= 0
//! Rules    (C1) `x` real, rank >= 1, D fixed   (C2) `g`, `b` real of `[D]`   (C3) `eps` finite, >= 0
//! Result: f32 of `x`'s shape.
//! Numerics rounding.   Source: Ba et al. 2016, arXiv:1607.06450.

use super::{Op, arity, require, require_eps, require_real};
use crate::attr::{Attr, Attrs};
use crate::error::Result;
use crate::interp::EvalCx;
use crate::tensor::Tensor;
use crate::types::{Elem, TensorType};

/// See the file's header.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerNorm {
    pub eps: f64,
}

impl LayerNorm {
    pub(crate) fn from_attrs(mut attrs: Attrs) -> Result<LayerNorm> {
        let eps = attrs.take_f64("eps")?;
        attrs.finish()?;
        Ok(LayerNorm { eps })
    }
}

impl Op for LayerNorm {
    fn name(&self) -> &'static str {
        "layer_norm"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        arity("layer_norm", 3..=3, inputs.len())?;
        let x = &inputs[0];
        require_real("layer_norm", "C1", x, None)?;
        require("layer_norm", "C1", x.last().is_some(), "a fixed last dimension", x)?;
        require_eps("layer_norm", "C3", self.eps)?;
        for v in &inputs[1..] {
            require_real("layer_norm", "C2", v, Some(1))?;
            require("layer_norm", "C2", x.shape.last() == v.shape.last(), format!("a vector to fit {x}"), v)?;
        }
        Ok(vec![TensorType::new(Elem::F32, x.shape.clone())])
    }

    fn attrs(&self) -> Attrs {
        Attrs::new("layer_norm").with("eps", Attr::Float(self.eps))
    }

    fn eval(&self, _cx: &mut EvalCx<'_>, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let (x, gain, bias) = (&inputs[0], inputs[1].as_real(), inputs[2].as_real());
        let mut out = Vec::with_capacity(x.len());
        for row in x.rows() {
            let mean = row.iter().sum::<f64>() / row.len() as f64;
            let variance = row.iter().map(|v| (v - mean) * (v - mean)).sum::<f64>() / row.len() as f64;
            let factor = 1.0 / (variance + self.eps).sqrt();
            out.extend(row.iter().zip(gain.iter().zip(bias)).map(|(v, (g, b))| (v - mean) * factor * g + b));
        }
        Ok(vec![Tensor::real(x.shape.clone(), out)])
    }
}
