//! `config.json`: settings that are accepted describe a decoder whose graph can be built.
#![no_main]

use attar_import::{Problems, arch, config};
use libfuzzer_sys::fuzz_target;
use serde_json::Value;

fuzz_target!(|text: &str| {
    let Ok(Value::Object(object)) = serde_json::from_str(text) else { return };
    let mut problems = Problems::new();
    let Some(config) = config::from_hf(&object, &mut problems) else {
        assert!(!problems.is_empty(), "refused without a word");
        return;
    };
    // Larger ones are valid too, but the tensors would have to be there before their graph is built.
    if config.layers > 4 || config.head_dim > 1024 {
        return;
    }
    for arch in arch::ALL {
        let blocks = (arch.blocks)(&config, &|_| true);
        let rope = config.rope.table(config.head_dim);
        for tied in [false, true] {
            assert!(!arch::weights(&config, &blocks, tied).is_empty());
            let graph =
                arch::build("step", &config, &blocks, tied, &rope).expect("a checked configuration builds");
            attar_ir::verify(&graph, None).expect("a built graph is valid");
        }
    }
});
