//! `; test eval`: values worked out by hand, and equal meaning around a pass.

use super::file::Edit;
use super::{Case, Verdict, pass};
use crate::random;
use crate::tolerance::tolerance;
use anyhow::{Context, Result, bail, ensure};
use attar_ir::interp::{self, KvState, Precision};
use attar_ir::{Elem, Graph, Tensor, TensorType, ValueId, WeightStore};
use serde_json::Value;
use std::collections::BTreeMap;

/// Values in comments have about seven digits.
const DIGITS: f64 = 2e-6;
/// Between f64 and a rounding to f32 after every op.
const SINGLE: f64 = 2e-5;

pub(super) fn test(case: &Case<'_>) -> Result<Verdict> {
    let graph = case.function.graph()?;
    let mut core = graph.clone();
    for id in graph.ids().collect::<Vec<_>>() {
        core.expand(id)?;
    }
    let mut given: BTreeMap<&str, Value> = BTreeMap::new();
    let (mut cache, mut single_cache, mut core_cache) = Default::default();
    let mut results: Option<Vec<Tensor>> = None;
    let mut edits = Vec::new();
    let mut checked = 0;
    for (at, line) in case.file.comments(case.function) {
        if let Some(assignment) = line.strip_prefix("with ") {
            ensure!(
                results.as_ref().is_none_or(Vec::is_empty),
                "line {}: one `; gives` per output first",
                at + 1
            );
            results = None;
            let (name, value) = assignment.split_once(" = ").context("expected `; with NAME = VALUE`")?;
            given.insert(name, serde_json::from_str(value).with_context(|| format!("line {}", at + 1))?);
        } else if let Some(wanted) = line.strip_prefix("gives ") {
            if results.as_ref().is_none_or(Vec::is_empty) {
                let double = evaluate(&graph, &given, Precision::F64, &mut cache)?;
                let single = evaluate(&graph, &given, Precision::F32, &mut single_cache)?;
                let expanded = evaluate(&core, &given, Precision::F64, &mut core_cache)?;
                ensure!(double == expanded, "decomposed it gives {expanded:?}, by itself {double:?}");
                for (a, b) in double.iter().zip(&single) {
                    ensure!(near(a.as_real(), b.as_real(), SINGLE), "in f32 it gives {b:?}, in f64 {a:?}");
                }
                results = Some(double);
            }
            let got =
                results.as_mut().filter(|r| !r.is_empty()).context("more `; gives` than outputs")?.remove(0);
            checked += 1;
            let wanted_value: Option<Value> = serde_json::from_str(wanted).ok();
            let is_same = match wanted_value.as_ref().map(flattened) {
                Some(Ok((shape, values))) => shape == got.shape && near(&numbers(&got), &values, DIGITS),
                _ => false,
            };
            if !is_same {
                let shown = nested(&got.shape, &numbers(&got));
                ensure!(case.update, "line {}: gives {shown}", at + 1);
                edits.push(Edit { range: at..at + 1, lines: vec![format!("; gives {shown}")] });
            }
        } else if let Some(wanted) = line.strip_prefix("fails ") {
            let error = match evaluate(&graph, &given, Precision::F64, &mut cache) {
                Ok(values) => bail!("line {}: gives {values:?} and does not fail", at + 1),
                Err(error) => format!("{error:#}"),
            };
            checked += 1;
            if error != wanted {
                ensure!(case.update, "line {}: fails {error}", at + 1);
                edits.push(Edit { range: at..at + 1, lines: vec![format!("; fails {error}")] });
            }
        }
    }
    ensure!(checked > 0, "neither `; gives` nor `; fails` behind the function");
    Ok(Verdict { edits, skipped: None })
}

