//! Random valid graphs: decoder models as importers build them, and arbitrary compositions of core and fused ops.

use attar_format::{FormatRef, formats};
use attar_ir::ops::{
    Add, Attention, Embed, GateUpSwiglu, GatherRows, Gelu, LayerNorm, Linear, LinearResidual, Mul,
    NormLinear, QkvRope, Reshape, RmsNorm, Rope, Silu, Slice, Softmax,
};
use attar_ir::{Dim, Elem, Graph, NodeId, OpKind, Result, TensorType, ValueId};
use proptest::prelude::*;
use proptest::sample::select;

/// Of all norms. Real models have 1e-5 and hundreds of channels; where two channels nearly cancel, that would make one rounding
/// of a weight three hundred times as large, and no tolerance could tell that from a mistake.
const EPS: f64 = 1e-2;

/// A decoder as importers build it, in core ops.
#[derive(Clone, Debug)]
pub struct Model {
    pub layers: usize,
    pub kv_heads: usize,
    /// Query heads per KV head.
    pub group: usize,
    pub head_dim: usize,
    pub dim: usize,
    pub ffn: usize,
    pub vocab: usize,
    pub window: Option<usize>,
    /// Norms of q and k per head (Qwen3).
    pub qk_norm: bool,
    /// Biases of q, k and v (Qwen2).
    pub bias: bool,
    /// The head is the embedding.
    pub tied: bool,
    pub format: FormatRef,
}

/// Models of one or two layers whose widths are small multiples of `unit`. A unit of 2 keeps the interpreter fast; one
/// of 16 reaches every fused kernel, and allows compressed formats.
pub fn models(unit: usize) -> impl Strategy<Value = Model> {
    let format =
        if unit.is_multiple_of(16) { select(formats::ALL).boxed() } else { Just(&formats::F32).boxed() };
    // Compressed formats need widths that are multiples of 32.
    let wide = if unit.is_multiple_of(16) { unit.next_multiple_of(32) } else { unit };
    let widths = (1..3usize, 1..3usize, 1..3usize, 1..3usize, 1..4usize, 3..40usize);
    let flags = (proptest::option::of(1..5usize), any::<bool>(), any::<bool>(), any::<bool>());
    (widths, flags, format).prop_map(move |(widths, flags, format)| {
        let (layers, kv_heads, group, dim, ffn, vocab) = widths;
        let (window, qk_norm, bias, tied) = flags;
        // q's width is also the K of the output projection.
        let head_dim = if (kv_heads * group * unit).is_multiple_of(wide) { unit } else { wide };
        let (dim, ffn) = (dim * wide, ffn * wide);
        Model { layers, kv_heads, group, head_dim, dim, ffn, vocab, window, qk_norm, bias, tied, format }
    })
}

