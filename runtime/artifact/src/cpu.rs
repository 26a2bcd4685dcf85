//! What this machine's CPU and operating system offer, by the names that code sections use for features.
//!
//! A feature counts only when code may use it: AVX state must be saved by the operating system (the detection macros see
//! to that), and AMX needs a permission besides, which [`has_feature`] asks for.

/// Whether code may use the feature here. Names are those of `std::arch`'s detection macros.
pub fn has_feature(name: &str) -> bool {
    arch::has_feature(name)
}

#[cfg(target_arch = "x86_64")]
mod arch {
    /// One arm per feature: the detection macro takes literals only.
    pub(super) fn has_feature(feature: &str) -> bool {
        macro_rules! any_of {
            ($($name:tt)*) => {
                match feature {
                    $($name => std::arch::is_x86_feature_detected!($name),)*
                    "amx-tile" => amx(24),
                    "amx-bf16" => amx(22),
                    "amx-int8" => amx(25),
                    _ => false,
                }
            };
        }
        any_of!("sse" "sse2" "sse3" "ssse3" "sse4.1" "sse4.2" "popcnt" "cmpxchg16b" "avx" "avx2" "fma" "f16c" "bmi1" "bmi2"
            "lzcnt" "movbe" "avx512f" "avx512bw" "avx512cd" "avx512dq" "avx512vl" "avx512vbmi" "avx512vbmi2"
            "avx512vnni" "avx512bf16" "avx512fp16" "avx512bitalg" "avx512vpopcntdq" "avxvnni" "gfni")
    }

    /// A bit of CPUID leaf 7, EDX, with everything that AMX needs besides.
    fn amx(bit: u32) -> bool {
        static TILES: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
        let leaf = std::arch::x86_64::__cpuid_count(7, 0);
        let told = std::arch::x86_64::__cpuid(0).eax >= 7 && leaf.edx & (1 << bit) != 0;
        told && *TILES.get_or_init(|| tile_state_saved() && tile_permission())
    }

    /// Whether the operating system saves tile configuration and tiles (XCR0 bits 17 and 18).
    fn tile_state_saved() -> bool {
        const OSXSAVE: u32 = 1 << 27;
        if std::arch::x86_64::__cpuid(1).ecx & OSXSAVE == 0 {
            return false;
        }
        let (low, high): (u32, u32);
        // SAFETY: the operating system has enabled xgetbv, which reads register 0 and changes nothing.
        unsafe {
            std::arch::asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high,
                options(nomem, nostack, preserves_flags));
        }
        let _ = high;
        low >> 17 & 3 == 3
    }

    /// Asks Linux for tile data for the whole process: threads started later have it too.
    #[cfg(target_os = "linux")]
    fn tile_permission() -> bool {
        const ARCH_PRCTL: i64 = 158;
        const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
        const XFEATURE_XTILEDATA: u64 = 18;
        let result: i64;
        // SAFETY: a system call that takes two numbers and touches no memory of ours; it clobbers rcx and r11.
        unsafe {
            std::arch::asm!("syscall", inlateout("rax") ARCH_PRCTL => result, in("rdi") ARCH_REQ_XCOMP_PERM,
                in("rsi") XFEATURE_XTILEDATA, lateout("rcx") _, lateout("r11") _, options(nostack));
        }
        result == 0
    }

    /// Other systems give tiles to whoever finds the state enabled.
    #[cfg(not(target_os = "linux"))]
    fn tile_permission() -> bool {
        true
    }
}

#[cfg(target_arch = "aarch64")]
mod arch {
    /// One arm per feature: the detection macro takes literals only.
    pub(super) fn has_feature(feature: &str) -> bool {
        macro_rules! any_of {
            ($($name:tt)*) => {
                match feature {
                    $($name => std::arch::is_aarch64_feature_detected!($name),)*
                    _ => false,
                }
            };
        }
        any_of!("neon" "dotprod" "fp16" "i8mm" "bf16" "sve" "sve2" "lse" "rdm")
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
mod arch {
    pub(super) fn has_feature(_feature: &str) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn detection_knows_this_machine() {
        assert!(has_feature("sse2"));
        assert!(!has_feature("no-such-feature"));
        assert_eq!(has_feature("avx2"), std::arch::is_x86_feature_detected!("avx2"));
    }

    /// `/proc/cpuinfo` lists what CPU and kernel support; a permission may still be refused, never the reverse.
    #[test]
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    fn amx_is_found_only_where_the_kernel_knows_it() {
        let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        for (feature, flag) in [("amx-tile", "amx_tile"), ("amx-bf16", "amx_bf16"), ("amx-int8", "amx_int8")]
        {
            let listed = cpuinfo.split_whitespace().any(|f| f == flag);
            assert!(listed || !has_feature(feature), "{feature} found on a machine that has no {flag}");
        }
    }
}
