//! `rotate-hadamard`: rotates the residual stream, and the values of attention heads, by Hadamard transforms within weights.
//!
//! Before: `%x = embed %t, %e`, `%n = rms_norm %x, %g`, `%y = linear %n, %w`, `%z = add %x, %o` and so on.
//! After: the same, `%e` being `e Rᵀ`, `%w` being `w diag(g) Rᵀ`, what writes to the stream being `R w`, and norms without gain:
//! an RMS norm commutes with `R` once its gain is part of what follows. `R` is a Hadamard transform of each `n`
//! neighbouring channels, `n` the largest power of two that divides the width, after random changes of sign. Within heads
//! (`heads`) rows of `v` and columns of `o` are rotated likewise.
//! Preconditions: only embeddings, linears, additions, RMS norms and selections of rows touch the stream, and only linears read
//! the norms; weights are uncompressed. Otherwise nothing is done, and the metrics say why. Where one weight would have to become
//! two, as a tied embedding does unless the last norm has no gain, `untie` has to allow it.
//! Numerics: rounding (weights are rounded to f32 again).   Cost: reading a rotated weight costs a transform.
//! Reference: Ashkboos et al. 2024, QuaRot, arXiv:2404.00456 (R1 and R2 in Liu et al. 2024, SpinQuant, arXiv:2405.16406).

use super::head_values::{HeadValues, values_at};
use crate::pattern::{fresh_name, out, weight_name};
use attar_ir::ops::RmsNorm;
use attar_ir::{Elem, Graph, NodeId, OpKind, Rotation, Transform, ValueId, WeightName, WeightStore};
use attar_pass::plugin::in_compiler;
use attar_pass::{PassCx, Result};
use attar_plugin::{About, Context, Numerics, Pass, Phase};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

attar_plugin::options! {
    /// Options of the pass.
    pub(crate) struct Options {
        /// rotate the residual stream
        pub(crate) stream: bool = true;
        /// rotate the values of attention heads
        pub(crate) heads: bool = true;
        /// allow a weight that is used twice, as a tied embedding, to become two
        pub(crate) untie: bool = false;
    }
}

/// See the file's header.
pub(crate) struct RotateHadamard;

attar_plugin::plugin! { passes: [RotateHadamard] }

impl Pass for RotateHadamard {
    type Options = Options;

    const ABOUT: About = About {
        name: "rotate-hadamard",
        summary: "rotates the residual stream and the values of heads, so that no channel stands out",
        phase: Phase::Compress,
        numerics: Numerics::Rounding,
        takes_tensors: false,
    };

    fn run(options: &Options, cx: &Context<'_>) -> attar_plugin::Result<()> {
        // Weights are rotated where they are read, which keeps the checkpoint mapped.
        in_compiler(cx, |graph, cx| options.rotate(graph, cx))
    }
}

