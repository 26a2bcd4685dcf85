//! `attar plan MODEL`: size, memory, speed and cost of a model in several formats, before any of them is compiled.

use crate::commands::compile::Kv;
use crate::failure::{Failure, Result};
use crate::model::find_checkpoint;
use crate::plan::{Machine, Prediction, Question, cache_path, profile};
use crate::terminal::{Terminal, bytes_text, table};
use attar_compiler::{describe, resolve_targets};
use attar_pass::Preset;
use clap::Args;
use serde::Serialize;

/// Above it repetitions differ so much that something else must have been running.
const NOISY: f64 = 0.2;

#[derive(Args, Debug)]
#[command(
    after_help = "MODEL is a folder with config.json and safetensors, a .gguf file, or a name that was pulled.

For each entry of --formats a model of the same shapes with made-up weights is compiled and run on this machine: size and
speed do not depend on the values. Large models are measured with a few layers. Results are kept in the cache folder;
--fresh measures again. Speeds are those of `attar bench`: a prompt of --prompt tokens at once, and --generate
tokens one by one.

--machine describes another machine instead: GB/s it reads from memory, GOP/s of int8 and GFLOP/s of f32 that all its
cores make, and the microseconds from one launch to the next. Estimated from them alone, speeds are rougher.

--price is what an hour costs in any currency, --watts what the machine draws while it computes; --pue and --carbon
turn that into energy and grams of CO2. Costs are of a million tokens.

Examples:
  attar plan smollm2-135m
  attar plan ./Qwen3-0.6B --formats n4,n4/n6,w8 --context 8192 --kv int8
  attar plan smollm2-135m --price 0.12 --watts 65 --carbon 380
  attar plan smollm2-135m --machine read=25,int8=400,f32=100 --json"
)]
pub struct Plan {
    /// The checkpoint
    model: String,
    /// Formats of the layers, each with those of embedding and head behind a slash where they are not the usual ones
    #[arg(long, value_name = "FORMATS", value_delimiter = ',', default_value = "bf16,w8,n5,n4,n3")]
    formats: Vec<String>,
    /// Tokens of context that memory is for, and that are there before generation is timed (default: memory for what the
    /// model was made for, but at most 8192; speed without)
    #[arg(long, value_name = "N")]
    context: Option<u32>,
    /// Tokens of the prompt
    #[arg(long, value_name = "N", default_value_t = 512)]
    prompt: usize,
    /// Tokens to generate
    #[arg(long, value_name = "N", default_value_t = 128)]
    generate: usize,
    /// Element of cached keys and values (default: f32 when all weights are f32, else f16)
    #[arg(long, value_name = "TYPE")]
    kv: Option<Kv>,
    /// What code is made for, as in `attar compile`
    #[arg(long, value_name = "TARGETS", value_delimiter = ',', default_value = "native")]
    target: Vec<String>,
    /// Threads to compute with (default: as many as the process may use)
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Estimate for a described machine: read=GB/s,int8=GOP/s,f32=GFLOP/s[,launch=µs]
    #[arg(long, value_name = "NUMBERS")]
    machine: Option<String>,
    /// Price of an hour
    #[arg(long, value_name = "X")]
    price: Option<f64>,
    /// Power in watts
    #[arg(long, value_name = "W")]
    watts: Option<f64>,
    /// Energy of the building per energy of the machine
    #[arg(long, value_name = "X", default_value_t = 1.2)]
    pue: f64,
    /// Grams of CO2 per kWh
    #[arg(long, value_name = "G", default_value_t = 445.0)]
    carbon: f64,
    /// Runs that count
    #[arg(long, value_name = "N", default_value_t = 3)]
    repetitions: usize,
    /// Measure again what was measured before
    #[arg(long)]
    fresh: bool,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report {
    model: String,
    parameters: u64,
    layers: usize,
    /// Tokens the cache is for.
    context: u64,
    prompt: usize,
    generate: usize,
    machine: Option<Machine>,
    plans: Vec<Row>,
}

#[derive(Serialize)]
struct Row {
    #[serde(flatten)]
    prediction: Prediction,
    /// Of a million tokens of prompt, and of a million generated.
    cost: Option<Costs>,
    energy: Option<Energy>,
}

#[derive(Serialize, Clone, Copy)]
struct Costs {
    prompt: f64,
    generated: f64,
}

#[derive(Serialize, Clone, Copy)]
struct Energy {
    prompt_kwh: f64,
    generated_kwh: f64,
    prompt_grams_co2: f64,
    generated_grams_co2: f64,
}

impl Plan {
    /// Measures or estimates, and prints.
    ///
    /// # Errors
    /// Those of the importer, the compiler and the engine; an input failure for options that make no sense.
    pub fn run(&self, terminal: Terminal) -> Result<()> {
        self.check()?;
        let mixes = self.formats.iter().map(|f| Preset::by_name(f));
        let mixes = mixes.collect::<attar_pass::Result<Vec<_>>>()?;
        let machine = self.machine.as_deref().map(Machine::parse).transpose()?;
        let source = find_checkpoint(&self.model)?;
        let model = describe(&source)?;
        let most = model.context_length as u64;
        let context = match self.context {
            None => most.min(8192),
            Some(n) if (1..=most).contains(&u64::from(n)) => u64::from(n),
            Some(n) => {
                return Err(Failure::input(format!(
                    "--context {n}: expected 1 to {most}, which the model was made for"
                )));
            }
        };
        let held = self.context.map_or(0, |c| (c as usize).saturating_sub(self.generate));
        let longest = self.prompt.max(held + self.generate) as u64;
        if longest > most {
            return Err(Failure::input(format!(
                "{longest} tokens are more than the {most} the model was made for; lower --prompt or --generate"
            )));
        }
        let question = Question {
            source,
            targets: resolve_targets(&self.target)?,
            kv: self.kv.map(Kv::element),
            threads: self.threads,
            prompt: self.prompt,
            generate: self.generate,
            context: held,
            repetitions: self.repetitions,
        };
        let spinner = terminal.spinner("starting");
        let mut plans = Vec::new();
        for mix in mixes {
            let path = cache_path(&question, &model, mix)?;
            if self.fresh && path.exists() {
                std::fs::remove_file(&path)?;
            }
            let profile =
                profile(&question, mix, &model, Some(&path), |what| spinner.set_message(what.to_owned()))?;
            let mut prediction = profile.predict(mix, &model, &question, context);
            if let Some(machine) = machine {
                let (prompt, generated) = machine.speeds(&model, &profile, mix, &prediction, &question);
                prediction.prompt_tokens_per_second = Some(prompt);
                prediction.tokens_per_second = Some(generated);
                prediction.spread = None;
            }
            plans.push(self.row(prediction));
        }
        spinner.finish_and_clear();
        let (name, parameters, layers) = (model.name, model.parameters, model.layers);
        let (prompt, generate) = (self.prompt, self.generate);
        let report = Report { model: name, parameters, layers, context, prompt, generate, machine, plans };
        if self.json {
            return terminal.json(&report);
        }
        terminal.line(render(&report))?;
        let noisy: Vec<&str> = report
            .plans
            .iter()
            .filter(|r| r.prediction.spread.is_some_and(|s| s > NOISY))
            .map(|r| r.prediction.formats.as_str())
            .collect();
        if !noisy.is_empty() {
            terminal.note(format!(
                "repetitions of {} differed by more than {:.0} %: something else was running; measure again with --fresh",
                noisy.join(", "),
                NOISY * 100.0
            ));
        }
        Ok(())
    }

