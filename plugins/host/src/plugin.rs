//! A loaded library and its passes.

use crate::description::{self, DescribedPass};
use crate::error::{Error, ErrorKind, Result};
use crate::session;
use crate::table::HOST;
use attar_format::FormatRef;
use attar_ir::Graph;
use attar_pass::plugin::GraphHost;
use attar_pass::{OptionDecl, OptionKind, Options, PassCx, PassDecl, Value};
use attar_plugin::abi::{
    ATTAR_ABI_MAJOR, ATTAR_ABI_MINOR, ATTAR_CANCELLED, ATTAR_OK, ATTAR_OPTION_BOOL, ATTAR_OPTION_CHOICE,
    ATTAR_OPTION_FLOAT, ATTAR_OPTION_INT, AttarHost, AttarOptionValue, AttarPlugin, AttarStr,
};
use std::ffi::c_void;
use std::path::{Path, PathBuf};

/// The one function a plugin exports.
pub const ENTRY: &str = "attar_plugin_entry";

/// Size of the description in version 1.0: no plugin of this major has a smaller one.
const LEAST_SIZE: u32 = 72;
const _: () = assert!(size_of::<usize>() != 8 || size_of::<AttarPlugin>() == LEAST_SIZE as usize);

/// A plugin that is loaded. It stays so until the process ends.
#[derive(Clone, Debug)]
pub struct Plugin {
    pub name: String,
    pub version: String,
    /// The library.
    pub path: PathBuf,
    /// BLAKE3 of the file, hexadecimal.
    pub blake3: String,
    /// Version of the interface the plugin was compiled for.
    pub abi: (u16, u16),
    pub passes: Vec<&'static PassDecl>,
    pub formats: Vec<FormatRef>,
}

impl Plugin {
    /// BLAKE3 of a library, hexadecimal, without loading it.
    ///
    /// # Errors
    /// [`ErrorKind::Io`].
    pub fn hash(path: &Path) -> Result<String> {
        let bytes = std::fs::read(path).map_err(|e| Error::new(path, ErrorKind::Io(e)))?;
        Ok(blake3::hash(&bytes).to_hex().to_string())
    }

    /// Loads a library: runs its code. `allowed` are the hashes it may have, by default any.
    ///
    /// # Errors
    /// [`Error`].
    pub fn load(path: &Path, allowed: Option<&[String]>) -> Result<Plugin> {
        let fail = |kind| Error::new(path, kind);
        // A name without a folder would be looked for elsewhere.
        let whole = path.canonicalize().map_err(|e| fail(ErrorKind::Io(e)))?;
        let hash = Plugin::hash(&whole).map_err(|e| fail(e.kind))?;
        if allowed.is_some_and(|list| !list.iter().any(|h| h.eq_ignore_ascii_case(&hash))) {
            return Err(fail(ErrorKind::NotAllowed { hash }));
        }
        let description = described(&whole).map_err(fail)?;
        let wrong = |(what, problem)| fail(ErrorKind::Description { what, problem });
        // SAFETY: the description is the library's, and stays; so below.
        let (name, version) = unsafe { description::name(description) }.map_err(wrong)?;
        // SAFETY: as above.
        let passes = unsafe { description::passes(description) }.map_err(wrong)?;
        // SAFETY: as above.
        let formats = unsafe { description::formats(description) }.map_err(wrong)?;
        let formats = formats.iter().map(|f| {
            let registered = f.register();
            registered.map_err(|problem| wrong((format!("format {}", f.name), problem)))
        });
        let formats = formats.collect::<Result<Vec<_>>>()?;
        let title = if version.is_empty() { name.clone() } else { format!("{name} {version}") };
        let passes = passes.into_iter().map(|p| declared(p, &title)).collect();
        let abi = (description.abi_major, description.abi_minor);
        Ok(Plugin { name, version, path: path.to_owned(), blake3: hash, abi, passes, formats })
    }

    /// Runs the passes of a library while there is no run, so that the host answers every call with an error, and gives
    /// those that say all the same that they are done. What the conformance kit does in a process of its own.
    ///
    /// # Errors
    /// [`Error`].
    pub fn run_astray(path: &Path) -> Result<Vec<&'static str>> {
        let fail = |kind| Error::new(path, kind);
        let whole = path.canonicalize().map_err(|e| fail(ErrorKind::Io(e)))?;
        let description = described(&whole).map_err(fail)?;
        // SAFETY: the description is the library's, and stays.
        let passes = unsafe { description::passes(description) };
        let passes = passes.map_err(|(what, problem)| fail(ErrorKind::Description { what, problem }))?;
        let mut deaf = Vec::new();
        for pass in passes {
            let value = |option: &OptionDecl| match (option.default(), option.kind) {
                (None, OptionKind::Choice { of, .. }) => {
                    Value::Text(of.first().copied().unwrap_or("").to_owned())
                }
                (default, _) => default.unwrap_or(Value::Bool(false)),
            };
            let given: Vec<Value> = pass.options.iter().map(value).collect();
            let values: Vec<AttarOptionValue> = pass
                .options
                .iter()
                .zip(&given)
                .map(|(option, value)| option_value(option.name, value))
                .collect();
            // SAFETY: the function is the library's, for this context; the table and the options live during the call.
            let status =
                unsafe { (pass.run)(pass.context, &raw const HOST, 0, values.as_ptr(), values.len()) };
            if status == ATTAR_OK {
                deaf.push(pass.name);
            }
        }
        Ok(deaf)
    }
}

