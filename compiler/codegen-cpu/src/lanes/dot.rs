//! Integer dot products in the layout of packed weights: 16 weights are 4 channels by 4 consecutive inputs, met by 4
//! activations that every channel shares.
//!
//! Each instruction set has its own form, and Cranelift recognises each only as one exact pattern of operations:
//!
//! | target | weights | activations | accumulator |
//! |---|---|---|---|
//! | x86-64 | 2 registers of 8 i16 | the quad twice, as i16 | 2 registers; `pmaddwd` |
//! | aarch64 | 16 i8 | the quad four times | 2 registers; `smull`, `saddlp` |
//! | aarch64+dotprod | 16 i8 | the quad four times | 1 register; `sdot` |
//!
//! `pmaddubsw` would halve the work on x86-64 but saturates: two products of 131 and 127 exceed an i16.
//! Targets without vectors have no use for this; their kernels loop over bytes.

use super::*;
use cranelift_codegen::ir::types::I16X8;

/// 16 weights made ready for [`Lanes::dot`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct DotWeights {
    parts: [Value; 2],
}

/// 4 activations made ready for [`Lanes::dot`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct DotActivation(Value);

/// Sums of 4 channels under way.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DotAcc {
    parts: [Value; 2],
}

#[derive(Clone, Copy, PartialEq)]
enum Form {
    Pmaddwd,
    Smull,
    Sdot,
}

