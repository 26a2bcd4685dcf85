//! The pass reference, generated from the declarations and checked in as `docs/passes.md`.

use crate::decl::{PassDecl, Phase, to_toml};
use std::fmt::Write;

/// Markdown for the given passes, in the given order.
pub fn reference_markdown(decls: &[&'static PassDecl]) -> String {
    let mut out = String::from(
        "# Passes\n\n\
         Generated from the declarations in the code; do not edit. `attar passes` prints the same list.\n\n\
         Numerics: *exact* passes keep every value bit for bit; *rounding* passes keep the function but may round\n\
         differently; *lossy* passes change it. The sources of a pass stand at the top of its file.\n",
    );
    for phase in Phase::ALL {
        let of_phase: Vec<_> = decls.iter().filter(|d| d.phase == phase).collect();
        if of_phase.is_empty() {
            continue;
        }
        let _ = write!(out, "\n## {phase}\n\n| pass | what it does | numerics |\n|---|---|---|\n");
        for d in &of_phase {
            let _ = writeln!(out, "| `{}` | {} | {} |", d.name, cell(d.summary), d.numerics.name());
        }
        for d in of_phase.iter().filter(|d| d.takes_tensors || !d.options.is_empty()) {
            let _ = write!(
                out,
                "\n### `{}`\n\n| key | values | default | meaning |\n|---|---|---|---|\n",
                d.name
            );
            if d.takes_tensors {
                out.push_str("| `tensors` | list of globs | `[\"*\"]` | weights the pass concerns |\n");
                out.push_str("| `exclude` | list of globs | `[]` | weights it leaves alone all the same |\n");
            }
            for o in d.options {
                let default = match o.default() {
                    Some(v) => format!("`{}`", to_toml(&v)),
                    None => "required".to_owned(),
                };
                let _ =
                    writeln!(out, "| `{}` | {} | {default} | {} |", o.name, cell(&o.allowed()), cell(o.doc));
            }
        }
    }
    out
}

fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}
