//! The commands, one file each.

pub mod bench;
pub mod calibrate;
pub mod chat;
pub mod compile;
pub mod completions;
pub mod diff;
pub mod doctor;
pub mod eval;
pub mod inspect;
pub mod passes;
pub mod plan;
pub mod plugin;
pub mod pull;
pub mod quickstart;
pub mod run;
