//! The pass manager: runs a pipeline, and checks, dumps, times and counts around every pass.
//!
//! It performs no I/O. Dumps, progress and reports go to the caller as [`Event`]s.

use crate::calibration::Calibrator;
use crate::context::{Fuel, NoteLevel, PassCx};
use crate::decl::{Options, PassDecl, Phase};
use crate::error::{Error, ErrorKind, Result, nearest};
use crate::globs::TensorGlobs;
use crate::journal::Journal;
use crate::metrics::Metric;
use crate::model_runner::ModelRunner;
use crate::recipe::Recipe;
use crate::registry::Registry;
use attar_ir::{Graph, WeightStore};
use std::cell::RefCell;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

/// One run of a pass: which, with what options, on which tensors.
#[derive(Clone, Debug)]
pub struct Step {
    pub decl: &'static PassDecl,
    pub options: Options,
    pub tensors: TensorGlobs,
}

impl PartialEq for Step {
    fn eq(&self, other: &Step) -> bool {
        self.decl.name == other.decl.name && self.options == other.options && self.tensors == other.tensors
    }
}

impl Step {
    /// A pass with its defaults, on all tensors.
    ///
    /// # Errors
    /// [`ErrorKind::MissingOption`] when the pass has an option without a default.
    pub fn new(decl: &'static PassDecl) -> Result<Step> {
        Ok(Step { decl, options: Options::new(decl, &[])?, tensors: TensorGlobs::all()? })
    }
}

/// Passes in the order they run: phase by phase.
#[derive(Clone, Debug, Default)]
pub struct Pipeline {
    pub steps: Vec<Step>,
}

impl Pipeline {
    /// The default passes (by name, in order) and a recipe's: by phase, within a phase the default ones first.
    ///
    /// # Errors
    /// [`ErrorKind::UnknownPass`] or [`ErrorKind::MissingOption`] for a default pass.
    pub fn new(defaults: &[&str], recipe: &Recipe, registry: &Registry) -> Result<Pipeline> {
        let mut steps = Vec::with_capacity(defaults.len() + recipe.steps.len());
        for name in defaults {
            steps.push(Step::new(registry.find(name)?)?);
        }
        steps.extend(recipe.steps.iter().cloned());
        steps.sort_by_key(|s| s.decl.phase);
        Ok(Pipeline { steps })
    }
}

/// After which passes the graph's text is wanted.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub enum PrintAfter {
    #[default]
    Nothing,
    /// After the passes of these names.
    Passes(Vec<String>),
    /// Before the first pass and after every one.
    All,
}

/// Where to end early.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// After the last pass of the phase.
    Phase(Phase),
    /// After the first run of the pass.
    Pass(String),
}

impl Stop {
    /// Reads the value of `--stop-after`: a phase, or a pass of the pipeline.
    ///
    /// # Errors
    /// [`ErrorKind::UnknownStop`].
    pub fn parse(text: &str, pipeline: &Pipeline) -> Result<Stop> {
        if let Some(phase) = Phase::by_name(text) {
            return Ok(Stop::Phase(phase));
        }
        if pipeline.steps.iter().any(|s| s.decl.name == text) {
            return Ok(Stop::Pass(text.to_owned()));
        }
        let names = Phase::ALL.map(Phase::name).into_iter().chain(pipeline.steps.iter().map(|s| s.decl.name));
        Err(Error::new(ErrorKind::UnknownStop { name: text.to_owned(), nearest: nearest(text, names) }))
    }
}

/// The graph's text at some point of the pipeline.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dump<'a> {
    /// 0 before the first pass, else the number of the pass just run, from 1.
    pub index: usize,
    /// The pass just run; `import` before the first.
    pub name: &'a str,
    /// `.air` text.
    pub text: String,
}

impl Dump<'_> {
    /// Name for a file of `--emit-ir`: `03-fuse-qkv.air`.
    pub fn file_name(&self) -> String {
        format!("{:02}-{}.air", self.index, self.name)
    }
}

