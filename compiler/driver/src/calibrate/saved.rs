//! Statistics in a file: made once by `attar calibrate`, used by any number of compiles.
//!
//! A safetensors file. For each distinct linear input, named after the first weight that meets it, it holds
//! `NAME.second_moment`, f32 `[K (K + 1) / 2]`, the lower half of `XᵀX` row by row, and of each channel `NAME.minimum` and
//! `NAME.maximum`, f32 `[K]`, and the sum of the fourth powers `NAME.fourth_moment`, f64 `[K]`.
//! Its metadata name the model (BLAKE3 over the hashes of its files), the text (BLAKE3 of the tokens) and the number of
//! tokens. Statistics are those of the model as it is, not of a compressed prefix.

use super::text::problem;
use super::{CalibrationOptions, CalibrationSource, Subject, hash_of, sequential::SequentialRun};
use crate::error::{Error, ErrorKind, Result};
use crate::inputs::hash_files;
use attar_ir::{Graph, OpKind, ValueId};
use attar_pass::{InputStatistics, Phase};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

const FORMAT: &str = "attar calibration 2";
/// What the name of every version begins with.
const FAMILY: &str = "attar calibration ";
const MOMENT: &str = ".second_moment";
const MINIMUM: &str = ".minimum";
const MAXIMUM: &str = ".maximum";
const FOURTH: &str = ".fourth_moment";

/// What to calibrate, on what, and where to.
#[derive(Clone, Debug)]
pub struct CalibrateOptions {
    /// As in [`crate::CompileOptions`].
    pub source: PathBuf,
    pub calibration: CalibrationOptions,
    /// The file; replaced when it exists.
    pub out: PathBuf,
    /// As in [`crate::CompileOptions`].
    pub threads: Option<usize>,
}

/// What a calibration made.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CalibrationReport {
    pub model: String,
    pub model_hash: String,
    pub text_hash: String,
    pub windows: usize,
    pub tokens: u64,
    /// Distinct linear inputs.
    pub inputs: usize,
    pub bytes: u64,
    /// The inputs in which single channels stand out most, worst first.
    pub outliers: Vec<Outliers>,
    pub seconds: f64,
    /// Largest resident memory of the process, in bytes.
    pub peak_memory_bytes: Option<u64>,
}

/// Runs a model over text and writes the statistics of all its linear inputs. `progress` is told what is being done, and
/// how many of how many inputs are done.
///
/// # Errors
/// Those of importing, of text, and of writing.
pub fn calibrate(
    options: &CalibrateOptions,
    progress: &mut (dyn FnMut(&str, u64, u64) + Send),
) -> Result<CalibrationReport> {
    options.calibration.check()?;
    if matches!(options.calibration.source, CalibrationSource::None | CalibrationSource::Saved(_)) {
        return Err(Error::option("--calibrate", "give a text, or let the model write one"));
    }
    crate::session::with_threads(options.threads, || run(options, progress))
}

