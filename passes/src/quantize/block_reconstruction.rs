//! Reconstruction of whole blocks: codes and scales of a decoder layer are moved down the gradient of its output's error.
//!
//! `quantize-gptq` serves one matrix at a time: what a matrix does to the rest of its layer (softmax, the product of gate and
//! up) it does not see. Here all coded matrices of a block are moved together, so that the block gives, from inputs as the
//! compressed blocks before it make them, what the uncompressed model gives there.
//! Each weight has a latent value behind its code, at first the original weight moved into the middle of the code's cell. A
//! step computes the gradient of the relative squared error over a batch of calibration text as if rounding were the identity
//! (the straight-through estimate), moves latent values by Adam in units of the distance between codes, and rounds them anew.
//! Scales of groups and rows move alike, in relative units. Steps shrink to nothing over the run, and the outcome is kept only
//! if the error over all of the text is smaller than before.
//! References: Cheng et al. 2023, arXiv:2309.05516 (rounding and scales by gradient, block by block); Chen et al. 2024,
//! arXiv:2407.11062 (all of a block's weights trained); Bengio et al. 2013, arXiv:1308.3432 (straight-through).

use super::code_grid::{CodeGrid, GroupScale};
use super::linear_inputs::Site;
use attar_format::{Encoded, Scale};
use attar_ir::{Graph, NodeId, OpKind, ValueId, WeightName};
use attar_pass::{Error, ErrorKind, Part, PassCx, Result};
use rayon::prelude::*;
use std::collections::{BTreeMap, BTreeSet};

/// A decoder layer: what lies between two states of the residual stream.
#[derive(Clone, Debug)]
pub(super) struct Block {
    pub(super) part: Part,
    pub(super) nodes: BTreeSet<NodeId>,
}

/// The blocks of a graph in order: each begins at the last value before an attention that everything after it depends on alone,
/// and the last ends at the last such sum. A graph without such values has none.
pub(super) fn blocks(graph: &Graph) -> Vec<Block> {
    let is_source = |id: NodeId| matches!(graph.op(id), OpKind::Input(_) | OpKind::Weight(_));
    let order: Vec<NodeId> = graph.topo().into_iter().filter(|id| !is_source(*id)).collect();
    let time: BTreeMap<NodeId, usize> = order.iter().enumerate().map(|(i, id)| (*id, i)).collect();
    // Until when each node's value is needed; an output for ever.
    let mut needed: Vec<usize> = (0..order.len()).collect();
    for id in &order {
        for v in graph.inputs_of(*id) {
            if let Some(at) = time.get(&v.node) {
                needed[*at] = needed[*at].max(time[id]);
            }
        }
    }
    graph.outputs().iter().filter_map(|v| time.get(&v.node)).for_each(|at| needed[*at] = usize::MAX);
    let mut reach = 0;
    let mut cuts: Vec<usize> = Vec::new();
    for (i, needed) in needed.iter().enumerate() {
        // Nothing earlier is needed after this node but its own value.
        if reach <= i && *needed > i && *needed != usize::MAX {
            cuts.push(i);
        }
        reach = reach.max(*needed);
    }
    let attentions =
        order.iter().enumerate().filter(|(_, id)| matches!(graph.op(**id), OpKind::Attention(_)));
    let mut bounds: Vec<usize> = Vec::new();
    for (at, _) in attentions {
        if let Some(cut) = cuts.iter().copied().rfind(|c| *c < at)
            && bounds.last() != Some(&cut)
        {
            bounds.push(cut);
        }
    }
    let is_sum = |cut: &usize| matches!(graph.op(order[*cut]), OpKind::Add(_));
    if let (Some(last), Some(end)) = (bounds.last().copied(), cuts.iter().copied().rfind(is_sum))
        && end > last
    {
        bounds.push(end);
    }
    let value = |at: usize| ValueId { node: order[at], slot: 0 };
    bounds
        .windows(2)
        .map(|b| Block {
            part: Part { from: value(b[0]), to: value(b[1]) },
            nodes: order[b[0] + 1..=b[1]].iter().copied().collect(),
        })
        .collect()
}

