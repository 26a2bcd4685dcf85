//! `linear` kernels on this machine against the scalar reference.

mod case;

use attar_codegen_cpu::exec::ExecImage;
use attar_codegen_cpu::{Target, compile_blob, disassemble, disassemble_inners};
use attar_format::{Encoded, formats};
use attar_kernel::{ActInt8Layout, Activation, Epilogue, KernelSpec, LinearSpec, RowTile};
use case::emulate::{Way, emulated_instructions, way};
use case::{Arg, Case, Random, f32s, host_targets, linear_cases};
use std::io::Write;

fn specs(cases: &[Case]) -> Vec<KernelSpec> {
    cases.iter().map(|c| c.spec.clone()).collect()
}

/// Runs all cases on every target of this machine.
fn agree(cases: &[Case]) {
    let wanted: Vec<_> = cases.iter().map(Case::reference).collect();
    let targets = host_targets();
    assert!(!targets.is_empty(), "no target for this machine");
    for target in targets {
        let blob = compile_blob(target, &specs(cases)).unwrap();
        let image = ExecImage::load(&blob).unwrap();
        let before = emulated_instructions();
        for (case, want) in cases.iter().zip(&wanted) {
            let got = case.compiled(&image);
            case.check_on(target, want, &got);
        }
        if way(target) == Some(Way::Emulated) {
            let count = emulated_instructions() - before;
            assert!(count > 0, "{}: nothing was emulated", target.name());
            let launches = cases.len();
            let _ = writeln!(
                std::io::stderr(),
                "{}: {launches} launches, {count} instructions emulated",
                target.name()
            );
        }
    }
}

#[test]
fn agrees_with_the_reference() {
    agree(&linear_cases::all());
}

#[test]
fn odd_shapes_agree_with_the_reference() {
    agree(&linear_cases::odd_shapes());
}

/// What is wrong with a row stays in that row.
#[test]
fn special_rows_agree_with_the_reference() {
    let cases = linear_cases::special_rows();
    for case in &cases {
        let outputs = f32s(&case.reference()[0]);
        let spoilt = outputs.chunks(35).filter(|row| row.iter().all(|v| v.is_nan())).count();
        let touched = outputs.chunks(35).filter(|row| row.iter().any(|v| !v.is_finite())).count();
        // Infinities among f32 activations give infinities; int8 rows have no place for them but the scale.
        assert!(spoilt <= touched);
        if let (KernelSpec::Linear(spec), 13 | 40) = (&case.spec, outputs.len() / 35) {
            let rows = outputs.len() / 35;
            let bad = (0..rows).filter(|r| [3, 4, 6].contains(&(r % 8))).count();
            assert_eq!(touched, bad);
            assert!(!spec.format.wants_int8_activations() || spoilt == bad);
        }
    }
    agree(&cases);
}

/// Sums of a row must not depend on how many rows are computed with it.
#[test]
fn rows_do_not_depend_on_the_tile() {
    let (n, k) = (64, 96);
    for target in host_targets() {
        // Tile products, which round to bf16, begin with the 17th row.
        let count = if target == Target::SapphireRapids { 16 } else { 33 };
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

/// Tile products of a row must not depend on the other rows either, as long as there are more than 16.
#[test]
fn rows_of_tile_products_do_not_depend_on_their_number() {
    let target = Target::SapphireRapids;
    if !host_targets().contains(&target) {
        return;
    }
    for format in formats::ALL.iter().copied().filter(|f| f.wants_int8_activations()) {
        let spec =
            LinearSpec { format, n: 35, k: 800, rows: RowTile::Many, bias: true, epilogue: Epilogue::Store };
        let all = linear_cases::case(9, spec.clone(), 600);
        let blob = compile_blob(target, std::slice::from_ref(&all.spec)).unwrap();
        let image = ExecImage::load(&blob).unwrap();
        let whole = all.compiled(&image).remove(0);
        let width = whole.len() / 600;
        for (first, count) in [(0, 17), (3, 32), (499, 33), (560, 40), (10, 570)] {
            let got = rows_of(&all, spec.clone(), first, count, 600).compiled(&image).remove(0);
            assert!(got == whole[first * width..][..got.len()], "{} rows from {first}", count);
        }
    }
}

/// What tile products compute, exactly: both factors in bf16 with their scales folded in, products summed in f32.
#[test]
fn tile_products_are_those_of_operands_in_bf16() {
    let target = Target::SapphireRapids;
    if !host_targets().contains(&target) {
        return;
    }
    // One span of inputs, and several (rows of 16384 inputs do not fit the cache whole); one item, and a pair.
    for (format, n, k, rows) in [
        (&formats::N4, 35, 352, 70),
        (&formats::W8, 21, 800, 17),
        (&formats::N4, 16, 32, 64),
        (&formats::W8, 48, 576, 545),
        (&formats::N4, 288, 16384, 18),
        (&formats::W8, 35, 8224, 300),
        (&formats::BF16, 35, 352, 70),
        (&formats::BF16, 48, 8224, 49),
    ] {
        let spec = LinearSpec { format, n, k, rows: RowTile::Many, bias: false, epilogue: Epilogue::Store };
        let case = linear_cases::case(3, spec, rows);
        assert!(case.by_tiles(target));
        let blob = compile_blob(target, std::slice::from_ref(&case.spec)).unwrap();
        let got = f32s(&case.compiled(&ExecImage::load(&blob).unwrap())[0]);
        let (Arg::Input(x), Arg::Input(weights)) = (&case.args[0], &case.args[1]) else { unreachable!() };
        let weights = Encoded::unpack(format, n, k, weights).unwrap();
        let layout = ActInt8Layout::new(k);
        let x: Vec<Vec<f32>> = if format.is_uncompressed() {
            f32s(x).chunks(k).map(|row| row.iter().map(|v| rounded(*v)).collect()).collect()
        } else {
            x.chunks(layout.stride)
                .map(|row| {
                    let scales = f32s(&row[layout.scales_offset..layout.sums_offset]);
                    (0..k).map(|i| rounded(f32::from(row[i] as i8) * scales[i / 32])).collect()
                })
                .collect()
        };
        let mut w = vec![0.0; k];
        for c in 0..n {
            weights.decode_row(c, &mut w);
            let w: Vec<f32> = w.iter().map(|v| rounded_away(*v)).collect();
            for (r, x) in x.iter().enumerate() {
                let products = || x.iter().zip(&w).map(|(x, w)| f64::from(*x) * f64::from(*w));
                let (want, size): (f64, f64) = (products().sum(), products().map(f64::abs).sum());
                // Sums in f32; and a weight that lies between two of bf16 may have gone the other way.
                let largest = products().fold(0.0, |m: f64, p| m.max(p.abs()));
                let error = (f64::from(got[r * n + c]) - want).abs();
                assert!(error <= 1e-6 * size + largest / 100.0, "{}: [{r}, {c}]: {error}", case.spec.name());
            }
        }
    }
}

fn rounded(v: f32) -> f32 {
    half::bf16::from_f32(v).to_f32()
}

/// To the nearest bf16, ties away from zero.
fn rounded_away(v: f32) -> f32 {
    f32::from_bits((v.to_bits() + 0x8000) & 0xffff_0000)
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
                        // An inner function for four rows at once, else as with dot products.
                        Target::Aarch64I8mm if rows == RowTile::Many => {
                            let smmla = inner[0].lines().filter(|l| l.starts_with("smmla")).count();
                            assert_eq!((smmla, dots("sdot")), (64, 0), "{text}");
                        }
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
