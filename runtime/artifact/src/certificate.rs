//! The certificate: how good the compressed model is, measured on held-out text by the compiler with the artifact it made.
//!
//! Statistics are those of llama-perplexity: `d` at a position is the Kullback-Leibler divergence of the two distributions
//! over the next token, `p` the probability that a model gives to the token that really follows. Numbers have five
//! significant digits. [`METRICS`] lists what a [`Requirement`] can name.

use crate::error::ErrorKind;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// Layout of the section that this crate writes, and the newest that it reads.
pub const VERSION: u32 = 1;
/// Longest certificate that is read, in bytes.
pub const MOST_BYTES: u64 = 16 << 20;

/// The contents of a certificate section. Unknown fields are ignored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Certificate {
    /// [`VERSION`].
    pub version: u32,
    /// Weights of the model that the artifact was compared with: `f32`, or `bf16` where the checkpoint holds no more.
    pub reference: String,
    /// Code target whose kernels ran.
    pub target: String,
    pub text: Text,
    /// Tokens of a window.
    pub context: usize,
    pub windows: usize,
    pub quality: Quality,
    /// Packed weights, in bytes.
    pub weight_bytes: u64,
    /// Of all packed weights together.
    pub bits_per_weight: f64,
    /// Error of each compressed tensor, where the pass that compressed it measured one.
    #[serde(default)]
    pub tensors: Vec<TensorError>,
    /// What passes of plugins measured, in the order they did.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub reported: Vec<Reported>,
}

/// A record of a pass about one subject.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reported {
    pub pass: String,
    /// Tensor or place it is about.
    pub subject: String,
    /// By name; units stand in the names.
    pub values: BTreeMap<String, ReportedValue>,
}

/// A value that a pass measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ReportedValue {
    Count(u64),
    Number(f64),
    Text(String),
}

/// The text that was predicted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Text {
    pub name: String,
    /// Of all its bytes, hexadecimal.
    pub blake3: String,
    pub bytes: u64,
    /// Tokens of the whole text; windows may cover only its beginning.
    pub tokens: u64,
}

/// One compressed tensor, by its name in the checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TensorError {
    pub name: String,
    pub format: String,
    pub bits_per_weight: f64,
    /// `|w - decoded| / |w|`.
    pub relative_error: f64,
    /// Mean divergence of the model with only this tensor, and those that meet the same values, compressed, in nats; where a
    /// pass has foretold it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sensitivity: Option<f64>,
}

/// A model compared with a reference on the same tokens. Fields ending in `_error` are standard errors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Quality {
    /// Tokens that were predicted.
    pub scores: u64,
    /// Perplexity of the model.
    pub ppl: f64,
    pub ppl_error: f64,
    /// Perplexity of the reference.
    pub ppl_reference: f64,
    pub ppl_reference_error: f64,
    /// `ln(ppl / ppl_reference)`; its error knows that both saw the same tokens.
    pub ln_ppl_ratio: f64,
    pub ln_ppl_ratio_error: f64,
    pub ppl_ratio: f64,
    pub ppl_ratio_error: f64,
    /// Mean of d, in nats.
    pub kld: f64,
    pub kld_error: f64,
    pub kld_median: f64,
    pub kld_p90: f64,
    pub kld_p99: f64,
    pub kld_p999: f64,
    pub kld_max: f64,
    /// Share of positions where both find the same token likeliest.
    pub top1: f64,
    pub top1_error: f64,
    /// Root of the mean square of `p - p_reference`.
    pub dp_rms: f64,
    pub dp_rms_error: f64,
    /// Mean of `p - p_reference`.
    pub dp_mean: f64,
    pub dp_mean_error: f64,
}

/// A figure of a certificate.
pub struct Metric {
    /// As requirements spell it.
    pub name: &'static str,
    /// For people.
    pub meaning: &'static str,
    /// The value.
    pub of: fn(&Certificate) -> f64,
}