/// What the manager tells its caller while it runs.
#[derive(Debug)]
pub enum Event<'a> {
    /// A pass begins; `index` from 1, of `total`.
    Started { index: usize, total: usize, decl: &'static PassDecl },
    /// The running pass is at `what`, `done` of `total`.
    Progress { decl: &'static PassDecl, what: &'a str, done: u64, total: u64 },
    /// The running pass has something to say.
    Note { decl: &'static PassDecl, level: NoteLevel, text: &'a str },
    /// A dump that was asked for.
    Dump(Dump<'a>),
    /// A pass has ended and the graph is valid.
    Finished(&'a PassReport),
}

/// What one run of a pass did.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct PassReport {
    pub name: &'static str,
    pub phase: Phase,
    pub rewrites: u64,
    /// The rewrite counted last: the guilty one when bisecting with fuel.
    pub last_rewrite: Option<String>,
    pub nodes_before: usize,
    pub nodes_after: usize,
    /// Time of the pass alone. Kept out of anything written to the artifact.
    #[serde(skip)]
    pub time: Duration,
}

/// What a pipeline did.
#[derive(Clone, Debug, PartialEq, Default, serde::Serialize)]
pub struct Report {
    pub passes: Vec<PassReport>,
    pub metrics: Vec<Metric>,
    /// Whether [`Manager::stop_after`] ended the run.
    pub stopped: bool,
}

/// What stands around a pipeline for passes to use; each may be missing.
#[derive(Default)]
pub struct Surroundings<'a> {
    /// Runs the model over calibration text.
    pub calibrator: Option<&'a mut dyn Calibrator>,
    /// Keeps what passes have worked out.
    pub journal: Option<&'a dyn Journal>,
    /// Runs the model over whatever text.
    pub runner: Option<&'a mut dyn ModelRunner>,
    /// Stops the run when it is set.
    pub cancel: Option<&'a AtomicBool>,
}

impl std::fmt::Debug for Surroundings<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Surroundings").finish_non_exhaustive()
    }
}

/// How to run a pipeline.
#[derive(Clone, Debug)]
pub struct Manager {
    /// Verify before the first pass and after every one. Off only to measure what it costs.
    pub verify: bool,
    pub print_after: PrintAfter,
    /// Rewrites allowed over the whole pipeline.
    pub fuel: Fuel,
    pub stop_after: Option<Stop>,
    pub seed: u64,
}

impl Default for Manager {
    fn default() -> Manager {
        Manager {
            verify: true,
            print_after: PrintAfter::Nothing,
            fuel: Fuel::UNLIMITED,
            stop_after: None,
            seed: 0,
        }
    }
}

