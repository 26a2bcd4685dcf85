//! Elementary functions on 4 f32: polynomials, no tables, no calls.

use super::*;

impl Lanes<'_> {
    /// The Hadamard transform of the four lanes, without a factor: neighbours first.
    pub(crate) fn vhadamard(&mut self, x: F32x4) -> F32x4 {
        let v = match x.0 {
            Quad::Scalars([a, b, c, d]) => {
                let (a, b) = (self.fadd(a, b), self.fsub(a, b));
                let (c, d) = (self.fadd(c, d), self.fsub(c, d));
                let (a, c) = (self.fadd(a, c), self.fsub(a, c));
                let (b, d) = (self.fadd(b, d), self.fsub(b, d));
                return F32x4(Quad::Scalars([a, b, c, d]));
            }
            Quad::Vector(v) => v,
        };
        let mut v = v;
        for (other, signs) in [([1, 0, 3, 2], [1.0, -1.0, 1.0, -1.0]), ([2, 3, 0, 1], [1.0, 1.0, -1.0, -1.0])]
        {
            let bytes = self.bitcast(I8X16, v);
            let picked: Vec<u8> = (0..16).map(|i: u8| 4 * other[usize::from(i / 4)] + i % 4).collect();
            let mask = self.b.func.dfg.immediates.push(picked.into());
            let swapped = self.b.ins().shuffle(bytes, bytes, mask);
            let swapped = self.bitcast(F32X4, swapped);
            let signs = self.vector_const(F32X4, &signs.map(f32::to_le_bytes).concat());
            let signed = self.b.ins().fmul(v, signs);
            v = self.b.ins().fadd(swapped, signed);
        }
        F32x4(Quad::Vector(v))
    }

    /// `e^x` within 2 ulp: 0 below −86.6 (results that f32 holds only as subnormals, or nearly), infinite above
    /// 88.72, NaN for NaN. Range reduction and polynomial as in Cephes `expf` (Moshier 1989).
    pub(crate) fn vexp(&mut self, x: F32x4) -> F32x4 {
        let low = self.splat_const(EXP_LOW);
        let high = self.splat_const(EXP_HIGH);
        // Comparisons are false for NaN, so that NaN goes on through the polynomial.
        let under = self.vcmp(FloatCC::LessThan, x, low);
        let over = self.vcmp(FloatCC::LessThan, high, x);
        let y = self.vselect(under, low, x);
        let y = self.vselect(over, high, y);
        let log2e = self.splat_const(std::f32::consts::LOG2_E);
        let scaled = self.vmul(y, log2e);
        let (n, exponent) = self.vround(scaled);
        let c1 = self.splat_const(-0.693_359_4);
        let c2 = self.splat_const(2.121_944_4e-4);
        let r = self.vmuladd(n, c1, y);
        let r = self.vmuladd(n, c2, r);
        let p = self.polynomial(
            r,
            &[1.987_569_1e-4, 1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5],
        );
        let r2 = self.vmul(r, r);
        let p = self.vmuladd(p, r2, r);
        let one = self.splat_const(1.0);
        let p = self.vadd(p, one);
        // 2^(n-1), then doubled: 2^128 itself is no f32.
        let bias = self.splat_const_i32(126);
        let biased = self.viadd(exponent, bias);
        let bits = self.vishl_imm(biased, 23);
        let power = self.vfrom_bits(bits);
        let half = self.vmul(p, power);
        let result = self.vadd(half, half);
        let zero = self.splat_const(0.0);
        let infinity = self.splat_const(f32::INFINITY);
        let result = self.vselect(under, zero, result);
        self.vselect(over, infinity, result)
    }

    /// `2^x` for x up to 0 within 2 ulp: 0 below −126.5 (results that f32 holds only as subnormals), NaN for NaN.
    /// Polynomial as in Cephes `exp2f` (Moshier 1989).
    pub(crate) fn vexp2_up_to_0(&mut self, x: F32x4) -> F32x4 {
        let low = self.splat_const(EXP2_LOW);
        // NaN goes on.
        let y = self.vmax(low, x);
        let (n, exponent) = self.vround(y);
        let r = self.vsub(y, n);
        let p = self.polynomial(r, &EXP2);
        let bias = self.splat_const_i32(127);
        let biased = self.viadd(exponent, bias);
        let zero = self.splat_const_i32(0);
        let negative = self.vicmp(IntCC::SignedLessThan, biased, zero);
        let biased = self.viselect(negative, zero, biased);
        let bits = self.vishl_imm(biased, 23);
        let power = self.vfrom_bits(bits);
        self.vmul(p, power)
    }

    /// [`Lanes::vexp2_up_to_0`] of a scalar.
    pub(crate) fn exp2_up_to_0(&mut self, x: Scalar) -> Scalar {
        let x = self.splat(x);
        let e = self.vexp2_up_to_0(x);
        self.lane(e, 0)
    }

    /// `x / (1 + e^-x)`.
    pub(crate) fn vsilu(&mut self, x: F32x4) -> F32x4 {
        let negated = self.vneg(x);
        let e = self.vexp(negated);
        let one = self.splat_const(1.0);
        let sum = self.vadd(e, one);
        self.vdiv(x, sum)
    }

    /// The error function, by the rational approximation that Eigen and XLA use, exactly ±1 where f32 is; within 7e-7 absolutely.
    pub(crate) fn verf(&mut self, x: F32x4) -> F32x4 {
        let low = self.splat_const(-ERF_ONE);
        let high = self.splat_const(ERF_ONE);
        let under = self.vcmp(FloatCC::LessThan, x, low);
        let x = self.vselect(under, low, x);
        let over = self.vcmp(FloatCC::LessThan, high, x);
        let x = self.vselect(over, high, x);
        let x2 = self.vmul(x, x);
        let p = self.polynomial(
            x2,
            &[
                -2.726_142_4e-10,
                2.770_681_5e-8,
                -2.101_024e-6,
                -5.692_506_6e-5,
                -7.349_906e-4,
                -2.954_600_1e-3,
                -1.609_603_4e-2,
            ],
        );
        let p = self.vmul(p, x);
        let q = self.polynomial(
            x2,
            &[-1.456_607_2e-5, -2.133_740_6e-4, -1.682_827e-3, -7.373_329e-3, -1.426_473_9e-2],
        );
        let result = self.vdiv(p, q);
        let one = self.splat_const(1.0);
        let minus_one = self.splat_const(-1.0);
        let result = self.vselect(under, minus_one, result);
        self.vselect(over, one, result)
    }

    /// `x / 2 * (1 + erf(x / sqrt 2))`.
    pub(crate) fn vgelu(&mut self, x: F32x4) -> F32x4 {
        let scale = self.splat_const(std::f32::consts::FRAC_1_SQRT_2);
        let scaled = self.vmul(x, scale);
        let erf = self.verf(scaled);
        let one = self.splat_const(1.0);
        let half = self.splat_const(0.5);
        let sum = self.vadd(erf, one);
        let half_x = self.vmul(x, half);
        self.vmul(half_x, sum)
    }

    /// `e^x` of a scalar.
    pub(crate) fn exp(&mut self, x: Scalar) -> Scalar {
        let x = self.splat(x);
        let e = self.vexp(x);
        self.lane(e, 0)
    }

    /// Horner's rule, highest power first.
    fn polynomial(&mut self, x: F32x4, coefficients: &[f32]) -> F32x4 {
        let mut acc = self.splat_const(coefficients[0]);
        for c in &coefficients[1..] {
            let c = self.splat_const(*c);
            acc = self.vmuladd(acc, x, c);
        }
        acc
    }
}

/// Below, the power of two of the result would leave the normal range.
const EXP_LOW: f32 = -86.6;
/// Far enough below what 2^x is zero for, and still an exponent.
pub(crate) const EXP2_LOW: f32 = -200.0;
/// `2^r` for r in −1/2..1/2, highest power first.
pub(crate) const EXP2: [f32; 7] =
    [1.535_336_2e-4, 1.339_887_4e-3, 9.618_437e-3, 5.550_332_5e-2, 2.402_264_8e-1, 6.931_472e-1, 1.0];
/// Beyond, the error function rounds to one.
const ERF_ONE: f32 = 3.92;
/// The logarithm of the largest f32.
const EXP_HIGH: f32 = 88.722_84;
