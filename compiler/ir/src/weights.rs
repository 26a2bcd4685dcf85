//! The weight store: names of tensors and how to get their values, one tensor at a time.
//!
//! A compile needs memory for its largest tensor, not for the model: entries point into a mapped checkpoint or
//! at other entries (derived weights are computed when read), and codes chosen by a pass are spilled to an
//! unnamed temporary file.

use crate::error::{Error, ErrorKind, Result};
use crate::types::Elem;
use attar_format::Encoded;
use indexmap::IndexMap;
use std::sync::Arc;

/// Name of a weight tensor, as the checkpoint or the pass that made it spells it.
pub type WeightName = Arc<str>;

/// Reads one tensor of a checkpoint as f32. Implemented by the importer over a mapped file.
pub trait WeightReader: Send + Sync {
    /// All elements, row-major, converted to f32.
    ///
    /// # Errors
    /// [`ErrorKind::Weight`] when the bytes cannot be read or decoded.
    fn read_f32(&self) -> Result<Vec<f32>>;

    /// The type the checkpoint stores, for reports: `bf16`, `q4_1`, …
    fn stored_as(&self) -> String;

    /// The elements as they lie in memory, where the checkpoint stores aligned f32.
    fn borrow_f32(&self) -> Option<&[f32]> {
        None
    }
}

/// Values of a tensor: those in memory themselves where there are any, else decoded for the one who asked.
#[derive(Clone)]
pub enum WeightValues {
    Mapped(Arc<dyn WeightReader>),
    Shared(Arc<Vec<f32>>),
}

impl std::ops::Deref for WeightValues {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match self {
            WeightValues::Mapped(reader) => reader.borrow_f32().unwrap_or(&[]),
            WeightValues::Shared(values) => values,
        }
    }
}

impl std::fmt::Debug for WeightValues {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} values", self.len())
    }
}

/// What is known of a weight without reading it.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightInfo {
    /// `[N, K]` for matrices, `[D]` for vectors.
    pub shape: Vec<usize>,
    /// Plain f32 until a pass encodes it.
    pub elem: Elem,
    /// The type in the checkpoint, or how the weight was derived.
    pub stored_as: String,
}

/// What a pass does to a matrix `[N, K]`, or with rows alone to a vector `[N]`. Values are computed when they are read.
#[derive(Clone, Debug, PartialEq)]
pub enum Transform {
    /// Row `n` times factor `n`.
    ScaleRows(Arc<[f32]>),
    /// Column `k` times factor `k`.
    ScaleColumns(Arc<[f32]>),
    /// `R w`: what the matrix yields is rotated.
    RotateRows(Rotation),
    /// `w Rᵀ`: what the matrix takes has been rotated.
    RotateColumns(Rotation),
}

/// The orthogonal matrix `R = H diag(signs)`: a normalised Hadamard transform of each `order` neighbouring numbers after some
/// of them have changed sign.
#[derive(Clone, Debug, PartialEq)]
pub struct Rotation {
    /// A power of two.
    pub order: usize,
    /// 1 or -1; repeated as often as it takes.
    pub signs: Arc<[f32]>,
}

impl Transform {
    /// Whether it can be done to a weight of that shape.
    fn fits(&self, shape: &[usize]) -> bool {
        let rotates = |r: &Rotation, n: usize| {
            r.order.is_power_of_two()
                && n.is_multiple_of(r.order)
                && !r.signs.is_empty()
                && n.is_multiple_of(r.signs.len())
        };
        match (self, shape) {
            (Transform::ScaleRows(by), [n] | [n, _]) => by.len() == *n,
            (Transform::ScaleColumns(by), [_, k]) => by.len() == *k,
            (Transform::RotateRows(r), [n] | [n, _]) => rotates(r, *n),
            (Transform::RotateColumns(r), [_, k]) => rotates(r, *k),
            _ => false,
        }
    }

    fn apply(&self, shape: &[usize], w: &mut [f32]) {
        let width = shape.get(1).copied().unwrap_or(1);
        if width == 0 {
            return;
        }
        match self {
            Transform::ScaleRows(by) => {
                for (row, by) in w.chunks_exact_mut(width).zip(by.iter()) {
                    row.iter_mut().for_each(|w| *w *= by);
                }
            }
            Transform::ScaleColumns(by) => {
                for row in w.chunks_exact_mut(width) {
                    row.iter_mut().zip(by.iter()).for_each(|(w, by)| *w *= by);
                }
            }
            Transform::RotateRows(r) => r.apply(w, width),
            Transform::RotateColumns(r) => w.chunks_exact_mut(width).for_each(|row| r.apply(row, 1)),
        }
    }
}

