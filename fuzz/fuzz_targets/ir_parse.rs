//! `.air` text: whatever is accepted prints to text that parses to the same text, and can be verified.
#![no_main]

use attar_ir::{text, verify};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|source: &str| {
    let Ok(graphs) = text::parse(source) else { return };
    for graph in graphs {
        let printed = text::print(&graph);
        let again = text::parse(&printed).expect("printed text parses");
        let again: Vec<String> = again.iter().map(text::print).collect();
        assert_eq!(again, [printed]);
        drop(verify(&graph, None));
    }
});
