//! Every kernel's PTX, as NVRTC emits it, executed by the PTX interpreter and compared with the scalar reference.
//!
//! No GPU takes part, and nothing here says how fast one would be.

mod case;
mod modules;
mod nvrtc_here;

use attar_codegen_cuda::CudaTarget;
use attar_format::formats;
use attar_kernel::{LinearSpec, RowTile};
use case::{Case, attention_cases, linear_cases, row_cases};
use modules::Modules;

/// Runs all cases, on kernels that run everywhere; fails with everything that is wrong.
fn agree(cases: &[Case]) {
    agree_on(CudaTarget::Ptx, cases);
}

fn agree_on(target: CudaTarget, cases: &[Case]) {
    let Some(mut modules) = Modules::find(target) else { return };
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

/// Tiles of 256 rows by 128 channels and steps of 64 inputs, none of them filled exactly: K is 32 times an odd number, N no
/// multiple of the tile, and rows end within a warpgroup's first half, its second, and a second tile.
#[test]
fn products_of_warpgroups_agree_with_the_reference() {
    let target = CudaTarget::by_name("cuda:sm_90a").expect("a target");
    let mut cases = Vec::new();
    for (f, format) in formats::ALL.iter().copied().filter(|f| f.code_bits() != 32).enumerate() {
        for (e, (epilogue, n)) in linear_cases::epilogues().into_iter().enumerate() {
            let ks: &[usize] = if format.group == 1 { &[33, 96, 5, 256] } else { &[96, 32, 352, 256] };
            let count = [1, 17, 65, 130, 300][(e + f) % 5];
            let (k, bias) = (ks[(e + f) % ks.len()], (e + f) % 2 == 0);
            let spec = LinearSpec { format, n, k, rows: RowTile::Many, bias, epilogue };
            cases.push(linear_cases::case((100 * f + e) as u64, spec, count));
        }
    }
    cases.extend(linear_cases::special_rows().into_iter().filter(Case::is_rounded));
    agree_on(target, &cases);
}
