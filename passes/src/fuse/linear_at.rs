//! A `linear` and what it takes, as the passes of this family look for it.

use attar_plugin::{Context, Node, Result, Value};

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct LinearAt {
    pub(super) node: Node,
    pub(super) x: Value,
    pub(super) w: Value,
    pub(super) b: Option<Value>,
    /// Its result.
    pub(super) y: Value,
}

/// The `linear` that makes a value.
pub(super) fn linear_at(cx: &Context<'_>, y: Value) -> Result<Option<LinearAt>> {
    let node = cx.node_of(y)?;
    if cx.node(node)?.op != "linear" {
        return Ok(None);
    }
    Ok(match cx.inputs_of(node)?[..] {
        [x, w] => Some(LinearAt { node, x, w, b: None, y }),
        [x, w, b] => Some(LinearAt { node, x, w, b: Some(b), y }),
        _ => None,
    })
}
