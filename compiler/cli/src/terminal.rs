//! Standard output, notes and progress.
//!
//! **Invariant:** what a program may read goes to standard output; everything for eyes (notes, progress bars) goes to
//! standard error and is silent with `--quiet`.

use crate::failure::Result;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::fmt;
use std::io::{self, Write};
use std::time::Duration;

/// How to speak to the user.
#[derive(Clone, Copy, Debug)]
pub struct Terminal {
    /// No notes, no progress.
    pub quiet: bool,
}

impl Terminal {
    /// Writes one line to standard output.
    ///
    /// # Errors
    /// When standard output cannot be written.
    pub fn line(&self, text: impl fmt::Display) -> Result<()> {
        Ok(writeln!(io::stdout().lock(), "{text}")?)
    }

    /// Writes text without a line end and shows it at once.
    ///
    /// # Errors
    /// When standard output cannot be written.
    pub fn stream(&self, text: &str) -> Result<()> {
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes())?;
        Ok(out.flush()?)
    }

    /// Writes a value as indented JSON to standard output.
    ///
    /// # Errors
    /// When standard output cannot be written.
    pub fn json(&self, value: &impl serde::Serialize) -> Result<()> {
        let text = serde_json::to_string_pretty(value)?;
        self.line(text)
    }

    /// Tells the user something on standard error.
    pub fn note(&self, text: impl fmt::Display) {
        if !self.quiet {
            // Nobody is left to tell when standard error is gone.
            let _ = writeln!(io::stderr().lock(), "{text}");
        }
    }

    /// A bar for `total` steps.
    pub fn steps(&self, total: u64, what: &str) -> ProgressBar {
        self.bar(Some(total), what, "{msg} [{bar:30}] {pos}/{len} {prefix}")
    }

    /// A bar for bytes; a counter when the total is unknown.
    pub fn bytes(&self, total: Option<u64>, what: &str) -> ProgressBar {
        let template = match total {
            Some(_) => "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} eta {eta}",
            None => "{msg} {spinner} {bytes} {bytes_per_sec}",
        };
        self.bar(total, what, template)
    }

    /// A moving sign for work of unknown length.
    pub fn spinner(&self, what: &str) -> ProgressBar {
        let bar = self.bar(None, what, "{spinner} {msg}");
        if !bar.is_hidden() {
            bar.enable_steady_tick(Duration::from_millis(120));
        }
        bar
    }

    fn bar(&self, total: Option<u64>, what: &str, template: &str) -> ProgressBar {
        let target = if self.quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        ProgressBar::with_draw_target(total, target).with_style(style).with_message(what.to_owned())
    }
}

/// `123.4 MB`: decimal units, as disks and downloads count.
pub fn bytes_text(bytes: u64) -> String {
    const UNITS: [(&str, f64); 4] = [("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)];
    for (unit, size) in UNITS {
        if bytes as f64 >= size {
            return format!("{:.1} {unit}", bytes as f64 / size);
        }
    }
    format!("{bytes} B")
}

/// `1.24 s`, `35.0 ms`.
pub fn seconds_text(seconds: f64) -> String {
    if seconds >= 1.0 { format!("{seconds:.2} s") } else { format!("{:.1} ms", seconds * 1e3) }
}

/// Rows of text in columns, the first row being the heading.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut out = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, w) in row.iter().zip(&widths) {
            let pad = w - cell.chars().count() + 2;
            line.push_str(cell);
            line.push_str(&" ".repeat(pad));
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out.truncate(out.trim_end().len());
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_well() {
        assert_eq!(bytes_text(999), "999 B");
        assert_eq!(bytes_text(1_500), "1.5 kB");
        assert_eq!(bytes_text(98_362_432), "98.4 MB");
        assert_eq!(seconds_text(0.0123), "12.3 ms");
    }

    #[test]
    fn columns_line_up() {
        let rows = [["a", "bb"], ["ccc", "d"]].map(|r| r.map(str::to_owned).to_vec());
        assert_eq!(table(&rows), "a    bb\nccc  d");
    }
}
