//! Block types of ggml and their decoders, one file each. A tensor's innermost dimension is cut into blocks of
//! `block_values` values that take `block_bytes` bytes; everything is little-endian.
//!
//! Decoders compute in f32 in the order of the `gguf` Python package, so results agree bit for bit.

mod bf16;
mod f16;
mod f32;
mod iq4_nl;
mod mxfp4;
mod q2_k;
mod q3_k;
mod q4_0;
mod q4_1;
mod q4_k;
mod q5_0;
mod q5_1;
mod q5_k;
mod q6_k;
mod q8_0;

pub use self::bf16::BF16;
pub use self::f16::F16;
pub use self::f32::F32;
pub use self::iq4_nl::IQ4_NL;
pub use self::mxfp4::MXFP4;
pub use self::q2_k::Q2_K;
pub use self::q3_k::Q3_K;
pub use self::q4_0::Q4_0;
pub use self::q4_1::Q4_1;
pub use self::q4_k::Q4_K;
pub use self::q5_0::Q5_0;
pub use self::q5_1::Q5_1;
pub use self::q5_k::Q5_K;
pub use self::q6_k::Q6_K;
pub use self::q8_0::Q8_0;

use half::f16 as Half;
use rayon::prelude::*;

/// One block type.
pub struct GgmlType {
    /// As ggml spells it: `Q4_K`.
    pub name: &'static str,
    /// Number of the type in a GGUF file.
    pub id: u32,
    pub block_values: usize,
    pub block_bytes: usize,
    /// Decodes whole blocks.
    pub decode: fn(&[u8], &mut [f32]),
}

/// Every type that can be read.
pub const ALL: [&GgmlType; 15] = [
    &F32, &F16, &BF16, &Q4_0, &Q4_1, &Q5_0, &Q5_1, &Q8_0, &Q2_K, &Q3_K, &Q4_K, &Q5_K, &Q6_K, &IQ4_NL, &MXFP4,
];

/// Types of ggml that cannot be read, so that an error can name them.
const OTHERS: [(u32, &str); 23] = [
    (4, "Q4_2"),
    (5, "Q4_3"),
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (31, "Q4_0_4_4"),
    (32, "Q4_0_4_8"),
    (33, "Q4_0_8_8"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (40, "NVFP4"),
];

impl GgmlType {
    /// Bytes of `values` values, or `None` when they are no whole number of blocks or overflow.
    pub fn bytes(&self, values: u64) -> Option<u64> {
        let blocks = values / self.block_values as u64;
        if blocks * self.block_values as u64 != values {
            return None;
        }
        blocks.checked_mul(self.block_bytes as u64)
    }

    /// Decodes whole blocks, on several threads where there are many.
    pub fn decode_all(&self, bytes: &[u8]) -> Vec<f32> {
        const AT_ONCE: usize = 1 << 12;
        let mut out = vec![0f32; bytes.len() / self.block_bytes * self.block_values];
        let values = out.par_chunks_mut(AT_ONCE * self.block_values);
        values.zip(bytes.par_chunks(AT_ONCE * self.block_bytes)).for_each(|(y, b)| (self.decode)(b, y));
        out
    }

    /// Name in reports: `q4_k`.
    pub fn lower_name(&self) -> String {
        self.name.to_ascii_lowercase()
    }
}

impl std::fmt::Debug for GgmlType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

impl PartialEq for GgmlType {
    fn eq(&self, other: &GgmlType) -> bool {
        self.id == other.id
    }
}

/// The type of that number.
pub fn by_id(id: u32) -> Option<&'static GgmlType> {
    ALL.into_iter().find(|t| t.id == id)
}

/// ggml's name of a number, known or not.
pub fn name_of(id: u32) -> String {
    let other = || OTHERS.iter().find(|(n, _)| *n == id).map(|(_, name)| *name);
    match by_id(id).map(|t| t.name).or_else(other) {
        Some(name) => name.to_owned(),
        None => format!("number {id}, which ggml does not define"),
    }
}

/// Names of all types that can be read, for messages.
pub fn names() -> String {
    ALL.map(|t| t.name).join(", ")
}

/// Decodes blocks of `VALUES` values in `BYTES` bytes one after another.
#[inline(always)]
fn each_block<const BYTES: usize, const VALUES: usize>(
    bytes: &[u8],
    values: &mut [f32],
    block: impl Fn(&[u8; BYTES], &mut [f32; VALUES]),
) {
    let (blocks, _) = bytes.as_chunks();
    let (values, _) = values.as_chunks_mut();
    for (b, y) in blocks.iter().zip(values) {
        block(b, y);
    }
}

/// The f16 at `at`.
fn half_at(block: &[u8], at: usize) -> f32 {
    Half::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Nibbles of 16 bytes: value `i` is the low nibble of byte `i`, value `i + 16` its high nibble.
fn nibbles(bytes: &[u8], mut each: impl FnMut(usize, u8)) {
    for (i, b) in bytes.iter().enumerate() {
        each(i, b & 0xf);
        each(i + 16, b >> 4);
    }
}

/// The eight 6-bit (scale, minimum) pairs that `Q4_K` and `Q5_K` pack into 12 bytes.
fn scale_min(packed: &[u8], i: usize) -> (f32, f32) {
    let (scale, min) = if i < 4 {
        (packed[i] & 63, packed[i + 4] & 63)
    } else {
        ((packed[i + 4] & 0xf) | ((packed[i - 4] >> 6) << 4), (packed[i + 4] >> 4) | ((packed[i] >> 6) << 4))
    };
    (f32::from(scale), f32::from(min))
}
