//! Kernel bodies: one file per kernel, each written once for all targets.

mod linear;

use crate::lanes::Lanes;
use attar_kernel::KernelSpec;

/// Emits the body of `spec`.
///
/// # Errors
/// What the spec asks for that no kernel provides.
pub(crate) fn emit(spec: &KernelSpec, cx: &mut Lanes<'_>) -> Result<(), String> {
    match spec {
        KernelSpec::Linear(l) => linear::emit(l, cx),
        other => Err(format!("no code for {}", other.name())),
    }
}
