//! What can be wrong with PTX text, with a launch, or with what a kernel does.

use crate::memory::Space;
use std::fmt;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// A fault and the place it belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    pub kind: ErrorKind,
    pub at: Box<Site>,
}

/// Where a fault was found. What does not apply is absent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Site {
    /// Name of the kernel.
    pub kernel: Option<String>,
    /// Line of the PTX text, from 1.
    pub line: Option<u32>,
    /// That line, trimmed.
    pub text: Option<String>,
    /// Index of the block in the grid.
    pub block: Option<[u32; 3]>,
    /// Warp in its block.
    pub warp: Option<u32>,
    /// Index of the thread in its block; of a whole warp's fault, its first active thread.
    pub thread: Option<[u32; 3]>,
}

/// Whether memory was read, written, or updated by an atomic instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    Read,
    Write,
    Atomic,
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Access::Read => "read",
            Access::Write => "write",
            Access::Atomic => "atomic update",
        })
    }
}

/// What is wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ErrorKind {
    // The text.
    #[error("expected {expected}, found {found}")]
    Syntax { expected: String, found: String },
    /// The interpreter does not know an instruction, a modifier, or a form of operands.
    #[error("not supported by the PTX interpreter: {0}")]
    Unsupported(String),
    #[error("{0} is not declared")]
    Undeclared(String),
    #[error("PTX ISA {found} is newer than {known}, the newest the interpreter knows")]
    Version { found: String, known: &'static str },

    // The launch.
    #[error("there is no kernel {name}; there are: {known}")]
    NoKernel { name: String, known: String },
    #[error("{expected} parameters of {sizes:?} bytes are expected, got {got:?} bytes")]
    Params { expected: usize, sizes: Vec<usize>, got: Vec<usize> },
    #[error("launch: {0}")]
    Launch(String),

    // What a kernel does.
    #[error("{access} of {len} bytes out of bounds: {space} {buffer} has {size} bytes, offset {offset}")]
    OutOfBounds { access: Access, space: Space, buffer: String, offset: i64, len: usize, size: usize },
    #[error("{access} of {len} bytes at address {address:#x}, where nothing is allocated")]
    NoBuffer { access: Access, len: usize, address: u64 },
    #[error("{access} of {buffer}, which has been freed (offset {offset})")]
    Freed { access: Access, buffer: String, offset: i64 },
    #[error("write to {buffer}, which is read-only (offset {offset})")]
    ReadOnly { buffer: String, offset: usize },
    #[error("{access} of {len} bytes at {space} address {address:#x}, which is not a multiple of {align}")]
    Misaligned { access: Access, space: Space, len: usize, align: usize, address: u64 },
    #[error("uninitialised read: {space} {buffer}, offset {offset}")]
    Uninitialised { space: Space, buffer: String, offset: usize },
    #[error("register {register} is read before it is written")]
    UninitialisedRegister { register: String },
    #[error(
        "shared memory race at {buffer}, offset {offset}: {access} by warp {warp} lane {lane}, after a \
         {earlier} by warp {earlier_warp}{earlier_lane} with no barrier between"
    )]
    SharedRace {
        buffer: String,
        offset: usize,
        access: Access,
        warp: u32,
        lane: u32,
        earlier: Access,
        earlier_warp: u32,
        /// ` lane N`, or empty where several lanes, or none in particular, did it.
        earlier_lane: String,
    },
    #[error(
        "global memory race between blocks at {buffer}, offset {offset}: {access} by block {block}, after a \
         {earlier} by block {earlier_block}"
    )]
    GlobalRace {
        buffer: String,
        offset: usize,
        access: Access,
        block: u32,
        earlier: Access,
        earlier_block: u32,
    },
    #[error("{what} is executed by lanes {active:#010x} of a warp whose live lanes are {alive:#010x}")]
    Divergent { what: String, active: u32, alive: u32 },
    #[error("member mask {members:#010x} of {what} does not hold for the executing lanes {active:#010x}")]
    MemberMask { what: String, members: u32, active: u32 },
    #[error("warps wait at barrier {barrier} at different instructions: lines {lines:?}")]
    BarrierMismatch { barrier: u32, lines: Vec<u32> },
    #[error("barrier {barrier}: {why}")]
    Barrier { barrier: u32, why: String },
    #[error("deadlock: no warp can go on. {0}")]
    Deadlock(String),
    #[error("{0} warp instructions were executed and the kernel has not ended")]
    StepLimit(u64),
    #[error(
        "{access} of {buffer}, offset {offset}, while the asynchronous {what} of line {line} is not waited for"
    )]
    AsyncPending { access: Access, buffer: String, offset: usize, what: &'static str, line: u32 },
    #[error("register {register} is used while the wgmma of line {line} that writes it is not waited for")]
    RegisterPending { register: String, line: u32 },
    #[error("register {register} is written while the wgmma of line {line} that reads it is not waited for")]
    RegisterInUse { register: String, line: u32 },
    #[error(
        "shared memory {buffer}, offset {offset}, was written by warp {writer} and is read by {reader} without \
         fence.proxy.async between"
    )]
    ProxyFence { buffer: String, offset: usize, writer: u32, reader: &'static str },
    #[error("mbarrier at {buffer}, offset {offset}: {why}")]
    Mbarrier { buffer: String, offset: usize, why: String },
    #[error("{0}")]
    Matrix(String),
    #[error("the kernel ended with {0} not waited for")]
    NotWaited(String),
    #[error("trap")]
    Trap,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = &self.at;
        let triple = |[x, y, z]: [u32; 3]| format!("({x}, {y}, {z})");
        let mut place = Vec::new();
        place.extend(at.kernel.as_ref().map(|k| format!("kernel {k}")));
        place.extend(at.line.map(|line| match &at.text {
            Some(text) => format!("PTX line {line} `{text}`"),
            None => format!("PTX line {line}"),
        }));
        place.extend(at.block.map(|b| format!("block {}", triple(b))));
        place.extend(at.warp.map(|w| format!("warp {w}")));
        place.extend(at.thread.map(|t| format!("thread {}", triple(t))));
        if !place.is_empty() {
            write!(f, "{}: ", place.join(", "))?;
        }
        self.kind.fmt(f)
    }
}

impl std::error::Error for Error {}

impl Error {
    /// A fault that belongs to no line.
    pub(crate) fn new(kind: ErrorKind) -> Error {
        Error { kind, at: Box::default() }
    }

    /// A fault of a line of the text.
    pub(crate) fn at_line(kind: ErrorKind, line: u32) -> Error {
        Error { kind, at: Box::new(Site { line: Some(line), ..Site::default() }) }
    }
}
