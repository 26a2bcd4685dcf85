//! Every kernel's PTX, as NVRTC emits it, executed by the PTX interpreter and compared with the scalar reference.
//!
//! No GPU takes part, and nothing here says how fast one would be.

mod case;
mod modules;
mod nvrtc_here;

use attar_artifact::manifest::KvType;
use attar_artifact::program::StepSize;
use attar_codegen_cuda::{CudaPrograms, CudaSpec, CudaTarget};
use attar_format::{FormatRef, Scale, formats};
use attar_kernel::{ActInt8Layout, Activation, Epilogue, KernelSpec, LinearSpec, QkvEpilogue, RowTile};
use attar_ptx::{Launch, Memory, Param};
use case::attention_cases::{self, Store};
use case::{Arg, Case, Check, Random, Rounding, bytes_of, linear_cases, row_cases};
use half::f16;
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

/// Executes one launch and gives what is then in the buffers that it may write: partials, result, counters, and the cache.
fn launch_alone(modules: &mut Modules, spec: &CudaSpec, grid: u64, args: &[Arg]) -> Vec<Vec<u8>> {
    let programs = CudaPrograms { programs: Vec::new(), kernels: vec![spec.clone()] };
    let (module, blocks) = modules.module(&programs, &spec.name());
    let mut memory = Memory::new();
    let mut written = Vec::new();
    let mut place = |slot: usize, arg: &Arg| match arg {
        Arg::Number(n) => Param::from(*n),
        Arg::Input(bytes) => {
            let buffer = memory.alloc(&format!("argument {slot}"), bytes);
            memory.set_read_only(buffer);
            Param::from(buffer)
        }
        Arg::Output(bytes, _) => {
            written.push(memory.alloc(&format!("argument {slot}"), bytes));
            Param::from(written[written.len() - 1])
        }
    };
    let params: Vec<Param> = args.iter().enumerate().map(|(slot, arg)| place(slot, arg)).collect();
    let launch = Launch {
        kernel: &spec.name(),
        grid: [grid as u32, 1, 1],
        block: [spec.threads(), 1, 1],
        dynamic_shared: blocks.shared_bytes as usize,
        params: &params,
    };
    let both = module.launch_both(&mut memory, &launch).unwrap_or_else(|e| panic!("{e}"));
    assert!(both.differing.is_empty(), "{}: {:?} depend on the order", spec.name(), both.differing);
    written.into_iter().map(|buffer| memory.bytes(buffer).to_vec()).collect()
}

/// Spans and their merging in one launch, which no single launch of a CPU becomes: contexts of one span and of several, whose
/// blocks finish in either order.
#[test]
fn attention_joined_agrees_with_the_reference() {
    let shapes = [
        ((9, 3, 64), None, 64, Activation::Int8),
        ((7, 1, 128), None, 256, Activation::Int8),
        ((8, 1, 32), Some(70), 64, Activation::F32),
        ((6, 1, 80), Some(40), 64, Activation::F32),
        ((24, 2, 16), None, 32, Activation::F32),
        ((2, 1, 256), None, 96, Activation::Int8),
    ];
    for target in [CudaTarget::Ptx, CudaTarget::by_name("cuda:sm_90a").expect("a target")] {
        let Some(mut modules) = Modules::find(target) else { return };
        for (shape, window, span, out) in shapes {
            let attention = attention_cases::spec(shape, window, KvType::F16, span);
            let batch = attention_cases::runs(&[(0, 0, 2), (0, 31, 2), (1, 95, 3), (2, 63, 1), (1, 129, 1)]);
            let store = Store::new(attention, &[36, 130, 64], &mut Random(17));
            let case = store.spans(&batch, &attention_cases::queries(&attention, &batch), 0.0);
            let merge = store.merge(&batch, case.reference()[0].clone(), out);
            let counters = Arg::Output(vec![0; merge.grid as usize * 4], Check::Bytes);
            let args = [&case.args[..], &[merge.args[2].clone(), counters.clone()]].concat();
            let spec = CudaSpec::AttentionJoined { attention, out };
            let got = launch_alone(&mut modules, &spec, case.grid, &args);
            merge.check(&spec.name(), &merge.reference(), &[got[1].clone()]);
            assert!(got[2].iter().all(|byte| *byte == 0), "{}: counters are left at zero", spec.name());
        }
    }
}

