//! Opens an artifact: maps it, checks it, hands out its sections.
//!
//! Every byte of the file is hostile. What is checked in memory of its own (manifest, programs, code, texts) is read
//! with plain reads and used from that copy, so that a file which changes later cannot get behind the checks. Only
//! weights are used from the mapping, and only when the caller asks for that.

use crate::CHUNK;
use crate::certificate::Certificate;
use crate::check;
use crate::error::{Error, ErrorKind, Result, SectionFault, Site};
use crate::header::{HEADER_BYTES, Header, PAGE};
use crate::manifest::{Manifest, Section, SectionKind, TensorEntry};
use crate::program::Program;
use memmap2::Mmap;
use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Bytes read at a time of sections that are only looked at.
const BUFFER: usize = 1 << 16;
/// Longest text that a section may unpack to.
const MOST_TEXT: u64 = 1 << 28;
/// Chunks that a thread copies at a time: two huge pages.
const PIECE_CHUNKS: usize = 4;

/// How much is compared with its hash when a file is opened. The structure is always checked, and so is the
/// manifest's hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Verify {
    /// No section.
    None,
    /// Every section but the weights, which can be verified later.
    #[default]
    Code,
    /// Every section, and that padding is zero.
    Full,
}

/// An opened artifact.
#[derive(Debug)]
pub struct Artifact {
    site: Site,
    source: Source,
    file_len: u64,
    header: Header,
    manifest: Manifest,
    verify: Verify,
    programs: Vec<(String, Vec<Program>)>,
    /// Chunks of the weights whose hash has been compared.
    verified: Vec<AtomicBool>,
}

#[derive(Debug)]
enum Source {
    File { file: File, map: Mmap },
    Bytes(Vec<u8>),
}

impl Artifact {
    /// Opens a file.
    ///
    /// # Errors
    /// Everything in [`ErrorKind`] that can be wrong with a file.
    pub fn open(path: impl AsRef<Path>, verify: Verify) -> Result<Artifact> {
        let path = path.as_ref();
        let site = Site::File(path.to_path_buf());
        let io = |action| move |source| ErrorKind::Io { action, source };
        let at = |kind| Error::new(kind, &site);
        let file = File::open(path).map_err(io("open it")).map_err(at)?;
        let meta = file.metadata().map_err(io("read its length")).map_err(at)?;
        if !meta.is_file() {
            return Err(at(ErrorKind::NotAnArtifact));
        }
        if meta.len() < HEADER_BYTES as u64 {
            // An empty file cannot be mapped everywhere.
            let mut start = vec![0; meta.len().min(8) as usize];
            read_exact_at(&file, 0, &mut start).map_err(io("read it")).map_err(at)?;
            return Err(at(too_short(&start, meta.len())));
        }
        // SAFETY: the map is only read. As with every file mapping, a process that shortens or rewrites the file while
        // it is in use breaks the weights under us; everything else is used from copies made by plain reads.
        let map = unsafe { Mmap::map(&file) }.map_err(io("map it")).map_err(at)?;
        Artifact::load(site, Source::File { file, map }, meta.len(), verify)
    }

    /// Opens an artifact held in memory.
    ///
    /// # Errors
    /// As [`Artifact::open`].
    pub fn from_bytes(bytes: Vec<u8>, verify: Verify) -> Result<Artifact> {
        let len = bytes.len() as u64;
        Artifact::load(Site::Bytes, Source::Bytes(bytes), len, verify)
    }

