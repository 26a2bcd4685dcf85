//! Passes that store weights in fewer bits, and the searches they share.

pub mod allocation;
mod block_descent;
mod block_reconstruction;
pub mod code_grid;
pub mod curvature;
mod error_feedback;
mod linear_inputs;
pub mod quantize_gptq;
mod quantize_mixed;
mod quantize_rtn;
mod row_chunk;
pub mod scale_search;
pub mod vector_level;
