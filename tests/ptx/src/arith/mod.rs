//! Scalar arithmetic: what each instruction computes of its operands, for one lane and for all.

pub(crate) mod bits;
pub(crate) mod compare;
pub(crate) mod convert;
pub(crate) mod float;
pub(crate) mod half_float;
pub(crate) mod integer;
pub(crate) mod small_float;
