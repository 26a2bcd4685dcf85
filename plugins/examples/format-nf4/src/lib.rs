//! `nf4`: a weight format of a plugin's own, by the description of its layout, and the pass that stores matrices in it.
//!
//! Codes are 4-bit indices into the quantiles of a normal distribution (NF4: Dettmers et al. 2023, arXiv:2305.14314), as
//! multiples of 1/127, with one bf16 scale per 32 weights: 4.5 bits per weight. Encoder, decoder and kernels follow from
//! [`NF4`]; artifacts hold the description, so they run without the plugin.

use attar_plugin::{About, Codes, Context, ErrorKind, Format, Numerics, Pass, Phase, Result, Scale};

/// The layout.
pub const NF4: Format = Format {
    name: "nf4",
    source: "Dettmers et al. 2023, arXiv:2305.14314",
    codes: Codes::Table {
        bits: 4,
        entries: &[-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127],
        shift: 0,
    },
    group: 32,
    scale: Scale::Bf16,
};

attar_plugin::options! {
    /// Options of the pass.
    pub struct Options {
        /// weigh errors by how large the layer's inputs are, where calibration is allowed
        pub weigh: bool = true;
    }
}

/// See the crate's documentation.
#[derive(Debug)]
pub struct QuantizeNf4;

attar_plugin::plugin! { passes: [QuantizeNf4], formats: [NF4] }

impl Pass for QuantizeNf4 {
    type Options = Options;

    const ABOUT: About = About {
        name: "quantize-nf4",
        summary: "stores matrices in the 4-bit format nf4",
        phase: Phase::Compress,
        numerics: Numerics::Lossy,
        takes_tensors: true,
    };

    fn run(options: &Options, cx: &Context<'_>) -> Result<()> {
        let wanted = cx.tensors()?;
        let total = wanted.len() as u64;
        // Layers in the order of the graph, so that calibration runs over the model once.
        for node in cx.nodes_of("linear")? {
            let inputs = cx.inputs_of(node)?;
            let Some(name) = cx.weight_of(inputs[1])? else { continue };
            let Some(at) = wanted.iter().position(|w| *w == name) else { continue };
            cx.progress(&name, at as u64, total)?;
            let info = cx.tensor(&name)?;
            let fits = info.elem == "f32" && info.shape.len() == 2 && info.shape[1].is_multiple_of(NF4.group);
            // What is named without a wildcard and does not fit is an error, which the host words.
            if !(fits || info.is_explicit) || !cx.rewrite(&name)? {
                continue;
            }
            let importance = if options.weigh {
                match cx.statistics(inputs[0]) {
                    Ok(statistics) => Some(statistics.mean_squares()),
                    Err(e) if e.kind == ErrorKind::Unavailable => None,
                    Err(e) => return Err(e),
                }
            } else {
                None
            };
            match importance {
                Some(importance) => cx.set_format_weighted(&name, NF4.name, &importance)?,
                None => cx.set_format(&name, NF4.name)?,
            };
        }
        Ok(())
    }
}
