//! Artifacts as one page of HTML that needs nothing else: sizes, bits and errors layer by layer, certificates, and, of several
//! artifacts, size against divergence and speed. `page.html` is its template; here its values are made.

mod scatter;

use crate::failure::{Failure, Result};
use crate::terminal::bytes_text;
use attar_artifact::Artifact;
use attar_artifact::certificate::Certificate;
use attar_artifact::manifest::{Manifest, SectionKind};
use scatter::Scatter;
use serde::Serialize;
use std::collections::BTreeMap;

/// What is known of one artifact.
pub struct Subject {
    /// File name without folders.
    pub file: String,
    pub bytes: u64,
    /// BLAKE3 of the manifest.
    pub hash: String,
    pub manifest: Manifest,
    pub certificate: Option<Certificate>,
    pub recipe: Option<String>,
    /// Generated tokens per second on this machine, where that was measured.
    pub tokens_per_second: Option<f64>,
}

impl Subject {
    /// Reads what the page shows of an artifact.
    ///
    /// # Errors
    /// Whatever is wrong with its sections.
    pub fn of(artifact: &Artifact, file: String, tokens_per_second: Option<f64>) -> Result<Subject> {
        Ok(Subject {
            file,
            bytes: artifact.file_len(),
            hash: artifact.manifest_hash(),
            manifest: artifact.manifest().clone(),
            certificate: artifact.certificate()?,
            recipe: artifact.text(&SectionKind::Recipe)?,
            tokens_per_second,
        })
    }
}

#[derive(Serialize)]
struct Page {
    title: String,
    generator: &'static str,
    artifacts: Vec<Card>,
    scatter: Option<Scatter>,
}

#[derive(Serialize)]
struct Card {
    file: String,
    model: String,
    hash: String,
    size: String,
    bits: String,
    /// KLD, KLD 99 %, top-1, perplexity, tokens per second.
    figures: Vec<String>,
    tiles: Vec<Tile>,
    certificate: String,
    parts: Vec<Segment>,
    kinds: Vec<Segment>,
    columns: Vec<String>,
    has_errors: bool,
    has_sensitivity: bool,
    rows: Vec<Row>,
    tensors: Vec<TensorRow>,
    recipe: Option<String>,
}

#[derive(Serialize)]
struct Tile {
    label: &'static str,
    value: String,
}

/// A part of a bar.
#[derive(Serialize)]
struct Segment {
    label: String,
    size: String,
    percent: String,
    share: String,
    color: &'static str,
}

/// A layer, or what stands beside the layers.
#[derive(Serialize)]
struct Row {
    label: String,
    size: String,
    segments: Vec<Segment>,
    bits: Vec<Option<Cell>>,
    errors: Vec<Option<Cell>>,
    sensitivity: Vec<Option<Cell>>,
}

#[derive(Serialize, Clone)]
struct Cell {
    text: String,
    title: String,
    color: String,
    ink: &'static str,
}

#[derive(Serialize)]
struct TensorRow {
    name: String,
    format: String,
    shape: String,
    bytes: u64,
    bits: String,
}

/// The page.
///
/// # Errors
/// When the template cannot be rendered, which is a bug.
pub fn html(subjects: &[Subject]) -> Result<String> {
    let title = match subjects {
        [one] => one.manifest.model.name.clone(),
        _ => format!("{} artifacts compared", subjects.len()),
    };
    let page = Page {
        title,
        generator: concat!("attar ", env!("CARGO_PKG_VERSION")),
        artifacts: subjects.iter().map(card).collect(),
        scatter: scatter::scatter(subjects),
    };
    let bug = |e: minijinja::Error| Failure::bug(format!("the report's template: {e}"));
    let mut env = minijinja::Environment::new();
    env.add_template("page.html", include_str!("page.html")).map_err(bug)?;
    env.get_template("page.html").and_then(|t| t.render(&page)).map_err(bug)
}

/// Colours of parts, told apart also by those who see fewer.
const PARTS: [(&str, &str); 7] = [
    ("embedding and head", "#4477aa"),
    ("attention", "#66ccee"),
    ("feed-forward", "#228833"),
    ("norms and biases", "#ccbb44"),
    ("code", "#ee6677"),
    ("tokenizer", "#aa3377"),
    ("rest", "#999999"),
];

