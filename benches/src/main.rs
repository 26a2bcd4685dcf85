//! Kernels against the limits of the machine they run on.
//!
//! A decode kernel is bound by reading weights, so its bytes per second are set beside those of a loop that only reads
//! the same memory; a prefill kernel is bound by multiplying, so its operations per second are set beside those of a
//! loop that only issues the instruction it is built on, on registers. Both are measured in turns with the kernel: a
//! disturbed machine disturbs both. Whole models are measured by `attar bench`, other engines by `benches/peers`.

mod attention;
mod codes;
mod linear;
mod memory;
mod peak;
mod read;
mod row_kernels;
mod shapes;
mod table;
mod timing;

use anyhow::Result;
use attar_codegen_cpu::Target;
use attar_format::FormatRef;
use clap::{Args, Parser, Subcommand};
use serde::Serialize;
use shapes::Model;
use std::io::Write;
use timing::Effort;

#[derive(Parser, Debug)]
#[command(
    name = "attar-benches",
    about = "Kernels against what the machine can do",
    after_help = "Examples:
  cargo run --release -p attar-benches -- limits --threads 1,2
  cargo run --release -p attar-benches -- kernels --only linear --model smollm2 --format n4 --rows 1,512
  cargo run --release -p attar-benches -- kernels --only attention --target x86-64-v4 --json"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Read bandwidth and the rates of single instructions
    Limits(Limits),
    /// Read bandwidth alone, of memory too large for any cache
    Bandwidth(Bandwidth),
    /// Kernels as fractions of these
    Kernels(Kernels),
    /// Choosing codes of one matrix by the second moment of its inputs
    Codes(codes::Codes),
}