/// Loads a library and asks it for its description.
fn described(library: &Path) -> std::result::Result<&'static AttarPlugin, ErrorKind> {
    // SAFETY: loading runs the library's own code. The user has named it, which is to trust it.
    let library = unsafe { libloading::Library::new(library) };
    let library = library.map_err(|e| ErrorKind::Open { problem: chain(&e) })?;
    // Passes and descriptions live for ever, and so must what they point to.
    let library: &'static libloading::Library = Box::leak(Box::new(library));
    type Entry = unsafe extern "C" fn(*const AttarHost) -> *const AttarPlugin;
    // SAFETY: a library that exports a function of this name means this one.
    let entry = unsafe { library.get::<Entry>(ENTRY.as_bytes()) }.map_err(|_| ErrorKind::NoEntry)?;
    // SAFETY: the table is what the function asks for, and it gives null or a description that stays.
    unsafe { checked(entry(&raw const HOST)) }
}

/// An error and what caused it.
fn chain(e: &dyn std::error::Error) -> String {
    let mut text = e.to_string();
    let mut cause = e.source();
    while let Some(e) = cause {
        text = format!("{text}: {e}");
        cause = e.source();
    }
    text
}

/// A description of this major version.
///
/// # Safety
/// `plugin` must be null or valid for reads, of as much as its size says, for ever.
unsafe fn checked(plugin: *const AttarPlugin) -> std::result::Result<&'static AttarPlugin, ErrorKind> {
    if plugin.is_null() || !plugin.is_aligned() {
        return Err(ErrorKind::NoDescription);
    }
    // SAFETY: every description of any version begins with size and version.
    let (size, major, minor) = unsafe {
        (
            (&raw const (*plugin).size).read(),
            (&raw const (*plugin).abi_major).read(),
            (&raw const (*plugin).abi_minor).read(),
        )
    };
    if major != ATTAR_ABI_MAJOR {
        let host = (ATTAR_ABI_MAJOR, ATTAR_ABI_MINOR);
        return Err(ErrorKind::Major { plugin: (major, minor), host });
    }
    if size < LEAST_SIZE {
        let problem = format!("{size} bytes, and a description has at least {LEAST_SIZE}");
        return Err(ErrorKind::Description { what: "size".to_owned(), problem });
    }
    // SAFETY: it is of this major, and as large as its first version.
    Ok(unsafe { &*plugin })
}

fn declared(p: DescribedPass, plugin: &str) -> &'static PassDecl {
    let (context, target, plugin) = (Context(p.context), p.run, plugin.to_owned());
    let run = move |options: &Options, graph: &mut Graph, cx: &mut PassCx<'_>| {
        let values: Vec<AttarOptionValue> =
            options.values().iter().map(|(name, value)| option_value(name, value)).collect();
        let mut host = GraphHost::new(graph, cx);
        let (status, last) = session::run(&mut host, |run| {
            // SAFETY: the function is the library's, for this context; the table and the options live during the call.
            unsafe { target(context.get(), &raw const HOST, run, values.as_ptr(), values.len()) }
        });
        let result = match status {
            ATTAR_OK => Ok(()),
            ATTAR_CANCELLED => {
                Err(attar_plugin::Error::of(attar_plugin::ErrorKind::Cancelled, "it says it was stopped"))
            }
            status => Err(last.unwrap_or_else(|| {
                attar_plugin::Error::new(format!("it failed with status {status} and does not say why"))
            })),
        };
        host.finish(&plugin, result)
    };
    Box::leak(Box::new(PassDecl {
        name: p.name,
        summary: p.summary,
        phase: p.phase,
        numerics: p.numerics,
        takes_tensors: p.takes_tensors,
        options: p.options,
        file: p.file,
        run: Box::leak(Box::new(run)),
    }))
}

/// What a library wants back with each run of a pass, as it is.
#[derive(Clone, Copy)]
struct Context(*const c_void);

// SAFETY: the interface asks plugins for passes that may run on any thread.
unsafe impl Send for Context {}
// SAFETY: as above; runs of passes follow each other.
unsafe impl Sync for Context {}

impl Context {
    fn get(self) -> *const c_void {
        self.0
    }
}

fn option_value(name: &'static str, value: &Value) -> AttarOptionValue {
    let text = |s: &str| AttarStr { data: s.as_ptr(), len: s.len() };
    let mut out = AttarOptionValue {
        name: text(name),
        kind: ATTAR_OPTION_BOOL,
        integer: 0,
        number: 0.0,
        text: text(""),
    };
    match value {
        Value::Bool(v) => out.integer = i64::from(*v),
        Value::Int(v) => (out.kind, out.integer) = (ATTAR_OPTION_INT, *v),
        Value::Float(v) => (out.kind, out.number) = (ATTAR_OPTION_FLOAT, *v),
        Value::Text(v) => (out.kind, out.text) = (ATTAR_OPTION_CHOICE, text(v)),
    }
    out
}