/// Which of [`PARTS`] a tensor belongs to.
fn part_of(name: &str, shape: &[u64]) -> usize {
    match place(name) {
        _ if shape.len() < 2 => 3,
        None => 0,
        Some((_, kind)) if ["q", "k", "v", "o"].contains(&kind.split('_').next().unwrap_or("")) => 1,
        Some(_) => 2,
    }
}

/// Layer and kind of a matrix: `model.layers.3.mlp.down_proj.weight` is the `down` of layer 3.
fn place(name: &str) -> Option<(usize, &str)> {
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let kind = rest.strip_suffix(".weight").unwrap_or(rest);
    let kind = kind.rsplit('.').next().unwrap_or(kind);
    Some((layer.parse().ok()?, kind.strip_suffix("_proj").unwrap_or(kind)))
}

fn segment(label: String, bytes: u64, of: u64, color: &'static str) -> Segment {
    let percent = 100.0 * bytes as f64 / of.max(1) as f64;
    let (size, share) = (bytes_text(bytes), format!("{percent:.1} %"));
    Segment { label, size, percent: format!("{percent:.3}"), share, color }
}

/// What a map shows of one matrix.
struct Matrix<'a> {
    name: &'a str,
    format: &'a str,
    bits: f64,
    error: Option<f64>,
    sensitivity: Option<f64>,
}

/// Matrices by the names of the checkpoint where the certificate has them, as stored otherwise.
fn matrices(s: &Subject) -> Vec<Matrix<'_>> {
    match &s.certificate {
        Some(c) if !c.tensors.is_empty() => c
            .tensors
            .iter()
            .map(|t| Matrix {
                name: &t.name,
                format: &t.format,
                bits: t.bits_per_weight,
                error: Some(t.relative_error),
                sensitivity: t.sensitivity,
            })
            .collect(),
        _ => s
            .manifest
            .tensors
            .iter()
            .filter(|t| t.shape.len() > 1)
            .map(|t| {
                let bits = bits(t.len, &t.shape);
                Matrix { name: &t.name, format: &t.format, bits, error: None, sensitivity: None }
            })
            .collect(),
    }
}

fn bits(bytes: u64, shape: &[u64]) -> f64 {
    bytes as f64 * 8.0 / shape.iter().product::<u64>().max(1) as f64
}

fn card(s: &Subject) -> Card {
    let m = &s.manifest.model;
    let weight_bytes: u64 = s.manifest.tensors.iter().map(|t| t.len).sum();
    let bits_per_weight = weight_bytes as f64 * 8.0 / m.parameters.max(1) as f64;
    let matrices = matrices(s);
    let columns = columns(&matrices);
    let has_errors = matrices.iter().any(|m| m.error.is_some());
    Card {
        file: s.file.clone(),
        model: format!(
            "{} ({}), {:.1} M parameters, {} layers, context {}",
            m.name,
            m.architecture,
            m.parameters as f64 / 1e6,
            m.layers,
            m.context_length
        ),
        hash: s.hash.clone(),
        size: bytes_text(s.bytes),
        bits: format!("{bits_per_weight:.2}"),
        figures: figures(s),
        tiles: tiles(s, bits_per_weight),
        certificate: certified(s),
        parts: parts(s),
        kinds: PARTS[..4].iter().map(|(label, color)| segment((*label).to_owned(), 0, 1, color)).collect(),
        rows: rows(s, &matrices, &columns),
        columns,
        has_errors,
        has_sensitivity: matrices.iter().any(|m| m.sensitivity.is_some()),
        tensors: s
            .manifest
            .tensors
            .iter()
            .map(|t| TensorRow {
                name: t.name.clone(),
                format: t.format.clone(),
                shape: t.shape.iter().map(u64::to_string).collect::<Vec<_>>().join(" × "),
                bytes: t.len,
                bits: format!("{:.2}", bits(t.len, &t.shape)),
            })
            .collect(),
        recipe: s.recipe.clone(),
    }
}

fn figures(s: &Subject) -> Vec<String> {
    let none = || "–".to_owned();
    let speed = s.tokens_per_second.map_or_else(none, |t| format!("{t:.0}"));
    match &s.certificate {
        None => vec![none(), none(), none(), none(), speed],
        Some(c) => vec![
            format!("{:.4}", c.quality.kld),
            format!("{:.3}", c.quality.kld_p99),
            format!("{:.1} %", 100.0 * c.quality.top1),
            format!("{:.3}", c.quality.ppl),
            speed,
        ],
    }
}

