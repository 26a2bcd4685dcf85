//! `; test size`.

use super::{Case, Verdict};
use anyhow::{Context, Result};
use attar_format::PackedLayout;
use attar_ir::Elem;
use std::fmt::Write as _;

pub(super) fn test(case: &Case<'_>) -> Result<Verdict> {
    let graph = case.function.graph()?;
    let mut out = String::new();
    let (mut total_bytes, mut total_count) = (0, 0);
    for (_, weight) in graph.weights() {
        let shape: Vec<usize> = weight.ty.shape.iter().filter_map(|d| d.fixed()).collect();
        let count: usize = shape.iter().product();
        let bytes = match (weight.ty.elem, shape.as_slice()) {
            (elem, [n, k]) => {
                let format = match elem {
                    Elem::Coded(format) => format,
                    Elem::Plain(_) => &attar_format::formats::F32,
                };
                PackedLayout::new(format, *n, *k).context("the format cannot hold the shape")?.total_bytes()
            }
            _ => count * 4,
        };
        let bits = bytes as f64 * 8.0 / count as f64;
        writeln!(out, "@{} {}: {bytes} bytes, {bits:.3} bits per weight", weight.name, weight.ty)?;
        total_bytes += bytes;
        total_count += count;
    }
    let bits = total_bytes as f64 * 8.0 / total_count.max(1) as f64;
    write!(out, "total: {total_bytes} bytes, {bits:.3} bits per weight")?;
    case.check_block("size", &out)
}
