//! What passes have worked out, kept so that an interrupted run need not begin anew.
//!
//! Keeping is the business of whoever runs the pipeline; a pass only says what is worth it. What is kept was made from the same
//! graph, weights, options and calibration, so a pass that takes it back gives what it would have given without.

/// Results by name.
pub trait Journal {
    /// Whether something is kept under a key, though it may turn out damaged.
    fn has(&self, key: &str) -> bool;

    /// What is kept under a key, exactly as it was put there; `None` when there is nothing or it is damaged.
    fn get(&self, key: &str) -> Option<Vec<u8>>;

    /// Keeps something. What cannot be kept is worked out again after an interruption, so that is no error.
    fn put(&self, key: &str, value: &[u8]);
}
