//! PTX as text says it, before names are resolved.

use crate::types::Type;

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Operand {
    /// A register, variable, label, function or special register (`%tid.x`).
    Name(String),
    Int(u64),
    F32(u32),
    F64(u64),
    /// `{a, b}`
    Vector(Vec<Operand>),
    /// `[base + offset]`, for tensors `[base, {coordinates}]`
    Address {
        base: Box<Operand>,
        offset: i64,
        coordinates: Option<Vec<Operand>>,
    },
    /// `a|b`
    Pair(Box<Operand>, Box<Operand>),
    /// `!p`
    Not(Box<Operand>),
    /// `_`
    Sink,
    /// `(a, b)` of calls
    List(Vec<Operand>),
}

/// `@p` or `@!p`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Guard {
    pub(crate) register: String,
    pub(crate) negated: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Instruction {
    pub(crate) guard: Option<Guard>,
    /// The root and its modifiers: `ld`, `global`, `nc`, `v4`, `u32`.
    pub(crate) opcode: Vec<String>,
    pub(crate) operands: Vec<Operand>,
    pub(crate) line: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum StateSpace {
    Reg,
    Global,
    Shared,
    Local,
    Const,
    Param,
}

/// A variable with storage: everything but registers.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Variable {
    pub(crate) space: StateSpace,
    pub(crate) name: String,
    pub(crate) align: usize,
    pub(crate) bytes: usize,
    /// Storage comes from elsewhere: dynamic shared memory.
    pub(crate) external: bool,
    pub(crate) initial: Vec<Initial>,
    pub(crate) element: Type,
    pub(crate) line: u32,
}

/// One element of an initialiser.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Initial {
    Bits(u64),
    /// The address of another variable, plus a constant.
    Address(String, i64),
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Statement {
    Open,
    Close,
    Label(String),
    /// `.reg .type name<count>` or a single name.
    Registers {
        element: Type,
        name: String,
        count: Option<u32>,
        line: u32,
    },
    Variable(Variable),
    /// `name: .branchtargets a, b;`
    BranchTargets(Vec<String>),
    Instruction(Instruction),
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Function {
    pub(crate) name: String,
    pub(crate) is_entry: bool,
    pub(crate) params: Vec<Variable>,
    pub(crate) returns: Vec<Variable>,
    /// Threads per block the kernel was compiled for at most (`.maxntid`) or exactly (`.reqntid`).
    pub(crate) max_threads: Option<u32>,
    pub(crate) required_block: Option<[u32; 3]>,
    /// Absent of a declaration.
    pub(crate) body: Option<Vec<Statement>>,
    pub(crate) line: u32,
}

#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Text {
    pub(crate) version: String,
    pub(crate) target: String,
    pub(crate) variables: Vec<Variable>,
    pub(crate) functions: Vec<Function>,
}
