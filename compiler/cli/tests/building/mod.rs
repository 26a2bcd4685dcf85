//! Builds plugins for the tests, with the cargo that runs them, and runs the command.

#![allow(dead_code, reason = "each test file uses some of it")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, PoisonError};

/// One cargo at a time: they would wait for each other anyway.
static CARGO: Mutex<()> = Mutex::new(());

pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().expect("the repository")
}

/// Folder of build output that these tests belong to, and whether it is that of releases.
pub(crate) fn target() -> (PathBuf, bool) {
    let attar = Path::new(env!("CARGO_BIN_EXE_attar"));
    let profile = attar.parent().expect("a profile's folder");
    (profile.parent().expect("a target folder").to_owned(), profile.ends_with("release"))
}

fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    // What cargo tells the tests is about them, not about what they build.
    for (name, _) in std::env::vars_os() {
        let name_text = name.to_string_lossy().into_owned();
        if name_text.starts_with("CARGO_PKG_")
            || name_text.starts_with("CARGO_BIN_")
            || name_text == "CARGO_MANIFEST_DIR"
        {
            command.env_remove(name);
        }
    }
    command
}

fn done(mut command: Command) {
    let _one = CARGO.lock().unwrap_or_else(PoisonError::into_inner);
    let output = command.output().expect("cargo starts");
    assert!(output.status.success(), "{command:?}: {}", stderr(&output));
}

/// Library file of a crate.
pub(crate) fn library(folder: &Path, package: &str) -> PathBuf {
    folder.join(format!("lib{}.so", package.replace('-', "_")))
}

/// Builds a plugin of this workspace, beside the tests.
pub(crate) fn workspace_plugin(package: &str) -> PathBuf {
    let (target, release) = target();
    let mut command = cargo();
    command.current_dir(root()).args(["build", "--quiet", "--locked", "-p", package]);
    command.arg("--target-dir").arg(&target);
    if release {
        command.arg("--release");
    }
    done(command);
    library(&target.join(if release { "release" } else { "debug" }), package)
}

/// Builds a plugin in a folder of its own; all such share their build output. `toolchain` as rustup calls it.
pub(crate) fn plugin_in(folder: &Path, name: &str, toolchain: Option<&str>) -> PathBuf {
    std::fs::copy(root().join("Cargo.lock"), folder.join("Cargo.lock")).expect("a lock file");
    let output = target().0.join(format!("plugins-{}", toolchain.unwrap_or("same")));
    let mut command = match toolchain {
        None => cargo(),
        Some(toolchain) => {
            let mut command = Command::new("rustup");
            command.args(["run", toolchain, "cargo"]).env_remove("RUSTUP_TOOLCHAIN").env_remove("RUSTC");
            command
        }
    };
    command.current_dir(folder).args(["build", "--quiet", "--release"]).arg("--target-dir").arg(&output);
    done(command);
    // The next plugin of that name would take its place.
    let built = library(&output.join("release"), name);
    let kept = library(folder, name);
    std::fs::copy(built, &kept).expect("the library");
    kept
}

/// Runs the unit tests of a plugin in a folder of its own.
pub(crate) fn test_in(folder: &Path) {
    std::fs::copy(root().join("Cargo.lock"), folder.join("Cargo.lock")).expect("a lock file");
    let mut command = cargo();
    command.current_dir(folder).args(["test", "--quiet", "--release", "--target-dir"]);
    command.arg(target().0.join("plugins-same"));
    done(command);
}

pub(crate) fn tiny(name: &str) -> PathBuf {
    root().join("tests/data/tiny").join(name)
}

pub(crate) fn utf8(path: &Path) -> &str {
    path.to_str().expect("a UTF-8 path")
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

pub(crate) fn attar(folder: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_attar"));
    command.current_dir(folder).args(arguments).output().expect("attar starts")
}

/// Standard output of a command that must succeed.
pub(crate) fn text(folder: &Path, arguments: &[&str]) -> String {
    let output = attar(folder, arguments);
    assert!(output.status.success(), "{arguments:?}: {}", stderr(&output));
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// Runs a command that must fail, and returns its message.
pub(crate) fn failure(folder: &Path, code: i32, arguments: &[&str]) -> String {
    let output = attar(folder, arguments);
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {}", stderr(&output));
    stderr(&output)
}

/// Says that a test cannot run here.
pub(crate) fn skipped(why: &str) {
    let mut err = std::io::stderr();
    let _ = std::io::Write::write_all(&mut err, format!("skipped 1 test: {why}\n").as_bytes());
}

/// Whether a program can be started.
pub(crate) fn has(program: &str, argument: &str) -> bool {
    Command::new(program).arg(argument).output().is_ok_and(|o| o.status.success())
}