impl Model {
    /// The graph of one step.
    ///
    /// # Errors
    /// Never for a model that [`models`] makes.
    pub fn graph(&self) -> Result<Graph> {
        let heads = self.kv_heads * self.group;
        let mut b = Builder { graph: Graph::new("model"), format: self.format };
        let tokens = b.graph.add_input("tokens", TensorType::i32([Dim::T]));
        let positions = b.graph.add_input("positions", TensorType::i32([Dim::T]));
        let rows = b.graph.add_input("rows", TensorType::i32([Dim::R]));
        let table = b.matrix("model.embed_tokens.weight", self.vocab, self.dim);
        let mut x = b.graph.add1(Embed {}, &[tokens, table])?;
        for layer in 0..self.layers {
            let name = |part: &str| format!("model.layers.{layer}.{part}");
            let gain = b.vector(&name("input_layernorm.weight"), self.dim);
            let n = b.graph.add1(RmsNorm { eps: EPS }, &[x, gain])?;
            let mut qkv = Vec::with_capacity(3);
            for (part, count) in [("q", heads), ("k", self.kv_heads), ("v", self.kv_heads)] {
                let width = count * self.head_dim;
                let mut inputs =
                    vec![n, b.matrix(&name(&format!("self_attn.{part}_proj.weight")), width, self.dim)];
                if self.bias {
                    inputs.push(b.vector(&name(&format!("self_attn.{part}_proj.bias")), width));
                }
                let y = b.graph.add1(Linear {}, &inputs)?;
                let shape = vec![Dim::T, count.into(), self.head_dim.into()];
                let mut y = b.graph.add1(Reshape { shape }, &[y])?;
                if part != "v" {
                    if self.qk_norm {
                        let gain = b.vector(&name(&format!("self_attn.{part}_norm.weight")), self.head_dim);
                        y = b.graph.add1(RmsNorm { eps: EPS }, &[y, gain])?;
                    }
                    y = b.graph.add1(rope(self.head_dim), &[y, positions])?;
                }
                qkv.push(y);
            }
            let scale = 1.0 / (self.head_dim as f64).sqrt();
            let attention = Attention { layer, scale, window: self.window };
            let a = b.graph.add1(attention, &[qkv[0], qkv[1], qkv[2], positions])?;
            let width = heads * self.head_dim;
            let a = b.graph.add1(Reshape { shape: vec![Dim::T, width.into()] }, &[a])?;
            let w = b.matrix(&name("self_attn.o_proj.weight"), self.dim, width);
            let o = b.graph.add1(Linear {}, &[a, w])?;
            x = b.graph.add1(Add {}, &[x, o])?;
            let gain = b.vector(&name("post_attention_layernorm.weight"), self.dim);
            let n = b.graph.add1(RmsNorm { eps: EPS }, &[x, gain])?;
            let w = b.matrix(&name("mlp.gate_proj.weight"), self.ffn, self.dim);
            let gate = b.graph.add1(Linear {}, &[n, w])?;
            let w = b.matrix(&name("mlp.up_proj.weight"), self.ffn, self.dim);
            let up = b.graph.add1(Linear {}, &[n, w])?;
            let act = b.graph.add1(Silu {}, &[gate])?;
            let h = b.graph.add1(Mul {}, &[act, up])?;
            let w = b.matrix(&name("mlp.down_proj.weight"), self.dim, self.ffn);
            let down = b.graph.add1(Linear {}, &[h, w])?;
            x = b.graph.add1(Add {}, &[x, down])?;
        }
        let x = b.graph.add1(GatherRows {}, &[x, rows])?;
        let gain = b.vector("model.norm.weight", self.dim);
        let x = b.graph.add1(RmsNorm { eps: EPS }, &[x, gain])?;
        let head = if self.tied { table } else { b.matrix("lm_head.weight", self.vocab, self.dim) };
        let logits = b.graph.add1(Linear {}, &[x, head])?;
        b.graph.set_outputs(vec![logits]);
        Ok(b.graph)
    }
}

/// One step of a composition: an op, and numbers its operands and widths are chosen by.
#[derive(Clone, Debug)]
pub struct Pick {
    pub op: usize,
    pub operands: [usize; 3],
    pub width: usize,
    pub flags: [bool; 3],
}

/// Choices for [`compose`]; shorter lists are simpler graphs, so failures shrink well.
pub fn picks(len: std::ops::Range<usize>) -> impl Strategy<Value = Vec<Pick>> {
    let pick = (0..OPS, any::<[u8; 3]>(), 0..3usize, any::<[bool; 3]>());
    let pick =
        pick.prop_map(|(op, at, width, flags)| Pick { op, operands: at.map(usize::from), width, flags });
    proptest::collection::vec(pick, len)
}

/// Kinds of step [`compose`] knows.
const OPS: usize = 17;

