//! Passes that change what weights and activations look like, not what the model computes: to be named in a recipe before one
//! that quantizes.

mod head_values;
mod rotate_hadamard;
mod smooth_activations;
