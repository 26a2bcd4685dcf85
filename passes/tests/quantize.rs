//! `quantize-rtn`: error against plain rounding, determinism, extreme and damaged weights, what is left alone.

use attar_format::{Encoded, FormatRef, formats};
use attar_ir::ops::{Embed, Linear, RmsNorm};
use attar_ir::{Dim, Elem, Graph, TensorType, WeightStore};
use attar_pass::{
    Error, ErrorKind, Family, Manager, MetricValue, Pipeline, Preset, Recipe, Registry, Report,
};
use attar_passes as _;
use attar_passes::quantize::scale_search::{TableSearch, encode_w8_group};
use proptest::prelude::*;

/// Uniform numbers from a 64-bit state.
fn noise(state: &mut u64) -> f64 {
    *state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
    (*state >> 11) as f64 / (1u64 << 53) as f64
}

/// Roughly normal numbers.
fn normal(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..count).map(|_| (0..12).map(|_| noise(&mut state)).sum::<f64>() as f32 - 6.0).collect()
}

/// `head(norm(embed(tokens)))` with the embedding tied to the head, `k` wide.
fn model(k: usize, layer: Vec<f32>) -> (Graph, WeightStore) {
    let mut weights = WeightStore::new();
    let embedding = weights.add_values("model.embed_tokens.weight", &[40, k], normal(40 * k, 3));
    let gain = weights.add_values("model.layers.0.input_layernorm.weight", &[k], vec![1.0; k]);
    let w = weights.add_values("model.layers.0.mlp.up_proj.weight", &[k, k], layer);
    let mut g = Graph::new("step");
    let tokens = g.add_input("tokens", TensorType::i32([Dim::T]));
    let table = TensorType::f32([40.into(), k.into()]);
    let (in_table, out_table) = (g.add_weight(&embedding, table.clone()), g.add_weight(&embedding, table));
    let gain = g.add_weight(&gain, TensorType::f32([k.into()]));
    let w = g.add_weight(&w, TensorType::f32([k.into(), k.into()]));
    let x = g.add1(Embed {}, &[tokens, in_table]).unwrap();
    let n = g.add1(RmsNorm { eps: 1e-5 }, &[x, gain]).unwrap();
    let y = g.add1(Linear {}, &[n, w]).unwrap();
    let logits = g.add1(Linear {}, &[y, out_table]).unwrap();
    g.set_outputs(vec![logits]);
    (g, weights)
}

fn quantize(recipe: &str, graph: &mut Graph, weights: &mut WeightStore) -> Result<Report, Error> {
    let registry = Registry::new()?;
    let recipe = Recipe::parse(recipe, "test", &registry)?;
    recipe.check_tensors(graph)?;
    let pipeline = Pipeline::new(&[], &recipe, &registry)?;
    Manager::default().run(&pipeline, graph, weights, &mut |_| {})
}

fn step(keys: &str) -> String {
    format!("[[pass]]\nname = \"quantize-rtn\"\n{keys}\n")
}

fn square_error(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum()
}

/// A row in a table format, decoded.
fn coded_with(format: FormatRef, row: &[f32], search: &TableSearch) -> Vec<f32> {
    let mut e = Encoded::zeros(format, 1, row.len()).unwrap();
    e.row_scale[0] = search.encode_row(row, &mut e.codes, &mut e.field);
    e.decode()
}

fn coded(format: FormatRef, row: &[f32]) -> Vec<f32> {
    coded_with(format, row, &TableSearch::for_format(format).unwrap())
}

fn coded_plain(format: FormatRef, row: &[f32]) -> Vec<f32> {
    coded_with(format, row, &TableSearch::for_format(format).unwrap().plain())
}

fn n4(row: &[f32]) -> Vec<f32> {
    coded(&formats::N4, row)
}

fn n4_plain(row: &[f32]) -> Vec<f32> {
    coded_plain(&formats::N4, row)
}

/// Formats with tables, the largest first.
const TABLES: [FormatRef; 5] = [&formats::N6, &formats::N5, &formats::N4, &formats::N3, &formats::N2];

fn w8(row: &[f32]) -> Vec<f32> {
    let mut e = Encoded::zeros(&formats::W8, 1, row.len()).unwrap();
    for (g, w) in row.chunks(32).enumerate() {
        e.field[g] = encode_w8_group(w, &mut e.codes[g * 32..][..32]).unwrap();
    }
    e.decode()
}

fn rows() -> impl Strategy<Value = Vec<f32>> {
    let value = prop_oneof![4 => -1.0f32..1.0, 1 => -30.0f32..30.0, 1 => Just(0.0f32), 1 => -1e-3f32..1e-3];
    (1usize..6, -12i32..12).prop_flat_map(move |(groups, exponent)| {
        let scale = 10f32.powi(exponent);
        prop::collection::vec(value.clone().prop_map(move |v| v * scale), groups * 32)
    })
}