fn run(
    options: &CalibrateOptions,
    progress: &mut (dyn FnMut(&str, u64, u64) + Send),
) -> Result<CalibrationReport> {
    let started = std::time::Instant::now();
    let imported =
        attar_import::open(&options.source).map_err(|e| Error::new(Phase::Import, ErrorKind::Import(e)))?;
    let inputs = hash_files(&imported.source.files)?;
    let subject = Subject {
        source: &options.source,
        info: &imported.model,
        inputs: &inputs,
        tokenizer_json: imported.tokenizer_json.as_deref(),
        chat_template: imported.chat_template.as_deref(),
    };
    let graph = &imported.graph;
    let windows = subject.windows(&options.calibration, progress)?;
    let (count, text_hash) = (windows.len(), hash_of(&windows));
    let mut sequence = SequentialRun::new(windows, options.calibration.max_memory);
    let sites = linear_inputs(graph);
    let mut tensors: Vec<(String, Dtype, Vec<u8>)> = Vec::new();
    let mut outliers = Vec::new();
    for (done, (name, value)) in (0u64..).zip(&sites) {
        progress(name, done, sites.len() as u64);
        let s = sequence.input_statistics(graph, &imported.weights, (*value).into(), &mut |_, _, _| {})?;
        let lower = (0..s.width).flat_map(|i| &s.second_moment[i * s.width..=i * s.width + i]);
        let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let lower = lower.flat_map(|v| v.to_le_bytes()).collect();
        let fourth = s.fourth_moment.iter().flat_map(|v| v.to_le_bytes()).collect();
        tensors.push((format!("{name}{MOMENT}"), Dtype::F32, lower));
        tensors.push((format!("{name}{MINIMUM}"), Dtype::F32, bytes(&s.minimum)));
        tensors.push((format!("{name}{MAXIMUM}"), Dtype::F32, bytes(&s.maximum)));
        tensors.push((format!("{name}{FOURTH}"), Dtype::F64, fourth));
        outliers.push(Outliers::of(name, &s));
    }
    let about = About {
        format: FORMAT.to_owned(),
        model: subject.hash(),
        text: text_hash.clone(),
        tokens: sequence.tokens(),
    };
    let about = serde_json::to_string(&about).map_err(|e| {
        let problem = format!("statistics cannot be described: {e}");
        Error::new(Phase::Compress, ErrorKind::Bug { problem })
    })?;
    // One entry: several would be written in any order.
    let metadata = HashMap::from([(ABOUT.to_owned(), about)]);
    let broken = |e: safetensors::SafeTensorError| {
        Error::new(Phase::Compress, ErrorKind::Bug { problem: format!("statistics cannot be written: {e}") })
    };
    let views = tensors.iter().map(|(name, dtype, bytes)| {
        let count = bytes.len() * 8 / dtype.bitsize();
        TensorView::new(*dtype, vec![count], bytes).map(|view| (name.as_str(), view))
    });
    let views = views.collect::<std::result::Result<BTreeMap<_, _>, _>>().map_err(broken)?;
    let bytes = safetensors::serialize(views, Some(metadata)).map_err(broken)?;
    write_whole(&options.out, &bytes)
        .map_err(|e| Error::io(Phase::Compress, "write the statistics", &options.out, e))?;
    Ok(CalibrationReport {
        model: imported.model.name.clone(),
        model_hash: subject.hash(),
        text_hash,
        windows: count,
        tokens: sequence.tokens(),
        inputs: sites.len(),
        bytes: bytes.len() as u64,
        outliers: worst(outliers),
        seconds: started.elapsed().as_secs_f64(),
        peak_memory_bytes: crate::memory::peak_bytes(),
    })
}

/// Inputs that a report names.
const WORST: usize = 8;

/// How far single channels of an input stand out.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Outliers {
    /// The first weight that meets the input.
    pub input: String,
    /// The channel of the largest magnitude, and that over the root mean square of all channels.
    pub channel: usize,
    pub largest_over_rms: f64,
    /// Largest kurtosis of a single channel, and that of all values together; 3 is that of normal numbers.
    pub channel_kurtosis: f64,
    pub kurtosis: f64,
}

impl Outliers {
    fn of(name: &str, s: &InputStatistics) -> Outliers {
        let mut top = (0, 0.0f32);
        for (channel, value) in s.max_abs().into_iter().enumerate() {
            if value > top.1 {
                top = (channel, value);
            }
        }
        let rms = s.layer_square().sqrt();
        Outliers {
            input: name.to_owned(),
            channel: top.0,
            largest_over_rms: if rms > 0.0 { f64::from(top.1) / rms } else { 0.0 },
            channel_kurtosis: s.kurtosis().into_iter().fold(0.0, f64::max),
            kurtosis: s.layer_kurtosis(),
        }
    }
}

/// The worst, in order.
fn worst(mut all: Vec<Outliers>) -> Vec<Outliers> {
    all.sort_by(|a, b| b.largest_over_rms.total_cmp(&a.largest_over_rms));
    all.truncate(WORST);
    all
}

/// Writes a file that is there whole or not at all.
fn write_whole(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    std::io::Write::write_all(&mut file, bytes)?;
    file.persist(path).map(|_| ()).map_err(|e| e.error)
}

/// Every distinct input of a linear layer, in the order they are computed, by the first weight that meets it.
fn linear_inputs(graph: &Graph) -> Vec<(String, ValueId)> {
    let mut found: Vec<(String, ValueId)> = Vec::new();
    for id in graph.topo() {
        if let OpKind::Linear(_) = graph.op(id)
            && let [x, w, ..] = graph.inputs_of(id)[..]
            && let OpKind::Weight(weight) = graph.op(w.node)
            && !found.iter().any(|(_, v)| *v == x)
        {
            found.push((weight.name.to_string(), x));
        }
    }
    let time: BTreeMap<_, _> = graph.topo().into_iter().enumerate().map(|(i, id)| (id, i)).collect();
    found.sort_by_key(|(_, v)| time.get(&v.node).copied());
    found
}