#[derive(Args, Debug)]
struct Limits {
    /// Threads; several counts separated by commas
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1")]
    threads: Vec<usize>,
    #[command(flatten)]
    effort: Effort,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
struct Bandwidth {
    /// Threads
    #[arg(long, value_name = "N", default_value_t = 1)]
    threads: usize,
    /// Memory to read
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    mib: usize,
    #[command(flatten)]
    effort: Effort,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

/// Which kernels, and how.
#[derive(Args, Debug)]
struct Kernels {
    /// Only kinds of kernels: linear, attention, row; several separated by commas
    #[arg(long, value_name = "KIND", value_delimiter = ',', default_value = "linear,attention,row")]
    only: Vec<Kind>,
    /// Whose shapes: smollm2, 1b
    #[arg(long, value_name = "MODEL", value_delimiter = ',', default_value = "smollm2,1b")]
    model: Vec<Model>,
    /// Weight formats (default: all)
    #[arg(long, value_name = "FORMAT", value_delimiter = ',', value_parser = format_named)]
    format: Vec<FormatRef>,
    /// Code targets (default: all that run here)
    #[arg(long, value_name = "TARGET", value_delimiter = ',', value_parser = target_named)]
    target: Vec<Target>,
    /// Rows of activations
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1,2,4,8,16,512")]
    rows: Vec<usize>,
    /// Threads
    #[arg(long, value_name = "N", default_value_t = 1)]
    threads: usize,
    /// Decode kernels go round copies of their weight that together take this much, so that caches do not keep them; 0
    /// for one copy
    #[arg(long, value_name = "MIB", default_value_t = 192)]
    footprint: usize,
    /// Prefetch distance in bytes that kernels are given
    #[arg(long, value_name = "BYTES", default_value_t = 4096)]
    prefetch: usize,
    /// Positions of a span of attention, a multiple of 32; as many as the context and the prompt have together compute all scores
    /// of a row before its softmax
    #[arg(long, value_name = "N", default_value_t = 256)]
    span: usize,
    #[command(flatten)]
    effort: Effort,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Kind {
    Linear,
    Attention,
    Row,
}

/// One measurement.
#[derive(Debug, Serialize)]
struct Measured {
    kernel: String,
    target: &'static str,
    threads: usize,
    rows: usize,
    /// Of one launch.
    microseconds: f64,
    /// What bounds it, in G per second: bytes or operations.
    rate: f64,
    unit: &'static str,
    /// The limit of the same unit, measured in turns with it; `None` where this machine has no such loop.
    limit: Option<f64>,
    /// What the limit is.
    limit_is: String,
    /// `rate / limit`.
    fraction: Option<f64>,
}

fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Limits(options) => limits(&options),
        Command::Bandwidth(options) => bandwidth(&options),
        Command::Kernels(options) => kernels(&options),
        Command::Codes(options) => codes::run(&options),
    }
}

fn format_named(name: &str) -> Result<FormatRef, String> {
    attar_format::by_name(name).ok_or_else(|| {
        let all: Vec<&str> = attar_format::formats::ALL.iter().map(|f| f.name).collect();
        format!("no such format; there are {}", all.join(", "))
    })
}

fn target_named(name: &str) -> Result<Target, String> {
    let target = Target::by_name(name).ok_or_else(|| {
        let all: Vec<&str> = Target::ALL.iter().map(|t| t.name()).collect();
        format!("no such target; there are {}", all.join(", "))
    })?;
    if target.runs_here() { Ok(target) } else { Err("this machine does not run it".to_owned()) }
}

fn limits(options: &Limits) -> Result<()> {
    let mut rows = Vec::new();
    for &threads in &options.threads {
        for (what, mib) in [("L2", 0.5), ("L3", 8.0), ("memory", 512.0)] {
            let bytes = (mib * f64::from(1 << 20)) as usize;
            let region = memory::Region::filled(bytes * threads)?;
            let rate = read::bandwidth(region.bytes(), threads, &options.effort) / 1e9;
            rows.push((format!("read, {what}"), threads, rate, "GB/s"));
        }
        for instruction in peak::Instruction::ALL {
            if let Some(rate) = instruction.rate(threads, &options.effort) {
                rows.push((instruction.name().to_owned(), threads, rate, "GOP/s"));
            }
        }
    }
    if options.json {
        let rows: Vec<_> = rows
            .iter()
            .map(|(what, threads, rate, unit)| {
                serde_json::json!({"limit": what, "threads": threads, "rate": rate, "unit": unit})
            })
            .collect();
        return print(&serde_json::to_string_pretty(&rows)?);
    }
    let head = ["limit", "threads", "rate", ""];
    let cells: Vec<Vec<String>> = rows
        .into_iter()
        .map(|(what, threads, rate, unit)| {
            vec![what, threads.to_string(), format!("{rate:.1}"), unit.to_owned()]
        })
        .collect();
    print(&table::aligned(&head, &cells))
}

fn bandwidth(options: &Bandwidth) -> Result<()> {
    let region = memory::Region::filled(options.mib << 20)?;
    let rate = read::bandwidth(region.bytes(), options.threads, &options.effort);
    if options.json {
        let answer =
            serde_json::json!({"threads": options.threads, "mib": options.mib, "bytes_per_second": rate});
        return print(&answer.to_string());
    }
    print(&format!("{:.1} GB/s with {} threads over {} MiB", rate / 1e9, options.threads, options.mib))
}

fn kernels(options: &Kernels) -> Result<()> {
    let targets = match options.target.as_slice() {
        [] => Target::ALL.into_iter().filter(|t| t.runs_here()).collect(),
        some => some.to_vec(),
    };
    let mut results = Vec::new();
    let mut keep = |measured: Measured| -> Result<()> {
        if !options.json {
            print(&line(&measured))?;
        }
        results.push(measured);
        Ok(())
    };
    for kind in &options.only {
        for &target in &targets {
            for &model in &options.model {
                match kind {
                    Kind::Linear => linear::run(options, model, target, &mut keep)?,
                    Kind::Attention => attention::run(options, model, target, &mut keep)?,
                    Kind::Row => row_kernels::run(options, model, target, &mut keep)?,
                }
            }
        }
    }
    if options.json {
        return print(&serde_json::to_string_pretty(&results)?);
    }
    Ok(())
}

/// One line of the table, printed as it is measured.
fn line(m: &Measured) -> String {
    let fraction = m.fraction.map_or("-".to_owned(), |f| format!("{:.0} %", f * 100.0));
    let limit = m.limit.map_or("-".to_owned(), |l| format!("{l:.1}"));
    format!(
        "{:<44} {:<18} {} thr  rows {:>3}  {:>9.1} us  {:>7.1} {:<5}  of {:>7} ({}): {}",
        m.kernel, m.target, m.threads, m.rows, m.microseconds, m.rate, m.unit, limit, m.limit_is, fraction
    )
}

fn print(text: &str) -> Result<()> {
    writeln!(std::io::stdout(), "{text}")?;
    Ok(())
}
