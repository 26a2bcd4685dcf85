//! What a model would weigh and how fast it would be, before it is compiled.
//!
//! A sketch, a model of the same shapes with made-up weights, is compiled and run: on this machine its speed is that of the model,
//! since neither depends on the values. Where the model is large, sketches of fewer layers stand for it. Size is linear in the
//! layers, and two sketches tell it. Time is measured with the larger one, which exceeds the caches of most processors: a
//! prompt's grows with the layers, a token's with the bytes of weights it reads. (The difference of two times would be mostly
//! noise: memory is not equally fast from minute to minute.) What was measured is kept as a profile. Another machine is described by a few numbers, and the time of a step is the longest of what they allow.

use crate::failure::{Failure, Result};
use crate::home::{Home, make_folder};
use crate::speed::{self, Speed};
use attar_artifact::Artifact;
use attar_artifact::manifest::{KvType, Model as Shape, SectionKind};
use attar_artifact::program::StepSize;
use attar_compiler::{CompileOptions, ModelInfo, Session, Target, registry};
use attar_pass::{Preset, Recipe};
use attar_runtime::{Model, OpenOptions};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Weights of a sketch, in bytes, where the model has as many.
const ENOUGH: f64 = 160e6;
/// What the runtime needs besides weights, cache and activations.
const RUNTIME_BYTES: u64 = 15_000_000;

/// What is to be planned.
#[derive(Clone, Debug)]
pub struct Question {
    pub source: PathBuf,
    pub targets: Vec<Target>,
    pub kv: Option<KvType>,
    pub threads: Option<usize>,
    pub prompt: usize,
    pub generate: usize,
    /// Tokens held before generation is timed.
    pub context: usize,
    pub repetitions: usize,
}

/// What a sketch weighed, and how fast it was.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    pub layers: usize,
    pub file_bytes: u64,
    pub weight_bytes: u64,
    pub arena_bytes: u64,
    /// `None` where no code of the artifact runs here.
    pub speed: Option<SampleSpeed>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct SampleSpeed {
    /// Of the whole prompt.
    pub prompt_seconds: f64,
    /// Of one token.
    pub token_seconds: f64,
    /// The larger of both spreads, `(max - min) / median`.
    pub spread: f64,
}

/// What was measured for one mix of formats.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Profile {
    /// Of a sketch: what does not depend on the number of layers is the model's.
    pub shape: Shape,
    /// One sketch of all layers, or two of fewer.
    pub samples: Vec<Sample>,
}

/// What a mix of formats would give.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Prediction {
    pub formats: String,
    pub file_bytes: u64,
    pub weight_bytes: u64,
    /// Of all weights, embedding and head included.
    pub bits_per_weight: f64,
    /// Of the KV cache at the context asked for.
    pub kv_bytes: u64,
    /// Weights, cache, activations and the runtime.
    pub memory_bytes: u64,
    pub prompt_tokens_per_second: Option<f64>,
    pub tokens_per_second: Option<f64>,
    /// How much repetitions differed; above 0.2 the machine was busy.
    pub spread: Option<f64>,
}

/// Bytes of the KV cache of one sequence.
pub fn kv_bytes(shape: &Shape, layers: u64, tokens: u64) -> u64 {
    let page_len = u64::from(shape.kv.page_len).max(1);
    let block = shape.kv.dtype.block_bytes(shape.head_dim as usize, page_len as usize) as u64;
    2 * layers * u64::from(shape.kv_heads) * block * tokens.div_ceil(page_len)
}

/// Weights of all layers together.
pub fn layer_weights(model: &ModelInfo) -> u64 {
    let matrices = if model.tied { 1 } else { 2 };
    model.parameters.saturating_sub(matrices * (model.vocab * model.hidden) as u64)
}

/// Layers of the sketches that stand for a model of `layers` layers with `weights` weights in that format.
fn sketch_layers(layers: usize, weights: u64, mix: Preset) -> Vec<usize> {
    let bytes = weights as f64 / layers as f64 * mix.layers.bits_per_weight() / 8.0;
    let enough = (ENOUGH / bytes.max(1.0)).ceil().max(2.0);
    if enough >= layers as f64 { vec![layers] } else { vec![(enough as usize).div_ceil(2), enough as usize] }
}

