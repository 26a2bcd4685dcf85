//! Passes written against `attar-plugin`: those linked into this program become declarations like any other, and
//! [`GraphHost`] answers what they ask, here and behind the C interface.

mod graph_host;
mod handles;

pub use graph_host::GraphHost;
pub use handles::is_handle_of_run;

use crate::context::{Changed, Pass, PassCx};
use crate::decl::{Numerics, OptionDecl, OptionKind, Options, PassDecl, Phase, Value};
use crate::error::{Error, ErrorKind, Result};
use attar_format::described::Codes;
use attar_format::{Description, Scale};
use attar_ir::Graph;
use attar_plugin::{OptionValue, PassEntry, Registered};
use std::sync::OnceLock;

/// The passes of `attar-plugin` that are linked into this program. Their formats become known.
pub(crate) fn linked() -> &'static [&'static PassDecl] {
    static LINKED: OnceLock<Vec<&'static PassDecl>> = OnceLock::new();
    LINKED.get_or_init(|| {
        let mut all = Vec::new();
        for registered in attar_plugin::registered() {
            for format in registered.formats {
                // One that is refused is missed by the pass that wants it, with its name.
                let _ = description_of(format).register();
            }
            all.extend(registered.passes.iter().map(|entry| declare_linked(registered, entry)));
        }
        all
    })
}

/// A format as descriptions have it.
pub fn description_of(format: &attar_plugin::Format) -> Description {
    Description {
        name: format.name.to_owned(),
        source: format.source.to_owned(),
        codes: match format.codes {
            attar_plugin::Codes::Int8 => Codes::Int8,
            attar_plugin::Codes::Table { bits, entries, shift } => {
                Codes::Table { bits, entries: entries.to_vec(), shift }
            }
        },
        group: format.group,
        scale: match format.scale {
            attar_plugin::Scale::Bf16 => Scale::Bf16,
            attar_plugin::Scale::RowF32Field8 { bias, choice_bits } => {
                Scale::RowF32Field8 { bias, choice_bits }
            }
        },
    }
}

/// What a declaration says, without the means to build the pass.
#[derive(Clone, Copy, Debug)]
pub struct Facts {
    pub name: &'static str,
    pub summary: &'static str,
    pub phase: Phase,
    pub numerics: Numerics,
    pub takes_tensors: bool,
    pub options: &'static [OptionDecl],
    pub file: &'static str,
}

/// A declaration made while the program runs. It lives as long as the program, as those of built-in passes do.
pub fn declare(
    facts: Facts,
    make: impl Fn(&'static PassDecl, &Options) -> Box<dyn Pass> + Send + Sync + 'static,
) -> &'static PassDecl {
    let cell: &'static OnceLock<&'static PassDecl> = Box::leak(Box::default());
    let Facts { name, summary, phase, numerics, takes_tensors, options, file } = facts;
    let make = move |given: &Options| match cell.get() {
        Some(decl) => Ok(make(decl, given)),
        // Nobody has the declaration before it is in the cell.
        None => Err(Error::new(ErrorKind::UnknownPass { name: name.to_owned(), nearest: None })),
    };
    let make = Box::leak(Box::new(make));
    let decl = PassDecl { name, summary, phase, numerics, takes_tensors, options, file, make };
    cell.get_or_init(|| Box::leak(Box::new(decl)))
}

fn declare_linked(registered: &'static Registered, entry: &'static PassEntry) -> &'static PassDecl {
    let facts = Facts {
        name: entry.about.name,
        summary: entry.about.summary,
        phase: match entry.about.phase {
            attar_plugin::Phase::Canonicalize => Phase::Canonicalize,
            attar_plugin::Phase::Compress => Phase::Compress,
            attar_plugin::Phase::Fuse => Phase::Fuse,
        },
        numerics: match entry.about.numerics {
            attar_plugin::Numerics::Exact => Numerics::Exact,
            attar_plugin::Numerics::Rounding => Numerics::Rounding,
            attar_plugin::Numerics::Lossy => Numerics::Lossy,
        },
        takes_tensors: entry.about.takes_tensors,
        options: entry.options.iter().map(option_decl).collect::<Vec<_>>().leak(),
        file: entry.file,
    };
    declare(facts, move |decl, options| {
        let values = options.values().iter();
        let values = values.map(|(name, value)| ((*name).to_owned(), option_value(value))).collect();
        Box::new(Linked { decl, registered, entry, values })
    })
}

fn option_decl(option: &attar_plugin::OptionDecl) -> OptionDecl {
    let doc: Vec<&str> = option.doc.iter().map(|line| line.trim()).collect();
    OptionDecl {
        name: option.name,
        kind: match option.kind {
            attar_plugin::OptionKind::Bool { default } => OptionKind::Bool { default },
            attar_plugin::OptionKind::Int { default, min, max } => OptionKind::Int { default, min, max },
            attar_plugin::OptionKind::Float { default, min, max } => OptionKind::Float { default, min, max },
            attar_plugin::OptionKind::Choice { default, of } => OptionKind::Choice { default, of },
            attar_plugin::OptionKind::Text { default } => OptionKind::Text { default },
        },
        doc: doc.join(" ").leak(),
    }
}

fn option_value(value: &Value) -> OptionValue {
    match value {
        Value::Bool(v) => OptionValue::Bool(*v),
        Value::Int(v) => OptionValue::Int(*v),
        Value::Float(v) => OptionValue::Float(*v),
        Value::Str(v) => OptionValue::Text(v.clone()),
    }
}

/// A pass that is linked in.
struct Linked {
    decl: &'static PassDecl,
    registered: &'static Registered,
    entry: &'static PassEntry,
    values: Vec<(String, OptionValue)>,
}

impl Pass for Linked {
    fn decl(&self) -> &'static PassDecl {
        self.decl
    }

    fn run(&self, graph: &mut Graph, cx: &mut PassCx<'_>) -> Result<Changed> {
        let mut host = GraphHost::new(graph, cx);
        let result = (self.entry.run)(self.values.clone(), &mut host);
        host.finish(&format!("{} {}", self.registered.name, self.registered.version), result)?;
        Ok(cx.changed())
    }
}
