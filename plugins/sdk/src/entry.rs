//! The library's one exported function, and the description it gives: made from what [`plugin!`](macro@crate::plugin) has registered.

use crate::abi::{
    ATTAR_ABI_MAJOR, ATTAR_ABI_MINOR, ATTAR_CODES_INT8, ATTAR_CODES_TABLE, ATTAR_ERROR, ATTAR_MISUSE,
    ATTAR_NUMERICS_EXACT, ATTAR_NUMERICS_LOSSY, ATTAR_NUMERICS_ROUNDING, ATTAR_OK, ATTAR_OPTION_BOOL,
    ATTAR_OPTION_CHOICE, ATTAR_OPTION_FLOAT, ATTAR_OPTION_INT, ATTAR_OPTION_TEXT, ATTAR_PANIC,
    ATTAR_PHASE_CANONICALIZE, ATTAR_PHASE_COMPRESS, ATTAR_PHASE_FUSE, ATTAR_SCALE_BF16,
    ATTAR_SCALE_ROW_F32_FIELD8, AttarFormat, AttarHost, AttarOption, AttarOptionValue, AttarPass,
    AttarPlugin, AttarRun, AttarStatus, AttarStr,
};
use crate::decl::{Codes, Format, Numerics, OptionDecl, OptionKind, OptionValue, Phase, Scale};
use crate::error::{Error, ErrorKind};
use crate::host::Host;
use crate::pass::{PassEntry, message_of, registered};
use crate::remote::{RemoteHost, status_of, text_of};
use std::ffi::c_void;
use std::panic::catch_unwind;
use std::sync::OnceLock;

/// Describes the plugin. `host` stays valid for as long as the library is loaded; `NULL` when there is nothing to describe.
///
/// # Safety
/// `host` must point to a host's table, or be null.
// SAFETY: no other function of that name is linked with this crate.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn attar_plugin_entry(host: *const AttarHost) -> *const AttarPlugin {
    let described = catch_unwind(|| {
        static DESCRIPTION: OnceLock<Description> = OnceLock::new();
        DESCRIPTION.get_or_init(Description::of_registered)
    });
    match described {
        Ok(description) if !host.is_null() => &raw const description.plugin,
        _ => std::ptr::null(),
    }
}

/// The description; what it points to is leaked, since it stays as long as the library.
struct Description {
    plugin: AttarPlugin,
}

// SAFETY: nothing changes once it is made.
unsafe impl Send for Description {}
// SAFETY: nothing changes once it is made.
unsafe impl Sync for Description {}

impl Description {
    fn of_registered() -> Description {
        let all = registered();
        let passes: Vec<AttarPass> = all.iter().flat_map(|r| r.passes).map(pass).collect();
        let formats: Vec<AttarFormat> = all.iter().flat_map(|r| r.formats).map(format).collect();
        let (name, version) = all.first().map_or(("", ""), |r| (r.name, r.version));
        let (passes, formats) = (passes.leak(), formats.leak());
        Description {
            plugin: AttarPlugin {
                size: size_of::<AttarPlugin>() as u32,
                abi_major: ATTAR_ABI_MAJOR,
                abi_minor: ATTAR_ABI_MINOR,
                name: str_of(name),
                version: str_of(version),
                passes: passes.as_ptr(),
                passes_len: passes.len(),
                formats: formats.as_ptr(),
                formats_len: formats.len(),
            },
        }
    }
}

/// A text for the host.
pub(crate) fn str_of(text: &str) -> AttarStr {
    AttarStr { data: text.as_ptr(), len: text.len() }
}

fn pass(entry: &'static PassEntry) -> AttarPass {
    let options: &[AttarOption] = entry.options.iter().map(option).collect::<Vec<_>>().leak();
    AttarPass {
        name: str_of(entry.about.name),
        summary: str_of(entry.about.summary),
        file: str_of(entry.file),
        phase: match entry.about.phase {
            Phase::Canonicalize => ATTAR_PHASE_CANONICALIZE,
            Phase::Compress => ATTAR_PHASE_COMPRESS,
            Phase::Fuse => ATTAR_PHASE_FUSE,
        },
        numerics: match entry.about.numerics {
            Numerics::Exact => ATTAR_NUMERICS_EXACT,
            Numerics::Rounding => ATTAR_NUMERICS_ROUNDING,
            Numerics::Lossy => ATTAR_NUMERICS_LOSSY,
        },
        takes_tensors: u32::from(entry.about.takes_tensors),
        options: options.as_ptr(),
        options_len: options.len(),
        context: std::ptr::from_ref(entry).cast(),
        run: Some(run),
    }
}