impl Options {
    fn rotate(&self, graph: &mut Graph, cx: &mut PassCx<'_>) -> Result<()> {
        if self.stream {
            match Stream::find(graph, cx.weights, self.untie) {
                Ok(Some(stream)) => {
                    if cx.rewrite("the residual stream") {
                        let rotation = rotation(stream.width, stream.width, cx.seed);
                        stream.rotate(graph, cx.weights, &rotation)?;
                    }
                }
                Ok(None) => {}
                Err(reason) => cx.refused("the residual stream", &reason),
            }
        }
        for id in graph.topo() {
            let OpKind::Attention(_) = graph.op(id) else { continue };
            let name = graph.node(id).name.clone();
            match head_weights(graph, cx.weights, id).filter(|_| self.heads) {
                Some((width, changes)) if cx.rewrite(&name) => {
                    let rotation = rotation(width, width, cx.seed);
                    for (weight, change) in changes {
                        change.make(cx.weights, &weight, &rotation)?;
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// A rotation of `width` channels with signs drawn for `period` of them.
fn rotation(width: usize, period: usize, seed: u64) -> Rotation {
    let mut state = seed;
    let signs: Arc<[f32]> = (0..period)
        .map(|_| {
            // SplitMix64.
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            if (z ^ (z >> 31)) & 1 == 0 { 1.0 } else { -1.0 }
        })
        .collect();
    Rotation { order: 1 << width.trailing_zeros(), signs }
}

/// What one use of a weight asks of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Change {
    /// The gain that goes into its columns first.
    gain: Option<WeightName>,
    /// It meets what is rotated with its columns.
    columns: bool,
    /// It makes what is rotated.
    rows: bool,
}

impl Change {
    fn of_columns(gain: Option<WeightName>) -> Change {
        Change { gain, columns: true, rows: false }
    }

    fn of_rows() -> Change {
        Change { rows: true, ..Change::default() }
    }

    fn make(&self, weights: &mut WeightStore, name: &str, rotation: &Rotation) -> Result<()> {
        if let Some(gain) = &self.gain {
            let gain: Arc<[f32]> = weights.read_f32(gain)?.into();
            weights.transform(name, Transform::ScaleColumns(gain))?;
        }
        if self.columns {
            weights.transform(name, Transform::RotateColumns(rotation.clone()))?;
        }
        if self.rows {
            weights.transform(name, Transform::RotateRows(rotation.clone()))?;
        }
        Ok(())
    }
}

/// The residual stream: all values that are rotated, and what that asks of the weights around them.
#[derive(Default)]
struct Stream {
    width: usize,
    members: BTreeSet<ValueId>,
    pending: Vec<ValueId>,
    norms: BTreeSet<NodeId>,
    /// By node and slot.
    uses: BTreeMap<(NodeId, u16), Change>,
}

impl Stream {
    /// The stream of a model that begins with an embedding; `None` without one, or with one that is rotated already.
    fn find(
        graph: &Graph,
        weights: &WeightStore,
        untie: bool,
    ) -> std::result::Result<Option<Stream>, String> {
        let mut stream = Stream::default();
        for id in graph.topo() {
            if let OpKind::Embed(_) = graph.op(id) {
                stream.width = graph.ty(out(id)).last().unwrap_or(0);
                stream.pending.push(out(id));
            }
        }
        let Some(first) = stream.pending.first() else { return Ok(None) };
        let table = graph.inputs_of(first.node)[1];
        if weight_name(graph, table).is_some_and(|name| weights.is_rotated(name, false)) {
            return Ok(None);
        }
        if !stream.width.is_multiple_of(2) {
            return Err(format!("its width is {}, which is odd", stream.width));
        }
        while let Some(v) = stream.pending.pop() {
            if stream.members.insert(v) {
                stream.written(graph, v)?;
                stream.read(graph, v)?;
            }
        }
        stream.check(graph, weights, untie)?;
        Ok(Some(stream))
    }

    fn ask(&mut self, node: NodeId, slot: u16, asked: Change) {
        let change = self.uses.entry((node, slot)).or_default();
        change.columns |= asked.columns;
        change.rows |= asked.rows;
        change.gain = change.gain.take().or(asked.gain);
    }

    /// What makes a value of the stream.
    fn written(&mut self, graph: &Graph, v: ValueId) -> std::result::Result<(), String> {
        let inputs = graph.inputs_of(v.node);
        if graph.ty(v).last() != Some(self.width) || graph.ty(v).rank() != 2 {
            return Err(format!("{} has another width", graph.describe(v.node)));
        }
        match graph.op(v.node) {
            OpKind::Embed(_) => self.ask(v.node, 1, Change::of_columns(None)),
            OpKind::Linear(_) => {
                self.ask(v.node, 1, Change::of_rows());
                if inputs.len() == 3 {
                    self.ask(v.node, 2, Change::of_rows());
                }
            }
            OpKind::Add(_) => self.pending.extend(&inputs),
            OpKind::GatherRows(_) => self.pending.extend(&inputs[..1]),
            _ => return Err(format!("{} writes to it", graph.describe(v.node))),
        }
        Ok(())
    }

    /// What takes a value of the stream.
    fn read(&mut self, graph: &Graph, v: ValueId) -> std::result::Result<(), String> {
        if graph.outputs().contains(&v) {
            return Err(format!("{} is a result", graph.describe(v.node)));
        }
        for (user, slot) in graph.users(v) {
            match (graph.op(user), slot) {
                (OpKind::Add(_), _) | (OpKind::GatherRows(_), 0) => self.pending.push(out(user)),
                (OpKind::Linear(_), 0) => self.ask(user, 1, Change::of_columns(None)),
                (OpKind::RmsNorm(_), 0) => {
                    let gain = graph.inputs_of(user).get(1).copied();
                    let name = gain.and_then(|g| weight_name(graph, g));
                    if gain.is_some() && name.is_none() {
                        return Err(format!("the gain of {} is computed", graph.describe(user)));
                    }
                    let name = name.map(WeightName::from);
                    self.norms.insert(user);
                    self.normed(graph, out(user), name.as_ref())?;
                }
                _ => return Err(format!("{} reads it", graph.describe(user))),
            }
        }
        Ok(())
    }

    /// What takes a norm of the stream.
    fn normed(
        &mut self,
        graph: &Graph,
        v: ValueId,
        gain: Option<&WeightName>,
    ) -> std::result::Result<(), String> {
        if graph.outputs().contains(&v) {
            return Err(format!("{} is a result", graph.describe(v.node)));
        }
        for (user, slot) in graph.users(v) {
            match (graph.op(user), slot) {
                (OpKind::Linear(_), 0) => self.ask(user, 1, Change::of_columns(gain.cloned())),
                (OpKind::GatherRows(_), 0) => self.normed(graph, out(user), gain)?,
                _ => return Err(format!("{} reads its norm", graph.describe(user))),
            }
        }
        Ok(())
    }

    /// Which weights are to be changed how, with all uses that ask for the same.
    fn changes(&self, graph: &Graph) -> BTreeMap<WeightName, BTreeMap<Change, Vec<(NodeId, u16)>>> {
        let mut changes: BTreeMap<WeightName, BTreeMap<Change, Vec<_>>> = BTreeMap::new();
        for ((node, slot), change) in &self.uses {
            let Some(v) = graph.inputs_of(*node).get(usize::from(*slot)).copied() else { continue };
            let Some(name) = weight_name(graph, v) else { continue };
            changes.entry(name.into()).or_default().entry(change.clone()).or_default().push((*node, *slot));
        }
        changes
    }

    fn check(&self, graph: &Graph, weights: &WeightStore, untie: bool) -> std::result::Result<(), String> {
        for (node, slot) in self.uses.keys() {
            let v = graph.inputs_of(*node)[usize::from(*slot)];
            let Some(name) = weight_name(graph, v) else {
                return Err(format!("a weight of {} is computed", graph.describe(*node)));
            };
            if weights.info(name).map_or(true, |info| info.elem != Elem::F32) {
                return Err(format!("@{name} is compressed already"));
            }
        }
        let changes = self.changes(graph);
        for (id, w) in graph.weights() {
            let Some(changes) = changes.get(&w.name) else { continue };
            let others = |(node, slot): &(NodeId, u16)| !self.uses.contains_key(&(*node, *slot));
            if let Some((user, _)) = graph.users(out(id)).into_iter().find(others) {
                return Err(format!("{} uses @{} too", graph.describe(user), w.name));
            }
            if changes.len() > 1 && !untie {
                return Err(format!("@{} is used twice and would have to become two; see `untie`", w.name));
            }
        }
        Ok(())
    }

    fn rotate(&self, graph: &mut Graph, weights: &mut WeightStore, rotation: &Rotation) -> Result<()> {
        // Before any user is replaced, and before any gain is gone.
        let changes = self.changes(graph);
        let mut separate = BTreeMap::new();
        for (name, changes) in &changes {
            for (i, uses) in changes.values().enumerate().skip(1) {
                let copy = fresh_name(weights, &format!("{name}.untied{}", if i > 1 { "_too" } else { "" }));
                let copy = weights.copy(name, &copy)?;
                uses.iter().for_each(|at| {
                    separate.insert(*at, copy.clone());
                });
            }
        }
        for (name, changes) in &changes {
            for (change, uses) in changes {
                let name = uses.first().and_then(|at| separate.get(at)).unwrap_or(name);
                change.make(weights, name, rotation)?;
            }
        }
        for ((node, slot), name) in separate {
            let mut inputs = graph.inputs_of(node);
            let old = inputs[usize::from(slot)];
            inputs[usize::from(slot)] = graph.add_weight(&name, graph.ty(old).clone());
            let op = graph.op(node).clone();
            let new = graph.add1(op, &inputs)?;
            graph.replace_and_clean(node, &[new])?;
        }
        for norm in &self.norms {
            let OpKind::RmsNorm(RmsNorm { eps }) = *graph.op(*norm) else { continue };
            let inputs = graph.inputs_of(*norm);
            if let [x, gain] = inputs[..] {
                let new = graph.add1(RmsNorm { eps }, &[x])?;
                graph.replace(*norm, &[new])?;
                graph.remove_unused(gain.node)?;
            }
        }
        Ok(())
    }
}

/// Width of an attention's heads, and the weights to be rotated for its values to be.
fn head_weights(
    graph: &Graph,
    weights: &WeightStore,
    attention: NodeId,
) -> Option<(usize, Vec<(WeightName, Change)>)> {
    let values = values_at(graph, weights, attention)?;
    let HeadValues { width, v, v_bias, o, .. } = values;
    if !width.is_multiple_of(2) || weights.is_rotated(&v, true) {
        return None;
    }
    let mut changes = vec![(v, Change::of_rows()), (o, Change::of_columns(None))];
    changes.extend(v_bias.map(|b| (b, Change::of_rows())));
    Some((width, changes))
}