/// How long and how far.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reconstruction {
    /// Steps of descent; none does nothing.
    pub(super) steps: usize,
}

/// What a reconstruction did: the error of the block before and after.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Outcome {
    pub(super) before: f64,
    pub(super) after: f64,
}

/// Reconstructs blocks while a pass encodes site after site.
pub(super) struct BlockByBlock {
    reconstruction: Reconstruction,
    blocks: Vec<Block>,
    /// Blocks to be reconstructed.
    wanted: BTreeSet<usize>,
    /// All matrices of each block.
    matrices: BTreeMap<usize, Vec<WeightName>>,
    /// The block that is being encoded, if it is to be reconstructed.
    at: Option<usize>,
    /// What an interrupted run has kept of it: nothing of it needs to be run then.
    kept: Option<Vec<u8>>,
    /// What has been encoded of it.
    names: Vec<WeightName>,
}

impl BlockByBlock {
    /// `few` says which sites get so few bits that their blocks are to be reconstructed.
    pub(super) fn new<'s>(
        graph: &Graph,
        reconstruction: Reconstruction,
        sites: impl Iterator<Item = (&'s Site, bool)>,
    ) -> BlockByBlock {
        let blocks = if reconstruction.steps > 0 { blocks(graph) } else { Vec::new() };
        let mut wanted = BTreeSet::new();
        let mut matrices: BTreeMap<usize, Vec<WeightName>> = BTreeMap::new();
        // Blocks with a matrix that meets several values: its statistics are asked for in any case.
        let mut shared = BTreeSet::new();
        for (site, few) in sites {
            let Some(at) = place(graph, &blocks, site) else { continue };
            matrices.entry(at).or_default().extend(site.subjects.iter().map(|s| s.name.clone()));
            shared.extend((site.inputs.len() != 1).then_some(at));
            wanted.extend(few.then_some(at));
        }
        matrices.retain(|at, _| !shared.contains(at));
        BlockByBlock { reconstruction, blocks, wanted, matrices, at: None, kept: None, names: Vec::new() }
    }

    /// To be called before a site's statistics are asked for.
    pub(super) fn before(&mut self, graph: &Graph, cx: &mut PassCx<'_>, site: &Site) -> Result<()> {
        let at = place(graph, &self.blocks, site).filter(|b| self.wanted.contains(b));
        if at == self.at {
            return Ok(());
        }
        self.finish(graph, cx)?;
        self.at = at.filter(|_| cx.is_calibrated());
        if let Some(at) = self.at {
            // When a single matrix has to be encoded anew, the model runs through the block, and it has to be entered.
            let names = self.matrices.get(&at).map_or(&[][..], Vec::as_slice);
            let all = names.iter().all(|n| cx.recall(&super::quantize_gptq::kept_as(n)).is_some());
            self.kept = if all && !names.is_empty() { cx.recall(&kept_as(at)) } else { None };
            if self.kept.is_none() && !cx.enter_part(graph, self.blocks[at].part)? {
                self.at = None;
            }
        }
        Ok(())
    }

    /// To be called after a site has been encoded.
    pub(super) fn after(&mut self, site: &Site) {
        if self.at.is_some() {
            self.names.extend(site.subjects.iter().map(|s| s.name.clone()));
        }
    }

    /// To be called after the last site.
    pub(super) fn finish(&mut self, graph: &Graph, cx: &mut PassCx<'_>) -> Result<()> {
        let names = std::mem::take(&mut self.names);
        let Some(at) = self.at.take() else { return Ok(()) };
        let outcome = match self.kept.take() {
            Some(bytes) => Some(recall(cx, &names, &bytes)?.ok_or_else(unsuitable)?),
            None => self.reconstruction.run(graph, cx, &names)?,
        };
        if let Some(outcome) = outcome {
            if let Some(bytes) = remember(cx, &names, outcome)? {
                cx.keep(&kept_as(at), &bytes);
            }
            for name in &names {
                cx.metric(
                    name,
                    [("block_error", outcome.after.into()), ("block_error_before", outcome.before.into())],
                );
            }
        }
        Ok(())
    }
}

