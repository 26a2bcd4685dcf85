//! Arguments about calibration text that several commands share.

use attar_compiler::{CalibrationOptions, CalibrationSource};
use clap::Args;
use std::path::PathBuf;

/// What calibration text is, and how much of it.
#[derive(Args, Clone, Debug)]
pub struct CalibrationArgs {
    /// Text to weigh errors by: `self` (the model writes it), `none`, or a file: text, or .jsonl with `text` or
    /// `messages` in each line
    #[arg(long, value_name = "WHAT", default_value = "self")]
    calibrate: String,
    /// Most windows of calibration text
    #[arg(long, value_name = "N", default_value_t = CalibrationOptions::WINDOWS)]
    calibration_windows: usize,
    /// Tokens of a window of calibration text
    #[arg(long, value_name = "N", default_value_t = CalibrationOptions::CONTEXT)]
    calibration_context: usize,
    /// Memory for intermediate values of calibration, e.g. 512M or 2G; what is more goes to a temporary file
    #[arg(long, value_name = "BYTES", default_value = "256M", value_parser = bytes)]
    max_memory: u64,
}

impl CalibrationArgs {
    /// The options they stand for.
    pub fn options(&self) -> CalibrationOptions {
        let source = match self.calibrate.as_str() {
            "self" => CalibrationSource::Sampled,
            "none" => CalibrationSource::None,
            file => CalibrationSource::File(PathBuf::from(file)),
        };
        CalibrationOptions {
            source,
            windows: self.calibration_windows,
            context: self.calibration_context,
            max_memory: self.max_memory,
        }
    }
}

/// A number of bytes with an optional K, M, G or T, each 1024 times the one before.
fn bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let power = match text[digits.len()..].to_ascii_lowercase().trim_end_matches("ib").trim_end_matches('b') {
        "" => 0,
        "k" => 1,
        "m" => 2,
        "g" => 3,
        "t" => 4,
        _ => return Err("expected a number with K, M, G or T, such as 512M".to_owned()),
    };
    let number: u64 =
        digits.parse().map_err(|_| "expected a number with K, M, G or T, such as 512M".to_owned())?;
    number.checked_mul(1 << (10 * power)).ok_or_else(|| "is more bytes than there are".to_owned())
}

#[cfg(test)]
mod tests {
    use super::bytes;

    #[test]
    fn sizes_are_read() {
        assert_eq!(bytes("1000"), Ok(1000));
        assert_eq!((bytes("512M"), bytes("2GiB"), bytes("3kb")), (Ok(512 << 20), Ok(2 << 30), Ok(3 << 10)));
        for wrong in ["", "M", "12x", "-1", "99999999999999T"] {
            assert!(bytes(wrong).is_err(), "{wrong}");
        }
    }
}
