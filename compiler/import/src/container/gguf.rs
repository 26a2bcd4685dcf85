//! GGUF versions 2 and 3: metadata, tensor infos, tensor data, little-endian.
//! Source: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.
//!
//! Metadata arrays stay where they are in the file: a header costs memory for its keys and tensor infos, each of which
//! takes more bytes in the file than its smallest form here, so no count can ask for more than the file is long.

use super::check_overlaps;
use super::ggml_types;
use super::tensor::TensorEntry;
use crate::error::{Error, ErrorKind, Problems, Result};
use indexmap::IndexMap;
use std::collections::BTreeSet;
use std::ops::Range;

/// Metadata and tensors of a file.
#[derive(Clone, Debug)]
pub struct Gguf {
    pub version: u32,
    pub metadata: IndexMap<String, Value>,
    pub tensors: Vec<TensorEntry>,
}

/// One metadata value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Str(String),
    /// Elements are decoded when asked for, from the file the header was read from.
    Array(Array),
}

/// An array of metadata: `count` elements of `elem` at `range` of the file, checked to be readable.
#[derive(Clone, Debug, PartialEq)]
pub struct Array {
    pub elem: ValueType,
    pub count: usize,
    range: Range<usize>,
}

/// Type of a metadata value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ValueType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    Str,
    Array,
    U64,
    I64,
    F64,
}

impl ValueType {
    /// In the order of their numbers.
    const ALL: [ValueType; 13] = [
        ValueType::U8,
        ValueType::I8,
        ValueType::U16,
        ValueType::I16,
        ValueType::U32,
        ValueType::I32,
        ValueType::F32,
        ValueType::Bool,
        ValueType::Str,
        ValueType::Array,
        ValueType::U64,
        ValueType::I64,
        ValueType::F64,
    ];

    /// Bytes of one value, at least.
    fn min_bytes(self) -> usize {
        match self {
            ValueType::U8 | ValueType::I8 | ValueType::Bool => 1,
            ValueType::U16 | ValueType::I16 => 2,
            ValueType::U32 | ValueType::I32 | ValueType::F32 => 4,
            ValueType::U64 | ValueType::I64 | ValueType::F64 | ValueType::Str => 8,
            ValueType::Array => 12,
        }
    }
}

/// Arrays of arrays of arrays … that deep are refused.
const MAX_DEPTH: usize = 4;
/// Dimensions of a tensor, at most, as in ggml.
const MAX_DIMS: u32 = 4;
/// Bytes of a metadata key, at most, as the specification says.
const MAX_KEY: usize = 65_535;

/// Reads the header of a file.
///
/// # Errors
/// What is wrong with the metadata, or all that is wrong with the tensor infos.
pub fn parse(bytes: &[u8]) -> Result<Gguf> {
    let mut c = Cursor { bytes, at: 0 };
    let magic = c.take(4, "the magic")?;
    if magic != b"GGUF" {
        let expected = "a file that begins with GGUF (of safetensors, give the folder)";
        return Err(Error::malformed(expected, format!("{magic:02x?}")));
    }
    let version = c.u32("the version")?;
    if !matches!(version, 2 | 3) {
        let got = match version.swap_bytes() {
            2 | 3 => "GGUF in big-endian byte order".to_owned(),
            _ => format!("GGUF version {version}"),
        };
        let supported = "little-endian versions 2 and 3; convert the model again".to_owned();
        return Err(Error::new(ErrorKind::Unsupported { got, supported }));
    }
    let n_tensors = c.u64("the tensor count")?;
    let n_metadata = c.u64("the metadata count")?;
    // name length, dimension count, type, offset / key length, type, value
    c.fits(n_tensors, 24, "tensors")?;
    c.fits(n_metadata, 13, "metadata entries")?;

    let mut metadata = IndexMap::new();
    for _ in 0..n_metadata {
        let key = c.string(MAX_KEY, "a metadata key")?;
        let value = c.value().map_err(|e| e.at_key(&key))?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(Error::malformed("one value of each key", "another").at_key(key));
        }
    }
    let alignment = match metadata.get("general.alignment") {
        None => 32,
        Some(Value::Unsigned(n)) if n.is_power_of_two() && *n <= 1 << 30 => *n,
        Some(v) => {
            return Err(Error::malformed("a power of two", format!("{v:?}")).at_key("general.alignment"));
        }
    };

    let mut infos = Vec::new();
    for _ in 0..n_tensors {
        infos.push(c.tensor_info()?);
    }
    let base = (c.at as u64).next_multiple_of(alignment);
    let mut problems = Problems::new();
    let mut names = BTreeSet::new();
    let mut tensors = Vec::new();
    for info in infos {
        if !names.insert(info.name.clone()) {
            problems.push(Error::malformed("one tensor of each name", "another").at_tensor(info.name));
            continue;
        }
        let name = info.name.clone();
        if let Some(t) =
            problems.keep(info.check(base, alignment, bytes.len()).map_err(|e| e.at_tensor(name)))
        {
            tensors.push(t);
        }
    }
    check_overlaps(&tensors, &mut problems);
    problems.finish(Gguf { version, metadata, tensors })
}