/// Key of the journal for a block.
fn kept_as(block: usize) -> String {
    format!("block/{block}")
}

/// A reconstructed block for the journal; `None` when codes do not suit their format.
fn remember(cx: &PassCx<'_>, names: &[WeightName], outcome: Outcome) -> Result<Option<Vec<u8>>> {
    let mut bytes: Vec<u8> = [outcome.before, outcome.after].into_iter().flat_map(f64::to_le_bytes).collect();
    for name in names {
        let Ok(packed) = cx.weights.read_encoded(name)?.pack() else { return Ok(None) };
        bytes.extend((packed.len() as u64).to_le_bytes());
        bytes.extend(packed);
    }
    Ok(Some(bytes))
}

fn unsuitable() -> Error {
    let problem =
        "what an interrupted compile kept of a block does not suit it; start again with --no-resume";
    Error::new(ErrorKind::Calibration { problem: problem.to_owned() })
}

/// Puts a block's codes back as they were remembered; `None` when they are not those of these matrices.
fn recall(cx: &mut PassCx<'_>, names: &[WeightName], bytes: &[u8]) -> Result<Option<Outcome>> {
    let mut rest = bytes;
    let mut take = |len: usize| -> Option<&[u8]> {
        let (head, tail) = rest.split_at_checked(len)?;
        rest = tail;
        Some(head)
    };
    let before = take(8).and_then(|b| b.first_chunk().copied());
    let after = take(8).and_then(|b| b.first_chunk().copied());
    let (Some(before), Some(after)) = (before, after) else { return Ok(None) };
    let mut found = Vec::with_capacity(names.len());
    for name in names {
        let now = cx.weights.read_encoded(name)?;
        let len = take(8).and_then(|b| b.first_chunk().copied()).map(u64::from_le_bytes);
        let packed = len.and_then(|l| usize::try_from(l).ok()).and_then(&mut take);
        match packed.and_then(|p| Encoded::unpack(now.format, now.n, now.k, p).ok()) {
            Some(encoded) => found.push(encoded),
            None => return Ok(None),
        }
    }
    for (name, encoded) in names.iter().zip(&found) {
        cx.weights.set_encoded(name, encoded)?;
    }
    Ok(Some(Outcome { before: f64::from_le_bytes(before), after: f64::from_le_bytes(after) }))
}

/// The block that a site's linear layers are in.
fn place(graph: &Graph, blocks: &[Block], site: &Site) -> Option<usize> {
    let node = site.subjects.first()?.nodes.first()?;
    let (user, _) = *graph.users(crate::pattern::out(*node)).first()?;
    blocks.iter().position(|b| b.nodes.contains(&user))
}

/// First step of latent values, in distances between codes, and of scales, relative.
const CODE_STEP: f32 = 0.02;
const GROUP_STEP: f32 = 0.0005;
const ROW_STEP: f32 = 0.0001;

/// Matrices of more bits gain nothing.
const MOST_BITS: usize = 5;

impl Reconstruction {
    pub(super) const NONE: Reconstruction = Reconstruction { steps: 0 };

    /// Matrices of at most so many bits a weight have their blocks reconstructed.
    pub(super) const FEW_BITS: usize = 3;

