//! CUDA: kernels in CUDA C++, compiled by NVRTC where a model is compiled; programs for the GPU.
//!
//! [`translate`] turns a CPU's programs into a GPU's, over the same weights; [`emit`] writes the source of a kernel;
//! [`compile`] makes the code section of a target. Nothing here needs a GPU, and without NVRTC all but compiling works.

mod arch;
mod attention_tiles;
mod cache;
mod code;
mod emit;
mod error;
pub mod nvrtc;
mod resources;
mod spec;

pub use arch::{CudaTarget, LEAST_COMPUTE};
pub use cache::Cache;
pub use code::{CodeBlob, CompiledKernel, compile, compile_kernel};
pub use emit::{Emitted, emit};
pub use error::{Error, Result};
pub use nvrtc::Nvrtc;
pub use resources::Resources;
pub use spec::{CudaPrograms, CudaSpec, Widen, translate};
