//! An opened model: weights in memory, code chosen and executable, tokenizer and chat template ready.

use crate::chat::ChatTemplate;
use crate::device::cpu::{Code, chosen, judge, refusal};
use crate::device::cuda::Device;
use crate::device::executable::Kernel;
use crate::device::threads::Pool;
use crate::error::{ErrorKind, Result};
use crate::memory::Region;
use crate::prefetch;
use crate::session::{Session, SessionOptions};
use crate::text::Tokenizer;
use attar_artifact::certificate::Requirement;
use attar_artifact::manifest::{Manifest, SectionKind, device_of_target};
use attar_artifact::program::{Arg, Extent, Program, ProgramKind, StepSize};
use attar_artifact::vocabulary::{Vocabulary, VocabularyFault};
use attar_artifact::{Artifact, Verify};
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

/// Most rows of logits of a step; vocabularies are large.
pub(crate) const MOST_ROWS: usize = 512;

/// What a model runs on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The first GPU, where there is one that the artifact has code for; else the CPU.
    #[default]
    Best,
    Cpu,
    /// The GPU of that number, and nothing else.
    Cuda(usize),
}

impl std::str::FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<DeviceChoice, String> {
        match (text, text.strip_prefix("cuda:")) {
            ("cpu", _) => Ok(DeviceChoice::Cpu),
            ("cuda", _) => Ok(DeviceChoice::Cuda(0)),
            (_, Some(index)) => index
                .parse()
                .map(DeviceChoice::Cuda)
                .map_err(|_| format!("{text} is no GPU; name one as cuda:0")),
            _ => Err(format!("{text} is no device; known are cpu and cuda:N")),
        }
    }
}

/// Hears how much of the weights has been copied to a GPU: bytes done, and bytes in all.
#[derive(Clone)]
pub struct Progress(Arc<dyn Fn(u64, u64) + Send + Sync>);

impl Progress {
    /// Calls `hear` after each piece.
    pub fn new(hear: impl Fn(u64, u64) + Send + Sync + 'static) -> Progress {
        Progress(Arc::new(hear))
    }

    pub(crate) fn tell(&self, done: u64, total: u64) {
        (self.0)(done, total);
    }
}

impl std::fmt::Debug for Progress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Progress")
    }
}

/// How a model is opened.
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    /// What to run on.
    pub device: DeviceChoice,
    /// Hears of weights on their way to a GPU.
    pub progress: Option<Progress>,
    /// Threads to compute with, the caller's included; by default as many as the process may use.
    pub threads: Option<usize>,
    /// How much of the file is compared with its hashes.
    pub verify: Verify,
    /// A code target to use, e.g. `x86-64-v2` or `cuda:sm_80`, instead of the best that the device supports. That of a GPU
    /// asks for one.
    pub target: Option<String>,
    /// Use the weights as mapped from the file: opens faster and shares memory between processes. By default they are
    /// copied into huge pages, from which they are read faster.
    pub mmap: bool,
    /// Bytes that kernels prefetch ahead of the weights they read, 0 to 65536; by default tuned for this machine when the
    /// first engine or session is made, in a few milliseconds. Results do not depend on it.
    pub prefetch_bytes: Option<u32>,
    /// Logits are the same bits whatever the number of threads, the rest of a batch, and the way a prompt is cut into
    /// steps. On most targets they always are; where a prompt's kernels have arithmetic of their own (AMX), prompts are
    /// read by the slower kernels of small batches.
    pub deterministic: bool,
    /// What the artifact's certificate must say; a model that does not meet all of it is not opened.
    pub require: Vec<Requirement>,
}

/// Where the time of opening went. Weights and texts are read at the same time, on different threads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenTimings {
    /// Mapping the file; reading and checking manifest, programs and all sections but the weights. Zero for a model
    /// made of an artifact that was open already.
    pub file: Duration,
    /// Copying machine code, checking it and making it executable.
    pub code: Duration,
    /// Getting memory for the weights and copying them there.
    pub weights: Duration,
    /// Tokenizer and chat template.
    pub texts: Duration,
    /// Resolving kernels and starting threads.
    pub assembly: Duration,
    /// From the call to the model being ready to tokenize and run.
    pub total: Duration,
}

