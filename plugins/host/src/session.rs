//! The run that is going on in this thread: whose questions are answered, and what they are answered with.

use attar_pass::plugin::{GraphHost, is_handle_of_run};
use attar_plugin::abi::{ATTAR_OK, ATTAR_PANIC, AttarRun, AttarStatus, AttarStr};
use attar_plugin::remote::status_of;
use attar_plugin::{Error, ErrorKind, Result};
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

/// Longest text that is taken from a plugin, in bytes.
const MOST_TEXT: usize = 1 << 20;

/// A run and what belongs to it.
pub(crate) struct Session<'s, 'r, 'a> {
    pub(crate) host: &'s mut GraphHost<'r, 'a>,
    texts: BTreeSet<Arc<str>>,
    words: BTreeSet<Arc<[u64]>>,
    bytes: BTreeSet<Arc<[i8]>>,
    /// The last answer that was an error.
    last: Option<Error>,
}

thread_local! {
    /// The run of this thread; null while there is none.
    static CURRENT: Cell<*mut Session<'static, 'static, 'static>> = const { Cell::new(std::ptr::null_mut()) };
    /// Message of the last call that failed.
    static MESSAGE: RefCell<Arc<str>> = RefCell::new(Arc::from(""));
}

/// Calls with the handle of a run from threads it does not run on.
static STRAYS: Mutex<Vec<(AttarRun, &'static str)>> = Mutex::new(Vec::new());
/// Most strays that are remembered.
const MOST_STRAYS: usize = 64;

/// Runs `pass` with the host answering in this thread. Gives its status and the last error it was answered with.
pub(crate) fn run(
    host: &mut GraphHost<'_, '_>,
    pass: impl FnOnce(AttarRun) -> AttarStatus,
) -> (AttarStatus, Option<Error>) {
    /// Ends the run whatever happens.
    struct End(*mut Session<'static, 'static, 'static>);
    impl Drop for End {
        fn drop(&mut self) {
            CURRENT.set(self.0);
        }
    }
    let run = host.run();
    let mut session =
        Session { host, texts: BTreeSet::new(), words: BTreeSet::new(), bytes: BTreeSet::new(), last: None };
    let status = {
        // The lifetimes are forgotten; `End` sees to it that nothing remembers the pointer longer than `session` lives.
        let _end = End(CURRENT.replace((&raw mut session).cast()));
        pass(run)
    };
    let mut strays = STRAYS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, call)) = strays.iter().find(|(of, _)| *of == run) {
        session.host.misuse(call, "it was called on another thread than the one that runs the pass");
    }
    strays.retain(|(of, _)| *of != run);
    (status, session.last.take())
}

/// Answers a call: finds the run, and makes errors and panics statuses with messages.
pub(crate) fn answer(
    call: &'static str,
    run: AttarRun,
    question: impl FnOnce(&mut Session<'_, '_, '_>) -> Result<()>,
) -> AttarStatus {
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        let current = CURRENT.get();
        if current.is_null() {
            let mut strays = STRAYS.lock().unwrap_or_else(PoisonError::into_inner);
            if is_handle_of_run(run) && strays.len() < MOST_STRAYS {
                strays.push((run, call));
            }
            return Err(Error::of(ErrorKind::Misuse, "no pass is running on this thread").in_call(call));
        }
        // SAFETY: `run` above set the pointer to a session that lives until it is reset, on this thread; answers do not call
        // plugins, so nobody else has a reference to it.
        let session = unsafe { &mut *current };
        let result = match session.host.is_run(run) {
            Ok(()) => question(session),
            Err(problem) => Err(session.host.misuse(call, format!("run {run:#x}: {problem}"))),
        };
        if let Err(e) = &result {
            // An error from before the host was asked, such as of a null pointer, fails the pass like any misuse.
            if e.kind == ErrorKind::Misuse {
                session.host.misuse(call, e.message.clone());
            }
            session.last = Some(e.clone().in_call(call));
        }
        result
    }));
    match outcome {
        Ok(Ok(())) => ATTAR_OK,
        Ok(Err(e)) => {
            set_message(&e.message);
            status_of(e.kind)
        }
        Err(_) => {
            set_message("the host panicked");
            let current = CURRENT.get();
            if !current.is_null() {
                // SAFETY: as above; the panic has left the question.
                let session = unsafe { &mut *current };
                session.host.misuse(call, "the host panicked: this is a bug of Attar");
            }
            ATTAR_PANIC
        }
    }
}

