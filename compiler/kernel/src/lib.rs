//! Kernel contracts and their scalar reference.
//!
//! A [`KernelSpec`] names one kernel completely: operation, shape, formats, epilogue. Code generators turn specs into
//! machine code; the reference executes them slowly. Every kernel has the signature
//! `extern "C" fn(args: *const u64, begin: u64, end: u64)` and computes the grid items `begin..end`.

pub mod hadamard;
pub mod reference;
mod spec;

pub use spec::{
    ActInt8Layout, Activation, AttentionSpec, Elementwise, Epilogue, KernelSpec, LinearSpec, QkvEpilogue,
    RowTile,
};
