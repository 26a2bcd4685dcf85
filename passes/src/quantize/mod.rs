//! Passes that store weights in fewer bits, and the searches they share.

mod quantize_rtn;
pub mod scale_search;
