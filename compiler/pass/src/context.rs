//! What a pass may use while it runs.

use crate::calibration::{Calibrator, GainGradient, InputDrift, InputStatistics, Part, PartGradient};
use crate::decl::{Options, PassDecl};
use crate::error::{Error, ErrorKind, Result};
use crate::globs::TensorGlobs;
use crate::journal::Journal;
use crate::metrics::{Metric, MetricValue};
use crate::model_runner::ModelRunner;
use attar_ir::{Graph, NodeId, OpKind, ValueId, WeightName, WeightStore};
use std::borrow::Cow;
use std::sync::atomic::{AtomicBool, Ordering};

/// How many rewrites are still allowed: halving it finds the one that breaks a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fuel {
    left: Option<u64>,
}

impl Fuel {
    pub const UNLIMITED: Fuel = Fuel { left: None };

    pub fn limited(rewrites: u64) -> Fuel {
        Fuel { left: Some(rewrites) }
    }

    fn burn(&mut self) -> bool {
        match &mut self.left {
            None => true,
            Some(0) => false,
            Some(n) => {
                *n -= 1;
                true
            }
        }
    }
}

/// How much a note of a pass matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoteLevel {
    /// For whoever writes passes.
    Debug,
    Info,
    Warning,
}

/// Hears what passes have to say.
pub type Notes<'a> = dyn FnMut(NoteLevel, &str) + 'a;

/// A weight a pass is asked to look at.
#[derive(Clone, Debug, PartialEq)]
pub struct Subject {
    pub name: WeightName,
    /// Weight nodes that refer to it, by id.
    pub nodes: Vec<NodeId>,
    /// Named one by one, not caught by a wildcard.
    pub explicit: bool,
}

/// What a pass may use.
pub struct PassCx<'a> {
    /// The tensors behind the graph's `weight` nodes.
    pub weights: &'a mut WeightStore,
    /// Which of them the recipe means.
    pub tensors: &'a TensorGlobs,
    /// For passes that draw random numbers: differs between steps, not between runs.
    pub seed: u64,
    pass: &'static str,
    fuel: &'a mut Fuel,
    metrics: &'a mut Vec<Metric>,
    progress: &'a mut dyn FnMut(&str, u64, u64),
    calibrator: Option<&'a mut dyn Calibrator>,
    journal: Option<&'a dyn Journal>,
    runner: Option<&'a mut dyn ModelRunner>,
    notes: Option<&'a mut Notes<'a>>,
    cancel: Option<&'a AtomicBool>,
    /// Done and total as the pass told them last.
    told: (u64, u64),
    rewrites: u64,
    last_rewrite: Option<String>,
}

