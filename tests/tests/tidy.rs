//! The map of the repository stays true: names, dependency direction, one file per registered thing, documents.
//!
//! `tests/passes.rs` checks that `docs/passes.md` is fresh.

use clap::CommandFactory;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

// Passes register themselves; naming the crate links them.
use attar_passes as _;

/// Folder, package, and the packages of ours it may depend on.
const CRATES: [(&str, &str, &[&str]); 23] = [
    ("runtime/format", "attar-format", &[]),
    ("runtime/artifact", "attar-artifact", &["attar-format"]),
    ("runtime/engine", "attar-runtime", &["attar-artifact", "attar-format"]),
    ("compiler/ir", "attar-ir", &["attar-format"]),
    ("compiler/import", "attar-import", &["attar-format", "attar-ir"]),
    ("compiler/pass", "attar-pass", &["attar-format", "attar-ir", "attar-plugin"]),
    ("passes", "attar-passes", &["attar-format", "attar-ir", "attar-pass", "attar-plugin"]),
    ("plugins/sdk", "attar-plugin", &[]),
    ("plugins/host", "attar-plugin-host", &["attar-format", "attar-ir", "attar-pass", "attar-plugin"]),
    ("plugins/examples/drop-layers", "attar-example-drop-layers", &["attar-plugin"]),
    ("plugins/examples/format-nf4", "attar-example-format-nf4", &["attar-plugin"]),
    ("plugins/examples/list-outliers", "attar-example-list-outliers", &["attar-plugin"]),
    ("plugins/examples/prune-nm", "attar-example-prune-nm", &["attar-plugin"]),
    ("tests/plugins/built-in-passes", "attar-test-built-in-passes", &["attar-plugin"]),
    ("compiler/kernel", "attar-kernel", &["attar-artifact", "attar-format"]),
    (
        "compiler/codegen-cpu",
        "attar-codegen-cpu",
        &["attar-artifact", "attar-format", "attar-ir", "attar-kernel"],
    ),
    ("compiler/codegen-cuda", "attar-codegen-cuda", &["attar-artifact", "attar-format", "attar-kernel"]),
    (
        "compiler/driver",
        "attar-compiler",
        &[
            "attar-artifact",
            "attar-codegen-cpu",
            "attar-codegen-cuda",
            "attar-format",
            "attar-import",
            "attar-ir",
            "attar-kernel",
            "attar-pass",
            "attar-passes",
            "attar-plugin-host",
            "attar-runtime",
        ],
    ),
    (
        "compiler/cli",
        "attar",
        &["attar-artifact", "attar-compiler", "attar-format", "attar-pass", "attar-runtime"],
    ),
    (
        "tests",
        "attar-tests",
        &["attar-artifact", "attar-codegen-cpu", "attar-format", "attar-ir", "attar-pass", "attar-passes"],
    ),
    ("tests/ptx", "attar-ptx", &[]),
    ("tests/fake-cuda", "attar-fake-cuda", &["attar-ptx"]),
    (
        "benches",
        "attar-benches",
        &[
            "attar-artifact",
            "attar-codegen-cpu",
            "attar-format",
            "attar-kernel",
            "attar-pass",
            "attar-passes",
        ],
    ),
];

fn root() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    root.canonicalize().expect("the repository")
}

fn read(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn manifest(path: &str) -> toml::Table {
    read(path).parse().unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// Every file below a folder of the repository, relative to the root, without build output and test data.
fn files(below: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(below)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder").flatten() {
            let (path, name) = (entry.path(), entry.file_name());
            if path.is_dir() {
                if !["target", ".git", "data", "corpus", "artifacts"].iter().any(|skip| name == *skip) {
                    folders.push(path);
                }
            } else {
                let relative = path.strip_prefix(root()).expect("inside the repository");
                found.push(relative.to_string_lossy().into_owned());
            }
        }
    }
    found.sort();
    found
}

fn rust_files() -> Vec<String> {
    let folders = ["benches", "compiler", "passes", "plugins", "runtime", "tests"];
    folders.iter().flat_map(|f| files(f)).filter(|f| f.ends_with(".rs")).collect()
}

/// File names without extension directly inside a folder.
fn stems(folder: &str) -> BTreeSet<String> {
    let entries = fs::read_dir(root().join(folder)).unwrap_or_else(|e| panic!("{folder}: {e}"));
    let rust = entries.flatten().map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "rs"));
    rust.filter_map(|p| Some(p.file_stem()?.to_str()?.to_owned())).filter(|s| s != "mod").collect()
}

