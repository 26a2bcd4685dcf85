//! `quantize-rtn`: stores weight matrices in a format, rounding each weight to the nearest code.
//!
//! Before: `%w = weight @m : f32[N,K]`.   After: `%w = weight @m : n4[N,K]` (or another format).
//! Scales of the table formats, `n2` to `n6`, are searched so that the squared error of a row is small, without knowledge
//! of activations; see `scale_search.rs`. `w8` scales come from the largest magnitude of a group: its error is far below
//! what matters.
//! Where calibration is allowed, errors are weighed by the mean squares of the layer's inputs, layer by layer; elsewhere all
//! columns count alike.
//! Preconditions: weights are finite. Vectors (norm gains, biases) stay f32. A matrix whose K is no multiple of the
//! format's group gets bf16 instead and the metrics say so; when it is named without a wildcard that is an error.
//! Matrices an earlier step has encoded stay as they are.
//! Numerics: lossy (`f32`: exact).   Cost: up to 80 table lookups per weight for `n4` (136 for `n2`), one division for
//! `w8`.
//! Reference: Nagel et al. 2021, arXiv:2106.08295, section 3 (range setting by mean squared error).

use super::linear_inputs::{Site, sites};
use super::scale_search::{TableSearch, encode_w8_group};
use attar_format::formats::{BF16, F32};
use attar_format::{Encoded, FormatRef, PackedLayout, Value};
use attar_ir::{Elem, Graph, TensorType};
use attar_pass::plugin::in_compiler;
use attar_pass::{Error, ErrorKind, InputStatistics, PassCx, Result, Subject};
use attar_plugin::{About, Context, Numerics, Pass, Phase};
use rayon::prelude::*;

/// Formats whose codes a pass has to choose.
pub(super) const CODED_FORMATS: [&str; 6] = ["w8", "n6", "n5", "n4", "n3", "n2"];

attar_plugin::options! {
    /// Options of the pass.
    pub(crate) struct Options {
        /// weight format the matrices get
        pub(crate) format: String, of ["f32", "bf16", "w8", "n6", "n5", "n4", "n3", "n2"];
        /// search scales with a small squared error (`n2` to `n6`); else take those that clip nothing
        pub(crate) search: bool = true;
        /// weigh errors by how large the layer's inputs are, where calibration is allowed (`n2` to `n6`)
        pub(crate) importance: bool = true;
    }
}

/// See the file's header.
pub(crate) struct QuantizeRtn;

attar_plugin::plugin! { passes: [QuantizeRtn] }

impl Pass for QuantizeRtn {
    type Options = Options;

    const ABOUT: About = About {
        name: "quantize-rtn",
        summary: "stores matrices in a weight format, rounding to the nearest code after a search for scales",
        phase: Phase::Compress,
        numerics: Numerics::Lossy,
        takes_tensors: true,
    };

    fn run(options: &Options, cx: &Context<'_>) -> attar_plugin::Result<()> {
        let format = attar_format::by_name(&options.format).unwrap_or(&F32);
        let rtn = Rtn { format, search: options.search, importance: options.importance };
        // What `Context::set_format` does for other passes is this.
        in_compiler(cx, |graph, cx| rtn.run(graph, cx))
    }
}

struct Rtn {
    format: FormatRef,
    search: bool,
    importance: bool,
}

impl Rtn {
    fn run(&self, graph: &mut Graph, cx: &mut PassCx<'_>) -> Result<()> {
        let subjects = cx.subjects(graph);
        let size = |graph: &Graph, s: &Subject| elements(graph.ty(first_value(s)));
        let total: u64 = subjects.iter().map(|s| size(graph, s)).sum();
        let weighs = self.search && self.importance && self.format.table().is_some() && cx.is_calibrated();
        let sites = if weighs { sites(graph, subjects) } else { vec![Site { inputs: Vec::new(), subjects }] };
        let mut done = 0;
        for site in sites {
            let mut importance = None;
            for subject in &site.subjects {
                cx.progress(&subject.name, done, total);
                let at_tensor = |e: Error| e.at_tensor(&subject.name);
                let size = size(graph, subject);
                if let Some(suitable) = suitable(self.format, cx, subject).map_err(at_tensor)? {
                    if importance.is_none() && suitable.format == self.format {
                        importance =
                            site.statistics(graph, cx).map_err(at_tensor)?.map(|s| importance_of(&s));
                    }
                    self.quantize(graph, cx, subject, suitable, importance.as_deref()).map_err(at_tensor)?;
                }
                done += size;
            }
        }
        cx.progress("", done, total);
        Ok(())
    }
}

pub(super) fn first_value(subject: &Subject) -> attar_ir::ValueId {
    crate::pattern::out(subject.nodes[0])
}

