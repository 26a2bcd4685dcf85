//! `linear` kernels on this machine against the scalar reference.

mod case;

use attar_codegen_cpu::exec::ExecImage;
use attar_codegen_cpu::{Target, compile_blob, disassemble, disassemble_inners};
use attar_format::formats;
use attar_kernel::{Activation, Epilogue, KernelSpec, LinearSpec, RowTile};
use case::{Arg, Case, Random, host_targets, linear_cases};

fn specs(cases: &[Case]) -> Vec<KernelSpec> {
    cases.iter().map(|c| c.spec.clone()).collect()
}

#[test]
fn agrees_with_the_reference() {
    let cases = linear_cases::all();
    let wanted: Vec<_> = cases.iter().map(Case::reference).collect();
    let targets = host_targets();
    assert!(!targets.is_empty(), "no target for this machine");
    for target in targets {
        let blob = compile_blob(target, &specs(&cases)).unwrap();
        let image = ExecImage::load(&blob).unwrap();
        for (case, want) in cases.iter().zip(&wanted) {
            let got = case.compiled(&image);
            case.check(target.name(), want, &got);
        }
    }
}

/// Sums of a row must not depend on how many rows are computed with it.
#[test]
fn rows_do_not_depend_on_the_tile() {
    let (n, k, count) = (64, 96, 33);
    for target in host_targets() {
        for format in formats::ALL {
            for epilogue in [Epilogue::Store, Epilogue::Swiglu { width: 32, out: Activation::F32 }] {
                let spec = |rows| LinearSpec { format, n, k, rows, bias: true, epilogue: epilogue.clone() };
                let outputs = |rows, count| {
                    let case = linear_cases::case(7, spec(rows), count);
                    let blob = compile_blob(target, std::slice::from_ref(&case.spec)).unwrap();
                    (ExecImage::load(&blob).unwrap(), case)
                };
                let (image, all) = outputs(RowTile::Many, count);
                let whole = all.compiled(&image).remove(0);
                let width = whole.len() / count;
                for (rows, each) in [(RowTile::One, 1), (RowTile::Small, 3), (RowTile::Small, 11)] {
                    let (image, _) = outputs(rows, each);
                    for first in (0..count).step_by(each) {
                        let part = rows_of(&all, spec(rows), first, each.min(count - first), count);
                        let got = part.compiled(&image).remove(0);
                        let want = &whole[first * width..][..got.len()];
                        assert!(got == want, "{}: rows from {first} differ", part.spec.name());
                    }
                }
            }
        }
    }
}

/// `all` cut down to some of its rows, for another row tile.
fn rows_of(all: &Case, spec: LinearSpec, first: usize, count: usize, of: usize) -> Case {
    let mut case = Case { spec: KernelSpec::Linear(spec), ..all.clone() };
    let cut = |bytes: &mut Vec<u8>| {
        let row = bytes.len() / of;
        *bytes = bytes[first * row..(first + count) * row].to_vec();
    };
    let slots = case.args.len();
    for (slot, arg) in case.args.iter_mut().enumerate() {
        match arg {
            Arg::Input(x) if slot == 0 => cut(x),
            Arg::Output(out, _) => cut(out),
            Arg::Number(rows) if slot + 2 == slots => *rows = count as u64,
            Arg::Input(_) | Arg::Number(_) => {}
        }
    }
    case
}

/// A kernel has no way out of itself, and uses the instructions it was designed around.
#[test]
fn code_is_self_contained_and_uses_the_dot_product() {
    let mut seed = Random(1);
    for target in Target::ALL {
        for format in formats::ALL {
            for rows in [RowTile::One, RowTile::Many] {
                let spec = LinearSpec {
                    format,
                    n: 32,
                    k: 64 + 32 * seed.below(3),
                    rows,
                    bias: false,
                    epilogue: Epilogue::Swiglu { width: 16, out: Activation::F32 },
                };
                let text = disassemble(target, &KernelSpec::Linear(spec.clone())).unwrap();
                let calls = text.lines().filter(|l| l.contains("call") || l.contains("blr ")).count();
                let inner = disassemble_inners(target, &KernelSpec::Linear(spec.clone())).unwrap();
                if inner.is_empty() {
                    assert_eq!(calls, 0, "{} {} calls something:\n{text}", target.name(), format.name);
                }
                let dots = |name: &str| text.lines().filter(|l| l.contains(name)).count();
                // Per group: 4 quads of channels by 8 quads of inputs, or those of 4 rows by 8 quads of inputs.
                if format.wants_int8_activations() {
                    match target {
                        Target::Aarch64Dotprod | Target::Aarch64I8mm => {
                            assert_eq!(dots("sdot"), 32, "{text}")
                        }
                        Target::Aarch64 => assert_eq!(dots("smull"), 64, "{text}"),
                        Target::X86_64V2 => assert_eq!(dots("pmaddwd"), 64, "{text}"),
                        // Inner functions have a test of their own.
                        Target::X86_64V3
                        | Target::X86_64V3Avxvnni
                        | Target::X86_64V4
                        | Target::SapphireRapids
                        | Target::Riscv64 => {}
                    }
                } else if target == Target::X86_64V3 {
                    assert!(dots("vfmadd") >= 8, "{text}");
                }
            }
        }
    }
}

#[test]
fn blobs_depend_only_on_the_set_of_specs() {
    let mut specs = specs(&linear_cases::all());
    let once = compile_blob(Target::Aarch64Dotprod, &specs).unwrap();
    specs.reverse();
    specs.extend_from_within(..3);
    let again = compile_blob(Target::Aarch64Dotprod, &specs).unwrap();
    assert_eq!(once, again);
    assert!(once.entries.iter().all(|e| e.offset % 64 == 0));
    assert!(
        once.entries.windows(2).all(|e| e[0].kernel < e[1].kernel && e[0].offset + e[0].len <= e[1].offset)
    );
}

#[test]
fn contradicting_specs_are_refused() {
    let spec = LinearSpec {
        format: &formats::W8,
        n: 48,
        k: 64,
        rows: RowTile::One,
        bias: false,
        epilogue: Epilogue::Swiglu { width: 32, out: Activation::F32 },
    };
    let error = compile_blob(Target::X86_64V2, &[KernelSpec::Linear(spec.clone())]).unwrap_err();
    assert!(error.to_string().contains("swiglu of width 32"), "{error}");
    let odd = LinearSpec { k: 40, epilogue: Epilogue::Store, ..spec };
    let error = compile_blob(Target::X86_64V2, &[KernelSpec::Linear(odd)]).unwrap_err();
    assert!(error.to_string().contains("[48, 40]"), "{error}");
}
