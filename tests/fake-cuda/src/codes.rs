//! Results of driver calls.

use attar_ptx::ErrorKind;
use std::ffi::CStr;

/// A `CUresult`.
pub(crate) type Code = i32;

pub(crate) const SUCCESS: Code = 0;
pub(crate) const INVALID_VALUE: Code = 1;
pub(crate) const OUT_OF_MEMORY: Code = 2;
pub(crate) const DEVICE_UNAVAILABLE: Code = 46;
pub(crate) const NO_DEVICE: Code = 100;
pub(crate) const INVALID_DEVICE: Code = 101;
pub(crate) const INVALID_IMAGE: Code = 200;
pub(crate) const INVALID_CONTEXT: Code = 201;
pub(crate) const NO_BINARY_FOR_GPU: Code = 209;
pub(crate) const INVALID_PTX: Code = 218;
pub(crate) const UNSUPPORTED_PTX_VERSION: Code = 222;
pub(crate) const FILE_NOT_FOUND: Code = 301;
pub(crate) const INVALID_HANDLE: Code = 400;
pub(crate) const NOT_FOUND: Code = 500;
pub(crate) const ILLEGAL_ADDRESS: Code = 700;
pub(crate) const LAUNCH_OUT_OF_RESOURCES: Code = 701;
pub(crate) const LAUNCH_TIMEOUT: Code = 702;
pub(crate) const MISALIGNED_ADDRESS: Code = 716;
pub(crate) const LAUNCH_FAILED: Code = 719;
pub(crate) const NOT_SUPPORTED: Code = 801;
pub(crate) const STREAM_CAPTURE_UNSUPPORTED: Code = 900;
pub(crate) const STREAM_CAPTURE_ISOLATION: Code = 905;
pub(crate) const UNKNOWN: Code = 999;

/// Code, name and words.
const WORDS: [(Code, &CStr, &CStr); 23] = [
    (SUCCESS, c"CUDA_SUCCESS", c"no error (PTX interpreter)"),
    (INVALID_VALUE, c"CUDA_ERROR_INVALID_VALUE", c"invalid argument (PTX interpreter)"),
    (OUT_OF_MEMORY, c"CUDA_ERROR_OUT_OF_MEMORY", c"out of memory (PTX interpreter)"),
    (DEVICE_UNAVAILABLE, c"CUDA_ERROR_DEVICE_UNAVAILABLE", c"the device is lost (PTX interpreter)"),
    (NO_DEVICE, c"CUDA_ERROR_NO_DEVICE", c"no CUDA-capable device is detected (PTX interpreter)"),
    (INVALID_DEVICE, c"CUDA_ERROR_INVALID_DEVICE", c"invalid device ordinal (PTX interpreter)"),
    (INVALID_IMAGE, c"CUDA_ERROR_INVALID_IMAGE", c"device kernel image is invalid (PTX interpreter)"),
    (INVALID_CONTEXT, c"CUDA_ERROR_INVALID_CONTEXT", c"invalid device context (PTX interpreter)"),
    (
        NO_BINARY_FOR_GPU,
        c"CUDA_ERROR_NO_BINARY_FOR_GPU",
        c"no kernel image is available for execution on the device (PTX interpreter)",
    ),
    (INVALID_PTX, c"CUDA_ERROR_INVALID_PTX", c"a PTX JIT compilation failed (PTX interpreter)"),
    (
        UNSUPPORTED_PTX_VERSION,
        c"CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
        c"the provided PTX was compiled with an unsupported toolchain (PTX interpreter)",
    ),
    (FILE_NOT_FOUND, c"CUDA_ERROR_FILE_NOT_FOUND", c"file not found (PTX interpreter)"),
    (INVALID_HANDLE, c"CUDA_ERROR_INVALID_HANDLE", c"invalid resource handle (PTX interpreter)"),
    (NOT_FOUND, c"CUDA_ERROR_NOT_FOUND", c"named symbol not found (PTX interpreter)"),
    (
        ILLEGAL_ADDRESS,
        c"CUDA_ERROR_ILLEGAL_ADDRESS",
        c"an illegal memory access was encountered (PTX interpreter)",
    ),
    (
        LAUNCH_OUT_OF_RESOURCES,
        c"CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES",
        c"too many resources requested for launch (PTX interpreter)",
    ),
    (LAUNCH_TIMEOUT, c"CUDA_ERROR_LAUNCH_TIMEOUT", c"the kernel hangs (PTX interpreter)"),
    (MISALIGNED_ADDRESS, c"CUDA_ERROR_MISALIGNED_ADDRESS", c"misaligned address (PTX interpreter)"),
    (LAUNCH_FAILED, c"CUDA_ERROR_LAUNCH_FAILED", c"a check of the kernel failed (PTX interpreter)"),
    (NOT_SUPPORTED, c"CUDA_ERROR_NOT_SUPPORTED", c"operation not supported (PTX interpreter)"),
    (
        STREAM_CAPTURE_UNSUPPORTED,
        c"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
        c"operation not permitted when stream is capturing (PTX interpreter)",
    ),
    (
        STREAM_CAPTURE_ISOLATION,
        c"CUDA_ERROR_STREAM_CAPTURE_ISOLATION",
        c"dependency created on uncaptured work in another stream (PTX interpreter)",
    ),
    (UNKNOWN, c"CUDA_ERROR_UNKNOWN", c"unknown error (PTX interpreter)"),
];

pub(crate) fn name(code: Code) -> Option<&'static CStr> {
    WORDS.iter().find(|w| w.0 == code).map(|w| w.1)
}

pub(crate) fn words(code: Code) -> Option<&'static CStr> {
    WORDS.iter().find(|w| w.0 == code).map(|w| w.2)
}

/// What a device would report of a fault, where it would notice it; a failed launch where only the checks do.
pub(crate) fn of_fault(kind: &ErrorKind) -> Code {
    match kind {
        ErrorKind::OutOfBounds { .. }
        | ErrorKind::NoBuffer { .. }
        | ErrorKind::Freed { .. }
        | ErrorKind::ReadOnly { .. } => ILLEGAL_ADDRESS,
        ErrorKind::Misaligned { .. } => MISALIGNED_ADDRESS,
        ErrorKind::Deadlock(_) | ErrorKind::StepLimit(_) => LAUNCH_TIMEOUT,
        ErrorKind::Launch(_) | ErrorKind::Params { .. } => INVALID_VALUE,
        _ => LAUNCH_FAILED,
    }
}
