//! The pure read loop: loads and nothing else, as wide as the CPU has them.
//!
//! There are two, one that prefetches and one that leaves that to the hardware; which is faster depends on where the
//! memory is, and the faster one is the limit.

use crate::timing::{self, Effort};

/// The part of `bytes` that one of `threads` threads reads, cut at cache lines.
pub(crate) fn share(bytes: &[u8], thread: usize, threads: usize) -> &[u8] {
    let lines = bytes.len() / 64;
    &bytes[thread * lines / threads * 64..(thread + 1) * lines / threads * 64]
}

/// Bytes per second of reading all of `bytes`.
pub(crate) fn bandwidth(bytes: &[u8], threads: usize, effort: &Effort) -> f64 {
    let plain = |_, thread| read::<false>(share(bytes, thread, threads));
    let ahead = |_, thread| read::<true>(share(bytes, thread, threads));
    let [plain, ahead] = timing::in_turns(threads, effort, [&plain, &ahead]);
    bytes.len() as f64 / plain.min(ahead)
}

/// Loads every byte once, but for a rest of less than 512. `AHEAD`: with prefetches.
#[cfg(target_arch = "x86_64")]
pub(crate) fn read<const AHEAD: bool>(bytes: &[u8]) {
    let len = bytes.len() / 512 * 512;
    if len == 0 {
        return;
    }
    let (start, end) = (bytes.as_ptr(), bytes[len..].as_ptr());
    macro_rules! loop_of {
        ([$($load:literal),*], $last:literal, [$($ahead:literal),*]) => {
            // SAFETY: loads only from `start..end`, a multiple of 512 bytes inside the slice, with loads of a width the
            // CPU has; prefetches may go beyond it and touch nothing there.
            unsafe {
                std::arch::asm!(
                    "2:",
                    $($load,)*
                    $($ahead,)*
                    "add {p}, 512",
                    "cmp {p}, {end}",
                    "jb 2b",
                    $last,
                    p = inout(reg) start => _,
                    end = in(reg) end,
                    out("xmm0") _,
                    options(nostack, readonly),
                )
            }
        };
    }
    macro_rules! either {
        ($loads:tt, $last:literal) => {
            if AHEAD {
                loop_of!(
                    $loads,
                    $last,
                    [
                        "prefetcht0 [{p} + 4096]",
                        "prefetcht0 [{p} + 4160]",
                        "prefetcht0 [{p} + 4224]",
                        "prefetcht0 [{p} + 4288]",
                        "prefetcht0 [{p} + 4352]",
                        "prefetcht0 [{p} + 4416]",
                        "prefetcht0 [{p} + 4480]",
                        "prefetcht0 [{p} + 4544]"
                    ]
                )
            } else {
                loop_of!($loads, $last, [])
            }
        };
    }
    if is_x86_feature_detected!("avx512f") {
        either!(
            [
                "vmovdqu64 zmm0, [{p}]",
                "vmovdqu64 zmm0, [{p} + 64]",
                "vmovdqu64 zmm0, [{p} + 128]",
                "vmovdqu64 zmm0, [{p} + 192]",
                "vmovdqu64 zmm0, [{p} + 256]",
                "vmovdqu64 zmm0, [{p} + 320]",
                "vmovdqu64 zmm0, [{p} + 384]",
                "vmovdqu64 zmm0, [{p} + 448]"
            ],
            "vzeroupper"
        )
    } else if is_x86_feature_detected!("avx") {
        // Half of each line: the other half comes with it into the nearest cache, but has to be loaded all the same.
        either!(
            [".set at, 0", ".rept 16", "vmovdqu ymm0, [{p} + at]", ".set at, at + 32", ".endr"],
            "vzeroupper"
        )
    } else {
        either!([".set at, 0", ".rept 32", "movdqu xmm0, [{p} + at]", ".set at, at + 16", ".endr"], "")
    }
}

/// Loads every byte once; the compiler chooses the width, and the hardware prefetches.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn read<const AHEAD: bool>(bytes: &[u8]) {
    let mut sums = [0u64; 16];
    for chunk in bytes.chunks_exact(128) {
        for (sum, word) in sums.iter_mut().zip(chunk.chunks_exact(8)) {
            *sum ^= u64::from_le_bytes(word.try_into().unwrap_or_default());
        }
    }
    std::hint::black_box(sums);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_the_whole_in_order() {
        let bytes: Vec<u8> = (0..64 * 7).map(|i| (i % 251) as u8).collect();
        for threads in 1..=8 {
            let parts: Vec<&[u8]> = (0..threads).map(|t| share(&bytes, t, threads)).collect();
            assert_eq!(parts.concat(), bytes, "{threads} threads");
        }
    }

    /// Faults would end the process.
    #[test]
    fn loops_end_at_the_end() {
        for len in [0, 1, 511, 512, 513, 4096, 1 << 20] {
            let bytes = vec![1u8; len];
            read::<false>(&bytes);
            read::<true>(&bytes);
        }
    }
}
