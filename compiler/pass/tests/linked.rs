//! Passes written against `attar-plugin` and linked into the program: whose fault their failures are, and what is taken back.

use attar_ir::ops::Linear;
use attar_ir::{Dim, Graph, TensorType, WeightStore};
use attar_pass::plugin::in_compiler;
use attar_pass::{Error, ErrorKind, Family, Manager, Pipeline, Recipe, Registry};
use attar_plugin::{About, Context, NoOptions, Numerics, Pass, Phase, Result};

macro_rules! passes {
    ($($name:ident $text:literal |$cx:ident| $body:block)*) => {
        $(
            struct $name;

            impl Pass for $name {
                type Options = NoOptions;

                const ABOUT: About = About {
                    name: $text,
                    summary: "is tried by a test",
                    phase: Phase::Compress,
                    numerics: Numerics::Lossy,
                    takes_tensors: false,
                };

                fn run(_: &NoOptions, $cx: &Context<'_>) -> Result<()> $body
            }
        )*

        attar_plugin::plugin! { passes: [$($name),*] }
    };
}

passes! {
    Panics "panics" |cx| {
        halve(cx)?;
        panic!("at the disco")
    }
    UsesWhatIsGone "uses-what-is-gone" |cx| {
        halve(cx)?;
        let node = cx.nodes_of("linear")?[0];
        // Handles mean nothing after work within the compiler.
        in_compiler(cx, |graph, _| {
            assert_eq!(graph.len(), 3);
            Ok(())
        })?;
        cx.node(node).map(|_| ())
    }
    FailsWithin "fails-within" |cx| {
        halve(cx)?;
        in_compiler(cx, |_, _| Err(Error::new(ErrorKind::Budget { problem: "too dear".to_owned() })))
    }
    RecoversWithin "recovers-within" |cx| {
        let failed: Result<()> =
            in_compiler(cx, |_, _| Err(Error::new(ErrorKind::Budget { problem: "too dear".to_owned() })));
        assert!(failed.is_err());
        halve(cx)
    }
    BreaksTheGraph "breaks-the-graph" |cx| {
        halve(cx)?;
        cx.set_outputs(&[])
    }
    AddsWhatCannotBe "adds-what-cannot-be" |cx| {
        halve(cx)?;
        let x = cx.inputs()?[0];
        cx.add("linear", &[x], &[]).map(|_| ())
    }
    ReadsByRows "reads-by-rows" |cx| {
        let (all, row, rest) = (cx.read("w")?, cx.read_rows("w", 1, 1)?, cx.read_rows("w", 2, 99)?);
        assert_eq!((all.len(), row.len(), rest.len()), (128, 32, 64));
        // Nothing is copied: the views lie in one place.
        assert_eq!((all[32..64].as_ptr(), all[64..].as_ptr()), (row.as_ptr(), rest.as_ptr()));
        let before = all[0];
        halve(cx)?;
        // A view stays what it was, and the next one is of the new values.
        assert_eq!((all[0], cx.read_rows("w", 0, 1)?[0]), (before, before * 0.5));
        assert_eq!(cx.read_rows("w", 4, 1)?.len(), 0);
        Ok(())
    }
    Rewires "rewires" |cx| {
        // Twice the same rows, and a part of them; what is computed of weights alone becomes one.
        assert!(cx.stack("twice", &["w", "w"])? && cx.rewrite("w")?);
        assert_eq!((cx.tensor("twice")?.shape, cx.fresh_name("w")), (vec![8, 32], "w.2".to_owned()));
        let node = cx.nodes_of("linear")?[0];
        let x = cx.inputs_of(node)?[0];
        let twice = cx.add_weight("twice")?;
        let wide = cx.add("silu", &[twice], &[])?;
        cx.evaluate(cx.node_of(wide)?, "activated")?;
        let y = cx.add("linear", &[x, cx.add_weight("activated")?], &[])?;
        let part = cx.add("slice", &[y], &[("start", 4.into()), ("len", 4.into())])?;
        cx.replace(node, &[part])?;
        cx.remove_unused(cx.node_of(wide)?)?;
        // The node that was replaced has given its name to the one without.
        assert_eq!(cx.node(cx.node_of(part)?)?.name, "y");
        assert_eq!((cx.only_use(y)?, cx.op_of(part)?), (Some((cx.node_of(part)?, 0)), "slice".to_owned()));
        cx.refused("w", "that was all")
    }
}

/// Halves the tensor `w`.
fn halve(cx: &Context<'_>) -> Result<()> {
    let mut values = cx.edit("w")?;
    values.iter_mut().for_each(|v| *v *= 0.5);
    if cx.rewrite("w")? { values.commit() } else { Ok(()) }
}

/// What a pass makes of `y = x wᵀ`: the graph, the weights, and how it ended.
fn run(pass: &str) -> (Graph, WeightStore, attar_pass::Result<attar_pass::Report>) {
    let mut weights = WeightStore::new();
    let mut graph = Graph::new("toy");
    let x = graph.add_input("x", TensorType::f32([Dim::T, 32.into()]));
    let w = weights.add_values("w", &[4, 32], (1..=128u8).map(f32::from).collect());
    let w = graph.add_weight(&w, TensorType::f32([4.into(), 32.into()]));
    let y = graph.add_named(Linear {}, &[x, w], Some("y")).expect("a linear");
    graph.set_outputs(vec![attar_ir::ValueId { node: y, slot: 0 }]);
    let registry = Registry::new().expect("a registry");
    let recipe =
        Recipe::parse(&format!("[[pass]]\nname = \"{pass}\"\n"), "test", &registry).expect("a recipe");
    let pipeline = Pipeline::new(&[], &recipe, &registry).expect("a pipeline");
    let result = Manager::default().run(&pipeline, &mut graph, &mut weights, &mut |_| {});
    (graph, weights, result)
}

#[test]
fn a_linked_pass_that_fails_changes_nothing_and_says_whose_fault_it_is() {
    for (pass, family, expected) in [
        ("panics", Family::Bug, "panics: plugin attar-pass 0.1.0: it panicked: at the disco"),
        ("uses-what-is-gone", Family::Bug, "in node_info: node"),
        ("fails-within", Family::Input, "fails-within: too dear"),
        ("breaks-the-graph", Family::Bug, "bug in breaks-the-graph: after its last rewrite (w)"),
        ("adds-what-cannot-be", Family::Bug, "in add_node: linear"),
    ] {
        let (graph, weights, result) = run(pass);
        let e = result.expect_err("it fails");
        assert_eq!(e.family(), family, "{e}");
        assert!(e.to_string().contains(expected), "{e}");
        assert_eq!((graph.len(), graph.outputs().len()), (3, 1), "{pass}");
        assert_eq!(weights.read_f32("w").expect("values")[1], 2.0, "{pass}");
    }
}

#[test]
fn a_failure_within_the_compiler_can_be_survived() {
    let (_, weights, result) = run("recovers-within");
    assert_eq!(result.expect("it runs").passes[0].rewrites, 1);
    assert_eq!(weights.read_f32("w").expect("values")[1], 1.0);
}

#[test]
fn tensors_are_read_where_they_are() {
    run("reads-by-rows").2.expect("it runs");
}

#[test]
fn graphs_are_rewired() {
    let (graph, weights, result) = run("rewires");
    let report = result.expect("it runs");
    assert_eq!(
        attar_ir::text::print(&graph).lines().map(str::trim).collect::<Vec<_>>()[1..4],
        [
            "%3 = weight @activated : f32[8,32]",
            "%4 = linear %x, %3 : f32[T,8]",
            "%y = slice %4 {start = 4, len = 4} : f32[T,4]",
        ],
        "{}",
        attar_ir::text::print(&graph)
    );
    let silu = |v: f64| (v / (1.0 + (-v).exp())) as f32;
    let activated = weights.read_f32("activated").expect("values");
    assert_eq!((activated.len(), activated[0], activated[129]), (256, silu(1.0), silu(2.0)));
    assert!(report.metrics.iter().all(|m| !m.certified), "{:?}", report.metrics);
    assert_eq!(report.metrics.len(), 1);
}