fn option(decl: &OptionDecl) -> AttarOption {
    let mut option = AttarOption {
        name: str_of(decl.name),
        doc: str_of(decl.doc),
        kind: ATTAR_OPTION_BOOL,
        has_default: 1,
        default_integer: 0,
        default_number: 0.0,
        default_text: str_of(""),
        min_integer: 0,
        max_integer: 0,
        min_number: 0.0,
        max_number: 0.0,
        choices: std::ptr::null(),
        choices_len: 0,
    };
    match decl.kind {
        OptionKind::Bool { default } => option.default_integer = i64::from(default),
        OptionKind::Int { default, min, max } => {
            option.kind = ATTAR_OPTION_INT;
            (option.default_integer, option.min_integer, option.max_integer) = (default, min, max);
        }
        OptionKind::Float { default, min, max } => {
            option.kind = ATTAR_OPTION_FLOAT;
            (option.default_number, option.min_number, option.max_number) = (default, min, max);
        }
        OptionKind::Choice { default, of } => {
            let words: &[AttarStr] = of.iter().map(|w| str_of(w)).collect::<Vec<_>>().leak();
            option.kind = ATTAR_OPTION_CHOICE;
            option.has_default = u32::from(default.is_some());
            option.default_text = str_of(default.unwrap_or(""));
            (option.choices, option.choices_len) = (words.as_ptr(), words.len());
        }
        OptionKind::Text { default } => {
            (option.kind, option.default_text) = (ATTAR_OPTION_TEXT, str_of(default));
        }
    }
    option
}

fn format(format: &'static Format) -> AttarFormat {
    let (codes, bits, entries, shift): (_, _, &[i8], _) = match format.codes {
        Codes::Int8 => (ATTAR_CODES_INT8, 8, &[], 0),
        Codes::Table { bits, entries, shift } => (ATTAR_CODES_TABLE, bits as u32, entries, shift),
    };
    let (scale, bias, choice_bits) = match format.scale {
        Scale::Bf16 => (ATTAR_SCALE_BF16, 0, 0),
        Scale::RowF32Field8 { bias, choice_bits } => (ATTAR_SCALE_ROW_F32_FIELD8, bias, choice_bits),
    };
    AttarFormat {
        name: str_of(format.name),
        source: str_of(format.source),
        codes,
        bits,
        group: format.group as u32,
        scale,
        bias,
        choice_bits,
        entries: entries.as_ptr(),
        entries_len: entries.len(),
        shift: i32::from(shift),
    }
}

/// Runs a pass for a host behind the C interface.
unsafe extern "C" fn run(
    context: *const c_void,
    host: *const AttarHost,
    run: AttarRun,
    options: *const AttarOptionValue,
    options_len: usize,
) -> AttarStatus {
    let outcome = catch_unwind(|| {
        if context.is_null() || host.is_null() || (options.is_null() && options_len > 0) {
            return ATTAR_MISUSE;
        }
        // SAFETY: the context is what `pass` put into the description, and hosts hand it on as it is.
        let entry = unsafe { &*context.cast::<PassEntry>() };
        // SAFETY: a host gives its table and as many options as it says, all valid during the call.
        let (mut host, options) = unsafe {
            let options =
                if options_len == 0 { &[] } else { std::slice::from_raw_parts(options, options_len) };
            (RemoteHost::new(host, run), options)
        };
        let values = options.iter().map(|o| {
            // SAFETY: the texts of options are valid during the call.
            let (name, text) = unsafe { (text_of(o.name), text_of(o.text)) };
            let value = match o.kind {
                ATTAR_OPTION_BOOL => OptionValue::Bool(o.integer != 0),
                ATTAR_OPTION_INT => OptionValue::Int(o.integer),
                ATTAR_OPTION_FLOAT => OptionValue::Float(o.number),
                _ => OptionValue::Text(text),
            };
            (name, value)
        });
        let result = (entry.run)(values.collect(), &mut host);
        finish(&mut host, result)
    });
    outcome.unwrap_or_else(|panic| {
        // Outside of the pass itself there is little that can panic; its message is lost where there is no host.
        let _ = message_of(&*panic);
        ATTAR_PANIC
    })
}

/// Tells the host why a pass failed.
fn finish(host: &mut RemoteHost, result: crate::Result<()>) -> AttarStatus {
    match result {
        Ok(()) => ATTAR_OK,
        Err(error) => {
            let said = host.fail(&message_with_call(&error));
            match status_of(error.kind) {
                ATTAR_OK => ATTAR_ERROR,
                status if said.is_ok() || error.kind == ErrorKind::Cancelled => status,
                _ => ATTAR_MISUSE,
            }
        }
    }
}

fn message_with_call(error: &Error) -> String {
    match error.call {
        Some(call) => format!("{call}: {}", error.message),
        None => error.message.clone(),
    }
}
