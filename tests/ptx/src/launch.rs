//! Modules, kernels and launches: the interface of this crate.

use crate::code::Code;
use crate::decode::{self, VariableIndex};
use crate::error::{Error, ErrorKind, Result};
use crate::machine::{self, MAX_SHARED, Work};
use crate::memory::{Buffer, MAX_BLOCKS, Memory};
use crate::parser;
use crate::stats::Stats;
use crate::syntax::{Initial, StateSpace, Variable};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

/// When asynchronous copies take effect, and the order in which blocks, warps and lanes have their turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CopyMode {
    /// Copies land when they are waited for; blocks and warps run in their order. Shows waits that are missing.
    Lazy,
    /// Copies land when they are issued; blocks and warps run in reverse. Shows data overwritten while still in use.
    Eager,
}

/// How a launch is executed and what is checked. Bounds, alignment, initialisation of memory and divergence always are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    pub copies: CopyMode,
    /// Races in shared memory between barriers, and in global memory between blocks.
    pub check_races: bool,
    /// Reads of registers that no instruction has written.
    pub check_registers: bool,
    /// Warp instructions after which a launch counts as hanging.
    pub step_limit: u64,
}

impl Options {
    /// Every check.
    pub fn checked(copies: CopyMode) -> Options {
        Options { copies, check_races: true, check_registers: true, step_limit: 1 << 30 }
    }
}

/// A kernel parameter's bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Param(Vec<u8>);

impl Param {
    /// A structure passed by value.
    pub fn bytes(bytes: &[u8]) -> Param {
        Param(bytes.to_vec())
    }

    /// A pointer `offset` bytes into a buffer.
    pub fn pointer(buffer: Buffer, offset: u64) -> Param {
        Param::from(buffer.address() + offset)
    }
}

impl From<Buffer> for Param {
    fn from(buffer: Buffer) -> Param {
        Param::from(buffer.address())
    }
}

macro_rules! param_from {
    ($($ty:ty),*) => {
        $(impl From<$ty> for Param {
            fn from(value: $ty) -> Param {
                Param(value.to_le_bytes().to_vec())
            }
        })*
    };
}

param_from!(u8, i8, u16, i16, u32, i32, u64, i64, f32, f64);

/// A kernel and where to run it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch<'a> {
    pub kernel: &'a str,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    /// Bytes of dynamic shared memory.
    pub dynamic_shared: usize,
    pub params: &'a [Param],
}

/// What a kernel takes and needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelInfo {
    pub name: String,
    pub params: Vec<ParamInfo>,
    /// Bytes of static shared memory.
    pub shared_bytes: usize,
    /// Bytes of local memory per thread, parameters of device functions included.
    pub local_bytes: usize,
    /// Threads per block it was compiled for, at most.
    pub max_threads: Option<u32>,
    /// Whether it waits for the launches before it (`griddepcontrol.wait`), so that it may begin before they have ended.
    pub waits: bool,
}

/// A parameter of a kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParamInfo {
    pub name: String,
    pub bytes: usize,
    /// From the beginning of all parameters.
    pub offset: usize,
}

/// PTX that was parsed and whose kernels were decoded.
#[derive(Debug, Clone)]
pub struct Module {
    id: u64,
    /// Of the PTX ISA, as `9.0`.
    pub version: String,
    /// As `sm_90a`.
    pub target: String,
    lines: Vec<String>,
    kernels: Vec<Code>,
    /// Variables in global and constant memory.
    variables: Vec<Variable>,
}

static MODULES: AtomicU64 = AtomicU64::new(0);

