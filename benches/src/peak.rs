//! The rate of one instruction: a loop that issues nothing else, on registers, with enough independent accumulators to
//! hide its latency.

use crate::timing::{self, Effort};
use attar_codegen_cpu::Target;
use attar_format::FormatRef;

/// What matrix products are built on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Instruction {
    /// 16 lanes of four int8 products each.
    Vpdpbusd512,
    /// 8 lanes, AVX-VNNI.
    Vpdpbusd256,
    /// `vpmaddubsw`, `vpmaddwd` with ones, `vpaddd`: what stands for it in AVX2.
    Vpmaddubsw256,
    /// `pmaddwd`, `paddd`, on 128 bits.
    Pmaddwd128,
    /// `vfmadd231ps` on 512 bits.
    Fma512,
    Fma256,
    /// `mulps`, `addps`.
    Mulps128,
    /// 16 lanes of two bf16 products each.
    Vdpbf16ps512,
    /// AMX: 16 by 16 outputs of 32 bf16 products each.
    Tdpbf16ps,
}

impl Instruction {
    pub(crate) const ALL: [Instruction; 9] = [
        Instruction::Vpdpbusd512,
        Instruction::Vpdpbusd256,
        Instruction::Vpmaddubsw256,
        Instruction::Pmaddwd128,
        Instruction::Fma512,
        Instruction::Fma256,
        Instruction::Mulps128,
        Instruction::Vdpbf16ps512,
        Instruction::Tdpbf16ps,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Instruction::Vpdpbusd512 => "vpdpbusd zmm",
            Instruction::Vpdpbusd256 => "vpdpbusd ymm",
            Instruction::Vpmaddubsw256 => "vpmaddubsw+vpmaddwd+vpaddd ymm",
            Instruction::Pmaddwd128 => "pmaddwd+paddd xmm",
            Instruction::Fma512 => "vfmadd231ps zmm",
            Instruction::Fma256 => "vfmadd231ps ymm",
            Instruction::Mulps128 => "mulps+addps xmm",
            Instruction::Vdpbf16ps512 => "vdpbf16ps zmm",
            Instruction::Tdpbf16ps => "tdpbf16ps",
        }
    }

    /// The instruction that products of this format are meant to use on a target; `None` where there is no loop for it.
    pub(crate) fn meant(target: Target, format: FormatRef, rows: usize) -> Option<Instruction> {
        let int8 = format.wants_int8_activations();
        match target {
            // Few rows do not fill a tile.
            Target::SapphireRapids if rows > 16 => Some(Instruction::Tdpbf16ps),
            Target::X86_64V4 | Target::SapphireRapids if int8 => Some(Instruction::Vpdpbusd512),
            Target::X86_64V4 | Target::SapphireRapids => Some(Instruction::Fma512),
            Target::X86_64V3Avxvnni if int8 => Some(Instruction::Vpdpbusd256),
            Target::X86_64V3 if int8 => Some(Instruction::Vpmaddubsw256),
            Target::X86_64V3 | Target::X86_64V3Avxvnni => Some(Instruction::Fma256),
            Target::X86_64V2 if int8 => Some(Instruction::Pmaddwd128),
            Target::X86_64V2 => Some(Instruction::Mulps128),
            _ => None,
        }
    }

    /// CPU features it needs, as [`attar_artifact::cpu::has_feature`] spells them.
    fn features(self) -> &'static [&'static str] {
        match self {
            Instruction::Vpdpbusd512 => &["avx512f", "avx512vnni"],
            Instruction::Vpdpbusd256 => &["avxvnni"],
            Instruction::Vpmaddubsw256 => &["avx2"],
            Instruction::Pmaddwd128 | Instruction::Mulps128 => &["sse2"],
            Instruction::Fma512 => &["avx512f"],
            Instruction::Fma256 => &["avx", "fma"],
            Instruction::Vdpbf16ps512 => &["avx512f", "avx512bf16"],
            Instruction::Tdpbf16ps => &["amx-tile", "amx-bf16"],
        }
    }

    /// Multiplications and additions, counted as two, of one round of the loop.
    fn operations(self) -> f64 {
        let products = match self {
            Instruction::Vpdpbusd512 => 64,
            Instruction::Vpdpbusd256 | Instruction::Vpmaddubsw256 | Instruction::Vdpbf16ps512 => 32,
            Instruction::Pmaddwd128 => 8,
            Instruction::Fma512 => 16,
            Instruction::Fma256 => 8,
            Instruction::Mulps128 => 4,
            Instruction::Tdpbf16ps => 16 * 16 * 32,
        };
        f64::from(2 * products * self.chains())
    }

    /// Independent accumulators in the loop.
    fn chains(self) -> i32 {
        match self {
            Instruction::Tdpbf16ps => 4,
            _ => 12,
        }
    }

    /// G operations per second of `threads` threads together; `None` where the machine does not have it.
    pub(crate) fn rate(self, threads: usize, effort: &Effort) -> Option<f64> {
        let work = self.work()?;
        let seconds = timing::fastest(threads, effort, &work);
        Some(self.rate_of(seconds, threads))
    }

    /// The same from the seconds of one unit of [`Instruction::work`].
    pub(crate) fn rate_of(self, seconds: f64, threads: usize) -> f64 {
        self.operations() * ROUNDS as f64 * threads as f64 / seconds / 1e9
    }

    /// A unit of work for [`timing`]; `None` where the machine does not have the instruction.
    pub(crate) fn work(self) -> Option<impl Fn(usize, usize) + Sync> {
        let there = cfg!(target_arch = "x86_64")
            && self.features().iter().all(|f| attar_artifact::cpu::has_feature(f));
        there.then_some(move |_, _| loops::run(self, ROUNDS))
    }
}