pub(super) fn compare_around_pass(case: &Case<'_>, class: &str) -> Result<Verdict> {
    let tolerance = tolerance(class).with_context(|| format!("no tolerance class {class}"))?;
    let passes =
        case.file.directives.iter().find(|d| d.mode == "pass").context("no `; test pass=` beside it")?;
    let before = case.function.graph()?;
    for seed in 0..4 {
        let mut weights = random::weights(&before, seed)?;
        let inputs = random::inputs(&before, seed, random::Sequences::Two)?;
        let run = |graph: &Graph, weights: &WeightStore| {
            let cache = &mut KvState::default();
            interp::run_seqs(graph, weights, Precision::F64, cache, &inputs.tensors, &inputs.seqs)
        };
        let reference = run(&before, &weights)?;
        let mut after = before.clone();
        pass::run(passes, &mut after, &mut weights)?;
        let got = run(&after, &weights)?;
        ensure!(got.len() == reference.len(), "{} outputs instead of {}", got.len(), reference.len());
        for (i, (a, b)) in reference.iter().zip(&got).enumerate() {
            ensure!(a.shape == b.shape, "output {i} has shape {:?} instead of {:?}", b.shape, a.shape);
            let same = tolerance.check(a.as_real(), b.as_real());
            same.map_err(anyhow::Error::msg).with_context(|| format!("output {i}, seed {seed}"))?;
        }
    }
    Ok(Verdict::default())
}

fn evaluate(
    graph: &Graph,
    given: &BTreeMap<&str, Value>,
    precision: Precision,
    cache: &mut KvState,
) -> Result<Vec<Tensor>> {
    let mut store = WeightStore::new();
    for (_, weight) in graph.weights() {
        let value = given.get(format!("@{}", weight.name).as_str());
        let (shape, values) = flattened(value.with_context(|| format!("no `; with @{} = `", weight.name))?)?;
        ensure!(weight.ty.elem == Elem::F32, "@{}: values can be given for f32 weights only", weight.name);
        store.add_values(&weight.name, &shape, values.iter().map(|v| *v as f32).collect());
    }
    let mut inputs = Vec::new();
    for id in graph.inputs() {
        let name = &graph.node(*id).name;
        let value = given.get(format!("%{name}").as_str());
        let value = value.with_context(|| format!("no `; with %{name} = `"))?;
        inputs.push(tensor(graph.ty(ValueId { node: *id, slot: 0 }), value)?);
    }
    let seqs: Option<Vec<i32>> = given.get("seqs").map(|v| serde_json::from_value(v.clone())).transpose()?;
    Ok(match seqs {
        Some(seqs) => interp::run_seqs(graph, &store, precision, cache, &inputs, &seqs)?,
        None => interp::run(graph, &store, precision, cache, &inputs)?,
    })
}

fn tensor(ty: &TensorType, value: &Value) -> Result<Tensor> {
    let (shape, values) = flattened(value)?;
    Ok(if ty.elem == Elem::I32 {
        Tensor::int(shape, values.iter().map(|v| *v as i32).collect())
    } else {
        Tensor::real(shape, values)
    })
}

/// Shape and elements of nested lists.
fn flattened(value: &Value) -> Result<(Vec<usize>, Vec<f64>)> {
    let Value::Array(items) = value else {
        return Ok((Vec::new(), vec![value.as_f64().context("expected a number")?]));
    };
    let mut shape = vec![items.len()];
    let mut values = Vec::new();
    for (i, item) in items.iter().enumerate() {
        let (inner, part) = flattened(item)?;
        if i == 0 {
            shape.extend(&inner);
        }
        ensure!(shape[1..] == inner, "rows of different lengths");
        values.extend(part);
    }
    Ok((shape, values))
}

fn numbers(tensor: &Tensor) -> Vec<f64> {
    if tensor.as_int().is_empty() {
        tensor.as_real().to_vec()
    } else {
        tensor.as_int().iter().map(|v| f64::from(*v)).collect()
    }
}

/// Nested lists as a comment writes them.
fn nested(shape: &[usize], values: &[f64]) -> String {
    let Some((rows, inner)) = shape.split_first() else {
        // Seven significant digits, without the zeros that say nothing.
        let v = values[0];
        return format!("{}", format!("{v:.6e}").parse::<f64>().unwrap_or(v));
    };
    let width = inner.iter().product::<usize>();
    let items = (0..*rows).map(|i| nested(inner, &values[i * width..(i + 1) * width]));
    format!("[{}]", items.collect::<Vec<_>>().join(", "))
}

fn near(a: &[f64], b: &[f64], relative: f64) -> bool {
    let close = |(a, b): (&f64, &f64)| (a - b).abs() <= relative * (1.0 + a.abs().max(b.abs()));
    a.len() == b.len() && a.iter().zip(b).all(close)
}
