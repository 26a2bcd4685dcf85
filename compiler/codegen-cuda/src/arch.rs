//! GPU architectures that code is made for.

use std::fmt;

/// What a code section of an artifact is for: the machine code of one architecture, or PTX, from which a driver makes the
/// machine code of any later one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum CudaTarget {
    /// Machine code. An architecture with the suffix `a` has instructions that no other has, and runs on no other.
    Sm { compute: u32, specific: bool },
    /// PTX of the oldest architecture that kernels are written for.
    Ptx,
}

/// Compute capability, as `10 * major + minor`, that kernels need: `mma.sync` of bytes and bf16, and `cp.async`.
pub const LEAST_COMPUTE: u32 = 80;

impl CudaTarget {
    /// Architectures that can be asked for.
    pub const ALL: [CudaTarget; 7] = [
        CudaTarget::sm(80),
        CudaTarget::sm(86),
        CudaTarget::sm(89),
        CudaTarget::sm(90),
        CudaTarget::Sm { compute: 90, specific: true },
        CudaTarget::sm(100),
        CudaTarget::sm(120),
    ];

    const fn sm(compute: u32) -> CudaTarget {
        CudaTarget::Sm { compute, specific: false }
    }

    /// Name on the command line and in artifacts: `cuda:sm_90a`, `cuda:compute_80`.
    pub fn name(self) -> String {
        format!("cuda:{self}")
    }

    /// Whether it has matrix products of four warps at once.
    pub fn has_wgmma(self) -> bool {
        self == CudaTarget::Sm { compute: 90, specific: true }
    }

    /// Shared memory of a block of which two should find room on a multiprocessor, where one has more than it must give a block.
    pub(crate) fn shared_bytes(self) -> usize {
        // A block is charged 1 KiB beside.
        let of_two = |kib: usize| (kib << 10) / 2 - 1024;
        match self {
            CudaTarget::Sm { compute: 80, .. } => of_two(164),
            CudaTarget::Sm { compute: 90 | 100, .. } => of_two(228),
            CudaTarget::Sm { .. } | CudaTarget::Ptx => CudaTarget::LEAST_SHARED,
        }
    }

    /// Shared memory that every GPU gives a block.
    pub(crate) const LEAST_SHARED: usize = 96 << 10;

    /// The target of that name.
    pub fn by_name(name: &str) -> Option<CudaTarget> {
        CudaTarget::ALL.into_iter().find(|t| t.name() == name)
    }
}

impl fmt::Display for CudaTarget {
    /// As NVRTC's option `--gpu-architecture` spells it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            CudaTarget::Sm { compute, specific } => {
                write!(f, "sm_{compute}{}", if *specific { "a" } else { "" })
            }
            CudaTarget::Ptx => write!(f, "compute_{LEAST_COMPUTE}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for target in CudaTarget::ALL {
            assert_eq!(CudaTarget::by_name(&target.name()), Some(target));
        }
        assert_eq!(CudaTarget::by_name("cuda:sm_90a").map(CudaTarget::name).as_deref(), Some("cuda:sm_90a"));
        assert_eq!(CudaTarget::by_name("cuda:sm_70"), None);
        assert_eq!(CudaTarget::Ptx.name(), "cuda:compute_80");
    }
}
