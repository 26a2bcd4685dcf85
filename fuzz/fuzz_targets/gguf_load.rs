//! GGUF: headers are read, arrays decoded, and whole models imported with all their weights.
#![no_main]

use attar_import::container::FileBytes;
use attar_import::container::gguf::{self, Value};
use libfuzzer_sys::fuzz_target;
use std::path::Path;

fuzz_target!(|bytes: &[u8]| {
    let Ok(file) = gguf::parse(bytes) else { return };
    for value in file.metadata.values() {
        if let Value::Array(array) = value {
            drop(array.values(bytes));
            drop(array.strings(bytes));
        }
    }
    for t in &file.tensors {
        let values = t.kind.decode_all(&bytes[t.range.clone()]);
        assert_eq!(values.len(), t.shape.iter().product::<usize>());
    }
    let Ok(model) = attar_import::open_gguf(FileBytes::from_vec(Path::new("fuzz.gguf"), bytes.to_vec()))
    else {
        return;
    };
    attar_ir::verify(&model.graph, Some(&model.weights)).expect("an imported graph is valid");
    for name in model.weights.names() {
        model.weights.read_f32(name).expect("an imported weight can be read");
    }
});
