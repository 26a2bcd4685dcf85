//! Loads, stores and conversions of narrow element types. Offsets are bytes; nothing needs alignment.

use super::*;
use cranelift_codegen::ir::types::{I16X8, I64X2};

impl Lanes<'_> {
    /// Address of `bytes` bytes on the stack, aligned to 64.
    pub(crate) fn scratch(&mut self, bytes: usize) -> Scalar {
        let slot = self.b.create_sized_stack_slot(StackSlotData::new(
            StackSlotKind::ExplicitSlot,
            bytes.next_multiple_of(16) as u32 + 48,
            4,
        ));
        let address = self.b.ins().stack_addr(I64, slot, 0);
        // Slots are aligned to 16 at most.
        let up = self.b.ins().iadd_imm_s(address, 48);
        self.b.ins().band_imm_s(up, -64)
    }

    // Scalars

    pub(crate) fn load_i64(&mut self, at: Scalar, offset: i32) -> Scalar {
        self.b.ins().load(I64, UNALIGNED, at, offset)
    }

    pub(crate) fn load_i32(&mut self, at: Scalar, offset: i32) -> Scalar {
        self.b.ins().load(I32, UNALIGNED, at, offset)
    }

    /// An unsigned 16-bit integer, as an i32.
    pub(crate) fn load_u16(&mut self, at: Scalar, offset: i32) -> Scalar {
        self.b.ins().uload16(I32, UNALIGNED, at, offset)
    }

    /// An unsigned byte, as an i32.
    pub(crate) fn load_u8(&mut self, at: Scalar, offset: i32) -> Scalar {
        self.b.ins().uload8(I32, UNALIGNED, at, offset)
    }

    /// A signed byte, as an i32.
    pub(crate) fn load_i8(&mut self, at: Scalar, offset: i32) -> Scalar {
        self.b.ins().sload8(I32, UNALIGNED, at, offset)
    }

    pub(crate) fn load_f32(&mut self, at: Scalar, offset: i32) -> Scalar {
        self.b.ins().load(F32, UNALIGNED, at, offset)
    }

    /// A bf16, as an f32.
    pub(crate) fn load_bf16(&mut self, at: Scalar, offset: i32) -> Scalar {
        let bits = self.load_u16(at, offset);
        let bits = self.ishl_imm(bits, 16);
        self.bits_to_float(bits)
    }

    /// An f16, as an f32.
    pub(crate) fn load_f16(&mut self, at: Scalar, offset: i32) -> Scalar {
        let bits = self.b.ins().sload16(I32, UNALIGNED, at, offset);
        let quad = self.f16_to_f32(Quad::Scalars([bits; 4]), 1);
        self.lane(quad, 0)
    }

    pub(crate) fn store_i32(&mut self, value: Scalar, at: Scalar, offset: i32) {
        self.b.ins().store(UNALIGNED, value, at, offset);
    }

    pub(crate) fn store_f32(&mut self, value: Scalar, at: Scalar, offset: i32) {
        self.b.ins().store(UNALIGNED, value, at, offset);
    }

    /// The low byte of an i32.
    pub(crate) fn store_u8(&mut self, value: Scalar, at: Scalar, offset: i32) {
        self.b.ins().istore8(UNALIGNED, value, at, offset);
    }

    /// The low 16 bits of an i32.
    pub(crate) fn store_u16(&mut self, value: Scalar, at: Scalar, offset: i32) {
        self.b.ins().istore16(UNALIGNED, value, at, offset);
    }

    // Four lanes

    /// 4 f32 in 16 bytes.
    pub(crate) fn load4(&mut self, at: Scalar, offset: i32) -> F32x4 {
        F32x4(self.load_quad(F32X4, at, offset))
    }

    /// 4 i32 in 16 bytes.
    pub(crate) fn load4_i32(&mut self, at: Scalar, offset: i32) -> I32x4 {
        I32x4(self.load_quad(I32X4, at, offset))
    }

    /// The first `count` (1 to 4) of 4 f32; nothing is read beyond them, and the other lanes hold `fill`.
    pub(crate) fn load4_part(&mut self, at: Scalar, offset: i32, count: usize, fill: f32) -> F32x4 {
        if count >= 4 {
            return self.load4(at, offset);
        }
        let mut lanes = [self.f32(fill); 4];
        for (i, lane) in lanes.iter_mut().enumerate().take(count) {
            *lane = self.load_f32(at, offset + 4 * i as i32);
        }
        if self.is_scalar() {
            return F32x4(Quad::Scalars(lanes));
        }
        let mut v = self.b.ins().splat(F32X4, lanes[3]);
        for (i, lane) in lanes.iter().enumerate().take(count) {
            v = self.b.ins().insertlane(v, *lane, i as u8);
        }
        F32x4(Quad::Vector(v))
    }

    /// An f32 from memory in every lane.
    pub(crate) fn load_splat(&mut self, at: Scalar, offset: i32) -> F32x4 {
        let v = self.load_f32(at, offset);
        self.splat(v)
    }

    /// 4 bf16 in 8 bytes.
    pub(crate) fn load4_bf16(&mut self, at: Scalar, offset: i32) -> F32x4 {
        let bits = I32x4(self.load_u16x4(at, offset));
        let bits = self.vishl_imm(bits, 16);
        self.vfrom_bits(bits)
    }

    /// 4 f16 in 8 bytes, exactly (subnormals, infinities and NaN included).
    pub(crate) fn load4_f16(&mut self, at: Scalar, offset: i32) -> F32x4 {
        let bits = if self.is_scalar() {
            Quad::Scalars(std::array::from_fn(|i| {
                self.b.ins().sload16(I32, UNALIGNED, at, offset + 2 * i as i32)
            }))
        } else {
            Quad::Vector(self.b.ins().sload16x4(UNALIGNED, at, offset))
        };
        self.f16_to_f32(bits, 4)
    }

    /// 4 signed bytes.
    pub(crate) fn load4_i8(&mut self, at: Scalar, offset: i32) -> I32x4 {
        if self.is_scalar() {
            return I32x4(Quad::Scalars(std::array::from_fn(|i| self.load_i8(at, offset + i as i32))));
        }
        let bits = self.load_i32(at, offset);
        let v = self.b.ins().scalar_to_vector(I32X4, bits);
        let v = self.bitcast(I8X16, v);
        let v = self.b.ins().swiden_low(v);
        I32x4(Quad::Vector(self.b.ins().swiden_low(v)))
    }

    /// 4 unsigned bytes.
    pub(crate) fn load4_u8(&mut self, at: Scalar, offset: i32) -> I32x4 {
        if self.is_scalar() {
            return I32x4(Quad::Scalars(std::array::from_fn(|i| self.load_u8(at, offset + i as i32))));
        }
        let bits = self.load_i32(at, offset);
        let v = self.b.ins().scalar_to_vector(I32X4, bits);
        let v = self.bitcast(I8X16, v);
        let v = self.b.ins().uwiden_low(v);
        I32x4(Quad::Vector(self.b.ins().uwiden_low(v)))
    }

    pub(crate) fn store4(&mut self, value: F32x4, at: Scalar, offset: i32) {
        self.store_quad(value.0, at, offset);
    }

    pub(crate) fn store4_i32(&mut self, value: I32x4, at: Scalar, offset: i32) {
        self.store_quad(value.0, at, offset);
    }

    /// The first `count` (1 to 4) lanes; nothing is written beyond them.
    pub(crate) fn store4_part(&mut self, value: F32x4, at: Scalar, offset: i32, count: usize) {
        if count >= 4 {
            return self.store4(value, at, offset);
        }
        for (i, lane) in self.lanes_of(value.0).into_iter().enumerate().take(count) {
            self.store_f32(lane, at, offset + 4 * i as i32);
        }
    }

    /// 4 signed bytes; lanes must be in −128..=127.
    pub(crate) fn store4_i8(&mut self, value: I32x4, at: Scalar, offset: i32) {
        match value.0 {
            Quad::Vector(v) => {
                let v = self.b.ins().snarrow(v, v);
                let v = self.b.ins().snarrow(v, v);
                let v = self.bitcast(I32X4, v);
                let bits = self.b.ins().extractlane(v, 0);
                self.store_i32(bits, at, offset);
            }
            Quad::Scalars(s) => {
                for (i, v) in s.into_iter().enumerate() {
                    self.store_u8(v, at, offset + i as i32);
                }
            }
        }
    }

    /// 4 f16 in 8 bytes, rounded to nearest even. Values that round to more than 65504 become infinite, NaN stays
    /// NaN, and |x| < 2^-14 becomes zero of the same sign: subnormals would slow every later read.
    pub(crate) fn store4_f16(&mut self, value: F32x4, at: Scalar, offset: i32) {
        let half = self.f32_to_f16(value);
        match half.0 {
            Quad::Vector(v) => {
                let v = self.b.ins().unarrow(v, v);
                let v = self.bitcast(I64X2, v);
                let bits = self.b.ins().extractlane(v, 0);
                self.b.ins().store(UNALIGNED, bits, at, offset);
            }
            Quad::Scalars(s) => {
                for (i, v) in s.into_iter().enumerate() {
                    self.store_u16(v, at, offset + 2 * i as i32);
                }
            }
        }
    }

    /// Each lane's f16 in its low 16 bits; rounding as in [`Lanes::store4_f16`].
    pub(crate) fn f32_to_f16(&mut self, value: F32x4) -> I32x4 {
        let bits = self.vbits(value);
        let sign = self.vushr_imm(bits, 16);
        let mask = self.splat_const_i32(0x8000);
        let sign = self.viand(sign, mask);
        let mask = self.splat_const_i32(0x7fff_ffff);
        let magnitude = self.viand(bits, mask);
        // Half a unit, less one when the bit above is even: ties go to even.
        let odd = self.vushr_imm(magnitude, 13);
        let one = self.splat_const_i32(1);
        let odd = self.viand(odd, one);
        let half = self.splat_const_i32(0xfff);
        let rounded = self.viadd(magnitude, half);
        let rounded = self.viadd(rounded, odd);
        let rebias = self.splat_const_i32(112 << 23);
        let out = self.visub(rounded, rebias);
        let out = self.vushr_imm(out, 13);
        let smallest = self.splat_const_i32(0x3880_0000);
        let zero = self.splat_const_i32(0);
        let tiny = self.vicmp(IntCC::SignedGreaterThan, smallest, magnitude);
        let out = self.viselect(tiny, zero, out);
        let largest = self.splat_const_i32(0x477f_ffff);
        let infinite = self.splat_const_i32(0x7c00);
        let large = self.vicmp(IntCC::SignedGreaterThan, rounded, largest);
        let out = self.viselect(large, infinite, out);
        let inf_bits = self.splat_const_i32(0x7f80_0000);
        let quiet = self.splat_const_i32(0x7e00);
        let nan = self.vicmp(IntCC::SignedGreaterThan, magnitude, inf_bits);
        let out = self.viselect(nan, quiet, out);
        self.vior(out, sign)
    }

    /// f32 from sign-extended f16 bits; only the first `count` lanes of scalars are computed.
    fn f16_to_f32(&mut self, bits: Quad, count: usize) -> F32x4 {
        if let Quad::Scalars(s) = bits {
            let mut out = s;
            for lane in out.iter_mut().take(count) {
                let v = self.ishl_imm(*lane, 13);
                *lane = self.f16_shifted_scalar(v);
            }
            for i in count..4 {
                out[i] = out[0];
            }
            return F32x4(Quad::Scalars(out));
        }
        let shifted = self.vishl_imm(I32x4(bits), 13);
        self.f16_shifted_to_f32(shifted)
    }

    /// f32 from f16 bits whose sign stands at bit 31 and whose exponent starts at bit 27.
    pub(crate) fn f16_shifted_to_f32(&mut self, shifted: I32x4) -> F32x4 {
        if let Quad::Scalars(s) = shifted.0 {
            return F32x4(Quad::Scalars(s.map(|v| self.f16_shifted_scalar(v))));
        }
        let mask = self.splat_const_i32(0x8fff_e000_u32 as i32);
        let kept = self.viand(shifted, mask);
        let kept = self.vfrom_bits(kept);
        let scale = self.splat_const(F16_REBIAS);
        let scaled = self.vmul(kept, scale);
        // An exponent of all ones comes out as 2^16 or more: make it all ones again.
        let magnitude = self.vabs(scaled);
        let limit = self.splat_const(65504.0);
        let special = self.vcmp(FloatCC::LessThan, limit, magnitude);
        let bits = self.vbits(scaled);
        let ones = self.splat_const_i32(0x7f80_0000);
        let fixed = self.vior(bits, ones);
        let fixed = self.vfrom_bits(fixed);
        self.vselect(special, fixed, scaled)
    }

    fn f16_shifted_scalar(&mut self, shifted: Scalar) -> Scalar {
        let kept = self.iand_imm(shifted, i64::from(0x8fff_e000_u32 as i32));
        let kept = self.bits_to_float(kept);
        let scale = self.f32(F16_REBIAS);
        let scaled = self.fmul(kept, scale);
        let magnitude = self.fabs(scaled);
        let limit = self.f32(65504.0);
        let special = self.fcmp(FloatCC::LessThan, limit, magnitude);
        let bits = self.float_to_bits(scaled);
        let ones = self.int32(0x7f80_0000);
        let fixed = self.ior(bits, ones);
        let fixed = self.bits_to_float(fixed);
        self.select(special, fixed, scaled)
    }

    fn load_u16x4(&mut self, at: Scalar, offset: i32) -> Quad {
        if self.is_scalar() {
            Quad::Scalars(std::array::from_fn(|i| self.load_u16(at, offset + 2 * i as i32)))
        } else {
            Quad::Vector(self.b.ins().uload16x4(UNALIGNED, at, offset))
        }
    }

    fn load_quad(&mut self, ty: Type, at: Scalar, offset: i32) -> Quad {
        if self.is_scalar() {
            let lane = ty.lane_type();
            let flags = UNALIGNED;
            Quad::Scalars(std::array::from_fn(|i| self.b.ins().load(lane, flags, at, offset + 4 * i as i32)))
        } else {
            Quad::Vector(self.b.ins().load(ty, UNALIGNED, at, offset))
        }
    }

    fn store_quad(&mut self, value: Quad, at: Scalar, offset: i32) {
        let flags = UNALIGNED;
        match value {
            Quad::Vector(v) => {
                self.b.ins().store(flags, v, at, offset);
            }
            Quad::Scalars(s) => {
                for (i, v) in s.into_iter().enumerate() {
                    self.b.ins().store(flags, v, at, offset + 4 * i as i32);
                }
            }
        }
    }

    // Sixteen lanes

    /// 16 signed bytes.
    pub(crate) fn load16_i8(&mut self, at: Scalar, offset: i32) -> I8x16 {
        if self.is_scalar() {
            I8x16(Wide::Scalars(std::array::from_fn(|i| self.load_i8(at, offset + i as i32))))
        } else {
            I8x16(Wide::Vector(self.b.ins().load(I8X16, UNALIGNED, at, offset)))
        }
    }

    /// 16 signed bytes as they are.
    pub(crate) fn store16_bytes(&mut self, value: I8x16, at: Scalar, offset: i32) {
        match value.0 {
            Wide::Vector(v) => {
                self.b.ins().store(UNALIGNED, v, at, offset);
            }
            Wide::Scalars(s) => {
                for (i, v) in s.into_iter().enumerate() {
                    self.store_u8(v, at, offset + i as i32);
                }
            }
        }
    }

    /// 16 signed bytes from lanes in −128..=127, `parts` in ascending order.
    pub(crate) fn store16_i8(&mut self, parts: [I32x4; 4], at: Scalar, offset: i32) {
        if let [Quad::Vector(a), Quad::Vector(b), Quad::Vector(c), Quad::Vector(d)] = parts.map(|p| p.0) {
            let low = self.b.ins().snarrow(a, b);
            let high = self.b.ins().snarrow(c, d);
            let v = self.b.ins().snarrow(low, high);
            self.b.ins().store(UNALIGNED, v, at, offset);
        } else {
            for (i, part) in parts.into_iter().enumerate() {
                self.store4_i8(part, at, offset + 4 * i as i32);
            }
        }
    }

    /// The bits of every byte that `mask` selects from bit `from` on, moved to bit `to`; no others.
    pub(crate) fn byte_bits(&mut self, bytes: I8x16, from: u32, to: u32, mask: u8) -> I8x16 {
        let kept = mask << to;
        match bytes.0 {
            Wide::Vector(v) => {
                // Shifting 16-bit lanes and masking is what byte shifts become where they do not exist.
                let wide = self.target.arch() == Arch::X86_64;
                let v = if from == to || !wide { v } else { self.bitcast(I16X8, v) };
                let v = match (from, to) {
                    _ if from > to => self.b.ins().ushr_imm_u(v, i64::from(from - to)),
                    _ if from < to => self.b.ins().ishl_imm_u(v, i64::from(to - from)),
                    _ => v,
                };
                let v = if from == to || !wide { v } else { self.bitcast(I8X16, v) };
                if !wide && to == 0 && from + mask.count_ones() == 8 {
                    return I8x16(Wide::Vector(v));
                }
                let mask = self.vector_const(I8X16, &[kept; 16]);
                I8x16(Wide::Vector(self.b.ins().band(v, mask)))
            }
            Wide::Scalars(s) => I8x16(Wide::Scalars(s.map(|v| {
                let v = if from > to { self.ushr_imm(v, from - to) } else { self.ishl_imm(v, to - from) };
                self.iand_imm(v, i64::from(kept))
            }))),
        }
    }

    /// `a | b`, bit by bit.
    pub(crate) fn byte_or(&mut self, a: I8x16, b: I8x16) -> I8x16 {
        match (a.0, b.0) {
            (Wide::Vector(a), Wide::Vector(b)) => I8x16(Wide::Vector(self.b.ins().bor(a, b))),
            (Wide::Scalars(a), Wide::Scalars(b)) => {
                I8x16(Wide::Scalars(std::array::from_fn(|i| self.ior(a[i], b[i]))))
            }
            (a, b) => unreachable!("one is of vectors: {a:?} {b:?}"),
        }
    }

    /// `table[code]` for codes within the table; `table` is the address of its signed bytes and `loaded` their loads, by
    /// sixteens.
    pub(crate) fn lookup(&mut self, table: Scalar, loaded: &[I8x16], codes: I8x16) -> I8x16 {
        let codes = match codes.0 {
            Wide::Vector(codes) => codes,
            Wide::Scalars(codes) => {
                return I8x16(Wide::Scalars(codes.map(|c| {
                    let c = self.widen_unsigned(c);
                    let at = self.iadd(table, c);
                    self.load_i8(at, 0)
                })));
            }
        };
        let x86 = self.target.arch() == Arch::X86_64;
        let mut found = None;
        for (i, part) in loaded.iter().enumerate() {
            let Wide::Vector(part) = part.0 else { unreachable!("codes are vectors where the table is") };
            let mut index = codes;
            if i > 0 {
                let start = self.vector_const(I8X16, &[16 * i as u8; 16]);
                index = self.b.ins().isub(index, start);
            }
            // Indices outside a part must give zero: `pshufb` has it so when their highest bit is set.
            let entries = if x86 {
                if loaded.len() > 1 {
                    let most = self.vector_const(I8X16, &[0x70; 16]);
                    index = self.b.ins().uadd_sat(index, most);
                }
                self.b.ins().x86_pshufb(part, index)
            } else {
                self.b.ins().swizzle(part, index)
            };
            found = Some(match found {
                Some(others) => self.b.ins().bor(others, entries),
                None => entries,
            });
        }
        let Some(found) = found else { unreachable!("a table has entries") };
        I8x16(Wide::Vector(found))
    }
}

/// 2^112: the difference of the exponent biases of f32 and f16.
const F16_REBIAS: f32 = f32::from_bits(0x7780_0000);
