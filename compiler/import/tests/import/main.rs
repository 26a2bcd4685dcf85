//! Import against goldens and against damaged files.

mod data;
mod ggml_types;
mod hostile;
mod models;
mod tokenizers;
