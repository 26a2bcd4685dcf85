//! `linear`: matrix product with a transposed weight.
//!   y[.., n] = sum_k x[.., k] * w[n, k] (+ b[n])
//! Inputs   (I1) `x`: real `[.., K]`   (I2) `w`: real `[N, K]`   (I3, optional) `b`: real `[N]`
//! Rules    (C1) `x` real, rank >= 2   (C2) `w` real, rank 2   (C3) `x.dim(-1) == w.dim(1)`   (C4) `b.dim(0) == w.dim(0)`
//! Numerics rounding (accumulates in f32 or wider). Result: f32 `[.., N]`.

use super::{Op, arity, require, require_real, with_last};
use crate::attr::Attrs;
use crate::error::Result;
use crate::interp::EvalCx;
use crate::tensor::Tensor;
use crate::types::TensorType;

/// See the file's header.
#[derive(Clone, Debug, PartialEq)]
pub struct Linear {}

impl Linear {
    pub(crate) fn from_attrs(attrs: Attrs) -> Result<Linear> {
        attrs.finish()?;
        Ok(Linear {})
    }
}

impl Op for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        arity("linear", 2..=3, inputs.len())?;
        let (x, w) = (&inputs[0], &inputs[1]);
        require_real("linear", "C1", x, None)?;
        require("linear", "C1", x.rank() >= 2, "rank 2 or more", x)?;
        require_real("linear", "C2", w, Some(2))?;
        require("linear", "C3", x.shape.last() == w.shape.last(), format!("x {x} to end in w's K"), w)?;
        if let Some(b) = inputs.get(2) {
            require_real("linear", "C4", b, Some(1))?;
            require("linear", "C4", b.shape[0] == w.shape[0], format!("a bias of {}", w.shape[0]), b)?;
        }
        Ok(vec![with_last(x, w.shape[0])])
    }

    fn attrs(&self) -> Attrs {
        Attrs::new("linear")
    }

    fn eval(&self, _cx: &mut EvalCx<'_>, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let (x, w) = (&inputs[0], &inputs[1]);
        let bias = inputs.get(2).map(Tensor::as_real);
        let mut shape = x.shape.clone();
        if let Some(last) = shape.last_mut() {
            *last = w.shape[0];
        }
        let mut out = Vec::with_capacity(shape.iter().product());
        for row in x.rows() {
            for (n, channel) in w.rows().enumerate() {
                out.push(dot(row, channel) + bias.map_or(0.0, |b| b[n]));
            }
        }
        Ok(vec![Tensor::real(shape, out)])
    }
}

/// `sum_k a[k] b[k]`, in eight interleaved partial sums: the order is fixed, and a debug build stays bearable.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut partial = [0.0; 8];
    let (a_chunks, b_chunks) = (a.chunks_exact(8), b.chunks_exact(8));
    let tail: f64 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a_chunks.zip(b_chunks) {
        for i in 0..8 {
            partial[i] += a[i] * b[i];
        }
    }
    partial.iter().sum::<f64>() + tail
}
