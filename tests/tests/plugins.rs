//! A plugin's crate, linked into a program, is built in: its passes and formats are there without a library being loaded.

use attar_example_format_nf4 as _;
use attar_example_prune_nm as _;
use attar_ir::Elem;
use attar_pass::{Manager, Pipeline, Recipe, Registry};
use std::path::Path;

#[test]
fn linked_plugins_are_built_in() {
    let registry = Registry::new().expect("a registry");
    let decl = registry.find("prune-nm").expect("the pass is linked");
    assert!(
        decl.takes_tensors && decl.file.ends_with("plugins/examples/prune-nm/src/lib.rs"),
        "{}",
        decl.file
    );
    let text = "[[pass]]\nname = \"prune-nm\"\nn = 1\n\n[[pass]]\nname = \"quantize-nf4\"\ntensors = [\"*.mlp.*\"]\n";
    let recipe = Recipe::parse(text, "test", &registry).expect("a recipe");
    let pipeline = Pipeline::new(&[], &recipe, &registry).expect("a pipeline");
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("data/tiny/llama2");
    let mut model = attar_import::open(&folder).expect("a model");
    let report = Manager::default().run(&pipeline, &mut model.graph, &mut model.weights, &mut |_| {});
    let report = report.expect("the passes run");
    assert!(report.passes.iter().all(|p| p.rewrites > 0), "{:?}", report.passes);
    let gate = "model.layers.0.mlp.gate_proj.weight";
    assert!(matches!(model.weights.info(gate).expect("a weight").elem, Elem::Coded(f) if f.name == "nf4"));
    let q = model.weights.read_f32("model.layers.0.self_attn.q_proj.weight").expect("values");
    assert!(q.chunks_exact(4).all(|group| group.iter().filter(|w| **w != 0.0).count() <= 1));
}
