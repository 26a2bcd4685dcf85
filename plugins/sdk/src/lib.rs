//! Write a compression pass for Attar.
//!
//! A plugin is a shared library with passes. A pass implements [`Pass`] and is made known by [`plugin!`]; `attar compile
//! --plugin ./libmine.so --pass mine=strength:0.5` runs it. The library keeps working when Attar is updated: between them stands
//! a C interface that only grows ([`abi`]).
//!
//! ```
//! use attar_plugin::{About, Context, NoOptions, Numerics, Pass, Phase, Result};
//!
//! /// Counts the weights of a model.
//! struct CountWeights;
//!
//! impl Pass for CountWeights {
//!     type Options = NoOptions;
//!
//!     const ABOUT: About = About {
//!         name: "count-weights",
//!         summary: "counts the weights of a model",
//!         phase: Phase::Compress,
//!         numerics: Numerics::Exact,
//!         takes_tensors: true,
//!     };
//!
//!     fn run(_: &NoOptions, cx: &Context<'_>) -> Result<()> {
//!         let mut count = 0;
//!         for name in cx.tensors()? {
//!             count += cx.tensor(&name)?.shape.iter().product::<usize>();
//!         }
//!         cx.metric("model", [("weights", (count as u64).into())])
//!     }
//! }
//!
//! attar_plugin::plugin! { passes: [CountWeights] }
//! ```
//!
//! `docs/plugins.md` of Attar is a tutorial. Plugins are native code: whoever loads one trusts it.
//!
//! API boundary: plugins build on this crate and on nothing else of Attar.

pub mod abi;
mod context;
mod decl;
pub mod entry;
mod error;
pub mod host;
pub mod memory_host;
pub mod options;
mod pass;
pub mod remote;

pub use context::{Context, CustomOp, Edit, Floats, Reading, Statistics, Tokens};
pub use decl::{About, Codes, Format, Numerics, OptionDecl, OptionKind, OptionValue, Phase, Scale};
pub use error::{Error, ErrorKind, Result};
pub use host::{
    Attr, Dim, Encoded, FormatInfo, FormatKind, Host, Level, Metric, Node, NodeInfo, TensorInfo, Type, Value,
    borrowed,
};
pub use options::{NoOptions, Options};
pub use pass::{Pass, PassEntry, Registered, RunPass, registered};

/// Re-exported for what the macros expand to.
#[doc(hidden)]
pub use {inventory, serde};
