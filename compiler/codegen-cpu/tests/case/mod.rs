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

use attar_codegen_cpu::Target;
use attar_codegen_cpu::exec::ExecImage;
use attar_format::formats;
use attar_kernel::{KernelSpec, RowTile};
pub(crate) use launch::{Arg, Case, Check, Random, bytes_of, cache_codes, f32s};
use rounded::Rounding;

/// Launches of every kernel, for tests that run all of them.
pub(crate) fn all_cases() -> Vec<Case> {
    let mut cases = linear_cases::all();
    cases.extend(row_cases::all());
    cases.extend(attention_cases::all());
    cases
}

/// Rows up to which the integer kernels compute on any target.
const FEW: u64 = 16;

impl Case {
    /// Whether the target computes this launch with tile products.
    pub(crate) fn by_tiles(&self, target: Target) -> bool {
        let KernelSpec::Linear(spec) = &self.spec else { return false };
        let rows = self.args.len().checked_sub(2).map(|slot| &self.args[slot]);
        target == Target::SapphireRapids
            && spec.rows == RowTile::Many
            && spec.format != &formats::F32
            && spec.k.is_multiple_of(32)
            && matches!(rows, Some(Arg::Number(rows)) if *rows > FEW)
    }

    /// As [`Case::check`], with the tolerance of the target's arithmetic.
    pub(crate) fn check_on(&self, target: Target, want: &[Vec<u8>], got: &[Vec<u8>]) {
        if self.by_tiles(target) {
            self.check_rounded(target.name(), want, got, Rounding::BF16);
        } else {
            self.check(target.name(), want, got);
        }
    }

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
pub(crate) fn host_targets() -> Vec<Target> {
    emulate::host_targets()
}
