//! Calibration: what the inputs of a model's layers are like on real text.
//!
//! The driver's [`attar_pass::Calibrator`]. Text is prepared when a pass first asks, so that a compile whose passes ask
//! nothing costs nothing. The model is run by a dense f32 evaluator over the graph (`dense.rs`, `sequential.rs`), not by
//! compiled kernels: they quantize activations, and a graph half of whose weights are encoded would have to be lowered
//! anew for every layer.

mod activations;
mod adjoint;
mod backward;
mod dense;
mod gains;
mod part;
mod probe;
mod sampled;
mod saved;
mod sequential;
#[cfg(test)]
mod tests;
mod text;
mod token_weights;
mod whole_model;

use crate::error::{Error, Result};
use crate::inputs::InputFile;
use crate::origin::{CalibrationKind, CalibrationOrigin};
use attar_import::ModelInfo;
use attar_ir::{Graph, ValueId, WeightName, WeightStore};
use attar_pass::{Calibrator, GainGradient, InputDrift, InputStatistics, Journal, Part, PartGradient};
use attar_runtime::{ChatTemplate, Tokenizer};
use part::PartRun;
use probe::Probe;
use saved::SavedStatistics;
use std::ops::Range;
use std::path::{Path, PathBuf};
use text::Language;
use token_weights::TokenWeights;

use sequential::Counted;
pub(crate) use sequential::SequentialRun;
pub(crate) use text::problem;

pub use saved::{CalibrateOptions, CalibrationReport, Outliers, calibrate};

/// Where calibration text comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CalibrationSource {
    /// Passes that need calibration are refused, and those that profit do without.
    None,
    /// The model writes the text itself.
    Sampled,
    /// A text file, or a `.jsonl` file with `text` or `messages` in each line.
    File(PathBuf),
    /// Statistics written by `attar calibrate`.
    Saved(PathBuf),
}

/// How a model is calibrated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CalibrationOptions {
    pub source: CalibrationSource,
    /// Most windows of text.
    pub windows: usize,
    /// Tokens of a window; shortened to the longest context the model was made for.
    pub context: usize,
    /// Bytes of intermediate values that stay in memory; what is more goes to an unnamed temporary file.
    pub max_memory: u64,
}

impl CalibrationOptions {
    /// Windows that a second moment of a few thousand columns needs to be more than noise.
    pub const WINDOWS: usize = 96;
    /// Tokens that show most of what attention does in a short text.
    pub const CONTEXT: usize = 512;
    /// Memory that every machine has.
    pub const MAX_MEMORY: u64 = 256 << 20;

    /// The default amount of text from a source.
    pub fn new(source: CalibrationSource) -> CalibrationOptions {
        CalibrationOptions {
            source,
            windows: CalibrationOptions::WINDOWS,
            context: CalibrationOptions::CONTEXT,
            max_memory: CalibrationOptions::MAX_MEMORY,
        }
    }

    /// Checks what can be checked without the model.
    pub(crate) fn check(&self) -> Result<()> {
        if !(1..=1 << 20).contains(&self.windows) {
            return Err(Error::option("--calibration-windows", "must be from 1 to 1048576"));
        }
        if !(2..=1 << 20).contains(&self.context) {
            return Err(Error::option("--calibration-context", "must be from 2 to 1048576"));
        }
        Ok(())
    }
}

/// What a model is, as far as calibration asks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Subject<'a> {
    pub(crate) source: &'a Path,
    pub(crate) info: &'a ModelInfo,
    pub(crate) inputs: &'a [InputFile],
    pub(crate) tokenizer_json: Option<&'a str>,
    pub(crate) chat_template: Option<&'a str>,
}

impl Subject<'_> {
    /// BLAKE3 over the hashes of the files the model is read from, hexadecimal.
    pub(crate) fn hash(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        self.inputs.iter().for_each(|i| {
            hasher.update(i.blake3.as_bytes());
        });
        hasher.finalize().to_hex().to_string()
    }

    fn language(&self) -> attar_pass::Result<Language> {
        let json = self.tokenizer_json.ok_or_else(|| {
            problem("the checkpoint has no tokenizer, so text means nothing to it".to_owned())
        })?;
        let tokenizer = Tokenizer::from_json(json).map_err(|e| problem(e.to_string()))?;
        let text_of = |name: &str| self.info.special_tokens.get(name).cloned().unwrap_or_default();
        let template = match self.chat_template {
            None => None,
            Some(source) => {
                let template =
                    ChatTemplate::new(source.to_owned(), text_of("bos_token"), text_of("eos_token"));
                Some(template.map_err(|e| problem(e.to_string()))?)
            }
        };
        Ok(Language { tokenizer, template })
    }

    /// Windows of tokens from text or from the model itself.
    fn windows(
        &self,
        options: &CalibrationOptions,
        progress: &mut dyn FnMut(&str, u64, u64),
    ) -> attar_pass::Result<Vec<Vec<u32>>> {
        let context = options.context.min(self.info.context_length);
        let windows = match &options.source {
            CalibrationSource::None | CalibrationSource::Saved(_) => Vec::new(),
            CalibrationSource::Sampled => {
                sampled::windows_of_model(self.source, self.info, context, options.windows, progress)?
            }
            CalibrationSource::File(path) => {
                text::windows_of_file(path, &self.language()?, context, options.windows)?
            }
        };
        if let Some(token) = windows.iter().flatten().find(|t| **t as usize >= self.info.vocab) {
            let vocab = self.info.vocab;
            return Err(problem(format!("the tokenizer gives token {token}, and the model has {vocab}")));
        }
        Ok(windows)
    }
}