/// What a [`Requirement`] can name.
pub const METRICS: [Metric; 14] = [
    Metric { name: "kld", meaning: "mean KL divergence from the reference, in nats", of: |c| c.quality.kld },
    Metric { name: "kld_median", meaning: "median of the divergence", of: |c| c.quality.kld_median },
    Metric { name: "kld_p90", meaning: "90 % quantile of the divergence", of: |c| c.quality.kld_p90 },
    Metric { name: "kld_p99", meaning: "99 % quantile of the divergence", of: |c| c.quality.kld_p99 },
    Metric { name: "kld_p999", meaning: "99.9 % quantile of the divergence", of: |c| c.quality.kld_p999 },
    Metric { name: "kld_max", meaning: "largest divergence", of: |c| c.quality.kld_max },
    Metric { name: "ppl", meaning: "perplexity", of: |c| c.quality.ppl },
    Metric {
        name: "ppl_ratio",
        meaning: "perplexity over that of the reference",
        of: |c| c.quality.ppl_ratio,
    },
    Metric {
        name: "ln_ppl_ratio",
        meaning: "natural logarithm of that ratio",
        of: |c| c.quality.ln_ppl_ratio,
    },
    Metric { name: "top1", meaning: "share of equal likeliest tokens, 0 to 1", of: |c| c.quality.top1 },
    Metric {
        name: "dp_rms",
        meaning: "RMS change of the right token's probability",
        of: |c| c.quality.dp_rms,
    },
    Metric {
        name: "dp_mean",
        meaning: "mean change of the right token's probability",
        of: |c| c.quality.dp_mean,
    },
    Metric { name: "bits", meaning: "bits per weight", of: |c| c.bits_per_weight },
    Metric { name: "scores", meaning: "tokens that were predicted", of: |c| c.quality.scores as f64 },
];

impl Quality {
    /// Every field but `scores`, by name.
    pub fn numbers(&self) -> [(&'static str, f64); 21] {
        [
            ("ppl", self.ppl),
            ("ppl_error", self.ppl_error),
            ("ppl_reference", self.ppl_reference),
            ("ppl_reference_error", self.ppl_reference_error),
            ("ln_ppl_ratio", self.ln_ppl_ratio),
            ("ln_ppl_ratio_error", self.ln_ppl_ratio_error),
            ("ppl_ratio", self.ppl_ratio),
            ("ppl_ratio_error", self.ppl_ratio_error),
            ("kld", self.kld),
            ("kld_error", self.kld_error),
            ("kld_median", self.kld_median),
            ("kld_p90", self.kld_p90),
            ("kld_p99", self.kld_p99),
            ("kld_p999", self.kld_p999),
            ("kld_max", self.kld_max),
            ("top1", self.top1),
            ("top1_error", self.top1_error),
            ("dp_rms", self.dp_rms),
            ("dp_rms_error", self.dp_rms_error),
            ("dp_mean", self.dp_mean),
            ("dp_mean_error", self.dp_mean_error),
        ]
    }

    /// The same with every number rounded by [`round`].
    #[must_use]
    pub fn rounded(self) -> Quality {
        Quality {
            scores: self.scores,
            ppl: round(self.ppl),
            ppl_error: round(self.ppl_error),
            ppl_reference: round(self.ppl_reference),
            ppl_reference_error: round(self.ppl_reference_error),
            ln_ppl_ratio: round(self.ln_ppl_ratio),
            ln_ppl_ratio_error: round(self.ln_ppl_ratio_error),
            ppl_ratio: round(self.ppl_ratio),
            ppl_ratio_error: round(self.ppl_ratio_error),
            kld: round(self.kld),
            kld_error: round(self.kld_error),
            kld_median: round(self.kld_median),
            kld_p90: round(self.kld_p90),
            kld_p99: round(self.kld_p99),
            kld_p999: round(self.kld_p999),
            kld_max: round(self.kld_max),
            top1: round(self.top1),
            top1_error: round(self.top1_error),
            dp_rms: round(self.dp_rms),
            dp_rms_error: round(self.dp_rms_error),
            dp_mean: round(self.dp_mean),
            dp_mean_error: round(self.dp_mean_error),
        }
    }
}

/// Five significant digits: what is left of a number in a certificate.
pub fn round(x: f64) -> f64 {
    // By way of text, so that the result is the double nearest to those digits.
    format!("{x:.4e}").parse().unwrap_or(x)
}

impl Certificate {
    /// Reads a section's bytes and checks every number.
    ///
    /// # Errors
    /// [`ErrorKind::CertificateJson`], [`ErrorKind::Certificate`].
    pub fn parse(bytes: &[u8]) -> Result<Certificate, ErrorKind> {
        // The version first: fields of a later layout may mean something else.
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let json = |source| ErrorKind::CertificateJson { source };
        let Versioned { version } = serde_json::from_slice(bytes).map_err(json)?;
        if version != VERSION {
            let (value, expected) = (version.to_string(), "1; update attar");
            return Err(ErrorKind::Certificate { field: "version".to_owned(), value, expected });
        }
        let certificate: Certificate = serde_json::from_slice(bytes).map_err(json)?;
        certificate.check()?;
        Ok(certificate)
    }

