//! Single lanes, and numbers that count.

use super::*;

impl Lanes<'_> {
    /// Unsigned quotient; `b` must not be 0.
    pub(crate) fn udiv(&mut self, a: Scalar, b: Scalar) -> Scalar {
        self.b.ins().udiv(a, b)
    }

    /// The lanes as scalars.
    pub(crate) fn floats(&mut self, a: F32x4) -> [Scalar; 4] {
        self.lanes_of(a.0)
    }

    /// The lanes as scalars.
    pub(crate) fn ints(&mut self, a: I32x4) -> [Scalar; 4] {
        self.lanes_of(a.0)
    }
}
