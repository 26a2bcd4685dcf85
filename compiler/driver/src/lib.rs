//! The compiler: a checkpoint goes in, one artifact comes out.
//!
//! [`Session`] runs the phases `import → canonicalize → compress → fuse → lower → emit → package → certify` and reports what each
//! took and made. [`pipeline`] lists the passes that always run. The same inputs give the same bytes: neither time,
//! nor paths, nor the number of threads reach the artifact; a certificate depends on the target that was measured.
//!
//! API boundary: the command line and other programs that compile models build on this crate.

mod calibrate;
mod certify;
mod error;
pub mod evaluate;
mod events;
mod inputs;
mod memory;
mod model_runner;
mod origin;
mod package;
mod partial;
pub mod pipeline;
mod report;
mod session;
mod targets;

pub use attar_artifact::certificate::Certificate;
pub use attar_codegen_cpu::Target;
pub use attar_codegen_cuda::{CudaTarget, Nvrtc};
pub use attar_import::ModelInfo;
pub use attar_pass::{Family, Phase};
pub use attar_plugin_host::Plugin;
pub use calibrate::{
    CalibrateOptions, CalibrationOptions, CalibrationReport, CalibrationSource, Outliers, calibrate,
};
pub use certify::{Certify, DEFAULT_WINDOWS, HELD_OUT_TEXT};
pub use error::{Error, ErrorKind, Result};
pub use events::Event;
pub use inputs::InputFile;
pub use origin::{Again, CalibrationKind, Origin, PluginOrigin, Remake, remake};
pub use report::{
    CompileReport, FormatReport, ModelReport, PassRow, PhaseReport, SectionReport, TensorReport,
};
pub use session::{
    CompileOptions, Session, Sizes, describe, describe_inputs, registry, registry_with, sizes,
};
pub use targets::{Targets, resolve_all_targets, resolve_targets};

/// What artifacts name as their maker.
pub const GENERATOR: &str = concat!("attar ", env!("CARGO_PKG_VERSION"));
