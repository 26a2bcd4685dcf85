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
}