    fn load(site: Site, source: Source, file_len: u64, verify: Verify) -> Result<Artifact> {
        let at = |kind| Error::new(kind, &site);
        if file_len < HEADER_BYTES as u64 {
            let start = source.bytes(0, file_len.min(8)).unwrap_or_default();
            return Err(at(too_short(start, file_len)));
        }
        let mut head = [0; HEADER_BYTES];
        source.read(0, &mut head).map_err(at)?;
        let header = Header::from_bytes(&head, file_len).map_err(at)?;
        let mut text = vec![0; usize_of(header.manifest_len).map_err(at)?];
        source.read(header.manifest_offset, &mut text).map_err(at)?;
        if blake3::hash(&text) != blake3::Hash::from_bytes(header.manifest_hash) {
            return Err(at(ErrorKind::ManifestHash));
        }
        let text = std::str::from_utf8(&text).map_err(|source| at(ErrorKind::ManifestText { source }))?;
        let manifest: Manifest =
            serde_json::from_str(text).map_err(|source| at(ErrorKind::ManifestJson { source }))?;
        check::unknown_kinds(&manifest, text).map_err(at)?;
        check::manifest(&manifest, header.manifest_offset).map_err(at)?;
        let chunks =
            manifest.sections.iter().find(|s| s.kind == SectionKind::Weights).map_or(0, |s| s.chunks.len());
        let verified = (0..chunks).map(|_| AtomicBool::new(false)).collect();
        let mut out =
            Artifact { site, source, file_len, header, manifest, verify, programs: Vec::new(), verified };
        out.verify_at_open()?;
        out.programs = out.load_programs()?;
        Ok(out)
    }

    fn verify_at_open(&self) -> Result<()> {
        if self.verify == Verify::None {
            return Ok(());
        }
        for section in &self.manifest.sections {
            match section.kind {
                SectionKind::Weights => {}
                // What this version does not know it will not use; only a full check looks at it.
                SectionKind::Unknown if self.verify != Verify::Full => {}
                SectionKind::Tokenizer
                | SectionKind::ChatTemplate
                | SectionKind::Graph
                | SectionKind::Recipe
                | SectionKind::Certificate => self.verify_stream(section, section.inflated.is_none())?,
                _ => self.verify_stream(section, false)?,
            }
        }
        if self.verify == Verify::Full {
            self.verify_padding()?;
            self.verify_weights(1)?;
        }
        Ok(())
    }

    fn load_programs(&self) -> Result<Vec<(String, Vec<Program>)>> {
        let mut out = Vec::new();
        for section in &self.manifest.sections {
            let SectionKind::Programs { device } = &section.kind else { continue };
            let bytes = self.read(section)?;
            let list: Vec<Program> = serde_json::from_slice(&bytes).map_err(|source| {
                self.error(ErrorKind::ProgramsJson { section: section.kind.name(), source })
            })?;
            check::programs(device, &list, &self.manifest).map_err(|k| self.error(k))?;
            out.push((device.clone(), list));
        }
        Ok(out)
    }

    /// What the file says about itself.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Major and minor version of the file's format.
    pub fn version(&self) -> (u32, u32) {
        (self.header.major, self.header.minor)
    }

    /// Bytes of the file.
    pub fn file_len(&self) -> u64 {
        self.file_len
    }

    /// BLAKE3 of the manifest: it names the content of the whole file.
    pub fn manifest_hash(&self) -> String {
        blake3::Hash::from_bytes(self.header.manifest_hash).to_hex().to_string()
    }

    /// The checked programs of a device class (`cpu`, `cuda`).
    pub fn programs(&self, device: &str) -> Option<&[Program]> {
        self.programs.iter().find(|(d, _)| d == device).map(|(_, p)| p.as_slice())
    }

    /// The first section for which `pick` holds.
    pub fn section(&self, pick: impl Fn(&SectionKind) -> bool) -> Option<&Section> {
        self.manifest.sections.iter().find(|s| pick(&s.kind))
    }

    /// A copy of a section, compared with its hash unless the file was opened with [`Verify::None`].
    ///
    /// # Errors
    /// [`ErrorKind::Hash`], [`ErrorKind::Io`].
    pub fn read(&self, section: &Section) -> Result<Vec<u8>> {
        let len = usize_of(section.len).map_err(|k| self.error(k))?;
        let mut out = vec![0; len];
        self.read_into(section, &mut out)?;
        Ok(out)
    }

