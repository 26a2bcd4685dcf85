//! `qkv_rope`: the first half of an attention block: norm, one projection for q, k and v, rotary embedding.
//!   n = norm ? rms_norm(x, g) : x;  [q | k | v] = linear(n, w, b), as heads of Dh;
//!   qk_norm: q = rms_norm(q, gq), k = rms_norm(k, gk) per head;  q = rope(q), k = rope(k)
//! Inputs   `x`: real `[T, K]`, `g`: `[K]` when `gain`, `w`: `[(H + 2 Hk) Dh, K]`, `b` when `bias`,
//!          `gq`, `gk`: `[Dh]` when `qk_norm` is given, `positions`: i32 `[T]`
//! Attributes  `heads`, `kv_heads`, `head_dim`; `inv_freq`, `mscale` as in `rope`; `eps`: the input norm's, absent
//!          means none; `qk_norm`: eps of the head norms, absent means none; flags `gain`, `bias`
//! Rules    those of the parts; (C1) `w.dim(0) == (H + 2 Hk) Dh`   (C2) `gain` only with `eps`   (C3) Hk >= 1 divides H
//!          (C4) `x` has rank 2
//! Numerics rounding. Results: q f32 `[T, H, Dh]`, k f32 `[T, Hk, Dh]`, v f32 `[T, Hk, Dh]`.
//! Decomposes into `rms_norm`, `linear`, `slice`, `reshape`, `rope`.

use super::{Op, arity, missing, require};
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
        Ok(QkvRope { heads, kv_heads, head_dim, inv_freq, mscale, eps, qk_norm, gain, bias })
    }
}

impl QkvRope {
    /// Rows of the stacked projection; `None` on overflow.
    fn width(&self) -> Option<usize> {
        self.kv_heads.checked_mul(2)?.checked_add(self.heads)?.checked_mul(self.head_dim)
    }

    /// The inputs by role.
    fn roles<V: Clone>(&self, inputs: &[V]) -> Result<Roles<V>> {
        let mut rest = inputs.iter().cloned();
        let mut next = || rest.next().ok_or_else(|| missing("qkv_rope"));
        let mut norm = vec![next()?];
        if self.gain {
            norm.push(next()?);
        }
        let mut linear = vec![next()?];
        if self.bias {
            linear.push(next()?);
        }
        let head_gains = match self.qk_norm {
            Some(eps) => Some((eps, [next()?, next()?])),
            None => None,
        };
        Ok(Roles { norm, linear, head_gains, positions: next()? })
    }

    fn rope(&self) -> super::Rope {
        super::Rope { inv_freq: self.inv_freq.clone(), mscale: self.mscale }
    }
}

/// Inputs of [`QkvRope`], taken apart.
struct Roles<V> {
    /// `x`, and `g` if there is one.
    norm: Vec<V>,
    /// `w`, and `b` if there is one.
    linear: Vec<V>,
    /// Eps of the head norms, and their gains for q and k.
    head_gains: Option<(f64, [V; 2])>,
    positions: V,
}

impl Op for QkvRope {
    fn name(&self) -> &'static str {
        "qkv_rope"
    }

    fn infer(&self, inputs: &[TensorType]) -> Result<Vec<TensorType>> {
        require("qkv_rope", "C2", self.eps.is_some() || !self.gain, "eps beside gain", "gain alone")?;
        let grouped = self.kv_heads > 0 && self.heads > 0 && self.heads.is_multiple_of(self.kv_heads);
        let heads = format!("{} and {}", self.heads, self.kv_heads);
        require("qkv_rope", "C3", grouped, "heads to be a positive multiple of kv_heads", heads)?;
        let count =
            3 + usize::from(self.gain) + usize::from(self.bias) + 2 * usize::from(self.qk_norm.is_some());
        arity("qkv_rope", count..=count, inputs.len())?;
        let Roles { norm, linear, head_gains, positions } = self.roles(inputs)?;
        let w = &linear[0];
        let x = match self.eps {
            Some(eps) => super::RmsNorm { eps }.infer(&norm)?.remove(0),
            None => norm[0].clone(),
        };
        // The results have one row per token, so x cannot have further axes.
        require("qkv_rope", "C4", x.rank() == 2, "x of rank 2", &x)?;
        let y = super::Linear {}.infer(&[&[x], &linear[..]].concat())?;
        let width = self.width();
        let rows = width.map_or("fewer heads".to_owned(), |n| format!("{n} rows"));
        require("qkv_rope", "C1", width.map(Dim::Fixed) == Some(w.shape[0]), rows, w)?;
        let t = y[0].shape[0];
        let mut out = Vec::with_capacity(3);
        for (i, heads) in [self.heads, self.kv_heads].into_iter().enumerate() {
            let mut v = TensorType::f32([t, heads.into(), self.head_dim.into()]);
            if let Some((eps, gains)) = &head_gains {
                v = super::RmsNorm { eps: *eps }.infer(&[v, gains[i].clone()])?.remove(0);
            }
            out.extend(self.rope().infer(&[v, positions.clone()])?);
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
        let Roles { norm, linear, head_gains, positions } = self.roles(inputs)?;
        let n = match self.eps {
            Some(eps) => super::RmsNorm { eps }.eval(cx, &norm)?.remove(0),
            None => norm[0].clone(),
        };
        let y = super::Linear {}.eval(cx, &[&[n], &linear[..]].concat())?.remove(0);
        let tokens = y.shape[0];
        let mut start = 0;
        let mut out = Vec::with_capacity(3);
        for (i, heads) in [self.heads, self.kv_heads, self.kv_heads].into_iter().enumerate() {
            let width = heads * self.head_dim;
            let part = y.rows().flat_map(|row| row[start..start + width].iter().copied()).collect();
            start += width;
            let mut v = Tensor::real([tokens, heads, self.head_dim], part);
            if i < 2 {
                if let Some((eps, gains)) = &head_gains {
                    v = super::RmsNorm { eps: *eps }.eval(cx, &[v, gains[i].clone()])?.remove(0);
                }
                v = self.rope().eval(cx, &[v, positions.clone()])?.remove(0);
            }
            out.push(v);
        }
        Ok(out)
    }

    fn decompose(&self, graph: &mut Graph, inputs: &[ValueId]) -> Result<Option<Vec<ValueId>>> {
        let Roles { norm, linear, head_gains, positions } = self.roles(inputs)?;
        let n = match self.eps {
            Some(eps) => graph.add1(super::RmsNorm { eps }, &norm)?,
            None => norm[0],
        };
        let y = graph.add1(super::Linear {}, &[&[n], &linear[..]].concat())?;
        let tokens = graph.ty(y).shape[0];
        let mut start = 0;
        let mut out = Vec::with_capacity(3);
        for (i, heads) in [self.heads, self.kv_heads, self.kv_heads].into_iter().enumerate() {
            let len = heads * self.head_dim;
            let part = graph.add1(super::Slice { start, len }, &[y])?;
            start += len;
            let shape = vec![tokens, heads.into(), self.head_dim.into()];
            let mut v = graph.add1(super::Reshape { shape }, &[part])?;
            if i < 2 {
                if let Some((eps, gains)) = &head_gains {
                    v = graph.add1(super::RmsNorm { eps: *eps }, &[v, gains[i]])?;
                }
                v = graph.add1(self.rope(), &[v, positions])?;
            }
            out.push(v);
        }
        Ok(Some(out))
    }
}
