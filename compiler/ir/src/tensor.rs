//! Dense tensors of the reference interpreter.

/// A tensor with concrete dimensions, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    pub shape: Vec<usize>,
    pub data: TensorData,
}

/// Elements of a [`Tensor`]. Real numbers are held in f64; the f32 interpreter rounds every op's result to f32.
#[derive(Clone, Debug, PartialEq)]
pub enum TensorData {
    Real(Vec<f64>),
    Int(Vec<i32>),
}

impl Tensor {
    pub fn real(shape: impl Into<Vec<usize>>, data: Vec<f64>) -> Tensor {
        let shape = shape.into();
        debug_assert_eq!(shape.iter().product::<usize>(), data.len());
        Tensor { shape, data: TensorData::Real(data) }
    }

    pub fn int(shape: impl Into<Vec<usize>>, data: Vec<i32>) -> Tensor {
        let shape = shape.into();
        debug_assert_eq!(shape.iter().product::<usize>(), data.len());
        Tensor { shape, data: TensorData::Int(data) }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The innermost dimension (1 for a scalar).
    pub fn last(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Real elements; empty for integers.
    pub fn as_real(&self) -> &[f64] {
        match &self.data {
            TensorData::Real(v) => v,
            TensorData::Int(_) => &[],
        }
    }

    /// Integer elements; empty for reals.
    pub fn as_int(&self) -> &[i32] {
        match &self.data {
            TensorData::Int(v) => v,
            TensorData::Real(_) => &[],
        }
    }
}
