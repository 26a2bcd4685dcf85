//! Element types and weight formats of Attar.
//!
//! A [`Format`] is a value, not a code path: it says how many bits a code has, how many weights along K share
//! a scale, and how the scale is stored. From it follow the packed size ([`PackedLayout`]), the reference
//! encoder and decoder ([`Encoded`]) and, in other crates, the kernels.
//!
//! Shapes follow PyTorch: a weight matrix is `[N, K]`, N output channels by K inputs, row-major.

pub mod described;
mod dtype;
mod encoded;
pub mod formats;
mod nearest;
mod packed;
pub mod planes;

pub use described::{Description, is_described};
pub use dtype::DType;
pub use encoded::{Encoded, FormatError};
pub use formats::{Format, FormatRef, MOST_ENTRIES, Scale, Table, Value, by_name};
pub use packed::{CHANNELS, CodePart, PackedLayout};
pub use planes::Plane;

use formats::ALL as ALL_FORMATS;
