//! The model at work on behalf of passes: tokens of a text, and what values are while the model runs over tokens.

use crate::error::Result;
use attar_ir::{Graph, ValueId, WeightStore};

/// Runs the model as it is in the middle of a compile.
pub trait ModelRunner {
    /// Tokens of a text, without any that mark its beginning.
    ///
    /// # Errors
    /// [`ErrorKind::NoTokenizer`](crate::ErrorKind::NoTokenizer) when the checkpoint has none that works.
    fn tokenize(&mut self, text: &str) -> Result<Vec<u32>>;

    /// A real value, `[tokens, …]`, while the graph runs over one sequence of tokens with logits wanted of all of them. Further
    /// values of the same tokens cost least in topological order.
    ///
    /// # Errors
    /// [`ErrorKind::Calibration`](crate::ErrorKind::Calibration) when a token is not the model's, or a value not finite; those of
    /// reading weights.
    fn value(
        &mut self,
        graph: &Graph,
        weights: &WeightStore,
        tokens: &[u32],
        value: ValueId,
    ) -> Result<Vec<f32>>;
}
