//! Passes that teach a compressed model what the uncompressed one predicts.

mod distil_gains;
