//! Writes an artifact as a stream: sections in order, then the manifest, then the header; synced and renamed at the end.
//!
//! Nothing appears under the target name before the file is complete. The bytes depend on what is written and in
//! which order, and on nothing else.

use crate::certificate::Certificate;
use crate::check;
use crate::error::{Error, ErrorKind, Result, Site};
use crate::header::{HEADER_BYTES, Header, PAGE, VERSION};
use crate::manifest::{FormatEntry, Manifest, Model, Section, SectionKind, TensorEntry};
use crate::program::Program;
use crate::{CHUNK, TENSOR_ALIGN};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use tempfile::NamedTempFile;

/// Where a tensor goes that follows `end` bytes of weights: tensors stand at multiples of [`TENSOR_ALIGN`].
pub fn place_tensor(end: u64) -> u64 {
    end.next_multiple_of(TENSOR_ALIGN)
}

/// Makes one artifact. Dropped without [`Writer::finish`] it leaves nothing behind.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    site: Site,
    out: BufWriter<NamedTempFile>,
    /// Bytes written so far.
    position: u64,
    sections: Vec<Section>,
    tensors: Vec<TensorEntry>,
    programs: Vec<(String, Vec<Program>)>,
    /// Name of the section being written.
    open: Option<String>,
    uncertified: Option<String>,
}

