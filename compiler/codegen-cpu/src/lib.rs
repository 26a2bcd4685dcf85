//! CPU code generation: kernels through Cranelift, and lowering of graphs to programs.

mod target;

pub use target::Target;
