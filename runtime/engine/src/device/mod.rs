//! Devices that programs run on: the CPU, and GPUs through CUDA.

mod backoff;
pub(crate) mod cpu;
pub(crate) mod cuda;
pub(crate) mod executable;
pub(crate) mod threads;