/// Measures a mix of formats, or finds in the cache folder what was measured.
///
/// # Errors
/// Those of the compiler and the engine; when no temporary folder can be made.
pub fn profile(
    question: &Question,
    mix: Preset,
    model: &ModelInfo,
    cache: Option<&Path>,
    mut progress: impl FnMut(&str),
) -> Result<Profile> {
    if let Some(found) = cache.and_then(|path| serde_json::from_slice(&std::fs::read(path).ok()?).ok()) {
        return Ok(found);
    }
    let folder = tempfile::tempdir()?;
    let (mut samples, mut shape) = (Vec::new(), None);
    let sizes = sketch_layers(model.layers, layer_weights(model), mix);
    for layers in sizes.iter().copied() {
        progress(&format!("{}: compiling {layers} layers", mix.name()));
        let path = folder.path().join("sketch.attar");
        let mut options = CompileOptions::new(
            question.source.clone(),
            rough_recipe(mix)?,
            question.targets.clone(),
            path.clone(),
        );
        options.sketch = Some(layers);
        options.kv = question.kv;
        Session::new(options)?.run(&mut |_| {})?;
        progress(&format!("{}: running {layers} layers", mix.name()));
        let artifact = Artifact::open(&path, attar_artifact::Verify::default())?;
        shape = Some(artifact.manifest().model.clone());
        samples.push(measure(question, artifact, &path, layers, sizes.last() == Some(&layers))?);
    }
    let shape = shape.ok_or_else(|| Failure::bug("a plan without a sketch".to_owned()))?;
    let profile = Profile { shape, samples };
    if let Some(path) = cache {
        if let Some(parent) = path.parent() {
            make_folder(parent)?;
        }
        let temporary = path.with_extension("json.part");
        std::fs::write(&temporary, serde_json::to_vec_pretty(&profile)?)?;
        std::fs::rename(&temporary, path)?;
    }
    Ok(profile)
}

fn rough_recipe(mix: Preset) -> Result<Recipe> {
    let parsed = Recipe::parse(&mix.rough_recipe(), "a plan", &registry()?);
    parsed.map_err(|e| Failure::bug(format!("recipe of a plan: {e}")))
}

fn measure(
    question: &Question,
    artifact: Artifact,
    path: &Path,
    layers: usize,
    timed: bool,
) -> Result<Sample> {
    let sections = &artifact.manifest().sections;
    let weight_bytes = sections.iter().filter(|s| s.kind == SectionKind::Weights).map(|s| s.len).sum();
    let spans = artifact.manifest().model.kv.spans(question.context.max(question.prompt) as u64);
    let programs = artifact.programs("cpu").unwrap_or_default();
    let arena = |p: &attar_artifact::program::Program| {
        let tokens = u64::from(p.max_tokens);
        p.arena.at(StepSize { tokens, rows: 1, spans }).unwrap_or(0)
    };
    let arena_bytes = programs.iter().map(arena).max().unwrap_or(0);
    let speed = if timed && question.targets.iter().any(|t| t.runs_here()) {
        let open = OpenOptions { threads: question.threads, ..OpenOptions::default() };
        let model = Model::of(artifact, &open)?;
        let plan = speed::Plan {
            prompt: question.prompt,
            generate: question.generate,
            context: question.context,
            batch: 1,
            repetitions: question.repetitions,
        };
        let speeds = speed::measure(&model, plan, |_| {})?;
        let step = |i: usize| speeds.get(i).map_or(f64::NAN, |s: &Speed| s.step_ms / 1e3);
        let spread = speeds.iter().map(|s| s.spread).fold(0.0, f64::max);
        Some(SampleSpeed { prompt_seconds: step(0), token_seconds: step(1), spread })
    } else {
        None
    };
    Ok(Sample { layers, file_bytes: std::fs::metadata(path)?.len(), weight_bytes, arena_bytes, speed })
}

