//! Targets as Cranelift sees them: triple, feature flags, code generator settings.

use crate::Target;
use crate::error::{Error, ErrorKind};
use crate::target::Arch;
use cranelift_codegen::isa::{self, OwnedTargetIsa};
use cranelift_codegen::settings::{self, Configurable};

const V2: &[&str] = &["has_sse3", "has_ssse3", "has_sse41", "has_sse42", "has_popcnt"];
const V3: &[&str] = &[
    "has_sse3",
    "has_ssse3",
    "has_sse41",
    "has_sse42",
    "has_popcnt",
    "has_avx",
    "has_avx2",
    "has_fma",
    "has_bmi1",
    "has_bmi2",
    "has_lzcnt",
];

impl Target {
    /// The triple kernels are compiled for. Kernels call nothing, so only the calling convention depends on the
    /// operating system.
    pub(crate) fn triple(self) -> &'static str {
        match self.arch() {
            Arch::X86_64 => "x86_64-unknown-linux-gnu",
            Arch::Aarch64 => "aarch64-unknown-linux-gnu",
            Arch::Riscv64 => "riscv64gc-unknown-linux-gnu",
        }
    }

    /// Cranelift's names of the features of [`Target::features`].
    fn cranelift_features(self) -> &'static [&'static str] {
        match self {
            Target::X86_64V2 => V2,
            // Wider instructions enter through inner functions, which Cranelift does not see.
            Target::X86_64V3 | Target::X86_64V3Avxvnni | Target::X86_64V4 | Target::SapphireRapids => V3,
            Target::Aarch64 | Target::Riscv64 => &[],
            Target::Aarch64Dotprod => &["has_dotprod"],
            Target::Aarch64I8mm => &["has_dotprod", "has_i8mm"],
        }
    }

    /// Whether there are 128-bit vectors; without them every vector is emitted as scalars.
    pub fn has_vectors(self) -> bool {
        self != Target::Riscv64
    }

    /// Whether a multiplication and an addition fuse into one instruction with one rounding.
    pub fn has_fma(self) -> bool {
        self != Target::X86_64V2
    }
}

/// Code generator for `target`.
///
/// `opt_level` is `none`: it keeps the order in which kernels were written (the optimizing levels sink every pure
/// operation to its use and spill in unrolled loops) and still fuses instruction patterns.
pub(crate) fn target_isa(target: Target) -> Result<OwnedTargetIsa, Error> {
    let wrap = |kind| Error { kind, kernel: String::new(), target };
    let mut flags = settings::builder();
    let verifier = if cfg!(debug_assertions) { "true" } else { "false" };
    for (name, value) in [
        ("opt_level", "none"),
        ("is_pic", "true"),
        ("enable_verifier", verifier),
        ("preserve_frame_pointers", "false"),
        ("unwind_info", "false"),
        ("enable_probestack", "false"),
    ] {
        flags.set(name, value).map_err(|e| wrap(ErrorKind::Isa(e.to_string())))?;
    }
    let mut builder =
        isa::lookup_by_name(target.triple()).map_err(|e| wrap(ErrorKind::Isa(e.to_string())))?;
    for feature in target.cranelift_features() {
        builder.enable(feature).map_err(|e| wrap(ErrorKind::Isa(e.to_string())))?;
    }
    builder.finish(settings::Flags::new(flags)).map_err(|e| wrap(ErrorKind::Isa(e.to_string())))
}