/// BLAKE3 of windows of tokens, hexadecimal.
fn hash_of(windows: &[Vec<u32>]) -> String {
    let mut hasher = blake3::Hasher::new();
    for window in windows {
        hasher.update(&(window.len() as u64).to_le_bytes());
        window.iter().for_each(|t| {
            hasher.update(&t.to_le_bytes());
        });
    }
    hasher.finalize().to_hex().to_string()
}

/// Windows of tokens as bytes, and back.
fn bytes_of(windows: &[Vec<u32>]) -> Vec<u8> {
    let words = windows.iter().flat_map(|w| std::iter::once(w.len() as u32).chain(w.iter().copied()));
    words.flat_map(u32::to_le_bytes).collect()
}

fn windows_of(bytes: &[u8]) -> Vec<Vec<u32>> {
    let mut words = bytes.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b));
    let mut windows = Vec::new();
    while let Some(len) = words.next() {
        windows.push(words.by_ref().take(len as usize).collect());
    }
    windows
}

/// Of so many windows one is looked at for extremes.
const SIZES_EVERY: usize = 4;

/// Keys of the journal.
const TEXT: &str = "calibration/text";
const TEXT_HASH: &str = "calibration/text hash";
const MATTERS: &str = "calibration/what predictions depend on";

/// The calibrator of a compile: prepares its text when it is first asked.
pub(crate) struct DriverCalibrator<'a> {
    journal: Option<&'a dyn Journal>,
    subject: Subject<'a>,
    options: &'a CalibrationOptions,
    state: State,
    /// Of the model before any of its weights was encoded.
    probe: Option<Probe>,
}

enum State {
    Fresh,
    Running(Box<Running>),
    Saved(SavedStatistics),
}

/// The model at work on text.
struct Running {
    windows: Vec<Vec<u32>>,
    text_hash: String,
    run: SequentialRun,
    /// Over some of the windows, once a pass has asked for extremes.
    of_sizes: Option<SequentialRun>,
    /// Of the uncompressed model, once a pass has asked what it gives.
    original: Option<SequentialRun>,
    /// The part entered last.
    part: Option<PartRun>,
    /// What predictions depend on, once a pass has asked.
    matters: Option<TokenWeights>,
    /// The power of what a token matters that it counts with; 0 when all count alike.
    power: f64,
}

impl<'a> DriverCalibrator<'a> {
    /// A calibrator, unless there is to be none.
    pub(crate) fn new(
        subject: Subject<'a>,
        options: &'a CalibrationOptions,
        journal: Option<&'a dyn Journal>,
    ) -> Option<DriverCalibrator<'a>> {
        let wanted = options.source != CalibrationSource::None;
        wanted.then_some(DriverCalibrator { journal, subject, options, state: State::Fresh, probe: None })
    }

    /// What the artifact depends on; `None` when no pass has asked, neither now nor before an interruption.
    pub(crate) fn origin(&self) -> Option<CalibrationOrigin> {
        let blake3 = match &self.state {
            State::Fresh => String::from_utf8(self.journal?.get(TEXT_HASH)?).ok()?,
            State::Running(running) => running.text_hash.clone(),
            State::Saved(saved) => saved.text_hash().to_owned(),
        };
        let source = match &self.options.source {
            CalibrationSource::None => return None,
            CalibrationSource::Sampled => CalibrationKind::Sampled,
            CalibrationSource::File(_) => CalibrationKind::File,
            CalibrationSource::Saved(_) => CalibrationKind::Saved,
        };
        let CalibrationOptions { windows, context, .. } = *self.options;
        Some(CalibrationOrigin { source, windows, context, blake3 })
    }
}

