//! The host's side of plugins: [`Plugin::load`] opens a shared library and turns its passes into declarations like any other;
//! the table of C functions answers what they ask while they run.
//!
//! Plugins are native code. What this crate checks keeps their mistakes from doing harm; it does not protect from malice.

mod description;
mod error;
mod plugin;
mod session;
mod table;

pub use error::{Error, ErrorKind, Result};
pub use plugin::{ENTRY, Plugin};
pub use table::{FUNCTIONS, HOST};
