//! The built-in passes, one file each, by family.
//!
//! Every pass registers itself through `inventory`; a program that names this crate (`use attar_passes as _;`)
//! finds them in [`attar_pass::registered`].

mod pattern;

mod distil;
mod equalize;
mod fuse;
mod prune;
pub mod quantize;
mod simplify;
