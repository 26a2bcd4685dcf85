//! Page-aligned anonymous memory that kernels read and write.
//!
//! Pages are committed when first touched. Weights, of which all is used, ask for huge pages; what fills up as it is
//! used (KV cache, logits, step buffers) does not: the first token would commit 2 MiB for each layer's keys.

use crate::error::{Error, ErrorKind};
use memmap2::{MmapMut, MmapOptions};

const HUGE_PAGE: usize = 2 << 20;

/// Zeroed memory of a fixed size.
#[derive(Debug)]
pub(crate) struct Region {
    map: MmapMut,
    start: usize,
    len: usize,
}

impl Region {
    /// `len` zero bytes, aligned to at least 4096. `what` and `hint` go into the error.
    pub(crate) fn zeroed(len: u64, what: &'static str, hint: &'static str) -> Result<Region, Error> {
        Region::mapped(len, what, hint, false)
    }

    /// As [`Region::zeroed`], in huge pages where the system has them.
    pub(crate) fn huge(len: u64, what: &'static str, hint: &'static str) -> Result<Region, Error> {
        Region::mapped(len, what, hint, true)
    }

    fn mapped(len: u64, what: &'static str, hint: &'static str, huge: bool) -> Result<Region, Error> {
        let fail = |source| ErrorKind::Memory { what, bytes: len, hint, source };
        let out_of_memory = || fail(std::io::ErrorKind::OutOfMemory.into());
        let len = usize::try_from(len).map_err(|_| out_of_memory())?;
        let huge = huge && len >= 2 * HUGE_PAGE;
        let room = if huge { len.checked_add(HUGE_PAGE).ok_or_else(out_of_memory)? } else { len.max(1) };
        let map = MmapOptions::new().len(room).no_reserve_swap().map_anon().map_err(fail)?;
        let start = if huge { map.as_ptr().align_offset(HUGE_PAGE).min(room - len) } else { 0 };
        #[cfg(target_os = "linux")]
        if huge {
            // Only a wish: kernels without transparent huge pages refuse it, and all works without.
            let _ = map.advise(memmap2::Advice::HugePage);
        }
        Ok(Region { map, start, len })
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        self.map.get(self.start..self.start + self.len).unwrap_or_default()
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        self.map.get_mut(self.start..self.start + self.len).unwrap_or_default()
    }

    /// Address that kernels are given.
    pub(crate) fn address(&mut self) -> u64 {
        self.bytes_mut().as_mut_ptr().expose_provenance() as u64
    }

    /// The memory as numbers of 4 bytes.
    pub(crate) fn words<T: bytemuck::Pod>(&self) -> &[T] {
        bytemuck::try_cast_slice(self.bytes()).unwrap_or_default()
    }

    /// The memory as numbers of 4 bytes, to be written.
    pub(crate) fn words_mut<T: bytemuck::Pod>(&mut self) -> &mut [T] {
        bytemuck::try_cast_slice_mut(self.bytes_mut()).unwrap_or_default()
    }
}
