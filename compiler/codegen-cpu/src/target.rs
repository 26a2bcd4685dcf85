//! Targets: names of instruction-set levels, and what each may use.

use attar_artifact::cpu::has_feature;

/// A level of an instruction set that code is generated for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Target {
    /// SSE4.2 and POPCNT.
    X86_64V2,
    /// AVX2, FMA, F16C, BMI.
    X86_64V3,
    /// The same with the 256-bit `vpdpbusd` of AVX-VNNI.
    X86_64V3Avxvnni,
    /// AVX-512 F, BW, CD, DQ, VL and VNNI.
    X86_64V4,
    /// With AVX-512 BF16, AMX bf16 and int8.
    SapphireRapids,
    /// ARMv8.0 with NEON.
    Aarch64,
    /// With SDOT/UDOT.
    Aarch64Dotprod,
    /// With SMMLA.
    Aarch64I8mm,
    /// RV64GC, scalar.
    Riscv64,
}

/// Families of instruction sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arch {
    X86_64,
    Aarch64,
    Riscv64,
}

const V4: &[&str] = &[
    "avx",
    "avx2",
    "fma",
    "f16c",
    "bmi1",
    "bmi2",
    "lzcnt",
    "popcnt",
    "avx512f",
    "avx512bw",
    "avx512cd",
    "avx512dq",
    "avx512vl",
    "avx512vnni",
];
const SAPPHIRE_RAPIDS: &[&str] = &[
    "avx",
    "avx2",
    "fma",
    "f16c",
    "bmi1",
    "bmi2",
    "lzcnt",
    "popcnt",
    "avx512f",
    "avx512bw",
    "avx512cd",
    "avx512dq",
    "avx512vl",
    "avx512vnni",
    "avx512bf16",
    "amx-tile",
    "amx-bf16",
    "amx-int8",
];

impl Target {
    /// Within a family from least to most able.
    pub const ALL: [Target; 9] = [
        Target::X86_64V2,
        Target::X86_64V3,
        Target::X86_64V3Avxvnni,
        Target::X86_64V4,
        Target::SapphireRapids,
        Target::Aarch64,
        Target::Aarch64Dotprod,
        Target::Aarch64I8mm,
        Target::Riscv64,
    ];

    /// Name on the command line and in artifacts.
    pub fn name(self) -> &'static str {
        match self {
            Target::X86_64V2 => "x86-64-v2",
            Target::X86_64V3 => "x86-64-v3",
            Target::X86_64V3Avxvnni => "x86-64-v3+avxvnni",
            Target::X86_64V4 => "x86-64-v4",
            Target::SapphireRapids => "sapphirerapids",
            Target::Aarch64 => "aarch64",
            Target::Aarch64Dotprod => "aarch64+dotprod",
            Target::Aarch64I8mm => "aarch64+i8mm",
            Target::Riscv64 => "riscv64",
        }
    }

    /// CPU features the loader must find, spelled as `std::arch` detection macros spell them.
    pub fn features(self) -> &'static [&'static str] {
        match self {
            Target::X86_64V2 => &["sse3", "ssse3", "sse4.1", "sse4.2", "popcnt"],
            Target::X86_64V3 => &["avx", "avx2", "fma", "f16c", "bmi1", "bmi2", "lzcnt", "popcnt"],
            Target::X86_64V3Avxvnni => {
                &["avx", "avx2", "fma", "f16c", "bmi1", "bmi2", "lzcnt", "popcnt", "avxvnni"]
            }
            Target::X86_64V4 => V4,
            Target::SapphireRapids => SAPPHIRE_RAPIDS,
            Target::Aarch64 => &["neon"],
            Target::Aarch64Dotprod => &["neon", "dotprod"],
            Target::Aarch64I8mm => &["neon", "dotprod", "i8mm"],
            Target::Riscv64 => &[],
        }
    }

    /// Whether many rows are multiplied with other arithmetic than few: tiles of bf16 instead of bytes.
    pub fn prefill_differs(self) -> bool {
        self == Target::SapphireRapids
    }

    pub fn arch(self) -> Arch {
        match self {
            Target::X86_64V2
            | Target::X86_64V3
            | Target::X86_64V3Avxvnni
            | Target::X86_64V4
            | Target::SapphireRapids => Arch::X86_64,
            Target::Aarch64 | Target::Aarch64Dotprod | Target::Aarch64I8mm => Arch::Aarch64,
            Target::Riscv64 => Arch::Riscv64,
        }
    }

    pub fn by_name(name: &str) -> Option<Target> {
        Target::ALL.into_iter().find(|t| t.name() == name)
    }

    /// Whether this machine has every feature of the level, and lets programs use it.
    pub fn runs_here(self) -> bool {
        let family = match self.arch() {
            Arch::X86_64 => cfg!(target_arch = "x86_64"),
            Arch::Aarch64 => cfg!(target_arch = "aarch64"),
            Arch::Riscv64 => cfg!(target_arch = "riscv64"),
        };
        family && self.features().iter().all(|f| has_feature(f))
    }

    /// The highest level this machine runs; `None` on an architecture that no code is generated for.
    pub fn native() -> Option<Target> {
        Target::ALL.into_iter().rev().find(|t| t.runs_here())
    }
}
