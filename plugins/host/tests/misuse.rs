//! Plugins that do what they must not get an error that names plugin, pass and call, and leave everything as it was.
//! The plugins are written in C, see `misuse.c`; without a C compiler the tests report themselves as skipped.

use attar_ir::ops::Linear;
use attar_ir::{Dim, Graph, TensorType, WeightStore};
use attar_pass::{ErrorKind, Manager, Pipeline, Recipe, Registry, Surroundings};
use attar_plugin_host::Plugin;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Compiles `misuse.c`; `None` where there is no compiler.
fn compiled(folder: &Path, name: &str, defines: &[&str]) -> Option<PathBuf> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let library = folder.join(format!("lib{name}.so"));
    let mut gcc = Command::new("gcc");
    gcc.args([
        "-std=c11",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-pedantic",
        "-O1",
        "-shared",
        "-fPIC",
        "-pthread",
    ]);
    gcc.args(defines).arg("-I").arg(here.join("../sdk/include"));
    gcc.arg(here.join("tests/misuse.c")).arg("-o").arg(&library);
    match gcc.output() {
        Ok(output) => {
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            Some(library)
        }
        Err(_) => {
            let mut err = std::io::stderr();
            let _ = std::io::Write::write_all(&mut err, b"skipped 1 test: no gcc\n");
            None
        }
    }
}

fn model() -> (Graph, WeightStore) {
    let mut weights = WeightStore::new();
    let mut graph = Graph::new("toy");
    let x = graph.add_input("x", TensorType::f32([Dim::T, 32.into()]));
    let w = weights.add_values("w", &[4, 32], (0..128u8).map(f32::from).collect());
    let w = graph.add_weight(&w, TensorType::f32([4.into(), 32.into()]));
    let y = graph.add1(Linear {}, &[x, w]).expect("a linear");
    graph.set_outputs(vec![y]);
    (graph, weights)
}

/// Runs passes of a plugin, and gives the error of the last one.
fn run(plugin: &Plugin, passes: &[&str]) -> Result<(), attar_pass::Error> {
    run_with(plugin, passes, Surroundings::default())
}

fn run_with(
    plugin: &Plugin,
    passes: &[&str],
    surroundings: Surroundings<'_>,
) -> Result<(), attar_pass::Error> {
    let mut registry = Registry::new().expect("a registry");
    plugin.passes.iter().for_each(|p| registry.replace(p));
    let text: String = passes.iter().map(|p| format!("[[pass]]\nname = \"{p}\"\n\n")).collect();
    let recipe = Recipe::parse(&text, "test", &registry).expect("a recipe");
    let pipeline = Pipeline::new(&[], &recipe, &registry).expect("a pipeline");
    let (mut graph, mut weights) = model();
    let before = (graph.clone(), weights.read_f32("w").expect("values"));
    let result = Manager::default().run_with(&pipeline, &mut graph, &mut weights, surroundings, &mut |_| {});
    if result.is_err() {
        assert_eq!((&graph, weights.read_f32("w").expect("values")), (&before.0, before.1), "{passes:?}");
        assert!(!weights.contains("narrow"), "{passes:?}");
    }
    result.map(|_| ())
}

