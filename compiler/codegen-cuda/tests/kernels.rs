//! Every kernel's PTX, as NVRTC emits it, executed by the PTX interpreter and compared with the scalar reference.
//!
//! No GPU takes part, and nothing here says how fast one would be.

mod case;
mod modules;
mod nvrtc_here;

use attar_artifact::manifest::KvType;
use attar_codegen_cuda::{CudaPrograms, CudaSpec, CudaTarget};
use attar_format::{FormatRef, Scale, formats};
use attar_kernel::{Activation, Epilogue, KernelSpec, LinearSpec, RowTile};
use attar_ptx::{Launch, Memory, Param};
use case::attention_cases::{self, Store};
use case::{Arg, Case, Random, Rounding, bytes_of, linear_cases, row_cases};
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
            let halves = |spec: &KernelSpec| matches!(spec, KernelSpec::Linear(l) if has_halves(l.format));
            match case.rounding() {
                Some(_) if target.has_wgmma() && halves(&case.spec) => {
                    case.check_rounded("PTX interpreter", &want, &got, Rounding::F16_PRODUCTS);
                }
                Some(rounding) => case.check_rounded("PTX interpreter", &want, &got, rounding),
                None => case.check("PTX interpreter", &want, &got),
            }
        }));
        if let Err(fault) = checked {
            let text = fault.downcast::<String>().map_or_else(|_| "a panic".to_owned(), |s| *s);
            faults.push(format!("{}: {text}", case.spec.name()));
        }
    }
    assert!(faults.is_empty(), "{} of {} launches\n{}", faults.len(), cases.len(), faults.join("\n"));
}

/// Whether `wgmma` multiplies f16 by weights of that format.
fn has_halves(format: FormatRef) -> bool {
    matches!(format.scale, Scale::RowF32Field8 { .. })
}

#[test]
fn kernels_over_rows_agree_with_the_reference() {
    agree(&row_cases::all());
}

#[test]
fn attention_agrees_with_the_reference() {
    agree(&attention_cases::all());
}

/// Spans and their merging in one launch, which no single launch of a CPU becomes: contexts of one span and of several, whose
/// blocks finish in either order.
#[test]
fn attention_joined_agrees_with_the_reference() {
    for target in [CudaTarget::Ptx, CudaTarget::by_name("cuda:sm_90a").expect("a target")] {
        attention_joined_agrees_on(target);
    }
}

