//! The built-in pass as a shared library: its very source.

#[path = "../../../../passes/src/prune/prune_magnitude.rs"]
mod prune_magnitude;