#[test]
fn misuse_is_named_and_taken_back() {
    let folder = tempfile::tempdir().expect("a folder");
    let Some(library) = compiled(folder.path(), "misuse", &[]) else { return };
    let plugin = Plugin::load(&library, None).expect("it loads");
    let said = |passes: &[&str]| {
        let e = run(&plugin, passes).expect_err("it fails");
        assert!(matches!(*e.kind, ErrorKind::Plugin { .. }), "{passes:?}: {e}");
        assert_eq!(e.family(), attar_pass::Family::Input);
        let (text, pass) = (e.to_string(), passes.last().expect("a pass"));
        assert!(text.starts_with(&format!("{pass}: plugin misuse 1")), "{text}");
        text
    };
    for (pass, expected) in [
        ("garbage-handle", "in node_info: node 0xdeadbeefdeadbeef: no handle of a node"),
        ("garbage-run", "in seed: run"),
        ("null-pointers", "in tensor_info: tensor: 12 elements at 0x0"),
        ("no-room", "in seed: seed: 0x0 is no address to write to"),
        ("no-utf8", "in node_by_name: name: no UTF-8"),
        ("huge-text", "in log: message"),
        ("lying-sizes", "in tensor_set_codes: codes: n4 for tensor w wants 128, got 16"),
        ("wrong-importance", "in tensor_set_format: importance: tensor w has 32 columns, got 3 numbers"),
        ("release-twice", "in release: buffer"),
        ("commit-a-reading", "in tensor_commit: buffer"),
        ("removed-node", "its node has been removed"),
        ("no-outputs", "it left an invalid graph behind: @toy: graph (G6): the function returns nothing"),
        ("wrong-shape", "in add_node: linear: linear (C3)"),
        ("not-finite", "in tensor_commit: tensor w would hold inf"),
        ("fail-with-words", "the moon is not full"),
        ("strange-status", "it failed with status 4711"),
        ("other-thread", "in seed: it was called on another thread"),
        ("replace-by-itself", "in replace_node: the values are the node's own"),
        ("replaced-node", "in node_info: node"),
        ("evaluate-early", "in node_evaluate: it takes what is known when the model runs only"),
        ("stack-under-its-name", "in tensor_stack: the name \"w\" is taken"),
    ] {
        let text = said(&[pass]);
        assert!(text.contains(expected), "{text}\nexpected: {expected}");
    }
    assert!(said(&["keep-handle", "use-kept-handle"]).contains("in node_info: node"));
    assert!(said(&["keep-handle", "use-kept-handle"]).contains("the run it belongs to has ended"));
    assert!(said(&["keep-handle", "use-kept-run"]).contains("the run it belongs to has ended"));
    run(&plugin, &["forgets-buffers"]).expect("what is not released is released for it");
}

#[test]
fn a_pass_that_is_stopped_changes_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let Some(library) = compiled(folder.path(), "misuse", &[]) else { return };
    let plugin = Plugin::load(&library, None).expect("it loads");
    for pass in ["until-cancelled", "deaf-to-cancelling"] {
        let cancel = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(20));
                cancel.store(true, Ordering::Relaxed);
            });
            let surroundings = Surroundings { cancel: Some(&cancel), ..Surroundings::default() };
            let e = run_with(&plugin, &[pass], surroundings).expect_err("it is stopped");
            assert_eq!(
                (&*e.kind, e.family()),
                (&ErrorKind::Cancelled, attar_pass::Family::Cancelled),
                "{pass}: {e}"
            );
        });
    }
}

#[test]
fn versions_are_compared() {
    let folder = tempfile::tempdir().expect("a folder");
    let load = |name: &str, defines: &[&str]| {
        compiled(folder.path(), name, defines).map(|library| Plugin::load(&library, None))
    };
    let Some(older) = load("older", &["-DMAJOR=0", "-DMINOR=7"]) else { return };
    let said = older.expect_err("another major").to_string();
    assert!(said.contains("version 0.7") && said.contains("this is version 1.1"), "{said}");
    let newer = load("newer", &["-DMAJOR=2"]).expect("gcc").expect_err("another major").to_string();
    assert!(newer.contains("version 2.1"), "{newer}");
    let minor = load("minor", &["-DMINOR=99", "-DEXTRA=8"]).expect("gcc").expect("a newer minor works");
    assert_eq!(minor.abi, (1, 99));
    run(&minor, &["forgets-buffers"]).expect("it runs");
    let first = load("first", &["-DMINOR=0"]).expect("gcc").expect("an older minor works");
    run(&first, &["forgets-buffers"]).expect("it runs");
    let nothing = load("nothing", &["-DNOTHING"]).expect("gcc").expect_err("no description").to_string();
    assert!(nothing.contains("describes no passes"), "{nothing}");
}

#[test]
fn what_is_no_plugin_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let missing = Plugin::load(&folder.path().join("none.so"), None).expect_err("no file").to_string();
    assert!(missing.contains("none.so") && missing.contains("cannot be read"), "{missing}");
    let text = folder.path().join("text.so");
    std::fs::write(&text, "no library").expect("a file");
    let said = Plugin::load(&text, None).expect_err("no library").to_string();
    assert!(said.contains("cannot be loaded"), "{said}");
    let Some(library) = compiled(folder.path(), "pinned", &[]) else { return };
    let hash = Plugin::hash(&library).expect("a hash");
    let other = "0".repeat(64);
    let said =
        Plugin::load(&library, Some(std::slice::from_ref(&other))).expect_err("not allowed").to_string();
    assert!(said.contains(&hash) && said.contains("--allow-plugins"), "{said}");
    Plugin::load(&library, Some(&[other, hash.to_uppercase()])).expect("allowed");
}