/// Statistics read from a file, looked up as passes ask.
pub(crate) struct SavedStatistics {
    path: PathBuf,
    bytes: Vec<u8>,
    tokens: u64,
    text_hash: String,
}

/// What the file says of itself, in one entry of its metadata.
#[derive(Serialize, Deserialize)]
struct About {
    format: String,
    model: String,
    text: String,
    tokens: u64,
}

const ABOUT: &str = "attar";

impl SavedStatistics {
    /// Opens a file that must be of the model with that hash.
    ///
    /// # Errors
    /// When it cannot be read, is no such file, or is of another model.
    pub(crate) fn open(path: &Path, model_hash: &str) -> attar_pass::Result<SavedStatistics> {
        let name = path.display();
        let bytes = std::fs::read(path).map_err(|e| problem(format!("{name}: cannot read it: {e}")))?;
        let other = || problem(format!("{name}: is no file of `attar calibrate`"));
        let (_, metadata) = SafeTensors::read_metadata(&bytes).map_err(|_| other())?;
        let about = metadata.metadata().as_ref().and_then(|m| m.get(ABOUT)).ok_or_else(other)?;
        let about: About = serde_json::from_str(about).map_err(|_| other())?;
        if about.format != FORMAT {
            return Err(match about.format.strip_prefix(FAMILY) {
                Some(version) => problem(format!(
                    "{name}: is version {version} of the statistics, and this program reads {}; run `attar calibrate` again",
                    &FORMAT[FAMILY.len()..]
                )),
                None => other(),
            });
        }
        let of_model = about.model;
        if of_model != model_hash {
            let problem_text = format!(
                "{name}: was made from another model (its files hash to {}, these to {}); run `attar calibrate` again",
                short(&of_model),
                short(model_hash)
            );
            return Err(problem(problem_text));
        }
        let (tokens, text_hash) = (about.tokens, about.text);
        SafeTensors::deserialize(&bytes).map_err(|_| other())?;
        Ok(SavedStatistics { path: path.to_owned(), bytes, tokens, text_hash })
    }

    pub(crate) fn text_hash(&self) -> &str {
        &self.text_hash
    }

    /// Statistics of a value, found by the weights that meet it.
    pub(crate) fn input_statistics(
        &self,
        graph: &Graph,
        input: ValueId,
    ) -> attar_pass::Result<InputStatistics> {
        let other = |what: &str| problem(format!("{}: {what}", self.path.display()));
        let width = graph.ty(input).last().unwrap_or(0);
        let tensors = SafeTensors::deserialize(&self.bytes).map_err(|e| other(&e.to_string()))?;
        let readers = graph.users(input).into_iter().filter_map(|(user, _)| match graph.op(user) {
            OpKind::Linear(_) => graph.inputs_of(user).get(1).copied(),
            _ => None,
        });
        for weight in readers {
            let OpKind::Weight(w) = graph.op(weight.node) else { continue };
            let numbers = |suffix: &str, count: usize| {
                let tensor = tensors.tensor(&format!("{}{suffix}", w.name)).ok()?;
                let data: Vec<f32> =
                    tensor.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
                (tensor.dtype() == Dtype::F32 && data.len() == count).then_some(data)
            };
            let lower = numbers(MOMENT, width * (width + 1) / 2);
            let (minimum, maximum) = (numbers(MINIMUM, width), numbers(MAXIMUM, width));
            let fourth = tensors.tensor(&format!("{}{FOURTH}", w.name)).ok().and_then(|tensor| {
                let data = tensor.data().as_chunks::<8>().0;
                let data: Vec<f64> = data.iter().map(|b| f64::from_le_bytes(*b)).collect();
                (tensor.dtype() == Dtype::F64 && data.len() == width).then_some(data)
            });
            let (Some(lower), Some(minimum), Some(maximum), Some(fourth_moment)) =
                (lower, minimum, maximum, fourth)
            else {
                continue;
            };
            let mut s = InputStatistics {
                n_tokens: self.tokens,
                minimum,
                maximum,
                fourth_moment,
                ..InputStatistics::zeros(width)
            };
            let places = (0..width).flat_map(|i| (0..=i).map(move |j| (i, j)));
            for ((i, j), v) in places.zip(lower) {
                s.second_moment[i * width + j] = v;
                s.second_moment[j * width + i] = v;
            }
            return Ok(s);
        }
        Err(other(&format!("has nothing of %{}", graph.node(input.node).name)))
    }
}

fn short(hash: &str) -> &str {
    hash.get(..12).unwrap_or(hash)
}