fn has_files(folder: &str) -> bool {
    fs::read_dir(root().join(folder)).is_ok_and(|mut entries| entries.next().is_some())
}

/// Fails with everything that is wrong, not with the first.
fn none(problems: Vec<String>) {
    assert!(problems.is_empty(), "\n{}", problems.join("\n"));
}

#[test]
fn folders_and_packages_are_those_of_the_map() {
    let workspace = manifest("Cargo.toml");
    let members: BTreeSet<&str> = workspace["workspace"]["members"]
        .as_array()
        .expect("members")
        .iter()
        .filter_map(|m| m.as_str())
        .collect();
    assert_eq!(members, CRATES.iter().map(|c| c.0).collect());
    let mut problems = Vec::new();
    for (folder, package, _) in CRATES {
        let name = manifest(&format!("{folder}/Cargo.toml"))["package"]["name"].as_str().map(str::to_owned);
        if name.as_deref() != Some(package) {
            problems.push(format!("{folder} holds {name:?}, expected {package}"));
        }
        if !read("README.md").contains(&format!("| `{folder}` | `{package}` |")) {
            problems.push(format!("the crate table of README.md has no row for {folder} and {package}"));
        }
    }
    none(problems);
}

#[test]
fn dependencies_point_one_way() {
    let mut problems = Vec::new();
    for (folder, package, allowed) in CRATES {
        let manifest = manifest(&format!("{folder}/Cargo.toml"));
        // What runs on users' machines must not see the compiler, not even in its tests.
        let tables: &[&str] = if folder.starts_with("runtime/") {
            &["dependencies", "dev-dependencies", "build-dependencies"]
        } else {
            &["dependencies", "build-dependencies"]
        };
        for table in tables {
            let Some(dependencies) = manifest.get(*table).and_then(|t| t.as_table()) else { continue };
            for name in dependencies.keys().filter(|n| n.starts_with("attar")) {
                if !allowed.contains(&name.as_str()) {
                    problems.push(format!("{package}: {table} has {name}, which the map does not allow"));
                }
            }
        }
    }
    none(problems);
}

#[test]
fn every_pass_has_its_file_and_its_tests() {
    let registered = attar_pass::registered();
    assert!(registered.len() >= 10, "only {} passes are linked", registered.len());
    let mut problems = Vec::new();
    for decl in &registered {
        let expected = format!("/{}.rs", decl.name.replace('-', "_"));
        if !decl.file.ends_with(&expected) || !root().join(decl.file).is_file() {
            problems.push(format!("{} is declared in {}, expected a file …{expected}", decl.name, decl.file));
        }
        if !has_files(&format!("tests/filetests/{}", decl.name)) {
            problems.push(format!("{} has no filetests in tests/filetests/{0}", decl.name));
        }
        if decl.summary.is_empty() || decl.summary.ends_with('.') {
            problems.push(format!("{}: the summary is one sentence without a full stop", decl.name));
        }
    }
    let declared: BTreeSet<&str> = registered.iter().map(|d| d.file).collect();
    for file in files("passes/src").iter().filter(|f| read(f).contains("attar_plugin::plugin!")) {
        if !declared.contains(file.as_str()) {
            problems.push(format!("{file} submits a pass that is not registered"));
        }
    }
    none(problems);
}

#[test]
fn every_op_has_its_file_and_its_tests() {
    let named: BTreeSet<String> = attar_ir::ops::NAMES.iter().map(|n| (*n).to_owned()).collect();
    assert_eq!(named, stems("compiler/ir/src/ops"));
    none(
        named
            .iter()
            .filter(|op| !has_files(&format!("tests/filetests/{op}")))
            .map(|op| format!("{op} has no filetests in tests/filetests/{op}"))
            .collect(),
    );
}

#[test]
fn every_format_has_its_file_and_its_words() {
    let named: BTreeSet<String> = attar_format::formats::ALL.iter().map(|f| f.name.to_owned()).collect();
    assert_eq!(named, stems("runtime/format/src/formats"));
    let words = read("docs/formats.md");
    none(
        named
            .iter()
            .filter(|f| !words.contains(f.as_str()))
            .map(|f| format!("docs/formats.md omits {f}"))
            .collect(),
    );
}