proptest! {
    #[test]
    fn searching_is_never_worse_than_plain_rounding(row in rows()) {
        let square: f64 = row.iter().map(|w| f64::from(*w).powi(2)).sum();
        for format in TABLES {
            let plain = square_error(&row, &coded_plain(format, &row));
            let searched = square_error(&row, &coded(format, &row));
            prop_assert!(searched <= plain + 1e-6 * square, "{}: {searched} > {plain}", format.name);
        }
    }

    #[test]
    fn w8_error_is_bounded_by_half_a_step(row in rows()) {
        for (w, d) in row.chunks(32).zip(w8(&row).chunks(32)) {
            // The scale as bf16 is off by 1/256 at most: half a step, or what that clips from the largest weight.
            let step = w.iter().fold(0.0f32, |m, w| m.max(w.abs())) / 127.0 * (1.0 + 1.0 / 256.0);
            for (w, d) in w.iter().zip(d) {
                prop_assert!((w - d).abs() <= 0.5 * step * 1.001 + 1e-30, "{w} became {d}");
            }
        }
    }

    #[test]
    fn n4_error_is_bounded_by_the_widest_gap(row in rows()) {
        // Without a search, every group's scale is within half a unit of the one that clips nothing.
        let decoded = n4_plain(&row);
        let largest = row.iter().fold(0.0f32, |m, w| m.max(w.abs()));
        for (w, d) in row.iter().zip(&decoded) {
            prop_assert!((w - d).abs() <= 0.2 * largest, "{w} became {d} beside {largest}");
        }
    }
}

#[test]
fn the_search_pays_on_normal_weights() {
    let row = normal(32 * 64, 7);
    let square: f64 = row.iter().map(|w| f64::from(*w).powi(2)).sum();
    let relative = |d: Vec<f32>| (square_error(&row, &d) / square).sqrt();
    let (plain, searched) = (relative(n4_plain(&row)), relative(n4(&row)));
    assert!(searched < 0.0705 && searched < 0.97 * plain, "{searched} against {plain}");
    assert!(relative(w8(&row)) < 0.0056);
    for (format, most) in TABLES.into_iter().zip([0.0187, 0.036, 0.0705, 0.1435, 0.30]) {
        let (plain, searched) = (relative(coded_plain(format, &row)), relative(coded(format, &row)));
        assert!(searched < most && searched < 0.97 * plain, "{}: {searched} against {plain}", format.name);
    }
}

#[test]
fn values_on_the_grid_come_back() {
    let grid: Vec<f32> =
        (0..64).map(|i| f32::from(formats::N4.table().unwrap().entries[i % 16]) * 0.25).collect();
    assert!(square_error(&grid, &n4(&grid)) < 1e-6);
    let grid: Vec<f32> = (0..64).map(|i| ((i % 32) as f32 * 8.0 - 127.0) * 0.5).collect();
    assert_eq!(w8(&grid), grid);
}

#[test]
fn huge_tiny_and_zero_rows_survive() {
    let base = normal(64, 11);
    let largest = base.iter().fold(0.0f32, |m, w| m.max(w.abs()));
    for scale in [1e-20f32, 1e-28, 1e20, 1e37] {
        let row: Vec<f32> = base.iter().map(|w| w / largest * scale).collect();
        for decoded in [n4(&row), w8(&row)] {
            let worst = row.iter().zip(&decoded).map(|(w, d)| ((w - d) / scale).abs()).fold(0.0, f32::max);
            assert!(worst < 0.15, "{worst} at {scale}");
        }
    }
    for row in [vec![0.0; 64], vec![1e-40; 64], vec![-0.0; 64]] {
        for decoded in [n4(&row), w8(&row), n4_plain(&row)] {
            assert!(decoded.iter().all(|d| *d == 0.0));
        }
    }
    // One group of nothing beside one of something.
    let mut row = vec![0.0; 64];
    row[..32].copy_from_slice(&base[..32]);
    assert!(n4(&row)[32..].iter().chain(&w8(&row)[32..]).all(|d| *d == 0.0));
}

#[test]
fn results_do_not_depend_on_threads() {
    for format in ["n4", "w8", "bf16"] {
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let (mut g, mut weights) = model(96, normal(96 * 96, 5));
                let report =
                    quantize(&step(&format!("format = \"{format}\"")), &mut g, &mut weights).unwrap();
                let name = "model.layers.0.mlp.up_proj.weight";
                (weights.read_encoded(name).unwrap(), report.metrics)
            })
        };
        let one = run(1);
        for threads in [2, 3, 7] {
            assert_eq!(run(threads), one, "{format} with {threads} threads");
        }
    }
}

