//! Reads what a library says of itself, and refuses what cannot be.

use crate::session::{list_in, text_in};
use attar_format::described::Codes;
use attar_format::{Description, Scale};
use attar_pass::{Numerics, OptionDecl, OptionKind, Phase};
use attar_plugin::Result;
use attar_plugin::abi::*;
use std::ffi::c_void;

/// Most passes, formats, options and words of a choice.
const MOST: usize = 256;

/// The function that runs a pass.
pub(crate) type RunFn = unsafe extern "C" fn(
    *const c_void,
    *const AttarHost,
    AttarRun,
    *const AttarOptionValue,
    usize,
) -> AttarStatus;

/// A pass as described, in texts that live for ever: so do declarations.
pub(crate) struct DescribedPass {
    pub(crate) name: &'static str,
    pub(crate) summary: &'static str,
    pub(crate) file: &'static str,
    pub(crate) phase: Phase,
    pub(crate) numerics: Numerics,
    pub(crate) takes_tensors: bool,
    pub(crate) options: &'static [OptionDecl],
    pub(crate) context: *const c_void,
    pub(crate) run: RunFn,
}

/// What is wrong, and with what.
pub(crate) type Problem = (String, String);

fn leaked(text: &str) -> &'static str {
    text.to_owned().leak()
}

fn problem<T>(what: &str, result: Result<T>) -> std::result::Result<T, Problem> {
    result.map_err(|e| (what.to_owned(), e.message))
}

fn wrong<T>(what: &str, problem: impl Into<String>) -> std::result::Result<T, Problem> {
    Err((what.to_owned(), problem.into()))
}

/// The passes of a description.
///
/// # Safety
/// Unless they are null, pointers must be valid for reads of as much as the description says.
pub(crate) unsafe fn passes(plugin: &AttarPlugin) -> std::result::Result<Vec<DescribedPass>, Problem> {
    // SAFETY: as the caller promises; so below.
    let list = unsafe { problem("passes", list_in("passes", plugin.passes, plugin.passes_len, MOST))? };
    // SAFETY: as above.
    list.iter().map(|p| unsafe { pass(p) }).collect()
}

/// The formats of a description.
///
/// # Safety
/// As for [`passes`].
pub(crate) unsafe fn formats(plugin: &AttarPlugin) -> std::result::Result<Vec<Description>, Problem> {
    // SAFETY: as the caller promises; so below.
    let list = unsafe { problem("formats", list_in("formats", plugin.formats, plugin.formats_len, MOST))? };
    // SAFETY: as above.
    list.iter().map(|f| unsafe { format(f) }).collect()
}

/// Name and version of a plugin.
///
/// # Safety
/// As for [`passes`].
pub(crate) unsafe fn name(plugin: &AttarPlugin) -> std::result::Result<(String, String), Problem> {
    // SAFETY: as the caller promises; so below.
    let name = unsafe { problem("name", text_in("name", plugin.name))? };
    // SAFETY: as above.
    let version = unsafe { problem("version", text_in("version", plugin.version))? };
    if name.is_empty() || name.len() > 64 || name.chars().any(|c| c.is_control() || c == '"') {
        return wrong("name", format!("{name:?} is none"));
    }
    if version.len() > 64 || version.chars().any(|c| c.is_control() || c == '"') {
        return wrong("version", format!("{version:?} is none"));
    }
    Ok((name.to_owned(), version.to_owned()))
}

unsafe fn pass(p: &AttarPass) -> std::result::Result<DescribedPass, Problem> {
    // SAFETY: as the caller promises; so below.
    let name = unsafe { problem("name of a pass", text_in("name", p.name))? };
    let starts = name.bytes().next().is_some_and(|b| b.is_ascii_lowercase());
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    if !starts || name.len() > 64 || !name.bytes().all(plain) {
        return wrong("name of a pass", format!("{name:?}: expected lower-case letters, digits and dashes"));
    }
    let what = format!("pass {name}");
    // SAFETY: as above.
    let summary = unsafe { problem(&what, text_in("summary", p.summary))? };
    // SAFETY: as above.
    let file = unsafe { problem(&what, text_in("file", p.file))? };
    if summary.is_empty() || summary.contains('\n') {
        return wrong(&what, "summary: expected one sentence");
    }
    let phase = match p.phase {
        ATTAR_PHASE_CANONICALIZE => Phase::Canonicalize,
        ATTAR_PHASE_COMPRESS => Phase::Compress,
        ATTAR_PHASE_FUSE => Phase::Fuse,
        other => return wrong(&what, format!("phase: {other} is none")),
    };
    let numerics = match p.numerics {
        ATTAR_NUMERICS_EXACT => Numerics::Exact,
        ATTAR_NUMERICS_ROUNDING => Numerics::Rounding,
        ATTAR_NUMERICS_LOSSY => Numerics::Lossy,
        other => return wrong(&what, format!("numerics: {other} is none")),
    };
    let Some(run) = p.run else { return wrong(&what, "run: there is no function") };
    // SAFETY: as above.
    let list = unsafe { problem(&what, list_in("options", p.options, p.options_len, MOST))? };
    let mut options: Vec<OptionDecl> = Vec::with_capacity(list.len());
    for o in list {
        // SAFETY: as above.
        let decl = unsafe { option(&what, o)? };
        if options.iter().any(|other| other.name == decl.name) {
            return wrong(&what, format!("two options are called {}", decl.name));
        }
        options.push(decl);
    }
    Ok(DescribedPass {
        name: leaked(name),
        summary: leaked(summary),
        file: leaked(file),
        phase,
        numerics,
        takes_tensors: p.takes_tensors != 0,
        options: options.leak(),
        context: p.context,
        run,
    })
}

