//! Programs as text, for tests, `inspect` and people: one launch per line.

use super::Lowered;
use attar_artifact::program::{Arg, Extent, Program, ProgramKind, StepBuffer};
use std::fmt::{self, Write};

impl Lowered {
    /// All programs and tensors as text. A buffer prints as `[offset; length]` in bytes, a weight by its name.
    pub fn to_text(&self) -> String {
        let mut out = String::new();
        for program in &self.programs {
            self.program(program, &mut out).expect("writing to a string cannot fail");
        }
        writeln!(out, "weights {} bytes", self.weights_len).expect("writing to a string cannot fail");
        for t in &self.tensors {
            let line =
                format!("  @{} {} {:?} at {} len {}", t.name, t.format_name(), t.shape, t.offset, t.len);
            out.push_str(&line);
            out.push('\n');
        }
        out
    }

    fn program(&self, program: &Program, out: &mut String) -> fmt::Result {
        let kind = match program.kind {
            ProgramKind::Decode => "decode",
            ProgramKind::SmallBatch => "small batch",
            ProgramKind::Prefill => "prefill",
        };
        writeln!(
            out,
            "program {kind}, up to {} tokens, arena {}",
            program.max_tokens,
            extent(&program.arena)
        )?;
        for launch in &program.launches {
            write!(out, "  {}(", launch.kernel)?;
            for (at, arg) in launch.args.iter().enumerate() {
                let comma = if at == 0 { "" } else { ", " };
                write!(out, "{comma}{}", self.arg(arg))?;
            }
            writeln!(out, ") x {}  ; {}", extent(&launch.grid), launch.note)?;
        }
        Ok(())
    }

    fn arg(&self, arg: &Arg) -> String {
        match arg {
            Arg::Arena { offset, len } => format!("[{}; {}]", extent(offset), extent(len)),
            Arg::Weight { offset, .. } => {
                let tensor = self.tensors.iter().find(|t| t.offset == *offset);
                tensor.map_or(format!("@{offset}"), |t| format!("@{}", t.name))
            }
            Arg::Step(StepBuffer::Rope { table }) => format!("rope.{table}"),
            Arg::Step(StepBuffer::BlockTables) => "block_tables".to_owned(),
            Arg::Step(buffer) => format!("{buffer:?}").to_lowercase(),
            Arg::Keys { layer } => format!("keys.{layer}"),
            Arg::Values { layer } => format!("values.{layer}"),
            Arg::Imm(v) => v.to_string(),
            Arg::Count(e) => extent(e),
            Arg::BlockTableStride => "stride".to_owned(),
            Arg::Spans => "spans".to_owned(),
            Arg::PrefetchDistance => "prefetch".to_owned(),
        }
    }
}

/// `64+256T+4R+12TS`.
fn extent(e: &Extent) -> String {
    let unit = |n: u64, letter: &str| match n {
        0 => None,
        1 => Some(letter.to_owned()),
        n => Some(format!("{n}{letter}")),
    };
    let base = if e.base == 0 { None } else { Some(e.base.to_string()) };
    let parts: Vec<String> =
        [base, unit(e.per_token, "T"), unit(e.per_row, "R"), unit(e.per_token_span, "TS")]
            .into_iter()
            .flatten()
            .collect();
    if parts.is_empty() { "0".to_owned() } else { parts.join("+") }
}
