//! `; test roundtrip`.

use super::file::Edit;
use super::{Case, Verdict};
use anyhow::{Result, bail, ensure};
use attar_ir::text;

pub(super) fn test(case: &Case<'_>) -> Result<Verdict> {
    let graph = case.function.graph()?;
    let printed = text::print(&graph);
    let again = text::parse(&printed)?.remove(0);
    ensure!(again == graph, "reading the printed text gives another graph:\n{printed}");
    ensure!(text::print(&again) == printed, "printing twice gives two texts:\n{printed}");
    if case.file.block(case.function, "expect").is_some() {
        return case.check_block("expect", &printed);
    }
    if printed.trim_end() == case.function.text {
        return Ok(Verdict::default());
    }
    if !case.update {
        bail!("the function is printed as\n{printed}");
    }
    let lines = printed.lines().map(str::to_owned).collect();
    Ok(Verdict { edits: vec![Edit { range: case.function.first..case.function.end, lines }], skipped: None })
}
