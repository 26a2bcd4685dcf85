//! What can be wrong with an artifact, in words that say what to do.

use crate::program::{ProgramKind, StepSize};
use std::fmt;
use std::io;
use std::path::PathBuf;

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// A fault and the file it was found in.
#[derive(Debug)]
pub struct Error {
    pub kind: Box<ErrorKind>,
    pub at: Site,
}

/// Where an artifact came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Site {
    /// A file.
    File(PathBuf),
    /// Bytes in memory.
    Bytes,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.at {
            Site::File(path) => write!(f, "{}: {}", path.display(), self.kind),
            Site::Bytes => write!(f, "artifact in memory: {}", self.kind),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.kind.source()
    }
}

impl Error {
    pub(crate) fn new(kind: ErrorKind, at: &Site) -> Error {
        Error { kind: Box::new(kind), at: at.clone() }
    }
}

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The operating system refused.
    #[error("cannot {action}: {source}")]
    Io { action: &'static str, source: io::Error },
    /// The first bytes are not an artifact's.
    #[error("not an attar artifact (the file does not start with its magic number)")]
    NotAnArtifact,
    /// Too short for a header.
    #[error("truncated: {len} bytes, but the header alone takes {needed}; copy or download the file again")]
    TooShort { len: u64, needed: u64 },
    /// Made by a later compiler.
    #[error(
        "artifact format {major}.{minor} is newer than this reader's {known}; update attar, or compile the model \
         again with this version"
    )]
    NewerVersion { major: u32, minor: u32, known: u32 },
    /// The header's own hash differs.
    #[error("damaged header: its hash does not match; copy or download the file again")]
    HeaderHash,
    /// The header states another length than the file has.
    #[error(
        "the file has {file} bytes, its header says {header}: truncated or padded; copy or download it again"
    )]
    Length { header: u64, file: u64 },
    /// The manifest lies outside the file, or is absurdly large.
    #[error(
        "bad manifest range: {len} bytes at {offset} in a file of {file}; it must start at a multiple of 4096, \
         reach to the end of the file and be at most 64 MiB"
    )]
    ManifestRange { offset: u64, len: u64, file: u64 },
    /// The manifest was changed or damaged.
    #[error("damaged manifest: its BLAKE3 hash does not match the header's; copy or download the file again")]
    ManifestHash,
    /// The manifest is not text.
    #[error("the manifest is not UTF-8: {source}")]
    ManifestText { source: std::str::Utf8Error },
    /// The manifest is not the JSON it should be.
    #[error("the manifest cannot be read: {source}")]
    ManifestJson { source: serde_json::Error },
    /// A field about the model makes no sense.
    #[error("manifest field model.{field} is {value}, expected {expected}")]
    Model { field: &'static str, value: String, expected: &'static str },
    /// The file needs something that this version does not know.
    #[error("the artifact requires {what}, which this version does not know; update attar")]
    Requires { what: String },
    /// A section's place or description is impossible.
    #[error("section {section}: {fault}")]
    Section { section: String, fault: SectionFault },
    /// Bytes differ from what the manifest promises.
    #[error("section {section}{}: damaged, its BLAKE3 hash does not match the manifest's; copy or download the file \
             again", chunk.map(|c| format!(", chunk {c}")).unwrap_or_default())]
    Hash { section: String, chunk: Option<usize> },
    /// A text section is not UTF-8.
    #[error("section {section} is not UTF-8: {source}")]
    Text { section: String, source: std::str::Utf8Error },
    /// A weight tensor's entry is impossible.
    #[error("tensor {tensor}: {fault}")]
    Tensor { tensor: String, fault: TensorFault },
    /// The description of a weight format makes no sense.
    #[error("format {format}: {problem}")]
    Format { format: String, problem: String },
    /// A programs section is not the JSON it should be.
    #[error("section {section} cannot be read: {source}")]
    ProgramsJson { section: String, source: serde_json::Error },
    /// A program could reach outside of what it is given.
    #[error("{device} program {program:?}{}: {fault}",
            launch.as_ref().map(|(i, k)| format!(", launch {i} ({k})")).unwrap_or_default())]
    Program { device: String, program: ProgramKind, launch: Option<(usize, String)>, fault: ProgramFault },
    /// Two programs of one kind.
    #[error("{device} has two programs of kind {program:?}")]
    DuplicateProgram { device: String, program: ProgramKind },
    /// The certificate is not the JSON it should be.
    #[error("the certificate cannot be read: {source}")]
    CertificateJson { source: serde_json::Error },
    /// A number of the certificate makes no sense.
    #[error("certificate field {field} is {value}, expected {expected}")]
    Certificate { field: String, value: String, expected: &'static str },
    /// A section that the caller needs is absent.
    #[error("the artifact has no {what} section")]
    Missing { what: String },
    /// No tensor of that name.
    #[error("the artifact has no tensor named {name}")]
    NoTensor { name: String },
    /// A section was begun but not finished: a bug in the program that writes.
    #[error("bug: section {section} was begun and never finished")]
    Unfinished { section: String },
}