    /// Reads a section into memory of the caller's, e.g. what will become executable, and compares the copy with the
    /// section's hash unless the file was opened with [`Verify::None`]. Bytes of `out` past the section stay.
    ///
    /// # Errors
    /// [`ErrorKind::Hash`], [`ErrorKind::Io`]; [`ErrorKind::Section`] when `out` is too short.
    pub fn read_into(&self, section: &Section, out: &mut [u8]) -> Result<()> {
        let most = out.len() as u64;
        let Some(out) = usize::try_from(section.len).ok().and_then(|n| out.get_mut(..n)) else {
            let fault = SectionFault::TooLong { len: section.len, most };
            return Err(self.error(ErrorKind::Section { section: section.kind.name(), fault }));
        };
        self.source.read(section.offset, out).map_err(|k| self.error(k))?;
        if self.verify != Verify::None && Some(blake3::hash(out)) != check::hash_of(&section.hash) {
            return Err(self.error(ErrorKind::Hash { section: section.kind.name(), chunk: None }));
        }
        Ok(())
    }

    /// A text section such as [`SectionKind::Tokenizer`], verified as in [`Artifact::read`]; `None` when absent.
    ///
    /// # Errors
    /// [`ErrorKind::Text`] when it is not UTF-8, [`ErrorKind::Section`] when it is no zlib stream where the manifest says so,
    /// and as [`Artifact::read`].
    pub fn text(&self, kind: &SectionKind) -> Result<Option<String>> {
        let Some(section) = self.section(|k| k == kind) else { return Ok(None) };
        let mut bytes = self.read(section)?;
        if let Some(len) = section.inflated {
            bytes = inflate(&bytes, len)
                .map_err(|fault| self.error(ErrorKind::Section { section: section.kind.name(), fault }))?;
        }
        String::from_utf8(bytes)
            .map(Some)
            .map_err(|e| self.error(ErrorKind::Text { section: kind.name(), source: e.utf8_error() }))
    }

    /// The certificate; `None` when there is none.
    ///
    /// # Errors
    /// [`ErrorKind::CertificateJson`], [`ErrorKind::Certificate`], and as [`Artifact::read`].
    pub fn certificate(&self) -> Result<Option<Certificate>> {
        let Some(section) = self.section(|k| *k == SectionKind::Certificate) else { return Ok(None) };
        let bytes = self.read(section)?;
        Certificate::parse(&bytes).map(Some).map_err(|k| self.error(k))
    }

