//! `drop-layers`: removes the decoder layers that change the residual stream least.
//!
//! The model runs over text; for each layer the mean cosine between what enters and what leaves it is measured, position by
//! position. The layers with the largest cosines go (block influence: Men et al. 2024, arXiv:2403.03853). Text is the
//! calibration text where there is some, else a paragraph that comes with the plugin. Unlike zeros, layers that are gone cost
//! nothing: the model gets smaller and faster in proportion.

use attar_plugin::{About, Attr, Context, Error, ErrorKind, Numerics, Pass, Phase, Result, Value};

attar_plugin::options! {
    /// Options of the pass.
    pub struct Options {
        /// layers to remove
        pub count: usize = 1, int 1..=1000;
        /// windows of calibration text to run over
        pub windows: usize = 4, int 1..=1000;
        /// tokens of a window to look at
        pub tokens: usize = 128, int 1..=4096;
        /// keep the first and the last layer whatever they do
        pub keep_ends: bool = true;
    }
}

/// See the crate's documentation.
#[derive(Debug)]
pub struct DropLayers;

attar_plugin::plugin! { passes: [DropLayers] }

/// What the model reads where there is no calibration text.
const TEXT: &str = "The river rises in the hills to the north and runs for forty miles through farmland before it \
    reaches the town. In spring it floods the meadows, and children go out in flat boats to see how far the water has \
    come. There are three bridges; the oldest was built of stone when wool was still the main trade, and two people \
    can hardly pass on it. How long will it stand? Nobody can say, but every ten years the council has it measured, \
    stone by stone, and writes the numbers into a book.";

/// A decoder layer: the residual stream before it and behind it.
struct Layer {
    before: Value,
    behind: Value,
}

impl Pass for DropLayers {
    type Options = Options;

    const ABOUT: About = About {
        name: "drop-layers",
        summary: "removes the decoder layers that change the residual stream least",
        phase: Phase::Compress,
        numerics: Numerics::Lossy,
        takes_tensors: false,
    };

    fn run(options: &Options, cx: &Context<'_>) -> Result<()> {
        let layers = layers(cx)?;
        let ends = usize::from(options.keep_ends);
        let candidates = ends..layers.len().saturating_sub(ends);
        if options.count > candidates.len() {
            let (count, most) = (options.count, candidates.len());
            return Err(Error::new(format!(
                "count is {count}, and only {most} of the {} layers may go; make it smaller, or set keep_ends = false",
                layers.len()
            )));
        }
        let similarity = similarity(options, cx, &layers)?;
        for (layer, cosine) in similarity.iter().enumerate() {
            cx.metric(&format!("layer {layer}"), [("similarity", (*cosine).into())])?;
        }
        let mut order: Vec<usize> = candidates.collect();
        order.sort_by(|a, b| similarity[*b].total_cmp(&similarity[*a]).then(a.cmp(b)));
        let mut gone: Vec<usize> = order.into_iter().take(options.count).collect();
        // From the last to the first, so that what takes a layer's output still stands when the layer before it goes.
        gone.sort_unstable_by(|a, b| b.cmp(a));
        for layer in &gone {
            if cx.rewrite(&format!("layer {layer}"))? {
                cx.replace_uses(layers[*layer].behind, layers[*layer].before)?;
            }
        }
        remove_unused(cx)?;
        number_caches(cx)?;
        cx.info(format!("removed {} of {} layers: {:?}", gone.len(), layers.len(), gone));
        Ok(())
    }
}

/// The layers, found by their two additions to the residual stream.
fn layers(cx: &Context<'_>) -> Result<Vec<Layer>> {
    let mut additions = Vec::new();
    for node in cx.nodes_of("add")? {
        let sum = cx.output(node)?;
        // A bias is no sum of two values of the stream.
        if cx.type_of(sum)?.dims.len() == 2 {
            additions.push((node, sum));
        }
    }
    let attentions = cx.nodes_of("attention")?.len();
    if additions.len() != 2 * attentions || attentions == 0 {
        let found = additions.len();
        return Err(Error::new(format!(
            "found {found} additions and {attentions} attention blocks; this pass knows models with two additions a layer, \
             before they are fused"
        )));
    }
    let mut layers: Vec<Layer> = Vec::with_capacity(attentions);
    for pair in additions.chunks_exact(2) {
        let inputs = cx.inputs_of(pair[0].0)?;
        let last = layers.last().map(|l| l.behind);
        // The stream goes on from the layer before; at the first layer, from whatever is no projection.
        let mut before = None;
        for value in inputs {
            let is_stream = match last {
                Some(last) => value == last,
                None => cx.node(cx.node_of(value)?)?.op != "linear",
            };
            if is_stream {
                before = Some(value);
            }
        }
        let Some(before) = before else {
            return Err(Error::new(
                "a layer does not go on from the one before; this pass does not know such models",
            ));
        };
        layers.push(Layer { before, behind: pair[1].1 });
    }
    Ok(layers)
}

