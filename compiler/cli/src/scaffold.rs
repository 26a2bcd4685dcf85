//! `attar plugin new`: a folder with a plugin that builds, passes its test and does something, beside a copy of `attar-plugin`
//! of this version.

use crate::failure::{Failure, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// The files of `attar-plugin`, as this program was built with them.
const SDK: [(&str, &str); 12] = [
    ("include/attar_plugin.h", include_str!("../../../plugins/sdk/include/attar_plugin.h")),
    ("src/abi.rs", include_str!("../../../plugins/sdk/src/abi.rs")),
    ("src/context.rs", include_str!("../../../plugins/sdk/src/context.rs")),
    ("src/decl.rs", include_str!("../../../plugins/sdk/src/decl.rs")),
    ("src/entry.rs", include_str!("../../../plugins/sdk/src/entry.rs")),
    ("src/error.rs", include_str!("../../../plugins/sdk/src/error.rs")),
    ("src/host.rs", include_str!("../../../plugins/sdk/src/host.rs")),
    ("src/lib.rs", include_str!("../../../plugins/sdk/src/lib.rs")),
    ("src/memory_host.rs", include_str!("../../../plugins/sdk/src/memory_host.rs")),
    ("src/options.rs", include_str!("../../../plugins/sdk/src/options.rs")),
    ("src/pass.rs", include_str!("../../../plugins/sdk/src/pass.rs")),
    ("src/remote.rs", include_str!("../../../plugins/sdk/src/remote.rs")),
];
const SDK_MANIFEST: &str = include_str!("../../../plugins/sdk/Cargo.toml");

const MANIFEST: &str = include_str!("scaffold/Cargo.toml.txt");
const LIBRARY: &str = include_str!("scaffold/lib.rs.txt");
const GITIGNORE: &str = "/target\n";

/// Makes the folder `name`.
///
/// # Errors
/// An input failure when the name will not do or the folder exists; those of writing.
pub fn create(name: &str, sdk: Option<&Path>) -> Result<PathBuf> {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let starts = name.bytes().next().is_some_and(|b| b.is_ascii_lowercase());
    if !starts || !name.bytes().all(plain) || name.len() > 64 || name.ends_with('-') {
        return Err(Failure::input(format!(
            "{name:?} is no name for a plugin: use lower-case letters, digits and dashes, a letter first"
        )));
    }
    let folder = PathBuf::from(name);
    if folder.exists() {
        return Err(Failure::input(format!("{name} exists; choose another name, or remove it")));
    }
    let sdk_path = match sdk {
        Some(path) => {
            let path =
                path.canonicalize().map_err(|e| Failure::input(format!("--sdk {}: {e}", path.display())))?;
            path.display().to_string()
        }
        None => "attar-plugin".to_owned(),
    };
    let filled = |text: &str| {
        text.replace("{name}", name).replace("{type}", &camel_case(name)).replace("{sdk}", &sdk_path)
    };
    write(&folder.join("Cargo.toml"), &filled(MANIFEST))?;
    write(&folder.join("src/lib.rs"), &filled(LIBRARY))?;
    write(&folder.join(".gitignore"), GITIGNORE)?;
    if sdk.is_none() {
        let copy = folder.join("attar-plugin");
        // The lints are those of the workspace the crate comes from.
        let manifest = SDK_MANIFEST.split("[lints]").next().unwrap_or(SDK_MANIFEST);
        write(&copy.join("Cargo.toml"), manifest)?;
        for (file, text) in SDK {
            write(&copy.join(file), text)?;
        }
    }
    Ok(folder)
}

/// File name of the library that the plugin becomes.
pub fn library_file(name: &str) -> String {
    let stem = name.replace('-', "_");
    format!("{}{stem}{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX)
}

/// `my-pass` as `MyPass`.
fn camel_case(name: &str) -> String {
    let capital = |word: &str| {
        let mut letters = word.chars();
        letters.next().map(|c| c.to_ascii_uppercase()).into_iter().chain(letters).collect::<String>()
    };
    name.split('-').map(capital).collect()
}

fn write(path: &Path, text: &str) -> Result<()> {
    let fail = |e: std::io::Error| Failure::environment(format!("{}: {e}", path.display()));
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(fail)?;
    }
    fs::write(path, text).map_err(fail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_types_and_files() {
        assert_eq!(camel_case("my-2nd-pass"), "My2ndPass");
        assert!(library_file("my-pass").contains("my_pass"));
        for wrong in ["", "Mine", "a b", "../a", "-a", "a-", "1a"] {
            assert!(create(wrong, None).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_copy_of_the_sdk_is_whole() {
        let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../plugins/sdk");
        let mut found = Vec::new();
        for folder in ["src", "include"] {
            for entry in fs::read_dir(here.join(folder)).expect("the crate").flatten() {
                found.push(format!("{folder}/{}", entry.file_name().to_string_lossy()));
            }
        }
        found.sort();
        let mut copied: Vec<String> = SDK.iter().map(|(file, _)| (*file).to_owned()).collect();
        copied.sort();
        assert_eq!(found, copied);
    }
}
