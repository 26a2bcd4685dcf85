//! Bytes of a checkpoint's file: mapped, or in memory for tests and fuzzing.

use crate::error::{Error, ErrorKind, Result};
use memmap2::Mmap;
use std::fs::File;
use std::io::Read;
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};

/// The bytes of one file.
#[derive(Debug)]
pub struct FileBytes {
    pub path: PathBuf,
    data: Data,
}

#[derive(Debug)]
enum Data {
    Mapped(Mmap),
    Owned(Vec<u8>),
}

impl FileBytes {
    /// Maps a file. The file must not be cut short while it is mapped: reading past its end would end the process.
    ///
    /// # Errors
    /// When it cannot be opened or mapped, or is no regular file.
    pub fn map(path: &Path) -> Result<FileBytes> {
        let file = open_regular(path)?;
        // SAFETY: the map is read-only and private to this value; the bytes are only ever read as plain integers,
        // for which any content is valid, so another process writing to the file can change values but not
        // soundness. Truncation while mapped is documented above.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io("map", path, &e))?;
        Ok(FileBytes { path: path.to_owned(), data: Data::Mapped(map) })
    }

    /// Gives the memory behind a range back to the system. The bytes stay readable: they come from the file again.
    pub fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        if let Data::Mapped(map) = &self.data
            && range.end <= map.len()
        {
            // SAFETY: the map is backed by a file and never written to, so dropping its pages loses nothing.
            let advised = unsafe {
                map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len())
            };
            // Only advice: without it the pages stay until the system wants them.
            drop(advised);
        }
        #[cfg(not(unix))]
        drop(range);
    }

    /// Bytes that are in memory already, under a name for messages.
    pub fn from_vec(path: &Path, bytes: Vec<u8>) -> FileBytes {
        FileBytes { path: path.to_owned(), data: Data::Owned(bytes) }
    }
}

impl Deref for FileBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.data {
            Data::Mapped(m) => m,
            Data::Owned(v) => v,
        }
    }
}

/// Reads a text file of at most `limit` bytes.
///
/// # Errors
/// When it cannot be read, is longer, or is not UTF-8.
pub(crate) fn read_text(path: &Path, limit: u64) -> Result<String> {
    let file = open_regular(path)?;
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(|e| Error::io("read", path, &e))?;
    if bytes.len() as u64 > limit {
        let got = "a longer one".to_owned();
        return Err(Error::malformed(format!("a file of at most {limit} bytes"), got).at_file(path));
    }
    String::from_utf8(bytes).map_err(|e| {
        let got = format!("an invalid byte at {}", e.utf8_error().valid_up_to());
        Error::malformed("UTF-8", got).at_file(path)
    })
}

/// Opens a file that is neither a folder nor a device (which might block or never end).
fn open_regular(path: &Path) -> Result<File> {
    let meta = std::fs::metadata(path).map_err(|e| Error::io("open", path, &e))?;
    if !meta.is_file() {
        let kind = ErrorKind::NoCheckpoint { expected: "a regular file", got: "something else".to_owned() };
        return Err(Error::new(kind).at_file(path));
    }
    File::open(path).map_err(|e| Error::io("open", path, &e))
}