struct TensorInfo {
    name: String,
    /// Innermost dimension first.
    dims: Vec<u64>,
    kind: u32,
    offset: u64,
}

impl TensorInfo {
    fn check(self, base: u64, alignment: u64, file_len: usize) -> Result<TensorEntry> {
        let Some(kind) = ggml_types::by_id(self.kind) else {
            let got = ggml_types::name_of(self.kind);
            return Err(Error::new(ErrorKind::UnsupportedType { got, supported: ggml_types::names() }));
        };
        let row = self.dims.first().copied().unwrap_or(1);
        if !row.is_multiple_of(kind.block_values as u64) {
            let expected = format!("rows of a multiple of {} values for {}", kind.block_values, kind.name);
            return Err(Error::malformed(expected, format!("{row}")));
        }
        let values = self.dims.iter().try_fold(1u64, |a, n| a.checked_mul(*n));
        let shape =
            self.dims.iter().rev().map(|n| usize::try_from(*n)).collect::<std::result::Result<Vec<_>, _>>();
        let (Some(len), Ok(shape)) = (values.and_then(|v| kind.bytes(v)), shape) else {
            return Err(Error::malformed("a shape whose bytes can be counted", format!("{:?}", self.dims)));
        };
        if !self.offset.is_multiple_of(alignment) {
            let expected = format!("an offset that is a multiple of {alignment}");
            return Err(Error::malformed(expected, self.offset.to_string()));
        }
        let end = base.checked_add(self.offset).and_then(|start| start.checked_add(len));
        match end {
            Some(end) if end <= file_len as u64 => {
                let range = (end - len) as usize..end as usize;
                Ok(TensorEntry { name: self.name, shape, kind, range })
            }
            _ => {
                let needed = end.unwrap_or(u64::MAX);
                let what = "the tensor".to_owned();
                Err(Error::new(ErrorKind::Truncated { what, needed, len: file_len as u64 }))
            }
        }
    }
}