const ROUNDS: u64 = 20_000;

#[cfg(target_arch = "x86_64")]
mod loops {
    use super::Instruction;

    /// The instruction's text for each of the accumulators 0 to 11; sources are registers 12 to 15.
    macro_rules! rounds {
        ($count:expr, $first:literal, $last:literal, [$($body:literal),+]) => {
            std::arch::asm!(
                $first,
                "2:",
                ".irp n, 0,1,2,3,4,5,6,7,8,9,10,11",
                $($body,)+
                ".endr",
                "dec {count}",
                "jnz 2b",
                $last,
                count = inout(reg) $count => _,
                out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _,
                out("xmm6") _, out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
                options(nostack, nomem),
            )
        };
    }

    /// Runs the loop; the caller has checked that the CPU has the instruction.
    pub(super) fn run(instruction: Instruction, count: u64) {
        // SAFETY: the loops touch only registers they name; the caller answers for the CPU.
        unsafe {
            match instruction {
                Instruction::Vpdpbusd512 => {
                    rounds!(count, "vzeroall", "vzeroupper", ["vpdpbusd zmm\\n, zmm14, zmm15"]);
                }
                Instruction::Vpdpbusd256 => {
                    rounds!(count, "vzeroall", "vzeroupper", ["{{vex}} vpdpbusd ymm\\n, ymm14, ymm15"]);
                }
                Instruction::Vpmaddubsw256 => rounds!(
                    count,
                    "vzeroall",
                    "vzeroupper",
                    [
                        "vpmaddubsw ymm12, ymm14, ymm15",
                        "vpmaddwd ymm12, ymm12, ymm13",
                        "vpaddd ymm\\n, ymm\\n, ymm12"
                    ]
                ),
                Instruction::Pmaddwd128 => rounds!(
                    count,
                    "pxor xmm14, xmm14",
                    "",
                    ["movdqa xmm12, xmm14", "pmaddwd xmm12, xmm15", "paddd xmm\\n, xmm12"]
                ),
                Instruction::Fma512 => {
                    rounds!(count, "vzeroall", "vzeroupper", ["vfmadd231ps zmm\\n, zmm14, zmm15"]);
                }
                Instruction::Fma256 => {
                    rounds!(count, "vzeroall", "vzeroupper", ["vfmadd231ps ymm\\n, ymm14, ymm15"]);
                }
                Instruction::Mulps128 => rounds!(
                    count,
                    "xorps xmm14, xmm14",
                    "",
                    ["movaps xmm12, xmm14", "mulps xmm12, xmm14", "addps xmm\\n, xmm12"]
                ),
                Instruction::Vdpbf16ps512 => {
                    rounds!(count, "vzeroall", "vzeroupper", ["vdpbf16ps zmm\\n, zmm14, zmm15"]);
                }
                Instruction::Tdpbf16ps => tiles(count),
            }
        }
    }

    /// What `ldtilecfg` reads: palette 1, all tiles of 16 rows of 64 bytes.
    #[repr(C, align(64))]
    struct TileConfig {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        columns: [u16; 16],
        rows: [u8; 16],
    }

    /// # Safety
    /// The CPU has AMX bf16 and the operating system has permitted it.
    unsafe fn tiles(count: u64) {
        let mut config =
            TileConfig { palette: 1, start_row: 0, reserved: [0; 14], columns: [0; 16], rows: [0; 16] };
        config.columns[..8].fill(64);
        config.rows[..8].fill(16);
        // SAFETY: reads the configuration, touches tiles only, and releases them.
        unsafe {
            std::arch::asm!(
                "ldtilecfg [{config}]",
                ".irp n, 0,1,2,3,4,5",
                "tilezero tmm\\n",
                ".endr",
                "2:",
                "tdpbf16ps tmm0, tmm4, tmm5",
                "tdpbf16ps tmm1, tmm4, tmm5",
                "tdpbf16ps tmm2, tmm4, tmm5",
                "tdpbf16ps tmm3, tmm4, tmm5",
                "dec {count}",
                "jnz 2b",
                "tilerelease",
                config = in(reg) std::ptr::from_ref(&config),
                count = inout(reg) count => _,
                options(nostack, readonly),
            );
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod loops {
    /// Never called: no instruction is there.
    pub(super) fn run(_: super::Instruction, _: u64) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_instruction_of_this_machine_runs() {
        let effort = Effort { seconds: 0.0, runs: 1 };
        for instruction in Instruction::ALL {
            let there = instruction.features().iter().all(|f| attar_artifact::cpu::has_feature(f));
            let rate = instruction.rate(1, &effort);
            assert_eq!(rate.is_some(), there && cfg!(target_arch = "x86_64"), "{}", instruction.name());
            assert!(rate.is_none_or(|r| r > 0.0 && r.is_finite()), "{}", instruction.name());
        }
    }
}
