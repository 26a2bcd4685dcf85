//! `attar diff A B`: what differs between two artifacts: sizes, formats tensor by tensor, certified quality.

use crate::failure::Result;
use crate::quality;
use crate::terminal::{Terminal, bytes_text, table};
use attar_artifact::certificate::Certificate;
use attar_artifact::manifest::{Manifest, TensorEntry};
use attar_artifact::{Artifact, Verify};
use clap::Args;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

#[derive(Args, Debug)]
#[command(
    after_help = "Tensors are matched by name; those of equal format and size are counted, not listed, unless --all is given. Errors
of tensors are those that the compiler measured for the certificates.

Examples:
  attar diff model-n4.attar model-w8.attar
  attar diff a.attar b.attar --json | jq '.tensors[] | select(.a.format != .b.format)'"
)]
pub struct Diff {
    /// The first artifact
    a: PathBuf,
    /// The second artifact
    b: PathBuf,
    /// List equal tensors too
    #[arg(long)]
    all: bool,
    /// Print everything as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    a: Side,
    b: Side,
    /// Whether every section but the certificate holds the same bytes.
    same_content: bool,
    tensors: Vec<TensorRow>,
}

#[derive(Serialize)]
struct Side {
    file: PathBuf,
    bytes: u64,
    /// BLAKE3 of the manifest.
    hash: String,
    model: String,
    weight_bytes: u64,
    bits_per_weight: f64,
    /// Bytes by section.
    sections: BTreeMap<String, u64>,
    certificate: Option<Certificate>,
    uncertified: Option<String>,
}

/// A tensor that at least one of the two has.
#[derive(Serialize)]
struct TensorRow {
    name: String,
    a: Option<TensorSide>,
    b: Option<TensorSide>,
}

#[derive(Serialize)]
struct TensorSide {
    format: String,
    shape: Vec<u64>,
    bytes: u64,
    /// From the certificate; the largest one of tensors that were joined.
    relative_error: Option<f64>,
}

impl TensorRow {
    /// Whether both hold it in the same format and size.
    fn is_equal(&self) -> bool {
        let of = |t: &Option<TensorSide>| t.as_ref().map(|t| (t.format.clone(), t.shape.clone(), t.bytes));
        of(&self.a) == of(&self.b)
    }
}

impl Diff {
    /// Reads both and prints.
    ///
    /// # Errors
    /// Whatever is wrong with either file.
    pub fn run(&self, terminal: Terminal) -> Result<()> {
        let open = |file: &Path| Artifact::open(file, Verify::Code);
        let (a, b) = (open(&self.a)?, open(&self.b)?);
        let (left, right) = (side(&self.a, &a)?, side(&self.b, &b)?);
        let report = Report {
            same_content: contents(a.manifest()) == contents(b.manifest()),
            tensors: tensors((a.manifest(), &left), (b.manifest(), &right)),
            a: left,
            b: right,
        };
        if self.json { terminal.json(&report) } else { terminal.line(render(&report, self.all)) }
    }
}

/// Sections but the certificate, with their hashes.
fn contents(m: &Manifest) -> BTreeMap<String, &str> {
    let named = m.sections.iter().map(|s| (s.kind.name(), s.hash.as_str()));
    named.filter(|(name, _)| name != "certificate").collect()
}

fn side(file: &Path, artifact: &Artifact) -> Result<Side> {
    let m = artifact.manifest();
    let weight_bytes = m.tensors.iter().map(|t| t.len).sum::<u64>();
    let weights = m.tensors.iter().map(|t| t.shape.iter().product::<u64>()).sum::<u64>();
    Ok(Side {
        file: file.to_owned(),
        bytes: artifact.file_len(),
        hash: artifact.manifest_hash(),
        model: m.model.name.clone(),
        weight_bytes,
        bits_per_weight: weight_bytes as f64 * 8.0 / weights.max(1) as f64,
        sections: m.sections.iter().map(|s| (s.kind.name(), s.len)).collect(),
        certificate: artifact.certificate()?,
        uncertified: m.uncertified.clone(),
    })
}

/// In the order of A, then those that only B has.
fn tensors((a, a_side): (&Manifest, &Side), (b, b_side): (&Manifest, &Side)) -> Vec<TensorRow> {
    let side = |t: &TensorEntry, of: &Side| TensorSide {
        format: t.format.clone(),
        shape: t.shape.clone(),
        bytes: t.len,
        relative_error: of.certificate.as_ref().and_then(|c| largest_error(c, &t.name)),
    };
    let mut others: BTreeMap<&str, &TensorEntry> = b.tensors.iter().map(|t| (t.name.as_str(), t)).collect();
    let mut rows: Vec<TensorRow> = a
        .tensors
        .iter()
        .map(|t| TensorRow {
            name: t.name.clone(),
            a: Some(side(t, a_side)),
            b: others.remove(t.name.as_str()).map(|t| side(t, b_side)),
        })
        .collect();
    let only_b = b.tensors.iter().filter(|t| others.contains_key(t.name.as_str()));
    rows.extend(only_b.map(|t| TensorRow { name: t.name.clone(), a: None, b: Some(side(t, b_side)) }));
    rows
}

/// The certified error of a packed tensor. Certificates name tensors as the checkpoint does, before `q_proj`, `k_proj` and
/// `v_proj` became `q_k_v_proj`.
fn largest_error(certificate: &Certificate, packed: &str) -> Option<f64> {
    let of = |name: &str| certificate.tensors.iter().find(|t| t.name == name).map(|t| t.relative_error);
    let joined = || {
        let (path, end) = packed.rsplit_once('.')?;
        let (parent, leaf) = path.rsplit_once('.')?;
        let (stems, kind) = leaf.rsplit_once('_')?;
        stems.split('_').filter_map(|s| of(&format!("{parent}.{s}_{kind}.{end}"))).reduce(f64::max)
    };
    of(packed).or_else(joined)
}

