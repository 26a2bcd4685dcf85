//! `; test verify`.

use super::file::Edit;
use super::{Case, Verdict};
use crate::random;
use anyhow::{Context, Result, bail};
use attar_ir::{Error, WeightStore, text, verify};

const MARK: &str = "; error:";

pub(super) fn test(case: &Case<'_>) -> Result<Verdict> {
    let store = declared_store(case)?;
    let result = text::parse(&case.function.text)
        .and_then(|graphs| graphs.iter().try_for_each(|g| verify(g, store.as_ref())));
    let got = result.err().map(|e| (guilty_line(case, &e), message(&e)));
    let mut wanted =
        case.function.lines().filter_map(|(i, line)| Some((i, line.split_once(MARK)?.1.trim().to_owned())));
    let wanted = wanted.next();
    if got == wanted {
        return Ok(Verdict::default());
    }
    if !case.update {
        let show = |side: &Option<(usize, String)>| match side {
            Some((line, text)) => format!("line {}: {text}", line + 1),
            None => "a valid function".to_owned(),
        };
        bail!("expected {}\n     got {}", show(&wanted), show(&got));
    }
    let edits = case.function.lines().filter_map(|(i, line)| {
        let code = line.split_once(MARK).map_or(line, |(code, _)| code).trim_end();
        let marked = match &got {
            Some((at, text)) if *at == i => format!("{code} {MARK} {text}"),
            _ => code.to_owned(),
        };
        (marked != line).then(|| Edit { range: i..i + 1, lines: vec![marked] })
    });
    Ok(Verdict { edits: edits.collect(), skipped: None })
}

/// The message without the place, which the position of the comment gives.
fn message(error: &Error) -> String {
    let mut bare = error.clone();
    *bare.at = Default::default();
    bare.to_string()
}

/// Where the error belongs: the line it names, or that of its node, or the function's first.
fn guilty_line(case: &Case<'_>, error: &Error) -> usize {
    if let Some((line, _)) = error.at.line {
        return case.function.first + line as usize - 1;
    }
    let name = error.at.node.as_deref().and_then(|n| n.split(' ').next()).unwrap_or("?");
    let defines = |line: &str| {
        let first = line.trim_start().split([' ', '#']).next();
        first == Some(name)
    };
    case.function.lines().find(|(_, line)| defines(line)).map_or(case.function.first, |(i, _)| i)
}

/// The store of the `; store @w : type` comments; `None` when there are none.
fn declared_store(case: &Case<'_>) -> Result<Option<WeightStore>> {
    let declared: Vec<&str> =
        case.file.comments(case.function).filter_map(|(_, line)| line.strip_prefix("store ")).collect();
    if declared.is_empty() {
        return Ok(None);
    }
    let mut store = WeightStore::new();
    for line in declared {
        // A declaration is what stands behind `weight` in a function.
        let function = format!("func @store() -> () {{\n%w = weight {line}\nreturn\n}}");
        let graph = text::parse(&function)?.pop().context("no function")?;
        for (_, weight) in graph.weights() {
            random::add_weight(&mut store, &weight.name, &weight.ty, 0)?;
        }
    }
    Ok(Some(store))
}
