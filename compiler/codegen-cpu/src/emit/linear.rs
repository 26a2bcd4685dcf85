//! `linear`: matrix products with packed weights.

use crate::lanes::Lanes;
use attar_kernel::LinearSpec;

pub(super) fn emit(spec: &LinearSpec, _cx: &mut Lanes<'_>) -> Result<(), String> {
    Err(format!("no code for format {}", spec.format.name))
}
