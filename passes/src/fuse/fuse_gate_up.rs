//! `fuse-gate-up`: the gate and up projections of a gated MLP as one linear.
//!
//! Before: `%g = linear %x, %wg`, `%u = linear %x, %wu`, `%s = silu %g`, `%y = mul %s, %u`.
//! After: `%a = linear %x, %w`, `%g = slice %a`, `%u = slice %a`, … with `%w` all gate rows, then all up rows.
//! Preconditions: one input, weights of one format (and one table) with no other use; else the block is left as
//! it is and the metrics say why.
//! Numerics: exact.   Cost: the coded weights of two matrices are copied once.
//! Reference: Shazeer 2020, arXiv:2002.05202 (the gated MLP).

use super::linear_at::{LinearAt, linear_at};
use super::stacked_linear::stack_linears;
use attar_plugin::{About, Context, NoOptions, Numerics, Pass, Phase, Result, Value};

/// See the file's header.
pub(crate) struct FuseGateUp;

attar_plugin::plugin! { passes: [FuseGateUp] }

impl Pass for FuseGateUp {
    type Options = NoOptions;

    const ABOUT: About = About {
        name: "fuse-gate-up",
        summary: "joins the gate and up projections of a gated MLP into one linear",
        phase: Phase::Fuse,
        numerics: Numerics::Exact,
        takes_tensors: false,
    };

    fn run(_: &NoOptions, cx: &Context<'_>) -> Result<()> {
        for node in cx.nodes_of("mul")? {
            // Its factors may stand in either order.
            let [a, b] = cx.inputs_of(node)?[..] else { continue };
            let found = match gate_and_up(cx, a, b)? {
                Some(found) => Some(found),
                None => gate_and_up(cx, b, a)?,
            };
            if let Some(parts) = found {
                stack_linears(cx, &parts)?;
            }
        }
        Ok(())
    }
}

/// The two linears behind `mul(silu(gate), up)`.
fn gate_and_up(cx: &Context<'_>, activated: Value, up: Value) -> Result<Option<[LinearAt; 2]>> {
    if cx.op_of(activated)? != "silu" {
        return Ok(None);
    }
    let gate = cx.inputs_of(cx.node_of(activated)?)?[0];
    let (Some(gate), Some(up)) = (linear_at(cx, gate)?, linear_at(cx, up)?) else { return Ok(None) };
    Ok((gate.x == up.x && gate.node != up.node).then_some([gate, up]))
}
