//! Arithmetic compiled for the vectors a machine has.
//!
//! Work is written once, over arrays of fixed length, and compiled for every level. Each number is computed by the same
//! operations in the same order at all of them, and multiplications are never joined with additions: bits do not depend on
//! the level.

/// Vectors that a machine is known to have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Level(Vectors);

/// Private, so that only [`Level::available`] makes a level.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Vectors {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

/// Something to compute. Implementations mark `run`, and what it calls, `#[inline(always)]`.
pub trait Work {
    type Output;

    fn run(self) -> Self::Output;
}

impl Level {
    /// What every machine of the architecture has.
    pub const PORTABLE: Level = Level(Vectors::Portable);

    /// All levels of this machine, the widest last.
    pub fn available() -> Vec<Level> {
        let mut levels = vec![Level::PORTABLE];
        #[cfg(target_arch = "x86_64")]
        {
            let has_avx2 = std::arch::is_x86_feature_detected!("avx2");
            let has_avx512 = std::arch::is_x86_feature_detected!("avx512f")
                && std::arch::is_x86_feature_detected!("avx512bw")
                && std::arch::is_x86_feature_detected!("avx512dq")
                && std::arch::is_x86_feature_detected!("avx512vl");
            levels.extend(has_avx2.then_some(Level(Vectors::Avx2)));
            levels.extend((has_avx2 && has_avx512).then_some(Level(Vectors::Avx512)));
        }
        levels
    }

    /// The widest level of this machine.
    pub fn widest() -> Level {
        Level::available().last().copied().unwrap_or(Level::PORTABLE)
    }

    /// Computes something with this level's vectors.
    #[inline(always)]
    pub fn run<W: Work>(self, work: W) -> W::Output {
        match self.0 {
            Vectors::Portable => work.run(),
            // SAFETY: `available`, which alone makes this level, found all features that the function is compiled for.
            #[cfg(target_arch = "x86_64")]
            Vectors::Avx2 => unsafe { with_avx2(work) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Vectors::Avx512 => unsafe { with_avx512(work) },
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn with_avx2<W: Work>(work: W) -> W::Output {
    work.run()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,avx512f,avx512bw,avx512dq,avx512vl")]
fn with_avx512<W: Work>(work: W) -> W::Output {
    work.run()
}
