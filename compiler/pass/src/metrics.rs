//! What passes measured. Ends up in the certificate, so it holds nothing that differs between two compiles.

use std::borrow::Cow;
use std::collections::BTreeMap;

/// One record of a pass about one subject.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Metric {
    /// Pass that made it.
    pub pass: String,
    /// Tensor or place it is about.
    pub subject: String,
    /// Named values, by name. Units stand in the names (`bytes`, `bits_per_weight`).
    pub values: BTreeMap<Cow<'static, str>, MetricValue>,
    /// Whether it belongs in the certificate as it is.
    #[serde(skip)]
    pub certified: bool,
}

/// One measured value.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
#[serde(untagged)]
pub enum MetricValue {
    Count(u64),
    Number(f64),
    Text(String),
}

impl From<u64> for MetricValue {
    fn from(v: u64) -> MetricValue {
        MetricValue::Count(v)
    }
}

impl From<f64> for MetricValue {
    fn from(v: f64) -> MetricValue {
        MetricValue::Number(v)
    }
}

impl From<&str> for MetricValue {
    fn from(v: &str) -> MetricValue {
        MetricValue::Text(v.to_owned())
    }
}

impl From<String> for MetricValue {
    fn from(v: String) -> MetricValue {
        MetricValue::Text(v)
    }
}
