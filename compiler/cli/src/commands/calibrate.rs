//! `attar calibrate MODEL`: statistics of a model's activations, to be used by any number of compiles.

use crate::calibration::CalibrationArgs;
use crate::failure::Result;
use crate::model::find_checkpoint;
use crate::terminal::{Terminal, bytes_text, seconds_text, table};
use attar_compiler::{CalibrateOptions, CalibrationReport, calibrate};
use clap::Args;
use std::path::PathBuf;

#[derive(Args, Debug)]
#[command(
    after_help = "The statistics are those of the uncompressed model. `attar compile --quantize n4` without --calibration is slower and a
little better: it takes each layer's from the model as compressed up to there.

Examples:
  attar calibrate smollm2-135m -o smollm2.statistics
  attar calibrate smollm2-135m --calibrate text.txt -o smollm2.statistics
  attar compile smollm2-135m --quantize n4 --calibration smollm2.statistics -o smollm2.attar"
)]
pub struct Calibrate {
    /// The checkpoint
    model: String,
    /// The file to write
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
    #[command(flatten)]
    calibration: CalibrationArgs,
    /// Threads to run with; never changes the statistics
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// Print a report as JSON
    #[arg(long)]
    json: bool,
}

impl Calibrate {
    /// Calibrates and reports.
    ///
    /// # Errors
    /// Those of the compiler.
    pub fn run(&self, terminal: Terminal) -> Result<()> {
        let options = CalibrateOptions {
            source: find_checkpoint(&self.model)?,
            calibration: self.calibration.options(),
            out: self.output.clone(),
            threads: self.threads,
        };
        let bar = terminal.spinner("starting");
        let result = calibrate(&options, &mut |what, done, total| {
            bar.set_message(format!("{what} ({done} of {total})"));
        });
        bar.finish_and_clear();
        let report = result?;
        if self.json {
            return terminal.json(&report);
        }
        terminal.line(outliers(&report))?;
        terminal.line(format_args!(
            "{}: {} inputs over {} windows ({} tokens) in {}\nwrote {} ({})",
            report.model,
            report.inputs,
            report.windows,
            report.tokens,
            seconds_text(report.seconds),
            self.output.display(),
            bytes_text(report.bytes)
        ))
    }
}

/// The inputs with the worst outliers.
fn outliers(report: &CalibrationReport) -> String {
    let head = ["INPUT OF", "CHANNEL", "LARGEST / RMS", "CHANNEL KURTOSIS", "KURTOSIS"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for o in &report.outliers {
        rows.push(vec![
            o.input.clone(),
            o.channel.to_string(),
            format!("{:.1}", o.largest_over_rms),
            format!("{:.1}", o.channel_kurtosis),
            format!("{:.1}", o.kurtosis),
        ]);
    }
    table(&rows)
}
