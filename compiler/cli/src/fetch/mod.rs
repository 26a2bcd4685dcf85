//! Getting checkpoints: the hub, plain URLs, and a catalogue of names with pinned hashes.

pub mod catalogue;
pub mod download;
pub mod http;
pub mod hub;
pub mod package_index;
