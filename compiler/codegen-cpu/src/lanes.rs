//! `Lanes`: a small emitter of kernels, the seed of the vector language.
//!
//! One kernel body lowers on every target. Vectors are 4 f32, 4 i32 or 16 i8; where a target has no vectors they are
//! that many scalars, and the same calls emit scalar code. Operations are emitted in the order they are called and
//! nothing is reordered or shared: constants belong before the loop that uses them, and loads near their use.
//!
//! Control flow is structured ([`Lanes::for_range`], [`Lanes::if_`]). A value made outside a loop may be used inside;
//! one that changes from iteration to iteration lives in a [`Var`].
//!
//! Every operation is deterministic and rounds to nearest even. Reductions across lanes have a fixed order.

#![allow(dead_code, reason = "a language is complete before every operation has a user")]

mod dot;
mod index;
mod math;
mod memory;
#[cfg(test)]
mod tests;

pub(crate) use dot::{DotActivation, DotWeights};
pub(crate) use math::{EXP2, EXP2_LOW};

use crate::Target;
use crate::target::Arch;
use cranelift_codegen::ir::condcodes::{FloatCC, IntCC};
use cranelift_codegen::ir::types::{F32, F32X4, I8X16, I32, I32X4, I64};
use cranelift_codegen::ir::{
    AbiParam, BlockArg, ConstantData, Endianness, ExtFuncData, ExternalName, InstBuilder, MemFlagsData,
    Signature, StackSlotData, StackSlotKind, Type, UserExternalName, Value,
};
use cranelift_codegen::isa::CallConv;
use cranelift_frontend::{FunctionBuilder, Variable};
use std::marker::PhantomData;

/// Access that cannot fault: kernels get only ranges the runtime has checked.
const UNALIGNED: MemFlagsData = MemFlagsData::new().with_notrap().with_endianness(Endianness::Little);
/// The same, at a multiple of the access's size.
const ALIGNED: MemFlagsData = UNALIGNED.with_aligned();

/// A scalar value: an i64 (addresses, indices), an i32 or an f32.
pub(crate) type Scalar = Value;
/// Comparison of integers.
pub(crate) type IntCmp = IntCC;
/// Comparison of floats; the ordered ones are false when an operand is NaN.
pub(crate) type FloatCmp = FloatCC;

/// Four lanes: one vector register, or four scalars.
#[derive(Clone, Copy, Debug)]
enum Quad {
    Vector(Value),
    Scalars([Value; 4]),
}

/// 4 f32.
#[derive(Clone, Copy, Debug)]
pub(crate) struct F32x4(Quad);

/// 4 i32.
#[derive(Clone, Copy, Debug)]
pub(crate) struct I32x4(Quad);

/// 4 truth values, from a comparison.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mask4(Quad);

/// 16 i8: one vector register, or sixteen i32 scalars.
#[derive(Clone, Copy, Debug)]
pub(crate) struct I8x16(Wide);

#[derive(Clone, Copy, Debug)]
enum Wide {
    Vector(Value),
    Scalars([Value; 16]),
}

/// Something a [`Var`] can hold.
pub(crate) trait Pack: Copy {
    /// The values it is made of.
    #[doc(hidden)]
    fn parts(self) -> Vec<Value>;
    /// Back from as many values as [`Pack::parts`] gave.
    #[doc(hidden)]
    fn from_parts(parts: &[Value]) -> Self;
}

impl Pack for Value {
    fn parts(self) -> Vec<Value> {
        vec![self]
    }
    fn from_parts(parts: &[Value]) -> Self {
        parts[0]
    }
}

impl Pack for Quad {
    fn parts(self) -> Vec<Value> {
        match self {
            Quad::Vector(v) => vec![v],
            Quad::Scalars(s) => s.to_vec(),
        }
    }
    fn from_parts(parts: &[Value]) -> Self {
        match *parts {
            [a, b, c, d] => Quad::Scalars([a, b, c, d]),
            _ => Quad::Vector(parts[0]),
        }
    }
}