/// Norm, rotation and store of one token's heads in the same launch: what the cache has at the token's place is not read.
#[test]
fn attention_of_a_fresh_token_agrees_with_the_reference() {
    let shapes = [
        ((9, 3, 64), None, 64, None, Activation::Int8),
        ((7, 1, 128), None, 256, Some(1e-6), Activation::F32),
        ((8, 1, 32), Some(70), 64, None, Activation::F32),
        ((24, 2, 16), None, 32, Some(1e-5), Activation::F32),
        ((2, 1, 256), None, 96, None, Activation::Int8),
    ];
    for target in [CudaTarget::Ptx, CudaTarget::by_name("cuda:sm_90a").expect("a target")] {
        let Some(mut modules) = Modules::find(target) else { return };
        for (shape, window, span, qk_norm, out) in shapes {
            let (heads, kv_heads, head_dim) = shape;
            let attention = attention_cases::spec(shape, window, KvType::F16, span);
            let kv = KvType::F16;
            let qkv = QkvEpilogue { heads, kv_heads, head_dim, qk_norm, kv, page_len: 32 };
            let spec = CudaSpec::AttentionFresh { attention, qkv, out };
            for position in [0, 31, 95, 129] {
                let r = &mut Random(position as u64 + 1);
                let mut want = Store::new(attention, &[36, 130], r);
                let mut given = want.clone();
                let y = r.f32s((heads + 2 * kv_heads) * head_dim, 2.0);
                let gains = [r.f32s(head_dim, 1.0), r.f32s(head_dim, 1.0)];
                let angles = r.f32s(head_dim / 2, 3.0);
                let rope: Vec<f32> =
                    angles.iter().map(|a| a.cos()).chain(angles.iter().map(|a| a.sin())).collect();
                let mut made: Vec<Vec<f32>> = y.chunks(head_dim).map(<[f32]>::to_vec).collect();
                for (head, x) in made.iter_mut().take(heads + kv_heads).enumerate() {
                    let gain = &gains[usize::from(head >= heads)];
                    rotate(x, qk_norm.map(|eps| (eps, &gain[..])), &rope);
                }
                for head in 0..kv_heads {
                    want.put(1, position, head, false, &made[heads + head]);
                    want.put(1, position, head, true, &made[heads + kv_heads + head]);
                    for values in [false, true] {
                        given.put(1, position, head, values, &vec![f32::NAN; head_dim]);
                    }
                }
                let batch = vec![(1, position)];
                let case = want.spans(&batch, &made[..heads].concat(), 0.0);
                let merge = want.merge(&batch, case.reference()[0].clone(), out);
                let input = |x: &[f32]| Arg::Input(bytes_of(x));
                let mut args = vec![input(&y)];
                if qk_norm.is_some() {
                    args.extend(gains.each_ref().map(|gain| input(gain)));
                }
                args.push(input(&rope));
                args.extend_from_slice(&case.args[1..5]);
                args.extend([&given.keys, &given.values].map(|x| Arg::Output(x.clone(), Check::Bytes)));
                args.extend_from_slice(&case.args[7..]);
                let counters = Arg::Output(vec![0; kv_heads * 4], Check::Bytes);
                args.extend([merge.args[2].clone(), counters]);
                let got = launch_alone(&mut modules, &spec, case.grid, &args);
                merge.check(&spec.name(), &merge.reference(), &[got[3].clone()]);
                assert!(got[4].iter().all(|byte| *byte == 0), "{}: counters are left at zero", spec.name());
                for (got, want) in got.iter().zip([&want.keys, &want.values]) {
                    let f16s = |bytes: &[u8]| -> Vec<f32> {
                        bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect()
                    };
                    for (got, want) in f16s(got).into_iter().zip(f16s(want)) {
                        // The last bit, where a number lies between two.
                        let near = (got - want).abs() <= want.abs() / 1024.0 + 1e-6;
                        assert!(near || got.is_nan() && want.is_nan(), "{}: {got} for {want}", spec.name());
                    }
                }
            }
        }
    }
}

