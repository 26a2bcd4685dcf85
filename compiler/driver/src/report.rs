//! What a compile did, for people and, as JSON, for programs.

use crate::inputs::InputFile;
use attar_artifact::certificate::Certificate;
use attar_pass::{Metric, PassReport, Phase};
use serde::Serialize;
use std::time::Duration;

/// Everything a compile did. Times and memory differ between runs; nothing else does.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CompileReport {
    pub generator: String,
    pub model: ModelReport,
    pub inputs: Vec<InputFile>,
    pub phases: Vec<PhaseReport>,
    pub passes: Vec<PassRow>,
    /// Tensors whose codes an interrupted compile had chosen.
    pub resumed_tensors: u64,
    /// Why this compile could not have been resumed, if it could not.
    pub not_resumable: Option<String>,
    /// What passes measured.
    pub metrics: Vec<Metric>,
    /// Packed tensors in file order.
    pub tensors: Vec<TensorReport>,
    /// Packed sizes by weight format, largest first.
    pub formats: Vec<FormatReport>,
    /// Sections of the artifact in file order.
    pub sections: Vec<SectionReport>,
    /// Kernels in each code section.
    pub kernels: usize,
    /// Launches of a single-token step.
    pub decode_launches: usize,
    /// Size of the artifact; 0 when stopped before packaging.
    pub artifact_bytes: u64,
    /// BLAKE3 of the manifest, which holds the hashes of all sections: equal exactly when the artifacts are.
    pub artifact_hash: Option<String>,
    /// What was measured of the artifact.
    pub certificate: Option<Certificate>,
    /// Why nothing was.
    pub uncertified: Option<String>,
    /// The phase after which the compile was asked to stop.
    pub stopped_after: Option<String>,
    pub seconds: f64,
    /// Largest resident memory of the process, in bytes.
    pub peak_memory_bytes: Option<u64>,
}

/// The model that was compiled.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModelReport {
    pub name: String,
    pub architecture: String,
    pub parameters: u64,
    pub layers: usize,
    pub context_length: usize,
    pub tied_head: bool,
}

/// One phase.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PhaseReport {
    pub phase: Phase,
    pub seconds: f64,
    /// Largest resident memory of the process up to the end of the phase, in bytes.
    pub peak_memory_bytes: Option<u64>,
}

/// One run of a pass.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PassRow {
    #[serde(flatten)]
    pub pass: PassReport,
    pub seconds: f64,
}

/// One packed tensor.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TensorReport {
    pub name: String,
    pub format: &'static str,
    pub shape: Vec<usize>,
    pub bytes: u64,
}

/// All tensors of one format.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FormatReport {
    pub format: &'static str,
    pub tensors: usize,
    pub weights: u64,
    pub bytes: u64,
    pub bits_per_weight: f64,
}

/// One section of the artifact.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SectionReport {
    /// `weights`, `code x86-64-v3`, …
    pub name: String,
    pub bytes: u64,
}

impl From<PassReport> for PassRow {
    fn from(pass: PassReport) -> PassRow {
        PassRow { seconds: pass.time.as_secs_f64(), pass }
    }
}

impl PhaseReport {
    pub(crate) fn new(phase: Phase, time: Duration) -> PhaseReport {
        PhaseReport { phase, seconds: time.as_secs_f64(), peak_memory_bytes: crate::memory::peak_bytes() }
    }
}

/// Sums tensors by format, largest first.
pub(crate) fn by_format(tensors: &[TensorReport]) -> Vec<FormatReport> {
    let mut formats: Vec<FormatReport> = Vec::new();
    for t in tensors {
        let weights = t.shape.iter().map(|d| *d as u64).product::<u64>();
        if let Some(f) = formats.iter_mut().find(|f| f.format == t.format) {
            f.tensors += 1;
            f.weights += weights;
            f.bytes += t.bytes;
        } else {
            let (format, bytes) = (t.format, t.bytes);
            formats.push(FormatReport { format, tensors: 1, weights, bytes, bits_per_weight: 0.0 });
        }
    }
    for f in &mut formats {
        f.bits_per_weight = f.bytes as f64 * 8.0 / f.weights as f64;
    }
    formats.sort_by(|a, b| b.bytes.cmp(&a.bytes).then(a.format.cmp(b.format)));
    formats
}
