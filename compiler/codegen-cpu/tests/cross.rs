//! Kernels of other instruction sets, executed under user-mode emulation: the blob is linked into a small C program
//! that reads cases from a file and writes the outputs to another.
//!
//! Needs the cross compilers `aarch64-linux-gnu-gcc` and `riscv64-linux-gnu-gcc` and `qemu-aarch64`, `qemu-riscv64`;
//! what is missing is reported as skipped.

mod case;

use attar_codegen_cpu::{Target, compile_blob, cranelift_ir, disassemble, disassemble_inners};
use case::{Arg, Case, all_cases};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

struct Machine {
    target: Target,
    compiler: &'static str,
    emulator: &'static str,
    cpu: Option<&'static str>,
}

const MACHINES: [Machine; 4] = [
    // A core of ARMv8.0: anything newer faults.
    Machine {
        target: Target::Aarch64,
        compiler: "aarch64-linux-gnu-gcc",
        emulator: "qemu-aarch64",
        cpu: Some("cortex-a57"),
    },
    Machine {
        target: Target::Aarch64Dotprod,
        compiler: "aarch64-linux-gnu-gcc",
        emulator: "qemu-aarch64",
        cpu: Some("max"),
    },
    Machine {
        target: Target::Aarch64I8mm,
        compiler: "aarch64-linux-gnu-gcc",
        emulator: "qemu-aarch64",
        cpu: Some("max"),
    },
    Machine {
        target: Target::Riscv64,
        compiler: "riscv64-linux-gnu-gcc",
        emulator: "qemu-riscv64",
        cpu: None,
    },
];

#[test]
fn agrees_with_the_reference_under_emulation() {
    let cases = all_cases();
    let wanted: Vec<_> = cases.iter().map(Case::reference).collect();
    let mut skipped = 0;
    let mut dotprod = None;
    for machine in MACHINES {
        let missing: Vec<&str> =
            [machine.compiler, machine.emulator].into_iter().filter(|t| !runs(t)).collect();
        if !missing.is_empty() {
            report(&format!("{}: no {}", machine.target.name(), missing.join(", ")));
            skipped += cases.len();
            continue;
        }
        let outputs = execute(&machine, &cases);
        for ((case, want), got) in cases.iter().zip(&wanted).zip(&outputs) {
            case.check(machine.target.name(), want, got);
        }
        match machine.target {
            Target::Aarch64Dotprod => dotprod = Some(outputs),
            // However integers are multiplied, the sums are the same bits.
            Target::Aarch64I8mm => {
                for ((case, got), want) in cases.iter().zip(&outputs).zip(dotprod.iter().flatten()) {
                    assert!(got == want, "{} differs with smmla", case.spec.name());
                }
            }
            _ => {}
        }
    }
    if skipped > 0 {
        report(&format!("skipped: {skipped} of {} emulated launches", cases.len() * MACHINES.len()));
    }
}

/// Straight to the terminal: the test harness would keep it for failing tests.
fn report(line: &str) {
    let _ = writeln!(std::io::stderr(), "cross: {line}");
}

fn runs(tool: &str) -> bool {
    Command::new(tool).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
}

/// RV64GC has no vectors: neither may the IR, whose vector operations would not compile.
#[test]
fn scalar_targets_get_scalar_code() {
    for case in all_cases() {
        let ir = cranelift_ir(Target::Riscv64, &case.spec).unwrap();
        for ty in ["i8x16", "i16x8", "i32x4", "f32x4", "i64x2"] {
            assert!(!ir.contains(ty), "{} uses {ty}", case.spec.name());
        }
    }
}

/// Nothing is called but a kernel's own inner functions: whatever is not an instruction of the target would need the C
/// library.
#[test]
fn kernels_call_nothing() {
    for case in all_cases() {
        for target in Target::ALL {
            let text = disassemble(target, &case.spec).unwrap();
            let name = case.spec.name();
            assert!(text.contains("ret"), "{name}: no code");
            let calls = ["call", "blr ", "bl ", "jalr "];
            let call = text.lines().find(|l| calls.iter().any(|c| l.trim_start().starts_with(c)));
            let inner = disassemble_inners(target, &case.spec).unwrap();
            assert!(call.is_none() || !inner.is_empty(), "{name} on {}: {call:?}", target.name());
        }
    }
}

/// Every case's outputs.
fn execute(machine: &Machine, cases: &[Case]) -> Vec<Vec<Vec<u8>>> {
    let name = machine.target.name();
    let dir = tempfile::tempdir().unwrap();
    let path = |file: &str| dir.path().join(file);
    let specs: Vec<_> = cases.iter().map(|c| c.spec.clone()).collect();
    let blob = compile_blob(machine.target, &specs).unwrap();
    std::fs::write(path("blob.bin"), &blob.bytes).unwrap();
    let mut words = Vec::new();
    push(&mut words, cases.len());
    for case in cases {
        let entry = blob.entry(&case.spec.name()).unwrap();
        push(&mut words, entry.offset as usize);
        push(&mut words, case.grid as usize);
        push(&mut words, case.args.len());
        for (slot, arg) in case.args.iter().enumerate() {
            match arg {
                Arg::Number(n) => [0, 0, *n as usize].into_iter().for_each(|w| push(&mut words, w)),
                Arg::Input(bytes) | Arg::Output(bytes, _) => {
                    push(&mut words, if matches!(arg, Arg::Input(_)) { 1 } else { 2 });
                    push(&mut words, case.skew(slot));
                    push(&mut words, bytes.len());
                    words.extend_from_slice(bytes);
                    words.resize(words.len().next_multiple_of(8), 0);
                }
            }
        }
    }
    std::fs::write(path("cases"), &words).unwrap();
    let driver = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cross/driver.c");
    let define = format!("-DBLOB=\"{}\"", path("blob.bin").display());
    run(Command::new(machine.compiler)
        .args(["-O1", "-static", "-Wall", "-Werror", &define, "-o"])
        .arg(path("driver"))
        .arg(driver));
    let mut emulator = Command::new(machine.emulator);
    emulator.args(machine.cpu.iter().flat_map(|cpu| ["-cpu", cpu]));
    run(emulator.arg(path("driver")).arg(path("cases")).arg(path("outputs")));
    let bytes = std::fs::read(path("outputs")).unwrap();
    let mut rest = &bytes[..];
    let outputs = cases
        .iter()
        .map(|case| {
            let lens = case.args.iter().filter_map(|a| match a {
                Arg::Output(bytes, _) => Some(bytes.len()),
                _ => None,
            });
            lens.map(|len| {
                let (output, after) = rest.split_at(len);
                rest = after;
                output.to_vec()
            })
            .collect()
        })
        .collect();
    assert!(rest.is_empty(), "{name}: {} bytes too many", rest.len());
    outputs
}

fn push(words: &mut Vec<u8>, word: usize) {
    words.extend_from_slice(&(word as u64).to_le_bytes());
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {}\n{errors}", output.status);
}
