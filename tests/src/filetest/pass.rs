//! `; test pass=NAME[,NAME…] [option=value …] [tensors=GLOB]`.

use super::file::Directive;
use super::{Case, Verdict};
use crate::calibrator::InterpreterCalibrator;
use crate::random;
use anyhow::{Context, Result, ensure};
use attar_ir::{Graph, WeightStore, text};
use attar_pass::{Manager, Options, Pipeline, Registry, Step, TensorGlobs, Value};
use attar_passes as _;

pub(super) fn test(case: &Case<'_>) -> Result<Verdict> {
    let before = case.function.graph()?;
    let mut weights = random::weights(&before, 0)?;
    let mut after = before.clone();
    run(case.directive, &mut after, &mut weights)?;
    let mut again = after.clone();
    let rewrites = run(case.directive, &mut again, &mut weights)?;
    ensure!(rewrites == 0, "the second run makes {rewrites} rewrites:\n{}", text::print(&again));
    let printed = if after == before { "unchanged".to_owned() } else { text::print(&after) };
    case.check_block("expect", &printed)
}

/// Runs the directive's passes and counts their rewrites; the manager verifies around each.
pub(super) fn run(directive: &Directive, graph: &mut Graph, weights: &mut WeightStore) -> Result<u64> {
    let registry = Registry::new()?;
    let mut pipeline = Pipeline::default();
    for name in directive.arg.split(',') {
        let decl = registry.find(name)?;
        let mut given = Vec::new();
        let mut tensors = TensorGlobs::all()?;
        for (key, value) in &directive.options {
            if key == "tensors" {
                tensors = TensorGlobs::new(std::slice::from_ref(value), &[])?;
            } else {
                given.push((key.clone(), option_value(value)));
            }
        }
        pipeline.steps.push(Step { decl, options: Options::new(decl, &given)?, tensors });
    }
    let calibrator = &mut InterpreterCalibrator { steps: 8 };
    let report = Manager::default()
        .run_calibrated(&pipeline, graph, weights, Some(calibrator), &mut |_| {})
        .context("running the pass")?;
    Ok(report.passes.iter().map(|p| p.rewrites).sum())
}

fn option_value(text: &str) -> Value {
    if let Ok(v) = text.parse() {
        Value::Bool(v)
    } else if let Ok(v) = text.parse() {
        Value::Int(v)
    } else if let Ok(v) = text.parse() {
        Value::Float(v)
    } else {
        Value::Text(text.to_owned())
    }
}
