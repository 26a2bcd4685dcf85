//! Passes that join ops one kernel can do in one pass over memory.

mod fuse_gate_up;
mod fuse_norm;
mod fuse_qkv;
mod fuse_residual;
mod fuse_rope;
mod fuse_swiglu;
mod linear_at;
mod stacked_linear;