#[test]
fn all_uses_of_a_tensor_change_and_vectors_stay() {
    let (mut g, mut weights) = model(64, normal(64 * 64, 1));
    let report = quantize(&Preset::N4.recipe(), &mut g, &mut weights).unwrap();
    let elems: Vec<(String, Elem)> = attar_pass::graph_weights(&g)
        .iter()
        .flat_map(|s| s.nodes.iter().map(|n| (s.name.to_string(), *n)))
        .map(|(name, node)| (name, g.ty(attar_ir::ValueId { node, slot: 0 }).elem))
        .collect();
    let of = |name: &str| elems.iter().filter(|(n, _)| n == name).map(|(_, e)| *e).collect::<Vec<_>>();
    assert_eq!(of("model.embed_tokens.weight"), [Elem::Coded(&formats::W8); 2]);
    assert_eq!(of("model.layers.0.mlp.up_proj.weight"), [Elem::Coded(&formats::N4)]);
    assert_eq!(of("model.layers.0.input_layernorm.weight"), [Elem::F32]);
    let metric = report.metrics.iter().find(|m| m.subject == "model.layers.0.mlp.up_proj.weight").unwrap();
    assert_eq!(metric.values["format"], MetricValue::from("n4"));
    let MetricValue::Number(error) = metric.values["relative_rmse"] else { panic!("{metric:?}") };
    assert!((0.05..0.09).contains(&error), "{error}");
    assert_eq!(metric.values["bytes"], MetricValue::Count(64 + 4 * (64 + 64 + 64 * 32 / 4)));

    // Again: nothing is left to do, and nothing is quantized twice.
    let again = quantize(&Preset::N4.recipe(), &mut g, &mut weights).unwrap();
    assert!(again.passes.iter().all(|p| p.rewrites == 0));
}

#[test]
fn f32_leaves_everything_as_it_is() {
    let (mut g, mut weights) = model(64, normal(64 * 64, 1));
    let report = quantize(&Preset::F32.recipe(), &mut g, &mut weights).unwrap();
    assert_eq!(report.passes[0].rewrites, 0);
    assert!(attar_pass::graph_weights(&g).iter().all(|s| weights.info(&s.name).unwrap().elem == Elem::F32));
}

#[test]
fn odd_widths_fall_back_to_bf16_unless_named() {
    let (mut g, mut weights) = model(48, normal(48 * 48, 1));
    let report = quantize(&step("format = \"n4\""), &mut g, &mut weights).unwrap();
    let name = "model.layers.0.mlp.up_proj.weight";
    let mut said = report.metrics.iter().filter(|m| m.subject == name);
    assert_eq!(said.next().unwrap().values["format"], MetricValue::from("bf16"));
    let MetricValue::Text(reason) = &said.next().unwrap().values["refused"] else { panic!() };
    assert!(reason.contains("48"), "{reason}");
    assert_eq!(weights.read_encoded(name).unwrap().format, &formats::BF16);

    let (mut g, mut weights) = model(48, normal(48 * 48, 1));
    let named = step(&format!("format = \"w8\"\ntensors = [\"{name}\"]"));
    let e = quantize(&named, &mut g, &mut weights).unwrap_err();
    assert_eq!((e.family(), e.at.tensor.as_deref()), (Family::Input, Some(name)), "{e}");

    let named = step("format = \"w8\"\ntensors = [\"model.layers.0.input_layernorm.weight\"]");
    let e = quantize(&named, &mut g, &mut weights).unwrap_err();
    assert!(e.to_string().contains("only matrices"), "{e}");
}

#[test]
fn damaged_weights_are_an_error_that_names_the_place() {
    for (bad, format) in [(f32::NAN, "n4"), (f32::INFINITY, "w8"), (f32::NEG_INFINITY, "bf16")] {
        let mut layer = normal(64 * 64, 1);
        layer[64 * 3 + 5] = bad;
        let (mut g, mut weights) = model(64, layer);
        let e = quantize(&step(&format!("format = \"{format}\"")), &mut g, &mut weights).unwrap_err();
        assert!(matches!(*e.kind, ErrorKind::NotFinite { row: 3, column: 5, .. }), "{e}");
        assert_eq!(e.family(), Family::Input);
        assert!(
            e.to_string().starts_with("quantize-rtn: tensor model.layers.0.mlp.up_proj.weight: holds"),
            "{e}"
        );
    }
}

#[test]
fn weights_beyond_a_format_are_an_error() {
    let with_max = |format: &str| {
        let mut layer = normal(64 * 64, 1);
        layer[64 * 2] = f32::MAX;
        let (mut g, mut weights) = model(64, layer);
        quantize(&step(&format!("format = \"{format}\"")), &mut g, &mut weights)
    };
    let e = with_max("bf16").unwrap_err();
    assert!(matches!(*e.kind, ErrorKind::OutOfRange { row: 2, .. }), "{e}");
    // Here the scale rounds down, and what it clips still fits.
    with_max("w8").unwrap();
}