impl Rotation {
    /// Rotates numbers that are `width` wide.
    fn apply(&self, w: &mut [f32], width: usize) {
        let factor = (1.0 / (self.order as f64).sqrt()) as f32;
        for (number, sign) in w.chunks_exact_mut(width).zip(self.signs.iter().cycle()) {
            number.iter_mut().for_each(|w| *w *= sign * factor);
        }
        for block in w.chunks_exact_mut(self.order * width) {
            let mut apart = width;
            while apart < block.len() {
                for pair in block.chunks_exact_mut(2 * apart) {
                    let (low, high) = pair.split_at_mut(apart);
                    for (a, b) in low.iter_mut().zip(high) {
                        (*a, *b) = (*a + *b, *a - *b);
                    }
                }
                apart *= 2;
            }
        }
    }
}

#[derive(Clone)]
enum Source {
    Reader(Arc<dyn WeightReader>),
    /// Values in memory (small tensors, tests, constant folding).
    Values(Arc<Vec<f32>>),
    /// Rows of several weights stacked along N.
    ConcatRows(Vec<WeightName>),
    /// Columns of `base` `[N, K]` multiplied by the vector `by` `[K]`.
    ScaleColumns {
        base: WeightName,
        by: WeightName,
    },
    /// Another source's values, changed.
    Transformed {
        of: Box<Source>,
        by: Transform,
    },
    /// Codes chosen by a pass, in the spill file.
    Encoded(spill::Handle),
}

#[derive(Clone)]
struct Entry {
    info: WeightInfo,
    source: Source,
}

/// All weights of a model by name, in insertion order.
#[derive(Default)]
pub struct WeightStore {
    entries: IndexMap<WeightName, Entry>,
    /// What encoded entries were before.
    originals: IndexMap<WeightName, Entry>,
    spill: spill::SpillFile,
    revision: u64,
}

/// What a store held at some time; see [`WeightStore::checkpoint`].
#[derive(Clone)]
pub struct Checkpoint {
    entries: IndexMap<WeightName, Entry>,
    originals: IndexMap<WeightName, Entry>,
}

impl std::fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} weights", self.entries.len())
    }
}

impl std::fmt::Debug for WeightStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_map().entries(self.entries.iter().map(|(n, e)| (n, &e.info))).finish()
    }
}

impl WeightStore {
    pub fn new() -> WeightStore {
        WeightStore::default()
    }

    /// Adds a tensor of a checkpoint. Replaces an entry of the same name.
    pub fn add_reader(&mut self, name: &str, shape: &[usize], reader: Arc<dyn WeightReader>) -> WeightName {
        let stored_as = reader.stored_as();
        self.insert(name, shape, Elem::F32, stored_as, Source::Reader(reader))
    }

    /// Adds a tensor held in memory.
    pub fn add_values(&mut self, name: &str, shape: &[usize], values: Vec<f32>) -> WeightName {
        self.insert(name, shape, Elem::F32, "f32".to_owned(), Source::Values(Arc::new(values)))
    }

    /// Adds the rows of `parts` stacked along N. Parts are all uncompressed, or all coded in one format with one
    /// table.
    ///
    /// # Errors
    /// When a part is missing, or parts do not fit together.
    pub fn add_concat_rows(&mut self, name: &str, parts: &[WeightName]) -> Result<WeightName> {
        let infos = parts.iter().map(|p| self.info(p)).collect::<Result<Vec<_>>>()?;
        let Some(first) = infos.first() else {
            return Err(weight_error(name, "nothing to stack"));
        };
        let elem = first.elem;
        let mut shape = vec![0];
        shape.extend(first.shape.iter().skip(1));
        for info in &infos {
            match info.shape.split_first() {
                Some((rows, tail)) if info.elem == elem && *tail == shape[1..] => shape[0] += rows,
                _ => return Err(weight_error(name, "rows to be stacked differ in format or width")),
            }
        }
        if let Elem::Coded(_) = elem {
            let coded = parts.iter().map(|p| self.read_encoded(p)).collect::<Result<Vec<_>>>()?;
            let joined = Encoded::concat_rows(&coded.iter().collect::<Vec<_>>())
                .map_err(|e| weight_error(name, &e.to_string()))?;
            return self.set_encoded(name, &joined);
        }
        self.insert_derived(name, &shape, "stacked rows", Source::ConcatRows(parts.to_vec()))
    }

