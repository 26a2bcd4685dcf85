//! `fuse-rope`: the joined q, k, v projection with head norms and rotation, as one `qkv_rope`.
//!
//! Before: `%y = linear %x, %w`; q, k, v = `slice %y`, `reshape` to heads; optionally `rms_norm` of q and k per
//! head; `rope` of q and k.   After: `%q, %k, %v = qkv_rope %x, %w, …, %positions`.
//! Preconditions: the three slices are all of `%y` and in the order q, k, v; everything between has no other
//! use; q and k are rotated alike and both normed with a gain and one eps, or neither.
//! Numerics: exact (the fused op is defined by these ops).   Cost: none.
//! Reference: Su et al. 2021, arXiv:2104.09864 (rotation); Dehghani et al. 2023, arXiv:2302.05442 (head norms).

use super::linear_at::{LinearAt, linear_at};
use attar_plugin::{
    About, Attr, Context, Dim, NoOptions, Node, Numerics, Pass, Phase, Result, Value, borrowed,
};

/// See the file's header.
pub(crate) struct FuseRope;

attar_plugin::plugin! { passes: [FuseRope] }

impl Pass for FuseRope {
    type Options = NoOptions;

    const ABOUT: About = About {
        name: "fuse-rope",
        summary: "joins a qkv projection, its head norms and its rotation",
        phase: Phase::Fuse,
        numerics: Numerics::Exact,
        takes_tensors: false,
    };

    fn run(_: &NoOptions, cx: &Context<'_>) -> Result<()> {
        for node in cx.nodes_of("attention")? {
            let Some(found) = matched(cx, node)? else { continue };
            if !cx.rewrite(&cx.node(node)?.name)? {
                continue;
            }
            let fused = cx.add_node("qkv_rope", &found.inputs, &borrowed(&found.attrs))?;
            for (old, new) in found.results.into_iter().zip(cx.outputs_of(fused)?) {
                cx.replace_uses(old, new)?;
                cx.remove_unused(cx.node_of(old)?)?;
            }
        }
        Ok(())
    }
}

/// A fused op to be.
struct Match {
    attrs: Vec<(String, Attr)>,
    inputs: Vec<Value>,
    /// What stands for q, k and v now.
    results: [Value; 3],
}

/// One rotated part: from the slice to the result.
struct Rotated {
    slice: Heads,
    /// eps and gain.
    norm: Option<(Attr, Value)>,
    /// Attributes of the rotation.
    rope: Vec<(String, Attr)>,
    positions: Value,
}

/// A slice of the projection, as heads.
struct Heads {
    linear: LinearAt,
    start: usize,
    heads: usize,
    head_dim: usize,
}

fn matched(cx: &Context<'_>, attention: Node) -> Result<Option<Match>> {
    let inputs = cx.inputs_of(attention)?;
    let Some(&[q_result, k_result, v_result]) = inputs.first_chunk() else { return Ok(None) };
    let parts = (rotated(cx, q_result)?, rotated(cx, k_result)?, heads(cx, v_result)?);
    let (Some(q), Some(k), Some(v)) = parts else { return Ok(None) };
    let linear = q.slice.linear;
    let one_projection = linear == k.slice.linear && linear == v.linear;
    let d = q.slice.head_dim;
    let one_width = d == k.slice.head_dim && d == v.head_dim && k.slice.heads == v.heads;
    let (end_q, end_k) = (q.slice.heads * d, (q.slice.heads + k.slice.heads) * d);
    let in_order = q.slice.start == 0 && k.slice.start == end_q && v.start == end_k;
    let whole = cx.type_of(linear.w)?.dims[0] == Dim::Fixed(end_k + v.heads * d);
    let only_these = cx.uses(linear.y)?.len() == 3 && !cx.outputs()?.contains(&linear.y);
    let one_rotation = q.rope == k.rope && q.positions == k.positions;
    if !(one_projection && one_width && in_order && whole && only_these && one_rotation) {
        return Ok(None);
    }
    let (qk_norm, gains) = match (q.norm, k.norm) {
        (None, None) => (None, vec![]),
        (Some((eq, gq)), Some((ek, gk))) if eq == ek => (Some(eq), vec![gq, gk]),
        _ => return Ok(None),
    };
    let count = |n: usize| Attr::Int(n as i64);
    let mut attrs = vec![
        ("heads".to_owned(), count(q.slice.heads)),
        ("kv_heads".to_owned(), count(k.slice.heads)),
        ("head_dim".to_owned(), count(d)),
        ("bias".to_owned(), linear.b.is_some().into()),
    ];
    attrs.extend(q.rope);
    attrs.extend(qk_norm.map(|eps| ("qk_norm".to_owned(), eps)));
    let mut inputs = vec![linear.x, linear.w];
    inputs.extend(linear.b);
    inputs.extend(gains);
    inputs.push(q.positions);
    Ok(Some(Match { attrs, inputs, results: [q_result, k_result, v_result] }))
}

fn rotated(cx: &Context<'_>, result: Value) -> Result<Option<Rotated>> {
    let rotation = cx.node_of(result)?;
    if cx.node(rotation)?.op != "rope" {
        return Ok(None);
    }
    let [mut x, positions] = cx.inputs_of(rotation)?[..] else { return Ok(None) };
    if cx.only_use(x)?.is_none() {
        return Ok(None);
    }
    let mut norm = None;
    if cx.op_of(x)? == "rms_norm" {
        let node = cx.node_of(x)?;
        let (&[before, gain], Some(eps)) = (&cx.inputs_of(node)?[..], cx.attr(node, "eps")?) else {
            return Ok(None);
        };
        if cx.only_use(before)?.is_none() {
            return Ok(None);
        }
        (norm, x) = (Some((eps, gain)), before);
    }
    let Some(slice) = heads(cx, x)? else { return Ok(None) };
    Ok(Some(Rotated { slice, norm, rope: cx.attrs(rotation)?, positions }))
}

/// Reads `reshape(slice(linear))` with a result `[T, H, Dh]`; the slice has no other use.
fn heads(cx: &Context<'_>, v: Value) -> Result<Option<Heads>> {
    if cx.op_of(v)? != "reshape" {
        return Ok(None);
    }
    let [t, Dim::Fixed(heads), Dim::Fixed(head_dim)] = cx.type_of(v)?.dims[..] else { return Ok(None) };
    let sliced = cx.inputs_of(cx.node_of(v)?)?[0];
    let slice = cx.node_of(sliced)?;
    if cx.node(slice)?.op != "slice"
        || cx.type_of(sliced)?.dims[..] != [t, Dim::Fixed(heads * head_dim)]
        || cx.only_use(sliced)?.is_none()
    {
        return Ok(None);
    }
    let Some(Attr::Int(start)) = cx.attr(slice, "start")? else { return Ok(None) };
    let Some(linear) = linear_at(cx, cx.inputs_of(slice)?[0])? else { return Ok(None) };
    Ok(Some(Heads { linear, start: start as usize, heads, head_dim }))
}
