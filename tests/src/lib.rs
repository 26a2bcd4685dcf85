//! What the tests share: the filetest harness, random graphs and values, and the tolerance table.

pub mod calibrator;
pub mod compiled;
pub mod filetest;
pub mod generate;
pub mod random;
pub mod tolerance;