    /// Adds `base` `[N, K]` with its columns multiplied by `by` `[K]`; both uncompressed.
    ///
    /// # Errors
    /// When one is missing, coded, or K differs.
    pub fn add_scaled_columns(
        &mut self,
        name: &str,
        base: &WeightName,
        by: &WeightName,
    ) -> Result<WeightName> {
        let (b, s) = (self.info(base)?, self.info(by)?);
        if b.elem != Elem::F32 || s.elem != Elem::F32 {
            return Err(weight_error(name, "only uncompressed weights can be rescaled"));
        }
        if b.shape.len() != 2 || s.shape != [b.shape[1]] {
            return Err(weight_error(
                name,
                &format!("columns of {:?} cannot be scaled by {:?}", b.shape, s.shape),
            ));
        }
        let shape = b.shape.clone();
        let source = Source::ScaleColumns { base: base.clone(), by: by.clone() };
        self.insert_derived(name, &shape, "rescaled columns", source)
    }

    /// Adds an entry that is computed from others. It cannot take the place of a different entry, so that no entry
    /// can come to be computed from itself.
    fn insert_derived(
        &mut self,
        name: &str,
        shape: &[usize],
        stored_as: &str,
        source: Source,
    ) -> Result<WeightName> {
        if let Some((name, held)) = self.entries.get_key_value(name) {
            let same = match (&held.source, &source) {
                (Source::ConcatRows(a), Source::ConcatRows(b)) => a == b,
                (Source::ScaleColumns { base: a, by: b }, Source::ScaleColumns { base: c, by: d }) => {
                    a == c && b == d
                }
                _ => false,
            };
            return if same { Ok(name.clone()) } else { Err(weight_error(name, "the name is taken")) };
        }
        Ok(self.insert(name, shape, Elem::F32, stored_as.to_owned(), source))
    }

    /// Changes a weight in place, so that it keeps the name by which recipes know it.
    ///
    /// # Errors
    /// When it is missing, coded, part of another weight, or of the wrong shape.
    pub fn transform(&mut self, name: &str, by: Transform) -> Result<()> {
        let is_part = self.entries.values().any(|e| match &e.source {
            Source::ConcatRows(parts) => parts.iter().any(|p| **p == *name),
            Source::ScaleColumns { base, by } => **base == *name || **by == *name,
            _ => false,
        });
        let info = self.info(name)?;
        if is_part || info.elem != Elem::F32 || !by.fits(&info.shape) {
            let problem = format!("{:?} of {:?} cannot be transformed", info.elem, info.shape);
            return Err(weight_error(name, &problem));
        }
        let missing = || weight_error(name, "the weight store holds no such tensor");
        let entry = self.entries.get_mut(name).ok_or_else(missing)?;
        entry.source = Source::Transformed { of: Box::new(entry.source.clone()), by };
        self.revision += 1;
        Ok(())
    }

    /// Gives an uncompressed tensor other values under its name and shape. Those of a matrix go to the temporary file, so that
    /// memory holds one tensor; what it was before counts as its original.
    ///
    /// # Errors
    /// When it is missing or coded, the number of values is another, or the temporary file cannot be written.
    pub fn replace_values(&mut self, name: &str, values: Vec<f32>) -> Result<WeightName> {
        let info = self.info(name)?;
        let (shape, elem, stored_as) = (info.shape.clone(), info.elem, info.stored_as.clone());
        if elem != Elem::F32 {
            return Err(weight_error(name, &format!("it is stored as {} already", elem.name())));
        }
        self.insert_values(name, &shape, values, stored_as)
    }

    /// Adds a tensor of f32 values; those of a matrix go to the temporary file.
    ///
    /// # Errors
    /// When the name is taken, the number of values is not that of the shape, or the temporary file cannot be written.
    pub fn add_spilled(&mut self, name: &str, shape: &[usize], values: Vec<f32>) -> Result<WeightName> {
        if self.contains(name) {
            return Err(weight_error(name, "the name is taken"));
        }
        self.insert_values(name, shape, values, "f32".to_owned())
    }

