//! Page-aligned anonymous memory that kernels read and write.
//!
//! Pages are committed when first touched. Weights, of which all is used, ask for huge pages; what fills up as it is
//! used (KV cache, logits, step buffers) does not: the first token would commit 2 MiB for each layer's keys.
//!
//! Where memory is in pieces the system moves other pages out of the way to make a huge one, and whoever touches it first
//! waits. Then weights begin in small pages, and [`Region::collapse`] joins them on a thread of its own while they are in use.

use crate::error::{Error, ErrorKind};
use memmap2::{MmapMut, MmapOptions};
use std::sync::Arc;

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

    /// As [`Region::zeroed`], in huge pages where the system has them, else placed so that they can be made.
    pub(crate) fn huge(len: u64, what: &'static str, hint: &'static str) -> Result<Region, Error> {
        let region = Region::mapped(len, what, hint, true)?;
        #[cfg(target_os = "linux")]
        if region.wants_huge_pages() && free_huge_pages().is_none_or(|free| free > region.huge_pages()) {
            // Only a wish: kernels without transparent huge pages refuse it, and all works without.
            let _ = region.map.advise(memmap2::Advice::HugePage);
        }
        Ok(region)
    }

    fn wants_huge_pages(&self) -> bool {
        self.len >= 2 * HUGE_PAGE
    }

    fn huge_pages(&self) -> usize {
        self.len.div_ceil(HUGE_PAGE)
    }

    /// Joins small pages to huge ones on a thread of its own, for as long as somebody else holds the region. What it contains
    /// stays readable and the same all the time. Does nothing where pages are huge already or the system cannot.
    #[cfg(target_os = "linux")]
    pub(crate) fn collapse(region: &Arc<Region>) {
        if !region.wants_huge_pages() {
            return;
        }
        let region = region.clone();
        let work = move || {
            for page in 0..region.len / HUGE_PAGE {
                if Arc::strong_count(&region) == 1 || !region.collapse_page(page) {
                    return;
                }
            }
        };
        // Without a thread for it pages stay small.
        let _ = std::thread::Builder::new().name("attar-pages".to_owned()).stack_size(64 << 10).spawn(work);
    }

    #[cfg(not(target_os = "linux"))]
    pub(crate) fn collapse(_: &Arc<Region>) {}

    /// Makes one huge page; false where the system has no such call.
    #[cfg(target_os = "linux")]
    fn collapse_page(&self, page: usize) -> bool {
        /// Since Linux 6.1.
        const MADV_COLLAPSE: libc::c_int = 25;
        let start = self.bytes().as_ptr().wrapping_add(page * HUGE_PAGE);
        // SAFETY: the range lies in this mapping, whose contents the call keeps.
        let result = unsafe { libc::madvise(start.cast_mut().cast(), HUGE_PAGE, MADV_COLLAPSE) };
        result == 0 || std::io::Error::last_os_error().raw_os_error() != Some(libc::EINVAL)
    }

    fn mapped(len: u64, what: &'static str, hint: &'static str, huge: bool) -> Result<Region, Error> {
        let fail = |source| ErrorKind::Memory { what, bytes: len, hint, source };
        let out_of_memory = || fail(std::io::ErrorKind::OutOfMemory.into());
        let len = usize::try_from(len).map_err(|_| out_of_memory())?;
        let huge = huge && len >= 2 * HUGE_PAGE;
        let room = if huge { len.checked_add(HUGE_PAGE).ok_or_else(out_of_memory)? } else { len.max(1) };
        let map = MmapOptions::new().len(room).no_reserve_swap().map_anon().map_err(fail)?;
        let start = if huge { map.as_ptr().align_offset(HUGE_PAGE).min(room - len) } else { 0 };
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

/// Huge pages that the system could hand out at once; `None` where it does not tell.
#[cfg(target_os = "linux")]
fn free_huge_pages() -> Option<usize> {
    parse_buddyinfo(&std::fs::read_to_string("/proc/buddyinfo").ok()?)
}

/// Counts huge pages in what `/proc/buddyinfo` says: per zone, free blocks of 1, 2, 4, … pages of 4096 bytes.
#[cfg(target_os = "linux")]
fn parse_buddyinfo(text: &str) -> Option<usize> {
    const ORDER: usize = (HUGE_PAGE / 4096).ilog2() as usize;
    let mut pages = 0usize;
    for line in text.lines() {
        let (_, counts) = line.split_once("zone")?;
        for (order, count) in counts.split_whitespace().skip(1).enumerate().skip(ORDER) {
            let each = 1usize.checked_shl((order - ORDER) as u32)?;
            pages = pages.saturating_add(count.parse::<usize>().ok()?.saturating_mul(each));
        }
    }
    Some(pages)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn free_blocks_count_as_huge_pages() {
        let text = "Node 0, zone      DMA   0  0  0  0  0  0  0  0  1  1  3 \n\
                    Node 0, zone   Normal  117 1859 2633 1834 996 538 278 91 24 5 20 \n";
        assert_eq!(parse_buddyinfo(text), Some(1 + 2 * 3 + 5 + 2 * 20));
        assert_eq!(parse_buddyinfo("Node 0, zone DMA 1 x\n"), Some(0));
        assert_eq!(parse_buddyinfo("nonsense"), None);
        assert_eq!(parse_buddyinfo("Node 0, zone DMA 0 0 0 0 0 0 0 0 0 x"), None);
        assert!(free_huge_pages().is_some());
    }

    #[test]
    fn collapsing_keeps_what_is_there() {
        let len = 5 * HUGE_PAGE + 12345;
        let mut region = Region::mapped(len as u64, "a test", "", true).unwrap();
        assert_eq!(region.bytes().as_ptr().align_offset(HUGE_PAGE), 0);
        region.bytes_mut().iter_mut().enumerate().for_each(|(i, b)| *b = (i / 4096) as u8);
        let region = Arc::new(region);
        Region::collapse(&region);
        // Whatever the thread does meanwhile, and when it is done.
        while Arc::strong_count(&region) > 1 {
            assert!(region.bytes().iter().enumerate().step_by(997).all(|(i, b)| *b == (i / 4096) as u8));
        }
        assert!(region.bytes().iter().enumerate().all(|(i, b)| *b == (i / 4096) as u8));
    }
}
