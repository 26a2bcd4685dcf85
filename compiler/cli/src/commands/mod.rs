//! The commands, one file each.

pub mod completions;
pub mod doctor;
pub mod passes;
pub mod pull;
