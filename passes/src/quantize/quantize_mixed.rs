//! `quantize-mixed`: gives each weight matrix the format that serves the whole model best within a budget, and chooses codes
//! as `quantize-gptq` does.
//!
//! Before: `%w = weight @m : f32[N,K]`.   After: `%w = weight @m : n5[N,K]`, `n3[N,K]`, …
//! Matrices that meet the same values (q, k and v; gate and up) get one format, so that they can be stacked. For each such
//! unit the model runs over a little text with the unit alone rounded to few bits; the divergence of its predictions
//! over the unit's relative squared error is the unit's sensitivity. For a small error divergence is proportional to it
//! (Malinovskii et al. 2024, arXiv:2411.17525), so sensitivity times the error of a format foretells what the format costs,
//! and a knapsack (`allocation.rs`) divides the budget.
//! Preconditions: calibration by text, not by saved statistics; the rest as in `quantize-gptq`.
//! Numerics: lossy.   Cost: as `quantize-gptq`, and a run of the model over some hundred tokens for each unit.

use super::allocation::{Budget, Choice, Unmet, allocate};
use super::block_reconstruction::{BlockByBlock, Reconstruction};
use super::linear_inputs::{Site, sites};
use super::quantize_gptq::{self, Gptq};
use super::quantize_rtn::{self, CODED_FORMATS, Suitable};
use attar_format::{FormatRef, PackedLayout, by_name};
use attar_ir::{Graph, OpKind, WeightName};
use attar_pass::plugin::in_compiler;
use attar_pass::{Error, ErrorKind, PassCx, Result, Subject};
use attar_plugin::{About, Context, Numerics, Pass, Phase};
use std::collections::BTreeMap;

attar_plugin::options! {
    /// Options of the pass.
    pub(crate) struct Options {
        /// most bytes of the packed matrices; 0 when `max_kld` is the budget
        pub(crate) max_bytes: u64 = 0, int 0..=i64::MAX;
        /// most divergence from the uncompressed model that is foretold, in nats; 0 when `max_bytes` is the budget
        pub(crate) max_kld: f64 = 0.0, float 0.0..=100.0;
        /// format of fewest bits that a matrix may get
        pub(crate) coarsest: String = "n2", of CODED_FORMATS;
        /// format of most bits that a matrix may get
        pub(crate) finest: String = "w8", of CODED_FORMATS;
        /// share of what layers before have changed in a layer's inputs that its weights make up for
        pub(crate) correct_drift: f64 = quantize_gptq::FOLLOW, float 0.0..=1.0;
        /// power of what a token matters to predictions that it counts with; 0 counts all alike
        pub(crate) guidance: f64 = quantize_gptq::GUIDANCE, float 0.0..=1.0;
        /// steps of gradient descent over each decoder layer that holds matrices of at most 3 bits
        pub(crate) reconstruct_steps: usize = 0, int 0..=100_000;
    }
}

/// Divergence that choosing codes by calibration leaves of what rounding costs, on the careful side: what is foretold with it
/// was 1.1 to 1.6 times what was measured (docs/quality.md).
const LEFT_BY_CALIBRATION: f64 = 0.5;
/// Rows of a matrix from which the error of a format is estimated.
const SAMPLE_ROWS: usize = 96;

/// See the file's header.
pub(crate) struct QuantizeMixed;

attar_plugin::plugin! { passes: [QuantizeMixed] }

impl Pass for QuantizeMixed {
    type Options = Options;

    const ABOUT: About = About {
        name: "quantize-mixed",
        summary: "gives each matrix the format that serves the model best within a budget of bytes or divergence",
        phase: Phase::Compress,
        numerics: Numerics::Lossy,
        takes_tensors: true,
    };

    fn run(options: &Options, cx: &Context<'_>) -> attar_plugin::Result<()> {
        // It needs the divergence of predictions, and all that `quantize-gptq` needs.
        in_compiler(cx, |graph, cx| Mixed::new(options)?.run(graph, cx))
    }
}