    /// The mapped weights.
    ///
    /// # Errors
    /// [`ErrorKind::Missing`] without a weights section.
    pub fn weights(&self) -> Result<Weights<'_>> {
        let section = self
            .section(|k| *k == SectionKind::Weights)
            .ok_or_else(|| self.error(ErrorKind::Missing { what: "weights".to_owned() }))?;
        // The range was checked against the file; an empty slice cannot come of it.
        let bytes = self.source.bytes(section.offset, section.len).unwrap_or_default();
        Ok(Weights { artifact: self, section, bytes })
    }

    /// Compares every chunk of the weights with its hash, on `threads` threads.
    ///
    /// # Errors
    /// [`ErrorKind::Hash`] with the first bad chunk.
    pub fn verify_weights(&self, threads: usize) -> Result<()> {
        let Ok(weights) = self.weights() else { return Ok(()) };
        let count = self.verified.len();
        let next = AtomicUsize::new(0);
        let first_bad = AtomicUsize::new(usize::MAX);
        let work = || {
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                if i >= count {
                    break;
                }
                if !weights.chunk_is_good(i) {
                    first_bad.fetch_min(i, Ordering::Relaxed);
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..threads.clamp(1, 64) {
                scope.spawn(work);
            }
            work();
        });
        match first_bad.into_inner() {
            usize::MAX => Ok(()),
            chunk => Err(self.error(ErrorKind::Hash { section: "weights".to_owned(), chunk: Some(chunk) })),
        }
    }

    /// Reads the weights into memory of the caller's on `threads` threads; with `verify`, every chunk of the copy is
    /// compared with its hash.
    ///
    /// # Errors
    /// [`ErrorKind::Hash`] with the first bad chunk; [`ErrorKind::Io`]; [`ErrorKind::Section`] when `out` has another
    /// length than the section.
    pub fn copy_weights(&self, out: &mut [u8], threads: usize, verify: bool) -> Result<()> {
        let section = self.weights()?.section;
        let most = out.len() as u64;
        if most != section.len {
            let fault = SectionFault::TooLong { len: section.len, most };
            return Err(self.error(ErrorKind::Section { section: section.kind.name(), fault }));
        }
        // Pieces of whole huge pages: two threads that touch the same one first would both have it cleared.
        let pieces = out.chunks_mut(PIECE_CHUNKS * CHUNK as usize).enumerate();
        let queue = std::sync::Mutex::new(pieces);
        let fault = std::sync::Mutex::new(None::<(usize, ErrorKind)>);
        let work = || {
            loop {
                let piece = queue.lock().map(|mut q| q.next()).unwrap_or(None);
                let Some((p, piece)) = piece else { break };
                for (i, chunk) in (p * PIECE_CHUNKS..).zip(piece.chunks_mut(CHUNK as usize)) {
                    let found = match self.source.read(section.offset + i as u64 * CHUNK, chunk) {
                        Err(kind) => Some(kind),
                        Ok(()) if verify && Some(blake3::hash(chunk)) != chunk_hash(section, i) => {
                            Some(ErrorKind::Hash { section: section.kind.name(), chunk: Some(i) })
                        }
                        Ok(()) => None,
                    };
                    if let Some(kind) = found
                        && let Ok(mut slot) = fault.lock()
                        && slot.as_ref().is_none_or(|(j, _)| i < *j)
                    {
                        *slot = Some((i, kind));
                    }
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..threads.clamp(1, 64) {
                scope.spawn(work);
            }
            work();
        });
        match fault.into_inner() {
            Ok(Some((_, kind))) => Err(self.error(kind)),
            _ => Ok(()),
        }
    }

    /// Reads some of the weights from chunk `first` on into memory of the caller's; with `verify`, every chunk of the copy is
    /// compared with its hash. `out` ends where a chunk or the section does.
    ///
    /// # Errors
    /// [`ErrorKind::Hash`] with the first bad chunk; [`ErrorKind::Io`]; [`ErrorKind::Section`] when `out` reaches beyond the
    /// section.
    pub fn read_weights(&self, first: usize, out: &mut [u8], verify: bool) -> Result<()> {
        let section = self.weights()?.section;
        let end = (first as u64).checked_mul(CHUNK).and_then(|at| at.checked_add(out.len() as u64));
        if end.is_none_or(|end| end > section.len) {
            let fault = SectionFault::TooLong { len: out.len() as u64, most: section.len };
            return Err(self.error(ErrorKind::Section { section: section.kind.name(), fault }));
        }
        for (i, chunk) in (first..).zip(out.chunks_mut(CHUNK as usize)) {
            self.source.read(section.offset + i as u64 * CHUNK, chunk).map_err(|k| self.error(k))?;
            if verify && Some(blake3::hash(chunk)) != chunk_hash(section, i) {
                return Err(self.error(ErrorKind::Hash { section: section.kind.name(), chunk: Some(i) }));
            }
        }
        Ok(())
    }

    /// Compares a section with its hash, and looks whether it is UTF-8 where it must be, without holding all of it.
    fn verify_stream(&self, section: &Section, is_text: bool) -> Result<()> {
        let mut hash = blake3::Hasher::new();
        let mut buffer = vec![0; BUFFER.min(usize_of(section.len).map_err(|k| self.error(k))?)];
        let mut done = 0;
        // Of a character that the buffer's end cuts, the bytes that are there; they are looked at again.
        let mut text = Utf8::default();
        while done < section.len {
            let n = (section.len - done).min(buffer.len() as u64) as usize;
            let part = buffer.get_mut(..n).unwrap_or_default();
            self.source.read(section.offset + done, part).map_err(|k| self.error(k))?;
            hash.update(part);
            text.check(part);
            done += n as u64;
        }
        if Some(hash.finalize()) != check::hash_of(&section.hash) {
            return Err(self.error(ErrorKind::Hash { section: section.kind.name(), chunk: None }));
        }
        // Found by the stream, told by the whole: the message names the place.
        if is_text && !text.is_good() {
            self.text(&section.kind)?;
        }
        Ok(())
    }

    /// Everything outside the header, the sections and the manifest must be zero.
    fn verify_padding(&self) -> Result<()> {
        let mut spans: Vec<(u64, u64, String)> =
            self.manifest.sections.iter().map(|s| (s.offset, s.len, s.kind.name())).collect();
        spans.push((self.header.manifest_offset, self.header.manifest_len, "manifest".to_owned()));
        spans.sort();
        let mut end = HEADER_BYTES as u64;
        let mut before = "header".to_owned();
        let mut buffer = vec![0; PAGE as usize];
        for (offset, len, name) in spans {
            while end < offset {
                let n = (offset - end).min(PAGE);
                let part = buffer.get_mut(..n as usize).unwrap_or_default();
                self.source.read(end, part).map_err(|k| self.error(k))?;
                if part.iter().any(|b| *b != 0) {
                    return Err(
                        self.error(ErrorKind::Section { section: before, fault: SectionFault::Padding })
                    );
                }
                end += n;
            }
            end = end.max(offset + len);
            before = name;
        }
        Ok(())
    }

    fn error(&self, kind: ErrorKind) -> Error {
        Error::new(kind, &self.site)
    }
}