impl Module {
    /// Parses PTX and decodes all its kernels.
    ///
    /// # Errors
    /// The first line that is not PTX, or that this interpreter does not know, with its text.
    pub fn parse(source: &str) -> Result<Module> {
        let lines: Vec<String> = source.lines().map(|l| l.trim().to_owned()).collect();
        let decode = || {
            let text = parser::parse(source)?;
            let placed = |v: &&Variable| matches!(v.space, StateSpace::Global | StateSpace::Const);
            let variables: Vec<Variable> = text.variables.iter().filter(placed).cloned().collect();
            let names = variables.iter().enumerate();
            let index: VariableIndex = names.map(|(i, v)| (v.name.clone(), i as u32)).collect();
            let entries = text.functions.iter().filter(|f| f.is_entry && f.body.is_some());
            let kernels = entries.map(|f| decode::kernel(&text, f, &index)).collect::<Result<Vec<_>>>()?;
            let id = MODULES.fetch_add(1, Ordering::Relaxed);
            Ok(Module {
                id,
                version: text.version,
                target: text.target,
                lines: Vec::new(),
                kernels,
                variables,
            })
        };
        let module: Result<Module> = decode();
        match module {
            Ok(mut module) => {
                module.lines = lines;
                Ok(module)
            }
            Err(error) => Err(with_text(error, &lines)),
        }
    }

    /// The kernels, in the order of the text.
    pub fn kernels(&self) -> Vec<KernelInfo> {
        self.kernels.iter().map(info).collect()
    }

    /// The kernel of a name.
    pub fn kernel(&self, name: &str) -> Option<KernelInfo> {
        self.kernels.iter().find(|k| k.name == name).map(info)
    }

    /// The buffer of a variable in global or constant memory, which is made when the module is first used.
    ///
    /// # Errors
    /// There is no such variable, or its initial value names one that is missing.
    pub fn variable(&self, memory: &mut Memory, name: &str) -> Result<Buffer> {
        let buffers = self.instantiate(memory)?;
        let found = self.variables.iter().position(|v| v.name == name);
        found.map(|i| buffers[i]).ok_or_else(|| Error::new(ErrorKind::Undeclared(name.to_owned())))
    }

    fn instantiate(&self, memory: &mut Memory) -> Result<Vec<Buffer>> {
        if let Some(buffers) = memory.modules.get(&self.id) {
            return Ok(buffers.clone());
        }
        let mut buffers = Vec::new();
        let mut addresses = BTreeMap::new();
        for variable in &self.variables {
            // What has no initial value is zero.
            let buffer = memory.alloc(&variable.name, &vec![0; variable.bytes]);
            addresses.insert(variable.name.as_str(), buffer.address());
            buffers.push(buffer);
        }
        for (variable, buffer) in self.variables.iter().zip(&buffers) {
            let width = variable.element.bytes();
            for (i, value) in variable.initial.iter().enumerate() {
                let value = match value {
                    Initial::Bits(bits) => *bits,
                    Initial::Address(name, plus) => match addresses.get(name.as_str()) {
                        Some(address) => address.wrapping_add_signed(*plus),
                        None => {
                            return Err(Error::at_line(ErrorKind::Undeclared(name.clone()), variable.line));
                        }
                    },
                };
                let bytes = &mut memory.bytes_mut(*buffer)[i * width..(i + 1) * width];
                bytes.copy_from_slice(&value.to_le_bytes()[..width]);
            }
            if variable.space == StateSpace::Const {
                memory.set_read_only(*buffer);
            }
        }
        memory.modules.insert(self.id, buffers.clone());
        Ok(buffers)
    }

    /// Runs a kernel to its end.
    ///
    /// # Errors
    /// A launch that a device would refuse, or the first fault of the kernel. After a fault the buffers hold what was
    /// written until then.
    pub fn launch(&self, memory: &mut Memory, launch: &Launch<'_>, options: &Options) -> Result<Stats> {
        let code = self.kernels.iter().find(|k| k.name == launch.kernel).ok_or_else(|| {
            let known: Vec<&str> = self.kernels.iter().map(|k| k.name.as_str()).collect();
            let (name, known) = (launch.kernel.to_owned(), known.join(", "));
            Error::new(ErrorKind::NoKernel { name, known })
        })?;
        let in_kernel = |kind| {
            let mut error = Error::new(kind);
            error.at.kernel = Some(code.name.clone());
            error
        };
        check_shape(code, launch).map_err(in_kernel)?;
        let params = pack_params(code, launch.params).map_err(in_kernel)?;
        let variables: Vec<u64> = self.instantiate(memory)?.iter().map(|b| b.address()).collect();
        let work = Work {
            code,
            grid: launch.grid,
            block: launch.block,
            dynamic_bytes: launch.dynamic_shared,
            params: &params,
            variables: &variables,
            options,
        };
        machine::run(&work, memory).map_err(|e| with_text(e, &self.lines))
    }

