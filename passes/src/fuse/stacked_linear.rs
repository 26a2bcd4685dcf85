//! Several linears of one input as one linear on stacked rows, shared by `fuse-qkv` and `fuse-gate-up`.

use crate::pattern::{LinearAt, fresh_name, replace, weight_name};
use attar_ir::ops::{Linear, Slice};
use attar_ir::{Elem, Graph, TensorType, WeightName, WeightStore};
use attar_pass::{PassCx, Result};

/// Replaces `parts` by one linear and a slice for each. Leaves the graph alone, and records why, when the parts
/// do not fit together. Returns whether it was done.
pub(super) fn stack_linears(graph: &mut Graph, cx: &mut PassCx<'_>, parts: &[LinearAt]) -> Result<bool> {
    let Some(names) = parts.iter().map(|p| weight_name(graph, p.w)).collect::<Option<Vec<_>>>() else {
        return Ok(false);
    };
    let names: Vec<WeightName> = names.into_iter().map(WeightName::from).collect();
    let biases: Vec<Option<WeightName>> =
        parts.iter().map(|p| p.b.and_then(|b| weight_name(graph, b)).map(WeightName::from)).collect();
    let name = stacked_name(&names);
    if let Some(reason) = misfit(graph, cx.weights, parts, &names)? {
        cx.refused(&name, &reason);
        return Ok(false);
    }
    if parts.iter().zip(&biases).any(|(p, b)| p.b.is_some() && b.is_none()) {
        cx.refused(&name, "a bias is computed, not a weight");
        return Ok(false);
    }
    if !cx.rewrite(&name) {
        return Ok(false);
    }

    let rows: Vec<usize> = parts.iter().filter_map(|p| graph.ty(p.w).shape[0].fixed()).collect();
    let total: usize = rows.iter().sum();
    let k = graph.ty(parts[0].w).shape[1];
    let w = cx.weights.add_concat_rows(&fresh_name(cx.weights, &name), &names)?;
    let elem = cx.weights.info(&w)?.elem;
    let mut inputs = vec![parts[0].x, graph.add_weight(&w, TensorType::new(elem, [total.into(), k]))];
    if biases.iter().any(Option::is_some) {
        let mut values = Vec::with_capacity(total);
        for (bias, rows) in biases.iter().zip(&rows) {
            match bias {
                Some(b) => values.extend(cx.weights.read_f32(b)?),
                None => values.resize(values.len() + rows, 0.0),
            }
        }
        let given: Vec<WeightName> = biases.iter().flatten().cloned().collect();
        // With one bias given the stacked name would be that of the part.
        let bias_name = if given.len() > 1 { stacked_name(&given) } else { format!("{name}.bias") };
        let b = cx.weights.add_values(&fresh_name(cx.weights, &bias_name), &[total], values);
        inputs.push(graph.add_weight(&b, TensorType::f32([total.into()])));
    }
    let y = graph.add1(Linear {}, &inputs)?;
    let mut start = 0;
    for (part, len) in parts.iter().zip(rows) {
        let slice = graph.add1(Slice { start, len }, &[y])?;
        replace(graph, part.node, &[slice])?;
        start += len;
    }
    Ok(true)
}

/// Why the parts cannot be stacked.
fn misfit(
    graph: &Graph,
    weights: &WeightStore,
    parts: &[LinearAt],
    names: &[WeightName],
) -> Result<Option<String>> {
    let elem = graph.ty(parts[0].w).elem;
    if parts.iter().any(|p| graph.ty(p.w).elem != elem) {
        let each: Vec<&str> = parts.iter().map(|p| graph.ty(p.w).elem.name()).collect();
        return Ok(Some(format!("formats differ: {}", each.join(", "))));
    }
    if parts.iter().any(|p| !graph.has_one_use(p.w)) {
        return Ok(Some("a weight has other uses and would be stored twice".to_owned()));
    }
    if let Elem::Coded(format) = elem
        && format.table().is_some()
    {
        let first = weights.read_encoded(&names[0])?;
        for name in &names[1..] {
            let other = weights.read_encoded(name)?;
            if (other.table, other.shift) != (first.table, first.shift) {
                return Ok(Some("tables differ".to_owned()));
            }
        }
    }
    Ok(None)
}

/// What the names have in common, around what they have not: `a.q_proj.weight`, `a.k_proj.weight` give
/// `a.q_k_proj.weight`.
fn stacked_name(names: &[WeightName]) -> String {
    let first = &*names[0];
    let shared = |a: &mut dyn Iterator<Item = char>, b: &mut dyn Iterator<Item = char>| {
        a.zip(b).take_while(|(x, y)| x == y).map(|(x, _)| x.len_utf8()).sum::<usize>()
    };
    let head = names.iter().map(|n| shared(&mut first.chars(), &mut n.chars())).min().unwrap_or(0);
    let shortest = names.iter().map(|n| n.len()).min().unwrap_or(0);
    let tail =
        names.iter().map(|n| shared(&mut first.chars().rev(), &mut n.chars().rev())).min().unwrap_or(0);
    let tail = tail.min(shortest - head);
    let middles: Vec<&str> = names.iter().map(|n| &n[head..n.len() - tail]).collect();
    format!("{}{}{}", &first[..head], middles.join("_"), &first[first.len() - tail..])
}

#[cfg(test)]
mod tests {
    use super::stacked_name;

    #[test]
    fn stacked_names_keep_what_is_common() {
        let name = |names: &[&str]| stacked_name(&names.iter().map(|n| (*n).into()).collect::<Vec<_>>());
        assert_eq!(
            name(&["l.0.q_proj.weight", "l.0.k_proj.weight", "l.0.v_proj.weight"]),
            "l.0.q_k_v_proj.weight"
        );
        assert_eq!(name(&["l.gate_proj.weight", "l.up_proj.weight"]), "l.gate_up_proj.weight");
        assert_eq!(name(&["aba", "aa"]), "ab_a");
        assert_eq!(name(&["é1x", "é22x"]), "é1_22x");
    }
}
