//! A kernel, its arguments, and what must come out: executed by the scalar reference, by compiled code in this
//! process, or (as a file) under an emulator.

#![allow(dead_code, reason = "each test binary uses its part")]

pub(crate) mod attention_cases;
#[path = "../emulate/mod.rs"]
pub(crate) mod emulate;
mod launch;
pub(crate) mod linear_cases;
pub(crate) mod rounded;
pub(crate) mod row_cases;

use attar_codegen_cpu::exec::ExecImage;
pub(crate) use launch::{Arg, Case, Check, Random, bytes_of, cache_codes, f32s};

/// Launches of every kernel, for tests that run all of them.
pub(crate) fn all_cases() -> Vec<Case> {
    let mut cases = linear_cases::all();
    cases.extend(row_cases::all());
    cases.extend(attention_cases::all());
    cases
}

impl Case {
    /// What compiled code writes, the grid cut in two.
    pub(crate) fn compiled(&self, image: &ExecImage) -> Vec<Vec<u8>> {
        self.with_table(|table| {
            let name = self.spec.name();
            let middle = self.grid / 3;
            // SAFETY: the arguments are made for the spec; the caller's image is for this machine.
            let found =
                unsafe { image.call(&name, table, middle, self.grid) && image.call(&name, table, 0, middle) };
            assert!(found, "no kernel {name}");
            assert!(!emulate::tiles_in_use(), "{name} leaves tiles configured");
        })
    }
}

/// Targets whose kernels this machine runs, one way or the other.
pub(crate) fn host_targets() -> Vec<attar_codegen_cpu::Target> {
    emulate::host_targets()
}
