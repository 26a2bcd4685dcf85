//! NVRTC on this machine; without it a test reports itself as skipped.

use attar_codegen_cuda::Nvrtc;
use std::io::Write;

/// NVRTC, or `None` after saying so.
pub(crate) fn find() -> Option<Nvrtc> {
    match Nvrtc::find() {
        Ok(nvrtc) => Some(nvrtc),
        Err(e) if e.is_environment() => {
            // Not captured, so that whoever reads the log of a passing run sees it.
            let _ = writeln!(std::io::stderr(), "skipped 1 test of CUDA kernels: {e}");
            None
        }
        Err(e) => panic!("{e}"),
    }
}
