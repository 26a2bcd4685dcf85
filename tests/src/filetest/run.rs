//! `; test run`.

use super::lower::options;
use super::{Case, Verdict};
use crate::compiled;
use crate::tolerance::tolerance;
use anyhow::{Context, Result};
use attar_codegen_cpu::Target;
use attar_codegen_cpu::host::Kernels;

pub(super) fn test(case: &Case<'_>) -> Result<Verdict> {
    let class = case.directive.get("tol").unwrap_or("kernel-f32");
    let tolerance = tolerance(class).with_context(|| format!("no tolerance class {class}"))?;
    let graph = case.function.graph()?;
    let options = options(case.directive)?;
    let target = Target::native();
    let kernels = [Some(Kernels::Reference), target.map(Kernels::Compiled)];
    for kernels in kernels.into_iter().flatten() {
        for seed in 0..3 {
            compiled::check(&graph, &options, kernels, seed, tolerance)
                .with_context(|| format!("{kernels:?}, seed {seed}"))?;
        }
    }
    let skipped = target.is_none().then(|| "no target fits this machine; reference kernels only".to_owned());
    Ok(Verdict { edits: Vec::new(), skipped })
}