/// A model ready to run. Clones share everything.
#[derive(Clone, Debug)]
pub struct Model {
    pub(crate) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) manifest: Manifest,
    pub(crate) programs: Vec<Runnable>,
    pub(crate) weights: WeightMemory,
    pub(crate) pool: Mutex<Pool>,
    tokenizer: Option<Tokenizer>,
    template: Option<Template>,
    target: String,
    opening: OpenTimings,
    /// Given, or tuned by the first engine.
    pub(crate) prefetch: OnceLock<u64>,
    /// Holds the kernels' memory; `programs` point into it. Absent on a GPU.
    _code: Option<Code>,
    /// The GPU that the model is on.
    pub(crate) device: Option<Arc<Device>>,
}

/// A program with its kernels found.
#[derive(Debug)]
pub(crate) struct Runnable {
    pub(crate) kind: ProgramKind,
    pub(crate) max_tokens: usize,
    pub(crate) arena: Extent,
    pub(crate) launches: Vec<Call>,
    /// Arguments of all launches.
    pub(crate) args: usize,
    /// Chunks per thread that its launches are cut into.
    pub(crate) chunks: u64,
}

#[derive(Debug)]
pub(crate) struct Call {
    /// Absent on a GPU, which finds kernels by name.
    pub(crate) kernel: Option<Kernel>,
    pub(crate) args: Vec<Arg>,
    pub(crate) grid: Extent,
    pub(crate) tail: bool,
    pub(crate) name: String,
    pub(crate) note: String,
    pub(crate) weight_bytes: u64,
}

impl Call {
    /// Rows that the launch works on in a step of that size: what a count among its arguments says, else what its grid
    /// depends on.
    pub(crate) fn rows(&self, size: StepSize) -> u64 {
        let counted = self.args.iter().filter_map(|a| match a {
            Arg::Count(extent) => extent.at(size),
            _ => None,
        });
        counted.max().unwrap_or(if self.grid.per_row > 0 { size.rows } else { size.tokens })
    }
}

/// Where the weights are.
#[derive(Debug)]
pub(crate) enum WeightMemory {
    Copied(Arc<Region>),
    /// The artifact holds the map.
    Mapped(Box<Artifact>),
    /// The device has them.
    OnDevice,
}

impl WeightMemory {
    pub(crate) fn address(&self) -> u64 {
        match self {
            WeightMemory::Copied(region) => region.bytes().as_ptr().expose_provenance() as u64,
            WeightMemory::Mapped(artifact) => {
                artifact.weights().map_or(0, |w| w.bytes().as_ptr().expose_provenance() as u64)
            }
            WeightMemory::OnDevice => 0,
        }
    }
}

/// The text of a chat template, which is parsed when it is first asked for: benchmarks and plain prompts never do.
#[derive(Debug)]
pub(crate) struct Template {
    source: String,
    bos: String,
    eos: String,
    parsed: OnceLock<ChatTemplate>,
}

impl Template {
    fn get(&self) -> Result<&ChatTemplate> {
        if let Some(parsed) = self.parsed.get() {
            return Ok(parsed);
        }
        let parsed = ChatTemplate::new(self.source.clone(), self.bos.clone(), self.eos.clone())?;
        Ok(self.parsed.get_or_init(|| parsed))
    }
}

/// All that a model is made of.
pub(crate) struct Parts {
    pub(crate) manifest: Manifest,
    pub(crate) programs: Vec<Program>,
    pub(crate) weights: WeightMemory,
    /// Code for the CPU, or else the GPU.
    pub(crate) code: Option<Code>,
    pub(crate) device: Option<Arc<Device>>,
    pub(crate) tokenizer: Option<Tokenizer>,
    pub(crate) template: Option<Template>,
    pub(crate) threads: usize,
    pub(crate) opening: OpenTimings,
    pub(crate) started: Instant,
    pub(crate) prefetch: Option<u32>,
}

impl Model {
    /// Opens an artifact for this CPU.
    ///
    /// # Errors
    /// [`ErrorKind::Artifact`] when the file is damaged, [`ErrorKind::NoCode`] and its kin when it has no code for
    /// this CPU, [`ErrorKind::Memory`] when the weights do not fit, [`ErrorKind::Requirement`] and
    /// [`ErrorKind::Uncertified`] when its certificate is not what was asked for.
    pub fn open(path: impl AsRef<Path>, options: &OpenOptions) -> Result<Model> {
        let started = Instant::now();
        let artifact = Artifact::open(path, options.verify)?;
        Model::prepare(artifact, options, started, started.elapsed())
    }

