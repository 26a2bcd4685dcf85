//! Ctrl-C: the first one stops what can be stopped in order, the next one ends the process.

use crate::failure::{Failure, Result};
use attar_runtime::CancelToken;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Something that can be stopped in order.
#[derive(Clone, Debug)]
enum Running {
    Generation(CancelToken),
    Passes(Arc<AtomicBool>),
}

/// What the next Ctrl-C stops.
static RUNNING: Mutex<Option<Running>> = Mutex::new(None);

fn set(running: Option<Running>) {
    *RUNNING.lock().unwrap_or_else(PoisonError::into_inner) = running;
}

/// Installs the handler, once.
fn install() -> Result<()> {
    static INSTALLED: OnceLock<std::result::Result<(), String>> = OnceLock::new();
    let installed = INSTALLED.get_or_init(|| {
        ctrlc::set_handler(|| {
            let running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner).take();
            match running {
                Some(Running::Generation(token)) => token.cancel(),
                Some(Running::Passes(flag)) => flag.store(true, Ordering::Relaxed),
                None => std::process::exit(i32::from(crate::Family::Cancelled.exit_code())),
            }
        })
        .map_err(|e| e.to_string())
    });
    installed.clone().map_err(Failure::environment)
}

/// A token that the next Ctrl-C cancels; the one after that ends the process with exit code 130, as does Ctrl-C while
/// nothing can be stopped.
///
/// # Errors
/// When no signal handler can be installed.
pub fn cancel_on_ctrl_c() -> Result<CancelToken> {
    install()?;
    let token = CancelToken::default();
    set(Some(Running::Generation(token.clone())));
    Ok(token)
}

/// Nothing is being generated any more.
pub fn generation_ended() {
    set(None);
}

/// Lets the next Ctrl-C set a flag, while passes run: what they have worked out is then kept.
///
/// # Errors
/// When no signal handler can be installed.
pub fn stop_passes_on_ctrl_c(flag: &Arc<AtomicBool>) -> Result<()> {
    install()?;
    set(Some(Running::Passes(flag.clone())));
    Ok(())
}

/// No passes run any more.
pub fn passes_ended() {
    set(None);
}
