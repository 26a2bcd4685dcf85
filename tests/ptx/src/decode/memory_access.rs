//! Loads, stores, atomics, fences, address arithmetic.

use super::modifiers::Modifiers;
use super::{Decoded, Decoder};
use crate::code::{Atomic, AtomicOp, Load, Op, Store};
use crate::memory::Space;
use crate::syntax::Operand;
use crate::types::Type;

/// Ordering and scope of an access.
struct Order {
    strong: bool,
    acquire: bool,
    release: bool,
}

fn space(m: &mut Modifiers<'_>) -> Space {
    m.one_of(&[
        ("global", Space::Global),
        ("shared", Space::Shared),
        ("shared::cta", Space::Shared),
        // A cluster holds one block.
        ("shared::cluster", Space::Shared),
        ("local", Space::Local),
        ("const", Space::Const),
        ("param", Space::Param),
        ("param::entry", Space::Param),
        ("param::func", Space::Local),
    ])
    .unwrap_or(Space::Generic)
}

fn scope(m: &mut Modifiers<'_>) {
    for scope in ["cta", "cluster", "gpu", "sys"] {
        m.take(scope);
    }
}

fn order(m: &mut Modifiers<'_>) -> Order {
    m.take("weak");
    let (acquire, release, both) = (m.take("acquire"), m.take("release"), m.take("acq_rel"));
    let strong = m.take("volatile") | m.take("relaxed") | m.take("mmio") | acquire | release | both;
    scope(m);
    Order { strong, acquire: acquire || both, release: release || both }
}

/// Hints to caches change nothing here. True where an operand holds a cache policy.
fn cache_hints(m: &mut Modifiers<'_>) -> bool {
    for hint in ["ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc"] {
        m.take(hint);
    }
    let policy = m.take("L2::cache_hint");
    m.take_prefix("L1::");
    m.take_prefix("L2::");
    policy
}

fn width(m: &mut Modifiers<'_>) -> usize {
    m.one_of(&[("v2", 2), ("v4", 4), ("v8", 8)]).unwrap_or(1)
}

/// Devices before `sm_100` access at most 16 bytes at once, and registers hold 8.
fn fits(element: Type, count: usize) -> bool {
    element.bytes() <= 8 && count <= 4 && element.bytes() * count <= 16
}

