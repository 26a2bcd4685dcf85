//! The built-in passes that need nothing but `attar-plugin`, as a shared library: their very source.

#[path = "../../../../passes/src/fuse/mod.rs"]
mod fuse;
#[path = "../../../../passes/src/prune/mod.rs"]
mod prune;
#[path = "../../../../passes/src/simplify/mod.rs"]
mod simplify;
