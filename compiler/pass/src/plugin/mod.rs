//! Passes written against `attar-plugin`: those linked into this program become declarations like any other, and
//! [`GraphHost`] answers what they ask, here and behind the C interface.

mod graph_host;
mod handles;

pub use graph_host::GraphHost;
pub use handles::is_handle_of_run;

use crate::context::PassCx;
use crate::decl::{Options, PassDecl, Phase};
use crate::error::Result;
use attar_format::described::Codes;
use attar_format::{Description, Scale};
use attar_ir::Graph;
use attar_plugin::{Context, PassEntry, Registered};
use std::any::TypeId;
use std::sync::OnceLock;

/// The passes that are linked into this program. Their formats become known.
pub(crate) fn linked() -> &'static [&'static PassDecl] {
    static LINKED: OnceLock<Vec<&'static PassDecl>> = OnceLock::new();
    LINKED.get_or_init(|| {
        let mut all = Vec::new();
        for registered in attar_plugin::registered() {
            for format in registered.formats {
                // One that is refused is missed by the pass that wants it, with its name.
                let _ = description_of(format).register();
            }
            all.extend(registered.passes.iter().map(|entry| declare(registered, entry)));
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

fn declare(registered: &'static Registered, entry: &'static PassEntry) -> &'static PassDecl {
    let plugin = format!("{} {}", registered.name, registered.version);
    let run = move |options: &Options, graph: &mut Graph, cx: &mut PassCx<'_>| {
        let mut host = GraphHost::new(graph, cx);
        let values = options.values().iter().map(|(name, value)| ((*name).to_owned(), value.clone()));
        let result = (entry.run)(values.collect(), &mut host);
        host.finish_linked(&plugin, result)
    };
    Box::leak(Box::new(PassDecl {
        name: entry.about.name,
        summary: entry.about.summary,
        phase: match entry.about.phase {
            attar_plugin::Phase::Canonicalize => Phase::Canonicalize,
            attar_plugin::Phase::Compress => Phase::Compress,
            attar_plugin::Phase::Fuse => Phase::Fuse,
        },
        numerics: entry.about.numerics,
        takes_tensors: entry.about.takes_tensors,
        options: entry.options,
        file: entry.file,
        run: Box::leak(Box::new(run)),
    }))
}

/// Gives a pass that is linked into the compiler the graph and the context it is run with, for what [`Context`] does not offer.
/// What the host gave before, nodes and values, means nothing afterwards.
///
/// # Errors
/// Those of the work, which the manager gets as they are. [`ErrorKind::Unavailable`](attar_plugin::ErrorKind::Unavailable) where
/// the pass is not linked into the compiler.
pub fn in_compiler<T>(
    cx: &Context<'_>,
    work: impl FnOnce(&mut Graph, &mut PassCx<'_>) -> Result<T>,
) -> attar_plugin::Result<T> {
    cx.native(|native| {
        if native.of != TypeId::of::<GraphHost<'static, 'static>>() {
            let problem = "the pass was compiled for another compiler than the one it is linked into";
            return Err(attar_plugin::Error::of(attar_plugin::ErrorKind::Unavailable, problem));
        }
        // SAFETY: the host is what its type says, and stays borrowed until the work is done. The work is for references of any
        // lifetime, so it keeps none.
        let host = unsafe { &mut *native.at.cast::<GraphHost<'_, '_>>() };
        host.lend(work)
    })
}