    fn insert_values(
        &mut self,
        name: &str,
        shape: &[usize],
        values: Vec<f32>,
        stored_as: String,
    ) -> Result<WeightName> {
        if shape.iter().product::<usize>() != values.len() {
            let problem = format!("shape {shape:?} does not have {} values", values.len());
            return Err(weight_error(name, &problem));
        }
        let source = match *shape {
            [n, k] => {
                let encoded = Encoded::from_f32(&attar_format::formats::F32, n, k, &values);
                let encoded = encoded.map_err(|e| weight_error(name, &e.to_string()))?;
                let handle = self.spill.write(&encoded);
                Source::Encoded(handle.map_err(|e| weight_error(name, &format!("spill file: {e}")))?)
            }
            _ => Source::Values(Arc::new(values)),
        };
        Ok(self.insert(name, shape, Elem::F32, stored_as, source))
    }

    /// Grows with every change: what was computed from weights holds as long as this stays.
    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// What the store holds now, to go back to. Costs memory for names, not for values.
    pub fn checkpoint(&self) -> Checkpoint {
        Checkpoint { entries: self.entries.clone(), originals: self.originals.clone() }
    }

    /// Goes back to a checkpoint of this store.
    pub fn restore(&mut self, checkpoint: Checkpoint) {
        (self.entries, self.originals) = (checkpoint.entries, checkpoint.originals);
        self.revision += 1;
    }

    /// Whether [`WeightStore::transform`] has rotated the rows, or the columns, of a weight.
    pub fn is_rotated(&self, name: &str, rows: bool) -> bool {
        let mut source = self.entries.get(name).map(|e| &e.source);
        while let Some(Source::Transformed { of, by }) = source {
            match by {
                Transform::RotateRows(_) if rows => return true,
                Transform::RotateColumns(_) if !rows => return true,
                _ => {}
            }
            source = Some(of);
        }
        false
    }

    /// Adds a weight that is at first the same as another.
    ///
    /// # Errors
    /// When that is missing, or the name is taken.
    pub fn copy(&mut self, from: &str, name: &str) -> Result<WeightName> {
        if self.contains(name) {
            return Err(weight_error(name, "the name is taken"));
        }
        let Entry { info, source } = self.entry(from)?;
        let (info, source) = (info.clone(), source.clone());
        Ok(self.insert(name, &info.shape, info.elem, info.stored_as, source))
    }

    /// Adds or replaces a weight by codes a pass has chosen; the codes go to the spill file.
    ///
    /// # Errors
    /// When the spill file cannot be written.
    pub fn set_encoded(&mut self, name: &str, encoded: &Encoded) -> Result<WeightName> {
        let handle =
            self.spill.write(encoded).map_err(|e| weight_error(name, &format!("spill file: {e}")))?;
        let elem = Elem::coded(encoded.format);
        Ok(self.insert(
            name,
            &[encoded.n, encoded.k],
            elem,
            encoded.format.name.to_owned(),
            Source::Encoded(handle),
        ))
    }

    /// Gives an uncompressed tensor values that stand for its own, as codes do: what it was before stays its original.
    ///
    /// # Errors
    /// When it is missing or coded, or the number of values is another.
    pub fn set_stand_in(&mut self, name: &str, values: Vec<f32>) -> Result<WeightName> {
        let before = self.entry(name)?.clone();
        if before.info.elem != Elem::F32 {
            return Err(weight_error(name, &format!("it is stored as {} already", before.info.elem.name())));
        }
        if values.len() != before.info.shape.iter().product::<usize>() {
            let problem = format!("shape {:?} needs other than {} values", before.info.shape, values.len());
            return Err(weight_error(name, &problem));
        }
        let original = self.originals.get(name).cloned().unwrap_or(before);
        let WeightInfo { shape, elem, stored_as } = original.info.clone();
        let name = self.insert(name, &shape, elem, stored_as, Source::Values(Arc::new(values)));
        self.originals.insert(name.clone(), original);
        Ok(name)
    }

