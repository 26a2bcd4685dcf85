//! safetensors: 8 bytes of header length, a JSON header, the bytes of all tensors.
//! Source: <https://github.com/huggingface/safetensors>, section Format.
//!
//! The header is read here and not by the `safetensors` crate, because that keeps the last of two tensors of one name
//! and stops at the first problem.

use super::check_overlaps;
use super::ggml_types::{BF16, F16, F32, GgmlType};
use super::tensor::TensorEntry;
use crate::error::{Error, ErrorKind, Problems, Result};
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use std::collections::BTreeSet;
use std::fmt;

/// The longest header a writer may make, as in the reference implementation.
const MAX_HEADER: u64 = 100_000_000;

/// Tensors of a file, in the order of its header.
///
/// # Errors
/// All problems of the header, each with its tensor.
pub fn parse(bytes: &[u8]) -> Result<Vec<TensorEntry>> {
    let Some((head, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(truncated("the header's length", 8, bytes.len()));
    };
    let len = u64::from_le_bytes(*head);
    if len > MAX_HEADER {
        return Err(Error::malformed(format!("a header of at most {MAX_HEADER} bytes"), len.to_string()));
    }
    let len = len as usize;
    let Some((json, data)) = rest.split_at_checked(len) else {
        return Err(truncated("the header", 8 + len, bytes.len()));
    };
    let header: Header =
        serde_json::from_slice(json).map_err(|e| Error::malformed("a JSON header", e.to_string()))?;

    let mut problems = Problems::new();
    let mut names = BTreeSet::new();
    let mut tensors = Vec::new();
    let mut end = 0;
    for (name, raw) in header.0 {
        if !names.insert(name.clone()) {
            problems.push(Error::malformed("one tensor of each name", "another").at_tensor(&name));
            continue;
        }
        end = end.max(raw.data_offsets.1);
        if let Some(t) = problems.keep(check(&name, &raw, 8 + len, data.len(), bytes.len())) {
            tensors.push(t);
        }
    }
    check_overlaps(&tensors, &mut problems);
    if problems.is_empty() && end < data.len() as u64 {
        let got = format!("{} bytes more", data.len() as u64 - end);
        problems.push(Error::malformed("the last tensor to end the file", got));
    }
    problems.finish(tensors)
}

fn check(name: &str, raw: &RawTensor, base: usize, data_len: usize, file_len: usize) -> Result<TensorEntry> {
    let here = |e: Error| e.at_tensor(name);
    let Some(kind) = kind_of(&raw.dtype) else {
        let kind =
            ErrorKind::UnsupportedType { got: raw.dtype.clone(), supported: "F32, F16, BF16".to_owned() };
        return Err(here(Error::new(kind)));
    };
    let (start, end) = raw.data_offsets;
    let values = raw.shape.iter().try_fold(1u64, |a, n| a.checked_mul(*n));
    let bytes = values.and_then(|v| kind.bytes(v));
    let shape = raw.shape.iter().map(|n| usize::try_from(*n)).collect::<std::result::Result<Vec<_>, _>>();
    let (Some(bytes), Ok(shape)) = (bytes, shape) else {
        let got = format!("{:?}", raw.shape);
        return Err(here(Error::malformed("a shape whose bytes can be counted", got)));
    };
    if end.checked_sub(start) != Some(bytes) {
        let expected = format!("{bytes} bytes for {} {:?}", raw.dtype, raw.shape);
        return Err(here(Error::malformed(expected, format!("offsets {start} to {end}"))));
    }
    if end > data_len as u64 {
        let needed = (base as u64).saturating_add(end);
        let kind = ErrorKind::Truncated { what: "the tensor".to_owned(), needed, len: file_len as u64 };
        return Err(here(Error::new(kind)));
    }
    Ok(TensorEntry { name: name.to_owned(), shape, kind, range: base + start as usize..base + end as usize })
}

fn kind_of(dtype: &str) -> Option<&'static GgmlType> {
    match dtype {
        "F32" => Some(&F32),
        "F16" => Some(&F16),
        "BF16" => Some(&BF16),
        _ => None,
    }
}

fn truncated(what: &str, needed: usize, len: usize) -> Error {
    Error::new(ErrorKind::Truncated { what: what.to_owned(), needed: needed as u64, len: len as u64 })
}

#[derive(serde::Deserialize)]
struct RawTensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// All entries but `__metadata__`, repeated names included.
struct Header(Vec<(String, RawTensor)>);

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(d: D) -> std::result::Result<Header, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Header, A::Error> {
                let mut list = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        list.push((name, map.next_value()?));
                    }
                }
                Ok(Header(list))
            }
        }
        d.deserialize_map(Entries)
    }
}