impl DriverCalibrator<'_> {
    /// Prepares text, or opens statistics, when first asked.
    fn prepare(&mut self, progress: &mut dyn FnMut(&str, u64, u64)) -> attar_pass::Result<()> {
        if let State::Fresh = self.state {
            self.state = match &self.options.source {
                CalibrationSource::Saved(path) => {
                    State::Saved(SavedStatistics::open(path, &self.subject.hash())?)
                }
                _ => {
                    let windows = match self.journal.and_then(|j| j.get(TEXT)) {
                        Some(bytes) => windows_of(&bytes),
                        None => self.subject.windows(self.options, progress)?,
                    };
                    let text_hash = hash_of(&windows);
                    if let Some(journal) = self.journal {
                        journal.put(TEXT, &bytes_of(&windows));
                    }
                    let run = SequentialRun::new(windows.clone(), self.options.max_memory / 2);
                    State::Running(Box::new(Running {
                        windows,
                        text_hash,
                        run,
                        of_sizes: None,
                        original: None,
                        part: None,
                        matters: None,
                        power: 0.0,
                    }))
                }
            };
            let text_hash = match &self.state {
                State::Running(running) => &running.text_hash,
                State::Saved(saved) => saved.text_hash(),
                State::Fresh => return Ok(()),
            };
            if let Some(journal) = self.journal {
                journal.put(TEXT_HASH, text_hash.as_bytes());
            }
        }
        Ok(())
    }
}

impl DriverCalibrator<'_> {
    /// Measures what predictions depend on, when there is text and it was not done.
    fn measure_matters(
        &mut self,
        graph: &Graph,
        weights: &WeightStore,
        progress: &mut dyn FnMut(&str, u64, u64),
    ) -> attar_pass::Result<()> {
        let State::Running(running) = &mut self.state else { return Ok(()) };
        if running.matters.is_some() {
            return Ok(());
        }
        let kept =
            self.journal.and_then(|j| j.get(MATTERS)).and_then(|bytes| TokenWeights::read(graph, &bytes));
        let matters = match kept {
            Some(matters) => matters,
            None => {
                let most = (whole_model::LOGITS, self.options.max_memory);
                let matters = TokenWeights::measure(&running.run, graph, weights, most, progress)?;
                if let Some(journal) = self.journal {
                    journal.put(MATTERS, &matters.bytes(graph));
                }
                matters
            }
        };
        running.matters = Some(matters);
        Ok(())
    }
}

impl Running {
    /// What tokens count at a value, window by window; nothing when all count alike.
    fn counts(&self, value: ValueId) -> Option<Vec<Vec<f32>>> {
        let matters = self.matters.as_ref().filter(|_| self.power > 0.0)?;
        matters.at(value, self.power)
    }
}