    /// The section's bytes.
    ///
    /// # Errors
    /// [`ErrorKind::Certificate`] when a number makes no sense, as when it is NaN.
    pub fn to_json(&self) -> Result<Vec<u8>, ErrorKind> {
        self.check()?;
        serde_json::to_vec(self).map_err(|source| ErrorKind::CertificateJson { source })
    }

    fn check(&self) -> Result<(), ErrorKind> {
        let fail = |field: &str, value: f64, expected| {
            let (field, value) = (field.to_owned(), value.to_string());
            Err(ErrorKind::Certificate { field, value, expected })
        };
        for (name, value) in self.quality.numbers() {
            if !value.is_finite() {
                return fail(name, value, "a finite number");
            }
            // Of the others, differences and logarithms, any sign makes sense.
            if value < 0.0 && !["ln_ppl_ratio", "dp_mean"].contains(&name) {
                return fail(name, value, "0 or more");
            }
        }
        if self.quality.top1 > 1.0 {
            return fail("top1", self.quality.top1, "0 to 1");
        }
        if self.quality.scores == 0 {
            return fail("scores", 0.0, "1 or more");
        }
        let numbers = self.tensors.iter().flat_map(|t| [t.bits_per_weight, t.relative_error]);
        for value in numbers.chain([self.bits_per_weight]) {
            if !value.is_finite() || value < 0.0 {
                return fail("bits_per_weight or relative_error", value, "0 or more");
            }
        }
        Ok(())
    }
}

/// How a requirement compares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Comparison {
    AtMost,
    Below,
    AtLeast,
    Above,
}

impl Comparison {
    /// Longer spellings first: `<=` begins with `<`.
    const ALL: [(&'static str, Comparison); 4] = [
        ("<=", Comparison::AtMost),
        (">=", Comparison::AtLeast),
        ("<", Comparison::Below),
        (">", Comparison::Above),
    ];

    fn holds(self, value: f64, bound: f64) -> bool {
        match self {
            Comparison::AtMost => value <= bound,
            Comparison::Below => value < bound,
            Comparison::AtLeast => value >= bound,
            Comparison::Above => value > bound,
        }
    }
}

/// A condition on a certificate, `kld<=0.05` or `top1>=90%`.
#[derive(Clone, Debug, PartialEq)]
pub struct Requirement {
    /// One of [`METRICS`].
    pub metric: &'static str,
    pub comparison: Comparison,
    pub bound: f64,
}

impl Requirement {
    /// Several of them, separated by commas.
    ///
    /// # Errors
    /// The first that cannot be read.
    pub fn parse_list(text: &str) -> Result<Vec<Requirement>, RequirementFault> {
        text.split(',').map(str::parse).collect()
    }

    /// What the certificate says of the metric, and whether that is good enough.
    pub fn judge(&self, certificate: &Certificate) -> (f64, bool) {
        // The metric is one of the list, since nothing else makes a requirement; NaN would meet none.
        let metric = METRICS.iter().find(|m| m.name == self.metric);
        let value = metric.map_or(f64::NAN, |m| (m.of)(certificate));
        (value, self.comparison.holds(value, self.bound))
    }
}

impl FromStr for Requirement {
    type Err = RequirementFault;

    fn from_str(text: &str) -> Result<Requirement, RequirementFault> {
        let fault = |problem: String| RequirementFault { text: text.trim().to_owned(), problem };
        let found = Comparison::ALL.iter().find_map(|(sign, c)| Some((text.split_once(sign)?, *c)));
        let Some(((left, right), comparison)) = found else {
            return Err(fault("it has none of <=, <, >=, >".to_owned()));
        };
        let (name, number) = (left.trim(), right.trim());
        let Some(metric) = METRICS.iter().find(|m| m.name == name) else {
            let known: Vec<&str> = METRICS.iter().map(|m| m.name).collect();
            return Err(fault(format!("there is no metric {name:?}; known: {}", known.join(", "))));
        };
        let (digits, unit) = match number.strip_suffix('%') {
            Some(digits) => (digits.trim_end(), 0.01),
            None => (number, 1.0),
        };
        match digits.parse::<f64>() {
            Ok(bound) if bound.is_finite() => {
                Ok(Requirement { metric: metric.name, comparison, bound: bound * unit })
            }
            _ => Err(fault(format!("{number:?} is no number"))),
        }
    }
}

impl fmt::Display for Requirement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = Comparison::ALL.iter().find(|(_, c)| *c == self.comparison).map_or("", |(s, _)| s);
        write!(f, "{}{sign}{}", self.metric, self.bound)
    }
}