fn tiles(s: &Subject, bits_per_weight: f64) -> Vec<Tile> {
    let mut tiles = vec![
        Tile { label: "file", value: bytes_text(s.bytes) },
        Tile { label: "bits per weight", value: format!("{bits_per_weight:.2}") },
    ];
    if let Some(c) = &s.certificate {
        let q = &c.quality;
        tiles.extend([
            Tile { label: "mean KL divergence", value: format!("{:.4}", q.kld) },
            Tile { label: "its 99 % quantile", value: format!("{:.3}", q.kld_p99) },
            Tile { label: "same top token", value: format!("{:.1} %", 100.0 * q.top1) },
            Tile { label: "perplexity", value: format!("{:.3}", q.ppl) },
            Tile { label: "of the reference", value: format!("{:.3}", q.ppl_reference) },
        ]);
    }
    if let Some(t) = s.tokens_per_second {
        tiles.push(Tile { label: "tokens per second here", value: format!("{t:.0}") });
    }
    tiles
}

fn certified(s: &Subject) -> String {
    match (&s.certificate, &s.manifest.uncertified) {
        (Some(c), _) => format!(
            "Measured with {} against {} weights on {} tokens of {}, in {} windows of {}.",
            c.target, c.reference, c.quality.scores, c.text.name, c.windows, c.context
        ),
        (None, Some(reason)) => format!("No certificate: {reason}."),
        (None, None) => "No certificate.".to_owned(),
    }
}

fn parts(s: &Subject) -> Vec<Segment> {
    let mut sums = [0u64; PARTS.len()];
    for t in &s.manifest.tensors {
        sums[part_of(&t.name, &t.shape)] += t.len;
    }
    for section in &s.manifest.sections {
        match section.kind {
            SectionKind::Weights => {}
            SectionKind::Code { .. } => sums[4] += section.len,
            SectionKind::Tokenizer | SectionKind::Vocabulary => sums[5] += section.len,
            _ => sums[6] += section.len,
        }
    }
    let known: u64 = sums.iter().sum();
    sums[6] += s.bytes.saturating_sub(known);
    let shown = PARTS.iter().zip(sums).filter(|(_, bytes)| *bytes > 0);
    shown.map(|((label, color), bytes)| segment((*label).to_owned(), bytes, s.bytes, color)).collect()
}

