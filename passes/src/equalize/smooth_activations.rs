//! `smooth-activations`: moves size from the channels of activations into the weights that take them.
//!
//! Before: `%n = rms_norm %x, %g`, `%y = linear %n, %w`.   After: the same with `%g / s` and `%w diag(s)`, channel by channel
//! `s = max|n|^alpha / max|w|^(1 - alpha)`, the maxima over calibration text and over all linears that take the norm.
//! Likewise between the linear before an elementwise product and the one behind it (`products`), and between the linears on
//! both sides of an attention's values (`values`), where query heads that share a KV head share their factors.
//! Preconditions: weights are uncompressed and used once. All statistics are gathered before anything is changed. Without
//! calibration nothing is done, and the metrics say so.
//! Numerics: rounding (weights are rounded to f32 again).   Cost: one run over a quarter of the calibration text.
//! Reference: Xiao et al. 2023, SmoothQuant, arXiv:2211.10438.

use super::head_values::{own_weight, values_at};
use crate::pattern::{linear_at, only_user, out};
use attar_ir::{Graph, NodeId, OpKind, Transform, ValueId, WeightName, WeightStore};
use attar_pass::plugin::in_compiler;
use attar_pass::{PassCx, Result};
use attar_plugin::{About, Context, Numerics, Pass, Phase};
use std::collections::BTreeMap;
use std::sync::Arc;

attar_plugin::options! {
    /// Options of the pass.
    pub(crate) struct Options {
        /// how much of the activations' size moves: 1 makes their channels equal, 0 those of the weights
        pub(crate) alpha: f64 = 0.5, float 0.0..=1.0;
        /// between the gains of norms and what takes them
        pub(crate) norms: bool = true;
        /// between the up and down projections of gated MLPs
        pub(crate) products: bool = true;
        /// between the v and o projections of attention
        pub(crate) values: bool = true;
    }
}

/// See the file's header.
pub(crate) struct SmoothActivations;

attar_plugin::plugin! { passes: [SmoothActivations] }

/// Factors beyond this, and beyond one over it, are cut off: a channel that calibration saw nothing of may be used later.
const MOST: f64 = 1e4;
/// Factors this near to 1 are not worth a change.
const NEAR: f64 = 1e-3;

/// Channels between what makes them and what takes them.
struct Site {
    name: String,
    /// `[.., K]`.
    value: ValueId,
    /// Vectors or matrices whose rows, one for each factor, make the channels.
    makers: Vec<WeightName>,
    /// Matrices `[N, K]`.
    takers: Vec<WeightName>,
    /// Query heads and KV heads, and their width, where channels share factors.
    shared: Option<(usize, usize, usize)>,
}

impl Pass for SmoothActivations {
    type Options = Options;

    const ABOUT: About = About {
        name: "smooth-activations",
        summary: "moves size from channels of activations into the weights that take them, by calibration",
        phase: Phase::Compress,
        numerics: Numerics::Rounding,
        takes_tensors: false,
    };

    fn run(options: &Options, cx: &Context<'_>) -> attar_plugin::Result<()> {
        // Weights are scaled where they are read, which keeps the checkpoint mapped.
        in_compiler(cx, |graph, cx| options.smooth(graph, cx))
    }
}

impl Options {
    fn smooth(&self, graph: &Graph, cx: &mut PassCx<'_>) -> Result<()> {
        let sites = self.sites(graph, cx.weights);
        if !sites.is_empty() && !cx.is_calibrated() {
            cx.refused("all layers", "there is no calibration");
            return Ok(());
        }
        let total = sites.len() as u64;
        let mut sizes = Vec::with_capacity(sites.len());
        for (done, site) in (0..).zip(&sites) {
            cx.progress(&site.name, done, total);
            sizes.push(cx.input_sizes(graph, site.value)?);
        }
        // Norms last: rows of what takes them have then got their sizes.
        let (norms, others): (Vec<_>, Vec<_>) =
            sites.iter().zip(&sizes).partition(|(s, _)| matches!(graph.op(s.value.node), OpKind::RmsNorm(_)));
        for (site, sizes) in others.into_iter().chain(norms) {
            let factors = self.factors(site, sizes, cx.weights)?;
            let changes = factors.iter().any(|s| (f64::from(*s) - 1.0).abs() > NEAR);
            if changes && cx.rewrite(&site.name) {
                site.change(&factors, cx.weights)?;
                let most = factors.iter().copied().fold(0f32, f32::max);
                let least = factors.iter().copied().fold(f32::INFINITY, f32::min);
                cx.metric(
                    &site.name,
                    [("least_factor", f64::from(least).into()), ("most_factor", f64::from(most).into())],
                );
            }
        }
        cx.progress("", total, total);
        Ok(())
    }

