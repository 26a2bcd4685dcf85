//! Laws that hold for every valid graph, tried on random ones.

use attar_artifact::manifest::KvType;
use attar_codegen_cpu::Target;
use attar_codegen_cpu::host::Kernels;
use attar_codegen_cpu::lower::LowerOptions;
use attar_format::{FormatRef, formats};
use attar_ir::interp::{self, KvState, Precision};
use attar_ir::{Graph, Tensor, WeightStore, text, verify};
use attar_pass::{Manager, Numerics, PassDecl, Pipeline, Step, registered};
use attar_passes as _;
use attar_tests::random::{self, Inputs, Sequences};
use attar_tests::tolerance::tolerance;
use attar_tests::{compiled, generate};
use proptest::prelude::*;

/// Widths of graphs that only the interpreter runs.
const SMALL: usize = 2;
/// Widths of graphs that kernels run: whole blocks of channels.
const KERNEL: usize = 16;

/// `PROPTEST_CASES=2560` tries ten times as many of everything.
fn config(cases: u32) -> ProptestConfig {
    let standard = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    ProptestConfig { cases: (cases * standard.cases).div_ceil(256), ..standard }
}

fn reads_back(graph: &Graph) -> Result<(), TestCaseError> {
    let printed = text::print(graph);
    let again = text::parse(&printed).map_err(|e| TestCaseError::fail(format!("{e}\n{printed}")))?;
    prop_assert_eq!(again.len(), 1);
    prop_assert!(again[0] == *graph, "read back as another graph:\n{}", printed);
    prop_assert_eq!(text::print(&again[0]), printed);
    Ok(())
}

fn evaluate(graph: &Graph, weights: &WeightStore, precision: Precision, inputs: &Inputs) -> Vec<Tensor> {
    let cache = &mut KvState::default();
    interp::run_seqs(graph, weights, precision, cache, &inputs.tensors, &inputs.seqs)
        .expect("a valid graph runs")
}

fn near(class: &str, a: &[Tensor], b: &[Tensor]) -> Result<(), TestCaseError> {
    let tolerance = tolerance(class).expect("a known class");
    prop_assert_eq!(a.len(), b.len());
    for (a, b) in a.iter().zip(b) {
        prop_assert_eq!(&a.shape, &b.shape);
        tolerance.check(a.as_real(), b.as_real()).map_err(TestCaseError::fail)?;
    }
    Ok(())
}

/// Text form, verifier, decomposition and precision.
fn obeys_the_laws_of_the_ir(graph: &Graph, seed: u64) -> Result<(), TestCaseError> {
    reads_back(graph)?;
    let weights = random::weights(graph, seed).expect("weights");
    prop_assert_eq!(verify(graph, Some(&weights)), Ok(()));
    let mut core = graph.clone();
    for id in graph.ids().collect::<Vec<_>>() {
        core.expand(id).expect("a decomposition obeys the rules");
    }
    prop_assert_eq!(verify(&core, Some(&weights)), Ok(()));
    reads_back(&core)?;
    let inputs = random::inputs(graph, seed, Sequences::Two).expect("inputs");
    let double = evaluate(graph, &weights, Precision::F64, &inputs);
    near("exact", &double, &evaluate(&core, &weights, Precision::F64, &inputs))?;
    near("kernel-f32", &double, &evaluate(graph, &weights, Precision::F32, &inputs))
}

/// Runs one pass and gives its number of rewrites.
fn apply(
    decl: &'static PassDecl,
    graph: &mut Graph,
    weights: &mut WeightStore,
) -> Result<u64, TestCaseError> {
    let step = Step::new(decl).map_err(|e| TestCaseError::fail(e.to_string()))?;
    let pipeline = Pipeline { steps: vec![step] };
    let report = Manager::default().run(&pipeline, graph, weights, &mut |_| {});
    let report = report.map_err(|e| TestCaseError::fail(format!("{}: {e}", decl.name)))?;
    Ok(report.passes.iter().map(|p| p.rewrites).sum())
}

/// Every pass that can run without options: once on the graph as it is, and again where the ones before it have been,
/// in `order`.
fn passes_keep_the_meaning(
    graph: &Graph,
    seed: u64,
    order: &[&'static PassDecl],
) -> Result<(), TestCaseError> {
    let mut weights = random::weights(graph, seed).expect("weights");
    let inputs = random::inputs(graph, seed, Sequences::Two).expect("inputs");
    let mut graph = graph.clone();
    let mut reference = evaluate(&graph, &weights, Precision::F64, &inputs);
    for decl in order {
        apply(decl, &mut graph, &mut weights)?;
        let got = evaluate(&graph, &weights, Precision::F64, &inputs);
        let class = match decl.numerics {
            Numerics::Exact => "exact",
            Numerics::Rounding => "rounding",
            Numerics::Lossy => continue,
        };
        near(class, &reference, &got)
            .map_err(|e| TestCaseError::fail(format!("{}: {e}\n{}", decl.name, text::print(&graph))))?;
        let again = apply(decl, &mut graph, &mut weights)?;
        prop_assert_eq!(again, 0, "{} is not idempotent:\n{}", decl.name, text::print(&graph));
        reads_back(&graph)?;
        reference = got;
    }
    Ok(())
}

/// Passes that need no options and lose nothing: in the order of the default pipeline, then any other.
fn lossless() -> Vec<&'static PassDecl> {
    let rank = |d: &PassDecl| {
        attar_compiler::pipeline::default_passes().iter().position(|n| *n == d.name).unwrap_or(usize::MAX)
    };
    let mut decls: Vec<_> =
        registered().into_iter().filter(|d| d.numerics != Numerics::Lossy && Step::new(d).is_ok()).collect();
    decls.sort_by_key(|d| rank(d));
    decls
}

