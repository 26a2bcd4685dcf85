//! The model at work in the middle of a compile, on tokens that a pass brings.

use crate::calibrate::{SequentialRun, Subject, problem};
use attar_ir::{Graph, ValueId, WeightStore};
use attar_pass::{Error, ErrorKind, Result};
use attar_runtime::Tokenizer;

/// Bytes of values that stay in memory between two questions about the same tokens.
const MEMORY: u64 = 256 << 20;

/// Runs the graph with the dense evaluator of calibration.
pub(crate) struct GraphRunner<'a> {
    subject: Subject<'a>,
    tokenizer: Option<Tokenizer>,
    last: Option<Last>,
}

/// The run that was asked about last: questions about the same tokens and weights go on from it.
struct Last {
    tokens: Vec<u32>,
    revision: u64,
    run: SequentialRun,
}

impl<'a> GraphRunner<'a> {
    pub(crate) fn new(subject: Subject<'a>) -> GraphRunner<'a> {
        GraphRunner { subject, tokenizer: None, last: None }
    }
}

impl attar_pass::ModelRunner for GraphRunner<'_> {
    fn tokenize(&mut self, text: &str) -> Result<Vec<u32>> {
        let missing = |problem: String| Error::new(ErrorKind::NoTokenizer { problem });
        if self.tokenizer.is_none() {
            let json = self.subject.tokenizer_json;
            let json = json.ok_or_else(|| missing("the checkpoint has no tokenizer".to_owned()))?;
            self.tokenizer = Some(Tokenizer::from_json(json).map_err(|e| missing(e.to_string()))?);
        }
        match &self.tokenizer {
            Some(tokenizer) => tokenizer.encode(text, false).map_err(|e| missing(e.to_string())),
            None => Err(missing("the checkpoint has no tokenizer".to_owned())),
        }
    }

    fn value(
        &mut self,
        graph: &Graph,
        weights: &WeightStore,
        tokens: &[u32],
        value: ValueId,
    ) -> Result<Vec<f32>> {
        let info = self.subject.info;
        if let Some(token) = tokens.iter().find(|t| **t as usize >= info.vocab) {
            return Err(problem(format!("token {token} is none of the model's {}", info.vocab)));
        }
        if tokens.len() > info.context_length {
            let (got, most) = (tokens.len(), info.context_length);
            return Err(problem(format!("{got} tokens, and the model was made for at most {most}")));
        }
        let revision = weights.revision();
        let same = |last: &Last| last.tokens == tokens && last.revision == revision;
        let last = match self.last.take().filter(same) {
            Some(last) => last,
            None => {
                let run = SequentialRun::new(vec![tokens.to_vec()], MEMORY);
                Last { tokens: tokens.to_vec(), revision, run }
            }
        };
        let last = self.last.insert(last);
        let mut values = Vec::new();
        last.run.advance(graph, weights, value, &mut |_, _, _| (), &mut |windows| {
            windows.iter().for_each(|w| values.extend_from_slice(w));
        })?;
        Ok(values)
    }
}
