//! Tests of lowering: launches of known graphs, and memory safety of the plan over random ones.

use super::arena;
use super::launches::{BufId, VirtualLaunch, walk};
use super::prepare::prepare;
use super::tensors::TensorTable;
use super::{LowerOptions, Lowered, lower};
use crate::host::{HostRunner, Kernels, Room};
use attar_artifact::manifest::KvType;
use attar_artifact::program::{Arg, Extent, Launch, ProgramKind, StepBuffer, StepSize};
use attar_format::{Encoded, FormatRef, formats};
use attar_ir::interp::{KvState, Precision, Step, run_step};
use attar_ir::ops::{
    Add, Attention, Embed, GateUpSwiglu, GatherRows, Linear, LinearResidual, Mul, NormLinear, QkvRope,
    Reshape, RmsNorm, Rope, Silu, Slice, Softmax,
};
use attar_ir::{Dim, Elem, Graph, OpKind, TensorType, ValueId, WeightStore};
use proptest::prelude::*;
use std::collections::BTreeMap;

const D: usize = 64;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DH: usize = 16;
const F: usize = 96;
const VOCAB: usize = 40;

fn options() -> LowerOptions {
    LowerOptions::new(KvType::F16)
}

struct Model {
    graph: Graph,
    format: FormatRef,
}

impl Model {
    fn new(format: FormatRef) -> Model {
        Model { graph: Graph::new("step"), format }
    }

    fn matrix(&mut self, name: &str, n: usize, k: usize) -> ValueId {
        let elem = if *self.format == formats::F32 { Elem::F32 } else { Elem::Coded(self.format) };
        let ty = TensorType::new(elem, [n.into(), k.into()]);
        self.graph.add_weight(&name.into(), ty)
    }

    fn vector(&mut self, name: &str, d: usize) -> ValueId {
        self.graph.add_weight(&name.into(), TensorType::f32([d.into()]))
    }

    fn node(&mut self, op: impl Into<OpKind>, inputs: &[ValueId]) -> ValueId {
        self.graph.add1(op, inputs).expect("a valid node")
    }
}

fn inv_freq() -> Vec<f64> {
    (0..DH / 2).map(|i| 10000f64.powf(-(i as f64) / 8.0)).collect()
}

fn rope() -> Rope {
    Rope { inv_freq: inv_freq(), mscale: 1.0 }
}

/// Two decoder layers, fused, with a tied head.
fn fused(format: FormatRef) -> Graph {
    let mut m = Model::new(format);
    let tokens = m.graph.add_input("tokens", TensorType::i32([Dim::T]));
    let positions = m.graph.add_input("positions", TensorType::i32([Dim::T]));
    let rows = m.graph.add_input("rows", TensorType::i32([Dim::R]));
    let table = m.matrix("model.embed_tokens.weight", VOCAB, D);
    let mut x = m.node(Embed {}, &[tokens, table]);
    for layer in 0..2 {
        let name = |part: &str| format!("model.layers.{layer}.{part}");
        let gain = m.vector(&name("input_layernorm.weight"), D);
        let w = m.matrix(&name("self_attn.qkv.weight"), (HEADS + 2 * KV_HEADS) * DH, D);
        let op = QkvRope {
            heads: HEADS,
            kv_heads: KV_HEADS,
            head_dim: DH,
            inv_freq: inv_freq(),
            mscale: 1.0,
            eps: Some(1e-5),
            qk_norm: None,
            gain: true,
            bias: false,
        };
        let qkv = m.graph.add(op, &[x, gain, w, positions]).expect("a valid node");
        let out = |slot| ValueId { node: qkv, slot };
        let attention = Attention { layer, scale: 0.25, window: None };
        let a = m.node(attention, &[out(0), out(1), out(2), positions]);
        let a = m.node(Reshape { shape: vec![Dim::T, (HEADS * DH).into()] }, &[a]);
        let o = m.matrix(&name("self_attn.o_proj.weight"), D, HEADS * DH);
        x = m.node(LinearResidual { bias: false }, &[a, o, x]);
        let gain = m.vector(&name("post_attention_layernorm.weight"), D);
        let gate_up = m.matrix(&name("mlp.gate_up.weight"), 2 * F, D);
        let h = m.node(GateUpSwiglu { eps: Some(1e-5), gain: true }, &[x, gain, gate_up]);
        let down = m.matrix(&name("mlp.down_proj.weight"), D, F);
        x = m.node(LinearResidual { bias: false }, &[h, down, x]);
    }
    let last = m.node(GatherRows {}, &[x, rows]);
    let gain = m.vector("model.norm.weight", D);
    let head = m.matrix("model.embed_tokens.weight", VOCAB, D);
    let logits = m.node(NormLinear { eps: 1e-5, gain: true, bias: false }, &[last, gain, head]);
    m.graph.set_outputs(vec![logits]);
    m.graph
}