/// The tolerance of compiled kernels for weights of that format.
fn kernel_class(format: FormatRef) -> &'static str {
    if format.wants_int8_activations() { "kernel-int8-random" } else { "kernel-f32" }
}

fn runs_compiled(graph: &Graph, seed: u64, class: &str) -> Result<(), TestCaseError> {
    let options = LowerOptions::new(KvType::F32);
    let kernels = [Some(Kernels::Reference), Target::native().map(Kernels::Compiled)];
    for kernels in kernels.into_iter().flatten() {
        let result =
            compiled::check(graph, &options, kernels, seed, tolerance(class).expect("a known class"));
        result.map_err(|e| TestCaseError::fail(format!("{kernels:?}: {e:#}\n{}", text::print(graph))))?;
    }
    Ok(())
}

proptest! {
    #![proptest_config(config(256))]

    #[test]
    fn models_obey_the_laws_of_the_ir(model in generate::models(SMALL), seed in 0u64..1000) {
        obeys_the_laws_of_the_ir(&model.graph().expect("valid"), seed)?;
    }

    #[test]
    fn compositions_obey_the_laws_of_the_ir(picks in generate::picks(0..24), seed in 0u64..1000) {
        obeys_the_laws_of_the_ir(&generate::compose(&picks, SMALL).expect("valid"), seed)?;
    }

    #[test]
    fn passes_keep_the_meaning_of_models(model in generate::models(SMALL), seed in 0u64..1000) {
        passes_keep_the_meaning(&model.graph().expect("valid"), seed, &lossless())?;
    }

    #[test]
    fn passes_keep_the_meaning_of_models_in_any_order(
        model in generate::models(SMALL),
        order in Just(lossless()).prop_shuffle(),
        seed in 0u64..1000,
    ) {
        passes_keep_the_meaning(&model.graph().expect("valid"), seed, &order)?;
    }

    #[test]
    fn passes_keep_the_meaning_of_compositions(
        picks in generate::picks(0..24),
        order in Just(lossless()).prop_shuffle(),
        seed in 0u64..1000,
    ) {
        passes_keep_the_meaning(&generate::compose(&picks, SMALL).expect("valid"), seed, &order)?;
    }

    #[test]
    fn any_text_is_read_or_refused(text in "[ -~\\n]{0,200}") {
        let _ = text::parse(&text);
    }

    #[test]
    fn a_damaged_function_is_read_or_refused(
        picks in generate::picks(0..8),
        damage in proptest::collection::vec((any::<u16>(), any::<u8>()), 1..4),
    ) {
        let mut bytes = text::print(&generate::compose(&picks, SMALL).expect("valid")).into_bytes();
        for (at, byte) in damage {
            let Some(at) = usize::from(at).checked_rem(bytes.len()) else { break };
            match byte {
                0..128 => bytes[at] = byte,
                128..192 => drop(bytes.remove(at)),
                _ => bytes.truncate(at + 1),
            }
        }
        for graph in text::parse(&String::from_utf8_lossy(&bytes)).unwrap_or_default() {
            if verify(&graph, None).is_ok() {
                reads_back(&graph)?;
            }
        }
    }
}

proptest! {
    #![proptest_config(config(32))]

    #[test]
    fn compiled_models_give_what_the_interpreter_gives(
        model in generate::models(KERNEL),
        fuse in any::<bool>(),
        seed in 0u64..1000,
    ) {
        let mut graph = model.graph().expect("valid");
        let mut weights = random::weights(&graph, seed).expect("weights");
        if fuse {
            for decl in lossless() {
                apply(decl, &mut graph, &mut weights)?;
            }
        }
        // The weights are drawn anew for the names fusion has made: any values will do.
        runs_compiled(&graph, seed, kernel_class(model.format))?;
    }

    #[test]
    fn compiled_compositions_give_what_the_interpreter_gives(picks in generate::picks(0..12), seed in 0u64..1000) {
        runs_compiled(&generate::compose(&picks, KERNEL).expect("valid"), seed, "kernel-f32")?;
    }
}

#[test]
fn quantizing_every_matrix_stays_within_the_formats_tolerance() {
    for format in formats::ALL.iter().copied().filter(|f| !f.is_uncompressed()) {
        let model = generate::Model {
            layers: 2,
            kv_heads: 2,
            group: 2,
            head_dim: 16,
            dim: 64,
            ffn: 96,
            vocab: 40,
            window: None,
            qk_norm: false,
            bias: true,
            tied: true,
            format: &formats::F32,
        };
        let mut graph = model.graph().expect("valid");
        let mut weights = random::weights(&graph, 1).expect("weights");
        let inputs = random::inputs(&graph, 1, Sequences::Two).expect("inputs");
        let before = evaluate(&graph, &weights, Precision::F64, &inputs);
        let given = [("format".to_owned(), attar_pass::Value::Text(format.name.to_owned()))];
        let decl = registered().into_iter().find(|d| d.name == "quantize-rtn").expect("registered");
        let options = attar_pass::Options::new(decl, &given).expect("options");
        let tensors = attar_pass::TensorGlobs::all().expect("globs");
        let pipeline = Pipeline { steps: vec![Step { decl, options, tensors }] };
        let report =
            Manager::default().run(&pipeline, &mut graph, &mut weights, &mut |_| {}).expect("quantizes");
        assert!(report.passes[0].rewrites >= 14, "{} rewrites", report.passes[0].rewrites);
        let after = evaluate(&graph, &weights, Precision::F64, &inputs);
        near(&format!("lossy-{}", format.name), &before, &after).expect("within the class");
    }
}
