//! safetensors: every tensor of an accepted file lies in the file, apart from all others, and decodes.
#![no_main]

use attar_import::container::safetensors;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(tensors) = safetensors::parse(bytes) else { return };
    let mut total = 0;
    for t in tensors {
        total += t.range.len();
        let values = t.kind.decode_all(&bytes[t.range]);
        assert_eq!(values.len(), t.shape.iter().product::<usize>());
    }
    assert!(total <= bytes.len());
});
