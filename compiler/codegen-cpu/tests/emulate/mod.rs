//! Executes in software what a level needs and this machine lacks: `vpdpbusd` of AVX-VNNI, and AMX.
//!
//! Where an instruction does not exist the CPU raises an invalid opcode, which arrives as SIGILL. The handler decodes the
//! instruction, carries it out on the registers of the signal's context and on a tile file of the thread, and goes on
//! behind it. Everything else a kernel consists of runs as itself (but for plain loads between emulated instructions). What the architecture forbids ends the process with
//! the reason: no panic could unwind through a kernel.

mod dot;
mod tiles;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod trap;

pub(crate) use dot::vpdpbusd;
pub(crate) use tiles::{Products, TileFile};

use attar_artifact::cpu::has_feature;
use attar_codegen_cpu::Target;
use std::collections::BTreeSet;
use std::io::Write;
use std::sync::Mutex;

/// How kernels of a target run here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// As themselves.
    Native,
    /// Some instructions in software.
    Emulated,
}

/// Features whose instructions the handler knows.
const EMULATED: [&str; 4] = ["avxvnni", "amx-tile", "amx-bf16", "amx-int8"];

/// How kernels of a target run here; `None` if they cannot. Makes ready what they need.
pub(crate) fn way(target: Target) -> Option<Way> {
    if target.runs_here() {
        return Some(Way::Native);
    }
    let emulated = cfg!(all(target_arch = "x86_64", target_os = "linux"))
        && target.features().iter().all(|f| has_feature(f) || EMULATED.contains(f));
    if !emulated {
        return None;
    }
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    trap::install();
    Some(Way::Emulated)
}

/// The targets of this machine's architecture that it runs, one way or the other. Says which way, once for each.
pub(crate) fn host_targets() -> Vec<Target> {
    static TOLD: Mutex<BTreeSet<Target>> = Mutex::new(BTreeSet::new());
    let mut told = TOLD.lock().unwrap();
    let family = |t: &Target| Target::native().is_some_and(|n| n.arch() == t.arch());
    Target::ALL
        .into_iter()
        .filter(family)
        .filter(|target| {
            let way = way(*target);
            if told.insert(*target) {
                let how = match way {
                    Some(Way::Native) => "native",
                    Some(Way::Emulated) => "emulated in part",
                    None => "skipped: this machine lacks instructions that are not emulated",
                };
                // Straight to the terminal: the test harness would keep it for failing tests.
                let _ = writeln!(std::io::stderr(), "kernels of {}: {how}", target.name());
            }
            way.is_some()
        })
        .collect()
}

/// Whether this thread's emulated tiles are configured: kernels must leave them released.
pub(crate) fn tiles_in_use() -> bool {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    return trap::tiles_in_use();
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
    return false;
}

/// Instructions emulated so far in this process.
pub(crate) fn emulated_instructions() -> u64 {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    return trap::COUNT.load(std::sync::atomic::Ordering::Relaxed);
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
    return 0;
}
