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

impl TensorData {
    /// `real` or `i32`, for messages.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            TensorData::Real(_) => "real",
            TensorData::Int(_) => "i32",
        }
    }
}

impl Tensor {
    /// Rounds real elements to the nearest f32.
    pub(crate) fn round_to_f32(&mut self) {
        if let TensorData::Real(values) = &mut self.data {
            values.iter_mut().for_each(|v| *v = f64::from(*v as f32));
        }
    }

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

    /// The same shape with `f` of every real element.
    pub(crate) fn map(&self, f: impl Fn(f64) -> f64) -> Tensor {
        Tensor::real(self.shape.clone(), self.as_real().iter().map(|x| f(*x)).collect())
    }

    /// The same shape with `f` of the real elements of both.
    pub(crate) fn zip(&self, other: &Tensor, f: impl Fn(f64, f64) -> f64) -> Tensor {
        let data = self.as_real().iter().zip(other.as_real()).map(|(a, b)| f(*a, *b)).collect();
        Tensor::real(self.shape.clone(), data)
    }

    /// Real elements along the innermost dimension, row by row.
    pub(crate) fn rows(&self) -> std::slice::ChunksExact<'_, f64> {
        self.as_real().chunks_exact(self.last().max(1))
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