impl Manager {
    /// Runs the passes in order.
    ///
    /// # Errors
    /// What a pass reports, with its name; [`ErrorKind::Broken`] when the verifier refuses what it left behind;
    /// [`ErrorKind::Broken`] for `import` when the graph was invalid from the start.
    pub fn run(
        &self,
        pipeline: &Pipeline,
        graph: &mut Graph,
        weights: &mut WeightStore,
        sink: &mut dyn FnMut(Event<'_>),
    ) -> Result<Report> {
        self.run_calibrated(pipeline, graph, weights, None, sink)
    }

    /// As [`Manager::run`], with someone who runs the model for the passes that ask.
    ///
    /// # Errors
    /// As [`Manager::run`].
    pub fn run_calibrated(
        &self,
        pipeline: &Pipeline,
        graph: &mut Graph,
        weights: &mut WeightStore,
        calibrator: Option<&mut dyn Calibrator>,
        sink: &mut dyn FnMut(Event<'_>),
    ) -> Result<Report> {
        // Lifetimes of trait objects only shorten where they are coerced.
        let calibrator: Option<&mut dyn Calibrator> = match calibrator {
            Some(c) => Some(&mut *c),
            None => None,
        };
        let surroundings = Surroundings { calibrator, ..Surroundings::default() };
        self.run_with(pipeline, graph, weights, surroundings, sink)
    }

    /// As [`Manager::run`], with everything that passes may use. When a pass fails, graph and weights are as they were before it.
    ///
    /// # Errors
    /// As [`Manager::run`]; [`ErrorKind::Cancelled`].
    pub fn run_with(
        &self,
        pipeline: &Pipeline,
        graph: &mut Graph,
        weights: &mut WeightStore,
        mut surroundings: Surroundings<'_>,
        sink: &mut dyn FnMut(Event<'_>),
    ) -> Result<Report> {
        if let PrintAfter::Passes(names) = &self.print_after {
            for name in names {
                if !pipeline.steps.iter().any(|s| s.decl.name == name) {
                    let known = pipeline.steps.iter().map(|s| s.decl.name);
                    let kind = ErrorKind::UnknownStop { name: name.clone(), nearest: nearest(name, known) };
                    return Err(Error::new(kind));
                }
            }
        }
        if self.verify {
            attar_ir::verify(graph, Some(weights)).map_err(|problem| {
                let text = attar_ir::text::print(graph);
                let (before, after) = (text.clone(), text);
                Error::new(ErrorKind::Broken {
                    pass: "import".to_owned(),
                    rewrite: None,
                    problem,
                    before,
                    after,
                })
            })?;
        }
        if self.print_after == PrintAfter::All {
            sink(Event::Dump(Dump { index: 0, name: "import", text: attar_ir::text::print(graph) }));
        }
        let mut report = Report::default();
        let mut fuel = self.fuel;
        let total = pipeline.steps.len();
        for (i, step) in pipeline.steps.iter().enumerate() {
            let decl = step.decl;
            if let Some(Stop::Phase(last)) = self.stop_after
                && decl.phase > last
            {
                report.stopped = true;
                break;
            }
            sink(Event::Started { index: i + 1, total, decl });
            let (before, held) = (graph.clone(), weights.checkpoint());
            let ran = self.run_step(
                i,
                step,
                graph,
                weights,
                &mut surroundings,
                &mut fuel,
                &mut report.metrics,
                &before,
                sink,
            );
            let pass = match ran {
                Ok(pass) => pass,
                Err(e) => {
                    *graph = before;
                    weights.restore(held);
                    return Err(e);
                }
            };
            sink(Event::Finished(&pass));
            report.passes.push(pass);
            let wanted = match &self.print_after {
                PrintAfter::Nothing => false,
                PrintAfter::Passes(names) => names.iter().any(|n| n == decl.name),
                PrintAfter::All => true,
            };
            if wanted {
                sink(Event::Dump(Dump { index: i + 1, name: decl.name, text: attar_ir::text::print(graph) }));
            }
            if matches!(&self.stop_after, Some(Stop::Pass(name)) if name == decl.name) {
                report.stopped = true;
                break;
            }
        }
        Ok(report)
    }

    #[expect(clippy::too_many_arguments, reason = "the whole state of a run, passed on once")]
    fn run_step(
        &self,
        index: usize,
        step: &Step,
        graph: &mut Graph,
        weights: &mut WeightStore,
        surroundings: &mut Surroundings<'_>,
        fuel: &mut Fuel,
        metrics: &mut Vec<Metric>,
        before: &Graph,
        sink: &mut dyn FnMut(Event<'_>),
    ) -> Result<PassReport> {
        let decl = step.decl;
        let nodes_before = graph.len();
        let sink = RefCell::new(sink);
        let tell = |event: Event<'_>| (*sink.borrow_mut())(event);
        let mut progress = |what: &str, done: u64, total: u64| {
            tell(Event::Progress { decl, what, done, total });
        };
        let mut notes = |level: NoteLevel, text: &str| tell(Event::Note { decl, level, text });
        let seed = self.seed.wrapping_add(index as u64);
        let mut cx = PassCx::new(decl, weights, &step.tensors, fuel, metrics, &mut progress, seed)
            .with_notes(&mut notes);
        if let Some(calibrator) = &mut surroundings.calibrator {
            cx = cx.with_calibrator(&mut **calibrator);
        }
        if let Some(journal) = surroundings.journal {
            cx = cx.with_journal(journal);
        }
        if let Some(runner) = &mut surroundings.runner {
            cx = cx.with_runner(&mut **runner);
        }
        if let Some(cancel) = surroundings.cancel {
            cx = cx.with_cancel(cancel);
        }
        cx.check_cancelled()?;
        let started = Instant::now();
        (decl.run)(&step.options, graph, &mut cx).map_err(|e| e.in_pass(decl.name))?;
        let time = started.elapsed();
        // A pass that was not allowed to do more has not done what it is for.
        cx.check_cancelled()?;
        let (rewrites, last_rewrite) = (cx.rewrites(), cx.last_rewrite().map(str::to_owned));
        if self.verify {
            attar_ir::verify(graph, Some(weights)).map_err(|problem| {
                Error::new(ErrorKind::Broken {
                    pass: decl.name.to_owned(),
                    rewrite: last_rewrite.clone(),
                    problem,
                    before: attar_ir::text::print(before),
                    after: attar_ir::text::print(graph),
                })
            })?;
        }
        Ok(PassReport {
            name: decl.name,
            phase: decl.phase,
            rewrites,
            last_rewrite,
            nodes_before,
            nodes_after: graph.len(),
            time,
        })
    }
}