    fn insert(
        &mut self,
        name: &str,
        shape: &[usize],
        elem: Elem,
        stored_as: String,
        source: Source,
    ) -> WeightName {
        self.revision += 1;
        let name: WeightName = Arc::from(name);
        let info = WeightInfo { shape: shape.to_vec(), elem, stored_as };
        let encoded = matches!(source, Source::Encoded(_));
        match self.entries.insert(name.clone(), Entry { info, source }) {
            Some(before) if encoded && !matches!(before.source, Source::Encoded(_)) => {
                self.originals.insert(name.clone(), before);
            }
            Some(_) if encoded => {}
            _ => {
                self.originals.shift_remove(&name);
            }
        }
        name
    }

    /// Shape and element of a weight.
    ///
    /// # Errors
    /// When the store does not hold it.
    pub fn info(&self, name: &str) -> Result<&WeightInfo> {
        Ok(&self.entry(name)?.info)
    }

    pub fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// All names, in insertion order.
    pub fn names(&self) -> impl Iterator<Item = &WeightName> {
        self.entries.keys()
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        self.entries.get(name).ok_or_else(|| weight_error(name, "the weight store holds no such tensor"))
    }

    /// Decoded values, row-major. Costs memory for this tensor only.
    ///
    /// # Errors
    /// When the tensor is missing or its bytes cannot be read.
    pub fn read_f32(&self, name: &str) -> Result<Vec<f32>> {
        self.values_of(name, self.entry(name)?)
    }

    /// Decoded values without a copy where they are in memory.
    ///
    /// # Errors
    /// As [`WeightStore::read_f32`].
    pub fn view_f32(&self, name: &str) -> Result<WeightValues> {
        let entry = self.entry(name)?;
        let expected: usize = entry.info.shape.iter().product();
        match &entry.source {
            Source::Values(values) if values.len() == expected => Ok(WeightValues::Shared(values.clone())),
            Source::Reader(reader) if reader.borrow_f32().is_some_and(|v| v.len() == expected) => {
                Ok(WeightValues::Mapped(reader.clone()))
            }
            _ => Ok(WeightValues::Shared(Arc::new(self.values_of(name, entry)?))),
        }
    }

    /// The values a weight had before a pass encoded it; those it has when none did.
    ///
    /// # Errors
    /// As [`WeightStore::read_f32`].
    pub fn read_original_f32(&self, name: &str) -> Result<Vec<f32>> {
        match self.originals.get(name) {
            Some(entry) => self.values_of(name, entry),
            None => self.read_f32(name),
        }
    }

    fn values_of(&self, name: &str, entry: &Entry) -> Result<Vec<f32>> {
        let values = self.read_source(name, &entry.info.shape, &entry.source)?;
        let expected: usize = entry.info.shape.iter().product();
        if values.len() != expected {
            let problem =
                format!("shape {:?} needs {expected} values, got {}", entry.info.shape, values.len());
            return Err(weight_error(name, &problem));
        }
        Ok(values)
    }

    fn read_source(&self, name: &str, shape: &[usize], source: &Source) -> Result<Vec<f32>> {
        Ok(match source {
            Source::Reader(r) => r.read_f32().map_err(|e| e.at_tensor(name))?,
            Source::Values(v) => v.as_ref().clone(),
            Source::ConcatRows(parts) => {
                let mut all = Vec::with_capacity(shape.iter().product());
                for p in parts {
                    all.extend(self.read_f32(p)?);
                }
                all
            }
            Source::ScaleColumns { base, by } => {
                let mut w = self.read_f32(base)?;
                let s = self.read_f32(by)?;
                for row in w.chunks_exact_mut(s.len()) {
                    row.iter_mut().zip(&s).for_each(|(w, s)| *w *= s);
                }
                w
            }
            Source::Encoded(h) => {
                self.spill.read(h).map_err(|e| weight_error(name, &format!("spill file: {e}")))?.decode()
            }
            Source::Transformed { of, by } => {
                let mut w = self.read_source(name, shape, of)?;
                if w.len() == shape.iter().product() {
                    by.apply(shape, &mut w);
                }
                w
            }
        })
    }