#[test]
fn every_architecture_has_its_file_and_a_checkpoint() {
    let files = stems("compiler/import/src/arch");
    let mut covered = BTreeMap::new();
    for entry in fs::read_dir(root().join("tests/data/tiny")).expect("tests/data/tiny").flatten() {
        let Ok(text) = fs::read_to_string(entry.path().join("config.json")) else { continue };
        let config: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        let model_type = config["model_type"].as_str().expect("a model type").to_owned();
        covered.insert(model_type, entry.path());
    }
    let mut problems = Vec::new();
    for architecture in attar_import::arch::ALL {
        let name = architecture.name;
        if !files.contains(name) {
            problems.push(format!("{name} has no file compiler/import/src/arch/{name}.rs"));
        }
        if !covered.contains_key(name) {
            problems.push(format!("{name} has no checkpoint in tests/data/tiny"));
        }
    }
    // Beside the architectures stands what they share.
    let known: BTreeSet<String> =
        attar_import::arch::names().into_iter().map(str::to_owned).chain(["decoder".to_owned()]).collect();
    problems
        .extend(files.difference(&known).map(|f| format!("compiler/import/src/arch/{f}.rs is not in ALL")));
    none(problems);
}

#[test]
fn every_command_has_its_file_help_and_row() {
    let command = attar_cli::Cli::command();
    let named: BTreeSet<String> = command.get_subcommands().map(|c| c.get_name().to_owned()).collect();
    assert_eq!(named, stems("compiler/cli/src/commands"));
    let readme = read("README.md");
    let mut problems = Vec::new();
    for c in command.get_subcommands() {
        let name = c.get_name();
        if !c.get_after_help().is_some_and(|h| h.to_string().contains(&format!("attar {name}"))) {
            problems.push(format!("attar {name} --help shows no example"));
        }
        if !readme.contains(&format!("| `attar {name}")) {
            problems.push(format!("the command table of README.md omits {name}"));
        }
    }
    none(problems);
}

#[test]
fn files_say_what_they_are() {
    let mut problems = Vec::new();
    for file in rust_files() {
        let stem = Path::new(&file).file_stem().and_then(|s| s.to_str()).unwrap_or_default().to_owned();
        if ["utils", "util", "common", "base", "helpers", "misc"].contains(&stem.as_str()) {
            problems.push(format!("{file}: named for a role, not for a thing"));
        }
        if !read(&file).starts_with("//!") {
            problems.push(format!("{file}: does not begin with //!"));
        }
    }
    none(problems);
}

#[test]
fn nothing_unfinished_and_no_machine_stays_in_the_tree() {
    // In two parts, so that this file does not find itself.
    let words = [
        ("to", "do!("),
        ("unimple", "mented!("),
        ("place", "holder"),
        ("/ro", "ot/"),
        ("/tm", "p/w"),
        ("/wo", "rk/"),
    ];
    let words: Vec<String> = words.iter().map(|(a, b)| format!("{a}{b}")).collect();
    let mut problems = Vec::new();
    let documents = files("docs").into_iter().filter(|f| f.ends_with(".md"));
    let top = ["README.md", "CHANGELOG.md", "Cargo.toml", ".ci/run"].map(str::to_owned);
    for file in rust_files().into_iter().chain(documents).chain(top) {
        for (number, line) in read(&file).lines().enumerate() {
            problems.extend(
                words
                    .iter()
                    .filter(|w| line.contains(w.as_str()))
                    .map(|w| format!("{file}:{}: {w}", number + 1)),
            );
        }
    }
    none(problems);
}

#[test]
fn documents_name_only_what_exists() {
    const TOPS: [&str; 8] =
        ["compiler/", "passes/", "plugins/", "runtime/", "tests/", "docs/", ".ci/", "benches/"];
    let mut problems = Vec::new();
    let documents = files("docs").into_iter().filter(|f| f.ends_with(".md"));
    for file in documents.chain(["README.md".to_owned()]) {
        for word in read(&file).split('`').skip(1).step_by(2) {
            let is_path = TOPS.iter().any(|t| word.starts_with(t))
                && !word.contains(['*', '<', ' ', '{', '…'])
                && !word.contains("::");
            let exists = root().join(word).exists() || root().join("tests").join(word).exists();
            if is_path && !exists {
                problems.push(format!("{file} names {word}, which does not exist"));
            }
        }
    }
    none(problems);
}
