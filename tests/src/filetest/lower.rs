//! `; test lower`.

use super::file::Directive;
use super::{Case, Verdict};
use anyhow::{Result, bail};
use attar_artifact::manifest::KvType;
use attar_codegen_cpu::lower::{LowerOptions, lower};

pub(super) fn test(case: &Case<'_>) -> Result<Verdict> {
    let lowered = lower(&case.function.graph()?, &options(case.directive)?)?;
    let text = lowered.to_text();
    let Some(program) = case.directive.get("program") else {
        return case.check_block("lower", &text);
    };
    let header = format!("program {program},");
    let mut shown = false;
    let lines = text.lines().filter(|line| {
        if !line.starts_with(' ') {
            shown = line.starts_with(&header) || line.starts_with("weights");
        }
        shown
    });
    case.check_block("lower", &lines.collect::<Vec<_>>().join("\n"))
}

/// Standard sizes, with the cache element the directive asks for.
pub(super) fn options(directive: &Directive) -> Result<LowerOptions> {
    match directive.get("kv") {
        None | Some("f32") => Ok(LowerOptions::new(KvType::F32)),
        Some("f16") => Ok(LowerOptions::new(KvType::F16)),
        Some("int8") => Ok(LowerOptions::new(KvType::Int8)),
        Some("int4") => Ok(LowerOptions::new(KvType::Int4)),
        Some(other) => bail!("kv is f32, f16, int8 or int4, not {other}"),
    }
}