    /// The codes of a coded weight, or an uncompressed matrix in format `f32`.
    ///
    /// # Errors
    /// When the tensor is missing, unreadable, or not a matrix.
    pub fn read_encoded(&self, name: &str) -> Result<Encoded> {
        let entry = self.entry(name)?;
        if let Source::Encoded(h) = &entry.source {
            return self.spill.read(h).map_err(|e| weight_error(name, &format!("spill file: {e}")));
        }
        let [n, k] = entry.info.shape[..] else {
            return Err(weight_error(name, &format!("expected a matrix, got shape {:?}", entry.info.shape)));
        };
        Encoded::from_f32(&attar_format::formats::F32, n, k, &self.read_f32(name)?)
            .map_err(|e| weight_error(name, &e.to_string()))
    }
}

fn weight_error(name: &str, problem: &str) -> Error {
    Error::new(ErrorKind::Weight { problem: problem.to_owned() }).at_tensor(name)
}

/// Codes written once to an unnamed temporary file and read back when needed.
mod spill {
    use attar_format::{Encoded, FormatRef};
    use std::fs::File;
    use std::io::{self, Read, Seek, SeekFrom, Write};
    use std::sync::Mutex;

    #[derive(Default)]
    pub(super) struct SpillFile {
        file: Mutex<Option<File>>,
    }

    /// Where one matrix stands in the file, and what the file does not say.
    #[derive(Clone)]
    pub(super) struct Handle {
        offset: u64,
        format: FormatRef,
        n: usize,
        k: usize,
        table: [i8; attar_format::MOST_ENTRIES],
        shift: i8,
        row_scales: usize,
        fields: usize,
        codes: usize,
    }

    impl SpillFile {
        pub(super) fn write(&self, e: &Encoded) -> io::Result<Handle> {
            let mut guard = self.file.lock().map_err(|_| io::Error::other("poisoned"))?;
            if guard.is_none() {
                *guard = Some(tempfile::tempfile()?);
            }
            let Some(file) = guard.as_mut() else { return Err(io::Error::other("no file")) };
            let offset = file.seek(SeekFrom::End(0))?;
            let mut head = Vec::with_capacity(e.row_scale.len() * 4 + e.field.len() * 2);
            head.extend(e.row_scale.iter().flat_map(|v| v.to_le_bytes()));
            head.extend(e.field.iter().flat_map(|v| v.to_le_bytes()));
            file.write_all(&head)?;
            file.write_all(&e.codes)?;
            Ok(Handle {
                offset,
                format: e.format,
                n: e.n,
                k: e.k,
                table: e.table,
                shift: e.shift,
                row_scales: e.row_scale.len(),
                fields: e.field.len(),
                codes: e.codes.len(),
            })
        }

