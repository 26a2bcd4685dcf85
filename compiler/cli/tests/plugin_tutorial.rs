//! `docs/plugins.md` is true: its blocks of code are written and run in order, as a reader would.

mod building;

use building::{has, root, skipped, stderr, target, tiny};
use std::path::Path;
use std::process::Command;

/// The blocks of a document: what stands behind the three ticks, and the text.
fn blocks(document: &str) -> Vec<(String, String)> {
    let mut blocks = Vec::new();
    let mut lines = document.lines();
    while let Some(line) = lines.next() {
        let Some(info) = line.strip_prefix("```") else { continue };
        let text: Vec<&str> = lines.by_ref().take_while(|l| *l != "```").collect();
        blocks.push((info.trim().to_owned(), text.join("\n") + "\n"));
    }
    blocks
}

/// One script of all blocks: files are written where their names say, commands are run.
fn script(document: &str) -> String {
    let mut script = String::from("set -eu\n");
    for (info, text) in blocks(document) {
        match info.split_once(' ') {
            None if info == "sh" => script.push_str(&text),
            Some((_, file)) => script.push_str(&format!("cat > {file} <<'ATTAR_END'\n{text}ATTAR_END\n")),
            None => panic!("a block of {info:?} is neither run nor written"),
        }
    }
    // The model is one that is at hand and small. Build output is shared with the other tests, and versions are pinned.
    let shared = target().0.join("plugins-same");
    let model = tiny("smollm2");
    let build = format!(
        "cd mine\ncp '{}' Cargo.lock\nmkdir -p '{shared}'\nln -sfn '{shared}' target\n",
        root().join("Cargo.lock").display(),
        shared = shared.display()
    );
    let found = script.replace("MODEL=smollm2-135m\n", &format!("MODEL='{}'\n", model.display()));
    assert_ne!(found, script, "the tutorial names its model");
    assert!(found.contains("\ncd mine\n"), "the tutorial goes into its folder");
    found.replacen("cd mine\n", &build, 1)
}

#[test]
fn the_tutorial_works_as_it_is_written() {
    if !has("gcc", "--version") {
        return skipped("no gcc");
    }
    let document = std::fs::read_to_string(root().join("docs/plugins.md")).expect("the tutorial");
    let kinds: Vec<String> = blocks(&document).into_iter().map(|(info, _)| info).collect();
    assert!(
        kinds.iter().filter(|k| *k == "sh").count() >= 6 && kinds.iter().any(|k| k.starts_with("rust ")),
        "{kinds:?}"
    );
    let folder = tempfile::tempdir().expect("a folder");
    let program = Path::new(env!("CARGO_BIN_EXE_attar")).parent().expect("a folder");
    let path = std::env::var("PATH").unwrap_or_default();
    let mut bash = Command::new("bash");
    bash.arg("-c").arg(script(&document)).current_dir(folder.path());
    bash.env("PATH", format!("{}:{path}", program.display()));
    // The tutorial looks for what it builds where cargo puts it by default.
    bash.env_remove("CARGO_TARGET_DIR");
    let output = bash.output().expect("bash starts");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{said}\n{}", stderr(&output));
    assert!(said.contains("0 failed") && said.contains("byte by byte"), "{said}");
    for artifact in ["mine", "plain", "weighed", "pinned", "stressed", "halved"] {
        assert!(folder.path().join("mine").join(format!("{artifact}.attar")).is_file(), "{artifact}");
    }
}
