//! `fuse-rope`: the joined q, k, v projection with head norms and rotation, as one `qkv_rope`.
//!
//! Before: `%y = linear %x, %w`; q, k, v = `slice %y`, `reshape` to heads; optionally `rms_norm` of q and k per
//! head; `rope` of q and k.   After: `%q, %k, %v = qkv_rope %x, %w, …, %positions`.
//! Preconditions: the three slices are all of `%y` and in the order q, k, v; everything between has no other
//! use; q and k are rotated alike and both normed with a gain and one eps, or neither.
//! Numerics: exact (the fused op is defined by these ops).   Cost: none.
//! Reference: Su et al. 2021, arXiv:2104.09864 (rotation); Dehghani et al. 2023, arXiv:2302.05442 (head norms).

use crate::pattern::{LinearAt, linear_at, only_user, out, remove_unused};
use attar_ir::ops::{QkvRope, Rope};
use attar_ir::{Dim, Graph, NodeId, OpKind, ValueId};
use attar_pass::{Changed, Numerics, Pass, PassCx, PassDecl, Phase, Registered, Result};

struct FuseRope;

static DECL: PassDecl = PassDecl {
    name: "fuse-rope",
    summary: "joins a qkv projection, its head norms and its rotation",
    phase: Phase::Fuse,
    numerics: Numerics::Exact,
    takes_tensors: false,
    options: &[],
    file: file!(),
    make: &|_| Ok(Box::new(FuseRope)),
};

attar_pass::inventory::submit!(Registered(&DECL));

impl Pass for FuseRope {
    fn decl(&self) -> &'static PassDecl {
        &DECL
    }

    fn run(&self, graph: &mut Graph, cx: &mut PassCx<'_>) -> Result<Changed> {
        for id in graph.topo() {
            if !graph.contains(id) {
                continue;
            }
            let Some(found) = matched(graph, id) else { continue };
            if !cx.rewrite(&graph.node(id).name) {
                continue;
            }
            let fused = graph.add(found.op, &found.inputs)?;
            for (slot, old) in found.results.into_iter().enumerate() {
                graph.replace_uses(old, ValueId { node: fused, slot: slot as u16 })?;
                remove_unused(graph, old.node)?;
            }
        }
        Ok(cx.changed())
    }
}

struct Match {
    op: QkvRope,
    inputs: Vec<ValueId>,
    /// What stands for q, k and v now.
    results: [ValueId; 3],
}

/// One rotated part: from the slice to the result.
struct Rotated<'a> {
    slice: Heads,
    norm: Option<(f64, ValueId)>,
    rope: &'a Rope,
    positions: ValueId,
    result: ValueId,
}

/// A slice of the projection, as heads.
struct Heads {
    linear: LinearAt,
    start: usize,
    heads: usize,
    head_dim: usize,
}

fn matched(graph: &Graph, attention: NodeId) -> Option<Match> {
    let OpKind::Attention(_) = graph.op(attention) else { return None };
    let inputs = graph.inputs_of(attention);
    let [q, k, v] = *inputs.get(..3)? else { return None };
    let (q, k, v) = (rotated(graph, q)?, rotated(graph, k)?, heads(graph, v).map(|h| (h, v))?);
    let linear = q.slice.linear;
    let one_projection = linear == k.slice.linear && linear == v.0.linear;
    let d = q.slice.head_dim;
    let one_width = d == k.slice.head_dim && d == v.0.head_dim && k.slice.heads == v.0.heads;
    let (end_q, end_k) = (q.slice.heads * d, (q.slice.heads + k.slice.heads) * d);
    let in_order = q.slice.start == 0 && k.slice.start == end_q && v.0.start == end_k;
    let whole = graph.ty(linear.w).shape[0] == Dim::Fixed(end_k + v.0.heads * d);
    let only_these = graph.users(linear.y()).len() == 3 && !graph.outputs().contains(&linear.y());
    if !(one_projection && one_width && in_order && whole && only_these) {
        return None;
    }
    if q.rope != k.rope || q.positions != k.positions {
        return None;
    }
    let (qk_norm, gains) = match (q.norm, k.norm) {
        (None, None) => (None, vec![]),
        (Some((eq, gq)), Some((ek, gk))) if eq == ek => (Some(eq), vec![gq, gk]),
        _ => return None,
    };
    let op = QkvRope {
        heads: q.slice.heads,
        kv_heads: k.slice.heads,
        head_dim: d,
        inv_freq: q.rope.inv_freq.clone(),
        mscale: q.rope.mscale,
        eps: None,
        qk_norm,
        gain: false,
        bias: linear.b.is_some(),
    };
    let mut inputs = vec![linear.x, linear.w];
    inputs.extend(linear.b);
    inputs.extend(gains);
    inputs.push(q.positions);
    Some(Match { op, inputs, results: [q.result, k.result, v.1] })
}

fn rotated(graph: &Graph, result: ValueId) -> Option<Rotated<'_>> {
    let OpKind::Rope(rope) = graph.op(result.node) else { return None };
    let [mut x, positions] = graph.inputs_of(result.node)[..] else { return None };
    only_user(graph, x)?;
    let mut norm = None;
    if let OpKind::RmsNorm(n) = graph.op(x.node) {
        let [before, gain] = graph.inputs_of(x.node)[..] else { return None };
        norm = Some((n.eps, gain));
        x = before;
        only_user(graph, x)?;
    }
    Some(Rotated { slice: heads(graph, x)?, norm, rope, positions, result })
}

/// Reads `reshape(slice(linear))` with a result `[T, H, Dh]`; the slice has no other use.
fn heads(graph: &Graph, v: ValueId) -> Option<Heads> {
    let OpKind::Reshape(_) = graph.op(v.node) else { return None };
    let [t, Dim::Fixed(heads), Dim::Fixed(head_dim)] = graph.ty(v).shape[..] else { return None };
    let sliced = *graph.inputs_of(v.node).first()?;
    let OpKind::Slice(slice) = graph.op(sliced.node) else { return None };
    if graph.ty(sliced).shape[..] != [t, Dim::Fixed(heads * head_dim)] {
        return None;
    }
    only_user(graph, sliced)?;
    let y = *graph.inputs_of(sliced.node).first()?;
    let linear = linear_at(graph, y)?;
    (out(linear.node) == y).then_some(Heads { linear, start: slice.start, heads, head_dim })
}
