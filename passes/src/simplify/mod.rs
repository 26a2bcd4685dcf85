//! Passes that make a graph smaller without changing what it computes.

mod eliminate_common_subexpressions;
mod eliminate_dead_code;
mod fold_constants;