/// Why a text is no requirement.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no requirement such as kld<=0.05: {problem}")]
pub struct RequirementFault {
    pub text: String,
    pub problem: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn certificate() -> Certificate {
        let text = Text { name: "t".to_owned(), blake3: "00".repeat(32), bytes: 10, tokens: 9 };
        let quality = Quality { scores: 255, ppl: 9.5, kld: 0.0456, top1: 0.875, ..Quality::default() };
        Certificate {
            version: VERSION,
            reference: "f32".to_owned(),
            target: "x86-64-v3".to_owned(),
            text,
            context: 512,
            windows: 1,
            quality,
            weight_bytes: 100,
            bits_per_weight: 4.25,
            tensors: Vec::new(),
            reported: Vec::new(),
        }
    }

    #[test]
    fn requirements_are_read_and_judged() {
        let met = |text: &str| text.parse::<Requirement>().unwrap().judge(&certificate()).1;
        for text in ["kld<=0.05", " kld <= 4.56e-2 ", "kld<0.05", "top1>=87.5%", "top1 > .8", "bits<5"] {
            assert!(met(text), "{text}");
        }
        for text in ["kld<=0.045", "kld<0.0456", "top1>0.875", "kld>=1", "scores>=1000"] {
            assert!(!met(text), "{text}");
        }
        let list = Requirement::parse_list("kld<=0.05,top1>=90%").unwrap();
        assert_eq!(list.iter().map(ToString::to_string).collect::<Vec<_>>(), ["kld<=0.05", "top1>=0.9"]);
    }

    #[test]
    fn what_is_no_requirement_is_said() {
        let said = |text: &str| Requirement::parse_list(text).unwrap_err().to_string();
        assert!(said("kld=0.05").contains("none of <=, <, >=, >"));
        assert!(said("kdl<=0.05").contains("no metric \"kdl\"; known: kld,"));
        assert!(said("kld<=low").contains("\"low\" is no number"));
        assert!(said("kld<=NaN").contains("\"NaN\" is no number"));
        assert!(said("kld<=0.05,").contains("\"\" is no requirement"));
    }

    #[test]
    fn numbers_of_no_sense_are_refused() {
        let edit = |change: &dyn Fn(&mut Certificate)| {
            let mut c = certificate();
            change(&mut c);
            c.to_json().unwrap_err().to_string()
        };
        assert!(edit(&|c| c.quality.kld = f64::NAN).contains("kld is NaN, expected a finite number"));
        assert!(edit(&|c| c.quality.kld_p99 = -1.0).contains("kld_p99 is -1, expected 0 or more"));
        assert!(edit(&|c| c.quality.top1 = 1.5).contains("top1 is 1.5, expected 0 to 1"));
        assert!(edit(&|c| c.quality.scores = 0).contains("scores"));
        assert!(edit(&|c| c.bits_per_weight = f64::INFINITY).contains("bits_per_weight"));
    }

    proptest! {
        #[test]
        fn rounding_keeps_five_digits(x in -1e6f64..1e6) {
            let r = round(x);
            prop_assert!((r - x).abs() <= x.abs() * 5e-5);
            prop_assert_eq!(round(r), r);
        }

        #[test]
        fn certificates_survive_the_file(kld in 0.0f64..10.0, top1 in 0.0f64..=1.0, ln in -3.0f64..3.0) {
            let mut c = certificate();
            c.quality = Quality { kld, top1, ln_ppl_ratio: ln, ..c.quality }.rounded();
            c.tensors.push(TensorError {
                name: "a".to_owned(),
                format: "n4".to_owned(),
                bits_per_weight: 4.25,
                relative_error: kld,
                sensitivity: None,
            });
            prop_assert_eq!(Certificate::parse(&c.to_json().unwrap()).unwrap(), c);
        }

        #[test]
        fn any_bytes_are_a_certificate_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Certificate::parse(&bytes);
        }

        #[test]
        fn any_text_is_a_requirement_or_an_error(text in "[a-z_<>=0-9.% ]{0,20}") {
            if let Ok(r) = text.parse::<Requirement>() {
                prop_assert_eq!(r.to_string().parse::<Requirement>().unwrap(), r);
            }
        }
    }
}
