//! The graph of every architecture, as text. `ATTAR_UPDATE_FILETESTS=1` writes the files anew.

use crate::data::data;
use attar_import::arch;
use std::path::Path;

/// An architecture and the checkpoint whose graph is kept for it.
const CHECKPOINTS: [(&str, &str); 4] =
    [("llama", "smollm2"), ("mistral", "mistral"), ("qwen2", "qwen2"), ("qwen3", "qwen3")];

#[test]
fn graphs_are_as_written_down() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/import/graphs");
    for a in arch::ALL {
        let (name, checkpoint) = CHECKPOINTS.into_iter().find(|(n, _)| *n == a.name).expect(a.name);
        let imported = attar_import::open(&data("tiny").join(checkpoint)).unwrap();
        let text = attar_ir::text::print(&imported.graph);
        let path = folder.join(format!("{name}.air"));
        if std::env::var_os("ATTAR_UPDATE_FILETESTS").is_some_and(|v| v == "1") {
            std::fs::write(&path, &text).unwrap();
        }
        let written = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            written == text,
            "{} is not the graph of {checkpoint}; ATTAR_UPDATE_FILETESTS=1 writes it anew",
            path.display()
        );
    }
}
