//! Arithmetic, logic, comparison, conversion, moves.

use super::modifiers::Modifiers;
use super::{Decoded, Decoder};
use crate::arith::bits::{self, Permute};
use crate::arith::compare::{self, Compare};
use crate::arith::convert::Convert;
use crate::arith::float::{self, Mode};
use crate::arith::half_float::{self, HalfMode};
use crate::arith::integer;
use crate::arith::small_float::Rounding;
use crate::code::{FloatTest, Logic, Op};
use crate::lanes::{Binary, Ternary, Unary, unary};
use crate::syntax::Operand;
use crate::types::{Kind, Type};

fn is_half(ty: Type) -> bool {
    matches!(ty, Type::F16 | Type::F16x2 | Type::Bf16 | Type::Bf16x2)
}

fn logic(name: &str) -> Option<Logic> {
    Some(match name {
        "and" => Logic::And,
        "or" => Logic::Or,
        "xor" => Logic::Xor,
        _ => return None,
    })
}

impl Decoder<'_> {
    pub(super) fn alu_op(&mut self, root: &str, m: &mut Modifiers<'_>, o: &[Operand]) -> Decoded<Op> {
        match root {
            "add" | "sub" | "mul" | "div" | "min" | "max" => self.arithmetic(root, m, o),
            "addc" | "subc" => self.carry(root, m, o),
            "rem" => {
                let ty = m.ty()?;
                self.binary(integer::rem(ty), ty, ty, m, o)
            }
            "fma" | "mad" | "madc" => self.multiply_add(root, m, o),
            "mul24" | "mad24" => Err(m.unsupported("")),
            "sad" => {
                let ty = m.ty()?;
                self.ternary(integer::sad(ty), [ty; 3], m, o)
            }
            "dp4a" => {
                let (a, b) = (m.ty()?, m.ty()?);
                self.ternary(integer::dp4a(a, b), [Type::B32; 3], m, o)
            }
            "dp2a" => {
                let upper = m.take("hi");
                m.take("lo");
                let (a, b) = (m.ty()?, m.ty()?);
                self.ternary(integer::dp2a(a, b, upper), [Type::B32; 3], m, o)
            }
            "and" | "or" | "xor" => self.logical(root, m, o),
            "not" => self.not(m, o),
            "cnot" => {
                let ty = m.ty()?;
                self.unary(bits::cnot(ty), ty, m, o)
            }
            "shl" | "shr" => {
                let ty = m.ty()?;
                let of = if root == "shl" { bits::shl(ty) } else { bits::shr(ty) };
                self.binary(of, ty, Type::U32, m, o)
            }
            "shf" => {
                let left = m.take("l");
                if !left && !m.take("r") {
                    return Err(m.unsupported(""));
                }
                let clamp = m.take("clamp");
                m.take("wrap");
                m.ty()?;
                self.ternary(Some(bits::shf(left, clamp)), [Type::B32, Type::B32, Type::U32], m, o)
            }
            "lop3" => {
                m.ty()?;
                let [into, a, b, c, table] = self.exactly(o)?;
                let Operand::Int(table) = table else { return Err(m.unsupported("without a table")) };
                let src = |o| self.src(o, Type::B32);
                Ok(Op::Lop3 {
                    table: *table as u8,
                    into: self.reg(into)?,
                    a: src(a)?,
                    b: src(b)?,
                    c: src(c)?,
                })
            }
            "popc" | "clz" | "brev" => {
                let ty = m.ty()?;
                let of = match root {
                    "popc" => bits::popc(ty),
                    "clz" => bits::clz(ty),
                    _ => bits::brev(ty),
                };
                self.unary(of, ty, m, o)
            }
            "bfind" => {
                let shift = m.take("shiftamt");
                let ty = m.ty()?;
                self.unary(bits::bfind(ty, shift), ty, m, o)
            }
            "bfe" => {
                let ty = m.ty()?;
                self.ternary(bits::bfe(ty), [ty, Type::U32, Type::U32], m, o)
            }
            "bfi" => {
                let ty = m.ty()?;
                let [into, a, b, position, length] = self.exactly(o)?;
                Ok(Op::Bfi {
                    bits: ty.bits(),
                    into: self.reg(into)?,
                    a: self.src(a, ty)?,
                    b: self.src(b, ty)?,
                    position: self.src(position, Type::U32)?,
                    length: self.src(length, Type::U32)?,
                })
            }
            "prmt" => {
                m.ty()?;
                let mode = m.one_of(&[
                    ("f4e", Permute::Forward4),
                    ("b4e", Permute::Backward4),
                    ("rc8", Permute::Replicate8),
                    ("ecl", Permute::EdgeLeft),
                    ("ecr", Permute::EdgeRight),
                    ("rc16", Permute::Replicate16),
                ]);
                let [into, a, b, selector] = self.exactly(o)?;
                let src = |o| self.src(o, Type::B32);
                let mode = mode.unwrap_or(Permute::Index);
                Ok(Op::Prmt { mode, into: self.reg(into)?, a: src(a)?, b: src(b)?, selector: src(selector)? })
            }
            "neg" | "abs" => self.sign(root, m, o),
            "copysign" => {
                let ty = m.ty()?;
                let of = match ty {
                    Type::F32 => Some(float::copysign_single()),
                    Type::F64 => Some(float::copysign_double()),
                    _ => None,
                };
                self.binary(of, ty, ty, m, o)
            }
            "rcp" | "sqrt" | "rsqrt" | "ex2" | "lg2" | "sin" | "cos" | "tanh" => self.function(root, m, o),
            "setp" => self.set_predicate(m, o),
            "set" => self.set_register(m, o),
            "selp" => {
                let ty = m.ty()?;
                let [into, a, b, by] = self.exactly(o)?;
                Ok(Op::Select {
                    into: self.reg(into)?,
                    a: self.src(a, ty)?,
                    b: self.src(b, ty)?,
                    by: self.pred_src(by)?,
                    bits: ty.bits(),
                })
            }
            "slct" => {
                m.take("ftz");
                let (ty, by) = (m.ty()?, m.ty()?);
                if !matches!(by, Type::S32 | Type::F32) {
                    return Err(m.unsupported(""));
                }
                let [into, a, b, c] = self.exactly(o)?;
                Ok(Op::SelectSign {
                    into: self.reg(into)?,
                    a: self.src(a, ty)?,
                    b: self.src(b, ty)?,
                    c: self.src(c, by)?,
                    c_is_float: by == Type::F32,
                    bits: ty.bits(),
                })
            }
            "testp" => {
                let what = m.one_of(&[
                    ("finite", FloatTest::Finite),
                    ("infinite", FloatTest::Infinite),
                    ("number", FloatTest::Number),
                    ("notanumber", FloatTest::NotANumber),
                    ("normal", FloatTest::Normal),
                    ("subnormal", FloatTest::Subnormal),
                ]);
                let Some(what) = what else { return Err(m.unsupported("")) };
                let ty = m.ty()?;
                if !matches!(ty, Type::F32 | Type::F64) {
                    return Err(m.unsupported(""));
                }
                let [into, a] = self.exactly(o)?;
                Ok(Op::Test { what, ty, into: self.pred(into)?, a: self.src(a, ty)? })
            }
            "mov" => self.mov(m, o),
            "cvt" => self.convert(m, o),
            _ => Err(m.unsupported("")),
        }
    }

    fn unary(&self, of: Option<Unary>, ty: Type, m: &Modifiers<'_>, o: &[Operand]) -> Decoded<Op> {
        let Some(of) = of else { return Err(m.unsupported("")) };
        let [into, a] = self.exactly(o)?;
        Ok(Op::Unary { of, into: self.reg(into)?, a: self.src(a, ty)? })
    }

    fn binary(
        &self,
        of: Option<Binary>,
        a_ty: Type,
        b_ty: Type,
        m: &Modifiers<'_>,
        o: &[Operand],
    ) -> Decoded<Op> {
        let Some(of) = of else { return Err(m.unsupported("")) };
        let [into, a, b] = self.exactly(o)?;
        Ok(Op::Binary { of, into: self.reg(into)?, a: self.src(a, a_ty)?, b: self.src(b, b_ty)? })
    }

    fn ternary(
        &self,
        of: Option<Ternary>,
        types: [Type; 3],
        m: &Modifiers<'_>,
        o: &[Operand],
    ) -> Decoded<Op> {
        let Some(of) = of else { return Err(m.unsupported("")) };
        let [into, a, b, c] = self.exactly(o)?;
        Ok(Op::Ternary {
            of,
            into: self.reg(into)?,
            a: self.src(a, types[0])?,
            b: self.src(b, types[1])?,
            c: self.src(c, types[2])?,
        })
    }

    fn arithmetic(&mut self, root: &str, m: &mut Modifiers<'_>, o: &[Operand]) -> Decoded<Op> {
        if m.take("cc") {
            let ty = m.ty()?;
            return self.carried(root == "sub", false, true, ty, m, o);
        }
        let wide = m.one_of(&[("wide", 2), ("hi", 1), ("lo", 0)]);
        // `div.full` is as exact as it says and a little more.
        let approximate = m.take("approx") | m.take("full");
        let rounding = m.rounding();
        let (flush, saturate) = (m.take("ftz"), m.take("sat"));
        let (nan, xorsign) = (m.take("NaN"), m.take("xorsign"));
        if xorsign {
            m.take("abs");
        }
        let ty = m.ty()?;
        if (approximate && (root != "div" || ty != Type::F32)) || (nan && !matches!(root, "min" | "max")) {
            return Err(m.unsupported(""));
        }
        if ty == Type::F32 {
            let mode = Mode { rounding, flush, saturate };
            let of = match root {
                "add" => float::add_single(mode),
                "sub" => float::sub_single(mode),
                "mul" => float::mul_single(mode),
                "div" => float::div_single(mode),
                _ => float::extreme_single(root == "max", nan, flush, xorsign)?,
            };
            return self.binary(Some(of), ty, ty, m, o);
        }
        if xorsign {
            return Err(m.unsupported(""));
        }
        if ty == Type::F64 {
            if rounding != Rounding::Nearest || flush || saturate {
                return Err(m.unsupported("of doubles"));
            }
            return self.binary(float::double_binary(root), ty, ty, m, o);
        }
        if is_half(ty) {
            if rounding != Rounding::Nearest {
                return Err(m.unsupported(""));
            }
            let mode = HalfMode { flush, saturate, relu: false };
            let of = match (root, nan) {
                ("add", _) => half_float::add(ty, mode),
                ("sub", _) => half_float::sub(ty, mode),
                ("mul", _) => half_float::mul(ty, mode),
                ("min", false) => half_float::min(ty, mode),
                ("min", true) => half_float::min_nan(ty, mode),
                ("max", false) => half_float::max(ty, mode),
                ("max", true) => half_float::max_nan(ty, mode),
                _ => None,
            };
            return self.binary(of, ty, ty, m, o);
        }
        if nan || flush || rounding != Rounding::Nearest || (saturate && ty != Type::S32) {
            return Err(m.unsupported(""));
        }
        let of = match (root, saturate) {
            ("add", true) => Some(integer::add_sat()),
            ("sub", true) => Some(integer::sub_sat()),
            (_, true) => None,
            ("add", _) => integer::add(ty),
            ("sub", _) => integer::sub(ty),
            ("mul", _) => match wide {
                Some(2) => integer::mul_wide(ty),
                Some(1) => integer::mul_hi(ty),
                Some(_) => integer::mul_lo(ty),
                None => None,
            },
            ("div", _) => integer::div(ty),
            ("min", _) => integer::min(ty),
            _ => integer::max(ty),
        };
        self.binary(of, ty, ty, m, o)
    }

    fn carried(
        &self,
        subtract: bool,
        carry_in: bool,
        carry_out: bool,
        ty: Type,
        m: &Modifiers<'_>,
        o: &[Operand],
    ) -> Decoded<Op> {
        if ty.is_float() || ty.bits() < 32 {
            return Err(m.unsupported(""));
        }
        let [into, a, b] = self.exactly(o)?;
        let (into, a, b) = (self.reg(into)?, self.src(a, ty)?, self.src(b, ty)?);
        Ok(Op::Carry { into, a, b, bits: ty.bits(), subtract, carry_in, carry_out })
    }

    fn carry(&mut self, root: &str, m: &mut Modifiers<'_>, o: &[Operand]) -> Decoded<Op> {
        let carry_out = m.take("cc");
        let ty = m.ty()?;
        self.carried(root == "subc", true, carry_out, ty, m, o)
    }

    fn multiply_add(&mut self, root: &str, m: &mut Modifiers<'_>, o: &[Operand]) -> Decoded<Op> {
        let wide = m.one_of(&[("wide", 2), ("hi", 1), ("lo", 0)]);
        let rounding = m.rounding();
        let (flush, saturate, relu) = (m.take("ftz"), m.take("sat"), m.take("relu"));
        let carry_out = m.take("cc");
        let ty = m.ty()?;
        if carry_out || root == "madc" {
            let product = match wide {
                Some(0) => integer::mul_lo(ty),
                Some(1) => integer::mul_hi(ty),
                _ => None,
            };
            let Some(product) = product.filter(|_| ty.bits() >= 32) else { return Err(m.unsupported("")) };
            let [into, a, b, c] = self.exactly(o)?;
            let src = |o| self.src(o, ty);
            let (into, a, b, c) = (self.reg(into)?, src(a)?, src(b)?, src(c)?);
            let carry_in = root == "madc";
            return Ok(Op::MadCarry { into, product, a, b, c, bits: ty.bits(), carry_in, carry_out });
        }
        let of = match ty {
            Type::F32 if !relu => Some(float::fma_single(Mode { rounding, flush, saturate })),
            Type::F64 if rounding == Rounding::Nearest && !flush && !saturate && !relu => {
                Some(float::fma_double())
            }
            _ if is_half(ty) && rounding == Rounding::Nearest => {
                half_float::fma(ty, HalfMode { flush, saturate, relu })
            }
            _ if flush || saturate || relu || rounding != Rounding::Nearest => None,
            _ => match wide {
                Some(2) => {
                    let sum = match ty {
                        Type::U16 => Type::U32,
                        Type::S16 => Type::S32,
                        Type::U32 => Type::U64,
                        _ => Type::S64,
                    };
                    return self.ternary(integer::mad_wide(ty), [ty, ty, sum], m, o);
                }
                Some(1) => integer::mad_hi(ty),
                Some(_) => integer::mad_lo(ty),
                None => None,
            },
        };
        self.ternary(of, [ty; 3], m, o)
    }

    fn logical(&mut self, root: &str, m: &mut Modifiers<'_>, o: &[Operand]) -> Decoded<Op> {
        let ty = m.ty()?;
        let Some(op) = logic(root) else { return Err(m.unsupported("")) };
        if ty == Type::Pred {
            let [into, a, b] = self.exactly(o)?;
            return Ok(Op::LogicPred {
                op,
                into: self.pred(into)?,
                a: self.pred_src(a)?,
                b: self.pred_src(b)?,
            });
        }
        if ty.kind() != Kind::Bits || ty.bits() < 16 {
            return Err(m.unsupported(""));
        }
        let of = match op {
            Logic::And => bits::and(),
            Logic::Or => bits::or(),
            Logic::Xor => bits::xor(),
        };
        self.binary(Some(of), ty, ty, m, o)
    }

    fn not(&mut self, m: &mut Modifiers<'_>, o: &[Operand]) -> Decoded<Op> {
        let ty = m.ty()?;
        if ty == Type::Pred {
            let [into, a] = self.exactly(o)?;
            let from = self.pred_src(&Operand::Not(Box::new(a.clone())))?;
            return Ok(Op::MovePred { into: self.pred(into)?, from });
        }
        self.unary(bits::not(ty), ty, m, o)
    }

    fn sign(&mut self, root: &str, m: &mut Modifiers<'_>, o: &[Operand]) -> Decoded<Op> {
        let flush = m.take("ftz");
        let ty = m.ty()?;
        let of = match (root, ty) {
            ("neg", Type::F32) => Some(float::neg_single(flush)),
            (_, Type::F32) => Some(float::abs_single(flush)),
            (_, Type::F64) => float::double_unary(root),
            ("neg", _) if is_half(ty) && !flush => half_float::neg(ty),
            (_, _) if is_half(ty) && !flush => half_float::abs(ty),
            ("neg", _) => integer::neg(ty),
            _ => integer::abs(ty),
        };
        self.unary(of, ty, m, o)
    }

    fn function(&mut self, root: &str, m: &mut Modifiers<'_>, o: &[Operand]) -> Decoded<Op> {
        let approximate = m.take("approx");
        let rounding = m.rounding();
        let flush = m.take("ftz");
        let ty = m.ty()?;
        let mode = Mode { rounding, flush, saturate: false };
        let of = match (root, ty) {
            ("rcp", Type::F32) => Some(float::rcp_single(mode)),
            ("sqrt", Type::F32) => Some(float::sqrt_single(mode)),
            ("rcp" | "sqrt" | "rsqrt", Type::F64) if rounding == Rounding::Nearest => {
                float::double_unary(root)
            }
            _ if !approximate && !is_half(ty) => None,
            ("rsqrt", Type::F32) => Some(float::rsqrt(flush)),
            ("ex2", Type::F32) => Some(float::ex2(flush)),
            ("lg2", Type::F32) => Some(float::lg2(flush)),
            ("sin", Type::F32) => Some(float::sin(flush)),
            ("cos", Type::F32) => Some(float::cos(flush)),
            ("tanh", Type::F32) => Some(float::tanh(flush)),
            ("ex2", _) => half_float::ex2(ty, flush),
            ("tanh", _) => half_float::tanh(ty, flush),
            _ => None,
        };
        self.unary(of, ty, m, o)
    }

    /// Operator, types and third operand that `setp` and `set` share.
    fn comparison(&mut self, m: &mut Modifiers<'_>) -> Decoded<(Compare, Option<Logic>)> {
        let op = m.parse(Compare::parse).ok_or_else(|| m.unsupported("without a comparison"))?;
        Ok((op, m.parse(logic)))
    }

    fn checked(op: Compare, ty: Type, m: &Modifiers<'_>) -> Decoded<()> {
        if !compare::supported(ty) || (op.is_float_only() && !ty.is_float()) {
            return Err(m.unsupported(""));
        }
        Ok(())
    }

    fn set_predicate(&mut self, m: &mut Modifiers<'_>, o: &[Operand]) -> Decoded<Op> {
        let (op, combine) = self.comparison(m)?;
        let flush = m.take("ftz");
        let ty = m.ty()?;
        Self::checked(op, ty, m)?;
        let [into, a, b, rest @ ..] = o else { return Err(m.unsupported("without operands")) };
        let and = match (combine, rest) {
            (None, []) => None,
            (Some(logic), [with]) => Some((logic, self.pred_src(with)?)),
            _ => return Err(m.unsupported("with these operands")),
        };
        let (into, not_into) = match into {
            Operand::Pair(p, q) => (self.pred_or_sink(p)?, self.pred_or_sink(q)?),
            p => (self.pred_or_sink(p)?, None),
        };
        let (a, b) = (self.src(a, ty)?, self.src(b, ty)?);
        Ok(Op::Compare { op, ty, flush, into, not_into, a, b, and })
    }

    fn set_register(&mut self, m: &mut Modifiers<'_>, o: &[Operand]) -> Decoded<Op> {
        let (op, combine) = self.comparison(m)?;
        let flush = m.take("ftz");
        let (to, ty) = (m.ty()?, m.ty()?);
        Self::checked(op, ty, m)?;
        let one = match to {
            Type::U32 | Type::S32 => 0xffff_ffff,
            Type::F32 => u64::from(1f32.to_bits()),
            _ => return Err(m.unsupported("")),
        };
        let [into, a, b, rest @ ..] = o else { return Err(m.unsupported("without operands")) };
        let and = match (combine, rest) {
            (None, []) => None,
            (Some(logic), [with]) => Some((logic, self.pred_src(with)?)),
            _ => return Err(m.unsupported("with these operands")),
        };
        let (a, b) = (self.src(a, ty)?, self.src(b, ty)?);
        Ok(Op::Set { op, ty, flush, into: self.reg(into)?, a, b, and, one })
    }

    fn mov(&mut self, m: &mut Modifiers<'_>, o: &[Operand]) -> Decoded<Op> {
        let ty = m.ty()?;
        if ty.bits() > 64 {
            return Err(m.unsupported(""));
        }
        let [into, from] = self.exactly(o)?;
        match (into, from) {
            (Operand::Vector(into), from) => {
                let into = into.iter().map(|o| self.reg_or_sink(o)).collect::<Decoded<Vec<_>>>()?;
                let bits = ty.bits() / (into.len() as u32).max(1);
                if !matches!(into.len(), 2 | 4) || bits < 8 {
                    return Err(m.unsupported("with so many components"));
                }
                Ok(Op::Split { into, a: self.src(from, ty)?, bits })
            }
            (into, Operand::Vector(parts)) => {
                let bits = ty.bits() / (parts.len() as u32).max(1);
                if !matches!(parts.len(), 2 | 4) || bits < 8 {
                    return Err(m.unsupported("with so many components"));
                }
                let part_ty = match bits {
                    8 => Type::B8,
                    16 => Type::B16,
                    _ => Type::B32,
                };
                let parts = parts.iter().map(|o| self.src(o, part_ty)).collect::<Decoded<Vec<_>>>()?;
                Ok(Op::Join { into: self.reg(into)?, parts, bits })
            }
            (into, from) if ty == Type::Pred || self.is_pred(into) => {
                Ok(Op::MovePred { into: self.pred(into)?, from: self.pred_src(from)? })
            }
            (into, from) => {
                let of = match ty.bits() {
                    16 => unary!(|a| a & 0xffff),
                    32 => unary!(|a| a & 0xffff_ffff),
                    64 => unary!(|a| a),
                    _ => return Err(m.unsupported("")),
                };
                Ok(Op::Unary { of, into: self.reg(into)?, a: self.src(from, ty)? })
            }
        }
    }

    fn convert(&mut self, m: &mut Modifiers<'_>, o: &[Operand]) -> Decoded<Op> {
        if m.take("pack") {
            m.take("sat");
            let (to, from) = (m.ty()?, m.ty()?);
            let third = m.parse(Type::parse);
            if from != Type::S32 || !matches!(to, Type::U8 | Type::S8 | Type::U16 | Type::S16) {
                return Err(m.unsupported(""));
            }
            let src = |o| self.src(o, Type::B32);
            return match (o, third) {
                ([into, a, b], None) => {
                    Ok(Op::PackSaturate { to, into: self.reg(into)?, a: src(a)?, b: src(b)?, c: None })
                }
                ([into, a, b, c], Some(Type::B32)) if to.bits() == 8 => Ok(Op::PackSaturate {
                    to,
                    into: self.reg(into)?,
                    a: src(a)?,
                    b: src(b)?,
                    c: Some(src(c)?),
                }),
                _ => Err(m.unsupported("with these operands")),
            };
        }
        let whole = m.one_of(&[
            ("rni", Rounding::Nearest),
            ("rzi", Rounding::Zero),
            ("rmi", Rounding::Down),
            ("rpi", Rounding::Up),
        ]);
        let rounding = if m.take("rna") { Rounding::NearestAway } else { m.rounding() };
        let (flush, relu) = (m.take("ftz"), m.take("relu"));
        let (saturate, finite) = (m.take("sat"), m.take("satfinite"));
        let (to, from) = (m.ty()?, m.ty()?);
        let how = Convert {
            to,
            from,
            rounding: whole.unwrap_or(rounding),
            integral: whole.is_some(),
            flush,
            saturate,
            finite,
            relu,
        };
        let packed = |ty| matches!(ty, Type::F16x2 | Type::Bf16x2 | Type::E4m3x2 | Type::E5m2x2);
        let plain = |ty: Type| !packed(ty) && !matches!(ty, Type::Pred | Type::B1 | Type::S4 | Type::U4);
        match (packed(to), packed(from), o) {
            (true, false, [into, a, b]) if from == Type::F32 => Ok(Op::ConvertPair {
                how,
                into: self.reg(into)?,
                a: self.src(a, from)?,
                b: self.src(b, from)?,
            }),
            (true, true, [into, a]) => Ok(Op::Repack { how, into: self.reg(into)?, a: self.src(a, from)? }),
            (false, false, [into, a]) if plain(to) && plain(from) && from != Type::Tf32 => {
                let directed_double = to == Type::F64 && !how.integral && rounding != Rounding::Nearest;
                if directed_double || to.bits() > 64 || from.bits() > 64 {
                    return Err(m.unsupported(""));
                }
                let into = self.reg(into)?;
                let a = self.src(a, from)?;
                let register_bits = self.reg_bits(into);
                Ok(match fast(&how) {
                    Some(of) if register_bits == to.bits() => Op::Unary { of, into, a },
                    _ => Op::Convert { how, into, register_bits, a },
                })
            }
            _ => Err(m.unsupported("with these operands")),
        }
    }
}