/// A graph of the chosen ops over the values made so far, where they fit; everything that nobody uses is returned.
/// Widths are 1 to 3 times `unit`.
///
/// # Errors
/// Never, unless a fixed part of the graph breaks a rule.
pub fn compose(picks: &[Pick], unit: usize) -> Result<Graph> {
    let mut c = Composer {
        b: Builder { graph: Graph::new("composition"), format: &formats::F32 },
        unit,
        values: Vec::new(),
        heads: Vec::new(),
        weights: 0,
        layers: 0,
    };
    let tokens = c.b.graph.add_input("tokens", TensorType::i32([Dim::T]));
    let positions = c.b.graph.add_input("positions", TensorType::i32([Dim::T]));
    let rows = c.b.graph.add_input("rows", TensorType::i32([Dim::R]));
    let x = c.b.graph.add_input("x", TensorType::f32([Dim::T, (2 * unit).into()]));
    let table = c.matrix(7, 2 * unit);
    let embedded = c.b.graph.add1(Embed {}, &[tokens, table])?;
    c.values.extend([x, embedded]);
    // Every input has a user, so that the graph is a step whatever is picked.
    let kept = c.b.graph.add1(GatherRows {}, &[x, rows])?;
    c.values.push(kept);
    let turned = c.b.graph.add1(Reshape { shape: vec![Dim::T, 1.into(), (2 * unit).into()] }, &[embedded])?;
    let turned = c.b.graph.add1(rope(2 * unit), &[turned, positions])?;
    c.heads.push(turned);
    for pick in picks {
        // A step whose operands do not fit is left out.
        let _ = c.step(pick, positions, rows);
    }
    let graph = &mut c.b.graph;
    let is_value = |id: &NodeId| !matches!(graph.op(*id), OpKind::Weight(_) | OpKind::Input(_));
    let all: Vec<ValueId> = graph
        .ids()
        .filter(is_value)
        .flat_map(|node| {
            (0..graph.node(node).outputs.len()).map(move |slot| ValueId { node, slot: slot as u16 })
        })
        .collect();
    let unused = all.into_iter().filter(|v| graph.users(*v).is_empty()).collect();
    graph.set_outputs(unused);
    // A step that failed halfway leaves weights behind.
    for id in graph.ids().collect::<Vec<_>>() {
        if matches!(graph.op(id), OpKind::Weight(_)) && graph.users(ValueId { node: id, slot: 0 }).is_empty()
        {
            graph.remove(id)?;
        }
    }
    Ok(c.b.graph)
}

struct Builder {
    graph: Graph,
    format: FormatRef,
}

impl Builder {
    fn matrix(&mut self, name: &str, n: usize, k: usize) -> ValueId {
        let ty = TensorType::new(Elem::coded(self.format), [n.into(), k.into()]);
        self.graph.add_weight(&name.into(), ty)
    }

    fn vector(&mut self, name: &str, d: usize) -> ValueId {
        self.graph.add_weight(&name.into(), TensorType::f32([d.into()]))
    }
}

struct Composer {
    b: Builder,
    unit: usize,
    /// Values of rank 2.
    values: Vec<ValueId>,
    /// Values `[T, H, Dh]`.
    heads: Vec<ValueId>,
    weights: usize,
    layers: usize,
}

impl Composer {
    fn matrix(&mut self, n: usize, k: usize) -> ValueId {
        self.weights += 1;
        self.b.matrix(&format!("w{}", self.weights), n, k)
    }

    fn vector(&mut self, d: usize) -> ValueId {
        self.weights += 1;
        self.b.vector(&format!("v{}", self.weights), d)
    }

    fn last(&self, v: ValueId) -> usize {
        self.b.graph.ty(v).last().unwrap_or(1)
    }

