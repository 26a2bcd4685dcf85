//! `fuse-swiglu`: the joined gate and up projection with its activation, as one `gate_up_swiglu`.
//!
//! Before: `%a = linear %x, %w` of 2F rows, `%g = slice %a`, `%u = slice %a`, `%s = silu %g`, `%y = mul %s, %u`.
//! After: `%y = gate_up_swiglu %x, %w`.
//! Preconditions: the slices are the two halves, gate first; nothing between has another use; no bias; `%x` is a
//! matrix.
//! Numerics: exact (the fused op is defined by these ops).   Cost: none.
//! Reference: Shazeer 2020, arXiv:2002.05202.

use super::linear_at::{LinearAt, linear_at};
use attar_plugin::{About, Attr, Context, Dim, NoOptions, Numerics, Pass, Phase, Result, Value};

/// See the file's header.
pub(crate) struct FuseSwiglu;

attar_plugin::plugin! { passes: [FuseSwiglu] }

impl Pass for FuseSwiglu {
    type Options = NoOptions;

    const ABOUT: About = About {
        name: "fuse-swiglu",
        summary: "joins a gate and up projection and its activation",
        phase: Phase::Fuse,
        numerics: Numerics::Exact,
        takes_tensors: false,
    };

    fn run(_: &NoOptions, cx: &Context<'_>) -> Result<()> {
        for node in cx.nodes_of("mul")? {
            let [a, b] = cx.inputs_of(node)?[..] else { continue };
            let found = match read(cx, a, b)? {
                Some(linear) => Some(linear),
                None => read(cx, b, a)?,
            };
            let Some(linear) = found else { continue };
            if cx.rewrite(&cx.node(node)?.name)? {
                let y = cx.add("gate_up_swiglu", &[linear.x, linear.w], &[])?;
                cx.replace(node, &[y])?;
            }
        }
        Ok(())
    }
}

/// The linear behind both factors of a product, the first of which is activated.
fn read(cx: &Context<'_>, activated: Value, up: Value) -> Result<Option<LinearAt>> {
    if cx.op_of(activated)? != "silu" || cx.only_use(activated)?.is_none() {
        return Ok(None);
    }
    let gate = cx.inputs_of(cx.node_of(activated)?)?[0];
    let (Some((y, g_start, g_len)), Some((same, u_start, u_len))) = (half(cx, gate)?, half(cx, up)?) else {
        return Ok(None);
    };
    let Some(linear) = linear_at(cx, y)? else { return Ok(None) };
    let halves = g_start == 0 && u_start == g_len && g_len == u_len;
    let whole = cx.type_of(linear.w)?.dims[0] == Dim::Fixed(g_len.saturating_add(u_len));
    let only_these = cx.uses(y)?.len() == 2 && !cx.outputs()?.contains(&y);
    let plain = linear.b.is_none() && cx.type_of(linear.x)?.dims.len() == 2;
    Ok((y == same && halves && whole && only_these && plain).then_some(linear))
}

/// What a slice without other uses is cut from, where it begins and how long it is.
fn half(cx: &Context<'_>, v: Value) -> Result<Option<(Value, usize, usize)>> {
    let node = cx.node_of(v)?;
    if cx.node(node)?.op != "slice" || cx.only_use(v)?.is_none() {
        return Ok(None);
    }
    let (start, len) = (cx.attr(node, "start")?, cx.attr(node, "len")?);
    let (Some(Attr::Int(start)), Some(Attr::Int(len))) = (start, len) else { return Ok(None) };
    Ok(Some((cx.inputs_of(node)?[0], start as usize, len as usize)))
}