/// Kinds of matrices within layers, in the order in which a token meets them.
fn columns(matrices: &[Matrix<'_>]) -> Vec<String> {
    const ORDER: [&str; 7] = ["q", "k", "v", "o", "gate", "up", "down"];
    let mut kinds: Vec<&str> = Vec::new();
    for m in matrices {
        if let Some((_, kind)) = place(m.name)
            && !kinds.contains(&kind)
        {
            kinds.push(kind);
        }
    }
    let rank =
        |kind: &str| ORDER.iter().position(|o| kind.split('_').next() == Some(o)).unwrap_or(ORDER.len());
    kinds.sort_by_key(|k| rank(k));
    kinds.into_iter().map(str::to_owned).collect()
}

fn rows(s: &Subject, matrices: &[Matrix<'_>], columns: &[String]) -> Vec<Row> {
    // Bytes by row and part; rows that are no layer come last.
    let mut bytes: BTreeMap<(bool, usize, String), [u64; 4]> = BTreeMap::new();
    let key = |name: &str| match name.strip_prefix("model.layers.").and_then(|r| r.split_once('.')) {
        Some((layer, _)) => (false, layer.parse().unwrap_or(0), format!("layer {layer}")),
        None => (true, 0, name.strip_suffix(".weight").unwrap_or(name).replace("model.", "")),
    };
    for t in s.manifest.tensors.iter().filter(|t| t.shape.len() > 1 || key(&t.name).2.starts_with("layer")) {
        bytes.entry(key(&t.name)).or_default()[part_of(&t.name, &t.shape)] += t.len;
    }
    // The embedding fills its bar: on the scale of the layers it would be far too long.
    let largest = bytes.iter().filter(|(k, _)| !k.0).map(|(_, b)| b.iter().sum::<u64>()).max().unwrap_or(1);
    let most_sensitive = matrices.iter().filter_map(|m| m.sensitivity).fold(0.0, f64::max);
    let mut rows = Vec::new();
    for (key_of_row, sums) in &bytes {
        let total: u64 = sums.iter().sum();
        let segments = PARTS
            .iter()
            .zip(sums)
            .filter(|(_, b)| **b > 0)
            .map(|((label, color), b)| segment((*label).to_owned(), *b, largest.max(total), color))
            .collect();
        let find = |column: Option<&str>| {
            matrices.iter().find(|m| key(m.name) == *key_of_row && place(m.name).map(|p| p.1) == column)
        };
        let shown: Vec<Option<&Matrix<'_>>> = if key_of_row.0 {
            columns.iter().enumerate().map(|(i, _)| if i == 0 { find(None) } else { None }).collect()
        } else {
            columns.iter().map(|c| find(Some(c))).collect()
        };
        let bits = |m: &Matrix<'_>| {
            let text = if m.bits >= 10.0 { format!("{:.0}", m.bits) } else { format!("{:.2}", m.bits) };
            Some(cell(text, format!("{}: {}", m.name, m.format), BLUE, (m.bits - 1.5) / 8.0))
        };
        let error = |m: &Matrix<'_>| {
            let e = m.error?;
            let title = format!("{}: {} has an error of {:.2} %", m.name, m.format, 100.0 * e);
            Some(cell(format!("{:.1}", 100.0 * e), title, RED, e / LARGE_ERROR))
        };
        let sensitivity = |m: &Matrix<'_>| {
            let s = m.sensitivity?;
            let title = format!("{}: alone in {} it costs a divergence of {s:.2e}", m.name, m.format);
            Some(cell(format!("{:.1}", 1e3 * s), title, RED, s / most_sensitive.max(1e-12)))
        };
        let cells = |of: &dyn Fn(&Matrix<'_>) -> Option<Cell>| shown.iter().map(|m| m.and_then(of)).collect();
        rows.push(Row {
            label: key_of_row.2.clone(),
            size: bytes_text(total),
            segments,
            bits: cells(&bits),
            errors: cells(&error),
            sensitivity: cells(&sensitivity),
        });
    }
    rows
}

/// A relative error in the darkest colour.
const LARGE_ERROR: f64 = 0.25;

type Rgb = [f64; 3];
/// Ramps from little to much.
const BLUE: [Rgb; 2] = [[232.0, 241.0, 250.0], [23.0, 78.0, 140.0]];
const RED: [Rgb; 2] = [[252.0, 240.0, 232.0], [165.0, 42.0, 32.0]];

/// A cell coloured by a share of 0 to 1.
fn cell(text: String, title: String, [from, to]: [Rgb; 2], share: f64) -> Cell {
    let share = share.clamp(0.0, 1.0);
    let [r, g, b] = [0, 1, 2].map(|i| from[i] + (to[i] - from[i]) * share);
    let ink = if share > 0.5 { "#ffffff" } else { "#1b2430" };
    Cell { text, title, color: format!("#{:02x}{:02x}{:02x}", r as u8, g as u8, b as u8), ink }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_find_their_place() {
        assert_eq!(place("model.layers.3.mlp.down_proj.weight"), Some((3, "down")));
        assert_eq!(place("model.layers.12.self_attn.q_k_v_proj.weight"), Some((12, "q_k_v")));
        assert_eq!(place("model.embed_tokens.weight"), None);
        let part = |name: &str, shape: &[u64]| PARTS[part_of(name, shape)].0;
        assert_eq!(part("model.layers.0.self_attn.o_proj.weight", &[4, 4]), "attention");
        assert_eq!(part("model.layers.0.mlp.gate_up_proj.weight", &[4, 4]), "feed-forward");
        assert_eq!(part("model.layers.0.input_layernorm.weight", &[4]), "norms and biases");
        assert_eq!(part("lm_head.weight", &[4, 4]), "embedding and head");
    }

    #[test]
    fn cells_are_legible() {
        assert_eq!(cell(String::new(), String::new(), BLUE, 0.0).ink, "#1b2430");
        let full = cell(String::new(), String::new(), BLUE, 2.0);
        assert_eq!((full.ink, full.color.as_str()), ("#ffffff", "#174e8c"));
    }
}
