//! Tensor maps: what `cp.async.bulk.tensor` copies from and to. Devices keep their encoding to themselves; this one is the
//! interpreter's own.

use crate::error::ErrorKind;

/// Bytes of an encoded map.
const BYTES: usize = 128;
const MAGIC: &[u8; 8] = b"PTXTMAP1";
/// Most dimensions a tensor has.
const MOST: usize = 5;

/// A tensor in global memory, and the box of it that one copy moves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorMap {
    /// Address of the first element; a multiple of 16.
    pub address: u64,
    pub element_bytes: usize,
    /// Elements along each dimension, the innermost first.
    pub dims: Vec<u64>,
    /// Bytes from one index to the next, of all dimensions but the innermost; multiples of 16.
    pub strides: Vec<u64>,
    /// Elements of the box along each dimension, at most 256.
    pub box_dims: Vec<u32>,
    /// Bytes within which pieces of 16 bytes are exchanged in shared memory: 32, 64, 128, or 0 for none.
    pub swizzle: usize,
}

impl TensorMap {
    /// The bytes a kernel takes as its parameter.
    ///
    /// # Errors
    /// What a driver would refuse to encode.
    pub fn encode(&self) -> Result<[u8; BYTES], ErrorKind> {
        self.check()?;
        let mut bytes = [0; BYTES];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..16].copy_from_slice(&self.address.to_le_bytes());
        bytes[16..20].copy_from_slice(&[
            self.element_bytes as u8,
            self.dims.len() as u8,
            self.swizzle as u8,
            0,
        ]);
        let mut at = 20;
        for n in &self.box_dims {
            bytes[at..at + 2].copy_from_slice(&(*n as u16).to_le_bytes());
            at += 2;
        }
        at = 32;
        for n in self.dims.iter().chain(&self.strides) {
            bytes[at..at + 8].copy_from_slice(&n.to_le_bytes());
            at += 8;
        }
        Ok(bytes)
    }

    /// # Errors
    /// The bytes are no tensor map of this interpreter.
    pub(crate) fn decode(bytes: &[u8; BYTES]) -> Result<TensorMap, ErrorKind> {
        let bad = || ErrorKind::Matrix("these bytes are no tensor map of the interpreter".to_owned());
        if &bytes[..8] != MAGIC {
            return Err(bad());
        }
        let word = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(word)
        };
        let rank = usize::from(bytes[17]);
        if !(1..=MOST).contains(&rank) {
            return Err(bad());
        }
        let map = TensorMap {
            address: word(8),
            element_bytes: usize::from(bytes[16]),
            dims: (0..rank).map(|d| word(32 + d * 8)).collect(),
            strides: (0..rank - 1).map(|d| word(32 + (rank + d) * 8)).collect(),
            box_dims: (0..rank)
                .map(|d| u32::from(u16::from_le_bytes([bytes[20 + d * 2], bytes[21 + d * 2]])))
                .collect(),
            swizzle: usize::from(bytes[18]),
        };
        map.check()?;
        Ok(map)
    }

    fn check(&self) -> Result<(), ErrorKind> {
        let rank = self.dims.len();
        let fail = |why: &str| Err(ErrorKind::Matrix(format!("tensor map: {why}")));
        if !(1..=MOST).contains(&rank) || self.strides.len() != rank - 1 || self.box_dims.len() != rank {
            return fail("1 to 5 dimensions, with a stride for each but the innermost, and a box");
        }
        if !matches!(self.element_bytes, 1 | 2 | 4 | 8) {
            return fail("elements of 1, 2, 4 or 8 bytes");
        }
        if !self.address.is_multiple_of(16)
            || self.strides.iter().any(|s| !s.is_multiple_of(16) || *s >= 1 << 40)
        {
            return fail("address and strides are multiples of 16");
        }
        if self.dims.iter().any(|d| !(1..=1 << 32).contains(d)) {
            return fail("1 to 2^32 elements along a dimension");
        }
        if self.box_dims.iter().any(|n| !(1..=256).contains(n)) {
            return fail("a box of 1 to 256 elements along a dimension");
        }
        let row = self.box_dims[0] as usize * self.element_bytes;
        if !row.is_multiple_of(16) {
            return fail("the innermost row of a box has a multiple of 16 bytes");
        }
        if !matches!(self.swizzle, 0 | 32 | 64 | 128) || (self.swizzle > 0 && row != self.swizzle) {
            // Narrower rows are allowed, but how devices place them is not written down.
            return fail("the innermost row of a box has as many bytes as the swizzle");
        }
        Ok(())
    }

    /// Bytes of a box in shared memory.
    pub(crate) fn box_bytes(&self) -> usize {
        self.box_dims.iter().map(|n| *n as usize).product::<usize>() * self.element_bytes
    }

    /// Rows of the box at `at` that lie in the tensor, at least in part: offset in the box, address, bytes.
    pub(crate) fn segments(&self, at: &[i32]) -> Vec<(usize, u64, usize)> {
        let row = self.box_dims[0] as usize * self.element_bytes;
        let first = i64::from(at[0]);
        let low = first.max(0);
        let high = (first + i64::from(self.box_dims[0])).min(self.dims[0] as i64);
        let outer: usize = self.box_dims[1..].iter().map(|n| *n as usize).product();
        let mut out = Vec::new();
        if low >= high {
            return out;
        }
        'rows: for index in 0..outer {
            let mut rest = index;
            let mut address = self.address;
            let outer_dims = self.box_dims.iter().zip(&self.dims).zip(at).skip(1);
            for (((n, dim), at), stride) in outer_dims.zip(&self.strides) {
                let i = i64::from(*at) + (rest % *n as usize) as i64;
                rest /= *n as usize;
                if !(0..*dim as i64).contains(&i) {
                    continue 'rows;
                }
                address = address.wrapping_add((i as u64).wrapping_mul(*stride));
            }
            let offset = index * row + (low - first) as usize * self.element_bytes;
            out.push((
                offset,
                address + low as u64 * self.element_bytes as u64,
                (high - low) as usize * self.element_bytes,
            ));
        }
        out
    }

    /// Where byte `offset` of a box lies when the box begins at `start` in shared memory.
    pub(crate) fn swizzled(&self, start: u64, offset: usize) -> u64 {
        let address = start + offset as u64;
        match self.swizzle {
            0 => address,
            swizzle => address ^ (address >> 7 & (swizzle as u64 / 16 - 1)) << 4,
        }
    }
}
