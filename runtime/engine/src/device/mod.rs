//! Devices that programs run on. One file per device; the CPU is the one there is.

mod backoff;
pub(crate) mod cpu;
pub(crate) mod executable;
pub(crate) mod threads;
