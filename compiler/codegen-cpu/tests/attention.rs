//! Attention on this machine: against the scalar reference, and its programs against each other, bit by bit.

mod case;

use attar_artifact::manifest::KvType;
use attar_codegen_cpu::exec::ExecImage;
use attar_codegen_cpu::{Target, compile_blob, disassemble_inners};
use attar_kernel::{ActInt8Layout, Activation, AttentionSpec, KernelSpec};
use case::attention_cases::{self, Batch, Store, queries, runs, spec};
use case::{Random, f32s, host_targets};
use proptest::prelude::*;

#[test]
fn agrees_with_the_reference() {
    let cases = attention_cases::all();
    let specs: Vec<KernelSpec> = cases.iter().map(|c| c.spec.clone()).collect();
    for target in host_targets() {
        let image = ExecImage::load(&compile_blob(target, &specs).unwrap()).unwrap();
        for case in &cases {
            case.check(target.name(), &case.reference(), &case.compiled(&image));
        }
    }
}

fn image(target: Target, attention: AttentionSpec, out: Activation) -> ExecImage {
    let specs = [
        KernelSpec::Attention { attention, out },
        KernelSpec::AttentionSpan(attention),
        KernelSpec::AttentionMerge { attention, out },
    ];
    ExecImage::load(&compile_blob(target, &specs).unwrap()).unwrap()
}

/// Results through the program for few tokens.
fn by_spans(image: &ExecImage, store: &Store, batch: &Batch, q: &[f32], out: Activation) -> Vec<u8> {
    // Partials that are not written must not be read.
    let partials = store.spans(batch, q, f32::NAN).compiled(image).remove(0);
    store.merge(batch, partials, out).compiled(image).remove(0)
}

fn by_tiles(image: &ExecImage, store: &Store, batch: &Batch, q: &[f32], out: Activation) -> Vec<u8> {
    store.tiles(batch, q, out).compiled(image).remove(0)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// A token's result is the same bits whatever is computed with it, and by whichever program.
    #[test]
    fn results_do_not_depend_on_the_batch(
        shape in prop_oneof![
            Just((9, 3, 64)), Just((4, 4, 16)), Just((10, 2, 12)), Just((8, 1, 32)), Just((6, 2, 80)), Just((2, 1, 128)),
            Just((3, 1, 96)),
        ],
        window in prop_oneof![Just(None), (1usize..200).prop_map(Some)],
        kv in prop_oneof![Just(KvType::F32), Just(KvType::F16), Just(KvType::Int8), Just(KvType::Int4)],
        int8 in any::<bool>(),
        span in prop_oneof![Just(32usize), Just(64), Just(256)],
        parts in prop::collection::vec((0usize..3, 0usize..290, 1usize..40), 1..5),
        seed in any::<u64>(),
    ) {
        // Heads of 12 have no 4-bit cache.
        let kv = if kv == KvType::Int4 && !usize::is_multiple_of(shape.2, KvType::INT4_HEAD) { KvType::Int8 } else { kv };
        let spec = spec(shape, window, kv, span);
        let whole = (spec.group() * spec.head_dim).is_multiple_of(ActInt8Layout::GROUP);
        let out = if int8 && whole { Activation::Int8 } else { Activation::F32 };
        let batch = runs(&parts);
        let store = Store::new(spec, &[330, 330, 330], &mut Random(seed));
        for target in host_targets() {
            let image = image(target, spec, out);
            let q = queries(&spec, &batch);
            let all = by_tiles(&image, &store, &batch, &q, out);
            let width = all.len() / batch.len();
            let spans = by_spans(&image, &store, &batch, &q, out);
            prop_assert!(all == spans, "{}: tiles and spans differ", target.name());
            for (t, token) in batch.iter().enumerate().step_by(7) {
                let alone = vec![*token];
                let q = queries(&spec, &alone);
                let want = &all[t * width..][..width];
                prop_assert!(want == by_spans(&image, &store, &alone, &q, out), "{}: token {t}", target.name());
            }
            for (i, chunk) in batch.chunks(5).take(3).enumerate() {
                let (chunk, first) = (chunk.to_vec(), 5 * i);
                let q = queries(&spec, &chunk);
                let want = &all[first * width..][..chunk.len() * width];
                let got = by_tiles(&image, &store, &chunk, &q, out);
                prop_assert!(want == got, "{}: chunk from {first}", target.name());
            }
        }
    }
}