/// The conversions that kernels make most, without the tests of the general one.
fn fast(how: &Convert) -> Option<Unary> {
    if how.flush
        || how.saturate
        || how.relu
        || how.finite
        || how.integral
        || how.rounding != Rounding::Nearest
    {
        return None;
    }
    use crate::types::sign_extend;
    Some(match (how.to, how.from) {
        (Type::F32, Type::F16) => unary!(|a| u64::from(half_float::f16_value(a as u16).to_bits())),
        (Type::F32, Type::Bf16) => unary!(|a| (a & 0xffff) << 16),
        (Type::F32, Type::S32) => unary!(|a| u64::from((a as i32 as f32).to_bits())),
        (Type::F32, Type::U32) => unary!(|a| u64::from((a as u32 as f32).to_bits())),
        (Type::F32, Type::S8) => unary!(|a| u64::from((f32::from(a as i8)).to_bits())),
        (Type::F32, Type::U8) => unary!(|a| u64::from((f32::from(a as u8)).to_bits())),
        (Type::F32, Type::S16) => unary!(|a| u64::from((f32::from(a as i16)).to_bits())),
        (Type::F32, Type::U16) => unary!(|a| u64::from((f32::from(a as u16)).to_bits())),
        (Type::U32 | Type::S32, Type::U64 | Type::S64 | Type::U32 | Type::S32) => unary!(|a| a & 0xffff_ffff),
        (Type::U16 | Type::S16, Type::U64 | Type::S64 | Type::U32 | Type::S32) => unary!(|a| a & 0xffff),
        (Type::U64 | Type::S64, Type::U32) => unary!(|a| a & 0xffff_ffff),
        (Type::U64 | Type::S64, Type::S32) => unary!(|a| sign_extend(a, 32)),
        (Type::U32 | Type::S32, Type::U16) => unary!(|a| a & 0xffff),
        (Type::U32 | Type::S32, Type::S16) => unary!(|a| sign_extend(a, 16) & 0xffff_ffff),
        (Type::U32 | Type::S32, Type::U8) => unary!(|a| a & 0xff),
        (Type::U32 | Type::S32, Type::S8) => unary!(|a| sign_extend(a, 8) & 0xffff_ffff),
        _ => return None,
    })
}
