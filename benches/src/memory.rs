//! Memory for measurements: aligned, in huge pages where the system gives them, as the runtime keeps weights.

use anyhow::Result;
use memmap2::MmapMut;

/// Readable memory at an address that is a multiple of 2 MiB.
#[derive(Debug)]
pub(crate) struct Region {
    map: MmapMut,
    start: usize,
    len: usize,
}

const HUGE: usize = 2 << 20;

impl Region {
    /// Zeros; no page is there before it is written.
    pub(crate) fn zeroed(len: usize) -> Result<Region> {
        let map = MmapMut::map_anon(len + HUGE)?;
        // A wish: without huge pages the same is measured, somewhat slower.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        let address = map.as_ptr() as usize;
        Ok(Region { start: address.next_multiple_of(HUGE) - address, map, len })
    }

    /// Bytes that are not zero, so that every page is there.
    pub(crate) fn filled(len: usize) -> Result<Region> {
        let mut region = Region::zeroed(len)?;
        region.bytes_mut().fill(0x5a);
        Ok(region)
    }

    /// `bytes` as often as fits into `footprint`, at least once, each at a multiple of 64. Also the distance from one to
    /// the next.
    pub(crate) fn copies(bytes: &[u8], footprint: usize) -> Result<(Region, usize)> {
        let stride = bytes.len().next_multiple_of(64);
        let mut region = Region::zeroed((footprint / stride).max(1) * stride)?;
        for copy in region.bytes_mut().chunks_exact_mut(stride) {
            copy[..bytes.len()].copy_from_slice(bytes);
        }
        Ok((region, stride))
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.map[self.start..self.start + self.len]
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.map[self.start..self.start + self.len]
    }

    /// As kernels take it: whoever passes it on answers for what is written there.
    pub(crate) fn address(&self) -> u64 {
        self.bytes().as_ptr() as u64
    }
}

/// Pseudorandom numbers (SplitMix64), the same every time.
#[derive(Debug)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in −1..1.
    pub(crate) fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub(crate) fn f32s(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.unit()).collect()
    }
}

/// A region holding these f32.
pub(crate) fn floats(values: &[f32]) -> Result<Region> {
    let mut region = Region::zeroed(values.len() * 4)?;
    for (to, value) in region.bytes_mut().chunks_exact_mut(4).zip(values) {
        to.copy_from_slice(&value.to_le_bytes());
    }
    Ok(region)
}
