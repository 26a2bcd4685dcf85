//! One tensor of a container: where its bytes are and how they become f32.

use super::file::FileBytes;
use super::ggml_types::GgmlType;
use attar_ir::WeightReader;
use std::ops::Range;
use std::sync::Arc;

/// A tensor as a header declares it. The range has been checked against the file and fits shape and type.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorEntry {
    pub name: String,
    /// Outermost dimension first.
    pub shape: Vec<usize>,
    pub kind: &'static GgmlType,
    /// Byte offsets in the file.
    pub range: Range<usize>,
}

/// How the rows of a stored matrix relate to the rows the graph means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowOrder {
    AsStored,
    /// Within each of `heads` heads the halves are interleaved: stored row `2 i + j` is row `i + j Dh/2`. llama.cpp's
    /// converter stores queries and keys of its `llama` architecture so, for a rotation of neighbours.
    Interleaved {
        heads: usize,
    },
}

/// Tensors of that many bytes leave no pages behind when read, so that importing costs memory for one tensor and not
/// for the file; for smaller ones the call costs more than it frees.
const RELEASE_FROM: usize = 1 << 16;

/// Reads one tensor of a mapped file.
#[derive(Debug)]
pub struct TensorReader {
    pub file: Arc<FileBytes>,
    pub entry: TensorEntry,
    pub rows: RowOrder,
}

impl WeightReader for TensorReader {
    fn read_f32(&self) -> attar_ir::Result<Vec<f32>> {
        let Some(bytes) = self.file.get(self.entry.range.clone()) else {
            let problem = format!("bytes {:?} are not in {}", self.entry.range, self.file.path.display());
            return Err(attar_ir::Error::new(attar_ir::ErrorKind::Weight { problem }));
        };
        let values = self.entry.kind.decode_all(bytes);
        if bytes.len() >= RELEASE_FROM {
            self.file.release(self.entry.range.clone());
        }
        Ok(match self.rows {
            RowOrder::AsStored => values,
            RowOrder::Interleaved { heads } => {
                deinterleave(&values, self.entry.shape.first().copied(), heads)
            }
        })
    }

    fn stored_as(&self) -> String {
        self.entry.kind.lower_name()
    }

    fn borrow_f32(&self) -> Option<&[f32]> {
        let as_they_are = self.rows == RowOrder::AsStored && cfg!(target_endian = "little");
        if self.entry.kind.lower_name() != "f32" || !as_they_are {
            return None;
        }
        bytemuck::try_cast_slice(self.file.get(self.entry.range.clone())?).ok()
    }
}

/// Puts interleaved rows back into halves. `rows` must be a multiple of `2 * heads`, or nothing is moved.
fn deinterleave(values: &[f32], rows: Option<usize>, heads: usize) -> Vec<f32> {
    let n = rows.unwrap_or(0);
    if heads == 0 || n == 0 || !n.is_multiple_of(2 * heads) {
        return values.to_vec();
    }
    let (width, half) = (values.len() / n, n / heads / 2);
    let mut out = Vec::with_capacity(values.len());
    for row in 0..n {
        let (head, j, i) = (row / (2 * half), row / half % 2, row % half);
        let from = head * 2 * half + 2 * i + j;
        out.extend_from_slice(&values[from * width..(from + 1) * width]);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_each_head_are_put_back_into_halves() {
        // two heads of width 4, one column: stored 0 2 1 3 | 4 6 5 7 when interleaved
        let stored = [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0];
        assert_eq!(deinterleave(&stored, Some(8), 2), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
    }

    #[test]
    fn a_row_count_that_does_not_fit_moves_nothing() {
        assert_eq!(deinterleave(&[1.0, 2.0, 3.0], Some(3), 2), [1.0, 2.0, 3.0]);
    }
}