pub(super) fn elements(ty: &TensorType) -> u64 {
    ty.shape.iter().filter_map(|d| d.fixed()).map(|d| d as u64).product()
}

impl Rtn {
    fn quantize(
        &self,
        graph: &mut Graph,
        cx: &mut PassCx<'_>,
        subject: &Subject,
        suitable: Suitable,
        importance: Option<&[f32]>,
    ) -> Result<()> {
        let Suitable { format, n, k, reason } = suitable;
        if format == &F32 || !cx.rewrite(&subject.name) {
            return Ok(());
        }
        let weights = cx.weights.read_f32(&subject.name)?;
        let encoded = encode(format, n, k, self.search, &weights, importance)?;
        let error = relative_rmse(&weights, &encoded);
        let bytes = PackedLayout::new(format, n, k).map_or(0, |l| l.total_bytes());
        let name = cx.weights.set_encoded(&subject.name, &encoded)?;
        let elem = cx.weights.info(&name)?.elem;
        for node in &subject.nodes {
            graph.set_weight(*node, name.clone(), TensorType::new(elem, [n.into(), k.into()]))?;
        }
        cx.metric(
            &subject.name,
            [
                ("format", format.name.into()),
                ("relative_rmse", error.into()),
                ("bits_per_weight", (8.0 * bytes as f64 / (n as f64 * k as f64)).into()),
                ("bytes", (bytes as u64).into()),
            ],
        );
        if let Some(reason) = reason {
            cx.refused(&subject.name, &reason);
        }
        Ok(())
    }
}

/// What a squared error in each column counts: the mean square of what the column meets, relative to the mean over all
/// columns, and a little for what calibration has not seen.
fn importance_of(statistics: &InputStatistics) -> Vec<f32> {
    let squares = statistics.mean_squares();
    let mean = squares.iter().map(|v| f64::from(*v)).sum::<f64>() / squares.len().max(1) as f64;
    if mean <= 0.0 {
        return vec![1.0; squares.len()];
    }
    squares.iter().map(|v| (f64::from(*v) / mean) as f32 + 0.01).collect()
}

/// What a matrix can be stored as.
#[derive(Clone, Debug)]
pub(super) struct Suitable {
    /// The format that was asked for, or bf16 where it does not fit.
    pub(super) format: FormatRef,
    pub(super) n: usize,
    pub(super) k: usize,
    /// Why it is not the format that was asked for.
    pub(super) reason: Option<String>,
}

/// Whether a weight can be stored in a format; `None` when it is to stay as it is.
///
/// # Errors
/// [`ErrorKind::FormatDoesNotFit`] when it cannot and was named one by one.
pub(super) fn suitable(
    format: FormatRef,
    cx: &mut PassCx<'_>,
    subject: &Subject,
) -> Result<Option<Suitable>> {
    let does_not_fit =
        |problem: String| Err(Error::new(ErrorKind::FormatDoesNotFit { format: format.name, problem }));
    let info = cx.weights.info(&subject.name)?.clone();
    if let Elem::Coded(has) = info.elem {
        let problem = format!("an earlier pass has stored it as {}", has.name);
        if has == format {
            return Ok(None);
        }
        if subject.explicit {
            return does_not_fit(problem);
        }
        cx.refused(&subject.name, &problem);
        return Ok(None);
    }
    let [n, k] = info.shape[..] else {
        // That vectors stay as they are is no news, unless one was asked for.
        let problem = "only matrices are compressed".to_owned();
        return if subject.explicit { does_not_fit(problem) } else { Ok(None) };
    };
    if k.is_multiple_of(format.group) {
        return Ok(Some(Suitable { format, n, k, reason: None }));
    }
    let problem = format!("its rows of {k} are no multiple of {}", format.group);
    if subject.explicit {
        return does_not_fit(problem);
    }
    let reason = format!("not {}: {problem}", format.name);
    Ok(Some(Suitable { format: &BF16, n, k, reason: Some(reason) }))
}