    /// All sites, in the order their values are computed.
    fn sites(&self, graph: &Graph, weights: &WeightStore) -> Vec<Site> {
        let mut sites = Vec::new();
        for id in graph.topo() {
            let site = match graph.op(id) {
                OpKind::RmsNorm(_) if self.norms => norm_site(graph, weights, id),
                OpKind::Mul(_) if self.products => product_site(graph, weights, id),
                OpKind::Attention(_) if self.values => value_site(graph, weights, id),
                _ => None,
            };
            sites.extend(site);
        }
        let time: BTreeMap<_, _> = graph.topo().into_iter().enumerate().map(|(i, id)| (id, i)).collect();
        sites.sort_by_key(|s| time.get(&s.value.node).copied());
        sites
    }

    /// What takers are multiplied by, for each channel of the makers.
    fn factors(&self, site: &Site, sizes: &[f32], weights: &WeightStore) -> Result<Vec<f32>> {
        let mut of_weights = vec![0f32; sizes.len()];
        for taker in &site.takers {
            for row in weights.read_f32(taker)?.chunks_exact(sizes.len()) {
                of_weights.iter_mut().zip(row).for_each(|(most, w)| *most = most.max(w.abs()));
            }
        }
        let (sizes, of_weights) = (site.of_makers(sizes), site.of_makers(&of_weights));
        let factor = |(x, w): (&f32, &f32)| {
            let s = f64::from(*x).powf(self.alpha) / f64::from(*w).powf(1.0 - self.alpha);
            if *x > 0.0 && *w > 0.0 && s.is_finite() { s.clamp(1.0 / MOST, MOST) as f32 } else { 1.0 }
        };
        Ok(sizes.iter().zip(&of_weights).map(factor).collect())
    }
}

impl Site {
    /// Where the channel of a maker lies that channel `k` of the value comes from.
    fn maker(&self, k: usize) -> usize {
        match self.shared {
            None => k,
            Some((heads, kv_heads, width)) => k / width / (heads / kv_heads) * width + k % width,
        }
    }

    /// The largest of each maker's channels.
    fn of_makers(&self, sizes: &[f32]) -> Vec<f32> {
        let count = sizes.len().checked_sub(1).map_or(0, |last| self.maker(last) + 1);
        let mut most = vec![0f32; count];
        for (k, size) in sizes.iter().enumerate() {
            let most = &mut most[self.maker(k)];
            *most = most.max(*size);
        }
        most
    }

    fn change(&self, factors: &[f32], weights: &mut WeightStore) -> Result<()> {
        let inverse: Arc<[f32]> = factors.iter().map(|s| 1.0 / s).collect();
        for maker in &self.makers {
            weights.transform(maker, Transform::ScaleRows(inverse.clone()))?;
        }
        for taker in &self.takers {
            let width = weights.info(taker)?.shape.last().copied().unwrap_or(0);
            let each = (0..width).map(|k| factors[self.maker(k)]).collect();
            weights.transform(taker, Transform::ScaleColumns(each))?;
        }
        Ok(())
    }
}

/// The weights of all linears that take a value, if nothing else does.
fn takers(graph: &Graph, weights: &WeightStore, v: ValueId) -> Option<Vec<WeightName>> {
    let users = graph.users(v);
    if users.is_empty() || graph.outputs().contains(&v) || graph.ty(v).rank() != 2 {
        return None;
    }
    users
        .into_iter()
        .map(|(user, slot)| {
            let linear = linear_at(graph, out(user)).filter(|_| slot == 0)?;
            own_weight(graph, weights, linear.w)
        })
        .collect()
}

fn norm_site(graph: &Graph, weights: &WeightStore, norm: NodeId) -> Option<Site> {
    let gain = *graph.inputs_of(norm).get(1)?;
    let takers = takers(graph, weights, out(norm))?;
    let makers = vec![own_weight(graph, weights, gain)?];
    Some(Site { name: graph.node(norm).name.clone(), value: out(norm), makers, takers, shared: None })
}

fn product_site(graph: &Graph, weights: &WeightStore, product: NodeId) -> Option<Site> {
    let takers = takers(graph, weights, out(product))?;
    let makers = graph.inputs_of(product).into_iter().find_map(|v| {
        let linear = linear_at(graph, v)?;
        only_user(graph, v)?;
        let mut makers = vec![own_weight(graph, weights, linear.w)?];
        if let Some(b) = linear.b {
            makers.push(own_weight(graph, weights, b)?);
        }
        Some(makers)
    })?;
    let name = graph.node(product).name.clone();
    Some(Site { name, value: out(product), makers, takers, shared: None })
}

fn value_site(graph: &Graph, weights: &WeightStore, attention: NodeId) -> Option<Site> {
    let values = values_at(graph, weights, attention)?;
    let mut makers = vec![values.v];
    makers.extend(values.v_bias);
    Some(Site {
        name: graph.node(attention).name.clone(),
        value: values.result,
        makers,
        takers: vec![values.o],
        shared: Some((values.heads, values.kv_heads, values.width)),
    })
}
