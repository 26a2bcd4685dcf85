//! Every kernel's PTX, as NVRTC emits it, executed by the PTX interpreter and compared with the scalar reference.
//!
//! No GPU takes part, and nothing here says how fast one would be.

mod case;
mod modules;
mod nvrtc_here;

use case::{Case, attention_cases, linear_cases, row_cases};
use modules::Modules;

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