/// What is wrong with a section's entry in the manifest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SectionFault {
    #[error("{len} bytes at {offset} do not lie between the header and the manifest at {manifest}")]
    Range { offset: u64, len: u64, manifest: u64 },
    #[error("offset {offset} is no multiple of 4096")]
    Unaligned { offset: u64 },
    #[error("overlaps section {other}")]
    Overlap { other: String },
    #[error("appears twice")]
    Duplicate,
    #[error("hash {index:?} is not 64 hexadecimal digits")]
    HashText { index: Option<usize> },
    #[error("{got} chunk hashes for {len} bytes, expected {expected} (one per MiB)")]
    ChunkCount { got: usize, expected: u64, len: u64 },
    #[error(
        "entry {kernel}: {len} bytes at {offset} reach outside the section of {section} bytes, or are not aligned to 64"
    )]
    Entry { kernel: String, offset: u64, len: u64, section: u64 },
    #[error("entry {kernel} merges no blocks, or asks for more shared memory than any GPU has")]
    EntryBlocks { kernel: String },
    #[error("kernel {kernel} has two entries")]
    DuplicateEntry { kernel: String },
    #[error("names no target")]
    NoTarget,
    #[error("is {len} bytes long, more than the {most} allowed for its kind")]
    TooLong { len: u64, most: u64 },
    #[error("is no zlib stream of {len} bytes")]
    Stream { len: u64 },
    #[error("non-zero padding after it")]
    Padding,
}

/// What is wrong with a tensor's entry in the manifest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TensorFault {
    #[error("the name is empty or longer than 1024 bytes")]
    Name,
    #[error("appears twice")]
    Duplicate,
    #[error("format {format} is unknown to this version; update attar")]
    Format { format: String },
    #[error("format {format} cannot hold the shape {shape:?}")]
    Shape { format: String, shape: Vec<u64> },
    #[error("{got} bytes, but shape and format ask for {expected}")]
    Length { expected: u64, got: u64 },
    #[error("{len} bytes at {offset} reach outside the weights section of {section} bytes")]
    Range { offset: u64, len: u64, section: u64 },
    #[error("offset {offset} is no multiple of 64")]
    Unaligned { offset: u64 },
    #[error("overlaps tensor {other}")]
    Overlap { other: String },
    #[error("there is no weights section")]
    NoWeights,
}

/// What is wrong with a program.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProgramFault {
    #[error("max_tokens is {got}, allowed are 1 to {most}")]
    MaxTokens { got: u32, most: u32 },
    #[error("an arena of more than {most} bytes, or a size that overflows")]
    Arena { most: u64 },
    #[error("{got} launches, at most {most} are allowed")]
    Launches { got: usize, most: usize },
    #[error("{got} arguments, at most {most} are allowed")]
    Args { got: usize, most: usize },
    #[error("code section {target} has no kernel of that name")]
    NoKernel { target: String },
    #[error("argument {arg} reaches outside the arena with {} tokens, {} rows and {} spans", step.tokens, step.rows, step.spans)]
    ArenaRange { arg: usize, step: StepSize },
    #[error("argument {arg}: {len} bytes at {offset} reach outside the weights section of {section} bytes")]
    WeightRange { arg: usize, offset: u64, len: u64, section: u64 },
    #[error("argument {arg} is not aligned to {align} bytes")]
    Unaligned { arg: usize, align: u64 },
    #[error("argument {arg} names layer {layer}, the model has {layers}")]
    Layer { arg: usize, layer: u32, layers: u32 },
    #[error("argument {arg} names rotary table {table}, the model has {tables}")]
    RopeTable { arg: usize, table: u32, tables: usize },
    #[error("argument {arg}: the number overflows")]
    Overflow { arg: usize },
    #[error("a grid of more than {most} items, or a number that overflows")]
    Grid { most: u64 },
    #[error("says nothing of blocks of threads, which a GPU must know")]
    NoBlocks,
    #[error(
        "blocks of no thread or more than {threads}, or more than {x} by {y} of them, or a number that overflows"
    )]
    Blocks { threads: u32, x: u64, y: u64 },
}