impl<'a> PassCx<'a> {
    /// A context for one run of one pass. `progress` is told what is being done, and how many of how many are
    /// done.
    pub fn new(
        decl: &'static PassDecl,
        weights: &'a mut WeightStore,
        tensors: &'a TensorGlobs,
        fuel: &'a mut Fuel,
        metrics: &'a mut Vec<Metric>,
        progress: &'a mut dyn FnMut(&str, u64, u64),
        seed: u64,
    ) -> PassCx<'a> {
        PassCx {
            weights,
            tensors,
            seed,
            pass: decl.name,
            fuel,
            metrics,
            progress,
            calibrator: None,
            journal: None,
            runner: None,
            notes: None,
            cancel: None,
            told: (0, 0),
            rewrites: 0,
            last_rewrite: None,
        }
    }

    /// The same context with someone to run the model.
    #[must_use]
    pub fn with_calibrator(mut self, calibrator: &'a mut dyn Calibrator) -> PassCx<'a> {
        self.calibrator = Some(calibrator);
        self
    }

    /// The same context with a journal.
    #[must_use]
    pub fn with_journal(mut self, journal: &'a dyn Journal) -> PassCx<'a> {
        self.journal = Some(journal);
        self
    }

    /// The same context with the model at work.
    #[must_use]
    pub fn with_runner(mut self, runner: &'a mut dyn ModelRunner) -> PassCx<'a> {
        self.runner = Some(runner);
        self
    }

    /// The same context with someone who reads what passes have to say.
    #[must_use]
    pub fn with_notes(mut self, notes: &'a mut Notes<'a>) -> PassCx<'a> {
        self.notes = Some(notes);
        self
    }

    /// The same context with a flag that stops the pass: no further rewrite is allowed, and questions are refused.
    #[must_use]
    pub fn with_cancel(mut self, cancel: &'a AtomicBool) -> PassCx<'a> {
        self.cancel = Some(cancel);
        self
    }

    /// Whether the user stops the compile.
    pub fn is_cancelled(&self) -> bool {
        self.cancel.is_some_and(|c| c.load(Ordering::Relaxed))
    }

    /// Tells the user something.
    pub fn note(&mut self, level: NoteLevel, text: &str) {
        if let Some(notes) = &mut self.notes {
            notes(level, text);
        }
    }

    /// Whether [`PassCx::recall`] is likely to find something.
    pub fn has_kept(&self, key: &str) -> bool {
        self.journal.is_some_and(|j| j.has(&self.journal_key(key)))
    }

    /// What the same step kept under a key before it was interrupted, see [`Journal`].
    pub fn recall(&self, key: &str) -> Option<Vec<u8>> {
        self.journal.and_then(|j| j.get(&self.journal_key(key)))
    }

    /// Keeps a result that took long.
    pub fn keep(&self, key: &str, value: &[u8]) {
        if let Some(journal) = self.journal {
            journal.put(&self.journal_key(key), value);
        }
    }

    /// Two steps may run the same pass; their seeds tell them apart.
    fn journal_key(&self, key: &str) -> String {
        format!("{}/{:016x}/{key}", self.pass, self.seed)
    }

    /// Whether [`PassCx::input_statistics`] can be asked.
    pub fn is_calibrated(&self) -> bool {
        self.calibrator.is_some()
    }

    /// What reaches a value when the model runs over calibration text, see [`Calibrator::input_statistics`].
    ///
    /// # Errors
    /// [`ErrorKind::Uncalibrated`] when nobody runs the model; those of the calibrator.
    pub fn input_statistics(&mut self, graph: &Graph, input: ValueId) -> Result<InputStatistics> {
        self.ask(|calibrator, weights, parts| calibrator.input_statistics(graph, weights, input, parts))
    }

    /// How large each column of a value gets, see [`Calibrator::input_sizes`].
    ///
    /// # Errors
    /// [`ErrorKind::Uncalibrated`] when nobody runs the model; those of the calibrator.
    pub fn input_sizes(&mut self, graph: &Graph, input: ValueId) -> Result<Vec<f32>> {
        self.ask(|calibrator, weights, parts| calibrator.input_sizes(graph, weights, input, parts))
    }

    /// How far a value has drifted from the uncompressed model's, see [`Calibrator::input_drift`].
    ///
    /// # Errors
    /// [`ErrorKind::Uncalibrated`] when nobody runs the model; those of the calibrator.
    pub fn input_drift(
        &mut self,
        graph: &Graph,
        input: ValueId,
        sum: Option<ValueId>,
    ) -> Result<Option<InputDrift>> {
        self.ask(|calibrator, weights, parts| calibrator.input_drift(graph, weights, input, sum, parts))
    }

    /// Makes tokens count by what predictions depend on, see [`Calibrator::weigh_tokens`].
    ///
    /// # Errors
    /// [`ErrorKind::Uncalibrated`] when nobody runs the model; those of the calibrator.
    pub fn weigh_tokens(&mut self, graph: &Graph, power: f64) -> Result<bool> {
        self.ask(|calibrator, weights, parts| calibrator.weigh_tokens(graph, weights, power, parts))
    }

    /// Runs the model up to a part of it, see [`Calibrator::enter_part`].
    ///
    /// # Errors
    /// [`ErrorKind::Uncalibrated`] when nobody runs the model; those of the calibrator.
    pub fn enter_part(&mut self, graph: &Graph, part: Part) -> Result<bool> {
        self.ask(|calibrator, weights, parts| calibrator.enter_part(graph, weights, part, parts))
    }

    /// How far the part entered last is from the uncompressed one, see [`Calibrator::part_gradient`].
    ///
    /// # Errors
    /// [`ErrorKind::Uncalibrated`] when nobody runs the model; those of the calibrator.
    pub fn part_gradient(
        &mut self,
        graph: &Graph,
        changed: &[(WeightName, Vec<f32>)],
        batch: Option<u64>,
    ) -> Result<PartGradient> {
        self.ask(|calibrator, weights, parts| calibrator.part_gradient(graph, weights, changed, batch, parts))
    }

    /// Goes back to the beginning of the part entered last, see [`Calibrator::leave_part`].
    ///
    /// # Errors
    /// [`ErrorKind::Uncalibrated`] when nobody runs the model; those of the calibrator.
    pub fn leave_part(&mut self) -> Result<()> {
        self.ask(|calibrator, _, _| calibrator.leave_part())
    }

    /// How far predictions are from the uncompressed model's, and which way factors lead nearer, see
    /// [`Calibrator::gain_gradient`].
    ///
    /// # Errors
    /// [`ErrorKind::Uncalibrated`] when nobody runs the model; those of the calibrator.
    pub fn gain_gradient(
        &mut self,
        graph: &Graph,
        gains: &[(WeightName, Vec<f32>)],
        windows: std::ops::Range<usize>,
        slopes: bool,
    ) -> Result<Option<GainGradient>> {
        self.ask(|calibrator, weights, parts| {
            calibrator.gain_gradient(graph, weights, gains, (windows, slopes), parts)
        })
    }

    /// A window of calibration text and how many there are, see [`Calibrator::window`].
    ///
    /// # Errors
    /// [`ErrorKind::Uncalibrated`] when nobody runs the model; those of the calibrator.
    pub fn calibration_window(&mut self, index: usize) -> Result<(Vec<u32>, usize)> {
        self.ask(|calibrator, _, parts| calibrator.window(index, parts))
    }

    /// Tokens of a text, see [`ModelRunner::tokenize`].
    ///
    /// # Errors
    /// [`ErrorKind::NoModel`] when there is no model to run; those of the runner.
    pub fn tokenize(&mut self, text: &str) -> Result<Vec<u32>> {
        match &mut self.runner {
            Some(runner) => runner.tokenize(text),
            None => Err(Error::new(ErrorKind::NoModel)),
        }
    }

    /// A value while the model runs over tokens, see [`ModelRunner::value`].
    ///
    /// # Errors
    /// [`ErrorKind::NoModel`] when there is no model to run; those of the runner.
    pub fn run_model(&mut self, graph: &Graph, tokens: &[u32], value: ValueId) -> Result<Vec<f32>> {
        self.check_cancelled()?;
        match &mut self.runner {
            Some(runner) => runner.value(graph, self.weights, tokens, value),
            None => Err(Error::new(ErrorKind::NoModel)),
        }
    }

    pub(crate) fn check_cancelled(&self) -> Result<()> {
        if self.is_cancelled() { Err(Error::new(ErrorKind::Cancelled)) } else { Ok(()) }
    }

    /// Runs another pass within this one, on its own tensors and options. Its rewrites are not counted: the pass that asks
    /// counts its own.
    pub(crate) fn run_within(
        &mut self,
        graph: &mut Graph,
        decl: &'static PassDecl,
        options: &Options,
        tensors: &TensorGlobs,
    ) -> Result<()> {
        let mut fuel = Fuel::UNLIMITED;
        let mut silent = |_: &str, _, _| {};
        let mut cx =
            PassCx::new(decl, self.weights, tensors, &mut fuel, self.metrics, &mut silent, self.seed);
        cx.cancel = self.cancel;
        (decl.run)(options, graph, &mut cx)
    }

    /// Records made so far by all passes.
    pub(crate) fn metrics(&self) -> &[Metric] {
        self.metrics
    }

    /// Asks the calibrator. The pass's own count of what is done goes on: parts of a question are no measure of the whole.
    fn ask<T>(
        &mut self,
        question: impl FnOnce(&mut dyn Calibrator, &WeightStore, &mut dyn FnMut(&str, u64, u64)) -> Result<T>,
    ) -> Result<T> {
        self.check_cancelled()?;
        let Some(calibrator) = self.calibrator.as_deref_mut() else {
            return Err(Error::new(ErrorKind::Uncalibrated));
        };
        let (progress, (done, total)) = (&mut *self.progress, self.told);
        let mut parts = |what: &str, part: u64, parts: u64| {
            progress(&format!("{what}, {part}/{parts}"), done, total);
        };
        question(calibrator, self.weights, &mut parts)
    }

    /// How far predictions move when weights change, see [`Calibrator::divergence`].
    ///
    /// # Errors
    /// [`ErrorKind::Uncalibrated`] when nobody runs the model; those of the calibrator.
    pub fn divergence(
        &mut self,
        graph: &Graph,
        from: Option<ValueId>,
        changed: &[(WeightName, Vec<f32>)],
    ) -> Result<f64> {
        self.ask(|calibrator, weights, parts| calibrator.divergence(graph, weights, from, changed, parts))
    }

    /// Asks leave for a rewrite and counts it. `site` says in a few words what is rewritten. When the answer is
    /// no (the fuel is spent, or the user stops the compile), the pass leaves that site alone.
    #[must_use]
    pub fn rewrite(&mut self, site: &str) -> bool {
        let yes = !self.is_cancelled() && self.fuel.burn();
        if yes {
            self.rewrites += 1;
            self.last_rewrite = Some(site.to_owned());
        }
        yes
    }

    /// Rewrites that were asked for and allowed; none means that graph and weights are as they were.
    pub fn rewrites(&self) -> u64 {
        self.rewrites
    }

    /// The rewrite counted last.
    pub fn last_rewrite(&self) -> Option<&str> {
        self.last_rewrite.as_deref()
    }

    /// Records measured values.
    pub fn metric<const N: usize>(&mut self, subject: &str, values: [(&'static str, MetricValue); N]) {
        let values = values.into_iter().map(|(name, value)| (Cow::Borrowed(name), value)).collect();
        let (pass, subject) = (self.pass.to_owned(), subject.to_owned());
        self.metrics.push(Metric { pass, subject, values, certified: false });
    }

    /// Records measured values that belong in the certificate, by names of the pass's own.
    pub(crate) fn certified_metric(&mut self, subject: &str, values: Vec<(String, MetricValue)>) {
        let values = values.into_iter().map(|(name, value)| (Cow::Owned(name), value)).collect();
        let (pass, subject) = (self.pass.to_owned(), subject.to_owned());
        self.metrics.push(Metric { pass, subject, values, certified: true });
    }

    /// Records why something was not done.
    pub fn refused(&mut self, subject: &str, reason: &str) {
        self.metric(subject, [("refused", reason.into())]);
    }

    /// Tells the user how far the pass is: `done` of `total`, now at `what`.
    pub fn progress(&mut self, what: &str, done: u64, total: u64) {
        self.told = (done, total);
        (self.progress)(what, done, total);
    }

    /// The graph's weights the recipe means, by first use.
    pub fn subjects(&self, graph: &Graph) -> Vec<Subject> {
        let mut subjects = graph_weights(graph);
        subjects.retain(|s| self.tensors.matches(&s.name));
        for s in &mut subjects {
            s.explicit = self.tensors.names_exactly(&s.name);
        }
        subjects
    }
}

/// The weights a graph uses, in topological order of their first node.
pub fn graph_weights(graph: &Graph) -> Vec<Subject> {
    let mut at = std::collections::BTreeMap::new();
    let mut subjects: Vec<Subject> = Vec::new();
    for id in graph.topo() {
        let OpKind::Weight(w) = graph.op(id) else { continue };
        let index = *at.entry(w.name.clone()).or_insert(subjects.len());
        match subjects.get_mut(index) {
            Some(s) => s.nodes.push(id),
            None => subjects.push(Subject { name: w.name.clone(), nodes: vec![id], explicit: false }),
        }
    }
    subjects
}