/// Reads forward; every length is checked against what is left.
#[derive(Clone)]
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize, what: &str) -> Result<&'a [u8]> {
        let left = &self.bytes[self.at..];
        let Some(part) = left.get(..n) else {
            let kind = ErrorKind::Truncated {
                what: what.to_owned(),
                needed: (self.at as u64).saturating_add(n as u64),
                len: self.bytes.len() as u64,
            };
            return Err(Error::new(kind));
        };
        self.at += n;
        Ok(part)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N, what)?);
        Ok(out)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// Checks that `count` things of at least `each` bytes can still come.
    fn fits(&self, count: u64, each: usize, what: &str) -> Result<usize> {
        let needed = count.checked_mul(each as u64).and_then(|n| n.checked_add(self.at as u64));
        if needed.is_some_and(|n| n <= self.bytes.len() as u64) {
            return Ok(count as usize);
        }
        let kind = ErrorKind::Truncated {
            what: format!("{count} {what}"),
            needed: needed.unwrap_or(u64::MAX),
            len: self.bytes.len() as u64,
        };
        Err(Error::new(kind))
    }

    /// The bytes of a string, not yet checked to be UTF-8.
    fn string_bytes(&mut self, max: usize, what: &str) -> Result<&'a [u8]> {
        let len = self.u64(what)?;
        if len > max as u64 {
            return Err(Error::malformed(format!("{what} of at most {max} bytes"), len.to_string()));
        }
        self.take(len as usize, what)
    }

    fn string(&mut self, max: usize, what: &str) -> Result<String> {
        let bytes = self.string_bytes(max, what)?;
        let text = std::str::from_utf8(bytes).map_err(|e| {
            Error::malformed(format!("{what} in UTF-8"), format!("an invalid byte at {}", e.valid_up_to()))
        })?;
        Ok(text.to_owned())
    }

    fn value_type(&mut self) -> Result<ValueType> {
        let n = self.u32("a value's type")?;
        let known = ValueType::ALL.get(n as usize).copied();
        known.ok_or_else(|| Error::malformed("a value type from 0 to 12", n.to_string()))
    }

    fn value(&mut self) -> Result<Value> {
        let ty = self.value_type()?;
        if ty == ValueType::Array {
            let elem = self.value_type()?;
            let count = self.u64("an array's length")?;
            let count = self.fits(count, elem.min_bytes(), "array elements")?;
            let start = self.at;
            self.skip(elem, count, 1)?;
            return Ok(Value::Array(Array { elem, count, range: start..self.at }));
        }
        self.scalar(ty)
    }

    fn scalar(&mut self, ty: ValueType) -> Result<Value> {
        const WHAT: &str = "a value";
        Ok(match ty {
            ValueType::U8 => Value::Unsigned(u64::from(u8::from_le_bytes(self.array(WHAT)?))),
            ValueType::U16 => Value::Unsigned(u64::from(u16::from_le_bytes(self.array(WHAT)?))),
            ValueType::U32 => Value::Unsigned(u64::from(self.u32(WHAT)?)),
            ValueType::U64 => Value::Unsigned(self.u64(WHAT)?),
            ValueType::I8 => Value::Signed(i64::from(i8::from_le_bytes(self.array(WHAT)?))),
            ValueType::I16 => Value::Signed(i64::from(i16::from_le_bytes(self.array(WHAT)?))),
            ValueType::I32 => Value::Signed(i64::from(i32::from_le_bytes(self.array(WHAT)?))),
            ValueType::I64 => Value::Signed(i64::from_le_bytes(self.array(WHAT)?)),
            ValueType::F32 => Value::Float(f64::from(f32::from_le_bytes(self.array(WHAT)?))),
            ValueType::F64 => Value::Float(f64::from_le_bytes(self.array(WHAT)?)),
            ValueType::Bool => match u8::from_le_bytes(self.array(WHAT)?) {
                0 => Value::Bool(false),
                1 => Value::Bool(true),
                n => return Err(Error::malformed("a bool of 0 or 1", n.to_string())),
            },
            ValueType::Str => Value::Str(self.string(usize::MAX, "a string")?),
            ValueType::Array => return Err(Error::malformed("a scalar", "an array")),
        })
    }

    /// Walks over array elements, checking that they are there.
    fn skip(&mut self, elem: ValueType, count: usize, depth: usize) -> Result<()> {
        match elem {
            ValueType::Str => {
                for _ in 0..count {
                    self.string_bytes(usize::MAX, "a string")?;
                }
            }
            ValueType::Array => {
                if depth >= MAX_DEPTH {
                    return Err(Error::malformed(
                        format!("arrays nested {MAX_DEPTH} deep at most"),
                        "deeper",
                    ));
                }
                for _ in 0..count {
                    let inner = self.value_type()?;
                    let n = self.u64("an array's length")?;
                    let n = self.fits(n, inner.min_bytes(), "array elements")?;
                    self.skip(inner, n, depth + 1)?;
                }
            }
            plain => {
                self.take(count * plain.min_bytes(), "array elements")?;
            }
        }
        Ok(())
    }

    fn tensor_info(&mut self) -> Result<TensorInfo> {
        let name = self.string(MAX_KEY, "a tensor's name")?;
        let n_dims = self.u32("a tensor's dimension count").map_err(|e| e.at_tensor(&name))?;
        if n_dims > MAX_DIMS {
            let expected = format!("{MAX_DIMS} dimensions at most");
            return Err(Error::malformed(expected, n_dims.to_string()).at_tensor(name));
        }
        let mut rest = || -> Result<_> {
            let dims = (0..n_dims).map(|_| self.u64("a tensor's dimensions")).collect::<Result<_>>()?;
            Ok((dims, self.u32("a tensor's type")?, self.u64("a tensor's offset")?))
        };
        let (dims, kind, offset) = rest().map_err(|e| e.at_tensor(&name))?;
        Ok(TensorInfo { name, dims, kind, offset })
    }
}