    /// A model from an artifact that is open already.
    ///
    /// # Errors
    /// As [`Model::open`].
    pub fn of(artifact: Artifact, options: &OpenOptions) -> Result<Model> {
        Model::prepare(artifact, options, Instant::now(), Duration::ZERO)
    }

    fn prepare(artifact: Artifact, options: &OpenOptions, started: Instant, file: Duration) -> Result<Model> {
        meets(&artifact, &options.require)?;
        let mut opening = OpenTimings { file, ..OpenTimings::default() };
        let threads = match options.threads {
            Some(n @ 1..=1024) => n,
            Some(n) => {
                let (value, expected) = (n.to_string(), "1 to 1024".to_owned());
                return Err(ErrorKind::Option { name: "threads", value, expected }.into());
            }
            None => std::thread::available_parallelism().map_or(1, usize::from),
        };
        if let Some(n) = options.prefetch_bytes.filter(|n| u64::from(*n) > prefetch::MOST) {
            let (value, expected) = (n.to_string(), format!("0 to {}", prefetch::MOST));
            return Err(ErrorKind::Option { name: "prefetch_bytes", value, expected }.into());
        }
        if let Some(mut device) = find_device(&artifact, options)? {
            // Both kernels and weights are there by now.
            opening.weights = started.elapsed().saturating_sub(file);
            if options.deterministic {
                device.programs.retain(|p| p.kind != ProgramKind::Prefill);
            }
            let texts = Instant::now();
            let (tokenizer, template) = read_texts(&artifact)?;
            opening.texts = texts.elapsed();
            return Model::assemble(Parts {
                manifest: artifact.manifest().clone(),
                programs: device.programs.clone(),
                weights: WeightMemory::OnDevice,
                code: None,
                device: Some(Arc::new(device)),
                tokenizer,
                template,
                threads: 1,
                opening,
                started,
                prefetch: options.prefetch_bytes,
            });
        }
        let code_start = Instant::now();
        let code = Code::load(&artifact, options.target.as_deref())?;
        opening.code = code_start.elapsed();
        let mut programs = artifact.programs("cpu").unwrap_or_default().to_vec();
        if options.deterministic && code.prefill_differs {
            programs.retain(|p| p.kind != ProgramKind::Prefill);
        }
        let manifest = artifact.manifest().clone();
        // Reading the tokenizer takes about as long as copying small weights: both at once.
        let (texts, weights) = std::thread::scope(|scope| {
            let texts = scope.spawn(|| {
                let start = Instant::now();
                read_texts(&artifact).map(|texts| (texts, start.elapsed()))
            });
            let start = Instant::now();
            let weights = if options.mmap {
                Ok(None)
            } else {
                copy_weights(&artifact, threads, options.verify).map(Some)
            };
            opening.weights = start.elapsed();
            let texts = texts.join().unwrap_or_else(|_| {
                let source = "its parser panicked".into();
                Err(ErrorKind::Tokenizer { action: "be read", source }.into())
            });
            (texts, weights)
        });
        let ((tokenizer, template), texts) = texts?;
        opening.texts = texts;
        let weights = match weights? {
            Some(region) => {
                let region = Arc::new(region);
                Region::collapse(&region);
                WeightMemory::Copied(region)
            }
            None => WeightMemory::Mapped(Box::new(artifact)),
        };
        Model::assemble(Parts {
            manifest,
            programs,
            weights,
            code: Some(code),
            device: None,
            tokenizer,
            template,
            threads,
            opening,
            started,
            prefetch: options.prefetch_bytes,
        })
    }

