//! Functions of whole vectors.

use super::asm::AsmResult;
use super::{Asm, Src, V};
use crate::lanes::{EXP2, EXP2_LOW};

/// Below it `e^x` is taken for zero, as the power of two would leave the normal range.
const EXP_LOW: f32 = -86.6;
/// The logarithm of the largest f32; beyond it `e^x` is infinite.
const EXP_HIGH: f32 = 88.722_84;

impl Asm {
    /// `x = e^x` in every lane, within 2 units in the last place; far below exactly 0 (or less than 1e-37, with 512 bits), far
    /// above infinite, NaN for NaN. The approximation is that of the portable kernels (Cephes).
    pub(crate) fn exp(&mut self, x: V, t: [V; 4]) -> AsmResult<()> {
        const MAGIC: f32 = 12_582_912.0;
        if self.level.is_512() {
            return self.exp_scaled(x, [t[0], t[1], t[2]]);
        }
        let [y, n, p, r] = t;
        // Minimum and maximum give their second source for NaN, which so goes on.
        let low = self.constant(EXP_LOW.to_bits());
        let high = self.constant(EXP_HIGH.to_bits());
        self.broadcast(y, low)?;
        self.vmaxps(y, y, x)?;
        self.broadcast(n, high)?;
        self.vminps(y, n, y)?;
        // Adding 1.5 * 2^23 leaves the rounded integer in the low bits of the significand.
        let (log2e, magic) = (self.float(std::f32::consts::LOG2_E), self.constant(MAGIC.to_bits()));
        self.vmulps(n, y, log2e)?;
        self.vaddps(n, n, Src::Bcst(magic))?;
        self.vsubps(r, n, Src::Bcst(magic))?;
        let (c1, c2) = (self.float(-0.693_359_4), self.float(2.121_944_4e-4));
        self.vfmadd231ps(y, r, c1)?;
        self.vfmadd231ps(y, r, c2)?;
        self.exp_series(p, y, r)?;
        // 2^(n-1), then doubled: 2^128 itself is no f32.
        self.vpslld(n, n, 23)?;
        let bias = self.constant(126 << 23);
        self.vpaddd(n, n, Src::Bcst(bias))?;
        self.vmulps(p, p, n)?;
        self.vaddps(p, p, p)?;
        self.keep_within(p, x, low, high)?;
        self.vmovups(x, p)
    }

    /// [`Asm::exp`] where the instruction that multiplies by a power of two takes care of its range.
    fn exp_scaled(&mut self, x: V, [n, p, r]: [V; 3]) -> AsmResult<()> {
        let (low, high) = (self.constant(EXP_LOW.to_bits()), self.constant((EXP_HIGH + 1.0).to_bits()));
        // The second source for NaN, which so goes on.
        self.broadcast(n, low)?;
        self.vmaxps(x, n, x)?;
        self.broadcast(n, high)?;
        self.vminps(x, n, x)?;
        let log2e = self.float(std::f32::consts::LOG2_E);
        self.vmulps(n, x, log2e)?;
        self.vroundps(n, n)?;
        let (c1, c2) = (self.float(-0.693_359_4), self.float(2.121_944_4e-4));
        self.vfmadd231ps(x, n, c1)?;
        self.vfmadd231ps(x, n, c2)?;
        self.exp_series(p, x, r)?;
        self.vscalefps(x, p, n)
    }

    /// `p = e^x` for x between halves of the logarithm of 2.
    fn exp_series(&mut self, p: V, x: V, square: V) -> AsmResult<()> {
        let first = self.constant(1.987_569_1e-4f32.to_bits());
        self.broadcast(p, first)?;
        for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
            let c = self.float(c);
            self.vfmadd213ps(p, x, c)?;
        }
        self.vmulps(square, x, x)?;
        self.vfmadd213ps(p, square, x)?;
        let one = self.float(1.0);
        self.vaddps(p, p, one)
    }

    /// `x = 2^x` for x up to 0 in every lane, within 2 units in the last place; 0 where the result would be subnormal (or,
    /// with 512 bits, rounded to what a subnormal holds), NaN for NaN. The approximation is that of the portable kernels.
    pub(crate) fn exp2_up_to_0(&mut self, x: V, t: [V; 2]) -> AsmResult<()> {
        let [n, p] = t;
        let low = self.constant(EXP2_LOW.to_bits());
        self.broadcast(n, low)?;
        // The second source where either is NaN.
        self.vmaxps(x, n, x)?;
        self.vroundps(n, x)?;
        self.vsubps(x, x, n)?;
        let first = self.constant(EXP2[0].to_bits());
        self.broadcast(p, first)?;
        for c in &EXP2[1..] {
            let c = self.float(*c);
            self.vfmadd213ps(p, x, c)?;
        }
        if self.level.is_512() {
            return self.vscalefps(x, p, n);
        }
        self.vcvtps2dq(n, n)?;
        let bias = self.constant(127);
        self.vpaddd(n, n, Src::Bcst(bias))?;
        let zero = self.constant(0);
        self.vpmaxsd(n, n, Src::Bcst(zero))?;
        self.vpslld(n, n, 23)?;
        self.vmulps(x, p, n)
    }

    /// `x / (1 + e^-x)`, in place.
    pub(crate) fn silu(&mut self, x: V, e: V, t: [V; 4]) -> AsmResult<()> {
        self.zero(e)?;
        self.vsubps(e, e, x)?;
        self.exp(e, t)?;
        let one = self.float(1.0);
        self.vaddps(e, e, one)?;
        self.vdivps(x, x, e)
    }
}
