//! Single lanes, and numbers that count.

use super::*;

impl Lanes<'_> {
    /// Unsigned quotient; `b` must not be 0.
    pub(crate) fn udiv(&mut self, a: Scalar, b: Scalar) -> Scalar {
        self.b.ins().udiv(a, b)
    }

    /// Stores an i64, an address for example.
    pub(crate) fn store_i64(&mut self, value: Scalar, at: Scalar, offset: i32) {
        self.b.ins().store(UNALIGNED, value, at, offset);
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