    pub(crate) fn assemble(parts: Parts) -> Result<Model> {
        let start = Instant::now();
        if parts.programs.is_empty() {
            return Err(ErrorKind::Missing { what: "CPU programs", hint: " with a CPU target" }.into());
        }
        let mut programs = Vec::new();
        for p in parts.programs {
            let mut launches = Vec::new();
            let mut args = 0;
            for launch in p.launches {
                let kernel = parts.code.as_ref().and_then(|c| c.kernel(&launch.kernel));
                if kernel.is_none() && parts.device.is_none() {
                    let missing = ErrorKind::Missing { what: "kernel that its programs call", hint: "" };
                    return Err(missing.into());
                }
                args += launch.args.len();
                launches.push(Call {
                    kernel,
                    args: launch.args,
                    grid: launch.grid,
                    tail: launch.tail,
                    name: launch.kernel,
                    note: launch.note,
                    weight_bytes: launch.weight_bytes,
                });
            }
            let max_tokens = p.max_tokens as usize;
            let chunks = match p.kind {
                // A launch takes microseconds, and whoever starts on a chunk first waits for its memory.
                ProgramKind::Decode | ProgramKind::SmallBatch => 3,
                // Tiles lay activations out anew for every chunk.
                ProgramKind::Prefill if parts.code.as_ref().is_some_and(|c| c.prefill_differs) => 2,
                ProgramKind::Prefill => 24,
            };
            programs.push(Runnable { kind: p.kind, max_tokens, arena: p.arena, launches, args, chunks });
        }
        let most_launches = programs.iter().map(|p| p.launches.len()).max().unwrap_or(0);
        let pool = Mutex::new(Pool::new(parts.threads, most_launches));
        let mut opening = parts.opening;
        (opening.assembly, opening.total) = (start.elapsed(), parts.started.elapsed());
        Ok(Model {
            inner: Arc::new(Inner {
                manifest: parts.manifest,
                programs,
                weights: parts.weights,
                pool,
                opening,
                prefetch: parts.prefetch.map_or_else(OnceLock::new, |p| OnceLock::from(u64::from(p))),
                tokenizer: parts.tokenizer,
                template: parts.template,
                target: match (&parts.code, &parts.device) {
                    (Some(code), _) => code.target.clone(),
                    (None, device) => device.as_ref().map_or(String::new(), |d| d.target.clone()),
                },
                _code: parts.code,
                device: parts.device,
            }),
        })
    }

    /// Starts a session: one sequence of tokens with its KV cache.
    ///
    /// # Errors
    /// [`ErrorKind::Option`] for a context the model was not made for; [`ErrorKind::Memory`].
    pub fn session(&self, options: &SessionOptions) -> Result<Session> {
        Session::new(self.clone(), options)
    }

    /// What the artifact says about itself.
    pub fn manifest(&self) -> &Manifest {
        &self.inner.manifest
    }

    /// The code target in use.
    pub fn target(&self) -> &str {
        &self.inner.target
    }

    /// Threads in use, the caller's included.
    pub fn threads(&self) -> usize {
        self.inner.pool.lock().map_or(1, |p| p.threads())
    }

    /// Bytes that kernels prefetch ahead of the weights; `None` until an engine has tuned it.
    pub fn prefetch_bytes(&self) -> Option<u64> {
        self.inner.prefetch.get().copied()
    }

    /// Where the time of opening went.
    pub fn opening(&self) -> OpenTimings {
        self.inner.opening
    }

    /// Most tokens of one step.
    pub fn max_step_tokens(&self) -> usize {
        self.inner.programs.iter().map(|p| p.max_tokens).max().unwrap_or(0)
    }

    /// Most tokens of a step that runs the program for few: batched decode, drafts to verify. 0 without such a program.
    pub fn small_batch_tokens(&self) -> usize {
        let small = self.inner.programs.iter().filter(|p| p.kind == ProgramKind::SmallBatch);
        small.map(|p| p.max_tokens).max().unwrap_or(0)
    }

    /// Most rows of logits of one step.
    pub fn max_step_rows(&self) -> usize {
        self.max_step_tokens().min(MOST_ROWS)
    }

    /// The tokenizer.
    ///
    /// # Errors
    /// [`ErrorKind::Missing`] when the artifact has none.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        let missing = ErrorKind::Missing { what: "tokenizer", hint: " from a folder that has one" };
        self.inner.tokenizer.as_ref().ok_or_else(|| missing.into())
    }

    /// The chat template, parsed at the first call.
    ///
    /// # Errors
    /// [`ErrorKind::Missing`] when the artifact has none, [`ErrorKind::ChatTemplate`] when it cannot be parsed.
    pub fn chat_template(&self) -> Result<&ChatTemplate> {
        let missing = ErrorKind::Missing { what: "chat template", hint: ", or give a plain prompt" };
        self.inner.template.as_ref().ok_or(missing)?.get()
    }
}

