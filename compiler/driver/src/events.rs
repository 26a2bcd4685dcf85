//! What a session tells its caller while it runs.

use attar_pass::{Dump, NoteLevel, PassDecl, PassReport, Phase};
use std::time::Duration;

/// Something happened. Events of one phase come between its `Started` and `Finished`.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    PhaseStarted {
        phase: Phase,
    },
    PhaseFinished {
        phase: Phase,
        time: Duration,
    },
    /// A pass begins; `index` from 1, of `total`.
    PassStarted {
        index: usize,
        total: usize,
        decl: &'static PassDecl,
    },
    PassFinished(&'a PassReport),
    /// Within a phase: at `what`, `done` of `total`.
    Progress {
        phase: Phase,
        what: &'a str,
        done: u64,
        total: u64,
    },
    /// A pass has something to say.
    Note {
        decl: &'static PassDecl,
        level: NoteLevel,
        text: &'a str,
    },
    /// IR text that `print_after` asked for.
    Dump(&'a Dump<'a>),
}
