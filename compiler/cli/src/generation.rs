//! Generating text: the arguments that `run` and `chat` share, and Ctrl-C.

use crate::failure::{Failure, Result};
use crate::start_up::give_back_code;
use attar_runtime::{
    CancelToken, ContextOverflow, DeviceChoice, ErrorKind, GenerateOptions, Generation, Model, OpenOptions,
    Requirement, SamplingOptions, Timings,
};
use clap::{Args, ValueEnum};
use serde::Serialize;
use std::path::Path;

/// How to open the artifact.
#[derive(Args, Debug, Clone)]
pub struct OpenArgs {
    /// Threads to compute with (default: as many as the process may use)
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// What to run on: cpu, or cuda:N for a GPU (default: the first GPU that the artifact has code for, else the CPU)
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<DeviceChoice>,
    /// Use this code target of the artifact instead of the best one
    #[arg(long, value_name = "TARGET")]
    pub target: Option<String>,
    /// Use the weights as mapped from the file instead of copying them into huge pages
    #[arg(long)]
    pub mmap: bool,
    /// The same logits, bit by bit, for any number of threads, batch and cut of the prompt (slower only with AMX)
    #[arg(long)]
    pub deterministic: bool,
    /// Refuse an artifact whose certificate does not say this, e.g. 'kld<=0.05,top1>=90%'
    #[arg(long, value_name = "CONDITIONS", value_delimiter = ',')]
    pub require: Vec<Requirement>,
}

impl OpenArgs {
    /// Opens an artifact.
    ///
    /// # Errors
    /// Those of [`Model::open`].
    pub fn open(&self, file: &Path) -> Result<Model> {
        let options =
            OpenOptions { target: self.target.clone(), require: self.require.clone(), ..self.options() };
        let model = Model::open(file, &options).map_err(|e| match *e.kind {
            ErrorKind::Requirement { .. } | ErrorKind::Uncertified { .. } => {
                Failure::from(e).context(format!("{}: --require", file.display()))
            }
            _ => e.into(),
        })?;
        give_back_code();
        Ok(model)
    }

    /// Opens an artifact to compare with. Target and requirements concern the other one.
    ///
    /// # Errors
    /// Those of [`Model::open`].
    pub fn open_reference(&self, file: &Path) -> Result<Model> {
        Ok(Model::open(file, &self.options())?)
    }

    fn options(&self) -> OpenOptions {
        OpenOptions {
            device: self.device.unwrap_or_default(),
            threads: self.threads,
            mmap: self.mmap,
            deterministic: self.deterministic,
            ..OpenOptions::default()
        }
    }
}

/// How tokens are chosen.
#[derive(Args, Debug, Clone)]
pub struct SamplingArgs {
    /// 0 always takes the likeliest token
    #[arg(long, value_name = "X")]
    pub temperature: Option<f32>,
    /// Choose among this many of the likeliest tokens; 0: all
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub top_k: usize,
    /// Choose among the likeliest tokens whose probabilities reach this sum
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    pub top_p: f32,
    /// Choose among tokens at least this likely, relative to the likeliest
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    pub min_p: f32,
    /// Make recent tokens less likely; 1 changes nothing
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    pub repetition_penalty: f32,
    /// Starts the random draws
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// End before this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Most tokens of prompt and answer together (default: what the model was made for)
    #[arg(long, value_name = "N")]
    pub context: Option<usize>,
    /// What happens when the context is full: an error, or the older half of it is forgotten
    #[arg(long, value_name = "POLICY", default_value = "error")]
    pub context_overflow: Overflow,
    /// With `--context-overflow shift`: the first N tokens are never forgotten
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub keep: usize,
}

/// Policy for a full context.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Overflow {
    Error,
    Shift,
}

impl SamplingArgs {
    /// Options of a generation that Ctrl-C ends.
    pub fn options(
        &self,
        max_tokens: usize,
        default_temperature: f32,
        cancel: CancelToken,
    ) -> GenerateOptions {
        GenerateOptions {
            max_tokens: Some(max_tokens),
            sampling: SamplingOptions {
                temperature: self.temperature.unwrap_or(default_temperature),
                top_k: self.top_k,
                top_p: self.top_p,
                min_p: self.min_p,
                repetition_penalty: self.repetition_penalty,
                seed: self.seed,
                ..SamplingOptions::default()
            },
            stop: self.stop.clone(),
            context_overflow: match self.context_overflow {
                Overflow::Error => ContextOverflow::Error,
                Overflow::Shift => ContextOverflow::Shift { keep: self.keep },
            },
            cancel,
            ..GenerateOptions::default()
        }
    }
}

/// Where the time went, in seconds, and what follows from it.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct TimingReport {
    /// Opening the artifact: mapping, checking, copying weights.
    pub open_seconds: f64,
    pub prompt_seconds: f64,
    pub prompt_tokens_per_second: f64,
    /// From the start of the prompt to the first token.
    pub first_token_seconds: f64,
    pub decode_seconds: f64,
    pub decode_tokens_per_second: f64,
}

impl TimingReport {
    pub fn new(open_seconds: f64, t: &Timings) -> TimingReport {
        TimingReport {
            open_seconds,
            prompt_seconds: t.prompt.as_secs_f64(),
            prompt_tokens_per_second: t.prompt_rate(),
            first_token_seconds: t.first_token.as_secs_f64(),
            decode_seconds: t.decode.as_secs_f64(),
            decode_tokens_per_second: t.decode_rate(),
        }
    }
}

/// One line about a generation, for standard error.
pub fn summary(g: &Generation) -> String {
    let t = &g.timings;
    format!(
        "{} prompt tokens at {:.1}/s, {} tokens at {:.1}/s, first after {:.0} ms; ended by {}",
        t.prompt_tokens,
        t.prompt_rate(),
        t.generated_tokens,
        t.decode_rate(),
        t.first_token.as_secs_f64() * 1e3,
        g.finish.name(),
    )
}
