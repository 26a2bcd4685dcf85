//! Packed tensors: which weights an artifact carries, in which row order, and their bytes.
//!
//! Lowering lists tensors and gives each its place in the weights section; [`PackedTensor::bytes`] makes the bytes of
//! one at a time, so that packaging never holds the whole model.

use attar_format::{CHANNELS, Encoded, FormatRef, PackedLayout, formats};
use attar_ir::{Error as IrError, ErrorKind as IrErrorKind, WeightName, WeightStore};

/// Boundary every tensor of the weights section starts at.
pub const TENSOR_ALIGN: u64 = 64;

/// Order of a matrix's rows in the packed tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RowOrder {
    /// As in the checkpoint.
    Natural,
    /// Stacked gate and up rows `[2F]`: 16 gate rows, then the 16 up rows that belong to them, and so on. F is a
    /// multiple of 16.
    GateUp,
}

impl RowOrder {
    /// The source row of each packed row, or `None` when nothing moves.
    pub fn indices(self, rows: usize) -> Option<Vec<usize>> {
        match self {
            RowOrder::Natural => None,
            RowOrder::GateUp => {
                let f = rows / 2;
                let block = |b: usize| (b..b + CHANNELS).chain(f + b..f + b + CHANNELS);
                Some((0..f).step_by(CHANNELS).flat_map(block).collect())
            }
        }
    }
}

/// How a tensor's bytes are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorLayout {
    /// A matrix `[n, k]` in a weight format, as [`PackedLayout`] describes it.
    Matrix { format: FormatRef, order: RowOrder },
    /// Plain little-endian f32, row-major, padded with zeros to a multiple of 16 elements: gains and biases.
    Plain,
}

/// One tensor of the weights section.
#[derive(Clone, Debug, PartialEq)]
pub struct PackedTensor {
    /// Name in the manifest; unique.
    pub name: String,
    /// The weight it is made of.
    pub source: WeightName,
    pub layout: TensorLayout,
    /// `[N, K]` or `[D]`, as in the weight store.
    pub shape: Vec<usize>,
    /// From the start of the weights section; a multiple of [`TENSOR_ALIGN`].
    pub offset: u64,
    pub len: u64,
}

impl PackedTensor {
    /// Bytes of a tensor of that layout and shape; `None` when the format cannot hold the shape.
    pub fn len_of(layout: TensorLayout, shape: &[usize]) -> Option<u64> {
        match (layout, shape) {
            (TensorLayout::Matrix { format, .. }, [n, k]) => {
                PackedLayout::new(format, *n, *k).map(|l| l.total_bytes() as u64)
            }
            (TensorLayout::Matrix { .. }, _) => None,
            (TensorLayout::Plain, _) => {
                let elements = shape.iter().try_fold(1usize, |a, d| a.checked_mul(*d))?;
                Some(elements.checked_next_multiple_of(CHANNELS)?.checked_mul(4)? as u64)
            }
        }
    }

    /// Shape for manifests: `[N, K]` of a matrix, or the number of elements of a plain tensor with its padding.
    pub fn file_shape(&self) -> Vec<u64> {
        match self.layout {
            TensorLayout::Matrix { .. } => self.shape.iter().map(|d| *d as u64).collect(),
            TensorLayout::Plain => vec![self.len / 4],
        }
    }

    /// Name of the format for manifests; plain tensors are `f32`.
    pub fn format_name(&self) -> &'static str {
        match self.layout {
            TensorLayout::Matrix { format, .. } => format.name,
            TensorLayout::Plain => formats::F32.name,
        }
    }

    /// The tensor's `len` bytes, made from the weight store. Costs memory for this tensor only.
    ///
    /// # Errors
    /// When the weight is missing, cannot be read, or is not what lowering saw.
    pub fn bytes(&self, weights: &WeightStore) -> Result<Vec<u8>, IrError> {
        let bytes = match self.layout {
            TensorLayout::Plain => {
                let values = weights.read_f32(&self.source)?;
                let mut bytes = Vec::with_capacity(values.len().next_multiple_of(CHANNELS) * 4);
                bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
                bytes.resize(values.len().next_multiple_of(CHANNELS) * 4, 0);
                bytes
            }
            TensorLayout::Matrix { format, order } => {
                let mut matrix = weights.read_encoded(&self.source)?;
                if [matrix.n, matrix.k] != self.shape[..] || matrix.format != format {
                    return Err(self.error(&format!(
                        "lowered as {} {:?}, but the store holds {} [{}, {}]",
                        format.name, self.shape, matrix.format.name, matrix.n, matrix.k
                    )));
                }
                if let Some(rows) = order.indices(matrix.n) {
                    matrix = matrix.select_rows(&rows);
                }
                Encoded::pack(&matrix).map_err(|e| self.error(&e.to_string()))?
            }
        };
        if bytes.len() as u64 != self.len {
            return Err(self.error(&format!("packed to {} bytes, planned {}", bytes.len(), self.len)));
        }
        Ok(bytes)
    }

    fn error(&self, problem: &str) -> IrError {
        IrError::new(IrErrorKind::Weight { problem: problem.to_owned() }).at_tensor(&*self.source)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gate_and_up_rows_alternate_in_blocks_and_none_is_lost() {
        let order = RowOrder::GateUp.indices(96).expect("a permutation");
        assert_eq!(order[..3], [0, 1, 2]);
        assert_eq!(order[16..19], [48, 49, 50]);
        assert_eq!(order[32..34], [16, 17]);
        assert_eq!(order[48..50], [64, 65]);
        let mut sorted = order;
        sorted.sort_unstable();
        assert_eq!(sorted, (0..96).collect::<Vec<_>>());
    }

    #[test]
    fn packed_matrix_reads_back_in_the_new_order() {
        let mut store = WeightStore::new();
        let values: Vec<f32> = (0..32 * 4).map(|v| v as f32).collect();
        let source = store.add_values("w", &[32, 4], values.clone());
        let layout = TensorLayout::Matrix { format: &formats::F32, order: RowOrder::GateUp };
        let len = PackedTensor::len_of(layout, &[32, 4]).expect("fits");
        let tensor = PackedTensor { name: "w".into(), source, layout, shape: vec![32, 4], offset: 0, len };
        let bytes = tensor.bytes(&store).expect("packs");
        let back = Encoded::unpack(&formats::F32, 32, 4, &bytes).expect("unpacks").decode();
        let order = RowOrder::GateUp.indices(32).expect("a permutation");
        for (row, from) in back.chunks(4).zip(order) {
            assert_eq!(row, &values[from * 4..from * 4 + 4]);
        }
    }

    #[test]
    fn plain_tensors_are_padded_to_a_block() {
        let mut store = WeightStore::new();
        let source = store.add_values("b", &[5], vec![1.0; 5]);
        let len = PackedTensor::len_of(TensorLayout::Plain, &[5]).expect("fits");
        assert_eq!(len, 64);
        let tensor = PackedTensor {
            name: "b".into(),
            source,
            layout: TensorLayout::Plain,
            shape: vec![5],
            offset: 0,
            len,
        };
        let bytes = tensor.bytes(&store).expect("packs");
        assert_eq!(&bytes[..4], &1.0f32.to_le_bytes());
        assert!(bytes[20..].iter().all(|b| *b == 0));
    }
}
