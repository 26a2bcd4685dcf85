//! `qkv_rope`: the first half of an attention block: norm, one projection for q, k and v, rotary embedding.
//!   n = norm ? rms_norm(x, g) : x;  [q | k | v] = linear(n, w, b), as heads of Dh;
//!   qk_norm: q = rms_norm(q, gq), k = rms_norm(k, gk) per head;  q = rope(q), k = rope(k)
//! Inputs   `x`: real `[T, K]`, `g`: `[K]` when `gain`, `w`: `[(H + 2 Hk) Dh, K]`, `b` when `bias`,
//!          `gq`, `gk`: `[Dh]` when `qk_norm` is given, `positions`: i32 `[T]`
//! Attributes  `heads`, `kv_heads`, `head_dim`; `inv_freq`, `mscale` as in `rope`; `eps`: the input norm's, absent
//!          means none; `qk_norm`: eps of the head norms, absent means none; flags `gain`, `bias`
//! Rules    those of the parts; (C1) `w.dim(0) == (H + 2 Hk) Dh`
//! Numerics rounding. Results: q f32 `[T, H, Dh]`, k f32 `[T, Hk, Dh]`, v f32 `[T, Hk, Dh]`.
//! Decomposes into `rms_norm`, `linear`, `slice`, `reshape`, `rope`.

use super::{Op, arity, require};
use crate::attr::{Attr, Attrs};
use crate::error::Result;
use crate::graph::{Graph, ValueId};
use crate::interp::EvalCx;
use crate::tensor::Tensor;
use crate::types::{Dim, TensorType};

/// See the file's header.
#[derive(Clone, Debug, PartialEq)]
pub struct QkvRope {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub inv_freq: Vec<f64>,
    pub mscale: f64,
    pub eps: Option<f64>,
    pub qk_norm: Option<f64>,
    pub gain: bool,
    pub bias: bool,
}

impl QkvRope {
    pub(crate) fn from_attrs(mut attrs: Attrs) -> Result<QkvRope> {
        let (heads, kv_heads) = (attrs.take_usize("heads")?, attrs.take_usize("kv_heads")?);
        let head_dim = attrs.take_usize("head_dim")?;
        let inv_freq = attrs.take_floats("inv_freq")?;
        let mscale = attrs.take_f64("mscale")?;
        let eps = if attrs.list.iter().any(|(n, _)| n == "eps") { Some(attrs.take_f64("eps")?) } else { None };
        let qk_norm =
            if attrs.list.iter().any(|(n, _)| n == "qk_norm") { Some(attrs.take_f64("qk_norm")?) } else { None };
        let (gain, bias) = (attrs.take_flag("gain")?, attrs.take_flag("bias")?);
        attrs.finish()?;
        Ok(QkvRope { heads, kv_heads, head_dim, inv_freq, mscale, eps, qk_norm, gain: gain && eps.is_some(), bias })
    }
}

impl Op for QkvRope {
    fn name(&self) -> &'static str {
        "qkv_rope"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        let count =
            3 + usize::from(self.gain) + usize::from(self.bias) + 2 * usize::from(self.qk_norm.is_some());
        arity("qkv_rope", count..=count, inputs.len())?;
        let mut at = 1 + usize::from(self.gain);
        let mut x = inputs[0].clone();
        if let Some(eps) = self.eps {
            x = super::RmsNorm { eps }.infer(&inputs[..at])?.remove(0);
        }
        let w = &inputs[at];
        let mut linear = vec![x, w.clone()];
        at += 1;
        if self.bias {
            linear.push(inputs[at].clone());
            at += 1;
        }
        let y = super::Linear {}.infer(&linear)?;
        let width = (self.heads + 2 * self.kv_heads) * self.head_dim;
        require("qkv_rope", "C1", w.shape[0] == Dim::Fixed(width), format!("{width} rows"), w)?;
        let positions = &inputs[count - 1];
        let t = y[0].shape[0];
        let rope = super::Rope { inv_freq: self.inv_freq.clone(), mscale: self.mscale };
        let mut out = Vec::with_capacity(3);
        for heads in [self.heads, self.kv_heads] {
            let mut v = TensorType::f32([t, heads.into(), self.head_dim.into()]);
            if let Some(eps) = self.qk_norm {
                let gain = inputs[at + out.len()].clone();
                v = super::RmsNorm { eps }.infer(&[v, gain])?.remove(0);
            }
            out.extend(rope.infer(&[v, positions.clone()])?);
        }
        out.push(out[1].clone());
        Ok(out)
    }

    fn attrs(&self) -> Attrs {
        let mut attrs = Attrs::new("qkv_rope")
            .with("heads", Attr::Int(self.heads as i64))
            .with("kv_heads", Attr::Int(self.kv_heads as i64))
            .with("head_dim", Attr::Int(self.head_dim as i64))
            .with("inv_freq", Attr::Floats(self.inv_freq.clone()))
            .with("mscale", Attr::Float(self.mscale));
        if let Some(eps) = self.eps {
            attrs = attrs.with("eps", Attr::Float(eps));
        }
        if let Some(eps) = self.qk_norm {
            attrs = attrs.with("qk_norm", Attr::Float(eps));
        }
        attrs.flag("gain", self.gain).flag("bias", self.bias)
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