    fn step(&mut self, pick: &Pick, positions: ValueId, rows: ValueId) -> Result<()> {
        let value = |at: usize| self.values[pick.operands[at] % self.values.len()];
        let head = |at: usize| self.heads[pick.operands[at] % self.heads.len()];
        let (a, b, q) = (value(0), value(1), head(0));
        let (k, n) = (self.last(a), (pick.width + 1) * self.unit);
        let [gain, bias, more] = pick.flags;
        let y = match pick.op {
            0 => self.b.graph.add1(Add {}, &[a, b])?,
            1 => self.b.graph.add1(Mul {}, &[a, b])?,
            2 => self.b.graph.add1(Silu {}, &[a])?,
            3 => self.b.graph.add1(Gelu {}, &[a])?,
            4 => self.b.graph.add1(Softmax {}, &[a])?,
            5 => {
                let mut inputs = vec![a, self.matrix(n, k)];
                if bias {
                    inputs.push(self.vector(n));
                }
                self.b.graph.add1(Linear {}, &inputs)?
            }
            6 => {
                let mut inputs = vec![a];
                if gain {
                    inputs.push(self.vector(k));
                }
                self.b.graph.add1(RmsNorm { eps: EPS }, &inputs)?
            }
            7 => {
                let inputs = [a, self.vector(k), self.vector(k)];
                self.b.graph.add1(LayerNorm { eps: EPS }, &inputs)?
            }
            8 => {
                let start = pick.operands[1] % k;
                self.b.graph.add1(Slice { start, len: (k - start).min(n) }, &[a])?
            }
            9 => self.b.graph.add1(GatherRows {}, &[a, rows])?,
            10 => {
                let mut inputs = vec![a];
                if gain {
                    inputs.push(self.vector(k));
                }
                inputs.push(self.matrix(n, k));
                if bias {
                    inputs.push(self.vector(n));
                }
                self.b.graph.add1(NormLinear { eps: EPS, gain, bias }, &inputs)?
            }
            11 => {
                let mut inputs = vec![a];
                let gain = gain && more;
                if gain {
                    inputs.push(self.vector(k));
                }
                inputs.push(self.matrix(2 * n, k));
                self.b.graph.add1(GateUpSwiglu { eps: more.then_some(EPS), gain }, &inputs)?
            }
            12 => {
                let n = self.last(b);
                let mut inputs = vec![a, self.matrix(n, k)];
                if bias {
                    inputs.push(self.vector(n));
                }
                inputs.push(b);
                self.b.graph.add1(LinearResidual { bias }, &inputs)?
            }
            13 => return self.qkv(pick, a, positions),
            14 => {
                let shape = vec![Dim::T, (k / self.unit).max(1).into(), (k / (k / self.unit).max(1)).into()];
                let y = self.b.graph.add1(Reshape { shape }, &[a])?;
                let y = if more { self.b.graph.add1(rope(self.last(y)), &[y, positions])? } else { y };
                self.heads.push(y);
                return Ok(());
            }
            15 => {
                let (key, value) = (head(1), head(2));
                let window = gain.then_some(pick.width + 1);
                let attention = Attention { layer: self.layers, scale: 0.3, window };
                let y = self.b.graph.add1(attention, &[q, key, value, positions])?;
                self.layers += 1;
                self.heads.push(y);
                return Ok(());
            }
            _ => {
                let [t, h, d] = self.b.graph.ty(q).shape[..] else { return Ok(()) };
                let width = h.fixed().unwrap_or(1) * d.fixed().unwrap_or(1);
                self.b.graph.add1(Reshape { shape: vec![t, width.into()] }, &[q])?
            }
        };
        self.values.push(y);
        Ok(())
    }

    /// A `qkv_rope`, half the time with the attention that reads it.
    fn qkv(&mut self, pick: &Pick, x: ValueId, positions: ValueId) -> Result<()> {
        let [gain, bias, attend] = pick.flags;
        let (kv_heads, heads, head_dim) = (1 + pick.width % 2, 2 * (1 + pick.width % 2), self.unit);
        let (k, n) = (self.last(x), (heads + 2 * kv_heads) * head_dim);
        let qk_norm = (pick.operands[2] % 2 == 1).then_some(EPS);
        let mut inputs = vec![x];
        if gain {
            inputs.push(self.vector(k));
        }
        inputs.push(self.matrix(n, k));
        if bias {
            inputs.push(self.vector(n));
        }
        if qk_norm.is_some() {
            inputs.extend([self.vector(head_dim), self.vector(head_dim)]);
        }
        inputs.push(positions);
        let Rope { inv_freq, mscale } = rope(head_dim);
        let eps = (gain || attend).then_some(EPS);
        let op = QkvRope { heads, kv_heads, head_dim, inv_freq, mscale, eps, qk_norm, gain, bias };
        let node = self.b.graph.add(op, &inputs)?;
        let out = |slot| ValueId { node, slot };
        if attend {
            let attention = Attention { layer: self.layers, scale: 0.3, window: None };
            let y = self.b.graph.add1(attention, &[out(0), out(1), out(2), positions])?;
            self.layers += 1;
            self.heads.push(y);
        } else {
            self.heads.extend([out(0), out(1), out(2)]);
        }
        Ok(())
    }
}

/// The usual frequencies for a head of that width.
fn rope(head_dim: usize) -> Rope {
    let half = head_dim / 2;
    Rope { inv_freq: (0..half).map(|i| 100f64.powf(-(i as f64) / half.max(1) as f64)).collect(), mscale: 1.0 }
}
