//! Targets: names of instruction-set levels, and what each may use.

/// A level of an instruction set that code is generated for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Target {
    /// SSE4.2 and POPCNT.
    X86_64V2,
    /// AVX2, FMA, BMI.
    X86_64V3,
    /// ARMv8.0 with NEON.
    Aarch64,
    /// With SDOT/UDOT.
    Aarch64Dotprod,
    /// RV64GC, scalar.
    Riscv64,
}

impl Target {
    pub const ALL: [Target; 5] =
        [Target::X86_64V2, Target::X86_64V3, Target::Aarch64, Target::Aarch64Dotprod, Target::Riscv64];

    /// Name on the command line and in artifacts.
    pub fn name(self) -> &'static str {
        match self {
            Target::X86_64V2 => "x86-64-v2",
            Target::X86_64V3 => "x86-64-v3",
            Target::Aarch64 => "aarch64",
            Target::Aarch64Dotprod => "aarch64+dotprod",
            Target::Riscv64 => "riscv64",
        }
    }

    /// CPU features the loader must find, spelled as `std::arch` detection macros spell them.
    pub fn features(self) -> &'static [&'static str] {
        match self {
            Target::X86_64V2 => &["sse3", "ssse3", "sse4.1", "sse4.2", "popcnt"],
            Target::X86_64V3 => &["avx", "avx2", "fma", "bmi1", "bmi2", "lzcnt", "popcnt"],
            Target::Aarch64 => &["neon"],
            Target::Aarch64Dotprod => &["neon", "dotprod"],
            Target::Riscv64 => &[],
        }
    }

    pub fn by_name(name: &str) -> Option<Target> {
        Target::ALL.into_iter().find(|t| t.name() == name)
    }

    /// Whether this machine has every feature of the level.
    pub fn runs_here(self) -> bool {
        let family = match self {
            Target::X86_64V2 | Target::X86_64V3 => cfg!(target_arch = "x86_64"),
            Target::Aarch64 | Target::Aarch64Dotprod => cfg!(target_arch = "aarch64"),
            Target::Riscv64 => cfg!(target_arch = "riscv64"),
        };
        family && self.features().iter().all(|f| has_feature(f))
    }

    /// The highest level this machine runs; `None` on an architecture that no code is generated for.
    pub fn native() -> Option<Target> {
        Target::ALL.into_iter().rev().find(|t| t.runs_here())
    }
}

#[cfg(target_arch = "x86_64")]
fn has_feature(name: &str) -> bool {
    match name {
        "sse3" => is_x86_feature_detected!("sse3"),
        "ssse3" => is_x86_feature_detected!("ssse3"),
        "sse4.1" => is_x86_feature_detected!("sse4.1"),
        "sse4.2" => is_x86_feature_detected!("sse4.2"),
        "popcnt" => is_x86_feature_detected!("popcnt"),
        "avx" => is_x86_feature_detected!("avx"),
        "avx2" => is_x86_feature_detected!("avx2"),
        "fma" => is_x86_feature_detected!("fma"),
        "bmi1" => is_x86_feature_detected!("bmi1"),
        "bmi2" => is_x86_feature_detected!("bmi2"),
        "lzcnt" => is_x86_feature_detected!("lzcnt"),
        _ => false,
    }
}

#[cfg(target_arch = "aarch64")]
fn has_feature(name: &str) -> bool {
    match name {
        "neon" => std::arch::is_aarch64_feature_detected!("neon"),
        "dotprod" => std::arch::is_aarch64_feature_detected!("dotprod"),
        _ => false,
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn has_feature(_name: &str) -> bool {
    false
}
