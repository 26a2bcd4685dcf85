//! Executes PTX on the CPU: the text that NVRTC 13.0 emits (PTX ISA up to 9.0) for `sm_80` to `sm_90a`, with the checks
//! that a GPU does not make. Nothing here says how fast a kernel is; counts of bytes and instructions are exact.
//!
//! ```
//! use attar_ptx::{CopyMode, Launch, Memory, Module, Options, Param};
//!
//! let module = Module::parse(
//!     ".version 9.0
//!      .target sm_80
//!      .address_size 64
//!      .visible .entry twice(.param .u64 x) {
//!          .reg .b32 %r<3>;
//!          .reg .b64 %rd<4>;
//!          ld.param.u64 %rd1, [x];
//!          mov.u32 %r1, %tid.x;
//!          mul.wide.u32 %rd2, %r1, 4;
//!          add.s64 %rd3, %rd1, %rd2;
//!          ld.global.u32 %r2, [%rd3];
//!          shl.b32 %r2, %r2, 1;
//!          st.global.u32 [%rd3], %r2;
//!          ret;
//!      }",
//! )?;
//! let mut memory = Memory::new();
//! let x = memory.alloc("x", &[1, 0, 0, 0, 2, 0, 0, 0]);
//! let launch =
//!     Launch { kernel: "twice", grid: [1; 3], block: [2, 1, 1], dynamic_shared: 0, params: &[Param::from(x)] };
//! let stats = module.launch(&mut memory, &launch, &Options::checked(CopyMode::Lazy))?;
//! assert_eq!(memory.bytes(x), [2, 0, 0, 0, 4, 0, 0, 0]);
//! assert_eq!(stats.global_read.bytes, 8);
//! # Ok::<(), attar_ptx::Error>(())
//! ```
//!
//! `docs/ptx-interpreter.md` says what is checked, what cannot be seen, and how an instruction is added.

mod arith;
mod code;
mod decode;
mod error;
mod lanes;
mod launch;
mod lexer;
mod machine;
mod memory;
mod parser;
mod shared;
mod stats;
mod syntax;
mod tensor_map;
mod types;

pub use error::{Access, Error, ErrorKind, Result, Site};
pub use launch::{Both, CopyMode, KernelInfo, Launch, Module, Options, Param, ParamInfo};
pub use memory::{Buffer, Memory, Space};
pub use stats::{Count, SharedTraffic, Stats, Traffic};
pub use tensor_map::TensorMap;
