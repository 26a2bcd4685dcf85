//! The graph IR: one graph is one step of a model over a flat ragged batch of tokens.
//!
//! Weights never live here: a `weight` node names a tensor of a [`WeightStore`]. Op files under `ops/` are the
//! specification; [`Graph`] keeps petgraph private behind [`NodeId`] and [`ValueId`].

mod attr;
mod error;
mod graph;
pub mod interp;
pub mod ops;
mod tensor;
pub mod text;
mod types;
mod verify;
mod weights;

pub use attr::{Attr, Attrs};
pub use error::{Error, ErrorKind, Result, Site};
pub use graph::{Graph, Node, NodeId, ValueId};
pub use ops::{Op, OpKind};
pub use tensor::{Tensor, TensorData};
pub use types::{Dim, Elem, Sym, TensorType};
pub use verify::verify;
pub use weights::{
    Checkpoint, Rotation, Transform, WeightInfo, WeightName, WeightReader, WeightStore, WeightValues,
};
