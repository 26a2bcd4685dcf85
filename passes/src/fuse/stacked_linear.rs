//! Several linears of one input as one linear on stacked rows, shared by `fuse-qkv` and `fuse-gate-up`.

use super::linear_at::LinearAt;
use attar_plugin::{Context, Result};

/// Replaces `parts` by one linear and a slice for each. Leaves the graph alone, and records why, when the parts
/// do not fit together.
pub(super) fn stack_linears(cx: &Context<'_>, parts: &[LinearAt]) -> Result<()> {
    let mut names = Vec::with_capacity(parts.len());
    for part in parts {
        let Some(name) = cx.weight_of(part.w)? else { return Ok(()) };
        names.push(name);
    }
    let mut biases = Vec::with_capacity(parts.len());
    for part in parts {
        biases.push(part.b.map(|b| cx.weight_of(b)).transpose()?);
    }
    let name = stacked_name(&names);
    if let Some(reason) = misfit(cx, parts, &names)? {
        return cx.refused(&name, &reason);
    }
    if biases.iter().any(|b| matches!(b, Some(None))) {
        return cx.refused(&name, "a bias is computed, not a weight");
    }
    // A tensor that the graph does not use changes nothing yet.
    let w = cx.fresh_name(&name);
    let each: Vec<&str> = names.iter().map(String::as_str).collect();
    if !cx.stack(&w, &each)? {
        return cx.refused(&name, "tables differ");
    }
    if !cx.rewrite(&name)? {
        return Ok(());
    }

    let mut rows = Vec::with_capacity(parts.len());
    for name in &names {
        rows.push(cx.tensor(name)?.shape[0]);
    }
    let mut inputs = vec![parts[0].x, cx.add_weight(&w)?];
    let given: Vec<String> = biases.iter().flatten().flatten().cloned().collect();
    if !given.is_empty() {
        // With one bias given the stacked name would be that of the part.
        let stem = if given.len() > 1 { stacked_name(&given) } else { format!("{name}.bias") };
        let b = cx.fresh_name(&stem);
        // A bias that is missing is zeros.
        let mut values = cx.create(&b, &[rows.iter().sum()])?;
        let mut start = 0;
        for (bias, rows) in biases.iter().zip(&rows) {
            if let Some(bias) = bias.as_ref().and_then(Option::as_ref) {
                values[start..start + rows].copy_from_slice(&cx.read(bias)?);
            }
            start += rows;
        }
        values.commit()?;
        inputs.push(cx.add_weight(&b)?);
    }
    let y = cx.add("linear", &inputs, &[])?;
    let mut start = 0;
    for (part, len) in parts.iter().zip(rows) {
        let attrs = [("start", (start as i64).into()), ("len", (len as i64).into())];
        let slice = cx.add("slice", &[y], &attrs)?;
        cx.replace(part.node, &[slice])?;
        start += len;
    }
    Ok(())
}

/// Why the parts cannot be stacked.
fn misfit(cx: &Context<'_>, parts: &[LinearAt], names: &[String]) -> Result<Option<String>> {
    let mut formats = Vec::with_capacity(names.len());
    for name in names {
        formats.push(cx.tensor(name)?.elem);
    }
    if formats.iter().any(|f| *f != formats[0]) {
        return Ok(Some(format!("formats differ: {}", formats.join(", "))));
    }
    for part in parts {
        if cx.only_use(part.w)?.is_none() {
            return Ok(Some("a weight has other uses and would be stored twice".to_owned()));
        }
    }
    Ok(None)
}

/// What the names have in common, around what they have not: `a.q_proj.weight`, `a.k_proj.weight` give
/// `a.q_k_proj.weight`.
fn stacked_name(names: &[String]) -> String {
    let first = names[0].as_str();
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
        let name = |names: &[&str]| stacked_name(&names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>());
        assert_eq!(
            name(&["l.0.q_proj.weight", "l.0.k_proj.weight", "l.0.v_proj.weight"]),
            "l.0.q_k_v_proj.weight"
        );
        assert_eq!(name(&["l.gate_proj.weight", "l.up_proj.weight"]), "l.gate_up_proj.weight");
        assert_eq!(name(&["aba", "aa"]), "ab_a");
        assert_eq!(name(&["é1x", "é22x"]), "é1_22x");
    }
}