/// One layer in core ops, as importers build it.
fn unfused(format: FormatRef) -> Graph {
    let mut m = Model::new(format);
    let tokens = m.graph.add_input("tokens", TensorType::i32([Dim::T]));
    let positions = m.graph.add_input("positions", TensorType::i32([Dim::T]));
    let rows = m.graph.add_input("rows", TensorType::i32([Dim::R]));
    let table = m.matrix("model.embed_tokens.weight", VOCAB, D);
    let x = m.node(Embed {}, &[tokens, table]);
    let gain = m.vector("model.layers.0.input_layernorm.weight", D);
    let n = m.node(RmsNorm { eps: 1e-5 }, &[x, gain]);
    let mut heads = Vec::new();
    for (part, count) in [("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)] {
        let w = m.matrix(&format!("model.layers.0.self_attn.{part}_proj.weight"), count * DH, D);
        let b = m.vector(&format!("model.layers.0.self_attn.{part}_proj.bias"), count * DH);
        let y = m.node(Linear {}, &[n, w, b]);
        let y = m.node(Reshape { shape: vec![Dim::T, count.into(), DH.into()] }, &[y]);
        heads.push(if part == "v" { y } else { m.node(rope(), &[y, positions]) });
    }
    let attention = Attention { layer: 0, scale: 0.25, window: Some(8) };
    let a = m.node(attention, &[heads[0], heads[1], heads[2], positions]);
    let a = m.node(Reshape { shape: vec![Dim::T, (HEADS * DH).into()] }, &[a]);
    let o = m.matrix("model.layers.0.self_attn.o_proj.weight", D, HEADS * DH);
    let o = m.node(Linear {}, &[a, o]);
    let x = m.node(Add {}, &[x, o]);
    let n = m.node(RmsNorm { eps: 1e-5 }, &[x]);
    let gate = m.matrix("model.layers.0.mlp.gate_proj.weight", F, D);
    let gate = m.node(Linear {}, &[n, gate]);
    let gate = m.node(Silu {}, &[gate]);
    let up = m.matrix("model.layers.0.mlp.up_proj.weight", F, D);
    let up = m.node(Linear {}, &[n, up]);
    let h = m.node(Mul {}, &[gate, up]);
    let down = m.matrix("model.layers.0.mlp.down_proj.weight", D, F);
    let down = m.node(Linear {}, &[h, down]);
    let x = m.node(Add {}, &[x, down]);
    let last = m.node(GatherRows {}, &[x, rows]);
    let head = m.matrix("lm_head.weight", VOCAB, D);
    let logits = m.node(Linear {}, &[last, head]);
    m.graph.set_outputs(vec![logits]);
    m.graph
}

fn kernels(lowered: &Lowered, program: usize) -> Vec<&str> {
    lowered.programs[program].launches.iter().map(|l| l.kernel.as_str()).collect()
}

#[test]
fn a_fused_layer_takes_five_launches_and_their_tails() {
    let lowered = lower(&fused(&formats::N4), &options()).expect("lowers");
    let expected = [
        "rms_norm_64_e3727c5ac_g_i8",
        "linear_n4_128x64_r1_qkv4_2x16_kvf16_p32",
        "attention_span_4_2x16_s3e800000_kvf16_p32_n256",
        "attention_merge_4_2x16_s3e800000_kvf16_p32_n256_i8",
        "linear_n4_64x64_r1_residual",
        "rms_norm_64_e3727c5ac_g_i8",
        "linear_n4_192x64_r1_swiglu96_i8",
        "linear_n4_64x96_r1_residual",
    ];
    let decode = kernels(&lowered, 0);
    assert_eq!(decode[0], "embed_n4_40x64");
    assert_eq!(decode[1..9], expected);
    assert_eq!(decode[9..17], expected);
    let tails: Vec<bool> = lowered.programs[0].launches[1..9].iter().map(|l| l.tail).collect();
    assert_eq!(tails, [true, false, false, true, false, true, false, false]);
    assert!(lowered.programs[1..].iter().all(|p| p.launches.iter().all(|l| !l.tail)));
    assert_eq!(decode[17..], ["gather_rows_64", "rms_norm_64_e3727c5ac_g_i8", "linear_n4_40x64_r1"]);
    assert!(kernels(&lowered, 1)[2].contains("_r16_") && kernels(&lowered, 2)[2].contains("_rn_"));
    assert_eq!(kernels(&lowered, 1)[3..5], expected[2..4]);
    assert_eq!(kernels(&lowered, 2)[3], "attention_4_2x16_s3e800000_kvf16_p32_n256_i8");
    assert_eq!(kernels(&lowered, 2)[4], "linear_n4_64x64_rn_residual");
    assert!(lowered.ports.iter().all(|p| p.inputs.is_empty() && p.outputs.is_empty()));
    assert_eq!(lowered.rope.len(), 1);
}

#[test]
fn prompts_compute_the_last_layer_for_wanted_rows_alone() {
    let lowered = lower(&fused(&formats::N4), &options()).expect("lowers");
    let prefill = &lowered.programs[2];
    let last = prefill.launches.iter().rposition(|l| l.kernel.starts_with("attention")).expect("one");
    // Attention's int8 rows are gathered as they are: 64 codes and their scales and sums in 192 bytes.
    let expected = [
        "gather_rows_48",
        "gather_rows_64",
        "linear_n4_64x64_rn_residual",
        "rms_norm_64_e3727c5ac_g_i8",
        "linear_n4_192x64_rn_swiglu96_i8",
        "linear_n4_64x96_rn_residual",
        "rms_norm_64_e3727c5ac_g_i8",
        "linear_n4_40x64_rn",
    ];
    assert_eq!(kernels(&lowered, 2)[last + 1..], expected);
    let by_row = |l: &Launch| l.args.iter().any(|a| matches!(a, Arg::Count(e) if e.per_row == 1));
    let products = prefill.launches[last..].iter().filter(|l| l.kernel.starts_with("linear"));
    assert!(products.into_iter().all(by_row));
}

#[test]
fn nothing_is_gathered_early_that_others_read_too() {
    let mut graph = fused(&formats::F32);
    let gather = graph.ids().find(|id| matches!(graph.op(*id), OpKind::GatherRows(_))).expect("one");
    let x = graph.inputs_of(gather)[0];
    let outputs = graph.outputs().to_vec();
    graph.set_outputs([outputs, vec![x]].concat());
    let lowered = lower(&graph, &options()).expect("lowers");
    let end = kernels(&lowered, 2).len() - 3;
    assert!(kernels(&lowered, 2)[end..].contains(&"gather_rows_64"), "{:?}", kernels(&lowered, 2));
    assert_eq!(kernels(&lowered, 2).iter().filter(|k| k.starts_with("gather")).count(), 1);
}

#[test]
fn uncompressed_weights_take_f32_activations() {
    let lowered = lower(&fused(&formats::BF16), &options()).expect("lowers");
    assert!(kernels(&lowered, 0).iter().all(|k| !k.contains("i8") && !k.contains("quantize")));
}

#[test]
fn a_tied_table_is_packed_once_and_offsets_are_aligned() {
    let lowered = lower(&fused(&formats::W8), &options()).expect("lowers");
    let tables = lowered.tensors.iter().filter(|t| t.shape == [VOCAB, D]).count();
    assert_eq!(tables, 1);
    let mut end = 0;
    for t in &lowered.tensors {
        assert!(t.offset >= end && t.offset.is_multiple_of(64));
        end = t.offset + t.len;
    }
    assert_eq!(end, lowered.weights_len);
}

#[test]
fn residuals_are_added_in_place() {
    let lowered = lower(&fused(&formats::F32), &options()).expect("lowers");
    for launch in lowered.programs[2].launches.iter().filter(|l| l.kernel.ends_with("_residual")) {
        assert_eq!(launch.args[2], launch.args[3], "{}", launch.note);
    }
}

#[test]
fn activations_of_several_consumers_are_made_once() {
    let lowered = lower(&unfused(&formats::N4), &options()).expect("lowers");
    let kernels = kernels(&lowered, 0);
    let count = |what: &str| kernels.iter().filter(|k| k.starts_with(what)).count();
    assert_eq!(count("rms_norm"), 2, "one for q, k and v; one for gate and up");
    assert_eq!(count("quantize"), 2, "product, gathered rows");
    assert_eq!(count("kv_write"), 1);
}

#[test]
fn an_attention_that_is_read_as_f32_leaves_as_f32() {
    let mut graph = fused(&formats::N4);
    let attention = graph.ids().find(|id| matches!(graph.op(*id), OpKind::Attention(_))).expect("one");
    let again = graph.add1(Silu {}, &[ValueId { node: attention, slot: 0 }]).expect("a valid node");
    let outputs = graph.outputs().to_vec();
    graph.set_outputs([outputs, vec![again]].concat());
    let lowered = lower(&graph, &options()).expect("lowers");
    let ends =
        |end| kernels(&lowered, 2).iter().filter(|k| k.starts_with("attention") && k.ends_with(end)).count();
    assert_eq!((ends("_f32"), ends("_i8")), (1, 1));
}

#[test]
fn a_qkv_whose_keys_are_read_elsewhere_is_decomposed() {
    let mut graph = fused(&formats::F32);
    let qkv = graph.ids().find(|id| matches!(graph.op(*id), OpKind::QkvRope(_))).expect("one");
    let k = ValueId { node: qkv, slot: 1 };
    let again = graph.add1(Silu {}, &[k]).expect("a valid node");
    let outputs = graph.outputs().to_vec();
    graph.set_outputs([outputs, vec![again]].concat());
    let lowered = lower(&graph, &options()).expect("lowers");
    assert_eq!(kernels(&lowered, 0).iter().filter(|k| k.contains("_qkv")).count(), 1);
    assert_eq!(kernels(&lowered, 0).iter().filter(|k| k.starts_with("kv_write")).count(), 1);
    assert_eq!(lowered.ports[0].outputs.len(), 2);
}

#[test]
fn unequal_blocks_of_gate_and_up_are_decomposed() {
    let mut m = Model::new(&formats::F32);
    let x = m.graph.add_input("x", TensorType::f32([Dim::T, D.into()]));
    let w = m.matrix("w", 2 * 20, D);
    let y = m.node(GateUpSwiglu { eps: None, gain: false }, &[x, w]);
    m.graph.set_outputs(vec![y]);
    let lowered = lower(&m.graph, &options()).expect("lowers");
    assert!(kernels(&lowered, 0).contains(&"linear_f32_40x64_r1"));
}

#[test]
fn logits_go_straight_to_the_step() {
    let lowered = lower(&unfused(&formats::F32), &options()).expect("lowers");
    let last = lowered.programs[0].launches.last().expect("launches");
    assert!(last.args.contains(&Arg::Step(StepBuffer::Logits)));
    assert!(last.args.ends_with(&[Arg::Count(Extent::per_row(1)), Arg::PrefetchDistance]));
}

#[test]
fn what_cannot_be_lowered_is_named() {
    let mut m = Model::new(&formats::F32);
    let x = m.graph.add_input("x", TensorType::f32([Dim::T, D.into()]));
    let w = m.graph.add_input("w", TensorType::f32([D.into(), D.into()]));
    let y = m.node(Linear {}, &[x, w]);
    m.graph.set_outputs(vec![y]);
    let error = lower(&m.graph, &options()).expect_err("an activation is no weight").to_string();
    assert!(error.contains("linear") && error.contains("must be a weight"), "{error}");

    let mut m = Model::new(&formats::W8);
    let x = m.graph.add_input("x", TensorType::f32([Dim::T, 40.into()]));
    let w = m.matrix("w", 16, 40);
    let y = m.node(Linear {}, &[x, w]);
    m.graph.set_outputs(vec![y]);
    let error = lower(&m.graph, &options()).expect_err("40 is no multiple of 32").to_string();
    assert!(error.contains("w8") && error.contains("32"), "{error}");
}

/// Values for every weight of a graph; a weight's values depend on its name and shape only.
fn weights(graph: &Graph) -> WeightStore {
    let mut store = WeightStore::new();
    for id in graph.ids() {
        let OpKind::Weight(w) = graph.op(id) else { continue };
        let shape: Vec<usize> = w.ty.shape.iter().filter_map(|d| d.fixed()).collect();
        let mut state = w.name.bytes().fold(17u32, |s, b| s.wrapping_mul(31).wrapping_add(b.into()));
        let values: Vec<f32> = (0..shape.iter().product())
            .map(|_| {
                state = state.wrapping_mul(1664525).wrapping_add(1013904223);
                (state >> 8) as f32 / (1 << 24) as f32 - 0.5
            })
            .map(|v| if shape.len() == 1 { 1.0 + v } else { v * 0.5 })
            .collect();
        match (w.ty.elem, &shape[..]) {
            (Elem::Coded(format), [n, k]) if *format == formats::BF16 => {
                let encoded = Encoded::from_f32(format, *n, *k, &values).expect("encodes");
                store.set_encoded(&w.name, &encoded).expect("spills");
            }
            (Elem::Coded(format), [n, k]) => {
                // One scale for all: enough to try the int8 path.
                let mut encoded = Encoded::zeros(format, *n, *k).expect("fits");
                encoded.field.fill(half::bf16::from_f32(1.0 / 256.0).to_bits());
                let code = |v: &f32| (v * 256.0).round() as i8 as u8;
                encoded.codes = values.iter().map(code).collect();
                store.set_encoded(&w.name, &encoded).expect("spills");
            }
            _ => drop(store.add_values(&w.name, &shape, values)),
        }
    }
    store
}

/// Steps that use every program, several sequences and a page border.
fn steps() -> Vec<Step> {
    let token = |i: i32| (i * 7 + 3) % VOCAB as i32;
    let run = |seq: i32, from: i32, len: i32| Step {
        tokens: (from..from + len).map(token).collect(),
        positions: (from..from + len).collect(),
        seqs: vec![seq; len as usize],
        rows: vec![len - 1],
    };
    let join = |a: Step, b: Step| {
        let shift = a.tokens.len() as i32;
        Step {
            tokens: [a.tokens, b.tokens].concat(),
            positions: [a.positions, b.positions].concat(),
            seqs: [a.seqs, b.seqs].concat(),
            rows: [a.rows, b.rows.iter().map(|r| r + shift).collect()].concat(),
        }
    };
    vec![
        run(0, 0, 1),
        run(0, 1, 5),
        join(run(1, 0, 20), run(0, 6, 3)).all_rows(),
        join(run(0, 9, 1), run(1, 20, 1)),
        run(0, 10, 25),
        run(0, 35, 1),
    ]
}

/// Runs a model through the interpreter and through its lowering, and gives the largest difference of logits.
fn drift(graph: &Graph, kernels: Kernels, kv: KvType) -> f64 {
    let store = weights(graph);
    let room = Room { sequences: 2, context: 64 };
    let options = LowerOptions::new(kv);
    let mut runner = HostRunner::new(graph, &store, &options, kernels, room).expect("is ready");
    let mut cache = KvState::default();
    let mut worst: f64 = 0.0;
    for step in steps() {
        let expected = run_step(graph, &store, Precision::F64, &mut cache, &step).expect("evaluates");
        let got = runner.step(&step).expect("runs");
        assert_eq!(got.len(), 1);
        assert_eq!(got[0].shape, expected[0].shape);
        for (a, b) in got[0].as_real().iter().zip(expected[0].as_real()) {
            assert!(a.is_finite());
            worst = worst.max((a - b).abs());
        }
    }
    worst
}

#[test]
fn lowered_models_compute_what_the_interpreter_computes() {
    let graphs = [fused as fn(FormatRef) -> Graph, unfused];
    for graph in graphs {
        // f32 throughout: only rounding remains. bf16 weights round the weights alike on both sides.
        let exact = drift(&graph(&formats::F32), Kernels::Reference, KvType::F32);
        assert!(exact < 2e-4, "{exact}");
        let bf16 = drift(&graph(&formats::BF16), Kernels::Reference, KvType::F32);
        assert!(bf16 < 2e-4, "{bf16}");
        // Keys and values rounded to f16, and activations to int8 in groups of 32.
        let w8 = drift(&graph(&formats::W8), Kernels::Reference, KvType::F16);
        assert!(w8 < 0.15, "{w8}");
    }
}

#[test]
fn a_cache_of_codes_costs_what_its_codes_do() {
    for graph in [fused as fn(FormatRef) -> Graph, unfused] {
        let graph = graph(&formats::F32);
        let bytes = drift(&graph, Kernels::Reference, KvType::Int8);
        let halves = drift(&graph, Kernels::Reference, KvType::Int4);
        // Random graphs amplify; what counts is that steps are some 15 times as long.
        assert!(bytes < 0.15 && halves < 25.0 * bytes && halves > 3.0 * bytes, "{bytes} {halves}");
    }
}

#[test]
fn every_program_serves_a_step_it_can_hold() {
    let graph = fused(&formats::F32);
    let store = weights(&graph);
    let room = Room { sequences: 2, context: 64 };
    let step = steps().remove(0);
    let logits = |kind| {
        let options = LowerOptions::new(KvType::F32);
        let mut runner =
            HostRunner::new(&graph, &store, &options, Kernels::Reference, room).expect("is ready");
        runner.program = Some(kind);
        runner.step(&step).expect("runs")
    };
    let decode = logits(ProgramKind::Decode);
    assert_eq!(decode, logits(ProgramKind::SmallBatch));
    assert_eq!(decode, logits(ProgramKind::Prefill));
}

/// A random straight-line graph over `[T, 64]` and `[R, 64]` values.
fn random_graph(choices: &[(u8, u16, u16)], format: FormatRef) -> Graph {
    let mut m = Model::new(format);
    let positions = m.graph.add_input("positions", TensorType::i32([Dim::T]));
    let rows = m.graph.add_input("rows", TensorType::i32([Dim::R]));
    let mut values = vec![m.graph.add_input("x", TensorType::f32([Dim::T, D.into()]))];
    for (at, (what, a, b)) in choices.iter().enumerate() {
        let pick = |v: &u16| values[usize::from(*v) % values.len()];
        let a = pick(a);
        let alike: Vec<ValueId> =
            values.iter().copied().filter(|v| m.graph.ty(*v) == m.graph.ty(a)).collect();
        let b = alike[usize::from(*b) % alike.len()];
        let per_token = m.graph.ty(a).shape[0] == Dim::T;
        let w = format!("w{}", at % 5);
        let y = match what % 11 {
            0 => m.node(Add {}, &[a, b]),
            1 => m.node(RmsNorm { eps: 1e-6 }, &[a]),
            2 => {
                let w = m.matrix(&w, D, D);
                m.node(Linear {}, &[a, w])
            }
            3 => {
                let w = m.matrix(&w, D, D);
                m.node(LinearResidual { bias: false }, &[a, w, b])
            }
            4 if per_token => m.node(GatherRows {}, &[a, rows]),
            5 => m.node(Softmax {}, &[a]),
            6 => {
                let w = m.matrix("gate_up", 2 * D, D);
                m.node(GateUpSwiglu { eps: Some(1e-6), gain: false }, &[a, w])
            }
            7 if per_token => {
                let shape = vec![Dim::T, HEADS.into(), DH.into()];
                let h = m.node(Reshape { shape }, &[a]);
                let h = m.node(rope(), &[h, positions]);
                let attention = Attention { layer: at, scale: 0.25, window: None };
                let h = m.node(attention, &[h, h, h, positions]);
                m.node(Reshape { shape: vec![Dim::T, D.into()] }, &[h])
            }
            8 => {
                let w = m.matrix(&w, D, D);
                m.node(NormLinear { eps: 1e-6, gain: false, bias: false }, &[a, w])
            }
            9 => {
                let half = m.node(Slice { start: 0, len: D / 2 }, &[a]);
                let w = m.matrix("widen", D, D / 2);
                m.node(Linear {}, &[half, w])
            }
            _ => m.node(Mul {}, &[a, b]),
        };
        values.push(y);
    }
    let outputs = values.iter().copied().filter(|v| m.graph.users(*v).is_empty()).collect();
    m.graph.set_outputs(outputs);
    m.graph
}

/// Replays a program on memory that remembers who wrote each byte, and checks that every read finds what was meant.
fn replay(sizes: &[Extent], launches: &[VirtualLaunch], inputs: &[BufId], outputs: &[BufId]) {
    let lives = arena::lifetimes(sizes, launches, inputs, outputs);
    let kept: Vec<BufId> = inputs.iter().chain(outputs).copied().collect();
    let plan = arena::place(&lives, &arena::in_place(&lives, launches, &kept));
    for (tokens, rows, spans) in [(1u64, 1u64, 1u64), (2, 1, 4), (3, 3, 2), (16, 2, 7)] {
        let step = StepSize { tokens, rows, spans };
        let mut owner = vec![None; plan.arena.at(step).expect("small") as usize];
        let range = |b: BufId| {
            let start = plan.offsets[b.0].at(step).expect("small") as usize;
            start..start + sizes[b.0].at(step).expect("small") as usize
        };
        for b in inputs {
            owner[range(*b)].fill(Some(*b));
        }
        let check = |owner: &[Option<BufId>], b: BufId, who: &str| {
            assert!(owner[range(b)].iter().all(|o| *o == Some(b)), "{who} finds {b:?} overwritten");
        };
        for launch in launches {
            launch.reads().for_each(|b| check(&owner, b, &launch.spec.name()));
            for b in launch.writes() {
                for r in launch.reads().filter(|r| Some(*r) != launch.may_overwrite) {
                    let apart = range(r).end <= range(b).start || range(b).end <= range(r).start;
                    assert!(apart, "{} writes over its input", launch.spec.name());
                }
                owner[range(b)].fill(Some(b));
            }
        }
        outputs.iter().for_each(|b| check(&owner, *b, "the caller"));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn random_graphs_keep_every_value_until_it_is_read(
        choices in prop::collection::vec((any::<u8>(), any::<u16>(), any::<u16>()), 1..40),
        coded in any::<bool>(),
    ) {
        let graph = random_graph(&choices, if coded { &formats::N4 } else { &formats::F32 });
        let graph = prepare(&graph).expect("prepares");
        let (mut tensors, mut rope) = (TensorTable::default(), Vec::new());
        let walk = walk(&graph, 16, &options(), &mut tensors, &mut rope).expect("lowers");
        let bufs = |ports: &[(super::Port, BufId)]| ports.iter().map(|(_, b)| *b).collect::<Vec<_>>();
        replay(&walk.sizes, &walk.launches, &bufs(&walk.inputs), &bufs(&walk.outputs));
    }
}

#[test]
fn equal_graphs_lower_equally_and_names_are_unique() {
    let (a, b) = (lower(&fused(&formats::N4), &options()), lower(&fused(&formats::N4), &options()));
    let lowered = a.expect("lowers");
    assert_eq!(lowered, b.expect("lowers"));
    let names: BTreeMap<String, usize> =
        lowered.tensors.iter().enumerate().map(|(i, t)| (t.name.clone(), i)).collect();
    assert_eq!(names.len(), lowered.tensors.len());
    assert_eq!(lowered.to_text().lines().filter(|l| l.starts_with("program ")).count(), 3);
}
