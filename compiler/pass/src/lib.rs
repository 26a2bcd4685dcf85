//! Which passes exist, in which order they run, and what surrounds each run.
//!
//! What a pass is says the trait [`attar_plugin::Pass`], for built-in passes as for those of plugins. It changes a graph and the
//! weights it names, nothing else. The [`Manager`] verifies, dumps, times, counts
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

pub use calibration::{Calibrator, GainGradient, InputDrift, InputStatistics, Part, PartGradient};
pub use context::{Fuel, NoteLevel, Notes, PassCx, Subject, graph_weights};
pub use decl::{Numerics, OptionDecl, OptionKind, Options, PassDecl, Phase, RunFn, Value, to_toml};
pub use error::{Error, ErrorKind, Family, Result, Site};
pub use globs::TensorGlobs;
pub use journal::Journal;
pub use manager::{Dump, Event, Manager, PassReport, Pipeline, PrintAfter, Report, Step, Stop, Surroundings};
pub use metrics::{Metric, MetricValue};
pub use model_runner::ModelRunner;
pub use preset::Preset;
pub use recipe::Recipe;
pub use reference::reference_markdown;
pub use registry::{Registry, registered};