/// A norm within the product behind it, which two launches of a CPU become.
#[test]
fn products_of_normed_rows_agree_with_the_reference() {
    for target in [CudaTarget::Ptx, CudaTarget::by_name("cuda:sm_90a").expect("a target")] {
        let Some(mut modules) = Modules::find(target) else { return };
        for (f, format) in formats::ALL.iter().copied().filter(|f| f.wants_int8_activations()).enumerate() {
            let epilogues = linear_cases::epilogues().into_iter();
            for (e, (epilogue, n)) in epilogues.filter(|(e, _)| !matches!(e, Epilogue::Qkv(_))).enumerate() {
                let (k, gain, eps) = ([96, 32, 352, 4128, 512][(e + f) % 5], (e + f) % 3 > 0, 1e-5);
                let linear =
                    LinearSpec { format, n, k, rows: RowTile::One, bias: (e + f) % 2 == 0, epilogue };
                let mut case = linear_cases::case((100 * f + e) as u64, linear.clone(), 1);
                let r = &mut Random((f + e) as u64);
                let mut row = vec![Arg::Input(bytes_of(&r.f32s(k, 3.0)))];
                if gain {
                    row.push(Arg::Input(bytes_of(&r.f32s(k, 1.0))));
                }
                let quantized = Arg::Output(vec![0; ActInt8Layout::new(k).stride], Check::Bytes);
                let norm = Case {
                    spec: KernelSpec::RmsNorm { dim: k, eps, gain, out: Activation::Int8 },
                    args: [&row[..], &[quantized]].concat(),
                    grid: 1,
                };
                case.args[0] = Arg::Input(norm.reference()[0].clone());
                let blocks = case.on_gpu().programs[0].launches[0].blocks.expect("a launch of a GPU");
                let grid = blocks.x.at(StepSize { tokens: 1, rows: 1, spans: 1 }).expect("small");
                let spec = CudaSpec::NormLinear { linear, eps, gain };
                let got = launch_alone(&mut modules, &spec, grid, &[&row[..], &case.args[1..]].concat());
                case.check(&spec.name(), &case.reference(), &got);
            }
        }
    }
}