        pub(super) fn read(&self, h: &Handle) -> io::Result<Encoded> {
            let mut head = vec![0u8; h.row_scales * 4 + h.fields * 2];
            let mut codes = vec![0u8; h.codes];
            {
                let mut guard = self.file.lock().map_err(|_| io::Error::other("poisoned"))?;
                let Some(file) = guard.as_mut() else { return Err(io::Error::other("nothing was written")) };
                file.seek(SeekFrom::Start(h.offset))?;
                file.read_exact(&mut head)?;
                file.read_exact(&mut codes)?;
            }
            let (rows, fields) = head.split_at(h.row_scales * 4);
            Ok(Encoded {
                format: h.format,
                n: h.n,
                k: h.k,
                table: h.table,
                shift: h.shift,
                row_scale: rows
                    .chunks_exact(4)
                    .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                    .collect(),
                field: fields.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect(),
                codes,
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> WeightStore {
        let mut store = WeightStore::new();
        store.add_values("w", &[4, 2], (0..8u8).map(f32::from).collect());
        store
    }

    fn rotation(signs: &[f32]) -> Rotation {
        Rotation { order: 2, signs: signs.into() }
    }

    #[test]
    fn transforms_follow_each_other_under_one_name() {
        let mut store = store();
        store.transform("w", Transform::ScaleRows([1.0, 2.0, 3.0, 4.0].into())).unwrap();
        store.transform("w", Transform::ScaleColumns([1.0, 0.5].into())).unwrap();
        assert_eq!(store.read_f32("w").unwrap(), [0.0, 0.5, 4.0, 3.0, 12.0, 7.5, 24.0, 14.0]);
        let copy = store.copy("w", "v").unwrap();
        store.transform("w", Transform::ScaleColumns([0.0, 0.0].into())).unwrap();
        assert_eq!(store.read_f32(&copy).unwrap()[2], 4.0);
        assert!(store.copy("w", "v").is_err());
    }

    #[test]
    fn rotations_change_signs_first_and_cover_rows_and_columns() {
        let root = 0.5f32.sqrt();
        let mut rows = store();
        rows.transform("w", Transform::RotateRows(rotation(&[1.0, -1.0, 1.0, 1.0]))).unwrap();
        let wanted = [-2.0, -2.0, 2.0, 4.0, 10.0, 12.0, -2.0, -2.0].map(|v: f32| v * root);
        let near = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5);
        assert!(near(&rows.read_f32("w").unwrap(), &wanted));
        assert!(rows.is_rotated("w", true) && !rows.is_rotated("w", false));
        let mut columns = store();
        columns.transform("w", Transform::RotateColumns(rotation(&[1.0, 1.0]))).unwrap();
        let wanted = [1.0, -1.0, 5.0, -1.0, 9.0, -1.0, 13.0, -1.0].map(|v: f32| v * root);
        assert!(near(&columns.read_f32("w").unwrap(), &wanted));
    }

    #[test]
    fn replaced_values_stay_uncompressed_and_checkpoints_bring_back_the_old() {
        let mut store = store();
        store.add_values("v", &[2], vec![1.0, 2.0]);
        let (before, revision) = (store.checkpoint(), store.revision());
        store.replace_values("w", vec![3.0; 8]).unwrap();
        store.replace_values("v", vec![4.0; 2]).unwrap();
        store.add_spilled("x", &[1, 2], vec![5.0; 2]).unwrap();
        assert!(store.revision() > revision);
        assert_eq!(store.info("w").unwrap().elem, Elem::F32);
        assert_eq!(store.view_f32("w").unwrap()[..], [3.0; 8]);
        assert_eq!(store.read_original_f32("w").unwrap()[1], 1.0);
        assert_eq!((&store.view_f32("v").unwrap()[..], store.contains("x")), (&[4.0, 4.0][..], true));
        assert!(store.replace_values("w", vec![0.0; 7]).is_err());
        assert!(store.replace_values("nothing", vec![]).is_err());
        assert!(store.add_spilled("w", &[1], vec![0.0]).is_err());
        store.restore(before);
        assert_eq!(store.read_f32("w").unwrap()[7], 7.0);
        assert_eq!((store.read_f32("v").unwrap(), store.contains("x")), (vec![1.0, 2.0], false));
        // What is in memory is not copied.
        let (a, b) = (store.view_f32("w").unwrap(), store.view_f32("w").unwrap());
        assert_eq!(a.as_ptr(), b.as_ptr());
    }

    #[test]
    fn stand_ins_keep_what_they_stand_for() {
        let mut store = store();
        store.add_values("v", &[2], vec![1.0, 2.0]);
        for value in [4.0, 5.0] {
            store.set_stand_in("v", vec![value; 2]).unwrap();
            assert_eq!(store.read_f32("v").unwrap(), [value; 2]);
            assert_eq!(store.read_original_f32("v").unwrap(), [1.0, 2.0]);
        }
        assert!(store.set_stand_in("v", vec![0.0; 3]).is_err());
        assert!(store.set_stand_in("nothing", vec![]).is_err());
        let codes = Encoded::zeros(attar_format::by_name("n4").unwrap(), 4, 32).unwrap();
        store.set_encoded("w", &codes).unwrap();
        assert!(store.set_stand_in("w", vec![0.0; 128]).is_err());
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut store = store();
        assert!(store.transform("w", Transform::ScaleRows([1.0; 3].into())).is_err());
        assert!(store.transform("w", Transform::ScaleColumns([1.0; 4].into())).is_err());
        assert!(
            store.transform("w", Transform::RotateRows(Rotation { order: 3, signs: [1.0].into() })).is_err()
        );
        assert!(store.transform("w", Transform::RotateColumns(rotation(&[1.0; 3]))).is_err());
        assert!(store.transform("x", Transform::ScaleRows([1.0].into())).is_err());
        // Others are computed from it.
        let name = WeightName::from("w");
        store.add_concat_rows("both", &[name.clone(), name]).unwrap();
        assert!(store.transform("w", Transform::ScaleColumns([2.0, 2.0].into())).is_err());
    }
}