impl Array {
    /// The elements, from the bytes the header was read from.
    ///
    /// # Errors
    /// When an element is malformed (a string that is not UTF-8, a bool that is neither 0 nor 1) or is an array itself.
    pub fn values(&self, bytes: &[u8]) -> Result<Vec<Value>> {
        let mut c = self.cursor(bytes)?;
        (0..self.count).map(|_| c.scalar(self.elem)).collect()
    }

    /// The elements of an array of strings.
    ///
    /// # Errors
    /// When the elements are no strings, or one is not UTF-8.
    pub fn strings<'a>(&self, bytes: &'a [u8]) -> Result<Vec<&'a str>> {
        if self.elem != ValueType::Str {
            return Err(Error::malformed("an array of strings", format!("one of {:?}", self.elem)));
        }
        let mut c = self.cursor(bytes)?;
        let one = |i: usize| {
            let s = c.string_bytes(usize::MAX, "a string")?;
            std::str::from_utf8(s).map_err(|_| Error::malformed("UTF-8", format!("element {i} that is not")))
        };
        (0..self.count).map(one).collect()
    }

    fn cursor<'a>(&self, bytes: &'a [u8]) -> Result<Cursor<'a>> {
        match bytes.get(..self.range.end) {
            Some(bytes) => Ok(Cursor { bytes, at: self.range.start }),
            None => Err(Error::malformed("the file of this header", "a shorter one")),
        }
    }
}

impl Gguf {
    /// A number that is not negative.
    ///
    /// # Errors
    /// When the key holds something else.
    pub fn unsigned(&self, key: &str) -> Result<Option<u64>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Unsigned(n)) => Ok(Some(*n)),
            Some(Value::Signed(n)) if *n >= 0 => Ok(Some(n.cast_unsigned())),
            Some(v) => Err(Error::config(key, "a number that is not negative", v.describe())),
        }
    }

    /// A number.
    ///
    /// # Errors
    /// When the key holds something else.
    pub fn float(&self, key: &str) -> Result<Option<f64>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Float(x)) => Ok(Some(*x)),
            Some(Value::Unsigned(n)) => Ok(Some(*n as f64)),
            Some(Value::Signed(n)) => Ok(Some(*n as f64)),
            Some(v) => Err(Error::config(key, "a number", v.describe())),
        }
    }

    /// A flag.
    ///
    /// # Errors
    /// When the key holds something else.
    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Bool(b)) => Ok(Some(*b)),
            Some(v) => Err(Error::config(key, "true or false", v.describe())),
        }
    }

    /// A text.
    ///
    /// # Errors
    /// When the key holds something else.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Str(s)) => Ok(Some(s)),
            Some(v) => Err(Error::config(key, "a text", v.describe())),
        }
    }

    /// An array.
    ///
    /// # Errors
    /// When the key holds something else.
    pub fn array(&self, key: &str) -> Result<Option<&Array>> {
        match self.metadata.get(key) {
            None => Ok(None),
            Some(Value::Array(a)) => Ok(Some(a)),
            Some(v) => Err(Error::config(key, "an array", v.describe())),
        }
    }

    /// The tensor of that name.
    pub fn tensor(&self, name: &str) -> Option<&TensorEntry> {
        self.tensors.iter().find(|t| t.name == name)
    }
}

impl Value {
    /// For messages: short, whatever the value.
    fn describe(&self) -> String {
        match self {
            Value::Unsigned(n) => n.to_string(),
            Value::Signed(n) => n.to_string(),
            Value::Float(x) => x.to_string(),
            Value::Bool(b) => b.to_string(),
            Value::Str(s) => format!("{:?}", s.chars().take(40).collect::<String>()),
            Value::Array(a) => format!("an array of {} values", a.count),
        }
    }
}