    /// Runs a kernel in both modes: lazily on a copy of the memory, then eagerly on `memory` itself.
    ///
    /// # Errors
    /// The first fault of either.
    pub fn launch_both(&self, memory: &mut Memory, launch: &Launch<'_>) -> Result<Both> {
        // Variables must have the same addresses in both.
        self.instantiate(memory)?;
        let mut copy = memory.clone();
        let stats = self.launch(&mut copy, launch, &Options::checked(CopyMode::Lazy))?;
        self.launch(memory, launch, &Options::checked(CopyMode::Eager))?;
        let differing = memory.buffers().filter(|b| memory.bytes(*b) != copy.bytes(*b));
        Ok(Both { stats, differing: differing.map(|b| memory.name(b).to_owned()).collect() })
    }
}

/// What [`Module::launch_both`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Both {
    /// Of the lazy run; the eager one executes the same instructions but for loops that wait.
    pub stats: Stats,
    /// Buffers whose bytes depend on the mode: of sums by floating-point atomics, or of a kernel that is wrong.
    pub differing: Vec<String>,
}

fn info(code: &Code) -> KernelInfo {
    let params = code.params.iter();
    KernelInfo {
        name: code.name.clone(),
        params: params
            .map(|p| ParamInfo { name: p.name.clone(), bytes: p.bytes, offset: p.offset })
            .collect(),
        shared_bytes: code.shared_bytes,
        local_bytes: code.local_bytes,
        max_threads: code.max_threads,
        waits: code.spellings.iter().any(|s| s == "griddepcontrol.wait"),
    }
}

fn with_text(mut error: Error, lines: &[String]) -> Error {
    if let Some(line) = error.at.line {
        error.at.text = lines.get((line as usize).wrapping_sub(1)).cloned();
    }
    error
}

/// What a device of compute capability 9.0 would refuse.
fn check_shape(code: &Code, launch: &Launch<'_>) -> std::result::Result<(), ErrorKind> {
    let fail = |why: String| Err(ErrorKind::Launch(why));
    let threads: u64 = launch.block.iter().map(|n| u64::from(*n)).product();
    let blocks = launch.grid.iter().try_fold(1u64, |all, n| all.checked_mul(u64::from(*n)));
    if threads == 0 || threads > 1024 || launch.block[2] > 64 {
        return fail(format!(
            "a block of {:?} threads; it holds 1 to 1024, at most 64 along z",
            launch.block
        ));
    }
    if launch.grid[1] > 65535 || launch.grid[2] > 65535 {
        return fail(format!("a grid of {:?}; along y and z it holds at most 65535 blocks", launch.grid));
    }
    if !blocks.is_some_and(|b| (1..=MAX_BLOCKS).contains(&b)) {
        return fail(format!("a grid of {:?}; the interpreter runs 1 to {MAX_BLOCKS} blocks", launch.grid));
    }
    if let Some(required) = code.required_block
        && required != launch.block
    {
        return fail(format!("a block of {:?} threads; the kernel requires {required:?}", launch.block));
    }
    if let Some(most) = code.max_threads
        && threads > u64::from(most)
    {
        return fail(format!("a block of {threads} threads; the kernel was compiled for at most {most}"));
    }
    let shared = code.shared_bytes + launch.dynamic_shared;
    if shared > MAX_SHARED {
        return fail(format!("{shared} bytes of shared memory; a block has at most {MAX_SHARED}"));
    }
    Ok(())
}

fn pack_params(code: &Code, params: &[Param]) -> std::result::Result<Vec<u8>, ErrorKind> {
    let sizes: Vec<usize> = code.params.iter().map(|p| p.bytes).collect();
    let got: Vec<usize> = params.iter().map(|p| p.0.len()).collect();
    if sizes != got {
        return Err(ErrorKind::Params { expected: sizes.len(), sizes, got });
    }
    let mut bytes = vec![0; code.param_bytes];
    for (slot, param) in code.params.iter().zip(params) {
        bytes[slot.offset..slot.offset + slot.bytes].copy_from_slice(&param.0);
    }
    Ok(bytes)
}
