//! `fold-constants`: computes at compile time what depends on weights alone, and drops ops that change nothing.
//!
//! Before: `%s = add %w1, %w2` of two weights.   After: `%s = weight @…` holding the sum.
//! Also: a reshape or slice to the type it already has disappears; of two reshapes in a row the last is enough.
//! Preconditions: inputs are uncompressed weights; the result has at most `max_elements` elements, or no more than
//! the weights it makes superfluous, so an artifact never grows by much.
//! Numerics: rounding (values are computed in f64 and rounded once).   Cost: that of the folded ops.
//! Reference: Wegman and Zadeck 1991, "Constant propagation with conditional branches", without the branches.

use crate::pattern::{fresh_name, only_user, out, replace, weight_name};
use attar_ir::interp::{EvalCx, KvState, Sizes};
use attar_ir::ops::Reshape;
use attar_ir::{Elem, Graph, NodeId, Op, OpKind, Tensor, TensorType, ValueId, WeightStore};
use attar_pass::{
    Changed, Numerics, OptionDecl, OptionKind, Options, Pass, PassCx, PassDecl, Phase, Registered, Result,
};

struct FoldConstants {
    max_elements: usize,
}

static DECL: PassDecl = PassDecl {
    name: "fold-constants",
    summary: "computes at compile time what depends on weights alone",
    phase: Phase::Canonicalize,
    numerics: Numerics::Rounding,
    takes_tensors: false,
    options: &[OptionDecl {
        name: "max_elements",
        kind: OptionKind::Int { default: 65536, min: 0, max: 1 << 31 },
        doc: "largest result that may be added to the weights it is computed from",
    }],
    file: file!(),
    make: &|o: &Options| {
        // The range check of the option makes the conversion lossless.
        Ok(Box::new(FoldConstants { max_elements: o.int("max_elements")? as usize }))
    },
};

attar_pass::inventory::submit!(Registered(&DECL));

impl Pass for FoldConstants {
    fn decl(&self) -> &'static PassDecl {
        &DECL
    }

    fn run(&self, graph: &mut Graph, cx: &mut PassCx<'_>) -> Result<Changed> {
        for id in graph.topo() {
            if !graph.contains(id) {
                continue;
            }
            if let Some(same) = unchanged(graph, id) {
                if cx.rewrite(&graph.node(id).name) {
                    replace(graph, id, &[same])?;
                }
            } else if let Some((x, shape)) = reshape_of_reshape(graph, id) {
                if cx.rewrite(&graph.node(id).name) {
                    let is_back = graph.ty(x) == graph.ty(out(id));
                    let y = if is_back { x } else { graph.add1(shape, &[x])? };
                    replace(graph, id, &[y])?;
                }
            } else if self.folds(graph, id) && cx.rewrite(&graph.node(id).name) {
                fold(graph, cx.weights, id)?;
            }
        }
        Ok(cx.changed())
    }
}

/// The input of a reshape or slice that changes nothing.
fn unchanged(graph: &Graph, id: NodeId) -> Option<ValueId> {
    let (OpKind::Reshape(_) | OpKind::Slice(_)) = graph.op(id) else { return None };
    let x = *graph.inputs_of(id).first()?;
    (graph.ty(x) == graph.ty(out(id))).then_some(x)
}

fn reshape_of_reshape(graph: &Graph, id: NodeId) -> Option<(ValueId, Reshape)> {
    let OpKind::Reshape(last) = graph.op(id) else { return None };
    let between = *graph.inputs_of(id).first()?;
    let OpKind::Reshape(_) = graph.op(between.node) else { return None };
    let x = *graph.inputs_of(between.node).first()?;
    Some((x, last.clone()))
}

fn elements(ty: &TensorType) -> Option<usize> {
    ty.shape.iter().try_fold(1usize, |n, d| n.checked_mul(d.fixed()?))
}

impl FoldConstants {
    fn folds(&self, graph: &Graph, id: NodeId) -> bool {
        let foldable = matches!(
            graph.op(id),
            OpKind::Linear(_)
                | OpKind::RmsNorm(_)
                | OpKind::LayerNorm(_)
                | OpKind::Add(_)
                | OpKind::Mul(_)
                | OpKind::Silu(_)
                | OpKind::Gelu(_)
                | OpKind::Softmax(_)
                | OpKind::Reshape(_)
                | OpKind::Slice(_)
        );
        let inputs = graph.inputs_of(id);
        let plain = |v: &ValueId| weight_name(graph, *v).is_some() && graph.ty(*v).elem == Elem::F32;
        if !foldable || !inputs.iter().all(plain) {
            return false;
        }
        let freed: usize = inputs
            .iter()
            .filter(|v| only_user(graph, **v).is_some())
            .filter_map(|v| elements(graph.ty(*v)))
            .fold(0, usize::saturating_add);
        elements(graph.ty(out(id))).is_some_and(|n| n <= self.max_elements.max(freed))
    }
}

fn fold(graph: &mut Graph, weights: &mut WeightStore, id: NodeId) -> Result<()> {
    let mut tensors = Vec::new();
    let mut stem = String::new();
    for v in graph.inputs_of(id) {
        let name = weight_name(graph, v).unwrap_or_default();
        if stem.is_empty() {
            stem = format!("{name}.{}", graph.op(id).name());
        }
        let shape: Vec<usize> = graph.ty(v).shape.iter().filter_map(|d| d.fixed()).collect();
        let values = weights.read_f32(name)?;
        tensors.push(Tensor::real(shape, values.into_iter().map(f64::from).collect()));
    }
    let mut cache = KvState::default();
    let mut cx = EvalCx { weights, cache: &mut cache, seqs: &[], sizes: Sizes::default() };
    let results = graph.op(id).eval(&mut cx, &tensors)?;
    let mut folded = Vec::with_capacity(results.len());
    for (slot, result) in results.iter().enumerate() {
        let old = ValueId { node: id, slot: slot as u16 };
        let values = result.as_real().iter().map(|v| *v as f32).collect();
        let name = fresh_name(weights, &stem);
        let name = weights.add_values(&name, &result.shape, values);
        let ty = graph.ty(old).clone();
        let new = graph.add_weight(&name, ty);
        folded.push(new);
    }
    Ok(replace(graph, id, &folded)?)
}
