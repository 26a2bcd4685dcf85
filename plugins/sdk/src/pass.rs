//! What a pass is, and how it becomes known: by [`plugin!`](macro@crate::plugin), whether it ends up in a shared library or in the
//! compiler itself.

use crate::context::Context;
use crate::decl::{About, Format, OptionDecl, OptionValue};
use crate::error::{Error, ErrorKind, Result};
use crate::host::Host;
use crate::options::{self, Options};
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// A change of a graph and its weights.
///
/// A pass is deterministic: the same model, options and seed give the same result on any number of threads. It verifies, prints
/// and times nothing; the host does.
pub trait Pass: 'static {
    /// What a recipe may set; [`NoOptions`](crate::NoOptions) when there is nothing.
    type Options: Options;

    /// Name, summary, phase, numerics.
    const ABOUT: About;

    /// Does the work. Every rewrite is asked for with [`Context::rewrite`] first.
    ///
    /// # Errors
    /// When it cannot be done; everything the pass has changed is then taken back.
    fn run(options: &Self::Options, cx: &Context<'_>) -> Result<()>;
}

/// A pass without its type: what registries hold. Made by [`PassEntry::of`].
#[derive(Clone, Copy)]
pub struct PassEntry {
    pub about: About,
    pub options: &'static [OptionDecl],
    /// Source file, from `file!()`.
    pub file: &'static str,
    /// Reads the options and runs the pass; a panic becomes an error.
    pub run: RunPass,
}

/// Runs a pass with values for its options.
pub type RunPass = fn(Vec<(String, OptionValue)>, &mut dyn Host) -> Result<()>;

impl PassEntry {
    /// The entry of a pass.
    pub const fn of<P: Pass>(file: &'static str) -> PassEntry {
        PassEntry { about: P::ABOUT, options: <P::Options as Options>::DECLS, file, run: run::<P> }
    }
}

impl std::fmt::Debug for PassEntry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PassEntry").field("about", &self.about).finish_non_exhaustive()
    }
}

fn run<P: Pass>(values: Vec<(String, OptionValue)>, host: &mut dyn Host) -> Result<()> {
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let options: P::Options = options::read(values)?;
        P::run(&options, &Context::new(host))
    }));
    outcome.unwrap_or_else(|panic| Err(Error::of(ErrorKind::Panic, message_of(&*panic))))
}

/// What a panic says.
pub(crate) fn message_of(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    text.map_or_else(|| "it panicked".to_owned(), |t| format!("it panicked: {t}"))
}

/// Passes and formats that are linked into this program or library.
#[derive(Debug)]
pub struct Registered {
    /// Package the plugin comes from, and its version.
    pub name: &'static str,
    pub version: &'static str,
    pub passes: &'static [PassEntry],
    pub formats: &'static [Format],
}

inventory::collect!(Registered);

/// Everything that is registered in this program or library, by name.
pub fn registered() -> Vec<&'static Registered> {
    let mut all: Vec<&'static Registered> = inventory::iter::<Registered>().collect();
    all.sort_by_key(|r| (r.name, r.passes.first().map(|p| p.about.name)));
    all
}

/// Makes passes and weight formats known: `plugin! { passes: [Mine], formats: [MINE] }`. Built as a `cdylib`, the crate is a
/// plugin; linked into a program that uses Attar's compiler, its passes are built in.
#[macro_export]
macro_rules! plugin {
    (passes: [$($pass:ty),* $(,)?] $(, formats: [$($format:expr),* $(,)?])? $(,)?) => {
        $crate::inventory::submit! {
            $crate::Registered {
                name: env!("CARGO_PKG_NAME"),
                version: env!("CARGO_PKG_VERSION"),
                passes: &[$($crate::PassEntry::of::<$pass>(file!())),*],
                formats: &[$($($format),*)?],
            }
        }
    };
}