    /// Reconstructs the block entered last, whose matrices `names` have been encoded. `None` when there is nothing to do.
    pub(super) fn run(
        &self,
        graph: &Graph,
        cx: &mut PassCx<'_>,
        names: &[WeightName],
    ) -> Result<Option<Outcome>> {
        let mut trained = Vec::new();
        for name in names {
            let encoded = cx.weights.read_encoded(name)?;
            if encoded.format.code_bits() <= MOST_BITS
                && let Some(grid) = CodeGrid::of(encoded.format)
                && let Scale::RowF32Field8 { .. } = encoded.format.scale
            {
                let original = cx.weights.read_original_f32(name)?;
                trained.push(Trained::new(name.clone(), encoded, grid, &original));
            }
        }
        if trained.is_empty() {
            return Ok(None);
        }
        let values = |trained: &[Trained]| -> Vec<(WeightName, Vec<f32>)> {
            trained.iter().map(|t| (t.name.clone(), t.encoded.decode())).collect()
        };
        let before = cx.part_gradient(graph, &values(&trained), None)?.loss;
        for step in 0..self.steps {
            let found = cx.part_gradient(graph, &values(&trained), Some(step as u64))?;
            let rest = 1.0 - step as f32 / self.steps as f32;
            for (trained, gradient) in trained.iter_mut().zip(&found.weights) {
                trained.descend(gradient, rest, step as i32 + 1);
            }
        }
        let after = cx.part_gradient(graph, &values(&trained), None)?.loss;
        if after < before {
            for t in &trained {
                cx.weights.set_encoded(&t.name, &t.encoded)?;
            }
        }
        cx.leave_part()?;
        Ok(Some(Outcome { before, after: after.min(before) }))
    }
}

/// A matrix while it is moved.
struct Trained {
    name: WeightName,
    encoded: Encoded,
    grid: CodeGrid,
    /// Mean distance between neighbouring codes, in units of a group's scale.
    spacing: f32,
    /// Behind the codes, `[N, K]`.
    latent: Vec<f32>,
    codes: Moments,
    /// Scales behind the stored ones, `[N, groups]`.
    scales: Vec<f32>,
    groups: Moments,
    rows: Moments,
}

/// The running means of Adam.
struct Moments {
    mean: Vec<f32>,
    square: Vec<f32>,
}

impl Moments {
    fn new(len: usize) -> Moments {
        Moments { mean: vec![0.0; len], square: vec![0.0; len] }
    }
}

const MEAN_DECAY: f32 = 0.9;
const SQUARE_DECAY: f32 = 0.95;

/// One entry's step by Adam, of magnitude about 1.
fn adam(mean: &mut f32, square: &mut f32, gradient: f32, corrections: [f32; 2]) -> f32 {
    *mean = MEAN_DECAY * *mean + (1.0 - MEAN_DECAY) * gradient;
    *square = SQUARE_DECAY * *square + (1.0 - SQUARE_DECAY) * gradient * gradient;
    let size = (*square * corrections[1]).sqrt();
    if size > 0.0 { *mean * corrections[0] / size } else { 0.0 }
}

impl Trained {
    fn new(name: WeightName, encoded: Encoded, grid: CodeGrid, original: &[f32]) -> Trained {
        let (k, groups, group) = (encoded.k, encoded.groups(), encoded.format.group);
        let last = ((1usize << encoded.format.code_bits()) - 1) as u8;
        let spacing = (grid.value(0, last) - grid.value(0, 0)) / f32::from(last);
        let scale_of = |at: usize| grid.group_scale(encoded.field[at], encoded.row_scale[at / groups]);
        let scales: Vec<f32> = (0..encoded.n * groups).map(|at| scale_of(at).scale).collect();
        let mut latent = original.to_vec();
        latent.par_chunks_mut(k).enumerate().for_each(|(row, latent)| {
            for (i, w) in latent.iter_mut().enumerate() {
                let scale = scale_of(row * groups + i / group);
                let code = encoded.codes[row * k + i];
                *w = if scale.scale == 0.0 { 0.0 } else { inside(&grid, scale, code, last, *w) };
            }
        });
        Trained {
            codes: Moments::new(latent.len()),
            groups: Moments::new(scales.len()),
            rows: Moments::new(encoded.n),
            name,
            encoded,
            grid,
            spacing,
            latent,
            scales,
        }
    }