impl Decoder<'_> {
    pub(super) fn memory_op(&mut self, root: &str, m: &mut Modifiers<'_>, o: &[Operand]) -> Decoded<Op> {
        match root {
            "ld" | "ldu" => self.load(m, o),
            "st" => self.store(m, o),
            "atom" | "red" => self.atomic(root == "atom", m, o),
            "cvta" => {
                let back = m.take("to");
                let space = space(m);
                m.ty()?;
                let [into, a] = self.exactly(o)?;
                Ok(Op::AddressOf {
                    space,
                    to_generic: !back,
                    into: self.reg(into)?,
                    a: self.src(a, Type::U64)?,
                })
            }
            "isspacep" => {
                let space = space(m);
                let [into, a] = self.exactly(o)?;
                Ok(Op::IsSpace { space, into: self.pred(into)?, a: self.src(a, Type::U64)? })
            }
            "mapa" => {
                // The only block of a cluster is the own one.
                space(m);
                m.ty()?;
                let [into, a, _rank] = self.exactly(o)?;
                let of = crate::lanes::unary!(|a| a);
                Ok(Op::Unary { of, into: self.reg(into)?, a: self.src(a, Type::U64)? })
            }
            "createpolicy" => {
                // The policy is a hint; any value is one.
                m.take_prefix("fractional");
                m.take_prefix("range");
                m.take_prefix("L2::");
                m.ty()?;
                let [into, ..] = o else { return Err(m.unsupported("without operands")) };
                let of = crate::lanes::unary!(|a| a);
                Ok(Op::Unary { of, into: self.reg(into)?, a: crate::code::Src::Imm(0) })
            }
            "prefetch" | "prefetchu" | "discard" => {
                space(m);
                cache_hints(m);
                m.take("L1");
                m.take("L2");
                m.take("tensormap");
                Ok(Op::Nop)
            }
            "membar" => {
                if m.take("proxy") {
                    return Err(m.unsupported(""));
                }
                let device = m.take("gl") | m.take("sys");
                m.take("cta");
                Ok(Op::Fence { device })
            }
            _ => {
                if m.take("proxy") || m.take("mbarrier_init") {
                    m.take("release");
                    m.take("cluster");
                    let asynchronous = m.take("async");
                    for space in ["global", "shared::cta", "shared::cluster"] {
                        m.take(space);
                    }
                    if m.take_prefix("async") || asynchronous {
                        return Ok(Op::ProxyFence);
                    }
                    m.take("alias");
                    return Ok(Op::Nop);
                }
                for order in ["sc", "acq_rel", "acquire", "release"] {
                    m.take(order);
                }
                let device = m.take("gpu") | m.take("sys") | m.take("cluster");
                m.take("cta");
                Ok(Op::Fence { device })
            }
        }
    }

    fn load(&mut self, m: &mut Modifiers<'_>, o: &[Operand]) -> Decoded<Op> {
        let order = order(m);
        let mut space = space(m);
        let policy = cache_hints(m);
        m.take("unified");
        let count = width(m);
        let element = m.ty()?;
        let [into, address, rest @ ..] = o else { return Err(m.unsupported("without operands")) };
        if !fits(element, count) {
            return Err(m.unsupported("of so many bytes"));
        }
        if rest.len() != usize::from(policy) {
            return Err(m.unsupported("with these operands"));
        }
        if space == Space::Param && self.is_call_param(address) {
            space = Space::Local;
        }
        let into = self.regs(into)?;
        if into.len() != count {
            return Err(m.unsupported("with a vector of another length"));
        }
        let register_bits = into.iter().flatten().map(|r| self.reg_bits(*r)).max().unwrap_or(64);
        Ok(Op::Load(Box::new(Load {
            space,
            element,
            into,
            register_bits,
            address: self.address(address)?,
            strong: order.strong,
            acquire: order.acquire,
        })))
    }

    fn store(&mut self, m: &mut Modifiers<'_>, o: &[Operand]) -> Decoded<Op> {
        if m.take("async") || m.take("bulk") {
            return Err(m.unsupported(""));
        }
        let order = order(m);
        let mut space = space(m);
        let policy = cache_hints(m);
        let count = width(m);
        let element = m.ty()?;
        let [address, from, rest @ ..] = o else { return Err(m.unsupported("without operands")) };
        if !fits(element, count) {
            return Err(m.unsupported("of so many bytes"));
        }
        if rest.len() != usize::from(policy) {
            return Err(m.unsupported("with these operands"));
        }
        if space == Space::Param {
            if !self.is_call_param(address) {
                return Err(m.unsupported("to a parameter of the kernel"));
            }
            space = Space::Local;
        }
        let from = self.srcs(from, element)?;
        if from.len() != count {
            return Err(m.unsupported("with a vector of another length"));
        }
        let address = self.address(address)?;
        Ok(Op::Store(Box::new(Store {
            space,
            element,
            from,
            address,
            strong: order.strong,
            release: order.release,
        })))
    }

    fn atomic(&mut self, returns: bool, m: &mut Modifiers<'_>, o: &[Operand]) -> Decoded<Op> {
        let order = order(m);
        let space = space(m);
        let policy = cache_hints(m);
        m.take("noftz");
        let op = m.one_of(&[
            ("add", AtomicOp::Add),
            ("and", AtomicOp::And),
            ("or", AtomicOp::Or),
            ("xor", AtomicOp::Xor),
            ("min", AtomicOp::Min),
            ("max", AtomicOp::Max),
            ("inc", AtomicOp::Inc),
            ("dec", AtomicOp::Dec),
            ("exch", AtomicOp::Exchange),
            ("cas", AtomicOp::CompareExchange),
        ]);
        let Some(op) = op else { return Err(m.unsupported("")) };
        let count = width(m);
        let ty = m.ty()?;
        let known = match op {
            AtomicOp::Add => !matches!(ty, Type::B32 | Type::B64) && ty.bits() >= 16,
            AtomicOp::Min | AtomicOp::Max => !ty.is_float() && ty.bits() >= 32,
            AtomicOp::Inc | AtomicOp::Dec => ty == Type::U32,
            AtomicOp::And | AtomicOp::Or | AtomicOp::Xor => matches!(ty, Type::B32 | Type::B64),
            AtomicOp::Exchange | AtomicOp::CompareExchange => matches!(ty, Type::B16 | Type::B32 | Type::B64),
        };
        if !known
            || !fits(ty, count)
            || matches!(ty, Type::Tf32 | Type::E4m3 | Type::E5m2 | Type::E4m3x2 | Type::E5m2x2 | Type::B128)
        {
            return Err(m.unsupported(""));
        }
        let mut rest = o;
        let mut into = Vec::new();
        if returns {
            let [first, others @ ..] = rest else { return Err(m.unsupported("without operands")) };
            into = self.regs(first)?;
            rest = others;
        }
        let [address, value, others @ ..] = rest else { return Err(m.unsupported("without operands")) };
        let swap = op == AtomicOp::CompareExchange;
        if others.len() != usize::from(swap) + usize::from(policy) {
            return Err(m.unsupported("with these operands"));
        }
        let value = self.srcs(value, ty)?;
        if value.len() != count || (returns && into.len() != count) {
            return Err(m.unsupported("with a vector of another length"));
        }
        Ok(Op::Atomic(Box::new(Atomic {
            space,
            op,
            ty,
            into,
            address: self.address(address)?,
            value,
            replacement: if swap { Some(self.src(&others[0], ty)?) } else { None },
            acquire: order.acquire,
            release: order.release,
        })))
    }
}