impl Pack for F32x4 {
    fn parts(self) -> Vec<Value> {
        self.0.parts()
    }
    fn from_parts(parts: &[Value]) -> Self {
        F32x4(Quad::from_parts(parts))
    }
}

impl Pack for I32x4 {
    fn parts(self) -> Vec<Value> {
        self.0.parts()
    }
    fn from_parts(parts: &[Value]) -> Self {
        I32x4(Quad::from_parts(parts))
    }
}

/// A value that changes: an accumulator, a running pointer.
#[derive(Clone, Debug)]
pub(crate) struct Var<T> {
    variables: Vec<Variable>,
    holds: PhantomData<T>,
}

/// Emits the body of one kernel.
pub(crate) struct Lanes<'f> {
    b: FunctionBuilder<'f>,
    target: Target,
    args: Value,
    begin: Value,
    end: Value,
    inner: Vec<Vec<u8>>,
}

impl<'f> Lanes<'f> {
    /// Starts a function whose parameters are the argument table and the range of grid items.
    pub(crate) fn new(mut b: FunctionBuilder<'f>, target: Target) -> Lanes<'f> {
        let entry = b.create_block();
        b.append_block_params_for_function_params(entry);
        b.switch_to_block(entry);
        b.seal_block(entry);
        let &[args, begin, end] = b.block_params(entry) else {
            unreachable!("kernels have three parameters");
        };
        Lanes { b, target, args, begin, end, inner: Vec::new() }
    }

    /// Ends the function; yields the inner functions it calls, by the index of their name.
    pub(crate) fn finish(mut self, config: cranelift_codegen::isa::TargetFrontendConfig) -> Vec<Vec<u8>> {
        self.b.ins().return_(&[]);
        self.b.finalize(config);
        self.inner
    }

    /// Calls a hand-assembled function with up to six i64 arguments, in the target's C convention. Its code is laid
    /// behind this kernel's, once however often it is called, and must be position-independent and call nothing.
    pub(crate) fn call_inner(&mut self, code: Vec<u8>, args: &[Scalar]) {
        let index = self.inner.iter().position(|c| *c == code).unwrap_or_else(|| {
            self.inner.push(code);
            self.inner.len() - 1
        });
        let mut signature = Signature::new(CallConv::SystemV);
        signature.params.extend(args.iter().map(|_| AbiParam::new(I64)));
        let signature = self.b.import_signature(signature);
        let name = UserExternalName { namespace: 0, index: index as u32 };
        let name = ExternalName::user(self.b.func.declare_imported_user_function(name));
        // In the same image, so that the call is relative and needs no table.
        let data = ExtFuncData { name, signature, colocated: true, patchable: false };
        let function = self.b.import_function(data);
        self.b.ins().call(function, args);
    }

    pub(crate) fn target(&self) -> Target {
        self.target
    }

    /// Whether vectors are emitted as scalars. Kernels whose unrolled bodies would become too large then loop.
    pub(crate) fn is_scalar(&self) -> bool {
        !self.target.has_vectors()
    }

    // Arguments

    /// First grid item of this call.
    pub(crate) fn begin(&self) -> Scalar {
        self.begin
    }

    /// Past the last grid item of this call.
    pub(crate) fn end(&self) -> Scalar {
        self.end
    }

    /// Argument `i` as an address or an i64.
    pub(crate) fn arg(&mut self, i: usize) -> Scalar {
        self.b.ins().load(I64, MemFlagsData::trusted(), self.args, (8 * i) as i32)
    }

    /// The low half of argument `i` as an i32.
    pub(crate) fn arg_i32(&mut self, i: usize) -> Scalar {
        self.b.ins().load(I32, MemFlagsData::trusted(), self.args, (8 * i) as i32)
    }

    /// The low half of argument `i` as the bits of an f32.
    pub(crate) fn arg_f32(&mut self, i: usize) -> Scalar {
        self.b.ins().load(F32, MemFlagsData::trusted(), self.args, (8 * i) as i32)
    }

    /// `body(item)` for each grid item of this call.
    pub(crate) fn for_items(&mut self, body: impl FnOnce(&mut Self, Scalar)) {
        self.for_range(self.begin, self.end, 1, body);
    }

    // Control flow

    /// `for i in (begin..end).step_by(step)`; `begin` and `end` are i64.
    pub(crate) fn for_range(
        &mut self,
        begin: Scalar,
        end: Scalar,
        step: i64,
        body: impl FnOnce(&mut Self, Scalar),
    ) {
        let (head, exit) = (self.b.create_block(), self.b.create_block());
        let i = self.b.append_block_param(head, I64);
        let enter = self.b.ins().icmp(IntCC::SignedLessThan, begin, end);
        self.b.ins().brif(enter, head, &[BlockArg::Value(begin)], exit, &[]);
        self.b.switch_to_block(head);
        body(self, i);
        let next = self.b.ins().iadd_imm_s(i, step);
        let again = self.b.ins().icmp(IntCC::SignedLessThan, next, end);
        self.b.ins().brif(again, head, &[BlockArg::Value(next)], exit, &[]);
        self.b.seal_block(head);
        self.b.seal_block(exit);
        self.b.switch_to_block(exit);
    }

    /// `for i in (0..n).step_by(step)` with `n` known now. A loop of one iteration is emitted without a loop.
    pub(crate) fn for_const(&mut self, n: usize, step: usize, body: impl FnOnce(&mut Self, Scalar)) {
        if n == 0 {
            return;
        }
        let begin = self.int(0);
        if n <= step {
            body(self, begin);
            return;
        }
        let end = self.int(n as i64);
        self.for_range(begin, end, step as i64, body);
    }

    /// Runs `body` when `condition` (from a comparison) holds.
    pub(crate) fn if_(&mut self, condition: Scalar, body: impl FnOnce(&mut Self)) {
        self.if_else(condition, body, |_| {});
    }

    /// Runs one of two bodies.
    pub(crate) fn if_else(
        &mut self,
        condition: Scalar,
        then: impl FnOnce(&mut Self),
        otherwise: impl FnOnce(&mut Self),
    ) {
        let (yes, no, join) = (self.b.create_block(), self.b.create_block(), self.b.create_block());
        self.b.ins().brif(condition, yes, &[], no, &[]);
        self.b.seal_block(yes);
        self.b.seal_block(no);
        self.b.switch_to_block(yes);
        then(self);
        self.b.ins().jump(join, &[]);
        self.b.switch_to_block(no);
        otherwise(self);
        self.b.ins().jump(join, &[]);
        self.b.seal_block(join);
        self.b.switch_to_block(join);
    }

    /// A variable with a first value.
    pub(crate) fn var<T: Pack>(&mut self, first: T) -> Var<T> {
        let variables = first
            .parts()
            .into_iter()
            .map(|value| {
                let ty = self.b.func.dfg.value_type(value);
                let variable = self.b.declare_var(ty);
                self.b.def_var(variable, value);
                variable
            })
            .collect();
        Var { variables, holds: PhantomData }
    }

    /// What the variable holds here.
    pub(crate) fn get<T: Pack>(&mut self, var: &Var<T>) -> T {
        let parts: Vec<Value> = var.variables.iter().map(|v| self.b.use_var(*v)).collect();
        T::from_parts(&parts)
    }

    /// Gives the variable a new value.
    pub(crate) fn set<T: Pack>(&mut self, var: &Var<T>, value: T) {
        for (variable, part) in var.variables.iter().zip(value.parts()) {
            self.b.def_var(*variable, part);
        }
    }

    // Scalar integers (i64 unless the operands are i32)

    /// An i64 constant.
    pub(crate) fn int(&mut self, value: i64) -> Scalar {
        self.b.ins().iconst(I64, value)
    }

    /// An i32 constant.
    pub(crate) fn int32(&mut self, value: i32) -> Scalar {
        // Constants of narrow types are written zero-extended.
        self.b.ins().iconst(I32, i64::from(value as u32))
    }

    pub(crate) fn iadd(&mut self, a: Scalar, b: Scalar) -> Scalar {
        self.b.ins().iadd(a, b)
    }

    pub(crate) fn iadd_imm(&mut self, a: Scalar, imm: i64) -> Scalar {
        if imm == 0 { a } else { self.b.ins().iadd_imm_s(a, imm) }
    }

    pub(crate) fn isub(&mut self, a: Scalar, b: Scalar) -> Scalar {
        self.b.ins().isub(a, b)
    }

    pub(crate) fn imul(&mut self, a: Scalar, b: Scalar) -> Scalar {
        self.b.ins().imul(a, b)
    }

    /// `a * imm`; a power of two becomes a shift.
    pub(crate) fn imul_imm(&mut self, a: Scalar, imm: i64) -> Scalar {
        match imm {
            1 => a,
            imm if imm > 0 && imm & (imm - 1) == 0 => self.ishl_imm(a, imm.trailing_zeros()),
            imm => self.b.ins().imul_imm_s(a, imm),
        }
    }

    /// Unsigned quotient by a constant; a power of two becomes a shift.
    pub(crate) fn udiv_imm(&mut self, a: Scalar, imm: u32) -> Scalar {
        if imm.is_power_of_two() {
            self.ushr_imm(a, imm.trailing_zeros())
        } else {
            self.b.ins().udiv_imm_u(a, i64::from(imm))
        }
    }

    /// Unsigned remainder by a constant; a power of two becomes a mask.
    pub(crate) fn urem_imm(&mut self, a: Scalar, imm: u32) -> Scalar {
        if imm.is_power_of_two() {
            self.iand_imm(a, i64::from(imm) - 1)
        } else {
            self.b.ins().urem_imm_u(a, i64::from(imm))
        }
    }

    pub(crate) fn ishl_imm(&mut self, a: Scalar, bits: u32) -> Scalar {
        if bits == 0 { a } else { self.b.ins().ishl_imm_u(a, i64::from(bits)) }
    }

    /// Logical shift right.
    pub(crate) fn ushr_imm(&mut self, a: Scalar, bits: u32) -> Scalar {
        if bits == 0 { a } else { self.b.ins().ushr_imm_u(a, i64::from(bits)) }
    }

    /// Arithmetic shift right.
    pub(crate) fn sshr_imm(&mut self, a: Scalar, bits: u32) -> Scalar {
        if bits == 0 { a } else { self.b.ins().sshr_imm_u(a, i64::from(bits)) }
    }

    pub(crate) fn iand(&mut self, a: Scalar, b: Scalar) -> Scalar {
        self.b.ins().band(a, b)
    }

    pub(crate) fn iand_imm(&mut self, a: Scalar, imm: i64) -> Scalar {
        self.b.ins().band_imm_s(a, imm)
    }

    pub(crate) fn ior(&mut self, a: Scalar, b: Scalar) -> Scalar {
        self.b.ins().bor(a, b)
    }

    /// Signed minimum.
    pub(crate) fn imin(&mut self, a: Scalar, b: Scalar) -> Scalar {
        let less = self.b.ins().icmp(IntCC::SignedLessThan, a, b);
        self.b.ins().select(less, a, b)
    }

    /// Signed maximum.
    pub(crate) fn imax(&mut self, a: Scalar, b: Scalar) -> Scalar {
        let less = self.b.ins().icmp(IntCC::SignedLessThan, a, b);
        self.b.ins().select(less, b, a)
    }

    /// A condition for [`Lanes::if_`] and [`Lanes::select`].
    pub(crate) fn icmp(&mut self, cmp: IntCmp, a: Scalar, b: Scalar) -> Scalar {
        self.b.ins().icmp(cmp, a, b)
    }

    pub(crate) fn icmp_imm(&mut self, cmp: IntCmp, a: Scalar, imm: i64) -> Scalar {
        self.b.ins().icmp_imm_s(cmp, a, imm)
    }

    /// `condition ? a : b`, for any scalars.
    pub(crate) fn select(&mut self, condition: Scalar, a: Scalar, b: Scalar) -> Scalar {
        self.b.ins().select(condition, a, b)
    }

    /// i32 to i64 with its sign.
    pub(crate) fn widen(&mut self, a: Scalar) -> Scalar {
        self.b.ins().sextend(I64, a)
    }

    /// i32 to i64, taken as unsigned.
    pub(crate) fn widen_unsigned(&mut self, a: Scalar) -> Scalar {
        self.b.ins().uextend(I64, a)
    }

    /// The low half of an i64.
    pub(crate) fn narrow(&mut self, a: Scalar) -> Scalar {
        self.b.ins().ireduce(I32, a)
    }

    /// `base + index * scale`, an address.
    pub(crate) fn offset(&mut self, base: Scalar, index: Scalar, scale: usize) -> Scalar {
        let bytes = self.imul_imm(index, scale as i64);
        self.b.ins().iadd(base, bytes)
    }

    // Scalar floats

    /// An f32 constant.
    pub(crate) fn f32(&mut self, value: f32) -> Scalar {
        self.b.ins().f32const(value)
    }

    pub(crate) fn fadd(&mut self, a: Scalar, b: Scalar) -> Scalar {
        self.b.ins().fadd(a, b)
    }

    pub(crate) fn fsub(&mut self, a: Scalar, b: Scalar) -> Scalar {
        self.b.ins().fsub(a, b)
    }

    pub(crate) fn fmul(&mut self, a: Scalar, b: Scalar) -> Scalar {
        self.b.ins().fmul(a, b)
    }

    pub(crate) fn fdiv(&mut self, a: Scalar, b: Scalar) -> Scalar {
        self.b.ins().fdiv(a, b)
    }

    pub(crate) fn fsqrt(&mut self, a: Scalar) -> Scalar {
        self.b.ins().sqrt(a)
    }

    pub(crate) fn fneg(&mut self, a: Scalar) -> Scalar {
        self.b.ins().fneg(a)
    }

    pub(crate) fn fabs(&mut self, a: Scalar) -> Scalar {
        self.b.ins().fabs(a)
    }

    /// `a * b + c`; one rounding where the target fuses, otherwise two.
    pub(crate) fn fmuladd(&mut self, a: Scalar, b: Scalar, c: Scalar) -> Scalar {
        if self.target.has_fma() {
            self.b.ins().fma(a, b, c)
        } else {
            let product = self.b.ins().fmul(a, b);
            self.b.ins().fadd(product, c)
        }
    }

    /// The smaller; `b` when either is NaN.
    pub(crate) fn fmin(&mut self, a: Scalar, b: Scalar) -> Scalar {
        let less = self.b.ins().fcmp(FloatCC::LessThan, a, b);
        self.b.ins().select(less, a, b)
    }

    /// The larger; `b` when either is NaN.
    pub(crate) fn fmax(&mut self, a: Scalar, b: Scalar) -> Scalar {
        let less = self.b.ins().fcmp(FloatCC::LessThan, b, a);
        self.b.ins().select(less, a, b)
    }

    pub(crate) fn fcmp(&mut self, cmp: FloatCmp, a: Scalar, b: Scalar) -> Scalar {
        self.b.ins().fcmp(cmp, a, b)
    }

    /// i32 to f32.
    pub(crate) fn int_to_float(&mut self, a: Scalar) -> Scalar {
        self.b.ins().fcvt_from_sint(F32, a)
    }

    /// The bits of an i32 as an f32.
    pub(crate) fn bits_to_float(&mut self, a: Scalar) -> Scalar {
        self.bitcast(F32, a)
    }

    /// The bits of an f32 as an i32.
    pub(crate) fn float_to_bits(&mut self, a: Scalar) -> Scalar {
        self.bitcast(I32, a)
    }

    // Vectors of 4 f32

    /// A constant in every lane.
    pub(crate) fn splat_const(&mut self, value: f32) -> F32x4 {
        if self.is_scalar() {
            let v = self.f32(value);
            return F32x4(Quad::Scalars([v; 4]));
        }
        let bytes = [value.to_le_bytes(); 4].concat();
        F32x4(Quad::Vector(self.vector_const(F32X4, &bytes)))
    }

    /// A constant in every lane.
    pub(crate) fn splat_const_i32(&mut self, value: i32) -> I32x4 {
        if self.is_scalar() {
            let v = self.int32(value);
            return I32x4(Quad::Scalars([v; 4]));
        }
        let bytes = [value.to_le_bytes(); 4].concat();
        I32x4(Quad::Vector(self.vector_const(I32X4, &bytes)))
    }

    /// An f32 in every lane.
    pub(crate) fn splat(&mut self, value: Scalar) -> F32x4 {
        F32x4(self.splat_quad(F32X4, value))
    }

    /// An i32 in every lane.
    pub(crate) fn splat_i32(&mut self, value: Scalar) -> I32x4 {
        I32x4(self.splat_quad(I32X4, value))
    }

    pub(crate) fn vadd(&mut self, a: F32x4, b: F32x4) -> F32x4 {
        F32x4(self.zip(a.0, b.0, |f, a, b| f.ins().fadd(a, b)))
    }

    pub(crate) fn vsub(&mut self, a: F32x4, b: F32x4) -> F32x4 {
        F32x4(self.zip(a.0, b.0, |f, a, b| f.ins().fsub(a, b)))
    }

    pub(crate) fn vmul(&mut self, a: F32x4, b: F32x4) -> F32x4 {
        F32x4(self.zip(a.0, b.0, |f, a, b| f.ins().fmul(a, b)))
    }

    pub(crate) fn vdiv(&mut self, a: F32x4, b: F32x4) -> F32x4 {
        F32x4(self.zip(a.0, b.0, |f, a, b| f.ins().fdiv(a, b)))
    }

    /// `a * b + c`; one rounding where the target fuses, otherwise two.
    pub(crate) fn vmuladd(&mut self, a: F32x4, b: F32x4, c: F32x4) -> F32x4 {
        if !self.target.has_fma() {
            let product = self.vmul(a, b);
            return self.vadd(product, c);
        }
        F32x4(match (a.0, b.0, c.0) {
            (Quad::Vector(a), Quad::Vector(b), Quad::Vector(c)) => Quad::Vector(self.b.ins().fma(a, b, c)),
            (a, b, c) => {
                let (a, b, c) = (self.lanes_of(a), self.lanes_of(b), self.lanes_of(c));
                Quad::Scalars(std::array::from_fn(|i| self.b.ins().fma(a[i], b[i], c[i])))
            }
        })
    }

    /// The smaller of each pair; `b` when either is NaN.
    pub(crate) fn vmin(&mut self, a: F32x4, b: F32x4) -> F32x4 {
        let less = self.vcmp(FloatCC::LessThan, a, b);
        self.vselect(less, a, b)
    }

    /// The larger of each pair; `b` when either is NaN.
    pub(crate) fn vmax(&mut self, a: F32x4, b: F32x4) -> F32x4 {
        let less = self.vcmp(FloatCC::LessThan, b, a);
        self.vselect(less, a, b)
    }

    pub(crate) fn vneg(&mut self, a: F32x4) -> F32x4 {
        F32x4(self.each(a.0, |f, a| f.ins().fneg(a)))
    }

    pub(crate) fn vabs(&mut self, a: F32x4) -> F32x4 {
        F32x4(self.each(a.0, |f, a| f.ins().fabs(a)))
    }

    pub(crate) fn vsqrt(&mut self, a: F32x4) -> F32x4 {
        F32x4(self.each(a.0, |f, a| f.ins().sqrt(a)))
    }

    /// Compares lane by lane.
    pub(crate) fn vcmp(&mut self, cmp: FloatCmp, a: F32x4, b: F32x4) -> Mask4 {
        Mask4(self.zip(a.0, b.0, |f, a, b| f.ins().fcmp(cmp, a, b)))
    }

    /// `mask ? a : b`, lane by lane.
    pub(crate) fn vselect(&mut self, mask: Mask4, a: F32x4, b: F32x4) -> F32x4 {
        F32x4(match (mask.0, a.0, b.0) {
            (Quad::Vector(m), Quad::Vector(a), Quad::Vector(b)) => {
                let m = self.bitcast(F32X4, m);
                Quad::Vector(self.b.ins().bitselect(m, a, b))
            }
            (m, a, b) => self.select_lanes(m, a, b),
        })
    }

    /// Nearest integer of each lane, ties to even, as f32 and as i32; for |x| < 2^22.
    pub(crate) fn vround(&mut self, a: F32x4) -> (F32x4, I32x4) {
        // Adding 1.5 * 2^23 leaves the rounded integer in the low bits of the significand.
        const MAGIC: f32 = 12_582_912.0;
        let magic = self.splat_const(MAGIC);
        let shifted = self.vadd(a, magic);
        let rounded = self.vsub(shifted, magic);
        let bits = self.vbits(shifted);
        let offset = self.splat_const_i32(MAGIC.to_bits() as i32);
        (rounded, self.visub(bits, offset))
    }

    /// i32 to f32.
    pub(crate) fn vint_to_float(&mut self, a: I32x4) -> F32x4 {
        F32x4(match a.0 {
            Quad::Vector(v) => Quad::Vector(self.b.ins().fcvt_from_sint(F32X4, v)),
            Quad::Scalars(s) => Quad::Scalars(s.map(|v| self.b.ins().fcvt_from_sint(F32, v))),
        })
    }

    /// The bits of each f32.
    pub(crate) fn vbits(&mut self, a: F32x4) -> I32x4 {
        I32x4(match a.0 {
            Quad::Vector(v) => Quad::Vector(self.bitcast(I32X4, v)),
            Quad::Scalars(s) => Quad::Scalars(s.map(|v| self.bitcast(I32, v))),
        })
    }

    /// The f32 of each lane's bits.
    pub(crate) fn vfrom_bits(&mut self, a: I32x4) -> F32x4 {
        F32x4(match a.0 {
            Quad::Vector(v) => Quad::Vector(self.bitcast(F32X4, v)),
            Quad::Scalars(s) => Quad::Scalars(s.map(|v| self.bitcast(F32, v))),
        })
    }

    /// `(lane0 + lane1) + (lane2 + lane3)`.
    pub(crate) fn vsum(&mut self, a: F32x4) -> Scalar {
        let l = self.lanes_of(a.0);
        let (x, y) = (self.fadd(l[0], l[1]), self.fadd(l[2], l[3]));
        self.fadd(x, y)
    }

    /// The largest lane; for lanes without NaN.
    pub(crate) fn vmax_across(&mut self, a: F32x4) -> Scalar {
        let l = self.lanes_of(a.0);
        let (x, y) = (self.fmax(l[0], l[1]), self.fmax(l[2], l[3]));
        self.fmax(x, y)
    }

    /// Lane `i` as a scalar.
    pub(crate) fn lane(&mut self, a: F32x4, i: usize) -> Scalar {
        self.lanes_of(a.0)[i]
    }

    // Vectors of 4 i32

    pub(crate) fn viadd(&mut self, a: I32x4, b: I32x4) -> I32x4 {
        I32x4(self.zip(a.0, b.0, |f, a, b| f.ins().iadd(a, b)))
    }

    pub(crate) fn visub(&mut self, a: I32x4, b: I32x4) -> I32x4 {
        I32x4(self.zip(a.0, b.0, |f, a, b| f.ins().isub(a, b)))
    }

    pub(crate) fn vimul(&mut self, a: I32x4, b: I32x4) -> I32x4 {
        I32x4(self.zip(a.0, b.0, |f, a, b| f.ins().imul(a, b)))
    }

    pub(crate) fn viand(&mut self, a: I32x4, b: I32x4) -> I32x4 {
        I32x4(self.zip(a.0, b.0, |f, a, b| f.ins().band(a, b)))
    }

    pub(crate) fn vior(&mut self, a: I32x4, b: I32x4) -> I32x4 {
        I32x4(self.zip(a.0, b.0, |f, a, b| f.ins().bor(a, b)))
    }

    pub(crate) fn vineg(&mut self, a: I32x4) -> I32x4 {
        I32x4(self.each(a.0, |f, a| f.ins().ineg(a)))
    }

    pub(crate) fn vishl_imm(&mut self, a: I32x4, bits: u32) -> I32x4 {
        I32x4(self.each(a.0, |f, a| f.ins().ishl_imm_u(a, i64::from(bits))))
    }

    /// Logical shift right.
    pub(crate) fn vushr_imm(&mut self, a: I32x4, bits: u32) -> I32x4 {
        I32x4(self.each(a.0, |f, a| f.ins().ushr_imm_u(a, i64::from(bits))))
    }

    /// Arithmetic shift right.
    pub(crate) fn vsshr_imm(&mut self, a: I32x4, bits: u32) -> I32x4 {
        I32x4(self.each(a.0, |f, a| f.ins().sshr_imm_u(a, i64::from(bits))))
    }

    pub(crate) fn vicmp(&mut self, cmp: IntCmp, a: I32x4, b: I32x4) -> Mask4 {
        Mask4(self.zip(a.0, b.0, |f, a, b| f.ins().icmp(cmp, a, b)))
    }

    /// `mask ? a : b`, lane by lane.
    pub(crate) fn viselect(&mut self, mask: Mask4, a: I32x4, b: I32x4) -> I32x4 {
        I32x4(match (mask.0, a.0, b.0) {
            (Quad::Vector(m), Quad::Vector(a), Quad::Vector(b)) => {
                Quad::Vector(self.b.ins().bitselect(m, a, b))
            }
            (m, a, b) => self.select_lanes(m, a, b),
        })
    }

    /// Sum of the lanes.
    pub(crate) fn visum(&mut self, a: I32x4) -> Scalar {
        let l = self.lanes_of(a.0);
        let (x, y) = (self.iadd(l[0], l[1]), self.iadd(l[2], l[3]));
        self.iadd(x, y)
    }

    // Internals

    fn bitcast(&mut self, ty: Type, v: Value) -> Value {
        self.b.ins().bitcast(ty, MemFlagsData::new().with_endianness(Endianness::Little), v)
    }

    fn vector_const(&mut self, ty: Type, bytes: &[u8]) -> Value {
        let handle = self.b.func.dfg.constants.insert(ConstantData::from(bytes));
        self.b.ins().vconst(ty, handle)
    }

    fn splat_quad(&mut self, ty: Type, value: Value) -> Quad {
        if self.is_scalar() { Quad::Scalars([value; 4]) } else { Quad::Vector(self.b.ins().splat(ty, value)) }
    }

    fn lanes_of(&mut self, a: Quad) -> [Value; 4] {
        match a {
            Quad::Vector(v) => std::array::from_fn(|i| self.b.ins().extractlane(v, i as u8)),
            Quad::Scalars(s) => s,
        }
    }

    fn each(&mut self, a: Quad, mut op: impl FnMut(&mut FunctionBuilder<'f>, Value) -> Value) -> Quad {
        match a {
            Quad::Vector(v) => Quad::Vector(op(&mut self.b, v)),
            Quad::Scalars(s) => Quad::Scalars(s.map(|v| op(&mut self.b, v))),
        }
    }

    fn zip(
        &mut self,
        a: Quad,
        b: Quad,
        mut op: impl FnMut(&mut FunctionBuilder<'f>, Value, Value) -> Value,
    ) -> Quad {
        match (a, b) {
            (Quad::Vector(a), Quad::Vector(b)) => Quad::Vector(op(&mut self.b, a, b)),
            (a, b) => {
                let (a, b) = (self.lanes_of(a), self.lanes_of(b));
                Quad::Scalars(std::array::from_fn(|i| op(&mut self.b, a[i], b[i])))
            }
        }
    }

    fn select_lanes(&mut self, m: Quad, a: Quad, b: Quad) -> Quad {
        let (m, a, b) = (self.lanes_of(m), self.lanes_of(a), self.lanes_of(b));
        Quad::Scalars(std::array::from_fn(|i| self.b.ins().select(m[i], a[i], b[i])))
    }
}