struct Mixed {
    /// From few bits to many.
    formats: Vec<FormatRef>,
    budget: Budget,
    follow: f64,
    guidance: f64,
    reconstruction: Reconstruction,
}

/// Matrices that get one format together.
struct Unit {
    site: Site,
    suits: Vec<Suitable>,
    /// Bytes of each format, and the relative squared error of rounding to it.
    bytes: Vec<u64>,
    errors: Vec<f64>,
    /// Divergence per relative squared error.
    sensitivity: f64,
}

impl Unit {
    /// What was measured, for the journal.
    fn bytes(&self) -> Vec<u8> {
        let counts = self.bytes.iter().flat_map(|b| b.to_le_bytes());
        let numbers = self.errors.iter().chain([&self.sensitivity]).flat_map(|e| e.to_le_bytes());
        counts.chain(numbers).collect()
    }

    /// Takes back what was measured of so many formats; whether it could be.
    fn read(&mut self, bytes: &[u8], formats: usize) -> bool {
        let words = bytes.as_chunks::<8>().0;
        if words.len() != 2 * formats + 1 {
            return false;
        }
        let (counts, numbers) = words.split_at(formats);
        self.bytes = counts.iter().map(|b| u64::from_le_bytes(*b)).collect();
        self.errors = numbers[..formats].iter().map(|b| f64::from_le_bytes(*b)).collect();
        self.sensitivity = f64::from_le_bytes(numbers[formats]);
        true
    }
}

impl Mixed {
    fn new(options: &Options) -> Result<Mixed> {
        let bits = |name: &str| by_name(name).map_or(0.0, |f| f.bits_per_weight());
        let (low, high) = (bits(&options.coarsest), bits(&options.finest));
        let mut formats: Vec<FormatRef> = CODED_FORMATS
            .iter()
            .filter_map(|name| by_name(name))
            .filter(|f| (low..=high).contains(&f.bits_per_weight()))
            .collect();
        formats.sort_by(|a, b| a.bits_per_weight().total_cmp(&b.bits_per_weight()));
        let (bytes, kld) = (options.max_bytes, options.max_kld);
        let problem = match (bytes > 0, kld > 0.0) {
            (true, true) => Some("takes max_bytes or max_kld, not both"),
            (false, false) => Some("needs max_bytes or max_kld"),
            _ if formats.is_empty() => Some("coarsest has more bits than finest"),
            _ => None,
        };
        if let Some(problem) = problem {
            return Err(Error::new(ErrorKind::Budget { problem: problem.to_owned() }));
        }
        let budget = if bytes > 0 { Budget::Bytes(bytes) } else { Budget::Loss(kld / LEFT_BY_CALIBRATION) };
        let reconstruction = Reconstruction { steps: options.reconstruct_steps };
        Ok(Mixed {
            formats,
            budget,
            follow: options.correct_drift,
            guidance: options.guidance,
            reconstruction,
        })
    }