/// Mean cosine of what enters and leaves each layer.
fn similarity(options: &Options, cx: &Context<'_>, layers: &[Layer]) -> Result<Vec<f64>> {
    let windows = windows(options, cx)?;
    let mut sums = vec![0.0f64; layers.len()];
    let mut rows = 0usize;
    for (done, tokens) in windows.iter().enumerate() {
        cx.progress("measuring layers", done as u64, windows.len() as u64)?;
        let mut before = cx.activations(tokens, layers[0].before)?.to_vec();
        for (layer, sum) in layers.iter().zip(&mut sums) {
            let behind = cx.activations(tokens, layer.behind)?.to_vec();
            let width = before.len() / tokens.len();
            let pairs = before.chunks_exact(width).zip(behind.chunks_exact(width));
            *sum += pairs.map(|(a, b)| cosine(a, b)).sum::<f64>();
            before = behind;
        }
        rows += tokens.len();
    }
    Ok(sums.into_iter().map(|s| s / rows.max(1) as f64).collect())
}

/// Tokens to run over.
fn windows(options: &Options, cx: &Context<'_>) -> Result<Vec<Vec<u32>>> {
    let mut windows = Vec::new();
    for index in 0..options.windows {
        match cx.calibration_window(index) {
            Ok(Some(tokens)) => windows.push(tokens),
            Ok(None) => break,
            Err(e) if e.kind == ErrorKind::Unavailable => break,
            Err(e) => return Err(e),
        }
    }
    if windows.is_empty() {
        windows.push(cx.tokenize(TEXT)?);
    }
    for tokens in &mut windows {
        tokens.truncate(options.tokens);
    }
    Ok(windows)
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let norms = (dot(a, a) * dot(b, b)).sqrt();
    if norms > 0.0 { dot(a, b) / norms } else { 1.0 }
}

/// Removes nodes whose outputs nothing takes, the last ones first.
fn remove_unused(cx: &Context<'_>) -> Result<()> {
    let outputs = cx.outputs()?;
    for node in cx.nodes()?.into_iter().rev() {
        let info = cx.node(node)?;
        let mut used = info.op == "input";
        for slot in 0..info.outputs {
            let value = cx.output_at(node, slot)?;
            used |= outputs.contains(&value) || !cx.uses(value)?.is_empty();
        }
        if !used {
            cx.remove(node)?;
        }
    }
    Ok(())
}

/// Numbers the caches of what is left without gaps.
fn number_caches(cx: &Context<'_>) -> Result<()> {
    for (layer, node) in cx.nodes_of("attention")?.into_iter().enumerate() {
        let attrs = cx.attrs(node)?;
        let numbered: Vec<(&str, Attr)> = attrs
            .iter()
            .map(|(name, attr)| match name.as_str() {
                "layer" => ("layer", Attr::Int(layer as i64)),
                name => (name, attr.clone()),
            })
            .collect();
        if attrs.iter().zip(&numbered).all(|((_, a), (_, b))| a == b) {
            continue;
        }
        let (inputs, old) = (cx.inputs_of(node)?, cx.output(node)?);
        let new = cx.add("attention", &inputs, &numbered)?;
        cx.replace_uses(old, new)?;
        cx.remove(node)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::cosine;

    #[test]
    fn cosines_are_of_angles() {
        assert!((cosine(&[1.0, 0.0], &[2.0, 0.0]) - 1.0).abs() < 1e-12);
        assert!(cosine(&[1.0, 0.0], &[0.0, 3.0]).abs() < 1e-12);
        assert_eq!(cosine(&[0.0], &[1.0]), 1.0);
    }
}