impl Lanes<'_> {
    fn form(&self) -> Form {
        match self.target.arch() {
            Arch::X86_64 => Form::Pmaddwd,
            Arch::Aarch64 if self.target == Target::Aarch64 => Form::Smull,
            Arch::Aarch64 => Form::Sdot,
            Arch::Riscv64 => unreachable!("kernels for targets without vectors loop over bytes"),
        }
    }

    /// Bytes of 16 prepared weights in memory.
    pub(crate) fn dot_weight_bytes(&self) -> usize {
        if self.form() == Form::Pmaddwd { 32 } else { 16 }
    }

    /// Prepares 16 weights.
    pub(crate) fn dot_weights(&mut self, weights: I8x16) -> DotWeights {
        let Wide::Vector(v) = weights.0 else {
            unreachable!("kernels for targets without vectors loop over bytes");
        };
        match self.form() {
            Form::Pmaddwd => {
                let low = self.b.ins().swiden_low(v);
                let high = self.b.ins().swiden_high(v);
                DotWeights { parts: [low, high] }
            }
            Form::Smull | Form::Sdot => DotWeights { parts: [v, v] },
        }
    }

    /// Writes prepared weights to [`Lanes::dot_weight_bytes`] bytes aligned to 16.
    pub(crate) fn store_dot_weights(&mut self, weights: DotWeights, at: Scalar, offset: i32) {
        let flags = ALIGNED;
        self.b.ins().store(flags, weights.parts[0], at, offset);
        if self.form() == Form::Pmaddwd {
            self.b.ins().store(flags, weights.parts[1], at, offset + 16);
        }
    }

    /// Reads prepared weights.
    pub(crate) fn load_dot_weights(&mut self, at: Scalar, offset: i32) -> DotWeights {
        let flags = ALIGNED;
        if self.form() == Form::Pmaddwd {
            let low = self.b.ins().load(I16X8, flags, at, offset);
            let high = self.b.ins().load(I16X8, flags, at, offset + 16);
            DotWeights { parts: [low, high] }
        } else {
            let v = self.b.ins().load(I8X16, flags, at, offset);
            DotWeights { parts: [v, v] }
        }
    }

    /// Reads 16 activations and prepares each quad of them.
    pub(crate) fn load_dot_activations(&mut self, at: Scalar, offset: i32) -> [DotActivation; 4] {
        let flags = UNALIGNED;
        if self.form() == Form::Pmaddwd {
            let halves =
                [self.b.ins().sload8x8(flags, at, offset), self.b.ins().sload8x8(flags, at, offset + 8)];
            std::array::from_fn(|q| {
                let v = self.shuffle64(halves[q / 2], q % 2);
                DotActivation(v)
            })
        } else {
            let all = self.b.ins().load(I8X16, flags, at, offset);
            std::array::from_fn(|q| {
                let lanes: Vec<u8> = (0..16).map(|i| (4 * q + i % 4) as u8).collect();
                let mask = self.b.func.dfg.immediates.push(lanes.into());
                DotActivation(self.b.ins().shuffle(all, all, mask))
            })
        }
    }

    /// Writes a prepared quad to 16 bytes aligned to 16.
    pub(crate) fn store_dot_activation(&mut self, quad: DotActivation, at: Scalar, offset: i32) {
        self.b.ins().store(ALIGNED, quad.0, at, offset);
    }

    /// Reads a prepared quad.
    pub(crate) fn load_dot_activation(&mut self, at: Scalar, offset: i32) -> DotActivation {
        let ty = if self.form() == Form::Pmaddwd { I16X8 } else { I8X16 };
        DotActivation(self.b.ins().load(ty, ALIGNED, at, offset))
    }

    /// Sums of nothing.
    pub(crate) fn dot_zero(&mut self) -> DotAcc {
        let zero = self.vector_const(I32X4, &[0; 16]);
        DotAcc { parts: [zero; 2] }
    }

    /// Adds to each channel its 4 weights times the 4 activations.
    pub(crate) fn dot(&mut self, acc: DotAcc, weights: DotWeights, quad: DotActivation) -> DotAcc {
        let ([w0, w1], a) = (weights.parts, quad.0);
        match self.form() {
            Form::Pmaddwd => {
                let products = [self.pmaddwd(w0, a), self.pmaddwd(w1, a)];
                DotAcc { parts: std::array::from_fn(|i| self.b.ins().iadd(acc.parts[i], products[i])) }
            }
            Form::Smull => {
                let low = self.smull(w0, a, false);
                let high = self.smull(w0, a, true);
                let sums = [low, high].map(|p| {
                    let (x, y) = (self.b.ins().swiden_low(p), self.b.ins().swiden_high(p));
                    self.b.ins().iadd_pairwise(x, y)
                });
                DotAcc { parts: std::array::from_fn(|i| self.b.ins().iadd(acc.parts[i], sums[i])) }
            }
            Form::Sdot => {
                let sums = [false, true].map(|high| {
                    let p = self.smull(w0, a, high);
                    let (x, y) = (self.b.ins().swiden_low(p), self.b.ins().swiden_high(p));
                    self.b.ins().iadd_pairwise(x, y)
                });
                let sum = self.b.ins().iadd_pairwise(sums[0], sums[1]);
                let v = self.b.ins().iadd(sum, acc.parts[0]);
                DotAcc { parts: [v; 2] }
            }
        }
    }

    /// The 4 sums.
    pub(crate) fn dot_finish(&mut self, acc: DotAcc) -> I32x4 {
        let [a, b] = acc.parts;
        I32x4(Quad::Vector(match self.form() {
            Form::Sdot => a,
            Form::Pmaddwd | Form::Smull => self.b.ins().iadd_pairwise(a, b),
        }))
    }

    /// Either 64-bit half of a register, twice.
    fn shuffle64(&mut self, v: Value, half: usize) -> Value {
        let bytes = self.bitcast(I8X16, v);
        let lanes: Vec<u8> = (0..16).map(|i| (8 * half + i % 8) as u8).collect();
        let mask = self.b.func.dfg.immediates.push(lanes.into());
        let v = self.b.ins().shuffle(bytes, bytes, mask);
        self.bitcast(I16X8, v)
    }

    /// Products of i16 pairs, each two neighbours added.
    fn pmaddwd(&mut self, x: Value, y: Value) -> Value {
        let (xl, yl) = (self.b.ins().swiden_low(x), self.b.ins().swiden_low(y));
        let low = self.b.ins().imul(xl, yl);
        let (xh, yh) = (self.b.ins().swiden_high(x), self.b.ins().swiden_high(y));
        let high = self.b.ins().imul(xh, yh);
        self.b.ins().iadd_pairwise(low, high)
    }

    fn smull(&mut self, x: Value, y: Value, high: bool) -> Value {
        let (x, y) = if high {
            (self.b.ins().swiden_high(x), self.b.ins().swiden_high(y))
        } else {
            (self.b.ins().swiden_low(x), self.b.ins().swiden_low(y))
        };
        self.b.ins().imul(x, y)
    }
}
