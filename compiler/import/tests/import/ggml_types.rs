//! Every block type decodes to the bits that the `gguf` Python package reads (`tests/data/gguf/types.json`).

use attar_import::container::ggml_types::{ALL, by_id, name_of};
use serde_json::Value;
use std::path::Path;

fn hex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap()).collect()
}

#[test]
fn types_decode_bit_for_bit() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/gguf/types.json");
    let golden: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let types = golden["types"].as_object().unwrap();
    for kind in ALL {
        let row = types.get(kind.name).unwrap_or_else(|| panic!("no golden for {}", kind.name));
        assert_eq!(row["ggml_id"], kind.id, "{}", kind.name);
        assert_eq!(row["block_values"], kind.block_values, "{}", kind.name);
        assert_eq!(row["block_bytes"], kind.block_bytes, "{}", kind.name);
        let bytes = hex(row["bytes_hex"].as_str().unwrap());
        let want: Vec<u32> = hex(row["f32_hex"].as_str().unwrap())
            .chunks_exact(4)
            .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect();
        let got = kind.decode_all(&bytes);
        assert_eq!(got.len(), want.len(), "{}", kind.name);
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            assert_eq!(got.to_bits(), *want, "{} value {i}: {got} for {}", kind.name, f32::from_bits(*want));
        }
    }
    assert_eq!(types.len(), ALL.len(), "a golden without a decoder");
}

#[test]
fn numbers_are_unique_and_unreadable_types_have_names() {
    for (i, kind) in ALL.iter().enumerate() {
        assert!(ALL[..i].iter().all(|other| other.id != kind.id && other.name != kind.name));
        assert_eq!(by_id(kind.id), Some(*kind));
    }
    assert_eq!(name_of(19), "IQ1_S");
    assert_eq!(name_of(12), "Q4_K");
    assert!(name_of(999).contains("999"));
}