impl Writer {
    /// Starts a temporary file in the folder of `path`.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when the folder cannot be written to.
    pub fn create(path: impl AsRef<Path>) -> Result<Writer> {
        let path = path.as_ref().to_path_buf();
        let site = Site::File(path.clone());
        let io =
            |source| Error::new(ErrorKind::Io { action: "create a temporary file beside it", source }, &site);
        let mut builder = tempfile::Builder::new();
        builder.prefix(".attar-").suffix(".part");
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            // As an ordinary new file; the process's umask still applies.
            builder.permissions(std::fs::Permissions::from_mode(0o666));
        }
        let file = builder.tempfile_in(folder(&path)).map_err(io)?;
        let mut out = BufWriter::with_capacity(1 << 18, file);
        out.write_all(&[0; PAGE as usize]).map_err(io)?;
        Ok(Writer {
            path,
            site: site.clone(),
            out,
            position: PAGE,
            sections: Vec::new(),
            tensors: Vec::new(),
            programs: Vec::new(),
            open: None,
            uncertified: None,
        })
    }

    /// Begins a section; write its bytes and call [`SectionWriter::finish`].
    ///
    /// # Errors
    /// [`ErrorKind::Io`]; [`ErrorKind::Unfinished`] when the section before was dropped unfinished.
    pub fn section(&mut self, kind: SectionKind) -> Result<SectionWriter<'_>> {
        if let Some(section) = self.open.take() {
            return Err(self.error(ErrorKind::Unfinished { section }));
        }
        self.pad(PAGE)?;
        self.open = Some(kind.name());
        let offset = self.position;
        let chunked = kind == SectionKind::Weights;
        Ok(SectionWriter {
            writer: self,
            kind,
            offset,
            hash: blake3::Hasher::new(),
            chunks: Chunks::new(chunked),
            inflated: None,
        })
    }

    /// Writes a whole section.
    ///
    /// # Errors
    /// As [`Writer::section`].
    pub fn add_section(&mut self, kind: SectionKind, bytes: &[u8]) -> Result<()> {
        let site = self.site.clone();
        let mut section = self.section(kind)?;
        section.write_all(bytes).map_err(|source| write_error(source, &site))?;
        section.finish();
        Ok(())
    }

    /// Writes a text, as a zlib stream where that is shorter.
    ///
    /// # Errors
    /// As [`Writer::section`].
    pub fn add_text(&mut self, kind: SectionKind, text: &str) -> Result<()> {
        let stream = miniz_oxide::deflate::compress_to_vec_zlib(text.as_bytes(), TEXT_LEVEL);
        if stream.len() >= text.len() {
            return self.add_section(kind, text.as_bytes());
        }
        let site = self.site.clone();
        let mut section = self.section(kind)?;
        section.inflated = Some(text.len() as u64);
        section.write_all(&stream).map_err(|source| write_error(source, &site))?;
        section.finish();
        Ok(())
    }

    /// Writes the programs of a device class.
    ///
    /// # Errors
    /// As [`Writer::section`].
    pub fn add_programs(&mut self, device: &str, programs: &[Program]) -> Result<()> {
        let kind = SectionKind::Programs { device: device.to_owned() };
        let section = kind.name();
        let json = serde_json::to_vec(programs)
            .map_err(|source| self.error(ErrorKind::ProgramsJson { section, source }))?;
        self.add_section(kind, &json)?;
        self.programs.push((device.to_owned(), programs.to_vec()));
        Ok(())
    }

    /// Writes `tokenizer.json`, and the `vocabulary` section made of it where that form holds it.
    ///
    /// # Errors
    /// As [`Writer::section`].
    pub fn add_tokenizer(&mut self, json: &str) -> Result<()> {
        self.add_text(SectionKind::Tokenizer, json)?;
        match crate::vocabulary::encode(json) {
            Some(bytes) => self.add_section(SectionKind::Vocabulary, &bytes),
            None => Ok(()),
        }
    }

    /// Writes the certificate.
    ///
    /// # Errors
    /// As [`Writer::section`]; [`ErrorKind::Certificate`] when a number makes no sense.
    pub fn add_certificate(&mut self, certificate: &Certificate) -> Result<()> {
        let json = certificate.to_json().map_err(|k| self.error(k))?;
        self.add_section(SectionKind::Certificate, &json)
    }

    /// Says in the manifest why there is no certificate.
    pub fn set_uncertified(&mut self, reason: &str) {
        self.uncertified = Some(reason.to_owned());
    }

    /// Begins the weights section.
    ///
    /// # Errors
    /// As [`Writer::section`].
    pub fn weights(&mut self) -> Result<WeightsWriter<'_>> {
        Ok(WeightsWriter { section: self.section(SectionKind::Weights)?, tensors: Vec::new(), len: 0 })
    }

    /// Writes manifest and header, checks the whole as a reader would, syncs and puts the file in its place.
    /// Returns the manifest and the length of the file in bytes.
    ///
    /// # Errors
    /// [`ErrorKind::Io`], or the first check that a reader would refuse the file by.
    pub fn finish(mut self, generator: &str, model: Model) -> Result<(Manifest, u64)> {
        let (manifest, len) = self.close(generator, model)?;
        let site = self.site.clone();
        let io = |source| write_error(source, &site);
        let file = self.out.into_inner().map_err(|e| io(e.into_error()))?;
        file.as_file().sync_all().map_err(io)?;
        file.persist(&self.path).map_err(|e| {
            Error::new(ErrorKind::Io { action: "put the finished file in its place", source: e.error }, &site)
        })?;
        // The rename itself must survive a crash; folders cannot be opened everywhere, and there it is best effort.
        if let Ok(dir) = File::open(folder(&self.path)) {
            let _ = dir.sync_all();
        }
        Ok((manifest, len))
    }

    /// Makes the temporary file an artifact of what was written so far and returns its path, so that it can be opened and
    /// tried. Sections may be added afterwards; what was opened must be closed before.
    ///
    /// # Errors
    /// As [`Writer::finish`].
    pub fn preview(&mut self, generator: &str, model: Model) -> Result<PathBuf> {
        let end = self.position;
        self.close(generator, model)?;
        let site = self.site.clone();
        let io = |source| write_error(source, &site);
        self.out.flush().map_err(io)?;
        self.out.seek(SeekFrom::Start(end)).map_err(io)?;
        self.position = end;
        Ok(self.out.get_ref().path().to_path_buf())
    }

    /// Formats of tensors that are not built in, by name.
    fn described_formats(&self) -> Vec<FormatEntry> {
        let names: BTreeSet<&str> = self.tensors.iter().map(|t| t.format.as_str()).collect();
        names.into_iter().filter_map(attar_format::by_name).filter_map(FormatEntry::of).collect()
    }

    /// Writes manifest and header, the file ending where the manifest does.
    fn close(&mut self, generator: &str, model: Model) -> Result<(Manifest, u64)> {
        if let Some(section) = self.open.take() {
            return Err(self.error(ErrorKind::Unfinished { section }));
        }
        self.pad(PAGE)?;
        let manifest = Manifest {
            generator: generator.to_owned(),
            model,
            sections: self.sections.clone(),
            tensors: self.tensors.clone(),
            formats: self.described_formats(),
            uncertified: self.uncertified.clone(),
            requires: Vec::new(),
        };
        let manifest_offset = self.position;
        check::manifest(&manifest, manifest_offset).map_err(|k| self.error(k))?;
        for (device, programs) in &self.programs {
            check::programs(device, programs, &manifest).map_err(|k| self.error(k))?;
        }
        let json =
            serde_json::to_vec(&manifest).map_err(|source| self.error(ErrorKind::ManifestJson { source }))?;
        let site = self.site.clone();
        let io = |source| write_error(source, &site);
        self.out.write_all(&json).map_err(io)?;
        let manifest_len = json.len() as u64;
        let header = Header {
            major: VERSION.0,
            minor: VERSION.1,
            manifest_offset,
            manifest_len,
            file_len: manifest_offset + manifest_len,
            manifest_hash: *blake3::hash(&json).as_bytes(),
        };
        const { assert!(HEADER_BYTES as u64 <= PAGE) };
        self.out.seek(SeekFrom::Start(0)).map_err(io)?;
        self.out.write_all(&header.to_bytes()).map_err(io)?;
        self.out.flush().map_err(io)?;
        // A preview before may have been longer.
        self.out.get_ref().as_file().set_len(header.file_len).map_err(io)?;
        Ok((manifest, header.file_len))
    }

    fn pad(&mut self, align: u64) -> Result<()> {
        let zeros = [0u8; PAGE as usize];
        let gap = self.position.next_multiple_of(align) - self.position;
        let gap_bytes = zeros.get(..gap as usize).unwrap_or(&zeros);
        self.out.write_all(gap_bytes).map_err(|source| write_error(source, &self.site))?;
        self.position += gap;
        Ok(())
    }

    fn error(&self, kind: ErrorKind) -> Error {
        Error::new(kind, &self.site)
    }
}

