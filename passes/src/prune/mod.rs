//! Passes that make weights zero.

mod prune_magnitude;
