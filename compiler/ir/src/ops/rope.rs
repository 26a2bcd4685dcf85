//! `rope`: rotary position embedding, rotating dimension `i` with `i + Dh/2` ("half-split", as in Llama checkpoints).
//!   a = positions[t] * inv_freq[i];  (y[t,h,i], y[t,h,i+Dh/2]) = mscale * (x0 cos a - x1 sin a, x1 cos a + x0 sin a)
//! Inputs   (I1) `x`: real `[T, H, Dh]`   (I2) `positions`: i32 `[T]`
//! Attributes  `inv_freq`: Dh/2 numbers (any context scaling is folded into them); `mscale`: factor on both, usually 1
//! Rules    (C1) `x` real of rank 3, Dh fixed and even   (C2) `positions` i32 `[T]`   (C3) `inv_freq` has Dh/2 entries
//!          (C4) all of them and `mscale` finite
//! Numerics rounding (angles in f64).   Source: Su et al. 2021, arXiv:2104.09864.

use super::{Op, arity, require, require_real};
use crate::attr::{Attr, Attrs};
use crate::error::Result;
use crate::interp::EvalCx;
use crate::tensor::Tensor;
use crate::types::{Elem, TensorType};

/// See the file's header.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    pub inv_freq: Vec<f64>,
    pub mscale: f64,
}

impl Rope {
    pub(crate) fn from_attrs(mut attrs: Attrs) -> Result<Rope> {
        let inv_freq = attrs.take_floats("inv_freq")?;
        let mscale = attrs.take_f64("mscale")?;
        attrs.finish()?;
        Ok(Rope { inv_freq, mscale })
    }
}

impl Op for Rope {
    fn name(&self) -> &'static str {
        "rope"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        arity("rope", 2..=2, inputs.len())?;
        let (x, p) = (&inputs[0], &inputs[1]);
        require_real("rope", "C1", x, Some(3))?;
        require("rope", "C1", x.last().is_some_and(|d| d % 2 == 0), "an even head width", x)?;
        require("rope", "C2", p.elem == Elem::I32 && p.shape == x.shape[..1], "i32 positions, one per token", p)?;
        let got = self.inv_freq.len();
        require("rope", "C3", x.last() == Some(2 * got), format!("{} frequencies", x.last().unwrap_or(0) / 2), got)?;
        let finite = self.mscale.is_finite() && self.inv_freq.iter().all(|f| f.is_finite());
        require("rope", "C4", finite, "finite frequencies and mscale", "one that is not")?;
        Ok(vec![TensorType::new(Elem::F32, x.shape.clone())])
    }

    fn attrs(&self) -> Attrs {
        Attrs::new("rope").with("inv_freq", Attr::Floats(self.inv_freq.clone())).with("mscale", Attr::Float(self.mscale))
    }

    fn eval(&self, _cx: &mut EvalCx<'_>, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let (x, positions) = (&inputs[0], inputs[1].as_int());
        let (heads, half) = (x.shape[1], self.inv_freq.len());
        let mut out = x.as_real().to_vec();
        for (t, token) in out.chunks_exact_mut((heads * 2 * half).max(1)).enumerate() {
            for (i, freq) in self.inv_freq.iter().enumerate() {
                let (sin, cos) = (f64::from(positions[t]) * freq).sin_cos();
                for head in token.chunks_exact_mut(2 * half) {
                    let (a, b) = (head[i], head[half + i]);
                    head[i] = self.mscale * (a * cos - b * sin);
                    head[half + i] = self.mscale * (b * cos + a * sin);
                }
            }
        }
        Ok(vec![Tensor::real(x.shape.clone(), out)])
    }
}