fn render(r: &Report, all: bool) -> String {
    let row = |label: &str, a: String, b: String| vec![label.to_owned(), a, b];
    let both = |label: &str, of: &dyn Fn(&Side) -> String| row(label, of(&r.a), of(&r.b));
    let mut rows = vec![
        row("", "A".to_owned(), "B".to_owned()),
        both("file", &|s| s.file.display().to_string()),
        both("model", &|s| s.model.clone()),
        both("bytes", &|s| bytes_text(s.bytes)),
        both("weights", &|s| bytes_text(s.weight_bytes)),
        both("bits per weight", &|s| format!("{:.3}", s.bits_per_weight)),
    ];
    let names: std::collections::BTreeSet<&String> =
        r.a.sections.keys().chain(r.b.sections.keys()).filter(|n| *n != "weights").collect();
    for name in names {
        let of = |s: &Side| s.sections.get(name).map_or("-".to_owned(), |bytes| bytes_text(*bytes));
        rows.push(both(name, &of));
    }
    let mut out = table(&rows);
    if r.a.hash == r.b.hash {
        out.push_str("\n\nThe artifacts are equal, byte by byte.");
    } else if r.same_content {
        out.push_str("\n\nAll sections but the certificate are equal.");
    }
    out.push_str("\n\n");
    out.push_str(&certificates(r));
    out.push_str("\n\n");
    out.push_str(&changed(r, all));
    out
}

fn certificates(r: &Report) -> String {
    let of = |s: &Side| s.certificate.as_ref().map(|c| quality::rows(&c.quality));
    let (a, b) = (of(&r.a), of(&r.b));
    let mut rows = vec![vec!["CERTIFICATE".to_owned(), "A".to_owned(), "B".to_owned()]];
    let Some(labels) = a.as_ref().or(b.as_ref()) else {
        return "Neither artifact has a certificate.".to_owned();
    };
    let meta = |s: &Side, of: &dyn Fn(&Certificate) -> String| {
        let absent = || s.uncertified.clone().map_or("none".to_owned(), |why| format!("none: {why}"));
        s.certificate.as_ref().map_or_else(absent, of)
    };
    let text = |c: &Certificate| format!("{} ({} tokens)", c.text.name, c.quality.scores);
    rows.push(vec!["text".to_owned(), meta(&r.a, &text), meta(&r.b, &text)]);
    let how = |c: &Certificate| format!("{} against {}", c.target, c.reference);
    rows.push(vec!["measured with".to_owned(), meta(&r.a, &how), meta(&r.b, &how)]);
    for (i, [label, _]) in labels.iter().enumerate() {
        let cell = |of: &Option<Vec<[String; 2]>>| {
            of.as_ref().and_then(|rows| rows.get(i)).map_or("-".to_owned(), |[_, text]| text.clone())
        };
        rows.push(vec![label.clone(), cell(&a), cell(&b)]);
    }
    let mut out = table(&rows);
    if let (Some(a), Some(b)) = (&r.a.certificate, &r.b.certificate)
        && (a.text.blake3 != b.text.blake3 || (a.context, a.windows) != (b.context, b.windows))
    {
        out.push_str("\nThey were measured on different texts or windows and cannot be compared.");
    }
    out
}

fn changed(r: &Report, all: bool) -> String {
    let cell = |t: &Option<TensorSide>| match t {
        Some(t) => {
            let error = t.relative_error.map_or(String::new(), |e| format!(", error {e:.4}"));
            format!("{} {}{error}", t.format, bytes_text(t.bytes))
        }
        None => "-".to_owned(),
    };
    let mut rows = vec![["TENSOR", "A", "B"].map(str::to_owned).to_vec()];
    let shown = r.tensors.iter().filter(|t| all || !t.is_equal());
    rows.extend(shown.map(|t| vec![t.name.clone(), cell(&t.a), cell(&t.b)]));
    let equal = r.tensors.iter().filter(|t| t.is_equal()).count();
    let counted = format!("{equal} of {} tensors have the same format and size.", r.tensors.len());
    if rows.len() > 1 { format!("{}\n\n{counted}", table(&rows)) } else { counted }
}

#[cfg(test)]
mod tests {
    use super::*;
    use attar_artifact::certificate::{Quality, TensorError, Text};

    #[test]
    fn errors_of_joined_tensors_are_found() {
        let tensor = |name: &str, relative_error| TensorError {
            name: name.to_owned(),
            format: "n4".to_owned(),
            bits_per_weight: 4.25,
            relative_error,
            sensitivity: None,
        };
        let certificate = Certificate {
            version: 1,
            reference: "f32".to_owned(),
            target: "x86-64-v3".to_owned(),
            text: Text { name: "t".to_owned(), blake3: String::new(), bytes: 1, tokens: 1 },
            context: 4,
            windows: 1,
            quality: Quality::default(),
            weight_bytes: 1,
            bits_per_weight: 1.0,
            reported: Vec::new(),
            tensors: vec![
                tensor("l.0.attn.q_proj.weight", 0.1),
                tensor("l.0.attn.k_proj.weight", 0.3),
                tensor("l.0.attn.v_proj.weight", 0.2),
                tensor("l.0.attn.o_proj.weight", 0.4),
            ],
        };
        let of = |name: &str| largest_error(&certificate, name);
        assert_eq!(of("l.0.attn.q_k_v_proj.weight"), Some(0.3));
        assert_eq!(of("l.0.attn.o_proj.weight"), Some(0.4));
        assert_eq!((of("l.0.norm.weight"), of("plain")), (None, None));
    }
}
