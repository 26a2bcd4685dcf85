//! The fixed header: 128 bytes at the start of the file.
//!
//! | bytes | contents |
//! |---|---|
//! | 0..8 | magic `89 41 54 54 41 52 0d 0a` (`\x89ATTAR\r\n`: text-mode copying damages it visibly) |
//! | 8..12 | u32 major version; a reader refuses a greater one than it knows |
//! | 12..16 | u32 minor version; never a reason to refuse |
//! | 16..24 | u64 offset of the manifest, a multiple of 4096 |
//! | 24..32 | u64 length of the manifest, which reaches to the end of the file |
//! | 32..40 | u64 length of the file |
//! | 40..64 | zeros |
//! | 64..96 | BLAKE3 of the manifest's bytes |
//! | 96..128 | BLAKE3 of bytes 0..96 |
//!
//! Numbers are little-endian.

use crate::error::ErrorKind;

/// First bytes of every artifact.
pub const MAGIC: [u8; 8] = *b"\x89ATTAR\r\n";
/// Format version this crate writes; it reads every file of the same or a lower major version.
pub const VERSION: (u32, u32) = (1, 0);
/// Bytes of the header.
pub const HEADER_BYTES: usize = 128;
/// Sections and the manifest start at multiples of this.
pub const PAGE: u64 = 4096;
/// Largest manifest that is read.
pub const MAX_MANIFEST: u64 = 64 << 20;

/// The header's fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub major: u32,
    pub minor: u32,
    pub manifest_offset: u64,
    pub manifest_len: u64,
    pub file_len: u64,
    pub manifest_hash: [u8; 32],
}

impl Header {
    /// The header's bytes.
    pub fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        out[..8].copy_from_slice(&MAGIC);
        out[8..12].copy_from_slice(&self.major.to_le_bytes());
        out[12..16].copy_from_slice(&self.minor.to_le_bytes());
        out[16..24].copy_from_slice(&self.manifest_offset.to_le_bytes());
        out[24..32].copy_from_slice(&self.manifest_len.to_le_bytes());
        out[32..40].copy_from_slice(&self.file_len.to_le_bytes());
        out[64..96].copy_from_slice(&self.manifest_hash);
        let hash = blake3::hash(&out[..96]);
        out[96..].copy_from_slice(hash.as_bytes());
        out
    }

    /// Reads and checks a header; `file_len` is the true length of the file.
    ///
    /// The version is judged before the hash: a later major version may hash something else.
    ///
    /// # Errors
    /// Wrong magic, a newer major version, a hash that does not match, a length or a manifest range that do not fit
    /// the file.
    pub fn from_bytes(bytes: &[u8; HEADER_BYTES], file_len: u64) -> Result<Header, ErrorKind> {
        let u32_at = |at: usize| u32::from_le_bytes(field(bytes, at));
        let u64_at = |at: usize| u64::from_le_bytes(field(bytes, at));
        if bytes[..8] != MAGIC {
            return Err(ErrorKind::NotAnArtifact);
        }
        let header = Header {
            major: u32_at(8),
            minor: u32_at(12),
            manifest_offset: u64_at(16),
            manifest_len: u64_at(24),
            file_len: u64_at(32),
            manifest_hash: field(bytes, 64),
        };
        if header.major > VERSION.0 || header.major == 0 {
            let (major, minor) = (header.major, header.minor);
            return Err(ErrorKind::NewerVersion { major, minor, known: VERSION.0 });
        }
        if blake3::hash(&bytes[..96]) != blake3::Hash::from_bytes(field(bytes, 96)) {
            return Err(ErrorKind::HeaderHash);
        }
        if header.file_len != file_len {
            return Err(ErrorKind::Length { header: header.file_len, file: file_len });
        }
        let (offset, len) = (header.manifest_offset, header.manifest_len);
        let reaches_end = offset.checked_add(len) == Some(file_len);
        if !reaches_end || offset < PAGE || !offset.is_multiple_of(PAGE) || len > MAX_MANIFEST {
            return Err(ErrorKind::ManifestRange { offset, len, file: file_len });
        }
        Ok(header)
    }
}

/// `N` bytes from `at`, which callers keep inside the header.
fn field<const N: usize>(bytes: &[u8; HEADER_BYTES], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}