    fn run(&self, graph: &mut Graph, cx: &mut PassCx<'_>) -> Result<()> {
        let mut units = self.units(graph, cx)?;
        let count = units.len() as u64;
        // Three parts of about equal length: probes, and the codes, which take about twice as long.
        let total = 3 * count;
        for (i, unit) in units.iter_mut().enumerate() {
            let name = unit.site.subjects[0].name.clone();
            cx.progress(&format!("sensitivity of {name}"), i as u64, total);
            self.judge(graph, cx, unit).map_err(|e| e.at_tensor(&name))?;
        }
        let plan = self.plan(&units)?;
        quantize_gptq::weigh_tokens(graph, cx, self.guidance)?;
        let few = |choice: &usize| self.formats[*choice].code_bits() <= Reconstruction::FEW_BITS;
        let sites = units.iter().zip(&plan).map(|(unit, choice)| (&unit.site, few(choice)));
        let mut blocks = BlockByBlock::new(graph, self.reconstruction, sites);
        let matrices = units.iter().flat_map(|u| &u.site.subjects);
        let resumed = matrices.clone().filter(|s| cx.has_kept(&quantize_gptq::kept_as(&s.name))).count();
        if resumed > 0 {
            let all = matrices.count();
            cx.progress(&format!("resumed: {resumed} of {all} tensors"), count, total);
        }
        for (i, (unit, choice)) in units.iter().zip(&plan).enumerate() {
            blocks.before(graph, cx, &unit.site)?;
            let first = unit.site.subjects[0].name.clone();
            let format = self.formats[*choice];
            let gptq = Gptq::with_format(format, self.follow);
            cx.progress(&first, count + 2 * i as u64, total);
            // A matrix that no coded format fits stays with what does.
            let suited = |s: &Suitable| Suitable {
                format: if s.reason.is_some() { s.format } else { format },
                ..s.clone()
            };
            let suits: Vec<Suitable> = unit.suits.iter().map(suited).collect();
            let source = gptq.source(graph, cx, &unit.site, &suits).map_err(|e| e.at_tensor(&first))?;
            for (at, (subject, suitable)) in unit.site.subjects.iter().zip(&suits).enumerate() {
                cx.progress(&subject.name, count + 2 * i as u64, total);
                gptq.quantize(graph, cx, subject, suitable, source.of(at))
                    .map_err(|e| e.at_tensor(&subject.name))?;
                let foretold = LEFT_BY_CALIBRATION * unit.sensitivity * unit.errors[*choice];
                cx.metric(
                    &subject.name,
                    [
                        ("sensitivity", foretold.into()),
                        ("divergence_per_error", unit.sensitivity.into()),
                        ("why", self.why(unit, *choice).into()),
                    ],
                );
            }
            blocks.after(&unit.site);
        }
        blocks.finish(graph, cx)?;
        cx.progress("", total, total);
        Ok(())
    }

    fn units(&self, graph: &Graph, cx: &mut PassCx<'_>) -> Result<Vec<Unit>> {
        let mut suits = BTreeMap::new();
        let mut subjects: Vec<Subject> = Vec::new();
        for subject in cx.subjects(graph) {
            let suitable = quantize_rtn::suitable(self.formats[0], cx, &subject);
            if let Some(suitable) = suitable.map_err(|e| e.at_tensor(&subject.name))? {
                suits.insert(subject.name.clone(), suitable);
                subjects.push(subject);
            }
        }
        let unit = |site: Site| Unit {
            suits: site.subjects.iter().map(|s| suits[&s.name].clone()).collect(),
            site,
            bytes: Vec::new(),
            errors: Vec::new(),
            sensitivity: 0.0,
        };
        Ok(sites(graph, subjects).into_iter().map(unit).collect())
    }

    /// Measures what formats would do to a unit, and what that does to the model.
    fn judge(&self, graph: &Graph, cx: &mut PassCx<'_>, unit: &mut Unit) -> Result<()> {
        let key = format!("sensitivity/{}", unit.site.subjects[0].name);
        if let Some(bytes) = cx.recall(&key)
            && unit.read(&bytes, self.formats.len())
        {
            return Ok(());
        }
        let mut changed: Vec<(WeightName, Vec<f32>)> = Vec::new();
        let mut sums = vec![(0.0f64, 0.0f64); self.formats.len()];
        let mut bytes = vec![0u64; self.formats.len()];
        // The format that the model is tried with: few bits, so that the answer is no noise, but not so few that all is noise.
        let trial = self.formats.iter().position(|f| f.code_bits() >= 3).unwrap_or(0);
        for (subject, suitable) in unit.site.subjects.iter().zip(&unit.suits) {
            let Suitable { format, n, k, reason } = suitable;
            if reason.is_some() {
                let stored = PackedLayout::new(format, *n, *k).map_or(0, |l| l.total_bytes() as u64);
                bytes.iter_mut().for_each(|b| *b += stored);
                continue;
            }
            let weights = cx.weights.read_f32(&subject.name)?;
            let every = n.div_ceil(SAMPLE_ROWS).max(1);
            let sample: Vec<f32> = weights.chunks_exact(*k).step_by(every).flatten().copied().collect();
            for (i, format) in self.formats.iter().enumerate() {
                bytes[i] += PackedLayout::new(format, *n, *k).map_or(0, |l| l.total_bytes() as u64);
                if i == trial {
                    continue;
                }
                let rounded = quantize_rtn::encode(format, sample.len() / k, *k, true, &sample, None)?;
                add_errors(&mut sums[i], &sample, &rounded.decode(), every as f64);
            }
            let rounded = quantize_rtn::encode(self.formats[trial], *n, *k, true, &weights, None)?.decode();
            add_errors(&mut sums[trial], &weights, &rounded, 1.0);
            changed.push((subject.name.clone(), rounded));
        }
        unit.bytes = bytes;
        unit.errors =
            sums.iter().map(|(error, square)| if *square > 0.0 { error / square } else { 0.0 }).collect();
        let error = unit.errors[trial];
        if error > 0.0 && !changed.is_empty() {
            let divergence = cx.divergence(graph, first_read(graph, &unit.site), &changed)?;
            unit.sensitivity = divergence / error;
        }
        cx.keep(&key, &unit.bytes());
        Ok(())
    }

