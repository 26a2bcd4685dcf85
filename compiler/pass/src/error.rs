//! Errors of recipes, passes and their manager: what is wrong, where, and whose fault it is.

use std::fmt;

/// Result of anything in this crate, and of passes.
pub type Result<T> = std::result::Result<T, Error>;

/// An error and the place it belongs to.
#[derive(Debug, Clone, PartialEq)]
pub struct Error {
    /// Boxed, as is the site: errors are rare, results are everywhere.
    pub kind: Box<ErrorKind>,
    pub at: Box<Site>,
}

/// Where an error belongs.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Site {
    /// Recipe file, or what the text is called.
    pub file: Option<String>,
    /// Line and column in the recipe, from 1; columns count characters.
    pub line: Option<(usize, usize)>,
    /// Pass that was running.
    pub pass: Option<String>,
    /// Weight tensor.
    pub tensor: Option<String>,
}

/// Whose fault an error is; decides exit codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// The model or the options; the message says what to change.
    Input,
    /// The machine: disk, memory.
    Environment,
    /// Attar itself.
    Bug,
    /// Nobody's: the user stopped it.
    Cancelled,
}

/// What is wrong.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A recipe that is no TOML.
    Syntax { problem: String },
    /// A key of a recipe that has no meaning there, or a value of the wrong type.
    RecipeKey { key: String, problem: String, nearest: Option<String> },
    /// A recipe, `--print-after` or `--stop-after` names no registered pass.
    UnknownPass { name: String, nearest: Option<String> },
    /// `--stop-after` names neither a phase nor a pass of the pipeline.
    UnknownStop { name: String, nearest: Option<String> },
    /// `--quantize` names no preset.
    UnknownPreset { name: String, nearest: Option<String> },
    /// An option the pass does not declare.
    UnknownOption { pass: &'static str, name: String, nearest: Option<String>, known: Vec<&'static str> },
    /// An option of the wrong type.
    OptionType { pass: &'static str, option: &'static str, expected: String, got: &'static str },
    /// An option outside its range or list of words.
    OptionValue {
        pass: &'static str,
        option: &'static str,
        expected: String,
        got: String,
        nearest: Option<String>,
    },
    /// An option without a default was left out.
    MissingOption { pass: &'static str, option: &'static str, expected: String },
    /// `tensors` or `exclude` for a pass that concerns the whole graph.
    TakesNoTensors { pass: &'static str },
    /// A glob that cannot be read.
    GlobSyntax { glob: String, problem: String },
    /// A glob that matches no weight of the model.
    GlobMatchesNothing { glob: String, nearest: Option<String> },
    /// A pass of an earlier phase after one of a later phase.
    PhaseOrder { pass: &'static str, phase: &'static str, after: &'static str, after_phase: &'static str },
    /// A weight holds an infinity or a NaN.
    NotFinite { value: f32, row: usize, column: usize },
    /// A weight is too large for the format it should get.
    OutOfRange { format: &'static str, value: f32, row: usize },
    /// A tensor named one by one cannot get the format.
    FormatDoesNotFit { format: &'static str, problem: String },
    /// The pass needs statistics of activations, and the pipeline runs without calibration.
    Uncalibrated,
    /// Calibration cannot be done, or not with these values.
    Calibration { problem: String },
    /// A budget that is not said clearly, or that nothing keeps.
    Budget { problem: String },
    /// The machine refused what calibration needs: a file, memory.
    CalibrationIo { problem: String },
    /// The graph or a weight, as the IR sees it.
    Ir(attar_ir::Error),
    /// The verifier refused what a pass left behind. `before` and `after` are the graph's `.air` texts.
    Broken { pass: String, rewrite: Option<String>, problem: attar_ir::Error, before: String, after: String },
    /// Two passes of one name.
    DuplicatePass { name: &'static str },
    /// A pass of a plugin failed, or did what it must not. `call` is what it had asked of the host.
    Plugin { plugin: String, call: Option<String>, problem: String, family: Family },
    /// A pass wants to run the model, and the pipeline runs without one.
    NoModel,
    /// The checkpoint has no tokenizer that works.
    NoTokenizer { problem: String },
    /// The user stopped the compile.
    Cancelled,
}

impl Error {
    /// An error with no place yet.
    pub fn new(kind: ErrorKind) -> Error {
        Error { kind: Box::new(kind), at: Box::default() }
    }

    /// The same error at a line and column, unless it already has one.
    #[must_use]
    pub fn at_line(mut self, line: (usize, usize)) -> Error {
        self.at.line.get_or_insert(line);
        self
    }

    /// The same error in a file.
    #[must_use]
    pub fn in_file(mut self, file: &str) -> Error {
        self.at.file.get_or_insert_with(|| file.to_owned());
        self
    }

    /// The same error in a pass.
    #[must_use]
    pub fn in_pass(mut self, pass: &str) -> Error {
        self.at.pass.get_or_insert_with(|| pass.to_owned());
        self
    }

    /// The same error for a tensor.
    #[must_use]
    pub fn at_tensor(mut self, tensor: &str) -> Error {
        self.at.tensor.get_or_insert_with(|| tensor.to_owned());
        self
    }

    /// Whose fault it is.
    pub fn family(&self) -> Family {
        match &*self.kind {
            // A weight that cannot be read is the checkpoint's fault; anything else the IR refuses inside a pass
            // is a rewrite that should not have been tried.
            ErrorKind::Ir(e) => match e.kind {
                attar_ir::ErrorKind::Weight { .. } => Family::Input,
                _ => Family::Bug,
            },
            ErrorKind::Broken { .. } | ErrorKind::DuplicatePass { .. } => Family::Bug,
            ErrorKind::CalibrationIo { .. } => Family::Environment,
            ErrorKind::Plugin { family, .. } => *family,
            ErrorKind::Cancelled => Family::Cancelled,
            _ => Family::Input,
        }
    }

    /// The `.air` text that shows a bug: what the guilty pass was given.
    pub fn air(&self) -> Option<&str> {
        match &*self.kind {
            ErrorKind::Broken { before, .. } => Some(before),
            _ => None,
        }
    }
}

impl From<attar_ir::Error> for Error {
    fn from(e: attar_ir::Error) -> Error {
        Error::new(ErrorKind::Ir(e))
    }
}

/// The candidate most like `name`, if one is close enough to have been meant.
pub(crate) fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let mut best: Option<(f64, &str)> = None;
    for c in candidates {
        let score = strsim::normalized_damerau_levenshtein(name, c);
        if score > best.map_or(0.45, |(s, _)| s) {
            best = Some((score, c));
        }
    }
    best.map(|(_, c)| c.to_owned())
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(file) = &self.at.file {
            write!(f, "{file}:")?;
        }
        if let Some((line, col)) = self.at.line {
            write!(f, "{line}:{col}: ")?;
        } else if self.at.file.is_some() {
            f.write_str(" ")?;
        }
        if let Some(pass) = &self.at.pass {
            write!(f, "{pass}: ")?;
        }
        if let Some(tensor) = &self.at.tensor {
            write!(f, "tensor {tensor}: ")?;
        }
        self.kind.fmt(f)
    }
}

fn did_you_mean(f: &mut fmt::Formatter<'_>, nearest: &Option<String>) -> fmt::Result {
    match nearest {
        Some(n) => write!(f, "; did you mean {n}?"),
        None => Ok(()),
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ErrorKind::Syntax { problem } => write!(f, "not valid TOML: {problem}"),
            ErrorKind::RecipeKey { key, problem, nearest } => {
                write!(f, "{key}: {problem}")?;
                did_you_mean(f, nearest)
            }
            ErrorKind::UnknownPass { name, nearest } => {
                write!(f, "no pass is called {name}")?;
                did_you_mean(f, nearest)?;
                if nearest.is_none() { f.write_str("; `attar passes` lists them") } else { Ok(()) }
            }
            ErrorKind::UnknownStop { name, nearest } => {
                write!(f, "{name} is neither a phase nor a pass that runs")?;
                did_you_mean(f, nearest)
            }
            ErrorKind::UnknownPreset { name, nearest } => {
                write!(
                    f,
                    "no preset is called {name}; there are {}, and two of them as in n4/n6",
                    attar_format::formats::ALL.iter().map(|f| f.name).collect::<Vec<_>>().join(", ")
                )?;
                did_you_mean(f, nearest)
            }
            ErrorKind::UnknownOption { pass, name, nearest, known } => {
                write!(f, "{pass} has no option {name}")?;
                match (nearest, known.is_empty()) {
                    (Some(_), _) => did_you_mean(f, nearest),
                    (None, true) => f.write_str("; it has none"),
                    (None, false) => write!(f, "; it has {}", known.join(", ")),
                }
            }
            ErrorKind::OptionType { pass, option, expected, got } => {
                write!(f, "{pass}: option {option} must be {expected}, got {got}")
            }
            ErrorKind::OptionValue { pass, option, expected, got, nearest } => {
                write!(f, "{pass}: option {option} must be {expected}, got {got}")?;
                did_you_mean(f, nearest)
            }
            ErrorKind::MissingOption { pass, option, expected } => {
                write!(f, "{pass}: option {option} is missing; give {expected}")
            }
            ErrorKind::TakesNoTensors { pass } => {
                write!(f, "{pass} concerns the whole graph: remove `tensors` and `exclude`")
            }
            ErrorKind::GlobSyntax { glob, problem } => write!(f, "glob \"{glob}\": {problem}"),
            ErrorKind::GlobMatchesNothing { glob, nearest } => {
                write!(f, "\"{glob}\" matches no weight of this model")?;
                did_you_mean(f, nearest)
            }
            ErrorKind::PhaseOrder { pass, phase, after, after_phase } => write!(
                f,
                "{pass} belongs to phase {phase} and cannot run after {after} of phase {after_phase}; move it up"
            ),
            ErrorKind::NotFinite { value, row, column } => {
                write!(f, "holds {value} at row {row}, column {column}: the checkpoint is damaged")
            }
            ErrorKind::OutOfRange { format, value, row } => {
                write!(f, "row {row} holds {value}, which format {format} cannot represent; use f32 for it")
            }
            ErrorKind::FormatDoesNotFit { format, problem } => {
                write!(f, "cannot be stored as {format}: {problem}")
            }
            ErrorKind::Uncalibrated => f.write_str(
                "needs calibration text to weigh errors by; allow it with --calibrate, or use quantize-rtn",
            ),
            ErrorKind::Calibration { problem } | ErrorKind::CalibrationIo { problem } => {
                write!(f, "calibration: {problem}")
            }
            ErrorKind::Budget { problem } => f.write_str(problem),
            ErrorKind::Ir(e) => e.fmt(f),
            ErrorKind::Broken { pass, rewrite, problem, .. } => {
                write!(f, "bug in {pass}: ")?;
                if let Some(r) = rewrite {
                    write!(f, "after its last rewrite ({r}) ")?;
                }
                write!(f, "the graph is invalid: {problem}")
            }
            ErrorKind::DuplicatePass { name } => {
                write!(f, "bug: two passes are called {name}")
            }
            ErrorKind::Plugin { plugin, call: Some(call), problem, .. } => {
                write!(f, "plugin {plugin}, in {call}: {problem}")
            }
            ErrorKind::Plugin { plugin, call: None, problem, .. } => write!(f, "plugin {plugin}: {problem}"),
            ErrorKind::NoModel => f.write_str("wants to run the model, which is not there to be run"),
            ErrorKind::NoTokenizer { problem } => write!(f, "cannot read text: {problem}"),
            ErrorKind::Cancelled => f.write_str("stopped"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &*self.kind {
            ErrorKind::Ir(e) | ErrorKind::Broken { problem: e, .. } => Some(e),
            _ => None,
        }
    }
}
