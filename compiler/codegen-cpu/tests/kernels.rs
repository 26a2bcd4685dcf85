//! Every kernel but the matrix products, compiled for this machine, against the scalar reference.

mod case;

use attar_codegen_cpu::exec::ExecImage;
use attar_codegen_cpu::{Target, compile_blob};
use attar_kernel::KernelSpec;
use case::{host_targets, row_cases};

#[test]
fn kernels_match_the_reference() {
    let cases = row_cases::all();
    let specs: Vec<KernelSpec> = cases.iter().map(|c| c.spec.clone()).collect();
    for target in host_targets() {
        let blob = compile_blob(target, &specs).expect("compiles");
        let image = ExecImage::load(&blob).expect("executable memory");
        for case in &cases {
            case.check(target.name(), &case.reference(), &case.compiled(&image));
        }
    }
}

#[test]
fn unsupported_shapes_are_errors() {
    let spec = KernelSpec::Quantize { dim: 40 };
    let error = compile_blob(Target::X86_64V2, &[spec]).expect_err("40 is no multiple of 32");
    assert!(error.to_string().contains("no multiple of 32"), "{error}");
}
