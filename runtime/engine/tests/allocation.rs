//! Nothing is allocated per token: after the first token of a generation the allocator is not called.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

mod successor;

use attar_runtime::{Control, GenerateOptions, Model, OpenOptions, SamplingOptions, SessionOptions};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

struct Counting;

static CALLS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: passes everything on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        CALLS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: as the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        CALLS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: as the caller's promise.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// One test only: the counter is the process's.
#[test]
fn generating_allocates_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.attar");
    successor::write(&path, &[("x86-64-v2", &["sse2"], successor::X86)]);
    let model = Model::open(&path, &OpenOptions { threads: Some(3), ..OpenOptions::default() }).unwrap();
    let mut session = model.session(&SessionOptions::default()).unwrap();
    // Worker threads allocate while they start, and on a busy machine that takes a while.
    let warm = GenerateOptions { max_tokens: Some(10), ..GenerateOptions::default() };
    session.generate(&[50], &warm, |_| Control::Continue).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(300));
    let sampled = SamplingOptions {
        temperature: 0.9,
        top_k: 100,
        top_p: 0.999,
        min_p: 0.001,
        repetition_penalty: 1.01,
        seed: 1,
        ..SamplingOptions::default()
    };
    for sampling in [SamplingOptions::default(), sampled] {
        let options = GenerateOptions {
            max_tokens: Some(2000),
            sampling,
            stop: vec!["never there".to_owned(), "nor here".to_owned()],
            ignore_eos: true,
            ..GenerateOptions::default()
        };
        let mut after_first = None;
        let mut last = 0;
        let generation = session.generate(&[50, 51, 52], &options, |piece| {
            if piece.token.is_some() {
                last = CALLS.load(Ordering::SeqCst);
                after_first.get_or_insert(last);
            }
            Control::Continue
        });
        assert_eq!(generation.unwrap().tokens.len(), 2000);
        assert_eq!(Some(last), after_first, "calls of the allocator");
    }
}