/// Whether a stream of bytes is UTF-8.
#[derive(Default)]
struct Utf8 {
    bad: bool,
    /// The beginning of a character whose end has not come yet.
    cut: Vec<u8>,
}

impl Utf8 {
    fn check(&mut self, mut part: &[u8]) {
        while !self.bad
            && !self.cut.is_empty()
            && let Some((next, rest)) = part.split_first()
        {
            self.cut.push(*next);
            part = rest;
            match std::str::from_utf8(&self.cut) {
                Ok(_) => self.cut.clear(),
                Err(e) => self.bad = e.error_len().is_some(),
            }
        }
        if let Err(e) = std::str::from_utf8(part) {
            self.bad |= e.error_len().is_some();
            self.cut = part.get(e.valid_up_to()..).unwrap_or_default().to_vec();
        }
    }

    fn is_good(&self) -> bool {
        !self.bad && self.cut.is_empty()
    }
}

/// The weights section, mapped.
#[derive(Clone, Copy, Debug)]
pub struct Weights<'a> {
    artifact: &'a Artifact,
    section: &'a Section,
    bytes: &'a [u8],
}

impl<'a> Weights<'a> {
    /// All bytes, not compared with any hash.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Entry of a tensor.
    pub fn entry(&self, name: &str) -> Option<&'a TensorEntry> {
        self.artifact.manifest.tensors.iter().find(|t| t.name == name)
    }

    /// Packed bytes of a tensor; the chunks they lie in are verified when they have not been before.
    ///
    /// # Errors
    /// [`ErrorKind::NoTensor`], [`ErrorKind::Hash`].
    pub fn tensor(&self, name: &str) -> Result<&'a [u8]> {
        let missing = || self.artifact.error(ErrorKind::NoTensor { name: name.to_owned() });
        let entry = self.entry(name).ok_or_else(missing)?;
        self.verify_range(entry.offset, entry.len)?;
        let range = usize::try_from(entry.offset).ok().zip(usize::try_from(entry.len).ok());
        range.and_then(|(offset, len)| self.bytes.get(offset..offset.checked_add(len)?)).ok_or_else(missing)
    }

    /// Verifies the chunks that hold `len` bytes from `offset`, those that have not been before.
    ///
    /// # Errors
    /// [`ErrorKind::Hash`] with the first bad chunk.
    pub fn verify_range(&self, offset: u64, len: u64) -> Result<()> {
        let end = offset.saturating_add(len).min(self.section.len);
        for i in offset / CHUNK..end.div_ceil(CHUNK) {
            let i = usize_of(i).map_err(|k| self.artifact.error(k))?;
            if !self.chunk_is_good(i) {
                let section = self.section.kind.name();
                return Err(self.artifact.error(ErrorKind::Hash { section, chunk: Some(i) }));
            }
        }
        Ok(())
    }

    fn chunk_is_good(&self, i: usize) -> bool {
        let Some(flag) = self.artifact.verified.get(i) else { return false };
        if flag.load(Ordering::Relaxed) {
            return true;
        }
        let chunk = CHUNK as usize;
        let Some(bytes) = self.bytes.chunks(chunk).nth(i) else { return false };
        let good = Some(blake3::hash(bytes)) == chunk_hash(self.section, i);
        if good {
            flag.store(true, Ordering::Relaxed);
        }
        good
    }
}