    /// One step down the gradient `[N, K]`; `rest` of the first step's length.
    fn descend(&mut self, gradient: &[f32], rest: f32, time: i32) {
        let (k, groups, group) = (self.encoded.k, self.encoded.groups(), self.encoded.format.group);
        let corrections = [1.0 / (1.0 - MEAN_DECAY.powi(time)), 1.0 / (1.0 - SQUARE_DECAY.powi(time))];
        let (grid, spacing) = (&self.grid, self.spacing);
        let rows = (self.encoded.codes.par_chunks_mut(k))
            .zip(self.encoded.field.par_chunks_mut(groups))
            .zip(self.encoded.row_scale.par_iter_mut())
            .zip(self.latent.par_chunks_mut(k).zip(self.scales.par_chunks_mut(groups)))
            .zip(self.codes.mean.par_chunks_mut(k).zip(self.codes.square.par_chunks_mut(k)))
            .zip(self.groups.mean.par_chunks_mut(groups).zip(self.groups.square.par_chunks_mut(groups)))
            .zip(self.rows.mean.par_iter_mut().zip(self.rows.square.par_iter_mut()))
            .zip(gradient.par_chunks(k));
        rows.for_each(
            |(
                (
                    (((((codes, fields), row_scale), (latent, scales)), code_moments), group_moments),
                    row_moments,
                ),
                gradient,
            )| {
                let old_scale = *row_scale;
                if old_scale == 0.0 {
                    return;
                }
                let mut along_row = 0.0f32;
                for g in 0..groups {
                    let span = g * group..(g + 1) * group;
                    let s = grid.group_scale(fields[g], old_scale);
                    if s.scale == 0.0 {
                        continue;
                    }
                    // By the scale of the group: what the codes stand for in its units is its slope.
                    let mut along = 0.0f32;
                    for (code, d) in codes[span.clone()].iter().zip(&gradient[span.clone()]) {
                        along += grid.value(s.choice, *code) * d;
                    }
                    along_row += along * s.scale;
                    let moved =
                        adam(&mut group_moments.0[g], &mut group_moments.1[g], along * s.scale, corrections);
                    scales[g] *= 1.0 - GROUP_STEP * rest * moved;
                }
                let moved = adam(row_moments.0, row_moments.1, along_row, corrections);
                let factor = 1.0 - ROW_STEP * rest * moved;
                *row_scale = old_scale * factor;
                for g in 0..groups {
                    let span = g * group..(g + 1) * group;
                    let old = grid.group_scale(fields[g], old_scale);
                    if old.scale == 0.0 {
                        continue;
                    }
                    scales[g] *= factor;
                    let s = match grid.field(scales[g], old.choice, *row_scale) {
                        Some((field, s)) => {
                            fields[g] = field;
                            s
                        }
                        None => grid.group_scale(fields[g], *row_scale),
                    };
                    let step = CODE_STEP * rest * spacing * s.scale.abs();
                    for i in span {
                        let moved =
                            adam(&mut code_moments.0[i], &mut code_moments.1[i], gradient[i], corrections);
                        latent[i] -= step * moved;
                        codes[i] = grid.code(s.choice, latent[i] / s.scale);
                    }
                }
            },
        );
    }
}

/// The number nearest to `w` that lies in the middle part of the cell of `code`: `quantize-gptq` has rounded many weights away
/// from their nearest code on purpose, and these must not all fall back at the first step.
fn inside(grid: &CodeGrid, scale: GroupScale, code: u8, last: u8, w: f32) -> f32 {
    const SPARE: f32 = 0.1;
    let value = grid.value(scale.choice, code);
    let below = if code > 0 { value - grid.value(scale.choice, code - 1) } else { f32::INFINITY };
    let above = if code < last { grid.value(scale.choice, code + 1) - value } else { f32::INFINITY };
    // Beyond the first and the last entry as far as their neighbours are away on the other side.
    let (below, above) = (
        below.min(if below.is_finite() { below } else { above }),
        above.min(if above.is_finite() { above } else { below }),
    );
    scale.scale * (w / scale.scale).clamp(value - SPARE * below, value + SPARE * above)
}
