//! Every kernel's PTX, as NVRTC emits it, executed by the PTX interpreter and compared with the scalar reference.
//!
//! No GPU takes part, and nothing here says how fast one would be.

mod case;
mod nvrtc_here;

use attar_codegen_cuda::{Cache, CudaPrograms, CudaTarget, Nvrtc, compile_kernel};
use attar_ptx::Module;
use case::{Case, attention_cases, linear_cases, row_cases};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Compiles kernels to PTX, each once.
struct Modules {
    nvrtc: Nvrtc,
    cache: Cache,
    parsed: BTreeMap<String, Module>,
}

impl Modules {
    fn find() -> Option<Modules> {
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("kernels");
        Some(Modules { nvrtc: nvrtc_here::find()?, cache: Cache::new(folder), parsed: BTreeMap::new() })
    }

    fn module(&mut self, programs: &CudaPrograms, name: &str) -> Module {
        let compile = || {
            let spec =
                programs.kernels.iter().find(|k| k.name() == name).expect("programs list their kernels");
            let kernel = compile_kernel(&self.nvrtc, Some(&self.cache), spec, CudaTarget::Ptx);
            let kernel = kernel.unwrap_or_else(|e| panic!("{e}"));
            Module::parse(&kernel.output.ptx).unwrap_or_else(|e| panic!("{name}: {e}"))
        };
        self.parsed.entry(name.to_owned()).or_insert_with(compile).clone()
    }
}

/// Runs all cases; fails with everything that is wrong.
fn agree(cases: &[Case]) {
    let Some(mut modules) = Modules::find() else { return };
    let mut faults = Vec::new();
    for case in cases {
        let checked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let want = case.reference();
            let (got, _) = case.interpreted(&mut |programs, name| modules.module(programs, name));
            if case.is_rounded() {
                case.check_rounded("PTX interpreter", &want, &got);
            } else {
                case.check("PTX interpreter", &want, &got);
            }
        }));
        if let Err(fault) = checked {
            let text = fault.downcast::<String>().map_or_else(|_| "a panic".to_owned(), |s| *s);
            faults.push(format!("{}: {text}", case.spec.name()));
        }
    }
    assert!(faults.is_empty(), "{} of {} launches\n{}", faults.len(), cases.len(), faults.join("\n"));
}

#[test]
fn kernels_over_rows_agree_with_the_reference() {
    agree(&row_cases::all());
}

#[test]
fn attention_agrees_with_the_reference() {
    agree(&attention_cases::all());
}

#[test]
fn products_agree_with_the_reference() {
    agree(&linear_cases::all());
}

/// What is wrong with a row stays in that row.
#[test]
fn special_rows_agree_with_the_reference() {
    agree(&linear_cases::special_rows());
}