unsafe fn option(pass: &str, o: &AttarOption) -> std::result::Result<OptionDecl, Problem> {
    // SAFETY: as the caller promises; so below.
    let name = unsafe { problem(pass, text_in("name of an option", o.name))? };
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
    let taken = ["name", "tensors", "exclude"].contains(&name);
    if name.is_empty() || name.len() > 64 || !name.bytes().all(plain) || taken {
        return wrong(
            pass,
            format!("option {name:?}: expected lower-case letters, digits and _, and no key of recipes"),
        );
    }
    let what = format!("{pass}, option {name}");
    // SAFETY: as above.
    let doc = unsafe { problem(&what, text_in("doc", o.doc))? };
    let kind = match o.kind {
        ATTAR_OPTION_BOOL => OptionKind::Bool { default: o.default_integer != 0 },
        ATTAR_OPTION_INT => {
            let (default, min, max) = (o.default_integer, o.min_integer, o.max_integer);
            if !(min..=max).contains(&default) {
                return wrong(&what, format!("default {default} is not within {min} to {max}"));
            }
            OptionKind::Int { default, min, max }
        }
        ATTAR_OPTION_FLOAT => {
            let (default, min, max) = (o.default_number, o.min_number, o.max_number);
            if !(min.is_finite() && max.is_finite() && (min..=max).contains(&default)) {
                return wrong(&what, format!("default {default} is not within {min} to {max}"));
            }
            OptionKind::Float { default, min, max }
        }
        ATTAR_OPTION_CHOICE => {
            // SAFETY: as above.
            let words = unsafe { problem(&what, list_in("choices", o.choices, o.choices_len, MOST))? };
            let mut of: Vec<&'static str> = Vec::with_capacity(words.len());
            for word in words {
                // SAFETY: as above.
                of.push(leaked(unsafe { problem(&what, text_in("word", *word))? }));
            }
            // SAFETY: as above.
            let default = unsafe { problem(&what, text_in("default", o.default_text))? };
            let default = match o.has_default {
                0 => None,
                _ => Some(leaked(default)),
            };
            if of.is_empty() || default.is_some_and(|d| !of.contains(&d)) {
                return wrong(&what, "the default is none of the words");
            }
            OptionKind::Choice { default, of: of.leak() }
        }
        ATTAR_OPTION_TEXT => {
            // SAFETY: as above.
            let default = unsafe { problem(&what, text_in("default", o.default_text))? };
            OptionKind::Text { default: leaked(default) }
        }
        other => return wrong(&what, format!("kind: {other} is none")),
    };
    Ok(OptionDecl { name: leaked(name), kind, doc: leaked(doc) })
}

unsafe fn format(f: &AttarFormat) -> std::result::Result<Description, Problem> {
    // SAFETY: as the caller promises; so below.
    let name = unsafe { problem("name of a format", text_in("name", f.name))? };
    let what = format!("format {name}");
    // SAFETY: as above.
    let source = unsafe { problem(&what, text_in("source", f.source))? };
    let codes = match f.codes {
        ATTAR_CODES_INT8 => Codes::Int8,
        ATTAR_CODES_TABLE => {
            // SAFETY: as above.
            let entries = unsafe { problem(&what, list_in("entries", f.entries, f.entries_len, 64))? };
            let Ok(shift) = i8::try_from(f.shift) else { return wrong(&what, format!("shift {}", f.shift)) };
            Codes::Table { bits: f.bits as usize, entries: entries.to_vec(), shift }
        }
        other => return wrong(&what, format!("codes: {other} is no kind that plugins describe")),
    };
    let scale = match f.scale {
        ATTAR_SCALE_BF16 => Scale::Bf16,
        ATTAR_SCALE_ROW_F32_FIELD8 => Scale::RowF32Field8 { bias: f.bias, choice_bits: f.choice_bits },
        other => return wrong(&what, format!("scale: {other} is no kind that plugins describe")),
    };
    Ok(Description {
        name: name.to_owned(),
        source: source.to_owned(),
        codes,
        group: f.group as usize,
        scale,
    })
}