/// Numbers that f16 holds only as subnormals become zeros, ties go to even, and what is too large becomes infinite.
#[test]
fn halves_are_stored_alike_on_every_target() {
    let smallest = 2f32.powi(-14);
    let numbers = [
        0.0,
        -0.0,
        1.0,
        -1.5,
        1.0 + 2f32.powi(-11),
        1.0 + 3.0 * 2f32.powi(-11),
        smallest,
        -smallest,
        smallest.next_down(),
        -smallest.next_down(),
        smallest / 3.0,
        1e-40,
        -1e-40,
        65504.0,
        65519.0,
        65520.0,
        -65520.0,
        1e9,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        0.333_333_34,
        -3.25,
    ];
    let want = |x: f32| {
        if x.abs() < smallest { half::f16::from_f32(0f32.copysign(x)) } else { half::f16::from_f32(x) }
    };
    for head_dim in [16, 32, 64, 80, 128] {
        let spec = spec((2, 2, head_dim), None, KvType::F16, 64);
        let (batch, len) = (runs(&[(0, 3, 2)]), 4 * head_dim);
        let x: Vec<f32> = numbers.into_iter().cycle().take(len).collect();
        let mut expected = Store::new(spec, &[5], &mut Random(5));
        for (i, head) in x.chunks_exact(head_dim).enumerate() {
            let halves: Vec<f32> = head.iter().map(|v| want(*v).to_f32()).collect();
            [false, true].into_iter().for_each(|values| expected.put(0, 3 + i / 2, i % 2, values, &halves));
        }
        let case = attention_cases::write_of(&Store::new(spec, &[5], &mut Random(5)), &batch, &x, &x);
        for target in host_targets() {
            let image =
                ExecImage::load(&compile_blob(target, std::slice::from_ref(&case.spec)).unwrap()).unwrap();
            for (got, want) in case.compiled(&image).iter().zip([&expected.keys, &expected.values]) {
                let halves = |bytes: &[u8]| -> Vec<u16> {
                    let bits = bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
                    // Any NaN is as good as another.
                    bits.map(|b| if b & 0x7fff > 0x7c00 { 0x7e00 } else { b }).collect()
                };
                assert!(halves(got) == halves(want), "{}, heads of {head_dim}", target.name());
            }
        }
    }
}

/// NaN and infinities: what a token sees shows in its result as it does in the reference, what it does not see never.
#[test]
fn what_is_not_finite_stays_where_it_is_seen() {
    for kv in [KvType::F32, KvType::F16, KvType::Int8, KvType::Int4] {
        let spec = spec((3, 1, 32), None, kv, 64);
        let batch = runs(&[(0, 40, 60)]);
        let mut cases = Vec::new();
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for values in [false, true] {
                for position in [50, 70] {
                    let mut store = Store::new(spec, &[100], &mut Random(5));
                    let mut x = Random(6).f32s(32, 1.0);
                    x[3] = bad;
                    store.put(0, position, 0, values, &x);
                    cases.push((position, store, queries(&spec, &batch)));
                }
            }
            let mut q = queries(&spec, &batch);
            q[30 * 96 + 5] = bad;
            cases.push((70, Store::new(spec, &[100], &mut Random(5)), q));
        }
        // A span in which no score is more than minus infinity, and one after it that has others.
        let mut store = Store::new(spec, &[100], &mut Random(5));
        if !kv.has_scales() {
            let mut q = queries(&spec, &batch);
            q.iter_mut().step_by(32).for_each(|q| *q = 1.0);
            for position in 0..64 {
                let mut x = Random(6).f32s(32, 1.0);
                x[0] = f32::NEG_INFINITY;
                store.put(0, position, 0, false, &x);
            }
            cases.push((0, store, q));
        }
        for target in host_targets() {
            let image = image(target, spec, Activation::F32);
            for (position, store, q) in &cases {
                let case = store.tiles(&batch, q, Activation::F32);
                let (want, got) = (case.reference(), case.compiled(&image));
                case.check(target.name(), &want, &got);
                let finite = f32s(&got[0])
                    .chunks(96)
                    .zip(&batch)
                    .all(|(row, (_, p))| p >= position || row.iter().all(|v| v.is_finite()));
                assert!(finite, "something not finite shows before position {position}");
                let spans = by_spans(&image, store, &batch, q, Activation::F32);
                let bits = |b: &[u8]| {
                    f32s(b).iter().map(|v| if v.is_nan() { 0 } else { v.to_bits() }).collect::<Vec<_>>()
                };
                assert_eq!(bits(&got[0]), bits(&spans));
            }
        }
    }
}

