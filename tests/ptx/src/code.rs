//! Kernels as they are executed: names resolved, types chosen, device functions inlined, one dense list.

use crate::arith::bits::Permute;
use crate::arith::compare::Compare;
use crate::arith::convert::Convert;
use crate::lanes::{Binary, Ternary, Unary};
use crate::machine::async_copy::AsyncOp;
use crate::machine::mbarrier::MbarrierOp;
use crate::machine::tensor::TensorOp;
use crate::memory::Space;
use crate::shared::Named;
use crate::types::Type;

/// Index of a register in the file of a warp.
pub(crate) type Reg = u32;
/// Index of a predicate in the file of a warp.
pub(crate) type Pred = u32;

/// A special register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Special {
    Tid(usize),
    Ntid(usize),
    Ctaid(usize),
    Nctaid(usize),
    LaneId,
    WarpId,
    NWarpId,
    LaneMaskEq,
    LaneMaskLt,
    LaneMaskLe,
    LaneMaskGt,
    LaneMaskGe,
    SmId,
    NSmId,
    GridId,
    /// Warp instructions executed so far.
    Clock,
    DynamicSharedSize,
    TotalSharedSize,
    /// Clusters hold one block.
    Zero,
    One,
}

/// Where a value comes from.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Src {
    Reg(Reg),
    Imm(u64),
    Special(Special),
    /// Address of a variable of the module, by its index.
    Variable(u32, i64),
    /// Address of dynamic shared memory.
    DynamicShared(i64),
}