impl Calibrator for DriverCalibrator<'_> {
    fn divergence(
        &mut self,
        graph: &Graph,
        weights: &WeightStore,
        from: Option<ValueId>,
        changed: &[(WeightName, Vec<f32>)],
        progress: &mut dyn FnMut(&str, u64, u64),
    ) -> attar_pass::Result<f64> {
        self.prepare(progress)?;
        let State::Running(running) = &self.state else {
            return Err(problem(
                "saved statistics tell nothing of predictions; give text with --calibrate".to_owned(),
            ));
        };
        if self.probe.is_none() {
            self.probe = Some(Probe::new(&running.windows, graph, weights, self.options.max_memory)?);
        }
        match &mut self.probe {
            Some(probe) => probe.divergence(graph, weights, from, changed),
            None => Err(attar_pass::Error::new(attar_pass::ErrorKind::Uncalibrated)),
        }
    }

    fn weigh_tokens(
        &mut self,
        graph: &Graph,
        weights: &WeightStore,
        power: f64,
        progress: &mut dyn FnMut(&str, u64, u64),
    ) -> attar_pass::Result<bool> {
        self.prepare(progress)?;
        let State::Running(_) = &self.state else { return Ok(false) };
        if !whole_model::has_gradients(graph) {
            return Ok(false);
        }
        self.measure_matters(graph, weights, progress)?;
        if let State::Running(running) = &mut self.state {
            running.power = power;
        }
        Ok(true)
    }

    fn gain_gradient(
        &mut self,
        graph: &Graph,
        weights: &WeightStore,
        gains: &[(WeightName, Vec<f32>)],
        (windows, slopes): (Range<usize>, bool),
        progress: &mut dyn FnMut(&str, u64, u64),
    ) -> attar_pass::Result<Option<GainGradient>> {
        self.prepare(progress)?;
        self.probe = None;
        let State::Running(running) = &self.state else { return Ok(None) };
        if !whole_model::has_gradients(graph) {
            return Ok(None);
        }
        if windows.is_empty() {
            return Ok(Some(GainGradient::zeros(gains)));
        }
        let (run, most) = (&running.run, (whole_model::LOGITS, self.options.max_memory / 2));
        let windows = windows.start.min(run.count())..windows.end.min(run.count());
        gains::gain_gradient(run, graph, weights, most, gains, (windows, slopes)).map(Some)
    }

    fn window(
        &mut self,
        index: usize,
        progress: &mut dyn FnMut(&str, u64, u64),
    ) -> attar_pass::Result<(Vec<u32>, usize)> {
        self.prepare(progress)?;
        match &self.state {
            State::Running(running) => {
                Ok((running.windows.get(index).cloned().unwrap_or_default(), running.windows.len()))
            }
            _ => Err(attar_pass::Error::new(attar_pass::ErrorKind::Uncalibrated)),
        }
    }

    fn enter_part(
        &mut self,
        graph: &Graph,
        weights: &WeightStore,
        part: Part,
        progress: &mut dyn FnMut(&str, u64, u64),
    ) -> attar_pass::Result<bool> {
        self.prepare(progress)?;
        self.probe = None;
        let State::Running(running) = &mut self.state else { return Ok(false) };
        running.part = Some(PartRun::enter(&mut running.run, graph, weights, part, progress)?);
        Ok(true)
    }

    fn part_gradient(
        &mut self,
        graph: &Graph,
        weights: &WeightStore,
        changed: &[(WeightName, Vec<f32>)],
        batch: Option<u64>,
        progress: &mut dyn FnMut(&str, u64, u64),
    ) -> attar_pass::Result<PartGradient> {
        let outside = || problem("a part of the model was asked for that was not entered".to_owned());
        let State::Running(running) = &mut self.state else { return Err(outside()) };
        let Running { run, original, part, .. } = &mut **running;
        let part = part.as_mut().ok_or_else(outside)?;
        let original = original.get_or_insert_with(|| run.of_original(self.options.max_memory / 2));
        part.gradient((run, original), graph, weights, changed, batch, progress)
    }

    fn leave_part(&mut self) -> attar_pass::Result<()> {
        match &mut self.state {
            State::Running(running) => match running.part.take() {
                Some(part) => part.leave(&mut running.run),
                None => Ok(()),
            },
            _ => Ok(()),
        }
    }

    fn input_drift(
        &mut self,
        graph: &Graph,
        weights: &WeightStore,
        input: ValueId,
        sum: Option<ValueId>,
        progress: &mut dyn FnMut(&str, u64, u64),
    ) -> attar_pass::Result<Option<InputDrift>> {
        let State::Running(running) = &mut self.state else { return Ok(None) };
        let counts = running.counts(input);
        let Running { run, original, .. } = &mut **running;
        let original = original.get_or_insert_with(|| run.of_original(self.options.max_memory / 2));
        let input = Counted { value: input, counts: counts.as_deref() };
        run.input_drift(original, graph, weights, input, sum, progress).map(Some)
    }

    fn input_sizes(
        &mut self,
        graph: &Graph,
        weights: &WeightStore,
        input: ValueId,
        progress: &mut dyn FnMut(&str, u64, u64),
    ) -> attar_pass::Result<Vec<f32>> {
        self.prepare(progress)?;
        if let State::Running(running) = &mut self.state {
            let Running { windows, of_sizes, .. } = &mut **running;
            let some = || windows.iter().step_by(SIZES_EVERY).cloned().collect();
            let run = of_sizes.get_or_insert_with(|| SequentialRun::new(some(), self.options.max_memory / 2));
            return run.input_sizes(graph, weights, input, progress);
        }
        Ok(self.input_statistics(graph, weights, input, progress)?.max_abs())
    }

    fn input_statistics(
        &mut self,
        graph: &Graph,
        weights: &WeightStore,
        input: ValueId,
        progress: &mut dyn FnMut(&str, u64, u64),
    ) -> attar_pass::Result<InputStatistics> {
        self.prepare(progress)?;
        // Weights are about to change: nothing can be compared with the original after this.
        self.probe = None;
        if let State::Running(running) = &mut self.state {
            running.of_sizes = None;
        }
        match &mut self.state {
            State::Running(running) => {
                let counts = running.counts(input);
                let input = Counted { value: input, counts: counts.as_deref() };
                running.run.input_statistics(graph, weights, input, progress)
            }
            State::Saved(saved) => saved.input_statistics(graph, input),
            State::Fresh => Err(attar_pass::Error::new(attar_pass::ErrorKind::Uncalibrated)),
        }
    }
}
