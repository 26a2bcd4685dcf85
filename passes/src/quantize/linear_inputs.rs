//! Which values reach the linear layers a weight belongs to: what calibration is asked for.

use attar_ir::{Graph, OpKind, ValueId};
use attar_pass::{InputDrift, InputStatistics, PassCx, Result, Subject};
use std::collections::BTreeMap;

/// Weights that the same values are multiplied with, such as q, k and v.
#[derive(Clone, Debug)]
pub(super) struct Site {
    /// Inputs of the linear layers, in the order they are computed; empty when no linear layer reads the weights.
    pub(super) inputs: Vec<ValueId>,
    pub(super) subjects: Vec<Subject>,
}

/// Groups weights by the values they meet, in the order those are computed. Weights without a linear layer come first:
/// nothing before them changes their inputs.
pub(super) fn sites(graph: &Graph, subjects: Vec<Subject>) -> Vec<Site> {
    let time: BTreeMap<_, _> = graph.topo().into_iter().enumerate().map(|(i, id)| (id, i)).collect();
    let mut sites: Vec<Site> = Vec::new();
    for subject in subjects {
        let mut inputs: Vec<ValueId> = Vec::new();
        for node in &subject.nodes {
            for (user, slot) in graph.users(crate::pattern::out(*node)) {
                if slot == 1 && matches!(graph.op(user), OpKind::Linear(_)) {
                    inputs.push(graph.inputs_of(user)[0]);
                }
            }
        }
        inputs.sort_unstable_by_key(|v| (time.get(&v.node), v.slot));
        inputs.dedup();
        match sites.iter_mut().find(|s| s.inputs == inputs) {
            Some(site) => site.subjects.push(subject),
            None => sites.push(Site { inputs, subjects: vec![subject] }),
        }
    }
    // Stable: what is computed at the same time keeps the order of first use.
    sites.sort_by_key(|s| s.inputs.last().and_then(|v| time.get(&v.node)).copied());
    sites
}

impl Site {
    /// What all the inputs together were fed; `None` without inputs.
    pub(super) fn statistics(&self, graph: &Graph, cx: &mut PassCx<'_>) -> Result<Option<InputStatistics>> {
        let mut sum: Option<InputStatistics> = None;
        for input in &self.inputs {
            let statistics = cx.input_statistics(graph, *input)?;
            match &mut sum {
                Some(sum) => sum.merge(&statistics),
                None => sum = Some(statistics),
            }
        }
        Ok(sum)
    }

    /// How far the site's inputs have drifted from the uncompressed model's, where weights can make up for it: there is one
    /// input, and nothing but linear layers reads the weights.
    pub(super) fn drift(&self, graph: &Graph, cx: &mut PassCx<'_>) -> Result<Option<InputDrift>> {
        let [input] = self.inputs[..] else { return Ok(None) };
        let readers =
            || self.subjects.iter().flat_map(|s| &s.nodes).flat_map(|n| graph.users(crate::pattern::out(*n)));
        if readers().any(|(user, _)| !matches!(graph.op(user), OpKind::Linear(_))) {
            return Ok(None);
        }
        cx.input_drift(graph, input, self.added_to(graph))
    }

    /// What the site's output is added to, if it has one output and that is all that happens to it.
    fn added_to(&self, graph: &Graph) -> Option<ValueId> {
        let [subject] = &self.subjects[..] else { return None };
        let [node] = subject.nodes[..] else { return None };
        let [(linear, _)] = graph.users(crate::pattern::out(node))[..] else { return None };
        let output = crate::pattern::out(linear);
        let [(add, slot)] = graph.users(output)[..] else { return None };
        let is_sum = matches!(graph.op(add), OpKind::Add(_)) && graph.inputs_of(linear).len() == 2;
        is_sum.then(|| graph.inputs_of(add)[usize::from(1 - slot)]).filter(|other| *other != output)
    }
}