    fn plan(&self, units: &[Unit]) -> Result<Vec<usize>> {
        let choices: Vec<Vec<Choice>> = units
            .iter()
            .map(|u| {
                let loss = u.errors.iter().map(|e| u.sensitivity * e);
                u.bytes.iter().zip(loss).map(|(bytes, loss)| Choice { bytes: *bytes, loss }).collect()
            })
            .collect();
        allocate(&choices, self.budget).map_err(|unmet| {
            let problem = match unmet {
                Unmet::Bytes(fewest) => format!(
                    "max_bytes cannot be met: with {} for every matrix they take {fewest} bytes",
                    self.formats[0].name
                ),
                Unmet::Loss(least) => format!(
                    "max_kld cannot be met: with {} for every matrix it is foretold to be {:.2e}",
                    self.formats[self.formats.len() - 1].name,
                    LEFT_BY_CALIBRATION * least
                ),
            };
            Error::new(ErrorKind::Budget { problem })
        })
    }

    /// In a few words: what one step in either direction would have cost or gained.
    fn why(&self, unit: &Unit, choice: usize) -> String {
        let loss = |i: usize| LEFT_BY_CALIBRATION * unit.sensitivity * unit.errors[i];
        let step = |i: usize, sign: &str| {
            let bytes = unit.bytes[i].abs_diff(unit.bytes[choice]);
            let kld = (loss(i) - loss(choice)).abs();
            let less = if sign == "-" { "+" } else { "-" };
            format!("{}: {sign}{:.0} kB, KLD {less}{kld:.1e}", self.formats[i].name, bytes as f64 / 1e3)
        };
        let down = choice.checked_sub(1).map(|i| step(i, "-"));
        let up = (choice + 1 < self.formats.len()).then(|| step(choice + 1, "+"));
        down.into_iter().chain(up).collect::<Vec<_>>().join("; ")
    }
}

/// Adds squared errors and squared weights.
fn add_errors(sums: &mut (f64, f64), weights: &[f32], rounded: &[f32], times: f64) {
    let square = |v: f32| f64::from(v) * f64::from(v);
    sums.0 += times * weights.iter().zip(rounded).map(|(w, r)| square(w - r)).sum::<f64>();
    sums.1 += times * weights.iter().map(|w| square(*w)).sum::<f64>();
}

/// The first value that depends on the site's weights and needs nothing else that does: the input of its first linear layer,
/// or nothing, when something else reads the weights too.
fn first_read(graph: &Graph, site: &Site) -> Option<attar_ir::ValueId> {
    let of_linear =
        |(user, slot): &(attar_ir::NodeId, u16)| *slot == 1 && matches!(graph.op(*user), OpKind::Linear(_));
    let nodes = site.subjects.iter().flat_map(|s| &s.nodes);
    let all = nodes.into_iter().all(|n| graph.users(crate::pattern::out(*n)).iter().all(of_linear));
    site.inputs.first().copied().filter(|_| all)
}
