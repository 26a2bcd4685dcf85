//! CPU code generation: kernels through Cranelift, and lowering of graphs to programs.

mod aarch64;
mod blob;
mod emit;
mod error;
pub mod exec;
pub mod host;
mod isa;
mod lanes;
pub mod lower;
pub mod pack;
mod target;
mod x86;

pub use blob::{CodeBlob, compile_blob, cranelift_ir, disassemble, disassemble_inners};
pub use error::{Error, ErrorKind};
pub use target::{Arch, Target};