    fn check(&self) -> Result<()> {
        let positive = [("--price", self.price), ("--watts", self.watts), ("--pue", Some(self.pue))];
        for (flag, value) in positive.into_iter().chain([("--carbon", Some(self.carbon))]) {
            if let Some(v) = value.filter(|v| !(v.is_finite() && *v >= 0.0)) {
                return Err(Failure::input(format!("{flag} {v}: expected a number that is not negative")));
            }
        }
        if self.prompt == 0 || self.generate == 0 || self.repetitions == 0 {
            return Err(Failure::input("--prompt, --generate and --repetitions must be above 0"));
        }
        if self.threads.is_some_and(|n| !(1..=1024).contains(&n)) {
            return Err(Failure::input("--threads: expected 1 to 1024"));
        }
        Ok(())
    }

    fn row(&self, prediction: Prediction) -> Row {
        let speeds = prediction.prompt_tokens_per_second.zip(prediction.tokens_per_second);
        // Seconds of a million tokens.
        let seconds = speeds.map(|(p, g)| (1e6 / p, 1e6 / g));
        let cost = self
            .price
            .zip(seconds)
            .map(|(price, (p, g))| Costs { prompt: price / 3600.0 * p, generated: price / 3600.0 * g });
        let energy = self.watts.zip(seconds).map(|(watts, (p, g))| {
            let kwh = |seconds: f64| watts * self.pue * seconds / 3.6e6;
            Energy {
                prompt_kwh: kwh(p),
                generated_kwh: kwh(g),
                prompt_grams_co2: kwh(p) * self.carbon,
                generated_grams_co2: kwh(g) * self.carbon,
            }
        });
        Row { prediction, cost, energy }
    }
}

fn render(r: &Report) -> String {
    let mut heading = vec![
        "FORMATS".to_owned(),
        "FILE".to_owned(),
        "BITS/WEIGHT".to_owned(),
        format!("KV@{}", r.context),
        "MEMORY".to_owned(),
        format!("PP{} T/S", r.prompt),
        format!("TG{} T/S", r.generate),
    ];
    if r.plans.iter().any(|p| p.cost.is_some()) {
        heading.extend(["COST PROMPT/1M", "COST GENERATED/1M"].map(str::to_owned));
    }
    if r.plans.iter().any(|p| p.energy.is_some()) {
        heading.extend(["KWH PROMPT/1M", "KWH GENERATED/1M", "CO2 GENERATED/1M"].map(str::to_owned));
    }
    let mut rows = vec![heading];
    let speed = |s: Option<f64>| s.map_or("-".to_owned(), |s| format!("{s:.1}"));
    for Row { prediction: p, cost, energy } in &r.plans {
        let mut row = vec![
            p.formats.clone(),
            bytes_text(p.file_bytes),
            format!("{:.2}", p.bits_per_weight),
            bytes_text(p.kv_bytes),
            bytes_text(p.memory_bytes),
            speed(p.prompt_tokens_per_second),
            speed(p.tokens_per_second),
        ];
        if let Some(c) = cost {
            row.extend([format!("{:.4}", c.prompt), format!("{:.4}", c.generated)]);
        }
        if let Some(e) = energy {
            row.extend([
                format!("{:.4}", e.prompt_kwh),
                format!("{:.4}", e.generated_kwh),
                format!("{:.1} g", e.generated_grams_co2),
            ]);
        }
        rows.push(row);
    }
    let measured =
        if r.machine.is_some() { "estimated for the machine described" } else { "measured on this machine" };
    format!(
        "{}: {:.1} M parameters, {} layers; {measured}\n{}",
        r.model,
        r.parameters as f64 / 1e6,
        r.layers,
        table(&rows)
    )
}
