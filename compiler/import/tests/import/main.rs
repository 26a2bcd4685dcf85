//! Import against goldens and against damaged files.

mod data;
mod ggml_types;
mod graphs;
mod hostile;
mod models;
mod tokenizers;