impl Profile {
    /// What the whole model would give, with a cache for `context` tokens.
    pub fn predict(&self, mix: Preset, model: &ModelInfo, question: &Question, context: u64) -> Prediction {
        let layers = model.layers;
        let line = |value: &dyn Fn(&Sample) -> f64| match &self.samples[..] {
            [] => 0.0,
            [one] => value(one),
            [a, .., b] => {
                let slope = (value(b) - value(a)) / (b.layers as f64 - a.layers as f64);
                value(b) + slope * (layers as f64 - b.layers as f64)
            }
        };
        let bytes = |value: &dyn Fn(&Sample) -> u64| line(&|s| value(s) as f64).max(0.0).round() as u64;
        let weight_bytes = bytes(&|s| s.weight_bytes);
        let measured = self.samples.iter().rev().find_map(|s| Some((s, s.speed?)));
        let prompt_seconds =
            measured.map(|(s, speed)| speed.prompt_seconds * layers as f64 / s.layers as f64);
        let token_seconds = measured
            .map(|(s, speed)| speed.token_seconds * weight_bytes as f64 / s.weight_bytes.max(1) as f64);
        let kv_bytes = kv_bytes(&self.shape, layers as u64, context);
        let spread = self.samples.iter().filter_map(|s| Some(s.speed?.spread)).fold(0.0, f64::max);
        Prediction {
            formats: mix.name(),
            file_bytes: bytes(&|s| s.file_bytes),
            weight_bytes,
            bits_per_weight: weight_bytes as f64 * 8.0 / model.parameters.max(1) as f64,
            kv_bytes,
            memory_bytes: weight_bytes + kv_bytes + bytes(&|s| s.arena_bytes) + RUNTIME_BYTES,
            prompt_tokens_per_second: prompt_seconds.map(|s| question.prompt as f64 / s),
            tokens_per_second: token_seconds.map(|s| 1.0 / s),
            spread: (spread > 0.0).then_some(spread),
        }
    }
}

/// Where the profile of a mix is kept: a name made of all that it depends on.
///
/// # Errors
/// When there is no cache folder.
pub fn cache_path(question: &Question, model: &ModelInfo, mix: Preset) -> Result<PathBuf> {
    let targets: Vec<&str> = question.targets.iter().map(|t| t.name()).collect();
    let all = format!(
        "{} {} {:?} {model:?} {:?} {} {targets:?} {} {} {}",
        env!("CARGO_PKG_VERSION"),
        processor(),
        question.threads,
        question.kv,
        mix.name(),
        question.prompt,
        question.generate,
        question.context,
    );
    let name = format!("{}.json", &blake3::hash(all.as_bytes()).to_hex()[..24]);
    Ok(Home::from_env()?.root.join("plans").join(name))
}

/// What the system calls the processor, and how many cores this process may use.
fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|l| l.strip_prefix("model name")).unwrap_or_default();
    format!("{} × {}", name.trim_start_matches([' ', '\t', ':']), num_threads())
}

fn num_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// A machine that is not this one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Machine {
    /// Bytes per second that all its cores together read from memory.
    pub read: f64,
    /// Operations per second (a multiplication and an addition are two) that all its cores make of int8.
    pub int8: f64,
    /// The same of f32.
    pub f32: f64,
    /// Seconds from the end of a launch to the start of the next.
    pub launch: f64,
}

/// Shares of what a machine could do that kernels reach, as docs/performance.md has them: of reading in decode, of products
/// in prompts.
const READ_SHARE: f64 = 0.85;
const PRODUCT_SHARE: f64 = 0.6;

impl Machine {
    /// Reads `read=60,int8=900,f32=230,launch=2`: GB/s, GOP/s, GFLOP/s, µs.
    ///
    /// # Errors
    /// An input failure that says what is missing or no number.
    pub fn parse(text: &str) -> Result<Machine> {
        let expected = "expected read=GB/s,int8=GOP/s,f32=GFLOP/s and, if you like, launch=µs";
        let bad = |what: String| Failure::input(format!("--machine {text}: {what}; {expected}"));
        let (mut read, mut int8, mut f32, mut launch) = (None, None, None, Some(2.0));
        for part in text.split(',') {
            let (name, value) = part.split_once('=').ok_or_else(|| bad(format!("{part:?} has no value")))?;
            let number: f64 = value.trim().parse().map_err(|_| bad(format!("{value:?} is no number")))?;
            if !(number > 0.0 && number.is_finite()) {
                return Err(bad(format!("{name} must be above 0")));
            }
            match name.trim() {
                "read" => read = Some(number),
                "int8" => int8 = Some(number),
                "f32" => f32 = Some(number),
                "launch" => launch = Some(number),
                _ => return Err(bad(format!("{name:?} is not known"))),
            }
        }
        let need = |v: Option<f64>, name: &str| v.ok_or_else(|| bad(format!("{name} is missing")));
        Ok(Machine {
            read: need(read, "read")? * 1e9,
            int8: need(int8, "int8")? * 1e9,
            f32: need(f32, "f32")? * 1e9,
            launch: need(launch, "launch")? * 1e-6,
        })
    }

