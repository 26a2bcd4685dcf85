//! Passes and a graph small enough to reason about, shared by the tests of this crate.

use attar_ir::ops::{Add, Linear};
use attar_ir::{Dim, Graph, OpKind, TensorType, WeightStore};
use attar_pass::{Numerics, OptionDecl, OptionKind, PassDecl, Phase, Registry, Value};

/// `y = x·w1ᵀ + x·w2ᵀ`.
pub(crate) fn graph() -> (Graph, WeightStore) {
    let mut weights = WeightStore::new();
    let mut g = Graph::new("toy");
    let x = g.add_input("x", TensorType::f32([Dim::T, 4.into()]));
    let mut parts = Vec::new();
    for name in ["layers.0.up_proj.weight", "layers.0.down_proj.weight"] {
        let w = weights.add_values(name, &[4, 4], vec![1.0; 16]);
        let w = g.add_weight(&w, TensorType::f32([4.into(), 4.into()]));
        parts.push(g.add1(Linear {}, &[x, w]).unwrap());
    }
    let y = g.add1(Add {}, &parts).unwrap();
    g.set_outputs(vec![y]);
    (g, weights)
}

/// Counts one rewrite per tensor it may touch, and changes nothing.
pub(crate) static TOUCH: PassDecl = PassDecl {
    name: "touch-weights",
    summary: "counts weights",
    phase: Phase::Compress,
    numerics: Numerics::Exact,
    takes_tensors: true,
    options: &[
        OptionDecl {
            name: "mode",
            kind: OptionKind::Choice { default: None, of: &["gentle", "firm"] },
            doc: "how",
        },
        OptionDecl {
            name: "strength",
            kind: OptionKind::Float { default: 0.5, min: 0.0, max: 1.0 },
            doc: "how much",
        },
        OptionDecl { name: "rounds", kind: OptionKind::Int { default: 1, min: 1, max: 8 }, doc: "how often" },
        OptionDecl { name: "loud", kind: OptionKind::Bool { default: false }, doc: "whether to say so" },
    ],
    file: file!(),
    run: &|options, graph, cx| {
        let [(_, Value::Text(mode)), (_, Value::Float(strength)), ..] = options.values() else {
            panic!("options come in the order they are declared in: {options:?}")
        };
        let subjects = cx.subjects(graph);
        for (i, s) in subjects.iter().enumerate() {
            cx.progress(&s.name, i as u64, subjects.len() as u64);
            if cx.rewrite(&s.name) {
                cx.metric(&s.name, [("strength", (*strength).into()), ("mode", mode.as_str().into())]);
            }
        }
        Ok(())
    },
};

/// Swaps the operands of every add, forever.
pub(crate) static SWAP: PassDecl = PassDecl {
    name: "swap-add",
    summary: "swaps what is added",
    phase: Phase::Fuse,
    numerics: Numerics::Exact,
    takes_tensors: false,
    options: &[],
    file: file!(),
    run: &|_, graph, cx| {
        for id in graph.topo() {
            if !matches!(graph.op(id), OpKind::Add(_)) || !cx.rewrite(&graph.node(id).name) {
                continue;
            }
            let ins = graph.inputs_of(id);
            let new = graph.add1(Add {}, &[ins[1], ins[0]])?;
            graph.replace_uses(attar_ir::ValueId { node: id, slot: 0 }, new)?;
            graph.remove(id)?;
        }
        Ok(())
    },
};

/// Leaves a weight node whose shape the store does not have.
pub(crate) static BREAK: PassDecl = PassDecl {
    name: "break-weight",
    summary: "makes the graph invalid",
    phase: Phase::Fuse,
    numerics: Numerics::Exact,
    takes_tensors: false,
    options: &[],
    file: file!(),
    run: &|_, graph, cx| {
        if cx.rewrite("the first weight") {
            let name = "no.such.weight".into();
            graph.add_weight(&name, TensorType::f32([4.into(), 4.into()]));
        }
        Ok(())
    },
};

pub(crate) fn registry() -> Registry {
    let mut registry = Registry::new().unwrap();
    for decl in [&TOUCH, &SWAP, &BREAK] {
        registry.add(decl).unwrap();
    }
    registry
}