fn attention_joined_agrees_on(target: CudaTarget) {
    let Some(mut modules) = Modules::find(target) else { return };
    let mut faults = Vec::new();
    let shapes = [
        ((9, 3, 64), None, 64, Activation::Int8),
        ((7, 1, 128), None, 256, Activation::Int8),
        ((8, 1, 32), Some(70), 64, Activation::F32),
        ((6, 1, 80), Some(40), 64, Activation::F32),
        ((24, 2, 16), None, 32, Activation::F32),
        ((2, 1, 256), None, 96, Activation::Int8),
    ];
    for (shape, window, span, out) in shapes {
        let attention = attention_cases::spec(shape, window, KvType::F16, span);
        let batch = attention_cases::runs(&[(0, 0, 2), (0, 31, 2), (1, 95, 3), (2, 63, 1), (1, 129, 1)]);
        let store = Store::new(attention, &[36, 130, 64], &mut Random(17));
        let case = store.spans(&batch, &attention_cases::queries(&attention, &batch), 0.0);
        let merge = store.merge(&batch, case.reference()[0].clone(), out);
        let spec = CudaSpec::AttentionJoined { attention, out };
        let programs = CudaPrograms { programs: Vec::new(), kernels: vec![spec.clone()] };
        let (module, blocks) = modules.module(&programs, &spec.name());
        let mut memory = Memory::new();
        let mut params = Vec::new();
        for (slot, arg) in case.args.iter().enumerate() {
            params.push(match arg {
                Arg::Number(n) => Param::from(*n),
                Arg::Input(bytes) => {
                    let buffer = memory.alloc(&format!("argument {slot}"), bytes);
                    memory.set_read_only(buffer);
                    Param::from(buffer)
                }
                Arg::Output(bytes, _) => Param::from(memory.alloc_uninit("partials", bytes.len())),
            });
        }
        let Arg::Output(blank, _) = &merge.args[2] else { panic!("a result") };
        let out = memory.alloc("out", blank);
        let counters = memory.alloc("counters", &vec![0; merge.grid as usize * 4]);
        params.extend([Param::from(out), Param::from(counters)]);
        let launch = Launch {
            kernel: &spec.name(),
            grid: [case.grid as u32, 1, 1],
            block: [spec.threads(), 1, 1],
            dynamic_shared: blocks.shared_bytes as usize,
            params: &params,
        };
        let both = module.launch_both(&mut memory, &launch).unwrap_or_else(|e| panic!("{e}"));
        assert!(both.differing.is_empty(), "{}: {:?} depend on the order", spec.name(), both.differing);
        let (want, got) = (merge.reference(), vec![memory.bytes(out).to_vec()]);
        let checked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            merge.check("PTX interpreter", &want, &got);
        }));
        if let Err(fault) = checked {
            let text = fault.downcast::<String>().map_or_else(|_| "a panic".to_owned(), |s| *s);
            faults.push(format!("{}: {text}", spec.name()));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// Prompts in blocks of 64 and of 128 rows: more than one block, several sequences in one, rows and pages that are not full,
/// windows, steps of 16 positions.
#[test]
fn attention_of_prompts_agrees_with_the_reference() {
    let shapes = [
        ((16, 4, 128), None, Activation::Int8),
        ((16, 8, 64), Some(50), Activation::F32),
        ((16, 2, 48), None, Activation::F32),
        ((32, 1, 32), Some(3), Activation::Int8),
        ((3, 1, 64), Some(100), Activation::Int8),
        ((2, 2, 112), None, Activation::F32),
        ((1, 1, 240), None, Activation::F32),
        ((2, 1, 256), Some(70), Activation::Int8),
    ];
    let r = &mut Random(12);
    let mut cases = Vec::new();
    for (shape, window, out) in shapes {
        for kv in [KvType::F16, KvType::Int8, KvType::Int4] {
            let spec = attention_cases::spec(shape, window, kv, 256);
            let store = Store::new(spec, &[150, 70, 33, 1], r);
            let mut batches =
                vec![vec![(1, 0, 61), (0, 97, 5), (3, 0, 1), (2, 16, 17), (0, 102, 3), (1, 61, 9)]];
            if kv == KvType::F16 {
                batches.push(vec![(0, 0, 150)]);
            }
            for batch in batches {
                let batch = attention_cases::runs(&batch);
                cases.push(store.tiles(&batch, &attention_cases::queries(&spec, &batch), out));
            }
        }
    }
    agree(&cases);
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

/// Tiles of every height, none filled exactly: K is 32 times an odd number, or all the ring holds and more; N is no multiple of
/// the tile; rows end in a first tile and a second. Of the epilogues that are launches of their own, the products are stored
/// like any.
#[test]
fn products_of_warpgroups_agree_with_the_reference() {
    let target = CudaTarget::by_name("cuda:sm_90a").expect("a target");
    let mut cases = Vec::new();
    let ends = linear_cases::epilogues().into_iter().filter(|(e, _)| !matches!(e, Epilogue::Qkv(_)));
    let ends: Vec<_> = ends.chain([(Epilogue::Store, 192)]).collect();
    for (f, format) in formats::ALL.iter().copied().filter(|f| f.code_bits() != 32).enumerate() {
        for (e, (epilogue, n)) in ends.iter().cloned().enumerate() {
            let ks: &[usize] = if format.group == 1 { &[33, 96, 5, 256] } else { &[96, 32, 352, 256] };
            let count = if n == 192 { [257, 40, 100][f % 3] } else { [1, 17, 65, 130, 300][(e + f) % 5] };
            let k = if n == 192 { 1120 } else { ks[(e + f) % ks.len()] };
            let bias = (e + f) % 2 == 0;
            let spec = LinearSpec { format, n, k, rows: RowTile::Many, bias, epilogue };
            cases.push(linear_cases::case((100 * f + e) as u64, spec, count));
        }
    }
    for (d, format) in linear_cases::every_kind().into_iter().skip(formats::ALL.len()).enumerate() {
        let spec =
            LinearSpec { format, n: 35, k: 96, rows: RowTile::Many, bias: false, epilogue: Epilogue::Store };
        cases.push(linear_cases::case(d as u64, spec, 20));
    }
    cases.extend(linear_cases::special_rows().into_iter().filter(|c| c.rounding().is_some()));
    agree_on(target, &cases);
}

/// The same token as the sampler of the runtime takes: the first of the largest, whatever is not a number left out.
#[test]
fn the_likeliest_token_is_the_first_of_the_largest() {
    let Some(mut modules) = Modules::find(CudaTarget::Ptx) else { return };
    let programs = CudaPrograms { programs: Vec::new(), kernels: vec![CudaSpec::Argmax] };
    let name = CudaSpec::Argmax.name();
    let (module, _) = modules.module(&programs, &name);
    for vocab in [1, 5, 31, 1023, 1024, 1025, 5003] {
        let mut random = Random(vocab as u64);
        let mut rows = vec![
            random.f32s(vocab, 4.0),
            // Many equals, on different threads and warps.
            (0..vocab).map(|_| random.below(3) as f32).collect(),
            vec![-3.5; vocab],
            vec![f32::NAN; vocab],
            vec![f32::NEG_INFINITY; vocab],
            (0..vocab).map(|i| if i % 2 == 0 { f32::NAN } else { -(i as f32) }).collect(),
            (0..vocab).map(|i| if i % 2 == 0 { -0.0 } else { 0.0 }).collect(),
            (0..vocab).map(|i| if i < vocab / 2 { f32::NEG_INFINITY } else { f32::MIN }).collect(),
            random.f32s(vocab, 4.0),
        ];
        rows.last_mut().expect("a row")[vocab - 1] = f32::INFINITY;
        let want: Vec<u32> = rows
            .iter()
            .map(|row| {
                let mut best = (f32::NEG_INFINITY, 0);
                for (logit, token) in row.iter().zip(0..) {
                    if *logit > best.0 {
                        best = (*logit, token);
                    }
                }
                best.1
            })
            .collect();
        let mut memory = Memory::new();
        let logits = memory.alloc("logits", &bytes_of(&rows.concat()));
        memory.set_read_only(logits);
        let tokens = memory.alloc_uninit("tokens", rows.len() * 4);
        let launch = Launch {
            kernel: &name,
            grid: [rows.len() as u32, 1, 1],
            block: [CudaSpec::Argmax.threads(), 1, 1],
            dynamic_shared: 0,
            params: &[Param::from(logits), Param::from(tokens), Param::from(vocab as u64)],
        };
        let both = module.launch_both(&mut memory, &launch).unwrap_or_else(|e| panic!("{e}"));
        assert!(both.differing.is_empty(), "{vocab}");
        let got: Vec<u32> = memory
            .bytes(tokens)
            .chunks_exact(4)
            .map(|b| u32::from_le_bytes(b.try_into().expect("four bytes")))
            .collect();
        assert_eq!(got, want, "{vocab} logits");
    }
}