/// Where a predicate comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PredSrc {
    Pred { index: Pred, negated: bool },
    Const(bool),
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Address {
    pub(crate) base: Src,
    pub(crate) offset: i64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Logic {
    And,
    Or,
    Xor,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ShuffleMode {
    Up,
    Down,
    Butterfly,
    Index,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum VoteMode {
    All,
    Any,
    Uniform,
    Ballot,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ReduxMode {
    Add,
    Min,
    Max,
    And,
    Or,
    Xor,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AtomicOp {
    Add,
    And,
    Or,
    Xor,
    Min,
    Max,
    Inc,
    Dec,
    Exchange,
    CompareExchange,
}

/// Result of `bar.red`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum BarrierReduce {
    And(Pred, PredSrc),
    Or(Pred, PredSrc),
    Count(Reg, PredSrc),
}

/// A barrier of threads of a block.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Barrier {
    pub(crate) id: Src,
    /// Threads that take part; absent where all do.
    pub(crate) threads: Option<Src>,
    /// `bar.arrive` does not wait.
    pub(crate) waits: bool,
    /// All threads of a warp execute it together.
    pub(crate) aligned: bool,
    pub(crate) reduce: Option<BarrierReduce>,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Load {
    pub(crate) space: Space,
    pub(crate) element: Type,
    /// Registers; absent where a component is thrown away.
    pub(crate) into: Vec<Option<Reg>>,
    /// Signed values are extended to the width of their register.
    pub(crate) register_bits: u32,
    pub(crate) address: Address,
    /// Volatile, relaxed, acquire.
    pub(crate) strong: bool,
    pub(crate) acquire: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Store {
    pub(crate) space: Space,
    pub(crate) element: Type,
    pub(crate) from: Vec<Src>,
    pub(crate) address: Address,
    pub(crate) strong: bool,
    pub(crate) release: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Atomic {
    pub(crate) space: Space,
    pub(crate) op: AtomicOp,
    pub(crate) ty: Type,
    /// Absent of `red`.
    pub(crate) into: Vec<Option<Reg>>,
    pub(crate) address: Address,
    /// One per component of a vector.
    pub(crate) value: Vec<Src>,
    /// What `cas` writes.
    pub(crate) replacement: Option<Src>,
    pub(crate) acquire: bool,
    pub(crate) release: bool,
}

#[derive(Debug, Clone)]
pub(crate) enum Op {
    Nop,
    Unary {
        of: Unary,
        into: Reg,
        a: Src,
    },
    Binary {
        of: Binary,
        into: Reg,
        a: Src,
        b: Src,
    },
    Ternary {
        of: Ternary,
        into: Reg,
        a: Src,
        b: Src,
        c: Src,
    },
    /// `add`, `sub` with carry, of 32 or 64 bits.
    Carry {
        into: Reg,
        a: Src,
        b: Src,
        bits: u32,
        subtract: bool,
        carry_in: bool,
        carry_out: bool,
    },
    /// `mad` with carry: its product is added as [`Op::Carry`] adds.
    MadCarry {
        into: Reg,
        product: Binary,
        a: Src,
        b: Src,
        c: Src,
        bits: u32,
        carry_in: bool,
        carry_out: bool,
    },
    Lop3 {
        table: u8,
        into: Reg,
        a: Src,
        b: Src,
        c: Src,
    },
    Bfi {
        bits: u32,
        into: Reg,
        a: Src,
        b: Src,
        position: Src,
        length: Src,
    },
    Prmt {
        mode: Permute,
        into: Reg,
        a: Src,
        b: Src,
        selector: Src,
    },
    Compare {
        op: Compare,
        ty: Type,
        flush: bool,
        into: Option<Pred>,
        not_into: Option<Pred>,
        a: Src,
        b: Src,
        and: Option<(Logic, PredSrc)>,
    },
    /// As `Compare`, to a register: all ones, or 1.0 of a float.
    Set {
        op: Compare,
        ty: Type,
        flush: bool,
        into: Reg,
        a: Src,
        b: Src,
        and: Option<(Logic, PredSrc)>,
        one: u64,
    },
    Select {
        into: Reg,
        a: Src,
        b: Src,
        by: PredSrc,
        bits: u32,
    },
    /// `slct`: the first where `c` is not negative.
    SelectSign {
        into: Reg,
        a: Src,
        b: Src,
        c: Src,
        c_is_float: bool,
        bits: u32,
    },
    Convert {
        how: Convert,
        into: Reg,
        register_bits: u32,
        a: Src,
    },
    ConvertPair {
        how: Convert,
        into: Reg,
        a: Src,
        b: Src,
    },
    Repack {
        how: Convert,
        into: Reg,
        a: Src,
    },
    /// `cvt.pack.sat`: two integers saturated and joined, above the lower half of `c` where there is one.
    PackSaturate {
        to: Type,
        into: Reg,
        a: Src,
        b: Src,
        c: Option<Src>,
    },
    Join {
        into: Reg,
        parts: Vec<Src>,
        bits: u32,
    },
    Split {
        into: Vec<Option<Reg>>,
        a: Src,
        bits: u32,
    },
    MovePred {
        into: Pred,
        from: PredSrc,
    },
    LogicPred {
        op: Logic,
        into: Pred,
        a: PredSrc,
        b: PredSrc,
    },
    /// `testp`.
    Test {
        what: FloatTest,
        ty: Type,
        into: Pred,
        a: Src,
    },
    /// Generic addresses of a space, or back.
    AddressOf {
        space: Space,
        to_generic: bool,
        into: Reg,
        a: Src,
    },
    IsSpace {
        space: Space,
        into: Pred,
        a: Src,
    },
    Load(Box<Load>),
    Store(Box<Store>),
    Atomic(Box<Atomic>),
    Branch {
        target: u32,
    },
    BranchIndexed {
        index: Src,
        targets: Vec<u32>,
    },
    Exit,
    Trap,
    Barrier(Barrier),
    WarpSync {
        members: Src,
    },
    Vote {
        mode: VoteMode,
        into: Option<Reg>,
        into_pred: Option<Pred>,
        from: PredSrc,
        members: Src,
    },
    Match {
        all: bool,
        bits: u32,
        into: Option<Reg>,
        into_pred: Option<Pred>,
        a: Src,
        members: Src,
    },
    Shuffle {
        mode: ShuffleMode,
        into: Option<Reg>,
        into_pred: Option<Pred>,
        a: Src,
        b: Src,
        c: Src,
        members: Src,
    },
    Redux {
        mode: ReduxMode,
        ty: Type,
        into: Reg,
        a: Src,
        members: Src,
    },
    ActiveMask {
        into: Reg,
    },
    Elect {
        into: Option<Reg>,
        into_pred: Option<Pred>,
        members: Src,
    },
    /// Of device scope or wider where `device`.
    Fence {
        device: bool,
    },
    ProxyFence,
    Tensor(Box<TensorOp>),
    Async(Box<AsyncOp>),
    Mbarrier(Box<MbarrierOp>),
}

/// A class of `testp`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FloatTest {
    Finite,
    Infinite,
    Number,
    NotANumber,
    Normal,
    Subnormal,
}

#[derive(Debug, Clone)]
pub(crate) struct Inst {
    pub(crate) guard: Option<(Pred, bool)>,
    pub(crate) op: Op,
    pub(crate) line: u32,
    /// Index into [`Code::spellings`].
    pub(crate) spelling: u32,
}

/// A parameter of a kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ParamSlot {
    pub(crate) name: String,
    pub(crate) offset: usize,
    pub(crate) bytes: usize,
}

/// A kernel ready to run.
#[derive(Debug, Clone)]
pub(crate) struct Code {
    pub(crate) name: String,
    pub(crate) insts: Vec<Inst>,
    /// Names of registers and predicates, for errors.
    pub(crate) registers: Vec<String>,
    pub(crate) predicates: Vec<String>,
    pub(crate) params: Vec<ParamSlot>,
    pub(crate) param_bytes: usize,
    /// Bytes of local memory per thread: variables, and parameters of device functions.
    pub(crate) local_bytes: usize,
    pub(crate) shared: Vec<Named>,
    pub(crate) shared_bytes: usize,
    /// Alignment of dynamic shared memory, where there is any.
    pub(crate) dynamic_align: Option<usize>,
    pub(crate) spellings: Vec<String>,
    pub(crate) max_threads: Option<u32>,
    pub(crate) required_block: Option<[u32; 3]>,
}
