//! NVIDIA GPUs through the CUDA driver, which is looked for when a model is opened and linked never.
//!
//! [`Device`] is a GPU with a model's kernels and weights on it; [`Runner`] runs steps of an engine there. What is
//! allocated is allocated when they are made: the weights, and for each engine one arena with its KV cache, activations, inputs and
//! logits. Each has a stream of its own, so that engines of one model may run at once. Steps are captured as graphs, one for each
//! size, larger ones when their size comes again, and replayed: what changes from step to step stands in device memory.

mod device;
mod runner;

pub(crate) use device::{Device, Memory};
pub(crate) use runner::{Inputs, Runner, RunnerSizes, Wanted};

use crate::error::{Error, ErrorKind, Result};
use cudarc::driver::sys::{self, cudaError_enum as Code};
use cudarc::driver::{CudaContext, DriverError};

/// CUDA version whose machine code and PTX artifacts hold, as the driver numbers versions.
const LEAST_DRIVER: i32 = 13000;
/// Compute capability that kernels need.
const LEAST_COMPUTE: (i32, i32) = (8, 0);

/// A GPU of this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// The N of `cuda:N`.
    pub index: usize,
    pub name: String,
    /// Major and minor compute capability.
    pub compute: (i32, i32),
    pub memory_bytes: u64,
}

/// The GPUs that the driver shows, in its order.
///
/// # Errors
/// [`ErrorKind::DeviceUnavailable`] without a driver or any GPU, [`ErrorKind::DriverTooOld`].
pub fn gpus() -> Result<Vec<Gpu>> {
    let count = count()?;
    (0..count)
        .map(|index| {
            let fail = |e| failed(index, "asked what it is", e);
            let context = CudaContext::new(index).map_err(fail)?;
            let compute = context.compute_capability().map_err(fail)?;
            let memory_bytes = context.total_mem().map_err(fail)? as u64;
            Ok(Gpu { index, name: context.name().map_err(fail)?, compute, memory_bytes })
        })
        .collect()
}

/// How many GPUs there are; at least one.
pub(crate) fn count() -> Result<usize> {
    let unavailable =
        |reason: &str| ErrorKind::DeviceUnavailable { device: "cuda".to_owned(), reason: reason.to_owned() };
    // SAFETY: loads the driver's library, whose initialisers are its vendor's affair. Everything else in cudarc panics
    // without it.
    if !unsafe { sys::is_culib_present() } {
        return Err(unavailable("there is no NVIDIA driver (libcuda.so) on this machine").into());
    }
    let mut version = 0;
    // SAFETY: writes one number.
    let found = unsafe { sys::cuDriverGetVersion(&mut version) };
    if found == Code::CUDA_SUCCESS && version < LEAST_DRIVER {
        return Err(ErrorKind::DriverTooOld {
            found: version_text(version),
            needed: version_text(LEAST_DRIVER),
        }
        .into());
    }
    // `device_count` expects a driver that is initialised.
    let count = cudarc::driver::result::init().and_then(|()| CudaContext::device_count());
    match count {
        Ok(n) if n > 0 => Ok(n as usize),
        Ok(_) | Err(DriverError(Code::CUDA_ERROR_NO_DEVICE)) => {
            Err(unavailable("the driver shows no GPU").into())
        }
        Err(e) => Err(unavailable(&format!("the driver does not start: {}", text_of(e))).into()),
    }
}

/// `13.0` for 13000.
fn version_text(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

/// The error behind a failed call.
fn failed(index: usize, action: &'static str, e: DriverError) -> Error {
    ErrorKind::DeviceFailed { device: format!("cuda:{index}"), action, problem: text_of(e) }.into()
}

/// A code's name and what the driver says of it.
fn text_of(e: DriverError) -> String {
    let name = e.error_name().map_or("an unknown error".into(), |n| n.to_string_lossy());
    match e.error_string() {
        Ok(text) => format!("{name}: {}", text.to_string_lossy()),
        Err(_) => name.into_owned(),
    }
}