fn write_error(source: io::Error, site: &Site) -> Error {
    Error::new(ErrorKind::Io { action: "write it", source }, site)
}

fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(p) if !p.as_os_str().is_empty() => p,
        _ => Path::new("."),
    }
}

/// Bytes that a tokenizer takes in an artifact.
pub fn tokenizer_bytes(json: &str) -> u64 {
    let stream = miniz_oxide::deflate::compress_to_vec_zlib(json.as_bytes(), TEXT_LEVEL).len();
    let vocabulary = crate::vocabulary::encode(json).map_or(0, |v| v.len());
    (stream.min(json.len()) as u64).next_multiple_of(PAGE) + (vocabulary as u64).next_multiple_of(PAGE)
}

/// The slowest level: a tokenizer takes half a second once, and every copy of the file is smaller.
const TEXT_LEVEL: u8 = 10;

/// Hashes of the 1 MiB chunks of a stream.
#[derive(Debug)]
struct Chunks {
    wanted: bool,
    hash: blake3::Hasher,
    filled: u64,
    done: Vec<String>,
}

impl Chunks {
    fn new(wanted: bool) -> Chunks {
        Chunks { wanted, hash: blake3::Hasher::new(), filled: 0, done: Vec::new() }
    }

    fn update(&mut self, mut bytes: &[u8]) {
        while self.wanted && !bytes.is_empty() {
            let room = (CHUNK - self.filled) as usize;
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            self.hash.update(now);
            self.filled += now.len() as u64;
            if self.filled == CHUNK {
                self.close();
            }
            bytes = later;
        }
    }

    fn close(&mut self) {
        if self.filled > 0 {
            self.done.push(self.hash.finalize().to_hex().to_string());
            self.hash.reset();
            self.filled = 0;
        }
    }
}

/// One section being written.
#[derive(Debug)]
pub struct SectionWriter<'a> {
    writer: &'a mut Writer,
    kind: SectionKind,
    offset: u64,
    hash: blake3::Hasher,
    chunks: Chunks,
    inflated: Option<u64>,
}

impl Write for SectionWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.writer.out.write(bytes)?;
        let written = bytes.get(..n).unwrap_or(bytes);
        self.hash.update(written);
        self.chunks.update(written);
        self.writer.position += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.out.flush()
    }
}

impl SectionWriter<'_> {
    /// Ends the section.
    pub fn finish(mut self) {
        self.chunks.close();
        self.writer.open = None;
        self.writer.sections.push(Section {
            kind: self.kind,
            offset: self.offset,
            len: self.writer.position - self.offset,
            hash: self.hash.finalize().to_hex().to_string(),
            chunks: self.chunks.done,
            required: false,
            inflated: self.inflated,
        });
    }
}

/// The weights section being written, tensor by tensor.
#[derive(Debug)]
pub struct WeightsWriter<'a> {
    section: SectionWriter<'a>,
    tensors: Vec<TensorEntry>,
    len: u64,
}

impl WeightsWriter<'_> {
    /// Appends a tensor at the next multiple of 64 (see [`place_tensor`]) and says where it stands. `bytes` are the
    /// packed bytes of a matrix `[N, K]` or the little-endian elements of an f32 vector `[D]`.
    ///
    /// # Errors
    /// [`ErrorKind::Tensor`] when bytes, shape and format do not fit each other; [`ErrorKind::Io`].
    pub fn add(&mut self, name: &str, format: &str, shape: &[u64], bytes: &[u8]) -> Result<TensorEntry> {
        let fail = |w: &Writer, fault| w.error(ErrorKind::Tensor { tensor: name.to_owned(), fault });
        let expected =
            check::tensor_bytes(format, shape).map_err(|fault| fail(self.section.writer, fault))?;
        let len = bytes.len() as u64;
        if len != expected {
            let fault = crate::TensorFault::Length { expected, got: len };
            return Err(fail(self.section.writer, fault));
        }
        let offset = place_tensor(self.len);
        let zeros = [0u8; TENSOR_ALIGN as usize];
        let gap = zeros.get(..(offset - self.len) as usize).unwrap_or(&zeros);
        let site = self.section.writer.site.clone();
        self.section
            .write_all(gap)
            .and_then(|()| self.section.write_all(bytes))
            .map_err(|e| write_error(e, &site))?;
        self.len = offset + len;
        let entry = TensorEntry {
            name: name.to_owned(),
            format: format.to_owned(),
            shape: shape.to_vec(),
            offset,
            len,
        };
        self.tensors.push(entry.clone());
        Ok(entry)
    }

    /// Ends the section.
    pub fn finish(mut self) {
        self.section.writer.tensors.append(&mut self.tensors);
        self.section.finish();
    }
}
