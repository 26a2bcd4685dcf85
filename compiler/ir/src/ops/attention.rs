//! `attention`: causal grouped-query attention over the KV cache, which it extends.
//!   First k[t], v[t] are stored at (layer, seq[t], positions[t]). Then, with h' = h / (H / Hk) and s running over the
//!   cached positions of seq[t] with positions[t] - window < s <= positions[t]:
//!   y[t,h,:] = sum_s softmax_s(scale * q[t,h,:] . K[s,h',:]) V[s,h',:]
//! Inputs   (I1) `q`: real `[T, H, Dh]`   (I2) `k`: real `[T, Hk, Dh]`   (I3) `v`: real `[T, Hk, Dh]`
//!          (I4) `positions`: i32 `[T]`; the tokens' sequences belong to the step, not to the graph
//! Attributes  `layer`: which cache; `scale`: factor on scores; `window`: sliding window in tokens, absent means all
//! Rules    (C1) q, k, v real of rank 3   (C2) k and v of one type   (C3) Dh equal   (C4) Hk divides H
//!          (C5) `positions` i32 `[T]`, T equal   (C6) `window` from 1 to 2^40
//!          (C7) `scale` finite   (C8) `layer` < 65536   Result: f32 `[T, H, Dh]`.
//! Numerics rounding.   Source: Ainslie et al. 2023, arXiv:2305.13245; window: Jiang et al. 2023, arXiv:2310.06825.

use super::{Op, arity, require, require_real};
use crate::attr::{Attr, Attrs};
use crate::error::{Error, ErrorKind, Result};
use crate::interp::EvalCx;
use crate::tensor::Tensor;
use crate::types::{Elem, TensorType};

const MAX_WINDOW: usize = 1 << 40;
/// Caches are numbered; far more than any model has, few enough for every table of them.
const MAX_LAYERS: usize = 1 << 16;

/// See the file's header.
#[derive(Clone, Debug, PartialEq)]
pub struct Attention {
    pub layer: usize,
    pub scale: f64,
    pub window: Option<usize>,
}

impl Attention {
    pub(crate) fn from_attrs(mut attrs: Attrs) -> Result<Attention> {
        let layer = attrs.take_usize("layer")?;
        let scale = attrs.take_f64("scale")?;
        let window = attrs.take_opt_usize("window")?;
        attrs.finish()?;
        Ok(Attention { layer, scale, window })
    }
}

impl Op for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        arity("attention", 4..=4, inputs.len())?;
        let [q, k, v, p] = [&inputs[0], &inputs[1], &inputs[2], &inputs[3]];
        for x in [q, k, v] {
            require_real("attention", "C1", x, Some(3))?;
            require("attention", "C1", x.last().is_some() && x.shape[1].fixed().is_some(), "fixed heads and width", x)?;
        }
        require("attention", "C2", k.shape == v.shape, format!("v like k {k}"), v)?;
        require("attention", "C3", q.last() == k.last(), format!("head width of q {q}"), k)?;
        let (h, hk) = (q.shape[1].fixed().unwrap_or(0), k.shape[1].fixed().unwrap_or(0));
        require("attention", "C4", hk > 0 && h % hk == 0, format!("KV heads to divide {h}"), hk)?;
        let same_t = p.elem == Elem::I32 && p.shape == q.shape[..1] && q.shape[0] == k.shape[0];
        require("attention", "C5", same_t, format!("i32 positions for {q} and {k}"), p)?;
        let window = self.window.unwrap_or(1);
        require("attention", "C6", (1..=MAX_WINDOW).contains(&window), "a window from 1 to 2^40", window)?;
        require("attention", "C7", self.scale.is_finite(), "a finite scale", self.scale)?;
        require("attention", "C8", self.layer < MAX_LAYERS, format!("a layer below {MAX_LAYERS}"), self.layer)?;
        Ok(vec![TensorType::new(Elem::F32, q.shape.clone())])
    }

    fn attrs(&self) -> Attrs {
        let attrs = Attrs::new("attention")
            .with("layer", Attr::Int(self.layer as i64))
            .with("scale", Attr::Float(self.scale));
        match self.window {
            Some(w) => attrs.with("window", Attr::Int(w as i64)),
            None => attrs,
        }
    }

    fn eval(&self, cx: &mut EvalCx<'_>, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let [q, k, v] = [&inputs[0], &inputs[1], &inputs[2]];
        let positions = inputs[3].as_int();
        let (tokens, heads, dh, kv_heads) = (q.shape[0], q.shape[1], q.shape[2], k.shape[1]);
        if cx.seqs.len() != tokens {
            let expected = format!("a sequence for each of {tokens} tokens");
            return Err(Error::new(ErrorKind::Input { expected, got: cx.seqs.len().to_string() }));
        }
        for (t, (position, seq)) in positions.iter().zip(cx.seqs).enumerate() {
            let row = t * kv_heads * dh..(t + 1) * kv_heads * dh;
            let (key, value) = (k.as_real()[row.clone()].to_vec(), v.as_real()[row].to_vec());
            cx.cache.store(self.layer, *seq, *position, key, value)?;
        }
        let mut out = Vec::with_capacity(q.len());
        for (t, (position, seq)) in positions.iter().zip(cx.seqs).enumerate() {
            let cached = cx.cache.get(self.layer, *seq);
            let last = *position as usize;
            let first = self.window.map_or(0, |w| (last + 1).saturating_sub(w));
            for h in 0..heads {
                let query = &q.as_real()[(t * heads + h) * dh..][..dh];
                let shared = (h / (heads / kv_heads)) * dh;
                let scores: Vec<f64> = cached[first..=last]
                    .iter()
                    .map(|(key, _)| {
                        self.scale * query.iter().zip(&key[shared..shared + dh]).map(|(a, b)| a * b).sum::<f64>()
                    })
                    .collect();
                let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let powers: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
                let total: f64 = powers.iter().sum();
                let mut y = vec![0.0; dh];
                for (p, (_, value)) in powers.iter().zip(&cached[first..=last]) {
                    for (y, v) in y.iter_mut().zip(&value[shared..shared + dh]) {
                        *y += p / total * v;
                    }
                }
                out.extend(y);
            }
        }
        Ok(vec![Tensor::real(q.shape.clone(), out)])
    }
}