/// Encodes a matrix `[n, k]`, `k` being a multiple of the format's group. `importance` says what a squared error in each
/// column counts; only table formats heed it.
///
/// # Errors
/// [`ErrorKind::NotFinite`], [`ErrorKind::OutOfRange`].
pub(super) fn encode(
    format: FormatRef,
    n: usize,
    k: usize,
    search: bool,
    weights: &[f32],
    importance: Option<&[f32]>,
) -> Result<Encoded> {
    check_finite(weights, k)?;
    let does_not_fit = |e: attar_format::FormatError| {
        Error::new(ErrorKind::FormatDoesNotFit { format: format.name, problem: e.to_string() })
    };
    let encoded = match format.value {
        Value::Float(_) => Encoded::from_f32(format, n, k, weights).map_err(does_not_fit)?,
        Value::Int8 | Value::Table(_) => {
            let coder = RowCoder::new(format, search)?;
            let mut out = Encoded::zeros(format, n, k).map_err(does_not_fit)?;
            let (groups, has_rows) = (out.groups(), !out.row_scale.is_empty());
            let alike = vec![1.0; if importance.is_some() { 0 } else { k }];
            let importance = importance.unwrap_or(&alike);
            let mut row_scale = std::mem::take(&mut out.row_scale);
            row_scale.resize(n, 0.0);
            let rows = out.codes.par_chunks_mut(k).zip(out.field.par_chunks_mut(groups));
            rows.zip(row_scale.par_iter_mut()).zip(weights.par_chunks(k)).enumerate().try_for_each(
                |(row, (((codes, fields), scale), w))| {
                    *scale = coder
                        .encode(w, importance, codes, fields)
                        .map_err(|w| out_of_range(format, row, w))?;
                    Ok::<(), Error>(())
                },
            )?;
            if has_rows {
                out.row_scale = row_scale;
            }
            out
        }
    };
    // Rounding up near the largest f32 can leave the range of numbers.
    let bad = (0..n).into_par_iter().find_first(|&row| {
        let mut decoded = vec![0.0; k];
        encoded.decode_row(row, &mut decoded);
        decoded.iter().any(|v| !v.is_finite())
    });
    match bad {
        Some(row) => Err(out_of_range(format, row, &weights[row * k..(row + 1) * k])),
        None => Ok(encoded),
    }
}

/// Chooses scales and codes of single rows by plain rounding.
pub(super) struct RowCoder {
    /// `None` for formats of plain integers.
    pub(super) search: Option<TableSearch>,
}

impl RowCoder {
    /// For a format with codes; `search` as in [`encode`].
    ///
    /// # Errors
    /// [`ErrorKind::FormatDoesNotFit`].
    pub(super) fn new(format: FormatRef, search: bool) -> Result<RowCoder> {
        let table_search = match (format.value, TableSearch::for_format(format)) {
            (Value::Int8, _) => None,
            (_, Some(table_search)) => Some(if search { table_search } else { table_search.plain() }),
            _ => {
                let problem = "its scales are of a kind this pass does not know".to_owned();
                return Err(Error::new(ErrorKind::FormatDoesNotFit { format: format.name, problem }));
            }
        };
        Ok(RowCoder { search: table_search })
    }

    /// Encodes a row; gives its scale, 1 in formats without. What is out of range is given back.
    pub(super) fn encode<'w>(
        &self,
        weights: &'w [f32],
        importance: &[f32],
        codes: &mut [u8],
        fields: &mut [u16],
    ) -> std::result::Result<f32, &'w [f32]> {
        let Some(search) = &self.search else {
            let group = weights.len() / fields.len();
            let parts = codes.chunks_exact_mut(group).zip(weights.chunks_exact(group));
            for ((codes, w), field) in parts.zip(fields) {
                *field = encode_w8_group(w, codes).ok_or(w)?;
            }
            return Ok(1.0);
        };
        Ok(search.encode_row_weighted(weights, importance, codes, fields))
    }
}

/// Refuses weights that are no numbers.
pub(super) fn check_finite(weights: &[f32], k: usize) -> Result<()> {
    match weights.iter().position(|w| !w.is_finite()) {
        None => Ok(()),
        Some(at) => Err(Error::new(ErrorKind::NotFinite { value: weights[at], row: at / k, column: at % k })),
    }
}

pub(super) fn out_of_range(format: FormatRef, row: usize, weights: &[f32]) -> Error {
    let value = weights.iter().fold(0.0f32, |m, w| if w.abs() > m.abs() { *w } else { m });
    Error::new(ErrorKind::OutOfRange { format: format.name, value, row })
}

/// `|w - decoded| / |w|` over the whole matrix; 0 for a zero matrix.
pub(super) fn relative_rmse(weights: &[f32], encoded: &Encoded) -> f64 {
    let k = encoded.k;
    let per_row: Vec<(f64, f64)> = weights
        .par_chunks(k)
        .enumerate()
        .map(|(row, w)| {
            let mut decoded = vec![0.0; k];
            encoded.decode_row(row, &mut decoded);
            w.iter().zip(&decoded).fold((0.0, 0.0), |(error, square), (w, d)| {
                let (w, d) = (f64::from(*w), f64::from(*d));
                (error + (w - d) * (w - d), square + w * w)
            })
        })
        .collect();
    // Added in order: the sum must not depend on threads.
    let (error, square) = per_row.iter().fold((0.0, 0.0), |(e, s), (a, b)| (e + a, s + b));
    if square > 0.0 { (error / square).sqrt() } else { 0.0 }
}
