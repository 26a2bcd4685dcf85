//! What a pass is, which passes exist, in which order they run, and what surrounds each run.
//!
//! A pass changes a graph and the weights it names, nothing else. The [`Manager`] verifies, dumps, times, counts
//! and bisects; a [`Recipe`] says which passes run on which tensors with which options. Nothing here performs
//! I/O: dumps and progress go to a sink the caller gives.

mod calibration;
mod context;
mod decl;
mod error;
mod globs;
mod journal;
mod manager;
mod metrics;
mod model_runner;
pub mod plugin;
mod preset;
mod recipe;
mod reference;
mod registry;

pub use calibration::{Calibrator, InputDrift, InputStatistics, Part, PartGradient};
pub use context::{Changed, Fuel, NoteLevel, Notes, Pass, PassCx, Subject, graph_weights};
pub use decl::{Numerics, OptionDecl, OptionKind, Options, PassDecl, Phase, Value};
pub use error::{Error, ErrorKind, Family, Result, Site};
pub use globs::TensorGlobs;
pub use journal::Journal;
pub use manager::{Dump, Event, Manager, PassReport, Pipeline, PrintAfter, Report, Step, Stop, Surroundings};
pub use metrics::{Metric, MetricValue};
pub use model_runner::ModelRunner;
pub use preset::Preset;
pub use recipe::Recipe;
pub use reference::reference_markdown;
pub use registry::{Registered, Registry, registered};

/// Re-exported so that a pass file can say `attar_pass::inventory::submit!` without a dependency of its own.
pub use inventory;