    /// Tokens per second of a prompt and of generation behind `context` tokens.
    pub fn speeds(
        &self,
        model: &ModelInfo,
        profile: &Profile,
        mix: Preset,
        predicted: &Prediction,
        question: &Question,
    ) -> (f64, f64) {
        let layers = model.layers as f64;
        let width = (model.heads * model.head_dim) as f64;
        let products = if mix.layers.wants_int8_activations() { self.int8 } else { self.f32 } * PRODUCT_SHARE;
        let tokens = question.prompt as f64;
        let linear = 2.0 * layer_weights(model) as f64 * tokens / products;
        let attention = 2.0 * layers * width * tokens * tokens / (self.f32 * PRODUCT_SHARE);
        // Five launches a layer in decode.
        let launches = (5.0 * layers + 3.0) * self.launch;
        let cache = kv_bytes(&profile.shape, model.layers as u64, question.context as u64);
        let read = (predicted.weight_bytes + cache) as f64 / (self.read * READ_SHARE);
        (tokens / (linear + attention + launches), 1.0 / (read + launches))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use attar_artifact::manifest::KvSpec;
    use std::collections::BTreeMap;

    fn model(layers: usize) -> ModelInfo {
        ModelInfo {
            name: String::new(),
            architecture: "llama",
            layers,
            hidden: 4,
            heads: 9,
            kv_heads: 3,
            head_dim: 64,
            ffn: 8,
            vocab: 10,
            context_length: 64,
            parameters: 280,
            rope: Vec::new(),
            windows: Vec::new(),
            tied: true,
            eos: Vec::new(),
            bos: None,
            add_bos: false,
            special_tokens: BTreeMap::new(),
        }
    }

    #[test]
    fn machines_need_their_numbers() {
        let m = Machine::parse("read=60,int8=900,f32=230").unwrap();
        assert_eq!((m.read, m.int8, m.f32, m.launch), (60e9, 900e9, 230e9, 2e-6));
        for text in
            ["", "read=60", "read=60,int8=900,f32=-1", "read=x,int8=1,f32=1", "read=1,int8=1,f32=1,x=2"]
        {
            assert!(Machine::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn small_models_are_sketched_whole_and_large_ones_twice_in_part() {
        let n4 = Preset::by_name("n4").unwrap();
        assert_eq!(sketch_layers(30, 106_000_000, n4), [30]);
        assert_eq!(sketch_layers(32, 7_000_000_000, n4), [1, 2]);
        assert_eq!(sketch_layers(1, 218_000_000, n4), [1]);
        assert_eq!(sketch_layers(30, 106_000_000, Preset::by_name("f32").unwrap()), [6, 12]);
    }

    #[test]
    fn size_grows_with_layers_and_time_with_layers_or_bytes() {
        let sample = |layers: usize| Sample {
            layers,
            file_bytes: 100 + 10 * layers as u64,
            weight_bytes: 50 + 9 * layers as u64,
            arena_bytes: 7,
            speed: Some(SampleSpeed {
                prompt_seconds: 1.0 + layers as f64,
                token_seconds: 0.5 + 0.25 * layers as f64,
                spread: 0.01 * layers as f64,
            }),
        };
        let model = model(10);
        let shape = Shape {
            name: String::new(),
            architecture: "llama".to_owned(),
            layers: 4,
            hidden: 0,
            heads: 9,
            kv_heads: 3,
            head_dim: 64,
            vocab: 10,
            context_length: 64,
            parameters: 0,
            rope: Vec::new(),
            kv: KvSpec { dtype: KvType::F16, page_len: 32, span: 256 },
            eos: Vec::new(),
            bos: None,
        };
        let profile = Profile { shape, samples: vec![sample(2), sample(4)] };
        let question = Question {
            source: PathBuf::new(),
            targets: Vec::new(),
            kv: None,
            threads: None,
            prompt: 44,
            generate: 1,
            context: 0,
            repetitions: 1,
        };
        let p = profile.predict(Preset::by_name("n4").unwrap(), &model, &question, 64);
        assert_eq!((p.file_bytes, p.weight_bytes, p.bits_per_weight), (200, 140, 4.0));
        // 5 s for 4 layers; 1.5 s for 86 bytes of weights.
        assert_eq!(p.prompt_tokens_per_second, Some(44.0 / 12.5));
        assert_eq!(p.tokens_per_second, Some(1.0 / (1.5 * 140.0 / 86.0)));
        // 2 of keys and values, 10 layers, 3 KV heads, 64 elements of 2 bytes, 64 tokens.
        assert_eq!(p.kv_bytes, 2 * 10 * 3 * 64 * 2 * 64);
        assert_eq!(p.memory_bytes, 140 + p.kv_bytes + 7 + RUNTIME_BYTES);
        assert_eq!(p.spread, Some(0.04));
    }
}