fn set_message(message: &str) {
    // Where the thread is ending there is nobody to read it.
    let _ = MESSAGE.try_with(|m| *m.borrow_mut() = Arc::from(message));
}

/// The message of the last call of this thread that failed. Valid until the next one.
pub(crate) fn last_message() -> AttarStr {
    let message = MESSAGE.try_with(|m| {
        let m = m.borrow();
        AttarStr { data: m.as_ptr(), len: m.len() }
    });
    message.unwrap_or(AttarStr { data: std::ptr::null(), len: 0 })
}

impl Session<'_, '_, '_> {
    /// A text that lives until the run ends.
    pub(crate) fn text(&mut self, text: &str) -> AttarStr {
        let kept = match self.texts.get(text) {
            Some(kept) => kept.clone(),
            None => {
                let kept: Arc<str> = Arc::from(text);
                self.texts.insert(kept.clone());
                kept
            }
        };
        AttarStr { data: kept.as_ptr(), len: kept.len() }
    }

    /// Words of 64 bits that live until the run ends.
    pub(crate) fn words(&mut self, words: impl Iterator<Item = u64>) -> *const u64 {
        let words: Arc<[u64]> = words.collect();
        let kept = self.words.get(&words).cloned().unwrap_or_else(|| {
            self.words.insert(words.clone());
            words
        });
        kept.as_ptr()
    }

    /// Bytes that live until the run ends.
    pub(crate) fn bytes(&mut self, bytes: &[i8]) -> *const i8 {
        let bytes: Arc<[i8]> = Arc::from(bytes);
        let kept = self.bytes.get(&bytes).cloned().unwrap_or_else(|| {
            self.bytes.insert(bytes.clone());
            bytes
        });
        kept.as_ptr()
    }
}

fn misuse(problem: impl Into<String>) -> Error {
    Error::of(ErrorKind::Misuse, problem)
}

/// A text of a plugin.
///
/// # Safety
/// Unless null, `text.data` must be valid for reads of `text.len` bytes while the result lives.
pub(crate) unsafe fn text_in<'t>(what: &str, text: AttarStr) -> Result<&'t str> {
    // SAFETY: as the caller promises.
    let bytes = unsafe { list_in(what, text.data, text.len, MOST_TEXT)? };
    std::str::from_utf8(bytes).map_err(|e| misuse(format!("{what}: no UTF-8: {e}")))
}

/// A list of a plugin.
///
/// # Safety
/// Unless null or not aligned, `data` must be valid for reads of `len` elements while the result lives.
pub(crate) unsafe fn list_in<'t, T>(what: &str, data: *const T, len: usize, most: usize) -> Result<&'t [T]> {
    if len == 0 {
        return Ok(&[]);
    }
    if data.is_null() || !data.is_aligned() {
        return Err(misuse(format!("{what}: {len} elements at {data:p}, which is no address of any")));
    }
    if len > most {
        return Err(misuse(format!("{what}: {len} elements, and there cannot be more than {most}")));
    }
    // SAFETY: as the caller promises.
    Ok(unsafe { std::slice::from_raw_parts(data, len) })
}

/// Writes what a call gives.
///
/// # Safety
/// Unless null or not aligned, `out` must be valid for a write.
pub(crate) unsafe fn give<T>(what: &str, out: *mut T, value: T) -> Result<()> {
    if out.is_null() || !out.is_aligned() {
        return Err(misuse(format!("{what}: {out:p} is no address to write to")));
    }
    // SAFETY: as the caller promises.
    unsafe { out.write(value) };
    Ok(())
}

/// Writes as much of a list as there is room for, and says how long it is.
///
/// # Safety
/// Unless null or not aligned, `out` must be valid for writes of `capacity` elements, and `count` for a write.
pub(crate) unsafe fn give_list<T: Copy>(
    what: &str,
    (out, capacity): (*mut T, usize),
    count: *mut usize,
    items: &[T],
) -> Result<()> {
    let n = items.len().min(capacity);
    if n > 0 && (out.is_null() || !out.is_aligned()) {
        return Err(misuse(format!("{what}: {out:p} is no address to write to")));
    }
    // SAFETY: as the caller promises; so below.
    unsafe { give("count", count, items.len())? };
    if n > 0 {
        // SAFETY: `n` is at most the capacity.
        unsafe { std::ptr::copy_nonoverlapping(items.as_ptr(), out, n) };
    }
    Ok(())
}