#[test]
fn shapes_without_a_kernel_are_errors() {
    let refused = |spec: AttentionSpec, out| {
        let spec = KernelSpec::Attention { attention: spec, out };
        compile_blob(Target::X86_64V2, &[spec]).unwrap_err().to_string()
    };
    let good = spec((4, 2, 16), None, KvType::F16, 64);
    let out = Activation::F32;
    assert!(refused(AttentionSpec { head_dim: 18, ..good }, out).contains("width 18"));
    assert!(refused(AttentionSpec { page_len: 8, ..good }, out).contains("pages of 8"));
    assert!(refused(AttentionSpec { span: 40, ..good }, out).contains("spans of 40"));
    assert!(refused(AttentionSpec { kv_heads: 3, ..good }, out).contains("3 KV heads"));
    let halves = AttentionSpec { kv: KvType::Int4, head_dim: 24, ..good };
    assert!(refused(halves, out).contains("4-bit cache of heads of width 24"));
    assert!(refused(AttentionSpec { head_dim: 12, ..good }, Activation::Int8).contains("24 channels"));
}

/// Tiles cover every token and head once, the last tokens first.
#[test]
fn every_tile_has_one_item() {
    for (shape, tokens) in [((9, 3, 64), 100), ((4, 4, 16), 33), ((8, 1, 32), 1), ((32, 8, 64), 512)] {
        let spec = spec(shape, None, KvType::F32, 64);
        let grid = spec.kv_heads * (tokens + spec.tile_tokens() - 1);
        let tiles: Vec<_> = (0..grid).filter_map(|i| spec.tile(i, tokens)).collect();
        assert!(tiles.windows(2).all(|t| t[0].0 >= t[1].0));
        let mut sorted = tiles.clone();
        sorted.sort_unstable();
        let expected: Vec<_> = (0..tokens)
            .step_by(spec.tile_tokens())
            .flat_map(|t| (0..spec.kv_heads).map(move |h| (t, h)))
            .collect();
        assert_eq!(sorted, expected);
    }
}

/// The inner functions multiply in registers as wide as the level has, spill nothing, and leave clean registers behind.
#[test]
fn inner_functions_are_what_they_are_meant_to_be() {
    for (target, register) in [(Target::X86_64V3, "ymm"), (Target::X86_64V4, "zmm")] {
        for kv in [KvType::F32, KvType::F16, KvType::Int8, KvType::Int4] {
            let attention = spec((9, 3, 64), None, kv, 256);
            for kernel in [
                KernelSpec::AttentionSpan(attention),
                KernelSpec::Attention { attention, out: Activation::F32 },
                KernelSpec::Attention { attention, out: Activation::Int8 },
            ] {
                let inner = disassemble_inners(target, &kernel).unwrap();
                let text = inner.concat();
                let count = |what: &str| text.lines().filter(|l| l.contains(what)).count();
                let name = format!("{} on {}", kernel.name(), target.name());
                assert_eq!(count("vzeroupper"), inner.len(), "{name}");
                let products: &[&str] = match (kv, target) {
                    (KvType::F32 | KvType::F16, _) => &["vfmadd231ps"],
                    (KvType::Int8 | KvType::Int4, Target::X86_64V3) => &["vpmaddubsw", "vpmaddwd"],
                    (KvType::Int8 | KvType::Int4, _) => &["vpdpbusd", "vpdpwssd"],
                };
                for product in products {
                    let found: Vec<_> = text.lines().filter(|l| l.contains(product)).collect();
                    let as_meant = found.len() >= 20 && found.iter().all(|l| l.contains(register));
                    assert!(as_meant, "{name}, {product}:\n{text}");
                }
                assert_eq!(count("vcvtph2ps") > 0, kv == KvType::F16, "{name}");
                assert_eq!(count("rsp"), 0, "{name} keeps something on the stack:\n{text}");
            }
        }
    }
}
