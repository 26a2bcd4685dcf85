//! Texts with words exchanged: whatever comes of it is refused, runs, or is a fault of the kernel; nothing panics, and
//! nothing hangs.

mod harness;

use attar_ptx::{CopyMode, Launch, Memory, Module, Options, Param};
use harness::text;
use proptest::prelude::*;

const TEXTS: [&str; 6] =
    ["vector.sm_90a", "math.sm_90a", "norm.sm_90a", "gemv.sm_90a", "mma.sm_80", "wgmma.sm_90a"];

/// `text` with words exchanged for others of it.
fn mangle(text: &str, edits: &[(usize, usize)]) -> String {
    let mut words: Vec<&str> =
        text.split_inclusive([' ', '\t', '\n', ',', '.', '[', ']', '{', '}', ';']).collect();
    for (at, from) in edits {
        let (at, from) = (at % words.len(), from % words.len());
        words[at] = words[from];
    }
    words.concat()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn nothing_panics(
        name in 0..TEXTS.len(),
        edits in prop::collection::vec((any::<usize>(), any::<usize>()), 1..4),
        threads in 1u32..160,
        eager: bool,
    ) {
        let Ok(module) = Module::parse(&mangle(&text(TEXTS[name]), &edits)) else { return Ok(()) };
        let copies = if eager { CopyMode::Eager } else { CopyMode::Lazy };
        for kernel in module.kernels() {
            let mut memory = Memory::new();
            let params: Vec<Param> = kernel
                .params
                .iter()
                .map(|p| if p.bytes == 8 { memory.alloc(&p.name, &[1; 4096]).into() } else { Param::bytes(&vec![1; p.bytes]) })
                .collect();
            let launch = Launch {
                kernel: &kernel.name,
                grid: [2, 1, 1],
                block: [threads, 1, 1],
                dynamic_shared: 1024,
                params: &params,
            };
            let options = Options { step_limit: 20_000, ..Options::checked(copies) };
            // Either way is fine.
            let _ = module.launch(&mut memory, &launch, &options);
        }
    }
}