/// Norm and rotation of a head, in double precision.
fn rotate(x: &mut [f32], norm: Option<(f32, &[f32])>, rope: &[f32]) {
    let mut y: Vec<f64> = x.iter().map(|v| f64::from(*v)).collect();
    if let Some((eps, gain)) = norm {
        let squares: f64 = y.iter().map(|v| v * v).sum();
        let inverse = 1.0 / (squares / y.len() as f64 + f64::from(eps)).sqrt();
        y.iter_mut().zip(gain).for_each(|(v, g)| *v *= inverse * f64::from(*g));
    }
    let half = y.len() / 2;
    for i in 0..half {
        let (cosine, sine) = (f64::from(rope[i]), f64::from(rope[half + i]));
        x[i] = (y[i] * cosine - y[half + i] * sine) as f32;
        x[half + i] = (y[half + i] * cosine + y[i] * sine) as f32;
    }
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

/// Values far smaller than f16 has room for once they are multiplied by weights; queries and keys that are no numbers, which
/// concern those rows alone that see them.
#[test]
fn attention_of_prompts_keeps_small_values_and_what_is_no_number() {
    let r = &mut Random(13);
    let mut cases = Vec::new();
    for kv in [KvType::F16, KvType::Int8, KvType::Int4] {
        let spec = attention_cases::spec((16, 4, 64), None, kv, 256);
        let mut store = Store::new(spec, &[70, 40], r);
        if kv.has_scales() {
            for (position, head) in (0..40).flat_map(|p| (0..spec.kv_heads).map(move |h| (p, h))) {
                // Growing, so that sums meet larger scales than those before.
                let size = if position < 35 { 1e-7 } else { 1e-6 };
                store.put(1, position, head, true, &r.f32s(spec.head_dim, size));
            }
        }
        let batch = attention_cases::runs(&[(1, 20, 20)]);
        cases.push(store.tiles(&batch, &attention_cases::queries(&spec, &batch), Activation::F32));
        store.put(0, 69, 1, false, &vec![f32::NAN; spec.head_dim]);
        let batch = attention_cases::runs(&[(0, 30, 40)]);
        let mut queries = attention_cases::queries(&spec, &batch);
        let head = |token: usize, head: usize| (token * spec.heads + head) * spec.head_dim;
        queries[head(3, 5) + 7] = f32::NAN;
        queries[head(38, 0)] = f32::INFINITY;
        queries[head(12, 9)..][..spec.head_dim].fill(0.0);
        for out in [Activation::F32, Activation::Int8] {
            cases.push(store.tiles(&batch, &queries, out));
        }
    }
    agree(&cases);
}

#[test]
fn products_agree_with_the_reference() {
    agree(&linear_cases::all());
}

/// Matrices so tall that a warp has two blocks of channels, the last of them alone; and so deep that a warp asks for more weights
/// while it multiplies, for whole fours of groups and not.
#[test]
fn products_of_few_rows_and_large_matrices_agree_with_the_reference() {
    let int8 = Epilogue::Swiglu { width: 64, out: Activation::Int8 };
    let floats = Epilogue::Swiglu { width: 32, out: Activation::F32 };
    let shapes = [
        (Epilogue::Residual, 4112, 96),
        (Epilogue::Store, 4120, 128),
        (Epilogue::Store, 35, 4704),
        (Epilogue::Residual, 16, 4608),
        (int8.clone(), 128, 2912),
        (int8, 128, 2944),
        (floats, 64, 4224),
    ];
    let mut cases = Vec::new();
    let formats = formats::ALL.iter().copied().filter(|f| f.wants_int8_activations());
    for (f, format) in formats.enumerate() {
        for (e, (epilogue, n, k)) in shapes.iter().cloned().enumerate() {
            let bias = (e + f) % 2 == 0;
            let spec = |rows| LinearSpec { format, n, k, rows, bias, epilogue: epilogue.clone() };
            let seed = (100 * f + e) as u64;
            let count = [2, 16, 8, 9, 32, 19, 13][(3 * e + f) % 7];
            cases.push(linear_cases::case(seed, spec(RowTile::Small), count));
            if n < 4096 {
                cases.push(linear_cases::case(seed, spec(RowTile::One), 1));
            }
        }
    }
    // Of uncompressed weights, too, a block has 16 rows.
    for (f, format) in formats::ALL.iter().copied().filter(|f| f.is_uncompressed()).enumerate() {
        for (e, (epilogue, n)) in linear_cases::epilogues().into_iter().take(5).enumerate() {
            let spec = LinearSpec { format, n, k: 96, rows: RowTile::Small, bias: e % 2 == 0, epilogue };
            cases.push(linear_cases::case((10 * f + e) as u64, spec, [17, 32, 23][(e + f) % 3]));
        }
    }
    // A row that has no room beside weights.
    let (format, epilogue) = (formats::by_name("n4").expect("a format"), Epilogue::Residual);
    let longest = LinearSpec { format, n: 21, k: 53248, rows: RowTile::One, bias: true, epilogue };
    cases.push(linear_cases::case(7, longest, 1));
    for target in [CudaTarget::Ptx, CudaTarget::by_name("cuda:sm_90a").expect("a target")] {
        agree_on(target, &cases);
    }
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

/// The same as sorting, also of equals, of what is not a number, and where one thread has all of the largest.
#[test]
fn the_largest_logits_are_those_of_sorting() {
    let Some(mut modules) = Modules::find(CudaTarget::Ptx) else { return };
    let programs = CudaPrograms { programs: Vec::new(), kernels: vec![CudaSpec::TopK] };
    let name = CudaSpec::TopK.name();
    let (module, _) = modules.module(&programs, &name);
    let cases =
        [(1, 1), (5, 3), (31, 31), (1023, 64), (1024, 40), (1025, 1), (5003, 64), (12000, 64), (40960, 64)];
    for (vocab, k) in cases {
        let mut random = Random(vocab as u64);
        let mut rows = vec![
            random.f32s(vocab, 4.0),
            (0..vocab).map(|_| random.below(3) as f32).collect(),
            vec![f32::NAN; vocab],
            (0..vocab).map(|i| if i % 2 == 0 { f32::NAN } else { -(i as f32) }).collect(),
            (0..vocab).map(|i| if i % 2 == 0 { -0.0 } else { 0.0 }).collect(),
            (0..vocab).map(|i| if i < vocab / 2 { f32::NEG_INFINITY } else { f32::MIN }).collect(),
            (0..vocab).map(|i| i as f32).collect(),
            // A few threads have all of the largest; of 40960 these are more than there is room for.
            (0..vocab).map(|i| if i / 4 % 1024 < 56 { random.f32s(1, 1.0)[0] + 9.0 } else { 0.0 }).collect(),
        ];
        rows[0][vocab - 1] = f32::INFINITY;
        let mut want = Vec::new();
        for row in &rows {
            let usable = |i: usize| if row[i].is_nan() { f32::NEG_INFINITY } else { row[i] };
            let mut order: Vec<usize> = (0..vocab).collect();
            order.sort_by(|a, b| usable(*b).total_cmp(&usable(*a)).then(a.cmp(b)));
            want.extend(order[..k].iter().map(|&i| (i as u32, usable(i).to_bits())));
        }
        let mut memory = Memory::new();
        let logits = memory.alloc("logits", &bytes_of(&rows.concat()));
        memory.set_read_only(logits);
        let out = memory.alloc_uninit("out", rows.len() * k * 8);
        let launch = Launch {
            kernel: &name,
            grid: [rows.len() as u32, 1, 1],
            block: [CudaSpec::TopK.threads(), 1, 1],
            dynamic_shared: 0,
            params: &[logits.into(), out.into(), Param::from(vocab as u64), Param::from(k as u64)],
        };
        let both = module.launch_both(&mut memory, &launch).unwrap_or_else(|e| panic!("{e}"));
        assert!(both.differing.is_empty(), "{vocab}");
        let word = |b: &[u8]| u32::from_le_bytes(b.try_into().expect("four bytes"));
        let got: Vec<(u32, u32)> =
            memory.bytes(out).chunks_exact(8).map(|b| (word(&b[..4]), word(&b[4..]))).collect();
        assert_eq!(got, want, "the {k} largest of {vocab}");
    }
}