/// The GPU to run on, with the model's kernels and weights; `None` for the CPU.
fn find_device(artifact: &Artifact, options: &OpenOptions) -> Result<Option<Device>> {
    let forced = options.target.as_deref();
    let forced_gpu = forced.filter(|t| device_of_target(t) == "cuda");
    let open = |index| {
        let verify = options.verify == Verify::Full;
        Device::open(artifact, index, forced_gpu, verify, options.progress.as_ref())
    };
    match (options.device, forced) {
        (DeviceChoice::Cpu, _) => Ok(None),
        (DeviceChoice::Cuda(index), _) => open(index).map(Some),
        (DeviceChoice::Best, Some(_)) if forced_gpu.is_some() => open(0).map(Some),
        (DeviceChoice::Best, Some(_)) => Ok(None),
        (DeviceChoice::Best, None) => {
            if artifact.programs("cuda").is_none() {
                return Ok(None);
            }
            match open(0) {
                Ok(device) => Ok(Some(device)),
                // No GPU that could be used is no fault where there is code for the CPU; a GPU that fails is.
                Err(e) if artifact.programs("cpu").is_some() && is_absence(&e.kind) => Ok(None),
                Err(e) => Err(e),
            }
        }
    }
}

/// Whether an error says that there is no GPU for an artifact, rather than that one failed.
fn is_absence(kind: &ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::DeviceUnavailable { .. }
            | ErrorKind::DeviceUnsupported { .. }
            | ErrorKind::DriverTooOld { .. }
            | ErrorKind::NoCudaCode
    )
}

/// The CPU targets an artifact has code for; with each the reason why it cannot run here, or `None` when it can.
pub fn code_targets(manifest: &Manifest) -> Vec<(String, Option<String>)> {
    judge(&manifest.sections)
}

/// The code target of an artifact that would be used on this CPU, if there is one.
pub fn chosen_target(manifest: &Manifest) -> Option<String> {
    chosen(&manifest.sections)
}

/// Why this CPU cannot run code for `target` that needs `features` (named as in artifacts); `None` when it can.
pub fn target_refusal(target: &str, features: &[&str]) -> Option<String> {
    refusal(target, features)
}

/// Refuses an artifact whose certificate does not meet every requirement.
fn meets(artifact: &Artifact, requirements: &[Requirement]) -> Result<()> {
    let Some(first) = requirements.first() else { return Ok(()) };
    let Some(certificate) = artifact.certificate()? else {
        let (requirement, reason) = (first.to_string(), artifact.manifest().uncertified.clone());
        return Err(ErrorKind::Uncertified { requirement, reason }.into());
    };
    for requirement in requirements {
        let (value, met) = requirement.judge(&certificate);
        if !met {
            let (requirement, metric) = (requirement.to_string(), requirement.metric);
            return Err(ErrorKind::Requirement { requirement, metric, value }.into());
        }
    }
    Ok(())
}

fn read_texts(artifact: &Artifact) -> Result<(Option<Tokenizer>, Option<Template>)> {
    let tokenizer = read_tokenizer(artifact)?;
    let name = |id: Option<u32>| id.and_then(|id| tokenizer.as_ref()?.token(id)).unwrap_or_default();
    let model = &artifact.manifest().model;
    let (bos, eos) = (name(model.bos), name(model.eos.first().copied()));
    let template = artifact.text(&SectionKind::ChatTemplate)?.map(|source| Template {
        source,
        bos,
        eos,
        parsed: OnceLock::new(),
    });
    Ok((tokenizer, template))
}

/// The tokenizer, from the section that opens fast when this version knows its layout, else from the JSON.
fn read_tokenizer(artifact: &Artifact) -> Result<Option<Tokenizer>> {
    if let Some(section) = artifact.section(|k| *k == SectionKind::Vocabulary) {
        match Vocabulary::parse(&artifact.read(section)?) {
            Ok(vocabulary) => return Tokenizer::from_vocabulary(vocabulary).map(Some),
            Err(VocabularyFault::Version(_)) => {}
            Err(source) => {
                let (action, source) = ("be read", Box::new(source));
                return Err(ErrorKind::Tokenizer { action, source }.into());
            }
        }
    }
    artifact.text(&SectionKind::Tokenizer)?.map(|json| Tokenizer::from_json(&json)).transpose()
}

fn copy_weights(artifact: &Artifact, threads: usize, verify: Verify) -> Result<Region> {
    let len = artifact.section(|k| *k == SectionKind::Weights).map_or(0, |s| s.len);
    let mut region = Region::huge(len, "the weights", "; open with mmap")?;
    if len > 0 {
        // Under a full check the file was compared at open, but it is this copy that runs.
        artifact.copy_weights(region.bytes_mut(), threads, verify == Verify::Full)?;
    }
    Ok(region)
}
