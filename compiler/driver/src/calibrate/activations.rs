//! Values of all calibration windows between two steps of a run: in memory up to a limit, then in an unnamed file.

use attar_ir::ValueId;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::{Mutex, PoisonError};

/// Values by node and window.
#[derive(Debug)]
pub(crate) struct Activations {
    /// Bytes that may be held in memory.
    limit: u64,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    places: BTreeMap<(ValueId, usize), Place>,
    bytes: u64,
    file: Option<File>,
    /// End of the file.
    end: u64,
    /// Parts of the file that are free again, by length.
    free: Vec<(u64, u64)>,
}

#[derive(Debug)]
enum Place {
    Memory(Vec<f32>),
    File { offset: u64, len: usize },
}

impl Activations {
    /// Room for values; at most `limit` bytes of them stay in memory.
    pub(crate) fn new(limit: u64) -> Activations {
        Activations { limit, held: Mutex::default() }
    }

    /// Keeps a value of a window.
    ///
    /// # Errors
    /// When the temporary file cannot be made or written.
    pub(crate) fn put(&self, value: ValueId, window: usize, data: Vec<f32>) -> io::Result<()> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = data.len() as u64 * 4;
        let place = if held.bytes + bytes <= self.limit {
            held.bytes += bytes;
            Place::Memory(data)
        } else {
            let offset = held.reserve(bytes);
            if held.file.is_none() {
                held.file = Some(tempfile::tempfile()?);
            }
            let Some(file) = &mut held.file else { return Err(io::Error::other("no file")) };
            write_at(file, bytemuck::cast_slice(&data), offset)?;
            Place::File { offset, len: data.len() }
        };
        held.places.insert((value, window), place);
        Ok(())
    }

    /// A value of a window, if it is kept.
    ///
    /// # Errors
    /// When the temporary file cannot be read.
    pub(crate) fn get(&self, value: ValueId, window: usize) -> io::Result<Option<Vec<f32>>> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let (offset, len) = match held.places.get(&(value, window)) {
            None => return Ok(None),
            Some(Place::Memory(data)) => return Ok(Some(data.clone())),
            Some(Place::File { offset, len }) => (*offset, *len),
        };
        let Some(file) = &mut held.file else { return Err(io::Error::other("no file")) };
        let mut data = vec![0.0f32; len];
        read_at(file, bytemuck::cast_slice_mut(&mut data), offset)?;
        Ok(Some(data))
    }

    /// Whether any window's value is kept.
    pub(crate) fn has(&self, value: ValueId) -> bool {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.places.range((value, 0)..=(value, usize::MAX)).next().is_some()
    }

    /// Forgets a value of a window.
    pub(crate) fn drop_one(&self, value: ValueId, window: usize) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        match held.places.remove(&(value, window)) {
            Some(Place::Memory(data)) => held.bytes -= data.len() as u64 * 4,
            Some(Place::File { offset, len }) => held.free.push((len as u64 * 4, offset)),
            None => {}
        }
    }
}

impl Held {
    /// Where `bytes` can be written: a free part of that length, or the end.
    fn reserve(&mut self, bytes: u64) -> u64 {
        match self.free.iter().position(|(len, _)| *len == bytes) {
            Some(i) => self.free.swap_remove(i).1,
            None => {
                self.end += bytes;
                self.end - bytes
            }
        }
    }
}

fn write_at(file: &mut File, bytes: &[u8], offset: u64) -> io::Result<()> {
    use io::{Seek, SeekFrom, Write};
    file.seek(SeekFrom::Start(offset))?;
    file.write_all(bytes)
}

fn read_at(file: &mut File, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    use io::{Read, Seek, SeekFrom};
    file.seek(SeekFrom::Start(offset))?;
    file.read_exact(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use attar_ir::{Dim, Graph, TensorType};

    #[test]
    fn values_come_back_from_memory_and_from_the_file() {
        let mut graph = Graph::new("f");
        let v = graph.add_input("x", TensorType::f32([Dim::T]));
        let kept = Activations::new(16);
        for round in 0..3 {
            for window in 0..4usize {
                kept.put(v, window, vec![window as f32 + round as f32; 3]).unwrap();
            }
            for window in 0..4usize {
                assert_eq!(kept.get(v, window).unwrap(), Some(vec![window as f32 + round as f32; 3]));
                kept.drop_one(v, window);
            }
            assert!(!kept.has(v));
        }
        let held = kept.held.lock().unwrap();
        assert_eq!((held.bytes, held.end), (0, 36));
    }
}