fn chunk_hash(section: &Section, i: usize) -> Option<blake3::Hash> {
    section.chunks.get(i).and_then(|h| check::hash_of(h))
}

fn usize_of(n: u64) -> std::result::Result<usize, ErrorKind> {
    usize::try_from(n).map_err(|_| ErrorKind::Io {
        action: "address it on this machine",
        source: std::io::ErrorKind::OutOfMemory.into(),
    })
}

/// Why a file shorter than a header is refused: an artifact cut short, or something else altogether.
fn too_short(start: &[u8], len: u64) -> ErrorKind {
    if crate::header::MAGIC.starts_with(start) {
        ErrorKind::TooShort { len, needed: HEADER_BYTES as u64 }
    } else {
        ErrorKind::NotAnArtifact
    }
}

impl Source {
    fn read(&self, offset: u64, out: &mut [u8]) -> std::result::Result<(), ErrorKind> {
        match self {
            Source::File { file, .. } => {
                read_exact_at(file, offset, out).map_err(|source| ErrorKind::Io { action: "read it", source })
            }
            Source::Bytes(_) => {
                let bytes = self.bytes(offset, out.len() as u64).ok_or(ErrorKind::Io {
                    action: "read it",
                    source: std::io::ErrorKind::UnexpectedEof.into(),
                })?;
                out.copy_from_slice(bytes);
                Ok(())
            }
        }
    }

    fn bytes(&self, offset: u64, len: u64) -> Option<&[u8]> {
        let all: &[u8] = match self {
            Source::File { map, .. } => map,
            Source::Bytes(b) => b,
        };
        let start = usize::try_from(offset).ok()?;
        let end = usize::try_from(offset.checked_add(len)?).ok()?;
        all.get(start..end)
    }
}

/// Unpacks a zlib stream that must hold exactly `len` bytes.
fn inflate(stream: &[u8], len: u64) -> std::result::Result<Vec<u8>, SectionFault> {
    if len > MOST_TEXT {
        return Err(SectionFault::TooLong { len, most: MOST_TEXT });
    }
    // Memory grows with what is unpacked, not with what is promised.
    let bytes = miniz_oxide::inflate::decompress_to_vec_zlib_with_limit(stream, len as usize);
    let bytes = bytes.map_err(|_| SectionFault::Stream { len })?;
    if bytes.len() as u64 == len { Ok(bytes) } else { Err(SectionFault::Stream { len }) }
}

#[cfg(unix)]
fn read_exact_at(file: &File, offset: u64, out: &mut [u8]) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, out, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut offset: u64, mut out: &mut [u8]) -> std::io::Result<()> {
    use std::os::windows::fs::FileExt;
    while !out.is_empty() {
        let n = file.seek_read(out, offset)?;
        if n == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        offset += n as u64;
        out = out.get_mut(n..).unwrap_or_default();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_of_text_are_judged_as_the_whole_is() {
        let texts: [&[u8]; 7] =
            [b"", b"plain", "aé漢😀z".as_bytes(), b"a\xff", b"\xe6\xbc", b"\xc3(", b"\xf0\x9f\x98a"];
        for text in texts {
            for step in 1..6 {
                let mut stream = Utf8::default();
                text.chunks(step).for_each(|part| stream.check(part));
                assert_eq!(stream.is_good(), std::str::from_utf8(text).is_ok(), "{text:?} by {step}");
            }
        }
    }
}
